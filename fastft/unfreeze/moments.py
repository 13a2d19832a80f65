"""The optimizer's state of closed parameters: dropped, or moved to host memory and back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from fastft.optim.state import LOW_BITS


def drop(optimizer: Optimizer, params: Iterable[Tensor]) -> None:
    """Forget the state; the next step with a gradient starts at t = 1. Low bits stay: they are part of the weights."""
    for p in params:
        state = optimizer.state.pop(p, {})
        if LOW_BITS in state:
            optimizer.state[p] = {LOW_BITS: state[LOW_BITS]}


def offload(optimizer: Optimizer, params: Iterable[Tensor]) -> None:
    """Bring the moments of parameters on an accelerator to pinned host memory; their own memory becomes free."""
    for state, p, key, value in moments(optimizer, params):
        if value.device == p.device and p.device.type != "cpu" and type(value) is Tensor:
            state[key] = torch.empty_like(value, device="cpu", pin_memory=True).copy_(value)


def bring_back(optimizer: Optimizer, params: Iterable[Tensor]) -> None:
    """Undo :func:`offload`."""
    for state, p, key, value in moments(optimizer, params):
        if value.device != p.device and type(value) is Tensor:
            state[key] = value.to(p.device)


def state_bytes(optimizer: Optimizer, params: Iterable[Tensor]) -> tuple[int, int]:
    """(bytes of the state, bytes of it on another device than its parameter)."""
    total = away = 0
    for p in params:
        total += sum(v.nbytes for v in optimizer.state.get(p, {}).values() if isinstance(v, Tensor))
    for _, p, _, value in moments(optimizer, params):
        away += value.nbytes if value.device != p.device else 0
    return total, away


def moments(optimizer: Optimizer, params: Iterable[Tensor]) -> Iterator[tuple[dict[str, Any], Tensor, str, Tensor]]:
    """(state, parameter, key, tensor) of every tensor in the state that has its parameter's shape.

    A step count has none of its own: it stays where the optimizer keeps it.
    """
    for p in params:
        state = optimizer.state.get(p, {})
        for key, value in list(state.items()):
            if isinstance(value, Tensor) and value.dim() > 0 and value.shape == p.shape:
                yield state, p, key, value
