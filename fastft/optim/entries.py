"""The records that the core steps by: one for each parameter, made in one place, and the plans over them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import torch
from torch import Tensor

from fastft import _C

from .anchoring import anchoring_of
from .dtensors import like
from .low_precision import element_index
from .masks import UpdateMask
from .processes import HERE, Over, Spread
from .staging import PART_BYTES, Staging, staging_for
from .tensors import DeviceKey, laid_out_like, local, torch_device


def record_of(
    param: Tensor,
    group: int,
    name: str,
    *,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    max_exp_avg_sq: Tensor | None,
    step: Tensor,
    counts_on_device: bool,
    scales: tuple[Tensor, Tensor] | None = None,
    low_bits: Tensor | None = None,
    weight_sums: Tensor | None = None,
    rounding_key: int | None = None,
    anchor: Tensor | None = None,
    importance: Tensor | None = None,
    anchor_mode: str = "decoupled",
    mask: UpdateMask | None = None,
    cut: bool = False,
) -> _C.AdamWRecord:
    """The core's record of a parameter that is stepped; of a DTensor, by what this process holds of it.

    Args:
        param: dense; its state (``exp_avg``, ``exp_avg_sq``, ``max_exp_avg_sq`` with amsgrad) in its memory order.
            With ``scales`` (of exp_avg and of exp_avg_sq, float32) these are uint8 codes.
        group: the index of its group.
        name: for messages.
        step: one number; on the parameter's device if ``counts_on_device``, else on the CPU.
        low_bits: uint16 or uint8, in its memory order, with ``weight_sums``, those of ``WeightSums`` for it.
        rounding_key: its key for stochastic rounding; None: to nearest.
        anchor, importance: of its shape, any floating dtype, beside it or in host memory; None where it is free.
        anchor_mode: of its group.
        mask: the rows or elements to step; None: all.
        cut: whether ``param`` is a piece of a tensor that lies in several processes.

    Raises:
        ValueError: where the mode or stochastic rounding cannot be had, and from the plan for tensors that do not fit.
    """
    anchoring = anchoring_of(param, anchor, importance, anchor_mode, name, cut)
    stepped = local(param)

    def placed(kept: Tensor | None) -> Tensor | None:
        return None if kept is None else laid_out_like(local(like(kept, param)), stepped)

    update_mask, rows = (None, None) if mask is None else mask.for_core(param)
    return _C.AdamWRecord(
        param,
        group,
        name=name,
        anchoring=anchoring,
        counts_on_device=counts_on_device,
        stepped=stepped,
        exp_avg=local(exp_avg),
        exp_avg_sq=local(exp_avg_sq),
        max_exp_avg_sq=None if max_exp_avg_sq is None else local(max_exp_avg_sq),
        step=step,
        low_bits=None if low_bits is None else local(low_bits),
        weight_sums=weight_sums,
        exp_avg_scales=None if scales is None else local(scales[0]),
        exp_avg_sq_scales=None if scales is None else local(scales[1]),
        rounding_key=rounding_key,
        index=None if rounding_key is None else element_index(param, name),
        anchor=placed(anchor),
        importance=placed(importance),
        update_mask=update_mask,
        rows=rows,
    )


class Part:
    """Tensors stepped together: a plan, its scratch memory, and how its norm is added up over processes."""

    def __init__(self, records: list[_C.AdamWRecord], over: Over = HERE, staging: Staging | None = None) -> None:
        self.plan = _C.AdamWPlan(records)  # which keeps no parameter alive, and so must this
        self.over = over
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


STAGED = ("anchor", "importance")
"""Tensors of a record that may wait in host memory."""


def parts_of(records: list[_C.AdamWRecord], spread: Spread) -> Iterator[Part]:
    """Plans that together step all records that are to be stepped; usually one.

    Parameters that lie spread over other processes have a plan of their own, since their norm adds up over these;
    so do parameters whose anchor waits in host memory, some megabytes of it at a time.
    """

    def waiting(record: _C.AdamWRecord) -> dict[str, Tensor]:
        """The tensors that lie elsewhere than the parameter."""
        tensors = {name: getattr(record, name) for name in STAGED}
        return {name: t for name, t in tensors.items() if t is not None and t.device != record.param.device}

    watched = [record.unstepped() for record in records]
    live = [position for position, record in enumerate(records) if record.steps]
    plain: dict[Over, list[int]] = defaultdict(list)
    offloaded: dict[tuple[Over, torch.device], list[int]] = defaultdict(list)
    for position in live:
        record = records[position]
        key = spread.over(record.param)
        if waiting(record):
            offloaded[key, record.param.device].append(position)
        else:
            plain[key].append(position)

    def part(positions: list[int], over: Over, staging: Staging | None = None) -> Part:
        chosen = list(watched)
        views = iter(() if staging is None else staging.views)
        for position in positions:
            names = () if staging is None else waiting(records[position])
            chosen[position] = records[position].replaced(**{name: next(views) for name in names})
        return Part(chosen, over, staging)

    if not live:  # a plan of nothing still notices the first gradient
        yield part([], HERE)
    for key, positions in plain.items():
        yield part(positions, key)
    for (over, device), positions in offloaded.items():
        chunks: list[list[int]] = [[]]
        filled = 0
        for position in positions:
            nbytes = sum(tensor.nbytes for tensor in waiting(records[position]).values())
            if filled + nbytes > PART_BYTES and chunks[-1]:
                chunks.append([])
                filled = 0
            chunks[-1].append(position)
            filled += nbytes
        kept = [[tensor for i in chunk for tensor in waiting(records[i]).values()] for chunk in chunks]
        for chunk, staging in zip(chunks, staging_for(device, kept), strict=True):
            yield part(chunk, over, staging)
