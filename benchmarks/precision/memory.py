"""Bytes per parameter, measured: the process's memory after two steps, and its highest, less that before the model.

Each setting has a process of its own, which first trains a tiny model of the same setting, so that code and caches are
in memory when the count begins. The model is a chain of linear layers in which a gradient is made after the other.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fastft
from fastft.optim import step_in_backward

from .settings import (
    BY_NAME,
    EXTRA_8,
    EXTRA_8_STOCHASTIC,
    EXTRA_16,
    FLOAT32,
    NEAREST,
    ROOT,
    STOCHASTIC,
    adamw,
    header,
    trim,
)

NAME = "memory"
LAYERS, WIDTH = 96, 1024
QUICK_LAYERS, QUICK_WIDTH = 8, 512
ROWS = 2
STEPS = 2
SURROUNDINGS = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
"""Threads have buffers of their own, so there is one. And the C library gives what is freed back at once, as it does
with blocks above 32 MB in any case: a large model's tensors."""
STATUS = Path("/proc/self/status")


@dataclass(frozen=True)
class Kept:
    """Formats in memory, and what lies there beside weights and gradients."""

    weights: str
    moments: str
    anchor: str | None = None
    """The dtype of an anchor."""
    in_backward: bool = False
    """Each parameter is stepped as soon as its gradient is there, which is then freed."""

    @property
    def title(self) -> str:
        parts = [self.weights, f"{self.moments} moments"]
        parts += [f"{self.anchor} anchor"] if self.anchor else []
        return ", ".join([*parts, *(["step in the backward pass"] if self.in_backward else [])])

    @property
    def counted(self) -> float:
        """Bytes per parameter, by what each part of it takes, without one layer's gradient."""
        weights = BY_NAME[self.weights]
        size = {"float32": 4, "bfloat16": 2}
        weight = weights.dtype.itemsize
        moments = 2 * (1 + 4 / 256) if self.moments == "8bit" else 2 * size[self.moments]
        gradient = 0 if self.in_backward else weight
        anchor = size[self.anchor] if self.anchor else 0
        return float(weight + gradient + weights.options.get("extra_bits", 0) / 8 + moments + anchor)


SETTINGS = (
    Kept(FLOAT32.name, "float32"),
    Kept(FLOAT32.name, "8bit"),
    Kept(NEAREST.name, "bfloat16"),
    Kept(NEAREST.name, "float32"),
    Kept(EXTRA_16.name, "float32"),
    Kept(EXTRA_16.name, "8bit"),
    Kept(EXTRA_8.name, "8bit"),
    Kept(EXTRA_8_STOCHASTIC.name, "8bit"),
    Kept(STOCHASTIC.name, "8bit"),
    Kept(EXTRA_8.name, "8bit", anchor="bfloat16"),
    Kept(EXTRA_8.name, "8bit", in_backward=True),
    Kept(EXTRA_8.name, "8bit", anchor="bfloat16", in_backward=True),
)
QUICK_SETTINGS = (SETTINGS[0], SETTINGS[6], SETTINGS[11])


def in_memory(field: str) -> int:
    """Bytes of this process, by a field of /proc/self/status: VmRSS, or VmHWM for its highest."""
    for line in STATUS.read_text(encoding="ascii").splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"{STATUS}: expected a line of {field}")


def chain(layers: int, width: int, dtype: torch.dtype) -> nn.Sequential:
    """Made in its dtype: weights that are first made in another leave their mark on the highest memory."""
    return nn.Sequential(*(nn.Linear(width, width, bias=False, dtype=dtype) for _ in range(layers)))


def train(kept: Kept, layers: int, width: int) -> tuple[nn.Module, fastft.AdamW]:
    """Two steps; the gradients of the second stay, as they do until they are set to None."""
    weights = BY_NAME[kept.weights]
    model = chain(layers, width, weights.dtype)
    options: dict[str, Any] = {"lr": 1e-4, "weight_decay": 0.01}
    if kept.anchor:
        anchor = fastft.Anchor.snapshot(model, dtype=getattr(torch, kept.anchor))
        options |= {"anchor": anchor, "anchor_decay": 10.0}
    optimizer = adamw(model, weights, kept.moments, **options)
    if kept.in_backward:
        step_in_backward(optimizer)
    for _ in range(STEPS):
        optimizer.zero_grad()
        model(torch.randn(ROWS, width, dtype=weights.dtype)).sum().backward()
        optimizer.step()
    return model, optimizer


def child(kept: Kept, layers: int, width: int) -> dict[str, Any]:
    """In a process of its own."""
    model, optimizer = train(kept, 2, 64)
    del model, optimizer
    gc.collect()
    trim()
    baseline = in_memory("VmRSS")
    model, optimizer = train(kept, layers, width)
    gc.collect()
    trim()
    parameters = sum(p.numel() for p in model.parameters())
    after, peak = in_memory("VmRSS") - baseline, in_memory("VmHWM") - baseline
    state = sum(t.nbytes for values in optimizer.state.values() for t in values.values() if torch.is_tensor(t))
    return {
        "parameters": parameters,
        "bytes_per_parameter": after / parameters,
        "peak_bytes_per_parameter": peak / parameters,
        "state_bytes_per_parameter": state / parameters,
    }


def measure(quick: bool) -> dict[str, Any]:
    """A process for each setting, one after the other."""
    begin = time.perf_counter()
    result = header()
    layers, width = (QUICK_LAYERS, QUICK_WIDTH) if quick else (LAYERS, WIDTH)
    rows = []
    for kept in QUICK_SETTINGS if quick else SETTINGS:
        command = [sys.executable, "-m", __spec__.name, json.dumps(asdict(kept)), f"{layers}", f"{width}"]
        surroundings = {**os.environ, **SURROUNDINGS}
        done = subprocess.run(command, cwd=ROOT, env=surroundings, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{kept.title}: {done.stderr[-2000:]}")
        row = {**asdict(kept), "title": kept.title, "counted": kept.counted, **json.loads(done.stdout.splitlines()[-1])}
        rows.append(row)
        print(f"{kept.title}: {row['bytes_per_parameter']:.2f}, peak {row['peak_bytes_per_parameter']:.2f}", flush=True)
    return {**result, "rows": rows, "seconds": time.perf_counter() - begin}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("kept", type=json.loads)
    parser.add_argument("layers", type=int)
    parser.add_argument("width", type=int)
    parsed = parser.parse_args()
    print(json.dumps(child(Kept(**parsed.kept), parsed.layers, parsed.width)))
