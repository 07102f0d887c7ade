"""`proscale detect PHOTO`: from a photo to a picture with boxes that a person can read, and JSON if asked for."""

import argparse
import json
from pathlib import Path
from typing import Any

from proscale_hf.cli.command_line import Subcommand
from proscale_hf.cli.console import progress, user_errors
from proscale_hf.cli.device import add_device_options, place_model
from proscale_hf.cli.loading import load_model
from proscale_hf.cli.numbers import share
from proscale_hf.cli.segment import LONGEST_NAME, LONGEST_TABLE, checked_output, run_model


BOX_OPACITY = 0.12  # of the colour inside a box, which is mostly not the object


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the subcommand's arguments."""
    parser.add_argument("photo", metavar="PHOTO", help="an image file")
    parser.add_argument("--model", metavar="DIR-OR-HUB-ID", required=True, help="a detection model's folder or Hub id")
    parser.add_argument(
        "--threshold", type=share, default=0.5, metavar="SCORE", help="what to show, from 0 to 1 (default: %(default)s)"
    )
    parser.add_argument(
        "--output", metavar="FILE", help="the picture to write (default: PHOTO_detected.png in this folder)"
    )
    parser.add_argument(
        "--json", metavar="FILE", help="also write the detections as COCO's results: class, box and score of each"
    )
    add_device_options(parser)


def run(options: argparse.Namespace) -> None:
    """Finds objects in the photo, and writes the picture, and JSON if asked for."""
    from proscale_hf.files.whole import write_whole
    from proscale_hf.processing.pictures import load_image, save_image
    from proscale_hf.visualization import draw_segments, segments_from_boxes

    output = checked_output(options, "detected")
    with user_errors():
        image = load_image(options.photo)
    with progress("loading the model"):
        model, processor = load_model(options.model, "proscale_dino")
        place_model(model, options)
    with progress("detecting"), user_errors():
        outputs = run_model(image, model, processor)
        sizes = [(image.height, image.width)]
        [result] = processor.post_process_object_detection(outputs, options.threshold, sizes)
        detections = {name: values.cpu().numpy() for name, values in result.items()}
    boxes = segments_from_boxes(detections, model.config.id2label, sizes[0])
    with progress("drawing"), user_errors():
        save_image(draw_segments(image, boxes, opacity=BOX_OPACITY), output)
    if options.json is not None:
        content = to_coco_results(Path(options.photo).stem, detections, model.config)
        with progress("writing the detections"), user_errors():
            write_whole(options.json, lambda file: file.write(content.encode()))
    print_table(boxes)
    print(f"wrote {output}" + (f" and {options.json}" if options.json else ""))


def to_coco_results(image_id: str, detections: dict[str, Any], config: Any) -> str:
    """
    COCO's results file, one line for each detection.

    Args:
        image_id: of the photo; a number if it looks like one, as in COCO's file names.
        detections: `scores`, `labels` and `boxes`.
        config: the model's configuration, which may know the data set's own ids of the classes.

    Returns:
        JSON: a list of `image_id`, `category_id`, `bbox` (left, top, width, height in pixels) and `score`. Where the
        data set's id is not known, `category_id` is the label.
    """
    lines = []
    for score, label, box in zip(*(detections[name].tolist() for name in ("scores", "labels", "boxes")), strict=True):
        left, top, right, bottom = box
        entry = {
            "image_id": int(image_id) if image_id.isascii() and image_id.isdigit() else image_id,
            "category_id": (config.category(label) or {}).get("id", label),
            "bbox": [round(value, 2) for value in (left, top, right - left, bottom - top)],
            "score": round(score, 5),
        }
        lines.append(json.dumps(entry))
    return "[\n" + ",\n".join(lines) + "\n]\n" if lines else "[]\n"


def print_table(boxes: list[Any]) -> None:
    """Prints name, score and box of each detection, as `visualization.Segment`."""
    if not boxes:
        print("nothing found")
        return
    width = max(len(box.label[:LONGEST_NAME]) for box in boxes[:LONGEST_TABLE])
    for box in boxes[:LONGEST_TABLE]:
        left, top, right, bottom = box.box
        print(
            f"{box.label[:LONGEST_NAME]:<{width}}  {box.score:5.2f}  {right - left} x {bottom - top} at {left}, {top}"
        )
    if len(boxes) > LONGEST_TABLE:
        print(f"and {len(boxes) - LONGEST_TABLE} more")


DETECT = Subcommand(
    name="detect",
    help="find objects in a photo",
    description="Write a picture of the photo with boxes, names and scores, and print what was found.",
    add_options=add_options,
    run=run,
)
