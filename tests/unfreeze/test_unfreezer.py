"""The unfreezer in a training loop: what moves, what does not, and what it says about that."""

from __future__ import annotations

import copy
import gc
import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from unfreeze_cases import (
    WIDTH,
    ConvNet,
    Listed,
    Stack,
    TiedLM,
    assert_equal,
    backward,
    batch,
    bits,
    drawn,
    params,
    state_tensors,
)

import fastft
from fastft.optim import layerwise_lr
from fastft.unfreeze import (
    LISA,
    Always,
    BlockCoordinate,
    Event,
    GradualUnfreeze,
    OnPlateau,
    Policy,
    Progress,
    Unfreezer,
    layer_groups,
)

MODES = pytest.mark.parametrize("mode", ["requires_grad", "freeze"])
NAMES = ("embeddings", "blocks.0", "blocks.1", "blocks.2", "final_norm", "head")


def adamw(model: nn.Module, **options: Any) -> fastft.AdamW:
    """Everything at work that could move a parameter without a gradient."""
    return fastft.AdamW(
        layerwise_lr(layer_groups(model), 1e-2, decay=1 / 1.2),
        **{"weight_decay": 0.1, "anchor": away(model), "anchor_decay": 3.0, **options},
    )


def away(model: nn.Module) -> fastft.Anchor:
    """An anchor at some distance, so that it pulls from the first step on."""
    return fastft.Anchor.snapshot([(name, p.detach() + 0.5) for name, p in model.named_parameters()])


def phases(*opened: tuple[int | str, ...], every: int = 2) -> Policy:
    return Listed(tuple((i * every, names) for i, names in enumerate(opened)))


def steps(
    model: nn.Module,
    optimizer: Optimizer,
    unfreezer: Unfreezer,
    count: int,
    start: int = 0,
    before_step: Callable[[], Any] = lambda: None,
    after_step: Callable[[], Any] = lambda: None,
) -> None:
    for step in range(start, start + count):
        backward(model, step)
        before_step()
        optimizer.step()
        after_step()
        unfreezer.step()
        optimizer.zero_grad()


# -- closed is closed ----------------------------------------------------------------------------------------

OPTIMIZERS: dict[str, Callable[[nn.Module], Optimizer]] = {
    "fastft": adamw,
    "fastft-l2": lambda model: adamw(model, anchor_mode="l2", max_grad_norm=0.5, amsgrad=True),
    "adamw": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1),
    "fused": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1, fused=True),
    "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9, weight_decay=0.1, nesterov=True),
    "rmsprop": lambda model: torch.optim.RMSprop(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=0.1),
    "adam-l2": lambda model: torch.optim.Adam(model.parameters(), lr=1e-2, weight_decay=0.1, foreach=True),
}
GRADS: dict[str, Callable[[Tensor], Tensor | None]] = {
    "none": lambda p: None,
    "zero": torch.zeros_like,
    "stale": lambda p: torch.full_like(p, 7.0),
    "nan": lambda p: torch.full_like(p, float("nan")),
}


@pytest.mark.parametrize(
    ("optimizer", "mode"),
    [(name, "requires_grad") for name in OPTIMIZERS] + [(name, "freeze") for name in OPTIMIZERS if "fastft" in name],
)
@pytest.mark.parametrize("grads", GRADS)
@pytest.mark.parametrize("state_policy", ["keep", "reset"])
def test_a_closed_group_never_moves(optimizer: str, mode: Any, grads: str, state_policy: Any) -> None:
    """Groups open and close, so they have momentum and moments; then their gradients are anything at all."""
    model = Stack()
    opt = OPTIMIZERS[optimizer](model)
    policy = phases(
        ("head", 2), ("head",), (0, 1, 2, 3, 4, 5), (3,), ("embeddings", "final_norm"), ("blocks.1", "head"), (0,)
    )
    unfreezer = Unfreezer(model, opt, policy, mode=mode, state_policy=state_policy)
    groups = {group.name: group for group in unfreezer.groups}
    before: dict[str, dict[str, Tensor]] = {}

    def look() -> dict[str, dict[str, Tensor]]:
        """Each group's parameters and all that the optimizer keeps for them."""
        seen: dict[str, dict[str, Tensor]] = {name: {} for name in groups}
        for group in groups.values():
            for name, p in zip(group.param_names, group.parameters, strict=True):
                kept = {key: value for key, value in opt.state.get(p, {}).items() if isinstance(value, Tensor)}
                seen[group.name].update(bits({f"{name}.{key}": value for key, value in {"": p, **kept}.items()}))
        return seen

    def spoil() -> None:
        for name in NAMES:
            if name not in unfreezer.open_groups:
                for p in groups[name].parameters:
                    p.grad = GRADS[grads](p)
        before.update(look())

    def check() -> None:
        for name, after in look().items():
            if name not in unfreezer.open_groups:
                assert_equal(after, before[name])
            else:
                assert any(not torch.equal(t, before[name].get(key, t + 1)) for key, t in after.items())

    steps(model, opt, unfreezer, 14, before_step=spoil, after_step=check)
    assert unfreezer.open_groups == ("embeddings",)


@MODES
def test_what_was_frozen_before_stays_frozen_for_good(mode: Any) -> None:
    model = Stack()
    model.head.bias.requires_grad_(False)
    model.blocks[1].requires_grad_(False)
    optimizer = adamw(model)
    before = bits(params(model))
    unfreezer = Unfreezer(model, optimizer, GradualUnfreeze(1), mode=mode)

    def spoil() -> None:
        model.head.bias.grad = torch.ones(3)
        model.blocks[1].fc.weight.grad = torch.ones(WIDTH, WIDTH)

    steps(model, optimizer, unfreezer, 8, before_step=spoil)
    after = params(model)
    kept = {name for name in before if torch.equal(before[name], after[name])}
    frozen = {"head.bias", *(name for name in before if name.startswith("blocks.1."))}
    assert kept == frozen
    assert not any(after[name].requires_grad for name in frozen)
    note = "frozen before, and for good: blocks.1.norm.weight, blocks.1.norm.bias, blocks.1.fc.weight, blocks.1.fc.bias"
    assert f"{note}, head.bias" in unfreezer.report().notes
    unfreezer.undo()
    assert not any(after[name].requires_grad for name in frozen)


@MODES
def test_both_modes_train_to_the_same_bits_as_with_freeze_by_hand(mode: Any) -> None:
    by_hand = Stack()
    optimizer = adamw(by_hand)
    for step in range(6):
        opened = list(by_hand.children())[3:] if step < 3 else [*list(by_hand.children())[2:], by_hand.blocks[2]]
        moving = {p for module in opened for p in module.parameters()}
        for p in by_hand.parameters():
            p.requires_grad_(p in moving)
        backward(by_hand, step)
        optimizer.step()
        optimizer.zero_grad()

    model = Stack()
    opt = adamw(model)
    unfreezer = Unfreezer(model, opt, phases(("head",), ("blocks.2", "final_norm", "head"), every=3), mode=mode)
    steps(model, opt, unfreezer, 6)
    assert_equal(params(model), params(by_hand))
    assert_equal(state_tensors(opt), state_tensors(optimizer))


# -- transitions ---------------------------------------------------------------------------------------------


@MODES
def test_flags_and_gradients_follow(mode: Any) -> None:
    model = Stack()
    optimizer = adamw(model)
    unfreezer = Unfreezer(model, optimizer, phases((0, 5), (1, 5), every=1), mode=mode)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    assert all(flags.values()) if mode == "freeze" else [n for n in flags if flags[n]] == [
        "embed.weight", "embed.bias", "head.weight", "head.bias",
    ]  # fmt: skip
    backward(model, 0)
    assert model.embed.weight.grad is not None
    optimizer.step()
    assert unfreezer.step() is True
    assert model.embed.weight.grad is None  # closed: nothing stale is left
    assert model.head.weight.grad is not None  # as it was
    assert model.blocks[0].fc.weight.requires_grad
    assert unfreezer.step() is False
    assert unfreezer.open_groups == ("blocks.0", "head")
    unfreezer.undo()
    assert all(p.requires_grad for p in model.parameters())
    backward(model, 1)
    before = bits(params(model))
    optimizer.step()
    assert all(not torch.equal(before[name], p) for name, p in model.named_parameters())


def test_optimizer_groups_and_schedulers_are_left_alone() -> None:
    model = Stack()
    optimizer = adamw(model)
    groups = [[id(p) for p in group["params"]] for group in optimizer.param_groups]
    scheduler = LambdaLR(optimizer, lambda step: 0.5**step)
    unfreezer = Unfreezer(model, optimizer, GradualUnfreeze(1), rewarm_steps=3)
    initial = [group["initial_lr"] for group in optimizer.param_groups]
    for step in range(5):
        backward(model, step)
        optimizer.step()
        scheduler.step()
        unfreezer.step()
        assert [group["lr"] for group in optimizer.param_groups] == [lr * 0.5 ** (step + 1) for lr in initial]
    assert [[id(p) for p in group["params"]] for group in optimizer.param_groups] == groups


def test_anyones_function_is_a_policy() -> None:
    model = Stack()
    seen = []

    def policy(progress: Progress) -> list[str]:
        seen.append(progress)
        return ["head"] if not progress.events or progress.events[-1].metrics["acc"] < 0.5 else ["final_norm", "head"]

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    unfreezer = Unfreezer(model, optimizer, policy)
    unfreezer.step(epoch=0.5, acc=torch.tensor(0.25), f1=1)
    assert unfreezer.open_groups == ("head",)
    unfreezer.step()
    unfreezer.step(acc=0.75)
    assert unfreezer.open_groups == ("final_norm", "head")
    assert [p.step for p in seen] == [0, 1, 2, 3]
    assert seen[-1].epoch == 0.5
    assert seen[-1].events == (Event(1, 0.5, {"acc": 0.25, "f1": 1.0}), Event(3, 0.5, {"acc": 0.75}))
    assert [(group.name, group.kind) for group in seen[0].groups] == [(g.name, g.kind) for g in unfreezer.groups]


def test_a_policy_that_errs_changes_nothing() -> None:
    model = Stack()
    unfreezer = Unfreezer(model, torch.optim.SGD(model.parameters()), phases(("head",), ("haed",), every=1))
    with pytest.raises(ValueError, match="got 'haed' at step 1; closest: head"):
        unfreezer.step()
    assert unfreezer.open_groups == ("head",)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["head.weight", "head.bias"]


# -- the optimizer's state -----------------------------------------------------------------------------------


@MODES
@pytest.mark.parametrize("state_policy", ["keep", "reset", "offload"])
def test_state_of_closed_groups(mode: Any, state_policy: Any) -> None:
    """Open for 3 steps, closed for 3, open again: kept state goes on, and that which was reset starts at t = 1."""
    model = Stack()
    optimizer = adamw(model)
    policy = phases(("blocks.1", "head"), ("head",), ("blocks.1", "head"), every=3)
    unfreezer = Unfreezer(model, optimizer, policy, mode=mode, state_policy=state_policy)
    weight = model.blocks[1].fc.weight
    steps(model, optimizer, unfreezer, 2)
    open_state = dict(optimizer.state[weight])
    before = bits(open_state)
    steps(model, optimizer, unfreezer, 1, start=2)
    closed = bits(optimizer.state.get(weight, {}))
    steps(model, optimizer, unfreezer, 3, start=3)
    if state_policy == "reset":
        assert weight not in optimizer.state
    else:
        assert not torch.equal(closed["exp_avg"], before["exp_avg"])
        assert_equal(optimizer.state[weight], closed)
        # On the CPU there is nowhere to move it to.
        assert all(optimizer.state[weight][key] is open_state[key] for key in ("exp_avg", "exp_avg_sq"))
    assert optimizer.state[model.head.weight]["step"] == 6
    steps(model, optimizer, unfreezer, 1, start=6)
    assert optimizer.state[weight]["step"] == (1 if state_policy == "reset" else 4)


def test_reset_state_trains_as_if_the_group_were_new() -> None:
    model = Stack()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    unfreezer = Unfreezer(model, optimizer, BlockCoordinate(2, "ascending"), state_policy="reset")
    steps(model, optimizer, unfreezer, 12)  # once round
    assert not [p for p in optimizer.state if optimizer.state[p]]
    twin = copy.deepcopy(model)
    fresh = torch.optim.AdamW(twin.embed.parameters(), lr=1e-2)
    steps(model, optimizer, unfreezer, 2, start=12)
    for step in (12, 13):
        backward(twin, step)
        fresh.step()
        fresh.zero_grad()
    assert_equal(params(model), params(twin))


def test_making_an_unfreezer_drops_no_state_that_was_loaded() -> None:
    """The optimizer may be loaded before the unfreezer is made, when it is not known yet what is open."""
    model = Stack()
    optimizer = torch.optim.AdamW(model.parameters())
    backward(model, 0)
    optimizer.step()
    before = bits(state_tensors(optimizer))
    unfreezer = Unfreezer(model, optimizer, GradualUnfreeze(5), state_policy="reset")
    assert_equal(state_tensors(optimizer), before)
    other = Unfreezer(twin := Stack(), torch.optim.AdamW(twin.parameters()), GradualUnfreeze(5), state_policy="reset")
    for _ in range(12):
        other.step()
    unfreezer.load_state_dict(other.state_dict())
    left = {p for p in optimizer.state if optimizer.state[p]}
    assert left == {p for group in unfreezer.groups[3:] for p in group.parameters}


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@MODES
@pytest.mark.parametrize("ours", [True, False])
def test_moments_of_closed_groups_wait_in_host_memory(mode: Any, ours: bool) -> None:
    if not ours and mode == "freeze":
        pytest.skip("mask needs fastft.AdamW")

    def run(state_policy: Any) -> tuple[nn.Module, Optimizer, list[int]]:
        model = nn.Sequential(*(nn.Linear(512, 512) for _ in range(6))).cuda()
        torch.manual_seed(0)
        cls = fastft.AdamW if ours else torch.optim.AdamW
        optimizer = cls(model.parameters(), lr=1e-3)
        unfreezer = Unfreezer(model, optimizer, BlockCoordinate(3), mode=mode, state_policy=state_policy)
        sizes = []
        for step in range(24):
            x = torch.randn(4, 512, generator=torch.Generator().manual_seed(step)).cuda()
            model(x).square().sum().backward()
            optimizer.step()
            unfreezer.step()
            optimizer.zero_grad()
            sizes.append(sum(row.state_bytes - row.host_bytes for row in unfreezer.report().groups))
        return model, optimizer, sizes

    kept, kept_optimizer, _ = run("keep")
    model, optimizer, sizes = run("offload")
    assert_equal(params(model), params(kept))
    one = 2 * 4 * (512 * 512 + 512)
    assert max(sizes) < 1.1 * one
    for p in model[0].parameters():
        moments = [optimizer.state[p][key] for key in ("exp_avg", "exp_avg_sq")]
        assert all(m.is_pinned() and m.device.type == "cpu" for m in moments)
    again = type(optimizer)(model.parameters(), lr=1e-3)
    again.load_state_dict(optimizer.state_dict())
    for p, q in zip(model.parameters(), kept.parameters(), strict=True):
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(again.state[p][key], kept_optimizer.state[q][key])


# -- learning rates ------------------------------------------------------------------------------------------


def rates(optimizer: Optimizer, into: list[list[float]]) -> Callable[[], None]:
    """Notes the lr of each group as a step sees it."""
    handle = optimizer.register_step_pre_hook(lambda *_: into.append([float(g["lr"]) for g in optimizer.param_groups]))
    return handle.remove


@pytest.mark.parametrize("tensor", [False, True])
def test_a_group_that_opens_is_warmed_up(tensor: bool) -> None:
    model = Stack()
    optimizer = torch.optim.AdamW(layerwise_lr(layer_groups(model), 1.0, decay=1 / 2.0))
    if tensor:
        for group in optimizer.param_groups:
            group["lr"] = torch.tensor(group["lr"])
    objects = [group["lr"] for group in optimizer.param_groups]
    seen: list[list[float]] = []
    unfreezer = Unfreezer(model, optimizer, phases(("head",), ("blocks.2", "head"), every=3), rewarm_steps=4)
    rates(optimizer, seen)
    rows = []
    for step in range(8):
        rows.append({row.group: row.lr for row in unfreezer.report().groups})
        steps(model, optimizer, unfreezer, 1, start=step)
    assert [lrs[5] for lrs in seen] == [1.0] * 8  # open from the start: the scheduler warms it up
    assert [lrs[3] for lrs in seen] == [0.25, 0.25, 0.25, 0.0625, 0.125, 0.1875, 0.25, 0.25]
    assert [row["blocks.2"][0] for row in rows] == [lrs[3] for lrs in seen]
    assert all(group["lr"] is lr for group, lr in zip(optimizer.param_groups, objects, strict=True))
    assert [float(lr) for lr in objects] == [0.5 ** (5 - i) for i in range(6)]


def test_a_group_that_opens_again_is_warmed_up_again() -> None:
    model = Stack()
    optimizer = adamw(model)
    seen: list[list[float]] = []
    unfreezer = Unfreezer(
        model, optimizer, phases(("head",), ("blocks.2",), ("head",), ("blocks.2",)), mode="freeze", rewarm_steps=2
    )
    rates(optimizer, seen)
    steps(model, optimizer, unfreezer, 8)
    full_head, full_block = seen[0][5], seen[0][3]
    assert [lrs[5] / full_head for lrs in seen] == [1, 1, 1, 1, 0.5, 1, 1, 1]
    assert [lrs[3] / full_block for lrs in seen] == [1, 1, 0.5, 1, 1, 1, 0.5, 1]


def test_a_step_that_fails_leaves_no_lowered_lr_behind() -> None:
    model = Stack()
    optimizer = adamw(model)
    unfreezer = Unfreezer(model, optimizer, phases(("head",), ("blocks.2", "head"), every=1), rewarm_steps=10)
    full = optimizer.param_groups[3]["lr"]
    steps(model, optimizer, unfreezer, 1)
    seen: list[list[float]] = []
    rates(optimizer, seen)
    handle = optimizer.register_step_pre_hook(lambda *_: 1 / 0)
    backward(model, 1)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            optimizer.step()
    handle.remove()
    # The second one has put it back before it lowered it again, and so does the report.
    assert [row[3] for row in seen] == pytest.approx([full / 10] * 2)
    assert unfreezer.report().groups[3].lr == (pytest.approx(full / 10),)
    assert optimizer.param_groups[3]["lr"] == full
    optimizer.step()
    assert optimizer.param_groups[3]["lr"] == full


def test_warming_up_needs_groups_of_one_layer_group_each() -> None:
    model = Stack()
    optimizer = torch.optim.AdamW(model.parameters())
    message = r"rewarm_steps: expected 0, .* param_groups\[0\] has parameters of embeddings, blocks.*layerwise_lr"
    with pytest.raises(ValueError, match=message):
        Unfreezer(model, optimizer, Always(), rewarm_steps=2)
    Unfreezer(model, optimizer, Always())  # and the failed one has left nothing behind


# -- tied weights --------------------------------------------------------------------------------------------


@MODES
def test_a_weight_tied_across_the_border_is_refused(mode: Any) -> None:
    model = TiedLM()
    optimizer = adamw(model)
    message = (
        r"embed\.weight is tied across an open and a closed group at step 0: final_norm would be open, "
        r"embeddings closed\..*groups=.*untie.*tied=\"closed\""
    )
    with pytest.raises(ValueError, match=message):
        Unfreezer(model, optimizer, GradualUnfreeze(2), mode=mode)
    assert all(p.requires_grad for p in model.parameters())
    # The other way round it would move under a closed head.
    with pytest.raises(ValueError, match="embeddings would be open, final_norm closed"):
        Unfreezer(model, optimizer, phases(("embeddings",)), mode=mode)
    unfreezer = Unfreezer(model, optimizer, phases((1,), ("embeddings", "final_norm"), (3,), every=1), mode=mode)
    unfreezer.step()
    with pytest.raises(ValueError, match="at step 2"):
        unfreezer.step()
    assert unfreezer.open_groups == ("embeddings", "final_norm")


@MODES
def test_a_tied_weight_stays_closed_until_all_who_use_it_are_open(mode: Any) -> None:
    model = TiedLM()
    optimizer = adamw(model)
    unfreezer = Unfreezer(model, optimizer, GradualUnfreeze(2), mode=mode, tied="closed")
    before = model.embed.weight.detach().clone()
    norm = model.norm.weight.detach().clone()
    steps(
        model, optimizer, unfreezer, 6, before_step=lambda: setattr(model.embed.weight, "grad", torch.ones_like(before))
    )
    assert torch.equal(model.embed.weight, before)
    assert not torch.equal(model.norm.weight, norm)
    assert model.embed.weight.requires_grad
    assert unfreezer.open_groups == ("embeddings", "blocks.0", "blocks.1", "final_norm")
    steps(model, optimizer, unfreezer, 1, start=6)
    assert not torch.equal(model.embed.weight, before)


@MODES
def test_a_tied_weight_is_not_opened_by_its_owner_alone(mode: Any) -> None:
    model = TiedLM()
    optimizer = adamw(model)
    unfreezer = Unfreezer(model, optimizer, phases(("embeddings", 1)), mode=mode, tied="closed")
    before = model.embed.weight.detach().clone()
    steps(model, optimizer, unfreezer, 2)
    assert torch.equal(model.embed.weight, before)
    assert unfreezer.open_groups == ("embeddings", "blocks.0")


def test_a_state_dict_that_would_tear_a_tie_is_refused_before_anything_changes() -> None:
    model = TiedLM()
    whole = Unfreezer(model, adamw(model), Always())
    whole.step()
    twin = TiedLM()
    unfreezer = Unfreezer(twin, adamw(twin), phases((1,), (3,), every=1))
    with pytest.raises(ValueError, match="tied across an open and a closed group"):
        unfreezer.load_state_dict(whole.state_dict())
    assert unfreezer.progress.step == 0
    assert unfreezer.open_groups == ("blocks.0",)


def test_ties_that_are_closed_are_reported() -> None:
    model = TiedLM()
    unfreezer = Unfreezer(model, adamw(model), GradualUnfreeze(1), tied="closed")
    assert "closed until all groups that use it are open: embed.weight" in unfreezer.report().notes
    for _ in range(3):
        unfreezer.step()
    assert not unfreezer.report().notes


def test_lisa_opens_all_users_of_a_tied_weight() -> None:
    model = TiedLM()
    optimizer = adamw(model)
    unfreezer = Unfreezer(model, optimizer, LISA(1, every=1), mode="freeze")
    before = model.embed.weight.detach().clone()
    steps(model, optimizer, unfreezer, 2)
    assert not torch.equal(model.embed.weight, before)


# -- running statistics --------------------------------------------------------------------------------------


def statistics(model: nn.Module) -> dict[str, Tensor]:
    return bits({name: b for name, b in model.named_buffers() if b.is_floating_point()})


@MODES
@pytest.mark.parametrize("norm_policy", ["freeze_stats", "train"])
def test_batch_norm_stays_put_while_closed(mode: Any, norm_policy: Any) -> None:
    model = ConvNet()
    optimizer = adamw(model)
    policy = phases((2, 3, 4), (0, 3, 4), every=2)
    unfreezer = Unfreezer(model, optimizer, policy, mode=mode, norm_policy=norm_policy)
    before = statistics(model)

    def epoch(start: int) -> dict[str, bool]:
        """Which statistics move in an epoch, that begins with model.train()."""
        previous = statistics(model)
        model.train()
        steps(model, optimizer, unfreezer, 2, start=start)
        model.eval()
        model(batch(99)[0])
        return {name: not torch.equal(previous[name], b) for name, b in statistics(model).items()}

    # The norm without weights is the embeddings': nothing says so but its place.
    closed_first = ("bn1.", "layer1.0.")
    first = epoch(0)
    assert {name for name in first if not first[name]} == (
        {name for name in before if name.startswith(closed_first)} if norm_policy == "freeze_stats" else set()
    )
    model.train()
    x, _ = batch(5)
    normalised = model.bn1(model.conv1(x.unsqueeze(1)))
    # The embeddings are open again, and so normalise by the batch.
    assert normalised.mean().abs() < 1e-5
    still = "layer1."
    second = epoch(2)
    assert {name for name in second if not second[name]} == (
        {name for name in before if name.startswith(still)} if norm_policy == "freeze_stats" else set()
    )


@MODES
def test_closed_batch_norm_normalises_by_its_statistics(mode: Any) -> None:
    model = ConvNet()
    unfreezer = Unfreezer(model, adamw(model), phases(("head",)), mode=mode)
    x, _ = batch(0)
    model.train()
    trained = model(x)
    model.eval()
    assert torch.equal(trained, model(x))
    model.train()
    unfreezer.undo()
    assert not torch.equal(model(x), trained)


@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_that_opens_gets_the_mode_of_the_model(training: bool) -> None:
    model = ConvNet()
    unfreezer = Unfreezer(model, adamw(model), phases(("head",), (0, 1, 2, 3, 4), every=1))
    model(batch(0)[0])
    assert not model.bn1.training
    if not training:
        model.eval()
    unfreezer.step()
    assert all(module.training == training for module in model.modules())
    model.train()
    model(batch(0)[0])
    assert all(module.training for module in model.modules())


def test_held_statistics_are_reported() -> None:
    model = ConvNet()
    unfreezer = Unfreezer(model, adamw(model), phases(("layer2.0", "head")))
    assert "running statistics stay as they are in 4 closed modules" in unfreezer.report().notes


# -- metrics that come late ----------------------------------------------------------------------------------


@MODES
def test_metrics_may_follow_the_step_they_belong_to(mode: Any) -> None:
    """As one call, but for the step that was counted before."""
    runs = []
    for late in (False, True):
        model = Stack()
        optimizer = adamw(model)
        unfreezer = Unfreezer(model, optimizer, OnPlateau("loss", patience=1, restore_best=True), mode=mode)
        changes = []
        for step, loss in enumerate([1.0, 0.5, 0.7, 0.6]):
            backward(model, step)
            optimizer.step()
            optimizer.zero_grad()
            if late:
                assert not unfreezer.step()
                changes.append(unfreezer.update(epoch=step / 2, loss=loss))
            else:
                changes.append(unfreezer.step(epoch=step / 2, loss=loss))
        runs.append((params(model), unfreezer, changes))
    assert_equal(runs[0][0], runs[1][0])
    assert runs[0][1].progress == runs[1][1].progress
    assert runs[0][1].progress.step == 4
    assert runs[0][2] == runs[1][2] == [False, False, True, True]


# -- going back to the best ----------------------------------------------------------------------------------


@MODES
def test_a_plateau_goes_back_to_the_best_parameters(mode: Any) -> None:
    model = ConvNet()
    optimizer = adamw(model)
    unfreezer = Unfreezer(model, optimizer, OnPlateau("loss", patience=2, restore_best=True), mode=mode)
    snapshots = []
    for step, loss in enumerate([3.0, 1.0, 2.0, 1.5]):
        backward(model, step)
        optimizer.step()
        snapshots.append((bits(params(model)), statistics(model)))
        unfreezer.step(loss=loss)
        optimizer.zero_grad()
    assert unfreezer.open_groups == ("layer2.0", "head")
    assert_equal(params(model), snapshots[1][0])
    assert not torch.equal(snapshots[1][0]["fc.weight"], snapshots[3][0]["fc.weight"])
    assert_equal(statistics(model), snapshots[1][1])
    # Better ones replace it, now with what has opened since.
    for step, loss in enumerate([0.5, 0.6, 0.7], start=4):
        backward(model, step)
        optimizer.step()
        if loss == 0.5:
            best = bits(params(model)), statistics(model)
        unfreezer.step(loss=loss)
    assert len(unfreezer.open_groups) == 3
    assert_equal(params(model), best[0])
    assert_equal(statistics(model), best[1])


@pytest.mark.parametrize(
    ("logged", "got"),
    [
        ((), "no metrics at all"),
        (({"val_los": 1.0}, {"lr": 0.1}), "'lr', 'val_los'"),
        (({"val_los": 1.0}, {"val_loss": 1.0}), None),
    ],
)
def test_a_metric_that_was_never_logged_is_reported_at_the_end(logged: Any, got: str | None) -> None:
    model = Stack()
    unfreezer = Unfreezer(model, adamw(model), OnPlateau("val_loss"))
    for metrics in ({}, *logged):
        unfreezer.step(**metrics)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        unfreezer.undo()
        unfreezer.undo()
    expected = f"metric: expected 'val_loss' among the logged metrics, got {got}"
    assert [str(warning.message) for warning in found] == ([expected] if got else [])


def test_only_what_has_been_open_is_copied() -> None:
    model = Stack()
    unfreezer = Unfreezer(model, adamw(model), OnPlateau("loss", restore_best=True))
    unfreezer.step(loss=1.0)
    assert set(unfreezer.state_dict()["best"]) == {"head.weight", "head.bias"}
    without = Unfreezer(twin := Stack(), adamw(twin), OnPlateau("loss"))
    without.step(loss=1.0)
    assert without.state_dict()["best"] is None


# -- saving and loading --------------------------------------------------------------------------------------


@pytest.mark.slow
@given(data=st.data())
@drawn
def test_an_unfreezer_that_was_loaded_opens_the_same_groups(data: st.DataObject) -> None:
    policy = data.draw(
        st.sampled_from(
            [
                GradualUnfreeze(3),
                GradualUnfreeze(0.4, unit="epoch"),
                LISA(2, every=2, seed=1),
                BlockCoordinate(2, "random"),
                OnPlateau("loss", patience=1),
            ]
        )
    )
    losses = data.draw(st.lists(st.none() | st.sampled_from([0.1, 0.2, 0.3]), min_size=2, max_size=25))
    stop = data.draw(st.integers(0, len(losses) - 1))

    def make() -> Unfreezer:
        model = Stack(4)
        return Unfreezer(model, torch.optim.SGD(model.parameters(), lr=0.1), policy, state_policy="reset")

    def go_on(unfreezer: Unfreezer, start: int, end: int) -> list[Any]:
        seen = []
        for i in range(start, end):
            metrics = {} if losses[i] is None else {"loss": losses[i]}
            unfreezer.step(epoch=i / 10 if i % 2 else None, **metrics)
            seen.append((unfreezer.open_groups, [row.open_since for row in unfreezer.report().groups]))
        return seen

    whole, first, second = make(), make(), make()
    expected = go_on(whole, 0, len(losses))
    go_on(first, 0, stop)
    second.load_state_dict(first.state_dict())
    assert second.state_dict() == first.state_dict()
    assert go_on(second, stop, len(losses)) == expected[stop:]
    open_flags = {p.requires_grad for g in second.groups if g.name in second.open_groups for p in g.parameters}
    assert open_flags == {True}


@pytest.mark.parametrize("order", ["unfreezer first", "optimizer first"])
def test_the_order_of_loading_does_not_matter(order: str) -> None:
    def make() -> tuple[nn.Module, fastft.AdamW, Unfreezer]:
        model = Stack()
        optimizer = adamw(model)
        policy = phases(("head",), ("blocks.1",), ("blocks.2", "head"), every=3)
        return model, optimizer, Unfreezer(model, optimizer, policy, mode="freeze", state_policy="reset")

    model, optimizer, unfreezer = make()
    steps(model, optimizer, unfreezer, 4)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), unfreezer.state_dict()))
    steps(model, optimizer, unfreezer, 5, start=4)

    again, again_optimizer, again_unfreezer = make()
    again.load_state_dict(saved[0])
    loads = [lambda: again_unfreezer.load_state_dict(saved[2]), lambda: again_optimizer.load_state_dict(saved[1])]
    for load in loads if order == "unfreezer first" else reversed(loads):
        load()
    steps(again, again_optimizer, again_unfreezer, 5, start=4)
    assert_equal(params(again), params(model))
    assert_equal(state_tensors(again_optimizer), state_tensors(optimizer))


def test_an_optimizer_state_of_another_run_opens_nothing() -> None:
    """AdamW's state dict carries the frozen set, and the unfreezer's own is the one that counts."""
    model, other = Stack(), Stack()
    optimizer, free = adamw(model), adamw(other)
    backward(other, 0)
    free.step()
    free.freeze(other.embed)
    unfreezer = Unfreezer(model, optimizer, phases(("final_norm",)), mode="freeze")
    optimizer.load_state_dict(free.state_dict())
    before = bits(params(model))
    steps(model, optimizer, unfreezer, 1)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"norm.weight", "norm.bias"}


def test_another_policy_may_take_over() -> None:
    def make(policy: Policy) -> Unfreezer:
        model = Stack()
        return Unfreezer(model, torch.optim.SGD(model.parameters()), policy)

    first, second = make(GradualUnfreeze(10)), make(phases(("embeddings", "head")))
    for _ in range(15):
        first.step()
    second.load_state_dict(first.state_dict())
    assert second.open_groups == ("embeddings", "head")
    assert [row.open_since for row in second.report().groups] == [15, None, None, None, None, 0]


@pytest.mark.parametrize("order", ["optimizer first", "unfreezer first"])
def test_another_policy_opens_what_the_optimizer_was_saved_with_as_frozen(order: str) -> None:
    saved = Stack()
    optimizer = adamw(saved)
    first = Unfreezer(saved, optimizer, phases(("head",)), mode="freeze")
    steps(saved, optimizer, first, 1)

    model = Stack()
    optimizer = adamw(model)
    if order == "optimizer first":
        optimizer.load_state_dict(first.optimizer.state_dict())
    second = Unfreezer(model, optimizer, Always(), mode="freeze")
    if order == "unfreezer first":
        optimizer.load_state_dict(first.optimizer.state_dict())
    second.load_state_dict(first.state_dict())
    before = bits(params(model))
    steps(model, optimizer, second, 1)
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, r"state_dict: expected version 1, got 2"),
        ({"version": None}, r"expected version 1, got None"),
        ({"groups": ["a"]}, r"state_dict: expected the groups \['embeddings', .*\], got \['a'\]"),
    ],
)
def test_other_state_dicts_are_refused(change: dict[str, Any], message: str) -> None:
    model = Stack()
    unfreezer = Unfreezer(model, torch.optim.SGD(model.parameters()), GradualUnfreeze(3))
    with pytest.raises(ValueError, match=message):
        unfreezer.load_state_dict({**unfreezer.state_dict(), **change})


def test_a_state_dict_is_plain_and_its_own() -> None:
    model = Stack()
    unfreezer = Unfreezer(model, adamw(model), OnPlateau("loss", restore_best=True))
    unfreezer.step(epoch=1, loss=0.5)
    file = torch.serialization.io.BytesIO()
    torch.save(unfreezer.state_dict(), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again = Unfreezer(twin := Stack(), adamw(twin), OnPlateau("loss", restore_best=True))
    again.load_state_dict(saved)
    saved["best"]["head.weight"].zero_()
    saved["events"].clear()
    assert not again.state_dict()["best"]["head.weight"].eq(0).all()
    assert again.progress.events == (Event(1, 1.0, {"loss": 0.5}),)


# -- the report ----------------------------------------------------------------------------------------------


def test_the_report_is_a_table() -> None:
    model = Stack()
    optimizer = fastft.AdamW(layerwise_lr(layer_groups(model), 1e-3, decay=1 / 2.6))
    unfreezer = Unfreezer(model, optimizer, GradualUnfreeze(2))
    steps(model, optimizer, unfreezer, 3)
    assert str(unfreezer.report()).splitlines() == [
        "group       parameters  open since        lr  state bytes",
        "embeddings          48      closed  8.42e-06            0",
        "blocks.0            88      closed  2.19e-05            0",
        "blocks.1            88      closed  5.69e-05            0",
        "blocks.2            88      closed  0.000148            0",
        "final_norm          16      step 2  0.000385          136",
        "head                27      step 0     0.001          224",
        "step 3: 2 of 6 groups open, 12.1% of the parameters, 360 bytes of state beside them",
    ]


def test_the_report_as_markdown_and_json() -> None:
    model = Stack(1)
    unfreezer = Unfreezer(model, fastft.AdamW(model.parameters(), lr=1e-3), GradualUnfreeze(1, unit="epoch"))
    report = unfreezer.report()
    assert report.to_markdown().splitlines() == [
        "| group | parameters | open since | lr | state bytes |",
        "| --- | ---: | ---: | ---: | ---: |",
        "| embeddings | 48 | closed | 0.001 | 0 |",
        "| blocks.0 | 88 | closed | 0.001 | 0 |",
        "| final_norm | 16 | closed | 0.001 | 0 |",
        "| head | 27 | step 0 | 0.001 | 0 |",
        "",
        "step 0: 1 of 4 groups open, 15.1% of the parameters, 0 bytes of state beside them",
        "",
        f"- {report.notes[0]}",
    ]
    found = json.loads(report.to_json())
    assert found["step"] == 0 and found["notes"] == list(report.notes)
    assert [group["group"] for group in found["groups"]] == [group.group for group in report.groups]
    assert found["groups"][-1] == {
        "group": "head", "parameters": 27, "open_since": 0, "lr": [0.001], "state_bytes": 0, "host_bytes": 0
    }  # fmt: skip


def test_the_report_is_drawn_and_written(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    model = Stack()
    report = Unfreezer(model, adamw(model), GradualUnfreeze(1)).report()
    report.plot(tmp_path / "groups.svg")
    drawn = (tmp_path / "groups.svg").read_text()
    assert "<svg" in drawn
    report.write(tmp_path)
    assert (tmp_path / "report.md").read_text() == report.to_markdown() + "\n"
    assert (tmp_path / "report.json").read_text() == report.to_json() + "\n"
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_the_report_shows_the_span_of_learning_rates() -> None:
    model = Stack()
    named = list(model.named_parameters())
    optimizer = torch.optim.AdamW([{"params": named[:1], "lr": 1e-2}, {"params": named[1:], "lr": 1e-4}])
    unfreezer = Unfreezer(model, optimizer, Always())
    first, second, *_ = unfreezer.report().groups
    assert (first.lr, second.lr) == ((1e-4, 1e-2), (1e-4,))
    assert "0.0001 … 0.01" in str(unfreezer.report())


def test_a_policy_by_epochs_that_is_given_none_is_noted() -> None:
    model = Stack()
    unfreezer = Unfreezer(model, torch.optim.SGD(model.parameters()), GradualUnfreeze(1, unit="epoch"))
    unfreezer.step()
    note = "the policy depends on epochs, and step(epoch=...) has not been given any yet"
    assert note in unfreezer.report().notes
    unfreezer.step(epoch=0.1)
    assert note not in unfreezer.report().notes


def test_steps_without_gradients_at_open_groups_are_noted_once() -> None:
    model = Stack()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    unfreezer = Unfreezer(model, optimizer, phases(("blocks.0", "head"), every=1))
    for p in model.head.parameters():
        p.grad = torch.ones_like(p)
    with pytest.warns(UserWarning, match=r"no gradient arrived at open groups: blocks\.0;"):
        optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
    assert "no gradient arrived in the first step after it opened: blocks.0" in unfreezer.report().notes


def test_a_closure_computes_gradients_in_time() -> None:
    model = Stack()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    Unfreezer(model, optimizer, phases(("head",)))
    before = bits(params(model))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step(lambda: backward(model, 0))
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"head.weight", "head.bias"}


# -- what is refused -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "frozen"}, "mode: expected one of 'requires_grad', 'freeze', got 'frozen'"),
        ({"state_policy": "drop"}, "state_policy: expected one of 'keep', 'reset', 'offload', got 'drop'"),
        ({"norm_policy": "eval"}, "norm_policy: expected one of 'freeze_stats', 'train', got 'eval'"),
        ({"tied": "open"}, "tied: expected one of 'raise', 'closed', got 'open'"),
        ({"rewarm_steps": -1}, "rewarm_steps: expected an integer >= 0, got -1"),
        ({"groups": ["embed"]}, "groups: expected every parameter in exactly one group"),
        ({"wrapped": ["deepspeed"]}, "wrapped: expected one of 'ddp', .*, got 'deepspeed'"),
        ({"wrapped": "ddp"}, "wrapped in DistributedDataParallel"),
        ({"mode": "freeze"}, 'mode: expected "requires_grad" with torch.optim.sgd.SGD; "freeze" needs fastft.AdamW'),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    model = Stack()
    with pytest.raises(ValueError, match=message):
        Unfreezer(model, torch.optim.SGD(model.parameters()), Always(), **options)
    assert all(p.requires_grad for p in model.parameters())


def test_arguments_of_other_types_are_refused() -> None:
    model = Stack()
    optimizer = torch.optim.SGD(model.parameters())
    with pytest.raises(TypeError, match="policy: expected a function of a Progress, got 'gradual'"):
        Unfreezer(model, optimizer, "gradual")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"optimizer: expected a torch\.optim\.Optimizer, got int"):
        Unfreezer(model, 3, Always())  # type: ignore[arg-type]


def test_parameters_that_are_not_in_the_optimizer_are_named() -> None:
    model = Stack()
    model.embed.bias.requires_grad_(False)  # frozen for good: nobody misses it
    optimizer = torch.optim.SGD([p for name, p in model.named_parameters() if "embed" not in name])
    with pytest.raises(ValueError, match=r"optimizer: expected every parameter .* got none of embed\.weight$"):
        Unfreezer(model, optimizer, Always())
    model.embed.weight.requires_grad_(False)
    Unfreezer(model, optimizer, Always())


def test_parameters_of_the_optimizer_that_are_not_the_models_go_on() -> None:
    model, temperature = Stack(), nn.Parameter(torch.ones(()))
    optimizer = fastft.AdamW(
        [*layerwise_lr(layer_groups(model), 1e-2, decay=1 / 2.6), {"params": [("t", temperature)]}]
    )
    unfreezer = Unfreezer(model, optimizer, GradualUnfreeze(1), mode="freeze", rewarm_steps=2)
    for step in range(2):
        temperature.grad = torch.ones(())
        steps(model, optimizer, unfreezer, 1, start=step)
    assert temperature != 1.0


def test_the_old_word_for_a_mode_still_works() -> None:
    model = Stack()
    with pytest.warns(DeprecationWarning, match='mode: "mask" is called "freeze" now') as found:
        unfreezer = Unfreezer(model, adamw(model), GradualUnfreeze(1), mode="mask")  # type: ignore[arg-type]
    assert found[0].filename == __file__
    assert unfreezer.mode == "freeze"
    assert all(p.requires_grad for p in model.parameters())


def test_the_old_word_for_undo_still_works() -> None:
    model = Stack()
    unfreezer = Unfreezer(model, adamw(model), GradualUnfreeze(1))
    with pytest.warns(DeprecationWarning, match=r"close\(\) is called undo\(\) now") as found:
        unfreezer.close()
    assert found[0].filename == __file__
    assert all(p.requires_grad for p in model.parameters())
    Unfreezer(model, unfreezer.optimizer, GradualUnfreeze(1)).undo()  # the optimizer is free again


def test_lbfgs_is_refused() -> None:
    model = Stack()
    with pytest.raises(ValueError, match="LBFGS moves all parameters along one direction"):
        Unfreezer(model, torch.optim.LBFGS(model.parameters()), Always())


def test_an_optimizer_has_one_unfreezer_at_a_time() -> None:
    model = Stack()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    first = Unfreezer(model, optimizer, phases(("head",)))
    with pytest.raises(ValueError, match=r"it has an Unfreezer already; undo\(\) that one first"):
        Unfreezer(model, optimizer, Always())
    first.undo()
    second = Unfreezer(model, optimizer, phases(("final_norm",)))
    assert not second.report().notes  # what the first had closed counts as frozen by nobody
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["norm.weight", "norm.bias"]


def test_wrapped_optimizers_are_unwrapped() -> None:
    class Wrapped(Optimizer):
        """As accelerate's: an Optimizer by class, that hands everything on."""

        def __init__(self, optimizer: Optimizer) -> None:
            self.optimizer = optimizer

    model = Stack()
    inner = adamw(model)
    unfreezer = Unfreezer(model, Wrapped(inner), GradualUnfreeze(1), mode="freeze")
    assert unfreezer.optimizer is inner


def test_wrappers_that_are_named_to_be_around_the_model_counts_as_if_it_were_seen() -> None:
    model = Stack()
    unfreezer = Unfreezer(model, adamw(model), GradualUnfreeze(1), mode="freeze", wrapped=["ddp"])
    backward(model, 0)
    assert all(p.grad is not None for p in model.parameters())  # all gradients that DDP waits for
    assert "as the model is wrapped in DistributedDataParallel" in unfreezer.report().notes[0]


def test_nothing_keeps_a_finished_run_alive() -> None:
    import weakref

    model = Stack()
    optimizer = adamw(model)
    unfreezer = Unfreezer(model, optimizer, GradualUnfreeze(1), mode="freeze")
    steps(model, optimizer, unfreezer, 2)
    gone = [weakref.ref(x) for x in (model, optimizer, unfreezer)]
    del model, optimizer, unfreezer
    gc.collect()
    assert [ref() for ref in gone] == [None, None, None]


def test_amp_scaling_that_skips_a_step_is_no_trouble() -> None:
    model = Stack()
    optimizer = adamw(model)
    unfreezer = Unfreezer(model, optimizer, GradualUnfreeze(2), mode="freeze")
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    before = bits(params(model))
    x, y = batch(0)
    for spoilt in (True, False):
        scaler.scale(nn.functional.cross_entropy(model(x), y)).backward()
        if spoilt:
            model.head.weight.grad[0, 0] = math.inf
        scaler.step(optimizer)
        scaler.update()
        unfreezer.step()
        optimizer.zero_grad()
        moved = [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]
        assert moved == ([] if spoilt else ["head.weight", "head.bias"])
