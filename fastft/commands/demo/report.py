"""The demo's report: a table and its meaning, ``report.json`` and ``plot.png``."""

from __future__ import annotations

import dataclasses
import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastft.plotting import BLUE, GREEN, GREY, ORANGE, figure
from fastft.problems import ItemScores
from fastft.retention import Estimate, RetentionReport
from fastft.tables import aligned

from .train import Config, Log

COLOURS = (ORANGE, BLUE, GREEN)  # of the runs, in their order
SOURCE, TARGET = "recall@1", "accuracy"

NOTES = (
    "One seed. A standard error is the bootstrap's: it covers the choice of test items, not the chance of training.",
    "One learning rate. A lower one forgets less with either optimizer.",
    "optimizer_seconds_with_clipping: for torch, clip_grad_norm_ and step(); fastft clips inside step().",
    "training_seconds: the training loop, or for the base model fitting the linear probe; testing is apart.",
    "peak_state_bytes: the optimizer's state after the step after which it was largest; an anchor is apart.",
)


@dataclass(frozen=True)
class Outcome:
    """One model: its scores, and how it was trained."""

    name: str
    scores: ItemScores
    log: Log
    testing_seconds: float


class DemoReport:
    """A whole run: the base model, and a run for each method, by key; the first is the one that others are held to."""

    def __init__(self, config: Config, base: Outcome, runs: dict[str, Outcome], environment: dict[str, Any]) -> None:
        self.config, self.base, self.runs, self.environment = config, base, runs, environment
        self.baseline = next(iter(runs.values()))
        self.seconds = 0.0
        self.retention = RetentionReport({SOURCE: base.scores.source}, {TARGET: base.scores.target}, before=base.name)
        for run in runs.values():
            self.retention.add(run.name, source={SOURCE: run.scores.source}, target={TARGET: run.scores.target})

    def __str__(self) -> str:
        over = ("", "target", "source", "seconds", "seconds", "MB", "MB")
        titles = ("", TARGET, SOURCE, "optimizer", "training", "peak state", "anchor")
        rows = [self._cells(outcome) for outcome in (self.base, *self.runs.values())]
        return "\n".join([*aligned(titles, rows, over=over), "", self._meaning(), ""])

    def to_json(self) -> str:
        """All numbers of the run."""
        found = {
            "what": "fastft demo: movie-review polarity (target), WordNet gloss to example retrieval (source)",
            "meaning": self._meaning(),
            "notes": NOTES,
            "config": dataclasses.asdict(self.config),
            "environment": self.environment,
            "seconds": self.seconds,
            "base": self._numbers(self.base),
            "runs": {key: self._numbers(run) for key, run in self.runs.items()},
        }
        return json.dumps(found, indent=1)

    def plot(self, path: str | Path) -> None:
        """Draw what was kept against what was learned, and the losses."""
        with figure(Path(path), 11, 4.6, ncols=2) as (left, right):
            self._plot_trade_off(left)
            self._plot_losses(right)
            left.figure.legend(loc="outside lower center", ncols=4, frameon=False)

    def write(self, folder: str | Path) -> None:
        """Write ``plot.png`` and ``report.json`` into ``folder``."""
        self.plot(Path(folder) / "plot.png")
        (Path(folder) / "report.json").write_text(self.to_json() + "\n", encoding="utf-8")

    def _meaning(self) -> str:
        """The result in words, as far as the numbers carry it: a line for each run."""
        report, baseline = self.retention, self.baseline.name
        before = report.score("source", SOURCE).value
        lines = [f"Of the base model's {100 * before:.1f} points of recall, {baseline} {self._lost(baseline)}."]
        for name in report.names:
            if name != baseline:
                kept = verdict("kept", "lost", report.difference(name, baseline, "source", SOURCE))
                gain = verdict("gained", "gave up", report.difference(name, baseline, "target", TARGET))
                lines.append(
                    f"{name} {self._lost(name)}: against {baseline} it {kept} of recall, and {gain} of accuracy on the "
                    "new task."
                )
        return "\n".join([*lines, "(± is one standard error over the same test items; one seed.)"])

    def _lost(self, name: str) -> str:
        """A loss of recall, or a gain, in points."""
        amount = self.retention.result(name).source[SOURCE].forgetting.value
        return f"{'lost' if amount >= 0 else 'gained'} {abs(amount):.1f}"

    def _scores(self, outcome: Outcome) -> dict[str, Estimate]:
        """By its key in the JSON, the mean of each score."""
        name = None if outcome is self.base else outcome.name
        return {
            "target_accuracy": self.retention.score("target", TARGET, name),
            "source_recall_at_1": self.retention.score("source", SOURCE, name),
        }

    def _cells(self, outcome: Outcome) -> tuple[str, ...]:
        """One model's line of the table."""
        log, tuned = outcome.log, outcome is not self.base
        return (
            outcome.name,
            *(f"{score.value:.3f}" for score in self._scores(outcome).values()),
            f"{sum(log.optimizer_seconds):.2f}" if tuned else "-",
            f"{log.training_seconds:.1f}",
            f"{max(log.state_bytes) / 1e6:.1f}" if tuned else "-",
            f"{log.anchor_bytes / 1e6:.1f}" if tuned else "-",
        )

    def _numbers(self, outcome: Outcome) -> dict[str, Any]:
        """One model's part of the JSON."""
        ranks, log = outcome.scores.ranks, outcome.log
        assert ranks is not None
        numbers: dict[str, Any] = {
            "name": outcome.name,
            **{
                key: {"value": score.value, "standard_error": score.standard_error}
                for key, score in self._scores(outcome).items()
            },
            "source_mrr": {"value": (1 / ranks.double()).mean().item()},
            "training_seconds": log.training_seconds,
            "testing_seconds": outcome.testing_seconds,
        }
        if outcome is self.base:
            return numbers
        for key, role, evaluation in (
            ("target_accuracy", "target", TARGET),
            ("source_recall_at_1", "source", SOURCE),
        ):
            apart = self.retention.difference(outcome.name, self.baseline.name, role, evaluation)
            assert apart.standard_error is not None
            numbers[key] |= {
                "minus_first_run": apart.value / 100,
                "paired_standard_error": apart.standard_error / 100,
            }
        return numbers | {
            "optimizer_seconds_with_clipping": sum(log.optimizer_seconds),
            "median_optimizer_seconds_per_step": statistics.median(log.optimizer_seconds),
            "peak_state_bytes": max(log.state_bytes),
            "anchor_bytes": log.anchor_bytes,
            "steps": {
                "loss": log.loss,
                "grad_norm": log.grad_norm,
                "lr": log.lr,
                "optimizer_seconds": log.optimizer_seconds,
                "state_bytes": log.state_bytes,
                "open_groups": log.open_groups,
            },
        }

    def _plot_trade_off(self, axes: Any) -> None:
        """Source recall against target accuracy: up is kept, right is learned."""
        places = [
            [(100 * score.value, 100 * (score.standard_error or 0.0)) for score in self._scores(outcome).values()]
            for outcome in (self.base, *self.runs.values())
        ]
        start = tuple(value for value, _ in places[0])
        names = [self.base.name, *self.retention.names]
        for name, ((x, xerr), (y, yerr)), colour in zip(names, places, (GREY, *COLOURS), strict=True):
            if name != self.base.name:
                arrow = {"arrowstyle": "->", "color": colour, "alpha": 0.6, "shrinkA": 7, "shrinkB": 7}
                axes.annotate("", (x, y), start, arrowprops=arrow)
            look = {"fmt": "o", "markersize": 8, "color": colour, "elinewidth": 1, "capsize": 2.5}
            axes.errorbar(x, y, xerr=xerr, yerr=yerr, label=name, **look)
        axes.margins(0.15)
        axes.set_xlabel("target: movie-review polarity, accuracy (%)")
        axes.set_ylabel("source: gloss → example, recall@1 (%)")
        axes.set_title("What was learned, and what was kept (± 1 s.e.)", loc="left", fontweight="bold")

    def _plot_losses(self, axes: Any) -> None:
        """Training loss by step: each batch faintly, a running mean over it."""
        for outcome, colour in zip(self.runs.values(), COLOURS, strict=True):
            loss = outcome.log.loss
            steps = range(1, len(loss) + 1)
            axes.plot(steps, loss, color=colour, alpha=0.25, linewidth=1)
            axes.plot(steps, running_mean(loss), color=colour, linewidth=2)
        axes.set_ylim(bottom=0)
        axes.set_xlabel(f"step (batches of {self.config.batch_size} reviews)")
        axes.set_ylabel("training loss: cross-entropy (nats)")
        axes.set_title("Training loss, and its mean over 9 steps", loc="left", fontweight="bold")


def verdict(more: str, less: str, amount: Estimate) -> str:
    """A difference in points, with a warning where it is too small to mean anything."""
    words = f"{more if amount.value >= 0 else less} {abs(amount.value):.1f} ± {amount.standard_error:.1f} points"
    return f"{words} (not a clear difference)" if amount.is_tie else words


def running_mean(values: list[float], width: int = 9) -> list[float]:
    """The mean over the ``width`` values around each one, fewer at the ends."""
    half = width // 2
    return [statistics.fmean(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]
