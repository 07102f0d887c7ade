"""The demo model's training: its optimizer, its batches, and a run of a few steps whose result can be measured."""

import sys
from functools import partial

import pytest
import torch


pytest.importorskip("skimage")
pytest.importorskip("sklearn")
pytest.importorskip("accelerate")

import evaluate_demo
import pretrain_backbone
import train_demo_model
from transformers import AutoModelForUniversalSegmentation

from demo_scenes import ID2LABEL, STUFF_LABEL_IDS, DemoScenes
from proscale_hf import ProScaleMask2FormerImageProcessorPil


def create_small_model():
    return train_demo_model.ProScaleMask2FormerForUniversalSegmentation(train_demo_model.small_config())


def test_model_is_small_enough_to_ship():
    model = create_small_model()
    size = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    assert size < 10e6


def test_every_parameter_is_optimized_once_and_only_weights_decay():
    model = create_small_model()
    optimizer = train_demo_model.create_optimizer(model, 1e-3, 0.05, backbone_learning_rate_factor=0.1)
    names = {parameter: name for name, parameter in model.named_parameters()}
    settings = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            assert names[parameter] not in settings
            settings[names[parameter]] = group["lr"], group["weight_decay"]
    assert set(settings) == set(names.values())
    assert settings["class_predictor.weight"] == (1e-3, 0.05)
    assert settings["class_predictor.bias"] == (1e-3, 0.0)
    assert settings["model.transformer_module.queries_features.weight"] == (1e-3, 0.0)
    assert settings["model.transformer_module.level_embed.weight"] == (1e-3, 0.0)
    assert settings["model.pixel_level_module.decoder.level_embed"] == (1e-3, 0.0)
    backbone = {value for name, value in settings.items() if name.startswith("model.pixel_level_module.encoder.")}
    assert backbone == {(1e-4, 0.05), (1e-4, 0.0)}


def test_batch_holds_the_scenes_segments():
    scenes = [DemoScenes(2)[index] for index in range(2)]
    batch = train_demo_model.collate_scenes(scenes, train_demo_model.create_image_processor())
    height, width = batch["pixel_values"].shape[-2:]
    assert height % 32 == width % 32 == 0
    for scene, masks, labels in zip(scenes, batch["mask_labels"], batch["class_labels"], strict=True):
        assert masks.shape == (len(scene.segments_info), height, width)
        assert sorted(labels.tolist()) == sorted(scene.instance_id_to_semantic_id.values())
        covered = (masks == 1).sum(dim=0)
        assert covered.max() == 1  # the segments of a scene do not overlap


def test_pixels_are_labelled_and_padding_is_not():
    scenes = [DemoScenes(2)[index] for index in range(2)]
    collate_scenes = partial(train_demo_model.collate_scenes, image_processor=train_demo_model.create_image_processor())
    batch = pretrain_backbone.collate_pixels(scenes, collate_scenes)
    height, width = batch["pixel_values"].shape[-2:]
    assert batch["labels"].shape == (2, height // 4, width // 4)
    is_padding = ~collate_scenes(scenes)["pixel_mask"].bool()[:, 2::4, 2::4]
    assert (batch["labels"] == pretrain_backbone.IGNORED).equal(is_padding)
    for scene, labels in zip(scenes, batch["labels"], strict=True):
        assert set(labels.unique().tolist()) - {pretrain_backbone.IGNORED} == {
            segment["category_id"] for segment in scene.segments_info
        }


def test_pixel_classifier_reaches_the_backbone():
    classifier = pretrain_backbone.PixelClassifier(train_demo_model.small_config().backbone_config)
    loss = classifier(torch.randn(2, 3, 64, 64), torch.randint(13, (2, 16, 16)))["loss"]
    loss.backward()
    assert all(parameter.grad is not None for parameter in classifier.parameters())
    weights = classifier.backbone.state_dict()
    create_small_model().model.pixel_level_module.encoder.load_state_dict(weights)


def test_short_training_writes_a_model_that_loads(tmp_path, monkeypatch):
    options = "--pretraining_scenes 4 --train_scenes 6 --evaluation_scenes 1 --per_device_train_batch_size 2"
    options += " --eval_steps 2 --save_strategy no --dataloader_num_workers 0 --use_cpu --disable_tqdm true"
    monkeypatch.setattr(sys, "argv", ["train_demo_model.py", *options.split(), "--output_dir", str(tmp_path / "model")])
    train_demo_model.main()

    image_processor = ProScaleMask2FormerImageProcessorPil.from_pretrained(tmp_path / "model")
    assert image_processor.label_ids_to_fuse == STUFF_LABEL_IDS
    model, loading = AutoModelForUniversalSegmentation.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not any(loading.values())
    assert model.config.id2label == ID2LABEL
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    quality = evaluate_demo.measure_panoptic_quality(model, image_processor, DemoScenes(2, "held-out"))
    assert quality["All"].keys() == {"pq", "sq", "rq", "n"}


def test_training_learns():
    torch.manual_seed(0)
    model = create_small_model()
    optimizer = train_demo_model.create_optimizer(model, 1e-3, 0.05, backbone_learning_rate_factor=1.0)
    scenes = DemoScenes(2)
    batch = train_demo_model.collate_scenes([scenes[0], scenes[1]], train_demo_model.create_image_processor())
    losses = []
    for _ in range(25):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


@pytest.mark.slow
def test_shipped_model_segments_held_out_scenes():
    model = AutoModelForUniversalSegmentation.from_pretrained(evaluate_demo.SHIPPED_MODEL)
    image_processor = ProScaleMask2FormerImageProcessorPil.from_pretrained(evaluate_demo.SHIPPED_MODEL)
    quality = evaluate_demo.measure_panoptic_quality(model, image_processor, DemoScenes(50, "held-out", seed=2))
    assert quality["All"]["pq"] >= 0.6
    assert quality["All"]["n"] == len(ID2LABEL)


def test_table_shows_percents():
    group = {"pq": 0.5, "sq": 0.8, "rq": 0.625, "n": 13}
    table = evaluate_demo.format_table({"All": group, "Things": group, "Stuff": group})
    assert table.splitlines()[1].split() == ["All", "50.0", "80.0", "62.5", "13"]
