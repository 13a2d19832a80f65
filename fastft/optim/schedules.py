"""Learning-rate schedules for fine-tuning, as torch's own are: they chain, and resume from their state dicts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from fastft.checks import check_count, check_fraction


class FactorLR(LRScheduler):
    """A schedule that is a factor on each group's initial lr, greater than 0 at every step.

    Each step multiplies the lr by the ratio of two factors, so other schedulers may act on it as well.
    """

    def factor(self, step: int) -> float:
        """The factor on the initial lr in step 0, 1, ..."""
        raise NotImplementedError

    def get_lr(self) -> list[float | Tensor]:
        """The next lr of each group."""
        if self.last_epoch == 0:
            ratio = self.factor(0)
        elif self._is_initial:  # made with last_epoch: the lrs hold their factor already
            ratio = 1.0
        else:
            ratio = self.factor(self.last_epoch) / self.factor(self.last_epoch - 1)
        return [group["lr"] * ratio for group in self.optimizer.param_groups]

    def _get_closed_form_lr(self) -> list[float | Tensor]:
        return [lr * self.factor(self.last_epoch) for lr in self.base_lrs]


def warm_up_then_decay(steps: int, warmup: float) -> Callable[[int], float]:
    """A factor on lr, for torch's ``LambdaLR``: up in a straight line, over a part of the steps, then down to zero.

    Args:
        steps: of the whole run.
        warmup: the part of them in which it rises; the first step's is above 0.
    """
    rise = max(1, round(warmup * steps))

    def factor(step: int) -> float:
        return min((step + 1) / rise, max(0.0, (steps - step) / max(1, steps - rise)))

    return factor


class SlantedTriangularLR(FactorLR):
    """Up in a straight line from lr/ratio to lr, then down in a longer one, back to lr/ratio at ``total_steps``.

    ULMFiT (Howard & Ruder 2018, https://arxiv.org/abs/1801.06146).

    Args:
        optimizer: the optimizer.
        total_steps: the steps of the whole run; later ones stay at lr/ratio.
        cut_frac: the part of the steps that lr rises for; one step at least.
        ratio: the highest lr divided by the lowest.
        last_epoch: as in torch's schedulers.

    Raises:
        ValueError: a number out of range.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int,
        cut_frac: float = 0.1,
        ratio: float = 32.0,
        last_epoch: int = -1,
    ) -> None:
        check_count("total_steps", total_steps, least=2)
        if not 0.0 < cut_frac < 1.0:
            raise ValueError(f"cut_frac: expected a number between 0 and 1, got {cut_frac!r}")
        if not 1.0 <= ratio < math.inf:
            raise ValueError(f"ratio: expected a finite number >= 1, got {ratio!r}")
        self.total_steps = total_steps
        self.cut = max(1, math.floor(total_steps * cut_frac))
        self.ratio = ratio
        super().__init__(optimizer, last_epoch)

    def factor(self, step: int) -> float:
        """The factor on the initial lr in step 0, 1, ..."""
        rise = step / self.cut
        # The paper's (cut · (1/cut_frac − 1)) steps down end before total_steps where cut was rounded.
        fall = (self.total_steps - step) / (self.total_steps - self.cut)
        return (1.0 + max(0.0, min(rise, fall)) * (self.ratio - 1.0)) / self.ratio


class RewarmLR(FactorLR):
    """Up in a straight line to lr, down along a cosine to min_ratio · lr; and the same again from each of ``starts``.

    For training that goes on with new data: re-warming and re-decaying (Ibrahim et al. 2024,
    https://arxiv.org/abs/2403.08763). The first rise begins at 0, each later one where the last decay ended.

    Args:
        optimizer: the optimizer.
        total_steps: where the last decay ends; later steps stay at min_ratio · lr.
        warmup_steps: the length of each rise.
        min_ratio: the lowest lr relative to the highest; greater than 0.
        starts: the steps at which a rise begins, the first of them 0.
        last_epoch: as in torch's schedulers.

    Raises:
        ValueError: a number out of range, or starts that are not more than ``warmup_steps`` apart.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int,
        warmup_steps: int,
        min_ratio: float = 0.1,
        starts: Sequence[int] = (0,),
        last_epoch: int = -1,
    ) -> None:
        check_count("total_steps", total_steps)
        check_count("warmup_steps", warmup_steps, least=0)
        check_fraction("min_ratio", min_ratio)
        bounds = [*starts, total_steps]
        if (
            not all(isinstance(start, int) for start in bounds)
            or bounds[0] != 0
            or any(b - a <= warmup_steps for a, b in pairwise(bounds))
        ):
            raise ValueError(
                f"starts: expected 0 and then steps more than warmup_steps={warmup_steps} apart, up to "
                f"total_steps={total_steps}, got {list(starts)}"
            )
        self.total_steps = total_steps
        self.warmup_steps = warmup_steps
        self.min_ratio = min_ratio
        self.starts = list(starts)
        super().__init__(optimizer, last_epoch)

    def factor(self, step: int) -> float:
        """The factor on the initial lr in step 0, 1, ..."""
        start, end = next((a, b) for a, b in reversed([*pairwise([*self.starts, self.total_steps])]) if a <= step)
        begun = step - start
        if begun < self.warmup_steps:
            low = self.min_ratio if start > 0 else 0.0
            return low + (1.0 - low) * (begun + 1) / self.warmup_steps
        progress = min(1.0, (begun - self.warmup_steps) / (end - start - self.warmup_steps))
        return self.min_ratio + (1.0 - self.min_ratio) * 0.5 * (1.0 + math.cos(math.pi * progress))
