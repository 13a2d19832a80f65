"""A model's parameters beside their anchor: which have one, and the parts of the two in this process, chunk by chunk.

Of a DTensor every process reads and writes its own part; nothing is sent.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastft.anchor import Anchor
from fastft.layers.wrappers import is_fsdp1
from fastft.optim.dtensors import part_beside
from fastft.optim.tensors import is_dtensor, local

# Elements of a chunk: small enough that what is computed from it is still in cache when it is read again.
CHUNK = 1 << 18


@dataclass(frozen=True)
class Anchored:
    """A parameter that has an anchor."""

    name: str
    parameter: Tensor
    key: str
    """Its name in the anchor."""

    @property
    def here(self) -> Tensor:
        """The part of the parameter that this process holds; all of it, unless it is a DTensor."""
        return local(self.parameter).detach()

    def start(self, anchor: Anchor) -> Tensor:
        """The anchor's values for :attr:`here`, as they are kept."""
        return part_beside(anchor[self.key], self.parameter)

    def written(self) -> None:
        """Let autograd know that :attr:`here` was written: a DTensor does not share its part's version counter."""
        if is_dtensor(self.parameter) and not self.parameter.is_inference():
            torch.autograd.graph.increment_version(self.parameter)


def find_anchored(model: nn.Module, anchor: Anchor) -> tuple[list[Anchored], list[str]]:
    """The parameters that are anchored, and the names of those that are not; tied ones once.

    A parameter is looked up as :meth:`fastft.Anchor.find` does.

    Raises:
        TypeError: ``anchor`` is something else.
        ValueError: no parameter is anchored; one has another shape than its anchor, or is distributed in another way;
            or parameters are the pieces of ``FullyShardedDataParallel``.
    """
    if not isinstance(anchor, Anchor):
        raise TypeError(f"anchor: expected a fastft.Anchor, got {type(anchor).__name__}")
    if any(is_fsdp1(module) and is_in_pieces(module) for module in model.modules()):
        raise ValueError(
            "model: expected whole parameters or DTensors, got the flat pieces of FullyShardedDataParallel: use "
            "torch.distributed.fsdp.fully_shard, or call this inside FullyShardedDataParallel.summon_full_params(model)"
        )
    found, missing = [], []
    for name, p in model.named_parameters():
        key = anchor.find(p, name)
        if key is None:
            missing.append(name)
            continue
        kept = anchor[key]
        if kept.shape != p.shape:
            raise ValueError(f"{name}: expected an anchor of shape {list(p.shape)}, got {list(kept.shape)}")
        try:
            part_beside(kept, p)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        found.append(Anchored(name, p, key))
    if not found:
        raise ValueError(f"anchor: holds none of the model's {len(missing)} parameters: {anchor!r}")
    return found, missing


def is_in_pieces(module: Any) -> bool:
    """Whether a ``FullyShardedDataParallel`` has its parameters cut at this moment."""
    return bool(module.sharding_strategy.name != "NO_SHARD" and module.training_state.name != "SUMMON_FULL_PARAMS")


# -- in chunks -----------------------------------------------------------------------------------------------


def chunks(tensors: tuple[Tensor, ...], device: torch.device, least: torch.dtype) -> Iterator[tuple[Tensor, ...]]:
    """Tensors of one shape, rows at a time, on ``device`` and in the widest of their dtypes, ``least`` at least.

    What has that dtype and device already comes as a view.
    """
    wide = least
    for tensor in tensors:
        wide = torch.promote_types(wide, tensor.dtype)
    for views in views_of(tensors):
        yield tuple(view.to(device, wide) for view in views)


def views_of(tensors: tuple[Tensor, ...]) -> Iterator[tuple[Tensor, ...]]:
    """Views of tensors of one shape, a number of rows at a time, whatever their memory order."""
    rows = [t.detach().unsqueeze(0) if t.dim() == 0 else t.detach() for t in tensors]
    step = max(1, CHUNK // max(1, rows[0][:1].numel()))
    yield from zip(*(t.split(step) for t in rows), strict=True)
