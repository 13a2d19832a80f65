"""One step over parts that are ready for the kernels, for ``AdamW`` and ``adamw_`` alike."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .entries import Part
from .processes import Over, Spread
from .tensors import local, runs_kernels, scalar_on, torch_device


def lr_on(group: dict[str, Any], where: torch.device) -> float | Tensor:
    """A group's lr. A tensor goes to a GPU as it is, so that nothing waits for it."""
    lr = group["lr"]
    if isinstance(lr, Tensor) and runs_kernels(where) and lr.is_floating_point():
        return lr.to(where)
    return float(lr)


def global_sums(
    parts: Iterable[Part], spread: Spread, needs_norm: bool, found_inf: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """(Σ grad² over all parts and processes, ``found_inf`` of all processes), so that all of them decide alike.

    The first is 0-d, float64, on the first device; None unless ``needs_norm``.
    """
    if not needs_norm and (found_inf is None or not spread):
        return None, found_inf
    sums: dict[Over, Tensor] = {}
    total: Tensor | None = None
    for part in parts if needs_norm else ():
        for device in part.plan.devices():
            out = torch.empty((), dtype=torch.float64, device=torch_device(device))
            part.plan.sum_of_squares(device, out, part.workspace(device))
            if spread:
                key = part.over
                sums[key] = out if key not in sums else sums[key] + out.to(sums[key].device, non_blocking=True)
            else:
                total = out if total is None else total + out.to(total.device, non_blocking=True)
    if spread:
        total, found_inf = spread.total(sums, found_inf)
    return total if needs_norm else None, found_inf


def unscale_(grads: Iterable[Tensor | None], grad_scale: Tensor) -> None:
    """Divide gradients by a GradScaler's scale, as torch's optimizers leave them after a step.

    The step reads them as they are; this pass is for those who look at ``.grad`` after it.
    """
    with torch.no_grad():
        by_device: dict[torch.device, list[Tensor]] = {}
        for grad in {id(grad): grad for grad in grads if grad is not None}.values():
            by_device.setdefault(grad.device, []).append(local(grad))
        for device, found in by_device.items():
            inverse = grad_scale.double().reciprocal().to(device, torch.float32, non_blocking=True).reshape(())
            dense = [grad for grad in found if grad.layout == torch.strided]
            torch._foreach_mul_(dense, inverse)
            for grad in found:
                if grad.layout != torch.strided:
                    grad.mul_(inverse)


def take_step(
    parts: Iterable[Part],
    groups: list[dict[str, Any]],
    *,
    sums: Tensor | None = None,
    max_grad_norm: float | None = None,
    skip_nonfinite: bool = False,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    skipped_steps: Tensor | None = None,
) -> Tensor | None:
    """Step all parts whose gradients have been gathered; the norm of the gradients if it was needed.

    ``groups`` are dicts with AdamW's keys, ``sums`` and ``found_inf`` those of :func:`global_sums`. ``skipped_steps``
    counts on the first device. Nothing waits for a GPU. The norm is 0-d, float64, on the first device, after unscaling
    and before clipping.
    """
    places = [(part, device, torch_device(device)) for part in parts for device in part.plan.devices()]
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
    if not places and skipped_steps is not None:  # this process has nothing to step, and counts as the others do
        skips = torch.zeros((), dtype=torch.bool) if found_inf is None else (found_inf != 0).reshape(())
        if skip_nonfinite and sums is not None:
            skips = skips.to(sums.device) | ~sums.isfinite()
        skipped_steps += skips.to(skipped_steps.device)
    if sums is None:
        return None
    norm = sums.sqrt()
    scale = scalar_on(grad_scale, norm.device, torch.float64)
    return norm if scale is None else norm / scale
