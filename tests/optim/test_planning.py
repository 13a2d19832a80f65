"""The numbers of a run, against loaders that count them."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, DistributedSampler

from fastft.optim import TrainingPlan, plan_training

drawn = settings(max_examples=100, deadline=None, derandomize=True)


def counted(n: int, batch: int, accumulate: int, world: int, drop_last: bool) -> int:
    """Optimizer steps of an epoch over torch's own loader, with a step for what is left at the end, or not."""
    data = range(n)
    sampler = DistributedSampler(data, world, rank=0, drop_last=drop_last)
    batches = sum(1 for _ in DataLoader(data, batch_size=batch, sampler=sampler, drop_last=drop_last))
    return batches // accumulate + (0 if drop_last else batches % accumulate > 0)


@pytest.mark.slow
@given(
    n=st.integers(1, 300),
    batch=st.integers(1, 20),
    accumulate=st.integers(1, 5),
    world=st.integers(1, 4),
    drop_last=st.booleans(),
    epochs=st.integers(1, 4),
)
@drawn
def test_steps_are_what_loaders_yield(
    n: int, batch: int, accumulate: int, world: int, drop_last: bool, epochs: int
) -> None:
    options: dict[str, Any] = {"accumulate": accumulate, "world_size": world, "drop_last": drop_last}
    # torch's sampler rounds a share that is left out up where the data are fewer than the processes.
    expected = counted(n, batch, accumulate, world, drop_last) if n >= world or not drop_last else 0
    if expected == 0:
        with pytest.raises(ValueError, match=r"n_examples: expected enough for one step of .* with drop_last=True"):
            plan_training(n, batch, epochs=epochs, **options)
        return
    plan = plan_training(n, batch, epochs=epochs, **options)
    assert plan.steps_per_epoch == expected
    assert plan.total_steps == epochs * expected
    assert plan.effective_batch_size == batch * accumulate * world
    assert plan_training(n, batch, steps=17, **options).total_steps == 17


@pytest.mark.parametrize(
    ("warmup", "expected"), [(0.1, 30), (0, 0), (0.0, 0), (7, 7), (300, 300), (0.999, 300), (0.005, 2)]
)
def test_warm_up_in_steps_or_as_a_part(warmup: float, expected: int) -> None:
    assert plan_training(3000, 10, epochs=1, warmup=warmup).warmup_steps == expected


def test_parts_of_epochs_are_rounded_up_but_not_by_rounding_errors() -> None:
    assert plan_training(300, 10, epochs=0.1).total_steps == 3
    assert plan_training(300, 10, epochs=0.7).total_steps == 21
    assert plan_training(300, 10, epochs=0.71).total_steps == 22


@pytest.mark.parametrize(
    ("scaling", "lr", "rule"),
    [
        ("sqrt", 3e-5 * math.sqrt(8), "sqrt: 3e-05 · √(256/32)"),
        ("linear", 3e-5 * 8, "linear: 3e-05 · (256/32)"),
    ],
)
def test_lr_follows_the_effective_batch_size(scaling: Any, lr: float, rule: str) -> None:
    plan = plan_training(
        10_000, 16, epochs=3, accumulate=4, world_size=4, base_lr=3e-5, base_batch_size=32, scaling=scaling
    )
    assert plan.lr == pytest.approx(lr)
    assert plan.rule == rule
    same = plan_training(10_000, 32, epochs=3, base_lr=3e-5, base_batch_size=32, scaling=scaling)
    assert same.lr == 3e-5


def test_the_rule_for_adam_is_the_default() -> None:
    assert plan_training(100, 64, epochs=1, base_lr=1.0, base_batch_size=16).lr == 2.0


def test_a_plan_says_itself_in_words() -> None:
    plan = plan_training(10_000, 16, epochs=3, accumulate=4, base_lr=3e-5, base_batch_size=16)
    assert isinstance(plan, TrainingPlan)
    assert str(plan) == (
        "471 steps (3 epochs of 157), 47 of them to warm up, 64 examples each, lr 6e-05 (sqrt: 3e-05 · √(64/16))"
    )
    assert str(plan_training(100, 10, steps=25)) == (
        "25 steps (2.5 epochs of 10), 2 of them to warm up, 10 examples each (lr not scaled)"
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_examples": 0}, r"n_examples: expected an integer >= 1, got 0"),
        ({"batch_size": 2.0}, r"batch_size: expected an integer >= 1, got 2\.0"),
        ({"accumulate": 0}, r"accumulate: expected an integer >= 1, got 0"),
        ({"world_size": True}, r"world_size: expected an integer >= 1, got True"),
        ({"epochs": None}, r"epochs, steps: expected one of the two, got epochs=None and steps=None"),
        ({"steps": 3}, r"epochs, steps: expected one of the two, got epochs=1 and steps=3"),
        ({"epochs": None, "steps": 0}, r"steps: expected an integer >= 1, got 0"),
        ({"epochs": -1}, r"epochs: expected a finite number > 0, got -1"),
        ({"warmup": 1.0}, r"warmup: expected up to 10 steps, or a part of them as a float below 1, got 1\.0"),
        ({"warmup": 11}, r"warmup: .* got 11"),
        ({"warmup": -0.1}, r"warmup: .* got -0\.1"),
        ({"base_lr": 0.1}, r"base_lr, base_batch_size: expected both or neither, got 0\.1 and None"),
        ({"base_batch_size": 8}, r"base_lr, base_batch_size: expected both or neither, got None and 8"),
        ({"base_lr": 0.0, "base_batch_size": 8}, r"base_lr: expected a finite number > 0, got 0\.0"),
        ({"base_lr": 0.1, "base_batch_size": 0}, r"base_batch_size: expected an integer >= 1, got 0"),
        ({"scaling": "cube"}, r"scaling: expected one of 'sqrt', 'linear', got 'cube'"),
    ],
)
def test_what_makes_no_sense_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_training(**{"n_examples": 100, "batch_size": 10, "epochs": 1, **change})
