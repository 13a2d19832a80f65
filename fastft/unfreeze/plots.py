"""The drawing of an unfreezer's report. Imported when one is drawn, since only this needs matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fastft.plotting import BLUE, GREY, figure

if TYPE_CHECKING:
    from .report import UnfreezeReport


def plot_groups(report: UnfreezeReport, path: Path) -> None:
    """A bar for each group, from input to output, as long as it has parameters."""
    groups = report.groups
    with figure(path, 7.5, 1.4 + 0.3 * len(groups)) as axes:
        for opened, colour, label in ((True, BLUE, "open"), (False, GREY, "closed")):
            chosen = [i for i, status in enumerate(groups) if (status.open_since is not None) == opened]
            axes.barh(chosen, [groups[i].parameters for i in chosen], color=colour, label=label)
        axes.set_yticks(range(len(groups)), [status.group for status in groups], fontsize=8)
        axes.invert_yaxis()
        axes.set_xlabel("parameters")
        axes.set_title(f"Layer groups at step {report.step:,}", loc="left", fontweight="bold")
        axes.legend(frameon=False, fontsize=8)
