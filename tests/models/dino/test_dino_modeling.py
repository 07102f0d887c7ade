"""The detection model as a whole: the contracts of a Transformers model, and what this one promises beyond them."""

import copy

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForObjectDetection

from helpers import TINY_RESNET, TINY_SWIN, detection_labels, pixels, tiny_detection_config, tiny_detector
from proscale_hf import ProScaleDinoConfig, ProScaleDinoForObjectDetection, ProScaleDinoModel
from proscale_hf.models.dino.heads import ClassHead


ENCODERS = ProScaleDinoConfig.encoders
FIVE_LEVELS = {
    "backbone_config": TINY_RESNET,
    "feature_strides": (4, 8, 16, 32),
    "num_feature_levels": 5,
    "encoder_stage_layers": (1, 1, 1, 1, 1),
    "encoder": "dino",
}
SWIN = {"backbone_config": {**TINY_SWIN, "out_features": ["stage2", "stage3", "stage4"]}}
VARIANTS = [
    *({"encoder": encoder} for encoder in ENCODERS),
    FIVE_LEVELS,
    {**SWIN, "token_recalibration": "conv", "stage_residual": True},
    {"num_feature_levels": 6, "encoder_stage_layers": (1,) * 6, "feature_size": 96},  # several levels of one token
]


def mixed_batch() -> tuple[torch.Tensor, torch.Tensor, list[tuple[int, int]]]:
    """Three images of different sizes, none of which is a multiple of a stride."""
    sizes = [(70, 123), (70, 61), (49, 90)]
    pixel_values, pixel_mask = torch.zeros(3, 3, 70, 123), torch.zeros(3, 70, 123, dtype=torch.int64)
    for i, (height, width) in enumerate(sizes):
        pixel_values[i, :, :height, :width] = pixels(1, height, width, seed=i)[0]
        pixel_mask[i, :height, :width] = 1
    return pixel_values, pixel_mask, sizes


def results_of(model: nn.Module, *args, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        output = model(*args, **kwargs)
    return output.logits, output.pred_boxes


# -- shapes and outputs


@pytest.mark.parametrize("changes", VARIANTS)
def test_shapes_and_gradients(changes):
    """With objects in one image, and in none: several processes would wait for a gradient that does not come."""
    model = tiny_detector(**changes).train()
    for objects in ((3, 0), (0, 0)):
        model.zero_grad()
        output = model(pixels(height=128, width=192), labels=detection_labels(objects))
        assert output.logits.shape == (2, 9, 4) and output.pred_boxes.shape == (2, 9, 4)
        output.loss.backward()
        assert output.loss.isfinite() and output.loss.ndim == 0
        assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    terms = {"loss_ce", "loss_bbox", "loss_giou"}
    suffixes = {"", "_0", "_1", "_interm", "_dn", "_dn_0", "_dn_1"}
    assert set(output.loss_dict) == {term + suffix for term in terms for suffix in suffixes}


def test_all_outputs():
    model = tiny_detector()
    asked = {"output_hidden_states": True, "output_attentions": True, "output_auxiliary_logits": True}
    with torch.no_grad():
        output = model(pixels(), labels=detection_labels(), **asked)
        plain = model(pixels())
        as_tuple = model(pixels(), return_dict=False)
    assert list(output.keys())[:4] == ["loss", "loss_dict", "logits", "pred_boxes"]
    assert not any("dn" in name for name in output.loss_dict)  # no denoising in evaluation
    assert [m.shape[-2:] for m in output.backbone_feature_maps] == [(8, 12), (4, 6), (2, 3)]
    assert output.encoder_last_hidden_state.shape == (2, 96 + 24 + 6 + 2, 64)
    assert output.intermediate_reference_points.shape == (2, 3, 9, 4)
    assert len(output.decoder_hidden_states) == 4
    for weights in output.decoder_attentions:
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 9))
    assert [set(prediction) for prediction in output.auxiliary_outputs] == [{"logits", "pred_boxes"}] * 2
    torch.testing.assert_close(output.logits, plain.logits)
    for a, b in zip(plain.to_tuple(), as_tuple, strict=True):
        torch.testing.assert_close(a, b)
    assert plain.auxiliary_outputs is None and plain.decoder_attentions is None and plain.loss is None


def test_the_loss_is_the_weighted_sum_of_its_terms():
    model = tiny_detector(
        class_loss_coefficient=3.0,
        bbox_loss_coefficient=7.0,
        giou_loss_coefficient=11.0,
        two_stage_loss_coefficient=0.5,
    ).train()
    output = model(pixels(), labels=detection_labels())
    weights = {"loss_ce": 3.0, "loss_bbox": 7.0, "loss_giou": 11.0}
    expected = sum(
        weights["_".join(name.split("_")[:2])] * (0.5 if "interm" in name else 1) * value
        for name, value in output.loss_dict.items()
    )
    torch.testing.assert_close(output.loss, expected)


def test_without_auxiliary_loss_and_denoising():
    model = tiny_detector(auxiliary_loss=False, num_denoising=0).train()
    output = model(pixels(), labels=detection_labels())
    assert len(output.loss_dict) == 6 and model.model.denoising is None
    output.loss.backward()
    assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]


def test_predictions_for_objects_do_not_depend_on_denoising():
    model = tiny_detector().train()
    results = [model(pixels(), labels=given)["pred_boxes"] for given in (detection_labels(), None)]
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


def test_loss_falls_when_trained():
    torch.manual_seed(0)
    model = ProScaleDinoForObjectDetection(tiny_detection_config()).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(30):
        loss = model(pixels(), labels=detection_labels()).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(use_reentrant):
    plain = tiny_detector().double().train()
    checkpointed = copy.deepcopy(plain)
    enable = getattr(checkpointed, "activation_checkpointing_enable", checkpointed.gradient_checkpointing_enable)
    enable({"use_reentrant": use_reentrant})
    assert checkpointed.is_gradient_checkpointing
    images = pixels().double().requires_grad_()
    for model in (plain, checkpointed):
        torch.manual_seed(0)
        model(images, labels=detection_labels()).loss.backward()
    for (name, a), (_, b) in zip(plain.named_parameters(), checkpointed.named_parameters(), strict=True):
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, msg=name)


def test_the_stem_and_the_first_stage_of_a_resnet_are_frozen(tmp_path):
    tiny_detector().save_pretrained(tmp_path)
    for model in (tiny_detector(), ProScaleDinoForObjectDetection.from_pretrained(tmp_path)):
        frozen = {name.split("backbone.")[1] for name, p in model.train().named_parameters() if not p.requires_grad}
        convolutions = {name for name in frozen if "convolution" in name}
        assert convolutions and all(name.startswith(("embedder.", "encoder.stages.0.")) for name in convolutions)
        assert sum(name.startswith("encoder.stages.0.") for name in convolutions) == 3  # of a bottleneck
    trained = tiny_detector(freeze_backbone_stem=False).train().model.pixel_encoder.backbone
    assert trained.embedder.embedder.convolution.weight.requires_grad


# -- padding


@pytest.mark.parametrize("num_queries", [9, 1000])
@pytest.mark.parametrize("changes", VARIANTS[:4])
def test_an_image_does_not_depend_on_its_batch_mates(changes, num_queries):
    """Not even if it has fewer tokens than there are queries, and another has more."""
    model = tiny_detector(**changes, num_queries=num_queries)
    pixel_values, pixel_mask, sizes = mixed_batch()
    together = results_of(model, pixel_values, pixel_mask)
    for i, (height, width) in enumerate(sizes):
        alone = results_of(model, pixel_values[i : i + 1, :, :height, :width])
        queries = alone[0].shape[1]
        assert num_queries == 9 or i == 0 or queries < together[0].shape[1]
        torch.testing.assert_close(together[0][i, :queries], alone[0][0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(together[1][i, :queries], alone[1][0], rtol=1e-4, atol=1e-5)
        assert (together[0][i, queries:].sigmoid() < 1e-6).all()  # queries that the image does not have find nothing


def test_what_the_padding_holds_has_no_effect_on_the_loss():
    model = tiny_detector(num_queries=150).train()
    pixel_values, pixel_mask, _ = mixed_batch()
    noise = torch.where(pixel_mask[:, None] == 1, pixel_values, pixels(3, 70, 123, seed=5))
    losses = []
    for given in (pixel_values, noise):
        torch.manual_seed(0)
        losses.append(model(given, pixel_mask, detection_labels((2, 2, 2))).loss)
    torch.testing.assert_close(*losses)


def test_padding_as_in_the_original_is_masked_in_attention():
    """An image that fills the batch is as if it were alone; the others pass the backbone with their padding."""
    model = tiny_detector(batch_padding="original")
    pixel_values, pixel_mask, sizes = mixed_batch()
    together = results_of(model, pixel_values, pixel_mask)
    for i, (height, width) in enumerate(sizes):
        alone = results_of(model, pixel_values[i : i + 1, :, :height, :width])
        difference = (together[1][i] - alone[1][0]).abs().max()
        assert difference < 1e-5 if i == 0 else difference > 1e-4
    without = results_of(model, pixel_values)
    assert (without[1] - together[1])[1:].abs().max() > 1e-3


def test_an_empty_pixel_mask_gives_finite_numbers():
    for padding in ("per_image", "original"):
        model = tiny_detector(batch_padding=padding)
        assert all(result.isfinite().all() for result in results_of(model, pixels(), torch.zeros(2, 64, 96)))


# -- types, attention implementations, compilation


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_weights(dtype):
    reference = tiny_detector()
    model = copy.deepcopy(reference).to(dtype).train()
    output = model(pixels(), labels=detection_labels())
    assert output.logits.dtype == dtype and output.pred_boxes.dtype == torch.float32
    assert output.loss.isfinite()
    change = results_of(model.eval(), pixels())[1] - results_of(reference, pixels())[1]
    assert change.abs().median() < 0.02  # the order of tokens may change


def test_autocast_trains():
    model = tiny_detector().train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(pixels(), labels=detection_labels())
    output.loss.backward()
    assert output.loss.dtype == output.pred_boxes.dtype == torch.float32 and output.loss.isfinite()


def test_sdpa_equals_eager():
    model = tiny_detector(num_queries=150, **SWIN).train()  # transformers' ResNet knows no attention at all
    pixel_values, pixel_mask, _ = mixed_batch()
    results = []
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        torch.manual_seed(0)
        results.append(model(pixel_values, pixel_mask, detection_labels((2, 0, 1))).loss)
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_compiles_without_a_graph_break_and_exports():
    """The encoders' own parts are compiled in the tests of segmentation."""
    model = tiny_detector(decoder_layers=2)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for given in ({}, {"pixel_mask": torch.ones(2, 64, 96, dtype=torch.int64)}):
        exported = torch.export.export(model, (pixels(),), given, strict=False).module()
        expected = results_of(model, pixels(), **given)
        for other in (compiled, exported):
            for a, b in zip(expected, results_of(other, pixels(), **given), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


# -- weights: initial values, saving, loading


def test_initial_values():
    torch.manual_seed(0)
    model = ProScaleDinoForObjectDetection(tiny_detection_config())
    heads = [module for module in model.modules() if isinstance(module, ClassHead)]
    assert len(heads) == 2
    for head in heads:
        torch.testing.assert_close(head.bias.sigmoid(), torch.full((4,), 0.01))
    for head in (model.model.decoder.box_head, model.model.query_selection.box_head):
        assert not head[-1].weight.any() and not head[-1].bias.any() and head[0].weight.any()
    content = model.model.query_selection.content.weight
    assert abs(content.std() - (2 / (9 + 64)) ** 0.5) < 0.02
    assert model.model.pixel_encoder.feature_levels.level_embed.std() > 0.7
    assert abs(model.model.denoising.label_embedding.weight.std() - 1) < 0.2
    projection = model.model.pixel_encoder.feature_levels.input_projections[1][0]
    assert 0.8 < projection.weight.abs().max() / (6 / (32 + 64)) ** 0.5 <= 1


@pytest.mark.parametrize("changes", [VARIANTS[0], FIVE_LEVELS])
def test_saved_and_loaded_is_the_same(tmp_path, changes):
    model = tiny_detector(**changes)
    model.save_pretrained(tmp_path)
    loaded, report = ProScaleDinoForObjectDetection.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    for a, b in zip(results_of(model, pixels()), results_of(loaded, pixels()), strict=True):
        assert torch.equal(a, b)


def test_other_classes_and_fewer_queries_resize_what_depends_on_them(tmp_path):
    tiny_detector().save_pretrained(tmp_path)
    model = ProScaleDinoForObjectDetection.from_pretrained(
        tmp_path, id2label={0: "cat", 1: "dog"}, num_queries=5, ignore_mismatched_sizes=True
    ).train()
    output = model(pixels(), labels=detection_labels(num_labels=2))
    output.loss.backward()
    assert output.logits.shape == (2, 5, 2) and model.model.denoising.label_embedding.weight.shape[0] == 2


def test_auto_classes(tmp_path):
    model = tiny_detector()
    model.save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is ProScaleDinoConfig
    assert type(AutoModel.from_pretrained(tmp_path)) is ProScaleDinoModel
    assert type(AutoModelForObjectDetection.from_pretrained(tmp_path)) is ProScaleDinoForObjectDetection
    card = (tmp_path / "README.md").read_text()
    assert "pipeline_tag: object-detection" in card and "DINO with PRO-SCALE (1, 1, 2, 1)" in card
    assert "segmentation" not in card.partition("## Citation")[0]


# -- wrong input

BOX = {"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.2]])}


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([BOX], "one entry per image: got 1 for 2 images"),
        ([BOX, {"boxes": BOX["boxes"]}], r"Image 1: `labels` must have `class_labels` and `boxes`, got \['boxes'\]"),
        ([BOX, {**BOX, "class_labels": torch.tensor([1.0])}], "Image 1: `class_labels` must be integers"),
        ([{**BOX, "boxes": torch.zeros(2, 4)}, BOX], r"Image 0: `boxes` must be \(1, 4\)"),
        ([BOX, {**BOX, "class_labels": torch.tensor([4])}], "Image 1, box 0: `class_labels` holds 4.*classes 0 to 3"),
        ([BOX, {**BOX, "class_labels": torch.tensor([-1])}], "Image 1, box 0: `class_labels` holds -1"),
        ([BOX, {**BOX, "boxes": torch.tensor([[50.0, 60.0, 20.0, 10.0]])}], r"Image 1, box 0: .*\(50, 60, 20, 10\)"),
        ([{**BOX, "boxes": torch.tensor([[0.5, 0.5, -0.1, 0.1]])}, BOX], "Image 0, box 0: .*shares of the image"),
        ([{**BOX, "boxes": torch.tensor([[0.5, float("nan"), 0.1, 0.1]])}, BOX], "Image 0, box 0: .*nan"),
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_wrong_labels_are_refused(labels, message, training):
    with pytest.raises(ValueError, match=message) as error:
        tiny_detector().train(training)(pixels(), labels=labels)
    assert "\n" not in str(error.value)
