"""`proscale cost`: what an image costs in a model, and the paper's cost tables."""

import argparse
import csv
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from proscale_hf.cli.command_line import Subcommand
from proscale_hf.cli.console import CommandError, needed_libraries, progress, user_errors
from proscale_hf.cli.loading import load_config
from proscale_hf.cli.numbers import image_size


NOTES = (
    "A GFLOP is 10^9 multiply-adds; total and stages are counted as in the papers, by fvcore's rules on the original "
    "code.",
    "forward: what a forward pass takes here, without post-processing, with the products that fvcore does not see.",
    "activations: numbers that convolutions and matrix products put out in that forward pass.",
)
COLUMNS = {
    "total_gflops": "total",
    "backbone_gflops": "backbone",
    "projections_gflops": "projections",
    "encoder_gflops": "encoder",
    "mask_decoder_gflops": "mask decoder",
    "query_selection_gflops": "query selection",
    "decoder_gflops": "decoder",
    "post_processing_gflops": "post-processing",
    "forward_gflops": "forward",
    "activations_millions": "activations (M)",
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the subcommand's arguments."""
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", metavar="NAME", help="a folder, a Hub id or the short name of a published model")
    what.add_argument("--config", metavar="FILE", help="a model's config.json")
    what.add_argument("--preset", metavar="NAME", help="such as proscale-swin-t-coco or proscale-dino-r50-coco")
    what.add_argument("--paper-tables", action="store_true", help="the paper's tables 1, 2 and 4 to 7, and our figures")
    parser.add_argument(
        "--size", nargs="+", type=image_size, metavar="HxW", help="one or several, in pixels (default: 800x1333)"
    )
    parser.add_argument("--format", choices=("table", "json", "csv"), default="table", help="default: %(default)s")


def run(options: argparse.Namespace) -> None:
    """Counts what the model costs at each size, or the paper's tables."""
    if options.paper_tables:
        if options.size is not None:
            raise CommandError("--paper-tables has its own sizes: leave --size out", exit_code=2)
        print_paper_tables(options.format)
        return
    name = options.model or options.config or options.preset
    config = config_to_count(options)
    records = [measure(name, config, *size) for size in options.size or [(800, 1333)]]
    if options.format == "table":
        print(to_table(records))
    elif options.format == "json" and len(records) == 1:
        print(json.dumps(records[0], indent=1))
    else:
        print_records(records, options.format)


def config_to_count(options: argparse.Namespace) -> Any:
    """The configuration that `--model`, `--config` or `--preset` names."""
    if options.config is not None and not Path(options.config).is_file():
        raise CommandError(f"there is no file {options.config}", exit_code=2)
    from proscale_hf.hub.families import FAMILIES

    if options.preset is None:
        return load_config(options.model or options.config, list(FAMILIES))
    family = next((f for f in FAMILIES.values() if f.is_preset(options.preset)), FAMILIES["proscale_mask2former"])
    with user_errors(exit_code=2):
        return family.config_class.from_preset(options.preset)


def measure(name: str, config: Any, height: int, width: int) -> dict[str, Any]:
    """A record: the model's name, the size and the fields of `Cost`."""
    from proscale_hf.cost import measure_cost
    from proscale_hf.files.text import one_line

    try:
        with progress(f"counting {height} x {width}"), needed_libraries("timm"):
            cost = measure_cost(config, height, width)
    except (RuntimeError, ValueError, IndexError, TypeError) as error:  # what a backbone says to an impossible size
        raise CommandError(f"{name} cannot run at {height} x {width}: {one_line(error)}") from error
    return {"model": name, "height": height, "width": width, **asdict(cost)}


def print_paper_tables(text_format: str) -> None:
    """The paper's figures, ours, and the differences."""
    from proscale_hf.paper.tables import paper_rows, to_markdown

    with progress("counting the paper's models"), needed_libraries("timm"):
        rows = list(paper_rows())
    if text_format == "table":
        print(to_markdown(rows))
    else:
        print_records([asdict(row) for row in rows], text_format)


def print_records(records: Sequence[dict[str, Any]], text_format: str) -> None:
    """As JSON or CSV."""
    if text_format == "json":
        print(json.dumps(records, indent=1))
        return
    writer = csv.DictWriter(sys.stdout, records[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)


def to_table(records: Sequence[dict[str, Any]]) -> str:
    """A Markdown table, and what its columns mean."""
    columns = {key: title for key, title in COLUMNS.items() if key in records[0]}  # each family has its stages
    lines = [
        f"{records[0]['model']}, {records[0]['parameters_millions']:.2f} M parameters",
        "",
        f"| size | {' | '.join(columns.values())} |",
        f"| --- |{' ---: |' * len(columns)}",
        *(
            f"| {record['height']} x {record['width']} | {' | '.join(f'{record[key]:.2f}' for key in columns)} |"
            for record in records
        ),
        "",
        *NOTES,
    ]
    return "\n".join(lines)


COST = Subcommand(
    name="cost",
    help="count GFLOPs, parameters and activations",
    description="Count the GFLOPs of each stage for one image, parameters and activations. Only shapes are "
    "computed: weights are not read, and any size fits. " + " ".join(NOTES),
    add_options=add_options,
    run=run,
)
