"""fastft in Lightning: the unfreezer as a callback. Return the optimizer from configure_optimizers as any other.

.. code-block:: python

    trainer = Trainer(callbacks=[UnfreezeCallback(GradualUnfreeze(every=100))])

Works with both names of the package, ``lightning`` and ``pytorch_lightning``.
"""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from torch import nn

from fastft.integrations.progress import go_on, numbers, whole_tensors
from fastft.unfreeze import Policy, Unfreezer

__all__ = ["UnfreezeCallback"]


def callback_class() -> Any:
    """``Callback`` of the package that is in use already, or else of the one that is installed."""
    problems = []
    for package in sorted(("lightning.pytorch", "pytorch_lightning"), key=lambda name: name not in sys.modules):
        try:
            return import_module(package).Callback
        except ImportError as error:
            problems.append(error)
    raise ImportError(
        f'fastft.integrations.lightning needs lightning ({problems[0]}): python -m pip install "fastft[lightning]"'
    ) from problems[0]


class UnfreezeCallback(callback_class()):  # type: ignore[misc]
    """Opens layer groups while Lightning's ``Trainer`` fits: an :class:`Unfreezer` that lives as long as ``fit()``.

    ``configure_optimizers`` returns one optimizer with all parameters that are ever to be trained. Unlike with
    Lightning's own ``BaseFinetuning``, none come or go later, so checkpoints and schedulers go on working.

    It counts optimizer steps, whatever ``accumulate_grad_batches`` is. Policies that depend on metrics get
    ``trainer.callback_metrics`` after each validation: ``OnPlateau("val_loss")``. Its state is saved with the
    checkpoint, so ``fit(ckpt_path=...)`` goes on in the middle of the schedule.

    In several processes (DDP), and for modules that are compiled, ``mode="freeze"`` is needed. To clip, pass
    ``max_grad_norm`` to :class:`fastft.AdamW` rather than ``gradient_clip_val`` to the Trainer: that counts closed
    groups, too, where they get gradients, and refuses ``precision="16-mixed"``.

    Args:
        policy: as for :class:`Unfreezer`.
        **options: of :class:`Unfreezer`, but for ``wrapped``, which is found out.
    """

    unfreezer: Unfreezer | None
    """The one of the current or the last ``fit()``; ``print(callback.unfreezer.report())``."""

    def __init__(self, policy: Policy, **options: Any) -> None:
        inspect.signature(Unfreezer).bind(
            None, None, policy, wrapped=(), **options
        )  # raises at once for what it does not take
        self.policy = policy
        self.options = options
        self.unfreezer = None
        self._saved: dict[str, Any] | None = None
        self._fitting = False

    def on_train_start(self, trainer: Any, pl_module: nn.Module) -> None:
        """Make the unfreezer; Lightning has loaded its checkpoint by now."""
        self._undo()
        if len(trainer.optimizers) != 1:
            raise ValueError(f"optimizers: expected one, got {len(trainer.optimizers)}")
        # Lightning compiles the module's methods, so that the module itself looks as before.
        wrapped = ["compile"] if getattr(pl_module, "_compiler_ctx", None) is not None else []
        saved = self.state_dict()
        self.unfreezer = Unfreezer(
            trainer.strategy.model, trainer.optimizers[0], self.policy, wrapped=wrapped, **self.options
        )
        self._fitting = True
        go_on(self.unfreezer, saved or None, trainer.global_step, trainer.current_epoch)

    def on_train_batch_end(self, trainer: Any, pl_module: nn.Module, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Count the optimizer steps of this batch: none while gradients accumulate."""
        assert self.unfreezer is not None
        batches = trainer.num_training_batches
        done = (batch_idx + 1) / batches if math.isfinite(batches) else 0.0
        for _ in range(trainer.global_step - self.unfreezer.progress.step):
            self.unfreezer.step(epoch=trainer.current_epoch + done)

    def on_train_epoch_end(self, trainer: Any, pl_module: nn.Module) -> None:
        """Count the epoch: with a dataset without a length, its end is not known before."""
        assert self.unfreezer is not None
        self.unfreezer.update(epoch=trainer.current_epoch + 1)

    def on_validation_end(self, trainer: Any, pl_module: nn.Module) -> None:
        """Log the metrics; in several processes, those of the first."""
        if self._fitting:  # and not in the sanity check before, or in a validation on its own
            assert self.unfreezer is not None
            self.unfreezer.update(**trainer.strategy.broadcast(numbers(trainer.callback_metrics)))

    def teardown(self, trainer: Any, pl_module: nn.Module, stage: str) -> None:
        """Leave the module as it came: everything open."""
        self._undo()

    def on_exception(self, trainer: Any, pl_module: nn.Module, exception: BaseException) -> None:
        """Also where training was cut short."""
        self._undo()

    def state_dict(self) -> dict[str, Any]:
        """The unfreezer's, which Lightning saves with its checkpoints."""
        if self.unfreezer is not None:
            state = self.unfreezer.state_dict()
            self._saved = {**state, "best": whole_tensors(state["best"])}
        return self._saved or {}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Keep it for the unfreezer, which is made once there is an optimizer."""
        self.unfreezer = None
        self._saved = dict(state_dict)

    def _undo(self) -> None:
        if self._fitting:
            assert self.unfreezer is not None
            self._fitting = False
            self.unfreezer.undo()
