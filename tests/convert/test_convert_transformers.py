"""Models of transformers' Mask2Former, converted: the same numbers, or everything that fits into the other encoder.

Random models are sensitive where a mask's probability is 0.5 to the last bit, and attention is allowed or not. Few
queries and small images keep that away.
"""

import copy
import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessorPil,
    MaskFormerConfig,
    OneFormerConfig,
)

from helpers import TINY_RESNET, TINY_SWIN, labels, pixels
from hub_server import HubServer
from paths import ROOT
from proscale_hf import ProScaleMask2FormerForUniversalSegmentation, ProScaleMask2FormerImageProcessorPil
from proscale_hf.cli.convert import main as convert
from proscale_hf.convert import ConversionError
from proscale_hf.convert.transformers_mask2former import convert_model, grouped
from proscale_hf.data.categories import load_categories
from proscale_hf.layers.deformable_encoder import TokenGrid


main = partial(convert, "transformers-mask2former")
SMALL = {
    "feature_size": 32,
    "mask_feature_size": 16,
    "hidden_dim": 32,
    "num_attention_heads": 4,
    "encoder_feedforward_dim": 48,
    "dim_feedforward": 48,
    "encoder_layers": 6,
    "decoder_layers": 5,
    "num_queries": 7,
    "train_num_points": 64,
    "num_labels": 4,
}
ENCODER = "model.pixel_level_module.decoder.encoder.layers."
PROSCALE = {"encoder": "proscale", "token_recalibration": "linear", "pixel_embedding": "maxpool"}


def transformers_model(backbone: dict, seed: int = 0, **changes) -> Mask2FormerForUniversalSegmentation:
    """In evaluation mode, with weights and batch-norm statistics far enough from their initial values."""
    torch.manual_seed(seed)
    settings = {**SMALL, **changes}
    if "id2label" in settings:
        del settings["num_labels"]
    config = Mask2FormerConfig(backbone_config=AutoConfig.for_model(**backbone), **settings)
    model = Mask2FormerForUniversalSegmentation(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer.add_(0.2 * torch.rand_like(buffer))
    return model.eval()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A Swin model of transformers with its image processor, as (model, folder)."""
    folder = tmp_path_factory.mktemp("source") / "swin"
    model = transformers_model(TINY_SWIN)
    model.save_pretrained(folder)
    Mask2FormerImageProcessorPil(size={"height": 64, "width": 96}, num_labels=4).save_pretrained(folder)
    return model, folder


@pytest.fixture
def copy_of(saved, tmp_path):
    """A copy of the saved folder, to be damaged."""
    return Path(shutil.copytree(saved[1], tmp_path / "copy"))


def change_json(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def assert_same_outputs(ours, theirs) -> None:
    for seed, (height, width) in enumerate(((64, 96), (128, 64), (72, 104))):
        batch = pixels(2, height, width, seed)
        with torch.no_grad():
            found = ours(batch, output_auxiliary_logits=True)
            expected = theirs(batch, output_auxiliary_logits=True)
        predictions = [*zip(found.auxiliary_logits, expected.auxiliary_logits, strict=True), (found, expected)]
        for name in ("class_queries_logits", "masks_queries_logits"):
            for a, b in predictions:
                torch.testing.assert_close(a[name], b[name], rtol=0, atol=1e-5 * b[name].abs().max().item())


# The same model


@pytest.mark.parametrize(
    ("backbone", "changes"),
    [
        (TINY_SWIN, {}),
        (TINY_RESNET, {}),
        (TINY_RESNET, {"encoder_layers": 2, "num_queries": 3, "decoder_layers": 7, "num_labels": 9}),
        (TINY_SWIN, {"pre_norm": True, "activation_function": "gelu", "num_attention_heads": 2}),
    ],
    ids=["swin", "resnet", "other sizes", "pre-norm"],
)
def test_same_logits(backbone, changes, tmp_path):
    theirs = transformers_model(backbone, **changes)
    theirs.save_pretrained(tmp_path / "source")
    assert main(["--model", str(tmp_path / "source"), "--output", str(tmp_path / "converted")]) == 0
    ours = ProScaleMask2FormerForUniversalSegmentation.from_pretrained(tmp_path / "converted").eval()
    assert_same_outputs(ours, theirs)


def test_every_weight_is_taken(saved):
    theirs, folder = saved
    conversion = convert_model(folder)
    expected = theirs.state_dict()
    found = conversion.model.state_dict()
    assert conversion.taken == list(expected)
    assert not conversion.new + conversion.in_part + conversion.left_out
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert not conversion.model.training


def test_padding_counts_as_image_as_in_transformers(saved):
    """transformers takes no notice of `pixel_mask`."""
    theirs, folder = saved
    ours = convert_model(folder).model
    batch = pixels(2, 64, 96)
    mask = torch.ones(2, 64, 96, dtype=torch.int64)
    mask[1, 32:], mask[1, :, 64:] = 0, 0
    with torch.no_grad():
        torch.testing.assert_close(
            ours(batch, pixel_mask=mask).masks_queries_logits,
            theirs(batch, pixel_mask=mask).masks_queries_logits,
            rtol=0,
            atol=1e-4,
        )


def test_half_precision_is_read_as_float32(saved, tmp_path):
    theirs, _ = saved
    half = transformers_model(TINY_SWIN).half()
    half.save_pretrained(tmp_path / "half")
    state = convert_model(tmp_path / "half").model.state_dict()
    for name, tensor in half.state_dict().items():
        assert torch.equal(state[name], tensor.float() if tensor.is_floating_point() else tensor)
    assert theirs.dtype == torch.float32


def test_configuration_is_carried_over(tmp_path):
    values = {
        "no_object_weight": 0.2,
        "class_weight": 3.0,
        "mask_weight": 4.0,
        "dice_weight": 6.0,
        "importance_sample_ratio": 0.5,
        "oversample_ratio": 2.0,
        "use_auxiliary_loss": False,
        "output_auxiliary_logits": True,
        "ignore_value": 254,
        "dropout": 0.1,
        "init_std": 0.03,
        "init_xavier_std": 0.9,
    }
    id2label = {0: "cat", 1: "dog", 2: "lawn"}
    theirs = transformers_model(TINY_RESNET, **values, id2label=id2label, label2id={"cat": 0, "dog": 1, "lawn": 2})
    theirs.save_pretrained(tmp_path)
    conversion = convert_model(tmp_path)
    config = conversion.model.config
    for name, value in {**values, **SMALL, "num_labels": 3, "id2label": id2label}.items():
        assert getattr(config, name) == value, name
    assert config.label2id == theirs.config.label2id
    assert config.categories is None
    backbones = [c.backbone_config.to_dict() | {"dtype": None} for c in (config, theirs.config)]
    assert backbones[0] == backbones[1]
    assert torch.equal(conversion.model.criterion.empty_weight, theirs.criterion.empty_weight)


def test_image_processor_settings_are_carried_over(tmp_path, saved):
    _, folder = saved
    shutil.copytree(folder, tmp_path / "source")
    settings = {
        "size": {"shortest_edge": 480, "longest_edge": 640},
        "image_mean": [0.4, 0.5, 0.6],
        "image_std": [0.1, 0.2, 0.3],
        "rescale_factor": 0.01,
        "do_reduce_labels": True,
        "ignore_index": 254,
        "num_labels": 4,
        "size_divisor": 64,
        "resample": 3,
        "do_resize": False,
    }
    Mask2FormerImageProcessorPil(**settings).save_pretrained(tmp_path / "source")
    assert main(["--model", str(tmp_path / "source"), "--output", str(tmp_path / "converted")]) == 0
    found = ProScaleMask2FormerImageProcessorPil.from_pretrained(tmp_path / "converted").to_dict()
    assert {name: list(found[name]) if "image" in name else found[name] for name in settings} == settings
    assert found["label_ids_to_fuse"] == []


def test_settings_of_early_releases_are_understood(copy_of):
    """As they stand in repositories of 2023."""
    old = {
        "_max_size": 2560,
        "reduce_labels": True,
        "size": {"height": 384, "width": 384},
        "feature_extractor_type": "?",
    }
    (copy_of / "preprocessor_config.json").write_text(json.dumps(old))
    found = convert_model(copy_of).image_processor
    assert (found.size["height"], found.size["width"], found.do_reduce_labels) == (384, 384, True)


def test_missing_image_processor_is_said(copy_of):
    (copy_of / "preprocessor_config.json").unlink()
    conversion = convert_model(copy_of)
    assert any("without image processor settings" in note for note in conversion.notes)
    assert conversion.image_processor.size["shortest_edge"] == 800


def test_impossible_ignore_value_is_said(copy_of):
    change_json(copy_of / "config.json", ignore_value=0)
    conversion = convert_model(copy_of)
    assert conversion.model.config.ignore_value == 255
    assert any("ignore_value 0" in note for note in conversion.notes)


# Labels


def renamed(copy: Path, names: list[str]) -> Path:
    """Give the saved model, made for `len(names)` labels, these names."""
    transformers_model(TINY_RESNET, id2label=dict(enumerate(names))).save_pretrained(copy)
    return copy


@pytest.mark.parametrize("data_set", ["coco_panoptic", "coco_instance", "ade20k_panoptic", "cityscapes"])
def test_known_labels_get_their_categories(data_set, copy_of):
    categories = load_categories(data_set)
    conversion = convert_model(renamed(copy_of, [category["name"] for category in categories]))
    assert conversion.model.config.categories == categories
    stuff = [label for label, category in enumerate(categories) if not category["isthing"]]
    assert conversion.image_processor.label_ids_to_fuse == stuff
    assert any(data_set in note for note in conversion.notes)


def test_known_labels_keep_the_models_spelling(copy_of):
    names = [category["name"] for category in load_categories("ade20k_panoptic")]
    names[7], names[14] = "bed ", "door, double door"  # as published models have them
    config = convert_model(renamed(copy_of, names)).model.config
    assert [config.id2label[7], config.id2label[14]] == ["bed ", "door, double door"]
    assert config.category(7)["isthing"] == 1
    assert config.category(14)["color"] == load_categories("ade20k_panoptic")[14]["color"]


def test_labels_in_another_order_are_not_known(copy_of):
    names = [category["name"] for category in load_categories("cityscapes")]
    conversion = convert_model(renamed(copy_of, names[::-1]))
    assert conversion.model.config.categories is None
    assert conversion.model.config.id2label[0] == names[-1]
    assert any("--labels" in note for note in conversion.notes)


def test_labels_of_a_file(copy_of, tmp_path):
    labels_file = tmp_path / "labels.json"
    names = ["one", "two", "three", "four"]
    categories = [{"id": 10 * i, "name": name, "isthing": i % 2} for i, name in enumerate(names)]
    labels_file.write_text(json.dumps(categories))
    arguments = ["--model", str(copy_of), "--output", str(tmp_path / "converted"), "--labels", str(labels_file)]
    assert main(arguments) == 0
    config = ProScaleMask2FormerForUniversalSegmentation.from_pretrained(tmp_path / "converted").config
    assert config.categories == categories
    assert list(config.id2label.values()) == names
    assert config.label2id["three"] == 2
    processor = ProScaleMask2FormerImageProcessorPil.from_pretrained(tmp_path / "converted")
    assert processor.label_ids_to_fuse == [0, 2]


# With the PRO-SCALE encoder


def proscale(folder, stages=(3, 3, 3), **settings):
    return convert_model(folder, **PROSCALE | {"encoder_stage_layers": stages} | settings)


def test_everything_that_fits_is_taken_over(saved):
    theirs, folder = saved
    source = theirs.state_dict()
    conversion = proscale(folder)
    state = conversion.model.state_dict()
    assert sorted([*conversion.taken, *conversion.in_part, *conversion.new]) == sorted(state)
    for name in conversion.taken:
        assert torch.equal(state[name], source[name]), name
    assert {name for name in state if name in source and state[name].shape == source[name].shape} == {*conversion.taken}
    assert {int(name.removeprefix(ENCODER).split(".")[0]) for name in conversion.new if ENCODER in name} == {6, 7, 8}
    assert [name for name in conversion.new if ENCODER not in name] == [
        "model.pixel_level_module.decoder.encoder.token_recalibration.projection.weight",
        "model.pixel_level_module.decoder.encoder.token_recalibration.projection.bias",
    ]
    assert conversion.left_out == ["model.pixel_level_module.decoder.layer_1.0.weight"]


def test_early_stages_take_what_belongs_to_the_coarser_maps(saved):
    theirs, folder = saved
    conversion = proscale(folder)
    state, source = conversion.model.state_dict(), theirs.state_dict()
    heads, levels, points = 4, 3, 4
    for layer, kept in ((0, 1), (2, 1), (3, 2), (5, 2)):
        name = f"{ENCODER}{layer}.self_attn."
        offsets = source[f"{name}sampling_offsets.bias"].view(heads, levels, points, 2)
        assert torch.equal(state[f"{name}sampling_offsets.bias"].view(heads, kept, points, 2), offsets[:, :kept])
        logits = source[f"{name}attention_weights.weight"].view(heads, levels, points, 32)
        assert torch.equal(state[f"{name}attention_weights.weight"].view(heads, kept, points, 32), logits[:, :kept])
        assert f"{name}sampling_offsets.bias" in conversion.in_part


def test_coarsest_map_alone_gives_what_transformers_gives_for_it(saved):
    """An independent check of the order of levels: with attention logits of -infinity the finer maps are not there."""
    theirs, folder = saved
    theirs = copy.deepcopy(theirs)
    ours = proscale(folder, (1, 1, 1)).model.model.pixel_level_module.decoder.encoder.layers[0].self_attn
    attention = theirs.model.pixel_level_module.decoder.encoder.layers[0].self_attn
    with torch.no_grad():
        attention.attention_weights.bias.view(4, 3, 4)[:, 1:] = -torch.inf
    shapes = [(2, 3), (4, 6), (8, 12)]
    tokens = sum(height * width for height, width in shapes)
    generator = torch.Generator().manual_seed(0)
    hidden_states, positions = torch.randn(2, 1, tokens, 32, generator=generator)
    grid = TokenGrid.of_maps([torch.zeros(1, 1, *shape) for shape in shapes])
    with torch.no_grad():
        found = ours(
            (hidden_states + positions)[:, :6], hidden_states[:, :6], grid.first(1), grid.reference_points[:, :6]
        )
        expected, _ = attention(
            hidden_states=hidden_states,
            encoder_hidden_states=hidden_states,
            position_embeddings=positions,
            reference_points=grid.reference_points.expand(1, tokens, 3, 2),
            spatial_shapes_list=shapes,
            level_start_index=grid.level_start_index,
        )
    torch.testing.assert_close(found, expected[:, :6])


def test_fewer_layers_leave_the_last_ones_out(saved):
    conversion = proscale(saved[1], (1, 2, 1), token_recalibration="none", pixel_embedding="conv")
    assert not conversion.new
    assert {int(name.removeprefix(ENCODER).split(".")[0]) for name in conversion.left_out} == {4, 5}


def test_ready_to_fine_tune(saved):
    """All weights are finite, new ones are initialised as in a new model, and a step lowers the loss."""
    model = proscale(saved[1]).model
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())
    new_layer = model.model.pixel_level_module.decoder.encoder.layers[8]
    assert new_layer.self_attn.attention_weights.weight.eq(0).all()
    ring = new_layer.self_attn.sampling_offsets.bias.view(4, 3, 4, 2)
    torch.testing.assert_close(ring[0, 0, :, 0], torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert 0.05 < new_layer.fc1.weight.std() < 0.5

    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(5):
        torch.manual_seed(0)
        loss = model(pixels(), **labels()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_same_command_gives_the_same_file_and_leaves_the_generator_alone(saved, tmp_path, capsys):
    for seed, name in enumerate(("first", "second")):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        arguments = ["--model", str(saved[1]), "--output", str(tmp_path / name), "--encoder", "proscale"]
        assert main([*arguments, "--encoder-stage-layers", "3,3,3"]) == 0
        assert torch.equal(torch.get_rng_state(), before)
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("first", "second"))
    assert first == second
    config = ProScaleMask2FormerForUniversalSegmentation.from_pretrained(tmp_path / "first").config
    assert (config.encoder, list(config.encoder_stage_layers), config.token_recalibration) == (
        "proscale",
        [3, 3, 3],
        "linear",
    )
    assert (config.pixel_embedding, config.mask_padding) == ("maxpool", True)
    report = capsys.readouterr().out
    assert "encoder.layers.6-8: 48" in report
    assert "token_recalibration.projection: 2" in report
    assert "layer_1.0: 1" in report
    assert "Fine-tune" in report


def test_names_are_grouped():
    names = [f"{ENCODER}{layer}.fc1.{kind}" for layer in (0, 1, 2, 5) for kind in ("weight", "bias")]
    names += [f"{ENCODER}7.fc2.weight", "head.weight", "head.bias", "alone"]
    assert grouped(names) == [
        f"{ENCODER}0-2, 5: 8 (fc1)",
        f"{ENCODER}7: 1 (fc2)",
        "head: 2",
        "alone: 1",
    ]


# With the paper's other encoders


def test_the_layers_of_lite_are_mask2formers(saved, tmp_path, capsys):
    command = ["--model", str(saved[1]), "--output", str(tmp_path / "lite"), "--encoder", "lite"]
    assert main([*command, "--pixel-embedding", "conv"]) == 0
    assert "Fine-tune" in capsys.readouterr().out
    model = ProScaleMask2FormerForUniversalSegmentation.from_pretrained(tmp_path / "lite")
    assert model.config.encoder == "lite"
    source = saved[0].state_dict()
    assert all(torch.equal(tensor, source[name]) for name, tensor in model.state_dict().items())


def test_rt_takes_over_all_but_the_encoder(saved):
    conversion = convert_model(saved[1], encoder="rt", pixel_embedding="maxpool")
    encoder = ENCODER.removesuffix("layers.")
    assert all(name.startswith(encoder) for name in conversion.new)
    assert not any(name.startswith(encoder) for name in conversion.taken)
    assert conversion.model(pixels()).class_queries_logits.isfinite().all()


# What cannot be converted


def refused(model, tmp_path, capsys, *options: str) -> str:
    """Run the command line, and make sure that it fails in one line and leaves nothing behind."""
    output = tmp_path / "outputs" / "converted"
    output.parent.mkdir()
    capsys.readouterr()
    assert main(["--model", str(model), "--output", str(output), *options]) == 1
    assert not list(output.parent.iterdir())
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


@pytest.mark.parametrize("config_class", [MaskFormerConfig, OneFormerConfig])
def test_other_models_are_refused(config_class, copy_of, tmp_path, capsys):
    config_class().save_pretrained(copy_of)
    assert f"model_type is '{config_class.model_type}'" in refused(copy_of, tmp_path, capsys)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", None, "has no config.json"),
        ("config.json", b"{", "not a valid JSON"),
        ("config.json", b"{}", "model_type is None"),
        ("model.safetensors", None, "pickles"),
        ("model.safetensors", b"\x10\0\0\0\0\0\0\0{}", "cannot be loaded"),
        ("preprocessor_config.json", b"[1", "preprocessor_config.json"),
        ("preprocessor_config.json", b'{"size": "large"}', "preprocessor_config.json"),
    ],
)
def test_damaged_folders_are_refused(file, content, message, copy_of, tmp_path, capsys):
    (copy_of / file).unlink() if content is None else (copy_of / file).write_bytes(content)
    assert message in refused(copy_of, tmp_path, capsys)


def test_pickled_weights_are_not_read(copy_of, tmp_path, capsys):
    (copy_of / "model.safetensors").unlink()
    marker = tmp_path / "executed"

    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(marker),)

    torch.save(Payload(), copy_of / "pytorch_model.bin")
    assert "Weights in pickles (.bin) are not read" in refused(copy_of, tmp_path, capsys)
    assert not marker.exists()


def test_code_in_the_folder_is_not_run(copy_of, tmp_path):
    (copy_of / "evil.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'executed')!r})\n")
    auto_map = {"AutoConfig": "evil.Config", "AutoModelForUniversalSegmentation": "evil.Model"}
    change_json(copy_of / "config.json", auto_map=auto_map)
    convert_model(copy_of)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("change", ["missing", "misshapen"])
def test_weights_that_do_not_fit_are_refused(change, copy_of, tmp_path, capsys):
    weights = copy_of / "model.safetensors"
    tensors = load_file(weights)
    if change == "missing":
        del tensors["class_predictor.bias"]
    else:
        tensors["class_predictor.bias"] = torch.zeros(3)
    save_file(tensors, weights, metadata={"format": "pt"})
    assert "1 of the tensors, such as class_predictor.bias" in refused(copy_of, tmp_path, capsys)


def test_parts_that_only_start_anew_are_refused(saved):
    """Outside of the encoder nothing is new: transformers 5.17 loses such projections."""
    with pytest.raises(ConversionError, match=r"6 of the tensors, such as .*input_projections\.0\.bias, are missing"):
        convert_model(saved[1], enforce_input_projection=True)
    with pytest.raises(ConversionError, match=r"input_projections\.0\.bias"):
        proscale(saved[1], enforce_input_projection=True)


def test_tensors_that_transformers_does_not_know_are_listed(copy_of):
    weights = copy_of / "model.safetensors"
    save_file(load_file(weights) | {"extra.weight": torch.ones(2)}, weights, metadata={"format": "pt"})
    assert convert_model(copy_of).left_out == ["extra.weight"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--encoder-stage-layers", "3,3,3"), "needs --encoder proscale."),
        (("--encoder", "lite", "--token-recalibration", "none"), "needs --encoder proscale."),
        (("--pixel-embedding", "conv"), "--pixel-embedding changes the model"),
        (("--encoder", "proscale", "--encoder-stage-layers", "3,3"), "3 numbers of at least 1"),
        (("--encoder", "proscale", "--encoder-stage-layers", "3,0,3"), "3 numbers of at least 1"),
        (("--max-shard-size", "huge"), "shard size"),
        (("--labels", "nowhere.json"), "nowhere.json"),
    ],
)
def test_impossible_options_are_refused(options, message, saved, tmp_path, capsys):
    assert message in refused(saved[1], tmp_path, capsys, *options)


def test_wrong_number_of_labels_is_refused(saved, tmp_path, capsys):
    (tmp_path / "labels.json").write_text('["a", "b"]')
    message = refused(saved[1], tmp_path, capsys, "--labels", str(tmp_path / "labels.json"))
    assert "2 labels are given, but the model has 4" in message


@pytest.mark.parametrize("model", ["nowhere/at/all", "./nowhere", "a file"])
def test_names_that_are_no_model_are_refused(model, saved, tmp_path, capsys):
    if model == "a file":
        assert "is a file" in refused(saved[1] / "config.json", tmp_path, capsys)
    else:
        assert f"There is no folder {model}" in refused(model, tmp_path, capsys)


def test_models_on_the_hub(saved, tmp_path):
    files = {path.name: path.read_bytes() for path in saved[1].iterdir()}
    pickled = {name: content for name, content in files.items() if name != "model.safetensors"}
    torch.save(saved[0].state_dict(), tmp_path / "weights.bin")
    pickled["pytorch_model.bin"] = (tmp_path / "weights.bin").read_bytes()
    script = (
        "import sys; from proscale_hf.cli.convert import main; source = 'transformers-mask2former';"
        "runs = [['--model', name, '--output', sys.argv[1] + name[-1]] for name in sys.argv[2:]];"
        "sys.exit(sum(main(source, run) for run in runs))"
    )
    with HubServer() as hub:
        hub.create("us/model-1", files)
        hub.create("us/model-2", pickled)
        hub.create("us/model-3", {name: files[name] for name in ("config.json", "model.safetensors")})
        names = ["us/model-1", "us/model-2", "us/model-3", "us/model-4"]
        done = subprocess.run(
            [sys.executable, "-c", script, str(tmp_path / "converted"), *names],
            cwd=ROOT,
            env=hub.environment(tmp_path / "home"),
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 2  # of the four
    assert sorted(path.name for path in tmp_path.glob("converted*")) == ["converted1", "converted3"]
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 2
    assert "us/model-2 has no model.safetensors" in errors[0]
    assert "us/model-4 cannot be loaded: the Hub has no such repository" in errors[1]
    assert done.stdout.count("without image processor settings") == 1
    ours = ProScaleMask2FormerForUniversalSegmentation.from_pretrained(tmp_path / "converted1").eval()
    assert_same_outputs(ours, saved[0])


def test_hub_that_cannot_be_asked_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    message = refused("nobody/mask2former-that-is-not-there", tmp_path, capsys)
    assert "nobody/mask2former-that-is-not-there cannot be loaded" in message


def test_existing_output_is_refused_before_any_work(tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    assert main(["--model", "nowhere/at/all", "--output", str(tmp_path)]) == 1
    assert "exists already" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"


def test_runs_as_a_module(saved, tmp_path):
    command = [sys.executable, "-m", "convert.transformers_mask2former", "--model", str(saved[1])]
    done = subprocess.run(
        [*command, "--output", str(tmp_path / "converted")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "Which labels are stuff is not known" in done.stdout
    with pytest.raises(ConversionError):
        convert_model(saved[1], categories=[{"id": 0, "name": "only one"}])
