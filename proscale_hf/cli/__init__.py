"""The `proscale` command: one module per subcommand, each importing what is heavy only when it runs."""

from collections.abc import Sequence

from proscale_hf.cli.benchmark import BENCHMARK
from proscale_hf.cli.choose import CHOOSE
from proscale_hf.cli.command_line import OneLineParser, carry_out
from proscale_hf.cli.convert import CONVERT
from proscale_hf.cli.cost import COST
from proscale_hf.cli.detect import DETECT
from proscale_hf.cli.evaluate import EVALUATE
from proscale_hf.cli.figure import FIGURE
from proscale_hf.cli.first_look import FIRST_LOOK
from proscale_hf.cli.segment import SEGMENT


SUBCOMMANDS = (SEGMENT, DETECT, BENCHMARK, EVALUATE, FIRST_LOOK, FIGURE, CHOOSE, COST, CONVERT)


def build_parser() -> OneLineParser:
    """The command's parser."""
    parser = OneLineParser(
        prog="proscale",
        description="Panoptic, instance and semantic segmentation with PRO-SCALE, and object detection.",
        epilog="`proscale COMMAND --help` says more about each.",
    )
    parser.add_subcommands("COMMAND", SUBCOMMANDS)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        arguments: the words after `proscale`; default: those this process was started with.

    Returns:
        The exit status: 0 done, 1 failed, 2 wrong command line, 130 interrupted.
    """
    return carry_out(build_parser(), arguments)
