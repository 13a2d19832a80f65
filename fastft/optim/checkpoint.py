"""The parts of a state dict of ``AdamW`` that torch's lacks: anchor, masks, frozen set, counters, rounding seed.

It lies where every checkpoint looks. Beside a parameter's moments, in ``state_dict["state"][i]``: ``anchor``,
``anchor_importance`` and ``update_mask``, as they are kept, and ``fastft_flags``, one int64 of :class:`Has` that says
what was there, so that nothing can get lost on the way without being missed. In each group, under ``fastft``, a string
of JSON: version, rounding seed, skipped steps, and the file that the anchor lies in. A parameter without moments has no
entry in ``state``, since torch's AdamW would take it for one that has been stepped; what it has lies in
``state_dict["fastft"]`` then.

``torch.distributed.checkpoint`` (DCP) reads and writes by the structure of the optimizer that it finds, and wants state
for each parameter; so does FullyShardedDataParallel for those that it has flattened together, and
ZeroRedundancyOptimizer passes on ``state`` alone. Where they ask, each parameter has all of it, with moments that are 0
where it never stepped.
"""

from __future__ import annotations

import copy
import enum
import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastft.anchor import Anchor
from fastft.layers.wrappers import flattened
from fastft.names import NameIndex, listed
from fastft.warning import warn

from .by_names import by_names
from .dtensors import like
from .masks import UpdateMask, check_mask
from .processes import ZERO
from .replaced import has_names
from .state import (
    CODED,
    LOW_BITS,
    MOMENTS,
    OWN_KEYS,
    add_low_bits,
    as_kept,
    as_saved,
    bring_moments,
    check_moment,
    check_own_state,
    prepare_state,
)
from .tensors import local

if TYPE_CHECKING:
    from .adamw import AdamW

VERSION = 2
KEY = "fastft"
WITHOUT_MOMENTS = "without_moments"
"""In ``state_dict["fastft"]``: {its key in ``state``, as a string: what the parameter has}."""
FLAGS, ANCHOR, IMPORTANCE, MASK = "fastft_flags", "anchor", "anchor_importance", "update_mask"
SEED, SKIPPED = "fastft_seed", "fastft_skipped"
"""Rounding seed and number of skipped steps, for ZeroRedundancyOptimizer, which does not pass on keys of groups."""
CARRIED = (FLAGS, ANCHOR, IMPORTANCE, MASK, SEED, SKIPPED)
PLACE = 8
"""From this bit on, the flags hold the place of the parameter's name in ``names_in_file``, counted from 1, or 0."""
DCP = "torch.distributed.checkpoint.state_dict"
FSDP1 = "torch.distributed.fsdp.fully_sharded_data_parallel"


class Has(enum.IntFlag):
    """Flags of a parameter, beside its state."""

    FROZEN = 1
    MASK = 2
    ANCHOR = 4
    IMPORTANCE = 8
    ANCHOR_IN_FILE = 16


HELD = (
    (Has.MASK, MASK, "an update mask"),
    (Has.ANCHOR, ANCHOR, "an anchor"),
    (Has.IMPORTANCE, IMPORTANCE, "an importance"),
)
"""(flag, key, words) of what lies in the state."""


# -- saving ------------------------------------------------------------------------------------------------------


def pack(optimizer: AdamW, packed: dict[str, Any]) -> None:
    """Complete torch's state dict, in place; tensors are not copied."""
    whole = asked_by(DCP, FSDP1, ZERO)
    for_zero = counters(optimizer) if asked_by(ZERO) else {}
    state: dict[Any, Any] = {i: as_saved(kept) for i, kept in packed["state"].items() if kept}
    ids = [i for group in packed["param_groups"] for i in group["params"]]
    files = NamesInFile(optimizer)
    without: dict[str, dict[str, Any]] = {}
    for i, (index, p, name) in zip(ids, optimizer._parameters(), strict=True):
        carried = carried_by(optimizer, p, name, files.places.get(p, 0))
        if not has_moments(optimizer, p):
            if not whole or not is_wanted(optimizer, p):
                if int(carried[FLAGS]):
                    without[str(i)] = carried
                continue
            state[i] = as_saved(moments_of_zero(optimizer, p, index, name))
        state[i] = {**without_carried(state[i]), **(carried if whole or int(carried[FLAGS]) else {}), **for_zero}
        if whole and flattened(p) and (fault := why_not_gathered(state[i], p)):
            raise ValueError(f"state_dict: {name}: {fault}")
    packed["state"] = state
    for group, meta in zip(packed["param_groups"], metadata(optimizer, whole, files), strict=True):
        group[KEY] = meta
    places = {id(p): i for i, (_, p, _) in zip(ids, optimizer._parameters(), strict=True)}
    packed[KEY] = {
        "version": VERSION,
        "frozen": sorted(places[id(p)] for p in optimizer._frozen if id(p) in places),
        "masks": sorted(places[id(p)] for p in optimizer._masks if id(p) in places),  # for the reader
        WITHOUT_MOMENTS: without,
    }


def counters(optimizer: AdamW) -> dict[str, Tensor]:
    """Rounding seed and number of skipped steps as states of a parameter: 0-d, int64."""
    skipped = 0 if optimizer._skipped is None else int(optimizer._skipped)
    return {SEED: torch.tensor(optimizer._precision.rounding_seed), SKIPPED: torch.tensor(skipped)}


def why_not_gathered(state: Mapping[str, Any], p: Tensor) -> str | None:
    """Why FullyShardedDataParallel cannot put the pieces of a parameter's state together; None if it can.

    It takes tensors of the parameter's shape, no integers, and with ``use_orig_params=True`` all of one dtype.
    """
    kept = {key: t for key, t in state.items() if isinstance(t, Tensor) and t.dim() > 0}
    alike = all(t.is_floating_point() and t.shape == p.shape for t in kept.values())
    dtypes = {key: str(t.dtype).removeprefix("torch.") for key, t in kept.items()}
    if alike and (getattr(p, "_is_flat_param", False) or len(set(dtypes.values())) <= 1):
        return None
    got = ", ".join(f"{key} in {dtype}" for key, dtype in dtypes.items())
    return (
        f"expected one floating dtype for all of its state, as FSDP.optim_state_dict needs, got {got}; save "
        "optimizer.state_dict() of each process, which as many processes can load, or use "
        "torch.distributed.fsdp.fully_shard"
    )


def warn_of_flat_state(optimizer: AdamW) -> None:
    """Say, once there is state, that FullyShardedDataParallel's checkpoints will not hold it."""
    for _, p, name in optimizer._parameters():
        if flattened(p) and has_moments(optimizer, p):
            state = {**as_saved(optimizer.state[p]), **carried_by(optimizer, p, name)}
            if fault := why_not_gathered(state, p):
                warn(f"{name}: {fault}")
                return


def has_moments(optimizer: AdamW, p: Tensor) -> bool:
    """Whether ``p`` has more of a state than low bits, which are a part of the weight."""
    return bool(optimizer.state.get(p, {}).keys() - {LOW_BITS})


def moments_of_zero(optimizer: AdamW, p: Tensor, index: int, name: str) -> dict[str, Any]:
    """The state of a parameter before its first step."""
    state = dict(optimizer.state.get(p, {}))
    prepare_state(state, p, optimizer.param_groups[index], name, optimizer._precision, counts_on_device=False)
    return state


class NamesInFile:
    """The names that anchors which lie in a file have there, and where in that list each parameter's is."""

    def __init__(self, optimizer: AdamW) -> None:
        self.names: list[str] = []
        self.places: dict[Tensor, int] = {}
        """Counted from 1."""
        anchor = optimizer._anchor
        for _, p, name in optimizer._parameters() if anchor is not None and anchor.source is not None else ():
            own = optimizer._anchor_name(p, name)
            stored = None if anchor is None or own is None else anchor.name_in_file(own)
            if stored is not None:
                self.names.append(stored)
                self.places[p] = len(self.names)

    def by_parameter(self) -> dict[Tensor, str]:
        """The name in the file of each parameter that has one."""
        return {p: self.names[place - 1] for p, place in self.places.items()}


def metadata(optimizer: AdamW, whole: bool, files: NamesInFile) -> list[str]:
    """For each group, what concerns all parameters, and which of the group's have moments: JSON."""
    anchor = optimizer._anchor
    lent = {p for p, known in optimizer._lent.items() if known.moments}
    stepped: list[list[str]] = [[] for _ in optimizer.param_groups]
    places = [0] * len(stepped)
    for index, p, name in optimizer._parameters() if whole else ():
        if has_moments(optimizer, p) and p not in lent:
            stepped[index].append(name if has_names(optimizer.param_groups[index]) else str(places[index]))
        places[index] += 1
    for_all = {
        "version": VERSION,
        "rounding_seed": optimizer._precision.rounding_seed,
        "skipped_steps": None if optimizer._skipped is None else int(optimizer._skipped),
        "offloaded": anchor is not None and anchor.offloaded,
        "anchor_file": None if anchor is None else anchor.source,
        "names_in_file": files.names,
    }
    return [json.dumps({**for_all, "stepped": names if whole else None}) for names in stepped]


def carried_by(optimizer: AdamW, p: Tensor, name: str, place: int = 0) -> dict[str, Tensor]:
    """The flags of ``p``, with its ``place`` in the names in a file, and the tensors that it has, as they are kept."""
    flags = Has(0)
    found: dict[str, Tensor] = {}
    if p in optimizer._frozen:
        flags |= Has.FROZEN
    if p in optimizer._masks:
        flags |= Has.MASK
        found[MASK] = optimizer._masks[p].mask
    anchor, own = optimizer._anchor, optimizer._anchor_name(p, name)
    if anchor is not None and own is not None:
        tensor, importance = anchor.kept(own)
        if tensor is None:
            flags |= Has.ANCHOR_IN_FILE
        else:
            flags |= Has.ANCHOR
            found[ANCHOR] = tensor
        if importance is not None:
            flags |= Has.IMPORTANCE
            found[IMPORTANCE] = importance
    return {FLAGS: torch.tensor(int(flags) | place << PLACE, dtype=torch.int64), **found}


def may_step(p: Tensor) -> bool:
    """Whether a parameter can have moments."""
    return (p.is_floating_point() or p.is_complex()) and not p.is_meta and p.layout == torch.strided


def is_wanted(optimizer: AdamW, p: Tensor) -> bool:
    """Whether DCP wants the state of ``p``: not where it does not require grad, unless an unfreezer may open it."""
    return may_step(p) and (p.requires_grad or p in optimizer._frozen or has_moments(optimizer, p))


def asked_by(*modules: str) -> bool:
    """Whether a function of one of these modules is among the nearest callers."""
    if not any(module in sys.modules for module in modules):
        return False
    frame: Any = sys._getframe(1)
    for _ in range(16):
        if frame is None:
            return False
        if frame.f_globals.get("__name__") in modules:
            return True
        frame = frame.f_back
    return False


@dataclass
class Lent:
    """A parameter's state while DCP is to find more in it."""

    flags: Tensor
    moments: bool
    """Whether there were none, and these are 0."""
    before: dict[str, Any] | None
    """The state before, where moments were lent."""


def lend(optimizer: AdamW) -> None:
    """Put all that DCP is to find into ``optimizer.state`` and the groups, until :func:`take_back`.

    With ``flatten_optimizer_state_dict`` it loads what it finds there, and nothing else.
    """
    take_back(optimizer)
    files = NamesInFile(optimizer)
    for group, meta in zip(optimizer.param_groups, metadata(optimizer, True, files), strict=True):
        group[KEY] = meta
    for index, p, name in optimizer._parameters():
        if not is_wanted(optimizer, p):
            continue
        carried = carried_by(optimizer, p, name, files.places.get(p, 0))
        moments = not has_moments(optimizer, p)
        optimizer._lent[p] = Lent(carried[FLAGS], moments, optimizer.state.get(p) if moments else None)
        if moments:
            optimizer.state[p] = moments_of_zero(optimizer, p, index, name)
        optimizer.state[p].update(carried)


def take_back(optimizer: AdamW) -> None:
    """Take away what :func:`lend` has put there, unless somebody has put something else in its place."""
    if not optimizer._lent:
        return
    for group in optimizer.param_groups:
        group.pop(KEY, None)
    for p, lent in optimizer._lent.items():
        state = optimizer.state.get(p, {})
        if state.get(FLAGS) is not lent.flags:
            continue
        for key in CARRIED:
            state.pop(key, None)
        if lent.moments:
            del optimizer.state[p]
            if lent.before is not None:
                optimizer.state[p] = lent.before
    optimizer._lent = {}
    optimizer._forget_plan()


# -- loading -----------------------------------------------------------------------------------------------------


class Loading:
    """A state dict being loaded: checked when made, applied once torch's part is in place."""

    def __init__(self, optimizer: AdamW, loaded: dict[str, Any]) -> None:
        self.optimizer = optimizer
        check_form(loaded)
        self.for_torch = loaded = without_ours(by_names(optimizer, loaded))
        """The state dict in the optimizer's order, without what torch would cast and copy in vain."""
        self.kept: dict[Tensor, dict[str, Tensor]] = {}
        self.carried: dict[Tensor, dict[str, Any]] = {}
        self.drops_low_bits = False
        self.restored: Restored | None = None
        groups = loaded["param_groups"]
        ids = [i for group in groups for i in group["params"]]
        if len(ids) != len(list(optimizer._parameters())):  # torch will say so, after this
            return
        refuse_parts_of_a_flat_dict(optimizer, groups)
        beside = loaded.get(KEY, {"version": VERSION})
        check_version(beside, f'state_dict["{KEY}"]')
        for index, group in enumerate(groups):
            optimizer._precision.check_group(group, f"state_dict: param_groups[{index}]")
        metas = [read_metadata(group, index) for index, group in enumerate(groups)]
        stepped = [
            Keys(() if meta is None else meta["stepped"] or (), g) for meta, g in zip(metas, groups, strict=True)
        ]
        places = [place for group in groups for place in range(len(group["params"]))]
        state = dict(loaded["state"])
        in_file: dict[Tensor, str] = {}
        for i, place, (index, p, name) in zip(ids, places, optimizer._parameters(), strict=True):
            where = f"state_dict: state[{i!r}] of {name}"
            entry = check_entry(state.get(i), where)
            if not entry and stepped[index].find(place, name) is not None and local(p).numel() > 0:
                raise ValueError(
                    f"{where}: expected its moments, got none: torch.distributed.checkpoint leaves out parameters that "
                    "do not require grad. Load the optimizer first, and make the Unfreezer then"
                )
            found = carried_in(entry) or dict(beside.get(WITHOUT_MOMENTS, {}).get(str(i), {}))
            if "frozen" in beside:  # which hooks of the user may have edited
                frozen = int(Has.FROZEN)
                flags = int(found.get(FLAGS, 0)) & ~frozen | (frozen if i in beside["frozen"] else 0)
                found[FLAGS] = torch.tensor(flags, dtype=torch.int64)
            if found:
                check_carried(found, p, name, where)
            self.carried[p] = found
            names, at = (metas[index] or {}).get("names_in_file", []), int(found.get(FLAGS, 0)) >> PLACE
            if 0 < at <= len(names):
                in_file[p] = names[at - 1]
            if entry:
                state[i] = without_carried(entry)
                self._keep(state[i], p, where)
        for_torch = [{key: value for key, value in group.items() if key != KEY} for group in groups]
        self.for_torch = {"state": state, "param_groups": for_torch}
        meta = next((meta for meta in metas if meta is not None), None)
        known = self.carried if meta is not None else {p: found for p, found in self.carried.items() if found}
        if meta is not None or known:
            self.restored = Restored(optimizer, known, meta, in_file)
        warn_without_anchor(optimizer, for_torch, self.carried)

    def _keep(self, saved: dict[str, Any], p: Tensor, where: str) -> None:
        """Remember a parameter's tensors as they were saved: torch casts all state to the parameter's dtype."""
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
        own_steps(optimizer)
        optimizer._steps_without_gradients = 0
        if self.restored is not None:
            forget_unstepped(optimizer, self.carried)
            self.restored.apply()
        optimizer._known_parameters.note(optimizer)


class Restored:
    """Anchor, masks, frozen set and counters out of a checkpoint: checked when made, then applied."""

    def __init__(
        self,
        optimizer: AdamW,
        carried: Mapping[Tensor, Mapping[str, Any]],
        meta: Mapping[str, Any] | None,
        in_file: Mapping[Tensor, str],
    ) -> None:
        """Read what was saved.

        Args:
            optimizer: which is to have it.
            carried: of each parameter, the keys of :data:`CARRIED` that it has. Others stay as they are.
            meta: of :func:`metadata`; None where only ``carried`` came through.
            in_file: the names in the anchor's file.
        """
        self.optimizer = optimizer
        self.precision, self.skipped = optimizer._precision, optimizer._skipped
        if meta is not None:
            self.precision = replace(self.precision, rounding_seed=meta["rounding_seed"])
            device = None if self.skipped is None else self.skipped.device
            steps = meta["skipped_steps"]
            self.skipped = None if steps is None else torch.tensor(steps, dtype=torch.int64, device=device)
        elif counted := next((kept for kept in carried.values() if SEED in kept), None):
            self.precision = replace(self.precision, rounding_seed=int(counted[SEED]))
            self.skipped = counted[SKIPPED].to("cpu", torch.int64, copy=True)
        names = {p: name for _, p, name in optimizer._parameters()}
        flags = {p: flags_in(kept) for p, kept in carried.items()}
        self.masks = {p: mask for p, mask in optimizer._masks.items() if p not in carried}
        self.masks.update({p: UpdateMask(carried[p][MASK], p, names[p]) for p in carried if flags[p] & Has.MASK})
        self.frozen = {p for p in optimizer._frozen if p not in carried} | {p for p in flags if flags[p] & Has.FROZEN}
        for p in carried:
            if flags[p] & Has.ANCHOR_IN_FILE and p not in in_file:
                raise ValueError(
                    f"{names[p]}: expected the file that its anchor was saved in, got none: give the optimizer an "
                    "Anchor.from_safetensors of it first"
                )
        self.anchor = optimizer._anchor
        anchored = Has.ANCHOR | Has.ANCHOR_IN_FILE | Has.IMPORTANCE
        own = {p: carried_by(optimizer, p, names[p]) for p in carried}
        differs = any(
            (flags[p] ^ flags_in(own[p])) & anchored
            or any(carried[p].get(key) is not own[p].get(key) for key in (ANCHOR, IMPORTANCE))
            for p in carried
        )
        if any(flag & anchored for flag in flags.values()) and (differs or meta is not None):
            # A copy, so that on an error nothing has changed; it may know where the file lies now.
            self.anchor = Anchor() if self.anchor is None else copy.copy(self.anchor)
            source = None if meta is None else meta["anchor_file"]
            self.anchor.restore(
                [
                    (
                        names[p],
                        p,
                        carried[p].get(ANCHOR),
                        carried[p].get(IMPORTANCE),
                        in_file.get(p) if flags[p] & Has.ANCHOR_IN_FILE else None,
                    )
                    for p in carried
                ],
                source,
                offloaded=None if meta is None else bool(meta["offloaded"]),
            )

    def apply(self) -> None:
        """Give it to the optimizer."""
        optimizer = self.optimizer
        optimizer._anchor, optimizer._masks, optimizer._frozen = self.anchor, self.masks, self.frozen
        optimizer._precision, optimizer._skipped = self.precision, self.skipped


def adopt(optimizer: AdamW) -> None:
    """Take over what others have put into ``optimizer.state``, as ZeroRedundancyOptimizer loads a checkpoint."""
    if not any(isinstance(state, dict) and FLAGS in state for state in optimizer.state.values()):
        return
    found: dict[Tensor, dict[str, Any]] = {}
    for _, p, name in optimizer._parameters():
        state = optimizer.state.get(p, {})
        if FLAGS in state:
            found[p] = carried_in(state)
            check_carried(found[p], p, name, f"{name}: state")
    restored = Restored(optimizer, found, None, NamesInFile(optimizer).by_parameter())
    had = [p for _, p, name in optimizer._parameters() if p in found and optimizer._anchor_name(p, name) is not None]
    warn_without_anchor(optimizer, optimizer.param_groups if had else (), found)
    for p in found:
        state = optimizer.state[p] = without_carried(optimizer.state[p])
        if LOW_BITS in state:
            state[LOW_BITS] = as_kept(state[LOW_BITS], p)
    optimizer._weight_sums.clear()
    optimizer._steps_without_gradients = 0
    forget_unstepped(optimizer, found)
    restored.apply()


def warn_without_anchor(
    optimizer: AdamW, groups: Iterable[Mapping[str, Any]], carried: Mapping[Tensor, Mapping[str, Any]]
) -> None:
    """Say that a run with an anchor goes on without the one that it had."""
    pulled = any(group.get("anchor_decay") for group in groups)
    lost = not any(flags_in(found) & (Has.ANCHOR | Has.ANCHOR_IN_FILE) for found in carried.values())
    if pulled and lost:
        stays = "the optimizer's own stays" if optimizer._anchor is not None else "the optimizer has none either"
        warn(f"state_dict: has groups with anchor_decay > 0, and no anchor; {stays}")


def own_steps(optimizer: AdamW) -> None:
    """Give each parameter a step count of its own.

    FullyShardedDataParallel gives one tensor to all that it has flattened together, which would count for each of them.
    """
    seen: set[int] = set()
    for state in optimizer.state.values():
        step = state.get("step") if isinstance(state, dict) else None
        if isinstance(step, Tensor):
            if step.data_ptr() in seen:
                state["step"] = step.clone()
            seen.add(step.data_ptr())


def forget_unstepped(optimizer: AdamW, params: Iterable[Tensor]) -> None:
    """Drop moments that were saved for DCP's sake only."""
    for p in params:
        state = optimizer.state.get(p, {})
        step = state.get("step")
        if isinstance(step, Tensor) and step.numel() == 1 and float(step) == 0.0:
            low = state.get(LOW_BITS)
            del optimizer.state[p]
            if low is not None and bool(local(low).view(torch.uint8).any()):
                optimizer.state[p] = {LOW_BITS: low}


def check_form(loaded: Mapping[str, Any]) -> None:
    """Raise for what is no state dict, or has groups without the options that a step needs."""
    if missing := [key for key in ("state", "param_groups") if key not in loaded]:
        raise ValueError(
            f"state_dict: expected state and param_groups, got none for {listed(missing, quoted=False)}; with "
            "full_state_dict and broadcast_from_rank0 DCP reads no flat one: leave out flatten_optimizer_state_dict"
        )
    for index, group in enumerate(loaded["param_groups"]):
        if missing := [key for key in ("lr", "betas", "eps", "weight_decay") if key not in group]:
            raise ValueError(
                f"state_dict: param_groups[{index}]: expected lr, betas, eps and weight_decay, got none for "
                f"{listed(missing, quoted=False)}; where processes have other parameters each (pipeline stages), DCP "
                "keeps the groups of one: save and load with flatten_optimizer_state_dict=True"
            )


def refuse_parts_of_a_flat_dict(optimizer: AdamW, groups: Iterable[Mapping[str, Any]]) -> None:
    """Raise where DCP has read a flat state dict without looking at the optimizer first, and so only torch's keys.

    Torch's own state dicts have no ``anchor_decay``, and all others of this class the key :data:`KEY`.
    """
    has = optimizer._anchor is not None or optimizer._masks or optimizer._frozen
    ours = any("anchor_decay" in group for group in groups) and not any(KEY in group for group in groups)
    if asked_by(DCP) and ours and (has or optimizer._precision.rounding == "stochastic"):
        raise ValueError(
            "state_dict: expected all that was saved, got torch's part: with flatten_optimizer_state_dict, DCP reads "
            "what the optimizer holds at that moment; call get_optimizer_state_dict with the same options just before"
        )


def flags_in(found: Mapping[str, Any]) -> Has:
    """The flags among what a parameter has."""
    return Has(int(found.get(FLAGS, 0)) & ((1 << PLACE) - 1))


def check_entry(entry: Any, where: str) -> dict[str, Any]:
    """A parameter's saved state, {} without one; raises where DCP has found nothing for a key."""
    lost = [key for key, value in (entry or {}).items() if isinstance(value, dict)]
    if lost:
        raise ValueError(f"{where}: expected tensors, got none for {listed(lost, quoted=False)}")
    return dict(entry or {})


def check_carried(found: Mapping[str, Any], p: Tensor, name: str, where: str) -> None:
    """Raise unless all is there that the flags promise, and fits."""
    flags = flags_in(found)
    for flag, key, words in HELD:
        if flags & flag and not isinstance(found.get(key), Tensor):
            raise ValueError(
                f"{where}: expected its {key}, got none. It was saved with {words}, and torch.distributed.checkpoint "
                f"reads what the optimizer has already: give it {words} first, of any values"
            )
        if not flags & flag and key in found:
            raise ValueError(f"{where}: expected no {key}, as it was saved without {words}, got one")
    if flags & Has.MASK:
        check_mask(found[MASK], p, name)


def went_through_torch(loaded: Mapping[str, Any]) -> bool:
    """Whether another optimizer has loaded the state dict and saved it again.

    torch's casts masks, flags and anchors to the parameter's dtype, and drops what lies beside ``state``.
    """
    flags = [entry[FLAGS] for entry in loaded["state"].values() if entry and FLAGS in entry]
    if any(not isinstance(flag, Tensor) or flag.dtype != torch.int64 for flag in flags):
        return True
    metas = [json.loads(group[KEY]) for group in loaded["param_groups"] if KEY in group]
    return KEY not in loaded and any(meta.get("stepped", ()) is None for meta in metas)


def without_ours(loaded: dict[str, Any]) -> dict[str, Any]:
    """The state dict as it is, or as one of torch's if torch's optimizer had it in between."""
    if not went_through_torch(loaded):
        return loaded
    groups = [{key: value for key, value in group.items() if key != KEY} for group in loaded["param_groups"]]
    state = {i: without_carried(entry) if entry else entry for i, entry in loaded["state"].items()}
    return {**loaded, "state": state, "param_groups": groups}


def carried_in(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Of a parameter's saved state, what is not moments or low bits."""
    return {key: entry[key] for key in CARRIED if key in entry}


def without_carried(entry: Mapping[str, Any]) -> dict[str, Any]:
    """A parameter's saved state without what is not moments or low bits."""
    return {key: value for key, value in entry.items() if key not in CARRIED}


def read_metadata(group: Mapping[str, Any], index: int) -> dict[str, Any] | None:
    """The JSON that :func:`pack` has written into a group; None in a state dict of torch's."""
    if KEY not in group:
        return None
    meta: dict[str, Any] = json.loads(group[KEY])
    check_version(meta, f'state_dict: param_groups[{index}]["{KEY}"]')
    return meta


def check_version(saved: Mapping[str, Any], where: str) -> None:
    """Raise for what this release does not read."""
    if saved.get("version") != VERSION:
        raise ValueError(
            f"{where}: expected version {VERSION}, got {saved.get('version')!r}: it was written by another release of "
            "fastft"
        )


class Keys:
    """Finds a saved group's parameters under the keys that :func:`pack` gave them: names, or places in the group."""

    def __init__(self, keys: Iterable[str], group: Mapping[str, Any]) -> None:
        self.index = NameIndex(keys)
        self.names = group.get("param_names") or ()

    def find(self, place: int, name: str) -> str | None:
        """The key of the parameter at a place, which the optimizer knows by a name; None if there is none."""
        saved = self.names[place] if place < len(self.names) else str(place)
        return self.index.find(name) or (saved if saved in self.index.names else None)
