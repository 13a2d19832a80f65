"""The part that all callbacks share."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from unfreeze_cases import Stack

from fastft.integrations.progress import go_on, numbers
from fastft.unfreeze import OnPlateau, Unfreezer


def unfreezer() -> Unfreezer:
    model = Stack()
    return Unfreezer(model, torch.optim.SGD(model.parameters(), lr=0.1), OnPlateau("loss", patience=1))


def saved(steps: int = 4) -> dict[str, Any]:
    made = unfreezer()
    for step in range(steps):
        made.step(epoch=step / 2, loss=1.0)
    return made.state_dict()


def test_a_run_from_the_start_needs_no_state() -> None:
    for state in (None, saved()):
        go_on(made := unfreezer(), state, 0, 0.0)
        assert made.progress.step == 0
        assert made.open_groups == ("head",)


def test_with_its_state_an_unfreezer_goes_on_exactly() -> None:
    go_on(made := unfreezer(), saved(), 4, 1.5)
    assert made.state_dict() == saved()
    assert len(made.open_groups) == 4


@pytest.mark.parametrize("state", [None, saved(3)])
def test_without_a_state_of_that_step_it_goes_on_by_the_clock(state: Any) -> None:
    with pytest.warns(UserWarning, match="no state of an UnfreezeCallback was saved at step 4: its policy goes on"):
        go_on(made := unfreezer(), state, 4, 1.5)
    assert (made.progress.step, made.progress.epoch, made.progress.events) == (4, 1.5, ())


def test_numbers_are_what_a_policy_can_go_by() -> None:
    metrics = {"a": 1, "b": torch.tensor(2.5), "c": torch.ones(2), "d": "3", "e": [4.0], "epoch": 5.0, "f": 6.5}
    assert numbers(metrics) == {"a": 1.0, "b": 2.5, "f": 6.5}
