"""Write a folder of results all at once, so that it never holds half of them."""

from __future__ import annotations

import argparse
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fastft.errors import UserError

__all__ = ["OutputError", "add_output_arguments", "staged"]


class OutputError(UserError):
    """The output folder cannot be used as asked."""


def add_output_arguments(parser: argparse.ArgumentParser, default: str, contents: str) -> None:
    """Define ``--output``, a folder, and ``--overwrite``, for :func:`staged`."""
    parser.add_argument(
        "--output", type=Path, default=Path(default), metavar="FOLDER", help=f"{contents} (default: ./%(default)s)"
    )
    parser.add_argument("--overwrite", action="store_true", help="write into a folder that is not empty")


@contextmanager
def staged(output: Path, overwrite: bool) -> Iterator[Path]:
    """A temporary folder that becomes ``output`` when the block ends well, and vanishes when it does not.

    An ``output`` that exists and is not empty is refused, unless ``overwrite``: then the files written in the
    block replace those of the same name and everything else in it stays.
    """
    output = output.resolve()
    refuse_unusable(output, overwrite)
    existed = output.exists()
    # Inside an existing folder, which may be a mount of its own; beside a new one. Either way a rename suffices.
    staging = (output if existed else output.parent) / f".fastft-{secrets.token_hex(4)}"
    new_parents = [parent for parent in staging.parents if not parent.exists()]
    try:
        make_folder(staging)
        yield staging
        if existed:
            move_files(staging, output)
        else:
            staging.rename(output)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        for parent in new_parents:
            with suppress(OSError):
                parent.rmdir()
        raise


def refuse_unusable(output: Path, overwrite: bool) -> None:
    """Raise before hours of work, not after them, if ``output`` is in the way."""
    if not output.exists():
        return
    if not output.is_dir():
        raise OutputError(f"{output} is not a folder")
    if not overwrite and any(output.iterdir()):
        raise OutputError(f"{output} is not empty; choose another output, or overwrite with --overwrite")


def make_folder(path: Path) -> None:
    """Make ``path`` and its parents with the user's own permissions (``tempfile`` would make it private)."""
    try:
        path.mkdir(parents=True)
    except OSError as error:
        raise OutputError(f"cannot write to {path.parent}: {error.strerror}") from error


def move_files(source: Path, target: Path) -> None:
    """Move every file under ``source`` to the same place under ``target``, each in one step, and drop ``source``."""
    # In order of name, so that report.json, which speaks of the others, comes last.
    for file in sorted(path for path in source.rglob("*") if path.is_file()):
        place = target / file.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        os.replace(file, place)
    shutil.rmtree(source)
