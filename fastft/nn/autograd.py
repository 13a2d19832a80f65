"""Eager dropout: autograd functions that call the core and save (p, seed, offset) instead of a mask.

In the old style (``forward`` with ``ctx``), which costs less: functorch transforms never get here
(:func:`fastft.nn.functional.route_of`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd import Function

from fastft import _C

from . import kernels
from .random import Random

core_dropout, core_bias_dropout_add, core_takes = _C.dropout, _C.bias_dropout_add, _C.dropout_takes
Apply: TypeAlias = Callable[..., Any]
grad_enabled, transforms_active = torch.is_grad_enabled, torch._C._are_functorch_transforms_active


class Dropout(Function):
    """dropout(x). Linear, so it is its own derivative: it is applied to gradients, and to their gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, random: Random) -> Tensor:
        ctx.random = random
        return kernels.bias_dropout_add(x, None, None, random)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if grad_enabled() or transforms_active():
            return dropout_again(grad, ctx.random), None
        if grad.is_neg():
            grad = grad.resolve_neg()
        dx = core_dropout(grad, ctx.random)
        if dx is None:  # not contiguous: what sum() sends back, for one
            dx = grad.clone(memory_format=torch.contiguous_format)
            if not core_takes(dx):
                return dropout_again(grad, ctx.random), None
            core_bias_dropout_add(dx, dx, ctx.random)
        return dx, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        return dropout_again(tangent, ctx.random)


class PlainDropout(Dropout):
    """dropout(x) of an x that the core takes as it is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, random: Random) -> Tensor:
        ctx.random = random
        return core_dropout(x, random)


# A small call's time goes to Python, a tenth of it to what torch does for functorch, which never gets here. These are
# Function.apply, and the method that the autograd engine calls, without that part.
apply_plain_dropout: Apply = super(Function, PlainDropout).apply
PlainDropout._backward_cls.apply = PlainDropout.backward  # type: ignore[attr-defined]


class DropoutInPlace(Dropout):
    """x becomes dropout(x)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, random: Random) -> Tensor:
        ctx.random = random
        ctx.mark_dirty(x)
        dropout_(x, random)
        return x


class Mixout(Dropout):
    """anchor + dropout(weight − anchor), with a constant anchor."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, anchor: Tensor, random: Random) -> Tensor:  # type: ignore[override]
        ctx.random = random
        return kernels.mixout(weight, anchor, random)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return (*Dropout.backward(ctx, grad), None)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        return dropout_again(tangent, ctx.random)


class BiasDropoutAdd(Function):
    """residual + dropout(x + bias); bias and residual may be None."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, residual: Tensor | None, dtype: torch.dtype, random: Random
    ) -> Tensor:
        ctx.random = random
        ctx.dtypes = x.dtype, None if bias is None else bias.dtype, None if residual is None else residual.dtype
        return kernels.bias_dropout_add(x, bias, residual, random, dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dtype, bias_dtype, residual_dtype = ctx.dtypes
        wants_x, wants_bias, wants_residual = ctx.needs_input_grad[:3]
        dx = dbias = dresidual = None
        plain = readable(grad) if wants_bias and not grad_enabled() else None
        if plain is not None:
            dx, dbias = kernels.bias_dropout_add_backward(plain, ctx.random, dtype, bias_dtype)
        elif wants_bias:
            full = dropout_again(grad, ctx.random)
            dx, dbias = full.to(dtype), full.reshape(-1, full.shape[-1]).sum(0).to(bias_dtype)
        elif wants_x:
            dx = dropout_again(grad, ctx.random, dtype)
        if wants_residual:
            dresidual = grad.to(residual_dtype)
        return dx, dbias, dresidual, None, None

    @staticmethod
    def jvp(ctx: Any, x: Tensor | None, bias: Tensor | None, residual: Tensor | None, *_: None) -> Tensor | None:
        shifted = bias if x is None else x if bias is None else x + bias
        if shifted is None:
            return residual
        tangent = dropout_again(shifted, ctx.random)
        return tangent if residual is None else residual + tangent


class DropoutAddNorm(Function):
    """(norm(sum), sum) with sum = residual + dropout(x): layer or rms norm over the last ``columns`` elements.

    Saves the sum, the norm's statistics and its weight. The sum is always an output, so that the gradient can be
    differentiated with respect to it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        columns: int,
        eps: float,
        rms: bool,
        dtype: torch.dtype,
        random: Random,
    ) -> tuple[Tensor, Tensor]:
        y, sum, mean, rstd = kernels.dropout_add_norm(x, residual, weight, bias, columns, eps, rms, dtype, True, random)
        ctx.save_for_backward(sum, weight, mean, rstd)
        ctx.set_materialize_grads(False)
        ctx.columns, ctx.eps, ctx.rms, ctx.random = columns, eps, rms, random
        ctx.dtypes = x.dtype, residual.dtype
        affine = weight if weight is not None else bias
        ctx.affine = (None, dtype) if affine is None else (affine.shape, affine.dtype)
        return y, sum

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dsum: Tensor | None) -> tuple[Tensor | None, ...]:
        sum, weight, mean, rstd = ctx.saved_tensors
        if dy is None:
            dy = torch.zeros_like(sum)
        plain, plain_sum = readable(dy), None if dsum is None else readable(dsum)
        if grad_enabled() or plain is None or (plain_sum is None) != (dsum is None):
            return (*DropoutAddNorm.composed_backward(ctx, dy, dsum, sum, weight), *[None] * 5)
        shape, weight_dtype = ctx.affine
        dx, dresidual, dweight, dbias = kernels.dropout_add_norm_backward(
            plain,
            plain_sum,
            sum,
            weight,
            mean,
            rstd,
            ctx.columns,
            ctx.random,
            ctx.dtypes,
            ctx.needs_input_grad[2:4],
            weight_dtype,
        )
        dweight, dbias = (None if d is None else d.view(shape) for d in (dweight, dbias))
        return dx, dresidual, dweight, dbias, *[None] * 5

    @staticmethod
    def composed_backward(
        ctx: Any, dy: Tensor, dsum: Tensor | None, sum: Tensor, weight: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """The formulas of csrc/math/norm.h in operations that can be differentiated again."""
        computed = kernels.statistics_dtype(sum.dtype)
        s, g = sum.to(computed).reshape(-1, ctx.columns), dy.to(computed).reshape(-1, ctx.columns)
        centered = s if ctx.rms else s - s.mean(1, keepdim=True)
        rstd = (centered.square().mean(1, keepdim=True) + ctx.eps).rsqrt()
        h = centered * rstd
        dtype, residual_dtype = ctx.dtypes
        shape, weight_dtype = ctx.affine
        wants_weight, wants_bias = ctx.needs_input_grad[2:4]
        dweight = (g * h).sum(0).to(weight_dtype).reshape(shape) if wants_weight else None
        dbias = g.sum(0).to(weight_dtype).reshape(shape) if wants_bias else None
        if weight is not None:
            g = g * weight.to(computed).reshape(-1)
        ds = g - h * (g * h).mean(1, keepdim=True)
        if not ctx.rms:
            ds = ds - g.mean(1, keepdim=True)
        ds = (rstd * ds).reshape(sum.shape)
        if dsum is not None:
            ds = ds + dsum
        return dropout_again(ds, ctx.random).to(dtype), ds.to(residual_dtype), dweight, dbias


def readable(x: Tensor) -> Tensor | None:
    """A gradient as the core reads it; None where it cannot (under vmap, and for tensor subclasses)."""
    if transforms_active():
        return None
    x = kernels.ready(x)
    return x if core_takes(x) else None


def dropout_again(x: Tensor, random: Random, dtype: torch.dtype | None = None) -> Tensor:
    """dropout(x) with a mask that was drawn before, for any x that a backward pass may bring."""
    if grad_enabled() and x.requires_grad and not transforms_active():
        result: Tensor = apply_dropout(x, random)
        return result.to(dtype or x.dtype)
    plain = readable(x)
    if plain is not None:
        return kernels.bias_dropout_add(plain, None, None, random, dtype)
    kept = kernels.bias_dropout_add(torch.ones(x.shape, dtype=x.dtype, device=x.device), None, None, random) != 0
    p = random[0]
    return torch.where(kept, x * (1.0 / (1.0 - p) if p < 1.0 else 0.0), 0.0).to(dtype or x.dtype)


def dropout_(x: Tensor, random: Random) -> None:
    """x becomes dropout(x), in any layout. Version counters and autograd are the caller's job."""
    if core_takes(x) and not x.is_neg():
        core_bias_dropout_add(x, x, random)
    else:
        x.copy_(kernels.bias_dropout_add(x, None, None, random))


apply_dropout: Apply = Dropout.apply
apply_dropout_: Apply = DropoutInPlace.apply
apply_mixout: Apply = Mixout.apply
apply_bias_dropout_add: Apply = BiasDropoutAdd.apply
apply_dropout_add_norm: Apply = DropoutAddNorm.apply
