"""Over which processes an optimizer's parameters lie spread, and sums over all of them.

A DTensor says itself how it is cut. The pieces of FullyShardedDataParallel (FSDP1) and the share of a
ZeroRedundancyOptimizer are plain tensors that say nothing: their wrappers are looked for. Of other partitions only the
user knows (``process_group``).
"""

from __future__ import annotations

import gc
import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastft.layers.wrappers import flattened

from .dtensors import placement_of
from .tensors import is_dense, is_dtensor

ZERO = "torch.distributed.optim.zero_redundancy_optimizer"
CPU = torch.device("cpu")
Groups = tuple[Any, ...]
"""The process groups over which a parameter is spread: cut to pieces, or one process has this one, another that."""


class KeptGroup:
    """A process group that an optimizer was given; copies of the optimizer share it."""

    def __init__(self, group: Any) -> None:
        self.group = group

    def __deepcopy__(self, memo: Any) -> KeptGroup:
        return self

    def __reduce__(self) -> Any:
        if self.group is not None:
            raise TypeError("process_group: cannot be pickled; save the optimizer's state_dict() instead")
        return KeptGroup, (None,)


class Over(NamedTuple):
    """How the sum over a parameter's elements here becomes that over all of them."""

    groups: Groups = ()
    """It is to be added up over these."""
    share: float = 1.0
    """And to count so much of it, where the processes of the group beside have copies."""


HERE = Over()
"""All of it lies in this process."""


class Spread:
    """How an optimizer's parameters lie spread, and the one sum over processes that a step takes.

    It is made of all parameters, whatever has a gradient in this process: all processes have to come to the same sums,
    in the same order.
    """

    def __init__(self, params: Iterable[Tensor] = (), process_group: Any = None, optimizer: Any = None) -> None:
        """Find out about ``params``.

        Args:
            params: the optimizer's.
            process_group: given by the user: each of its processes has other parameters, or other parts of them, but
                for DTensors, which say themselves where they are cut and where they are copies.
            optimizer: whose share of the parameters a ZeroRedundancyOptimizer may have chosen.

        Raises:
            RuntimeError: a parameter was flattened by a FullyShardedDataParallel that is gone.
        """
        found = list(params)
        self.device = found[0].device if found else CPU
        self._cut: dict[int, Groups] = {}
        self._over: dict[int, Over] = {}
        self._beside: Groups = ()
        self._covers_world = False
        self._places: dict[int, int] = {}
        self.is_share = False
        """Whether a ZeroRedundancyOptimizer has chosen which parameters there are."""
        if not initialized():
            return
        zero = zero_around(optimizer) if process_group is None else None
        self._beside = larger([process_group if zero is None else zero.process_group])
        self.is_share = zero is not None
        if zero is not None:
            everyones = [p for group in zero.param_groups for p in group["params"]]
            self._places = {id(p): place for place, p in enumerate(everyones)}
            if not found:
                self.device = everyones[0].device
        elif not found and self._beside:  # the others are where their parameters are
            self.device = device_for(self._beside[0])
        flat = groups_of_flat(found)
        for p in found:
            self._cut[id(p)] = (flat[id(p)],) if id(p) in flat else cut_over(p)
            self._over[id(p)] = self._over_beside(p)
        # One parameter that lies on all processes shows that they train one model; what lies on fewer is then repeated.
        world = size_of(None)
        self._covers_world = any(is_dtensor(p) and placement_of(p)[0].size() == world for p in found)

    def __bool__(self) -> bool:
        """Whether there is anything to add up over processes."""
        return bool(self._beside) or any(self._cut.values())

    def cuts(self, p: Tensor) -> bool:
        """Whether this process has only a piece of ``p``."""
        return bool(self._cut[id(p)] if id(p) in self._cut else cut_over(p))

    def over(self, p: Tensor) -> Over:
        """Over which process groups, but for the one beside, the sums of ``p`` are added up."""
        return self._over.get(id(p), HERE)

    def place(self, p: Tensor, own: int) -> int:
        """The place of ``p`` among the parameters of all processes; ``own`` is that among those of this one."""
        return self._places.get(id(p), own)

    def _over_beside(self, p: Tensor) -> Over:
        """How the sums of ``p`` add up, so that each element counts once in the sum over the group beside.

        Of ``members`` processes in that group that ``p`` lies on, each adds its piece, or, where it is cut over other
        groups too, the sum over these. Together they have as many different ones as the groups within it make.
        """
        cut = self._cut[id(p)]
        if not self._beside or not (cut or is_dtensor(p)):
            return Over(cut)
        beside = {rank for group in self._beside for rank in ranks_of(group)}
        within = [group for group in cut if beside.issuperset(ranks_of(group))]
        if is_dtensor(p):
            ranks = placement_of(p)[0].mesh.flatten().tolist()
        else:
            ranks = [rank for group in cut for rank in ranks_of(group)]
        members = len(beside.intersection(ranks))
        different = math.prod(size_of(group) for group in within)
        groups = tuple(group for group in cut if group not in within)
        return Over(groups, different / members if members > 1 else 1.0)

    @torch.no_grad()
    def total(self, sums: Mapping[Over, Tensor], flag: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The sum over all parameters and processes, and whether a process has raised its flag.

        Args:
            sums: 0-d, float64: of the parameters in this process whose sums become the whole in this way.
            flag: one number, 0 where it is not raised.

        Returns:
            The same two in every process, on ``self.device``: 0-d, float64 and float32.
        """
        zero = torch.zeros((), dtype=torch.float64, device=self.device)
        values: dict[Groups, Tensor] = {over.groups: zero for over in self._over.values()}  # also those without a sum
        for over, own in sums.items():
            here = own.to(self.device)
            values[over.groups] = values[over.groups] + (here if over.share == 1.0 else here * over.share)
        raised = zero if flag is None else (flag.to(self.device) != 0).double().reshape(())
        groups = tuple(dict.fromkeys(group for key in values for group in key))
        whole = self._covers_world and not self._beside
        if whole or len(groups) == 1:
            # A sum that several processes have counts in equal parts, so that all go by the same bits.
            group = torch.distributed.group.WORLD if whole else groups[0]
            shares = {key: math.prod(size_of(g) for g in key) / size_of(group) for key in values}
            own_parts = [value if shares[key] == 1.0 else value * shares[key] for key, value in values.items()]
            total, raised = added_up([torch.stack(own_parts).sum(), raised], group)
        else:
            for group in groups:
                cut = [key for key in values if group in key]
                *found, raised = added_up([*(values[key] for key in cut), raised], group)
                values.update(zip(cut, found, strict=True))
            total = torch.stack([*values.values(), zero]).sum()
        for group in self._beside:  # two numbers, whatever each process has
            total, raised = added_up([total, raised], group)
        return total, None if flag is None else (raised != 0).float()


def added_up(numbers: Sequence[Tensor], group: Any) -> tuple[Tensor, ...]:
    """0-d tensors of one device, each added up over the processes of a group."""
    here = torch.stack(list(numbers))
    there = here.to(device_for(group, here.device))
    torch.distributed.all_reduce(there, group=group)
    return there.to(here.device).unbind()


def initialized() -> bool:
    """Whether several processes may train together."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def size_of(group: Any) -> int:
    """The number of processes in a group; None: of all."""
    return torch.distributed.get_world_size(group)


def ranks_of(group: Any) -> list[int]:
    """The processes of a group."""
    return torch.distributed.get_process_group_ranks(group)


def device_for(group: Any, device: torch.device | None = None) -> torch.device:
    """Where a tensor has to lie to be sent in a group: on ``device``, if a backend of the group sends from there."""
    kinds = [pair.partition(":")[0] for pair in torch.distributed.get_backend_config(group).split(",")]
    if device is not None and device.type in kinds:
        return device
    # A backend may be named for kinds of devices that this torch knows nothing of.
    for kind in kinds:
        module = None if kind == "cpu" else getattr(torch, kind, None)
        if module is not None and module.is_available():
            return torch.device(kind, module.current_device())
    return CPU


def larger(groups: Iterable[Any]) -> Groups:
    """Those that are groups of more than one process, each once."""
    return tuple(dict.fromkeys(group for group in groups if group is not None and size_of(group) > 1))


def cut_over(p: Tensor) -> Groups:
    """The process groups over which a DTensor is cut to pieces; () for a tensor that is whole here."""
    if not is_dtensor(p):
        return ()
    mesh, placements = placement_of(p)
    # Not is_shard(): the strided shards of fully_shard over tensor parallelism are none to it.
    return larger(mesh.get_group(i) for i, placement in enumerate(placements) if not placement.is_replicate())


def check_placements(p: Tensor, name: str) -> None:
    """Raise for a DTensor that cannot be stepped in parts, or of which this process has none."""
    if not is_dtensor(p):
        return
    mesh, placements = placement_of(p)
    if any(placement.is_partial() for placement in placements):
        raise ValueError(
            f"{name}: expected a DTensor that is cut or replicated, got {placements}: what AdamW does to the terms of "
            "a sum is not what it does to the sum; redistribute the parameter"
        )
    if mesh.get_coordinate() is None:
        raise ValueError(
            f"{name}: expected a parameter of which this process has a part, got a DTensor on ranks "
            f"{mesh.mesh.flatten().tolist()} in rank {torch.distributed.get_rank()}; give each process an optimizer of "
            "the parameters that it has, with process_group= of all"
        )


def looks_at_one_process(scaler: Any) -> bool:
    """Whether it is one of torch's GradScalers that know of this process's gradients only."""
    if not isinstance(scaler, torch.amp.GradScaler) or type(scaler).__module__.partition(".")[0] != "torch":
        return False
    from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

    return not isinstance(scaler, ShardedGradScaler)


def fingerprint(whole: Tensor) -> Tensor:
    """A number by which tensors are compared: the sum of their bits as integers, exact in any order; 0-d, int64."""
    values = torch.view_as_real(whole.detach()) if whole.is_complex() else whole.detach()
    bits = values.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()])
    flat = bits.as_strided((bits.numel(),), (1,)) if is_dense(bits) else bits.flatten()
    at_once = 1 << 18 if flat.device.type == "cpu" else 1 << 24  # elements, which are made int64 for the sum
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    for part in flat.split(at_once):
        total += part.sum(dtype=torch.int64)
    return total


@torch.no_grad()
def differing(pairs: Sequence[tuple[Groups, Tensor]]) -> list[int]:
    """Where the processes have other values in what should be the same whole tensor in each; a collective.

    Args:
        pairs: of the process groups that should have the same, and a plain tensor.

    Returns:
        The places of those that differ, the same in every process.
    """
    by_groups: dict[Groups, list[int]] = {}
    for i, (groups, _) in enumerate(pairs):
        if several := larger(groups):
            by_groups.setdefault(several, []).append(i)
    found = []
    for groups, places in by_groups.items():
        device = pairs[places[0]][1].device
        sums = [fingerprint(whole).to(device) for _, whole in (pairs[i] for i in places)]
        found += [places[i] for i in unequal(sums, groups)]
    return sorted(found)


def unequal(numbers: Sequence[Tensor], groups: Iterable[Any]) -> list[int]:
    """The places of the 0-d tensors, of one device, that are not the same in all processes of these groups."""
    least, most = torch.stack(list(numbers)), torch.stack(list(numbers))
    for group in larger(groups):
        where = device_for(group, least.device)
        least, most = least.to(where), most.to(where)
        torch.distributed.all_reduce(least, torch.distributed.ReduceOp.MIN, group=group)
        torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX, group=group)
    return [i for i, same in enumerate((least == most).tolist()) if not same]


def unlike(own: Mapping[str, int], group: Any) -> list[str]:
    """The names to which processes of the group have other numbers, of those that several have; a collective."""
    everyones: list[Any] = [None] * size_of(group)
    torch.distributed.all_gather_object(everyones, dict(own), group=group)
    numbers: dict[str, set[int]] = {}
    for theirs in everyones:
        for name, number in theirs.items():
            numbers.setdefault(name, set()).add(number)
    return [name for name, found in numbers.items() if len(found) > 1]


# -- wrappers of plain tensors ---------------------------------------------------------------------------------


def groups_of_flat(params: Sequence[Tensor]) -> dict[int, Any]:
    """By id(parameter), the process group over which FullyShardedDataParallel has cut it.

    Raises:
        RuntimeError: a parameter is in a flat one of which nothing is found.
    """
    wanted = {id(p) for p in params if flattened(p)}
    found: dict[int, Any] = {}
    if not wanted:
        return found
    from torch.distributed.fsdp import FullyShardedDataParallel

    known: set[int] = set()
    for module in living(FullyShardedDataParallel):
        handle = getattr(module, "_handle", None)
        if handle is None:
            continue
        flat = handle.flat_param
        for p in (flat, *(flat._params or ()), *(flat._shared_params or ())):
            known.add(id(p))
            if handle.uses_sharded_strategy and id(p) in wanted and size_of(handle.process_group) > 1:
                found[id(p)] = handle.process_group
    if wanted - known:
        raise RuntimeError(
            "params: expected parameters of a FullyShardedDataParallel that is there, got some "
            f"({len(wanted - known)}) of one that is gone; make the optimizer from the wrapped model's parameters"
        )
    return found


def zero_around(optimizer: Any) -> Any:
    """The ZeroRedundancyOptimizer that gave ``optimizer`` its share; None without one."""
    module = sys.modules.get(ZERO)
    if module is None or optimizer is None:
        return None
    # One whose making failed has no optimizer.
    kinds = module.ZeroRedundancyOptimizer
    return next((zero for zero in living(kinds) if getattr(zero, "optim", None) is optimizer), None)


def averaged_together(params: Iterable[Tensor]) -> Iterator[tuple[Any, list[tuple[str, Tensor]]]]:
    """For each DistributedDataParallel that averages gradients of some of these: its process group, and they by name.

    Not those that it was to ignore, which it does not make equal either.
    """
    wanted = {id(p) for p in params}
    for ddp in living(nn.parallel.DistributedDataParallel) if wanted else ():
        module, group = ddp._modules.get("module"), getattr(ddp, "process_group", None)
        if module is None or not larger([group]):  # one whose making failed has neither
            continue
        named = [(name, p) for name, p in module.named_parameters() if id(p) in wanted]
        if named := [(name, p) for name, p in named if name not in ddp.parameters_to_ignore]:
            yield group, named


def wrappers() -> Iterator[nn.Module]:
    """All modules in this process that average or cut the gradients of the parameters inside them.

    Neither parameters nor the autograd graph know of them, so all objects are looked at, some tenths of a second; only
    where several processes train.
    """
    if not initialized():
        return
    from torch.distributed.fsdp import FullyShardedDataParallel

    yield from living((nn.parallel.DistributedDataParallel, FullyShardedDataParallel))


def living(kinds: type | tuple[type, ...]) -> Iterator[Any]:
    """All objects of these classes.

    After ``gc.freeze()`` all that there is now is left alone by the garbage collector again.
    """
    frozen = gc.get_freeze_count() > 0  # gc.freeze() hides what there was from get_objects()
    if frozen:
        gc.collect()  # so that no garbage stays for good
        gc.unfreeze()
    objects = gc.get_objects()
    if frozen:
        gc.freeze()
    for found in objects:
        if issubclass(type(found), kinds):
            yield found
