"""`proscale segment PHOTO`: from a photo to an overlay that a person can read, and JSON if asked for."""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from proscale_hf.cli.command_line import Subcommand
from proscale_hf.cli.console import CommandError, progress, user_errors
from proscale_hf.cli.device import add_device_options, place_model
from proscale_hf.cli.loading import load_model
from proscale_hf.cli.numbers import positive
from proscale_hf.evaluation.agreement import TASKS


LONGEST_TABLE = 30  # rows
LONGEST_NAME = 40  # characters


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the subcommand's arguments."""
    parser.add_argument("photo", metavar="PHOTO", help="an image file")
    parser.add_argument(
        "--model",
        metavar="DIR-OR-HUB-ID",
        help="a folder, a Hub id or a short name such as proscale-swin-t-coco (default: the small demo model that "
        "comes with the package; it knows handwritten digits on brick, grass and gravel)",
    )
    parser.add_argument("--task", choices=TASKS, default="panoptic", help="default: %(default)s")
    parser.add_argument(
        "--top-k",
        type=positive,
        metavar="N",
        help="with --task instance: the best ones, at most this many (default: the model's own number, or as many as "
        "it has queries, but at least 100)",
    )
    parser.add_argument(
        "--output", metavar="FILE", help="the picture to write (default: PHOTO_segmented.png in this folder)"
    )
    parser.add_argument(
        "--json",
        metavar="FILE",
        help="also write class, the data set's id of it, score, area, box and mask (COCO's encoding) of each segment",
    )
    add_device_options(parser)


def run(options: argparse.Namespace) -> None:
    """Segments the photo, and writes the picture, and JSON if asked for."""
    from proscale_hf.files.whole import write_whole
    from proscale_hf.processing.pictures import load_image, save_image
    from proscale_hf.visualization import draw_segments

    output = checked_output(options, "segmented")
    with user_errors():
        image = load_image(options.photo)
    with progress("loading the model"):
        model, processor = load_model(options.model)
        place_model(model, options)
    with progress("segmenting"), user_errors():
        segments = segment_image(image, model, processor, options.task, options.top_k)
    categories = {segment.label_id: model.config.category(segment.label_id) or {} for segment in segments}
    colors = {label_id: tuple(category["color"]) for label_id, category in categories.items() if "color" in category}
    with progress("drawing"), user_errors():
        save_image(draw_segments(image, segments, colors), output)
    if options.json is not None:
        with progress("writing the segments"), user_errors():
            size = {"height": image.height, "width": image.width}
            header = {"task": options.task, "model": options.model or "demo", **size}
            content = to_json(header, describe_segments(segments, categories, **size))
            write_whole(options.json, lambda file: file.write(content.encode()))
    print_table(segments, image.width * image.height)
    print(f"wrote {output}" + (f" and {options.json}" if options.json else ""))


def checked_output(options: argparse.Namespace, suffix: str) -> Path:
    """The picture to write, PHOTO_SUFFIX.png by default; raises `CommandError` if it or --json cannot be written."""
    from proscale_hf.files.whole import check_writable
    from proscale_hf.processing.pictures import check_picture_name

    output = Path(options.output or f"{Path(options.photo).stem}_{suffix}.png")
    targets = [output] if options.json is None else [output, Path(options.json)]
    with user_errors(exit_code=2):
        check_picture_name(output)
        for target in targets:
            check_writable(target)
    if len({path.resolve() for path in (Path(options.photo), *targets)}) <= len(targets):
        raise CommandError("PHOTO, --output and --json name the same file; give each its own", exit_code=2)
    return output


def run_model(image: Any, model: Any, processor: Any) -> Any:
    """The model's outputs for one PIL image; raises `CommandError` if memory does not suffice."""
    import torch

    from proscale_hf.files.text import one_line

    try:
        inputs = processor(images=[image], return_tensors="pt").to(model.device)
        with torch.inference_mode():
            return model(**inputs)
    except (RuntimeError, MemoryError) as error:  # torch says so when memory does not suffice
        size = f"{image.width} x {image.height}"
        raise CommandError(f"the model failed on this {size} image: {one_line(error)[:200]}") from error


def segment_image(image: Any, model: Any, processor: Any, task: str, top_k: int | None = None) -> list[Any]:
    """Runs the model on one image.

    Args:
        image: PIL image, RGB.
        model: the segmentation model.
        processor: its image processor.
        task: one of `TASKS`.
        top_k: of the task "instance": how many instances at most; None: as the image processor says.

    Returns:
        The segments found, as `visualization.Segment`.
    """
    from proscale_hf.processing.postprocessing import COCO_DETECTIONS
    from proscale_hf.visualization import segments_from_label_map, segments_from_result

    outputs = run_model(image, model, processor)
    sizes = {"target_sizes": [(image.height, image.width)]}
    names, stuff = model.config.id2label, set(model.config.stuff_label_ids(processor.label_ids_to_fuse))
    if task == "semantic":
        return segments_from_label_map(processor.post_process_semantic_segmentation(outputs, **sizes)[0], names, stuff)
    options = {"label_ids_to_fuse": stuff, **sizes}
    if task == "instance":
        if top_k is not None:  # what post-processing takes is pairs of query and label, before it drops stuff
            usual = processor.top_k or max(outputs.class_queries_logits.shape[1], COCO_DETECTIONS)
            options["top_k"] = max(top_k, usual)
        [result] = processor.post_process_instance_segmentation(outputs, return_binary_maps=True, **options)
        result = {name: values[:top_k] for name, values in result.items()}
    else:
        [result] = processor.post_process_panoptic_segmentation(outputs, **options)
    return segments_from_result(result, names, stuff)


def describe_segments(
    segments: list[Any], categories: Mapping[int, Mapping[str, Any]], height: int, width: int
) -> list[dict[str, Any]]:
    """What the JSON file says of each segment.

    Args:
        segments: what was found.
        categories: what the model's configuration knows of each label found, nothing or a data set's category.
        height: of the image, in pixels.
        width: of the image, in pixels.

    Returns:
        Plain values. "category_id" is the data set's own id of the class, None where it is not known. "bbox" is COCO's
        [left, top, width, height] in pixels, "segmentation" COCO's run-length encoding: compressed where pycocotools is
        installed, else a list of counts.
    """
    from proscale_hf.processing.run_length import encode_mask

    descriptions = []
    for number, segment in enumerate(segments, start=1):
        left, top, right, bottom = segment.box
        descriptions.append(
            {
                "id": number,
                "label_id": segment.label_id,
                "label": segment.label,
                "category_id": categories[segment.label_id].get("id"),
                "isthing": segment.is_thing,
                "score": segment.score,
                "area": segment.area,
                "bbox": [left, top, right - left, bottom - top],
                "segmentation": encode_mask(segment.full_mask(height, width)),
            }
        )
    return descriptions


def to_json(header: dict[str, Any], descriptions: list[dict[str, Any]]) -> str:
    """The JSON file's text: the header, then one line for each segment under "segments"."""
    lines = ",\n".join(json.dumps(description) for description in descriptions)
    return f'{json.dumps(header)[:-1]}, "segments": [\n{lines}\n]}}\n'


def print_table(segments: list[Any], pixels: int) -> None:
    """Prints name, score and share of the picture for each segment.

    Args:
        segments: what was found.
        pixels: of the whole image.
    """
    if not segments:
        print("nothing found")
        return
    names = [segment.label[:LONGEST_NAME] for segment in segments[:LONGEST_TABLE]]
    width = max(map(len, names))
    for name, segment in zip(names, segments, strict=False):
        score = "     " if segment.score is None else f"{segment.score:5.2f}"
        print(f"{name:<{width}}  {score}  {segment.area / pixels:6.1%} of the picture")
    if len(segments) > LONGEST_TABLE:
        print(f"and {len(segments) - LONGEST_TABLE} more")


SEGMENT = Subcommand(
    name="segment",
    help="segment a photo",
    description="Write a picture of the photo with masks, outlines, names and scores, and print what was found.",
    add_options=add_options,
    run=run,
)
