"""Replay and augmentation, by the runs of ``plan.DATA``: a table, a sentence on it, and a plot.

``python benchmarks/plot.py`` puts them into the documentation. From the JSON lines and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fastft.plotting import BLUE, GREEN, GREY, ORANGE, figure
from fastft.retention import Estimate
from fastft.tables import markdown

from . import plan, records
from .plan import Choice
from .report import CONFIDENCE, Result, Results, bars, result, signed

BEFORE = "before fine-tuning"
FILE = records.DATA_RESULTS / plan.data_settings(None).file
LABEL_GAP = 0.075
"""Between the plot's labels, as a part of its height."""


class DataResults(Results):
    """The methods of ``plan.DATA`` over their seeds, and the pre-trained model."""

    def __init__(self, found: list[dict[str, Any]]) -> None:
        self.by_key = {record["key"]: record for record in found}
        rows = [self.row(name, "1", [plan.data_settings(name, seed) for seed in plan.SEEDS]) for name in plan.DATA]
        base = self.row(BEFORE, "0", [plan.data_settings(None)])
        super().__init__(base, [row for row in rows if row is not None])
        self.plain = next(row for row in self.rows if row.choice.name == plan.PLAIN)

    def row(self, name: str, alpha: str, settings: list[plan.Settings]) -> Result | None:
        found = [self.by_key[each.key] for each in settings if each.key in self.by_key]
        return result(Choice(name, settings[0], alpha), found)

    def to_markdown(self) -> str:
        """The table."""
        assert self.base is not None
        against = f"− {plan.PLAIN}, points"
        titles = ["", "seeds", "target accuracy", against, "source recall@1", "kept, %", against, "CPU s"]
        lines = [
            [
                row.choice.name,
                str(row.seeds) if row is not self.base else "",
                self.score(row, "target"),
                self.apart(row, "target"),
                self.score(row, "source"),
                self.kept(row).show(100, 1),
                self.apart(row, "source"),
                f"{row.cpu_seconds:.0f}" if row.cpu_seconds else "",
            ]
            for row in [self.base, *self.rows]
        ]
        return "\n".join(markdown(titles, lines))

    def score(self, row: Result, role: str) -> str:
        """With its standard error over the seeds, and its interval."""
        value, _, bracket = self.estimate(row, role).show().partition(" ")
        return f"{value} ± {row.standard_error(role):.3f} {bracket}" if row.seeds > 1 else f"{value} {bracket}"

    def apart(self, row: Result, role: str) -> str:
        """How far the score is from that with neither replay nor augmentation."""
        return "" if row is self.plain else signed(self.difference(row, self.plain, role))

    def verdict(self, role: str) -> str:
        """Which methods differ from the one with neither."""
        apart = {row.choice.name: self.difference(row, self.plain, role) for row in self.rows if row is not self.plain}
        kinds: dict[str, Callable[[Estimate], bool]] = {
            "higher with": lambda difference: not difference.is_tie and difference.value > 0,
            "lower with": lambda difference: not difference.is_tie and difference.value < 0,
            "a tie with": lambda difference: difference.is_tie,
        }
        said = []
        for kind, holds in kinds.items():
            if names := [name for name, difference in apart.items() if holds(difference)]:
                said.append(f"{kind} {listed(names)}")
        return "; ".join(said)

    def circumstances(self) -> str:
        """The measurement: rows, training, tests, intervals, machine and versions."""
        plain, settings = self.plain, self.plain.choice.settings
        steps = {row.choice.name: self.by_key[row.choice.settings.key]["training"]["steps"] for row in self.rows}
        as_many = steps[plain.choice.name]
        longer = [f"{count} with {name}" for name, count in steps.items() if count != as_many]
        known = [record["environment"] for record in self.by_key.values()]
        device, torch, commit = (listed(sorted({each[k] for each in known})) for k in ("device", "torch", "commit"))
        return (
            f"{settings.rows:,} movie reviews, {settings.epochs} epoch{'s' * (settings.epochs > 1)}, "
            f"lr {settings.lr:g}, {plain.seeds} seeds; {as_many} steps, {listed(longer)}, since all new batches stay. "
            f"Tested on {plain.target.shape[1]:,} reviews and {plain.source.shape[1]:,} definitions. "
            f"±: standard error over the seeds. In brackets: {CONFIDENCE:.0%} bootstrap intervals over items and "
            "seeds, differences paired over the items; tie: the interval holds 0. CPU s: of training on one thread, "
            f"the median over the seeds. {device}, torch {torch}, fastft at {commit}."
        )

    def plot(self, path: Path) -> None:
        """Source recall against target accuracy: a point for each method, its name beside the axes."""
        assert self.base is not None
        rows = sorted([self.base, *self.rows], key=lambda row: row.mean("source"))
        points = [(100 * row.mean("target"), 100 * row.mean("source")) for row in rows]
        with figure(path, 7, 4.4, dpi=200) as axes:
            axes.set_xlabel("target accuracy, %")
            axes.set_ylabel("source recall@1, %")
            for row, (x, y) in zip(rows, points, strict=True):
                error = {"xerr": bars(self.estimate(row, "target")), "yerr": bars(self.estimate(row, "source"))}
                axes.errorbar(x, y, **error, fmt="none", ecolor=self.colour(row), elinewidth=1, capsize=3, alpha=0.5)
                axes.plot(x, y, "o", color=self.colour(row), markersize=6)
            low, high = axes.get_ylim()
            heights = spread([(y - low) / (high - low) for _, y in points], LABEL_GAP)
            for row, point, height in zip(rows, points, heights, strict=True):
                line = {"arrowstyle": "-", "linestyle": ":", "color": self.colour(row), "relpos": (0, 0.5)}
                axes.annotate(
                    row.choice.name,
                    point,
                    (1.04, height),
                    textcoords="axes fraction",
                    va="center",
                    color=self.colour(row),
                    arrowprops=line,
                )

    def colour(self, row: Result) -> str:
        if row is self.base or row is self.plain:
            return ORANGE if row is self.base else GREY
        return GREEN if "replay_mixer" in row.choice.settings.ingredients else BLUE


def listed(names: Sequence[str]) -> str:
    """a, b and c"""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def spread(wanted: Sequence[float], gap: float) -> list[float]:
    """Heights of at most 1 near the ``wanted`` ones, which ascend, no two nearer to each other than ``gap``."""
    heights: list[float] = []
    for height in wanted:
        heights.append(max(height, heights[-1] + gap) if heights else height)
    highest = 1.0
    for i in reversed(range(len(heights))):
        heights[i] = min(heights[i], highest)
        highest = heights[i] - gap
    return heights
