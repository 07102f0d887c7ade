"""`proscale first-look`: what a data set holds, before anything is trained on it."""

import argparse
import contextlib
import json
from pathlib import Path
from typing import Any

from proscale_hf.cli.command_line import Subcommand
from proscale_hf.cli.console import CommandError, progress, user_errors
from proscale_hf.cli.dataset_options import add_dataset_options, open_chosen_dataset
from proscale_hf.cli.numbers import natural, positive


OVERLAYS = 8


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the subcommand's arguments."""
    add_dataset_options(parser)
    parser.add_argument("--samples", type=positive, metavar="N", help="only the first N images")
    parser.add_argument(
        "--workers", type=natural, default=2, metavar="N", help="processes that read images (default: %(default)s)"
    )
    parser.add_argument("--output", metavar="DIR", help="new folder for pictures of the first images and segments")
    parser.add_argument(
        "--overlays", type=positive, default=OVERLAYS, metavar="N", help="how many pictures (default: %(default)s)"
    )
    parser.add_argument("--json", metavar="FILE", help="also write all counts to a JSON file")


def run(options: argparse.Namespace) -> None:
    """Reads the data set, prints what it holds, and fails if an image cannot be used."""
    from proscale_hf.files.whole import check_writable, write_whole

    with progress("opening the data set"):
        dataset = open_chosen_dataset(options)
    from proscale_hf.data.first_look import look
    from proscale_hf.files.folders import check_new_folder, folder_written_whole

    if options.samples is not None:
        dataset = dataset.select(range(min(options.samples, len(dataset))))
    with user_errors(exit_code=2):
        if options.output is not None:
            check_new_folder(Path(options.output))
        if options.json is not None:
            check_writable(options.json)
    with progress(f"reading {len(dataset)} images"), user_errors():
        seen = look(dataset, options.workers)
    if options.json is not None:
        content = json.dumps(seen.to_dict(), indent=1) + "\n"
        with user_errors():
            write_whole(options.json, lambda file: file.write(content.encode()))
    print(seen.to_text())
    if options.output is not None and seen.images:
        with progress("drawing"), user_errors(), folder_written_whole(Path(options.output)) as folder:
            pictures = draw_overlays(dataset, options.overlays, folder)
        print(f"wrote {pictures} pictures to {options.output}")
    if seen.unusable:
        raise CommandError(f"{seen.unusable} of {len(dataset)} images cannot be used, see above; mend or remove them")


def draw_overlays(dataset: Any, number: int, folder: Path) -> int:
    """Draws the first images that can be used with their segments, into PNG files; how many there were."""
    from proscale_hf.data.first_look import segments_to_draw
    from proscale_hf.data.sample import SampleError
    from proscale_hf.processing.pictures import save_image
    from proscale_hf.visualization import draw_segments

    colors = {label_id: tuple(category["color"]) for label_id, category in enumerate(dataset.categories)}
    drawn = 0
    for index in range(len(dataset)):
        if drawn == number:
            break
        with contextlib.suppress(SampleError):  # it is in the report
            sample = dataset.read(index)
            picture = draw_segments(sample.image, segments_to_draw(sample, dataset.categories), colors)
            save_image(picture, folder / f"{index:06d}_{Path(sample.file_name).stem}.png")
            drawn += 1
    return drawn


FIRST_LOOK = Subcommand(
    name="first-look",
    help="look through a data set",
    description="Read a data set and print how often each class occurs, which images are empty, and which images "
    "or annotations cannot be used. The exit status is 1 if there are any of the last kind.",
    add_options=add_options,
    run=run,
)
