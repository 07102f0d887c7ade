"""The converter of DINO's checkpoints: settings, names, order of levels, and what it refuses."""

import argparse
import json
import pathlib
import re

import pytest
import torch

from helpers import TINY_RESNET, TINY_SWIN, pixels, tiny_detector
from proscale_hf import ProScaleDinoForObjectDetection
from proscale_hf.cli.convert import main
from proscale_hf.convert import ConversionError
from proscale_hf.convert.dino import convert_checkpoint, label_settings
from proscale_hf.convert.dino_config import read_settings
from proscale_hf.convert.dino_names import RULES, coarse_to_fine
from proscale_hf.data.categories import load_categories


# As a training writes them; the sizes are those of `tiny_detector`.
SETTINGS = {
    "modelname": "dino",
    "backbone": "resnet50",
    "hidden_dim": 64,
    "nheads": 4,
    "enc_layers": 2,
    "dec_layers": 3,
    "num_queries": 9,
    "num_feature_levels": 4,
    "return_interm_indices": [1, 2, 3],
    "dim_feedforward": 48,
    "enc_n_points": 4,
    "dec_n_points": 4,
    "pe_temperatureH": 20,
    "pe_temperatureW": 20,
    "dn_number": 6,
    "dn_box_noise_scale": 0.4,
    "interm_loss_coef": 0.5,
    "decoder_module_seq": ["sa", "ca", "ffn"],
    "two_stage_type": "standard",
    "device": "cuda",
}
ORIGINAL = {"encoder": "dino", "batch_padding": "original"}
FIVE_SCALES = {
    "backbone_config": TINY_RESNET,
    "feature_strides": (4, 8, 16, 32),
    "num_feature_levels": 5,
    "encoder_stage_layers": (1,) * 5,
}
SWIN = {"backbone_config": {**TINY_SWIN, "out_features": ["stage2", "stage3", "stage4"]}}


def in_the_original(model) -> dict[str, torch.Tensor]:
    """A model's weights by the original's names, with its copies and its order of levels."""
    patterns = []
    for source, targets in RULES:
        targets = (targets,) if isinstance(targets, str) else targets
        for part, target in enumerate(targets):
            pattern = re.compile(re.escape(target).replace(r"\*", r"(\d+)") + "([a-z_]+)")
            patterns.append((pattern, source.replace("*", "{}") + "{}", part))
    parts: dict[str, dict[int, torch.Tensor]] = {}
    for name, tensor in model.state_dict().items():
        for pattern, source, part in patterns:
            if (match := pattern.fullmatch(name)) and not name.endswith("num_batches_tracked"):
                parts.setdefault(source.format(*match.groups()), {})[part] = tensor
                break
    state = {name: torch.cat([tensors[part] for part in sorted(tensors)]) for name, tensors in parts.items()}
    state = coarse_to_fine(state, model.config.num_feature_levels, model.config.num_attention_heads)  # its own inverse
    state["label_enc.weight"] = torch.cat((state["label_enc.weight"], torch.randn(1, 64)))
    for name in list(state):
        if name.startswith(("class_embed.0.", "bbox_embed.0.")):
            head, _, rest = name.split(".", 2)
            for layer in range(model.config.decoder_layers):
                state[f"{head}.{layer}.{rest}"] = state[f"transformer.decoder.{head}.{layer}.{rest}"] = state[name]
    return state


def save(path, model, settings=SETTINGS, **more):
    args = {"args": argparse.Namespace(**settings)} if settings is not None else {}
    torch.save({"model": in_the_original(model), "epoch": 11, **args, **more}, path)
    return path


@pytest.mark.parametrize(
    ("changes", "settings"),
    [
        ({}, {}),
        (FIVE_SCALES, {"num_feature_levels": 5, "return_interm_indices": [0, 1, 2, 3]}),
        (SWIN, {"backbone": "swin_L_384_22k"}),
    ],
    ids=["r50", "five scales", "swin"],
)
def test_a_converted_model_is_the_one_that_was_trained(tmp_path, changes, settings):
    model = tiny_detector(**ORIGINAL, **changes)
    converted, processor = convert_checkpoint(save(tmp_path / "model.pth", model, {**SETTINGS, **settings}))
    with torch.no_grad():
        expected, found = model(pixels()), converted(pixels())
    assert torch.equal(found.logits, expected.logits) and torch.equal(found.pred_boxes, expected.pred_boxes)
    for name, value in model.state_dict().items():
        if not name.endswith("num_batches_tracked") and ".swin.layernorm." not in name:
            assert torch.equal(converted.state_dict()[name], value), name
    config = converted.config
    assert (config.encoder, config.batch_padding, config.num_labels) == ("dino", "original", 4)
    assert (config.num_denoising, config.box_noise_scale, config.two_stage_loss_coefficient) == (6, 0.4, 0.5)
    assert config.weights_license is None and processor.size_divisor == 1


def test_averaged_weights_are_taken_and_wrappers_taken_off(tmp_path):
    model, other = tiny_detector(**ORIGINAL), tiny_detector(seed=1, **ORIGINAL)
    averaged = {f"module.{name}": tensor.half() for name, tensor in in_the_original(other).items()}
    converted, _ = convert_checkpoint(save(tmp_path / "model.pth", model, ema_model=averaged))
    weight = converted.class_head.weight
    assert weight.dtype == torch.float32
    torch.testing.assert_close(weight, other.class_head.weight, atol=1e-3, rtol=1e-3)


def test_settings_come_from_a_file_if_the_checkpoint_has_none(tmp_path):
    checkpoint = save(tmp_path / "model.pth", tiny_detector(**ORIGINAL), settings=None)
    with pytest.raises(ConversionError, match=r"has no settings \(args\); give the training's with --config"):
        convert_checkpoint(checkpoint)
    (tmp_path / "config.json").write_text(json.dumps(SETTINGS))
    base = {name: SETTINGS[name] for name in list(SETTINGS)[:8]}
    (tmp_path / "base.py").write_text("\n".join(f"{name} = {value!r}  # words" for name, value in base.items()))
    rest = {name: value for name, value in SETTINGS.items() if name not in base}
    lines = ["_base_ = ['base.py']", "num_queries = 9", *(f"{name} = {value!r}" for name, value in rest.items())]
    (tmp_path / "config.py").write_text("\n".join(lines))
    configs = [convert_checkpoint(checkpoint, tmp_path / name)[0].config for name in ("config.json", "config.py")]
    assert configs[0].to_dict() == configs[1].to_dict()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import os", None),
        ("hidden_dim = os.system('true')", "is no configuration of DINO: malformed"),
        ("hidden_dim = ", "is no configuration of DINO"),
        ("_base_ = '../other.py'", "`_base_` in another folder, or on itself"),
        ("_base_ = 'config.py'", "`_base_` in another folder, or on itself"),
    ],
)
def test_a_configuration_is_read_and_not_run(tmp_path, text, message):
    (tmp_path / "config.py").write_text(text)
    if message is None:
        assert read_settings(tmp_path / "config.py") == {}
        return
    with pytest.raises(ConversionError, match=message) as error:
        read_settings(tmp_path / "config.py")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"enc_scale": 3}, "This is a Lite-DETR checkpoint"),
        ({"two_stage_type": "no"}, "two_stage_type is 'no', but only 'standard' can be converted"),
        ({"decoder_module_seq": ["ca", "sa", "ffn"]}, "decoder_module_seq is .*, but only .* can be converted"),
        ({"dec_pred_bbox_embed_share": False}, "dec_pred_bbox_embed_share is False"),
        ({"pe_temperatureW": 10}, "pe_temperatureH and pe_temperatureW differ"),
        ({"hidden_dim": "wide"}, "hidden_dim is 'wide', but must be of type int"),
        ({"hidden_dim": 100}, "describes no possible model: `feature_size`"),
        ({"return_interm_indices": [3, 1]}, "return_interm_indices is .*in order"),
        ({"enc_layers": 3}, "does not fit the configuration"),
    ],
)
def test_what_has_no_equivalent_is_refused(tmp_path, settings, message):
    checkpoint = save(tmp_path / "model.pth", tiny_detector(**ORIGINAL), {**SETTINGS, **settings})
    with pytest.raises(ConversionError, match=message):
        convert_checkpoint(checkpoint)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("transformer.decoder.bbox_embed.1.layers.0.weight", "is not the same as in the other decoder layers"),
        ("transformer.encoder.layers.0.self_attn.query_proj.weight", "This is a Lite-DETR checkpoint"),
        ("backbone.0.patch_embed.proj.weight", "without a place in the model"),
    ],
)
def test_tensors_that_do_not_belong_are_refused(tmp_path, name, message):
    state = in_the_original(tiny_detector(**ORIGINAL))
    state[name] = state.get(name, torch.zeros(64, 64)) + 1
    torch.save({"model": state, "args": argparse.Namespace(**SETTINGS)}, tmp_path / "model.pth")
    with pytest.raises(ConversionError, match=message):
        convert_checkpoint(tmp_path / "model.pth")


def test_no_other_object_is_read(tmp_path):
    """Settings are a dictionary; what else a pickle may name is refused, in the settings too."""
    for value in (pathlib.PurePosixPath("x"), slice(1)):
        torch.save({"model": {"x": torch.zeros(1)}, "args": argparse.Namespace(x=value)}, tmp_path / "model.pth")
        with pytest.raises(ConversionError, match="is refused: reading it would call"):
            convert_checkpoint(tmp_path / "model.pth")


def test_labels_of_coco_are_its_ids():
    names = label_settings(91, None)["id2label"]
    things = {category["id"]: category["name"] for category in load_categories("coco_instance")}
    assert len(names) == 91 and names[1] == "person" and names[90] == "toothbrush" and names[0] == names[12] == "N/A"
    assert {label: name for label, name in names.items() if name != "N/A"} == things
    assert label_settings(5, None) == {"num_labels": 5}


def test_command(tmp_path, capsys):
    model = tiny_detector(**ORIGINAL)
    checkpoint = save(tmp_path / "model.pth", model)
    (tmp_path / "labels.json").write_text(json.dumps(["cat", "dog", "cow", "hen"]))
    options = ["--checkpoint", str(checkpoint), "--output", str(tmp_path / "out")]
    assert main("dino", [*options, "--labels", str(tmp_path / "labels.json")]) == 0
    assert "resnet backbone, dino encoder, 4 scales, 4 labels" in capsys.readouterr().out
    loaded = ProScaleDinoForObjectDetection.from_pretrained(tmp_path / "out")
    assert loaded.config.id2label[2] == "cow"
    with torch.no_grad():
        assert torch.equal(loaded(pixels()).logits, model(pixels()).logits)
    (tmp_path / "labels.json").write_text(json.dumps(["cat"]))
    other = ["--checkpoint", str(checkpoint), "--output", str(tmp_path / "other")]
    assert main("dino", [*other, "--labels", str(tmp_path / "labels.json")]) == 1
    assert "1 labels are given, but the checkpoint has 4" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()
