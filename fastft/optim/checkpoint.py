"""The part of a state dict of ``AdamW`` that torch's lacks: anchor, masks, frozen set, counters, rounding seed."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastft.anchor import Anchor
from fastft.warning import warn

from .masks import UpdateMask, check_mask
from .state import (
    CODED,
    LOW_BITS,
    MOMENTS,
    OWN_KEYS,
    add_low_bits,
    as_kept,
    bring_moments,
    check_moment,
    check_own_state,
)
from .tensors import like

if TYPE_CHECKING:
    from .adamw import AdamW

KEY = "fastft"
VERSION = 1


def own_state(optimizer: AdamW) -> dict[str, Any]:
    """The entry under :data:`KEY`; parameters by their position in the groups."""
    named = list(optimizer._parameters())
    names = {i: optimizer._anchor_name(p, name) for i, (_, p, name) in enumerate(named)}
    positions = {id(p): i for i, (_, p, _) in enumerate(named)}
    return {
        "version": VERSION,
        "anchor": None if optimizer._anchor is None else optimizer._anchor.state_dict(),
        "anchor_names": {i: name for i, name in names.items() if name is not None},
        "masks": {positions[id(p)]: mask.mask for p, mask in optimizer._masks.items() if id(p) in positions},
        "frozen": sorted(positions[id(p)] for p in optimizer._frozen if id(p) in positions),
        "skipped_steps": optimizer.skipped_steps.cpu() if optimizer._skipped is not None else None,
        "rounding_seed": optimizer._precision.rounding_seed,
    }


class Loading:
    """A state dict being loaded: checked when made, applied once torch's part is in place."""

    def __init__(self, optimizer: AdamW, loaded: dict[str, Any]) -> None:
        self.optimizer = optimizer
        self.params = [p for _, p, _ in optimizer._parameters()]
        self.own = loaded.get(KEY)
        # torch casts all state to the parameter's dtype, so what is kept in others is taken from the original.
        saved_ids = [i for group in loaded["param_groups"] for i in group["params"]]
        self.kept: dict[Tensor, dict[str, Tensor]] = {}
        self.drops_low_bits = False
        if len(saved_ids) != len(self.params):  # torch will say so, after this
            self.own = None
            return
        for index, group in enumerate(loaded["param_groups"]):
            optimizer._precision.check_group(group, f"state_dict: param_groups[{index}]")
        for i, (_, p, name) in zip(saved_ids, optimizer._parameters(), strict=True):
            self._keep(loaded["state"].get(i, {}), p, f"state_dict: state[{i!r}] of {name}")
        if self.own is not None:
            self._check()

    def _keep(self, saved: dict[str, Any], p: Tensor, where: str) -> None:
        """Remember a parameter's tensors as they were saved, where torch would not keep them so."""
        precision = self.optimizer._precision
        kept, low = precision.moments(p), precision.low_dtype(p)
        tensors = {key: saved[key] for key in (*MOMENTS, *OWN_KEYS) if isinstance(saved.get(key), Tensor)}
        if LOW_BITS in tensors:
            tensors[LOW_BITS] = as_kept(tensors[LOW_BITS], p)
        own = any(key in saved for key in OWN_KEYS)
        if not tensors or (kept == p.dtype and low is None and not own):
            return
        check_own_state({**saved, **tensors}, p, where)
        if kept == "8bit":
            for key in CODED:
                if key in tensors:
                    check_moment(saved, p, key, where)
        self.drops_low_bits |= LOW_BITS in tensors and low is None
        self.kept[p] = tensors

    def _check(self) -> None:
        assert self.own is not None
        version = self.own.get("version")
        if version != VERSION:
            raise ValueError(
                f'state_dict["{KEY}"]: expected version {VERSION}, got {version!r}: '
                "it was written by another release of fastft"
            )
        names = [name for _, _, name in self.optimizer._parameters()]
        self.masks = {}
        for i, mask in self.own["masks"].items():
            check_mask(mask, self.params[i], names[i])
            self.masks[self.params[i]] = UpdateMask(mask, self.params[i], names[i])
        self.frozen = {self.params[i] for i in self.own["frozen"]}
        known = self.optimizer._precision  # older state dicts have no seed
        self.precision = replace(known, rounding_seed=self.own.get("rounding_seed", known.rounding_seed))
        self.anchor = self.optimizer._anchor
        if self.own["anchor"] is not None:
            # A copy, so that on an error nothing has changed; it may know where the file lies now.
            self.anchor = Anchor() if self.anchor is None else copy.copy(self.anchor)
            self.anchor.load_state_dict(self.own["anchor"])
            self.anchor.bind([(name, self.params[i]) for i, name in self.own["anchor_names"].items()])

    def apply(self) -> None:
        """Called once torch's part is in place."""
        optimizer = self.optimizer
        precision = optimizer._precision
        optimizer._weight_sums.clear()
        for p, tensors in self.kept.items():
            state = optimizer.state[p]
            for key in (*MOMENTS, *OWN_KEYS):
                state.pop(key, None)
            state.update({key: like(tensor, p).to(p.device, copy=True) for key, tensor in tensors.items()})
            bring_moments(state, p, precision, "state_dict")
            add_low_bits(state, p, precision)
        if self.drops_low_bits:
            warn(
                "state_dict: has low bits of weights, and this optimizer keeps none (extra_bits=0, or weights that are "
                "not bfloat16): they are dropped. To keep them, save fastft.optim.master_weights(model, optimizer)"
            )
        if self.own is not None:
            optimizer._anchor = self.anchor
            optimizer._masks = self.masks
            optimizer._frozen = self.frozen
            optimizer._precision = self.precision
            skipped = self.own["skipped_steps"]
            device = optimizer._skipped.device if optimizer._skipped is not None else None
            optimizer._skipped = None if skipped is None else skipped.to(device, torch.int64, copy=True)
