"""Compiled models: no graph is run with what was open before; checked by values."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from unfreeze_cases import ConvNet, Listed, Stack, assert_equal, backward, batch, bits, params

import fastft
from fastft.optim import layerwise_lr
from fastft.unfreeze import GradualUnfreeze, Policy, Unfreezer, layer_groups

pytestmark = pytest.mark.slow

UP_AND_DOWN = Listed(((0, (5,)), (2, (3, 4, 5)), (4, (0, 1)), (6, (0, 5)), (8, (2, 5))))


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch._dynamo.reset()


def train(
    model: nn.Module, called: Any, policy: Policy, count: int = 10, **options: Any
) -> tuple[list[Any], Unfreezer]:
    """The gradients of open groups and all parameters, after each step."""
    groups = layerwise_lr(layer_groups(called), 1e-2, decay=1 / 1.5, weight_decay=0.1)
    optimizer = fastft.AdamW(groups, eps=1e-4, anchor="init", anchor_decay=2.0)
    unfreezer = Unfreezer(called, optimizer, policy, mode="freeze", **options)
    path = []
    for step in range(count):
        called.train()
        backward(called, step)
        opened = {p for g in unfreezer.groups if g.name in unfreezer.open_groups for p in g.parameters}
        grads = {name: p.grad for name, p in model.named_parameters() if p in opened}
        assert all(g is not None for g in grads.values())
        path.append(bits({f"grad.{name}": g for name, g in grads.items()}))
        optimizer.step()
        path[-1].update(bits(params(model)))
        unfreezer.step()
        optimizer.zero_grad()
    return path, unfreezer


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("how", ["wrapper", "in place", "blocks"])
@pytest.mark.parametrize("policy", [UP_AND_DOWN, GradualUnfreeze(2)], ids=["up and down", "gradual"])
def test_compiled_models_train_as_eager_ones(backend: str, how: str, policy: Policy) -> None:
    expected, _ = train(eager := Stack(), eager, policy)
    model = Stack()
    called: nn.Module = model
    counter = CompileCounterWithBackend(backend)
    if how == "wrapper":
        called = torch.compile(model, backend=counter, fullgraph=True)
    elif how == "in place":
        model.compile(backend=counter, fullgraph=True)
    else:
        for block in model.blocks:
            block.compile(backend=counter, fullgraph=True)
    got, unfreezer = train(model, called, policy)
    for step, (ours, theirs) in enumerate(zip(got, expected, strict=True)):
        assert ours.keys() == theirs.keys()
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-6, msg=f"{name} at step {step}")
    # Flags stay, so nothing is compiled again when groups open and close.
    assert counter.frame_count == (1 if how != "blocks" else len({type(b) for b in model.blocks}))
    assert "as the model is compiled" in unfreezer.report().notes[0]


@pytest.mark.parametrize("how", ["wrapper", "in place"])
def test_batch_norm_stays_put_in_compiled_models(how: str) -> None:
    policy = Listed(((0, (3, 4)), (3, (0, 3, 4)), (6, (2, 4))))
    expected, _ = train(eager := ConvNet(), eager, policy, count=9)
    model = ConvNet()
    called = torch.compile(model, backend="eager") if how == "wrapper" else model
    if how == "in place":
        model.compile(backend="eager")
    got, unfreezer = train(model, called, policy, count=9)
    for ours, theirs in zip(got, expected, strict=True):
        assert_equal(ours, theirs)
    assert_equal(dict(model.named_buffers()), dict(eager.named_buffers()))
    unfreezer.undo()
    model.train()
    before = model.bn1.running_mean.clone()
    called(batch(0)[0])
    assert not torch.equal(model.bn1.running_mean, before)


@pytest.mark.parametrize("how", ["wrapper", "in place", "part", "later"])
def test_flags_of_a_compiled_model_are_not_flipped(how: str) -> None:
    model = Stack()
    called: nn.Module = model
    if how == "wrapper":
        called = torch.compile(model, backend="eager")
    elif how == "in place":
        model.compile(backend="eager")
    elif how == "part":
        model.blocks[1] = torch.compile(model.blocks[1], backend="eager")
    optimizer = fastft.AdamW(model.parameters())
    message = r'mode: expected "freeze", together with fastft\.AdamW, for a model that is compiled: .*139476'
    if how == "later":
        unfreezer = Unfreezer(called, optimizer, GradualUnfreeze(1))
        model.compile(backend="eager")
        with pytest.raises(ValueError, match=message):
            unfreezer.step()
    else:
        with pytest.raises(ValueError, match=message):
            Unfreezer(called, optimizer, GradualUnfreeze(1))
        assert all(p.requires_grad for p in model.parameters())


def test_compiling_after_the_unfreezer_was_made_loses_no_gradient() -> None:
    """The hooks are in the model then, and step aside while it is traced."""
    plain, model = Stack(), Stack()
    Unfreezer(model, fastft.AdamW(model.parameters()), Listed(((0, ("blocks.1", "head")),)), mode="freeze")
    compiled = torch.compile(model, backend="aot_eager")
    backward(plain, 0)
    for _ in range(2):
        model.zero_grad()
        backward(compiled, 0)
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-7)
    assert copy.deepcopy(model)(batch(0)[0]).requires_grad
