"""The result of a run, as text, ``report.json`` and ``plot.png``: ``RunReport``."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from fastft.plotting import BLUE, GREY, ORANGE, figure
from fastft.tables import aligned, markdown

MOST_NAMED_LAYERS = 30
Table = tuple[Sequence[str], Sequence[Sequence[str]]]
"""Titles and rows."""


@dataclass
class RunReport:
    """A whole run. ``str()`` of it is its tables, and their meaning in words."""

    task: str
    options: dict[str, Any]
    plan: dict[str, Any]
    data: dict[str, Any]
    model: dict[str, Any]
    before: dict[str, float]
    after: dict[str, float]
    kept: dict[str, Any]
    """``{"step", "of", "best"}``: the step whose model was kept, all steps, and whether it was chosen as the best."""
    drift: float
    """‖θ − θ₀‖₂ / ‖θ₀‖₂ over all parameters but new ones; θ₀ are the pre-trained weights."""
    layer_drift: dict[str, float]
    """The same by layer, without layers that are all new."""
    history: list[dict[str, Any]]
    """The Trainer's log, with an entry ``{"step", "open": [names]}`` wherever other layers are open than before."""
    lr_ratios: tuple[float, float]
    """The lowest and the highest lr of a layer, relative to the lr in the history."""
    skipped_steps: int
    resumed_from: int | None
    training_seconds: float
    seconds: float
    notes: list[str]
    environment: dict[str, Any]

    @property
    def losses(self) -> list[dict[str, Any]]:
        """The entries of the history about training steps."""
        return [entry for entry in self.history if "loss" in entry]

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        """The entries of the history about evaluations."""
        return [entry for entry in self.history if "eval_loss" in entry]

    @property
    def opened(self) -> list[tuple[int, frozenset[str]]]:
        """(first step, names of the layers that are open from it on); all from step 0 if none was ever closed."""
        found = [(entry["step"], frozenset(entry["open"])) for entry in self.history if "open" in entry]
        return found or [(0, frozenset(self.model["layers"]))]

    def __str__(self) -> str:
        return "\n\n".join([*(ruled(aligned(*table)) for table in tables(self)), "\n".join(meaning(self))])

    def to_markdown(self) -> str:
        """The same in Markdown."""
        return "\n\n".join([*("\n".join(markdown(*table)) for table in tables(self)), *meaning(self)])

    def to_json(self) -> str:
        """All numbers of the run, as JSON."""
        content = {
            "what": f"fastft finetune: {self.task}",
            "before": self.before,
            "after": self.after,
            "kept": self.kept,
            "drift": {"all": self.drift, "layers": self.layer_drift},
            "training_seconds": self.training_seconds,
            "seconds": self.seconds,
            "resumed_from": self.resumed_from,
            "skipped_steps": self.skipped_steps,
            "notes": self.notes,
            "options": self.options,
            "plan": self.plan,
            "data": self.data,
            "model": self.model,
            "environment": self.environment,
            "history": {
                "training": [
                    {
                        "step": entry["step"],
                        "loss": entry["loss"],
                        "lr": [ratio * entry["learning_rate"] for ratio in self.lr_ratios],
                        "grad_norm": entry.get("grad_norm"),
                    }
                    for entry in self.losses
                ],
                "evaluation": [
                    {key.removeprefix("eval_"): entry[key] for key in ("step", *scored(entry))}
                    for entry in self.evaluations
                ],
                "open": [{"step": step, "layers": sorted(names)} for step, names in self.opened],
            },
        }
        return json.dumps(content, indent=1, ensure_ascii=False)

    def plot(self, path: Path) -> None:
        """Draw the loss, the lr and the open layers over the steps."""
        names = list(self.model["layers"])
        height = 5.6 + 0.16 * min(len(names), MOST_NAMED_LAYERS)
        ratios = [3.0, 1.6, height - 5.0]
        with figure(path, 9, height, 3, sharex=True, gridspec_kw={"height_ratios": ratios}) as (loss, lr, opened):
            plot_loss(self, loss)
            plot_lr(self, lr)
            plot_open(self, opened, names)
            opened.set_xlabel("step")
            opened.set_xlim(0, self.kept["of"])
            opened.xaxis.set_major_locator(MaxNLocator(integer=True))

    def write(self, folder: Path) -> None:
        """Write ``plot.png`` and ``report.json`` into ``folder``."""
        self.plot(folder / "plot.png")
        (folder / "report.json").write_text(self.to_json() + "\n", encoding="utf-8")


def scored(entry: dict[str, Any]) -> list[str]:
    """The keys of an evaluation's scores; the others say how fast it was."""
    return [key for key in entry if key in ("eval_accuracy", "eval_perplexity", "eval_loss")]


# -- tables --------------------------------------------------------------------------------------------------


def tables(report: RunReport) -> list[Table]:
    """The scores, and the layers unless all were open all the time."""
    always_open = len(report.opened) == 1 and len(report.opened[0][1]) == len(report.model["layers"])
    return [table_of_scores(report), *([] if always_open else [table_of_layers(report)])]


def table_of_scores(report: RunReport) -> Table:
    rows = [(name, score(report.before[name]), score(report.after[name])) for name in report.after]
    return (f"{report.data['evaluation_rows']:,} evaluation rows", "before", "after"), rows


def table_of_layers(report: RunReport) -> Table:
    """When each layer was open, and how far it moved."""
    rows = []
    for name, size in report.model["layers"].items():
        spans = open_spans(report, name)
        when = ", ".join(f"{start + 1:,}–{end:,}" for start, end in spans[:3]) + (" …" if len(spans) > 3 else "")
        moved = percent(report.layer_drift[name]) if name in report.layer_drift else "new"
        rows.append((name, f"{size:,}", when or "never", moved))
    return ("layer", "parameters", "open in steps", f"moved by step {report.kept['step']:,}"), rows


def ruled(lines: list[str]) -> str:
    """An aligned table with a line below its titles."""
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def score(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 100 else f"{value:,.1f}"


def percent(share: float) -> str:
    return f"{100 * share:.2f} %" if share >= 1e-4 or share == 0 else f"{100 * share:.0e} %"


def meaning(report: RunReport) -> list[str]:
    """Sentences about the rest, one a line."""
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
    return lines


# -- the plot ------------------------------------------------------------------------------------------------


def open_spans(report: RunReport, name: str) -> list[tuple[int, int]]:
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


def plot_loss(report: RunReport, axes: Axes) -> None:
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


def plot_lr(report: RunReport, axes: Axes) -> None:
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


def plot_open(report: RunReport, axes: Axes, names: list[str]) -> None:
    """A bar for each time that a layer was open, the input below and the output above."""
    for at, name in enumerate(names):
        spans = [(start, end - start) for start, end in open_spans(report, name)]
        axes.broken_barh(spans, (at - 0.4, 0.8), facecolors=BLUE, alpha=0.75)
    every = math.ceil(len(names) / MOST_NAMED_LAYERS)
    axes.set_yticks(range(0, len(names), every), names[::every], fontsize=8)
    axes.set_ylim(-0.6, len(names) - 0.4)
    axes.set_title("Open layers, from input (below) to output", loc="left", fontweight="bold")
