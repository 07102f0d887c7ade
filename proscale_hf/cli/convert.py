"""`proscale convert SOURCE`: weights of other code bases, rewritten as a folder for `from_pretrained`."""

import argparse
import importlib
from collections.abc import Sequence
from types import ModuleType

from proscale_hf.cli.command_line import OneLineParser, Subcommand, carry_out
from proscale_hf.cli.console import CommandError, needed_libraries, quiet_libraries


# A source is a module in `proscale_hf/convert` of the same name, with `add_options(parser)` and `run(options)`.
SOURCES = {
    "detectron2": "a detectron2 checkpoint of Mask2Former or PRO-SCALE",
    "dino": "a checkpoint of the original DINO, with a ResNet or a Swin backbone",
    "transformers-mask2former": "a Mask2Former model of transformers, as it is, or with another encoder",
}


def module_name(source: str) -> str:
    """The name of a source's module."""
    return source.replace("-", "_")


def converter(source: str) -> ModuleType:
    """The module that converts what comes from a source; to import it takes seconds."""
    with needed_libraries("convert"):
        return importlib.import_module(f"proscale_hf.convert.{module_name(source)}")


def source_command(source: str) -> Subcommand:
    """The command of one source."""

    def run(options: argparse.Namespace) -> None:
        from proscale_hf.convert import ConversionError

        quiet_libraries()
        try:
            converter(source).run(options)
        except ConversionError as error:  # which may list tensors
            raise CommandError(str(error), keep_lines=True) from error

    return Subcommand(
        source,
        help=SOURCES[source],
        description=f"Convert {SOURCES[source]} into a folder for `from_pretrained`.",
        add_options=lambda parser: converter(source).add_options(parser),
        run=run,
    )


def main(source: str, arguments: Sequence[str] | None = None) -> int:
    """Runs `python -m convert.SOURCE`, which a clone has beside `proscale convert SOURCE`.

    Args:
        source: one of `SOURCES`.
        arguments: the words after the command's name; default: those this process was started with.

    Returns:
        The exit status.
    """
    parser = OneLineParser(source_command(source), prog=f"python -m convert.{module_name(source)}")
    return carry_out(parser, arguments)


CONVERT = Subcommand(
    name="convert",
    help="rewrite weights of other code bases",
    description="Rewrite weights of another code base as a folder for `from_pretrained`. No code that comes with them "
    "is run. `proscale convert SOURCE --help` says more about each.",
    add_options=lambda parser: parser.add_subcommands("SOURCE", [source_command(source) for source in SOURCES]),
)
