"""The rename table is complete for every published architecture, in both directions."""

import os
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from detectron2_zoo import (
    IMAGE_MODELS,
    Architecture,
    ResNet,
    Swin,
    checkpoint,
    with_old_names,
    write_configuration,
)
from paths import FIXTURES
from proscale_hf import ProScaleMask2FormerConfig, ProScaleMask2FormerForUniversalSegmentation
from proscale_hf.convert import ConversionError
from proscale_hf.convert.detectron2_config import model_settings, read_config
from proscale_hf.convert.rename import rename_state_dict, target_names


PARITY = os.environ.get("PROSCALE_PARITY_DIR")

# The tiny originals that numbers were recorded from.
TINY_RESNET = Architecture(
    backbone=ResNet(50, stem=16, channels=32, bottleneck=8),
    classes=11,
    queries=20,
    encoder_levels=(1, 2, 2, 3, 3),
    recalibration="conv",
    decoder_layers=3,
    channels=32,
    hidden=32,
    feedforward=128,
    heads=4,
)
TINY_SWIN = Architecture(
    backbone=Swin(24, (1, 1, 2, 1), (1, 2, 3, 6)),
    classes=11,
    queries=20,
    encoder_levels=(1, 1, 1, 2, 2, 3),
    recalibration="linear",
    pixel_convolution=False,
    decoder_layers=3,
    channels=64,
    hidden=64,
    feedforward=128,
    heads=4,
)

ARCHITECTURES = {entry.architecture: entry for entry in IMAGE_MODELS}


def model_on(device: str, config_path: Path) -> ProScaleMask2FormerForUniversalSegmentation:
    config = ProScaleMask2FormerConfig(**model_settings(read_config(config_path)))
    with torch.device(device):
        return ProScaleMask2FormerForUniversalSegmentation(config)


def tiny_model() -> ProScaleMask2FormerForUniversalSegmentation:
    return model_on("cpu", FIXTURES / "parity_r50" / "config.yaml")


def shapes(state: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def test_zoo_names_are_those_of_a_recorded_checkpoint():
    recorded = torch.load(FIXTURES / "parity_r50" / "model_final.pth", weights_only=True)["model"]
    assert shapes(checkpoint(TINY_RESNET)) == shapes(recorded)


@pytest.mark.skipif(not PARITY, reason="PROSCALE_PARITY_DIR, the folder of recorded numbers, is not set")
def test_zoo_names_are_those_of_a_recorded_checkpoint_with_swin():
    recorded = torch.load(Path(PARITY or ".") / "swin_proscale_3_2_1" / "model_final.pth", weights_only=True)["model"]
    assert shapes(checkpoint(TINY_SWIN)) == shapes(recorded)


@pytest.mark.parametrize("entry", ARCHITECTURES.values(), ids=[entry.path for entry in ARCHITECTURES.values()])
def test_every_published_architecture(tmp_path, entry):
    """No tensor of the checkpoint is left over, none of the model's is without a value."""
    source = checkpoint(entry.architecture)
    expected = model_on("meta", write_configuration(entry, tmp_path)).state_dict()
    assert shapes(rename_state_dict(source, expected)) == shapes(expected)

    derived = ("relative_position_index", "num_batches_tracked", "empty_weight")
    targets = [target for name in source if not name.endswith(derived) for target in target_names(name)]
    assert len(set(targets)) == len(targets)
    assert set(targets) <= expected.keys()
    backbone = "model.pixel_level_module.encoder."
    assert {
        name.removeprefix(backbone)
        for name in expected.keys() - set(targets)
        if not name.endswith("num_batches_tracked")
    } == {
        "criterion.empty_weight",
        *(("swin.layernorm.weight", "swin.layernorm.bias") if isinstance(entry.architecture.backbone, Swin) else ()),
    }


def test_all_earlier_layouts_and_types_give_the_same():
    source, expected = checkpoint(TINY_RESNET, "cpu"), tiny_model().state_dict()
    reference = rename_state_dict(source, expected)
    assert all(tensor.dtype == expected[name].dtype for name, tensor in reference.items())
    half = {name: tensor.half() for name, tensor in source.items()}
    rounded = rename_state_dict({name: tensor.float() for name, tensor in half.items()}, expected)
    for other, same in (
        (with_old_names(source), reference),
        ({f"module.{name}": tensor for name, tensor in source.items()}, reference),
        (half, rounded),
    ):
        state = rename_state_dict(other, expected)
        assert state.keys() == same.keys()
        for name, tensor in state.items():
            assert tensor.dtype == expected[name].dtype
            assert torch.equal(tensor, same[name]), name


def test_query_key_and_value_are_cut_in_this_order():
    source, expected = checkpoint(TINY_RESNET, "cpu"), tiny_model().state_dict()
    state = rename_state_dict(source, expected)
    name = "sem_seg_head.predictor.transformer_self_attention_layers.1.self_attn.in_proj_weight"
    target = "model.transformer_module.decoder.layers.1.self_attn.{}_proj.weight"
    for part, letter in zip(source[name].split(32), "qkv", strict=True):
        assert torch.equal(state[target.format(letter)], part)


def test_values_of_the_model_stay_where_no_checkpoint_has_any():
    expected = tiny_model().state_dict()
    name = "criterion.empty_weight"
    assert torch.equal(rename_state_dict(checkpoint(TINY_RESNET, "cpu"), expected)[name], expected[name])


def test_a_wrapper_around_some_names_only_is_none():
    source = checkpoint(TINY_RESNET)
    source["module.extra.weight"] = torch.zeros(1)
    with pytest.raises(ConversionError, match=r"without a place in the model:\n  module\.extra\.weight$"):
        rename_state_dict(source, tiny_model().state_dict())


def test_old_and_new_name_of_one_tensor():
    source = checkpoint(TINY_RESNET)
    source["sem_seg_head.predictor.static_query.weight"] = source["sem_seg_head.predictor.query_feat.weight"]
    with pytest.raises(ConversionError, match=r"1 in the checkpoint, .*\n .*\.predictor\.static_query\.weight$"):
        rename_state_dict(source, tiny_model().state_dict())


def test_the_message_about_another_architecture_is_short():
    with pytest.raises(ConversionError) as error:
        rename_state_dict(checkpoint(TINY_SWIN), tiny_model().state_dict())
    lines = str(error.value).splitlines()
    assert lines[0] == "The checkpoint does not fit the configuration."
    assert len(lines) < 70
    assert sum(bool(re.fullmatch(r"  and \d+ more", line)) for line in lines) >= 2
