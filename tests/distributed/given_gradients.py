"""A model whose gradients are given: each layer's forward pass is linear in its parameters, with chosen factors.

So a real backward pass, through whatever wraps the model, gives exactly the gradients that one process is given by
hand. They are multiples of 1/16: neither averages over 2 or 4 processes nor sums of squares round, in float64 or in
bfloat16, and what several processes compute can be held to the bits of one.
"""

from __future__ import annotations

import zlib
from collections import OrderedDict
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastft.names import bare

STEPS = 6
SPOILT_STEP = 2
"""The step in which one element is inf, where a scenario asks for it."""
HEAD = "head"
"""The layer with options of its own."""
OPTIONS: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1, "eps": 1e-4}
HEAD_OPTIONS: dict[str, Any] = {"lr": 3e-3, "weight_decay": 0.02}
ANCHOR_DECAY, HEAD_ANCHOR_DECAY = 3.0, 11.0


def linear_in(layer: nn.Module, x: Tensor) -> Tensor:
    """``x``, and the sum of the layer's parameters times what they are given as gradients."""
    for name, grad in layer.given.items():
        x = x + (getattr(layer, name) * grad).sum()
    return x


class GivenLinear(nn.Linear):
    """Parameters as ``nn.Linear`` has them, which tensor parallelism knows; ``given`` holds their gradients by name."""

    def forward(self, x: Tensor) -> Tensor:
        return linear_in(self, x)


class GivenNorm(nn.LayerNorm):
    """Parameters as ``nn.LayerNorm`` has them."""

    def forward(self, x: Tensor) -> Tensor:
        return linear_in(self, x)


LAYERS = (GivenLinear, GivenNorm)


def model(dtype: torch.dtype, seed: int = 0, layers: Collection[str] = ()) -> nn.Sequential:
    """Over four processes cut unevenly (17 rows), so that one has nothing (3 rows), or three (1 row).

    Args:
        dtype: of the parameters.
        seed: of their values.
        layers: the names of those to take; none: all but the square one, which is cut evenly.
    """
    made = {
        "first": GivenLinear(5, 17),
        "norm": GivenNorm(17),
        "second": GivenLinear(17, 3),
        HEAD: GivenLinear(3, 1),
        "square": GivenLinear(4, 4, bias=False),
    }
    chosen = layers or [name for name in made if name != "square"]
    built = nn.Sequential(OrderedDict((name, made[name]) for name in chosen))
    with torch.no_grad():
        for name, p in built.named_parameters():
            p.copy_(numbers(p.shape, name, seed) * 0.5)
    return built.to(dtype)


def numbers(shape: Iterable[int], name: str, seed: int) -> Tensor:
    """Normally distributed, float64; the same ones for the same name and seed."""
    generator = torch.Generator().manual_seed(1000 * seed + zlib.crc32(name.encode()) % 1000)
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float64)


def gradients(shapes: Mapping[str, Any], dtype: torch.dtype, step: int, *, spoilt: bool, exact: bool) -> dict[str, Any]:
    """{name: whole gradient} of a step.

    Args:
        shapes: {name: shape} of all parameters.
        dtype: of the parameters.
        step: of which they are.
        spoilt: whether the last row of one parameter, which lies in one process, has an inf in ``SPOILT_STEP``.
        exact: whether they are multiples of 1/16; else any numbers, whose squares round when they are added up.
    """
    found = {name: numbers(shape, name, 10 + step) for name, shape in shapes.items()}
    if exact:
        found = {name: (grad * 16).round().clamp(-64, 64) / 16 for name, grad in found.items()}
    if spoilt and step == SPOILT_STEP:
        found["second.weight"][-1, 0] = float("inf")
    return {name: grad.to(dtype) for name, grad in found.items()}


def groups(
    named: Iterable[tuple[str, Tensor]], *, anchored: bool, with_names: bool = True, together: bool = False
) -> list[dict[str, Any]]:
    """Two parameter groups: the head with its own learning rate, decay and anchor decay, and the rest.

    Args:
        named: all parameters.
        anchored: whether there is an anchor.
        with_names: whether the groups have them.
        together: one group instead.
    """
    if together:
        return [{"params": [(name, p) if with_names else p for name, p in named]}]
    body: list[Any] = []
    head: list[Any] = []
    for name, p in named:
        (head if bare(name).startswith(HEAD) else body).append((name, p) if with_names else p)
    own = {"anchor_decay": HEAD_ANCHOR_DECAY} if anchored else {}
    return [group for group in ({"params": body}, {"params": head, **HEAD_OPTIONS, **own}) if group["params"]]
