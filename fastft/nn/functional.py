"""Dropout that stores no mask, alone and fused with the operations around it.

Element i of the logically contiguous input is kept iff word i mod 4 of Philox4x32-10(key = seed, counter = {offset/4,
i/4}) is below round((1−p)·2³²): the mask depends on (seed, offset, i) only, so it is the same for every dtype, memory
order, number of threads and device, and the backward pass computes it again from 16 bytes. Kept elements are multiplied
by 1/(1−p); dropped elements become 0, even where they were inf or NaN.

(seed, offset) come from torch's generator of the input's device: ``torch.manual_seed``, ``torch.random.fork_rng`` and
activation checkpointing act on them as on torch's own dropout. Under ``torch.compile``, in a captured CUDA graph and
in an exported program they are drawn in the graph, so each run has another mask.

Tensors of float32, bfloat16, float16 and float64, on CPU and CUDA, of any shape and memory order, are computed here, in
float32 (float64 for float64). Everything else (complex numbers, other devices, tensor subclasses, functorch transforms)
goes to ``torch.nn.functional``, with torch's errors and torch's masks.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from numbers import Real
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.nn.parameter import Parameter
from torch.overrides import handle_torch_function, has_torch_function, has_torch_function_unary

from . import kernels
from .autograd import (
    apply_bias_dropout_add,
    apply_dropout,
    apply_dropout_,
    apply_dropout_add_norm,
    apply_mixout,
    apply_plain_dropout,
    core_dropout,
    core_takes,
    dropout_,
    grad_enabled,
    transforms_active,
)
from .ops import ops, promoted
from .random import OFFSET_STEP, Random, draw, draw_state, signed

__all__ = [
    "bias_dropout_add",
    "dropout",
    "dropout_add_layer_norm",
    "dropout_add_rms_norm",
    "dropout_mask",
    "mixout",
]

PLAIN = (Tensor, Parameter, type(None))
is_compiling, active_modes = torch.compiler.is_compiling, torch._C._len_torch_dispatch_stack


class Route(Enum):
    """How a call is computed."""

    CORE = 0  # by the core, through an autograd function
    GRAPH = 1  # by the core, through torch.ops.fastft
    TORCH = 2  # by torch


def route_of(*tensors: Tensor | None) -> Route:
    """How a call on these tensors is computed."""
    if is_compiling():
        return Route.GRAPH if computable(tensors) else Route.TORCH
    if transforms_active() or torch._C._get_tracing_state() is not None:
        return Route.TORCH
    if all(t is None or core_takes(t) for t in tensors):
        return Route.GRAPH if active_modes() else Route.CORE
    if not computable(tensors):
        return Route.TORCH
    for t in tensors:
        if type(t) not in PLAIN and type(t).__torch_dispatch__ is not Tensor.__torch_dispatch__:  # type: ignore[union-attr]
            fake = isinstance(t, torch._subclasses.FakeTensor)
            return Route.GRAPH if fake else Route.TORCH
    return Route.GRAPH if active_modes() else Route.CORE


def computable(tensors: Sequence[Tensor | None]) -> bool:
    """Whether the core can compute with all of these together."""
    devices = {t.device for t in tensors if t is not None}
    return len(devices) == 1 and all(t is None or kernels.runs(t) for t in tensors)


def probability(p: Any) -> Any:
    """p as a float if it is a number or a 0-d tensor. Anything else comes back as it is, for torch to refuse."""
    if isinstance(p, Tensor):
        if p.dim() > 0:
            raise TypeError(f"dropout(): argument 'p' (position 2) must be float, not Tensor of shape {list(p.shape)}")
        return p.item()
    return float(p) if isinstance(p, Real) else p


def checked(p: Any, input: Tensor, training: bool) -> float:
    """The probability to use: p, or 0 outside training.

    Raises:
        What ``torch.nn.functional.dropout`` raises for this p.
    """
    if type(p) is not float:
        p = probability(p)
    if not 0.0 <= p <= 1.0:
        F.dropout(input, p, training)
    return p if training else 0.0


def random_for(p: float, tensor: Tensor, generator: torch.Generator | None) -> Random:
    """The next mask. Nothing is drawn for p = 0 and p = 1, which need none."""
    return draw(p, tensor, generator) if 0.0 < p < 1.0 else (p, 0, 0)


def records(*tensors: Tensor | None) -> bool:
    """Whether autograd has to record a call on these tensors: for gradients, or for forward-mode tangents."""
    return forward_ad._current_level >= 0 or (
        grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    )


def dropout(
    input: Tensor,
    p: float | Tensor = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    generator: torch.Generator | None = None,
) -> Tensor:
    """``torch.nn.functional.dropout`` without a stored mask (Srivastava et al. 2014, Dropout: a simple way to prevent
    neural networks from overfitting, https://jmlr.org/papers/v15/srivastava14a.html).

    Args:
        input: any shape, of a floating dtype.
        p: the probability of an element to become 0: a number from 0 to 1, or a 0-d tensor.
        training: if False, or with p = 0, ``input`` itself is returned and nothing is drawn.
        inplace: write into ``input``.
        generator: a generator of the input's device to draw from, instead of torch's default.

    Returns:
        A tensor of the input's shape, dtype and memory order. Can be differentiated any number of times.

    Raises:
        ValueError: p is outside [0, 1], or a generator is given for an input that torch's own dropout computes.
        TypeError: p is neither a number nor a 0-d tensor.
        RuntimeError: p is NaN, the input's dtype is an integer, the generator belongs to another device, or the input
            is a leaf that requires grad and is to be written in place.
    """
    if has_torch_function_unary(input):
        return handle_torch_function(
            dropout, (input,), input, p=p, training=training, inplace=inplace, generator=generator
        )
    rate: float = p if type(p) is float else probability(p)
    if (
        inplace
        or not training
        or not 0.0 < rate < 1.0
        or is_compiling()
        or transforms_active()
        or active_modes()
        or not core_takes(input)
        or input.is_neg()
    ):
        return uncommon_dropout(input, rate, training, inplace, generator)
    random = draw(rate, input, generator)
    if (input.requires_grad and grad_enabled()) or forward_ad._current_level >= 0:
        return apply_plain_dropout(input, random)  # type: ignore[no-any-return]
    return core_dropout(input, random)


def torch_dropout(input: Tensor, p: float, training: bool, inplace: bool, generator: torch.Generator | None) -> Tensor:
    """torch's own dropout, which takes no generator."""
    result = F.dropout(input, p, training, inplace)
    if generator is not None:
        kind = f"{type(input).__name__} of {input.dtype} on {input.device}"
        raise ValueError(f"generator: expected None for a {kind}, since torch's own dropout computes it")
    return result


def uncommon_dropout(
    input: Tensor, p: float, training: bool, inplace: bool, generator: torch.Generator | None
) -> Tensor:
    """All cases of :func:`dropout`, with p from :func:`probability`."""
    if 0.0 <= p <= 1.0 and (not training or p == 0.0):
        return input
    route = route_of(input)
    if route is Route.TORCH or not 0.0 < p <= 1.0:
        return torch_dropout(input, p, training, inplace, generator)
    if route is Route.GRAPH:
        result: Tensor = ops.bias_dropout_add(input, None, None, p, draw_state(input.device, generator))
        return input.copy_(result) if inplace else result
    recorded = records(input)
    if inplace and recorded and input.is_leaf and input.requires_grad:
        raise RuntimeError("a leaf Variable that requires grad is being used in an in-place operation.")
    random = random_for(p, input, generator)
    if inplace and not recorded:
        dropout_(input, random)
        torch.autograd.graph.increment_version(input)
        return input
    return (apply_dropout_ if inplace else apply_dropout)(input, random)  # type: ignore[no-any-return]


def bias_dropout_add(
    input: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    p: float | Tensor = 0.5,
    training: bool = True,
    *,
    generator: torch.Generator | None = None,
) -> Tensor:
    """``residual + dropout(input + bias)`` in one pass over memory.

    Args:
        input: any shape, of a floating dtype.
        bias: ``[input.shape[-1]]``, or None.
        residual: of the input's shape, or None.
        p, training, generator: as in :func:`dropout`. Without training, or with p = 0: ``residual + (input + bias)``.

    A bias or residual of another shape that broadcasts is computed by several operations.

    Returns:
        A tensor of the dtype that the arguments promote to, as with torch's operators, in the input's memory order. Can
        be differentiated any number of times; the bias's gradient is summed in a fixed order.

    Raises:
        ValueError: p is outside [0, 1].
        RuntimeError: the shapes do not broadcast, or the tensors are on different devices.
    """
    tensors = (input, bias, residual)
    if has_torch_function(tensors):
        return handle_torch_function(
            bias_dropout_add, tensors, input, bias, residual, p=p, training=training, generator=generator
        )
    p = checked(p, input, training)
    route = route_of(*tensors)
    fits_bias = bias is None or (input.dim() > 0 and bias.shape == input.shape[-1:])
    fits = fits_bias and (residual is None or residual.shape == input.shape)
    if route is Route.TORCH or not fits or (p == 0.0 and (route is Route.GRAPH or (bias is None and residual is None))):
        shifted = input if bias is None else input + bias
        dropped = dropout(shifted, p, generator=generator)
        return dropped if residual is None else residual + dropped
    dtype = promoted(*tensors)
    if dtype == torch.float64:
        input, bias, residual = (None if t is None else t.to(dtype) for t in tensors)  # type: ignore[assignment]
    if route is Route.GRAPH:
        return ops.bias_dropout_add(input, bias, residual, p, draw_state(input.device, generator))  # type: ignore[no-any-return]
    random = random_for(p, input, generator)
    if records(input, bias, residual):
        return apply_bias_dropout_add(input, bias, residual, dtype, random)  # type: ignore[no-any-return]
    return kernels.bias_dropout_add(input, bias, residual, random, dtype)


@overload
def dropout_add_layer_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    p: float | Tensor = 0.5,
    training: bool = True,
    eps: float = 1e-5,
    *,
    return_residual: Literal[False] = False,
    generator: torch.Generator | None = None,
) -> Tensor: ...
@overload
def dropout_add_layer_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    p: float | Tensor = 0.5,
    training: bool = True,
    eps: float = 1e-5,
    *,
    return_residual: bool,
    generator: torch.Generator | None = None,
) -> Tensor | tuple[Tensor, Tensor]: ...
def dropout_add_layer_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    p: float | Tensor = 0.5,
    training: bool = True,
    eps: float = 1e-5,
    *,
    return_residual: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """``layer_norm(residual + dropout(input))`` (Ba et al. 2016, https://arxiv.org/abs/1607.06450).

    The sum is written and read once.

    Args:
        input, residual: of one shape, which ends in ``normalized_shape``; of floating dtypes.
        weight, bias: of shape ``normalized_shape``, or None.
        p, training, generator: as in :func:`dropout`. Without training, or with p = 0, nothing is dropped or drawn.
        eps: added to the variance.
        return_residual: return ``(normalised, residual + dropout(input))``, for blocks that normalise first.

    Returns:
        One or two tensors of the input's shape and of the dtype that ``input`` and ``residual`` promote to (under CUDA
        autocast float32, as with ``layer_norm``). The gradients of weight and bias are summed in a fixed order. In
        eager mode it can be differentiated twice; in compiled graphs once.

    Raises:
        ValueError: p is outside [0, 1].
        RuntimeError: the shapes do not fit, or the tensors are on different devices.
    """
    tensors = (input, residual, weight, bias)
    if has_torch_function(tensors):
        return handle_torch_function(
            dropout_add_layer_norm,
            tensors,
            input,
            residual,
            normalized_shape,
            weight,
            bias,
            p=p,
            training=training,
            eps=eps,
            return_residual=return_residual,
            generator=generator,
        )
    p = checked(p, input, training)
    y, sum = dropout_add_norm(
        input, residual, normalized_shape, weight, bias, p, eps, False, return_residual, generator
    )
    return (y, sum) if return_residual else y


@overload
def dropout_add_rms_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    p: float | Tensor = 0.5,
    training: bool = True,
    eps: float | None = 1e-5,
    *,
    return_residual: Literal[False] = False,
    generator: torch.Generator | None = None,
) -> Tensor: ...
@overload
def dropout_add_rms_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    p: float | Tensor = 0.5,
    training: bool = True,
    eps: float | None = 1e-5,
    *,
    return_residual: bool,
    generator: torch.Generator | None = None,
) -> Tensor | tuple[Tensor, Tensor]: ...
def dropout_add_rms_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    p: float | Tensor = 0.5,
    training: bool = True,
    eps: float | None = 1e-5,
    *,
    return_residual: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """``rms_norm(residual + dropout(input))`` (Zhang & Sennrich 2019, https://arxiv.org/abs/1910.07467).

    Arguments, result and errors are those of :func:`dropout_add_layer_norm`, without a bias. ``eps=None`` is the
    machine epsilon of the dtype that it computes in, as in ``torch.nn.functional.rms_norm``.
    """
    tensors = (input, residual, weight)
    if has_torch_function(tensors):
        return handle_torch_function(
            dropout_add_rms_norm,
            tensors,
            input,
            residual,
            normalized_shape,
            weight,
            p=p,
            training=training,
            eps=eps,
            return_residual=return_residual,
            generator=generator,
        )
    p = checked(p, input, training)
    y, sum = dropout_add_norm(input, residual, normalized_shape, weight, None, p, eps, True, return_residual, generator)
    return (y, sum) if return_residual else y


def dropout_add_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    p: float,
    eps: float | None,
    rms: bool,
    return_residual: bool,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor]:
    """(norm(sum), sum) of sum = residual + dropout(input). The second is undefined without ``return_residual``."""
    shape = torch.Size(normalized_shape)
    route = route_of(input, residual, weight, bias)
    dtype = promoted(input, residual)
    affine = [t for t in (weight, bias) if t is not None]
    fits = (
        residual.shape == input.shape
        and len(shape) > 0
        and input.shape[input.dim() - len(shape) :] == shape
        and all(t.shape == shape and t.dtype == affine[0].dtype for t in affine)
        and (dtype == torch.float64 or all(t.dtype != torch.float64 for t in affine))
        and input.numel() > 0
    )
    if route is Route.TORCH or not fits or (route is Route.GRAPH and p == 0.0) or forward_ad._current_level >= 0:
        sum = residual + dropout(input, p, generator=generator)
        if rms:
            return F.rms_norm(sum, shape, weight, eps), sum
        return F.layer_norm(sum, shape, weight, bias, 0.0 if eps is None else eps), sum
    if eps is None:
        eps = torch.finfo(kernels.statistics_dtype(dtype)).eps
    if dtype in (torch.bfloat16, torch.float16) and input.is_cuda and torch.is_autocast_enabled("cuda"):
        dtype = torch.float32
    if dtype == torch.float64:
        input, residual = input.to(dtype), residual.to(dtype)
        weight, bias = (None if t is None else t.to(dtype) for t in (weight, bias))
    columns = shape.numel()
    if route is Route.GRAPH:
        state = draw_state(input.device, generator)
        y, sum, *_ = ops.dropout_add_norm(input, residual, weight, bias, columns, eps, rms, dtype, p, state)
        return y, sum
    random = random_for(p, input, generator)
    if records(input, residual, weight, bias):
        return apply_dropout_add_norm(input, residual, weight, bias, columns, eps, rms, dtype, random)  # type: ignore[no-any-return]
    y, sum, *_ = kernels.dropout_add_norm(
        input, residual, weight, bias, columns, eps, rms, dtype, return_residual, random
    )
    return y, sum


def mixout(
    weight: Tensor,
    anchor: Tensor,
    p: float | Tensor,
    training: bool = True,
    *,
    generator: torch.Generator | None = None,
) -> Tensor:
    """``anchor + dropout(weight − anchor)``: Mixout (Lee et al. 2020, https://arxiv.org/abs/1909.11299).

    Each element of ``weight`` is replaced by its pre-trained value with probability p; the others are scaled so that
    the mean over masks is ``weight``. The gradient for ``weight`` is m/(1−p), with the mask m.

    Args:
        weight: any shape, of a floating dtype.
        anchor: the pre-trained values, of the weight's shape and any floating dtype. If it requires grad, the same is
            computed with the same mask by several operations.
        p, training, generator: as in :func:`dropout`. Without training, or with p = 0, ``weight`` itself is returned.

    Returns:
        A tensor of the weight's dtype and memory order.

    Raises:
        ValueError: the shapes differ, or p is outside [0, 1].
    """
    tensors = (weight, anchor)
    if has_torch_function(tensors):
        return handle_torch_function(mixout, tensors, weight, anchor, p, training=training, generator=generator)
    p = checked(p, weight, training)
    if anchor.shape != weight.shape:
        raise ValueError(f"anchor: expected the weight's shape {list(weight.shape)}, got {list(anchor.shape)}")
    if p == 0.0:
        return weight
    route = route_of(weight, anchor)
    if route is Route.TORCH or anchor.requires_grad:
        return (anchor + dropout(weight - anchor, p, generator=generator)).to(weight.dtype)
    if (anchor.dtype == torch.float64) != (weight.dtype == torch.float64):
        anchor = anchor.to(weight.dtype)
    if route is Route.GRAPH:
        return ops.mixout(weight, anchor, p, draw_state(weight.device, generator))  # type: ignore[no-any-return]
    random = random_for(p, weight, generator)
    if records(weight):
        return apply_mixout(weight, anchor, random)  # type: ignore[no-any-return]
    return kernels.mixout(weight, anchor, random)


def dropout_mask(
    size: Sequence[int] | int,
    p: float,
    *,
    seed: int,
    offset: int = 0,
    device: torch.device | str | None = None,
) -> Tensor:
    """The elements that a call with this (seed, offset) keeps.

    Args:
        size: the shape of the input.
        p: the probability of an element to be dropped.
        seed: any 64-bit integer, signed or not.
        offset: a multiple of 4, as torch's CUDA generators count; 0 for calls on the CPU, where each draws a new seed.
        device: the device of the result; None: torch's default.

    Returns:
        A bool tensor of shape ``size``: True where kept.

    Raises:
        ValueError: the seed or the offset is out of range, or p is outside [0, 1].
    """
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed: expected a 64-bit integer, got {seed}")
    if not 0 <= offset < 2**63 or offset % OFFSET_STEP:
        raise ValueError(f"offset: expected a multiple of {OFFSET_STEP} below 2**63, got {offset}")
    ones = torch.ones(size, dtype=torch.bfloat16, device=device)
    return kernels.bias_dropout_add(ones, None, None, (p, signed(seed), offset)) != 0
