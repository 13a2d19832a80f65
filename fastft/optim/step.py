"""One step over tensors that are ready for the kernels: what ``AdamW`` and ``adamw_`` have in common."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastft import _C

from .staging import Staging

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
ANCHOR_MODES = ("decoupled", "l2", "selective")

DLPACK_CPU = 1  # DLDeviceType of the DLPack specification; CUDA is 2
DeviceKey = tuple[int, int]


def torch_device(device: DeviceKey) -> torch.device:
    """The torch device of a DLPack device."""
    return torch.device("cpu") if device[0] == DLPACK_CPU else torch.device("cuda", device[1])


def runs_kernels(device: torch.device) -> bool:
    """Whether tensors on this device go to the CUDA kernels, which read scalars from device memory."""
    return device.type in _C.kernel_devices


def is_dtensor(tensor: Tensor) -> bool:
    """Whether ``tensor`` is a DTensor; without importing torch.distributed, which takes long."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a DTensor; any other tensor itself. Call it under ``no_grad``."""
    # Not to_local(), which may make a new view of it at each call.
    return tensor._local_tensor if is_dtensor(tensor) else tensor  # type: ignore[attr-defined]


def like(tensor: Tensor, param: Tensor) -> Tensor:
    """A plain ``tensor`` distributed as the DTensor ``param`` is; anything else as it is."""
    if not is_dtensor(param) or is_dtensor(tensor):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    # Every process has the whole tensor, so each takes its own part and nothing is sent.
    return distribute_tensor(
        tensor.to(param.device),
        param.device_mesh,  # type: ignore[attr-defined]
        param.placements,  # type: ignore[attr-defined]
        src_data_rank=None,
    )


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


class Part:
    """Tensors stepped together: a plan, its scratch memory, and the process groups its norm is added up over."""

    def __init__(
        self, entries: list[tuple[Any, ...]], process_groups: Sequence[Any] = (), staging: Staging | None = None
    ) -> None:
        self.plan = _C.AdamWPlan(entries)  # which keeps no parameter alive, and so must this
        self.process_groups = process_groups
        self.staging = staging
        self._workspaces: dict[DeviceKey, Tensor] = {}

    def workspace(self, device: DeviceKey) -> Tensor | None:
        """The zeroed memory that the kernels keep their table in; None on the CPU."""
        if device not in self._workspaces:
            count = self.plan.workspace_bytes(device)
            if count == 0:
                return None
            self._workspaces[device] = torch.zeros(count, dtype=torch.uint8, device=torch_device(device))
        return self._workspaces[device]


def group_options(group: dict[str, Any], where: torch.device) -> tuple[Any, ...]:
    """A group's numbers in the order in which the core takes them. A tensor lr stays on the device."""
    lr = group["lr"]
    if isinstance(lr, Tensor) and runs_kernels(where) and lr.is_floating_point():
        lr = lr.to(where)
    else:
        lr = float(lr)
    beta1, beta2 = group["betas"]
    return (
        lr,
        float(beta1),
        float(beta2),
        float(group["eps"]),
        float(group["weight_decay"]),
        float(group["anchor_decay"]),
        group["anchor_mode"] == "l2",
        bool(group["amsgrad"]),
        bool(group["maximize"]),
    )


def scalar_on(value: Tensor | None, where: torch.device, dtype: torch.dtype) -> Tensor | None:
    """A one-element tensor on a device."""
    return None if value is None else value.to(where, dtype, non_blocking=True)


def take_step(
    parts: Iterable[Part],
    groups: Sequence[dict[str, Any]],
    *,
    max_grad_norm: float | None = None,
    skip_nonfinite: bool = False,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    skipped_steps: Tensor | None = None,
) -> Tensor | None:
    """Step all parts whose gradients have been gathered; the norm of the gradients if it was needed.

    ``groups`` are dicts with AdamW's keys. ``skipped_steps`` counts on the first device. Nothing waits for a
    GPU. The norm is 0-d, float64, on the first device, after unscaling and before clipping.
    """
    places = [(part, device, torch_device(device)) for part in parts for device in part.plan.devices()]
    if not places:
        return None
    sums: Tensor | None = None
    if max_grad_norm is not None or skip_nonfinite:
        sums = sum_of_squares(places)
    staged = [part.staging for part, _, _ in places if part.staging is not None]
    if staged:
        staged[0].fetch()
    for index, (part, device, where) in enumerate(places):
        if part.staging is not None:
            staged.pop(0)
            if staged:
                staged[0].fetch()
            part.staging.wait()
        part.plan.step(
            device,
            [group_options(group, where) for group in groups],
            scalar_on(sums, where, torch.float64),
            -1.0 if max_grad_norm is None else float(max_grad_norm),
            skip_nonfinite,
            scalar_on(grad_scale, where, torch.float32),
            scalar_on(found_inf, where, torch.float32),
            skipped_steps if index == 0 else None,
            part.workspace(device),
        )
        torch.autograd.graph.increment_version(part.plan.written())
        if part.staging is not None:
            part.staging.done()
    if sums is None:
        return None
    norm = sums.sqrt()
    scale = scalar_on(grad_scale, norm.device, torch.float64)
    return norm if scale is None else norm / scale


def sum_of_squares(places: Sequence[tuple[Part, DeviceKey, torch.device]]) -> Tensor:
    """Σ grad² over all places and processes: 0-d, float64, on the first device."""
    total: Tensor | None = None
    for part, device, where in places:
        out = torch.empty((), dtype=torch.float64, device=where)
        part.plan.sum_of_squares(device, out, part.workspace(device))
        for group in part.process_groups:
            torch.distributed.all_reduce(out, group=group)
        total = out if total is None else total + out.to(total.device, non_blocking=True)
    assert total is not None
    return total
