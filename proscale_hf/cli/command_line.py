"""What a subcommand is, and how a command line is read and carried out: whatever fails is one line."""

import argparse
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn

from proscale_hf.cli.console import CommandError
from proscale_hf.endings import complain, forget_output, interruptible, status_of


class Subcommand(NamedTuple):
    """One word of the command line, and what it does.

    Attributes:
        name: the word.
        help: what it does, in a few words for the list of subcommands.
        description: the same in full, for its own help.
        add_options: adds its arguments to its parser. It runs when the subcommand is chosen, so it may import much.
        run: does the work, given the parsed command line. It raises a `CommandError` for all that the user can mend.
            None where the next word, a subcommand of this one, says what to do.
    """

    name: str
    help: str
    description: str
    add_options: Callable[[argparse.ArgumentParser], object]
    run: Callable[[argparse.Namespace], None] | None = None


class OneLineParser(argparse.ArgumentParser):
    """Reports a wrong command line in one line, without the usage block.

    Args:
        subcommand: what the command line is for; default: arguments are added to the parser as to any other.
        options: those of `ArgumentParser`.
    """

    def __init__(self, subcommand: Subcommand | None = None, **options: Any):
        if subcommand is not None:
            options["description"] = subcommand.description
        super().__init__(**options)
        self.add_options = None if subcommand is None else subcommand.add_options
        if subcommand is not None and subcommand.run is not None:
            self.set_defaults(run=subcommand.run)

    def add_subcommands(self, metavar: str, subcommands: Sequence[Subcommand]) -> None:
        """Makes the next word of the command line one of some subcommands.

        Args:
            metavar: stands for the word in the help.
            subcommands: the choices.
        """
        choices = self.add_subparsers(required=True, metavar=metavar, parser_class=OneLineParser)
        for subcommand in subcommands:
            choices.add_parser(subcommand.name, help=subcommand.help, subcommand=subcommand)

    def parse_known_args(self, *arguments: Any, **options: Any) -> tuple[argparse.Namespace, list[str]]:
        """Refuses unknown words here, where the subcommand is known; argparse leaves that to the first parser."""
        if self.add_options is not None:
            self.add_options(self)
            self.add_options = None  # a parser may be used again
        namespace, unknown = super().parse_known_args(*arguments, **options)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return namespace, unknown

    def error(self, message: str) -> NoReturn:
        raise CommandError(f"{message} (see {self.prog} --help)", exit_code=2)


def carry_out(parser: OneLineParser, arguments: Sequence[str] | None = None) -> int:
    """Runs a command line.

    Args:
        parser: reads it.
        arguments: the words after the command's name; default: those this process was started with.

    Returns:
        The exit status: 0 done, 1 failed, 2 wrong command line, 130 interrupted.
    """
    with interruptible(), warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: complain(f"warning: {message}")
        try:
            options = parser.parse_args(arguments)
            options.run(options)
            sys.stdout.flush()
        except BaseException as error:
            status = status_of(error)
            if status is not None:
                return status
            if isinstance(error, OSError):  # the disk that our output goes to is full, say
                forget_output()
            elif not isinstance(error, CommandError):
                raise
            complain(f"error: {error}")
            return getattr(error, "exit_code", 1)
    return 0
