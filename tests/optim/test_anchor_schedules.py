"""The anchor's schedules: RecAdam's rule in float64, and chaining and resuming as torch's schedulers do."""

from __future__ import annotations

import io
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ChainedScheduler, ExponentialLR, LambdaLR, SequentialLR

import fastft
from fastft.optim import AnchorDecayScheduler, RecAdamScheduler


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).double()


def adamw(model: nn.Sequential, lr: float | Tensor = 0.01, **options: Any) -> fastft.AdamW:
    """Two groups: the body near its anchor (which is elsewhere), and a head."""
    anchor = fastft.Anchor.snapshot([(f"0.{n}", p.detach() + 1.0) for n, p in model[0].named_parameters()])
    anchor.bind((f"0.{n}", p) for n, p in model[0].named_parameters())
    groups = [
        {"params": list(model[0].parameters()), "anchor_decay": 2.0, "weight_decay": 0.1},
        {"params": list(model[1].parameters()), "anchor_decay": 0.5, "weight_decay": 0.2},
    ]
    return fastft.AdamW(groups, lr=lr, anchor=anchor, **options)


def take_step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64)
    optimizer.step()


def values(optimizer: torch.optim.Optimizer, key: str) -> list[float]:
    return [float(group[key]) for group in optimizer.param_groups]


# -- AnchorDecayScheduler ------------------------------------------------------------------------------------


def test_the_initial_decay_times_the_factor() -> None:
    net = model()
    optimizer = adamw(net)
    scheduler = AnchorDecayScheduler(optimizer, lambda step: max(0.0, 1.0 - step / 4))
    seen = []
    for step in range(6):
        seen.append(values(optimizer, "anchor_decay"))
        take_step(net, optimizer, step)
        scheduler.step()
    assert [a for a, _ in seen] == [2.0, 1.5, 1.0, 0.5, 0.0, 0.0]
    assert [b for _, b in seen] == [0.5, 0.375, 0.25, 0.125, 0.0, 0.0]
    assert values(optimizer, "lr") == [0.01, 0.01]


def test_the_step_uses_it() -> None:
    """With a factor of 0 the anchor pulls no more; before that it does."""
    moved = []
    for factor in (1.0, 0.0):
        net = model()
        optimizer = adamw(net)
        AnchorDecayScheduler(optimizer, lambda step, factor=factor: factor)  # type: ignore[misc]
        before = net[0].weight.detach().clone()
        take_step(net, optimizer, 0)
        moved.append(net[0].weight.detach() - before)
    torch.testing.assert_close(moved[0] - moved[1], torch.full((4, 3), 0.01 * 2.0 * 1.0, dtype=torch.float64))


def test_a_function_for_each_group() -> None:
    optimizer = adamw(model())
    AnchorDecayScheduler(optimizer, [lambda step: 3.0, lambda step: 0.0])
    assert values(optimizer, "anchor_decay") == [6.0, 0.0]


def test_beside_and_chained_with_learning_rates() -> None:
    net = model()
    optimizer = adamw(net)
    chained = ChainedScheduler(
        [AnchorDecayScheduler(optimizer, lambda step: 0.5**step), ExponentialLR(optimizer, gamma=0.9)]
    )
    for step in range(3):
        assert values(optimizer, "anchor_decay")[0] == 2.0 * 0.5**step
        assert values(optimizer, "lr")[0] == pytest.approx(0.01 * 0.9**step)
        take_step(net, optimizer, step)
        chained.step()


def test_one_after_the_other() -> None:
    net = model()
    optimizer = adamw(net)
    schedulers = [
        AnchorDecayScheduler(optimizer, lambda step: 1.0 + step),
        AnchorDecayScheduler(optimizer, lambda step: 0.5 / (1 + step)),
    ]
    scheduler = SequentialLR(optimizer, schedulers, milestones=[2])  # type: ignore[arg-type]
    seen = []
    for step in range(5):
        seen.append(values(optimizer, "anchor_decay")[0])
        take_step(net, optimizer, step)
        scheduler.step()
    assert seen == pytest.approx([2.0, 4.0, 1.0, 0.5, 1.0 / 3])
    assert values(optimizer, "lr") == [0.01, 0.01]


def test_groups_that_come_later_are_left_alone() -> None:
    net = model()
    optimizer = adamw(net)
    scheduler = AnchorDecayScheduler(optimizer, lambda step: 0.5)
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], "anchor_decay": 7.0})
    take_step(net, optimizer, 0)
    scheduler.step()
    assert values(optimizer, "anchor_decay") == [1.0, 0.25, 7.0]


def saved(state: dict[str, Any]) -> dict[str, Any]:
    """As from a checkpoint: plain values only."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    loaded: dict[str, Any] = torch.load(buffer, weights_only=True)
    return loaded


def make(kind: str, optimizer: torch.optim.Optimizer) -> list[Any]:
    if kind == "decay":
        return [AnchorDecayScheduler(optimizer, lambda step: 0.8**step)]
    if kind == "recadam":
        return [RecAdamScheduler(optimizer, k=0.7, t0=4, gamma=20.0, weight=[0.9, 0.0])]
    warm_up = LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 3))
    return [warm_up, RecAdamScheduler(optimizer, k=0.7, t0=4, gamma=20.0)]


@pytest.mark.parametrize("kind", ["decay", "recadam"])
def test_resuming_in_the_middle(kind: str) -> None:
    def run(resume_at: int | None) -> tuple[list[Tensor], list[list[float]]]:
        net = model()
        optimizer = adamw(net)
        (scheduler,) = make(kind, optimizer)
        seen = []
        for step in range(8):
            if step == resume_at:
                states = saved(optimizer.state_dict()), saved(scheduler.state_dict())
                optimizer = adamw(net)
                (scheduler,) = make(kind, optimizer)
                optimizer.load_state_dict(states[0])
                scheduler.load_state_dict(states[1])
            take_step(net, optimizer, step)
            scheduler.step()
            seen.append([v for key in ("lr", "anchor_decay", "weight_decay") for v in values(optimizer, key)])
        return [p.detach() for p in net.parameters()], seen

    whole, resumed = run(None), run(5)
    assert all(torch.equal(a, b) for a, b in zip(whole[0], resumed[0], strict=True))
    assert whole[1] == resumed[1]


@pytest.mark.parametrize("kind", ["decay", "recadam"])
def test_made_with_last_epoch(kind: str) -> None:
    net = model()
    optimizer = adamw(net)
    (scheduler,) = make(kind, optimizer)
    for step in range(3):
        take_step(net, optimizer, step)
        scheduler.step()
    before = {key: values(optimizer, key) for key in ("lr", "anchor_decay", "weight_decay")}
    if kind == "decay":
        again: Any = AnchorDecayScheduler(optimizer, lambda step: 0.8**step, last_epoch=2)
    else:
        again = RecAdamScheduler(optimizer, k=0.7, t0=4, gamma=20.0, weight=[0.9, 0.0], last_epoch=2)
    assert {key: values(optimizer, key) for key in before} == before
    scheduler.step()
    after = {key: values(optimizer, key) for key in before}
    for group, *old in zip(optimizer.param_groups, *before.values(), strict=True):
        group.update(zip(before, old, strict=True))
    again.step()
    assert {key: values(optimizer, key) for key in before} == after


# -- RecAdamScheduler ----------------------------------------------------------------------------------------


class RecAdam:
    """The rule, restated in float64 with Python's own arithmetic; decays and pull before the Adam part."""

    def __init__(self, p: Tensor, anchor: Tensor | None, weight: float, weight_decay: float) -> None:
        self.p, self.m, self.v = p.detach().clone(), torch.zeros_like(p), torch.zeros_like(p)
        self.anchor, self.weight, self.weight_decay = anchor, weight, weight_decay

    def step(self, t: int, grad: Tensor, lr: float, k: float, t0: float, gamma: float) -> None:
        annealed = self.weight / (1 + math.exp(-k * (t - t0))) if self.weight else 1.0
        pull = lr * (self.weight - annealed) * gamma if self.weight and self.anchor is not None else 0.0
        self.m = 0.9 * self.m + 0.1 * grad
        self.v = 0.999 * self.v + 0.001 * grad**2
        adam = self.m / (1 - 0.9**t) / ((self.v / (1 - 0.999**t)).sqrt() + 1e-8)
        delta = 0.0 if self.anchor is None else self.p - self.anchor
        self.p = self.p - lr * self.weight_decay * self.p - pull * delta - lr * annealed * adam


@pytest.mark.parametrize("warm_up", [False, True])
@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.8, 0.8), (0.6, 1.0)])
def test_recadam_in_float64(weights: tuple[float, float], warm_up: bool) -> None:
    net = model()
    optimizer = adamw(net)
    schedulers: list[Any] = [RecAdamScheduler(optimizer, k=0.7, t0=4, gamma=20.0, weight=list(weights))]
    if warm_up:
        schedulers.append(LambdaWarmUp(optimizer))
    restated = [
        RecAdam(p, p.detach() + 1.0 if i < 2 else None, weights[i // 2], (0.1, 0.2)[i // 2])
        for i, p in enumerate(net.parameters())
    ]
    for step in range(9):
        take_step(net, optimizer, step)
        lr = 0.01 * (min(1.0, (step + 1) / 3) if warm_up else 1.0)
        for p, expected in zip(net.parameters(), restated, strict=True):
            expected.step(step + 1, p.grad, lr, 0.7, 4, 20.0)  # type: ignore[arg-type]
            torch.testing.assert_close(p.detach(), expected.p, rtol=1e-11, atol=1e-13)
        for scheduler in schedulers:
            scheduler.step()


class LambdaWarmUp(ExponentialLR):
    """Up in three steps, by ratios."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(optimizer, 1.0)

    def get_lr(self) -> list[Any]:
        def factor(step: int) -> float:
            return min(1.0, (step + 1) / 3)

        ratio = factor(self.last_epoch) / (factor(self.last_epoch - 1) if self.last_epoch else 1.0)
        return [group["lr"] * ratio for group in self.optimizer.param_groups]


def test_the_sigmoid_by_hand() -> None:
    """At t = t0, half of w is learning and half is recalling, and anchor_decay is gamma."""
    net = model()
    optimizer = adamw(net)
    scheduler = RecAdamScheduler(optimizer, k=0.5, t0=3, gamma=40.0)
    for step in range(2):
        take_step(net, optimizer, step)
        scheduler.step()
    assert values(optimizer, "lr") == pytest.approx([0.005, 0.005])
    assert values(optimizer, "anchor_decay") == pytest.approx([40.0, 40.0])
    assert values(optimizer, "weight_decay") == pytest.approx([0.2, 0.4])


def test_the_far_ends_of_the_sigmoid() -> None:
    """e^1000 is no float64, and e^−1000 is 0: both ends are steady, and the pull is lr·w·gamma at the first."""
    net = model()
    optimizer = adamw(net)
    scheduler = RecAdamScheduler(optimizer, k=1.0, t0=1000, gamma=50.0, weight=[0.5, 0.0])
    weights = net[0].weight.detach().clone()
    for step in range(3):
        group = optimizer.param_groups[0]
        assert group["lr"] * group["anchor_decay"] == pytest.approx(0.01 * 0.5 * 50.0)
        assert group["lr"] * group["weight_decay"] == pytest.approx(0.01 * 0.1)
        take_step(net, optimizer, step)
        scheduler.step()
    anchor = weights + 1.0
    for _ in range(3):
        weights = weights - 0.01 * 0.1 * weights - 0.25 * (weights - anchor)
    torch.testing.assert_close(net[0].weight.detach(), weights, rtol=1e-9, atol=1e-9)
    optimizer = adamw(model())
    scheduler = RecAdamScheduler(optimizer, k=1.0, t0=0, gamma=50.0)
    with pytest.warns(UserWarning):
        scheduler.step(2000)
    assert values(optimizer, "lr") == [0.01, 0.01]
    assert values(optimizer, "anchor_decay") == [0.0, 0.0]


def test_too_strong_a_pull_is_refused_by_the_step() -> None:
    net = model()
    optimizer = adamw(net)
    RecAdamScheduler(optimizer, k=0.5, t0=30, gamma=5000.0, weight=[1.0, 0.0])
    before = [p.detach().clone() for p in net.parameters()]
    with pytest.raises(ValueError, match=r"param_groups\[0\]: lr \* anchor_decay: expected at most 1 .* = 50"):
        take_step(net, optimizer, 0)
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))


def test_a_learning_rate_in_a_tensor() -> None:
    net = model()
    optimizer = adamw(net, lr=torch.tensor(0.01, dtype=torch.float64))
    lr = optimizer.param_groups[0]["lr"]
    scheduler = RecAdamScheduler(optimizer, k=0.5, t0=3, gamma=40.0)
    take_step(net, optimizer, 0)
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] is lr
    assert lr.item() == pytest.approx(0.01 / (1 + math.exp(0.5)))


# -- errors --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0.0}, "k: expected a finite number > 0, got 0.0"),
        ({"t0": -1}, "t0: expected a finite number >= 0, got -1"),
        ({"gamma": math.inf}, "gamma: expected a finite number >= 0, got inf"),
        ({"weight": -1.0}, "weight: expected a finite number >= 0, got -1.0"),
        ({"weight": [1.0]}, "weight: expected a number, or 2, got 1"),
    ],
)
def test_bad_annealing(options: dict[str, Any], message: str) -> None:
    optimizer = adamw(model())
    before = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    with pytest.raises(ValueError, match=message):
        RecAdamScheduler(optimizer, **{"k": 0.5, "t0": 3, "gamma": 40.0, **options})
    assert [{key: v for key, v in group.items() if key != "params"} for group in optimizer.param_groups] == before


def test_other_errors() -> None:
    sgd = torch.optim.SGD(model().parameters())
    with pytest.raises(TypeError, match=r"optimizer: expected a fastft\.AdamW, got SGD"):
        AnchorDecayScheduler(sgd, lambda step: 1.0)
    with pytest.raises(TypeError, match=r"optimizer: expected a fastft\.AdamW, got SGD"):
        RecAdamScheduler(sgd, k=0.5, t0=3)
    optimizer = adamw(model(), anchor_mode="l2")
    with pytest.raises(ValueError, match=r"param_groups\[0\]: anchor_mode: expected \"decoupled\", got 'l2'"):
        RecAdamScheduler(optimizer, k=0.5, t0=3, gamma=1.0)
    with pytest.raises(ValueError, match="factor: expected one function, or 2, got 1"):
        AnchorDecayScheduler(optimizer, [lambda step: 1.0])
    for value in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="factor: expected a finite number >= 0 in step 0, got"):
            AnchorDecayScheduler(optimizer, [lambda step: 2.0, lambda step, value=value: value])  # type: ignore[misc]
    assert values(optimizer, "anchor_decay") == [2.0, 0.5]
