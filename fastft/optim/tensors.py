"""How tensors lie: on which device, of which process, in which memory order; and how to bring them into another's."""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from fastft import _C

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

DLPACK_CPU = 1  # DLDeviceType of the DLPack specification; CUDA is 2
DeviceKey = tuple[int, int]


def torch_device(device: DeviceKey) -> torch.device:
    """The torch device of a DLPack device."""
    return torch.device("cpu") if device[0] == DLPACK_CPU else torch.device("cuda", device[1])


def runs_kernels(device: torch.device) -> bool:
    """Whether tensors on this device go to the CUDA kernels, which read scalars from device memory."""
    return device.type in _C.kernel_devices


def scalar_on(value: Tensor | None, where: torch.device, dtype: torch.dtype) -> Tensor | None:
    """A one-element tensor on a device."""
    return None if value is None else value.to(where, dtype, non_blocking=True)


# -- DTensors ------------------------------------------------------------------------------------------------


def is_dtensor(tensor: Tensor) -> bool:
    """Whether ``tensor`` is a DTensor; without importing torch.distributed, which takes long."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """The part of a DTensor that this process holds; any other tensor itself. Call it under ``no_grad``."""
    # Not to_local(), which may make a new view of it at each call.
    return tensor._local_tensor if is_dtensor(tensor) else tensor  # type: ignore[attr-defined]


# -- memory order --------------------------------------------------------------------------------------------


def is_wrapper(p: Tensor) -> bool:
    """Whether its class overrides operations, so that its own memory, if any, need not hold its values."""
    return type(p).__torch_dispatch__ is not Tensor.__torch_dispatch__


def is_dense(p: Tensor) -> bool:
    """numel consecutive items of memory, in some order."""
    expected = 1
    for stride, n in sorted((s, n) for n, s in zip(p.shape, p.stride(), strict=True) if n != 1):
        if stride != expected:
            return p.numel() <= 1
        expected *= n
    return True


def same_layout(a: Tensor, b: Tensor) -> bool:
    """Same shape, and the same order of elements in memory."""
    return a.shape == b.shape and (
        a.numel() == 0 or all(n == 1 or x == y for n, x, y in zip(a.shape, a.stride(), b.stride(), strict=True))
    )


def laid_out_like(tensor: Tensor, model: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """``tensor`` in the memory order of the dense ``model``: itself if it already is, else a copy."""
    dtype = dtype or tensor.dtype
    if tensor.dtype == dtype and same_layout(tensor, model) and not tensor.is_neg():
        return tensor
    return torch.empty_like(model, dtype=dtype).copy_(tensor)


def fit_grad(grad: Tensor, param: Tensor, stepped: Tensor, name: str) -> Tensor:
    """The gradient as the kernels take it: plain, in the memory order of ``stepped``, of a floating dtype.

    Values keep their dtype where the kernels read it; float64 beside narrower parameters becomes float32.
    """
    if grad.shape != param.shape:
        raise ValueError(f"{name}: grad: expected shape {list(param.shape)}, got {list(grad.shape)}")
    if is_dtensor(param):
        if not is_dtensor(grad):
            raise ValueError(f"{name}: grad: expected a DTensor like the parameter, got {type(grad).__name__}")
        placements = param.placements  # type: ignore[attr-defined]
        if grad.placements != placements:  # type: ignore[attr-defined]
            grad = grad.redistribute(placements=placements)  # type: ignore[attr-defined]
    grad = local(grad)
    if grad.layout != torch.strided or grad.is_meta:
        raise ValueError(f"{name}: grad: expected a dense tensor with memory, got {grad.layout} on {grad.device}")
    if not grad.is_floating_point():
        raise ValueError(f"{name}: grad: expected a floating dtype, got {grad.dtype}")
    narrow = grad.dtype == torch.float64 and stepped.dtype != torch.float64
    dtype = torch.float32 if narrow or grad.dtype not in KERNEL_DTYPES else grad.dtype
    if type(grad) is not Tensor:
        grad = grad.as_subclass(Tensor)
    return laid_out_like(grad.to(stepped.device), stepped, dtype)
