"""The schedules against their closed forms, in chains and sequences, and resumed."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ChainedScheduler, ConstantLR, ExponentialLR, LRScheduler, SequentialLR

import fastft
from fastft.optim import RewarmLR, SlantedTriangularLR

drawn = settings(max_examples=60, deadline=None, derandomize=True)
Make = Callable[[Optimizer], LRScheduler]
SLANTED: Make = lambda optimizer: SlantedTriangularLR(optimizer, 20, cut_frac=0.25, ratio=8)  # noqa: E731
REWARM: Make = lambda optimizer: RewarmLR(optimizer, 30, 4, min_ratio=0.1, starts=(0, 12))  # noqa: E731
BOTH = pytest.mark.parametrize("make", [SLANTED, REWARM], ids=["slanted", "rewarm"])


def optimizer_with(*lrs: Any) -> Optimizer:
    groups = [{"params": [nn.Parameter(torch.ones(2))], "lr": lr} for lr in lrs]
    return fastft.AdamW(groups)


def advance(optimizer: Optimizer, scheduler: LRScheduler, count: int) -> list[list[float]]:
    """The lrs of so many steps."""
    seen = []
    for _ in range(count):
        seen.append([float(group["lr"]) for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    return seen


def lrs(make: Make, count: int, *initial: Any) -> list[list[float]]:
    optimizer = optimizer_with(*(initial or (1.0,)))
    return advance(optimizer, make(optimizer), count)


def ulmfit(step: int, total: int, cut_frac: float, ratio: float) -> float:
    """As printed in the paper; right where cut_frac · total is whole."""
    cut = math.floor(total * cut_frac)
    p = step / cut if step < cut else 1 - (step - cut) / (cut * (1 / cut_frac - 1))
    return (1 + p * (ratio - 1)) / ratio


@pytest.mark.parametrize(("total", "cut_frac", "ratio"), [(20, 0.25, 8.0), (100, 0.1, 32.0), (40, 0.5, 4.0)])
def test_slanted_triangles_are_those_of_the_paper(total: int, cut_frac: float, ratio: float) -> None:
    got = lrs(lambda o: SlantedTriangularLR(o, total, cut_frac, ratio), total + 1)
    assert [lr for (lr,) in got] == pytest.approx([ulmfit(t, total, cut_frac, ratio) for t in range(total + 1)])


@given(
    total=st.integers(2, 60),
    cut_frac=st.floats(0.01, 0.99),
    ratio=st.floats(1.0, 64.0),
    base=st.floats(1e-6, 10.0),
)
@drawn
def test_slanted_triangles_rise_once_and_fall_once(total: int, cut_frac: float, ratio: float, base: float) -> None:
    """Also where cut_frac · total is not whole: there the paper's formula goes below lr/ratio."""
    got = [lr for (lr,) in lrs(lambda o: SlantedTriangularLR(o, total, cut_frac, ratio), total + 5, base)]
    cut = max(1, math.floor(total * cut_frac))
    assert got[cut] == pytest.approx(base)
    assert got[0] == pytest.approx(base / ratio)
    assert got[total:] == pytest.approx([base / ratio] * 5)
    slack = 1e-9 * base
    assert all(a <= b + slack for a, b in pairwise(got[: cut + 1]))
    assert all(a >= b - slack for a, b in pairwise(got[cut:]))


def test_rewarming_by_hand() -> None:
    got = [lr for (lr,) in lrs(lambda o: RewarmLR(o, 14, 2, min_ratio=0.2, starts=(0, 6)), 17)]

    def cosine(done: float) -> float:
        return 0.2 + 0.8 * (1 + math.cos(math.pi * done)) / 2

    first = [0.5, 1.0, cosine(0), cosine(1 / 4), cosine(2 / 4), cosine(3 / 4)]
    second = [0.6, 1.0, *(cosine(i / 6) for i in range(6))]
    assert got == pytest.approx([*first, *second, 0.2, 0.2, 0.2])


def test_rewarming_without_warm_up_or_decay() -> None:
    assert lrs(lambda o: RewarmLR(o, 3, 0, min_ratio=1.0), 5) == [[1.0]] * 5
    assert [lr for (lr,) in lrs(lambda o: RewarmLR(o, 2, 0, min_ratio=0.5), 4)] == pytest.approx([1.0, 0.75, 0.5, 0.5])


@given(
    lengths=st.lists(st.integers(5, 20), min_size=1, max_size=4),
    warmup=st.integers(0, 4),
    min_ratio=st.floats(0.01, 1.0),
)
@drawn
def test_each_rewarming_reaches_the_full_lr_and_none_exceeds_it(
    lengths: list[int], warmup: int, min_ratio: float
) -> None:
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    got = [lr for (lr,) in lrs(lambda o: RewarmLR(o, sum(lengths), warmup, min_ratio, starts), sum(lengths) + 2)]
    assert max(got) <= 1 + 1e-9
    assert min(got[warmup:]) >= min_ratio - 1e-9
    for start in starts:
        assert got[start + warmup] == pytest.approx(1.0)
    assert got[-2:] == pytest.approx([min_ratio] * 2)


# -- as torch's own ------------------------------------------------------------------------------------------


@BOTH
def test_each_group_keeps_its_own_lr(make: Make) -> None:
    got = lrs(make, 25, 1.0, 0.1, 3.0)
    alone = [lr for (lr,) in lrs(make, 25)]
    for row, lr in zip(got, alone, strict=True):
        assert row == pytest.approx([lr, 0.1 * lr, 3 * lr])


@BOTH
def test_the_multiplicative_form_follows_the_closed_one(make: Make) -> None:
    optimizer = optimizer_with(0.3)
    scheduler = make(optimizer)
    for step, (lr,) in enumerate(advance(optimizer, scheduler, 40)):
        assert lr == pytest.approx(0.3 * scheduler.factor(step), rel=1e-12)
    assert scheduler.get_last_lr() == [optimizer.param_groups[0]["lr"]]


@BOTH
def test_a_tensor_lr_is_filled_in_place(make: Make) -> None:
    lr = torch.tensor(0.5)
    optimizer = optimizer_with(lr)
    scheduler = make(optimizer)
    got = [row[0] for row in advance(optimizer, scheduler, 25)]
    assert optimizer.param_groups[0]["lr"] is lr
    assert got == pytest.approx([row[0] for row in lrs(make, 25, 0.5)], rel=1e-5)


@BOTH
def test_chained_with_another(make: Make) -> None:
    optimizer = optimizer_with(1.0)
    chain = ChainedScheduler([make(optimizer), ExponentialLR(optimizer, 0.9)])
    alone = [lr for (lr,) in lrs(make, 25)]
    got = [lr for (lr,) in advance(optimizer, chain, 25)]
    assert got == pytest.approx([lr * 0.9**i for i, lr in enumerate(alone)])


@BOTH
@pytest.mark.parametrize("first", [True, False])
def test_in_a_sequence(make: Make, first: bool) -> None:
    """Before and after another scheduler, from whose end it begins anew."""
    optimizer = optimizer_with(1.0)
    constant = ConstantLR(optimizer, factor=0.5, total_iters=100)
    parts = [make(optimizer), constant] if first else [constant, make(optimizer)]
    got = [lr for (lr,) in advance(optimizer, SequentialLR(optimizer, parts, milestones=[7]), 20)]
    alone = [lr for (lr,) in lrs(make, 20)]
    expected = [*alone[:7], *[0.5] * 13] if first else [*[0.5] * 7, *alone[:13]]
    assert got == pytest.approx(expected)


@BOTH
@pytest.mark.parametrize("stop", [0, 1, 5, 12, 19, 31])
def test_resumed_bit_for_bit(make: Make, stop: int) -> None:
    optimizer = optimizer_with(0.7, 0.03)
    scheduler = make(optimizer)
    advance(optimizer, scheduler, stop)
    saved = copy.deepcopy((optimizer.state_dict(), scheduler.state_dict()))
    expected = advance(optimizer, scheduler, 15)

    again = optimizer_with(0.7, 0.03)
    resumed = make(again)
    again.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    assert advance(again, resumed, 15) == expected


@pytest.mark.parametrize("cls", [SlantedTriangularLR, RewarmLR])
@pytest.mark.parametrize("stop", [1, 6])
def test_resumed_by_last_epoch(cls: Any, stop: int) -> None:
    options: dict[str, Any] = (
        {"total_steps": 20} if cls is SlantedTriangularLR else {"total_steps": 20, "warmup_steps": 3}
    )
    optimizer = optimizer_with(0.7)
    scheduler = cls(optimizer, **options)
    advance(optimizer, scheduler, stop)
    saved = copy.deepcopy(optimizer.state_dict())
    expected = advance(optimizer, scheduler, 10)
    again = optimizer_with(0.7)
    again.load_state_dict(saved)
    # As with torch's: the step that making it takes moves its count and no lr.
    resumed = cls(again, **options, last_epoch=stop - 1)
    assert advance(again, resumed, 10) == expected


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda o: SlantedTriangularLR(o, 1), r"total_steps: expected an integer >= 2, got 1"),
        (lambda o: SlantedTriangularLR(o, 10.0), r"total_steps: expected an integer >= 2, got 10\.0"),
        (lambda o: SlantedTriangularLR(o, 10, cut_frac=1.0), r"cut_frac: expected a number between 0 and 1, got 1\.0"),
        (lambda o: SlantedTriangularLR(o, 10, ratio=0.5), r"ratio: expected a finite number >= 1, got 0\.5"),
        (lambda o: RewarmLR(o, 0, 0), r"total_steps: expected an integer >= 1, got 0"),
        (lambda o: RewarmLR(o, 10, -1), r"warmup_steps: expected an integer >= 0, got -1"),
        (lambda o: RewarmLR(o, 10, 2, min_ratio=0.0), r"min_ratio: expected a number above 0 and up to 1, got 0\.0"),
        (lambda o: RewarmLR(o, 10, 2, starts=()), r"starts: expected 0 and then .* got \[\]"),
        (lambda o: RewarmLR(o, 10, 2, starts=(1, 5)), r"starts: expected 0 .* total_steps=10, got \[1, 5\]"),
        (lambda o: RewarmLR(o, 10, 2, starts=(0, 2)), r"more than warmup_steps=2 apart, .* got \[0, 2\]"),
        (lambda o: RewarmLR(o, 10, 2, starts=(0, 9)), r"got \[0, 9\]"),
        (lambda o: RewarmLR(o, 10, 2, starts=(0, 4.5)), r"got \[0, 4\.5\]"),
    ],
)
def test_what_makes_no_sense_is_refused(make: Callable[[Optimizer], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(optimizer_with(1.0))
