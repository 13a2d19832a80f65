"""``fastft.recipe``: what it puts together, against the parts by hand; going on in the middle; wrong numbers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import LambdaLR

import fastft
from fastft.optim import warm_up_then_decay
from fastft.unfreeze import GradualUnfreeze, Unfreezer

GROUPS = ["low", "middle", "head"]
STEPS = 12


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.low, self.middle, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.middle(self.low(x).tanh()).tanh())
        return y


@pytest.fixture
def model() -> Net:
    torch.manual_seed(0)
    return Net()


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(16, 6, generator=generator), torch.randint(3, (16,), generator=generator)


def backward(model: nn.Module, step: int) -> None:
    x, y = batch(step)
    cross_entropy(model(x), y).backward()


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_it_is_its_parts(model: Net) -> None:
    by_hand = copy.deepcopy(model)
    recipe = fastft.recipe(model, STEPS, exclude="head", lr=0.02, anchor_decay=7.0, weight_decay=0.1, groups=GROUPS)
    optimizer = fastft.AdamW(
        by_hand.named_parameters(),
        lr=0.02,
        weight_decay=0.1,
        anchor=fastft.Anchor.snapshot(by_hand, exclude="head"),
        anchor_decay=7.0,
        max_grad_norm=1.0,
    )
    scheduler = LambdaLR(optimizer, warm_up_then_decay(STEPS, 0.1))
    unfreezer = Unfreezer(by_hand, optimizer, GradualUnfreeze(every=3), groups=GROUPS)
    opened = []
    for step in range(STEPS):
        opened.append(len(recipe.unfreezer.open_groups))
        for net in (model, by_hand):
            backward(net, step)
        recipe.step()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        unfreezer.step()
    assert opened == [1] * 3 + [2] * 3 + [3] * 6  # the lowest after half of the steps
    ours, theirs = weights(model), weights(by_hand)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert all(p.grad is None for p in model.parameters())
    assert recipe.scheduler.get_last_lr() == [0.0]
    recipe.undo()
    assert all(p.requires_grad for p in model.parameters())


def test_old_words_still_work(model: Net) -> None:
    with pytest.warns(DeprecationWarning, match='mode: "mask" is called "freeze" now') as found:
        recipe = fastft.recipe(model, STEPS, groups=GROUPS, mode="mask")  # type: ignore[arg-type]
    assert recipe.unfreezer.mode == "freeze"
    with pytest.warns(DeprecationWarning, match=r"close\(\) is called undo\(\) now") as ended:
        recipe.close()
    assert [warning.filename for warning in (*found, *ended)] == [__file__] * 2
    fastft.recipe(model, STEPS, groups=GROUPS)  # all of the first is gone


def test_all_but_what_is_new_is_pulled(model: Net) -> None:
    assert set(fastft.recipe(copy.deepcopy(model), STEPS, exclude="head", groups=GROUPS).anchor.names) == {
        "low.weight", "low.bias", "middle.weight", "middle.bias",
    }  # fmt: skip
    moved = {}
    for decay in (0.0, 40.0):
        net = copy.deepcopy(model)
        recipe = fastft.recipe(net, STEPS, exclude="head", lr=0.02, anchor_decay=decay, weight_decay=0.0, groups=GROUPS)
        for step in range(STEPS):
            backward(net, step)
            recipe.step()
        moved[decay] = (net.low.weight - model.low.weight).norm().item()
    assert 0 < moved[40.0] < 0.9 * moved[0.0]


@pytest.mark.parametrize("stop", [1, 4, 7])
def test_it_goes_on_bit_for_bit(model: Net, stop: int) -> None:
    def fresh(net: Net) -> fastft.Recipe:
        return fastft.recipe(net, STEPS, exclude="head", lr=0.02, groups=GROUPS)

    net = copy.deepcopy(model)
    recipe = fresh(net)
    states: list[Any] = []
    for step in range(STEPS):
        if step == stop:
            states = [copy.deepcopy(net.state_dict()), copy.deepcopy(recipe.state_dict())]
        backward(net, step)
        recipe.step()

    other = copy.deepcopy(model)
    other.load_state_dict(states[0])
    resumed = fresh(other)
    resumed.load_state_dict(states[1])
    for step in range(stop, STEPS):
        backward(other, step)
        resumed.step()
    ours, theirs = weights(net), weights(other)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_short_run_opens_a_layer_a_step(model: Net) -> None:
    recipe = fastft.recipe(model, 2, exclude="head", groups=GROUPS)
    backward(model, 0)
    recipe.step()
    assert recipe.unfreezer.open_groups == ("middle", "head")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"total_steps": 0}, "total_steps: expected an integer >= 1, got 0"),
        ({"total_steps": 2.5}, "total_steps: expected an integer >= 1, got 2.5"),
        ({"open_by": 0}, "open_by: expected a part of the steps above 0 up to 1, got 0"),
        ({"open_by": 1.5}, "open_by: expected a part of the steps above 0 up to 1, got 1.5"),
        ({"warmup": 1}, "warmup: expected a part of the steps from 0 to below 1, got 1"),
        ({"exclude": "haed"}, "exclude: 'haed' matches no parameter"),
        ({"groups": ["low", "hed"]}, "'hed' matches no"),
        ({"lr": -1.0}, "Invalid learning rate: -1.0"),
        ({"anchor_decay": -1.0}, "anchor_decay: "),
    ],
)
def test_wrong_numbers(model: Net, changes: dict[str, Any], said: str) -> None:
    before = [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match=said):
        fastft.recipe(model, **{"total_steps": STEPS, "exclude": "head", "groups": GROUPS, **changes})
    assert [p.requires_grad for p in model.parameters()] == before
    fastft.recipe(model, STEPS, exclude="head", groups=GROUPS)  # nothing of the first attempt is in its way


def test_float16_beside_bfloat16_gets_no_extra_bits(model: Net) -> None:
    model.bfloat16()
    next(model.parameters()).data = next(model.parameters()).data.half()
    optimizer = fastft.recipe(model, STEPS, exclude="head", groups=GROUPS).optimizer
    assert "extra_bits: 0" in repr(optimizer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bfloat16_weights_learn_and_are_pulled_as_float32_weights_are(model: Net, dtype: torch.dtype) -> None:
    """By gradients that bfloat16 holds: the weights are the float32 ones, rounded."""
    model.bfloat16()
    wide = copy.deepcopy(model).float()
    model.to(dtype)
    options: dict[str, Any] = {"lr": 1e-4, "anchor_decay": 30.0, "weight_decay": 0.1, "groups": GROUPS, "open_by": 0.01}
    recipes = [fastft.recipe(net, STEPS, **options) for net in (model, wide)]
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        for p, q in zip(model.parameters(), wide.parameters(), strict=True):
            grad = torch.randn(p.shape, generator=generator).bfloat16()
            p.grad, q.grad = grad.to(dtype), grad.float()
        for each in recipes:
            each.step()
    for p, q in zip(model.parameters(), wide.parameters(), strict=True):
        assert torch.equal(p, q.to(dtype))
        assert ("low_bits" in recipes[0].optimizer.state[p]) == (dtype == torch.bfloat16)
        assert recipes[0].optimizer.state[p]["exp_avg_sq"].dtype == torch.float32
