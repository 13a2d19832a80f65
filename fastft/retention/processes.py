"""Several processes with one model: sums over them, what must agree, and a wrapper that is refused."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import count
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastft.layers.wrappers import is_fsdp1
from fastft.optim.dtensors import placement_of
from fastft.optim.tensors import is_dtensor

Made = TypeVar("Made")


def refuse_fsdp1(model: nn.Module, instead: str) -> None:
    """Raise if a part of the model is wrapped by ``FullyShardedDataParallel``; ``instead``: a way without it.

    Raises:
        ValueError: it is.
    """
    if any(is_fsdp1(module) for module in model.modules()):
        raise ValueError(
            "model: expected parameters that are whole, or DTensors, got those that FullyShardedDataParallel has "
            f"flattened: {instead}"
        )


# -- over the processes of a mesh --------------------------------------------------------------------------------


def is_first_copy(p: Tensor) -> bool:
    """Whether this process's part counts: of the processes that hold the same part of a DTensor, one does."""
    if not is_dtensor(p):
        return True
    mesh, placements = placement_of(p)
    at = zip(mesh.get_coordinate(), placements, strict=True)
    return all(i == 0 for i, placement in at if placement.is_replicate())


def meshes_of(model: nn.Module) -> list[Any]:
    """The meshes that the model's DTensors and this process lie on, in the same order on every process."""
    meshes = dict.fromkeys(placement_of(p)[0] for p in model.parameters() if is_dtensor(p))
    return [mesh for mesh in meshes if mesh.get_coordinate() is not None]


def sum_over_mesh(values: Tensor, mesh: Any) -> Tensor:
    """The sum of plain CPU tensors over the processes of a mesh; a collective."""
    total = values.to(mesh.device_type, copy=True)  # also for parameters that wait in host memory
    for group in mesh.get_all_groups():
        torch.distributed.all_reduce(total, group=group)
    return total.cpu()


def groups_of(meshes: Iterable[Any]) -> list[Any]:
    """The process groups of all dimensions of the meshes."""
    return [group for mesh in meshes for group in mesh.get_all_groups()]


def common_groups(model: nn.Module) -> list[Any]:
    """The groups of processes that hold the model together: of its DTensors' meshes, and of DistributedDataParallel."""
    wrappers = [module for module in model.modules() if isinstance(module, DistributedDataParallel)]
    return [*groups_of(meshes_of(model)), *(wrapper.process_group for wrapper in wrappers)]


# -- what must agree ---------------------------------------------------------------------------------------------


def check_agreement(expected: str, own: str | Exception, groups: Sequence[Any]) -> None:
    """Raise on every process of the groups unless all say the same; a collective.

    Raises:
        Exception: ``own``, if that is one.
        ValueError: the processes have said different things, and which.
    """
    said: dict[str, int] = {}  # and the first process that says so: of many that agree, one line is sent
    if groups:
        from torch.distributed import all_gather_object, get_rank, get_world_size

        said[str(own)] = get_rank()
        for group in groups:
            others: list[Any] = [None] * get_world_size(group)
            all_gather_object(others, said, group=group)
            for other in others:
                said.update({text: min(rank, said.get(text, rank)) for text, rank in other.items()})
    if isinstance(own, Exception):
        raise own
    if len(said) > 1:
        different = "; ".join(f"{text} on rank {rank}" for text, rank in sorted(said.items(), key=lambda s: s[1]))
        raise ValueError(f"{expected}, got {different}")


def agreed(expected: str, make: Callable[[], Made], said: Callable[[Made], str], groups: Sequence[Any]) -> Made:
    """The result of ``make``, once all processes of the groups have one of which they say the same.

    Raises:
        Exception: as ``make`` or ``said`` does, after the other processes have heard of it.
        ValueError: as :func:`check_agreement` does.
    """
    own: str | Exception
    try:
        made = make()
        own = said(made)
    except Exception as error:
        own = error
    check_agreement(expected, own, groups)
    return made


def same_everywhere(batches: Iterable[Any], groups: Sequence[Any]) -> Iterator[Any]:
    """The batches, each after all processes of the groups have found that they have the same; a collective.

    Raises:
        ValueError: a process has another one, or no more; on every process.
    """
    if not groups:
        yield from batches
        return
    expected = "batches: expected the same on every process (leave out a DistributedSampler)"
    iterator, end = iter(batches), object()

    def described(batch: Any, i: int) -> str:
        return f"{i} batches" if batch is end else f"batch {i} with the digest {digest_of(batch)}"

    for i in count():
        batch: Any = agreed(expected, lambda: next(iterator, end), partial(described, i=i), groups)
        if batch is end:
            return
        yield batch


def digest_of(value: Any) -> str:
    """Alike for the same tensors, numbers and strings, inside mappings, lists and tuples."""
    digest = hashlib.sha256()
    for piece in pieces_of(value):
        digest.update(piece)
    return digest.hexdigest()[:16]


def pieces_of(value: Any) -> Iterator[bytes]:
    """Bytes that say which value it is; of types that are not known, which type."""
    if isinstance(value, Tensor):
        yield f"{value.dtype} {tuple(value.shape)};".encode()
        if value.layout == torch.strided and not is_dtensor(value):
            yield value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    elif isinstance(value, Mapping):
        yield f"{len(value)} pairs;".encode()
        for key, own in value.items():
            yield from pieces_of(key)
            yield from pieces_of(own)
    elif isinstance(value, (list, tuple)):
        yield f"{len(value)} items;".encode()
        for own in value:
            yield from pieces_of(own)
    else:
        known = value is None or isinstance(value, (str, bytes, int, float))
        yield f"{value!r};".encode() if known else f"{type(value).__name__};".encode()
