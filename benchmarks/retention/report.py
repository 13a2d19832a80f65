"""The table and the plot: ``python -m benchmarks.retention.report``. From the JSON lines and nothing else."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastft.plotting import BLUE, GREY, ORANGE, figure, whiskers
from fastft.retention import Estimate, RetentionReport, pareto_front
from fastft.tables import markdown

from . import plan, records
from .plan import Choice
from .run import TUNING_ROWS, Settings

RESAMPLES = 4000
CONFIDENCE = 0.95
GOAL = 0.97
"""The part of the source recall that a method should keep within a point of the best accuracy."""
BASELINE = "full FT + WiSE"
RIVALS = (BASELINE, "LP-FT + WiSE")
RECIPE = "anchor + gradual"
"""``fastft.recipe`` on a model whose head ``fit_head_`` has fitted."""

Array = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Result:
    """One row: the scores of a choice, over its seeds."""

    choice: Choice
    target: Array
    source: Array
    """[seeds, items]"""
    cpu_seconds: float
    """Of training; the median over the seeds."""

    @property
    def seeds(self) -> int:
        return len(self.target)

    def mean(self, role: str) -> float:
        return float(getattr(self, role).mean())

    def standard_error(self, role: str) -> float:
        """Of the mean, by how the seeds differ; nan with one seed."""
        if self.seeds == 1:
            return float("nan")
        return float(getattr(self, role).mean(axis=1).std(ddof=1) / self.seeds**0.5)


def stacked(found: list[dict[str, Any]], alpha: str, role: str) -> Array:
    """[seeds, items]"""
    return np.stack([records.unpack(r["scores"][alpha][role]).numpy() for r in found])


def retention_report(before: str, source: Array, target: Array | None = None) -> RetentionReport:
    """A report against scores [items] with this benchmark's intervals."""
    targets = {} if target is None else {"target": target}
    return RetentionReport({"source": source}, targets, before=before, confidence=CONFIDENCE, resamples=RESAMPLES)


def result(choice: Choice, found: list[dict[str, Any]]) -> Result | None:
    """The choice's row from the records of its settings; None without any."""
    found = [r for r in found if choice.alpha in r["scores"]]
    if not found:
        return None
    seconds = [r["training"].get("cpu_seconds", 0.0) for r in found]
    return Result(
        choice,
        stacked(found, choice.alpha, "target"),
        stacked(found, choice.alpha, "source"),
        float(np.median(seconds)),
    )


class Results:
    """Rows that were tested on the same items, and the pre-trained model's."""

    def __init__(self, base: Result | None, rows: list[Result]) -> None:
        self.base, self.rows = base, rows

    @cached_property
    def report(self) -> RetentionReport:
        """All rows against the pre-trained model."""
        assert self.base is not None
        report = retention_report(self.base.choice.name, self.base.source[0], self.base.target[0])
        for row in self.rows:
            report.add(row.choice.name, source={"source": row.source}, target={"target": row.target})
        return report

    def name(self, row: Result) -> str | None:
        """The row's name in the report."""
        return None if row is self.base else row.choice.name

    def estimate(self, row: Result, role: str) -> Estimate:
        return self.report.score(role, role, self.name(row))

    def kept(self, row: Result) -> Estimate:
        """The part of the pre-trained model's source recall."""
        name = self.name(row)
        kept = Estimate(1.0, 1.0, 1.0) if name is None else self.report.result(name).source["source"].retention
        assert kept is not None
        return kept

    def difference(self, row: Result, other: Result, role: str) -> Estimate:
        """In points, paired over the items."""
        return self.report.difference(self.name(row), self.name(other), role, role)


class Comparison(Results):
    """All rows of one split, against the pre-trained model, the reference and the baseline."""

    def __init__(self, split: str, tuned: list[dict[str, Any]], tested: list[dict[str, Any]]) -> None:
        self.split = split
        by_key = {r["key"]: r for r in (tuned if split == "validation" else tested)}
        probe = plan.PROBES[split == "test"]
        base = [by_key[probe.key]] if probe.key in by_key else []
        rows: list[Result] = []
        self.by_name: dict[str, Result] = {}
        self.curves: dict[str, list[Result]] = {}
        for name in plan.GRIDS:
            for choice in plan.choices(name, tuned):
                wanted = [choice.settings] if split == "validation" else every_seed(choice.settings)
                found = [by_key[s.key] for s in wanted if s.key in by_key]
                row = result(choice, found)
                # The same run chosen twice is one row.
                twin = next((other for other in rows if row is not None and same(row, other)), None)
                if row is not None and twin is None:
                    rows.append(row)
                if row is not None:
                    self.by_name[choice.name] = twin or row
                if found:
                    curve = [result(Choice(name, choice.settings, alpha), found) for alpha in found[0]["scores"]]
                    self.curves[choice.settings.key] = [r for r in curve if r is not None]
        super().__init__(result(Choice("linear probe", probe, "0"), base), rows)

    def named(self, name: str) -> Result | None:
        """The row of that name; where it was the same as an earlier one, that."""
        return self.by_name.get(name)

    @property
    def reference(self) -> Result | None:
        """The full fine-tuning that was most accurate on the validation split."""
        found = [row for name in plan.FULL if (row := self.named(f"{name}, most accurate")) is not None]
        return max(found, key=lambda row: row.choice.target, default=None)

    def to_markdown(self) -> str:
        """The table."""
        reference, baseline = self.reference, self.named(BASELINE) or self.reference
        assert self.base is not None
        ahead_of = baseline.choice.name if baseline else BASELINE
        titles = ["method", "settings", "seeds", "target accuracy", "− best full FT, points", "source recall@1"]
        titles += ["kept, %", f"recall − {ahead_of}, points", "CPU s"]
        lines = [
            [
                row.choice.name,
                described(row.choice),
                str(row.seeds) if row is not self.base else "",
                self.estimate(row, "target").show(),
                signed(self.difference(row, reference, "target")) if reference and row is not reference else "",
                self.estimate(row, "source").show(),
                self.kept(row).show(100, 1),
                signed(self.difference(row, baseline, "source")) if baseline and row is not baseline else "",
                f"{row.cpu_seconds:.0f}" if row.cpu_seconds else "",
            ]
            for row in [self.base, *self.rows]
        ]
        return "\n".join(markdown(titles, lines, left=2))

    def verdict(self) -> str:
        """Whether the goal is reached by what validation chose: on the test split nothing is picked out."""
        reference = self.reference
        if reference is None:
            return ""
        floor = reference.choice.target - plan.POINT
        blind = [row for row in self.rows if row.choice.name.removesuffix(" + WiSE") not in plan.SEE_OLD_TASK]
        near = [row for row in blind if row.choice.target >= floor]
        best = max(near, key=lambda row: row.choice.source)
        kept, lost = self.kept(best), 100 * (reference.mean("target") - best.mean("target"))
        reached = kept.value >= GOAL and lost <= 100 * plan.POINT
        sure = " (the interval's lower end too)" if reached and kept.low is not None and kept.low >= GOAL else ""
        return (
            f"Of the methods here that see nothing of the source task (not {' and '.join(plan.SEE_OLD_TASK)}), and "
            f"that are within a point of the best full fine-tuning, **{best.choice.name}** kept the most on the "
            f"validation split. On this split it keeps {kept.show(100, 1)} % of the source recall, "
            f"{abs(lost):.1f} points {'above' if lost < 0 else 'below'} the accuracy of the best full fine-tuning "
            f"({best.mean('target'):.3f} against {reference.mean('target'):.3f}; {best.seeds} "
            f"seed{'s' * (best.seeds > 1)}). The goal was to keep {GOAL:.0%} at a point at most: it is "
            f"{'reached' if reached else 'not reached'}{sure}. {self.recipe_against_rivals()}"
        ).rstrip()

    def recipe_against_rivals(self) -> str:
        """``fastft.recipe``, as trained, against full fine-tuning that was tuned and blended back."""
        recipe = self.named(RECIPE)
        rivals = [row for row in map(self.named, RIVALS) if row is not None]
        if recipe is None or not rivals:
            return ""
        said = [
            f"`fit_head_` and `fastft.recipe`, as trained (**{RECIPE}**), keep {self.kept(recipe).show(100, 1)} %, "
            f"with an accuracy of {recipe.mean('target'):.3f}."
        ]
        for rival in rivals:
            learned, kept = (self.difference(recipe, rival, role) for role in ("target", "source"))
            said.append(
                f"Against {rival.choice.name} ({self.kept(rival).show(100, 1)} %) that is "
                f"{signed(kept, ' points of recall')} and {signed(learned, ' of accuracy')}."
            )
        return " ".join(said)

    def plot(self, path: Path) -> None:
        """Source kept against target accuracy; a line joins one training run's blends."""
        assert self.base is not None
        recall = self.base.mean("source")

        def place(row: Result) -> tuple[float, float]:
            return 100 * row.mean("target"), 100 * row.mean("source") / recall

        with figure(path, 10, 6) as axes:
            for curve in self.curves.values():
                colour = GREY if curve[0].choice.name in plan.FULL else BLUE
                axes.plot(*zip(*map(place, curve), strict=True), "-", color=colour, alpha=0.3, linewidth=1)
            for number, row in enumerate([self.base, *self.rows]):
                x, y = place(row)
                colour = ORANGE if row is self.base else GREY if row.choice.name.startswith(plan.FULL) else BLUE
                error = {"xerr": bars(self.estimate(row, "target")), "yerr": bars(self.kept(row))}
                axes.errorbar(x, y, **error, fmt="none", ecolor=colour, elinewidth=0.7, alpha=0.25)
                axes.plot(x, y, "o", color=colour, markersize=11, label=f"{number}  {row.choice.name}")
                axes.annotate(str(number), (x, y), ha="center", va="center", fontsize=6.5, color="white")
            points = [place(row) for row in [self.base, *self.rows]]
            front = [points[i] for i in pareto_front(points)]
            look = {"where": "pre", "color": ORANGE, "alpha": 0.6, "linewidth": 1.5}
            axes.step(*zip(*front, strict=True), **look, label="Pareto front")
            if (reference := self.reference) is not None:
                floor = 100 * (reference.mean("target") - plan.POINT)
                label = "a point below the best full fine-tuning"
                axes.axvline(floor, color=GREY, linestyle=":", linewidth=1, label=label)
            axes.axhline(100 * GOAL, color=GREY, linestyle="--", linewidth=1, label=f"{GOAL:.0%} kept")
            axes.set_xlabel("target accuracy, %")
            axes.set_ylabel("source recall@1 kept, %")
            axes.set_title(f"What was learned, and what was kept ({self.split} split)", loc="left", fontweight="bold")
            axes.legend(frameon=False, fontsize=7.5, loc="upper left", bbox_to_anchor=(1.0, 1.0), markerscale=0.5)


def signed(difference: Estimate, unit: str = "") -> str:
    """A difference in points, and whether it is a tie."""
    return f"{difference.show(digits=1, sign=True)}{unit}{' (tie)' * difference.is_tie}"


def bars(estimate: Estimate) -> list[list[float]] | None:
    """An interval as error bars, in percent."""
    return whiskers(estimate.value, estimate.low, estimate.high, 100)


def same(row: Result, other: Result) -> bool:
    return (row.choice.settings.key, row.choice.alpha) == (other.choice.settings.key, other.choice.alpha)


def every_seed(settings: Settings) -> list[Settings]:
    """The full runs of tuned settings."""
    return [settings.for_test(seed) for seed in range(100)]


def described(choice: Choice) -> str:
    """The settings in short."""
    settings = choice.settings
    if not settings.lr:
        return ""
    parts = [f"lr {settings.lr:g}"]
    parts += ["random head" if name == "fresh_head" else f"{name} {x:g}" for name, x in settings.ingredients.items()]
    parts += [f"{settings.texts} texts a step ({settings.text_kind})"] * bool(settings.texts)
    return ", ".join([*parts, *([f"α {choice.alpha}"] if choice.alpha != "1" else [])])


def tuning_table(tuned: list[dict[str, Any]]) -> list[str]:
    """How much of each method's grid has been run."""
    lines = [
        [name, grid_text(settings), f"{len(plan.measured(name, tuned))} of {plan.GRID_SIZE}"]
        for name, settings in plan.GRIDS.items()
    ]
    return markdown(["method", "grid", "tuned"], lines, left=2)


def grid_text(settings: list[Settings]) -> str:
    lrs = ", ".join(f"{lr:g}" for lr in sorted({s.lr for s in settings}))
    names = sorted({name for s in settings for name in s.ingredients})
    values = {name: ", ".join(f"{v:g}" for v in sorted({s.ingredients[name] for s in settings})) for name in names}
    return "; ".join([f"lr {lrs}", *(f"{name} {text}" for name, text in values.items())])


def document(tuned: list[dict[str, Any]], tested: list[dict[str, Any]], folder: Path) -> str:
    """The whole text; draws the plots beside it."""
    parts = ["# What keeps what the model knew", ""]
    for split, title in (
        ("test", "All rows, test split"),
        ("validation", f"Tuning: {TUNING_ROWS:,} rows, validation split"),
    ):
        comparison = Comparison(split, tuned, tested)
        if comparison.base is None or not comparison.rows:
            continue
        comparison.plot(folder / f"{split}.png")
        sections = (f"## {title}", comparison.verdict(), comparison.to_markdown(), f"![{title}]({split}.png)")
        parts += [line for section in sections for line in (section, "")]
    parts += [
        f"In brackets: {CONFIDENCE:.0%} bootstrap intervals, paired over the test items; with several seeds they cover "
        'the seeds too, with one the items only, not the chance of training. "Tie": the interval of the difference '
        "holds 0. CPU s: processor seconds of training on one thread.",
        "",
        "## What was tuned",
        "",
        "Methods whose grid is not done may still get better; so may the full fine-tuning they are held against.",
        "",
        *tuning_table(tuned),
        "",
    ]
    return "\n".join(parts)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.retention.report", description=__doc__)
    parser.add_argument("--results", type=Path, default=records.RESULTS)
    parsed = parser.parse_args(arguments)
    tuned = records.load(parsed.results / "validation.jsonl")
    tested = records.load(parsed.results / "test.jsonl")
    text = document(tuned, tested, parsed.results)
    (parsed.results / "retention.md").write_text(text, "utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
