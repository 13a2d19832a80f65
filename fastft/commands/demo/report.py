"""What the demo tells: a table and its meaning, ``report.json`` and ``plot.png``, all from one ``Report``."""

from __future__ import annotations

import dataclasses
import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .evaluate import Scores, difference, standard_error
from .train import Config, Log

GREY = "#6b6b6b"
COLOURS = ("#d55e00", "#0072b2", "#009e73")  # of the runs, in their order: Okabe and Ito's, told apart by everyone

NOTES = (
    "One seed. A standard error covers the choice of test items, not the randomness of training.",
    "One learning rate. A lower one forgets less with either optimizer.",
    "optimizer_seconds_with_clipping: for torch, clip_grad_norm_ and step(); fastft clips inside step().",
    "training_seconds: the training loop, or for the base model fitting the linear probe; testing is apart.",
    "peak_state_bytes: the optimizer's state after the step after which it was largest; an anchor is apart.",
)


@dataclass(frozen=True)
class Outcome:
    """One model: its scores, and how it was trained."""

    name: str
    scores: Scores
    log: Log
    testing_seconds: float


@dataclass
class Report:
    """A whole run."""

    config: Config
    base: Outcome
    runs: dict[str, Outcome]
    """By key; the first is what the others are compared with."""
    environment: dict[str, Any]
    seconds: float = 0.0

    @property
    def baseline(self) -> Outcome:
        """The run that the others are compared with."""
        return next(iter(self.runs.values()))


def write(report: Report, folder: Path) -> str:
    """Write ``plot.png`` and ``report.json`` into ``folder``; return the table and its meaning."""
    plot(report, folder / "plot.png")
    (folder / "report.json").write_text(json.dumps(as_json(report), indent=1) + "\n", encoding="utf-8")
    return f"{table(report)}\n\n{meaning(report)}\n"


def table(report: Report) -> str:
    """The result as aligned text."""
    rows = [cells(report.base, tuned=False), *(cells(run, tuned=True) for run in report.runs.values())]
    lower = ("", "accuracy", "recall@1", "optimizer", "training", "peak state", "anchor")
    widths = [max(map(len, column)) for column in zip(lower, *rows, strict=True)]
    upper = ("", "target", "source", "seconds", "seconds", "MB", "MB")
    lines = [aligned(upper, widths), aligned(lower, widths), "-" * (sum(widths) + 2 * (len(widths) - 1))]
    return "\n".join(lines + [aligned(row, widths) for row in rows])


def cells(outcome: Outcome, tuned: bool) -> tuple[str, ...]:
    """One model's line of the table."""
    scores, log = outcome.scores, outcome.log
    return (
        outcome.name,
        f"{scores.accuracy:.3f}",
        f"{scores.recall:.3f}",
        f"{sum(log.optimizer_seconds):.2f}" if tuned else "-",
        f"{log.training_seconds:.1f}",
        f"{max(log.state_bytes) / 1e6:.1f}" if tuned else "-",
        f"{log.anchor_bytes / 1e6:.1f}" if tuned else "-",
    )


def aligned(cells: tuple[str, ...], widths: list[int]) -> str:
    """The first cell to the left, the others to the right."""
    first, *others = zip(cells, widths, strict=True)
    return "  ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]).rstrip()


def meaning(report: Report) -> str:
    """The result in words, as far as the numbers carry it: a line for each run."""
    before, baseline = report.base.scores, report.baseline
    lines = [
        f"Of the base model's {100 * before.recall:.1f} points of recall, {baseline.name} "
        f"{lost(before.recall - baseline.scores.recall)}."
    ]
    for run in report.runs.values():
        if run is not baseline:
            kept = verdict("kept", "lost", *difference(run.scores.hits, baseline.scores.hits))
            gain = verdict("gained", "gave up", *difference(run.scores.correct, baseline.scores.correct))
            lines.append(
                f"{run.name} {lost(before.recall - run.scores.recall)}: against {baseline.name} it {kept} of recall, "
                f"and {gain} of accuracy on the new task."
            )
    return "\n".join([*lines, "(± is one standard error over the same test items; one seed.)"])


def lost(amount: float) -> str:
    """A loss of ``amount``, or a gain, in points."""
    return f"{'lost' if amount >= 0 else 'gained'} {100 * abs(amount):.1f}"


def verdict(more: str, less: str, amount: float, error: float) -> str:
    """A difference in points, with a warning where it is too small to mean anything."""
    words = f"{more if amount >= 0 else less} {100 * abs(amount):.1f} ± {100 * error:.1f} points"
    return words if abs(amount) >= 2 * error else f"{words} (not a clear difference)"


def as_json(report: Report) -> dict[str, Any]:
    """All numbers of the run, ready for ``json``."""
    return {
        "what": "fastft demo: movie-review polarity (target), WordNet gloss to example retrieval (source)",
        "meaning": meaning(report),
        "notes": NOTES,
        "config": dataclasses.asdict(report.config),
        "environment": report.environment,
        "seconds": report.seconds,
        "base": outcome_json(report, report.base),
        "runs": {key: outcome_json(report, run) for key, run in report.runs.items()},
    }


def outcome_json(report: Report, outcome: Outcome) -> dict[str, Any]:
    """One model's numbers."""
    scores, log = outcome.scores, outcome.log
    numbers: dict[str, Any] = {
        "name": outcome.name,
        "target_accuracy": {"value": scores.accuracy, "standard_error": standard_error(scores.correct)},
        "source_recall_at_1": {"value": scores.recall, "standard_error": standard_error(scores.hits)},
        "source_mrr": {"value": scores.mrr},
        "training_seconds": log.training_seconds,
        "testing_seconds": outcome.testing_seconds,
    }
    if outcome is report.base:
        return numbers
    baseline = report.baseline.scores
    for key, ours, theirs in (
        ("target_accuracy", scores.correct, baseline.correct),
        ("source_recall_at_1", scores.hits, baseline.hits),
    ):
        value, error = difference(ours, theirs)
        numbers[key] |= {"minus_first_run": value, "paired_standard_error": error}
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


def plot(report: Report, path: Path) -> None:
    """Draw what was kept against what was learned, and the losses."""
    figure = Figure(figsize=(11, 4.6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)  # drawn without pyplot: no display, and no global state of the caller's touched
    left, right = figure.subplots(1, 2)
    plot_trade_off(report, left)
    plot_losses(report, right)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.set_axisbelow(True)
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path)


def plot_trade_off(report: Report, axes: Axes) -> None:
    """Source recall against target accuracy: up is kept, right is learned."""
    start = report.base.scores
    for outcome, colour in zip((report.base, *report.runs.values()), (GREY, *COLOURS), strict=True):
        scores = outcome.scores
        x, y = 100 * scores.accuracy, 100 * scores.recall
        if outcome is not report.base:
            axes.annotate(
                "",
                (x, y),
                (100 * start.accuracy, 100 * start.recall),
                arrowprops={"arrowstyle": "->", "color": colour, "alpha": 0.6, "shrinkA": 7, "shrinkB": 7},
            )
        axes.errorbar(
            x,
            y,
            xerr=100 * standard_error(scores.correct),
            yerr=100 * standard_error(scores.hits),
            fmt="o",
            markersize=8,
            color=colour,
            elinewidth=1,
            capsize=2.5,
            label=outcome.name,
        )
    axes.margins(0.15)
    axes.set_xlabel("target: movie-review polarity, accuracy (%)")
    axes.set_ylabel("source: gloss → example, recall@1 (%)")
    axes.set_title("What was learned, and what was kept (± 1 s.e.)", loc="left", fontweight="bold")


def plot_losses(report: Report, axes: Axes) -> None:
    """Training loss by step: each batch faintly, a running mean over it."""
    for outcome, colour in zip(report.runs.values(), COLOURS, strict=True):
        loss = outcome.log.loss
        steps = range(1, len(loss) + 1)
        axes.plot(steps, loss, color=colour, alpha=0.25, linewidth=1)
        axes.plot(steps, running_mean(loss), color=colour, linewidth=2)
    axes.set_ylim(bottom=0)
    axes.set_xlabel(f"step (batches of {report.config.batch_size} reviews)")
    axes.set_ylabel("training loss: cross-entropy (nats)")
    axes.set_title("Training loss, and its mean over 9 steps", loc="left", fontweight="bold")


def running_mean(values: list[float], width: int = 9) -> list[float]:
    """The mean over the ``width`` values around each one, fewer at the ends."""
    half = width // 2
    return [statistics.fmean(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]
