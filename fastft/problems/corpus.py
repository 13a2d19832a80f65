"""The data: what the model is taught (reviews) and what it should not forget (WordNet).

Every choice of rows is made by a hash of their text, so it does not depend on the order of the rows in a
file, on Python's random numbers, or on how many rows a run asks for: a quick run sees a part of what a full
run sees, and the test rows are never trained on.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import resources

TEST_ROWS = 2000
"""Movie reviews set aside for testing, whatever part of them a run scores."""


@dataclass(frozen=True)
class Review:
    """A sentence about a film and whether its raters, on average, found it positive."""

    text: str
    positive: bool


@dataclass(frozen=True)
class Sense:
    """One meaning of a word: its definition, and a sentence that uses it."""

    gloss: str
    example: str


def read_table(name: str) -> list[dict[str, str]]:
    """The rows of a packaged ``.tsv.gz`` file, by column name."""
    packed = resources.files(__package__).joinpath("data", f"{name}.tsv.gz").read_bytes()
    lines = io.StringIO(gzip.decompress(packed).decode("utf-8"), newline="")
    return list(csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))


def load_reviews(target: str = "movie") -> list[Review]:
    """Reviews with a clear polarity, of "movie" or "amazon", in hash order, no text twice."""
    return clear_reviews(read_table(f"{target}_reviews"))


def load_senses() -> list[Sense]:
    """WordNet senses in hash order, no gloss and no example twice."""
    return distinct_senses(read_table("wordnet_gloss_examples"))


def clear_reviews(rows: Iterable[dict[str, str]], threshold: float = 0.5) -> list[Review]:
    """Label ``rows`` by the sign of their rating, without those whose raters were undecided."""
    by_key: dict[str, Review] = {}
    # Sorted, so that of two ratings of one text the same one is kept whatever the row order.
    for row in sorted(rows, key=lambda row: (row["text"], float(row["mean_rating"]))):
        rating = float(row["mean_rating"])
        if abs(rating) >= threshold:
            by_key.setdefault(text_key(row["text"]), Review(row["text"], rating > 0))
    return [by_key[key] for key in sorted(by_key)]


def distinct_senses(rows: Iterable[dict[str, str]]) -> list[Sense]:
    """Senses in hash order; a repeated gloss or example would make retrieval ambiguous, so only the first stays."""
    senses = {Sense(row["gloss"], row["example"]) for row in rows}
    seen: set[str] = set()
    kept = []
    for sense in sorted(senses, key=lambda s: text_key(f"{s.gloss}\t{s.example}")):
        keys = {text_key(sense.gloss), text_key(sense.example)}
        if not keys & seen:
            kept.append(sense)
        seen |= keys
    return kept


def text_key(text: str) -> str:
    """A hash of ``text`` that ignores case and spacing, so that near-copies fall on the same side of a split."""
    plain = " ".join(text.casefold().split())
    return hashlib.blake2b(plain.encode("utf-8"), digest_size=16).hexdigest()


def split_reviews(
    target: str = "movie", train_rows: int | None = None, test_rows: int | None = None
) -> tuple[list[Review], list[Review]]:
    """Training and test rows of :func:`load_reviews`.

    The first by hash are for testing, ``TEST_ROWS`` of the movie reviews or a third of the others; the rest is for
    training. Of both parts the first so many; None: all.

    Raises:
        ValueError: there are not so many.
    """
    reviews = load_reviews(target)
    held_out = TEST_ROWS if target == "movie" else len(reviews) // 3
    test, train = reviews[:held_out], reviews[held_out:]
    for name, rows, wanted in (("train_rows", train, train_rows), ("test_rows", test, test_rows)):
        if wanted is not None and wanted > len(rows):
            raise ValueError(f"{name}: expected at most {len(rows)}, got {wanted}")
    return train[:train_rows], test[:test_rows]


def sense_pools(senses: list[Sense], pools: int, size: int) -> list[list[Sense]]:
    """``pools`` disjoint pools of ``size`` senses, the same ones for every seed.

    Raises:
        ValueError: there are not so many senses.
    """
    if pools * size > len(senses):
        raise ValueError(f"pools: expected at most {len(senses)} senses in all, got {pools} pools of {size}")
    return [senses[i * size : (i + 1) * size] for i in range(pools)]


def distinct_texts(*names: str) -> list[str]:
    """The texts of packaged tables, in hash order, none twice."""
    by_key = {text_key(row["text"]): row["text"] for name in names for row in read_table(name)}
    return [by_key[key] for key in sorted(by_key)]
