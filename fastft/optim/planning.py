"""The number of steps of a run, and a learning rate scaled to its batch size."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from fastft.checks import check_choice, check_count, check_positive


@dataclass(frozen=True)
class TrainingPlan:
    """The numbers of a run; ``str()`` gives them in a sentence."""

    total_steps: int
    """Optimizer steps."""
    warmup_steps: int
    steps_per_epoch: int
    effective_batch_size: int
    """Examples in an optimizer step, over all processes and accumulated batches."""
    lr: float | None
    """None if no base_lr was given."""
    rule: str
    """How lr was found."""

    def __str__(self) -> str:
        epochs = self.total_steps / self.steps_per_epoch
        lr = "" if self.lr is None else f", lr {self.lr:.3g}"
        return (
            f"{self.total_steps:,} steps ({epochs:.3g} epochs of {self.steps_per_epoch:,}), "
            f"{self.warmup_steps:,} of them to warm up, {self.effective_batch_size:,} examples each{lr} ({self.rule})"
        )


def plan_training(
    n_examples: int,
    batch_size: int,
    *,
    epochs: float | None = None,
    steps: int | None = None,
    accumulate: int = 1,
    world_size: int = 1,
    warmup: float = 0.1,
    drop_last: bool = False,
    base_lr: float | None = None,
    base_batch_size: int | None = None,
    scaling: Literal["sqrt", "linear"] = "sqrt",
) -> TrainingPlan:
    """The steps, the warm-up and the lr of a run.

    Args:
        n_examples: in the training set.
        batch_size: of each process, in each forward pass.
        epochs, steps: how long to train; one of the two.
        accumulate: batches in an optimizer step.
        world_size: processes, each of which sees its share of the examples.
        warmup: steps as an integer, or a part of all steps as a float below 1.
        drop_last: whether an incomplete share, batch or accumulation at the end of an epoch is left out.
        base_lr, base_batch_size: an lr that is known to be good, and the effective batch size it was good for.
        scaling: "sqrt" for Adam and its relatives (Malladi et al. 2022, https://arxiv.org/abs/2205.10287): lr grows
            with the square root of the effective batch size; "linear" for SGD (Goyal et al. 2017,
            https://arxiv.org/abs/1706.02677): in proportion to it.

    Returns:
        A plan with ``total_steps``, ``warmup_steps``, ``steps_per_epoch``, ``effective_batch_size``, ``lr`` (None
        without ``base_lr``) and ``rule`` (how lr was scaled); ``str()`` gives them in a sentence.

    Raises:
        ValueError: a number out of range, both or none of ``epochs`` and ``steps``, or too few examples for a step.
    """
    sizes = {"n_examples": n_examples, "batch_size": batch_size, "accumulate": accumulate, "world_size": world_size}
    for name, value in sizes.items():
        check_count(name, value)
    if (epochs is None) == (steps is None):
        raise ValueError(f"epochs, steps: expected one of the two, got epochs={epochs!r} and steps={steps!r}")
    if (base_lr is None) != (base_batch_size is None):
        raise ValueError(f"base_lr, base_batch_size: expected both or neither, got {base_lr!r} and {base_batch_size!r}")
    check_choice("scaling", scaling, ("sqrt", "linear"))

    steps_per_epoch = n_examples
    for size in (world_size, batch_size, accumulate):
        steps_per_epoch = steps_per_epoch // size if drop_last else -(-steps_per_epoch // size)
    if steps_per_epoch == 0:
        raise ValueError(
            f"n_examples: expected enough for one step of {batch_size * accumulate * world_size}, got {n_examples} "
            "with drop_last=True"
        )
    if steps is not None:
        check_count("steps", steps)
        total = steps
    else:
        assert epochs is not None
        check_positive("epochs", epochs)
        total = math.ceil(round(epochs * steps_per_epoch, 6))  # 0.1 · 30 is a little more than 3

    effective = batch_size * accumulate * world_size
    lr, rule = None, "lr not scaled"
    if base_lr is not None and base_batch_size is not None:
        check_positive("base_lr", base_lr)
        check_count("base_batch_size", base_batch_size)
        ratio = effective / base_batch_size
        lr = base_lr * (math.sqrt(ratio) if scaling == "sqrt" else ratio)
        root = "√" if scaling == "sqrt" else ""
        rule = f"{scaling}: {base_lr:g} · {root}({effective}/{base_batch_size})"
    return TrainingPlan(total, warmup_of(warmup, total), steps_per_epoch, effective, lr, rule)


def warmup_of(warmup: float, total: int) -> int:
    """The steps to warm up, from a number of them or a part of all."""
    if isinstance(warmup, int) and not isinstance(warmup, bool) and 0 <= warmup <= total:
        return warmup
    if isinstance(warmup, float) and 0.0 <= warmup < 1.0:
        return round(warmup * total)
    raise ValueError(f"warmup: expected up to {total} steps, or a part of them as a float below 1, got {warmup!r}")
