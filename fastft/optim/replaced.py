"""Parameters that somebody has put in the place of others in ``group["params"]``, as accelerate does for FSDP2.

State, masks and the frozen set are kept by tensor, and an anchor may be. They follow by name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastft.layers.wrappers import flattened
from fastft.names import NameIndex, listed
from fastft.warning import warn

from .masks import UpdateMask
from .processes import initialized, size_of
from .state import LOW_BITS
from .tensors import is_dtensor, is_wrapper, local

if TYPE_CHECKING:
    from .adamw import AdamW


@dataclass
class Known:
    """A parameter that the optimizer had when it last looked."""

    name: str | None
    """None where the optimizer was given no names."""
    label: str
    """For messages."""
    anchored: str | None
    """Its name in the anchor."""
    absent: bool = False
    """Whether it was taken out of the groups before others came."""


class KnownParameters:
    """The parameters of an optimizer, by which new ones are noticed.

    By id, as a reference would keep a parameter alive, and a weak one would keep ``torch.utils.swap_tensors`` from it.
    The id of what is gone may be used again, but not where it counts: masks, the frozen set and state hold on to their
    tensors, names differ, and the anchor sees that a tensor is another one.
    """

    def __init__(self) -> None:
        self._by_id: dict[int, Known] = {}
        self._ids: list[int] | None = None
        self.strangers = False
        """Whether plain tensors have come in the place of parameters, and nobody knows of which."""

    def note(self, optimizer: AdamW) -> None:
        """Take those that the optimizer has now for its own."""
        self._ids = ids_of(optimizer)
        self._by_id = {
            id(p): Known(name, label, optimizer._anchor_name(p, label)) for p, name, label in named(optimizer)
        }

    @property
    def noted(self) -> bool:
        """Whether there are any yet."""
        return self._ids is not None

    def look(self, optimizer: AdamW) -> None:
        """:meth:`follow` if the groups hold other tensors than before."""
        if self.noted and ids_of(optimizer) != self._ids:
            self.follow(optimizer)

    def follow(self, optimizer: AdamW) -> None:
        """Give masks, freezing, anchor and state of parameters that are gone to those that came under their names.

        With ``anchor="init"`` and before the first step, the anchor is taken anew from the new ones: the old ones may
        have had no values in some processes.

        Raises:
            ValueError: parameters that were masked, frozen or anchored were replaced by others without names, or two
                parameters by one.
        """
        current = list(named(optimizer))
        new = [(p, name) for p, name, _ in current if not self._knows(optimizer, p, name)]
        stayed = {id(p) for p, _, _ in current} - {id(p) for p, _ in new}
        if not new:
            for i, known in self._by_id.items():
                known.absent = i not in stayed
            return
        refuse_twice(current)
        gone = {i: known for i, known in self._by_id.items() if i not in stayed and not known.absent}
        if gone:
            self._replace(optimizer, new, gone)
        self.note(optimizer)
        optimizer._forget_plan()

    def _knows(self, optimizer: AdamW, p: Tensor, name: str | None) -> bool:
        known, anchor = self._by_id.get(id(p)), optimizer._anchor
        if known is None or (anchor is not None and anchor.knew_another(p)):
            return False
        if known.name == name or None in (known.name, name):
            return True
        # Either it was moved to the place of another name, or another tensor has its id.
        held = p in optimizer.state or p in optimizer._masks or p in optimizer._frozen
        return held or (anchor is not None and p in anchor)

    def _replace(self, optimizer: AdamW, new: list[tuple[Tensor, str | None]], gone: dict[int, Known]) -> None:
        by_name = {known.name: i for i, known in gone.items() if known.name is not None}
        index = NameIndex(by_name)
        pairs: dict[int, tuple[Tensor, str]] = {}
        unmatched = []
        for p, name in new:
            i = None if name is None else by_name.pop(index.find(name) or "", None)
            if i is None:
                unmatched.append(p)
            else:
                pairs[i] = (p, name or "")
        masks, frozen, stepped = by_ids(optimizer._masks), by_ids(optimizer._frozen), by_ids(optimizer.state)
        pulls = any(group.get("anchor_decay") for group in optimizer.param_groups)
        lost = [
            known.label
            for i, known in gone.items()
            if i not in pairs and (i in masks or i in frozen or (pulls and known.anchored is not None))
        ]
        if unmatched and lost:
            raise ValueError(
                f"params: {len(unmatched)} of them came in the place of others; which is which is not known, and these "
                f"were masked, frozen or anchored: {listed(lost, quoted=False)}. Make the optimizer from "
                "model.named_parameters(), or from the model as it is now; with DeepSpeed ZeRO see "
                "fastft.integrations.deepspeed"
            )
        self.strangers |= len(pairs) < len(gone) and any(not is_dtensor(p) and not flattened(p) for p in unmatched)
        anchor = optimizer._anchor
        try:
            moved = {i: UpdateMask(optimizer._masks[masks[i]].mask, p, n) for i, (p, n) in pairs.items() if i in masks}
            if anchor is not None:
                anchor.check_shapes((own, p) for i, (p, _) in pairs.items() if (own := gone[i].anchored) is not None)
        except ValueError as error:
            raise ValueError(
                f"{error}\nIt came in the place of another parameter; make a new optimizer from the model as it is now"
            ) from None
        # From here on nothing raises.
        anew = optimizer._anchors_new_params and not optimizer.state
        fresh = []
        for i, (p, name) in pairs.items():
            if i in masks:
                del optimizer._masks[masks[i]]
                optimizer._masks[p] = moved[i]
            if i in frozen:
                optimizer._frozen.remove(frozen[i])
                optimizer._frozen.add(p)
            if i in stepped and not move_state(optimizer, stepped[i], p):
                fresh.append(name)
            own = gone[i].anchored
            if own is not None and anchor is not None:
                if anew:
                    anchor.restore([(own, p, p.detach(), None, None)], None)
                else:
                    anchor.bind([(own, p)])
        if fresh:
            warn(
                f"params: parameters of another kind came in the place of others that had stepped: "
                f"{listed(fresh, quoted=False)}; their moments start anew"
            )

    def check(self, optimizer: AdamW) -> None:
        """Raise for parameters that nobody trains any more, and for norms over nobody knows which parts of them."""
        freed = [name for _, p, name in optimizer._parameters() if is_freed(p)] if initialized() else []
        if freed:
            raise ValueError(
                f"params: expected the model's parameters, got copies that fully_shard had gathered for a forward pass "
                f"and freed since: {listed(freed, quoted=False)}. Make the optimizer before the first forward pass, or "
                "call model.reshard() first"
            )
        asked = [
            option
            for option, on in (
                ("max_grad_norm", optimizer.max_grad_norm is not None),
                ("skip_nonfinite", optimizer.skip_nonfinite),
            )
            if on
        ]
        if self.strangers and asked and optimizer._process_group is None and initialized() and size_of(None) > 1:
            raise ValueError(
                f"{asked[0]}: expected parameters that are whole, DTensors, or wrapped in a wrapper that is known, got "
                f"others that somebody put in their place, and {size_of(None)} processes: each may have other parts of "
                "them. Say over which with process_group=, or leave it to the framework that did so (DeepSpeed: "
                "gradient_clipping)"
            )


def named(optimizer: AdamW) -> Iterator[tuple[Tensor, str | None, str]]:
    """(parameter, its name, its name for messages). The name is None where there is none, or two have it."""
    times = Counter(label for _, _, label in optimizer._parameters())
    for index, p, label in optimizer._parameters():
        yield p, label if has_names(optimizer.param_groups[index]) and times[label] == 1 else None, label


def has_names(group: Mapping[str, Any]) -> bool:
    """Whether a group has a name for each of its parameters."""
    return len(group["params"]) > 0 and len(group.get("param_names") or ()) == len(group["params"])


def refuse_twice(current: Iterable[tuple[Tensor, str | None, str]]) -> None:
    """Raise for one tensor that came in the place of two: to accelerate all parameters on meta are the same one."""
    labels: dict[int, str] = {}
    for p, _, label in current:
        other = labels.setdefault(id(p), label)
        if other != label:
            raise ValueError(
                f"params: expected a parameter of its own for each name, got one for both {other} and {label} in the "
                "place of two; with accelerate, set cpu_ram_efficient_loading to false"
            )


def ids_of(optimizer: AdamW) -> list[int]:
    """The parameters, by id."""
    return [id(p) for group in optimizer.param_groups for p in group["params"]]


def is_freed(p: Tensor) -> bool:
    """Whether the memory of a tensor is gone."""
    plain = not is_wrapper(p) and p.layout == torch.strided and not p.is_meta
    return plain and p.numel() > 0 and p.untyped_storage().size() == 0


def by_ids(tensors: Iterable[Any]) -> dict[int, Tensor]:
    """Tensors by their ids."""
    return {id(p): p for p in tensors}


def move_state(optimizer: AdamW, old: Tensor, p: Tensor) -> bool:
    """Move a parameter's state to the one in its place; False if that is of another kind, and it is dropped."""
    state = optimizer.state.pop(old)
    if not state or optimizer.state.get(p):
        return True
    alike = (old.shape, old.dtype, old.device, getattr(old, "placements", None)) == (
        p.shape,
        p.dtype,
        p.device,
        getattr(p, "placements", None),
    )
    if not alike:
        return False
    with torch.no_grad():
        if LOW_BITS in state and not torch.equal(local(old), local(p)):
            del state[LOW_BITS]
    optimizer.state[p] = state
    return True
