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
    SIXTEEN_BIT,
    Run,
    Watch,
    bits,
    half_of,
    importances,
    normal,
    parameter,
    same_bits,
    short,
    steps_on,
    threads,
)
from torch import Tensor, nn

import fastft
from fastft.optim import adamw_, reference

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
    """1 + lr·λ·F may be 0 if a scheduler ends below 0."""
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
    """A parameter that is not stepped is not pulled either."""
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


# -- selective projection --------------------------------------------------------------------------------------
# With eps = 0, Adam's first step is lr along each gradient's sign, whatever its size.

SELECTIVE: dict[str, Any] = {"anchor_mode": "selective", "eps": 0.0, "weight_decay": 0.0, "lr": 1.0}
GOES_AWAY, COMES_BACK, TURNS_AWAY = [1.0, -0.1], [1.0, 1.0], [-1.0, -1.0]
"""Gradients at p − a = (3, 4): uphill and farther (2, 5), uphill and nearer (2, 3), downhill and farther (4, 5)."""


def three_four(grad: list[float], home: float = 0.0) -> nn.Parameter:
    """(3, 4) away from a home, with a gradient."""
    p = nn.Parameter(torch.tensor([3.0 + home, 4.0 + home]))
    p.grad = torch.tensor(grad)
    return p


@pytest.mark.parametrize("home", [0.0, 10.0])
@pytest.mark.parametrize("decay", [0.5, 1.0, 2.0, 1000.0])
def test_a_projection_by_hand(decay: float, home: float) -> None:
    """(3, 4) becomes (2, 5), √29 away where it was 5: r = 1 − 5/√29, and at λ = 1 it is put back to 5."""
    p = three_four(GOES_AWAY, home)
    anchored(p, torch.full((2,), home), anchor_decay=decay, **SELECTIVE).step()
    pull = min(1.0, decay * (1 - 5 / 29**0.5))
    torch.testing.assert_close(p.detach() - home, torch.tensor([2.0, 5.0]) * (1 - pull))
    if decay == 1.0:
        torch.testing.assert_close((p.detach() - home).norm(), torch.tensor(5.0))
    if decay == 1000.0:
        assert p.tolist() == [home] * 2  # no farther than to the anchor


@pytest.mark.parametrize(("grad", "expected"), [(COMES_BACK, [2.0, 3.0]), (TURNS_AWAY, [4.0, 5.0])])
def test_what_comes_back_or_goes_where_the_gradient_wants_is_let_go(grad: list[float], expected: list[float]) -> None:
    p = three_four(grad)
    anchored(p, torch.zeros(2), anchor_decay=1.0, **SELECTIVE).step()
    assert p.tolist() == expected


def test_each_tensor_is_judged_by_itself() -> None:
    """Three in one group, whose sums would project them all."""
    grads = {"away": GOES_AWAY, "back": COMES_BACK, "turns": TURNS_AWAY}
    params = {name: three_four(grad) for name, grad in grads.items()}
    free = {name: three_four(grad) for name, grad in grads.items()}
    anchor = fastft.Anchor.snapshot((name, torch.zeros(2)) for name in grads)
    fastft.AdamW(params.items(), anchor=anchor, anchor_decay=1.0, **SELECTIVE).step()
    fastft.AdamW(free.values(), eps=0.0, weight_decay=0.0, lr=1.0).step()
    assert [same_bits(params[name].detach(), free[name].detach()) for name in grads] == [False, True, True]
    torch.testing.assert_close(params["away"].detach(), torch.tensor([2.0, 5.0]) * 5 / 29**0.5)


def test_how_far_it_goes_does_not_depend_on_lr() -> None:
    """As the ratio of distances does: with λ = 2 a ninth is a ninth."""
    for lr in (1e-2, 1e-3):
        p = three_four(GOES_AWAY)
        anchored(p, torch.zeros(2), anchor_decay=2.0, **{**SELECTIVE, "lr": lr}).step()
        stepped = torch.tensor([3.0 - lr, 4.0 + lr], dtype=torch.float64)
        expected = stepped * (1 - 2 * (1 - 5 / stepped.norm()))
        torch.testing.assert_close(p.detach().double(), expected, rtol=0, atol=1e-6)


def test_maximize_turns_the_question() -> None:
    """With ``maximize`` the gradient counts with its sign turned."""
    ours, theirs = three_four([-g for g in GOES_AWAY]), three_four(GOES_AWAY)
    anchored(ours, torch.zeros(2), anchor_decay=1.0, maximize=True, **SELECTIVE).step()
    anchored(theirs, torch.zeros(2), anchor_decay=1.0, **SELECTIVE).step()
    assert same_bits(ours.detach(), theirs.detach()) and ours.tolist() != [2.0, 5.0]
    asked_the_other_way = three_four(GOES_AWAY)
    anchored(asked_the_other_way, torch.zeros(2), anchor_decay=1.0, maximize=True, **SELECTIVE).step()
    assert asked_the_other_way.tolist() == [4.0, 3.0]


@pytest.mark.parametrize("rows", [False, True])
def test_masked_elements_have_no_say(rows: bool) -> None:
    """Nor do they move: alone they would have decided otherwise, and their gradients are NaN."""
    shape = (3, 20) if rows else (60,)
    p = nn.Parameter(torch.zeros(shape))
    mask = torch.tensor([True, False, True]) if rows else torch.arange(60) % 30 < 20
    live = p.detach()[mask].numel()
    with torch.no_grad():
        p[mask] = torch.tensor([3.0, 4.0]).repeat(live // 2).reshape(p[mask].shape)
        p[~mask] = 1e6
    before = p.detach().clone()
    p.grad = torch.full(shape, float("nan"))
    p.grad[mask] = torch.tensor(GOES_AWAY).repeat(live // 2).reshape(p[mask].shape)
    optimizer = anchored(p, torch.zeros(shape), anchor_decay=1.0, **SELECTIVE)
    optimizer.set_update_mask(p, mask)
    optimizer.step()
    assert torch.equal(p.detach()[~mask], before[~mask])
    expected = torch.tensor([2.0, 5.0]).repeat(live // 2) * 5 / 29**0.5
    torch.testing.assert_close(p.detach()[mask].flatten(), expected)


def test_at_the_anchor_nothing_is_projected() -> None:
    """Every run starts at its anchor: the first step is the plain one, bit for bit."""
    ours, theirs = parameter((300, 200), seed=1), parameter((300, 200), seed=1)
    options: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.1}
    mine = fastft.AdamW([ours], anchor="init", anchor_decay=1.0, anchor_mode="selective", **options)
    Run([ours], mine).go([1])
    Run([theirs], fastft.AdamW([theirs], **options)).go([1])
    assert same_bits(ours.detach(), theirs.detach())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_no_number_projects_nothing(bad: float) -> None:
    ours, theirs = parameter((40,), seed=1), parameter((40,), seed=1)
    mine = anchored(ours, normal((40,), seed=2), anchor_decay=1.0, anchor_mode="selective", lr=0.01)
    for p, optimizer in ((ours, mine), (theirs, fastft.AdamW([theirs], lr=0.01))):
        steps_on([p], 1)
        p.grad[3] = bad  # type: ignore[index]
        optimizer.step()
    assert ours.isnan().sum() == 1
    assert torch.equal(bits(ours), bits(theirs))


def drifting(step: int, p: Tensor, home: Tensor) -> Tensor:
    """Gradients that lead away from the anchor for some steps and then would have it come back: momentum goes on."""
    noise = normal(p.shape, p.dtype, seed=50 + step)
    return (noise + (-1.0 if step % 4 < 3 else 1.5) * (p.detach() - home.to(p.dtype))).to(p.dtype)


@pytest.mark.parametrize(
    ("mask", "clip"), [("none", False), *[pytest.param(m, True, marks=pytest.mark.slow) for m in ("elements", "rows")]]
)
@pytest.mark.parametrize(
    ("dtype", "state_dtype"),
    [
        (torch.float32, None),
        *[pytest.param(d, None, marks=pytest.mark.slow) for d in FLOATS[1:]],
        *[pytest.param(d, torch.float32, marks=pytest.mark.slow) for d in SIXTEEN_BIT],
    ],
    ids=short,
)
def test_selective_steps_against_the_reference(
    dtype: torch.dtype, state_dtype: torch.dtype | None, clip: bool, mask: str
) -> None:
    """Every dtype, with decay, clipping and masks, over more than a chunk; each tensor is projected now and then."""
    shapes = ((7, 31), (129, 400), (40,), (3, 5, 4))
    named = [(f"p{i}", parameter(shape, dtype, seed=i)) for i, shape in enumerate(shapes)]
    homes = {name: p.detach().float() + 0.1 * normal(p.shape, seed=i + 20) for i, (name, p) in enumerate(named)}
    homes["p2"] = homes["p2"].bfloat16()
    group = {"params": named, "lr": 0.02, "betas": (0.8, 0.95), "weight_decay": 0.1, "amsgrad": True}
    watch = Watch(
        [{**group, "anchor_decay": 0.7, "anchor_mode": "selective"}],
        homes,
        max_grad_norm=2.0 if clip else None,
        state_dtype=state_dtype,
    )
    for name, p in named if mask != "none" else ():
        watch.set_mask(name, half_of(p.shape[:1] if mask == "rows" else p.shape, seed=4))
    projected = []
    for step in range(12):
        for name, p in named:
            p.grad = drifting(step, p, homes[name])
        with Projections() as seen:
            watch.step()
        projected.append(seen.counts[::2])  # of each parameter the one that starts from what was stored
    counts = torch.tensor(projected)
    assert counts.any(0).all() and not counts.all(0).any(), counts


class Projections:
    """Counts, in the reference, which calls projected."""

    def __enter__(self) -> Projections:
        self.counts: list[bool] = []
        self.original = reference.selective_projection

        def counted(p: Tensor, stepped: Tensor, *more: Any) -> Tensor:
            moved = self.original(p, stepped, *more)
            self.counts.append(moved is not stepped and not torch.equal(moved, stepped))
            return moved

        reference.selective_projection = counted
        return self

    def __exit__(self, *_: Any) -> None:
        reference.selective_projection = self.original


@pytest.mark.parametrize(
    ("option", "wrong"),
    [("anchor_decay", 0.7 * (1 + 1e-4)), ("maximize", True), ("anchor_mode", "decoupled"), ("anchor_decay", 0.0)],
)
def test_the_bound_on_a_projection_is_tight_enough_to_notice(option: str, wrong: Any) -> None:
    p, home = parameter((7, 31), seed=1), normal((7, 31), seed=2)
    group = {"params": [("p", p)], "lr": 0.5, "anchor_decay": 0.7, "anchor_mode": "selective", "betas": (0.8, 0.95)}
    watch = Watch([group], {"p": home})
    for _ in range(3):
        p.grad = home - p.detach()
        watch.step()
    p.grad = 0.1 * (p.detach() - home)  # not enough to turn it round
    with pytest.raises(AssertionError, match=r"p: (param|exp_avg), step 4, one step on: "):
        watch.step(assumed={option: wrong})


def test_the_reference_projects_to_the_sphere() -> None:
    """At λ = 1 to the very distance it had, along the line to the anchor; at 2 as much nearer as it was farther."""
    p, a = (normal((6, 7), torch.float64, seed=i) for i in range(2))
    stepped = a + 1.5 * (p - a) + 0.1 * normal((6, 7), torch.float64, seed=2)
    uphill = p - a
    back = reference.selective_projection(p, stepped, uphill, a, 1.0)
    assert (back - a).norm().item() == pytest.approx((p - a).norm().item(), rel=1e-14)
    torch.testing.assert_close((back - a) / (back - a).norm(), (stepped - a) / (stepped - a).norm())
    nearer = reference.selective_projection(p, stepped, uphill, a, 2.0)
    torch.testing.assert_close(nearer - back, back - stepped)
    for let_go in (
        reference.selective_projection(p, stepped, -uphill, a, 1.0),
        reference.selective_projection(stepped, p, uphill, a, 1.0),
        reference.selective_projection(a, stepped, uphill, a, 1.0),
    ):
        assert torch.equal(let_go, stepped) or torch.equal(let_go, p)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", FLOATS, ids=short)
def test_a_selective_step_has_the_same_bits_on_any_number_of_threads(dtype: torch.dtype) -> None:
    """Its sums have an order of their own."""
    runs = []
    for count in (1, 2, 3):
        params = [parameter(shape, dtype, seed=i) for i, shape in enumerate(((70001,), (300, 129), (17,), (0,)))]
        anchor = fastft.Anchor.snapshot((f"p{i}", normal(p.shape, seed=i + 9)) for i, p in enumerate(params))
        named = [(f"p{i}", p) for i, p in enumerate(params)]
        optimizer = fastft.AdamW(named, lr=0.05, anchor=anchor, anchor_decay=0.7, anchor_mode="selective")
        optimizer.set_update_mask(params[1], half_of((300,), seed=3))
        with threads(count):
            for step in range(6):
                for i, p in enumerate(params):
                    p.grad = drifting(step, p, normal(p.shape, seed=i + 9))
                optimizer.step()
        runs.append(Run(params, optimizer))
    for other in runs[1:]:
        runs[0].assert_same(other)


def test_kinds_of_anchors_side_by_side() -> None:
    """Groups of each mode in one optimizer step as they do alone; and a group may change its mode between steps."""
    options: dict[str, Any] = {"lr": 0.05, "anchor": "init"}
    modes = ("decoupled", "l2", "selective")

    def groups(only: tuple[str, ...]) -> list[dict[str, Any]]:
        made = [
            {
                "params": [parameter((50, 3), dtype, seed=i) for dtype in FLOATS],
                "anchor_mode": mode,
                "anchor_decay": 2.0,
            }
            for i, mode in enumerate(modes)
        ]
        return [group for group in made if group["anchor_mode"] in only]

    together = fastft.AdamW(groups(modes), **options)
    alone = [fastft.AdamW(groups((mode,)), **options) for mode in modes]
    for step in range(8):
        for group in (g for o in (together, *alone) for g in o.param_groups):
            steps_on(group["params"], step)
            if step == 5:
                group["anchor_mode"] = "selective" if group["anchor_mode"] == "l2" else "l2"
        for optimizer in (together, *alone):
            optimizer.step()
    for ours, theirs in zip(together.param_groups, (g for o in alone for g in o.param_groups), strict=True):
        assert all(same_bits(p.detach(), q.detach()) for p, q in zip(ours["params"], theirs["params"], strict=True))


def test_selective_frozen_skipped_and_absent() -> None:
    """A skipped step does not repeat the last one's projection."""
    frozen, absent, away = (three_four(GOES_AWAY) for _ in range(3))
    absent.grad = None
    named = [("frozen", frozen), ("absent", absent), ("away", away)]
    anchor = fastft.Anchor.snapshot((name, torch.zeros(2)) for name, _ in named)
    optimizer = fastft.AdamW(named, anchor=anchor, anchor_decay=0.5, skip_nonfinite=True, **SELECTIVE)
    optimizer.freeze(frozen)
    optimizer.step()
    assert frozen.tolist() == absent.tolist() == [3.0, 4.0] and away.tolist() != [2.0, 5.0]
    before = bits(away)
    away.grad = torch.tensor([float("inf"), 1.0])
    optimizer.step()
    assert torch.equal(bits(away), before) and int(optimizer.skipped_steps) == 1


def test_selective_projection_takes_no_importance() -> None:
    p = three_four(GOES_AWAY)
    optimizer = anchored(p, torch.zeros(2), torch.ones(2), anchor_decay=1.0, **SELECTIVE)
    message = r'^p: anchor_mode: expected "decoupled" or "l2" with an importance, got "selective"$'
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    assert p.tolist() == [3.0, 4.0] and not optimizer.state
    state = {"exp_avgs": [torch.zeros(2)], "exp_avg_sqs": [torch.zeros(2)], "steps": [torch.zeros(())], "lr": 1.0}
    kept = {"anchors": [torch.zeros(2)], "importances": [torch.ones(2)], "anchor_decay": 1.0}
    with pytest.raises(ValueError, match=message.replace("p:", r"params\[0\]:")):
        adamw_([p.detach()], [p.grad], **state, **kept, anchor_mode="selective")
    assert p.tolist() == [3.0, 4.0] and not state["steps"][0].any()  # type: ignore[index]
