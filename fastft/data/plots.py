"""The plot of a data report: lengths, labels and repetitions."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from fastft.plotting import BLUE, GREEN, GREY, ORANGE, figure

from .examine import KINDS, Examined, Part, quantiles

SHOWN_CLASSES = 12


def plot_report(examined: Examined, path: Path) -> None:
    """Draw lengths, labels and repetitions side by side."""
    drawers = [plot_lengths, *([plot_labels] if examined.train.labels else []), plot_repetitions]
    with figure(path, 4.6 * len(drawers), 4, dpi=130, ncols=len(drawers), squeeze=False) as axes:
        for each, draw in zip(axes[0], drawers, strict=True):
            draw(examined, each)


def style_of(part: Part, examined: Examined) -> dict[str, Any]:
    """Of a histogram: the evaluation data's is an outline over the training data's."""
    if part is examined.train:
        return {"color": BLUE, "alpha": 0.6}
    return {"color": ORANGE, "histtype": "step", "linewidth": 1.8}


def plot_lengths(examined: Examined, axes: Any) -> None:
    most = max(quantiles(part.words)["p99"] for part in examined.parts)
    bins = np.arange(0, max(2.0, most) + 1.5, max(1, round(most / 30))) - 0.5
    for part in examined.parts:
        shares = np.full(len(part.words), 100 / len(part.words))
        clipped = np.minimum(part.words, bins[-1] - 0.25)
        axes.hist(clipped, bins=bins, weights=shares, label=part.name, **style_of(part, examined))
    axes.set_xlabel("words in a text (the longest 1 % in the last bar)")
    axes.set_ylabel("% of rows")
    axes.set_title("Lengths", loc="left", fontweight="bold")
    if examined.eval is not None:
        axes.legend(frameon=False)


def plot_labels(examined: Examined, axes: Any) -> None:
    axes.set_title(f"Labels: {examined.label_column}", loc="left", fontweight="bold")
    balance = examined.train.balance
    parts = [part for part in examined.parts if part.labels is not None]
    if balance is None:
        for part in parts:
            if numbers := part.numbers:
                shares = np.full(len(numbers), 100 / len(numbers))
                axes.hist(numbers, bins=30, weights=shares, label=part.name, **style_of(part, examined))
        axes.set_xlabel(str(examined.label_column))
        axes.set_ylabel("% of rows")
        return
    classes = list(balance.counts)[:SHOWN_CLASSES]
    height = 0.8 / len(parts)
    for number, part in enumerate(parts):
        found = part.balance
        total = sum(found.counts.values()) if found is not None else 1
        parts_of = [100 * (found.counts.get(label, 0) if found is not None else 0) / total for label in classes]
        places = [place + number * height for place in range(len(classes))]
        colour = style_of(part, examined)["color"]
        axes.barh(places, parts_of, height=height, color=colour, alpha=0.85, label=part.name)
    middle = height * (len(parts) - 1) / 2
    axes.set_yticks([place + middle for place in range(len(classes))], [str(label)[:20] for label in classes])
    axes.invert_yaxis()
    more = len(balance.counts) > SHOWN_CLASSES
    axes.set_xlabel("% of rows" + (f"; the {SHOWN_CLASSES} largest of {len(balance.counts)} classes" if more else ""))


def plot_repetitions(examined: Examined, axes: Any) -> None:
    """The shares of rows that are repeated or empty, of each file and of the evaluation texts in the training data."""
    bars: list[tuple[str, dict[str, int], int]] = []
    for part in examined.parts:
        counts = {kind: part.count(kind) for kind in KINDS}
        bars.append((f"within\n{part.name}", {**counts, "no text": len(part.empty)}, len(part.texts)))
    if examined.eval is not None:
        counts = Counter(str(match.kind) for match in examined.leakage)
        bars.append((f"{examined.eval.name}\nin {examined.train.name}", dict(counts), len(examined.eval.texts)))
    colours = {"exact": ORANGE, "normalised": BLUE, "near": GREEN, "no text": GREY}
    names = {**KINDS, "no text": "no text"}
    starts = [0.0] * len(bars)
    for kind, colour in colours.items():
        if not any(counts.get(kind) for _, counts, _ in bars):
            continue
        widths = [100 * counts.get(kind, 0) / total for _, counts, total in bars]
        axes.barh(
            range(len(bars)),
            widths,
            left=list(starts),
            color=colour,
            height=0.5,
            label=names[kind],
        )
        for i, width in enumerate(widths):
            starts[i] += width
    for i in range(len(bars)):
        axes.text(starts[i], i, f" {starts[i]:.1f} %", va="center", fontsize=9)
    axes.set_yticks(range(len(bars)), [name for name, _, _ in bars], fontsize=9)
    axes.set_xlim(0, max(1.0, 1.25 * max(starts)))
    axes.set_ylim(max(0.9, len(bars) - 0.4), -0.6)
    axes.set_xlabel("% of rows")
    axes.set_title("Repetitions", loc="left", fontweight="bold")
    if any(starts):
        axes.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(0, -0.14), ncols=2)
