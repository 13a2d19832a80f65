"""What a run tells: a table, ``report.json`` and ``plot.png``, all from one ``Report``."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

GREY, ORANGE, BLUE = "#6b6b6b", "#d55e00", "#0072b2"  # the last two: Okabe and Ito's, told apart by everyone
MOST_NAMED_LAYERS = 30


@dataclass
class Report:
    """A whole run."""

    task: str
    options: dict[str, Any]
    plan: dict[str, Any]
    data: dict[str, Any]
    model: dict[str, Any]
    before: dict[str, float]
    after: dict[str, float]
    kept: dict[str, Any]
    """``{"step", "of", "best"}``: which step's model it is, of how many, and whether it was chosen as the best."""
    drift: float
    layer_drift: dict[str, float]
    history: list[dict[str, Any]]
    """The Trainer's, with what was open in between."""
    lr_ratios: tuple[float, float]
    """The lowest and the highest lr of a layer, relative to the one in the history."""
    skipped_steps: int
    resumed_from: int | None
    training_seconds: float
    seconds: float
    notes: list[str]
    environment: dict[str, Any]

    @property
    def losses(self) -> list[dict[str, Any]]:
        """What was recorded of training steps."""
        return [entry for entry in self.history if "loss" in entry]

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        """What was recorded of evaluations."""
        return [entry for entry in self.history if "eval_loss" in entry]

    @property
    def opened(self) -> list[tuple[int, frozenset[str]]]:
        """(from which step on, the names of the open layers); all from the first step if none were ever closed."""
        found = [(entry["step"], frozenset(entry["open"])) for entry in self.history if "open" in entry]
        return found or [(0, frozenset(self.model["layers"]))]


def write(report: Report, folder: Path) -> str:
    """Write ``plot.png`` and ``report.json`` into ``folder``; return the table and its meaning."""
    plot(report, folder / "plot.png")
    content = json.dumps(as_json(report), indent=1, ensure_ascii=False) + "\n"
    (folder / "report.json").write_text(content, encoding="utf-8")
    return "\n\n".join(part for part in (table(report), layers(report), meaning(report)) if part)


def as_json(report: Report) -> dict[str, Any]:
    """All numbers of the run, ready for ``json``."""
    return {
        "what": f"fastft finetune: {report.task}",
        "before": report.before,
        "after": report.after,
        "kept": report.kept,
        "drift": {"all": report.drift, "layers": report.layer_drift},
        "training_seconds": report.training_seconds,
        "seconds": report.seconds,
        "resumed_from": report.resumed_from,
        "skipped_steps": report.skipped_steps,
        "notes": report.notes,
        "options": report.options,
        "plan": report.plan,
        "data": report.data,
        "model": report.model,
        "environment": report.environment,
        "history": {
            "training": [
                {
                    "step": entry["step"],
                    "loss": entry["loss"],
                    "lr": [ratio * entry["learning_rate"] for ratio in report.lr_ratios],
                    "grad_norm": entry.get("grad_norm"),
                }
                for entry in report.losses
            ],
            "evaluation": [
                {key.removeprefix("eval_"): entry[key] for key in ("step", *scored(entry))}
                for entry in report.evaluations
            ],
            "open": [{"step": step, "layers": sorted(names)} for step, names in report.opened],
        },
    }


def scored(entry: dict[str, Any]) -> list[str]:
    """The keys of what was measured, not of how fast."""
    return [key for key in entry if key in ("eval_accuracy", "eval_perplexity", "eval_loss")]


# -- the table -----------------------------------------------------------------------------------------------


def table(report: Report) -> str:
    """Before and after, as aligned text."""
    rows = [(name, score(report.before[name]), score(report.after[name])) for name in report.after]
    return aligned([(f"{report.data['evaluation_rows']:,} evaluation rows", "before", "after"), *rows])


def layers(report: Report) -> str:
    """From when on each layer was open and how far it moved; nothing if all were open all the time."""
    if len(report.opened) == 1 and len(report.opened[0][1]) == len(report.model["layers"]):
        return ""
    rows = []
    for name, size in report.model["layers"].items():
        spans = open_spans(report, name)
        when = ", ".join(f"{start + 1:,}–{end:,}" for start, end in spans[:3]) + (" …" if len(spans) > 3 else "")
        moved = percent(report.layer_drift[name]) if name in report.layer_drift else "new"
        rows.append((name, f"{size:,}", when or "never", moved))
    moved_by = f"moved by step {report.kept['step']:,}"
    return aligned([("layer", "parameters", "open in steps", moved_by), *rows])


def aligned(rows: Sequence[tuple[str, ...]]) -> str:
    """Rows with the first cell to the left and the others to the right, the first row above a line."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows
    ]  # fmt: skip
    return "\n".join([lines[0], "-" * (sum(widths) + 2 * (len(widths) - 1)), *lines[1:]])


def score(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 100 else f"{value:,.1f}"


def percent(share: float) -> str:
    return f"{100 * share:.2f} %" if share >= 1e-4 or share == 0 else f"{100 * share:.0e} %"


def meaning(report: Report) -> str:
    """The rest in words."""
    kept, steps = report.kept, report.kept["of"]
    lines = []
    if "accuracy" in report.after:
        rows = report.data["evaluation_rows"]
        error = math.sqrt(report.after["accuracy"] * (1 - report.after["accuracy"]) / rows)
        counts = {name: label["evaluation"] for name, label in report.data["labels"].items()}
        commonest = max(counts, key=lambda name: counts[name])
        lines.append(
            f"One standard error of the accuracy is {error:.3f}; always answering {commonest!r} would score "
            f"{counts[commonest] / rows:.3f}."
        )
    if kept["best"] and len(report.evaluations) > 1:
        lines.append(
            f"Kept: the model after step {kept['step']:,} of {steps:,}, which has the lowest loss of "
            f"{len(report.evaluations)} evaluations on these same rows."
        )
    else:
        lines.append(f"Kept: the model after the last step, {kept['step']:,}.")
    lines.append(f"Moved from pre-trained: {percent(report.drift)} (‖θ − θ₀‖ / ‖θ₀‖, without new parameters).")
    since = f" (those from step {report.resumed_from:,} on)" if report.resumed_from else ""
    lines.append(f"Trained in {report.training_seconds:.1f} s{since}, {report.seconds:.1f} s with everything.")
    if report.skipped_steps:
        lines.append(f"{report.skipped_steps:,} of {steps:,} steps were skipped: their gradients held inf or NaN.")
    return "\n".join(lines)


# -- the plot ------------------------------------------------------------------------------------------------


def open_spans(report: Report, name: str) -> list[tuple[int, int]]:
    """(first step, step at which it closed) of each time that a layer was open, counted from 0."""
    spans: list[tuple[int, int]] = []
    ends = [step for step, _ in report.opened[1:]] + [report.kept["of"]]
    for (start, names), end in zip(report.opened, ends, strict=True):
        if name in names and end > start:
            if spans and spans[-1][1] == start:
                spans[-1] = (spans[-1][0], end)
            else:
                spans.append((start, end))
    return spans


def plot(report: Report, path: Path) -> None:
    """Draw the loss, the lr and the open layers over the steps."""
    names = list(report.model["layers"])
    height = 5.6 + 0.16 * min(len(names), MOST_NAMED_LAYERS)
    figure = Figure(figsize=(9, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)  # drawn without pyplot: no display, and no global state of the caller's touched
    ratios = [3.0, 1.6, height - 5.0]
    loss, lr, opened = figure.subplots(3, 1, sharex=True, gridspec_kw={"height_ratios": ratios})
    plot_loss(report, loss)
    plot_lr(report, lr)
    plot_open(report, opened, names)
    for axes in (loss, lr, opened):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.set_axisbelow(True)
    opened.set_xlabel("step")
    opened.set_xlim(0, report.kept["of"])
    opened.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.savefig(path)


def plot_loss(report: Report, axes: Axes) -> None:
    """The loss of the training batches, and of the evaluation rows."""
    steps, losses = [e["step"] for e in report.losses], [e["loss"] for e in report.losses]
    axes.plot(steps, losses, color=GREY, alpha=0.35, linewidth=1)
    axes.plot(steps, running_mean(losses), color=GREY, linewidth=1.8, label="training (running mean)")
    evaluated = [(0, report.before["loss"])]
    evaluated += [(e["step"], math.log(e["eval_perplexity"]) if "eval_perplexity" in e else e["eval_loss"])
                  for e in report.evaluations]  # fmt: skip
    axes.plot(
        *zip(*evaluated, strict=True),
        color=ORANGE,
        marker="o",
        markersize=4,
        linewidth=1.4,
        label="evaluation",
        clip_on=False,
    )
    axes.plot([report.kept["step"]], [report.after["loss"]], "o", color=BLUE, markersize=8, label="kept", clip_on=False)
    axes.set_ylabel("cross-entropy (nats)")
    axes.set_title("Loss", loc="left", fontweight="bold")
    axes.legend(frameon=False, ncols=3, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0)


def running_mean(values: list[float]) -> list[float]:
    """The mean over about a tenth of the values around each one, fewer at the ends."""
    half = len(values) // 20
    windows = (values[max(0, i - half) : i + half + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def plot_lr(report: Report, axes: Axes) -> None:
    """The lr of the topmost layer, and down to that of the lowest."""
    steps = [e["step"] for e in report.losses]
    low, high = ([ratio * e["learning_rate"] for e in report.losses] for ratio in report.lr_ratios)
    if report.lr_ratios[0] < report.lr_ratios[1]:
        axes.fill_between(steps, low, high, color=BLUE, alpha=0.15, linewidth=0, label="of all layers")
    axes.plot(steps, high, color=BLUE, linewidth=1.8, label="of the topmost layer")
    axes.set_ylim(bottom=0)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    axes.set_title("Learning rate", loc="left", fontweight="bold")
    if report.lr_ratios[0] < report.lr_ratios[1]:
        axes.legend(frameon=False, ncols=2, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0)


def plot_open(report: Report, axes: Axes, names: list[str]) -> None:
    """A bar for each time that a layer was open, the input below and the output above."""
    for at, name in enumerate(names):
        spans = [(start, end - start) for start, end in open_spans(report, name)]
        axes.broken_barh(spans, (at - 0.4, 0.8), facecolors=BLUE, alpha=0.75)
    every = math.ceil(len(names) / MOST_NAMED_LAYERS)
    axes.set_yticks(range(0, len(names), every), names[::every], fontsize=8)
    axes.set_ylim(-0.6, len(names) - 0.4)
    axes.set_title("Open layers, from input (below) to output", loc="left", fontweight="bold")
