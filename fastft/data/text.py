"""Augment tokenised text: drop tokens, mask spans, put synonyms for words. Lengths, labels and special tokens stay."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from fastft.names import closest

from .augment import Keys, Switch, mix, mixed

Ids = NDArray[np.int64]
Flags = NDArray[np.bool_]

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
"""2⁶⁴ over the golden ratio: SplitMix64's step from one key to the next."""

DRAWS = np.array([mixed(1), mixed(2)], np.uint64)
HALF = np.uint64(32)
EVERYWHERE = slice(None)


class Rows:
    """The division of consecutive tokens into rows."""

    def __init__(self, lengths: Ids) -> None:
        self.lengths, self.ends = lengths, lengths.cumsum()
        self.starts: Ids = self.ends - lengths
        numbers = np.arange(1, self.ends[-1] + 1 if len(lengths) else 1, dtype=np.uint64)
        self.steps: Keys = (numbers - self.starts.astype(np.uint64).repeat(lengths)) * GOLDEN
        """1, 2, ... times ``GOLDEN`` for each row."""

    def contents(self, ids: Ids) -> Keys:
        """A hash of each row's ids and their order."""
        sums = np.zeros(len(ids) + 1, np.uint64)
        mix(ids.view(np.uint64) + self.steps).cumsum(out=sums[1:])
        differences: Keys = sums[self.ends] - sums[self.starts]  # modulo 2⁶⁴, as the sums
        return differences

    def keys(self, row_keys: Keys) -> Keys:
        """A key for each token, from one for each row."""
        keys: Keys = (row_keys - GOLDEN).repeat(self.lengths) + self.steps
        return keys


class Tokens(NamedTuple):
    """The tokens of some rows, one row after the other, [tokens] each."""

    ids: Ids
    free: Flags
    """Whether it may be changed: it is neither special nor protected."""
    special: Flags
    first: Flags
    """Whether it is the first of its row."""
    keys: Keys
    mask_id: int
    """The id that replaces a masked token."""

    def random(self, draw: int, places: Ids | slice = EVERYWHERE) -> Keys:
        """64 random bits for each token, or for those at ``places``; other ones for another ``draw``, 0 or 1."""
        return mix(self.keys[places] + DRAWS[draw])

    def masked(self, where: Flags) -> Ids:
        """The ids, with the mask's where they are free and ``where`` says so."""
        ids = self.ids.copy()
        ids[self.free & where] = self.mask_id
        return ids


Step = Callable[[Tokens], Ids]
"""One way to change tokens: gives the new ids; changes only those that are free."""


class TextAugment:
    """Steps that change the ``input_ids`` of examples, one after the other.

    Only ``input_ids`` change, and of them no special token of the tokenizer, no padding and nothing that a
    ``special_tokens_mask`` marks; lengths stay, so labels, also those of single tokens, keep their places. Empty rows
    are fine. Use it with :class:`AugmentingCollator` or :class:`~fastft.data.Augmented`.

    Args:
        tokenizer: of transformers.
        steps: :class:`TokenDropout`, :class:`SpanMasking`, :class:`SynonymReplacement` or a function of
            :class:`Tokens`.
        mask_id: what is put for a token that is dropped or masked; by default the tokenizer's mask token, else its
            unknown token.

    Raises:
        ValueError: there is no step, or the tokenizer has neither token and ``mask_id`` is not given.
    """

    def __init__(self, tokenizer: Any, *steps: Step, mask_id: int | None = None) -> None:
        if not steps:
            raise ValueError("steps: expected at least one, got none")
        candidates = (mask_id, tokenizer.mask_token_id, tokenizer.unk_token_id)
        found = [candidate for candidate in candidates if candidate is not None]
        if not found:
            raise ValueError("mask_id: expected a token id, since the tokenizer has no mask token, got None")
        self.steps, self.mask_id, self.pad_id = steps, int(found[0]), tokenizer.pad_token_id
        special = [*tokenizer.all_special_ids, self.mask_id]
        self._is_special = np.zeros(max(len(tokenizer), max(special) + 1), bool)
        self._is_special[special] = True
        self._salts = np.array([mixed(3, number) for number in range(len(steps))], np.uint64)

    @classmethod
    def from_spec(cls, spec: str, tokenizer: Any) -> TextAugment:
        """The augmentation that a text such as ``"token_dropout=0.1,span_masking=0.15,synonyms=0.2:words.tsv"`` names.

        ``span_masking=P:LENGTH`` sets the mean length; ``synonyms=P:FILE`` reads a table, see
        :class:`SynonymReplacement`.

        Raises:
            ValueError: with the part of ``spec`` that is wrong.
        """
        steps = []
        for name, p, *rest in cls.split_spec(spec):
            try:
                steps.append(SPEC_STEPS[name](tokenizer, float(p), *rest))
            except (TypeError, ValueError, OSError) as error:
                raise ValueError(f"augment: {name}={':'.join([p, *rest])}: {error}") from error
        return cls(tokenizer, *steps)

    @staticmethod
    def split_spec(spec: str) -> list[list[str]]:
        """The parts of a spec, as :meth:`from_spec` takes it, without a tokenizer and without reading files.

        Returns:
            For each part its name, the probability as a text, and the text behind a further colon if there is one.

        Raises:
            ValueError: an unknown name.
        """
        parts = []
        for part in spec.split(","):
            name, _, values = (text.strip() for text in part.partition("="))
            if name not in SPEC_STEPS:
                raise ValueError(
                    f"augment: expected one of {', '.join(SPEC_STEPS)}, got {name!r}{closest(name, SPEC_STEPS)}"
                )
            parts.append([name, *values.split(":", 1)])
        return parts

    def __call__(self, examples: list[Any], keys: Keys) -> list[Any]:
        """Copies of examples (dicts with ``input_ids`` as a list, array or tensor) with a random key for each."""
        parts = [np.asarray(example["input_ids"], np.int64) for example in examples]
        rows = Rows(np.array([len(part) for part in parts]))
        marked = [example.get("special_tokens_mask") for example in examples]
        protected = (
            None if any(row is None for row in marked) else np.concatenate([np.asarray(row, bool) for row in marked])
        )
        changed = np.split(self._changed(np.concatenate(parts), rows, keys, protected), rows.ends[:-1])
        return [
            {**example, "input_ids": like(example["input_ids"], part)}
            for example, part in zip(examples, changed, strict=True)
        ]

    def batch(self, batch: MutableMapping[str, Any], keys: Callable[[Keys], Keys]) -> None:
        """Change the ``input_ids`` [rows, tokens] of a batch.

        Args:
            batch: gets new ``input_ids``, of the same kind.
            keys: makes a random key for each row out of one for its content; padding does not count as such.
        """
        ids = np.asarray(batch["input_ids"])
        shown = batch.get("attention_mask")
        if shown is not None and tuple(shown.shape) == ids.shape:
            present = np.asarray(shown, bool)
        else:
            present = np.ones(ids.shape, bool) if self.pad_id is None else ids != self.pad_id
        marked = batch.get("special_tokens_mask")
        protected = None if marked is None else np.asarray(marked, bool)[present]
        tokens, rows = ids[present].astype(np.int64, copy=False), Rows(present.sum(1))
        changed = ids.copy()
        changed[present] = self._changed(tokens, rows, keys(rows.contents(tokens)), protected)
        batch["input_ids"] = like(batch["input_ids"], changed)

    def _changed(self, ids: Ids, rows: Rows, row_keys: Keys, protected: Flags | None) -> Ids:
        """``ids`` [tokens] after all steps."""
        special = self._is_special[ids]
        free = ~special if protected is None else ~(special | protected)
        keys, first = rows.keys(row_keys), rows.steps == GOLDEN
        for step, salt in zip(self.steps, self._salts, strict=True):
            ids = step(Tokens(ids, free, special, first, keys + salt, self.mask_id))
        return ids


class AugmentingCollator(Switch):
    """A ``collate_fn`` that augments the batches of another one.

    The change of a row depends on (seed, epoch, the row's tokens) alone: not on the rest of the batch, its padding,
    the number of workers, or on other uses of random numbers; so equal rows change alike in one epoch. Labels that
    the inner collator makes from the tokens are those of the text as it was.

    It augments until :meth:`eval`. transformers' ``Trainer`` gives evaluation data to the same collator and does
    not set its epoch: wrap its training data in :class:`~fastft.data.Augmented` instead.

    Args:
        collate: makes a dict with ``input_ids`` out of examples, such as ``DataCollatorWithPadding(tokenizer)``.
        augment: what to change.
        seed: of all changes.
    """

    def __init__(self, collate: Callable[[list[Any]], Any], augment: TextAugment, seed: int = 0) -> None:
        super().__init__(seed)
        self.collate, self.augment = collate, augment

    def __call__(self, examples: list[Any]) -> Any:
        batch = self.collate(examples)
        if self.training:
            self.augment.batch(batch, self.keys)
        return batch


def like(before: Any, after: NDArray[Any]) -> Any:
    """``after`` as a list, array or tensor, as ``before`` is."""
    if isinstance(before, torch.Tensor):
        tensor = torch.from_numpy(after)
        return tensor if tensor.dtype == before.dtype else tensor.to(before.dtype)
    return after.astype(before.dtype) if isinstance(before, np.ndarray) else after.tolist()


# -- steps ---------------------------------------------------------------------------------------------------


@cache
def below(p: float) -> np.uint64:
    """64 random bits are below it with probability p."""
    return np.uint64(min(int(p * 2.0**64), 2**64 - 1))


def check_probability(p: float) -> None:
    if not isinstance(p, (int, float)) or not 0 <= p < 1:
        raise ValueError(f"p: expected a number from 0 to below 1, got {p!r}")


@dataclass(frozen=True)
class TokenDropout:
    """Each token is masked with probability p, by itself."""

    p: float

    def __post_init__(self) -> None:
        check_probability(self.p)

    def __call__(self, tokens: Tokens) -> Ids:
        return tokens.masked(tokens.random(0) < below(self.p))


@dataclass(frozen=True)
class SpanMasking:
    """Runs of tokens are masked; their lengths are geometric, as in SpanBERT (Joshi et al. 2019,
    https://arxiv.org/abs/1907.10529).

    Args:
        p: the probability of a token to be masked; the same for each, at the ends of a row and in short rows too.
        mean_length: of a run, in tokens; at least 1/(1 − p), where tokens are masked one by one.
    """

    p: float
    mean_length: float = 3.0

    def __post_init__(self) -> None:
        check_probability(self.p)
        if not self.mean_length >= 1 / (1 - self.p):
            raise ValueError(
                f"mean_length: expected at least 1/(1 - p) = {1 / (1 - self.p):.3g}, got {self.mean_length!r}"
            )

    def __call__(self, tokens: Tokens) -> Ids:
        if not len(tokens.ids):
            return tokens.ids
        # A two-state chain that starts as it goes on: masked with probability p, it stays so with 1 − 1/mean_length.
        # A random number below ``begin`` makes the state masked, one from ``stay`` on makes it shown, and one between
        # them leaves it; so a token is as the last one before it that was not left.
        begin, stay = self.p / ((1 - self.p) * self.mean_length), 1 - 1 / self.mean_length
        bits = tokens.random(0)
        masked, starts = bits < below(begin), np.flatnonzero(tokens.first)
        masked[starts] = bits[starts] < below(self.p)
        decided = masked | (bits >= below(max(begin, stay))) | tokens.first
        last = np.maximum.accumulate(np.arange(len(bits)) * decided)
        return tokens.masked(masked[last])


class SynonymReplacement:
    """Words of a table are replaced, each with probability p, by one of their synonyms.

    Only words that are one token, by synonyms that are one token, so that lengths stay; both as written and
    capitalised, at the beginning of a text and within.

    Args:
        p: the probability of a word of the table to be replaced.
        table: from words to their synonyms; or a UTF-8 file of it, with a word and its synonyms on each line, separated
            by tabs.
        tokenizer: of transformers, the one that made the tokens.

    Raises:
        ValueError: p is no probability below 1, a line of the file has no synonym, or no word can be replaced.
    """

    def __init__(self, p: float, table: Mapping[str, Sequence[str]] | str | Path, tokenizer: Any) -> None:
        check_probability(p)
        self.p = p
        if isinstance(table, (str, Path)):
            table = read_synonyms(table)
        pairs = [(word, synonym) for word, synonyms in table.items() for synonym in synonyms]
        found: dict[int, dict[int, None]] = {}  # a dict of None: each synonym once, in order
        for form in (str, str.capitalize):
            for before in ("", " "):
                words, synonyms = (single_ids(tokenizer, [before + form(pair[i]) for pair in pairs]) for i in (0, 1))
                for word, synonym in zip(words, synonyms, strict=True):
                    if word is not None and synonym is not None and word != synonym:
                        found.setdefault(word, {})[synonym] = None
        if not found:
            raise ValueError(
                f"table: expected a word and a synonym that are one token each, got none among {len(table)} words"
            )
        self.words = len(found)
        self._continues = continuing(tokenizer)
        self._count = np.zeros(len(self._continues), np.uint64)
        self._first = np.zeros(len(self._continues), np.int64)
        flat: list[int] = []
        for word, replacements in found.items():
            self._first[word], self._count[word] = len(flat), len(replacements)
            flat.extend(replacements)
        self._synonyms = np.array(flat, np.int64)

    def __call__(self, tokens: Tokens) -> Ids:
        # Step by step only those that are left: a text holds few of the table's words.
        places = np.flatnonzero(self._count[tokens.ids])
        places = places[tokens.free[places]]
        places = places[tokens.random(0, places) < below(self.p)]
        # The token behind the last one is taken to be the first, which goes on with none either.
        places = places[~(self._joined(tokens, places) | self._joined(tokens, (places + 1) % len(tokens.ids)))]
        words = tokens.ids[places]
        which = (tokens.random(1, places) >> HALF) * self._count[words] >> HALF
        ids = tokens.ids.copy()
        ids[places] = self._synonyms[self._first[words] + which.astype(np.int64)]
        return ids

    def _joined(self, tokens: Tokens, places: Ids) -> Flags:
        """Whether the tokens go on with the word before them: there is one in their row, and no special token."""
        return self._continues[tokens.ids[places]] & ~tokens.first[places] & ~tokens.special[places - 1]


def single_ids(tokenizer: Any, texts: list[str]) -> list[int | None]:
    """The id of each text that is a single token, and none that stands for others; None for other texts."""
    rows = tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
    special = set(tokenizer.all_special_ids)
    return [ids[0] if len(ids) == 1 and ids[0] not in special else None for ids in rows]


def continuing(tokenizer: Any) -> Flags:
    """For each id, whether its token goes on with a word: ``##ing``; or ``ing`` where ``Ġ`` or ``▁`` begin words."""
    words = [word or "" for word in tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))]
    marks = ("Ġ", "▁")
    marked = any(word.startswith(marks) for word in words)
    return np.array(
        [
            w.startswith("##") or (marked and not w.startswith(marks) and (w[:1].isalnum() or w[:1] in "'’"))
            for w in words
        ]
    )


def read_synonyms(path: str | Path) -> dict[str, list[str]]:
    """The table of synonyms in a file, see :class:`SynonymReplacement`.

    Raises:
        ValueError: a line has no synonym.
    """
    table: dict[str, list[str]] = {}
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        word, *synonyms = (part.strip() for part in line.split("\t"))
        synonyms = [synonym for synonym in synonyms if synonym]
        if not word or not synonyms:
            raise ValueError(f"{path}, line {number}: expected a word, a tab and a synonym, got {line!r:.80}")
        table.setdefault(word, []).extend(synonyms)
    return table


SPEC_STEPS: dict[str, Callable[..., Step]] = {
    "token_dropout": lambda tokenizer, p: TokenDropout(p),
    "span_masking": lambda tokenizer, p, length="3": SpanMasking(p, float(length)),
    "synonyms": lambda tokenizer, p, path: SynonymReplacement(p, path, tokenizer),
}
"""{name in a spec: function of the tokenizer, the probability and the texts behind it that makes the step}."""
