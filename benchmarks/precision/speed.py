"""A step's time in each setting, against the plain float32 step and against the bytes that it moves.

All steps take turns in one process. Other libraries' are measured where they are installed.
"""

from __future__ import annotations

import gc
import importlib
import importlib.metadata
import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import fastft
from fastft.commands.bench import Measurement, Work, alternate, significant

from .settings import (
    EXTRA_8,
    EXTRA_8_STOCHASTIC,
    EXTRA_16,
    FLOAT32,
    NEAREST,
    STOCHASTIC,
    Tensors,
    Weights,
    adamw,
    header,
)

NAME = "speed"
SIZES = {"8M": ((1024, 1024),) * 8, "30M": ((2048, 1024),) * 15}
QUICK_SIZES = {"16k": ((64, 64),) * 4}
ROUNDS, QUICK_ROUNDS = 41, 5
SECONDS = 60.0
LR, WEIGHT_DECAY, ANCHOR_DECAY, MAX_GRAD_NORM = 1e-4, 0.01, 10.0, 1.0
PLAIN = "float32, float32 moments"
COMPOSITION = "torch: clip, anchor, fused AdamW, bfloat16"
OURS = "bfloat16, bfloat16 moments, clip, anchor"
SETTINGS: tuple[tuple[Weights, str], ...] = (
    (FLOAT32, "float32"),
    (FLOAT32, "bfloat16"),
    (FLOAT32, "8bit"),
    (NEAREST, "bfloat16"),
    (NEAREST, "float32"),
    (EXTRA_16, "float32"),
    (EXTRA_16, "8bit"),
    (EXTRA_8, "float32"),
    (EXTRA_8, "8bit"),
    (EXTRA_8_STOCHASTIC, "8bit"),
    (STOCHASTIC, "float32"),
    (STOCHASTIC, "8bit"),
)
Make = Callable[[tuple[tuple[int, ...], ...]], tuple[Work, float | None]]
"""From shapes to a step, and the bytes that it must move for each element."""


def model_of(shapes: tuple[tuple[int, ...], ...], dtype: torch.dtype) -> Tensors:
    """Parameters, each with a gradient."""
    generator = torch.Generator().manual_seed(0)
    model = Tensors((0.02 * torch.randn(shape, generator=generator) for shape in shapes), dtype)
    for p in model.all:
        p.grad = torch.randn(p.shape, generator=generator).to(dtype)
    return model


def traffic(weights: Weights, moments: str, anchored: bool) -> float:
    """Bytes read and written for each element: weight, low bits and moments both ways, gradient and anchor once.

    With the anchor goes clipping, which reads the gradient once more.
    """
    weight = weights.dtype.itemsize
    low = weights.options.get("extra_bits", 0) / 8
    moment = {"float32": 4.0, "bfloat16": 2.0, "8bit": 1 + 4 / 256}[moments]
    return 2 * (weight + low + 2 * moment) + weight + (2 * weight if anchored else 0)


def ours(shapes: tuple[tuple[int, ...], ...], weights: Weights, moments: str, anchored: bool) -> tuple[Work, float]:
    model = model_of(shapes, weights.dtype)
    options: dict[str, Any] = {"lr": LR, "weight_decay": WEIGHT_DECAY}
    if anchored:
        options |= {"anchor": fastft.Anchor.snapshot(model), "anchor_decay": ANCHOR_DECAY}
        options |= {"max_grad_norm": MAX_GRAD_NORM}
    optimizer = adamw(model, weights, moments, **options)
    return optimizer.step, traffic(weights, moments, anchored)


def composition(shapes: tuple[tuple[int, ...], ...]) -> tuple[Work, None]:
    """The code of a torch user: clipping, the pull and the step, each over all of memory."""
    params: list[nn.Parameter] = list(model_of(shapes, torch.bfloat16).parameters())
    anchors = [p.detach().clone() for p in params]
    tensors: list[Tensor] = list(params)
    optimizer = torch.optim.AdamW(params, lr=LR, weight_decay=WEIGHT_DECAY, fused=True)

    @torch.no_grad()
    def step() -> None:
        nn.utils.clip_grad_norm_(params, MAX_GRAD_NORM)
        torch._foreach_lerp_(tensors, anchors, LR * ANCHOR_DECAY)
        optimizer.step()

    return step, None


def peer(shapes: tuple[tuple[int, ...], ...], module: str, name: str) -> tuple[Work, None]:
    cls: Any = importlib.import_module(module)
    for part in name.split("."):
        cls = getattr(cls, part)
    params = list(model_of(shapes, torch.bfloat16).parameters())
    return cls(params, lr=LR, weight_decay=WEIGHT_DECAY).step, None


PEERS: dict[str, tuple[str, Make]] = {
    "torchao AdamW8bit, bfloat16": ("torchao", partial(peer, module="torchao.optim", name="AdamW8bit")),
    "bitsandbytes AdamW8bit, bfloat16": ("bitsandbytes", partial(peer, module="bitsandbytes", name="optim.AdamW8bit")),
    "optimi AdamW, bfloat16 with Kahan summation": ("torch-optimi", partial(peer, module="optimi", name="AdamW")),
}
"""{title: (package, how it is made)}."""


def makers() -> dict[str, Make]:
    """Our steps and torch's composition; the first is what all are measured against."""
    made: dict[str, Make] = {
        f"{weights.name}, {moments} moments": partial(ours, weights=weights, moments=moments, anchored=False)
        for weights, moments in SETTINGS
    }
    anchored = (
        (FLOAT32, "float32"),
        (NEAREST, "bfloat16"),
        (EXTRA_16, "float32"),
        (EXTRA_16, "8bit"),
        (EXTRA_8, "8bit"),
    )
    for weights, moments in anchored:
        title = f"{weights.name}, {moments} moments, clip, anchor"
        made[title] = partial(ours, weights=weights, moments=moments, anchored=True)
    return {**made, COMPOSITION: composition}


def ready(makers: dict[str, Make], shapes: tuple[tuple[int, ...], ...]) -> tuple[dict[str, Work], dict[str, float]]:
    """Steps that have been taken once, and the bytes of ours."""
    works, nbytes = {}, {}
    for title, make in makers.items():
        works[title], moved = make(shapes)
        works[title]()
        if moved is not None:
            nbytes[title] = moved
    return works, nbytes


def rows_of(
    measured: Measurement, baseline: str, nbytes: dict[str, float], shapes: tuple[tuple[int, ...], ...]
) -> list[dict[str, Any]]:
    elements = sum(map(math.prod, shapes))
    rows = []
    for title in measured.seconds:
        ratio = measured.ratio(title, baseline)
        row = {"title": title, "ms": significant(1e3 * measured.median(title)), "rounds": measured.rounds}
        row |= {"ratio": ratio.of_medians, "ratio_quartiles": [ratio.lower, ratio.upper]}
        if title in nbytes:
            share = nbytes[title] / nbytes[baseline]
            row |= {"bytes": nbytes[title], "share": share, "over_share": ratio.of_medians / share}
            row["gb_per_s"] = nbytes[title] * elements / measured.median(title) / 1e9
        rows.append(row)
    return rows


def against(shapes: tuple[tuple[int, ...], ...], rounds: int) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Other libraries' 16-bit steps, each alternating with ours of the same bytes; and why one was not measured."""
    rows, absent = [], {}
    own = f"{EXTRA_8.name}, 8bit moments"
    for title, (package, make) in PEERS.items():
        try:
            mine = partial(ours, weights=EXTRA_8, moments="8bit", anchored=False)
            works, _ = ready({own: mine, title: make}, shapes)
        except Exception as error:  # a foreign package may fail in any way
            absent[title] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            continue
        measured = alternate(works, torch.device("cpu"), rounds, seconds_at_most=SECONDS / 2)
        ratio = measured.ratio(title, own)
        rows.append(
            {
                "title": title,
                "version": importlib.metadata.version(package),
                "against": own,
                "ms": significant(1e3 * measured.median(title)),
                "own_ms": significant(1e3 * measured.median(own)),
                "ratio": ratio.of_medians,
                "ratio_quartiles": [ratio.lower, ratio.upper],
            }
        )
    return rows, absent


def measure(quick: bool) -> dict[str, Any]:
    """Ours and torch's composition at each size, then other libraries at the first."""
    begin = time.perf_counter()
    result = header()
    rounds = QUICK_ROUNDS if quick else ROUNDS
    sizes: dict[str, Any] = {}
    shapes_by_name = QUICK_SIZES if quick else SIZES
    for name, shapes in shapes_by_name.items():
        works, nbytes = ready(makers(), shapes)
        measured = alternate(works, torch.device("cpu"), rounds, seconds_at_most=SECONDS)
        rows = rows_of(measured, PLAIN, nbytes, shapes)
        composed = measured.ratio(OURS, COMPOSITION)
        quartiles = [composed.lower, composed.upper]
        sizes[name] = {"rows": rows, "composition": {"ratio": composed.of_medians, "ratio_quartiles": quartiles}}
        del works
        gc.collect()
    peers: list[dict[str, Any]] = []
    absent: dict[str, str] = {}
    if not quick:
        peers, absent = against(next(iter(shapes_by_name.values())), rounds)
    return {**result, "sizes": sizes, "peers": peers, "absent": absent, "seconds": time.perf_counter() - begin}
