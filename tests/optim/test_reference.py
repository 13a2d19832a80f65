"""The reference that everything else is tested against: beside torch in float64, and where the result is known."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from optim_cases import half_of, normal
from torch import Tensor, nn

from fastft.optim import reference

SHAPE = (7, 5)
LR, WD, DECAY = 0.02, 0.3, 4.0


def start(seed: int = 1) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A parameter, a gradient, and moments as they are in the middle of a run."""
    p, g, m = (normal(SHAPE, torch.float64, seed=seed + i) for i in range(3))
    return p, g, m, normal(SHAPE, torch.float64, seed=seed + 3).square()


def test_defaults_are_torchs() -> None:
    p, g, m, v = start()
    defaults = torch.optim.AdamW([nn.Parameter(p)]).defaults
    named = {key: defaults[key] for key in ("betas", "eps", "weight_decay", "maximize")}
    plain = reference.adamw(p, g, m, v, None, 3, lr=LR)
    spelled = reference.adamw(p, g, m, v, None, 3, lr=LR, **named)
    assert all(torch.equal(a, b) for a, b in zip(plain[:3], spelled[:3], strict=True))


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"betas": (0.0, 0.5), "eps": 1e-3, "weight_decay": 0.7},
        {"lr": 0.3, "betas": (0.97, 0.9), "weight_decay": 0.0},
    ],
    ids=["defaults", "others", "no_decay"],
)
def test_fifty_steps_are_torchs(options: dict[str, Any], maximize: bool, amsgrad: bool) -> None:
    """To the rounding of float64: some units in the last place for each step."""
    options = {"lr": LR, "maximize": maximize, **options}
    theirs = nn.Parameter(normal(SHAPE, torch.float64, seed=1))
    torchs = torch.optim.AdamW([theirs], amsgrad=amsgrad, foreach=False, **options)
    p, m, v = theirs.detach().clone(), torch.zeros(SHAPE), torch.zeros(SHAPE)
    v_max = torch.zeros(SHAPE) if amsgrad else None
    for t in range(1, 51):
        # They shrink in the end, so that amsgrad's maximum is not the latest second moment.
        theirs.grad = normal(SHAPE, torch.float64, seed=t + 1, scale=1.0 if t < 30 else 0.1)
        torchs.step()
        p, m, v, v_max = reference.adamw(p, theirs.grad, m, v, v_max, t, **options)
    state = torchs.state[theirs]
    found = {"exp_avg": m, "exp_avg_sq": v, **({"max_exp_avg_sq": v_max} if amsgrad else {})}
    assert set(found) == set(state) - {"step"}
    torch.testing.assert_close(p, theirs.detach(), rtol=1e-12, atol=1e-14)
    for key, value in found.items():
        torch.testing.assert_close(value, state[key], rtol=1e-12, atol=1e-16)
    if v_max is not None:
        assert (v_max > v).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_narrow_tensors_are_computed_with_in_float64(dtype: torch.dtype) -> None:
    """And nothing is written in place."""
    tensors = [x.to(dtype) for x in (*start(), normal(SHAPE, seed=9).square(), normal(SHAPE, seed=8))]
    before = copy.deepcopy(tensors)

    def run(p: Tensor, g: Tensor, m: Tensor, v: Tensor, v_max: Tensor, anchor: Tensor) -> tuple[Tensor, ...]:
        mask = half_of(SHAPE, seed=3)
        return reference.adamw(p, g, m, v, v_max, 4, lr=LR, anchor=anchor, anchor_decay=DECAY, update_mask=mask)

    narrow, wide = run(*tensors), run(*(x.double() for x in tensors))
    assert all(torch.equal(a, b) and a.dtype == torch.float64 for a, b in zip(narrow, wide, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


def test_a_constant_gradient_moves_by_lr_at_every_step() -> None:
    """The bias corrections make m̂ = g and v̂ = g² from the first step on."""
    g = normal(SHAPE, torch.float64, seed=1)
    p = p0 = normal(SHAPE, torch.float64, seed=2)
    m = v = torch.zeros(SHAPE)
    for t in range(1, 30):
        p, m, v, _ = reference.adamw(p, g, m, v, None, t, lr=LR, betas=(0.8, 0.97), eps=0.0, weight_decay=0.0)
        torch.testing.assert_close(p, p0 - t * LR * g.sign(), rtol=1e-12, atol=1e-13)


def test_a_decoupled_anchor_shrinks_the_distance_by_lr_times_decay() -> None:
    """Without gradients and other decay: (p − a) times 1 − lr·λ at each step, whatever the moments' count."""
    p, _, _, _ = start()
    a = normal(SHAPE, torch.float64, seed=7)
    distance, m, v = p - a, torch.zeros(SHAPE), torch.zeros(SHAPE)
    for t in range(1, 20):
        options = {"lr": LR, "weight_decay": 0.0, "anchor": a, "anchor_decay": DECAY}
        p, m, v, _ = reference.adamw(p, torch.zeros(SHAPE), m, v, None, t, **options)
        torch.testing.assert_close(p - a, distance * (1 - LR * DECAY) ** t, rtol=1e-12, atol=1e-13)
        assert not m.any() and not v.any()


def test_decay_and_anchor_start_from_the_same_value() -> None:
    """Both take the parameter as it was before the step; neither comes first. Moments know nothing of them."""
    p, g, m, v = start()
    a = normal(SHAPE, torch.float64, seed=7)
    with_all = reference.adamw(p, g, m, v, None, 3, lr=LR, weight_decay=WD, anchor=a, anchor_decay=DECAY)
    with_none = reference.adamw(p, g, m, v, None, 3, lr=LR, weight_decay=0.0)
    torch.testing.assert_close(with_all[0], with_none[0] - LR * WD * p - LR * DECAY * (p - a), rtol=1e-13, atol=1e-14)
    assert torch.equal(with_all[1], with_none[1]) and torch.equal(with_all[2], with_none[2])


def test_a_pull_beyond_the_anchor_ends_there() -> None:
    p, a, zero = normal(SHAPE, torch.float64, seed=1), normal(SHAPE, torch.float64, seed=2), torch.zeros(SHAPE)
    for decay in (50.0, 51.0, 1e6):
        options = {"lr": LR, "weight_decay": 0.0, "anchor": a, "anchor_decay": decay}
        after, _, _, _ = reference.adamw(p, zero, zero, zero, None, 1, **options)
        torch.testing.assert_close(after, a, rtol=0.0, atol=1e-15)


@pytest.mark.parametrize("maximize", [False, True])
def test_an_l2_anchor_is_a_part_of_the_gradient(maximize: bool) -> None:
    """λ·(p − a), as a loss of λ/2·‖p − a‖² would add; also when a loss is maximized, it pulls towards the anchor."""
    p, g, m, v = start()
    a = normal(SHAPE, torch.float64, seed=7)
    options = {"lr": LR, "weight_decay": WD}
    l2 = reference.adamw(
        p, g, m, v, None, 3, anchor=a, anchor_decay=DECAY, anchor_mode="l2", maximize=maximize, **options
    )
    by_hand = (-g if maximize else g) + DECAY * (p - a)
    plain = reference.adamw(p, by_hand, m, v, None, 3, **options)
    assert all(torch.equal(x, y) for x, y in zip(l2[:3], plain[:3], strict=True))


@pytest.mark.parametrize("mode", ["decoupled", "l2"])
def test_no_decay_is_no_anchor(mode: str) -> None:
    p, g, m, v = start()
    a = normal(SHAPE, torch.float64, seed=7)
    with_it = reference.adamw(p, g, m, v, None, 3, lr=LR, anchor=a, anchor_decay=0.0, anchor_mode=mode)
    without = reference.adamw(p, g, m, v, None, 3, lr=LR)
    assert all(torch.equal(x, y) for x, y in zip(with_it[:3], without[:3], strict=True))


def test_maximize_turns_the_gradient_and_nothing_else() -> None:
    p, g, m, v = start()
    up = reference.adamw(p, g, m, v, None, 3, lr=LR, weight_decay=WD, maximize=True)
    down = reference.adamw(p, -g, m, v, None, 3, lr=LR, weight_decay=WD)
    assert all(torch.equal(x, y) for x, y in zip(up[:3], down[:3], strict=True))


def test_amsgrad_divides_by_the_largest_second_moment_so_far() -> None:
    p, g, m, v = start()
    larger, smaller = v * 100 + 1, torch.zeros(SHAPE)
    plain = reference.adamw(p, g, m, v, None, 3, lr=LR)
    held = reference.adamw(p, g, m, v, larger, 3, lr=LR)
    fresh = reference.adamw(p, g, m, v, smaller, 3, lr=LR)
    assert torch.equal(held[3], larger)
    assert torch.equal(fresh[3], fresh[2]) and torch.equal(fresh[0], plain[0])
    moved = [(x[0] - p * (1 - LR * 1e-2)).abs() for x in (held, plain)]
    assert (moved[0] < moved[1] / 5).all()


@pytest.mark.parametrize("shape", [SHAPE[:1], SHAPE])
def test_a_mask_leaves_what_was(shape: tuple[int, ...]) -> None:
    """Of parameter and all moments; the rest steps as without it."""
    p, g, m, v = start()
    a, v_max = normal(SHAPE, torch.float64, seed=7), v + normal(SHAPE, torch.float64, seed=8)
    mask = half_of(shape, seed=3)
    live = mask if mask.dim() == 2 else mask[:, None].expand(SHAPE)
    options = {"lr": LR, "weight_decay": WD, "anchor": a, "anchor_decay": DECAY}
    g[~live] = float("nan")
    masked = reference.adamw(p, g, m, v, v_max, 3, update_mask=mask, **options)
    free = reference.adamw(p, g, m, v, v_max, 3, **options)
    for after, before, unmasked in zip(masked, (p, m, v, v_max), free, strict=True):
        assert torch.equal(after[live], unmasked[live])
        assert torch.equal(after[~live], before[~live])


def test_grad_norm() -> None:
    """Over all gradients, without what is masked, after unscaling."""
    grads = [torch.tensor([3.0, float("nan")]), torch.tensor([[4.0], [float("inf")], [12.0]])]
    masks = [torch.tensor([True, False]), torch.tensor([True, False, True])]
    assert reference.grad_norm(grads, masks) == 13.0
    assert reference.grad_norm(grads, masks, grad_scale=26.0) == 0.5
    assert reference.grad_norm(grads[:1], [None]) != reference.grad_norm(grads[:1], [None])  # NaN
    assert reference.grad_norm([]) == 0.0
    big = torch.full((3,), 1e300, dtype=torch.float64)
    assert reference.grad_norm([big.float().double().clamp(max=1e30)]) == pytest.approx(3**0.5 * 1e30)


@pytest.mark.parametrize("limit", [0.0, 0.1, 1.0, 100.0])
def test_clipping_is_torchs(limit: float) -> None:
    params = [nn.Parameter(normal(SHAPE, torch.float64, seed=i)) for i in range(3)]
    for i, p in enumerate(params):
        p.grad = normal(SHAPE, torch.float64, seed=i + 9)
    grads = [p.grad.clone() for p in params]
    norm = reference.grad_norm(grads)
    assert norm == pytest.approx(float(nn.utils.clip_grad_norm_(params, limit)), rel=1e-14)
    factor = reference.clip_factor(norm, limit)
    assert factor <= 1.0
    for p, g in zip(params, grads, strict=True):
        torch.testing.assert_close(p.grad, g * factor, rtol=1e-13, atol=0.0)


def test_no_limit_clips_nothing() -> None:
    assert reference.clip_factor(1e30, None) == 1.0
    assert reference.clip_factor(1e30, float("inf")) == 1.0
    assert reference.clip_factor(float("inf"), 1.0) == 0.0
