"""The dropout family, forward and backward, against the same formula in torch's operators."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastft.nn import functional as ours

from .cases import FASTFT, Case, ReadyCase
from .harness import Work

EAGER, COMPILED = "torch eager", "torch compiled"
P = 0.1
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
"""How far, relative to its norm, a fused result may be from the exact one."""
COMPARED_ROWS = 256


@dataclass(frozen=True)
class Form:
    """An operator of the family."""

    fused: Callable[..., Tensor]
    composed: Callable[..., Tensor]
    """The same in single operators; its first argument is the dropout to use."""
    inputs: str
    """x, r: of full shape; w, b: of the length of a row."""
    passes: int
    """How many arrays of full shape the fused form reads or writes, forward and backward."""


def columns(x: Tensor) -> list[int]:
    return [x.shape[-1]]


FORMS = {
    "dropout": Form(lambda x: ours.dropout(x, P), lambda drop, x: drop(x, P), "x", 4),
    "bias_dropout_add": Form(
        lambda x, b, r: ours.bias_dropout_add(x, b, r, P), lambda drop, x, b, r: r + drop(x + b, P), "xbr", 5
    ),
    "dropout_add_layer_norm": Form(
        lambda x, r, w, b: ours.dropout_add_layer_norm(x, r, columns(x), w, b, P),
        lambda drop, x, r, w, b: F.layer_norm(r + drop(x, P), columns(x), w, b),
        "xrwb",
        9,
    ),
    "dropout_add_rms_norm": Form(
        lambda x, r, w: ours.dropout_add_rms_norm(x, r, columns(x), w, P),
        lambda drop, x, r, w: F.rms_norm(r + drop(x, P), columns(x), w, 1e-5),
        "xrw",
        9,
    ),
}
SIZES = {"16m": (16384, 1024), "8": (1, 8)}
DTYPES = (torch.float32, torch.bfloat16)


def prepare(form: Form, shape: tuple[int, int], dtype: torch.dtype, compiled: bool, device: torch.device) -> ReadyCase:
    generator = torch.Generator(device).manual_seed(0)

    def values(of: str) -> Tensor:
        empty = torch.empty(shape if of in "xr" else shape[-1:], dtype=dtype, device=device)
        return empty.normal_(generator=generator)

    inputs = [values(of).requires_grad_() for of in form.inputs]
    dy = values("x")

    def both_ways(forward: Callable[..., Tensor], *first: Any) -> Work:
        return lambda: torch.autograd.grad(forward(*first, *inputs), inputs, dy)

    check(form, inputs, dy)
    works = {FASTFT: both_ways(form.fused), EAGER: both_ways(form.composed, F.dropout)}
    absent = {}
    if compiled:
        work = both_ways(torch.compile(form.composed, dynamic=False), F.dropout)
        try:
            work()
        except Exception as error:  # no compiler, or one that fails: whatever it raises
            absent[COMPILED] = f"{type(error).__name__}: {error}".splitlines()[0]
        else:
            works[COMPILED] = work
    return ReadyCase(works, absent)


def check(form: Form, inputs: list[Tensor], dy: Tensor) -> None:
    """Raise unless the fused form agrees, forward and backward, with single operators in float64 and the same mask."""
    first = [t.detach()[:COMPARED_ROWS] if t.dim() > 1 else t.detach() for t in (*inputs, dy)]
    ways: tuple[tuple[Callable[..., Tensor], torch.dtype], ...] = (
        (form.fused, dy.dtype),
        (partial(form.composed, ours.dropout), torch.float64),
    )
    results = []
    for forward, dtype in ways:
        *tensors, direction = (t.to(dtype).requires_grad_() for t in first)
        torch.manual_seed(0)
        y = forward(*tensors)
        results.append([y.detach(), *torch.autograd.grad(y, tensors, direction.detach())])
    for fused, truth in zip(*results, strict=True):
        error = float((fused.double() - truth).norm() / truth.norm())
        if not error <= TOLERANCE[dy.dtype]:
            raise AssertionError(f"dropout: fused and composed differ by {error:.1e}")
    dropped = float((ours.dropout(dy, P) == 0).double().mean())
    if abs(dropped - P) > 6 * (P * (1 - P) / dy.numel()) ** 0.5:
        raise AssertionError(f"dropout: {dropped:.4f} were dropped instead of {P}")


def make(form_name: str, size: str, dtype: torch.dtype) -> Case:
    form, shape, kind = FORMS[form_name], SIZES[size], str(dtype).removeprefix("torch.")
    numel = shape[0] * shape[1]
    # Compiling takes longer than measuring, so not for every form.
    compiled = size == "16m" and form_name in ("dropout", "dropout_add_layer_norm")
    return Case(
        f"{form_name}_{size}_{kind}",
        "dropout",
        f"{form_name}, forward + backward, {'16.8M' if numel > 8 else numel} {kind}",
        lambda device: prepare(form, shape, dtype, compiled, device),
        nbytes=float(form.passes * numel * dtype.itemsize) if numel > 8 else None,
        memory=24.0 * numel * dtype.itemsize,
        axis={"numel": numel},
    )


CASES = tuple(
    make(form, size, dtype) for size in SIZES for dtype in DTYPES for form in FORMS if size != "8" or dtype == DTYPES[0]
)
