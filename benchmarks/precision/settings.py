"""How weights and moments are kept: the settings that every experiment compares."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fastft
from fastft.commands.bench import environment

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "precision"
WORK = ROOT / "build" / "precision"
"""For what could be made again: base models, results of ``--quick``."""

MOMENTS: dict[str, Any] = {"float32": torch.float32, "bfloat16": torch.bfloat16, "8bit": "8bit"}
"""By the name under which results list them: the value of ``state_dtype``."""


@dataclass(frozen=True)
class Weights:
    """A way to keep weights."""

    name: str
    dtype: torch.dtype = torch.bfloat16
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def stochastic(self) -> bool:
        """Whether a result depends on the seed of rounding."""
        return self.options.get("rounding") == "stochastic"

    @property
    def rounds(self) -> bool:
        """Whether small steps are lost for good: rounded to nearest, and nothing kept of the rest."""
        return self.dtype != torch.float32 and not self.options


FLOAT32 = Weights("float32", torch.float32)
NEAREST = Weights("bfloat16")
EXTRA_8 = Weights("bfloat16, extra_bits=8", options={"extra_bits": 8})
EXTRA_16 = Weights("bfloat16, extra_bits=16", options={"extra_bits": 16})
STOCHASTIC = Weights("bfloat16, stochastic", options={"rounding": "stochastic"})
EXTRA_8_STOCHASTIC = Weights("bfloat16, extra_bits=8, stochastic", options={"extra_bits": 8, "rounding": "stochastic"})
ALL = (FLOAT32, NEAREST, EXTRA_16, EXTRA_8, EXTRA_8_STOCHASTIC, STOCHASTIC)
BY_NAME = {weights.name: weights for weights in ALL}


class Tensors(nn.Module):
    """A model that is nothing but its parameters, which are copies of these values."""

    def __init__(self, values: Iterable[torch.Tensor], dtype: torch.dtype) -> None:
        super().__init__()
        self.all = nn.ParameterList(nn.Parameter(value.to(dtype, copy=True)) for value in values)


def adamw(model: nn.Module, weights: Weights, moments: str, seed: int = 0, **options: Any) -> fastft.AdamW:
    """The optimizer of a setting."""
    rounding = {"rounding_seed": seed} if weights.stochastic else {}
    state = {"state_dtype": MOMENTS[moments]}
    return fastft.AdamW(model.named_parameters(), **state, **weights.options, **rounding, **options)


def header() -> dict[str, Any]:
    """The machine, versions and commit; taken before the work, as another commit may be checked out by its end."""
    return {"environment": environment(torch.device("cpu"))}


def write(result: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def trim() -> None:
    """Give free memory back to the system, where the C library can."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
