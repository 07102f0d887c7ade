"""`proscale choose`: which numbers of encoder layers fit a budget, and how long they take on this machine."""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from proscale_hf.cli.command_line import Subcommand
from proscale_hf.cli.console import CommandError, needed_libraries, user_errors
from proscale_hf.cli.device import add_device_options, place_model
from proscale_hf.cli.loading import load_config
from proscale_hf.cli.numbers import input_size, positive


LONGEST_TABLE = 20  # rows


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the subcommand's arguments."""
    from proscale_hf.backbones.presets import BACKBONES

    parser.add_argument("--gflops", type=budget, metavar="N", help="of one image, counted as in the papers")
    parser.add_argument("--milliseconds", type=budget, metavar="N", help="of a forward pass with one image, here")
    parser.add_argument(
        "--size", type=input_size, default=(800, 1333), metavar="HxW", help="of the image in pixels (default: 800x1333)"
    )
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--backbone", choices=BACKBONES, default="swin-t", help="default: %(default)s")
    model.add_argument("--config", metavar="NAME", help="instead: a preset, a folder, a config.json or a Hub id")
    parser.add_argument("--labels", type=positive, metavar="N", help="classes (default: 133, or those of --config)")
    parser.add_argument("--max-layers", type=positive, default=4, metavar="N", help="in a stage (default: %(default)s)")
    parser.add_argument(
        "--timed",
        type=positive,
        default=5,
        metavar="N",
        help="how many of those that fit are timed, the rest is estimated (default: %(default)s)",
    )
    parser.add_argument("--format", choices=("table", "json"), default="table", help="default: %(default)s")
    add_device_options(parser)


def budget(text: str) -> float:
    """A number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a possible budget")
    return number


def run(options: argparse.Namespace) -> None:
    """Lists the numbers of layers that fit the budget."""
    if options.gflops is None and options.milliseconds is None:
        raise CommandError("give a budget: --gflops, --milliseconds or both", exit_code=2)

    from proscale_hf.benchmarking.choosing import choose
    from proscale_hf.benchmarking.tables import versions
    from proscale_hf.files.text import one_line

    config = config_to_fit(options)
    devices = []

    def prepare(model: Any) -> None:
        place_model(model, options)
        devices.append(str(model.device))

    try:
        with user_errors(), needed_libraries("timm"):  # the backbone's
            choices = choose(
                config,
                *options.size,
                gflops=options.gflops or math.inf,
                milliseconds=options.milliseconds or math.inf,
                max_layers=options.max_layers,
                timed=options.timed,
                prepare=prepare,
                report=lambda line: print(line, file=sys.stderr, flush=True),
            )
    except (RuntimeError, MemoryError) as error:  # torch says so when memory does not suffice
        raise CommandError(f"the model failed at this size: {one_line(error)}") from error
    machine = {**versions(devices[0]), "dtype": options.dtype}
    print(to_json(options, choices, machine) if options.format == "json" else to_table(options, choices, machine))


def config_to_fit(options: argparse.Namespace) -> Any:
    """The configuration whose numbers of layers are chosen: that of a preset, or the one that `--config` names."""
    from proscale_hf.models.mask2former.configuration_proscale_mask2former import ProScaleMask2FormerConfig

    if options.config is None:
        return ProScaleMask2FormerConfig.from_preset(
            f"proscale-{options.backbone}-coco", num_labels=options.labels or 133
        )
    config = load_config(options.config)
    if options.labels is not None:
        config.num_labels = options.labels
    return config


def to_json(options: argparse.Namespace, choices: Sequence[Any], machine: dict[str, str]) -> str:
    """Everything that was found."""
    height, width = options.size
    asked = {"height": height, "width": width, "gflops": options.gflops, "milliseconds": options.milliseconds}
    return json.dumps({**asked, "machine": machine, "choices": [asdict(choice) for choice in choices]}, indent=1)


def to_table(options: argparse.Namespace, choices: Sequence[Any], machine: dict[str, str]) -> str:
    """A Markdown table, and what its marks mean."""
    rows = [
        "| layers | GFLOPs | of the encoder | parameters | time | spread | |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for choice in choices[:LONGEST_TABLE]:
        time, spread = f"{choice.milliseconds:.0f} ms", ""
        if choice.spread is None:
            time = f"~ {time}"
        else:
            spread = f"{choice.spread:.0%}"
        rows.append(
            f"| {choice.encoder_stage_layers} | {choice.total_gflops:.2f} | {choice.encoder_gflops:.2f} | "
            f"{choice.parameters_millions:.1f} M | {time} | {spread} | {'full' if choice.is_full else ''} |"
        )
    notes = [
        "",
        f"full: with one more layer in any stage it does not fit, or the stage has more than {options.max_layers}.",
        "time: a forward pass with one image, median of the rounds; ~ is an estimate from those that were measured.",
        ", ".join(f"{name} {value}" for name, value in machine.items()),
    ]
    if len(choices) > LONGEST_TABLE:
        notes.insert(0, f"and {len(choices) - LONGEST_TABLE} more (all with --format json)")
    return "\n".join(rows + notes)


CHOOSE = Subcommand(
    name="choose",
    help="find the encoder layers that fit a budget",
    description="List the numbers of layers (p1, p2, p3) of the encoder's stages that fit a budget of GFLOPs, of "
    "milliseconds on this machine, or both. What cannot be made larger comes first.",
    add_options=add_options,
    run=run,
)
