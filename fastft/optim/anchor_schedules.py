"""Schedules of the anchor's strength, stepped, chained and resumed as torch's learning-rate schedules are."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from fastft.checks import check_not_negative, check_positive

# Where RecAdam's sigmoid is taken as constant: e^27 is 5e11, so the lr is a trillionth of the full one.
FLOOR = -27.0


class AnchorDecayScheduler(LRScheduler):
    """Sets each group's ``anchor_decay`` to its initial one times a function of the step; leaves lr alone.

    So it goes with any learning-rate schedule, stepped beside it or together with it in a
    ``torch.optim.lr_scheduler.ChainedScheduler``; several in a row go into a ``SequentialLR``. The pull of a step is
    ``lr · anchor_decay``: it falls with lr as it is.

    Args:
        optimizer: a ``fastft.AdamW``.
        factor: step 0, 1, ... → a number >= 0; or one such function for each group. Functions are not in the state
            dict: give the same again when resuming. For instance ``lambda step: max(0.0, 1.0 - step / 1000)``.
        last_epoch: as in torch's schedulers. Groups then hold their ``initial_anchor_decay`` already.

    Raises:
        TypeError: an optimizer whose groups have no ``anchor_decay``.
        ValueError: another number of functions, or a factor that is negative or not finite.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        factor: Callable[[int], float] | Sequence[Callable[[int], float]],
        last_epoch: int = -1,
    ) -> None:
        groups = anchored_groups(optimizer)
        self.factors = [factor] * len(groups) if callable(factor) else list(factor)
        if len(self.factors) != len(groups):
            raise ValueError(f"factor: expected one function, or {len(groups)}, got {len(self.factors)}")
        self.base_anchor_decays = initial_values(groups, "anchor_decay")
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float | Tensor]:
        """The lr of each group, as it is. Sets ``anchor_decay``: every way to step a scheduler comes through here."""
        values = [factor(self.last_epoch) for factor in self.factors]
        for value in values:
            if not 0.0 <= value < math.inf:
                raise ValueError(f"factor: expected a finite number >= 0 in step {self.last_epoch}, got {value!r}")
        # Groups that were added later are left alone.
        for group, base, value in zip(self.optimizer.param_groups, self.base_anchor_decays, values, strict=False):
            group["anchor_decay"] = base * value
        return [group["lr"] for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        """All but the optimizer and the functions."""
        return {key: value for key, value in super().state_dict().items() if key != "factors"}


class RecAdamScheduler(LRScheduler):
    """RecAdam's annealing, from recalling to learning, on ``fastft.AdamW``.

    (Chen et al. 2020, https://arxiv.org/abs/2004.12651.) In step t = 1, 2, ..., with λ_t = w / (1 + e^(−k·(t − t0))),
    the Adam part is scaled by λ_t and the weights are pulled to the anchor:

    .. code-block:: text

        p = p − λ_t·lr·adam − lr·(w − λ_t)·gamma·(p − anchor)

    Here lr becomes λ_t·lr and ``anchor_decay`` gamma·(w − λ_t)/λ_t = gamma·e^(−k·(t − t0)); ``weight_decay``, which
    RecAdam does not scale, is divided by λ_t. lr is multiplied by ratios, so other schedules may act on it as well.
    (The authors pull after the Adam part, ``fastft.AdamW`` before it: the difference is of second order in lr.)

    Args:
        optimizer: a ``fastft.AdamW`` with an anchor, ``anchor_mode="decoupled"``.
        k: its steepness, > 0; the authors try 0.05 to 1.
        t0: the step in the middle; the authors try 100 to 1000.
        gamma: the strength of the pull. The authors' 5000 goes with a learning rate up to 2e-4: lr·w·gamma must not
            exceed 1, or the optimizer refuses the step, unless its anchor is weighted by importance.
        weight: w, or one for each group; 0 for groups that have nothing to recall, such as a new head: they are
            stepped with lr as it is and ``anchor_decay`` 0.
        last_epoch: as in torch's schedulers.

    While k·(t − t0) is below −27, λ_t stays at its value there, w·2e-12.

    Raises:
        TypeError: an optimizer whose groups have no ``anchor_decay``.
        ValueError: a number out of range, another number of weights, or another ``anchor_mode``.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        k: float,
        t0: float,
        gamma: float = 5000.0,
        weight: float | Sequence[float] = 1.0,
        last_epoch: int = -1,
    ) -> None:
        groups = anchored_groups(optimizer)
        weights = [weight] * len(groups) if isinstance(weight, (int, float)) else list(weight)
        if len(weights) != len(groups):
            raise ValueError(f"weight: expected a number, or {len(groups)}, got {len(weights)}")
        check_positive("k", k)
        for name, value in (("t0", t0), ("gamma", gamma), *(("weight", w) for w in weights)):
            check_not_negative(name, value)
        for index, (w, group) in enumerate(zip(weights, groups, strict=True)):
            if w and group["anchor_mode"] != "decoupled":
                raise ValueError(
                    f'param_groups[{index}]: anchor_mode: expected "decoupled", got {group["anchor_mode"]!r}'
                )
        self.k, self.t0, self.gamma, self.weights = k, t0, gamma, weights
        self.base_weight_decays = initial_values(groups, "weight_decay")
        super().__init__(optimizer, last_epoch)

    def factor(self, step: int, weight: float) -> float:
        """The factor on the initial lr in step 0, 1, ...: λ_t with t = step + 1; 1 for a weight of 0."""
        return weight / (1.0 + math.exp(-self._position(step))) if weight else 1.0

    def get_lr(self) -> list[float | Tensor]:
        """The next lr of each group. Sets the decays: every way to step a scheduler comes through here."""
        self._set_decays()
        if self.last_epoch == 0:
            return [g["lr"] * self.factor(0, w) for g, w in self._weighted()]
        if self._is_initial:  # made with last_epoch: the lrs hold their factor already
            return [g["lr"] for g in self.optimizer.param_groups]
        now, before = self.last_epoch, self.last_epoch - 1
        return [g["lr"] * (self.factor(now, w) / self.factor(before, w)) for g, w in self._weighted()]

    def _get_closed_form_lr(self) -> list[float | Tensor]:
        self._set_decays()
        return [lr * self.factor(self.last_epoch, w) for lr, w in zip(self.base_lrs, self.weights, strict=True)]

    def _set_decays(self) -> None:
        recall = self.gamma * math.exp(-self._position(self.last_epoch))
        for index, (group, weight) in enumerate(self._weighted()):
            group["anchor_decay"] = recall if weight else 0.0
            group["weight_decay"] = self.base_weight_decays[index] / self.factor(self.last_epoch, weight)

    def _weighted(self) -> list[tuple[dict[str, Any], float]]:
        return list(zip(self.optimizer.param_groups, self.weights, strict=True))

    def _position(self, step: int) -> float:
        return max(FLOOR, self.k * (step + 1 - self.t0))


def anchored_groups(optimizer: Optimizer) -> list[dict[str, Any]]:
    """The parameter groups, if they are those of a ``fastft.AdamW``."""
    groups: list[dict[str, Any]] = getattr(optimizer, "param_groups", [])
    if not groups or not all("anchor_decay" in group for group in groups):
        raise TypeError(f"optimizer: expected a fastft.AdamW, got {type(optimizer).__name__}")
    return groups


def initial_values(groups: Sequence[dict[str, Any]], key: str) -> list[float]:
    """The groups' values at the start, kept in them as torch keeps ``initial_lr``."""
    return [group.setdefault(f"initial_{key}", group[key]) for group in groups]
