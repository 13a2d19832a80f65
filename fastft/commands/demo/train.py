"""The fine-tuning itself: ``train`` is the loop, a ``Method`` makes what differs from one run to the next."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from tqdm import tqdm

import fastft
from fastft.optim import warm_up_then_decay
from fastft.problems import Classifier
from fastft.unfreeze import Unfreezer

Batch = tuple[Mapping[str, Tensor], Tensor]
"""A model's inputs, and the classes [rows]."""


@dataclass(frozen=True)
class Config:
    """The numbers of a run. The defaults are the full run."""

    train_rows: int = 2048
    test_rows: int = 2000
    pools: int = 3
    pool_size: int = 1000
    epochs: int = 1
    batch_size: int = 32
    max_length: int = 64
    lr: float = 3e-4
    warmup: float = 0.1
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    anchor_decay: float = 100.0
    seed: int = 0


@dataclass(frozen=True)
class Tuner:
    """A method made ready for one model: its optimizer, schedule, anchor and unfreezer."""

    optimizer: torch.optim.Optimizer
    step: Callable[[], Tensor]
    """Clips, steps, and returns the gradients' norm before clipping."""
    schedule: LRScheduler
    anchor: fastft.Anchor | None = None
    unfreezer: Unfreezer | None = None


Method = Callable[[Classifier, Config, int], Tuner]
"""A way to fine-tune: makes the ``Tuner`` of a model for a run of so many steps."""


def torch_adamw(model: Classifier, config: Config, steps: int) -> Tuner:
    """torch's AdamW in its fastest form, and torch's clipping."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=True)

    def step() -> Tensor:
        norm = clip_grad_norm_(model.parameters(), config.max_grad_norm)
        optimizer.step()
        return norm

    return Tuner(optimizer, step, scheduled(optimizer, config, steps))


def anchored(model: Classifier, config: Config, steps: int) -> Tuner:
    """fastft's AdamW: clips inside the step, and holds all but the new head near its pre-trained values."""
    anchor = fastft.Anchor.snapshot(model, exclude=("head.*",))
    optimizer = fastft.AdamW(
        model.parameters(),
        lr=config.lr,
        weight_decay=config.weight_decay,
        anchor=anchor,
        anchor_decay=config.anchor_decay,
        max_grad_norm=config.max_grad_norm,
    )

    return Tuner(optimizer, clipping_step(optimizer), scheduled(optimizer, config, steps), anchor)


def anchored_unfreezing(model: Classifier, config: Config, steps: int) -> Tuner:
    """An anchor, and the head alone at first and then layer after layer: ``fastft.recipe`` as it comes."""
    made = fastft.recipe(
        model,
        steps,
        exclude="head",
        lr=config.lr,
        warmup=config.warmup,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
    )
    return Tuner(made.optimizer, clipping_step(made.optimizer), made.scheduler, made.anchor, made.unfreezer)


def clipping_step(optimizer: fastft.AdamW) -> Callable[[], Tensor]:
    """A step that clips by itself."""

    def step() -> Tensor:
        optimizer.step()
        assert optimizer.grad_norm is not None  # there is one wherever max_grad_norm is given
        return optimizer.grad_norm

    return step


def scheduled(optimizer: torch.optim.Optimizer, config: Config, steps: int) -> LambdaLR:
    return LambdaLR(optimizer, warm_up_then_decay(steps, config.warmup))


@dataclass
class Log:
    """The numbers of one training run: a value per step, and the seconds of the whole."""

    loss: list[float] = field(default_factory=list)
    grad_norm: list[float] = field(default_factory=list)
    lr: list[float] = field(default_factory=list)
    optimizer_seconds: list[float] = field(default_factory=list)
    state_bytes: list[int] = field(default_factory=list)
    """The size of the optimizer's state after the step."""
    open_groups: list[int] = field(default_factory=list)
    """How many layer groups the step moved; nothing where no unfreezer was at work."""
    anchor_bytes: int = 0
    training_seconds: float = 0.0


def train(model: Classifier, batches: list[Batch], method: Method, config: Config, title: str) -> Log:
    """Fine-tune ``model`` in place on ``batches``, once through."""
    log = Log()
    start = time.perf_counter()
    tuner = method(model, config, len(batches))
    torch.manual_seed(config.seed)  # the same dropout for every method
    model.train()
    with tqdm(batches, desc=title, unit="step", disable=None) as bar:
        for inputs, labels in bar:
            loss = cross_entropy(model(inputs), labels)
            loss.backward()
            before_step = time.perf_counter()
            norm = tuner.step()
            log.optimizer_seconds.append(time.perf_counter() - before_step)
            log.loss.append(loss.item())
            log.grad_norm.append(float(norm))
            log.lr.append(float(tuner.schedule.get_last_lr()[0]))
            log.state_bytes.append(state_bytes(tuner.optimizer))
            tuner.schedule.step()
            tuner.optimizer.zero_grad()
            if tuner.unfreezer is not None:
                log.open_groups.append(len(tuner.unfreezer.open_groups))
                tuner.unfreezer.step()
            bar.set_postfix(loss=f"{loss.item():.3f}")
    model.eval()
    log.training_seconds = time.perf_counter() - start
    if tuner.anchor is not None:
        log.anchor_bytes = sum(tensor.nbytes for tensor in tuner.anchor.state_dict()["tensors"].values())
    if tuner.unfreezer is not None:
        tuner.unfreezer.undo()
    return log


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """The size of all tensors in the optimizer's state: for AdamW two moments and a step count a parameter."""
    return sum(
        value.nbytes for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)
    )
