"""How a parameter is anchored: from the user's ``anchor_mode`` and importance to the one value that the formulas go by.

The values are those of ``Anchoring`` in csrc/math/adamw.h, where the formulas stand.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

from torch import Tensor

from fastft._C import Anchoring

AnchorMode = Literal["decoupled", "l2", "selective"]
ANCHOR_MODES: tuple[AnchorMode, ...] = get_args(AnchorMode)


def anchoring_of(
    p: Tensor, anchor: Tensor | None, importance: Tensor | None, mode: str, name: str, cut: bool
) -> Anchoring:
    """How ``p`` is anchored; raises ``ValueError`` where the mode cannot be had for it, or for a ``cut`` tensor."""
    if anchor is None:
        return Anchoring.none
    kinds = Anchoring.__members__
    kind = kinds.get(mode if importance is None else f"{mode}_weighted")
    if kind is None:
        others = " or ".join(f'"{other}"' for other in ANCHOR_MODES if f"{other}_weighted" in kinds)
        raise ValueError(f'{name}: anchor_mode: expected {others} with an importance, got "{mode}"')
    if kind == Anchoring.selective and cut:
        placements = getattr(p, "placements", None)
        placed = "is a piece of a flat parameter" if placements is None else f"DTensor is placed {list(placements)}"
        raise ValueError(
            f'{name}: anchor_mode: "selective" needs the whole tensor in one process, and this {placed}; '
            '"decoupled" and "l2" take it'
        )
    return kind


def check_anchor_options(anchor_decay: Any, anchor_mode: Any, where: str) -> None:
    """Raise unless the two make sense."""
    if not isinstance(anchor_decay, (int, float)) or not 0.0 <= anchor_decay < float("inf"):
        raise ValueError(f"{where}: anchor_decay: expected a finite number >= 0, got {anchor_decay!r}")
    if anchor_mode not in ANCHOR_MODES:
        raise ValueError(f"{where}: anchor_mode: expected one of {ANCHOR_MODES}, got {anchor_mode!r}")


def check_pull(lr: float | Tensor, anchor_decay: float, anchor_mode: str, where: str) -> None:
    """Raise if a decoupled step would land beyond the anchor. An lr on a GPU is not waited for."""
    if anchor_mode != "decoupled" or (isinstance(lr, Tensor) and lr.device.type != "cpu"):
        return
    pull = float(lr) * anchor_decay
    if not pull <= 1.0:
        raise ValueError(
            f"{where}: lr * anchor_decay: expected at most 1 (a step would land beyond the anchor), "
            f"got {float(lr):g} * {anchor_decay:g} = {pull:g}"
        )
