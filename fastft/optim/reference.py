"""The same update in plain PyTorch: slow, short, in float64. The kernels are tested against it.

    g  = grad · grad_scale⁻¹ · clip                clip = min(1, max_grad_norm / (‖g‖₂ + 1e-6))
    p  = p − lr·wd·p − pull·(p − a)                (or, with the l2 anchor: g = g + λ·F·(p − a))
    m  = β₁·m + (1−β₁)·g
    v  = β₂·v + (1−β₂)·g²                          (amsgrad: v̂ = max(v̂, v), else v̂ = v)
    p  = p − lr/(1−β₁ᵗ) · m / (√v̂/√(1−β₂ᵗ) + ε)

with anchor_mode="selective" no pull, but last of all, for the tensor as a whole (see :func:`selective_projection`)

    p  = p̃ − min(1, λ·r)·(p̃ − a)                   r = 1 − ‖p − a‖₂ / ‖p̃ − a‖₂, if ⟨g, p − a⟩ > 0 and r > 0

where pull = min(1, lr·λ), or lr·λ·F / (1 + lr·λ·F) for elements with an importance F: an implicit step on
λ/2·F·(p − a)², which divides p − a by 1 + lr·λ·F (why: csrc/math/adamw.h).

Where weights or moments are kept in few bits, a step reads them by :func:`read_weight` and :func:`read_moment`, and
what it computed is kept by :func:`write_weight` and :func:`write_moment`, which round to the bit as the kernels do.

Decay: Loshchilov & Hutter 2019, https://arxiv.org/abs/1711.05101. The l2 anchor (L2-SP): Li et al. 2018,
https://arxiv.org/abs/1802.01483. The importance (EWC): Kirkpatrick et al. 2017, https://arxiv.org/abs/1612.00796.
Selective projection (SPD): Tian et al. 2024, https://arxiv.org/abs/2411.01713. amsgrad: Reddi et al. 2018,
https://arxiv.org/abs/1904.09237.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .formats import FORMATS, decode8, encode8, join, narrow_stochastic, rounding_bits, split


def adamw(
    p: Tensor,
    grad: Tensor,
    m: Tensor,
    v: Tensor,
    v_max: Tensor | None,
    t: int,
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    anchor: Tensor | None = None,
    importance: Tensor | None = None,
    anchor_decay: float = 0.0,
    anchor_mode: str = "decoupled",
    maximize: bool = False,
    update_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """One tensor's step number ``t`` (1 is the first): the new (p, m, v, v_max), all float64, nothing in place.

    All tensors have one shape, ``update_mask`` (bool) that shape or ``[rows]``; ``grad`` is already unscaled
    and clipped. ``v_max`` is amsgrad's, None without it.
    """
    p, g, m, v = p.double(), grad.double(), m.double(), v.double()
    before = (p, m, v, v_max)
    if maximize:
        g = -g
    new_p = p - lr * weight_decay * p
    raw = g
    if anchor is not None and anchor_mode != "selective":
        delta = p - anchor.double()
        f = None if importance is None else importance.double()
        if anchor_mode == "l2":
            g = g + anchor_decay * delta * (1.0 if f is None else f)
        elif f is None:
            new_p = new_p - min(1.0, lr * anchor_decay) * delta
        else:
            rate = max(0.0, lr) * anchor_decay * f
            new_p = new_p - rate / (1.0 + rate) * delta
    m = betas[0] * m + (1 - betas[0]) * g
    v = betas[1] * v + (1 - betas[1]) * g.square()
    second = v
    if v_max is not None:
        second = v_max = torch.maximum(v_max.double(), v)
    new_p = new_p - lr / (1 - betas[0] ** t) * m / (second.sqrt() / (1 - betas[1] ** t) ** 0.5 + eps)
    if anchor is not None and anchor_mode == "selective":
        new_p = selective_projection(p, new_p, raw, anchor, anchor_decay, update_mask)
    after = (new_p, m, v, v_max)
    if update_mask is None:
        return after
    live = update_mask.view(update_mask.shape + (1,) * (p.dim() - update_mask.dim()))
    new = [
        None if a is None or b is None else torch.where(live, a, b.double()) for a, b in zip(after, before, strict=True)
    ]
    assert new[0] is not None and new[1] is not None and new[2] is not None
    return new[0], new[1], new[2], new[3]


def selective_projection(
    p: Tensor, stepped: Tensor, grad: Tensor, anchor: Tensor, anchor_decay: float, update_mask: Tensor | None = None
) -> Tensor:
    """``stepped``, the result of a step from ``p``, moved to the anchor if ``p`` had gone too far: float64.

    ``grad`` is the loss's, to be descended along. Masked-out elements do not count; the values returned for them are
    meaningless.
    """
    p, stepped, anchor = p.double(), stepped.double(), anchor.double()
    live = slice(None) if update_mask is None else update_mask
    before, after = (p - anchor)[live], (stepped - anchor)[live]
    uphill = (grad.double()[live] * before).sum()
    ratio = (after.norm() - before.norm()) / after.norm()
    if not (uphill > 0 and ratio > 0):
        return stepped
    return stepped - min(1.0, anchor_decay * float(ratio)) * (stepped - anchor)


def grad_norm(
    grads: Sequence[Tensor], update_masks: Sequence[Tensor | None] | None = None, grad_scale: float = 1.0
) -> float:
    """The global 2-norm over all gradients, unscaled, of what is not masked out."""
    total = 0.0
    for i, grad in enumerate(grads):
        mask = update_masks[i] if update_masks is not None else None
        total += (grad if mask is None else grad[mask]).double().square().sum().item()
    return math.sqrt(total) / grad_scale


def clip_factor(norm: float, max_grad_norm: float | None) -> float:
    """The factor that clips gradients: min(1, max_grad_norm / (norm + 1e-6)), as in torch."""
    return 1.0 if max_grad_norm is None else min(1.0, max_grad_norm / (norm + 1e-6))


# -- what is kept in few bits ------------------------------------------------------------------------------------


def read_weight(weight: Tensor, low_bits: Tensor | None = None) -> Tensor:
    """The weight in float64, with its low bits (uint8 or uint16, of its shape) if it has some."""
    return (weight if low_bits is None else join(weight, low_bits)).double()


def write_weight(
    value: Tensor, dtype: torch.dtype, extra_bits: int = 0, random: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """(weight, low bits or None) of a float64 ``value``.

    Args:
        value: rounded to float32 first, but for float64 weights.
        dtype: of the weight.
        extra_bits: 0, 8 or 16, beside bfloat16.
        random: int64, the 16 bits of each element by :func:`random_bits`; None: to nearest.
    """
    if extra_bits:
        return split(value.float(), extra_bits, None if random is None else random & 0xFF)
    if random is not None and dtype in (torch.bfloat16, torch.float16):
        return narrow_stochastic(value.float(), random, dtype), None
    return (value if dtype == torch.float64 else value.float()).to(dtype), None


def random_bits(key: int, t: int, shape: Sequence[int]) -> Tensor:
    """The random bits of step number ``t`` of a whole contiguous tensor, whose ``key`` is of 64 bits: int64."""
    return rounding_bits(key, t, torch.arange(math.prod(shape))).view(tuple(shape))


def read_moment(kept: Tensor | tuple[Tensor, Tensor], key: str) -> Tensor:
    """A moment in float64; of (codes, scales), ``key`` says which: ``"exp_avg"`` or ``"exp_avg_sq"``."""
    return (kept if isinstance(kept, Tensor) else decode8(*kept, FORMATS[key])).double()


def write_moment(
    value: Tensor,
    key: str,
    t: int,
    before: Tensor | tuple[Tensor, Tensor],
    update_mask: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """A moment as it is kept after step number ``t``, in the format that it had ``before``: the dtype, or 8 bits.

    In 8 bits, what ``update_mask`` (bool, ``[rows]`` or the shape) leaves out keeps its code, and a block without a
    live element its scale.
    """
    if isinstance(before, Tensor):
        return value.to(before.dtype)
    live = None
    if update_mask is not None:
        live = update_mask.view(update_mask.shape + (1,) * (value.dim() - update_mask.dim())).expand(value.shape)
    return encode8(value, FORMATS[key], t, live=live, before=before)
