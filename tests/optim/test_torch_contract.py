"""The contract of ``torch.optim.AdamW`` that other code relies on, beyond the numbers of one step."""

from __future__ import annotations

import copy
import gc
import inspect
import io
import pickle
import threading
import tracemalloc
import warnings
import weakref
from collections import defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from contract_cases import Composed, Twins, assert_near, assert_same, give_grads, net, state_of, train
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.optim import lr_scheduler as schedulers
from torch.optim import swa_utils
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import fastft

BOTH = pytest.mark.parametrize("cls", [fastft.AdamW, torch.optim.AdamW], ids=["ours", "torchs"])
# Options that torch lacks, all at work: a clip that clips, an anchor that pulls.
FINE_TUNING = {"anchor": "init", "anchor_decay": 3.0, "max_grad_norm": 1.5}


# -- the class, its groups, its names --------------------------------------------------------------------


def test_the_signature_is_torchs_then_keywords_of_our_own() -> None:
    theirs = list(inspect.signature(torch.optim.AdamW.__init__).parameters.values())
    ours = list(inspect.signature(fastft.AdamW.__init__).parameters.values())
    described = [[(p.name, p.kind, p.default) for p in params] for params in (ours, theirs)]
    assert described[0][: len(theirs)] == described[1]
    assert [(p.name, p.kind, p.default) for p in ours[len(theirs) :]] == [
        ("anchor", inspect.Parameter.KEYWORD_ONLY, None),
        ("anchor_decay", inspect.Parameter.KEYWORD_ONLY, 0.0),
        ("anchor_mode", inspect.Parameter.KEYWORD_ONLY, "decoupled"),
        ("max_grad_norm", inspect.Parameter.KEYWORD_ONLY, None),
        ("skip_nonfinite", inspect.Parameter.KEYWORD_ONLY, False),
        ("state_dtype", inspect.Parameter.KEYWORD_ONLY, None),
        ("extra_bits", inspect.Parameter.KEYWORD_ONLY, 0),
        ("rounding", inspect.Parameter.KEYWORD_ONLY, "nearest"),
        ("rounding_seed", inspect.Parameter.KEYWORD_ONLY, 0),
        ("process_group", inspect.Parameter.KEYWORD_ONLY, None),
    ]


def test_positional_options_mean_what_they_mean_in_torch() -> None:
    arguments = (0.02, (0.8, 0.95), 1e-5, 0.3, True)
    ours = fastft.AdamW(net().parameters(), *arguments).param_groups[0]
    theirs = torch.optim.AdamW(net().parameters(), *arguments).param_groups[0]
    assert {key: ours[key] for key in theirs if key != "params"} == {
        key: value for key, value in theirs.items() if key != "params"
    }


@pytest.mark.parametrize(
    "params",
    [
        lambda model: model.parameters(),
        lambda model: model.named_parameters(),
        lambda model: [{"params": model.parameters(), "lr": 0.5, "extra": "kept"}],
        lambda model: [{"params": list(model.named_parameters()), "weight_decay": 0.5}],
        lambda model: [{"amsgrad": True, "params": model[0].weight}, {"params": model[3].parameters()}],
    ],
    ids=["params", "named", "group", "named_group", "two_groups"],
)
def test_groups_have_torchs_keys_in_torchs_order_then_the_anchors(params: Callable[[nn.Module], Any]) -> None:
    twins = Twins(groups=params)
    assert isinstance(twins.ours, torch.optim.AdamW)
    defaults = {**twins.theirs.defaults, "foreach": None, "anchor_decay": 0.0, "anchor_mode": "decoupled"}
    assert list(twins.ours.defaults.items()) == list(defaults.items())
    for ours, theirs in zip(twins.ours.param_groups, twins.theirs.param_groups, strict=True):
        assert list(ours) == [*theirs, "anchor_decay", "anchor_mode"]
        assert ours["foreach"] is None
        for key in theirs.keys() - {"params", "foreach"}:
            assert ours[key] == theirs[key], key
    twins.step(3)


def test_keys_of_the_anchor_may_stand_in_any_group() -> None:
    model = net()
    optimizer = fastft.AdamW(
        [
            {"params": model[0].parameters(), "anchor_decay": 0.5},
            {"params": model[3].parameters(), "anchor_mode": "l2"},
        ],
        anchor="init",
        anchor_decay=2.0,
    )
    assert [(g["anchor_decay"], g["anchor_mode"]) for g in optimizer.param_groups] == [(0.5, "decoupled"), (2.0, "l2")]
    assert optimizer.defaults["anchor_decay"] == 2.0


def test_repr_is_torchs_with_more_lines() -> None:
    twins = Twins(
        groups=lambda model: [{"params": model[0].parameters()}, {"params": model[3].parameters(), "lr": 0.5}]
    )
    theirs = repr(twins.theirs).replace("foreach: False", "foreach: None")
    ours = repr(twins.ours)
    assert ours.count("    anchor_decay: 0.0\n    anchor_mode: decoupled\n") == 2
    own = (
        "All groups\n    anchor: None, max_grad_norm: None, skip_nonfinite: False\n"
        "    state_dtype: None, extra_bits: 0, rounding: nearest\n"
    )
    assert ours.replace("    anchor_decay: 0.0\n    anchor_mode: decoupled\n", "").replace(own, "") == theirs


def test_profilers_find_the_step_under_torchs_names() -> None:
    class Counted(fastft.AdamW):
        calls = 0

        def _optimizer_step_code(self) -> None:  # torch's profiler hooks in here, after the step
            assert len(self.state) == 6
            Counted.calls += 1

    model = net()
    for cls in (fastft.AdamW, Counted):
        optimizer = cls(model.parameters(), lr=1e-3)
        assert optimizer._zero_grad_profile_name == f"Optimizer.zero_grad#{cls.__name__}.zero_grad"
        give_grads(model.parameters(), 0)
        with torch.autograd.profiler.profile() as profile:
            optimizer.step()
            optimizer.zero_grad()
        names = {event.name for event in profile.function_events}
        assert {f"Optimizer.step#{cls.__name__}.step", f"Optimizer.zero_grad#{cls.__name__}.zero_grad"} <= names
    assert Counted.calls == 1
    assert fastft.AdamW.step.hooked  # type: ignore[attr-defined]


@pytest.mark.parametrize("foreach", [None, True])
@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(set_to_none: bool, foreach: bool | None) -> None:
    model = net()
    optimizer = fastft.AdamW(model.parameters(), foreach=foreach)
    train(optimizer, [0])
    grads = [p.grad for p in model.parameters()]
    optimizer.zero_grad(set_to_none=set_to_none)
    for p, grad in zip(model.parameters(), grads, strict=True):
        assert p.grad is (None if set_to_none else grad)
        assert set_to_none or not grad.any()


def test_a_step_leaves_gradients_alone() -> None:
    model = net()
    optimizer = fastft.AdamW(model.parameters(), maximize=True, **FINE_TUNING)
    give_grads(model.parameters(), 0)
    grads = [p.grad for p in model.parameters()]
    before = copy.deepcopy(grads)
    optimizer.step()
    assert_same(grads, before, "gradients")
    assert all(p.grad is grad for p, grad in zip(model.parameters(), grads, strict=True))


# -- the learning rate -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(), (1,)], ids=str)
def test_filling_a_tensor_lr_in_place_changes_the_next_step(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    lr = torch.full(shape, 0.5, dtype=dtype)
    model = net()
    ours = fastft.AdamW(model.parameters(), lr=lr, weight_decay=0.1)
    twins = Twins()
    for rate in (0.5, 0.125, 0.0, 0.25):  # exact in either dtype
        lr.fill_(rate)
        twins.theirs.param_groups[0]["lr"] = rate
        twins.give_grads()
        for p, q in zip(model.parameters(), twins.params(1), strict=True):
            p.grad = q.grad
        ours.step()
        twins.theirs.step()
        assert_near(list(model.parameters()), twins.params(1), "parameters")
    assert ours.param_groups[0]["lr"] is lr
    assert lr.shape == shape and lr.dtype == dtype


@pytest.mark.parametrize("lr", [torch.tensor([1e-3, 1e-3]), torch.ones(2, 2), torch.empty(0)], ids=["2", "4", "0"])
def test_a_tensor_lr_of_another_size_is_refused_as_in_torch(lr: Tensor) -> None:
    for cls in (torch.optim.AdamW, fastft.AdamW):
        with pytest.raises(ValueError, match=r"^Tensor lr must be 1-element$"):
            cls(net().parameters(), lr=lr)


def test_a_bad_lr_found_in_a_group_raises_before_anything_is_written() -> None:
    model = net()
    optimizer = fastft.AdamW([{"params": model[0].parameters()}, {"params": model[3].parameters()}])
    train(optimizer, [0])
    optimizer.param_groups[1]["lr"] = torch.tensor([0.1, 0.2])
    before = copy.deepcopy((list(model.parameters()), state_of(optimizer)))
    with pytest.raises((ValueError, RuntimeError)):
        train(optimizer, [1])
    assert_same((list(model.parameters()), state_of(optimizer)), before, "after the error")


SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "LambdaLR": lambda o: schedulers.LambdaLR(o, [lambda epoch: 0.9**epoch, lambda epoch: 1 / (1 + epoch)]),
    "MultiplicativeLR": lambda o: schedulers.MultiplicativeLR(o, lambda epoch: 0.9),
    "StepLR": lambda o: schedulers.StepLR(o, step_size=3, gamma=0.5),
    "MultiStepLR": lambda o: schedulers.MultiStepLR(o, milestones=[2, 5], gamma=0.3),
    "ConstantLR": lambda o: schedulers.ConstantLR(o, factor=0.25, total_iters=4),
    "LinearLR": lambda o: schedulers.LinearLR(o, start_factor=0.2, total_iters=6),
    "ExponentialLR": lambda o: schedulers.ExponentialLR(o, gamma=0.8),
    "CosineAnnealingLR": lambda o: schedulers.CosineAnnealingLR(o, T_max=5, eta_min=1e-4),
    "PolynomialLR": lambda o: schedulers.PolynomialLR(o, total_iters=6, power=2.0),
    "CyclicLR": lambda o: schedulers.CyclicLR(o, 1e-3, 2e-2, step_size_up=3, mode="triangular2"),  # and beta1
    "OneCycleLR": lambda o: schedulers.OneCycleLR(o, max_lr=2e-2, total_steps=14),  # and beta1
    "CosineAnnealingWarmRestarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, T_0=3, T_mult=2),
    "ReduceLROnPlateau": lambda o: schedulers.ReduceLROnPlateau(o, factor=0.5, patience=1),
    "SequentialLR": lambda o: schedulers.SequentialLR(
        o, [schedulers.LinearLR(o, 0.1, total_iters=3), schedulers.ExponentialLR(o, 0.7)], milestones=[4]
    ),
    "ChainedScheduler": lambda o: schedulers.ChainedScheduler(
        [schedulers.ConstantLR(o, 0.1, total_iters=3), schedulers.ExponentialLR(o, 0.7)]
    ),
    "SWALR": lambda o: swa_utils.SWALR(o, swa_lr=5e-4, anneal_epochs=5),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_of_torch(name: str) -> None:
    twins = Twins(groups=lambda m: [{"params": m[0].parameters(), "lr": 0.02}, {"params": m[3].parameters()}])
    pair = [SCHEDULERS[name](optimizer) for optimizer in twins.optimizers]
    seen = set()
    for step in range(12):
        twins.step()
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # "detected call of lr_scheduler.step() before optimizer.step()" and such
            for scheduler in pair:
                scheduler.step(*[1.0 + step] if name == "ReduceLROnPlateau" else [])
        for ours, theirs in zip(twins.ours.param_groups, twins.theirs.param_groups, strict=True):
            assert {key: ours[key] for key in ("lr", "betas")} == {key: theirs[key] for key in ("lr", "betas")}
            assert ours.keys() - theirs.keys() == {"anchor_decay", "anchor_mode"}
            seen.add((ours["lr"], ours["betas"]))
    assert len(seen) > 3  # it did schedule something


def test_a_scheduler_scales_the_anchors_pull_as_it_scales_weight_decay() -> None:
    twins = Twins(ours=FINE_TUNING)
    pair = [schedulers.CosineAnnealingLR(optimizer, T_max=6) for optimizer in twins.optimizers]
    for _ in range(8):
        twins.step()
        for scheduler in pair:
            scheduler.step()


def test_schedulers_wrap_step_without_keeping_the_optimizer_alive() -> None:
    optimizer = fastft.AdamW((model := net()).parameters())
    scheduler = schedulers.StepLR(optimizer, step_size=2)
    assert optimizer.param_groups[0]["initial_lr"] == 1e-3
    train(optimizer, range(2))
    assert optimizer._opt_called  # type: ignore[attr-defined]
    alive = weakref.ref(optimizer)
    del optimizer, scheduler
    gc.collect()
    assert alive() is None
    assert len(list(model.parameters())) == 6


def test_a_tensor_lr_is_scheduled_in_place() -> None:
    lr = torch.tensor(0.5, dtype=torch.float64)
    optimizer = fastft.AdamW((model := net()).parameters(), lr=lr)
    scheduler = schedulers.ExponentialLR(optimizer, gamma=0.5)
    for step in range(3):
        give_grads(model.parameters(), step)
        optimizer.step()
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] is lr
    assert lr.item() == 0.5**4


# -- hooks -----------------------------------------------------------------------------------------------


@pytest.fixture
def global_hooks() -> Any:
    """Registers hooks on all optimizers, and takes them away afterwards."""
    handles = []
    yield lambda register, hook: handles.append(register(hook))
    for handle in handles:
        handle.remove()


def hooked_run(cls: type[torch.optim.Optimizer], add_global: Callable[..., None]) -> list[Any]:
    """Everything that hooks of all kinds get to see, in the order in which it happens."""
    log: list[Any] = []
    model = net()
    optimizer = cls(model.parameters(), lr=1e-2)  # type: ignore[call-arg]

    def note(label: str) -> Callable[..., None]:
        def hook(hooked: torch.optim.Optimizer, *rest: Any) -> None:
            if hooked is optimizer:
                contents = [sorted(r.keys() - {"fastft"}, key=str) if isinstance(r, dict) else len(r) for r in rest]
                steps = [float(state["step"]) for state in state_of(optimizer) if state]
                log.append((label, contents, steps))

        return hook

    add_global(register_optimizer_step_post_hook, note("global step post"))
    add_global(register_optimizer_step_pre_hook, note("global step pre"))
    for position in ("first", "second"):
        optimizer.register_step_post_hook(note(f"step post {position}"))
        optimizer.register_step_pre_hook(note(f"step pre {position}"))
        for prepend in (False, True):
            where = f"{position}{' prepended' if prepend else ''}"
            optimizer.register_state_dict_pre_hook(note(f"state_dict pre {where}"), prepend=prepend)
            optimizer.register_state_dict_post_hook(note(f"state_dict post {where}"), prepend=prepend)
            optimizer.register_load_state_dict_pre_hook(note(f"load pre {where}"), prepend=prepend)
            optimizer.register_load_state_dict_post_hook(note(f"load post {where}"), prepend=prepend)
    removed = optimizer.register_step_pre_hook(note("never"))
    removed.remove()

    def closure() -> Tensor:
        log.append(("closure", torch.is_grad_enabled()))
        give_grads(model.parameters(), 0)
        return torch.tensor(7.0)

    log.append(optimizer.step(closure))
    saved = optimizer.state_dict()
    optimizer.step()
    optimizer.load_state_dict(copy.deepcopy(saved))
    log.append([float(state["step"]) for state in state_of(optimizer)])
    return log


def test_hooks_run_in_torchs_order_and_see_what_torchs_see(global_hooks: Callable[..., None]) -> None:
    ours = hooked_run(fastft.AdamW, global_hooks)
    theirs = hooked_run(torch.optim.AdamW, global_hooks)
    assert ours == theirs
    assert len(ours) == 2 * 6 + 1 + 1 + 4 * 4 + 1


@BOTH
def test_a_step_pre_hook_may_change_the_arguments(cls: type[torch.optim.Optimizer]) -> None:
    model = net()
    optimizer = cls(model.parameters())  # type: ignore[call-arg]
    optimizer.register_step_pre_hook(lambda opt, args, kwargs: ((args[0], lambda: 42.0), {}))
    assert optimizer.step(lambda: 1.0) == 42.0


@BOTH
def test_state_dict_hooks_may_replace_the_dict(cls: type[torch.optim.Optimizer]) -> None:
    """A post hook may return another dict; a load pre hook too, and may edit the (shallow) copy it was given."""
    model = net()
    optimizer = cls(model.parameters())  # type: ignore[call-arg]
    train(optimizer, range(2))

    def rename(_: Any, packed: dict[str, Any]) -> dict[str, Any]:
        return {**{key: value for key, value in packed.items() if key != "state"}, "renamed": packed["state"]}

    def rename_back(_: Any, packed: dict[str, Any]) -> dict[str, Any]:
        packed["state"] = packed.pop("renamed")
        return packed

    optimizer.register_state_dict_post_hook(rename)
    optimizer.register_load_state_dict_pre_hook(rename_back)
    saved = copy.deepcopy(optimizer.state_dict())
    assert "state" not in saved and len(saved["renamed"]) == 6
    train(optimizer, range(2, 4))
    optimizer.load_state_dict(saved)
    assert {float(state["step"]) for state in state_of(optimizer)} == {2.0}
    assert "renamed" in saved  # the hook got a copy


def test_our_part_of_a_state_dict_passes_through_the_users_hooks() -> None:
    """They see it when saving, and what they make of it is what gets loaded."""
    model = net()
    optimizer = fastft.AdamW(model.parameters(), **FINE_TUNING)
    optimizer.freeze(model[0].bias)
    seen: list[Any] = []
    optimizer.register_state_dict_post_hook(lambda _, packed: seen.append(packed["fastft"]["frozen"]), prepend=True)

    def freeze_another(_: Any, packed: dict[str, Any]) -> None:
        packed["fastft"] = {**packed["fastft"], "frozen": [0]}

    optimizer.register_load_state_dict_pre_hook(freeze_another)
    saved = optimizer.state_dict()
    assert seen == [[1]]
    optimizer.load_state_dict(saved)
    give_grads(model.parameters(), 0)
    before = copy.deepcopy(list(model.parameters()))
    optimizer.step()
    moved = [not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True)]
    assert moved == [False, True, True, True, True, True]


def test_state_dict_calls_leave_no_hooks_behind() -> None:
    optimizer = fastft.AdamW(net().parameters())
    for _ in range(3):
        optimizer.load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError, match="different number of parameter groups"):
        optimizer.load_state_dict({"state": {}, "param_groups": []})
    assert len(optimizer._optimizer_state_dict_post_hooks) == 0
    assert len(optimizer._optimizer_load_state_dict_pre_hooks) == 0


# -- closures and grad modes -----------------------------------------------------------------------------


@pytest.mark.parametrize("outside", [nullcontext, torch.no_grad, torch.inference_mode], ids=lambda f: f.__name__)
def test_a_closure_runs_with_gradients_enabled(outside: Callable[[], AbstractContextManager[Any]]) -> None:
    losses = []
    for cls in (fastft.AdamW, torch.optim.AdamW):
        model = net()
        x = torch.linspace(-1, 1, 10).reshape(2, 5)
        optimizer = cls(model.parameters(), lr=1e-2)

        def closure(model: nn.Module = model, optimizer: Any = optimizer, x: Tensor = x) -> Tensor:
            assert torch.is_grad_enabled()
            optimizer.zero_grad()
            loss = model(x).square().sum()
            if not torch.is_inference_mode_enabled():
                loss.backward()
            else:
                give_grads(model.parameters(), 0)
            return loss

        with outside():
            enabled = torch.is_grad_enabled()
            losses.append([optimizer.step(closure).item(), optimizer.step(closure=closure).item()])
            assert torch.is_grad_enabled() is enabled
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0][1] < losses[0][0] or outside is torch.inference_mode


def test_step_returns_none_without_a_closure() -> None:
    optimizer = fastft.AdamW((model := net()).parameters())
    give_grads(model.parameters(), 0)
    assert optimizer.step() is None
    assert optimizer.step(None) is None
    assert optimizer.step(closure=lambda: "any value") == "any value"


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode], ids=lambda f: f.__name__)
def test_steps_in_any_grad_mode(mode: Callable[[], AbstractContextManager[Any]]) -> None:
    twins = Twins()
    with mode():
        twins.step(3)
    assert all(p.is_leaf and p.requires_grad for p in twins.params(0))
    assert all(not value.requires_grad for state in state_of(twins.ours) for value in state.values())


def test_what_was_made_in_inference_mode_steps_outside_of_it() -> None:
    """torch's step fails there; ours has no reason to."""
    twins = Twins()
    with torch.inference_mode():
        twins.give_grads()
        twins.ours.step()
    twins.theirs.step()
    twins.step(2)


def test_backward_through_values_that_a_step_has_overwritten_raises() -> None:
    """Autograd notices by the version counters of tensors; silence here would mean wrong gradients."""
    for cls in (torch.optim.AdamW, fastft.AdamW):
        model = net()
        optimizer = cls(model.parameters())
        loss = model(torch.ones(2, 5)).square().sum()
        train(optimizer, [0])
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_a_step_counts_the_versions_of_all_that_it_writes() -> None:
    model = net()
    optimizer = fastft.AdamW(model.parameters(), amsgrad=True)
    train(optimizer, [0])
    frozen = model[1].weight
    optimizer.freeze(frozen)
    written = [p for p in model.parameters() if p is not frozen]
    before = [p._version for p in written]
    untouched = frozen._version
    train(optimizer, [1])
    assert all(p._version > version for p, version in zip(written, before, strict=True))
    assert frozen._version == untouched


# -- parameters come, go and change ----------------------------------------------------------------------


def test_parameters_without_gradients_stay_and_late_ones_start_at_one() -> None:
    twins = Twins()
    late = [4, 5]
    untouched = copy.deepcopy(twins.params(0))
    for _ in range(4):
        twins.give_grads()
        for which in (0, 1):
            for i in late:
                twins.params(which)[i].grad = None
        for optimizer in twins.optimizers:
            optimizer.step()
        twins.check()
    for i in late:
        assert torch.equal(twins.params(0)[i], untouched[i])
        assert twins.params(0)[i] not in twins.ours.state
    twins.step(3)
    assert [float(state["step"]) for state in state_of(twins.ours)] == [7.0] * 4 + [3.0] * 2


def test_groups_are_added_in_the_middle_of_a_run() -> None:
    twins = Twins(groups=lambda model: model[0].parameters())
    twins.step(3)
    for optimizer, model in zip(twins.optimizers, twins.models, strict=True):
        optimizer.add_param_group({"params": model[1].parameters(), "lr": 0.05})
        optimizer.add_param_group({"params": model[3].weight, "weight_decay": 0.0, "betas": (0.5, 0.9)})
    twins.step(3)
    assert [float(state["step"]) for state in state_of(twins.ours)] == [6.0] * 2 + [3.0] * 3


def test_groups_added_to_an_anchored_run_are_anchored_where_they_are_then() -> None:
    twins = Twins(groups=lambda model: model[0].parameters(), ours=FINE_TUNING)
    twins.step(3)
    for optimizer, model in zip(twins.optimizers, twins.models, strict=True):
        with torch.no_grad():
            for p in model[3].parameters():
                p.add_(0.25)
        if isinstance(optimizer, Composed):
            optimizer.anchors |= {p: p.detach().clone() for p in model[3].parameters()}
        optimizer.add_param_group(
            {"params": model[3].parameters(), "lr": 0.05, "anchor_decay": 7.0}
            | ({"anchor_mode": "decoupled"} if isinstance(optimizer, Composed) else {})
        )
    twins.step(4)


@pytest.mark.parametrize("how", ["at_once", "added"])
def test_named_groups_of_two_modules_may_share_names(how: str) -> None:
    """Backbone and head as two groups, each by its own ``named_parameters()``: "weight" is then in both."""
    twins = Twins(
        groups=lambda m: [
            {"params": m[i].named_parameters(), "lr": 0.01 * i} for i in ((1, 3) if how == "at_once" else (1,))
        ],
        ours=FINE_TUNING,
    )
    if how == "added":
        twins.ours.add_param_group({"params": twins.models[0][3].named_parameters(), "lr": 0.03})
        twins.theirs.anchors |= {p: p.detach().clone() for p in twins.models[1][3].parameters()}  # type: ignore[attr-defined]
        added = {"params": twins.models[1][3].named_parameters(), "lr": 0.03}
        twins.theirs.add_param_group({**added, "anchor_decay": 3.0, "anchor_mode": "decoupled"})
    assert [group["param_names"] for group in twins.ours.param_groups] == [["weight", "bias"]] * 2
    twins.step(4)


def test_a_group_that_cannot_be_added_is_not_added() -> None:
    model = net()
    optimizer = fastft.AdamW(model[0].parameters(), anchor="init", anchor_decay=1.0)
    before = repr(optimizer)
    for group, message in [
        ({"params": model[3].parameters(), "anchor_decay": -1.0}, r"anchor_decay: expected a finite number >= 0"),
        ({"params": model[3].parameters(), "anchor_mode": "hard"}, r"param_groups\[1\]: anchor_mode: expected one of"),
        ({"params": model[0].parameters()}, "some parameters appear in more than one parameter group"),
    ]:
        with pytest.raises(ValueError, match=message):
            optimizer.add_param_group(group)
        assert repr(optimizer) == before
    with pytest.raises(TypeError, match="param_group must be a dict"):
        optimizer.add_param_group([model[3].weight])  # type: ignore[arg-type]


def replace_parameter(model: nn.Module, optimizer: torch.optim.Optimizer, keep_state: bool) -> None:
    """As libraries do that flatten, shard or cast parameters behind the optimizer's back."""
    old = model[3].weight
    new = nn.Parameter(old.detach() * 0.5)
    model[3].weight = new
    params = optimizer.param_groups[0]["params"]
    params[[p is old for p in params].index(True)] = new
    state = optimizer.state.pop(old)
    if keep_state:
        optimizer.state[new] = state


def fresh_state_dicts(optimizer: torch.optim.Optimizer) -> None:
    optimizer.state = defaultdict(dict, {p: dict(state) for p, state in optimizer.state.items()})


def set_states(optimizer: torch.optim.Optimizer, key: str, value: Callable[[Tensor], Any]) -> None:
    for state in optimizer.state.values():
        state[key] = value(state.get(key, torch.zeros(())))


def move_to_second_group(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    moved = optimizer.param_groups[0]["params"].pop()
    group = {key: value for key, value in optimizer.param_groups[0].items() if key != "params"}
    optimizer.add_param_group({**group, "params": [moved], "lr": 0.1})


def reload_as(dtype: torch.dtype) -> Callable[[nn.Module, torch.optim.Optimizer], None]:
    def change(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        model.to(dtype)
        model.zero_grad()
        optimizer.load_state_dict(optimizer.state_dict())

    return change


def relaid(tensor: Tensor) -> Tensor:
    """The same values in another memory order."""
    return tensor.detach().t().contiguous().t()


def replace_at_once(optimizer: torch.optim.Optimizer, keys: tuple[str, ...], make: Callable[[Tensor], Tensor]) -> None:
    """Let go of a tensor before the next one is made: that one often gets the address of the object and of its data."""
    for state in optimizer.state.values():
        for key in keys:
            values = state[key].tolist()
            like = torch.empty_like(state[key], device="meta")
            state[key] = None
            state[key] = make(like).copy_(torch.tensor(values))


Change = Callable[[Any, torch.optim.Optimizer], Any]
CHANGES: dict[str, Change] = {
    "data_swapped": lambda m, o: setattr(m[0].weight, "data", m[0].weight.data.clone() + 1),
    "data_relaid": lambda m, o: setattr(m[0].weight, "data", relaid(m[0].weight)),
    "data_relaid_and_state": lambda m, o: (
        setattr(m[0].weight, "data", relaid(m[0].weight)),
        [o.state[m[0].weight].update({k: relaid(o.state[m[0].weight][k])}) for k in ("exp_avg", "exp_avg_sq")],
    ),
    "data_set": lambda m, o: m[0].weight.data.set_(torch.ones(17, 5)),
    "tensors_swapped": lambda m, o: torch.utils.swap_tensors(m[0].weight, nn.Parameter(m[0].weight.detach() + 1)),
    "module_cast": reload_as(torch.float64),
    "parameter_replaced": lambda m, o: replace_parameter(m, o, keep_state=True),
    "parameter_replaced_without_state": lambda m, o: replace_parameter(m, o, keep_state=False),
    "list_reversed": lambda m, o: o.param_groups[0]["params"].reverse(),
    "list_replaced": lambda m, o: o.param_groups[0].update(params=list(o.param_groups[0]["params"])),
    "list_became_a_tuple": lambda m, o: o.param_groups[0].update(params=tuple(o.param_groups[0]["params"])),
    "parameter_taken_out": lambda m, o: o.param_groups[0]["params"].pop(),
    "moved_to_another_group": move_to_second_group,
    "groups_replaced": lambda m, o: setattr(o, "param_groups", [dict(g) for g in o.param_groups]),
    "grad_off": lambda m, o: m[0].weight.requires_grad_(False),
    "state_dict_loaded": lambda m, o: o.load_state_dict(copy.deepcopy(o.state_dict())),
    "first_moments_replaced": lambda m, o: set_states(o, "exp_avg", lambda t: t * 0.5),
    "second_moments_scaled_in_place": lambda m, o: set_states(o, "exp_avg_sq", lambda t: t.mul_(4.0)),
    "moments_swapped_by_data": lambda m, o: [setattr(s["exp_avg"], "data", s["exp_avg"] * 2) for s in o.state.values()],
    "steps_replaced": lambda m, o: set_states(o, "step", lambda t: torch.tensor(10.0)),
    "steps_filled": lambda m, o: set_states(o, "step", lambda t: t.fill_(20.0)),
    "steps_in_float64": lambda m, o: set_states(o, "step", lambda t: t.double()),
    "steps_in_float64_in_the_place_of_the_old": lambda m, o: replace_at_once(
        o, ("step",), lambda like: torch.empty((), dtype=torch.float64)
    ),
    "moments_relaid_in_the_place_of_the_old": lambda m, o: replace_at_once(
        o, ("exp_avg", "exp_avg_sq"), lambda like: torch.empty(like.shape[::-1]).permute(*range(like.dim())[::-1])
    ),
    "a_key_of_the_users_own": lambda m, o: set_states(o, "mine", lambda t: "anything"),
    "a_state_removed": lambda m, o: o.state.pop(m[0].weight),
    "all_state_cleared": lambda m, o: o.state.clear(),
    "all_state_replaced": lambda m, o: fresh_state_dicts(o),
    "options_changed": lambda m, o: o.param_groups[0].update(
        lr=0.2, betas=(0.5, 0.7), eps=1e-3, weight_decay=0.9, maximize=True
    ),
    "amsgrad_on": lambda m, o: (
        set_states(o, "max_exp_avg_sq", lambda t: torch.zeros_like(t)),
        [s.update(max_exp_avg_sq=s["exp_avg_sq"] * 1.5) for s in o.state.values()],
        o.param_groups[0].update(amsgrad=True),
    ),
    "other_implementation": lambda m, o: o.param_groups[0].update(foreach=True),
}


@pytest.mark.parametrize("name", CHANGES)
def test_changes_between_steps_take_effect_as_in_torch(name: str) -> None:
    """Values cached from one step to the next are dropped when what they were computed from changes."""
    twins = Twins()
    twins.step(2)
    twins.equalize()
    for model, optimizer in zip(twins.models, twins.optimizers, strict=True):
        CHANGES[name](model, optimizer)
    twins.step(3)


def test_amsgrad_may_be_switched_off_and_on_again() -> None:
    twins = Twins(amsgrad=True)
    twins.step(2)
    twins.ours.load_state_dict(twins.ours.state_dict())  # no step remembered where the maxima were
    for amsgrad in (False, True):
        for optimizer in twins.optimizers:
            optimizer.param_groups[0]["amsgrad"] = amsgrad
        twins.step(2)


@pytest.mark.parametrize("start", [0.0, 3.0])
def test_the_anchors_options_may_change_between_steps(start: float) -> None:
    twins = Twins(ours={**FINE_TUNING, "anchor_decay": start})
    for decay, mode in [(start, "decoupled"), (5.0, "decoupled"), (2.0, "l2"), (0.0, "l2"), (4.0, "decoupled")]:
        for optimizer in twins.optimizers:
            optimizer.param_groups[0].update(anchor_decay=decay, anchor_mode=mode)
        twins.step(2)


# What another parameter in the place of an anchored one is pulled to is no question for torch, and torch swaps no
# tensor that something refers to weakly, as an anchor does.
WITHOUT_ANCHOR = {"parameter_replaced", "parameter_replaced_without_state", "parameter_taken_out", "tensors_swapped"}


@pytest.mark.parametrize("name", [name for name in CHANGES if name not in WITHOUT_ANCHOR])
def test_changes_between_steps_take_effect_with_an_anchor_a_clip_and_masks(name: str) -> None:
    twins = Twins(ours=FINE_TUNING)
    rows, elements = torch.arange(17) % 3 > 0, torch.rand(3, 17, generator=torch.Generator().manual_seed(0)) > 0.4
    for model, optimizer in zip(twins.models, twins.optimizers, strict=True):
        if isinstance(optimizer, Composed):
            optimizer.masks |= {model[0].weight: rows, model[3].weight: elements}
            optimizer.frozen.add(model[1].bias)
        else:
            optimizer.set_update_mask(model[0].weight, rows)
            optimizer.set_update_mask(model[3].weight, elements)
            optimizer.freeze(model[1].bias)
    twins.step(2)
    twins.equalize()
    for model, optimizer in zip(twins.models, twins.optimizers, strict=True):
        CHANGES[name](model, optimizer)
    twins.step(3)


@BOTH
def test_a_module_is_converted_by_swapping_its_tensors(cls: type[torch.optim.Optimizer]) -> None:
    """torch's coming way to convert modules works only while nothing else holds on to the tensors themselves."""
    model = net()
    optimizer = cls(model.parameters())  # type: ignore[call-arg]
    train(optimizer, range(2))
    optimizer.zero_grad()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.double()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.param_groups[0]["params"][0] is model[0].weight
    before = copy.deepcopy(list(model.parameters()))
    train(optimizer, [2])
    for p, b in zip(model.parameters(), before, strict=True):
        assert p.dtype == torch.float64 and (p != b).all()


def test_a_casted_module_goes_on_with_moments_of_its_old_dtype() -> None:
    """``module.to(torch.bfloat16)`` changes ``.data`` in place; float32 moments are as good as before."""
    model = net()
    optimizer = fastft.AdamW(model.parameters(), lr=1e-2)
    train(optimizer, range(2))
    moments = [state["exp_avg"] for state in state_of(optimizer)]
    model.to(torch.bfloat16)
    train(optimizer, range(2, 4))
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    assert all(
        state["exp_avg"] is m and m.dtype == torch.float32
        for state, m in zip(state_of(optimizer), moments, strict=True)
    )
    assert {float(state["step"]) for state in state_of(optimizer)} == {4.0}


@pytest.mark.parametrize("change", ["freeze", "mask"])
def test_a_restricted_parameter_may_be_taken_out_of_the_groups(change: str) -> None:
    """With nothing in its place; for what comes in its place see test_replaced.py."""
    model = net()
    optimizer = fastft.AdamW(model.parameters(), **FINE_TUNING)
    if change == "freeze":
        optimizer.freeze(model[3].weight)
    else:
        optimizer.set_update_mask(model[3].weight, torch.tensor([True, False, True]))
    train(optimizer, range(2))
    before = model[3].weight.detach().clone()
    optimizer.state.pop(model[3].weight, None)
    params = optimizer.param_groups[0]["params"]
    del params[[p is model[3].weight for p in params].index(True)]
    saved = optimizer.state_dict()
    assert saved["fastft"]["frozen"] == [] and saved["fastft"]["masks"] == []
    assert len(saved["state"]) == 5 and not any("update_mask" in state for state in saved["state"].values())
    others = copy.deepcopy(params)
    train(optimizer, [2])
    assert torch.equal(model[3].weight, before)
    assert [bool((p != q).any()) for p, q in zip(params, others, strict=True)] == [True] * 5


def test_the_same_memory_may_be_read_in_another_order() -> None:
    """``.data`` set to a view of itself: the address stays, what lies there is another element."""
    start = torch.arange(25.0).reshape(5, 5)
    params = [nn.Parameter(start.clone()) for _ in range(2)]
    optimizers = [fastft.AdamW([params[0]], lr=0.1), torch.optim.AdamW([params[1]], lr=0.1, foreach=False)]
    for step in range(5):
        if step == 3:
            for p in params:
                p.data = p.data.t()
        for p, optimizer in zip(params, optimizers, strict=True):
            p.grad = torch.linspace(-1.0, 1.0 + step, 25).reshape(5, 5)
            optimizer.step()
        assert_near(params[0].detach(), params[1].detach(), "parameter")
        assert_near(state_of(optimizers[0]), state_of(optimizers[1]), "state")


@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq", "max_exp_avg_sq", "step"])
def test_state_in_a_users_buffer_may_be_viewed_otherwise(key: str) -> None:
    """Another tensor at the address of the last one, over the same memory, in another order or dtype."""
    params = [nn.Parameter(torch.arange(12.0).reshape(4, 3)) for _ in range(2)]
    optimizers = [
        cls([p], lr=0.1, amsgrad=True) for cls, p in zip((fastft.AdamW, torch.optim.AdamW), params, strict=True)
    ]
    buffers = [torch.zeros(12), torch.zeros(12)]

    def put(make: Callable[[Tensor], Tensor]) -> None:
        for p, buffer, optimizer in zip(params, buffers, optimizers, strict=True):
            values = optimizer.state[p].get(key).clone()
            optimizer.state[p][key] = None
            optimizer.state[p][key] = make(buffer)
            optimizer.state[p][key].copy_(values)

    def step(count: int) -> None:
        for i in range(count):
            for p, optimizer in zip(params, optimizers, strict=True):
                p.grad = torch.linspace(-1.0, 1.0 + i, 12).reshape(4, 3)
                optimizer.step()
            assert_near(params[0].detach(), params[1].detach(), "parameter")
            assert_near(state_of(optimizers[0]), state_of(optimizers[1]), "state")

    # One call each, so that no other object takes the address in between.
    step(1)
    put(lambda buffer: buffer[0] if key == "step" else buffer.as_strided((4, 3), (3, 1)))
    step(2)
    doubles = {id(buffer): buffer.view(torch.float64) for buffer in buffers}
    put(lambda buffer: doubles[id(buffer)][0] if key == "step" else buffer.as_strided((4, 3), (1, 4)))
    step(2)


GRADS: dict[str, Callable[[Tensor], Tensor]] = {
    "another_tensor": lambda g: g.clone(),
    "another_memory_order": lambda g: g.t().contiguous().t() if g.dim() == 2 else g,
    "strided": lambda g: torch.stack([g, -g], dim=-1)[..., 0],
    "expanded": lambda g: g.flatten()[0].expand(g.shape),
    "view_of_a_buffer": lambda g: torch.cat([torch.ones(3), g.flatten()])[3:].view_as(g),
    "requires_grad": lambda g: g.clone().requires_grad_(),
    "lazily_negated": lambda g: torch.complex(torch.zeros_like(g), g).conj().imag,
    "subclass": lambda g: nn.Parameter(g),
}


@pytest.mark.parametrize("name", GRADS)
def test_gradients_of_any_make(name: str) -> None:
    twins = Twins()
    for _ in range(4):
        twins.give_grads()
        for which in (0, 1):
            for p in twins.params(which):
                p.grad = GRADS[name](p.grad)
        for optimizer in twins.optimizers:
            optimizer.step()
        twins.check()


def test_an_error_in_a_step_leaves_the_optimizer_usable() -> None:
    twins = Twins(ours=FINE_TUNING)
    twins.step(2)
    before = copy.deepcopy((twins.params(0), state_of(twins.ours)))
    twins.give_grads()
    weight = twins.models[0][3].weight
    good = weight.grad
    weight.grad = good.to_sparse()
    with pytest.raises(ValueError, match=r"param_groups\[0\]\['params'\]\[4\]: has a sparse gradient.*max_grad_norm"):
        twins.ours.step()
    assert_same((twins.params(0), state_of(twins.ours)), before, "after the error")
    weight.grad = good
    for optimizer in twins.optimizers:
        optimizer.step()
    twins.check()
    twins.step()


@BOTH
def test_a_sparse_gradient_is_refused_in_torchs_words(cls: type[torch.optim.Optimizer]) -> None:
    model = net()
    optimizer = cls(model.parameters())  # type: ignore[call-arg]
    give_grads(model.parameters(), 0)
    model[0].weight.grad = model[0].weight.grad.to_sparse()
    with pytest.raises(
        RuntimeError, match="Adam does not support sparse gradients, please consider SparseAdam instead"
    ):
        optimizer.step()


# -- modules of all kinds --------------------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 6)
        self.inner = nn.Linear(6, 6)
        self.head = nn.Linear(6, 9, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.inner(self.embedding(x))))


def parametrized() -> nn.Module:
    return nn.utils.parametrizations.weight_norm(nn.Linear(6, 4))


def seeded(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        torch.manual_seed(11)
        return make()

    return build


@pytest.mark.parametrize("ours", [None, FINE_TUNING], ids=["plain", "fine_tuning"])
@pytest.mark.parametrize(
    ("make", "example"),
    [(Tied, torch.tensor([[1, 4, 8], [0, 2, 2]])), (parametrized, torch.linspace(-1, 1, 12).reshape(2, 6))],
    ids=["tied", "parametrized"],
)
def test_tied_and_parametrized_modules(
    make: Callable[[], nn.Module], example: Tensor, ours: dict[str, Any] | None
) -> None:
    twins = Twins(seeded(make), ours=ours, eps=1e-4)
    for _ in range(6):
        for model, optimizer in zip(twins.models, twins.optimizers, strict=True):
            optimizer.zero_grad()
            model(example).square().sum().backward()
        for p, q in zip(twins.params(0), twins.params(1), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-5)
            p.grad.copy_(q.grad)
        for optimizer in twins.optimizers:
            optimizer.step()
        twins.check()


def test_groups_of_different_options_and_dtypes() -> None:
    def groups(model: Any) -> list[dict[str, Any]]:
        model[3].to(torch.float64)
        return [
            {"params": model[0].parameters(), "lr": 0.05, "betas": (0.5, 0.6), "amsgrad": True},
            {"params": model[1].weight, "maximize": True, "weight_decay": 0.0},
            {"params": [model[3].weight, model[1].bias], "eps": 1e-3, "weight_decay": 0.5},
            {"params": model[3].bias, "lr": torch.tensor(0.25, dtype=torch.float64)},
        ]

    twins = Twins(groups=groups)
    twins.step(8)


def test_a_default_dtype_of_float64_counts_steps_in_float64() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        twins = Twins()
        twins.step(2)  # compares the dtype of the counts as well
    finally:
        torch.set_default_dtype(torch.float32)
    assert {state["step"].dtype for state in state_of(twins.ours)} == {torch.float64}
    twins.step(2)


@BOTH
def test_a_step_on_fake_tensors(cls: type[torch.optim.Optimizer]) -> None:
    """How tools estimate the memory of a run without running it."""
    with FakeTensorMode():
        model = nn.Linear(3, 4)
        optimizer = cls(model.parameters())  # type: ignore[call-arg]
        for _ in range(2):
            model(torch.ones(2, 3)).sum().backward()
            optimizer.step()
        assert isinstance(optimizer.state[model.weight]["exp_avg"], FakeTensor)


@pytest.mark.parametrize("average", ["swa", "ema"])
def test_averaged_models(average: str) -> None:
    function = swa_utils.get_ema_multi_avg_fn(0.8) if average == "ema" else swa_utils.get_swa_multi_avg_fn()
    twins = Twins()
    averages = [swa_utils.AveragedModel(model, multi_avg_fn=function) for model in twins.models]
    for _ in range(5):
        twins.step()
        for averaged, model in zip(averages, twins.models, strict=True):
            averaged.update_parameters(model)
    assert_near(*[list(averaged.module.parameters()) for averaged in averages], "averages")
    assert not torch.equal(averages[0].module[0].weight, twins.models[0][0].weight)


def test_a_learning_rate_of_zero_with_zero_gradients_moves_nothing() -> None:
    """How torch.distributed.checkpoint makes an optimizer create its state."""
    model = net()
    optimizer = fastft.AdamW(model.parameters(), weight_decay=0.5, **FINE_TUNING)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)  # away from the anchor
    before = copy.deepcopy(list(model.parameters()))
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step(closure=None)
    assert_same(list(model.parameters()), before, "parameters")
    assert len(optimizer.state) == 6


# -- copies ----------------------------------------------------------------------------------------------


def through_pickle(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


def through_torch_save(value: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle, through_torch_save], ids=lambda f: f.__name__)
def test_a_copied_pair_of_model_and_optimizer_goes_on_alone(copied: Callable[[Any], Any]) -> None:
    model = net()
    optimizer = fastft.AdamW(model.named_parameters(), lr=1e-2, skip_nonfinite=True, **FINE_TUNING)
    optimizer.set_update_mask(model[0].weight, torch.arange(17) % 2 == 0)
    optimizer.freeze(model[1].weight)
    train(optimizer, range(3))
    other_model, other = copied((model, optimizer))
    assert type(other) is fastft.AdamW
    assert other.param_groups[0]["params"][0] is other_model[0].weight
    assert other._step_supports_amp_scaling
    assert_same(other.state_dict(), optimizer.state_dict(), "state dict")
    assert other.grad_norm == optimizer.grad_norm and other.grad_norm is not optimizer.grad_norm
    before = copy.deepcopy(list(model.parameters()))
    train(other, range(3, 6))
    assert_same(list(model.parameters()), before, "the original")
    train(optimizer, range(3, 6))
    assert_same(list(other_model.parameters()), list(model.parameters()), "the copy")
    assert_same(other.state_dict(), optimizer.state_dict(), "state dict")
    # Masks and the frozen set are its own as well.
    other.unfreeze(other_model[1].weight)
    other.set_update_mask(other_model[0].weight, None)
    assert optimizer.update_mask(model[0].weight) is not None
    assert optimizer.state_dict()["fastft"]["frozen"] == [2]


@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle], ids=lambda f: f.__name__)
@BOTH
def test_copies_drop_hooks_as_torchs_do(cls: type[torch.optim.Optimizer], copied: Callable[[Any], Any]) -> None:
    optimizer = cls(net().parameters())  # type: ignore[call-arg]
    optimizer.register_step_pre_hook(no_hook)
    other = copied(optimizer)
    assert len(other._optimizer_step_pre_hooks) == 0
    train(other, [0])
    assert len(other.state) == 6 and len(optimizer.state) == 0


def no_hook(*_: Any) -> None:
    raise AssertionError("this hook belongs to the original")


# -- memory ----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("ours", [{}, {**FINE_TUNING, "skip_nonfinite": True}], ids=["plain", "fine_tuning"])
def test_steps_do_not_accumulate_memory(ours: dict[str, Any]) -> None:
    model = net()
    optimizer = fastft.AdamW(model.parameters(), **ours)
    give_grads(model.parameters(), 0)
    for _ in range(20):
        optimizer.step()
    gc.collect()
    objects = len(gc.get_objects())
    grown = []
    tracemalloc.start()
    try:
        for _ in range(5):
            before = tracemalloc.get_traced_memory()[0]
            for _ in range(200):
                optimizer.step()
            gc.collect()
            grown.append(tracemalloc.get_traced_memory()[0] - before)
    finally:
        tracemalloc.stop()
    # Profiling records come and go; one object forgotten at each step would be 3200 bytes or more, every time.
    assert min(grown) < 1600, f"{grown} bytes in 200 steps each"
    assert len(gc.get_objects()) - objects < 200


def test_the_optimizer_and_what_it_held_die_with_the_last_reference() -> None:
    """Without the garbage collector: there is no cycle."""
    model = net()
    optimizer = fastft.AdamW(model.named_parameters(), **FINE_TUNING)
    optimizer.set_update_mask(model[0].weight, torch.arange(17) % 2 == 0)
    train(optimizer, range(2))
    held = {"optimizer": weakref.ref(optimizer), "moment": weakref.ref(optimizer.state[model[0].weight]["exp_avg"])}
    parameter, grad = weakref.ref(model[0].weight), weakref.ref(model[0].weight.grad)
    gc.collect()
    gc.disable()
    try:
        optimizer.zero_grad()
        assert grad() is None, "a gradient outlived zero_grad"
        del optimizer
        assert [name for name, ref in held.items() if ref() is not None] == []
        del model
        assert parameter() is None
    finally:
        gc.enable()


def test_what_was_replaced_is_let_go_at_the_next_step() -> None:
    model = net()
    optimizer = fastft.AdamW(model.named_parameters(), amsgrad=True, **FINE_TUNING)
    optimizer.set_update_mask(model[0].weight, torch.arange(17) % 2 == 0)
    train(optimizer, range(2))
    old = [model[0].weight, *optimizer.state[model[0].weight].values(), model[0].weight.grad]
    held = [weakref.ref(tensor) for tensor in old]
    new = nn.Parameter(model[0].weight.detach().clone())
    optimizer.param_groups[0]["params"][0] = new
    optimizer.state[new] = {key: value.clone() for key, value in optimizer.state.pop(model[0].weight).items()}
    model[0].weight = new
    del old
    train(optimizer, [2])
    assert optimizer.update_mask(new).sum() == 9
    gc.collect()
    assert [ref() is None for ref in held] == [True] * len(held)


@BOTH
def test_parameters_taken_out_of_the_groups_are_let_go(cls: type[torch.optim.Optimizer]) -> None:
    model = net()
    optimizer = cls(model.parameters())  # type: ignore[call-arg]
    train(optimizer, range(2))
    parameter = weakref.ref(model[0].weight)
    optimizer.param_groups.clear()
    optimizer.state.clear()
    del model
    gc.collect()
    assert parameter() is None


@BOTH
def test_state_that_the_user_takes_away_is_let_go(cls: type[torch.optim.Optimizer]) -> None:
    """Programs move the moments to the host between phases of training, to have the GPU's memory for themselves."""
    model = net()
    optimizer = cls(model.parameters())  # type: ignore[call-arg]
    train(optimizer, range(2))
    moment = weakref.ref(optimizer.state[model[0].weight]["exp_avg"])
    for state in optimizer.state.values():
        state["exp_avg"] = state["exp_avg"].clone()
    assert moment() is None


@BOTH
def test_an_optimizer_that_its_parameter_refers_to_is_collected(cls: type[torch.optim.Optimizer]) -> None:
    """As with optimizers that step in the backward pass and are kept at their parameters."""
    model = net()
    optimizer = cls(model.parameters())  # type: ignore[call-arg]
    train(optimizer, range(2))
    model[0].weight.optimizer = optimizer
    alive = weakref.ref(optimizer)
    del model, optimizer
    gc.collect()
    assert alive() is None


# -- threads and compilers -------------------------------------------------------------------------------


def test_optimizers_step_in_several_threads_at_once() -> None:
    """Kernels run without the interpreter's lock: each thread must get the very bits of a lone run."""

    def run(results: list[Any], index: int, ready: threading.Barrier | None) -> None:
        model = nn.Sequential(net(seed=index), nn.Linear(3, 20_000))
        with torch.no_grad():
            for p in model[1].parameters():
                p.copy_(torch.linspace(-1, 1, p.numel()).view_as(p))
        optimizer = fastft.AdamW(model.parameters(), lr=1e-2, **FINE_TUNING)
        params = list(model.parameters())
        for step in range(6):
            give_grads(params, step + 10 * index)
            if ready is not None:
                ready.wait(timeout=120)
            optimizer.step()
        results[index] = (params, state_of(optimizer), optimizer.grad_norm)

    count = 4
    together: list[Any] = [None] * count
    alone: list[Any] = [None] * count
    barrier = threading.Barrier(count)
    threads = [threading.Thread(target=run, args=(together, i, barrier)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(count):
        run(alone, i, None)
    assert_same(together, alone, "threads")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("ours", [None, FINE_TUNING], ids=["plain", "fine_tuning"])
def test_a_compiled_step(backend: str, ours: dict[str, Any] | None) -> None:
    torch._dynamo.reset()
    twins = Twins(ours=ours)
    step = torch.compile(lambda: twins.ours.step(), backend=backend)
    for _ in range(4):
        twins.give_grads()
        step()
        twins.theirs.step()
        twins.check()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_compiled_training_step() -> None:
    torch._dynamo.reset()
    x = torch.linspace(-1, 1, 10).reshape(2, 5)
    losses = []
    for compiled in (True, False):
        model = net()
        optimizer = fastft.AdamW(model.parameters(), lr=1e-2, **FINE_TUNING)

        def train_step(model: nn.Module = model, optimizer: fastft.AdamW = optimizer) -> Tensor:
            optimizer.zero_grad()
            loss = model(x).square().sum()
            loss.backward()
            optimizer.step()
            return loss

        function = torch.compile(train_step, backend="aot_eager") if compiled else train_step
        losses.append([function().item() for _ in range(5)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0][-1] < losses[0][0]
