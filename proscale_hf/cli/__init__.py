"""The `proscale` command: one module per subcommand, each imported only when it runs."""

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from proscale_hf.cli.benchmark import add_benchmark_command
from proscale_hf.cli.choose import add_choose_command
from proscale_hf.cli.console import CommandError
from proscale_hf.cli.cost import add_cost_command
from proscale_hf.cli.evaluate import add_evaluate_command
from proscale_hf.cli.figure import add_figure_command
from proscale_hf.cli.first_look import add_first_look_command
from proscale_hf.cli.segment import add_segment_command


class _OneLineParser(argparse.ArgumentParser):
    """Reports a wrong command line in one line, without the usage block."""

    def parse_known_args(self, *arguments: Any, **options: Any) -> tuple[argparse.Namespace, list[str]]:
        """Refuses unknown words here, where the subcommand is known; argparse leaves that to `proscale`."""
        namespace, unknown = super().parse_known_args(*arguments, **options)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return namespace, unknown

    def error(self, message: str) -> NoReturn:
        raise CommandError(f"{message} (see {self.prog} --help)", exit_code=2)


def build_parser() -> argparse.ArgumentParser:
    """The command's parser; each subcommand sets `run`, the function that carries it out."""
    parser = _OneLineParser(
        prog="proscale",
        description="Panoptic, instance and semantic segmentation with PRO-SCALE.",
        epilog="`proscale COMMAND --help` says more about each.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_OneLineParser)
    add_segment_command(commands)
    add_benchmark_command(commands)
    add_evaluate_command(commands)
    add_first_look_command(commands)
    add_figure_command(commands)
    add_choose_command(commands)
    add_cost_command(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        arguments: the words after `proscale`; default: those this process was started with.

    Returns:
        The exit status: 0 done, 1 failed, 2 wrong command line, 130 interrupted.
    """
    try:
        options = build_parser().parse_args(arguments)
        options.run(options)
        sys.stdout.flush()
    except CommandError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output, `head` say, has seen enough
        _forget_output()
    except OSError as error:  # the disk that our output goes to is full, say
        _forget_output()
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _forget_output() -> None:
    """What could not be written is not tried again when Python ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
