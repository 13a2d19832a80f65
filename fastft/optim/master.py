"""Out of 16-bit weights and 8-bit moments: the float32 that they stand for, for saving and for other optimizers."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from fastft import _C

from .adamw import AdamW
from .entries import Part
from .formats import join
from .low_precision import SIXTEEN_BIT
from .state import CODED, LOW_BITS, MOMENTS, OWN_KEYS, moment_of, new_moment, spread_like
from .step import take_step
from .tensors import local, runs_kernels


@torch.no_grad()
def master_weights(model: nn.Module, optimizer: AdamW) -> dict[str, Tensor]:
    """The float32 weights of a model that is trained in 16 bits, with the low bits that ``extra_bits`` keeps.

    Args:
        model: whose parameters are asked for.
        optimizer: which has stepped them.

    Returns:
        Float32 tensors (DTensors of sharded parameters) under the names of ``model.named_parameters()``, to be saved or
        loaded into a float32 model. Parameters without low bits are only widened, and those that somebody else has
        written since the last step are as they were written. Float32 parameters are not copied.

    To resume, save ``model.state_dict()`` beside the optimizer's instead: rounded to bfloat16 again, a float32 weight
    half-way between two may become another one than that which the low bits belong to.

    Raises:
        TypeError: the optimizer is no :class:`fastft.AdamW`.
    """
    if not isinstance(optimizer, AdamW):
        raise TypeError(f"optimizer: expected a fastft.AdamW, got {type(optimizer).__name__}")
    found = {}
    for name, p in model.named_parameters():
        low = optimizer.state.get(p, {}).get(LOW_BITS)
        if low is None or p.dtype != torch.bfloat16 or low.shape != p.shape:
            found[name] = p.detach().float()
            continue
        part = local(p.detach())
        kept = torch.empty_like(part, dtype=low.dtype).copy_(local(low))  # in its memory order
        found[name] = spread_like(join(part, still_valid(optimizer, p, kept)), p, p.shape)
    return found


def still_valid(optimizer: AdamW, p: Tensor, low: Tensor) -> Tensor:
    """``low``, low bits of this process's part of ``p``, but 0 where a step would take them as 0."""
    sums = optimizer._weight_sums.known(p)
    if sums is None or low.numel() == 0:
        return low
    # A step on a copy, which moves nothing, with moments in the format of the steps before: the core alone knows how
    # it cuts a tensor into the chunks that it has sums for.
    stepped = local(p.detach()).clone()
    moments: dict[str, Any] = {}
    for key, (codes, scales) in CODED.items():
        made = {name: local(tensor) for name, tensor in new_moment(p, key, optimizer._precision).items()}
        moments[key] = made.get(key, made.get(codes))
        moments[f"{key}_scales"] = made.get(scales)
    on_device = runs_kernels(stepped.device)
    checked = low.clone()
    mask = optimizer._masks.get(p)
    update_mask, rows = (None, None) if mask is None else mask.for_core(p)
    record = _C.AdamWRecord(
        stepped,
        0,
        name="a copy",
        counts_on_device=on_device,
        stepped=stepped,
        step=torch.zeros((), dtype=torch.float32, device=stepped.device if on_device else "cpu"),
        low_bits=checked,
        weight_sums=sums.clone(),
        update_mask=update_mask,
        rows=rows,
        **moments,
    )
    part = Part([record])
    part.plan.set_grad(0, torch.zeros_like(stepped))
    nothing = {"lr": 0.0, "betas": (0.9, 0.999), "eps": 1.0, "weight_decay": 0.0, "anchor_decay": 0.0}
    take_step([part], [{**nothing, "amsgrad": False, "maximize": False, "anchor_mode": "decoupled"}])
    return checked


@torch.no_grad()
def full_precision_state(optimizer: AdamW) -> dict[str, Any]:
    """The optimizer's state dict with its moments in float32, as ``torch.optim.AdamW`` over float32 weights loads it.

    Its state is a copy: another optimizer that loads it goes on by itself.
    8-bit and 16-bit moments are widened, and low bits left out: they belong to the weights, which
    :func:`master_weights` gives in float32. Moments of float64 and complex parameters stay. A ``fastft.AdamW`` loads it
    too, with its anchor, masks and counters. The other way, ``load_state_dict`` takes any of these state dicts.

    Raises:
        TypeError: the optimizer is no :class:`fastft.AdamW`.
    """
    if not isinstance(optimizer, AdamW):
        raise TypeError(f"optimizer: expected a fastft.AdamW, got {type(optimizer).__name__}")
    packed = optimizer.state_dict()
    positions = [i for group in packed["param_groups"] for i in group["params"]]
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for i, p in zip(positions, params, strict=True):
        saved = packed["state"].get(i)
        if not saved:
            continue
        wide = {key: copy.deepcopy(value) for key, value in saved.items() if key not in (*MOMENTS, *OWN_KEYS)}
        for key in MOMENTS:
            if key in saved or CODED.get(key, ("",))[0] in saved:
                moment = moment_of(saved, p, key)
                wide[key] = moment.float() if moment.dtype in SIXTEEN_BIT else moment.clone()
        packed["state"][i] = wide
    return packed
