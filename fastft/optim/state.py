"""The state of a parameter: made, checked, and brought to the formats and the place in which the step reads it.

Keys of ``optimizer.state[p]``: ``step``; the moments ``exp_avg``, ``exp_avg_sq`` and, with amsgrad,
``max_exp_avg_sq``; in 8 bits, in place of a moment, its ``_codes`` (uint8, like p) and ``_scales`` (float32, of
``formats.scales_shape``); ``low_bits`` beside a bfloat16 parameter (uint16 or uint8, like p). In a state dict and in
a pickle, 16 low bits are bytes: uint8 with one more dimension of 2. ``pickle``, gloo and NCCL do not take uint16.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .dtensors import like, spread_like
from .formats import FORMATS, decode8, encode8, resized, scales_shape
from .low_precision import Precision
from .tensors import is_dtensor, laid_out_like, local, runs_kernels

MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
LOW_BITS = "low_bits"
CODED = {key: (f"{key}_codes", f"{key}_scales") for key in FORMATS}
"""The keys of a moment's codes and scales, by the moment's own."""
OWN_KEYS = (LOW_BITS, *(key for pair in CODED.values() for key in pair))
"""Those that torch's AdamW does not know."""


def prepare_state(
    state: dict[str, Any], p: Tensor, group: dict[str, Any], name: str, precision: Precision, counts_on_device: bool
) -> bool:
    """Make the state if there is none, and bring it into the parameter's memory order and the optimizer's formats.

    Args:
        state: ``optimizer.state[p]``, filled in place. Low bits alone are no state: they are part of the weight.
        group: the parameter's group, whose flags say what is kept, and where.
        name: of the parameter, for messages.
        precision: the formats. Moments that are kept as floating-point numbers keep the dtype that they have.
        counts_on_device: whether a kernel has to know whether the step is skipped, and so has to count.

    Returns whether the step count lies on the device, where a kernel counts.

    Raises:
        ValueError: for a state that lacks a tensor or has one that does not fit, or whose ``step`` is not one number.
    """
    names = MOMENTS if group["amsgrad"] else MOMENTS[:2]
    kernels = runs_kernels(p.device)
    on_device = bool(kernels and (group["capturable"] or group["fused"] or counts_on_device))
    if not state.keys() - {LOW_BITS}:
        check_own_state(state, p, f"{name}: state")
        default = torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32
        beside = group["capturable"] or group["fused"] or on_device
        state["step"] = (
            torch.zeros((), dtype=torch.float32, device=p.device)
            if beside
            else torch.zeros((), dtype=default, device="cpu")
        )
        for key in names:
            state.update(new_moment(p, key, precision))
        add_low_bits(state, p, precision)
        return on_device
    check_own_state(state, p, f"{name}: state")
    missing = [
        key
        for key in ("step", *names)
        if not isinstance(state.get(key), Tensor) and CODED.get(key, (key,))[0] not in state.keys() - {key}
    ]
    if missing:
        raise ValueError(f"{name}: state: expected tensors for {', '.join(missing)}, got {sorted(state)}")
    as_codes = precision.moments(p) == "8bit"
    if any((CODED[key][0] in state) != as_codes for key in CODED):
        bring_moments(state, p, precision, f"{name}: state")
    add_low_bits(state, p, precision)
    for key in (*names, LOW_BITS, *(codes for codes, _ in CODED.values())):
        if key in state and not is_dtensor(p) and state[key].shape == p.shape:
            state[key] = laid_out_like(state[key], p)
    step = state["step"]
    if step.numel() != 1:
        raise ValueError(f"{name}: state: step: expected one number, got shape {list(step.shape)}")
    on_device = on_device or bool(kernels and step.device == p.device and step.device.type != "cpu")
    device = p.device if on_device else torch.device("cpu")
    if step.device != device or step.dtype not in (torch.float32, torch.float64)[: 1 if on_device else 2]:
        state["step"] = step.to(device, torch.float32)
    return on_device


def new_moment(p: Tensor, key: str, precision: Precision) -> dict[str, Tensor]:
    """The entries of a moment that is 0."""
    kept = precision.moments(p)
    if kept != "8bit":
        return {key: torch.zeros_like(p, dtype=kept, memory_format=torch.preserve_format)}
    codes, scales = CODED[key]
    stepped = local(p)
    zeros = torch.zeros(scales_shape(stepped.shape), dtype=torch.float32, device=stepped.device)
    return {
        codes: torch.zeros_like(p, dtype=torch.uint8, memory_format=torch.preserve_format),
        scales: spread_like(zeros, p, scales_shape(p.shape)),
    }


def add_low_bits(state: dict[str, Any], p: Tensor, precision: Precision) -> None:
    """Low bits in the width that the optimizer keeps: those that are there, or 0; without any, none."""
    dtype, known = precision.low_dtype(p), state.get(LOW_BITS)
    if dtype is None:
        state.pop(LOW_BITS, None)
    elif known is None:
        state[LOW_BITS] = torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format)
    elif known.dtype != dtype:
        state[LOW_BITS] = spread_like(resized(local(known), dtype), p, p.shape)


def check_own_state(state: Mapping[str, Any], p: Tensor, where: str) -> None:
    """Raise for codes, scales or low bits that do not fit the parameter."""
    if LOW_BITS in state:
        check_like(state[LOW_BITS], (torch.uint16, torch.uint8), tuple(p.shape), f"{where}: {LOW_BITS}")
    if any(key in state for pair in CODED.values() for key in pair):
        for codes, scales in CODED.values():
            check_like(state.get(codes), (torch.uint8,), tuple(p.shape), f"{where}: {codes}")
            check_like(state.get(scales), (torch.float32,), scales_shape(p.shape), f"{where}: {scales}")


def check_like(tensor: Any, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...], where: str) -> None:
    """Raise unless it is a tensor of one of the dtypes and of the shape."""
    names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{where}: expected {names} of shape {list(shape)}, got {type(tensor).__name__}")
    if tensor.dtype not in dtypes or tuple(tensor.shape) != shape:
        raise ValueError(
            f"{where}: expected {names} of shape {list(shape)}, got {str(tensor.dtype).removeprefix('torch.')} of "
            f"shape {list(tensor.shape)}"
        )


def bring_moments(state: dict[str, Any], p: Tensor, precision: Precision, where: str) -> None:
    """Moments in the optimizer's format, in place: codes to numbers or numbers to codes, and numbers in its dtype."""
    kept = precision.moments(p)
    for key in MOMENTS:
        codes, scales = CODED.get(key, ("", ""))
        if kept == "8bit" and key in state and codes:
            check_moment(state, p, key, where)
            values = local(like(state[key], p)).to(p.device).contiguous()
            found = encode8(values, FORMATS[key])
            state[codes] = spread_like(found[0], p, p.shape)
            state[scales] = spread_like(found[1], p, scales_shape(p.shape))
            del state[key]
        elif kept != "8bit" and codes in state:
            value = decode8(local(like(state[codes], p)), local(like(state[scales], p)), FORMATS[key])
            state[key] = spread_like(value.to(p.device, kept), p, p.shape)
            del state[codes], state[scales]
        elif kept != "8bit" and key in state:
            state[key] = state[key].to(p.device, kept)


def check_moment(state: Mapping[str, Any], p: Tensor, key: str, where: str) -> None:
    """Raise unless a moment can be brought into 8 bits."""
    if state[key].shape != p.shape:
        raise ValueError(f"{where}: {key}: expected shape {list(p.shape)}, got {list(state[key].shape)}")


def as_saved(kept: dict[str, Any]) -> dict[str, Any]:
    """A parameter's state with 16 low bits as bytes, which lie in the same memory; itself if it has none."""
    low = kept.get(LOW_BITS)
    if not isinstance(low, Tensor) or low.dtype != torch.uint16:
        return kept
    strides = (*(2 * stride for stride in low.stride()), 1)
    return {**kept, LOW_BITS: viewed(low, lambda part: part.unsqueeze(-1).view(torch.uint8), (*low.shape, 2), strides)}


def as_kept(low: Tensor, p: Tensor) -> Tensor:
    """Low bits of ``p`` out of a state dict as the step reads them: bytes as uint16, others as they are."""
    if low.dtype != torch.uint8 or low.dim() != p.dim() + 1 or low.shape[-1] != 2:
        return low
    strides = tuple(stride // 2 for stride in low.stride()[:-1])
    return viewed(low, joined_bytes, tuple(low.shape[:-1]), strides)


def joined_bytes(part: Tensor) -> Tensor:
    """uint16 out of plain bytes; in the same memory where they lie in pairs."""
    in_pairs = part.stride(-1) == 1 and part.storage_offset() % 2 == 0 and not any(s % 2 for s in part.stride()[:-1])
    return (part if in_pairs else part.clone(memory_format=torch.contiguous_format)).view(torch.uint16).squeeze(-1)


def viewed(
    tensor: Tensor, view: Callable[[Tensor], Tensor], shape: tuple[int, ...], strides: tuple[int, ...]
) -> Tensor:
    """``view`` of a tensor; of a DTensor, of this process's part of it, with the shape and strides of the whole."""
    if not is_dtensor(tensor):
        return view(tensor)
    from torch.distributed.tensor import DTensor

    mesh, placements = tensor.device_mesh, tensor.placements  # type: ignore[attr-defined]
    whole = torch.Size(shape)
    return DTensor.from_local(view(local(tensor)), mesh, placements, run_check=False, shape=whole, stride=strides)


def moments_of(optimizer: torch.optim.Optimizer, p: Tensor) -> tuple[Tensor, Tensor]:
    """(exp_avg, exp_avg_sq) of a parameter that has been stepped, as floating-point tensors; float32 out of 8 bits.

    Args:
        optimizer: ``fastft.AdamW``, or torch's ``Adam`` or ``AdamW``.
        p: one of its parameters.
    """
    state = optimizer.state[p]
    return moment_of(state, p, "exp_avg"), moment_of(state, p, "exp_avg_sq")


def moment_of(state: Mapping[str, Any], p: Tensor, key: str) -> Tensor:
    """A moment of ``p`` out of its ``state``, decoded if it is kept in 8 bits."""
    if key in state:
        found: Tensor = state[key]
        return found
    codes, scales = (local(state[name]) for name in CODED[key])
    return spread_like(decode8(codes, scales, FORMATS[key]), p, p.shape)
