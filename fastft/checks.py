"""Checks of single arguments. Each error names the argument, what was expected and what was given."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

__all__ = ["check_choice", "check_count", "check_fraction", "check_not_negative", "check_positive", "check_share"]


def check_count(name: str, value: Any, least: int = 1) -> None:
    """Raise a ``ValueError`` unless ``value`` is an integer and large enough."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name}: expected an integer >= {least}, got {value!r}")


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Raise a ``ValueError`` unless ``value`` is among the choices."""
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")


def check_positive(name: str, value: Any) -> None:
    """Raise a ``ValueError`` unless ``value`` is a finite number above 0."""
    if not (isinstance(value, Real) and 0.0 < float(value) < math.inf):
        raise ValueError(f"{name}: expected a finite number > 0, got {value!r}")


def check_not_negative(name: str, value: Any) -> None:
    """Raise a ``ValueError`` unless ``value`` is a finite number, 0 or above."""
    if not (isinstance(value, Real) and 0.0 <= float(value) < math.inf):
        raise ValueError(f"{name}: expected a finite number >= 0, got {value!r}")


def check_fraction(name: str, value: Any) -> None:
    """Raise a ``ValueError`` unless ``value`` is a number above 0, and 1 at most."""
    if not (isinstance(value, Real) and 0.0 < float(value) <= 1.0):
        raise ValueError(f"{name}: expected a number above 0 and up to 1, got {value!r}")


def check_share(name: str, value: Any) -> None:
    """Raise a ``ValueError`` unless ``value`` is a number from 0 to 1, and no bool."""
    if not (isinstance(value, Real) and not isinstance(value, bool) and 0.0 <= float(value) <= 1.0):
        raise ValueError(f"{name}: expected a number from 0 to 1, got {value!r}")
