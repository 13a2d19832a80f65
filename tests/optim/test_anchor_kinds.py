"""How an anchor pulls: with an importance for each element, and with a strength that a schedule sets.

The arithmetic in every dtype, layout and combination of options is tested in test_adamw_numerics.py; here it is small
examples that can be worked out by hand, and what is said of each kind.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from optim_cases import (
    FLOATS,
    Run,
    Watch,
    bits,
    importances,
    normal,
    parameter,
    same_bits,
    short,
    steps_on,
)
from torch import Tensor, nn

import fastft
from fastft.optim import reference

STILL: dict[str, Any] = {"lr": 0.5, "weight_decay": 0.0}


def anchored(p: Tensor, home: Tensor, importance: Tensor | None = None, **options: Any) -> fastft.AdamW:
    """An optimizer of this parameter alone."""
    anchor = fastft.Anchor.snapshot([("p", home)])
    if importance is not None:
        anchor = anchor.with_importance({"p": importance})
    return fastft.AdamW([("p", p)], anchor=anchor, **options)


def still_step(optimizer: fastft.AdamW) -> None:
    """With gradients of 0 in a first step: what moves is moved by decay and anchor."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.zeros_like(p)
    optimizer.step()


# -- importance ------------------------------------------------------------------------------------------------


def test_a_weighted_pull_by_hand() -> None:
    """lr·λ = 2, so that F = 0, ½, 1½, 49½ divide the distance of 6 by 1, 2, 4, 100."""
    p = nn.Parameter(torch.tensor([7.0, 7.0, -5.0, 7.0]))
    home = torch.ones(4)
    optimizer = anchored(p, home, torch.tensor([0.0, 0.5, 1.5, 49.5]), anchor_decay=4.0, **STILL)
    still_step(optimizer)
    torch.testing.assert_close(p.detach(), torch.tensor([7.0, 4.0, -0.5, 1.06]))
    assert not optimizer.state[p]["exp_avg"].any()


def test_a_weighted_l2_anchor_by_hand() -> None:
    """g = grad + λ·F·(p − a) = 0.5 + 4·F·6, and the first step's moments are (1−β₁)·g and (1−β₂)·g²."""
    p = nn.Parameter(torch.full((3,), 7.0))
    optimizer = anchored(
        p, torch.ones(3), torch.tensor([0.0, 0.25, 2.0]), anchor_decay=4.0, anchor_mode="l2", betas=(0.5, 0.75), **STILL
    )
    p.grad = torch.full((3,), 0.5)
    optimizer.step()
    assert optimizer.state[p]["exp_avg"].tolist() == [0.25, 3.25, 24.25]
    assert optimizer.state[p]["exp_avg_sq"].tolist() == [0.25 * 0.25, 0.25 * 6.5**2, 0.25 * 48.5**2]
    torch.testing.assert_close(p.detach(), torch.full((3,), 6.5))  # Adam's first step is lr


def test_decay_and_a_weighted_pull_start_from_the_same_value() -> None:
    p = nn.Parameter(torch.tensor([4.0]))
    optimizer = anchored(p, torch.tensor([1.0]), torch.tensor([1.0]), lr=0.5, weight_decay=0.25, anchor_decay=2.0)
    still_step(optimizer)
    assert p.item() == 4.0 - 0.125 * 4.0 - 0.5 * 3.0


@pytest.mark.parametrize("dtype", FLOATS, ids=short)
def test_no_strength_overshoots(dtype: torch.dtype) -> None:
    """However large lr·λ·F: what is heavy ends at the anchor, and what has no importance is not touched."""
    p = nn.Parameter(torch.full((4,), 3.0, dtype=dtype))
    weights = torch.tensor([0.0, 1e-30, 1.0, 3e38])
    optimizer = anchored(p, torch.ones(4), weights, lr=0.5, weight_decay=0.0, anchor_decay=1e300)
    still_step(optimizer)
    assert p[0] == 3.0 and p[2] == 1.0 and p[3] == 1.0
    assert 1.0 <= p[1] < 3.0


def test_heavier_elements_stay_nearer() -> None:
    """In the order of their importance, where min(1, lr·λ·F) would be 1 for the upper half."""
    weights = torch.logspace(-6, 6, 25)
    p = nn.Parameter(torch.full((25,), 2.0, dtype=torch.float64))
    still_step(anchored(p, torch.zeros(25), weights, anchor_decay=2.0, **STILL))
    distance = p.detach()
    assert (distance[1:] < distance[:-1]).all() and distance[0] < 2.0 and distance[-1] > 0.0
    torch.testing.assert_close(distance, 2.0 / (1.0 + weights.double()))


def test_a_light_pull_is_nearly_that_without_importance() -> None:
    """The implicit and the explicit step differ by the square of lr·λ·F."""
    plain, weighted = (nn.Parameter(torch.full((5,), 3.0, dtype=torch.float64)) for _ in range(2))
    still_step(anchored(plain, torch.zeros(5), None, anchor_decay=2e-4, **STILL))
    still_step(anchored(weighted, torch.zeros(5), torch.ones(5), anchor_decay=2e-4, **STILL))
    assert 0 < (weighted - plain).max() < 3.01 * 1e-8


@pytest.mark.parametrize("mode", ["decoupled", "l2"])
def test_the_reference_divides_the_distance(mode: str) -> None:
    """By 1 + lr·λ·F; l2 is the gradient of λ/2·F·(p − a)², taken by autograd."""
    p, a, g = (normal((6, 7), torch.float64, seed=i) for i in range(3))
    f, zero = importances((6, 7), torch.float64, seed=3), torch.zeros(6, 7)
    options: dict[str, Any] = {"lr": 0.02, "weight_decay": 0.0, "anchor_decay": 30.0, "anchor_mode": mode}
    got = reference.adamw(p, g, zero, zero, None, 1, anchor=a, importance=f, **options)
    q = p.clone().requires_grad_()
    if mode == "l2":
        (15.0 * f * (q - a) ** 2).sum().backward()
        assert q.grad is not None
        g = g + q.grad
    plain = reference.adamw(p, g, zero, zero, None, 1, lr=0.02, weight_decay=0.0)
    moved = (p - a) / (1 + 0.6 * f) - (p - a) if mode == "decoupled" else zero
    torch.testing.assert_close(got[0], plain[0] + moved, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(got[1:3], plain[1:3], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=short)
def test_a_weighted_step_at_a_negative_lr_pulls_nowhere(dtype: torch.dtype) -> None:
    """Where a scheduler ends below 0, 1 + lr·λ·F may be 0."""
    p = nn.Parameter(torch.full((3,), 5.0, dtype=dtype))
    optimizer = anchored(p, torch.zeros(3), torch.tensor([1.0, 2.0, 4.0]), anchor_decay=1.0, weight_decay=0.0)
    optimizer.param_groups[0]["lr"] = -0.5
    still_step(optimizer)
    assert p.tolist() == [5.0] * 3
    watch = Watch(
        [{"params": [("p", parameter((50,), dtype, seed=1))], "lr": 1e-2, "anchor_decay": 3.0}],
        {"p": normal((50,), seed=2)},
        {"p": importances((50,), seed=3)},
    )
    for lr in (0.01, -0.01):
        watch.optimizer.param_groups[0]["lr"] = lr
        steps_on([watch["p"].param], 4)
        watch.step()


def test_without_an_importance_the_bound_on_the_pull_stands() -> None:
    p, q = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))
    anchor = fastft.Anchor.snapshot([("p", p)]).with_importance({"p": torch.ones(2)})
    optimizer = fastft.AdamW([("p", p), ("q", q)], lr=0.5, anchor=anchor, anchor_decay=1000.0)
    still_step(optimizer)
    before = p.detach().clone()
    anchor.update(fastft.Anchor.snapshot([("q", q)]))
    with pytest.raises(ValueError, match=r"lr \* anchor_decay: expected at most 1 .*, got 0\.5 \* 1000 = 500"):
        optimizer.step()
    assert torch.equal(p, before)


@pytest.mark.parametrize("dtype", FLOATS, ids=short)
@pytest.mark.parametrize("mode", ["decoupled", "l2"])
def test_a_free_parameter_beside_weighted_ones_steps_as_alone(mode: str, dtype: torch.dtype) -> None:
    """The new head, which the anchor does not know."""
    head, alone = (parameter((300, 7), dtype, seed=1) for _ in range(2))
    body = parameter((40, 8), dtype, seed=2)
    anchor = fastft.Anchor.snapshot([("body", body)]).with_importance({"body": importances((40, 8), seed=3)})
    options: dict[str, Any] = {"lr": 0.01, "amsgrad": True, "anchor_decay": 50.0, "anchor_mode": mode}
    both = Run([head, body], fastft.AdamW([("head", head), ("body", body)], anchor=anchor, **options)).go(range(4))
    single = Run([alone], fastft.AdamW([alone], lr=0.01, amsgrad=True)).go(range(4))
    assert same_bits(head.detach(), alone.detach())
    assert same_bits(both.optimizer.state[head]["exp_avg_sq"], single.optimizer.state[alone]["exp_avg_sq"])


def test_frozen_skipped_and_absent() -> None:
    """What is not stepped is not pulled either."""
    frozen, absent, live = (parameter((20,), seed=i) for i in range(3))
    named = [("frozen", frozen), ("absent", absent), ("live", live)]
    anchor = fastft.Anchor.snapshot((name, p + 1) for name, p in named)
    anchor = anchor.with_importance({name: torch.full((20,), 3.0) for name, _ in named})
    optimizer = fastft.AdamW(named, anchor=anchor, anchor_decay=100.0, skip_nonfinite=True)
    optimizer.freeze(frozen)
    before = [bits(p) for _, p in named]
    steps_on([frozen, live], 1)
    live.grad[3] = float("inf")  # type: ignore[index]
    optimizer.step()
    assert all(torch.equal(bits(p), was) for (_, p), was in zip(named, before, strict=True))
    steps_on([frozen, live], 1)
    optimizer.step()
    assert [torch.equal(bits(p), was) for (_, p), was in zip(named, before, strict=True)] == [True, True, False]
    assert int(optimizer.skipped_steps) == 1


def test_an_importance_that_moved_is_followed() -> None:
    """Its memory is watched, as the anchor's is."""
    p, home, f = parameter((30,), seed=1), normal((30,), seed=2), importances((30,), seed=3)
    optimizer = anchored(p, home, f, lr=0.01, anchor_decay=50.0)
    copy = Run([p], optimizer).go(range(2)).copy()
    kept = optimizer._anchor.importance_of("p")  # type: ignore[union-attr]
    assert kept is not None
    kept.data = kept.detach().clone()
    Run([p], optimizer).go(range(2, 4))
    copy.go(range(2, 4))
    assert same_bits(p.detach(), copy.params[0].detach())
