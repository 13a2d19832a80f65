"""The drawings of the reports. Imported when one is drawn, since only this needs matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fastft.plotting import BLUE, GREY, figure, whiskers

from .report import pareto_front

if TYPE_CHECKING:
    from .drift import DriftReport
    from .report import RetentionReport


def plot_retention(report: RetentionReport, path: Path) -> None:
    """Source against target, in points: up is kept, right is learned."""
    names = [None, *report.names]
    means = [report.means(name) for name in names]
    area = report.hypervolume()
    points = [(report.points * x.value, report.points * y.value) for x, y in means]
    with figure(path, 7.5, 5.2) as axes:
        front = [points[i] for i in pareto_front(points)]
        axes.step(*zip(*front, strict=True), where="pre", color=BLUE, alpha=0.5, linewidth=2, label="Pareto front")
        for name, point, (x, y) in zip(names, points, means, strict=True):
            colour = GREY if name is None else BLUE
            xerr, yerr = (whiskers(e.value, e.low, e.high, report.points) for e in (x, y))
            axes.errorbar(*point, xerr=xerr, yerr=yerr, fmt="none", ecolor=colour, alpha=0.4, elinewidth=1, capsize=2.5)
            axes.plot(*point, "o", color=colour)
            label = report.before if name is None else name
            axes.annotate(label, point, (6, 6), textcoords="offset points", fontsize=8, color=colour)
        axes.margins(0.18)
        axes.set_xlabel(axis_title(report, "target"))
        axes.set_ylabel(axis_title(report, "source"))
        axes.set_title("What was learned, and what was kept", loc="left", fontweight="bold")
        axes.legend(frameon=False, loc="best", fontsize=8)
        note = f"hypervolume {report.points**2 * area:.4g} points², from (target as before, source 0)"
        if any(e.low is not None for pair in means for e in pair):
            seeds = " and seeds" * any(result.seeds > 1 for result in report.results)
            note = f"bars: {report.confidence:.0%} intervals over the items{seeds}; {note}"
        axes.text(0.0, -0.13, note, transform=axes.transAxes, fontsize=8, color=GREY)


def axis_title(report: RetentionReport, role: str) -> str:
    """An axis's label."""
    evaluations = report.evaluations(role)
    return f"{role}: {', '.join(evaluations)}{' (mean)' if len(evaluations) > 1 else ''}, in points"


def plot_drift(report: DriftReport, path: Path) -> None:
    """The relative drift of each layer group, from input (top) to output."""
    with figure(path, 7.5, 1.4 + 0.28 * len(report.groups)) as axes:
        names = [drift.group for drift in report.groups]
        axes.barh(names, [100.0 * (drift.relative or 0.0) for drift in report.groups], color=BLUE)
        for i, drift in enumerate(report.groups):
            if drift.relative is None:
                axes.text(0.0, i, " not anchored" if not drift.elements else " anchor is 0", va="center", color=GREY)
        axes.invert_yaxis()
        axes.set_xlabel("‖δ‖₂ / ‖θ₀‖₂ (%)")
        axes.set_title("How far each layer group has moved", loc="left", fontweight="bold")
