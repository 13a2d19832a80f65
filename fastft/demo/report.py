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

GREY, ORANGE, BLUE = "#6b6b6b", "#d55e00", "#0072b2"  # the last two: Okabe and Ito's, told apart by everyone

NOTES = (
    "One seed. A standard error covers the choice of test items, not the randomness of training.",
    "One learning rate. A lower one forgets less with either optimizer.",
    "optimizer_seconds_with_clipping: for torch, clip_grad_norm_ and step(); fastft clips inside step().",
    "training_seconds: the training loop, or for the base model fitting the linear probe; testing is apart.",
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
    torch: Outcome
    fastft: Outcome
    environment: dict[str, Any]
    seconds: float = 0.0


def write(report: Report, folder: Path) -> str:
    """Write ``plot.png`` and ``report.json`` into ``folder``; return the table and its meaning."""
    plot(report, folder / "plot.png")
    (folder / "report.json").write_text(json.dumps(as_json(report), indent=1) + "\n", encoding="utf-8")
    return f"{table(report)}\n\n{meaning(report)}\n"


def table(report: Report) -> str:
    """The result as aligned text."""
    before = report.base.scores
    rows = []
    for outcome in (report.base, report.torch, report.fastft):
        tuned = outcome is not report.base
        rows.append(
            (
                outcome.name,
                f"{before.accuracy:.3f}",
                f"{outcome.scores.accuracy:.3f}" if tuned else "-",
                f"{before.recall:.3f}",
                f"{outcome.scores.recall:.3f}" if tuned else "-",
                f"{sum(outcome.log.optimizer_seconds):.2f}" if tuned else "-",
                f"{outcome.log.training_seconds:.1f}",
            )
        )
    widths = [max(len(row[0]) for row in rows), 8, 8, 9, 9, 10, 9]
    upper = ("", "target accuracy", "source recall@1", "seconds")
    spans = (widths[0], sum(widths[1:3]) + 2, sum(widths[3:5]) + 2, sum(widths[5:]) + 2)
    lower = ("", "before", "after", "before", "after", "optimizer", "total")
    lines = [aligned(upper, spans), aligned(lower, widths), "-" * (sum(widths) + 2 * (len(widths) - 1))]
    return "\n".join(lines + [aligned(row, widths) for row in rows])


def aligned(cells: tuple[str, ...], widths: list[int] | tuple[int, ...]) -> str:
    """The first cell to the left, the others to the right."""
    first, *others = zip(cells, widths, strict=True)
    return "  ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]).rstrip()


def meaning(report: Report) -> str:
    """The result in words, as far as the numbers carry it."""
    base, torch, ours = (outcome.scores for outcome in (report.base, report.torch, report.fastft))
    kept, kept_error = difference(ours.hits, torch.hits)
    gain, gain_error = difference(ours.correct, torch.correct)
    return (
        f"Of the base model's {100 * base.recall:.1f} points of recall, torch.optim.AdamW "
        f"{lost(base.recall - torch.recall)} and the anchored fastft.AdamW {lost(base.recall - ours.recall)}: "
        f"the anchor {verdict('kept', 'cost', kept, kept_error)}. On the new task it "
        f"{verdict('gained', 'gave up', gain, gain_error)} of accuracy. "
        f"(± is one standard error over the same test items; one seed.)"
    )


def lost(amount: float) -> str:
    """A loss of ``amount``, or a gain, in points."""
    return f"{'lost' if amount >= 0 else 'gained'} {100 * abs(amount):.1f}"


def verdict(more: str, less: str, amount: float, error: float) -> str:
    """A difference in points, with a warning where it is too small to mean anything."""
    words = f"{more if amount >= 0 else less} {100 * abs(amount):.1f} ± {100 * error:.1f} points"
    return words if abs(amount) >= 2 * error else f"{words} (not a clear difference)"


def as_json(report: Report) -> dict[str, Any]:
    """All numbers of the run, ready for ``json``."""
    kept, kept_error = difference(report.fastft.scores.hits, report.torch.scores.hits)
    gain, gain_error = difference(report.fastft.scores.correct, report.torch.scores.correct)
    return {
        "what": "fastft demo: movie-review polarity (target), WordNet gloss to example retrieval (source)",
        "meaning": meaning(report),
        "notes": NOTES,
        "config": dataclasses.asdict(report.config),
        "environment": report.environment,
        "seconds": report.seconds,
        "base": outcome_json(report, report.base),
        "torch": outcome_json(report, report.torch),
        "fastft": outcome_json(report, report.fastft),
        "fastft_minus_torch": {
            "target_accuracy": {"value": gain, "paired_standard_error": gain_error},
            "source_recall_at_1": {"value": kept, "paired_standard_error": kept_error},
        },
    }


def outcome_json(report: Report, outcome: Outcome) -> dict[str, Any]:
    """One model's numbers."""
    before, after, log = report.base.scores, outcome.scores, outcome.log
    per_step = log.optimizer_seconds
    return {
        "name": outcome.name,
        "target_accuracy": {
            "before": before.accuracy,
            "after": after.accuracy,
            "standard_error": standard_error(after.correct),
        },
        "source_recall_at_1": {
            "before": before.recall,
            "after": after.recall,
            "standard_error": standard_error(after.hits),
        },
        "source_mrr": {"before": before.mrr, "after": after.mrr},
        "optimizer_seconds_with_clipping": sum(per_step),
        "median_optimizer_seconds_per_step": statistics.median(per_step) if per_step else None,
        "training_seconds": log.training_seconds,
        "testing_seconds": outcome.testing_seconds,
        "steps": {"loss": log.loss, "grad_norm": log.grad_norm, "lr": log.lr, "optimizer_seconds": per_step},
    }


def plot(report: Report, path: Path) -> None:
    """Draw what was kept against what was learned, and the two losses."""
    figure = Figure(figsize=(11, 4.6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)  # drawn without pyplot: no display, and no global state of the caller's touched
    left, right = figure.subplots(1, 2)
    plot_trade_off(report, left)
    plot_losses(report, right)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.set_axisbelow(True)
    figure.savefig(path)


def plot_trade_off(report: Report, axes: Axes) -> None:
    """Source recall against target accuracy: up is kept, right is learned."""
    start = report.base.scores
    for outcome, colour in zip((report.base, report.torch, report.fastft), (GREY, ORANGE, BLUE), strict=True):
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
    axes.set_title("What was learned, and what was kept", loc="left", fontweight="bold")
    axes.legend(frameon=False, loc="best")
    axes.text(
        0.0, -0.19, "bars: ± 1 standard error over the test items", transform=axes.transAxes, fontsize=8, color=GREY
    )


def plot_losses(report: Report, axes: Axes) -> None:
    """Training loss by step: each batch faintly, a running mean over it."""
    for outcome, colour in ((report.torch, ORANGE), (report.fastft, BLUE)):
        loss = outcome.log.loss
        steps = range(1, len(loss) + 1)
        axes.plot(steps, loss, color=colour, alpha=0.25, linewidth=1)
        axes.plot(steps, running_mean(loss), color=colour, linewidth=2, label=outcome.name)
    axes.set_ylim(bottom=0)
    axes.set_xlabel(f"step (batches of {report.config.batch_size} reviews)")
    axes.set_ylabel("training loss: cross-entropy (nats)")
    axes.set_title("Training loss", loc="left", fontweight="bold")
    axes.legend(frameon=False, loc="upper right", title="running mean of 9 steps")


def running_mean(values: list[float], width: int = 9) -> list[float]:
    """The mean over the ``width`` values around each one, fewer at the ends."""
    half = width // 2
    return [statistics.fmean(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]
