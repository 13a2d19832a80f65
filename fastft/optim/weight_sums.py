"""The sums by which a step notices that somebody else has written a parameter: one for each unit of its weights.

The rule is that of csrc/math/split.h and csrc/adamw.h: a unit is 4096 consecutive live elements in memory order, or,
with 8-bit moments, 16 consecutive blocks of theirs, in rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from .formats import BLOCK, row_of
from .masks import UpdateMask
from .tensors import local

UNIT = 4096  # elements
AT_ONCE = 1 << 20  # elements, in temporaries of a few times their size
SUMS_EVERY = 1024  # elements, at least, that one of `weight_sums` stands for


@dataclass
class Known:
    """The sums of a parameter, and where they hold."""

    layout: tuple[Any, ...]
    coded: bool  # whether its moments are kept in 8 bits
    sums: Tensor  # int32, which the core reads and writes; 0: not known
    rows: Tensor | None = None  # that are live, if not all
    left_out: Tensor | None = None  # the other ones, and their sums
    left_out_sums: Tensor | None = None


class WeightSums:
    """The sums by which a step sees that somebody else has written a parameter: of an optimizer, not saved.

    They hold for the memory order that the parameter has; in another they start anew, and the low bits are trusted for
    one step. Rows that a mask leaves out have sums of their own, which are looked at when somebody asks, and when the
    mask changes.
    """

    def __init__(self) -> None:
        self._known: dict[Tensor, Known] = {}

    def of(self, p: Tensor, coded: bool, mask: UpdateMask | None) -> Tensor:
        """Those of ``p``, for the core to read and write: int32, zeros where nothing is known.

        Args:
            p: the parameter.
            coded: whether its moments are kept in 8 bits.
            mask: its update mask.
        """
        known = self._current(p)
        if known is None:
            known = self._known[p] = Known(layout(p), coded, new_sums(local(p)))
            leave_out(known, p, mask)
        return known.sums

    def known(self, p: Tensor) -> Tensor | None:
        """Those of ``p`` as it lies now; None where there are none."""
        known = self._current(p)
        return None if known is None else known.sums

    def valid(self, p: Tensor, low: Tensor) -> Tensor:
        """A copy of what this process holds of low bits of ``p``, in its memory order.

        They are 0 in units that somebody else has written since the last step.
        """
        known, weights = self._current(p), local(p.detach())
        checked = torch.empty_like(weights, dtype=low.dtype).copy_(local(low))
        if known is None:
            return checked
        for rows, sums in ((known.rows, known.sums), (known.left_out, known.left_out_sums)):
            if sums is not None:
                now = unit_sums(weights, known.coded, rows)
                was = sums[: len(now)]
                clear_units(checked, (was != 0) & (was != now), known.coded, rows)
        return checked

    def set_mask(self, p: Tensor, low: Tensor | None, mask: UpdateMask | None) -> None:
        """Bring low bits of ``p`` to what is :meth:`valid`, in place, and :meth:`renew` the sums."""
        if low is not None and self._current(p) is not None:
            local(low).copy_(self.valid(p, low))
        self.renew(p, mask)

    def renew(self, p: Tensor, mask: UpdateMask | None) -> None:
        """Take ``p`` as it is now for written by the optimizer, if sums were kept, with ``mask`` from now on."""
        known = self._current(p)
        if known is None:
            self._known.pop(p, None)
            return
        leave_out(known, p, mask)
        now = unit_sums(local(p.detach()), known.coded, known.rows)
        known.sums.zero_()[: len(now)] = now

    def clear(self) -> None:
        """Let the next step trust all low bits; plans made before hold sums of their own."""
        self._known.clear()

    def _current(self, p: Tensor) -> Known | None:
        known = self._known.get(p)
        return None if known is None or known.layout != layout(p) else known


def leave_out(known: Known, p: Tensor, mask: UpdateMask | None) -> None:
    """Note the rows that are live, and the sums of the others."""
    known.rows = None if mask is None else mask.for_core(p)[1]
    known.left_out = known.left_out_sums = None
    if known.rows is not None:
        others = torch.ones(p.shape[0], dtype=torch.bool, device=p.device)
        others[known.rows] = False
        known.left_out = others.nonzero().flatten()
        known.left_out_sums = unit_sums(p, known.coded, known.left_out)


def new_sums(stepped: Tensor) -> Tensor:
    """Sums of which none is known, for a plain tensor."""
    return torch.zeros(stepped.numel() // SUMS_EVERY + 2, dtype=torch.int32, device=stepped.device)


def layout(p: Tensor) -> tuple[Any, ...]:
    """Where, as which numbers and in which memory order it lies."""
    stepped = local(p)
    return stepped.device, stepped.dtype, tuple(stepped.shape), stepped.stride()


# -- the sums of units -------------------------------------------------------------------------------------------


def unit_sums(weights: Tensor, coded: bool, rows: Tensor | None = None) -> Tensor:
    """The sum of each unit: int32.

    Args:
        weights: plain, dense, bfloat16.
        coded: whether its moments are kept in 8 bits.
        rows: int64, ascending: the rows that are live, which lie one after the other in memory; None: all.
    """
    if weights.numel() == 0 or (rows is not None and rows.numel() == 0):
        return torch.empty(0, dtype=torch.int32, device=weights.device)
    row, filled = widths(weights, coded, rows)
    matrix = in_memory(weights.view(torch.int16)).view(-1, row)
    places = 4 * torch.arange(UNIT, dtype=torch.int32, device=weights.device) + 2
    sums = []
    for part in parts(len(matrix), filled, rows):
        bits = pad(matrix[part].to(torch.int32) & 0xFFFF, (0, filled - row)).flatten()
        bits = pad(bits, (0, -bits.numel() % UNIT)).view(-1, UNIT)
        sums.append((bits * places).sum(1, dtype=torch.int64) & 0xFFFFFFFF | 1)
    found = torch.cat(sums)
    return torch.where(found >= 2**31, found - 2**32, found).to(torch.int32)


def clear_units(low: Tensor, units: Tensor, coded: bool, rows: Tensor | None = None) -> None:
    """Set the low bits of some units to 0, in place.

    Args:
        low: plain, dense, uint16 or uint8.
        units: bool, one for each unit.
        coded, rows: as in :func:`unit_sums`.
    """
    if units.numel() == 0 or (units.device.type == "cpu" and not units.any()):  # elsewhere that would have to wait
        return
    row, filled = widths(low, coded, rows)
    matrix = in_memory(low.view(torch.int16 if low.dtype == torch.uint16 else torch.uint8)).view(-1, row)
    first = 0
    for part in parts(len(matrix), filled, rows):
        bits = matrix[part]
        last = first + -(-len(bits) * filled // UNIT)
        cleared = units[first:last].repeat_interleave(UNIT)[: len(bits) * filled].view(-1, filled)[:, :row]
        matrix[part] = torch.where(cleared, torch.zeros_like(bits), bits)
        first = last


def widths(t: Tensor, coded: bool, rows: Tensor | None) -> tuple[int, int]:
    """(elements of a row, the same with its last block filled up); (1, 1) if that changes nothing."""
    row = row_of(t.shape) if rows is None else t.shape[1:].numel()
    filled = -(-row // BLOCK) * BLOCK if coded else row
    return (1, 1) if rows is None and (row == filled or row == t.numel()) else (row, filled)


def parts(count: int, filled: int, rows: Tensor | None) -> Iterator[slice | Tensor]:
    """Indices of rows, some at a time: such as hold whole units."""
    step = UNIT // math.gcd(UNIT, filled)
    step *= max(1, AT_ONCE // (step * filled))
    for i in range(0, count if rows is None else len(rows), step):
        yield slice(i, i + step) if rows is None else rows[i : i + step]


def in_memory(t: Tensor) -> Tensor:
    """A dense tensor's elements as they lie in memory, in one dimension."""
    return t.detach().as_strided((t.numel(),), (1,))
