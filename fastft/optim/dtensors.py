"""DTensors: which part of a whole tensor lies in this process, and tensors that are distributed as another is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .tensors import is_dtensor, local


def like(tensor: Tensor, p: Tensor) -> Tensor:
    """A plain ``tensor`` distributed as the DTensor ``p`` is; one that is so already, or beside a plain ``p``, itself.

    Every process has the whole tensor, so each takes its own part and nothing is sent.

    Raises:
        ValueError: a DTensor that is placed otherwise.
    """
    if is_dtensor(tensor):
        check_same_placement(tensor, p)
        return tensor
    if not is_dtensor(p):
        return tensor
    # Not distribute_tensor(), whose strided shards of fully_shard over tensor parallelism are not those of the
    # parameter where rows do not come out even.
    return spread_like(cut_like(tensor, p).to(p.device), p, tuple(tensor.shape))


def whole(tensor: Tensor) -> Tensor:
    """All of a DTensor, also of one that waits in host memory, a collective; any other tensor itself.

    Gradients go back to the parts.
    """
    if not is_dtensor(tensor):
        return tensor
    device = placement_of(tensor)[0].device_type  # where the process group can send
    here = tensor if tensor.device.type == device else tensor.to(device)
    return here.full_tensor()  # type: ignore[attr-defined, no-any-return]


def spread_like(part: Tensor, p: Tensor, shape: tuple[int, ...]) -> Tensor:
    """This process's part of a tensor of ``shape`` as a DTensor placed as ``p`` is; beside a plain ``p``, itself."""
    if not is_dtensor(p):
        return part
    from torch.distributed.tensor import DTensor

    whole = torch.empty(shape, device="meta")
    if tuple(shape) == tuple(p.shape):
        whole = torch.empty_strided(tuple(p.shape), p.stride(), device="meta")
    mesh, placements = placement_of(p)
    return DTensor.from_local(part, mesh, placements, run_check=False, shape=whole.shape, stride=whole.stride())


def part_beside(tensor: Tensor, p: Tensor) -> Tensor:
    """Of a tensor of the parameter's shape, the part that belongs to ``local(p)``; a view.

    Args:
        tensor: whole, or a DTensor on the parameter's mesh with its placements.
        p: a parameter, of any kind.

    Raises:
        ValueError: a DTensor that is placed otherwise, or a parameter whose placements do not say which part this is.
    """
    if is_dtensor(tensor):
        check_same_placement(tensor, p)
        return local(tensor).detach()
    part = cut_like(tensor, p)
    if part.shape != local(p).shape:
        mesh, placements = placement_of(p)
        raise ValueError(
            f"expected a part of shape {list(part.shape)} on this process, with {placements} on a mesh of shape "
            f"{tuple(mesh.shape)}, got {list(local(p).shape)}"
        )
    return part


def check_same_placement(tensor: Tensor, p: Tensor) -> None:
    """Raise unless the DTensor ``tensor`` lies as ``p`` does."""
    if is_dtensor(p) and placement_of(tensor) == placement_of(p):
        return
    mesh, placements = placement_of(tensor)
    where = "a plain tensor"
    if is_dtensor(p):
        where = f"{placement_of(p)[1]} on a mesh of shape {tuple(placement_of(p)[0].shape)}"
    raise ValueError(
        f"expected one that is whole, or lies as the parameter does ({where}), got a DTensor with {placements} on a "
        f"mesh of shape {tuple(mesh.shape)}; take it before the model is distributed, or from the model as it is now"
    )


def cut_like(tensor: Tensor, p: Tensor) -> Tensor:
    """This process's part of a whole plain tensor that is cut as ``p`` is, whatever its shape; a view."""
    if not is_dtensor(p):
        return tensor
    mesh, placements = placement_of(p)
    coordinate = mesh.get_coordinate()
    for i in cutting_order(p):
        dim, pieces = placements[i].dim, mesh.size(i)
        size = tensor.shape[dim]
        longest = -(-size // pieces)  # as torch.chunk cuts
        first = min(coordinate[i] * longest, size)
        tensor = tensor.narrow(dim, first, min(longest, size - first))
    return tensor


def placement_of(p: Tensor) -> tuple[Any, tuple[Any, ...]]:
    """A DTensor's mesh and placements."""
    return p.device_mesh, p.placements  # type: ignore[attr-defined]


def cutting_order(p: Tensor) -> list[int]:
    """The mesh dimensions that cut a DTensor, in the order of the cuts.

    That is from left to right, but for ``_StridedShard``: its ``split_factor`` counts the pieces that others had made
    before, as ``fully_shard`` finds them where tensor parallelism has cut already.

    Raises:
        ValueError: placements that are no cuts of a whole tensor, or a process outside of the mesh.
    """
    mesh, placements = placement_of(p)
    if mesh.get_coordinate() is None:
        raise ValueError(f"expected a process of the parameter's mesh, got one outside of {mesh}")
    order: dict[int, list[int]] = {}  # by the tensor's dimension; cuts along different ones do not meet
    for i in reversed(range(mesh.ndim)):
        if placements[i].is_replicate():
            continue
        before = order.setdefault(placements[i].dim, []) if hasattr(placements[i], "dim") else None
        place, made, wanted = 0, 1, getattr(placements[i], "split_factor", 1)
        while before and place < len(before) and made < wanted:
            made *= mesh.size(before[place])
            place += 1
        if before is None or made != wanted:
            raise ValueError(f"expected a DTensor that is cut or replicated, got {placements} on {mesh}")
        before.insert(place, i)
    return [i for cuts in order.values() for i in cuts]
