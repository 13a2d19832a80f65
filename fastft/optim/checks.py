"""Checks of arguments, shared by ``AdamW`` and ``adamw_``: each raises with the name, the expectation and the value."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastft import _C

from .tensors import KERNEL_DTYPES, is_dense, is_dtensor, is_wrapper, local


def check_max_grad_norm(max_grad_norm: float | None) -> None:
    """Raise unless it is None or a number above 0. With 0, which elsewhere means no clipping, nothing would move."""
    if max_grad_norm is not None and (not isinstance(max_grad_norm, (int, float)) or not max_grad_norm > 0.0):
        raise ValueError(f"max_grad_norm: expected None (no clipping) or a number > 0, got {max_grad_norm!r}")


def check_numbers(betas: tuple[float, float], eps: float, weight_decay: float, max_grad_norm: float | None) -> None:
    """Raise unless they are in the ranges that torch's AdamW accepts."""
    if not eps >= 0.0:
        raise ValueError(f"eps: expected a number >= 0, got {eps!r}")
    if not weight_decay >= 0.0:
        raise ValueError(f"weight_decay: expected a number >= 0, got {weight_decay!r}")
    for index, beta in enumerate(betas):
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"betas[{index}]: expected a number >= 0 and below 1, got {beta!r}")
    check_max_grad_norm(max_grad_norm)


def check_scalar(value: Tensor | None, name: str) -> None:
    """Raise unless it is None or holds one number."""
    if value is not None and value.numel() != 1:
        dtype = str(value.dtype).removeprefix("torch.")
        raise ValueError(f"{name}: expected one {dtype} on {value.device}, got {value.numel()} {dtype}")


def refuse_unusable(p: Tensor, name: str) -> None:
    """Raise for parameters that no implementation can step: they hold no values, or one place for several."""
    if p.is_meta:
        raise ValueError(f"{name}: expected a parameter with memory, got one on the meta device")
    if p.layout == torch.strided and any(n > 1 and s == 0 for n, s in zip(p.shape, p.stride(), strict=True)):
        raise ValueError(
            f"{name}: expected a parameter whose elements each have memory of their own, got an expanded tensor "
            f"of shape {list(p.shape)} and strides {list(p.stride())}; pass a contiguous copy"
        )


def why_not_fused(p: Tensor, group: dict[str, Any]) -> str | None:
    """Why torch's own step must take ``p``; None if ours can."""
    if group["differentiable"]:
        return "differentiable=True"
    if p.layout != torch.strided or (p.grad is not None and p.grad.layout != torch.strided):
        return "a sparse gradient"
    if p.dtype not in KERNEL_DTYPES:
        return f"dtype {p.dtype}"
    if not is_dtensor(p) and is_wrapper(p):
        return f"the tensor subclass {type(p).__name__}"
    if p.device.type not in ("cpu", *_C.kernel_devices):
        return f"device {p.device}"
    if not is_dense(local(p)):
        return "gaps in its memory"
    if any(isinstance(beta, Tensor) and beta.device.type != "cpu" for beta in group["betas"]):
        return "betas on a GPU"
    return None
