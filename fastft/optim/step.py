"""One step over parts that are ready for the kernels, for ``AdamW`` and ``adamw_`` alike."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from .entries import Part
from .tensors import DeviceKey, runs_kernels, scalar_on, torch_device


def lr_on(group: dict[str, Any], where: torch.device) -> float | Tensor:
    """A group's lr. A tensor goes to a GPU as it is, so that nothing waits for it."""
    lr = group["lr"]
    if isinstance(lr, Tensor) and runs_kernels(where) and lr.is_floating_point():
        return lr.to(where)
    return float(lr)


def take_step(
    parts: Iterable[Part],
    groups: list[dict[str, Any]],
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
            groups,
            [lr_on(group, where) for group in groups],
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
