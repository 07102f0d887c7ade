"""Checks a converted model by numbers: what it finds in a picture, and how far it is from recorded tensors.

A recorded file is a `.safetensors` file with `pixel_values`, the normalised and padded batch, and any of the stages
below. A JSON file of the same name beside it (`expected.json` for `expected.safetensors`) has what the recorded maps
need: sizes, thresholds, and which labels are things and stuff.
"""

import itertools
import json
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from transformers.image_processing_utils import BaseImageProcessor
from transformers.utils import ModelOutput

from proscale_hf.convert import ConversionError
from proscale_hf.convert.comparison import (
    Comparison,
    check_shape,
    one_thread,
    relative_error,
    run_model,
    shape_text,
    table,
    table_of,
)
from proscale_hf.files.reading import read_bytes, reading
from proscale_hf.files.text import one_line
from proscale_hf.models.mask2former.modeling_proscale_mask2former import ProScaleMask2FormerForUniversalSegmentation
from proscale_hf.processing.pictures import load_image
from proscale_hf.processing.postprocessing import instance_segmentation, panoptic_segmentation, semantic_segmentation
from proscale_hf.visualization import Segment, segments_from_label_map, segments_from_result


LONGEST_TABLE = 30  # segments
LONGEST_NAME = 40  # characters
BEST_QUERIES = 5  # shown where no segment passes the thresholds

STAGE = re.compile(
    r"backbone\.res\d+|multi_scale_features\.\d+|mask_features|(aux\.\d+\.)?(class|masks)_queries_logits"
)
MAP = re.compile(r"(panoptic_seg|sem_seg_argmax|instance_masks)_\d+")
LARGEST_FACTS = 2**24  # bytes
NO_LABELS: Mapping[int, int] = MappingProxyType({})
MAP_TOLERANCE = 1e-3  # share of pixels: a pixel at an edge may fall to either side


def report_on_image(
    model: ProScaleMask2FormerForUniversalSegmentation, image_processor: BaseImageProcessor, image_path: str | Path
) -> str:
    """
    Run the model on a picture.

    The task is panoptic segmentation for a model with things and stuff, semantic segmentation where all labels are
    stuff, and instance segmentation where none is.

    Args:
        model: In evaluation mode.
        image_processor: The model's; its `label_ids_to_fuse` are the stuff labels.
        image_path: An image file.

    Returns:
        Sizes, time, and a table of the segments; a table of the best scores if no segment passed the thresholds.

    Raises:
        ConversionError: the picture cannot be read, does not fit into memory, or gives NaN or infinity.
    """
    try:
        image = load_image(image_path)
        inputs = image_processor(images=[image], return_tensors="pt")
    except ValueError as error:
        raise ConversionError(str(error)) from error
    start = time.perf_counter()
    output = run_model(model, **inputs)
    seconds = time.perf_counter() - start
    for name in ("class_queries_logits", "masks_queries_logits"):
        broken = (~output[name].isfinite()).float().mean().item()
        if broken:
            raise ConversionError(f"The model is broken: {broken:.1%} of {name} are NaN or infinity for {image_path}.")
    task, segments = _segments(model, image_processor, output, image)
    height, width = inputs["pixel_values"].shape[-2:]
    lines = [
        f"{image_path}: {image.width} x {image.height}, input of the model {width} x {height} (width x height), "
        f"forward {seconds:.2f} s on {model.device}, all logits finite",
        f"{task} segmentation: {len(segments) or 'no'} segments",
        _segment_table(segments, image.width * image.height) if segments else _best_queries(model, output),
    ]
    return "\n".join(lines)


def compare_with_recorded(
    model: ProScaleMask2FormerForUniversalSegmentation,
    image_processor: BaseImageProcessor,
    expected_path: str | Path,
    tolerance: float = 1e-4,
) -> str:
    """
    Run the model on recorded `pixel_values`, and compare the result of each stage with the recorded one.

    Args:
        model: In evaluation mode.
        image_processor: The model's. It is checked, too, if the file has the pictures `image_0`, ..., uint8 (height,
            width, 3).
        expected_path: The `.safetensors` file: `pixel_values` float (batch, channels, height, width), and any of
            `backbone.res2`, ..., `multi_scale_features.0`, ... (coarse to fine), `mask_features`,
            `aux.0.class_queries_logits`, `aux.0.masks_queries_logits`, ..., `class_queries_logits`,
            `masks_queries_logits`; and for image i `panoptic_seg_i`, `sem_seg_argmax_i` and `instance_*_i`. Other
            tensors are ignored.
        tolerance: Largest absolute error, relative to the largest absolute value in the recorded tensor. Maps may
            differ in one pixel of a thousand.

    Returns:
        A table with the error of each stage, in the order of computation.

    Raises:
        ConversionError: a stage departs, and the message names the first one; or the file cannot be used.
    """
    path = Path(expected_path)
    recorded = _read_recorded(path)
    facts = _read_facts(path.with_suffix(".json"))
    pixel_values = recorded["pixel_values"].float()
    auxiliary = any(name.startswith("aux.") for name in recorded)
    has_maps = any(MAP.fullmatch(name) for name in recorded)
    with one_thread():
        output = run_model(model, pixel_values, output_hidden_states=True, output_auxiliary_logits=auxiliary)

    comparisons = itertools.chain(
        _compare_images(image_processor, recorded, tolerance),
        _compare_stages(_stages(output), recorded, tolerance),
        _compare_maps(output, recorded, facts, path) if facts and has_maps else (),
    )
    errors = table_of(comparisons, path)
    lines = [errors, f"{path}: all agree; error relative to each tensor's maximum, at most {tolerance:.2g}"]
    if has_maps and not facts:
        lines.append(f"segmentation maps not compared: there is no {path.with_suffix('.json').name} with their sizes")
    return "\n".join(lines)


def _segments(
    model: ProScaleMask2FormerForUniversalSegmentation,
    image_processor: BaseImageProcessor,
    output: ModelOutput,
    image: Image.Image,
) -> tuple[str, list[Segment]]:
    """The task that fits the labels, and the segments that it finds."""
    names, stuff = model.config.id2label, set(image_processor.label_ids_to_fuse)
    sizes = {"target_sizes": [(image.height, image.width)]}
    if stuff >= set(names):
        [label_map] = image_processor.post_process_semantic_segmentation(output, **sizes)
        return "semantic", segments_from_label_map(label_map, names, stuff)
    if stuff:
        [result] = image_processor.post_process_panoptic_segmentation(output, **sizes)
        return "panoptic", segments_from_result(result, names, stuff)
    [result] = image_processor.post_process_instance_segmentation(output, return_binary_maps=True, **sizes)
    return "instance", segments_from_result(result, names)


def _segment_table(segments: Sequence[Segment], pixels: int) -> str:
    rows = [
        (
            segment.label[:LONGEST_NAME],
            "thing" if segment.is_thing else "stuff",
            "" if segment.score is None else f"{segment.score:.2f}",
            f"{segment.area / pixels:.1%}",
        )
        for segment in segments[:LONGEST_TABLE]
    ]
    more = f"\nand {len(segments) - LONGEST_TABLE} more" if len(segments) > LONGEST_TABLE else ""
    return table(("label", "kind", "score", "area"), rows) + more


def _best_queries(model: ProScaleMask2FormerForUniversalSegmentation, output: ModelOutput) -> str:
    """A table of the queries with the highest scores."""
    [probabilities] = output.class_queries_logits.float().softmax(-1)[:, :, :-1]
    scores, labels = probabilities.max(-1)
    best = scores.topk(min(BEST_QUERIES, len(scores))).indices.tolist()
    rows = [(model.config.id2label[labels[q].item()][:LONGEST_NAME], f"{scores[q]:.2g}", str(q)) for q in best]
    return "nothing passed the thresholds; the most confident queries were\n" + table(("label", "score", "query"), rows)


def _read_recorded(path: Path) -> dict[str, Tensor]:
    with reading(path, "is no complete safetensors file", ConversionError):
        recorded = load_file(path)
    pixel_values = recorded.get("pixel_values")
    if pixel_values is None:
        raise ConversionError(f"{path} has no pixel_values, which are the input of the other tensors.")
    if pixel_values.ndim != 4 or not pixel_values.is_floating_point() or not pixel_values.numel():
        raise ConversionError(
            f"pixel_values of {path} must be floating-point numbers (batch, channels, height, width), but are "
            f"{pixel_values.dtype} of shape {shape_text(pixel_values)}."
        )
    if not any(STAGE.fullmatch(name) for name in recorded):
        raise ConversionError(
            f"{path} has no stage to compare: none of backbone.res2, ..., multi_scale_features.0, ..., mask_features, "
            "class_queries_logits, masks_queries_logits."
        )
    return recorded


def _read_facts(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    with reading(path, "is no valid JSON", ConversionError):
        return json.loads(read_bytes(path, LARGEST_FACTS))


def _stages(output: ModelOutput) -> dict[str, Tensor]:
    """The model's tensors under the recorded names, in the order of computation."""
    predictions = {
        f"aux.{index}.{name}": logits
        for index, prediction in enumerate(output.auxiliary_logits or ())
        for name, logits in prediction.items()
    }
    return {
        **{f"backbone.res{i + 2}": feature_map for i, feature_map in enumerate(output.encoder_hidden_states)},
        **{f"multi_scale_features.{i}": m for i, m in enumerate(output.pixel_decoder_hidden_states)},
        "mask_features": output.pixel_decoder_last_hidden_state,
        **predictions,
        "class_queries_logits": output.class_queries_logits,
        "masks_queries_logits": output.masks_queries_logits,
    }


def _compare_images(
    image_processor: BaseImageProcessor, recorded: Mapping[str, Tensor], tolerance: float
) -> Iterator[Comparison]:
    """Compare normalisation and padding, but not of pictures that were resized before they were recorded as pixels."""
    expected = recorded["pixel_values"]
    images = [recorded[f"image_{i}"].numpy() for i in range(len(expected)) if f"image_{i}" in recorded]
    if len(images) != len(expected):
        return
    try:
        inputs = image_processor(images=images, do_resize=False, input_data_format="channels_last", return_tensors="pt")
    except ValueError as error:
        raise ConversionError(f"The recorded image_0, ... are no pictures: {one_line(error)}.") from error
    if inputs["pixel_values"].shape == expected.shape:
        yield Comparison("pixel_values", expected.shape, relative_error(inputs["pixel_values"], expected), tolerance)


def _compare_stages(
    computed: Mapping[str, Tensor], recorded: Mapping[str, Tensor], tolerance: float
) -> Iterator[Comparison]:
    for name, tensor in computed.items():
        if name in recorded:
            check_shape(name, tensor, recorded[name])
            yield Comparison(name, tensor.shape, relative_error(tensor, recorded[name]), tolerance)
    unknown = [name for name in recorded if STAGE.fullmatch(name) and name not in computed]
    if unknown:
        raise ConversionError(f"The recorded model has {unknown[0]}, and the converted one has no such stage.")


def _compare_maps(
    output: ModelOutput, recorded: Mapping[str, Tensor], facts: Mapping[str, Any], path: Path
) -> Iterator[Comparison]:
    """Compare panoptic, semantic and instance results at the target sizes; the error is a share of pixels."""
    try:
        images = facts["images"]
        logits = output.class_queries_logits.cpu(), output.masks_queries_logits.cpu()
        sizes = {
            "padded_size": tuple(recorded["pixel_values"].shape[-2:]),
            "image_sizes": [image["size"] for image in images],
            "target_sizes": [image["target_size"] for image in images],
        }
        segments = panoptic_segmentation(
            *logits,
            **sizes,
            label_ids_to_fuse=facts["stuff_classes"],
            object_mask_threshold=facts["object_mask_threshold"],
            overlap_threshold=facts["overlap_threshold"],
        )
        label_maps = semantic_segmentation(*logits, **sizes)
        instances = instance_segmentation(*logits, **sizes, thing_label_ids=facts["thing_classes"])
        for i, image in enumerate(images):
            if f"panoptic_seg_{i}" in recorded:
                found = {segment["id"]: segment["label_id"] for segment in segments[i]["segments_info"]}
                expected = {segment["id"]: segment["category_id"] for segment in image["segments_info"]}
                yield _compare_ids(f"panoptic_seg_{i}", segments[i]["segmentation"], recorded, found, expected)
            if f"sem_seg_argmax_{i}" in recorded:
                yield _compare_ids(f"sem_seg_argmax_{i}", label_maps[i], recorded)
            if f"instance_masks_{i}" in recorded:
                yield from _compare_instances(i, instances[i], recorded)
    except ConversionError:
        raise
    except Exception as error:  # whatever a wrong value leads to
        raise ConversionError(
            f"The maps of {path} cannot be compared: {path.with_suffix('.json').name} must have sizes, thresholds and "
            f"labels for them ({type(error).__name__}: {one_line(error)})."
        ) from error


def _compare_ids(
    name: str,
    found_map: Tensor,
    recorded: Mapping[str, Tensor],
    found_labels: Mapping[int, int] = NO_LABELS,
    expected_labels: Mapping[int, int] = NO_LABELS,
) -> Comparison:
    """The share of pixels with another id, or of a segment with another label."""
    check_shape(name, found_map, recorded[name])
    expected_map = recorded[name].long()
    differs = found_map.cpu() != expected_map
    for segment_id in found_labels.keys() | expected_labels.keys():
        if found_labels.get(segment_id) != expected_labels.get(segment_id):
            differs |= expected_map == segment_id
    return Comparison(name, found_map.shape, differs.float().mean().item(), MAP_TOLERANCE)


def _compare_instances(index: int, found: Mapping[str, Tensor], recorded: Mapping[str, Tensor]) -> Iterator[Comparison]:
    """Compare each recorded instance with the model's nearest in score, of its class; the model may have more."""
    scores, labels, masks = (recorded[f"instance_{name}_{index}"] for name in ("scores", "classes", "masks"))
    score_error, mask_error = 0.0, 0.0
    for score, label, mask in zip(scores, labels, masks, strict=True):
        candidates = (found["labels"] == label).nonzero().flatten()
        if not len(candidates):
            score_error = mask_error = 1.0
            break
        distances = (found["scores"][candidates] - score).abs()
        nearest = candidates[distances.argmin()]
        check_shape(f"instance_masks_{index}", found["masks"][nearest], mask)
        score_error = max(score_error, distances.min().item())
        mask_error = max(mask_error, (found["masks"][nearest] != mask.bool()).float().mean().item())
    yield Comparison(f"instance_scores_{index}", scores.shape, score_error, MAP_TOLERANCE)
    yield Comparison(f"instance_masks_{index}", masks.shape, mask_error, MAP_TOLERANCE)
