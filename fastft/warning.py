"""Warnings that name the line of the user's program, through however many calls it came."""

from __future__ import annotations

import sys
import warnings

OWN = ("fastft", "torch")
"""Packages whose lines are passed over: torch wraps each ``step`` and hook in calls of its own."""


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """``warnings.warn`` from the nearest line outside of fastft and torch, or the first line of all."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in OWN:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)
