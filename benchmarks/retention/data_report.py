"""What replay and augmentation do, by the runs of ``plan.DATA``: a table, a verdict and a plot for the documentation.

Written by ``python benchmarks/plot.py``, from the JSON lines and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from . import plan, records
from .minilm import BATCH
from .plan import Choice
from .report import BLUE, CONFIDENCE, GREY, ORANGE, Estimate, Result, Results, result, whiskers

BEFORE = "before fine-tuning"
FILE = records.DATA_RESULTS / plan.data_settings(None).file
LABEL_GAP = 0.075
"""Between labels of the plot, as a part of its height."""


class DataResults(Results):
    """The recipes of ``plan.DATA`` over their seeds, and the pre-trained model."""

    def __init__(self, found: list[dict[str, Any]]) -> None:
        self.records = found
        by_key = {record["key"]: record for record in found}

        def row(title: str, name: str | None, alpha: str) -> Result | None:
            settings = [plan.data_settings(name, seed) for seed in (plan.SEEDS if name is not None else (0,))]
            return result(
                Choice(title, settings[0], alpha), [by_key[each.key] for each in settings if each.key in by_key]
            )

        rows = [row(name, name, "1") for name in plan.DATA]
        super().__init__(row(BEFORE, None, "0"), [each for each in rows if each is not None])
        self.plain = next(each for each in self.rows if each.choice.name == plan.PLAIN)

    def table(self) -> list[str]:
        """Markdown."""
        assert self.base is not None
        lines = [
            f"| | seeds | target accuracy | − {plan.PLAIN}, points | source recall@1 | kept, % | − {plan.PLAIN}, points "
            "| CPU s |",
            "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        ]
        for row in [self.base, *self.rows]:
            cells = [
                row.choice.name,
                str(row.seeds) if row is not self.base else "",
                self.shown(row, "target"),
                self.apart(row, "target"),
                self.shown(row, "source"),
                self.kept(row).show(100, 1),
                self.apart(row, "source"),
                f"{row.cpu_seconds:.0f}" if row.cpu_seconds else "",
            ]
            lines.append("| " + " | ".join(cells) + " |")
        return lines

    def shown(self, row: Result, role: str) -> str:
        """The score, its standard error over the seeds, and its interval."""
        value, _, bracket = self.estimate(row, role).show().partition(" ")
        error = f" ± {row.standard_error(role):.3f}" if row.seeds > 1 else ""
        return f"{value}{error} {bracket}"

    def apart(self, row: Result, role: str) -> str:
        """How far the score is from that with neither replay nor augmentation."""
        if row is self.plain:
            return ""
        difference = self.difference(row, self.plain, role)
        return difference.show(100, 1, "+") + " (tie)" * difference.is_tie

    def verdict(self) -> list[str]:
        """In words, what differs from the run with neither."""
        return [self.compared("Source recall", "source"), self.compared("Target accuracy", "target")]

    def compared(self, what: str, role: str) -> str:
        differences = {
            row.choice.name: self.difference(row, self.plain, role) for row in self.rows if row is not self.plain
        }
        kinds: dict[str, Callable[[Estimate], bool]] = {
            "higher with": lambda difference: difference.low > 0,
            "lower with": lambda difference: difference.high < 0,
            "a tie for": lambda difference: difference.is_tie,
        }
        said = []
        for kind, holds in kinds.items():
            names = [name for name, difference in differences.items() if holds(difference)]
            if names:
                said.append(f"{kind} {listed(names)}")
        return f"{what} against {plan.PLAIN}: {'; '.join(said)}."

    def circumstances(self) -> str:
        """What was measured, on what, and how."""
        known = [record["environment"] for record in self.records]
        settings = self.plain.choice.settings
        first = known[0]
        steps = {
            row.choice.name: next(r["training"]["steps"] for r in self.records if r["key"] == row.choice.settings.key)
            for row in self.rows
        }
        longer = [f"{name.removeprefix('replay, ')}: {n}" for name, n in steps.items() if n != steps[plan.PLAIN]]
        commits = listed(sorted({each["commit"] for each in known}))
        return (
            f"{settings.rows:,} reviews, epochs: {settings.epochs}, batches of {BATCH}, lr {settings.lr:g}, "
            f"{self.plain.seeds} seeds; {steps[plan.PLAIN]} steps, and more with replay ({', '.join(longer)}), since "
            f"all new batches stay. {len(self.plain.target[0]):,} test reviews and {len(self.plain.source[0]):,} "
            f"definitions that nothing was chosen by. ±: standard error over the seeds; in brackets: "
            f"{CONFIDENCE:.0%} bootstrap intervals over test items and seeds, of differences paired over the items; "
            f"tie: that interval holds 0. CPU s: processor seconds of training, median over the seeds. "
            f"{first['device']}, one thread, torch {first['torch']}, fastft at {commits}."
        )

    def plot(self, path: Path) -> None:
        """Source recall against target accuracy: a point for each recipe, its name beside the plot."""
        assert self.base is not None
        figure = Figure(figsize=(7, 4.4), dpi=200)
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        figure.subplots_adjust(left=0.09, right=0.75, bottom=0.12, top=0.97)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.set_xlabel("target accuracy, %")
        axes.set_ylabel("source recall@1, %")
        rows = sorted([self.base, *self.rows], key=lambda row: row.mean("source"))
        colours = [
            ORANGE if row is self.base else GREY if row is self.plain else GREEN if is_replay(row) else BLUE
            for row in rows
        ]
        places = [(100 * row.mean("target"), 100 * row.mean("source")) for row in rows]
        for row, (x, y), colour in zip(rows, places, colours, strict=True):
            error = {role: whiskers(self.estimate(row, role)) for role in ("target", "source")}
            axes.errorbar(
                x, y, xerr=error["target"], yerr=error["source"], fmt="o", color=colour, elinewidth=0.8, markersize=6
            )
        low, high = axes.get_ylim()
        heights = spread([(y - low) / (high - low) for _, y in places], LABEL_GAP)
        for row, place, height, colour in zip(rows, places, heights, colours, strict=True):
            axes.annotate(
                row.choice.name,
                place,
                (1.04, height),
                textcoords="axes fraction",
                va="center",
                color=colour,
                fontsize=10,
                arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.6, "alpha": 0.6},
            )
        figure.savefig(path)


GREEN = "#009e73"


def is_replay(row: Result) -> bool:
    return "replay_mixer" in row.choice.settings.ingredients


def listed(names: Sequence[str]) -> str:
    """a, b and c"""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def spread(wanted: Sequence[float], gap: float) -> list[float]:
    """Ascending heights from 0 to 1 near the ``wanted`` ones, which ascend too, no two nearer than ``gap``."""
    heights = list(wanted)
    for i in range(1, len(heights)):
        heights[i] = max(heights[i], heights[i - 1] + gap)
    heights[-1] = min(heights[-1], 1.0)
    for i in reversed(range(len(heights) - 1)):
        heights[i] = min(heights[i], heights[i + 1] - gap)
    return heights
