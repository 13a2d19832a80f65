"""Read a table from a file: csv, tsv, jsonl or parquet, also gzipped."""

from __future__ import annotations

import csv
import importlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastft.anchor import closest

CSV = {"keep_default_na": False, "na_values": [""]}
"""A cell that says "null" or "NA" is that text, not a missing value."""

FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    ".csv": ("csv", CSV),
    # As linguistic data are written: a quotation mark is one, and does not swallow the lines up to the next.
    ".tsv": ("csv", {**CSV, "sep": "\t", "quoting": csv.QUOTE_NONE}),
    ".jsonl": ("json", {}),
    ".json": ("json", {}),
    ".parquet": ("parquet", {}),
}


NO_ROWS = ("corresponds to no data", "No columns to parse", "StopIteration")
"""What datasets and pandas say of a file with nothing in it."""


class FileError(Exception):
    """A file cannot be read as asked; the message is one line that names it."""


def read_table(path: str | os.PathLike[str], columns: Sequence[str] | None = None) -> Any:
    """A ``datasets.Dataset`` with the rows of a file.

    The name tells the format: ``.csv``, ``.tsv`` (without quoting), ``.jsonl`` or ``.json`` (an object a line), or
    ``.parquet``; the text formats also with ``.gz`` behind. Text is UTF-8; csv and tsv have a header line.

    Args:
        path: of the file.
        columns: keep only these, in this order; None: all.

    Raises:
        FileError: no such file, an unknown format, a malformed or empty table, or a column that is not there.
        ImportError: the package ``datasets`` is not installed.
    """
    path = Path(path)
    if not path.is_file():
        raise FileError(f"{path}: {'is a folder, not a file' if path.is_dir() else 'no such file'}")
    suffixes = [suffix.lower() for suffix in path.suffixes]
    suffix = suffixes[-2] if suffixes[-1:] == [".gz"] and len(suffixes) > 1 else "".join(suffixes[-1:])
    if suffix not in FORMATS:
        raise FileError(f"{path}: expected a name that ends in {', '.join(FORMATS)}, or one of them with .gz")
    builder, options = FORMATS[suffix]
    try:
        with quiet(datasets := import_datasets()):
            table = datasets.load_dataset(builder, data_files=str(path), split="train", **options)
    except ImportError:
        raise
    except Exception as error:  # datasets, pandas, pyarrow and gzip each have their own
        cause = root_cause(error)
        if any(words in cause for words in NO_ROWS):
            raise FileError(f"{path}: has no rows") from error
        raise FileError(f"{path}: cannot be read as {suffix[1:]}: {cause}") from error
    if not len(table):
        raise FileError(f"{path}: has no rows")
    for name in columns or ():
        check_column(path, table.column_names, name)
    return table if columns is None else table.select_columns(list(columns))


def check_column(where: str | os.PathLike[str], names: Sequence[str], name: str) -> None:
    """Raise if ``name`` is none of the columns."""
    if name not in names:
        hint = closest(name, names) or f"; it has {', '.join(names)}"
        raise FileError(f"{where}: has no column {name!r}{hint}")


@contextmanager
def quiet(datasets: Any) -> Iterator[None]:
    """No progress bars, and nothing logged of an error that is raised as well."""
    bars, verbosity = not datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(verbosity)
        if bars:
            datasets.enable_progress_bars()


def root_cause(error: BaseException) -> str:
    """The first line of what began it."""
    while error.__cause__ is not None or (error.__context__ is not None and not error.__suppress_context__):
        error = error.__cause__ or error.__context__ or error
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def import_datasets() -> Any:
    try:
        return importlib.import_module("datasets")
    except ImportError as error:
        raise ImportError('reading files needs the package datasets: pip install "fastft[data]"') from error
