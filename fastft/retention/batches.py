"""Cut batches into rows, run a model on a batch, and put a model into ``eval`` mode for a while."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

IGNORED = -100
"""The label of positions that do not count, as in ``torch.nn.functional.cross_entropy``."""


def rows_of(batch: Any) -> Iterator[Any]:
    """The batch cut into batches of one row, in its own form.

    Raises:
        ValueError: the batch has another form, or parts of it have different numbers of rows.
    """
    if not isinstance(batch, (Mapping, Tensor, list, tuple)):
        raise ValueError(f"batches: expected mappings, (inputs, labels) or tensors, got {type(batch).__name__}")
    pair = isinstance(batch, (list, tuple))
    sizes = {size for part in (batch if pair else [batch]) for size in sizes_in(part)}
    if len(sizes) != 1:
        raise ValueError(f"batches: expected the same number of rows in all of a batch, got {sorted(sizes)}")
    for i in range(sizes.pop()):
        yield tuple(cut(part, i) for part in batch) if pair else cut(batch, i)


def sizes_in(value: Any) -> Iterator[int]:
    """The number of rows of each tensor and list inside, through mappings."""
    if isinstance(value, Mapping):
        for part in value.values():
            yield from sizes_in(part)
    elif isinstance(value, (list, tuple)) or (isinstance(value, Tensor) and value.dim() > 0):
        yield len(value)
    elif not (value is None or isinstance(value, (Tensor, str, int, float))):
        raise ValueError(f"batches: expected tensors, lists, numbers and mappings of them, got {type(value).__name__}")


def cut(value: Any, i: int) -> Any:
    """Row ``i`` of it; a value without rows as it is."""
    if isinstance(value, Mapping):
        return {key: cut(part, i) for key, part in value.items()}
    if isinstance(value, (list, tuple)) or (isinstance(value, Tensor) and value.dim() > 0):
        return value[i : i + 1]
    return value


def outputs_of(model: nn.Module, batch: Any) -> Any:
    """The logits, as models usually give them."""
    inputs = batch[0] if isinstance(batch, tuple) else batch
    if isinstance(inputs, Mapping):
        outputs = model(**{key: value for key, value in inputs.items() if key != "labels"})
    else:
        outputs = model(inputs)
    return getattr(outputs, "logits", outputs)


def labels_of(batch: Any) -> Tensor | None:
    """The labels, where the batch has them."""
    if isinstance(batch, Mapping):
        return batch.get("labels")
    return batch[1] if isinstance(batch, tuple) and len(batch) > 1 else None


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """``model.eval()`` for a while; afterwards each module is in the mode it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
