"""The names of tensors in the original DINO's checkpoints, what is stored twice there, and the order of its levels."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from proscale_hf.convert import ConversionError
from proscale_hf.convert.rename import SWIN, Rule, below, compiled, query_key_value, rename_tensors, translated


def _head(source: str, target: str, layers: int) -> tuple[Rule, ...]:
    """Linear layers with an activation between each two."""
    return tuple(Rule(f"{source}.layers.{i}.", f"{target}.{2 * i}.") for i in range(layers))


def _convolution(source: str, norm: str, target: str) -> tuple[Rule, Rule]:
    return Rule(f"{source}.", f"{target}.convolution."), Rule(f"{norm}.", f"{target}.normalization.")


RESNET = (
    *_convolution("conv1", "bn1", "embedder.embedder"),
    *(
        rule
        for stage in range(4)
        for rule in below(
            f"layer{stage + 1}.*.",
            f"encoder.stages.{stage}.layers.*.",
            *_convolution("downsample.0", "downsample.1", "shortcut"),
            *(rule for i in range(3) for rule in _convolution(f"conv{i + 1}", f"bn{i + 1}", f"layer.{i}")),
        )
    ),
)

DEFORMABLE_ATTENTION = (
    Rule("sampling_offsets.", "sampling_offsets."),
    Rule("attention_weights.", "attention_weights."),
    Rule("value_proj.", "value_proj."),
    Rule("output_proj.", "output_proj."),
)

ENCODER_LAYER = (
    *below("self_attn.", "self_attn.", *DEFORMABLE_ATTENTION),
    Rule("norm1.", "self_attn_layer_norm."),
    Rule("linear1.", "fc1."),
    Rule("linear2.", "fc2."),
    Rule("norm2.", "final_layer_norm."),
)

DECODER_LAYER = (
    *below("cross_attn.", "cross_attn.", *DEFORMABLE_ATTENTION),
    Rule("norm1.", "cross_attn_layer_norm."),
    Rule("self_attn.in_proj_", query_key_value("self_attn.")),
    Rule("self_attn.out_proj.", "self_attn.out_proj."),
    Rule("norm2.", "self_attn_layer_norm."),
    Rule("linear1.", "fc1."),
    Rule("linear2.", "fc2."),
    Rule("norm3.", "final_layer_norm."),
)

RULES = (
    *below("backbone.0.body.", "model.pixel_encoder.backbone.", *RESNET),
    *below("backbone.0.", "model.pixel_encoder.backbone.", *SWIN),
    Rule("input_proj.*.*.", "model.pixel_encoder.feature_levels.input_projections.*.*."),
    Rule("label_enc.", "model.denoising.label_embedding."),
    Rule("class_embed.0.", "class_head."),
    *_head("bbox_embed.0", "model.decoder.box_head", 3),
    *below(
        "transformer.",
        "model.",
        Rule("", "pixel_encoder.feature_levels."),  # level_embed, the only parameter at this level
        *below("encoder.layers.*.", "pixel_encoder.encoder.layers.*.", *ENCODER_LAYER),
        *below("decoder.layers.*.", "decoder.layers.*.", *DECODER_LAYER),
        Rule("decoder.norm.", "decoder.layernorm."),
        *_head("decoder.ref_point_head", "decoder.position_head", 2),
        Rule("tgt_embed.", "query_selection.content."),
        Rule("enc_output.", "query_selection.token_projection."),
        Rule("enc_output_norm.", "query_selection.token_norm."),
        Rule("enc_out_class_embed.", "query_selection.class_head."),
        *_head("enc_out_bbox_embed", "query_selection.box_head", 3),
    ),
)
COMPILED_RULES = compiled(RULES)
WITHOUT_SOURCE = re.compile(r".*\.num_batches_tracked|.*\.swin\.layernorm\.[a-z]+")
SHARED_HEAD = re.compile(r"(?:transformer\.decoder\.)?(bbox_embed|class_embed)\.\d+\.(.*)")
INPUT_PROJECTION = re.compile(r"input_proj\.(\d+)\.(.*)")
DEFORMABLE = re.compile(r"transformer\.(?:en|de)coder\..*\.(sampling_offsets|attention_weights)\.[a-z]+")


def target_names(source_name: str) -> tuple[str, ...]:
    """The names in this package of a tensor that is stored once, with levels in this package's order."""
    return translated(source_name, COMPILED_RULES)


def rename_state_dict(
    source: Mapping[str, Tensor], expected: Mapping[str, Tensor], levels: int, heads: int
) -> dict[str, Tensor]:
    """
    Rename a state dict of the original, and make sure that it fits the model to the last tensor.

    Args:
        source: Tensors by the original's names.
        expected: State dict of the model to fill; a value that no checkpoint has stays as it is.
        levels: How many maps there are.
        heads: Attention heads.

    Returns:
        A complete state dict of the model.

    Raises:
        ConversionError: copies of a head differ, or tensors are unmapped, missing or misshapen; the message names them.
    """
    once = coarse_to_fine(without_copies(source), levels, heads)
    labels = expected.get("model.denoising.label_embedding.weight")
    if labels is None:
        once.pop("label_enc.weight", None)
    elif "label_enc.weight" in once:  # has rows for classes that were never used
        once["label_enc.weight"] = once["label_enc.weight"][: len(labels)]
    own = {name: tensor for name, tensor in expected.items() if WITHOUT_SOURCE.fullmatch(name)}
    return own | rename_tensors(once, expected, target_names, WITHOUT_SOURCE)


def without_copies(source: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """
    The heads of all decoder layers are one, which is stored for each layer, in two places.

    Raises:
        ConversionError: they are not one.
    """
    once: dict[str, Tensor] = {}
    for name, tensor in source.items():
        copy = SHARED_HEAD.fullmatch(name)
        first = f"{copy[1]}.0.{copy[2]}" if copy else name
        if first in once and not torch.equal(once[first], tensor):
            raise ConversionError(
                f"{name} is not the same as in the other decoder layers. A model whose layers have heads of their own "
                "(dec_pred_bbox_embed_share or dec_pred_class_embed_share False) cannot be converted."
            )
        once[first] = tensor
    return once


def coarse_to_fine(source: Mapping[str, Tensor], levels: int, heads: int) -> dict[str, Tensor]:
    """The original counts levels from the finest to the coarsest, and this package from the coarsest to the finest."""
    flipped = {}
    for name, tensor in source.items():
        projection = INPUT_PROJECTION.fullmatch(name)
        if projection and int(projection[1]) < levels:
            name = f"input_proj.{levels - 1 - int(projection[1])}.{projection[2]}"
        elif name == "transformer.level_embed":
            tensor = tensor.flip(0)
        elif DEFORMABLE.fullmatch(name) and len(tensor) % (heads * levels) == 0:
            tensor = tensor.unflatten(0, (heads, levels, -1)).flip(1).flatten(0, 2)
        flipped[name] = tensor
    return flipped
