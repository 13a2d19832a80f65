"""torch's own AdamW step, for the parameters that the fused one cannot take."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam

OPTIONS = ("amsgrad", "lr", "weight_decay", "eps", "maximize", "foreach", "capturable", "differentiable", "fused")


class TorchStep:
    """Parameters left to torch, and its functional AdamW over them."""

    def __init__(self) -> None:
        self.params: list[tuple[int, Tensor]] = []
        """(group index, parameter)"""
        self._calls: list[tuple[dict[str, Any], bool, tuple[list[Tensor], ...]]] = []

    def __bool__(self) -> bool:
        """Whether anything is stepped by it this time."""
        return bool(self._calls)

    def add(self, group: int, p: Tensor, name: str, reason: str, unknown: Iterable[str]) -> None:
        """Leave ``p`` to torch.

        Raises:
            ValueError: there are options that concern it and that torch's step does not have (``unknown``).
        """
        if used := ", ".join(unknown):
            raise ValueError(
                f"{name}: has {reason}, which fastft's own step cannot take; torch's does not support {used}"
            )
        self.params.append((group, p))

    def prepare(self, optimizer: torch.optim.AdamW) -> None:
        """Make their state ready, and collect the gradients of this step."""
        for index, group in enumerate(optimizer.param_groups):
            left = [p for i, p in self.params if i == index and p.grad is not None]
            lists: tuple[list[Tensor], ...] = ([], [], [], [], [], [])
            has_complex = optimizer._init_group({**group, "params": left}, *lists)
            if left:
                self._calls.append((group, has_complex, lists))

    def step(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        """Take the step, unless it is to be skipped."""
        if not self._calls or (found_inf is not None and found_inf.item() != 0):
            return
        for group, has_complex, (params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps) in self._calls:
            if grad_scale is not None:
                grads = [grad / grad_scale.to(grad.device) for grad in grads]
            options: dict[str, Any] = {key: group[key] for key in OPTIONS}
            options.update(beta1=group["betas"][0], beta2=group["betas"][1])
            # Not torch's fused one, which on the CPU writes into the gaps of a parameter that has some.
            options.update(has_complex=has_complex, decoupled_weight_decay=True, fused=False)
            adam(params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps, **options)
