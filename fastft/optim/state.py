"""The state of a parameter: its moments and step count, made and brought to where the step reads them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .tensors import is_dtensor, laid_out_like, runs_kernels

MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")


def moment_dtype(p: Tensor, state_dtype: torch.dtype | None) -> torch.dtype:
    """The dtype of its moments, for an optimizer with this ``state_dtype``."""
    wide = state_dtype is not None and p.dtype in (torch.bfloat16, torch.float16)
    return torch.float32 if wide else p.dtype


def prepare_state(
    state: dict[str, Any], p: Tensor, group: dict[str, Any], name: str, dtype: torch.dtype, counts_on_device: bool
) -> bool:
    """Make the state if there is none, and bring it into the parameter's memory order.

    Args:
        state: ``optimizer.state[p]``, filled in place.
        group: the parameter's group, whose flags say what is kept, and where.
        name: of the parameter, for messages.
        dtype: of new moments.
        counts_on_device: whether a kernel has to know whether the step is skipped, and so has to count.

    Returns whether the step count lies on the device, where a kernel counts.

    Raises:
        ValueError: for a state that lacks a tensor, or whose ``step`` is not one number.
    """
    names = MOMENTS if group["amsgrad"] else MOMENTS[:2]
    kernels = runs_kernels(p.device)
    on_device = bool(kernels and (group["capturable"] or group["fused"] or counts_on_device))
    if not state:
        default = torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32
        beside = group["capturable"] or group["fused"] or on_device
        state["step"] = (
            torch.zeros((), dtype=torch.float32, device=p.device)
            if beside
            else torch.zeros((), dtype=default, device="cpu")
        )
        for key in names:
            state[key] = torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format)
        return on_device
    missing = [key for key in ("step", *names) if not isinstance(state.get(key), Tensor)]
    if missing:
        raise ValueError(f"{name}: state: expected tensors for {', '.join(missing)}, got {sorted(state)}")
    for key in names:
        if not is_dtensor(p) and state[key].shape == p.shape:
            state[key] = laid_out_like(state[key], p)
    step = state["step"]
    if step.numel() != 1:
        raise ValueError(f"{name}: state: step: expected one number, got shape {list(step.shape)}")
    on_device = on_device or bool(kernels and step.device == p.device and step.device.type != "cpu")
    device = p.device if on_device else torch.device("cpu")
    if step.device != device or step.dtype not in (torch.float32, torch.float64)[: 1 if on_device else 2]:
        state["step"] = step.to(device, torch.float32)
    return on_device
