"""Loss scaling with ``torch.amp.GradScaler``, against ``torch.optim.AdamW`` under the same scaler."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from contract_cases import Composed, Twins, assert_near, assert_same, net, state_of
from torch import Tensor, nn

import fastft

# A power of two: scaling and unscaling change no digit, so runs with and without it can be compared closely.
SCALE = 1024.0
X = torch.linspace(-1.0, 1.0, 20).reshape(4, 5)
# Which steps have a gradient that is not finite.
SPOILT = {1: float("inf"), 4: float("nan"), 5: float("-inf")}


def scaler(**options: Any) -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", **{"init_scale": SCALE, "growth_interval": 3, **options})


def give_scaled_grads(twins: Twins, pair: list[torch.amp.GradScaler], spoilt: float | None = None) -> None:
    """Equal scaled gradients for both, from a backward pass; one element of them spoilt if asked for."""
    for which in (0, 1):
        twins.optimizers[which].zero_grad()
        loss = (twins.models[which](X) * (1 + twins.steps % 3)).square().sum()
        pair[which].scale(loss).backward()
    for p, q in zip(twins.params(0), twins.params(1), strict=True):
        p.grad = q.grad.clone()
    if spoilt is not None:
        for which in (0, 1):
            twins.params(which)[4].grad[1, 3] = spoilt
    twins.steps += 1


def unscaled_norm(model: nn.Module, scale: float) -> float:
    grads = [p.grad.double().flatten() for p in model.parameters() if p.grad is not None]
    return torch.cat(grads).norm().item() / scale


@pytest.mark.parametrize("options", [{}, {"amsgrad": True}, {"maximize": True}, {"fused": True}], ids=str)
def test_a_scaled_run_is_torchs(options: dict[str, Any]) -> None:
    twins = Twins(**options)
    pair = [scaler(), scaler()]
    for step in range(10):
        give_scaled_grads(twins, pair, SPOILT.get(step))
        before = copy.deepcopy((twins.params(0), state_of(twins.ours)))
        # torch's fused step leaves the gradients of a skipped one scaled; those of the others are unscaled before it.
        left = pair[0].get_scale() if options.get("fused") and step in SPOILT else 1.0
        for s, optimizer in zip(pair, twins.optimizers, strict=True):
            s.step(optimizer)
            s.update()
        assert pair[0].get_scale() == pair[1].get_scale()
        assert_near(twins.params(0), twins.params(1), "parameters")
        for ours, theirs in zip(state_of(twins.ours), state_of(twins.theirs), strict=True):
            assert float(ours["step"]) == float(theirs["step"])
            assert_near(ours["exp_avg"], theirs["exp_avg"], "exp_avg")
        if step in SPOILT:
            assert_same((twins.params(0), state_of(twins.ours)), before, "skipped step")
        assert_same([p.grad for p in twins.params(0)], [q.grad / left for q in twins.params(1)], "gradients")
    assert {float(state["step"]) for state in state_of(twins.ours)} == {7.0}
    assert twins.ours.skipped_steps.item() == 3
    assert len(SPOILT) == 3
    assert not hasattr(twins.ours, "grad_scale") and not hasattr(twins.ours, "found_inf")


def test_the_first_step_may_be_a_skipped_one() -> None:
    twins = Twins()
    pair = [scaler(), scaler()]
    start = copy.deepcopy(twins.params(0))
    give_scaled_grads(twins, pair, float("inf"))
    for s, optimizer in zip(pair, twins.optimizers, strict=True):
        s.step(optimizer)
        s.update()
    assert_same(twins.params(0), start, "parameters")
    give_scaled_grads(twins, pair)
    for s, optimizer in zip(pair, twins.optimizers, strict=True):
        s.step(optimizer)
        s.update()
    twins.check()  # with step counts of 1 on both sides


@pytest.mark.parametrize("unscale_first", [False, True], ids=["scaled", "unscaled"])
def test_clipping_sees_unscaled_gradients(unscale_first: bool) -> None:
    """torch's way is unscale_, clip, step; ours clips in the step, whether or not the user unscaled before."""
    twins = Twins(ours={"anchor": "init", "anchor_decay": 3.0, "max_grad_norm": 0.5})
    pair = [scaler(), scaler()]
    for step in range(8):
        give_scaled_grads(twins, pair, SPOILT.get(step))
        expected = unscaled_norm(twins.models[0], pair[0].get_scale())
        if unscale_first:
            pair[0].unscale_(twins.ours)
        pair[1].unscale_(twins.theirs)
        for s, optimizer in zip(pair, twins.optimizers, strict=True):
            s.step(optimizer)
            s.update()
        assert twins.ours.grad_norm is not None
        if step not in SPOILT:
            assert expected > 0.5  # it does clip
            assert twins.ours.grad_norm.item() == pytest.approx(expected, rel=1e-6)
        else:
            assert not twins.ours.grad_norm.isfinite()
        twins.check()
    assert {float(state["step"]) for state in state_of(twins.ours)} == {5.0}


@pytest.mark.parametrize("found", [1.0, 2.0, 3.0])
def test_found_inf_is_a_sum_over_devices_and_skips_wherever_it_is_not_zero(found: float) -> None:
    """With parameters on two devices and an inf on both, GradScaler hands over 2."""
    model = net()
    optimizer = fastft.AdamW(model.parameters(), lr=1e-2)

    class SeveralDevices(torch.amp.GradScaler):
        def _check_inf_per_device(self, optimizer: torch.optim.Optimizer) -> Any:
            state = self._per_optimizer_states[id(optimizer)]
            state["found_inf_per_device"] = {i: torch.tensor(1.0) for i in range(int(found))}
            return state["found_inf_per_device"]

    s = SeveralDevices("cpu", init_scale=SCALE)
    s.scale(model(X).square().sum()).backward()
    before = copy.deepcopy(list(model.parameters()))
    s.step(optimizer)
    assert_same(list(model.parameters()), before, "parameters")
    assert {float(state["step"]) for state in state_of(optimizer)} == {0.0}
    assert optimizer.skipped_steps.item() == 1


@pytest.mark.parametrize("shape", [(), (1,)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_scale_and_found_inf_of_any_one_element_shape(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Whoever sets them by hand, as GradScaler does around a step."""
    models = [net(), net()]
    optimizers = [fastft.AdamW(model.parameters(), lr=1e-2, max_grad_norm=1.0) for model in models]
    for i, (p, q) in enumerate(zip(models[0].parameters(), models[1].parameters(), strict=True)):
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
        q.grad = p.grad * SCALE
    optimizers[1].grad_scale = torch.full(shape, SCALE, dtype=dtype)  # type: ignore[attr-defined]
    optimizers[1].found_inf = torch.zeros(shape, dtype=dtype)  # type: ignore[attr-defined]
    for optimizer in optimizers:
        optimizer.step()
    assert_same(list(models[0].parameters()), list(models[1].parameters()), "parameters")
    assert_same(state_of(optimizers[0]), state_of(optimizers[1]), "state")
    torch.testing.assert_close(optimizers[0].grad_norm, optimizers[1].grad_norm.reshape(()))  # type: ignore[union-attr]


def test_several_optimizers_under_one_scaler() -> None:
    """One is skipped, the other steps, as in torch."""
    models = [net(), net()]
    pairs = []
    for model, cls in zip(models, (fastft.AdamW, torch.optim.AdamW), strict=True):
        pairs.append([cls(model[0].parameters(), lr=0.02), cls(model[3].parameters(), lr=0.01, weight_decay=0.3)])
    scalers = [scaler(), scaler()]
    for step in range(6):
        for model, s in zip(models, scalers, strict=True):
            model.zero_grad()
            s.scale(model(X).square().sum()).backward()
        for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
            p.grad = q.grad.clone()
        for model, pair, s in zip(models, pairs, scalers, strict=True):
            if step % 3 == 1:
                model[0].weight.grad[0, 0] = float("inf")
            for optimizer in pair:
                s.step(optimizer)
            s.update()
        assert scalers[0].get_scale() == scalers[1].get_scale()
        assert_near(list(models[0].parameters()), list(models[1].parameters()), "parameters")
        for ours, theirs in zip(*pairs, strict=True):
            if step > 0:
                assert_near(state_of(ours), state_of(theirs), "state")
    steps = [[{float(state["step"]) for state in state_of(optimizer)} for optimizer in pair] for pair in pairs]
    assert steps == [[{4.0}, {6.0}]] * 2
    assert [optimizer.skipped_steps.item() for optimizer in pairs[0]] == [2, 0]


def test_a_disabled_scaler_is_a_plain_step() -> None:
    twins = Twins()
    s = scaler(enabled=False)
    for _ in range(3):
        twins.give_grads()
        for optimizer in twins.optimizers:
            s.step(optimizer)
        s.update()
        twins.check()


def test_a_loss_scale_does_not_wake_what_is_frozen_or_masked() -> None:
    twins = Twins(ours={"max_grad_norm": 0.5})
    rows = torch.arange(17) % 2 == 0
    for model, optimizer in zip(twins.models, twins.optimizers, strict=True):
        if isinstance(optimizer, Composed):
            optimizer.frozen.add(model[1].weight)
            optimizer.masks[model[0].weight] = rows
        else:
            optimizer.freeze(model[1].weight)
            optimizer.set_update_mask(model[0].weight, rows)
    start = copy.deepcopy(twins.params(0))
    pair = [scaler(), scaler()]
    for _ in range(4):
        give_scaled_grads(twins, pair)
        pair[1].unscale_(twins.theirs)
        for s, optimizer in zip(pair, twins.optimizers, strict=True):
            s.step(optimizer)
            s.update()
        twins.check()
    assert_same(twins.params(0)[2], start[2], "frozen")
    assert_same(twins.params(0)[0][~rows], start[0][~rows], "masked rows")


def test_skip_nonfinite_and_a_scaler_count_a_skipped_step_once() -> None:
    model = net()
    optimizer = fastft.AdamW(model.parameters(), lr=1e-2, skip_nonfinite=True)
    s = scaler()
    for spoilt in (None, float("inf"), float("nan"), None):
        optimizer.zero_grad()
        s.scale(model(X).square().sum()).backward()
        if spoilt is not None:
            model[0].bias.grad[2] = spoilt
        s.step(optimizer)
        s.update()
    assert optimizer.skipped_steps.item() == 2
    assert {float(state["step"]) for state in state_of(optimizer)} == {2.0}


GAPPED: dict[str, Callable[[], Tensor]] = {
    "with_gaps": lambda: torch.arange(8.0).reshape(4, 2)[:, 0],
    "complex": lambda: torch.tensor([1.0 + 2.0j, -0.5j]),
}


@pytest.mark.parametrize("alone", [True, False], ids=["alone", "beside_another"])
@pytest.mark.parametrize("name", GAPPED)
def test_parameters_that_take_torchs_own_step_are_unscaled_and_skipped_too(name: str, alone: bool) -> None:
    def make() -> list[nn.Parameter]:
        return [nn.Parameter(GAPPED[name]()), *([] if alone else [nn.Parameter(torch.ones(3))])]

    ours, theirs = make(), make()
    optimizer = fastft.AdamW(ours, lr=0.1, weight_decay=0.2)
    reference = torch.optim.AdamW(theirs, lr=0.1, weight_decay=0.2, foreach=False)
    for step in range(4):
        skip = step == 1
        for p, q in zip(ours, theirs, strict=True):
            q.grad = torch.full_like(q, 0.25 * (step + 1))
            p.grad = torch.full_like(p, float("inf")) if skip else q.grad * SCALE
        optimizer.grad_scale = torch.tensor(SCALE)  # type: ignore[attr-defined]
        optimizer.found_inf = torch.tensor(float(skip))  # type: ignore[attr-defined]
        optimizer.step()
        if not skip:
            reference.step()
        # Adam's direction hardly depends on the gradients' scale: only the moments show it.
        assert_near([p.detach() for p in ours], [q.detach() for q in theirs], "parameters")
        assert_near(state_of(optimizer), state_of(reference), "state")
    assert {float(state["step"]) for state in state_of(optimizer)} == {3.0}
    assert optimizer.skipped_steps.item() == 1


def test_autocast_training_with_a_scaler() -> None:
    """A whole loop as users write it: bfloat16 activations, float32 parameters."""
    losses = []
    for cls in (fastft.AdamW, torch.optim.AdamW):
        model = net()
        optimizer = cls(model.parameters(), lr=1e-2)
        s = scaler()
        curve = []
        for _ in range(8):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = model(X).float().square().mean()
            s.scale(loss).backward()
            s.step(optimizer)
            s.update()
            curve.append(loss.item())
        losses.append(curve)
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)
    assert losses[0][-1] < 0.7 * losses[0][0]


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.0}, {"skip_nonfinite": True, "weight_decay": 0.1}])
def test_an_optimizer_without_a_gradient_is_passed_over(options: dict[str, Any]) -> None:
    """As by torch's fused step: of two optimizers under one scaler this one's parameters were not used."""
    used, idle = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    optimizers = [fastft.AdamW(module.parameters(), lr=1e-2, **options) for module in (used, idle)]
    before = [p.detach().clone() for p in idle.parameters()]
    ours = scaler()
    ours.scale(used(torch.ones(1, 2)).sum()).backward()
    for optimizer in optimizers:
        ours.step(optimizer)
    ours.update()
    assert all(torch.equal(p, start) for p, start in zip(idle.parameters(), before, strict=True))
    assert not optimizers[1].state and int(optimizers[1].skipped_steps) == 0
    assert optimizers[0].state


@pytest.mark.parametrize("found", [0.0, 1.0])
def test_found_inf_counts_with_nothing_to_step(found: float) -> None:
    optimizer = fastft.AdamW(torch.nn.Linear(2, 2).parameters(), lr=1e-2, skip_nonfinite=True)
    optimizer.found_inf = torch.full((1,), found)  # type: ignore[attr-defined]
    optimizer.step()
    assert optimizer.skipped_steps.shape == () and int(optimizer.skipped_steps) == found
