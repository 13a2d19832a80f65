"""Read rows from a file: csv, tsv, jsonl (each also gzipped) or parquet. Errors name the line."""

from __future__ import annotations

import csv
import gzip
import importlib
import json
import os
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastft.errors import UserError
from fastft.names import closest, listed

FORMATS = ".csv, .tsv, .jsonl (each also with .gz) or .parquet"
Record = Mapping[str, Any]


class FileError(UserError, ValueError):
    """A file cannot be read as asked: one line that names it, and the place in it."""


def read_table(path: str | os.PathLike[str], columns: Sequence[str] | None = None) -> Any:
    """A ``datasets.Dataset`` with the rows of a file.

    The format follows from the name: ``.csv``, ``.tsv`` (without quoting) and ``.jsonl`` (an object a line), each also
    with ``.gz`` behind, or ``.parquet``. Text is UTF-8; csv and tsv have a header line. In these two, a column whose
    cells are all numbers becomes numbers, and an empty cell becomes None; "NA" and "null" are words.

    Args:
        path: of the file.
        columns: keep only these, in this order; None: all.

    Raises:
        ValueError: no such file, an unknown format, a malformed or empty table, or a column that is not there.
        ImportError: the package ``datasets`` is not installed.
    """
    path = Path(path)
    datasets = import_datasets()
    if kind_of(path) == ".parquet":
        table = parquet_table(path)
    else:
        rows = [row for _, row in rows_of(path)]
        names = dict.fromkeys(name for row in rows for name in row)
        cells = {name: [row.get(name) for row in rows] for name in names}
        if kind_of(path) != ".jsonl":
            cells = {name: as_numbers([cell or None for cell in column]) for name, column in cells.items()}
        try:
            table = datasets.Dataset.from_dict(cells)
        except (TypeError, ValueError, OverflowError) as error:  # pyarrow's are ValueErrors
            raise FileError(
                f"{path}: a column holds values of different kinds: {str(error).splitlines()[0]}"
            ) from error
    if not len(table):
        raise FileError(f"{path}: expected rows, found none")
    for name in columns or ():
        check_column(path, table.column_names, name)
    return table if columns is None else table.select_columns(list(columns))


WHOLE = re.compile(r"-?(0|[1-9]\d{0,17})")
NUMBER = re.compile(r"-?\d+(\.\d*)?([eE][-+]?\d+)?|-?\.\d+([eE][-+]?\d+)?")


def as_numbers(cells: list[str | None]) -> list[Any]:
    """Numbers where every cell is one; a number with a leading zero is a name."""
    present = [cell for cell in cells if cell is not None]
    if not present or any(re.fullmatch(r"-?0\d+", cell) for cell in present):
        return cells
    for pattern, number in ((WHOLE, int), (NUMBER, float)):
        if all(pattern.fullmatch(cell) for cell in present):
            return [None if cell is None else number(cell) for cell in cells]
    return cells


def check_column(where: str | os.PathLike[str], names: Iterable[str], name: str) -> None:
    """Raise a :class:`FileError` if ``name`` is none of the columns."""
    if name not in names:
        raise FileError(f"{where}: there is no column {name!r}, but {listed(names)}{closest(name, names)}")


# -- row by row ----------------------------------------------------------------------------------------------


def kind_of(path: Path) -> str:
    """ ".csv", ".tsv", ".jsonl" or ".parquet"; an error if the file is not there, or of no such kind."""
    if not path.is_file():
        raise FileError(f"{path}: expected a file with rows, but there is {'a folder' if path.is_dir() else 'none'}")
    suffixes = [suffix.lower() for suffix in path.suffixes]
    packed = suffixes[-1:] == [".gz"]
    kind = "".join(suffixes[-2 if packed else -1 :][:1])
    if kind not in (*READERS, ".parquet") or (packed and kind == ".parquet"):
        raise FileError(f"{path}: expected a file whose name ends in {FORMATS}")
    return kind


def read_rows(path: str | os.PathLike[str], columns: Sequence[str] | None = None) -> Iterator[tuple[str, Record]]:
    """The rows of a file one by one, with their places, for error messages that name the line.

    Formats are those of :func:`read_table`, but the cells of csv and tsv stay texts.

    Args:
        path: of the file.
        columns: those that every row must have; of a Parquet file only these are read.

    Yields:
        ``(place, row)``: ``"line 7"`` and a dict with a value for each column.

    Raises:
        ValueError: no such file, an unknown format, a malformed table, or a column that is not there.
        ImportError: for a Parquet file, the package ``datasets`` is not installed.
    """
    path = Path(path)
    for place, row in rows_of(path, columns):
        for column in columns or ():
            check_column(f"{path}, {place}", row, column)
        yield place, row


def rows_of(path: Path, columns: Sequence[str] | None = None) -> Iterator[tuple[str, Record]]:
    """:func:`read_rows` without the check of each row."""
    kind = kind_of(path)
    if kind == ".parquet":
        for number, row in enumerate(parquet_table(path, columns), start=1):
            yield f"row {number}", row
        return
    with (gzip.open if path.suffix.lower() == ".gz" else open)(path, "rb") as raw:
        lines = Lines(raw)
        try:
            yield from READERS[kind](lines, path)
        except (UnicodeDecodeError, gzip.BadGzipFile, EOFError, zlib.error) as error:
            hint = "; save the file as UTF-8" if isinstance(error, UnicodeDecodeError) else ""
            raise FileError(f"{path}, line {lines.number}: cannot be read: {error}{hint}") from error


class Lines:
    """A file's lines as texts. ``number`` is that of the current line, also of one that cannot be decoded."""

    def __init__(self, raw: Iterable[bytes]) -> None:
        self.raw = raw
        self.number = 1

    def __iter__(self) -> Iterator[str]:
        for number, line in enumerate(self.raw, start=1):
            self.number = number
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")


def csv_rows(lines: Lines, path: Path) -> Iterator[tuple[str, Record]]:
    """Rows of a CSV file: fields may be quoted, and then hold commas and line breaks."""
    hint = "; a field with commas, quotes or line breaks stands in quotes, its own quotes doubled"
    yield from table_rows(csv.reader(iter(lines), strict=True), path, hint)


def tsv_rows(lines: Lines, path: Path) -> Iterator[tuple[str, Record]]:
    """Rows of a TSV file, without quoting: a quote that a text begins with would swallow the rows that follow."""
    hint = "; a field of a .tsv file holds no tabs and no line breaks (one of a .csv file may)"
    yield from table_rows(csv.reader(iter(lines), delimiter="\t", quoting=csv.QUOTE_NONE), path, hint)


def table_rows(rows: Any, path: Path, hint: str) -> Iterator[tuple[str, Record]]:
    """Rows below a header, each with as many fields."""
    csv.field_size_limit(2**31 - 1)  # texts may be long
    header: list[str] = []
    place = "line 1"
    try:
        for fields in rows:
            if not header:
                header = fields
                if twice := [name for name, times in Counter(header).items() if times > 1]:
                    raise FileError(f"{path}: expected columns of different names, got {twice[0]!r} twice")
            elif fields and len(fields) != len(header):
                raise FileError(
                    f"{path}, {place}: expected {len(header)} fields, as in the header ({listed(header)}), "
                    f"got {len(fields)}{hint}"
                )
            elif fields:
                yield place, dict(zip(header, fields, strict=True))
            place = f"line {rows.line_num + 1}"
    except csv.Error as error:
        raise FileError(f"{path}, {place}: cannot be read: {error}{hint}") from error


def json_rows(lines: Lines, path: Path) -> Iterator[tuple[str, Record]]:
    """One JSON object a line."""
    for line in lines:
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise FileError(f"{path}, line {lines.number}: not JSON: {error}") from error
        if not isinstance(row, dict):
            raise FileError(f"{path}, line {lines.number}: expected one JSON object a line, got {row!r:.80}")
        yield f"line {lines.number}", row


READERS = {".csv": csv_rows, ".tsv": tsv_rows, ".jsonl": json_rows}


def parquet_table(path: Path, columns: Sequence[str] | None = None) -> Any:
    """A ``datasets.Dataset`` of a Parquet file; class labels by their names, where ``datasets`` wrote it."""
    datasets = import_datasets()
    from pyarrow import ArrowException, array, parquet  # datasets brings it

    try:
        there = parquet.read_schema(path).names
        for name in columns or ():
            check_column(path, there, name)
        table = parquet.read_table(path, columns=None if columns is None else list(columns))
    except ArrowException as error:
        raise FileError(f"{path}: not a Parquet file: {error}") from error
    features = datasets.Features.from_arrow_schema(table.schema)
    named = {name: f for name, f in features.items() if isinstance(f, datasets.ClassLabel)}
    for name, feature in named.items():
        labels = [None if number is None else feature.int2str(number) for number in table[name].to_pylist()]
        table = table.set_column(table.column_names.index(name), name, array(labels, "string"))
    # What datasets wrote of the columns' kinds stands in the metadata, and is so no longer.
    return datasets.Dataset(table.replace_schema_metadata() if named else table)


def import_datasets() -> Any:
    try:
        return importlib.import_module("datasets")
    except ImportError as error:
        raise ImportError('reading files needs the package datasets: pip install "fastft[data]"') from error
