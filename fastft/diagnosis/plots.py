"""The drawing of a doctor's report. Imported when one is drawn, since only this needs matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fastft.plotting import BLUE, GREEN, GREY, ORANGE, figure

if TYPE_CHECKING:
    from .report import DoctorReport


def plot_memory(report: DoctorReport, path: Path) -> None:
    """A bar for each setting, from weights to anchor."""
    unit, divisor = report.unit
    names = [f"{memory.kept}\n{memory.moments_as} moments" for memory in report.memories]
    parts = {"weights": BLUE, "low_bits": "#56b4e9", "moments": GREEN, "gradients": GREY, "anchor": ORANGE}
    with figure(path, 8, 1.5 + 0.45 * len(names)) as axes:
        start = [0.0] * len(names)
        for part, colour in parts.items():
            sizes = [getattr(memory, part) / divisor for memory in report.memories]
            if any(sizes):
                axes.barh(range(len(names)), sizes, left=start, color=colour, label=part.replace("_", " "))
            start = [a + b for a, b in zip(start, sizes, strict=True)]
        if report.gpu_memory is not None:
            axes.axvline(report.gpu_memory / divisor, color="black", linestyle="--", linewidth=1, label="GPU memory")
        axes.set_yticks(range(len(names)), names, fontsize=8)
        axes.invert_yaxis()
        axes.set_xlabel(f"{unit}, without activations")
        axes.set_title(report.model, loc="left", fontweight="bold")
        axes.legend(frameon=False, fontsize=8)
