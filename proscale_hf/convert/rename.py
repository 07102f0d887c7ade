"""The rename table: the names of tensors in the originals' detectron2 checkpoints, and in this package.

A rule is a pair (start of the source name, start of the target name). A `*` stands for a number, which is carried
over, as is the last word of the name (`weight`, `running_mean`, ...). A rule with several targets cuts the source
tensor into equal parts along its first axis, such as query, key and value.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from proscale_hf.convert import ConversionError
from proscale_hf.files.text import printable


class Rule(NamedTuple):
    source: str
    target: str | tuple[str, ...]


def below(source: str, target: str, *rules: Rule) -> tuple[Rule, ...]:
    """The rules, with a prefix put in front of both sides."""

    def prefixed(targets: str | tuple[str, ...]) -> str | tuple[str, ...]:
        return target + targets if isinstance(targets, str) else tuple(target + name for name in targets)

    return tuple(Rule(source + rule.source, prefixed(rule.target)) for rule in rules)


def query_key_value(target: str) -> tuple[str, ...]:
    return tuple(f"{target}{name}_proj." for name in "qkv")


SWIN = (
    Rule("patch_embed.proj.", "swin.embeddings.patch_embeddings.projection."),
    Rule("patch_embed.norm.", "swin.embeddings.norm."),
    *below(
        "layers.*.",
        "swin.encoder.layers.*.",
        Rule("blocks.*.norm1.", "blocks.*.layernorm_before."),
        Rule("blocks.*.attn.", "blocks.*.attention.relative_position_bias."),
        Rule("blocks.*.attn.qkv.", query_key_value("blocks.*.attention.")),
        Rule("blocks.*.attn.proj.", "blocks.*.attention.o_proj."),
        Rule("blocks.*.norm2.", "blocks.*.layernorm_after."),
        Rule("blocks.*.mlp.fc1.", "blocks.*.mlp.fc1."),
        Rule("blocks.*.mlp.fc2.", "blocks.*.mlp.fc2."),
        Rule("downsample.norm.", "downsample.norm."),
        Rule("downsample.reduction.", "downsample.reduction."),
    ),
    *(Rule(f"norm{index}.", f"hidden_states_norms.stage{index + 1}.") for index in range(4)),
)


def _convolution(source: str, target: str) -> tuple[Rule, Rule]:
    """A convolution; in detectron2 it contains its batch norm."""
    return Rule(f"{source}.", f"{target}.convolution."), Rule(f"{source}.norm.", f"{target}.normalization.")


RESNET = (
    *_convolution("stem.conv1", "embedder.embedder"),
    *(
        rule
        for stage in range(4)
        for rule in below(
            f"res{stage + 2}.*.",
            f"encoder.stages.{stage}.layers.*.",
            *_convolution("shortcut", "shortcut"),
            *_convolution("conv1", "layer.0"),
            *_convolution("conv2", "layer.1"),
            *_convolution("conv3", "layer.2"),
        )
    ),
)

PIXEL_DECODER = (
    Rule("input_proj.*.*.", "input_projections.*.*."),
    Rule("transformer.", ""),  # level_embed, the only parameter at this level
    *below(
        "transformer.encoder.layers.*.",
        "encoder.layers.*.",
        Rule("self_attn.sampling_offsets.", "self_attn.sampling_offsets."),
        Rule("self_attn.attention_weights.", "self_attn.attention_weights."),
        Rule("self_attn.value_proj.", "self_attn.value_proj."),
        Rule("self_attn.output_proj.", "self_attn.output_proj."),
        Rule("norm1.", "self_attn_layer_norm."),
        Rule("linear1.", "fc1."),
        Rule("linear2.", "fc2."),
        Rule("norm2.", "final_layer_norm."),
    ),
    Rule("transformer.encoder.token_excite.ops.", "encoder.token_recalibration.projection."),
    Rule("adapter_1.", "adapter_1.0."),
    Rule("adapter_1.norm.", "adapter_1.1."),
    Rule("layer_1.", "layer_1.0."),
    Rule("layer_1.norm.", "layer_1.1."),
    Rule("mask_features.", "mask_projection."),
)

MASK_DECODER = (
    Rule("input_proj.*.", "input_projections.*."),
    Rule("level_embed.", "level_embed."),
    Rule("query_embed.", "queries_embedder."),
    Rule("query_feat.", "queries_features."),
    *below(
        "transformer_self_attention_layers.*.",
        "decoder.layers.*.",
        Rule("self_attn.in_proj_", query_key_value("self_attn.")),
        Rule("self_attn.out_proj.", "self_attn.out_proj."),
        Rule("norm.", "self_attn_layer_norm."),
    ),
    *below(
        "transformer_cross_attention_layers.*.",
        "decoder.layers.*.",
        Rule("multihead_attn.in_proj_", "cross_attn.in_proj_"),
        Rule("multihead_attn.out_proj.", "cross_attn.out_proj."),
        Rule("norm.", "cross_attn_layer_norm."),
    ),
    *below(
        "transformer_ffn_layers.*.",
        "decoder.layers.*.",
        Rule("linear1.", "fc1."),
        Rule("linear2.", "fc2."),
        Rule("norm.", "final_layer_norm."),
    ),
    Rule("decoder_norm.", "decoder.layernorm."),
    Rule("mask_embed.layers.*.", "decoder.mask_predictor.mask_embedder.*.0."),
)

RULES = (
    *below("backbone.", "model.pixel_level_module.encoder.", *SWIN, *RESNET),
    *below("sem_seg_head.pixel_decoder.", "model.pixel_level_module.decoder.", *PIXEL_DECODER),
    *below("sem_seg_head.predictor.", "model.transformer_module.", *MASK_DECODER),
    Rule("sem_seg_head.predictor.class_embed.", "class_predictor."),
)

# Names of earlier releases, as (pattern, replacement), applied in order before the rules.
OLD_NAMES = (
    (r"^sem_seg_head\.(?!predictor\.|pixel_decoder\.)", "sem_seg_head.pixel_decoder."),
    (r"\.static_query\.", ".query_feat."),
)

# Source tensors that follow from the configuration.
DERIVED = re.compile(
    r"criterion\.empty_weight|pixel_(mean|std)|.*\.(relative_position_index|attn_mask|num_batches_tracked)"
)
# Target tensors that no checkpoint has: derived ones, and Swin's last norm, which a Swin backbone never uses.
WITHOUT_SOURCE = re.compile(r"criterion\.empty_weight|.*\.num_batches_tracked|.*\.swin\.layernorm\.[a-z]+")
# The convolutions that read the image: their input channels are the image's.
IMAGE_CONVOLUTION = re.compile(r".*\.(patch_embeddings\.projection|embedder\.embedder\.convolution)\.weight")

WRAPPER = "module."  # what `DistributedDataParallel` puts in front of every name
LISTED = 20  # names in an error message; a checkpoint of another architecture has hundreds of misfits


CompiledRule = tuple[re.Pattern[str], tuple[str, ...]]


def compiled(rules: Iterable[Rule]) -> tuple[CompiledRule, ...]:
    """Rules in the form that `translated` needs."""
    return tuple(map(_compiled, rules))


def _compiled(rule: Rule) -> CompiledRule:
    targets = (rule.target,) if isinstance(rule.target, str) else rule.target
    pattern = re.escape(rule.source).replace(r"\*", r"(\d+)") + "([a-z_]+)"
    return re.compile(pattern), tuple(target.replace("*", "{}") for target in targets)


COMPILED_RULES = compiled(RULES)


def translated(source_name: str, rules: Iterable[CompiledRule]) -> tuple[str, ...]:
    """The names that the first rule that fits gives: none if no rule fits, several if the tensor must be cut."""
    for pattern, targets in rules:
        match = pattern.fullmatch(source_name)
        if match:
            *numbers, last_word = match.groups()
            return tuple(target.format(*numbers) + last_word for target in targets)
    return ()


def target_names(source_name: str) -> tuple[str, ...]:
    """
    Translate a detectron2 name.

    Args:
        source_name: Name in the checkpoint, current or of an earlier release.

    Returns:
        The names in this package: none if no rule fits, several if the tensor must be cut.
    """
    for pattern, replacement in OLD_NAMES:
        source_name = re.sub(pattern, replacement, source_name)
    return translated(source_name, COMPILED_RULES)


def rename_state_dict(source: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """
    Rename a detectron2 state dict, and make sure that it fits the model to the last tensor.

    Args:
        source: Tensors by detectron2 name.
        expected: State dict of the model to fill; a value that no checkpoint has stays as it is.

    Returns:
        A complete state dict of the model. Where the types agree, tensors are views of the source's.

    Raises:
        ConversionError: tensors are unmapped, missing or misshapen; the message names them.
    """
    own = {name: tensor for name, tensor in expected.items() if WITHOUT_SOURCE.fullmatch(name)}
    return own | rename_tensors(without_wrapper(source), expected, target_names, WITHOUT_SOURCE)


def without_wrapper(source: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """A state dict without the prefix that `DistributedDataParallel` puts in front of all names."""
    if all(name.startswith(WRAPPER) for name in source):
        return {name.removeprefix(WRAPPER): tensor for name, tensor in source.items()}
    return source


def rename_tensors(
    source: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    targets_of: Callable[[str], tuple[str, ...]],
    without_source: re.Pattern[str],
) -> dict[str, Tensor]:
    """
    Rename tensors, and make sure that they fit to the last one.

    Args:
        source: Tensors by their names in the checkpoint. Derived ones are left out.
        expected: The tensors to fill.
        targets_of: Translates a source name, as `target_names` does.
        without_source: Matches names in `expected` that need no source.

    Returns:
        Tensors by their names in `expected`, in the types of `expected`.

    Raises:
        ConversionError: tensors are unmapped, missing or misshapen; the message names them.
    """
    state: dict[str, Tensor] = {}
    unmapped, misshapen = [], []
    for source_name, tensor in source.items():
        if DERIVED.fullmatch(source_name):
            continue
        targets = targets_of(source_name)
        if not targets or any(target not in expected or target in state for target in targets):
            unmapped.append(printable(source_name))
            continue
        for target, part in zip(targets, torch.atleast_1d(tensor).tensor_split(len(targets)), strict=True):
            if part.shape == expected[target].shape:
                part = part.to(expected[target].dtype)
            else:
                found, needed = tuple(part.shape), tuple(expected[target].shape)
                misshapen.append(f"{printable(source_name)} -> {target}: {found} found, {needed} needed")
            state[target] = part
    missing = [name for name in expected if name not in state and not without_source.fullmatch(name)]
    problems = (
        ("in the checkpoint, without a place in the model", unmapped),
        ("in the model, without a value in the checkpoint", missing),
        ("of another shape", misshapen),
    )
    if any(names for _, names in problems):
        lists = [f"\n{len(names)} {what}:\n  " + "\n  ".join(_shortened(names)) for what, names in problems if names]
        raise ConversionError("The checkpoint does not fit the configuration." + "".join(lists))
    return state


def _shortened(names: list[str]) -> list[str]:
    return names if len(names) <= LISTED else [*names[:LISTED], f"and {len(names) - LISTED} more"]
