"""Fine-tuning a small decoder: the final loss of each setting, on texts that were held out.

Every run of a seed starts from the same bfloat16 weights and sees the same batches. "float32" is float32 throughout:
weights, forward and gradients. "float32 beside a bfloat16 model" steps float32 weights of which the model is a bfloat16
copy, with that model's gradients: the classical master weights. All other settings train the bfloat16 model itself.

A run is a line of ``training.jsonl``; what is there is not run again, and several processes may share the work.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastft.optim import master_weights, warm_up_then_decay

from ..retention.records import append, claim, load
from .decoder import QUICK, SMALL, Corpus, base_weights, fresh_model, loss_of, loss_on
from .settings import (
    BY_NAME,
    EXTRA_8,
    EXTRA_8_STOCHASTIC,
    EXTRA_16,
    FLOAT32,
    NEAREST,
    STOCHASTIC,
    adamw,
    header,
)

NAME = "training"
MASTER = "float32 beside a bfloat16 model"
LR = 1e-4
WARMUP = 0.1
WEIGHT_DECAY = 0.01
MAX_GRAD_NORM = 1.0
STEPS, QUICK_STEPS = 500, 4
SEEDS, QUICK_SEEDS = (0, 1, 2), (0,)
SETTINGS = (
    (FLOAT32.name, "float32"),
    (FLOAT32.name, "8bit"),
    (MASTER, "float32"),
    (NEAREST.name, "bfloat16"),
    (NEAREST.name, "float32"),
    *(
        (weights.name, moments)
        for weights in (EXTRA_16, EXTRA_8, EXTRA_8_STOCHASTIC, STOCHASTIC)
        for moments in ("float32", "8bit")
    ),
    (EXTRA_16.name, "bfloat16"),
)
"""(weights, moments)."""


@dataclass(frozen=True)
class Plan:
    """A run."""

    weights: str
    moments: str
    seed: int
    steps: int
    lr: float = LR

    @property
    def key(self) -> str:
        """The same for the same run."""
        text = json.dumps(asdict(self), sort_keys=True)
        return hashlib.blake2b(text.encode("utf-8"), digest_size=8).hexdigest()


def plans(quick: bool) -> Iterator[Plan]:
    """All settings of a seed before the next seed, so that what is there first can be compared."""
    for seed in QUICK_SEEDS if quick else SEEDS:
        for weights, moments in SETTINGS:
            yield Plan(weights, moments, seed, QUICK_STEPS if quick else STEPS)


class Trainee:
    """The model that computes, the parameters that are stepped, and their optimizer."""

    def __init__(self, plan: Plan, corpus: Corpus, base: dict[str, Tensor]) -> None:
        weights = BY_NAME.get(plan.weights, FLOAT32)
        self.model = fresh_model(corpus.size)
        with torch.no_grad():
            for name, p in self.model.named_parameters():
                p.copy_(base[name])
        self.beside: nn.Module | None = None
        if plan.weights == MASTER:
            self.beside, self.model = self.model, fresh_model(corpus.size).bfloat16()
            self.refresh()
        else:
            self.model.to(weights.dtype)
        options = {"lr": plan.lr, "weight_decay": WEIGHT_DECAY, "max_grad_norm": MAX_GRAD_NORM}
        self.optimizer = adamw(self.beside or self.model, weights, plan.moments, plan.seed, **options)

    @torch.no_grad()
    def refresh(self) -> None:
        """The model's weights: those beside it, rounded."""
        assert self.beside is not None
        for p, master in zip(self.model.parameters(), self.beside.parameters(), strict=True):
            p.copy_(master)

    def step(self, batch: Tensor) -> float:
        """Returns the loss before it."""
        loss = loss_of(self.model, batch)
        loss.backward()
        if self.beside is not None:
            for p, master in zip(self.model.parameters(), self.beside.parameters(), strict=True):
                assert p.grad is not None
                master.grad = p.grad.float()
        self.optimizer.step()
        if self.beside is not None:
            self.refresh()
        self.model.zero_grad()
        return float(loss.detach())

    def masters(self) -> dict[str, Tensor]:
        return master_weights(self.beside or self.model, self.optimizer)


def run(plan: Plan, corpus: Corpus, base: dict[str, Tensor]) -> dict[str, Any]:
    """Train, and measure the loss: in float32 from the float32 weights, and of the model as it is."""
    wall, cpu = time.perf_counter(), time.process_time()
    record: dict[str, Any] = {"key": plan.key, "settings": asdict(plan), **header()}
    trainee = Trainee(plan, corpus, base)
    schedule = torch.optim.lr_scheduler.LambdaLR(trainee.optimizer, warm_up_then_decay(plan.steps, WARMUP))
    losses = []
    for batch in corpus.batches(corpus.new, plan.steps, plan.seed):
        losses.append(trainee.step(batch))
        schedule.step()
    exact = fresh_model(corpus.size)
    exact.load_state_dict(trainee.masters(), strict=False)  # lm_head is tied to the embedding
    moved = [(p != base[name]).double().mean() for name, p in trainee.model.named_parameters()]
    return {
        **record,
        "parameters": sum(p.numel() for p in exact.parameters()),
        "loss": loss_on(exact, corpus.held_out),
        "loss_of_model": loss_on(trainee.model, corpus.held_out),
        "training_loss": sum(losses[-50:]) / len(losses[-50:]),
        "moved": float(torch.stack(moved).mean()),
        "wall_seconds": time.perf_counter() - wall,
        "cpu_seconds": time.process_time() - cpu,
        "transformers": package_version("transformers"),
    }


def package_version(name: str) -> str:
    from importlib.metadata import version

    return version(name)


def before(corpus: Corpus, base: dict[str, Tensor]) -> dict[str, Any]:
    """The loss at the start, as a record."""
    model = fresh_model(corpus.size)
    model.load_state_dict(base, strict=False)
    return {"key": "before", "loss": loss_on(model, corpus.held_out), **header()}


def measure(quick: bool, folder: Path, seconds: float = float("inf"), settings: str | None = None) -> None:
    """Run what is missing in ``folder``, for about that long; ``settings``: only those with this in their name."""
    path = folder / f"{NAME}.jsonl"
    end = time.monotonic() + seconds
    corpus = Corpus(QUICK if quick else SMALL)
    base = base_weights(corpus)
    if not any(record["key"] == "before" for record in load(path)):
        append(path, before(corpus, base))
    for plan in plans(quick):
        title = f"{plan.weights}, {plan.moments} moments, seed {plan.seed}"
        if settings is not None and settings not in title:
            continue
        if time.monotonic() > end:
            return
        with claim(f"precision-{plan.key}") as mine:
            if not mine or any(record["key"] == plan.key for record in load(path)):
                continue
            record = run(plan, corpus, base)
            append(path, record)
            figures = [f"{record['loss']:.4f}", f"as it is {record['loss_of_model']:.4f}"]
            print(f"{title}: {', '.join(figures)}, {record['wall_seconds']:.0f} s", flush=True)
