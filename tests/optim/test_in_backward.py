"""Steps in the backward pass: bit for bit the plain step, with few gradients alive; refused where it cannot be."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import sys
import warnings
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from contract_cases import assert_same, net
from started import end_together, free_port, run_together
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import fastft
from fastft.optim import step_in_backward

# Everything that moves a weight is on.
OPTIONS: dict[str, Any] = {"lr": 0.05, "weight_decay": 0.1, "eps": 1e-4, "anchor": "init", "anchor_decay": 2.0}
BATCHES = [torch.linspace(-1.0, 1.0, 4 * 5).reshape(4, 5).mul(7.0 * k + 3.0).sin() for k in range(6)]


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    p = next(model.parameters())
    return (model(batch.to(p.dtype)).float() - 0.3).square().mean()


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Parameters and their state, by name."""
    named = dict(model.named_parameters())
    return {name: [p.detach(), dict(optimizer.state[p]) if p in optimizer.state else None] for name, p in named.items()}


Prepare = Callable[[nn.Module, fastft.AdamW], Any]


def trained(
    in_backward: bool,
    prepare: Prepare = lambda *_: None,
    loop: Callable[[nn.Module, fastft.AdamW, Any], Any] | None = None,
    dtype: torch.dtype = torch.float32,
    make: Callable[[torch.dtype], nn.Module] = lambda dtype: net(dtype=dtype),
    groups: Callable[[nn.Module], Any] = nn.Module.named_parameters,
    **options: Any,
) -> dict[str, Any]:
    """The outcome of a run, plain or in the backward pass."""
    model = make(dtype)
    optimizer = fastft.AdamW(groups(model), **{**OPTIONS, **options})
    prepare(model, optimizer)
    handle = step_in_backward(optimizer) if in_backward else None
    (loop or usual_loop)(model, optimizer, handle)
    return state_of(model, optimizer)


def usual_loop(model: nn.Module, optimizer: fastft.AdamW, handle: Any) -> None:
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)
    for batch in BATCHES:
        loss_of(model, batch).backward()
        assert handle is None or all(p.grad is None for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()


def assert_equal_runs(*arguments: Any, **options: Any) -> None:
    plain = trained(False, *arguments, **options)
    assert_same(trained(True, *arguments, **options), plain)


def restrict(model: nn.Module, optimizer: fastft.AdamW) -> None:
    params = dict(model.named_parameters())
    optimizer.set_update_mask(params["0.weight"], torch.arange(17) % 3 > 0)
    optimizer.set_update_mask(params["3.weight"], torch.arange(51).reshape(3, 17) % 2 == 0)
    optimizer.freeze(params["1.bias"])


# -- the same bits -----------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*rounded to nearest")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"amsgrad": True},
        {"maximize": True},
        {"anchor_mode": "l2"},
        {"anchor_mode": "selective"},
        {"state_dtype": torch.float32},
        {"capturable": True},
        {"lr": torch.tensor(0.05)},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_a_run_has_the_bits_of_the_plain_one(dtype: torch.dtype, options: dict[str, Any]) -> None:
    options = {key: value.clone() if isinstance(value, Tensor) else value for key, value in options.items()}
    plain = trained(False, restrict, dtype=dtype, **options)
    if "lr" in options and isinstance(options["lr"], Tensor):  # the scheduler fills it in place
        options["lr"] = torch.tensor(0.05)
    assert_same(trained(True, restrict, dtype=dtype, **options), plain)
    start = dict(net(dtype=dtype).named_parameters())
    assert torch.equal(plain["1.bias"][0], start["1.bias"]) and not torch.equal(plain["0.bias"][0], start["0.bias"])


class Wide(nn.Module):
    """Enough elements in a tensor and a row for 8-bit moments, with a bias below that."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.first = nn.Linear(5, 80)
        self.second = nn.Linear(80, 70)
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh()) * 10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {"extra_bits": 16, "state_dtype": "8bit"},
        {"extra_bits": 8, "state_dtype": torch.bfloat16},
        {"extra_bits": 8, "rounding": "stochastic", "state_dtype": "8bit"},
        {"rounding": "stochastic", "rounding_seed": 7},
        {"state_dtype": "8bit", "rounding": "stochastic", "anchor_mode": "l2"},
        {"rounding": "stochastic", "anchor_mode": "selective"},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_low_bits_codes_and_random_rounding(dtype: torch.dtype, options: dict[str, Any]) -> None:
    def prepare(model: nn.Module, optimizer: fastft.AdamW) -> None:
        optimizer.set_update_mask(model.second.weight, torch.arange(70) % 3 > 0)
        optimizer.set_update_mask(model.first.weight, torch.arange(400).view(80, 5) % 7 > 1)

    def loop(model: nn.Module, optimizer: fastft.AdamW, handle: Any) -> None:
        for i, batch in enumerate(BATCHES):
            loss_of(model, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
            if i == 2:  # written by somebody else
                with torch.no_grad():
                    model.second.weight[::2] *= 1.5
            if i == 3:
                optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            if i == 4:
                optimizer.set_update_mask(model.second.weight, None)
        masters.append(fastft.optim.master_weights(model, optimizer))

    masters: list[dict[str, Tensor]] = []
    assert_equal_runs(prepare, loop, dtype=dtype, make=Wide, **{"lr": 1e-3, **options})
    assert_same(masters[1], masters[0])


def test_the_warning_of_lost_decay_comes_once() -> None:
    for in_backward in (False, True):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trained(in_backward, dtype=torch.bfloat16, lr=1e-6)
        assert [w.category for w in caught] == [UserWarning] and "rounded to nearest" in str(caught[0].message)


def test_importances_and_groups_of_their_own_options() -> None:
    base = net(seed=4)
    importance = {name: p.detach().abs() + 0.1 for name, p in base.named_parameters()}
    anchor = fastft.Anchor.snapshot(base, exclude="1").with_importance(importance)

    def groups(model: nn.Module) -> list[dict[str, Any]]:
        return [
            {"params": list(model[0].named_parameters(prefix="0")), "lr": 0.1, "anchor_decay": 0.0},
            {"params": [("3.weight", model[3].weight)], "weight_decay": 0.5, "amsgrad": True, "anchor_mode": "l2"},
            {"params": [("1.weight", model[1].weight), ("3.bias", model[3].bias)]},
        ]

    assert_equal_runs(restrict_the_first, loop_over_a_part, anchor=anchor, anchor_decay=20.0, groups=groups)


def restrict_the_first(model: nn.Module, optimizer: fastft.AdamW) -> None:
    optimizer.set_update_mask(model[0].weight, torch.arange(17) % 3 > 0)


def loop_over_a_part(model: nn.Module, optimizer: fastft.AdamW, handle: Any) -> None:
    for batch in BATCHES:
        loss_of(model, batch).backward()
        assert (model[3].bias.grad is None) == (handle is not None) and model[1].bias.grad is not None
        optimizer.step()
        model.zero_grad()


def test_what_is_changed_between_steps_counts_from_then_on() -> None:
    def loop(model: nn.Module, optimizer: fastft.AdamW, handle: Any) -> None:
        params = dict(model.named_parameters())
        extra = nn.Parameter(torch.linspace(-1, 1, 3))
        changes: list[Callable[[], Any]] = [
            lambda: optimizer.freeze(params["0.weight"]),
            lambda: optimizer.set_update_mask(params["3.bias"], torch.tensor([True, False, True])),
            lambda: optimizer.param_groups[0].update(betas=(0.5, 0.7), anchor_decay=0.0),
            lambda: optimizer.unfreeze(params["0.weight"]),
            lambda: optimizer.param_groups[0].update(anchor_decay=5.0, weight_decay=0.3),
            lambda: optimizer.add_param_group({"params": [("extra", extra)], "lr": 0.01}),
            lambda: optimizer.set_update_mask(params["3.bias"], None),
            lambda: model[3].bias.requires_grad_(False),
            lambda: optimizer.state.pop(params["1.weight"]),
            lambda: model[3].bias.requires_grad_(True),
        ]
        for step, change in enumerate(changes):
            loss = loss_of(model, BATCHES[step % 6])
            (loss + (extra * loss.detach()).sum() if step > 5 else loss).backward()
            # A group added in this round may get its gradient before it has a hook.
            assert handle is None or all(p.grad is None for p in model.parameters())
            assert handle is None or step == 6 or extra.grad is None
            optimizer.step()
            optimizer.zero_grad()
            change()
        extras.append(extra.detach())

    extras: list[Tensor] = []
    assert_equal_runs(loop=loop)
    assert torch.equal(extras[0], extras[1]) and not torch.equal(extras[0], torch.linspace(-1, 1, 3))


@pytest.mark.parametrize("state_policy", ["keep", "reset", "offload"])
@pytest.mark.parametrize("mode", ["requires_grad", "freeze"])
def test_gradual_unfreezing(mode: Any, state_policy: Any) -> None:
    def loop(model: nn.Module, optimizer: fastft.AdamW, handle: Any) -> None:
        unfreezer = fastft.unfreeze.Unfreezer(
            model,
            optimizer,
            lambda progress: [0] if progress.step < 2 else [[1], [0, 1]][progress.step % 2],
            groups={"first": ["0", "1"], "last": "3"},
            mode=mode,
            state_policy=state_policy,
        )
        for batch in BATCHES:
            loss_of(model, batch).backward()
            assert handle is None or all(p.grad is None for p in model.parameters())
            optimizer.step()
            unfreezer.step()
            optimizer.zero_grad()
        unfreezer.undo()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_equal_runs(loop=loop)


def test_what_is_taken_out_of_its_group_is_left_alone() -> None:
    def loop(model: nn.Module, optimizer: fastft.AdamW, handle: Any) -> None:
        for i, batch in enumerate(BATCHES):
            if i in (2, 3):
                for key in ("params", "param_names"):
                    taken = optimizer.param_groups[0][key]
                    del taken[-1 if i == 2 else 0]
            loss_of(model, batch).backward()
            assert i < 3 or (model[0].weight.grad is not None and model[3].bias.grad is not None)
            optimizer.step()
            optimizer.zero_grad()

    assert_equal_runs(loop=loop)


def test_frozen_by_requires_grad_when_it_began() -> None:
    def prepare(model: nn.Module, optimizer: fastft.AdamW) -> None:
        model[0].requires_grad_(False)

    def loop(model: nn.Module, optimizer: fastft.AdamW, handle: Any) -> None:
        assert not model[0].weight.requires_grad
        usual_loop(model, optimizer, handle)
        model[0].requires_grad_(True)
        usual_loop(model, optimizer, handle)  # which finds no gradient left after the backward pass

    assert_equal_runs(prepare, loop)


class Tied(nn.Module):
    """One weight used as embedding, as output layer, and once more."""

    def __init__(self, use_checkpoint: bool = False, reentrant: bool = False) -> None:
        super().__init__()
        self.inner = net()
        self.shared = nn.Linear(5, 5)
        self.use_checkpoint, self.reentrant = use_checkpoint, reentrant

    def forward(self, x: Tensor) -> Tensor:
        def block(x: Tensor) -> Tensor:
            return self.shared(x).tanh() @ self.shared.weight

        x = x.clone().requires_grad_()
        for _ in range(2):
            x = checkpoint(block, x, use_reentrant=self.reentrant) if self.use_checkpoint else block(x)
        return self.inner(self.shared(x))


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_weight_used_many_times_is_stepped_once(checkpointed: bool) -> None:
    def make(_: Any) -> nn.Module:
        torch.manual_seed(3)
        return Tied(checkpointed)

    assert_equal_runs(make=make)


def test_reentrant_checkpointing_of_a_weight_used_twice_is_noticed() -> None:
    torch.manual_seed(3)
    model = Tied(True, reentrant=True)
    optimizer = fastft.AdamW(model.named_parameters(), **OPTIONS)
    step_in_backward(optimizer)
    with pytest.raises(RuntimeError, match=r"shared\.\w+: expected one gradient .* use use_reentrant=False"):
        loss_of(model, BATCHES[0]).backward()


def test_what_torch_steps_is_stepped_by_it_here_too() -> None:
    def make(_: Any) -> nn.Module:
        model = net()
        base = torch.linspace(-1, 1, 34).view(17, 2)
        model[0].bias = nn.Parameter(base[:, 0])  # memory with gaps
        model[3].register_parameter("z", nn.Parameter(torch.complex(torch.ones(2), -torch.ones(2))))
        return model

    def loop(model: nn.Module, optimizer: fastft.AdamW, handle: Any) -> None:
        for batch in BATCHES:
            (loss_of(model, batch) + model[3].z.abs().square().sum()).backward()
            assert handle is None or model[3].z.grad is None
            optimizer.step()
            optimizer.zero_grad()

    assert_equal_runs(loop=loop, make=make, anchor=None, anchor_decay=0.0)


# -- memory ------------------------------------------------------------------------------------------------


def test_few_gradients_live_at_once() -> None:
    alive: dict[int, weakref.ref[Any]] = {}
    most = 0

    class Layer(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, p: Tensor) -> Tensor:
            return x + p.detach().sum()

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
            nonlocal most
            storage = torch.ones(100)
            alive[len(alive)] = weakref.ref(storage.untyped_storage())
            most = max(most, sum(ref() is not None for ref in alive.values()))
            return dy, storage

    params = [nn.Parameter(torch.linspace(-1, 1, 100)) for _ in range(20)]
    optimizer = fastft.AdamW(params, **OPTIONS)

    def backward() -> int:
        nonlocal most
        most = 0
        alive.clear()
        x = torch.zeros((), requires_grad=True)
        for p in params:
            x = Layer.apply(x, p)
        x.backward()
        optimizer.step()
        optimizer.zero_grad()
        return most

    assert backward() == 20
    handle = step_in_backward(optimizer)
    for _ in range(3):
        assert backward() <= 2
    optimizer.freeze(params)
    assert backward() <= 2
    optimizer.unfreeze(params)
    handle.undo()
    assert backward() == 20


def test_it_lasts_as_long_as_the_optimizer_and_keeps_nothing_alive() -> None:
    model = net()
    optimizer = fastft.AdamW(model.named_parameters(), **OPTIONS)
    step_in_backward(optimizer)  # the handle is dropped
    loss_of(model, BATCHES[0]).backward()
    assert model[0].weight.grad is None
    gone = [weakref.ref(optimizer), weakref.ref(optimizer.state[model[0].weight]["exp_avg"])]
    gc.disable()
    try:
        del optimizer
        assert [ref() for ref in gone] == [None, None]
    finally:
        gc.enable()
    before = copy.deepcopy(model.state_dict())
    loss_of(model, BATCHES[0]).backward()
    assert model[0].weight.grad is not None and not model[0].weight._post_accumulate_grad_hooks
    assert_same(model.state_dict(), before)
    step_in_backward(fastft.AdamW(model.named_parameters(), **OPTIONS))


# -- the loop ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("last", ["outside", "inside"])
def test_accumulation(last: str) -> None:
    def loop(model: nn.Module, optimizer: fastft.AdamW, handle: Any) -> None:
        for step in range(3):
            losses = [
                lambda batch=BATCHES[step]: loss_of(model[:3], batch),  # the last layer has no part in it
                lambda batch=BATCHES[step + 1]: loss_of(model, batch),
                lambda batch=BATCHES[step + 2]: model[0](batch).square().sum(),
            ]
            if handle is None:
                for loss in losses:
                    loss().backward()
            else:
                before = copy.deepcopy(model.state_dict())
                with handle.accumulate():
                    losses[0]().backward()
                    with handle.accumulate():
                        losses[1]().backward()
                    if last == "inside":
                        losses[2]().backward()
                assert_same(model.state_dict(), before)
                if last == "outside":
                    losses[2]().backward()
                    assert model[0].weight.grad is None and not torch.equal(model[0].weight, before["0.weight"])
                    assert model[3].weight.grad is not None  # waits for optimizer.step()
                    assert torch.equal(model[3].weight, before["3.weight"])
            optimizer.step()
            optimizer.zero_grad()

    assert_equal_runs(restrict, loop)


def test_accumulation_ends_with_an_error_too() -> None:
    model = net()
    optimizer = fastft.AdamW(model.named_parameters(), **OPTIONS)
    handle = step_in_backward(optimizer)
    with pytest.raises(ZeroDivisionError), handle.accumulate():
        raise ZeroDivisionError
    loss_of(model, BATCHES[0]).backward()
    assert model[0].weight.grad is None


def test_a_second_gradient_is_an_error_until_the_step() -> None:
    model = net()
    optimizer = fastft.AdamW(model.named_parameters(), **OPTIONS)
    handle = step_in_backward(optimizer)
    loss_of(model, BATCHES[0]).backward()
    before = copy.deepcopy(model.state_dict())
    said = r"3\.bias: expected one gradient for each optimizer\.step\(\), got a second one.*handle\.accumulate\(\)"
    with pytest.raises(RuntimeError, match=said):
        loss_of(model, BATCHES[1]).backward()
    model.zero_grad()
    with pytest.raises(RuntimeError, match=said), handle.accumulate():
        loss_of(model, BATCHES[1]).backward()
    assert_same(model.state_dict(), before)
    model.zero_grad()
    optimizer.step()
    assert_same(model.state_dict(), before)
    loss_of(model, BATCHES[1]).backward()
    assert not torch.equal(model[0].weight, before["0.weight"])


class OutOfMemory(RuntimeError):
    pass


def test_after_a_backward_pass_that_failed() -> None:
    """The output side was stepped by then, and the next batch steps all."""
    model = net()
    optimizer = fastft.AdamW(model.named_parameters(), **OPTIONS)
    step_in_backward(optimizer)

    def fail(grad: Tensor) -> Tensor:
        raise OutOfMemory

    before = copy.deepcopy(model.state_dict())
    hook = model[0].register_full_backward_hook(lambda *_: fail(_[0]))
    with pytest.raises(OutOfMemory):
        loss_of(model, BATCHES[0]).backward()
    hook.remove()
    moved = {name: not torch.equal(p, before[name]) for name, p in model.named_parameters()}
    assert moved["3.weight"] and not moved["0.weight"]
    optimizer.zero_grad()
    loss_of(model, BATCHES[1]).backward()
    optimizer.step()
    steps = {name: int(optimizer.state[p]["step"]) for name, p in model.named_parameters()}
    assert steps == {name: 1 + moved[name] for name in moved}


def test_step_counts_for_hooks_and_schedulers() -> None:
    model = net()
    optimizer = fastft.AdamW(model.named_parameters(), **OPTIONS)
    step_in_backward(optimizer)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    calls: list[float] = []
    optimizer.register_step_post_hook(lambda o, args, kwargs: calls.append(o.param_groups[0]["lr"]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for batch in BATCHES[:3]:
            loss_of(model, batch).backward()
            assert optimizer.step() is None
            scheduler.step()
    assert calls == [0.05, 0.025, 0.0125]
    assert {float(state["step"]) for state in optimizer.state.values()} == {3.0}


def test_the_lr_is_that_of_the_backward_pass() -> None:
    p = nn.Parameter(torch.ones(3))
    optimizer = fastft.AdamW([p], lr=0.25, weight_decay=0.0, eps=0.0)
    step_in_backward(optimizer)
    p.sum().backward()
    optimizer.param_groups[0]["lr"] = 0.5
    optimizer.step()
    assert torch.allclose(p, torch.full((3,), 0.75))
    p.sum().backward()
    assert torch.allclose(p, torch.full((3,), 0.25))


# -- checkpoints, copies, undo -----------------------------------------------------------------------------


def test_state_dicts_travel_both_ways() -> None:
    plain = trained(False, restrict)
    model = net()
    optimizer = fastft.AdamW(model.named_parameters(), **OPTIONS)
    restrict(model, optimizer)
    step_in_backward(optimizer)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)
    for i, batch in enumerate(BATCHES):
        if i in (2, 4):  # on and off, in a new model and in this one
            saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), scheduler.state_dict()))
            if i == 2:
                model = net(seed=8)
                optimizer = fastft.AdamW(model.named_parameters(), **OPTIONS)
            else:
                step_in_backward(optimizer)
                loss_of(model, batch.flip(0)).backward()  # gone again
                optimizer.step()
            scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)
            model.load_state_dict(saved[0])
            optimizer.load_state_dict(saved[1])
            scheduler.load_state_dict(saved[2])
        loss_of(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    assert_same(state_of(model, optimizer), plain)


def test_a_copy_steps_plainly() -> None:
    model = net()
    optimizer = fastft.AdamW(model.named_parameters(), **OPTIONS)
    step_in_backward(optimizer)
    loss_of(model, BATCHES[0]).backward()
    for other, twin in (copy.deepcopy((model, optimizer)), pickle.loads(pickle.dumps((model, optimizer)))):
        loss_of(other, BATCHES[1]).backward()
        assert other[0].weight.grad is not None
        assert torch.equal(other[0].weight, model[0].weight)
        twin.step()
        assert not torch.equal(other[0].weight, model[0].weight)
        step_in_backward(twin)


def test_undo_and_with_give_the_plain_step_back() -> None:
    def loop(model: nn.Module, optimizer: fastft.AdamW, handle: Any) -> None:
        if handle is not None:
            handle.undo()
            handle.undo()
        for i, batch in enumerate(BATCHES):
            if handle is not None and i % 2:
                with step_in_backward(optimizer):
                    step(model, optimizer, batch, True)
                assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks
                assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
                optimizer.max_grad_norm = 1e6  # no longer refused
                optimizer.max_grad_norm = None
            else:
                step(model, optimizer, batch, False)

    def step(model: nn.Module, optimizer: fastft.AdamW, batch: Tensor, in_backward: bool) -> None:
        loss_of(model, batch).backward()
        assert (model[0].weight.grad is None) == in_backward
        optimizer.step()
        optimizer.zero_grad()

    assert_equal_runs(restrict, loop)


# -- refused -----------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[Callable[[fastft.AdamW], Any], str]] = {
    "max_grad_norm": (lambda o: setattr(o, "max_grad_norm", 0.5), "max_grad_norm: expected None .*, got 0.5: .*plain"),
    "skip_nonfinite": (lambda o: setattr(o, "skip_nonfinite", True), "skip_nonfinite: expected False .*plain step"),
    "differentiable": (lambda o: o.param_groups[0].update(differentiable=True), "differentiable: expected False"),
    "pre_hook": (lambda o: o.register_step_pre_hook(lambda *_: None), "step pre-hooks.*register_step_post_hook"),
    "mofo": (lambda o: fastft.retention.MoFO(o), "step pre-hooks"),
    "overshoot": (lambda o: o.param_groups[0].update(anchor_decay=1e3), r"param_groups\[0\].*anchor_decay"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_needs_all_gradients_is_refused_whenever_it_comes(name: str) -> None:
    change, said = REFUSED[name]
    model = net()
    optimizer = fastft.AdamW(model.named_parameters(), **OPTIONS)
    if name != "overshoot":  # which the plain step refuses too
        other = copy.deepcopy(optimizer)
        change(other)
        with pytest.raises(ValueError, match=said):
            step_in_backward(other)
    step_in_backward(optimizer)
    loss_of(model, BATCHES[0]).backward()
    optimizer.step()
    change(optimizer)
    before = copy.deepcopy(state_of(model, optimizer))
    with pytest.raises(ValueError, match=said):
        loss_of(model, BATCHES[1]).backward()
    with pytest.raises(ValueError, match=said):
        optimizer.step()
    assert_same(state_of(model, optimizer), before)


def test_rewarming_of_an_unfreezer_is_refused() -> None:
    model = net()
    optimizer = fastft.AdamW([{"params": list(model[:3].parameters())}, {"params": list(model[3].parameters())}])
    groups = {"first": ["0", "1"], "last": "3"}
    unfreezer = fastft.unfreeze.Unfreezer(model, optimizer, lambda _: ["last"], groups=groups, rewarm_steps=2)
    with pytest.raises(ValueError, match="step pre-hooks"):
        step_in_backward(optimizer)
    unfreezer.undo()
    step_in_backward(optimizer)


def test_options_given_to_the_constructor_are_refused() -> None:
    for options in ({"max_grad_norm": 1.0}, {"skip_nonfinite": True}, {"differentiable": True}):
        with pytest.raises(ValueError, match=next(iter(options))):
            step_in_backward(fastft.AdamW(net().parameters(), **options))


def test_a_grad_scaler_is_refused_at_its_step() -> None:
    model = net()
    optimizer = fastft.AdamW(model.named_parameters(), **OPTIONS)
    handle = step_in_backward(optimizer)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    scaler.scale(loss_of(model, BATCHES[0])).backward()
    scaler.step(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(loss_of(model, BATCHES[0])).backward()
    with pytest.raises(ValueError, match=r"got a GradScaler's.*spoilt; load them again, and use bfloat16"):
        scaler.step(optimizer)
    handle.undo()  # and nothing of the scaler's stays behind
    loss_of(model, BATCHES[0]).backward()
    optimizer.step()


def test_a_closure_is_refused() -> None:
    model = net()
    optimizer = fastft.AdamW(model.named_parameters(), **OPTIONS)
    step_in_backward(optimizer)
    before = copy.deepcopy(model.state_dict())

    def closure() -> Tensor:
        loss = loss_of(model, BATCHES[0])
        loss.backward()
        return loss

    for call in (lambda: optimizer.step(closure), lambda: optimizer.step(closure=closure)):
        with pytest.raises(ValueError, match="closure: expected None"):
            call()
    assert_same(model.state_dict(), before)
    optimizer.step(closure=None)


def test_other_optimizers_and_a_second_time_are_refused() -> None:
    model = net()
    with pytest.raises(TypeError, match=r"optimizer: expected a fastft.AdamW, got SGD"):
        step_in_backward(torch.optim.SGD(model.parameters(), lr=0.1))  # type: ignore[arg-type]
    optimizer = fastft.AdamW(model.named_parameters(), **OPTIONS)
    handle = step_in_backward(optimizer)
    with pytest.raises(ValueError, match=r"optimizer: it steps in the backward pass already; undo\(\)"):
        step_in_backward(optimizer)
    own = nn.Parameter(torch.ones(2))
    second = fastft.AdamW([own, *model[3].parameters()])
    with pytest.raises(ValueError, match=r"param_groups\[0\]\['params'\]\[1\]: another optimizer steps it"):
        step_in_backward(second)
    assert not own._post_accumulate_grad_hooks
    optimizer.add_param_group({"params": [("own", own)]})
    loss_of(model, BATCHES[0]).backward()
    optimizer.step()
    handle.undo()
    step_in_backward(second)


def test_parameters_of_one_memory_are_refused() -> None:
    base = torch.ones(6)
    a, b = nn.Parameter(base[:4]), nn.Parameter(base[2:])
    with pytest.raises(ValueError, match="a: expected memory of its own with step_in_backward, got some that b shares"):
        step_in_backward(fastft.AdamW([("a", a), ("b", b)]))
    assert not a._post_accumulate_grad_hooks


def test_a_step_that_fails_writes_nothing_and_may_be_taken_again() -> None:
    model = net()
    optimizer = fastft.AdamW(model.named_parameters(), **OPTIONS)
    step_in_backward(optimizer)
    before = copy.deepcopy(model.state_dict())
    optimizer.set_update_mask(model[3].bias, torch.tensor([True, False, True]))
    optimizer.param_groups[0]["betas"] = "no"
    with pytest.raises((ValueError, TypeError)):
        loss_of(model, BATCHES[0]).backward()
    assert_same(model.state_dict(), before)
    optimizer.zero_grad()
    optimizer.param_groups[0]["betas"] = (0.9, 0.99)
    loss_of(model, BATCHES[0]).backward()
    assert not torch.equal(model[0].weight, before["0.weight"])


@pytest.mark.parametrize("decays", [(0.0, 0.0), (0.0, 1.0)])
def test_the_warning_of_an_idle_anchor_comes_once(decays: tuple[float, float]) -> None:
    model = net()
    groups = [
        {"params": list(model[i].named_parameters(prefix=str(i))), "anchor_decay": decay}
        for i, decay in zip((0, 3), decays, strict=True)
    ]
    optimizer = fastft.AdamW(groups, **{**OPTIONS, "anchor_decay": 0.0})
    step_in_backward(optimizer)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loss_of(model, BATCHES[0]).backward()
        optimizer.step()
    assert [str(w.message)[:27] for w in caught] == ["anchor: expected anchor_dec"] * (not any(decays))


# -- several processes -------------------------------------------------------------------------------------


def in_two_processes(rank: int, port: str) -> None:
    """The run of both ranks."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))

    def run(in_backward: bool) -> Iterable[Tensor]:
        model = net()
        for layer in (model[0], model[3], model):
            fully_shard(layer, mesh=mesh)
        optimizer = fastft.AdamW(model.named_parameters(), **OPTIONS)
        optimizer.set_update_mask(model[0].weight, torch.arange(17) % 3 > 0)
        if in_backward:
            step_in_backward(optimizer)
        for batch in BATCHES:
            loss_of(model, batch * (rank + 1)).backward()
            assert all((p.grad is None) == in_backward for p in model.parameters())
            optimizer.step()
            optimizer.zero_grad()
        return [p.full_tensor().detach() for p in model.parameters()]

    plain = run(False)
    assert_same(run(True), plain)
    assert not torch.equal(next(iter(plain)), net()[0].weight)

    model = net()
    optimizer = fastft.AdamW(model.named_parameters(), **OPTIONS)
    handle = step_in_backward(optimizer)
    wrapped = DistributedDataParallel(model)
    said = "got DistributedDataParallel, which adds those of other processes later; use .*fully_shard"
    for refused in (lambda: loss_of(wrapped, BATCHES[0]).backward(), lambda: step_in_backward(optimizer)):
        with pytest.raises(ValueError, match=said):
            refused()
        handle.undo()
    assert_same(model.state_dict(), net().state_dict())
    end_together()


@pytest.mark.slow
def test_two_processes_sharded_and_ddp(tmp_path: Path) -> None:
    paths = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "GLOO_SOCKET_IFNAME": "lo"}
    port = str(free_port())
    run_together(
        ([sys.executable, __file__, str(rank), port], environment, tmp_path / f"{rank}.txt") for rank in range(2)
    )


if __name__ == "__main__":
    in_two_processes(int(sys.argv[1]), sys.argv[2])
