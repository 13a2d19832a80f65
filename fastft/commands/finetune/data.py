"""From the user's file to rows a model can be trained on: reading, checking, holding out, tokenizing."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets

from fastft.data import Augmented, ReplayMixer, TextAugment, find_duplicates, find_leakage, read_rows
from fastft.names import listed

from .errors import InputError
from .options import CAUSAL_LM, CLASSIFICATION, Options


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

    def select(self, indices: Sequence[int]) -> Rows:
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
    """The rows of a file.

    Raises:
        UserError: the file cannot be read, or a row has no text or, where a column of labels was given, no label.
    """
    wanted = [text_column] if label_column is None else [text_column, label_column]
    texts: list[str] = []
    labels: list[str] = []
    places: list[str] = []
    for place, row in read_rows(path, wanted):
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


# -- rows to train on, rows to evaluate on --------------------------------------------------------------------


@dataclass(frozen=True)
class Data:
    """The rows of a run."""

    train: Rows
    evaluation: Rows
    replay: Rows | None
    """Old rows, to be mixed in."""
    notes: list[str]
    """Lines about them for the user."""

    @property
    def labels(self) -> list[str]:
        """The labels of all rows to train on."""
        old = {} if self.replay is None else self.replay.counts
        return sorted_labels({*self.train.counts, *old})


def load(options: Options) -> Data:
    """Read the files of a run, hold rows out if there is no --eval, and check the labels."""
    train = read(options.train, options.text_column, options.label_column)
    replay = None if options.replay is None else read(options.replay, options.text_column, options.label_column)
    train, replay, removed = without_repetitions(train, replay, options)
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
    if replay is not None:
        notes.append(f"{len(replay):,} old rows to mix in, {options.replay_ratio:.3g} of all that is trained on")
    data = Data(train, evaluation, replay, removed + notes)
    if options.task == CLASSIFICATION:
        check_labels(data)
    return data


def without_repetitions(train: Rows, replay: Rows | None, options: Options) -> tuple[Rows, Rows | None, list[str]]:
    """The rows without those that ``--dedupe`` and ``--check-leakage`` leave out, and lines about these."""
    notes = []
    try:
        if options.check_leakage is not None:
            secret = read(options.check_leakage, options.text_column, None)
            train, said = left_out(train, find_leakage(secret.texts, train.texts), f"whose text is in {secret.path}")
            notes.append(said)
            if replay is not None:
                matches = find_leakage(secret.texts, replay.texts)
                replay, said = left_out(replay, matches, f"whose text is in {secret.path}")
                notes.append(said)
        if options.dedupe:
            train, said = left_out(train, find_duplicates(train.texts), "whose text repeats another")
            notes.append(said)
    except ImportError as error:
        raise InputError(str(error)) from error
    return train, replay, notes


def left_out(rows: Rows, matches: Sequence[Any], why: str) -> tuple[Rows, str]:
    """The rows that match nothing, and a line about the others."""
    repeated = {match.index for match in matches}
    kept = rows.select([i for i in range(len(rows)) if i not in repeated])
    if not len(kept):
        raise InputError(f"{rows.path}: all of its {len(rows):,} rows would be left out, as rows {why}")
    near = sum(match.kind == "near" for match in matches)
    return kept, f"{rows.path}: {len(matches):,} rows {why} are left out ({near:,} nearly the same)"


def share(text: str) -> float:
    """A number from 0 to 1 by a hash of the text; the same for texts that differ in case and spacing alone."""
    plain = " ".join(text.casefold().split())
    return int.from_bytes(hashlib.sha256(plain.encode("utf-8", "surrogatepass")).digest()[:8], "big") / 2**64


def held_out(rows: Rows, fraction: float) -> tuple[Rows, Rows]:
    """(to train on, to evaluate on). This depends on a row's text alone, so it stays the same when rows are added."""
    kept: list[int] = []
    out: list[int] = []
    for i, text in enumerate(rows.texts):
        (out if share(text) < fraction else kept).append(i)
    if not kept or not out:
        raise InputError(
            f"{rows.path}: of its {len(rows):,} rows, {len(out):,} would be held out for evaluation and {len(kept):,} "
            "be trained on; give more rows, another --eval-fraction, or a file with --eval"
        )
    return rows.select(kept), rows.select(out)


def check_labels(data: Data) -> None:
    """Raise unless there are at least two classes, each in several rows, and all evaluation rows have one of them."""
    train, evaluation, counts = data.train, data.evaluation, data.train.counts
    if len(counts) < 2:
        raise InputError(f"{train.path}: expected at least two different labels, got {listed(counts)} alone")
    if 2 * len(counts) > len(train) and len(counts) > 2:
        raise InputError(
            f"{train.path}: expected a few labels, each in several rows, got {len(counts):,} different ones in "
            f"{len(train):,} rows ({listed(counts)}); is --label-column the right one?"
        )
    known = data.labels
    if unseen := [label for label in evaluation.counts if label not in known]:
        first = (evaluation.labels or []).index(unseen[0])
        how = (
            "every row with it was held out; give more rows with it, or a file with --eval"
            if evaluation.path == train.path
            else f"--train {'has' if data.replay is None else 'and --replay have'} {listed(known)}"
        )
        raise InputError(
            f"{evaluation.path}, {evaluation.places[first]}: no row to train on has the label {unseen[0]!r}; {how}"
        )


# -- tokens --------------------------------------------------------------------------------------------------


def tokenized(
    rows: Rows, tokenizer: Any, limit: int | None, options: Options, label_ids: Mapping[str, int]
) -> tuple[datasets.Dataset, int]:
    """The rows as a model takes them, and the number of rows that were cut off.

    A text for a causal model ends in the tokenizer's end-of-sequence token, if that has one and the text was not cut.

    Args:
        rows: the texts.
        tokenizer: of the model.
        limit: the most tokens the model can take; None: any number.
        options: ``max_length`` is where to cut.
        label_ids: the number of each label.

    Raises:
        InputError: there is no ``max_length`` and a text is beyond the limit, or one for a causal model is one token.
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


def mixed(train: datasets.Dataset, replay: datasets.Dataset | None, tokenizer: Any, options: Options) -> Any:
    """The training data, map-style: old rows mixed in, and all of them augmented, as the options say.

    Raises:
        ValueError: an augmentation cannot be made for this tokenizer.
    """
    mixture: Any = train
    if replay is not None:
        mixture = ReplayMixer(train, replay, options.replay_ratio, options.seed, fresh=True)
    if options.augment is not None:
        mixture = Augmented(mixture, TextAugment.from_spec(options.augment, tokenizer), options.seed)
    return mixture
