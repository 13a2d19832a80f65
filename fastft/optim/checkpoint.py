"""The part of a state dict of ``AdamW`` that torch's lacks: the anchor, masks, the frozen set, counters."""

from __future__ import annotations

import copy
from collections import defaultdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastft.anchor import Anchor

from .masks import UpdateMask, check_mask
from .state import MOMENTS, moment_dtype

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
    }


class Loading:
    """A state dict being loaded: checked when made, applied once torch's part is in place."""

    def __init__(self, optimizer: AdamW, loaded: dict[str, Any]) -> None:
        self.optimizer = optimizer
        self.params = [p for _, p, _ in optimizer._parameters()]
        self.own = loaded.get(KEY)
        # torch casts moments to the parameter's dtype, so those of 16-bit parameters are taken from the original.
        saved_ids = [i for group in loaded["param_groups"] for i in group["params"]]
        self.moments: dict[Tensor, dict[str, Tensor]] = defaultdict(dict)
        for i, p in zip(saved_ids, self.params, strict=False):
            if moment_dtype(p, optimizer._state_dtype) != p.dtype:
                for key in MOMENTS:
                    value = loaded["state"].get(i, {}).get(key)
                    if isinstance(value, Tensor):
                        self.moments[p][key] = value
        # With another number of parameters torch will say so, after this.
        if self.own is not None and len(saved_ids) == len(self.params):
            self._check()
        else:
            self.own = None

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
        self.anchor = self.optimizer._anchor
        if self.own["anchor"] is not None:
            # A copy, so that on an error nothing has changed; it may know where the file lies now.
            self.anchor = Anchor() if self.anchor is None else copy.copy(self.anchor)
            self.anchor.load_state_dict(self.own["anchor"])
            self.anchor.bind([(name, self.params[i]) for i, name in self.own["anchor_names"].items()])

    def apply(self) -> None:
        """Called once torch's part is in place."""
        optimizer = self.optimizer
        for p, moments in self.moments.items():
            for key, value in moments.items():
                optimizer.state[p][key] = value.to(p.device, torch.float32, copy=True)
        if self.own is not None:
            optimizer._anchor = self.anchor
            optimizer._masks = self.masks
            optimizer._frozen = self.frozen
            skipped = self.own["skipped_steps"]
            device = optimizer._skipped.device if optimizer._skipped is not None else None
            optimizer._skipped = None if skipped is None else skipped.to(device, torch.int64, copy=True)
