"""``adamw_``: the step as a function, for those who keep the state themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastft import _C

from .anchoring import AnchorMode, check_anchor_options, check_pull
from .checks import check_numbers, refuse_unusable
from .entries import Part, record_of
from .formats import scales_shape
from .low_precision import Precision, Rounding
from .masks import UpdateMask
from .processes import Spread
from .state import CODED, check_like
from .step import global_sums, take_step
from .tensors import KERNEL_DTYPES, fit_grad, is_dense, is_wrapper, runs_kernels
from .weight_sums import new_sums


@torch.no_grad()
def adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    max_exp_avg_sqs: Sequence[Tensor] | None = None,
    exp_avg_scales: Sequence[Tensor | None] | None = None,
    exp_avg_sq_scales: Sequence[Tensor | None] | None = None,
    low_bits: Sequence[Tensor | None] | None = None,
    anchors: Sequence[Tensor | None] | None = None,
    importances: Sequence[Tensor | None] | None = None,
    update_masks: Sequence[Tensor | None] | None = None,
    lr: float | Tensor,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    maximize: bool = False,
    anchor_decay: float = 0.0,
    anchor_mode: AnchorMode = "decoupled",
    max_grad_norm: float | None = None,
    skip_nonfinite: bool = False,
    rounding: Rounding = "nearest",
    rounding_seed: int = 0,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    skipped_steps: Tensor | None = None,
) -> Tensor | None:
    """One AdamW step in place: writes params, moments and steps. The formulas are those of :class:`AdamW`.

    Args:
        params: n dense float32, bfloat16, float16 or float64 tensors, on CPU or CUDA.
        grads: as many of the same shapes, of any floating dtype; None leaves its parameter untouched.
        exp_avgs, exp_avg_sqs: the moments, in the parameter's memory order and dtype, or float32 with 16-bit
            parameters, or bfloat16 with any but float64 ones; or, where there are scales, uint8 codes.
        steps: how many steps each parameter has taken, one-element float32 or float64 tensors on the CPU, or
            float32 on the parameter's device; counted up here.
        max_exp_avg_sqs: amsgrad's running maxima; None without amsgrad.
        exp_avg_scales, exp_avg_sq_scales: of moments in 8 bits (``state_dtype="8bit"`` of :class:`AdamW`), of a
            parameter whose rows lie in one piece: float32, one for each block of 256 elements of a row, the last of
            which may be shorter: ``[rows, ceil(row / 256)]``, or ``[ceil(n / 256)]`` of one dimension; None where
            moments are numbers. Begin with zeros.
        low_bits: of bfloat16 parameters (``extra_bits`` of :class:`AdamW`), in their shape and memory order: uint16, or
            uint8 for 8 bits; None where there are none. Begin with zeros. Nothing notices here that somebody else has
            written a parameter: set its bits to 0 then.
        anchors: of the parameters' shapes, any floating dtype (float64 only with float64); None where free.
        importances: of the anchors' elements, as in :meth:`fastft.Anchor.with_importance`, any such dtype; None where
            there is none. That they are finite and nowhere negative is not checked: it would take another pass.
        update_masks: bool, ``[rows]`` or the parameter's shape; None where all of it is stepped.
        lr: a number, or a one-element tensor.
        rounding, rounding_seed: of 16-bit parameters, as in :class:`AdamW` over the same list.
        grad_scale: float32, one element: a factor that the gradients still carry.
        found_inf: float32, one element: the step is skipped where it is not 0.
        skipped_steps: int64, one element, on the first parameter's device; counts the skipped steps.

    Returns the norm of these gradients together (0-d, float64, unscaled, before clipping) if ``max_grad_norm`` or
    ``skip_nonfinite`` asks for it, else None. Other processes are not asked.

    Raises:
        ValueError: for arguments that do not fit, before anything is written.
    """
    n = len(params)
    lists: dict[str, Sequence[Any] | None] = {
        "grads": grads,
        "exp_avgs": exp_avgs,
        "exp_avg_sqs": exp_avg_sqs,
        "steps": steps,
        "max_exp_avg_sqs": max_exp_avg_sqs,
        "exp_avg_scales": exp_avg_scales,
        "exp_avg_sq_scales": exp_avg_sq_scales,
        "low_bits": low_bits,
        "anchors": anchors,
        "importances": importances,
        "update_masks": update_masks,
    }
    for name, values in lists.items():
        if values is not None and len(values) != n:
            raise ValueError(f"{name}: expected {n} entries, one for each of params, got {len(values)}")
    check_numbers(betas, eps, weight_decay, max_grad_norm)
    precision = Precision(rounding=rounding, rounding_seed=rounding_seed)
    check_anchor_options(anchor_decay, anchor_mode, "adamw_")
    if importances is None or any(
        a is not None and f is None for a, f in zip(anchors or (), importances, strict=False)
    ):
        check_pull(lr, anchor_decay, anchor_mode, "adamw_")

    records: list[_C.AdamWRecord] = []
    for i, p in enumerate(params):
        name = f"params[{i}]"
        if grads[i] is None:
            records.append(_C.AdamWRecord(p, 0))
            continue
        refuse_unusable(p, name)
        if p.dtype not in KERNEL_DTYPES or p.layout != torch.strided or not is_dense(p) or is_wrapper(p):
            raise ValueError(
                f"{name}: expected a dense float32, bfloat16, float16 or float64 tensor, got {p.dtype}, "
                f"{p.layout}, {type(p).__name__}, shape {list(p.shape)}, strides {list(p.stride())}"
            )
        anchored: list[Tensor | None] = []
        for key, given in (("anchors", anchors), ("importances", importances)):
            tensor = given[i] if given is not None else None
            if tensor is not None and tensor.shape != p.shape:
                raise ValueError(f"{key}[{i}]: expected shape {list(p.shape)}, got {list(tensor.shape)}")
            anchored.append(tensor)
        anchor, importance = anchored
        if importance is not None and anchor is None:
            raise ValueError(f"importances[{i}]: expected None without an anchor, got a tensor")
        mask = update_masks[i] if update_masks is not None else None
        if max_exp_avg_sqs is not None and max_exp_avg_sqs[i] is None:
            raise ValueError(f"max_exp_avg_sqs[{i}]: expected a tensor like {name}, got None")
        low = low_bits[i] if low_bits is not None else None
        scales = [None if given is None else given[i] for given in (exp_avg_scales, exp_avg_sq_scales)]
        check_low_precision(i, p, low, exp_avgs[i], scales, rounding)
        records.append(
            record_of(
                p,
                0,
                name,
                exp_avg=exp_avgs[i],
                exp_avg_sq=exp_avg_sqs[i],
                max_exp_avg_sq=None if max_exp_avg_sqs is None else max_exp_avg_sqs[i],
                step=steps[i],
                scales=None if scales[0] is None or scales[1] is None else (scales[0], scales[1]),
                low_bits=low,
                weight_sums=None if low is None else new_sums(p),
                rounding_key=precision.key(p, i),
                counts_on_device=runs_kernels(p.device) and steps[i].device == p.device,
                anchor=anchor if anchor_decay != 0.0 else None,
                importance=importance if anchor_decay != 0.0 else None,
                anchor_mode=anchor_mode,
                mask=None if mask is None else UpdateMask(mask, p, name),
            )
        )
    live = [i for i, record in enumerate(records) if record.steps]
    shared = _C.overlapping([params[i] for i in live])
    if shared:
        raise ValueError(f"params[{live[shared[0]]}]: expected memory of its own, got some that another one shares")
    part = Part(records)
    for i in live:
        grad = grads[i]
        assert grad is not None
        part.plan.set_grad(i, fit_grad(grad, params[i], params[i], f"params[{i}]"))
    group = {
        "lr": lr,
        "betas": betas,
        "eps": eps,
        "weight_decay": weight_decay,
        "amsgrad": max_exp_avg_sqs is not None,
        "maximize": maximize,
        "anchor_decay": anchor_decay,
        "anchor_mode": anchor_mode,
    }
    sums, found_inf = global_sums([part], Spread(), max_grad_norm is not None or skip_nonfinite, found_inf)
    return take_step(
        [part],
        [group],
        sums=sums,
        max_grad_norm=max_grad_norm,
        skip_nonfinite=skip_nonfinite,
        grad_scale=grad_scale,
        found_inf=found_inf,
        skipped_steps=skipped_steps,
    )


def check_low_precision(
    i: int, p: Tensor, low: Tensor | None, exp_avg: Tensor, scales: Sequence[Tensor | None], rounding: str
) -> None:
    """Raise for low bits and scales of ``params[i]`` that do not fit it; what else they must be, the core checks."""
    if low is not None:
        if p.dtype != torch.bfloat16:
            raise ValueError(f"low_bits[{i}]: expected None with a {p.dtype} parameter, got a tensor")
        if low.dtype == torch.uint16 and rounding == "stochastic":
            raise ValueError(f'low_bits[{i}]: expected uint8 with rounding="stochastic", since 16 bits are not rounded')
    for key, scale in zip(CODED, scales, strict=True):
        if (scale is not None) != (exp_avg.dtype == torch.uint8):
            raise ValueError(
                f"{key}_scales[{i}]: expected a tensor with uint8 moments, and None with others, got "
                f"{type(scale).__name__} with {exp_avg.dtype}"
            )
        if scale is not None:
            check_like(scale, (torch.float32,), scales_shape(p.shape), f"{key}_scales[{i}]")
