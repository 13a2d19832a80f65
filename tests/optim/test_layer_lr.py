"""Learning rates by layer: the groups that optimizers get."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from unfreeze_cases import Stack, TiedLM, params

import fastft
from fastft.optim import biases_and_norms, layerwise_lr
from fastft.unfreeze import layer_groups

NAMES = ["embeddings", "blocks.0", "blocks.1", "blocks.2", "final_norm", "head"]


@pytest.mark.parametrize(
    ("make", "factor"),
    [
        (layerwise_lr, 0.75),
        (lambda groups, lr: layerwise_lr(groups, lr, decay=1 / 2.6), 1 / 2.6),
        (lambda groups, lr: layerwise_lr(groups, lr, 0.25), 0.25),
        (lambda groups, lr: layerwise_lr(groups, lr, decay=1.0), 1.0),
        (lambda groups, lr: layerwise_lr(groups, lr, decay=0.5), 0.5),
    ],
)
def test_lr_falls_from_layer_to_layer(make: Any, factor: float) -> None:
    model = Stack()
    groups = make(layer_groups(model), 0.1)
    assert [group["layer_group"] for group in groups] == NAMES
    assert [group["lr"] for group in groups] == pytest.approx([0.1 * factor ** (5 - i) for i in range(6)])
    assert groups[-1]["lr"] == 0.1
    assert all(set(group) == {"params", "lr", "layer_group"} for group in groups)
    named = [item for group in groups for item in group["params"]]
    assert [name for name, _ in named] == list(params(model))
    assert all(p is params(model)[name] for name, p in named)


@pytest.mark.parametrize("cls", [fastft.AdamW, torch.optim.AdamW, torch.optim.SGD])
def test_optimizers_take_them(cls: Any) -> None:
    model = Stack()
    optimizer = cls(layerwise_lr(layer_groups(model), 0.1, weight_decay=0.3), lr=9.0)
    assert [name for group in optimizer.param_groups for name in group["param_names"]] == list(params(model))
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.3}
    scheduler = LambdaLR(optimizer, lambda step: 0.5**step)
    optimizer.step()
    scheduler.step()
    assert optimizer.param_groups[-1]["lr"] == 0.05
    again = cls(layerwise_lr(layer_groups(model), 0.7), lr=9.0)
    again.load_state_dict(optimizer.state_dict())
    assert [group["layer_group"] for group in again.param_groups] == NAMES
    assert again.param_groups[-1]["lr"] == 0.05


def test_options_of_the_optimizer_reach_every_group() -> None:
    model = Stack()
    optimizer = fastft.AdamW(layerwise_lr(layer_groups(model), 1e-3, anchor_decay=2.0, eps=1e-4), anchor="init")
    assert {(group["anchor_decay"], group["eps"]) for group in optimizer.param_groups} == {(2.0, 1e-4)}


def test_no_weight_decay_for_biases_and_norms() -> None:
    model = Stack()
    groups = layerwise_lr(layer_groups(model), 0.1, 0.5, no_decay=biases_and_norms, weight_decay=0.3)
    by_name = {name: group for group in groups for name, _ in group["params"]}
    assert set(by_name) == set(params(model))
    for name, group in by_name.items():
        decayed = name.endswith(("fc.weight", "embed.weight", "head.weight"))
        assert group["weight_decay"] == (0.3 if decayed else 0.0), name
    assert [group["layer_group"] for group in groups] == [
        name for name in NAMES for _ in range(1 if name == "final_norm" else 2)
    ]
    assert [group["lr"] for group in groups][:2] == [0.1 / 2**5] * 2
    optimizer = torch.optim.AdamW(groups)
    assert optimizer.param_groups[8]["layer_group"] == "final_norm"


def test_ones_own_rule() -> None:
    model = Stack()
    groups = layerwise_lr(layer_groups(model), 0.1, no_decay=lambda name, p: name == "embed.weight" and p.dim() == 2)
    assert [len(group["params"]) for group in groups] == [1, 1, 4, 4, 4, 2, 2]
    assert groups[1]["weight_decay"] == 0.0
    assert groups[1]["params"][0][1] is model.embed.weight


def test_tied_weights_are_in_one_group() -> None:
    model = TiedLM()
    groups = layerwise_lr(layer_groups(model), 0.1)
    assert sum(p is model.embed.weight for group in groups for _, p in group["params"]) == 1
    torch.optim.SGD(groups)


def test_a_single_layer_gets_the_full_lr() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    assert [group["lr"] for group in layerwise_lr(layer_groups(model), 0.1)] == [0.1]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda g: layerwise_lr(g, 0.1, float("nan")), r"decay: expected a number above 0 and up to 1, got nan"),
        (lambda g: layerwise_lr(g, 0.1, 1.1), r"decay: expected a number above 0 and up to 1, got 1\.1"),
        (lambda g: layerwise_lr(g, 0.1, 0.0), r"decay: expected a number above 0 and up to 1, got 0\.0"),
        (lambda g: layerwise_lr(g, -0.1), r"lr: expected a finite number >= 0, got -0\.1"),
        (lambda g: layerwise_lr(g, float("nan")), r"lr: expected a finite number >= 0, got nan"),
        (lambda g: layerwise_lr(g, 0.1, params=[]), r"group_options: expected options for all groups, got params"),
    ],
)
def test_what_makes_no_sense_is_refused(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(layer_groups(Stack()))


@pytest.mark.parametrize("groups", [[nn.Linear(2, 2)], nn.Linear(2, 2), [("weight", torch.ones(2))]])
def test_only_layer_groups_will_do(groups: Any) -> None:
    kind = type(groups).__name__ if isinstance(groups, nn.Module) else type(groups[0]).__name__
    with pytest.raises(TypeError, match=rf"groups: expected layer groups, .* got {kind}"):
        layerwise_lr(groups, 0.1)
