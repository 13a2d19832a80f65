"""The operations as ``torch.ops.fastft.*``, for compiled and exported graphs.

Each is a pure function: the mask's state {seed, offset} is an argument, an int64[2] tensor on the device. (Two equal
calls of an operation that drew its own state would be merged by common subexpression elimination.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from . import kernels

library = torch.library.Library("fastft", "DEF")
ops: Any = torch.ops.fastft


Function = TypeVar("Function", bound=Callable[..., Any])


def define(
    schema: str, fake: Callable[..., Any], setup: Callable[..., None], backward: Callable[..., Any]
) -> Callable[[Function], Function]:
    """A decorator: registers an operation that the decorated function computes."""
    name = "fastft::" + schema.split("(")[0]

    def decorate(function: Function) -> Function:
        library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        library.impl(schema.split("(")[0], function, "CompositeExplicitAutograd")
        torch.library.register_fake(name, fake, lib=library)
        torch.library.register_autograd(name, backward, setup_context=setup, lib=library)
        return function

    return decorate


def promoted(*tensors: Tensor | None) -> torch.dtype:
    """The dtype of these tensors' sum."""
    dtype = None
    for t in tensors:
        if t is not None and t.dtype is not dtype:
            dtype = t.dtype if dtype is None else torch.promote_types(dtype, t.dtype)
    assert dtype is not None
    return dtype


# -- residual + dropout(x + bias) --------------------------------------------------------------------------


def fake_bias_dropout_add(x: Tensor, bias: Tensor | None, residual: Tensor | None, p: float, state: Tensor) -> Tensor:
    return torch.empty_like(x, dtype=promoted(x, bias, residual))


def setup_bias_dropout_add(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, bias, residual, ctx.p, state = inputs
    ctx.save_for_backward(state)
    ctx.dtypes = x.dtype, None if bias is None else bias.dtype, None if residual is None else residual.dtype


def autograd_bias_dropout_add(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (state,) = ctx.saved_tensors
    dtype, bias_dtype, residual_dtype = ctx.dtypes
    wants_x, wants_bias, wants_residual = ctx.needs_input_grad[:3]
    dx = dbias = None
    if wants_bias:
        dx, dbias = ops.bias_dropout_add_backward(grad, ctx.p, state, dtype, bias_dtype)
    elif wants_x:
        dx = ops.bias_dropout_add(grad, None, None, ctx.p, state).to(dtype)
    return dx, dbias, grad.to(residual_dtype) if wants_residual else None, None, None


@define(
    "bias_dropout_add(Tensor x, Tensor? bias, Tensor? residual, float p, Tensor state) -> Tensor",
    fake_bias_dropout_add,
    setup_bias_dropout_add,
    autograd_bias_dropout_add,
)
def bias_dropout_add(x: Tensor, bias: Tensor | None, residual: Tensor | None, p: float, state: Tensor) -> Tensor:
    return kernels.bias_dropout_add(x, bias, residual, (p, state), promoted(x, bias, residual))


# -- its gradient where there is a bias --------------------------------------------------------------------


def fake_bias_dropout_add_backward(
    grad: Tensor, p: float, state: Tensor, dtype: torch.dtype, bias_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    return grad.new_empty(grad.shape, dtype=dtype), grad.new_empty(grad.shape[-1:], dtype=bias_dtype)


def setup_bias_dropout_add_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    grad, ctx.p, state, *_ = inputs
    ctx.dtype = grad.dtype
    ctx.save_for_backward(state)


def autograd_bias_dropout_add_backward(ctx: Any, ddx: Tensor, ddbias: Tensor) -> tuple[Tensor | None, ...]:
    (state,) = ctx.saved_tensors
    return ops.bias_dropout_add(ddx.to(ctx.dtype) + ddbias.to(ctx.dtype), None, None, ctx.p, state), *[None] * 4


@define(
    "bias_dropout_add_backward(Tensor grad, float p, Tensor state, ScalarType dtype, ScalarType bias_dtype)"
    " -> (Tensor, Tensor)",
    fake_bias_dropout_add_backward,
    setup_bias_dropout_add_backward,
    autograd_bias_dropout_add_backward,
)
def bias_dropout_add_backward(
    grad: Tensor, p: float, state: Tensor, dtype: torch.dtype, bias_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    return kernels.bias_dropout_add_backward(grad, (p, state), dtype, bias_dtype)


# -- anchor + dropout(weight − anchor) ---------------------------------------------------------------------


def fake_mixout(weight: Tensor, anchor: Tensor, p: float, state: Tensor) -> Tensor:
    return torch.empty_like(weight)


def setup_mixout(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *_, ctx.p, state = inputs
    ctx.save_for_backward(state)


def autograd_mixout(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (state,) = ctx.saved_tensors
    return ops.bias_dropout_add(grad, None, None, ctx.p, state), None, None, None


@define(
    "mixout(Tensor weight, Tensor anchor, float p, Tensor state) -> Tensor", fake_mixout, setup_mixout, autograd_mixout
)
def mixout(weight: Tensor, anchor: Tensor, p: float, state: Tensor) -> Tensor:
    return kernels.mixout(weight, anchor, (p, state))


# -- norm(residual + dropout(x)) ---------------------------------------------------------------------------


def fake_dropout_add_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    columns: int,
    eps: float,
    rms: bool,
    dtype: torch.dtype,
    p: float,
    state: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    y = x.new_empty(x.shape, dtype=dtype)
    rstd = x.new_empty((x.numel() // columns,), dtype=kernels.statistics_dtype(dtype))
    return y, torch.empty_like(y), rstd.new_empty((0,)) if rms else torch.empty_like(rstd), rstd


def setup_dropout_add_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, residual, weight, bias, ctx.columns, _, _, dtype, ctx.p, state = inputs
    _, sum, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(sum, weight, mean, rstd, state)
    affine = weight if weight is not None else bias
    ctx.affine = None if affine is None else affine.shape
    ctx.dtypes = x.dtype, residual.dtype, dtype if affine is None else affine.dtype


def autograd_dropout_add_norm(ctx: Any, dy: Tensor | None, dsum: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    sum, weight, mean, rstd, state = ctx.saved_tensors
    if dy is None:
        dy = torch.zeros_like(sum)
    _, _, wants_weight, wants_bias, *_ = ctx.needs_input_grad
    dx, dresidual, dweight, dbias = ops.dropout_add_norm_backward(
        dy, dsum, sum, weight, mean, rstd, ctx.columns, ctx.p, state, *ctx.dtypes, wants_weight, wants_bias
    )
    dweight = dweight.view(ctx.affine) if wants_weight else None
    dbias = dbias.view(ctx.affine) if wants_bias else None
    return dx, dresidual, dweight, dbias, *[None] * 6


@define(
    "dropout_add_norm(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, SymInt columns, float eps, bool rms,"
    " ScalarType dtype, float p, Tensor state) -> (Tensor, Tensor, Tensor, Tensor)",
    fake_dropout_add_norm,
    setup_dropout_add_norm,
    autograd_dropout_add_norm,
)
def dropout_add_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    columns: int,
    eps: float,
    rms: bool,
    dtype: torch.dtype,
    p: float,
    state: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return kernels.dropout_add_norm(x, residual, weight, bias, columns, eps, rms, dtype, True, (p, state))


def fake_dropout_add_norm_backward(
    dy: Tensor,
    dsum: Tensor | None,
    sum: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    columns: int,
    p: float,
    state: Tensor,
    dtype: torch.dtype,
    residual_dtype: torch.dtype,
    weight_dtype: torch.dtype,
    wants_weight: bool,
    wants_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        dy.new_empty(dy.shape, dtype=dtype),
        dy.new_empty(dy.shape, dtype=residual_dtype),
        dy.new_empty((columns if wants_weight else 0,), dtype=weight_dtype),
        dy.new_empty((columns if wants_bias else 0,), dtype=weight_dtype),
    )


def no_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    pass


def not_twice(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError(
        "dropout_add_layer_norm, dropout_add_rms_norm: expected one derivative outside eager mode, got a second one"
    )


@define(
    "dropout_add_norm_backward(Tensor dy, Tensor? dsum, Tensor sum, Tensor? weight, Tensor mean, Tensor rstd,"
    " SymInt columns, float p, Tensor state, ScalarType dtype, ScalarType residual_dtype, ScalarType weight_dtype,"
    " bool wants_weight, bool wants_bias) -> (Tensor, Tensor, Tensor, Tensor)",
    fake_dropout_add_norm_backward,
    no_context,
    not_twice,
)
def dropout_add_norm_backward(
    dy: Tensor,
    dsum: Tensor | None,
    sum: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    columns: int,
    p: float,
    state: Tensor,
    dtype: torch.dtype,
    residual_dtype: torch.dtype,
    weight_dtype: torch.dtype,
    wants_weight: bool,
    wants_bias: bool,
) -> tuple[Tensor, ...]:
    grads = kernels.dropout_add_norm_backward(
        dy,
        dsum,
        sum,
        weight,
        mean,
        rstd,
        columns,
        (p, state),
        (dtype, residual_dtype),
        (wants_weight, wants_bias),
        weight_dtype,
    )
    return tuple(rstd.new_empty(0, dtype=weight_dtype) if g is None else g for g in grads)
