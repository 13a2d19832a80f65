"""A model's parameters beside their anchor: which have one, and the two chunk by chunk in one wide dtype."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastft.anchor import Anchor
from fastft.optim.tensors import is_dtensor

# Elements of a chunk: small enough that what is computed from it is still in cache when it is read again.
CHUNK = 1 << 18


@dataclass(frozen=True)
class Anchored:
    """A parameter that has an anchor."""

    name: str
    parameter: Tensor
    key: str
    """Its name in the anchor."""


def find_anchored(model: nn.Module, anchor: Anchor) -> tuple[list[Anchored], list[str]]:
    """The parameters that are anchored, and the names of those that are not; tied ones once.

    A parameter is looked up as :meth:`fastft.Anchor.find` does.

    Raises:
        TypeError: ``anchor`` is something else.
        ValueError: no parameter is anchored, or one is sharded or of another shape.
    """
    if not isinstance(anchor, Anchor):
        raise TypeError(f"anchor: expected a fastft.Anchor, got {type(anchor).__name__}")
    found, missing = [], []
    for name, p in model.named_parameters():
        key = anchor.find(p, name)
        if key is None:
            missing.append(name)
            continue
        if is_dtensor(p):
            raise ValueError(
                f"{name}: expected a parameter that is whole on this process, got a DTensor: gather it first"
            )
        if anchor[key].shape != p.shape:
            raise ValueError(f"{name}: expected an anchor of shape {list(p.shape)}, got {list(anchor[key].shape)}")
        found.append(Anchored(name, p, key))
    if not found:
        raise ValueError(f"anchor: holds none of the model's {len(missing)} parameters: {anchor!r}")
    return found, missing


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
