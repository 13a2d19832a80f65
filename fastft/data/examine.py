"""Examine a data set: its parts, what is wrong with them, and the figures of a report."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np

from .duplicates import Match, column, find_duplicates, words_of
from .selection import Balance, class_balance

TEXT_NAMES = ("text", "sentence", "content", "review", "document", "body", "prompt", "question")
LABEL_NAMES = ("label", "labels", "class", "target", "category", "sentiment", "intent", "rating", "score", "stars")
MOST_CLASSES = 20
"""A column with more different numbers than this holds measurements, and so does one with fractions."""
QUANTILES = {"min": 0.0, "p05": 0.05, "median": 0.5, "p95": 0.95, "p99": 0.99, "max": 1.0}
IMBALANCED = 3.0
"""Classes count as out of balance where the largest has so many times the examples of the smallest."""
RARE = 5
"""A class with fewer examples than this can hardly be learned or measured."""
KINDS = {
    "exact": "letter for letter",
    "normalised": "but for case, spacing, punctuation",
    "near": "nearly",
}


@dataclass(frozen=True)
class Finding:
    """A fault of a data set, and its remedy."""

    what: str
    do: str


@dataclass(frozen=True)
class Part:
    """One of the two files: its texts, its labels, and the repetitions within it."""

    name: str
    texts: list[str]
    labels: list[Any] | None
    empty: list[int]
    """Rows without a text."""
    words: list[int]
    """How many words each text has."""
    duplicates: list[Match]
    vocabulary: Counter[str]

    def count(self, kind: str) -> int:
        """How many texts repeat an earlier one in this way."""
        return sum(match.kind == kind for match in self.duplicates)

    @cached_property
    def balance(self) -> Balance | None:
        """How often each label occurs; None without labels, or where they are measurements."""
        labels = [label for label in self.labels or () if label is not None]
        different = {label for label in labels if isinstance(label, float)}
        if not labels or len(different) > MOST_CLASSES or any(label % 1 for label in different):
            return None
        return class_balance(label if isinstance(label, (str, int, float)) else str(label) for label in labels)

    @cached_property
    def numbers(self) -> list[float]:
        """The labels that are measurements."""
        return [] if self.balance else [float(label) for label in self.labels or () if label is not None]

    @cached_property
    def spread(self) -> float:
        """The standard deviation of labels that are measurements."""
        return statistics.pstdev(self.numbers)

    def labels_differ(self, match: Match) -> bool:
        """Whether a repetition has another label: another class, or a number more than a standard deviation away."""
        label, other = (self.labels[i] if self.labels is not None else None for i in (match.index, match.of))
        if label is None or other is None:
            return False
        return abs(float(label) - float(other)) > self.spread if self.balance is None else bool(label != other)


@dataclass(frozen=True)
class Examined:
    """A training set, and an evaluation set if there is one, with the repetitions that were found in them."""

    train: Part
    eval: Part | None
    text_column: str
    label_column: str | None
    leakage: list[Match]
    """Evaluation texts (``index``) that are in the training data (``of``)."""
    conflicts: list[Match]
    """Exact and normalised repetitions whose labels differ, see :meth:`Part.labels_differ`."""

    @property
    def parts(self) -> list[Part]:
        return [part for part in (self.train, self.eval) if part is not None]


def make_part(dataset: Any, text_column: str, label_column: str | None, near: float | None, name: str) -> Part:
    texts = column(dataset, text_column)
    words = [words_of(text) for text in texts]
    return Part(
        name=name,
        texts=texts,
        labels=None if label_column is None else list(dataset[label_column]),
        empty=[number for number, text in enumerate(texts) if not text.strip()],
        words=[len(text) for text in words],
        duplicates=find_duplicates(texts, near=near),
        vocabulary=Counter(word for text in words for word in text),
    )


def guess_text_column(dataset: Any, name: str) -> str:
    """A column with a usual name that holds texts, or else the one with the longest."""
    first = dataset.select(range(min(1000, len(dataset))))
    lengths: dict[str, int] = {
        key: sum(len(text or "") for text in first[key])
        for key, feature in dataset.features.items()
        if getattr(feature, "dtype", None) in ("string", "large_string")
    }
    if not lengths:
        raise ValueError(f"{name}: has no column of texts; it has {', '.join(dataset.column_names)}")
    usual = [key for wanted in TEXT_NAMES for key in lengths if key.lower() == wanted]
    return usual[0] if usual else max(lengths, key=lambda key: lengths[key])


def guess_label_column(dataset: Any, text_column: str) -> str | None:
    """A column with a usual name, also as a part of it: ``mean_rating``."""
    others = [key for key in dataset.column_names if key != text_column]
    return next((key for wanted in LABEL_NAMES for key in others if wanted in key.lower().split("_")), None)


# -- findings -----------------------------------------------------------------------------------------------


def find_problems(examined: Examined) -> list[Finding]:
    """All findings, the worst first."""
    train, text = examined.train, examined.text_column
    problems = [*leakage_problems(examined)]
    if train.empty:
        problems.append(
            Finding(
                f"{rows(len(train.empty))} of {len(train.texts):,} {have(len(train.empty))} no text.",
                f'Leave them out: `dataset.filter(lambda row: (row["{text}"] or "").strip())`.',
            )
        )
    if examined.conflicts:
        problems.append(
            Finding(
                f"{rows(len(examined.conflicts))} {have(len(examined.conflicts))} the same text as an earlier one, but "
                + ("another label." if train.balance else "a label more than a standard deviation away."),
                "Decide on one label for each text, or leave such rows out: no model can get both right.",
            )
        )
    sure = train.count("exact") + train.count("normalised")
    if sure:
        problems.append(
            Finding(
                f"{rows(sure)} of {len(train.texts):,} ({sure / len(train.texts):.1%}) {repeat(sure)} an earlier one, "
                f"{train.count('exact'):,} letter for letter.",
                f'Leave them out: `fastft.data.deduplicate(dataset, "{text}", near=None)`. They count twice in '
                "training, and a random split puts copies on both sides.",
            )
        )
    if near := train.count("near"):
        problems.append(
            Finding(
                f"{rows(near)} nearly {repeat(near)} an earlier one.",
                f'Look at them below; a "not" may be all that differs. If they are copies: '
                f'`fastft.data.deduplicate(dataset, "{text}")`.',
            )
        )
    return [*problems, *label_problems(examined), *length_problems(examined), *vocabulary_problems(examined)]


def leakage_problems(examined: Examined) -> list[Finding]:
    if examined.eval is None or not examined.leakage:
        return []
    count, total = len(examined.leakage), len(examined.eval.texts)
    sure = sum(match.kind != "near" for match in examined.leakage)
    return [
        Finding(
            f"{count:,} of {total:,} evaluation texts ({count / total:.1%}) are in the training data too, "
            f"{count - sure:,} of them nearly.",
            "Take them out of the training data, or the scores will promise too much: "
            f'`fastft.data.remove_leakage(dataset, eval_dataset, "{examined.text_column}")`.',
        )
    ]


def label_problems(examined: Examined) -> list[Finding]:
    train, problems = examined.train, []
    if train.labels is None:
        return []
    if missing := sum(label is None for label in train.labels):
        problems.append(
            Finding(
                f"{rows(missing)} {have(missing)} no label in `{examined.label_column}`.",
                "Label them or leave them out.",
            )
        )
    balance = train.balance
    if balance is None:
        return problems
    if len(balance.counts) == 1:
        problems.append(
            Finding(f"All rows have the same label, {label_name(next(iter(balance.counts)))}.", "Check the column.")
        )
    elif balance.imbalance >= IMBALANCED:
        problems.append(
            Finding(
                f"The classes are out of balance, {balance.imbalance:,.1f} to 1: always guessing "
                f"{label_name(next(iter(balance.counts)))} is {balance.majority:.1%} right.",
                "Judge by macro F1 or balanced accuracy, and weigh the loss with "
                "`fastft.data.class_balance(labels).weights`.",
            )
        )
    rare = [label for label, count in balance.counts.items() if count < RARE]
    if rare and len(balance.counts) > 1:
        problems.append(
            Finding(
                f"{len(rare)} of {len(balance.counts)} classes have fewer than {RARE} examples: {named(rare)}.",
                "Collect more of them, merge them with others, or leave them out.",
            )
        )
    tested = examined.eval.balance if examined.eval is not None else None
    unknown = [label for label in tested.counts if label not in balance.counts] if tested is not None else []
    if unknown:
        problems.append(
            Finding(f"Labels of the evaluation data that are never trained: {named(unknown)}.", "Check both columns.")
        )
    return problems


def length_problems(examined: Examined) -> list[Finding]:
    words = [count for count in examined.train.words if count]
    if not words or max(words) < 50 * statistics.median(words):
        return []
    longest = max(range(len(examined.train.words)), key=lambda row: examined.train.words[row])
    return [
        Finding(
            f"The longest text, row {longest}, has {max(words):,} words; half have at most "
            f"{statistics.median(words):,.0f}.",
            "See whether several rows ran into one; otherwise split or truncate it, as it makes its whole batch long.",
        )
    ]


def vocabulary_problems(examined: Examined) -> list[Finding]:
    if examined.eval is None or not examined.eval.vocabulary:
        return []
    unseen = unseen_words(examined)
    if unseen["share_of_words"] < 0.1:
        return []
    return [
        Finding(
            f"{unseen['share_of_words']:.0%} of the words in the evaluation data never occur in the training data.",
            "Add training data from where the evaluation data come from, or mix such data in with "
            "`fastft.data.ReplayMixer`; keep more of the model with an anchor.",
        )
    ]


def unseen_words(examined: Examined) -> dict[str, Any]:
    """The evaluation data's words that are not in the training data: their shares, and the most frequent of them."""
    assert examined.eval is not None
    known, asked = examined.train.vocabulary, examined.eval.vocabulary
    unseen = {word: count for word, count in asked.items() if word not in known}
    return {
        "share_of_words": sum(unseen.values()) / max(1, sum(asked.values())),
        "share_of_different_words": len(unseen) / max(1, len(asked)),
        "most_frequent": [word for word, _ in Counter(unseen).most_common(10)],
    }


# -- figures -------------------------------------------------------------------------------------------------


def part_json(part: Part) -> dict[str, Any]:
    repeated = {match.index for match in part.duplicates}
    return {
        "name": part.name,
        "rows": len(part.texts),
        "empty": part.empty,
        "words": quantiles(part.words),
        "characters": quantiles([len(text) for text in part.texts]),
        "different_words": len(part.vocabulary),
        "labels": labels_json(part),
        "duplicates": [asdict(match) for match in part.duplicates],
        "rows_without_repetition": len(part.texts) - len(repeated),
    }


def labels_json(part: Part) -> dict[str, Any] | None:
    if part.labels is None:
        return None
    missing = sum(label is None for label in part.labels)
    balance = part.balance
    if balance is None:
        return {"missing": missing, "numbers": quantiles(part.numbers)}
    counts = {str(label): count for label, count in balance.counts.items()}
    return {"missing": missing, "counts": counts, "majority": balance.majority, "imbalance": balance.imbalance}


def quantiles(values: Sequence[float]) -> dict[str, float]:
    if not values:
        return {}
    return {name: round(float(np.quantile(values, q)), 4) for name, q in QUANTILES.items()}


# -- words ---------------------------------------------------------------------------------------------------


def rows(count: int) -> str:
    return f"{count:,} row{'s' if count != 1 else ''}"


def have(count: int) -> str:
    return "have" if count != 1 else "has"


def repeat(count: int) -> str:
    return "repeat" if count != 1 else "repeats"


def label_name(label: Any) -> str:
    return f"“{label}”" if isinstance(label, str) else str(label)


def named(labels: Sequence[Any]) -> str:
    names = [label_name(label) for label in labels[:10]]
    return ", ".join(names) + (f" and {len(labels) - 10} more" if len(labels) > 10 else "")
