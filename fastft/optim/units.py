"""The sums by which foreign writing is noticed, of units of a parameter, as the core's step forms them.

The rule is that of csrc/math/split.h and csrc/adamw.h: a unit is 4096 consecutive live elements in memory order, or,
with 8-bit moments, 16 consecutive blocks of theirs, in rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad

from .formats import BLOCK, row_of

UNIT = 4096  # elements
AT_ONCE = 1 << 20  # elements, in temporaries of a few times their size


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
