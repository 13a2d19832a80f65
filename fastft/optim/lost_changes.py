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

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .formats import join, split
from .tensors import local

DISTANCE = 0.02
"""Assumed distance to the anchor, relative to the weight, where it is not known: as after a usual fine-tuning."""
SAMPLE = 256
"""Elements of a large tensor that :func:`moved_shares` looks at."""


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


def pull(w: Tensor, rate: Tensor | float, distance: float = 1.0) -> Tensor:
    """How far a pull wants to move each element, in float32 (float64 for float64 weights).

    Args:
        w: weights.
        rate: part of the distance that a step goes: lr · weight_decay or lr · anchor_decay; of ``w``'s shape, or one.
        distance: from the target, relative to the weight; 1.0 is weight decay, whose target is 0.
    """
    wide = w if w.dtype == torch.float64 else w.float()
    return -rate * (wide * distance)


def moved_shares(
    parameters: Iterable[tuple[dict[str, Any], Tensor, bool]], extra_bits: int = 0
) -> dict[str, tuple[float, float]] | None:
    """Of each effect of a step, (the share of the weights that it moves by itself, its rate at most).

    Estimated from ``SAMPLE`` elements of each large tensor, with all of them at once and one read of the device.

    Args:
        parameters: (group, dense 16-bit parameter, whether it is anchored).
        extra_bits: low bits that are kept beside these, taken to be 0 now.

    Returns:
        By ``"anchor_decay"``, ``"weight_decay"`` and ``"lr"`` (a step of lr in either direction), those that are above
        0 for some parameter. Weights that have nowhere to go (0, with weight decay) do not count. None where no lr
        above 0 is known without waiting for a GPU.
    """
    rates = {"anchor_decay": 0.0, "weight_decay": 0.0, "lr": 0.0}
    places: dict[tuple[int, torch.device], Tensor] = {}
    batches: dict[tuple[torch.device, torch.dtype], list[tuple[Tensor, tuple[float, ...]]]] = defaultdict(list)
    for group, p, anchored in parameters:
        lr = group.get("initial_lr", group["lr"])  # a warm-up begins at 0
        if isinstance(lr, Tensor) and lr.device.type != "cpu":
            continue
        lr, whole = float(lr), local(p)
        if lr <= 0.0 or whole.numel() == 0 or (whole.is_cuda and torch.cuda.is_current_stream_capturing()):
            continue
        pulled = anchored and group["anchor_mode"] == "decoupled"
        anchor_decay, weight_decay = (
            group.get(f"initial_{key}", group[key]) for key in ("anchor_decay", "weight_decay")
        )
        here = (lr * float(anchor_decay) if pulled else 0.0, lr * float(weight_decay), lr)
        rates = {key: max(rate, more) for (key, rate), more in zip(rates.items(), here, strict=True)}
        part = sample(whole, places)
        batches[part.device, part.dtype].append((part, (whole.numel() / part.numel(), *here)))
    if not batches:
        return None
    totals = [of_batch(found, extra_bits) for found in batches.values()]
    sums = torch.stack([total.to(totals[0].device) for total in totals]).sum(0).tolist()
    return {key: (sum_moved / size, rates[key]) for key, (sum_moved, size) in zip(rates, sums, strict=True) if size > 0}


def of_batch(found: list[tuple[Tensor, tuple[float, ...]]], extra_bits: int) -> Tensor:
    """[effects, (elements that are moved, elements that are to be moved)] of samples on one device: float64."""
    w = torch.cat([part for part, _ in found])
    lengths = torch.tensor([part.numel() for part, _ in found], device="cpu")
    numbers = torch.tensor([row for _, row in found], dtype=torch.float32, device="cpu").t()
    counts, anchor_rate, decay_rate, lr = numbers.repeat_interleave(lengths, 1).to(w.device)
    effects = ([pull(w, anchor_rate, DISTANCE)], [pull(w, decay_rate)], [lr, -lr])
    sums = []
    for changes in effects:
        wanting = torch.stack([change != 0 for change in changes])
        flags = torch.stack([moved(w, change, extra_bits) for change in changes])
        sums.append(torch.stack([(counts * (flags & wanting)).double().sum(), (counts * wanting).double().sum()]))
    return torch.stack(sums)


def sample(whole: Tensor, places: dict[tuple[int, torch.device], Tensor]) -> Tensor:
    """``SAMPLE`` elements of a dense tensor, spread evenly over its memory, in one dimension; all of a small one.

    Args:
        whole: any dtype and shape.
        places: where they lie, by size and device; filled here.
    """
    n = whole.numel()
    flat = whole.detach().as_strided((n,), (1,))
    if n <= 4 * SAMPLE:
        return flat
    key = n, whole.device
    if key not in places:
        # Not multiples of one number, which could meet few of the columns of a matrix.
        golden = (5**0.5 - 1) / 2
        places[key] = (torch.arange(SAMPLE, dtype=torch.float64, device=whole.device) * golden % 1.0 * n).long()
    return flat[places[key]]


def stands_still(parameters: Iterable[tuple[dict[str, Any], Tensor, bool]], extra_bits: int) -> str | None:
    """The warning that steps, decay or anchor move no typical weight, since it is rounded to nearest; "" if they do.

    Args:
        parameters: (group, 16-bit parameter, whether it is anchored).
        extra_bits: low bits that are kept beside these: 0 or 8.

    None where :func:`moved_shares` is None.
    """
    parameters = list(parameters)
    shares = moved_shares(parameters, extra_bits)
    if shares is None:
        return None
    still = {option: found for option, found in shares.items() if found[0] < 0.5}
    if not still:
        return ""
    said = ", ".join(
        f"{option if option == 'lr' else f'lr * {option}'} = {rate:.2g} moves {share:.0%} of the weights by itself"
        for option, (share, rate) in still.items()
    )
    dtypes = {p.dtype for _, p, _ in parameters}
    remedy = 'rounding="stochastic"' if torch.float16 in dtypes else 'extra_bits=16 or rounding="stochastic"'
    names = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
    kept = f" with {extra_bits} extra bits" if extra_bits else ""
    return (
        f"{', '.join(still)}: {said}: {names} weights{kept} are rounded to nearest, and so small a change is lost; "
        f"pass {remedy}"
    )
