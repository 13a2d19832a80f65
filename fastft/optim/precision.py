"""Whether a change is large enough to move a weight that is kept in few bits, or is lost when the sum is rounded.

A weight w rounded to nearest moves with w + d only if |d| exceeds half the distance to its neighbour on that side;
exactly half moves it only where its last bit is odd, as ties go to even. Nothing is estimated: the sum is rounded as
the step rounds it, and compared with w. What is lost once is lost at each step: such a weight stands still for good.

How large changes are:

* a step of AdamW: lr for each element, in either direction. |m̂/√v̂| is 1 in the first step and mostly between 0.1 and 1
  afterwards, so this is the upper end.
* a pull toward a target: rate · |w − target|. For weight decay the rate is lr · weight_decay and the target 0; for a
  decoupled anchor it is lr · anchor_decay. Before training a model lies at its anchor; then ``DISTANCE`` is assumed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .formats import join, split

DISTANCE = 0.02
"""Assumed distance to the anchor, relative to the weight, where it is not known: as after a usual fine-tuning."""
SAMPLE = 4096
"""Elements of a tensor that :func:`cannot_move` looks at."""


def gaps(w: Tensor, extra_bits: int = 0) -> tuple[Tensor, Tensor]:
    """Distance of each weight to its neighbour toward zero, and to the one away from it: exact, in float32.

    Args:
        w: bfloat16, float16 or float32, any shape.
        extra_bits: 0, 8 or 16 bits kept beside a bfloat16 weight.

    0 has its neighbours at the smallest subnormal number. The largest finite weight has inf above it.
    """
    if w.dtype == torch.float16:
        bits = w.view(torch.int16) & 0x7FFF
        below, above = ((bits - 1).clamp(min=0).view(w.dtype), (bits + 1).view(w.dtype))
        size = w.float().abs()
        down, up = size - below.float(), above.float() - size
    else:
        last = 1 if w.dtype == torch.float32 else 1 << (16 - extra_bits)
        size = w.float().abs()
        bits = size.view(torch.int32)
        down = size - (bits - last).clamp(min=0).view(torch.float32)
        up = (bits + last).view(torch.float32) - size
    return torch.where(size == 0, up, down), up


def rounded(x: Tensor, dtype: torch.dtype, extra_bits: int = 0) -> Tensor:
    """``x`` (float32) to the nearest value that a weight of ``dtype`` with ``extra_bits`` can have, as float32."""
    if dtype == torch.float32 or extra_bits == 16:
        return x
    if extra_bits == 8:
        return join(*split(x, 8))
    return x.to(dtype).float()


def moved(w: Tensor, change: Tensor | float, extra_bits: int = 0) -> Tensor:
    """Whether ``w + change``, computed in float32 (float64 for float64 weights), is another weight once rounded.

    Args:
        w: weights of any floating-point dtype.
        change: of ``w``'s shape, or one number.
        extra_bits: 0, 8 or 16 bits kept beside a bfloat16 weight; it is the weight with its bits that moves.
    """
    if w.dtype == torch.float64:
        return w + change != w
    wide = w.float()
    return rounded(wide + change, w.dtype, extra_bits) != wide


def share_moved_by_step(w: Tensor, lr: float, extra_bits: int = 0) -> float:
    """Share of the elements that a step of ``lr`` moves: the mean over both directions. 1 for an empty tensor."""
    return sum(share(moved(w, change, extra_bits)) for change in (-lr, lr)) / 2


def pull(w: Tensor, rate: float, target: Tensor | None = None, distance: float = 1.0) -> Tensor:
    """How far a pull wants to move each element, in float32 (float64 for float64 weights).

    Args:
        w: weights.
        rate: part of the distance that a step goes: lr · weight_decay or lr · anchor_decay.
        target: of ``w``'s shape. Elements that lie at their target count with the relative ``distance``.
        distance: from the target, relative to the weight, where there is no ``target``; 1.0 is weight decay, whose
            target is 0.
    """
    wide = w if w.dtype == torch.float64 else w.float()
    away = wide * distance
    if target is not None:
        away = torch.where(wide == target, away, wide - target.to(wide.dtype))
    return -rate * away


def cannot_move(
    p: Tensor, rate: float, target: Tensor | None = None, distance: float = 1.0, extra_bits: int = 0
) -> float:
    """Share of a parameter's elements that a pull of ``rate`` does not move, rounded to nearest.

    Estimated from at most ``SAMPLE`` elements; those that have nowhere to go (0, with weight decay) do not count. For
    weight decay: ``cannot_move(p, lr * weight_decay)``. For a decoupled anchor: ``cannot_move(p, lr * anchor_decay,
    anchor, DISTANCE)``; elements at their anchor, and all of them without one, count as if ``DISTANCE`` away from it.
    Above 0.5 a typical weight does not move.

    Args:
        p: any floating-point dtype, on any device; the local part of a sharded one.
        rate: part of the distance that a step goes.
        target: of ``p``'s shape, on its device.
        distance: relative to the weight, where the target is not known.
        extra_bits: kept beside a bfloat16 weight, taken to be 0 now.
    """
    changes = pull(sample(p), rate, None if target is None else sample(target), distance)
    return 1.0 - share(moved(sample(p), changes, extra_bits)[changes != 0])


def sample(p: Tensor) -> Tensor:
    """At most ``SAMPLE`` elements, spread evenly, in one dimension: the same places for tensors of the same shape."""
    p = p.detach()
    if p.numel() <= SAMPLE:
        return p.reshape(-1)
    # An odd stride, so that rows of a power of two elements are not met in the same column each time.
    places = torch.arange(SAMPLE, device=p.device) * (p.numel() // SAMPLE | 1) % p.numel()
    return p[torch.unravel_index(places, p.shape)]


def share(flags: Tensor) -> float:
    """Of the elements that are True; 1 where there are none."""
    return float(flags.double().mean()) if flags.numel() else 1.0
