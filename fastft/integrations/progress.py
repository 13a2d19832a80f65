"""Shared by the callbacks: resuming an unfreezer, and the metrics of an evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastft.optim.dtensors import whole
from fastft.unfreeze import Unfreezer
from fastft.warning import warn


def go_on(unfreezer: Unfreezer, saved: Mapping[str, Any] | None, step: int, epoch: float) -> None:
    """Bring an unfreezer that was just made to where training is: ``step`` optimizer steps, ``epoch`` epochs.

    With a state of that step, exactly; with none, or one of another step, as far as the policy goes by the clock.
    """
    if step == 0:
        return
    if saved is None or saved["step"] != step:
        warn(
            f"no state of an UnfreezeCallback was saved at step {step}: its policy goes on there, without what was "
            "measured before"
        )
        saved = {**unfreezer.state_dict(), "step": step, "epoch": epoch}
    unfreezer.load_state_dict(saved)


def numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The metrics that are single numbers; not the epoch, which some count among them."""
    single = {k: v for k, v in metrics.items() if not isinstance(v, Tensor) or v.numel() == 1}
    return {k: float(v) for k, v in single.items() if isinstance(v, (int, float, Tensor)) and k != "epoch"}


@torch.no_grad()
def whole_tensors(best: Mapping[str, Tensor] | None) -> dict[str, Tensor] | None:
    """The tensors that a policy may go back to, in host memory and whole; to be called by every process."""
    return None if best is None else {name: whole(tensor).cpu() for name, tensor in best.items()}
