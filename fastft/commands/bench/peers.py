"""Other libraries' AdamW, where they are installed."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch.nn import Parameter

ADAMW: dict[str, Any] = {"lr": 1e-3, "weight_decay": 0.5}


class Absent(Exception):
    """A peer cannot be measured here; the message is the reason."""


def module(name: str, package: str) -> Any:
    """Import a module.

    Raises:
        Absent: it cannot be imported.
    """
    try:
        return importlib.import_module(name)
    except Exception as error:  # a foreign package may fail in any way while it is imported
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise Absent(f"{package} cannot be imported: {reason}") from error


def needs_cuda(params: list[Parameter], package: str) -> None:
    if params[0].device.type != "cuda":
        raise Absent(f"{package}'s AdamW is for CUDA only")


def optimi(params: list[Parameter]) -> torch.optim.Optimizer:
    # Kahan summation, its default for 16-bit parameters, keeps another tensor and is another algorithm.
    cls = module("optimi", "torch-optimi").AdamW
    return cls(params, betas=(0.9, 0.999), eps=1e-8, kahan_sum=False, **ADAMW)  # type: ignore[no-any-return]


def torchao_8bit(params: list[Parameter]) -> torch.optim.Optimizer:
    return module("torchao.optim", "torchao").AdamW8bit(params, **ADAMW)  # type: ignore[no-any-return]


def bitsandbytes(params: list[Parameter]) -> torch.optim.Optimizer:
    return module("bitsandbytes", "bitsandbytes").optim.AdamW(params, **ADAMW)  # type: ignore[no-any-return]


def bitsandbytes_8bit(params: list[Parameter]) -> torch.optim.Optimizer:
    return module("bitsandbytes", "bitsandbytes").optim.AdamW8bit(params, **ADAMW)  # type: ignore[no-any-return]


def apex(params: list[Parameter]) -> torch.optim.Optimizer:
    needs_cuda(params, "apex")
    return module("apex.optimizers", "apex").FusedAdam(params, adam_w_mode=True, **ADAMW)  # type: ignore[no-any-return]


def transformer_engine(params: list[Parameter]) -> torch.optim.Optimizer:
    needs_cuda(params, "TransformerEngine")
    cls = module("transformer_engine.pytorch.optimizers", "transformer_engine").FusedAdam
    return cls(params, adam_w_mode=True, **ADAMW)  # type: ignore[no-any-return]


Make = Callable[[list[Parameter]], torch.optim.Optimizer]
PEERS: dict[str, Make] = {
    "optimi": optimi,
    "torchao 8-bit": torchao_8bit,
    "bitsandbytes": bitsandbytes,
    "bitsandbytes 8-bit": bitsandbytes_8bit,
    "apex": apex,
    "TransformerEngine": transformer_engine,
}
SAME_RESULT = ("optimi",)
"""Those whose parameters equal fastft's. Their moments differ, as they are kept without their bias."""
PACKAGES = ("torch-optimi", "torchao", "bitsandbytes", "apex", "transformer-engine", "triton", "transformers")


def versions() -> dict[str, str]:
    """The version of each peer, or "not installed"."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
