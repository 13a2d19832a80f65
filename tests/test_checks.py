"""Checks of arguments: what passes, and the sentence for what does not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from fastft.checks import check_choice, check_count, check_fraction, check_not_negative, check_positive, check_share

INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize(
    ("check", "good", "wrong", "expected"),
    [
        (check_count, [1, 7], [0, -1, 1.0, True, "1", None], "an integer >= 1"),
        (check_positive, [1, 0.5, np.float32(2)], [0, -1.0, INF, NAN, "1", None], "a finite number > 0"),
        (check_not_negative, [0, 0.0, 3, np.float64(2)], [-1e-9, INF, NAN, "1", None], "a finite number >= 0"),
        (check_fraction, [1e-9, 1, 1.0, np.float32(0.5)], [0, 1.1, NAN, "1", None], "a number above 0 and up to 1"),
        (check_share, [0, 0.5, 1, np.float32(0.5)], [-0.1, 1.1, NAN, True, "1", None], "a number from 0 to 1"),
    ],
)
def test_numbers(check: Callable[[str, Any], None], good: list[Any], wrong: list[Any], expected: str) -> None:
    for value in good:
        check("x", value)
    for value in wrong:
        with pytest.raises(ValueError) as error:
            check("x", value)
        assert str(error.value) == f"x: expected {expected}, got {value!r}"


def test_a_count_from_another_number_on() -> None:
    check_count("x", 0, least=0)
    with pytest.raises(ValueError, match="x: expected an integer >= 2, got 1"):
        check_count("x", 1, least=2)


def test_a_choice() -> None:
    check_choice("x", "a", ("a", "b"))
    with pytest.raises(ValueError, match="x: expected one of 'a', 'b', got 'c'"):
        check_choice("x", "c", ("a", "b"))
