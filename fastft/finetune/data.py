"""From the user's file to rows a model can be trained on: reading, checking, holding out, tokenizing."""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from pyarrow import ArrowException
from pyarrow import parquet as pyarrow_parquet

from fastft.anchor import closest

from .errors import InputError
from .options import CAUSAL_LM, CLASSIFICATION, Options

FORMATS = ".csv, .tsv, .jsonl (each also with .gz) or .parquet"
MOST_LISTED = 12


@dataclass(frozen=True)
class Rows:
    """The texts of a file, their labels if they have some, and where each stands in the file."""

    path: Path
    texts: list[str]
    labels: list[str] | None
    places: list[str]
    """``"line 7"``."""

    def __len__(self) -> int:
        return len(self.texts)

    def chosen(self, indices: Sequence[int]) -> Rows:
        """These rows alone."""
        labels = None if self.labels is None else [self.labels[i] for i in indices]
        return Rows(self.path, [self.texts[i] for i in indices], labels, [self.places[i] for i in indices])

    @property
    def counts(self) -> dict[str, int]:
        """How many rows each label has, in the order of :func:`sorted_labels`."""
        counted = Counter(self.labels or ())
        return {label: counted[label] for label in sorted_labels(counted)}


def sorted_labels(labels: Iterator[str] | Mapping[str, Any] | set[str]) -> list[str]:
    """Numbers by their value, all else by its letters."""
    distinct = set(labels)
    numeric = all(label.lstrip("-").isdecimal() for label in distinct)
    return sorted(distinct, key=(lambda label: (int(label), label)) if numeric else None)


# -- reading -------------------------------------------------------------------------------------------------


def read(path: Path, text_column: str, label_column: str | None) -> Rows:
    """The rows of a file. Raises :class:`InputError` unless each has a text and, where asked for, a label."""
    wanted = [text_column] if label_column is None else [text_column, label_column]
    texts: list[str] = []
    labels: list[str] = []
    places: list[str] = []
    for place, row in rows_of(path, wanted):
        for column in wanted:
            if column not in row:
                raise InputError(
                    f"{path}, {place}: there is no column {column!r}, but {listed(row)}{closest(column, row)}"
                )
        texts.append(as_text(row[text_column], text_column, f"{path}, {place}"))
        if label_column is not None:
            labels.append(as_label(row[label_column], label_column, f"{path}, {place}"))
        places.append(place)
    if not texts:
        raise InputError(f"{path}: expected rows, found none")
    return Rows(path, texts, None if label_column is None else labels, places)


def as_text(value: Any, column: str, where: str) -> str:
    if value is None or (isinstance(value, str) and not value.strip()):
        raise InputError(f"{where}: the text in {column!r} is empty; take the row out, or fill it in")
    if not isinstance(value, str):
        raise InputError(f"{where}: expected a text in {column!r}, got {value!r:.80}")
    return value


def as_label(value: Any, column: str, where: str) -> str:
    if value is None or (isinstance(value, str) and not value.strip()):
        raise InputError(f"{where}: the label in {column!r} is empty; take the row out, or fill it in")
    if not isinstance(value, (str, int)):
        raise InputError(f"{where}: expected a name or a whole number as label in {column!r}, got {value!r:.80}")
    return value.strip() if isinstance(value, str) else json.dumps(value)


def rows_of(path: Path, wanted: list[str]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(place, row by column) of a file, by what its name ends in."""
    if not path.is_file():
        raise InputError(f"{path}: expected a file with rows, but there is {'a folder' if path.is_dir() else 'none'}")
    suffixes = [suffix.lower() for suffix in path.suffixes]
    packed = suffixes[-1:] == [".gz"]
    kind = suffixes[-2 if packed else -1 :][:1]
    if kind == [".parquet"] and not packed:
        yield from parquet_rows(path, wanted)
        return
    readers: dict[str, Any] = {".csv": csv_rows, ".tsv": tsv_rows, ".jsonl": json_rows}
    if not kind or kind[0] not in readers:
        raise InputError(f"{path}: expected a file whose name ends in {FORMATS}")
    with (gzip.open if packed else open)(path, "rb") as raw:
        lines = Lines(raw)
        try:
            yield from readers[kind[0]](lines, path)
        except (UnicodeDecodeError, gzip.BadGzipFile, EOFError, zlib.error) as error:
            hint = "; save the file as UTF-8" if isinstance(error, UnicodeDecodeError) else ""
            raise InputError(f"{path}, line {lines.number}: cannot be read: {error}{hint}") from error


class Lines:
    """A file's lines as texts; knows the number of the one it is at, also when that cannot be decoded."""

    def __init__(self, raw: Iterable[bytes]) -> None:
        self.raw = raw
        self.number = 1

    def __iter__(self) -> Iterator[str]:
        for number, line in enumerate(self.raw, start=1):
            self.number = number
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")


def csv_rows(lines: Lines, path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Rows of a CSV file: fields may be quoted, and then hold commas and line breaks."""
    hint = "; a field with commas, quotes or line breaks stands in quotes, its own quotes doubled"
    yield from table_rows(csv.reader(iter(lines), strict=True), path, hint)


def tsv_rows(lines: Lines, path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Rows of a TSV file. Quotes mean nothing: one that a text begins with would swallow the rows that follow."""
    hint = "; a field of a .tsv file holds no tabs and no line breaks (one of a .csv file may)"
    yield from table_rows(csv.reader(iter(lines), delimiter="\t", quoting=csv.QUOTE_NONE), path, hint)


def table_rows(rows: Any, path: Path, hint: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Rows below a header, each as long as that."""
    csv.field_size_limit(2**31 - 1)  # texts may be long
    header: list[str] = []
    place = "line 1"
    try:
        for fields in rows:
            if not header:
                header = fields
                if twice := [name for name, times in Counter(header).items() if times > 1]:
                    raise InputError(f"{path}: expected columns of different names, got {twice[0]!r} twice")
            elif fields and len(fields) != len(header):
                raise InputError(
                    f"{path}, {place}: expected {len(header)} fields, as in the header ({listed(header)}), "
                    f"got {len(fields)}{hint}"
                )
            elif fields:
                yield place, dict(zip(header, fields, strict=True))
            place = f"line {rows.line_num + 1}"
    except csv.Error as error:
        raise InputError(f"{path}, {place}: cannot be read: {error}{hint}") from error


def json_rows(lines: Lines, path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """One JSON object a line."""
    for line in lines:
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise InputError(f"{path}, line {lines.number}: not JSON: {error}") from error
        if not isinstance(row, dict):
            raise InputError(f"{path}, line {lines.number}: expected one JSON object a line, got {row!r:.80}")
        yield f"line {lines.number}", row


def parquet_rows(path: Path, wanted: list[str]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Rows of a Parquet file; class labels by their names, where ``datasets`` wrote it."""
    try:
        columns = pyarrow_parquet.read_schema(path).names
        if not set(wanted) <= set(columns):
            yield "row 1", dict.fromkeys(columns)  # to be told that it lacks one
            return
        table = datasets.Dataset(pyarrow_parquet.read_table(path, columns=wanted))
    except ArrowException as error:
        raise InputError(f"{path}: not a Parquet file: {error}") from error
    named = {name: f for name, f in table.features.items() if isinstance(f, datasets.ClassLabel)}
    for number, row in enumerate(table, start=1):
        yield f"row {number}", row | {name: f.int2str(row[name]) for name, f in named.items() if row[name] is not None}


# -- what is trained on, what is evaluated on -----------------------------------------------------------------


@dataclass(frozen=True)
class Data:
    """The rows of a run."""

    train: Rows
    evaluation: Rows
    notes: list[str]
    """What the user should know about them."""


def load(options: Options) -> Data:
    """Read the files of a run, hold rows out if there is no --eval, and check that they can be learned from."""
    train = read(options.train, options.text_column, options.label_column)
    if options.eval_fraction is None:
        assert options.eval is not None  # it is one or the other
        evaluation = read(options.eval, options.text_column, options.label_column)
        notes = [f"{len(train):,} rows to train on, {len(evaluation):,} to evaluate on"]
        known = {share(text) for text in train.texts}
        if both := sum(share(text) in known for text in evaluation.texts):
            notes.append(f"{both:,} of the {len(evaluation):,} evaluation texts are in --train too")
    else:
        train, evaluation = held_out(train, options.eval_fraction)
        notes = [
            f"{len(train):,} rows to train on; {len(evaluation):,} are held out to evaluate on, those whose text has a "
            f"hash in the lowest {options.eval_fraction:g}"
        ]
    if options.task == CLASSIFICATION:
        check_labels(train, evaluation)
    return Data(train, evaluation, notes)


def share(text: str) -> float:
    """A number from 0 to 1 by a hash of the text; the same for texts that differ in case and spacing alone."""
    plain = " ".join(text.casefold().split())
    return int.from_bytes(hashlib.sha256(plain.encode("utf-8", "surrogatepass")).digest()[:8], "big") / 2**64


def held_out(rows: Rows, fraction: float) -> tuple[Rows, Rows]:
    """(to train on, to evaluate on): which is a matter of a row's text alone, so it stays when rows are added."""
    kept: list[int] = []
    out: list[int] = []
    for i, text in enumerate(rows.texts):
        (out if share(text) < fraction else kept).append(i)
    if not kept or not out:
        raise InputError(
            f"{rows.path}: of its {len(rows):,} rows, {len(out):,} would be held out for evaluation and {len(kept):,} "
            "be trained on; give more rows, another --eval-fraction, or a file with --eval"
        )
    return rows.chosen(kept), rows.chosen(out)


def check_labels(train: Rows, evaluation: Rows) -> None:
    """Raise unless there are classes to tell apart, and none that was never seen."""
    counts = train.counts
    if len(counts) < 2:
        raise InputError(f"{train.path}: expected at least two different labels, got {listed(counts)} alone")
    if 2 * len(counts) > len(train) and len(counts) > 2:
        raise InputError(
            f"{train.path}: expected a few labels, each in several rows, got {len(counts):,} different ones in "
            f"{len(train):,} rows ({listed(counts)}); is --label-column the right one?"
        )
    if unseen := [label for label in evaluation.counts if label not in counts]:
        first = (evaluation.labels or []).index(unseen[0])
        how = (
            "every row with it was held out; give more rows with it, or a file with --eval"
            if evaluation.path == train.path
            else f"--train has {listed(counts)}"
        )
        raise InputError(
            f"{evaluation.path}, {evaluation.places[first]}: no row to train on has the label {unseen[0]!r}; {how}"
        )


# -- tokens --------------------------------------------------------------------------------------------------


def tokenized(
    rows: Rows, tokenizer: Any, limit: int | None, options: Options, label_ids: Mapping[str, int]
) -> tuple[datasets.Dataset, int]:
    """The rows as a model takes them, and how many of them were cut.

    A text for a causal model ends in the tokenizer's end-of-sequence token, if that has one and the text was not cut.

    Args:
        rows: the texts.
        tokenizer: of the model.
        limit: the most tokens the model can take; None: any number.
        options: ``max_length`` is where to cut; without, a text beyond the limit raises :class:`InputError`.
        label_ids: the number of each label.
    """
    cut_at = options.max_length
    most = cut_at or limit
    causal = options.task == CAUSAL_LM

    def encode(batch: Mapping[str, list[str]]) -> Mapping[str, Any]:
        encoded = dict(tokenizer(batch["text"]))
        if causal:
            end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
            ids = [row if row[-1:] == end else row + end for row in encoded["input_ids"]]
            encoded = {"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]}
        lengths = [len(row) for row in encoded["input_ids"]]
        for i, length in enumerate(lengths):
            if cut_at is not None and length > cut_at:
                shorter = tokenizer(batch["text"][i], truncation=True, max_length=cut_at)
                for name, values in encoded.items():
                    values[i] = shorter[name]
        labels = {"labels": encoded["input_ids"]} if causal else {}
        return {**encoded, **labels, "length": lengths}

    table = datasets.Dataset.from_dict({"text": rows.texts})
    encoded = table.map(encode, batched=True, remove_columns="text", desc=f"tokenizing {rows.path.name}")
    lengths = list(encoded["length"])
    encoded = encoded.remove_columns("length")
    long = [i for i, length in enumerate(lengths) if most is not None and length > most]
    if long and cut_at is None:
        longest = max(long, key=lengths.__getitem__)
        raise InputError(
            f"{rows.path}: {len(long):,} of {len(rows):,} texts are longer than the {limit:,} tokens that the model "
            f"can take (the longest, in {rows.places[longest]}, has {lengths[longest]:,}); cut them off with "
            f"--max-length {limit}"
        )
    if causal and (short := [i for i, length in enumerate(lengths) if length < 2]):
        raise InputError(f"{rows.path}, {rows.places[short[0]]}: the text is one token, which leaves none to predict")
    if rows.labels is not None:
        encoded = encoded.add_column("labels", [label_ids[label] for label in rows.labels])
    return encoded, len(long)


def listed(names: Any) -> str:
    """Names in a row, not too many of them."""
    shown = [repr(name) for name in names]
    return ", ".join(shown[:MOST_LISTED]) + (
        f" and {len(shown) - MOST_LISTED} more" if len(shown) > MOST_LISTED else ""
    )
