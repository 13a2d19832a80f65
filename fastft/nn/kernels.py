"""The compiled core's functions for tensors of any layout, without autograd. They allocate their results."""

from __future__ import annotations

import torch
from torch import Tensor

from fastft import _C

from .random import Random

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
DEVICES = ("cpu", *_C.kernel_devices)


def runs(tensor: Tensor) -> bool:
    """Whether the core can compute with a tensor of this dtype, device and (strided) kind."""
    return tensor.dtype in DTYPES and tensor.device.type in DEVICES and tensor.layout == torch.strided


def ready(tensor: Tensor) -> Tensor:
    """The tensor as the core reads it: contiguous, and without torch's negative bit."""
    return tensor if _C.dropout_takes(tensor) and not tensor.is_neg() else tensor.contiguous().resolve_neg()


def ready_or_none(tensor: Tensor | None) -> Tensor | None:
    """:func:`ready`, or None for None."""
    return None if tensor is None else ready(tensor)


def bias_dropout_add(
    x: Tensor, bias: Tensor | None, residual: Tensor | None, random: Random, dtype: torch.dtype | None = None
) -> Tensor:
    """residual + dropout(x + bias), in the memory order of x, and in its dtype unless one is given."""
    result = torch.empty_like(x, dtype=dtype)
    y = result if result.is_contiguous() else result.new_empty(x.shape)
    _C.bias_dropout_add(ready(x), y, random, ready_or_none(bias), None, ready_or_none(residual))
    return result if y is result else result.copy_(y)


def mixout(weight: Tensor, anchor: Tensor, random: Random) -> Tensor:
    """anchor + dropout(weight − anchor), in the memory order of weight."""
    result = torch.empty_like(weight)
    y = result if result.is_contiguous() else result.new_empty(weight.shape)
    anchor = ready(anchor)
    _C.bias_dropout_add(ready(weight), y, random, None, anchor, anchor)
    return result if y is result else result.copy_(y)


def bias_dropout_add_backward(
    grad: Tensor, random: Random, dtype: torch.dtype, bias_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """dropout(grad) and its sums over all dimensions but the last."""
    grad = ready(grad)
    columns = grad.shape[-1]
    dx = torch.empty_like(grad, dtype=dtype)
    dbias = torch.empty(columns, dtype=bias_dtype, device=grad.device)
    if dbias.numel() > 0:
        _C.bias_dropout_add_backward(grad, dx, dbias, random, workspace(grad, columns, 1))
    return dx, dbias


def dropout_add_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    columns: int,
    eps: float,
    rms: bool,
    dtype: torch.dtype,
    keep_sum: bool,
    random: Random,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y, sum, mean, rstd) of y = norm(sum), sum = residual + dropout(x), over the last ``columns`` elements.

    All are contiguous. Without ``keep_sum``, sum is y; mean is empty for rms.
    """
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    kept = torch.empty_like(y) if keep_sum else y
    rstd = torch.empty(x.numel() // columns, dtype=statistics_dtype(dtype), device=x.device)
    mean = torch.empty_like(rstd) if not rms else rstd.new_empty(0)
    _C.dropout_add_norm(
        ready(x),
        ready(residual),
        ready_or_none(weight),
        ready_or_none(bias),
        y,
        kept,
        None if rms else mean,
        rstd,
        columns,
        eps,
        random,
    )
    return y, kept, mean, rstd


def dropout_add_norm_backward(
    dy: Tensor,
    dsum: Tensor | None,
    sum: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    columns: int,
    random: Random,
    dtypes: tuple[torch.dtype, torch.dtype],
    wanted: tuple[bool, bool],
    weight_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """The gradients for x and residual, in these dtypes, and for weight and bias where ``wanted``, else None."""
    dy = ready(dy)
    dx = torch.empty_like(dy, dtype=dtypes[0])
    dresidual = torch.empty_like(dy, dtype=dtypes[1])
    dweight, dbias = (torch.empty(columns, dtype=weight_dtype, device=dy.device) if w else None for w in wanted)
    _C.dropout_add_norm_backward(
        dy,
        ready_or_none(dsum),
        sum,
        ready_or_none(weight),
        mean if mean.numel() == rstd.numel() else None,
        rstd,
        dx,
        dresidual,
        dweight,
        dbias,
        columns,
        random,
        workspace(dy, columns, 2) if any(wanted) else None,
    )
    return dx, dresidual, dweight, dbias


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums over elements of this dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def workspace(tensor: Tensor, columns: int, sums: int) -> Tensor | None:
    """Device memory for so many sums over the rows of ``tensor``; None where none is needed."""
    nbytes = _C.dropout_workspace_bytes(tensor, columns, sums)
    return torch.empty(nbytes, dtype=torch.uint8, device=tensor.device) if nbytes else None
