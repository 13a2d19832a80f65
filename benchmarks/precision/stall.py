"""How much of many small steps is left: the way that weights went, against that of a float32 run.

All settings get the same gradients, in bfloat16, from the same start: a constant direction plus noise, each element at
a scale of its own. At lr 6e-6 a step is a twentieth of what a bfloat16 weight of 0.02 can hold.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from fastft.optim import master_weights

from .settings import ALL, FLOAT32, MOMENTS, Tensors, Weights, adamw, header

NAME = "stall"
LR = 6e-6
STEPS, QUICK_STEPS = 1000, 30
SHAPE, QUICK_SHAPE = (256, 512), (64, 128)
SEEDS, QUICK_SEEDS = 16, 2
"""Of stochastic rounding: what is right in expectation shows in an average."""
WEIGHT = 0.02
NOISE = 3.0
"""Standard deviation of the gradient's noise, the direction's being 1."""
SPREAD = 1.0
"""Of the logarithm of an element's gradient scale: moments in 8 bits share a scale among unequal elements."""


class Run:
    """One setting, with one seed of rounding."""

    def __init__(self, start: Tensor, weights: Weights, moments: str, seed: int) -> None:
        self.weights, self.moments = weights, moments
        self.model = Tensors([start], weights.dtype)
        self.start = start
        self.optimizer = adamw(self.model, weights, moments, seed, lr=LR, weight_decay=0.0)

    def step(self, grad: Tensor) -> None:
        (p,) = self.model.all
        p.grad = grad if p.dtype == grad.dtype else grad.to(p.dtype)
        self.optimizer.step()

    def way(self, *, master: bool) -> Tensor:
        """How far each element went: of the weight itself, or of the float32 that weight and low bits stand for."""
        now = master_weights(self.model, self.optimizer)["all.0"] if master else self.model.all[0].detach()
        return now.double() - self.start.double()


def gradients(steps: int, shape: tuple[int, ...], generator: torch.Generator) -> Any:
    """One bfloat16 gradient after the other."""
    scale = (SPREAD * torch.randn(shape, generator=generator)).exp() * 1e-3
    direction = torch.randn(shape, generator=generator)
    for _ in range(steps):
        noise = NOISE * torch.randn(shape, generator=generator)
        yield (scale * (direction + noise)).bfloat16()


def cosine(a: Tensor, b: Tensor) -> float:
    """0 where nothing moved."""
    lengths = float(a.norm() * b.norm())
    return float((a * b).sum()) / lengths if lengths else 0.0


def measure(quick: bool) -> dict[str, Any]:
    """Each setting's way, against that of float32 weights with float32 moments."""
    begin = time.perf_counter()
    steps, shape = (QUICK_STEPS, QUICK_SHAPE) if quick else (STEPS, SHAPE)
    seeds = QUICK_SEEDS if quick else SEEDS
    result = header()
    generator = torch.Generator().manual_seed(0)
    start = (WEIGHT * torch.randn(shape, generator=generator)).bfloat16().float()
    runs = {
        (weights.name, moments): [
            Run(start, weights, moments, seed) for seed in range(seeds if weights.stochastic else 1)
        ]
        for weights in ALL
        for moments in MOMENTS
    }
    for grad in gradients(steps, shape, generator):
        for group in runs.values():
            for run in group:
                run.step(grad)
    reference = runs[FLOAT32.name, "float32"][0].way(master=True)
    rows = []
    for (weights, moments), group in runs.items():
        ways = [run.way(master=True) for run in group]
        stored = [run.way(master=False) for run in group]
        mean = torch.stack(ways).mean(0)
        rows.append(
            {
                "weights": weights,
                "moments": moments,
                "seeds": len(group),
                "cosine": cosine(mean, reference),
                "cosine_of_stored": cosine(torch.stack(stored).mean(0), reference),
                "cosine_of_one": sum(cosine(way, reference) for way in ways) / len(ways),
                "along": float((mean * reference).sum() / reference.square().sum()),
                "moved": sum(float((way != 0).double().mean()) for way in stored) / len(stored),
            }
        )
    result["problem"] = {
        "lr": LR,
        "steps": steps,
        "elements": start.numel(),
        "weight": WEIGHT,
        "noise": NOISE,
        "spread": SPREAD,
        "seeds": seeds,
    }
    return {**result, "rows": rows, "seconds": time.perf_counter() - begin}
