"""Update masks: which rows or elements of a parameter a step may touch."""

from __future__ import annotations

import torch
from torch import Tensor

from fastft.layers.wrappers import flattened

from .dtensors import cut_like
from .tensors import is_dtensor, laid_out_like, local

# Below this a row is too short for the loop over active rows to pay: an element mask reads one byte an element.
SHORTEST_ROW = 16


class UpdateMask:
    """A private copy of a user's mask, and the form in which the core takes it."""

    def __init__(self, mask: Tensor, param: Tensor, name: str) -> None:
        check_mask(mask, param, name)
        self.mask = mask.detach().clone()
        self._name = name
        self._known: tuple[object, tuple[Tensor | None, Tensor | None]] | None = None

    def __getstate__(self) -> dict[str, object]:
        return {"mask": self.mask, "_name": self._name, "_known": None}

    def for_core(self, param: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """(element mask, active rows) for ``param`` as it lies now; one of them is None.

        The element mask is bool in the parameter's shape and memory order, the rows are ascending int64 indices;
        of a DTensor, both are of its local part.
        """
        key = (param.device, param.shape, param.stride())
        if self._known is None or self._known[0] != key:
            check_mask(self.mask, param, self._name)
            self._known = (key, self._prepare(param))
        return self._known[1]

    def _prepare(self, param: Tensor) -> tuple[Tensor | None, Tensor | None]:
        mask = self.mask
        stepped = local(param)
        if mask.shape != param.shape or param.dim() == 1:
            row_size = param.shape[1:].numel()
            rows_lie_together = stepped.dim() > 0 and (
                stepped.shape[0] <= 1 or stepped.numel() == 0 or stepped.stride(0) == row_size
            )
            if rows_lie_together and row_size >= SHORTEST_ROW and not is_dtensor(param):
                return None, mask.to(param.device).nonzero().flatten()
            mask = mask.view(mask.numel(), *[1] * (param.dim() - 1)).expand(param.shape)
        return laid_out_like(cut_like(mask, param).to(param.device), stepped), None


def check_mask(mask: Tensor, param: Tensor, name: str) -> None:
    """Raise unless ``mask`` is bool, of shape ``[rows]`` or of the parameter's shape."""
    if flattened(param):
        raise ValueError(
            f"{name}: update mask: expected a parameter that is whole or a DTensor, got a piece of what "
            "FullyShardedDataParallel has flattened; use torch.distributed.fsdp.fully_shard"
        )
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name}: update mask: expected a bool tensor or None, got {type(mask).__name__}")
    if mask.dtype != torch.bool:
        raise ValueError(f"{name}: update mask: expected dtype torch.bool, got {mask.dtype}")
    if is_dtensor(mask) or mask.layout != torch.strided or mask.is_meta:
        raise ValueError(f"{name}: update mask: expected a plain dense tensor, got {type(mask).__name__}")
    if mask.shape not in (param.shape, param.shape[:1]):
        rows = f"{list(param.shape[:1])} (rows) or " if param.dim() > 0 else ""
        raise ValueError(
            f"{name}: update mask: expected shape {rows}{list(param.shape)} (elements), got {list(mask.shape)}"
        )
