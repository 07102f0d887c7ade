"""Reads ImageNet backbones, each with its publisher's names, as a start for training the whole model.

The publisher's names are first rewritten as detectron2's, and then by the rename table. Only names change. Publishers
also differ in the order of the image's channels and in the place of the strides; `check_training_conditions` makes
sure that the configuration agrees with the weights in these.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from proscale_hf.convert import ConversionError
from proscale_hf.convert.detectron2_config import Detectron2Config
from proscale_hf.convert.rename import rename_tensors, target_names, without_wrapper


BACKBONE = "model.pixel_level_module.encoder."


class Publisher(NamedTuple):
    """
    One kind of checkpoint.

    Attributes:
        title: Its name in a message.
        mark: Name of a tensor that only this kind of checkpoint has.
        ignored: Pattern of names that are no part of the backbone.
        rewritten: (pattern, replacement) pairs. Applied in order, they make detectron2's names.
        conditions: Entries of the configuration that the weights need, since they were trained with them.
    """

    title: str
    mark: str
    ignored: str
    rewritten: tuple[tuple[str, str], ...]
    conditions: Mapping[str, Any]


PUBLISHERS = (
    Publisher(
        title="MSRA's ResNet under Caffe2's names",
        mark="res2_0_branch2a_w",
        # A convolution before a batch norm has no use for a bias; detectron2 leaves it out, too.
        ignored=r"fc1000_.*|.*_momentum|(conv1|.*_branch\w\w?)_b",
        rewritten=(
            (r"_w$", ".weight"),
            (r"_bn_s$", ".norm.weight"),
            (r"_bn_b$", ".norm.bias"),
            (r"_bn_rm$", ".norm.running_mean"),
            (r"_bn_riv$", ".norm.running_var"),
            (r"^(res_)?conv1\.", "stem.conv1."),
            (r"^res(\d)_(\d+)_", r"res\1.\2."),
            (r"\.branch1\.", ".shortcut."),
            *((rf"\.branch2{letter}\.", f".conv{number}.") for number, letter in enumerate("abc", start=1)),
        ),
        conditions={
            "INPUT.FORMAT": "BGR",
            "MODEL.PIXEL_STD": (1.0, 1.0, 1.0),
            "MODEL.RESNETS.STRIDE_IN_1X1": True,
        },
    ),
    Publisher(
        title="a ResNet under detectron2's names",
        mark="res2.0.conv1.weight",
        ignored=r"(stem\.)?(fc|linear)\..*",
        rewritten=(),
        conditions={},  # the names say nothing about it
    ),
    Publisher(
        title="torchvision's ResNet",
        mark="layer1.0.conv1.weight",
        ignored=r"fc\..*",
        rewritten=(
            (r"^(conv1|bn1)\.", r"stem.\1."),
            *((rf"^layer{stage}\.", f"res{stage + 1}.") for stage in (1, 2, 3, 4)),
            (r"\.bn(\d)\.", r".conv\1.norm."),
            (r"\.downsample\.0\.", ".shortcut."),
            (r"\.downsample\.1\.", ".shortcut.norm."),
        ),
        conditions={"INPUT.FORMAT": "RGB", "MODEL.RESNETS.STRIDE_IN_1X1": False},
    ),
    Publisher(
        title="a Swin Transformer",
        mark="patch_embed.proj.weight",
        ignored=r"(norm|head)\..*",
        rewritten=(),
        conditions={"INPUT.FORMAT": "RGB"},
    ),
    Publisher(
        title="MoBY's self-supervised Swin Transformer",
        mark="encoder.patch_embed.proj.weight",
        ignored=r"encoder\.norm\..*|(?!encoder\.).*",  # the momentum encoder, the heads and the queues
        rewritten=((r"^encoder\.", ""),),
        conditions={"INPUT.FORMAT": "RGB"},
    ),
)

# Tensors that no classifier has: Swin's norms of the four outputs, and its last norm, which a backbone never uses.
WITHOUT_SOURCE = re.compile(r".*\.(hidden_states_norms\.\w+|swin\.layernorm)\.\w+|.*\.num_batches_tracked")


def rename_backbone(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """
    Rename an ImageNet checkpoint, and make sure that it fills the model's backbone.

    Args:
        state: Tensors by name, as one of `PUBLISHERS` has them.
        expected: State dict of the model.

    Returns:
        The backbone's part of the model's state dict (`model.pixel_level_module.encoder.*`), without the norms of
        Swin's four outputs, which no classifier has. The image's channels are in the checkpoint's order, which
        `check_training_conditions` compares with the configuration's.

    Raises:
        ConversionError: the checkpoint is no known ImageNet backbone, or tensors are unmapped, missing or misshapen;
            the message names them.
    """
    state = without_wrapper(state)
    publisher = publisher_of(state)
    backbone = {name: tensor for name, tensor in expected.items() if name.startswith(BACKBONE)}

    def targets_of(name: str) -> tuple[str, ...]:
        for pattern, replacement in publisher.rewritten:
            name = re.sub(pattern, replacement, name)
        return target_names(f"backbone.{name}")

    if not all(target in backbone for target in targets_of(publisher.mark)):
        raise ConversionError(f"The checkpoint is {publisher.title}; the configuration has another backbone.")
    used = {name: tensor for name, tensor in state.items() if not re.fullmatch(publisher.ignored, name)}
    return rename_tensors(_with_statistics(used), backbone, targets_of, WITHOUT_SOURCE)


def check_training_conditions(state: Mapping[str, Tensor], config: Detectron2Config) -> None:
    """
    Make sure that the configuration has the channel order and the strides that a backbone was trained with.

    Args:
        state: Tensors by name, as for `rename_backbone`.
        config: The configuration of the model to build.

    Raises:
        ConversionError: the checkpoint is no known ImageNet backbone, or the weights need another value of an entry;
            the message says which value.
    """
    publisher = publisher_of(without_wrapper(state))
    wrong = [name for name, value in publisher.conditions.items() if config[name] != value]
    if wrong:
        needed = ", ".join(f"{name} {publisher.conditions[name]}" for name in wrong)
        raise ConversionError(f"The checkpoint is {publisher.title}: the configuration must have {needed}.")


def publisher_of(state: Mapping[str, Tensor]) -> Publisher:
    """The kind of a checkpoint; raises `ConversionError` if it is none of `PUBLISHERS`."""
    for publisher in PUBLISHERS:
        if publisher.mark in state:
            return publisher
    titles = ", ".join(publisher.title for publisher in PUBLISHERS)
    raise ConversionError(f"The checkpoint is no known ImageNet backbone; known are: {titles}.")


def _with_statistics(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """MSRA's batch norms hold scale and shift, with the statistics worked in: mean 0 and variance 1 complete them."""
    completed = dict(state)
    for name, scale in state.items():
        if name.endswith("_bn_s"):
            completed.setdefault(f"{name[:-1]}rm", torch.zeros(()).expand_as(scale))
            completed.setdefault(f"{name[:-1]}riv", torch.ones(()).expand_as(scale))
    return completed
