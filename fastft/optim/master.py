"""Out of 16-bit weights and 8-bit moments: the float32 that they stand for, for saving and for other optimizers."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from .adamw import AdamW
from .dtensors import spread_like
from .formats import join
from .low_precision import SIXTEEN_BIT
from .state import CODED, LOW_BITS, MOMENTS, OWN_KEYS, moment_of
from .tensors import local


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
        masters = join(local(p.detach()), optimizer._weight_sums.valid(p, low))
        found[name] = spread_like(masters, p, p.shape)
    return found


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
