"""Find texts that repeat: exactly, but for case and punctuation, or nearly; and evaluation texts seen in training."""

from __future__ import annotations

import importlib
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Subset

Kind = Literal["exact", "normalised", "near"]

UNSPACED = r"\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
WORD = re.compile(
    rf"[{UNSPACED}]|[^\W{UNSPACED}]+"  # a word; or one sign of a script that puts no spaces between words
    r"|(?<!\w)[:;=]['o^-]*[()\[\]{}dpo3/\\|*@$<>]+(?!\w)|<3|[\u2600-\u27bf\U0001f000-\U0001faff]"  # :-) and emoji:
)  # some texts differ in nothing else, and mean the opposite

PERMUTATIONS = 128
CANDIDATE_JACCARD = 0.45
"""From about this Jaccard similarity of their character trigrams on, texts are compared word by word."""


@dataclass(frozen=True)
class Match:
    """Text ``index`` repeats text ``of``."""

    index: int
    of: int
    kind: Kind
    similarity: float
    """The share of their words that they have in common, in the same order: 1 unless ``kind`` is "near"."""


def find_duplicates(texts: Sequence[str], *, near: float | None = 0.8) -> list[Match]:
    """The texts that repeat an earlier one that repeats none itself; what is left without them holds no repetition.

    First exact repetitions are found; then those that differ in case, spacing, punctuation (smileys count as words) or
    Unicode form only; then near ones: candidates by MinHash LSH over character trigrams (datasketch), each then
    compared word by word. LSH misses a few, mostly among texts of some words.

    Args:
        texts: may hold empty ones, which repeat nothing.
        near: the least similarity of near repetitions, above 0 up to 1: 2·(words in common, in order) / (all words of
            both). 0.8, after Lee et al. 2022 (https://arxiv.org/abs/2107.06499), finds a changed word
            in five. None: do not look.

    Returns:
        A match for each repetition, by index: text ``index`` repeats text ``of``; ``kind`` is "exact", "normalised" or
        "near"; ``similarity`` is the share of their words that they have in common, in the same order.

    Raises:
        ValueError: ``near`` is out of range.
        ImportError: ``near`` is given and datasketch is not installed.
    """
    index = TextIndex(near)
    matches = []
    for number, text in enumerate(texts):
        found = index.find(text)
        if found is None:
            index.add(number, text)
        else:
            matches.append(Match(number, *found))
    return matches


def find_leakage(train_texts: Iterable[str], eval_texts: Sequence[str], *, near: float | None = 0.8) -> list[Match]:
    """The evaluation texts that are in the training set too, compared as :func:`find_duplicates` does.

    Returns:
        A match, as there, for each such text: ``index`` in ``eval_texts``, ``of`` in ``train_texts``.
    """
    index = TextIndex(near)
    for number, text in enumerate(train_texts):
        index.add(number, text)
    found = ((number, index.find(text)) for number, text in enumerate(eval_texts))
    return [Match(number, *match) for number, match in found if match is not None]


def deduplicate(dataset: Any, text_column: str | None = None, *, near: float | None = 0.8) -> Any:
    """A map-style dataset without the examples whose text repeats an earlier one.

    Args:
        dataset: a Hugging Face ``Dataset``, or anything with ``len`` and ``[i]``.
        text_column: where the text is in an example; None: the example is the text.
        near: as in :func:`find_duplicates`.

    Returns:
        A Hugging Face ``Dataset`` (by ``select``), or else a ``torch.utils.data.Subset``.
    """
    return without(dataset, find_duplicates(column(dataset, text_column), near=near))


def remove_leakage(dataset: Any, eval_dataset: Any, text_column: str | None = None, *, near: float | None = 0.8) -> Any:
    """A map-style training set without the examples whose text is in the evaluation set too.

    Args and returns as for :func:`deduplicate`.
    """
    texts = column(dataset, text_column)
    return without(dataset, find_leakage(column(eval_dataset, text_column), texts, near=near))


def without(dataset: Any, matches: Iterable[Match]) -> Any:
    """A dataset without the examples that repeat something."""
    repeated = {match.index for match in matches}
    kept = [number for number in range(len(dataset)) if number not in repeated]
    return dataset.select(kept) if hasattr(dataset, "select") else Subset(dataset, kept)


def column(dataset: Any, name: str | None) -> list[str]:
    """The texts of a dataset.

    Raises:
        ValueError: there is no such column, or it holds something else than texts.
    """
    names = getattr(dataset, "column_names", None)
    if names is not None and name is not None:
        if name not in names:
            raise ValueError(f"text_column: expected one of {', '.join(map(repr, names))}, got {name!r}")
        values: Iterable[Any] = dataset[name]
    else:
        values = (dataset[i] if name is None else dataset[i][name] for i in range(len(dataset)))
    texts = ["" if value is None else value for value in values]
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"text_column: expected texts, got {type(text).__name__} in row {number}")
    return texts


class TextIndex:
    """Texts in which the one that a new text repeats is found."""

    def __init__(self, near: float | None) -> None:
        if near is not None and not 0 < near <= 1:
            raise ValueError(f"near: expected None or a number above 0 up to 1, got {near!r}")
        self.near = near
        self._exact: dict[str, int] = {}
        self._normalised: dict[str, int] = {}
        self._words: dict[int, list[str]] = {}
        if near is not None:
            datasketch = import_datasketch()
            self._blank = datasketch.MinHash(PERMUTATIONS, hashfunc=int)
            self._lsh = datasketch.MinHashLSH(CANDIDATE_JACCARD, PERMUTATIONS, weights=(0.2, 0.8))

    def add(self, number: int, text: str) -> None:
        """Add a text unless it is empty; of equal ones the first counts."""
        words = words_of(text)
        plain = " ".join(words)
        self._exact.setdefault(text, number)
        if words and plain not in self._normalised:
            self._normalised[plain] = number
            if self.near is not None:
                self._words[number] = words
                self._lsh.insert(number, self._sketch(plain), check_duplication=False)

    def find(self, text: str) -> tuple[int, Kind, float] | None:
        """(the text that it repeats, kind, similarity), or None."""
        if not text.strip():
            return None
        if text in self._exact:
            return self._exact[text], "exact", 1.0
        words = words_of(text)
        plain = " ".join(words)
        if plain in self._normalised:
            return self._normalised[plain], "normalised", 1.0
        if self.near is None or not words:
            return None
        best = max(
            ((similarity(words, self._words[i], self.near), -i) for i in self._lsh.query(self._sketch(plain))),
            default=(0.0, 0),
        )
        return (-best[1], "near", best[0]) if best[0] >= self.near else None

    def _sketch(self, plain: str) -> Any:
        sketch = self._blank.copy()
        sketch.update_batch(trigrams(plain).tolist())
        return sketch


def words_of(text: str) -> list[str]:
    """The words of a text without case, punctuation and differences of Unicode form."""
    return WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def trigrams(plain: str) -> NDArray[np.uint32]:
    """A 32-bit hash of each three characters in a row, the ends of the text being characters too."""
    codes = np.frombuffer(f" {plain} ".encode("utf-32-le"), np.uint32)
    first, second, third = codes[:-2], codes[1:-1], codes[2:]
    return np.unique((first * np.uint32(0x9E3779B1) + second) * np.uint32(0x85EBCA77) + third)


def similarity(a: list[str], b: list[str], least: float) -> float:
    """2·(words in common, in order) / (all words); 0 if it is less than ``least``."""
    matcher = SequenceMatcher(None, a, b, autojunk=False)
    if matcher.real_quick_ratio() < least or matcher.quick_ratio() < least:
        return 0.0
    ratio = matcher.ratio()
    return ratio if ratio >= least else 0.0


def import_datasketch() -> Any:
    try:
        return importlib.import_module("datasketch")
    except ImportError as error:
        raise ImportError('finding near duplicates needs datasketch: pip install "fastft[data]"') from error
