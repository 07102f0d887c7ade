"""Checks a converted DINO by numbers that were recorded from the original, stage by stage.

A recorded file is a `.safetensors` file with `pixel_values`, the normalised and padded batch, `pixel_padding_mask`,
True where it is padding, and any of the stages below under the original's names and in its order of levels.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from proscale_hf.convert import ConversionError
from proscale_hf.convert.comparison import Comparison, check_shape, one_thread, run_model, shape_text, table_of
from proscale_hf.files.reading import reading
from proscale_hf.models.dino.modeling_proscale_dino import (
    ProScaleDinoForObjectDetection,
    ProScaleDinoForObjectDetectionOutput,
)


def compare_with_recorded(
    model: ProScaleDinoForObjectDetection, expected_path: str | Path, tolerance: float = 1e-4
) -> str:
    """
    Run the model on recorded `pixel_values`, and compare the result of each stage with the recorded one.

    Args:
        model: In evaluation mode.
        expected_path: The `.safetensors` file: `pixel_values` float (batch, channels, height, width),
            `pixel_padding_mask` bool (batch, height, width), and any of `backbone.0`, ..., `encoder.memory` (batch,
            tokens, channels), `two_stage.pred_logits`, `two_stage.pred_boxes`, `decoder.reference_points.0`, ...,
            `decoder.hidden_states.0`, ..., `aux.0.pred_logits`, `aux.0.pred_boxes`, ..., `pred_logits` and
            `pred_boxes`. Other tensors are ignored.
        tolerance: Largest absolute error.

    Returns:
        A table with the error of each stage, in the order of computation.

    Raises:
        ConversionError: the file is damaged or incomplete, or the model departs from it at a stage.
    """
    path = Path(expected_path)
    with reading(path, "is no complete safetensors file", ConversionError):
        recorded = load_file(path)
    for name, ndim in (("pixel_values", 4), ("pixel_padding_mask", 3)):
        if name not in recorded or recorded[name].ndim != ndim:
            raise ConversionError(f"{path} has no {name} of {ndim} dimensions, which the other tensors come from.")
    pixel_mask = (~recorded["pixel_padding_mask"]).long()
    with one_thread():
        output = run_model(
            model,
            recorded["pixel_values"].float(),
            pixel_mask=pixel_mask,
            output_hidden_states=True,
            output_auxiliary_logits=True,
        )
    errors = table_of(_comparisons(_stages(output), recorded, tolerance), path)
    return f"{errors}\n{path}: all agree; largest absolute errors, at most {tolerance:.2g}"


def _stages(output: ProScaleDinoForObjectDetectionOutput) -> dict[str, Tensor]:
    """The model's tensors under the recorded names, in the order of computation."""
    hidden_states, references = output.intermediate_hidden_states, output.intermediate_reference_points
    stages = {
        **{f"backbone.{i}": feature_map for i, feature_map in enumerate(output.backbone_feature_maps)},
        "encoder.memory": output.encoder_last_hidden_state,
        "two_stage.pred_logits": output.enc_topk_logits,
        "two_stage.pred_boxes": output.enc_topk_bboxes,
        **{f"decoder.reference_points.{i}": boxes for i, boxes in enumerate(references.unbind(1))},
        **{f"decoder.hidden_states.{i}": states for i, states in enumerate(hidden_states.unbind(1))},
    }
    for i, prediction in enumerate(output.auxiliary_outputs):
        stages |= {f"aux.{i}.pred_logits": prediction["logits"], f"aux.{i}.pred_boxes": prediction["pred_boxes"]}
    return stages | {"pred_logits": output.logits, "pred_boxes": output.pred_boxes}


def _comparisons(
    computed: Mapping[str, Tensor], recorded: Mapping[str, Tensor], tolerance: float
) -> Iterator[Comparison]:
    names = [name for name in computed if name in recorded]
    if not names:
        raise ConversionError(f"The recorded file has no stage to compare: none of {', '.join(computed)}.")
    for name in names:
        found, expected = computed[name].float().cpu(), recorded[name].float()
        check_shape(name, found, expected)
        if name == "encoder.memory":
            found, expected = _real_tokens(found, expected, recorded)
        yield Comparison(name, tuple(computed[name].shape), (found - expected).abs().max().item(), tolerance)


def _real_tokens(found: Tensor, expected: Tensor, recorded: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Both without the padding, in the original's order of levels: from the finest to the coarsest."""
    shapes, padding = recorded.get("spatial_shapes"), recorded.get("mask_flatten")
    if shapes is None or padding is None or padding.shape != expected.shape[:2]:
        raise ConversionError("encoder.memory cannot be compared without spatial_shapes and mask_flatten.")
    lengths = [height * width for height, width in shapes.tolist()]
    if sum(lengths) != found.shape[1]:
        raise ConversionError(f"spatial_shapes do not fit encoder.memory of {shape_text(expected)}.")
    fine_to_coarse = torch.cat(found.split(lengths[::-1], dim=1)[::-1], dim=1)
    return fine_to_coarse[~padding], expected[~padding]
