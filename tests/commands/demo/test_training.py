"""The demo's parts: the schedule, and how results are put into words."""

from __future__ import annotations

import pytest

from fastft.commands.demo.report import running_mean, verdict
from fastft.optim import warm_up_then_decay
from fastft.retention import Estimate


def test_the_schedule_rises_and_falls_in_straight_lines() -> None:
    factor = warm_up_then_decay(steps=100, warmup=0.1)
    assert [factor(i) for i in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])
    assert [factor(i) for i in (10, 55, 99, 100)] == pytest.approx([1.0, 0.5, 1 / 90, 0.0])
    assert warm_up_then_decay(steps=1, warmup=0.1)(0) == 1.0


def test_a_difference_too_small_to_mean_anything_is_called_so() -> None:
    assert verdict("kept", "cost", Estimate(5.7, 4.5, 6.9, 0.6)) == "kept 5.7 ± 0.6 points"
    assert verdict("kept", "cost", Estimate(-5.7, -6.9, -4.5, 0.6)) == "cost 5.7 ± 0.6 points"
    assert verdict("kept", "cost", Estimate(0.6, -0.4, 1.6, 0.5)) == "kept 0.6 ± 0.5 points (not a clear difference)"


def test_running_mean_uses_what_there_is_at_the_ends() -> None:
    assert running_mean([1.0, 2.0, 3.0, 4.0], width=3) == [1.5, 2.0, 3.0, 3.5]
