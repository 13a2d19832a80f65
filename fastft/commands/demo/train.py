"""The fine-tuning itself. ``train`` is the loop; a recipe says what is different from one run to the next."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from tqdm import tqdm

import fastft
from fastft.optim import warm_up_then_decay
from fastft.retention.head import minimum
from fastft.unfreeze import Unfreezer

from .corpus import Review

Inputs = Mapping[str, Tensor]
Batch = tuple[Inputs, Tensor]
Tokenize = Callable[[list[str]], Inputs]


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


class Classifier(nn.Module):
    """A pre-trained encoder and a linear head on the mean of its token vectors."""

    def __init__(self, encoder: nn.Module, width: int, labels: int = 2) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(width, labels)

    def embed(self, inputs: Inputs) -> Tensor:
        """One vector per text: the mean over its tokens, padding left out."""
        tokens: Tensor = self.encoder(**inputs).last_hidden_state
        mask = inputs["attention_mask"].unsqueeze(-1).to(tokens.dtype)
        return (tokens * mask).sum(1) / mask.sum(1)

    def forward(self, inputs: Inputs) -> Tensor:
        """The logits of each text."""
        logits: Tensor = self.head(self.embed(inputs))
        return logits


@dataclass(frozen=True)
class Tuner:
    """What takes a step, and what else belongs to it."""

    optimizer: torch.optim.Optimizer
    step: Callable[[], Tensor]
    """Clips, steps, and returns the gradients' norm before clipping."""
    schedule: LRScheduler
    anchor: fastft.Anchor | None = None
    unfreezer: Unfreezer | None = None


Recipe = Callable[[Classifier, Config, int], Tuner]
"""For a run of so many steps."""


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
    """What one training run left behind: a value per step, and the seconds of the whole."""

    loss: list[float] = field(default_factory=list)
    grad_norm: list[float] = field(default_factory=list)
    lr: list[float] = field(default_factory=list)
    optimizer_seconds: list[float] = field(default_factory=list)
    state_bytes: list[int] = field(default_factory=list)
    """What the optimizer keeps for the next step."""
    open_groups: list[int] = field(default_factory=list)
    """How many layer groups the step moved; nothing where no unfreezer was at work."""
    anchor_bytes: int = 0
    training_seconds: float = 0.0


def train(model: Classifier, batches: list[Batch], recipe: Recipe, config: Config, title: str) -> Log:
    """Fine-tune ``model`` in place on ``batches``, once through."""
    log = Log()
    start = time.perf_counter()
    tuner = recipe(model, config, len(batches))
    torch.manual_seed(config.seed)  # the same dropout for every recipe
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


def make_batches(reviews: list[Review], tokenize: Tokenize, config: Config) -> list[Batch]:
    """All batches of all epochs, in the order in which every recipe will see them."""
    generator = torch.Generator().manual_seed(config.seed)
    return [
        (tokenize([reviews[i].text for i in rows]), torch.tensor([int(reviews[i].positive) for i in rows]))
        for _ in range(config.epochs)
        for rows in shuffled([len(review.text) for review in reviews], config.batch_size, generator)
    ]


def shuffled(lengths: list[int], size: int, generator: torch.Generator, span: int = 8) -> Iterator[list[int]]:
    """Batches of row numbers in random order, with rows of like length together to save padding.

    Rows are shuffled, sorted by length within stretches of ``span`` batches, cut, and the batches shuffled.
    """
    order: list[int] = torch.randperm(len(lengths), generator=generator).tolist()
    batches: list[list[int]] = []
    for start in range(0, len(order), span * size):
        stretch = sorted(order[start : start + span * size], key=lengths.__getitem__)
        batches += [stretch[i : i + size] for i in range(0, len(stretch), size)]
    for index in torch.randperm(len(batches), generator=generator).tolist():
        yield batches[index]


def fit_linear_probe(model: Classifier, embeddings: Tensor, labels: Tensor, l2: float = 1e-2) -> None:
    """Fit ``model.head`` on frozen embeddings, so that all recipes start from the same good head.

    As :func:`fastft.retention.fit_head_` does, without a pass of the model.
    ``l2`` was chosen on reviews that are in neither the default training rows nor the test rows.
    """
    weight, bias = minimum(embeddings.double(), labels, model.head.out_features, l2, bias_l2=0.0)
    with torch.no_grad():
        model.head.weight.copy_(weight)
        model.head.bias.copy_(bias)
