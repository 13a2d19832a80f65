"""The functions as modules. Those that torch has too have the parameters and names of torch's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastft.anchor import Anchor

from . import functional

Shape = int | Sequence[int]


class Dropout(nn.Dropout):
    """``torch.nn.Dropout`` that stores no mask: see :func:`fastft.nn.functional.dropout`.

    Args:
        p: the probability of an element to become 0.
        inplace: write into the input.

    Shape: any; the output has the input's.

    Raises:
        ValueError: p is outside [0, 1].
    """

    def forward(self, input: Tensor) -> Tensor:
        return functional.dropout(input, self.p, self.training, self.inplace)


class BiasDropoutAdd(nn.Module):
    """``residual + dropout(input + bias)`` in one pass: see :func:`fastft.nn.functional.bias_dropout_add`.

    Args:
        p: the probability of an element to become 0.

    Shape: input and residual ``[..., n]``, bias ``[n]``; bias and residual may be None.

    Raises:
        ValueError: p is outside [0, 1].
    """

    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        self.p = checked_p(p)

    def forward(self, input: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
        return functional.bias_dropout_add(input, bias, residual, self.p, self.training)

    def extra_repr(self) -> str:
        return f"p={self.p}"


class DropoutAddLayerNorm(nn.LayerNorm):
    """``layer_norm(residual + dropout(input))``: see :func:`fastft.nn.functional.dropout_add_layer_norm`.

    The parameters are ``torch.nn.LayerNorm``'s, so its state dict fits.

    Args:
        normalized_shape: the last dimensions of the input.
        p: the probability of an element to become 0.
        return_residual: give back ``(normalised, residual + dropout(input))``.
        eps, elementwise_affine, bias, device, dtype: as in ``torch.nn.LayerNorm``.

    Shape: input and residual ``[..., *normalized_shape]``; the outputs have the same.

    Raises:
        ValueError: p is outside [0, 1].
    """

    def __init__(
        self,
        normalized_shape: Shape,
        p: float = 0.5,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        *,
        return_residual: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine, bias, device=device, dtype=dtype)
        self.p, self.return_residual = checked_p(p), return_residual

    def forward(self, input: Tensor, residual: Tensor) -> Tensor | tuple[Tensor, Tensor]:  # type: ignore[override]
        return functional.dropout_add_layer_norm(
            input,
            residual,
            self.normalized_shape,
            self.weight,
            self.bias,
            self.p,
            self.training,
            self.eps,
            return_residual=self.return_residual,
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, p={self.p}, return_residual={self.return_residual}"


class DropoutAddRMSNorm(nn.RMSNorm):
    """``rms_norm(residual + dropout(input))``: see :func:`fastft.nn.functional.dropout_add_rms_norm`.

    The parameter is ``torch.nn.RMSNorm``'s, so its state dict fits.

    Args:
        normalized_shape: the last dimensions of the input.
        p: the probability of an element to become 0.
        return_residual: give back ``(normalised, residual + dropout(input))``.
        eps, elementwise_affine, device, dtype: as in ``torch.nn.RMSNorm``.

    Shape: input and residual ``[..., *normalized_shape]``; the outputs have the same.

    Raises:
        ValueError: p is outside [0, 1].
    """

    def __init__(
        self,
        normalized_shape: Shape,
        p: float = 0.5,
        eps: float | None = None,
        elementwise_affine: bool = True,
        *,
        return_residual: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine, device=device, dtype=dtype)
        self.p, self.return_residual = checked_p(p), return_residual

    def forward(self, input: Tensor, residual: Tensor) -> Tensor | tuple[Tensor, Tensor]:  # type: ignore[override]
        return functional.dropout_add_rms_norm(
            input,
            residual,
            self.normalized_shape,
            self.weight,
            self.p,
            self.training,
            self.eps,
            return_residual=self.return_residual,
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, p={self.p}, return_residual={self.return_residual}"


class Mixout(nn.Module):
    """Mixout (Lee et al. 2020, https://arxiv.org/abs/1909.11299) as a parametrization: in training each element of the
    weight is replaced by its pre-trained value with probability p, anew in every forward pass.

    .. code-block:: python

        anchor = fastft.Anchor.snapshot(model)
        parametrize.register_parametrization(layer, "weight", Mixout(anchor, layer.weight, p=0.7))

    The pre-trained values are in a buffer that is not saved: make the parametrization again from the anchor before
    loading a checkpoint.

    Args:
        anchor: a :class:`fastft.Anchor`, or the pre-trained values themselves (they are copied).
        key: the weight's name in the anchor, or a parameter that the anchor was made from. None with a tensor.
        p: the probability of an element to be replaced.

    Shape: any; the output has the weight's.

    Raises:
        KeyError: the anchor does not hold ``key``.
        TypeError: an anchor without a key, or a tensor with one.
        ValueError: p is outside [0, 1].
    """

    anchor: Tensor

    def __init__(self, anchor: Anchor | Tensor, key: str | Tensor | None = None, p: float = 0.7) -> None:
        super().__init__()
        self.p = checked_p(p)
        if isinstance(anchor, Anchor) == (key is None):
            raise TypeError(
                "anchor: expected an Anchor and a key (a name or a parameter), or a tensor and no key, got "
                f"{type(anchor).__name__} and {'no key' if key is None else 'a key'}"
            )
        if isinstance(anchor, Anchor):
            assert key is not None
            values = anchor[key].detach()
            if isinstance(key, Tensor):
                values = values.to(key.device)
        else:
            values = anchor.detach().clone()  # it may be the weight itself, which will move away
        self.register_buffer("anchor", values, persistent=False)

    def forward(self, weight: Tensor) -> Tensor:
        return functional.mixout(weight, self.anchor, self.p, self.training)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Assigning to the parametrized weight sets the weight itself."""
        return weight

    def extra_repr(self) -> str:
        return f"p={self.p}"


def checked_p(p: float) -> float:
    """p, checked as torch's modules check it."""
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"dropout probability has to be between 0 and 1, but got {p}")
    return p
