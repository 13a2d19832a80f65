"""The functions that forwards rewritten by ``fuse_dropout_`` call.

Each computes what the original code did, by the modules that it finds when it is called: fused where these are plain
dropouts and norms that nothing watches, else by calling them one after the other.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from . import functional
from .modules import Dropout

RESIDUAL = "fastft_residual"  # the argument by which a block hands its residual to a part that ends in a dropout


def unhooked(module: nn.Module) -> bool:
    """Whether no hook or replaced forward sees the module's calls. A watched module must be called."""
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
        or "forward" in module.__dict__
    )


def drops_simply(module: nn.Module) -> bool:
    """Whether calling the module is the same as calling ``functional.dropout``."""
    return type(module) in (Dropout, nn.Dropout) and not module.inplace and unhooked(module)


def dropout_add(drop: Any, x: Tensor, residual: Tensor | None) -> Tensor:
    """drop(x) + residual."""
    if residual is None:
        return drop(x)  # type: ignore[no-any-return]
    if drops_simply(drop):
        return functional.bias_dropout_add(x, None, residual, drop.p, drop.training)
    return drop(x) + residual  # type: ignore[no-any-return]


def dropout_add_norm(norm: Any, drop: Any, x: Tensor, residual: Tensor) -> Tensor:
    """norm(drop(x) + residual)."""
    if type(norm) in (nn.LayerNorm, nn.RMSNorm) and unhooked(norm) and drops_simply(drop):
        shape, rate, training = norm.normalized_shape, drop.p, drop.training
        if type(norm) is nn.RMSNorm:
            return functional.dropout_add_rms_norm(x, residual, shape, norm.weight, rate, training, norm.eps)
        return functional.dropout_add_layer_norm(x, residual, shape, norm.weight, norm.bias, rate, training, norm.eps)
    return norm(dropout_add(drop, x, residual))  # type: ignore[no-any-return]


def with_residual(child: Any, residual: Tensor) -> Callable[..., Any]:
    """``child``, with the residual added to its result, or to the first of its results."""
    if getattr(type(child), "fastft_tail", False) and unhooked(child):
        return functools.partial(child, **{RESIDUAL: residual})

    def call(*args: Any, **kwargs: Any) -> Any:
        result = child(*args, **kwargs)
        if isinstance(result, tuple):
            return (result[0] + residual, *result[1:])
        return result + residual

    return call


# By the names that rewritten forwards use.
CALLS: dict[str, Callable[..., Any]] = {
    "_fastft_dropout_add": dropout_add,
    "_fastft_dropout_add_norm": dropout_add_norm,
    "_fastft_with_residual": with_residual,
}
