"""``recipe``: anchor, clipping, warm-up and gradual unfreezing in one call."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from fastft.anchor import Anchor
from fastft.layers import layer_groups
from fastft.layers.groups import GroupPatterns
from fastft.optim import AdamW, warm_up_then_decay
from fastft.unfreeze import GradualUnfreeze, Unfreezer
from fastft.unfreeze.unfreezer import current_mode
from fastft.warning import warn


@dataclass(frozen=True)
class Recipe:
    """An optimizer, its schedule, and the opening of layers, as :func:`recipe` puts them together."""

    optimizer: AdamW
    scheduler: LambdaLR
    unfreezer: Unfreezer
    anchor: Anchor

    def step(self) -> None:
        """After ``backward()``: step the optimizer, clear the gradients, and step both schedules."""
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.scheduler.step()
        self.unfreezer.step()

    def undo(self) -> None:
        """When training is over: open everything, put all ``requires_grad`` flags back, and take all hooks away."""
        self.unfreezer.undo()

    def close(self) -> None:
        """The old name of :meth:`undo`."""
        warn("Recipe.close() is called undo() now", DeprecationWarning)
        self.undo()

    def state_dict(self) -> dict[str, Any]:
        """The states of optimizer (with its anchor), scheduler and unfreezer. The model's own state is not in it."""
        return {name: getattr(self, name).state_dict() for name in ("optimizer", "scheduler", "unfreezer")}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken; load the model's state first."""
        for name in ("optimizer", "scheduler", "unfreezer"):
            getattr(self, name).load_state_dict(state[name])


def recipe(
    model: nn.Module,
    total_steps: int,
    *,
    exclude: str | Iterable[str] = (),
    lr: float = 3e-4,
    anchor_decay: float = 30.0,
    open_by: float = 0.5,
    warmup: float = 0.1,
    weight_decay: float = 0.01,
    max_grad_norm: float | None = 1.0,
    groups: GroupPatterns | None = None,
    mode: Literal["requires_grad", "freeze"] = "requires_grad",
) -> Recipe:
    """Optimizer, learning-rate schedule and unfreezer in the combination that did best in the retention benchmark.

    It kept the source task and learned the target as well as the best there. It is :class:`~fastft.AdamW` with a
    decoupled anchor at the values that ``model`` has now, clipping inside the step, and layers that open from the
    output down (:class:`~fastft.unfreeze.GradualUnfreeze`; Howard & Ruder 2018, https://arxiv.org/abs/1801.06146). As
    most layers are closed at first, it also takes less time than to train all of them.

    Rounded to bfloat16, weights would lose most steps and all of the anchor's pull. Such weights get ``extra_bits=16``
    and float32 moments, and so the steps of float32 weights, unless there are float16 weights beside them.

    Fit a new head first, by :func:`fastft.retention.fit_head_`, as was done there: the knowledge that training with a
    random head costs is not brought back.

    Args:
        model: pre-trained, and on the device that it is trained on.
        total_steps: optimizer steps of the run.
        exclude: names, glob patterns or module names of parameters that are not pre-trained, such as a new head's:
            nothing pulls them. They should be the topmost layer group, which is open from the start.
        lr: at its peak.
        anchor_decay: λ; each step moves a weight by lr·λ of its distance to the anchor.
        open_by: the part of the steps, above 0 up to 1, after which the lowest layer is open.
        warmup: the part of the steps in which lr rises from near 0; then it falls in a straight line to 0.
        weight_decay: decoupled, of all parameters.
        max_grad_norm: of the gradients together; None: no clipping.
        groups: as :func:`~fastft.layers.layer_groups` takes them; by default read from the model.
        mode: as in :class:`~fastft.unfreeze.Unfreezer`; ``"freeze"`` under DDP and ``torch.compile``.

    Raises:
        ValueError: a number out of range, a pattern that matches nothing, or a model whose layers cannot be found.
    """
    mode = current_mode(mode)
    opening = GradualUnfreeze.open_by(open_by, total_steps, layer_groups(model, groups))
    if not 0 <= warmup < 1:
        raise ValueError(f"warmup: expected a part of the steps from 0 to below 1, got {warmup!r}")
    anchor = Anchor.snapshot(model, exclude=exclude)
    dtypes = {p.dtype for p in model.parameters()}
    exact = torch.bfloat16 in dtypes and torch.float16 not in dtypes  # which can have no extra bits
    optimizer = AdamW(
        model.named_parameters(),
        lr=lr,
        weight_decay=weight_decay,
        anchor=anchor,
        anchor_decay=anchor_decay,
        max_grad_norm=max_grad_norm,
        extra_bits=16 if exact else 0,
    )
    scheduler = LambdaLR(optimizer, warm_up_then_decay(total_steps, warmup))
    return Recipe(optimizer, scheduler, Unfreezer(model, optimizer, opening, groups=groups, mode=mode), anchor)
