"""The program ``fastft``: parses the command line, runs one command, turns errors into messages and exit statuses."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Sequence
from typing import NoReturn, Protocol

import fastft
from fastft.errors import UserError

from . import bench, data_report, demo, doctor, finetune, info
from .failure import Failure

__all__ = ["main"]


class Command(Protocol):
    """A module that is a command. Importing it is quick: whatever takes long to import is imported by ``run``.

    A command whose failed run leaves something behind also has ``left_behind(options)``, which returns a clause about
    it, to follow the error message.
    """

    HELP: str
    """One line for ``fastft --help``."""
    DESCRIPTION: str
    """A paragraph for ``fastft COMMAND --help``."""
    EXTRA: str
    """The optional dependencies that it needs: ``fastft[EXTRA]``."""
    PACKAGES: dict[str, str]
    """{module to import: package to install} of these."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Define its options."""

    def run(self, options: argparse.Namespace) -> str:
        """Do it; returns the text to print at the end.

        Raises:
            UserError: the options, or the files they name, cannot be used (status 2).
            OSError: something could not be read or written (status 1).
            Failure: anything else that ends in a message and a status of its own.
        """


COMMANDS: dict[str, Command] = {
    "finetune": finetune,
    "demo": demo,
    "data-report": data_report,
    "doctor": doctor,
    "bench": bench,
    "info": info,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``fastft`` with command-line arguments (``sys.argv``'s by default).

    Returns:
        The exit status: 0 done, 1 could not be finished, 2 wrong usage, 130 interrupted (or 128 + a signal's number).
    """
    top = make_parser()
    options, unknown = top.parse_known_args(arguments)
    name = options.__dict__.pop("command")
    if unknown:
        top.prog += f" {name}"  # its --help lists the options
        top.error(f"unrecognized arguments: {' '.join(unknown)}")
    return run_command(name, options)


class Parser(argparse.ArgumentParser):
    """An error is one line, without the list of all options."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def make_parser() -> argparse.ArgumentParser:
    top = Parser(prog="fastft", description="Fine-tune large pre-trained models without losing what they know.")
    top.add_argument("--version", action="version", version=f"fastft {fastft.__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        command.add_arguments(commands.add_parser(name, help=command.HELP, description=command.DESCRIPTION))
    return top


def run_command(name: str, options: argparse.Namespace) -> int:
    """Run one command and print its text or its error."""
    command = COMMANDS[name]

    def fail(message: object, status: int) -> int:
        print(f"fastft {name}: {message}", file=sys.stderr)
        return status

    def left() -> str:
        return str(command.left_behind(options)) if hasattr(command, "left_behind") else ""

    missing = [package for module, package in command.PACKAGES.items() if importlib.util.find_spec(module) is None]
    if missing:
        extra = f'pip install "fastft[{command.EXTRA}]"'
        return fail(f"missing {', '.join(missing)}; install what this needs with: {extra}", 2)
    # Set before a tokenizer is loaded; otherwise it warns, if the process forks later, in the middle of the output.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        text = command.run(options)
    except Failure as failure:
        return fail(failure, failure.status)
    except UserError as error:
        return fail(error, 2)
    except OSError as error:
        return fail("; ".join(filter(None, [f"could not finish: {error}", left()])), 1)
    except KeyboardInterrupt:
        return fail(f"interrupted; {left() or 'nothing was written'}", 130)
    except Exception:
        if clause := left():
            fail(clause, 1)
        raise
    if text:
        print(text)
    return 0
