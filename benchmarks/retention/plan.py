"""The runs, in order of value. Tuning: every method gets ``GRID_SIZE`` settings, tested on the validation split."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product, zip_longest
from typing import Any

from .run import TUNING_ROWS, Settings

GRID_SIZE = 3
SEEDS = (0, 1, 2)
POINT = 0.01
"""How much of the best accuracy may be given up for keeping more."""

Grid = list[Settings]


def grid(
    lrs: Iterable[float], strengths: Mapping[str, Sequence[float]] | None = None, texts: int = 16, kind: str = "generic"
) -> Grid:
    """The first ``GRID_SIZE`` of every lr with every strength of every ingredient."""
    names = list(strengths or {})
    settings = [
        Settings.of(lr, dict(zip(names, values, strict=True)), texts, kind, rows=TUNING_ROWS)
        for *values, lr in product(*(strengths or {}).values(), lrs)
    ]
    return settings[:GRID_SIZE]


GRIDS: dict[str, Grid] = {
    "full FT": grid((1e-4, 2e-4, 5e-5), {"fresh_head": (1,)}),
    "LP-FT": grid((1e-4, 2e-4, 5e-5)),
    "anchor + gradual, random head": grid((2e-4, 3e-4), {"anchor": (30, 100), "gradual": (0.5,), "fresh_head": (1,)}),
    "relation, both": grid((2e-4, 3e-4), {"relation": (30, 100)}, 32, "mixed"),
    "anchor": grid((2e-4, 3e-4), {"anchor": (30, 100)}),
    "distill, both": grid((2e-4, 3e-4), {"distill": (10, 30)}, 32, "mixed"),
    "replay": grid((1e-4, 2e-4), {"replay": (0.05, 0.1)}),
    "LoRA r8": grid((1e-3, 5e-4, 2e-3), {"lora": (8,)}),
    "distill, random words": grid((2e-4, 3e-4), {"distill": (10, 30)}, 32, "words"),
    "distill + anchor": grid((2e-4, 3e-4), {"distill": (10,), "anchor": (10, 30)}, 32, "mixed"),
    "SPD": grid((2e-4, 3e-4), {"spd": (1, 0.3)}),
    "EWC": grid((2e-4, 3e-4), {"ewc": (30, 300)}),
    "anchor + gradual": grid((2e-4, 3e-4), {"anchor": (30, 100), "gradual": (0.5,)}),
    "mixout": grid((1e-4, 2e-4), {"mixout": (0.7, 0.9)}),
    "L2-SP": grid((1e-4, 2e-4), {"l2sp": (0.1, 1.0)}),
    "distill, generic text": grid((2e-4, 3e-4), {"distill": (10, 30)}),
}
"""In order of value, as are the settings in each. Whose names don't say otherwise start from a linear probe's head."""

FULL = ("full FT", "LP-FT")
"""Full fine-tuning, from a random head and from a linear probe's (Kumar et al. 2022,
https://arxiv.org/abs/2202.10054)."""

PROBES = [Settings.of(rows=TUNING_ROWS), Settings.of().for_test(0)]
SEE_OLD_TASK = ("replay", "EWC")
"""Methods that learn from data of the source task itself: an upper bound to the others, and no answer to the goal."""
CONTENDERS = (*FULL, "anchor + gradual, random head", "anchor + gradual", "anchor", "replay", "LoRA r8")


def tuning() -> Iterator[Settings]:
    """First one setting of each method, then the next of each."""
    yield PROBES[0]
    for settings in zip_longest(*GRIDS.values()):
        yield from filter(None, settings)


def full_runs(tuned: list[dict[str, Any]], seeds: Iterable[int] = SEEDS) -> Iterator[Settings]:
    """The chosen setting of each method on all rows: first one seed of each, contenders first, then the next."""
    yield PROBES[1]
    order = sorted(GRIDS, key=lambda name: (name not in CONTENDERS, list(GRIDS).index(name)))
    for seed in seeds:
        yielded = set()
        for name in order:
            for choice in choices(name, tuned):
                test = choice.settings.for_test(seed)
                if test.key not in yielded:
                    yielded.add(test.key)
                    yield test


def measured(name: str, records: list[dict[str, Any]]) -> list[tuple[Settings, dict[str, Any]]]:
    """The method's settings that have been run, with their records."""
    by_key = {record["key"]: record for record in records}
    return [(settings, by_key[settings.key]) for settings in GRIDS[name] if settings.key in by_key]


@dataclass(frozen=True)
class Choice:
    """Settings and an α of WiSE-FT, for a reason."""

    name: str
    settings: Settings
    alpha: str
    target: float = float("nan")
    """On the validation split."""
    source: float = float("nan")


def best_target(tuned: list[dict[str, Any]]) -> float:
    """The best accuracy of full fine-tuning as trained."""
    found = [r for name in FULL for _, r in measured(name, tuned)]
    return max((r["scores"]["1"]["target"]["mean"] for r in found), default=float("nan"))


def choices(name: str, tuned: list[dict[str, Any]]) -> list[Choice]:
    """A method's settings and α by validation: as trained (α = 1), and with whatever α.

    Of what lies within a point of the best accuracy of full fine-tuning, that which keeps most; where nothing does,
    that which is most accurate. For full fine-tuning also the most accurate: the others are held against it.
    """
    runs = measured(name, tuned)
    floor = best_target(tuned) - POINT
    wanted = [(f"{name}, most accurate", ("1",), float("inf"))] * (name in FULL)
    wanted += [(name, ("1",), floor), (f"{name} + WiSE", None, floor)]
    found = [(title, pick(runs, least, alphas)) for title, alphas, least in wanted]
    return [Choice(title, *picked) for title, picked in found if picked is not None]


def pick(
    runs: list[tuple[Settings, dict[str, Any]]], floor: float, alphas: Sequence[str] | None
) -> tuple[Settings, str, float, float] | None:
    """The best of the runs, at one of the ``alphas`` (None: any), with its scores on target and source."""
    candidates = [
        (settings, alpha, scores["target"]["mean"], scores["source"]["mean"])
        for settings, record in runs
        for alpha, scores in record["scores"].items()
        if alphas is None or alpha in alphas
    ]
    near = [c for c in candidates if c[2] >= floor]
    if near:
        return max(near, key=lambda c: (c[3], c[2]))
    return max(candidates, key=lambda c: (c[2], c[3])) if candidates else None


# -- fastft.data ---------------------------------------------------------------------------------------------

PLAIN = "neither"
DATA: dict[str, dict[str, float]] = {
    PLAIN: {},
    "1 % replay": {"replay_mixer": 0.01},
    "5 % replay": {"replay_mixer": 0.05},
    "25 % replay": {"replay_mixer": 0.25},
    "token dropout": {"token_dropout": 0.1},
    "span masking": {"span_masking": 0.15},
    "synonyms": {"synonyms": 0.5},
    "NEFTune": {"neftune": 5.0},
}
"""Replay and augmentation at one strength each, chosen beforehand; no part of the tuning."""
DATA_LR = 3e-4
"""High enough for even a short run to forget plainly."""
DATA_ROWS, DATA_EPOCHS = 2048, 1


def data_settings(name: str | None, seed: int = 0) -> Settings:
    """The run of that name in ``DATA``; None: the model before it."""
    if name is None:
        return Settings.of(rows=DATA_ROWS, epochs=DATA_EPOCHS, split="test")
    return Settings.of(DATA_LR, DATA[name], seed=seed, rows=DATA_ROWS, epochs=DATA_EPOCHS, split="test")


def data_runs(seeds: Iterable[int] = SEEDS) -> Iterator[Settings]:
    """All of ``DATA`` with one seed, then with the next."""
    yield data_settings(None)
    for seed in seeds:
        yield from (data_settings(name, seed) for name in DATA)
