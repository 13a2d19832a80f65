"""From an optimizer's parameters, options and state to the plans that step them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastft import _C
from fastft.names import listed
from fastft.warning import warn

from . import checkpoint
from .checks import refuse_unusable, why_not_fused
from .dtensors import like, placement_of
from .entries import Part, parts_of, record_of
from .lost_changes import stands_still
from .low_precision import SIXTEEN_BIT
from .processes import (
    Spread,
    averaged_together,
    check_placements,
    differing,
    fingerprint,
    initialized,
    unlike,
    zero_around,
)
from .state import CODED, LOW_BITS, prepare_state
from .tensors import is_dtensor, local
from .torch_step import TorchStep

if TYPE_CHECKING:
    from .adamw import AdamW


def plans_of(optimizer: AdamW, counts_on_device: bool) -> tuple[list[Part], TorchStep]:
    """The parts that together step everything that has a gradient or state, and what is left to torch.

    Makes the state ready; writes no parameter.

    Args:
        optimizer: whose parameters, options, anchor, masks and frozen set are read.
        counts_on_device: whether a kernel has to know whether the step is skipped, and so has to count.

    Raises:
        ValueError: for parameters that cannot be stepped with the options that concern them.
    """
    if not optimizer._is_part:
        look_at_parameters(optimizer)
    is_first = not optimizer.state
    if is_first:
        warn_of_idle_anchor(optimizer)
        warn_of_idle_options(optimizer)
    live: dict[int, tuple[int, Tensor, str]] = {}
    records: list[_C.AdamWRecord] = []
    torch_step = TorchStep()
    for position, (group_index, p, name) in enumerate(optimizer._parameters()):
        has_state = checkpoint.has_moments(optimizer, p)
        frozen = p in optimizer._frozen
        dormant = p.grad is None and not has_state and not frozen
        records.append(_C.AdamWRecord(p, group_index, dormant=dormant))
        if frozen or dormant:
            continue
        refuse_unusable(p, name)
        reason = why_not_fused(p, optimizer.param_groups[group_index])
        if reason:
            leave_to_torch(torch_step, optimizer, group_index, p, name, reason)
        else:
            live[position] = (group_index, p, name)
    shared = _C.overlapping([local(p) for _, p, _ in live.values()])
    for position in [list(live)[i] for i in shared]:
        leave_to_torch(torch_step, optimizer, *live.pop(position), "memory that it shares with another parameter")
    warn_of_rounding(optimizer, list(live.values()))
    for position, (group_index, p, name) in live.items():
        records[position] = record_at(
            optimizer,
            optimizer._spread.place(p, optimizer._first_position + position),
            group_index,
            p,
            name,
            counts_on_device,
        )
    if is_first:
        checkpoint.warn_of_flat_state(optimizer)
    parts = list(parts_of(records, optimizer._spread))
    torch_step.prepare(optimizer)
    return parts, torch_step


def look_at_parameters(optimizer: AdamW) -> None:
    """Notice which parameters were replaced, what others have put into the state, and what lies in other processes.

    Raises:
        ValueError: what was found cannot be stepped rightly.
    """
    checkpoint.take_back(optimizer)
    optimizer._known_parameters.follow(optimizer)
    checkpoint.adopt(optimizer)
    optimizer._known_parameters.check(optimizer)
    params = [p for _, p, _ in optimizer._parameters()]
    key = [(id(p), type(p)) for p in params]
    if key != optimizer._spread_of:
        for _, p, name in optimizer._parameters():
            check_placements(p, name)
        optimizer._spread = Spread(params, optimizer._process_group, optimizer)
        optimizer._spread_of = key
    refuse_other_anchors(optimizer)


def record_at(
    optimizer: AdamW, position: int, group_index: int, p: Tensor, name: str, counts_on_device: bool
) -> _C.AdamWRecord:
    """The core's record of the parameter at a position, counted through all groups; makes its state ready."""
    group, precision = optimizer.param_groups[group_index], optimizer._precision
    precision.check_parameter(p, name)
    state = optimizer.state[p]
    on_device = prepare_state(state, p, group, name, precision, counts_on_device)
    anchor = importance = None
    if group["anchor_decay"] != 0.0 and optimizer._anchor is not None:
        anchor = optimizer._anchor.tensor_for(p, name, like)
        importance = optimizer._anchor.importance_for(p, name, like) if anchor is not None else None
    first, second = (CODED[key] if CODED[key][0] in state else (key, "") for key in ("exp_avg", "exp_avg_sq"))
    has_low_bits = precision.low_dtype(p) is not None
    return record_of(
        p,
        group_index,
        name,
        exp_avg=state[first[0]],
        exp_avg_sq=state[second[0]],
        max_exp_avg_sq=state["max_exp_avg_sq"] if group["amsgrad"] else None,
        scales=(state[first[1]], state[second[1]]) if first[1] else None,
        step=state["step"],
        counts_on_device=on_device,
        low_bits=state[LOW_BITS] if has_low_bits else None,
        weight_sums=optimizer._weight_sums.of(p, bool(first[1]), optimizer._masks.get(p)) if has_low_bits else None,
        rounding_key=precision.key(p, position),
        anchor=anchor,
        importance=importance,
        anchor_mode=group["anchor_mode"],
        mask=optimizer._masks.get(p),
        cut=optimizer._spread.cuts(p),
    )


def leave_to_torch(
    torch_step: TorchStep, optimizer: AdamW, group_index: int, p: Tensor, name: str, reason: str
) -> None:
    """Give a parameter to torch's step; raises ``ValueError`` where an option concerns it that torch lacks."""
    group = optimizer.param_groups[group_index]
    options = {
        "max_grad_norm": optimizer._max_grad_norm is not None,
        "skip_nonfinite": optimizer._skip_nonfinite,
        "anchor_decay": group["anchor_decay"] != 0.0 and optimizer._anchor_name(p, name) is not None,
        "an update mask": p in optimizer._masks,
        **optimizer._precision.beyond_torch(p),
    }
    torch_step.add(group_index, p, name, reason, [option for option, on in options.items() if on])


def refuse_other_anchors(optimizer: AdamW) -> None:
    """Raise where processes have different anchors in memory for a parameter that they train together.

    So it is where a framework loads weights in one process only, and the others have taken a snapshot of what was in
    memory; or before DistributedDataParallel gives all the weights of the first. Looked at by all processes at their
    first step, and for each other anchor; with ZeroRedundancyOptimizer, where some may have nothing, once.
    """
    anchor, known, groups = optimizer._anchor, optimizer._compared, optimizer.param_groups
    pulling = [group["anchor_decay"] != 0.0 for group in groups]
    if not initialized() or not any(pulling):
        return
    changes = 0 if anchor is None else anchor.changes
    if known is not None and (optimizer._spread.is_share or (known[0] is anchor and known[1:] == (changes, pulling))):
        return
    if optimizer._spread.is_share:
        groups = zero_around(optimizer).param_groups  # of all processes
    names = {id(p): name for _, p, name in optimizer._parameters()}
    pulled = {id(p): p for group in groups if group.get("anchor_decay") for p in group["params"]}

    def kept(p: Tensor, name: str) -> Tensor | None:
        """The anchor of ``p``, if it is in memory and whole in each process."""
        own = optimizer._anchor_name(p, names.get(id(p), name))
        tensor = None if anchor is None or own is None else anchor.kept(own)[0]
        return None if tensor is None or is_dtensor(tensor) else tensor

    cut = [(names.get(id(p), ""), p, kept(p, "")) for p in pulled.values() if is_dtensor(p)]
    together = [(name, tuple(placement_of(p)[0].get_all_groups()), own) for name, p, own in cut if own is not None]
    others = [together[i][0] for i in differing([(groups, own) for _, groups, own in together])]
    for group, named in averaged_together(p for p in pulled.values() if not is_dtensor(p)):
        whole = [(name, kept(p, name)) for name, p in named]
        others += unlike({name: int(fingerprint(own)) for name, own in whole if own is not None}, group)
    if others:
        raise ValueError(
            f"anchor: expected the same weights in every process, got different ones for {listed(others, quoted=False)}"
            ': take the snapshot (anchor="init" is one) where all processes have loaded the model, after '
            "DistributedDataParallel, or of the sharded model, or use Anchor.from_safetensors"
        )
    optimizer._compared = (anchor, changes, pulling)


def warn_without_gradients(optimizer: AdamW) -> None:
    """Say, in the second step of a new or resumed run, that no parameter has had a gradient in it."""
    if optimizer._steps_without_gradients is None:
        return
    if any(p.grad is not None for group in optimizer.param_groups for p in group["params"]) or optimizer._is_part:
        optimizer._steps_without_gradients = None
        return
    optimizer._steps_without_gradients += 1
    count = sum(len(group["params"]) for group in optimizer.param_groups)
    if optimizer._steps_without_gradients == 2 and count:
        warn(
            f"step: none of the {count} parameters has had a gradient in the first two steps, so nothing is trained; "
            "if the model got other parameters after the optimizer was made (fully_shard, "
            "load_state_dict(assign=True), resize_token_embeddings), make the optimizer from those"
        )


def warn_of_idle_anchor(optimizer: AdamW) -> None:
    """Say, once, before the first step, that there is an anchor but nothing that pulls."""
    if optimizer._looked_for_idle_anchor:
        return
    optimizer._looked_for_idle_anchor = True
    # A scheduler may begin at 0; the value it scales is in initial_anchor_decay.
    decays = [g.get("initial_anchor_decay", g["anchor_decay"]) for g in optimizer.param_groups]
    if optimizer._anchor is not None and not any(decays):
        warn("anchor: expected anchor_decay > 0 with it, got 0 in every group; nothing is pulled")


def warn_of_idle_options(optimizer: AdamW) -> None:
    """Say, before the first step, that an option is for other parameters than there are."""
    params = [p for _, p, _ in optimizer._parameters() if p.layout == torch.strided]
    for idle in optimizer._precision.idle(params) if params else []:
        warn(f"{idle}; the optimizer has none, so this changes nothing")


def warn_of_rounding(optimizer: AdamW, live: list[tuple[int, Tensor, str]]) -> None:
    """Say, once, that steps, decay or anchor do nothing to most 16-bit weights, as these are rounded to nearest.

    Args:
        optimizer: whose groups are read.
        live: (group index, parameter, name) of what is stepped.
    """
    precision = optimizer._precision
    if optimizer._warned_of_rounding or precision.extra_bits == 16 or precision.rounding != "nearest":
        return
    anchor = optimizer._anchor
    explicit = anchor is not None and not anchor.weighted
    parameters = (
        (optimizer.param_groups[i], p, explicit and optimizer._anchor_name(p, name) is not None)
        for i, p, name in live
        if p.dtype in SIXTEEN_BIT
    )
    message = stands_still(parameters, precision.extra_bits)
    optimizer._warned_of_rounding = message is not None
    if message:
        warn(message)
