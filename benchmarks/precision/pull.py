"""How far an anchor alone pulls: gradient 0, weights 2 % from their anchor, lr·λ·steps = 3."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

import fastft
from fastft.optim import master_weights

from .settings import ALL, Tensors, Weights, adamw, header

NAME = "pull"
LR = 1e-4
PULLS, QUICK_PULLS = (0.001, 0.003, 0.01, 0.03), (0.03,)
"""lr·λ."""
TOTAL = 3.0
DISTANCE = 0.02
WEIGHT = 0.02
ELEMENTS, QUICK_ELEMENTS = 1 << 16, 1 << 12


def distance_left(weights: Weights, start: Tensor, anchor: Tensor, pull: float, steps: int) -> dict[str, float]:
    """Of the way to the anchor: along itself, in which random parts cancel, and as a length, in which they do not."""
    model = Tensors([anchor], weights.dtype)
    (p,) = model.all
    options = {"lr": LR, "weight_decay": 0.0, "anchor_decay": pull / LR}
    optimizer = adamw(model, weights, "float32", anchor=fastft.Anchor.snapshot(model), **options)
    with torch.no_grad():
        p.copy_(start)
    p.grad = torch.zeros_like(p)
    for _ in range(steps):
        optimizer.step()
    before = start.double() - anchor.double()
    after = master_weights(model, optimizer)["all.0"].double() - anchor.double()
    return {
        "along": float((after * before).sum() / before.square().sum()),
        "length": float(after.norm() / before.norm()),
    }


def measure(quick: bool) -> dict[str, Any]:
    """For each setting and each lr·λ, what is left."""
    begin = time.perf_counter()
    elements = QUICK_ELEMENTS if quick else ELEMENTS
    result = header()
    generator = torch.Generator().manual_seed(0)
    anchor = (WEIGHT * torch.randn(elements, generator=generator)).bfloat16().float()
    sides = torch.randint(2, (elements,), generator=generator) * 2 - 1
    start = (anchor * (1 + DISTANCE * sides)).bfloat16().float()
    rows = []
    for pull in QUICK_PULLS if quick else PULLS:
        steps = round(TOTAL / pull)
        for weights in ALL:
            left = distance_left(weights, start, anchor, pull, steps)
            exact = (1 - pull) ** steps
            rows.append({"pull": pull, "steps": steps, "exact": exact, "weights": weights.name, **left})
    result["problem"] = {"total": TOTAL, "distance": DISTANCE, "weight": WEIGHT, "elements": elements}
    return {**result, "rows": rows, "seconds": time.perf_counter() - begin}
