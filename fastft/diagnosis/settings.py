"""Ways to keep weights and moments, and the bytes that each takes: arithmetic on dtypes and shapes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastft.optim.low_precision import Precision, Rounding, StateDtype
from fastft.optim.state import MOMENTS, new_moment
from fastft.optim.weight_sums import new_sums


def name_of(dtype: torch.dtype) -> str:
    """``"bfloat16"``."""
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Stored:
    """A tensor of the model, as it is now."""

    name: str
    like: Tensor
    """Its dtype, shape and strides, on meta."""
    trainable: bool = True


@dataclass(frozen=True)
class Weights:
    """A dtype to load the model in, and the options of AdamW for 16-bit weights."""

    dtype: torch.dtype
    extra_bits: int = 0
    rounding: Rounding = "nearest"

    def __str__(self) -> str:
        """``"bfloat16, extra_bits=8"``, ``"bfloat16, stochastic"``."""
        bits = [f"extra_bits={self.extra_bits}"] if self.extra_bits else []
        return ", ".join([name_of(self.dtype), *bits, *([self.rounding] if self.rounding != "nearest" else [])])

    def options(self) -> list[str]:
        """The arguments of AdamW."""
        bits = [f"extra_bits={self.extra_bits}"] if self.extra_bits else []
        return bits + ([f'rounding="{self.rounding}"'] if self.rounding != "nearest" else [])

    def dtype_of(self, stored: torch.dtype, main: torch.dtype | None) -> torch.dtype:
        """The dtype that a stored tensor is trained in.

        Args:
            stored: the tensor's dtype now.
            main: where the model is left as it is, the dtype of most of it: a tensor that differs, such as a norm kept
                in float32, stays unless it would be narrower than the rest. None: all is converted.
        """
        stays = main is not None and stored != main and stored.itemsize >= self.dtype.itemsize
        return stored if stays else self.dtype


@dataclass(frozen=True)
class Memory:
    """Bytes of a setting, without activations and what libraries take."""

    kept: Weights
    state_dtype: StateDtype
    elements: int
    weights: int
    gradients: int
    moments: int
    low_bits: int
    """With the sums by which AdamW notices that somebody else wrote the weights."""
    anchor: int
    largest_gradient: int
    """All that is left of the gradients with ``step_in_backward``, at its peak."""

    def total(self, *, in_backward: bool = False, anchor_on_host: bool = False) -> int:
        """On the device that trains."""
        gradients = self.largest_gradient if in_backward else self.gradients
        anchor = 0 if anchor_on_host else self.anchor
        return self.weights + gradients + self.moments + self.low_bits + anchor

    @property
    def moments_as(self) -> str:
        """``"float32"``, ``"8bit"``."""
        dtype = self.state_dtype or (torch.float32 if self.kept.extra_bits else self.kept.dtype)
        return dtype if isinstance(dtype, str) else name_of(dtype)

    def options(self) -> list[str]:
        """The arguments of AdamW."""
        state = [
            f'state_dtype="{self.state_dtype}"' if self.state_dtype == "8bit" else f"state_dtype={self.state_dtype}"
        ]
        return self.kept.options() + (state if self.state_dtype is not None else [])


def memory_of(
    tensors: Iterable[Stored],
    kept: Weights,
    state_dtype: StateDtype,
    *,
    main: torch.dtype | None,
    anchored: bool,
) -> Memory:
    """The bytes that a setting takes for these tensors; ``main`` as in :meth:`Weights.dtype_of`."""
    setting = Precision(state_dtype, kept.extra_bits, kept.rounding)
    elements = weights = gradients = moments = low_bits = largest = 0
    for tensor in tensors:
        # The state is made as the optimizer makes it, without memory behind it.
        p = tensor.like.to(kept.dtype_of(tensor.like.dtype, main))
        elements += p.numel()
        weights += p.nbytes
        if not tensor.trainable:
            continue
        gradients += p.nbytes
        largest = max(largest, p.nbytes)
        moments += sum(part.nbytes for key in MOMENTS[:2] for part in new_moment(p, key, setting).values())
        low = setting.low_dtype(p)
        low_bits += 0 if low is None else p.numel() * low.itemsize + new_sums(p).nbytes
    anchor = gradients if anchored else 0
    return Memory(kept, state_dtype, elements, weights, gradients, moments, low_bits, anchor, largest)
