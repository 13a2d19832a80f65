"""The look of all plots. Import it where one is drawn: only this needs matplotlib."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

try:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
except ImportError as error:
    raise ImportError("plot needs matplotlib: install it, or fastft[plots]") from error

__all__ = ["BLUE", "GREEN", "GREY", "ORANGE", "figure", "whiskers"]

# Okabe and Ito's colours, which differ with every kind of colour vision, and a grey for what others are compared with.
GREY, BLUE, ORANGE, GREEN = "#6b6b6b", "#0072b2", "#d55e00", "#009e73"


@contextmanager
def figure(path: Path, width: float, height: float, rows: int = 1, *, dpi: int = 150, **subplots: Any) -> Iterator[Any]:
    """Axes to draw in, one or an array of ``rows``; saved to ``path`` when the block ends.

    Without pyplot: no display is needed, and the caller's global state stays as it is. ``width`` and ``height`` are in
    inches; ``subplots`` are further options of :meth:`matplotlib.figure.Figure.subplots`.
    """
    drawn = Figure(figsize=(width, height), dpi=dpi, layout="constrained")
    FigureCanvasAgg(drawn)
    axes = drawn.subplots(rows, **subplots)
    for one in drawn.axes:
        one.spines[["top", "right"]].set_visible(False)
        one.grid(alpha=0.25, linewidth=0.6)
        one.set_axisbelow(True)
    yield axes
    drawn.savefig(path)


def whiskers(value: float, low: float | None, high: float | None, scale: float = 1.0) -> list[list[float]] | None:
    """An interval as matplotlib's error bars, which are lengths from the value; None without an interval."""
    if low is None or high is None:
        return None
    return [[scale * max(0.0, value - low)], [scale * max(0.0, high - value)]]
