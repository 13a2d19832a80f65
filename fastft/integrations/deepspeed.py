"""fastft in DeepSpeed: anchor, masks and frozen parameters in the flat partitions of ZeRO-1 and ZeRO-2.

.. code-block:: python

    optimizer = fastft.AdamW(model.named_parameters(), lr=1e-5, anchor="init", anchor_decay=0.01)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    attach(engine)

``config`` needs ``"zero_allow_untested_optimizer": true``, as for any optimizer that is not DeepSpeed's own.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fastft.anchor import Anchor
from fastft.names import NameIndex, closest, listed, matching
from fastft.optim import AdamW
from fastft.optim.anchoring import check_anchor_options
from fastft.optim.checkpoint import KEY, WITHOUT_MOMENTS, carried_in, without_carried
from fastft.optim.masks import UpdateMask, check_mask
from fastft.optim.processes import fingerprint, unequal

__all__ = ["attach"]

# The attributes of DeepSpeed's two optimizers over partitions: the model's parameters by group, the flat tensor of each
# group that they are views of, and its parts, one for each process.
LAYOUTS = (
    ("bit16_groups", "bit16_groups_flat", "parallel_partitioned_bit16_groups"),
    ("bf16_groups", "bf16_groups_flat", "bf16_partitioned_groups"),
)
FROZEN = "deepspeed_frozen"
"""The key of a group's frozen names, in checkpoints too: masks do not say which of their elements these are."""


def attach(
    engine: Any,
    *,
    anchor: Anchor | Literal["init"] | None = None,
    anchor_decay: float | None = None,
    update_masks: Mapping[str, Tensor] | None = None,
    frozen: str | Iterable[str] | None = None,
) -> None:
    """Bring anchor, masks and frozen parameters of a :class:`fastft.AdamW` to the partitions that it steps.

    Under ZeRO-1 and ZeRO-2 the optimizer steps, for each group, one flat float32 tensor: this process's share of the
    group's parameters, one after the other. After this call each element of it is anchored, masked and frozen as it is
    in its parameter, and steps are those of one process. Call it in every process, after ``deepspeed.initialize`` and
    before the first step and ``load_checkpoint``; again to change something.

    ``engine.save_checkpoint`` saves anchor and masks too, and ``load_checkpoint`` brings them back. A universal
    checkpoint, which DeepSpeed loads with another number of processes, has neither: call ``attach`` with the same
    arguments then, with ``anchor="init"`` while the model has its first weights.

    Args:
        engine: the first of what ``deepspeed.initialize`` returns.
        anchor: an anchor of the model's parameters, or ``"init"``: the values that the partitions have now. None: the
            one that the optimizer has.
        anchor_decay: of all groups. None: that of each group.
        update_masks: parameter name → bool tensor as in ``AdamW.set_update_mask``: of the whole parameter, the same in
            every process. They replace all earlier ones. None: those that the optimizer has.
        frozen: names, glob patterns or module names of all parameters that are to be left untouched, as in
            ``AdamW.freeze``. None: those that are frozen already. (``requires_grad_(False)`` before
            ``deepspeed.initialize`` saves their memory too.)

    Raises:
        TypeError: ``engine`` is no DeepSpeed engine with a ``fastft.AdamW``.
        ValueError: for what could not be as in one process: ZeRO-3, pipelines, ZenFlow, elastic checkpoints; a
            ``state_dtype`` or ``anchor_mode`` that goes by whole tensors; a group of which only a part is anchored,
            unless the anchor has an importance; thawing after the first step; ``max_grad_norm`` and ``skip_nonfinite``
            with several groups, which DeepSpeed steps one by one. For names and shapes that do not fit. Nothing has
            changed then.

    DeepSpeed's own ``gradient_clipping``, which is on unless it is set to 0, counts masked and frozen gradients too. It
    steps a parameter without a gradient by a gradient of zeros.
    """
    optimizer, zero = base_optimizer(engine)
    refuse_options(engine, optimizer, zero)
    shares = shares_of(engine, optimizer, zero)
    groups = optimizer.param_groups
    decays = [group["anchor_decay"] if anchor_decay is None else anchor_decay for group in groups]
    for i, (decay, group) in enumerate(zip(decays, groups, strict=True)):
        check_anchor_options(decay, group["anchor_mode"], f"param_groups[{i}]")
    flat = flat_anchor(engine, optimizer, shares, anchor, decays)
    still = frozen_names(optimizer, shares, frozen)
    masks = flat_masks(optimizer, shares, update_masks, still)

    for group, share, decay in zip(groups, shares, decays, strict=True):
        group["anchor_decay"] = decay
        group["param_names"] = [share.name]
        group[FROZEN] = [name for name in share.params if name in still]
    optimizer._take_over(flat, masks, zero.dp_process_group)
    if (hold := OptionsHold(engine, zero)) not in optimizer._optimizer_step_pre_hooks.values():
        optimizer.register_step_pre_hook(hold)
    if keep_beside_state not in optimizer._optimizer_state_dict_post_hooks.values():
        optimizer.register_state_dict_post_hook(keep_beside_state)


@dataclass(frozen=True)
class OptionsHold:
    """Before a step: the options may have been set since ``attach``, which would have refused them."""

    engine: Any
    zero: Any

    def __call__(self, optimizer: AdamW, args: Any, kwargs: Any) -> None:
        refuse_options(self.engine, optimizer, self.zero)


def keep_beside_state(_: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
    """Move anchor, mask and flags out of ``state``, where ds_to_universal takes every tensor for one of moments."""
    without = state_dict[KEY][WITHOUT_MOMENTS]
    for i, state in state_dict["state"].items():
        if carried := carried_in(state):
            without[str(i)] = carried
            state_dict["state"][i] = without_carried(state)


class Piece(NamedTuple):
    """A run of a parameter's elements that lies in this process's partition."""

    name: str
    param: Tensor
    first: int  # of its elements
    start: int  # in the partition
    numel: int

    def of(self, tensor: Tensor) -> Tensor:
        """The same elements of a tensor of the parameter's shape."""
        return tensor.detach().reshape(-1)[self.first : self.first + self.numel]

    def write(self, flat: Tensor, value: Tensor | float) -> None:
        """Put them where they lie in the partition."""
        flat[self.start : self.start + self.numel] = value


class Share(NamedTuple):
    """This process's partition of a group."""

    name: str
    partition: Tensor
    params: dict[str, Tensor]  # all of the group's, whole
    pieces: list[Piece]


def params_of(shares: Iterable[Share]) -> dict[str, Tensor]:
    """All of the model's parameters, whole."""
    return {name: p for share in shares for name, p in share.params.items()}


def base_optimizer(engine: Any) -> tuple[AdamW, Any]:
    """(the fastft.AdamW, DeepSpeed's optimizer around it); raises where there is none or its partitions are others."""
    deepspeed = sys.modules.get("deepspeed")
    if deepspeed is None or not isinstance(engine, deepspeed.DeepSpeedEngine):
        raise TypeError(
            f"engine: expected a DeepSpeedEngine, the first of what deepspeed.initialize returns, "
            f"got {type(engine).__name__}"
        )
    stage = engine.zero_optimization_stage()
    if stage == 3:
        raise ValueError(
            "engine: expected ZeRO stage 1 or 2, got 3, which cuts each parameter by itself and is not supported: set "
            '"stage": 2 in "zero_optimization", or use torch.distributed.fsdp.fully_shard, which fastft.AdamW takes as '
            "it is"
        )
    if engine.pipeline_parallelism:
        raise ValueError(
            "engine: expected one without pipeline parallelism, whose processes have other parameters each, "
            f"got {type(engine).__name__}"
        )
    zero = engine.optimizer
    base = zero if stage == 0 else getattr(zero, "optimizer", None)
    if not isinstance(base, AdamW):
        raise TypeError(
            "engine: expected a fastft.AdamW given to deepspeed.initialize as optimizer, got "
            f"{type(zero if base is None else base).__name__}"
        )
    if stage == 0:
        raise ValueError(
            "engine: expected ZeRO stage 1 or 2, got 0, where AdamW steps whole parameters and takes anchor, "
            "set_update_mask and freeze itself"
        )
    if getattr(zero, "zenflow", False):
        raise ValueError('engine: expected ZeRO without "zenflow", which steps chosen columns apart from the rest')
    return base, zero


def refuse_options(engine: Any, optimizer: AdamW, zero: Any) -> None:
    """Raise for options that would not do in partitions what they do in one process."""
    if engine.zero_elastic_checkpoint():
        raise ValueError(
            'engine: expected "elastic_checkpoint": false, whose checkpoints DeepSpeed cannot load with an optimizer '
            "that counts the steps of each tensor, as torch's AdamW does"
        )
    if zero.torch_autocast_gradscaler is not None:
        raise ValueError(
            'engine: expected "torch_autocast" with bfloat16, got float16, where DeepSpeed judges each process\'s '
            'gradients alone; "fp16" judges them together'
        )
    if optimizer._precision.state_dtype == "8bit":
        raise ValueError(
            'state_dtype: expected None, torch.float32 or torch.bfloat16 with flat partitions, got "8bit", which goes '
            "by the rows of whole tensors"
        )
    own = {"max_grad_norm": optimizer.max_grad_norm is not None, "skip_nonfinite": optimizer.skip_nonfinite}
    instead = {
        "max_grad_norm": '"gradient_clipping" in DeepSpeed\'s config',
        "skip_nonfinite": '"check_grad_overflow": true in DeepSpeed\'s "bf16" (float32 and "fp16" skip without)',
    }
    groups = len(zero.real_dp_process_group)  # during a step, the optimizer has one of them
    one_by_one = groups > 1 and hasattr(zero, "_optimizer_step")
    for option in (name for name, on in own.items() if on):
        if one_by_one:
            raise ValueError(
                f"{option}: DeepSpeed steps the {groups} groups one after the other, so that none "
                f"knows the norm of all; use {instead[option]} instead"
            )
        if engine.mpu is not None or engine.has_moe_layers:
            raise ValueError(
                f"{option}: expected plain data parallelism, got model parallelism or experts, which the norm would "
                f"have to count by other rules; use {instead[option]} instead"
            )
    if own["max_grad_norm"] and engine.gradient_clipping() > 0.0:
        raise ValueError(
            f'max_grad_norm: expected "gradient_clipping": 0.0 in DeepSpeed\'s config with it, got '
            f"{engine.gradient_clipping()}, so that both would clip (left out, it is 1.0)"
        )


def shares_of(engine: Any, optimizer: AdamW, zero: Any) -> list[Share]:
    """This process's partition of each group, and where in it the parameters lie.

    The parameters are views of one flat tensor for each group, so that their place in memory is their place in it,
    whatever order and padding DeepSpeed has chosen.
    """
    layout = next((names for names in LAYOUTS if all(hasattr(zero, name) for name in names)), None)
    if layout is None or getattr(zero, "offloaded_states", None):
        raise ValueError(
            f"engine: expected the partitions of ZeRO stage 1 or 2 in memory, got {type(zero).__name__}"
            + ("" if layout is None else " with offloaded states; call engine.reload_states() first")
        )
    names = {id(p): name for name, p in engine.module.named_parameters()}
    shares = []
    for i, (params, flat, parts) in enumerate(zip(*(getattr(zero, name) for name in layout), strict=True)):
        rank = torch.distributed.get_rank(zero.real_dp_process_group[i])
        if strange := [list(p.shape) for p in params if id(p) not in names]:
            raise ValueError(
                f"engine: expected an optimizer of engine.module's parameters, got {len(strange)} in group {i} that "
                f"are not in it, the first of shape {strange[0]}"
            )
        (partition,) = optimizer.param_groups[i]["params"]
        begin = parts[rank].storage_offset() - flat.storage_offset()
        share = Share(f"deepspeed_partition_{i}", partition, {names[id(p)]: p for p in params}, [])
        for name, p in share.params.items():
            place = p.storage_offset() - flat.storage_offset()
            if (
                p.untyped_storage().data_ptr() != flat.untyped_storage().data_ptr()
                or not p.is_contiguous()
                or parts[rank].numel() != partition.numel()
            ):
                raise ValueError(
                    f"engine: {name}: expected a view of the flat tensor of its group, as in DeepSpeed 0.19, got "
                    "another memory"
                )
            start, end = max(place, begin), min(place + p.numel(), begin + partition.numel())
            if start < end:
                share.pieces.append(Piece(name, p, start - place, start - begin, end - start))
        shares.append(share)
    return shares


# -- the anchor ------------------------------------------------------------------------------------------------


def flat_anchor(
    engine: Any,
    optimizer: AdamW,
    shares: list[Share],
    anchor: Anchor | Literal["init"] | None,
    decays: list[float],
) -> Anchor | None:
    """The anchor of the partitions: of ``anchor``, or of the one that the optimizer has."""
    given = optimizer._anchor if anchor is None else anchor
    if given is None:
        if any(decays):
            raise ValueError(
                f'anchor_decay: expected 0 without an anchor, got {max(decays)}; pass anchor="init" or a fastft.Anchor'
            )
        return None
    if not (given == "init" or isinstance(given, Anchor)):
        raise ValueError(f'anchor: expected None, "init" or a fastft.Anchor, got {type(given).__name__}')
    if isinstance(given, Anchor) and any(share.partition in given for share in shares):
        return given  # attached before, or loaded
    if anchor is None and optimizer._anchors_new_params and not optimizer.state:
        given = "init"  # of the weights that all processes have now, which may have come from the first one
    anchored = shares
    if isinstance(given, Anchor):
        anchored = anchored_shares(given, shares, decays)
        refuse_other_anchors(given, shares, engine)
    names = {share.name for share in anchored}
    for i, (group, share) in enumerate(zip(optimizer.param_groups, shares, strict=True)):
        if group["anchor_mode"] == "selective" and share.name in names:
            raise ValueError(
                f'param_groups[{i}]: anchor_mode: expected "decoupled" or "l2" with flat partitions, got "selective", '
                "which judges whole tensors"
            )
    if not isinstance(given, Anchor):
        return Anchor.snapshot([(share.name, share.partition) for share in anchored])
    flat = Anchor()
    for share in anchored:
        flat.update(anchor_of_partition(given, share))
    return flat


def anchored_shares(anchor: Anchor, shares: list[Share], decays: list[float]) -> list[Share]:
    """The shares of the groups that the anchor holds; raises, alike in all processes, where it does not fit them."""
    anchor.bind(params_of(shares).items())  # compares the shapes
    found = []
    for i, (share, decay) in enumerate(zip(shares, decays, strict=True)):
        free = [name for name, p in share.params.items() if anchor.find(p, name) is None]
        if not free or (anchor.weighted and len(free) < len(share.params)):
            found.append(share)
        elif len(free) < len(share.params) and decay != 0.0:
            raise ValueError(
                f"param_groups[{i}]: anchor: expected all of its parameters or none, since DeepSpeed makes one tensor "
                f"of a group, got none for {listed(free)}; put these in a group of their own"
            )
    if not found and len(anchor):
        raise ValueError(
            f"anchor: none of the optimizer's parameters is in {anchor!r}, or only some of groups with anchor_decay 0"
        )
    return found


def refuse_other_anchors(anchor: Anchor, shares: list[Share], engine: Any) -> None:
    """Raise, alike in all processes, where they have different anchors in memory.

    DeepSpeed gives all processes the weights of the first; a snapshot from before may have others, of a new head.
    """
    known = [(name, anchor.find(p, name)) for name, p in params_of(shares).items()]
    kept = [(name, anchor.kept(own)[0]) for name, own in known if own is not None]
    named = [(name, tensor) for name, tensor in kept if tensor is not None]
    if not named:
        return
    sums = [fingerprint(tensor).to(engine.device) for _, tensor in named]
    if others := unequal(sums, [engine.optimizer.dp_process_group]):
        raise ValueError(
            "anchor: expected the same weights in every process, got different ones for "
            f"{listed((named[i][0] for i in others), quoted=False)}: take the snapshot after deepspeed.initialize, or "
            "use Anchor.from_safetensors"
        )


def anchor_of_partition(anchor: Anchor, share: Share) -> Anchor:
    """The anchor of one partition, kept in the dtype and place that ``anchor`` is kept in.

    Padding, and in an anchor with an importance what is not anchored, has importance and anchor 0.
    """
    own = [(piece, anchor.find(piece.param, piece.name)) for piece in share.pieces]
    anchored = [(piece, name) for piece, name in own if name is not None]
    weights = [(piece, piece.of(anchor[name]).clone()) for piece, name in anchored]  # of a file, only what lies here
    device = "cpu" if anchor.offloaded else None
    flat = Anchor.snapshot([(share.name, laid_in(weights, share.partition))], device=device)
    if anchor.weighted:
        found = [(piece, anchor.importance_of(name)) for piece, name in anchored]
        importance = [(piece, piece.of(tensor)) for piece, tensor in found if tensor is not None]
        flat = flat.with_importance({share.name: laid_in(importance, share.partition)})
    flat.bind([(share.name, share.partition)])
    return flat


def laid_in(values: list[tuple[Piece, Tensor]], partition: Tensor) -> Tensor:
    """The values at their places in a tensor of zeros like the partition, in a dtype that holds all of them."""
    dtypes = [value.dtype for _, value in values] or [partition.dtype]
    flat = torch.zeros(partition.shape, dtype=reduce(torch.promote_types, dtypes), device=partition.device)
    for piece, value in values:
        piece.write(flat, value.to(flat.device))
    return flat


# -- masks -----------------------------------------------------------------------------------------------------


def frozen_names(optimizer: AdamW, shares: list[Share], frozen: str | Iterable[str] | None) -> set[str]:
    """The parameters that are to be frozen; raises for one that is thawed after it could have stepped."""
    params = params_of(shares)
    before = {name for group in optimizer.param_groups for name in group.get(FROZEN, ())}
    if frozen is None:
        return before | {name for name, p in params.items() if p in optimizer._frozen}
    still = set(matching(frozen, params, "frozen"))
    thawed = [name for name in before if name not in still]
    if thawed and optimizer.state:
        raise ValueError(
            f"frozen: expected {listed(sorted(thawed))} among them still: a parameter that is thawed starts at its own "
            "step count, and those of a partition have one together; a mask (update_masks) may be lifted at any time"
        )
    return still


def flat_masks(
    optimizer: AdamW, shares: list[Share], update_masks: Mapping[str, Tensor] | None, frozen: set[str]
) -> dict[Tensor, UpdateMask]:
    """The masks of the partitions, but for those that leave nothing out."""
    given = None if update_masks is None else masks_by_name(shares, update_masks)
    flat: dict[Tensor, UpdateMask] = {}
    for group, share in zip(optimizer.param_groups, shares, strict=True):
        known = optimizer._masks.get(share.partition)
        stepped = torch.ones(share.partition.shape, dtype=torch.bool, device=share.partition.device)
        for piece in share.pieces:
            own = optimizer._masks.get(piece.param)  # set before DeepSpeed put the partition in the parameter's place
            mask = (None if own is None else own.mask) if given is None else given.get(piece.name)
            if piece.name in frozen:
                piece.write(stepped, False)
            elif mask is not None:
                by_element = mask.reshape(*mask.shape, *[1] * (piece.param.dim() - mask.dim()))
                piece.write(stepped, piece.of(by_element.expand(piece.param.shape)).to(stepped.device))
            elif given is None and known is not None and piece.name not in group.get(FROZEN, ()):
                piece.write(stepped, known.mask[piece.start : piece.start + piece.numel].to(stepped.device))
        if not bool(stepped.all()):
            flat[share.partition] = UpdateMask(stepped, share.partition, share.name)
    return flat


def masks_by_name(shares: list[Share], update_masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The masks by the model's own names; raises, alike in all processes, for those that do not fit."""
    params = params_of(shares)
    index = NameIndex(params)
    found = {}
    for given, mask in update_masks.items():
        name = index.find(given)
        if name is None:
            raise ValueError(f"update_masks: {given!r} is no parameter that is trained{closest(given, params)}")
        check_mask(mask, params[name], name)
        found[name] = mask
    return found
