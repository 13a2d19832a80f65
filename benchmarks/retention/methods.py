"""The ways of keeping knowledge, and the one training loop that all of them go through.

A method is a learning rate and a set of ingredients, each with a strength, so any of them can be combined.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss, normalize
from torch.nn.utils import parametrize
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import IterableDataset

import fastft
from fastft.data import (
    AugmentingCollator,
    ReplayMixer,
    SpanMasking,
    SynonymReplacement,
    TextAugment,
    TokenDropout,
    neftune,
)
from fastft.layers import layer_groups
from fastft.nn import Mixout, fuse_dropout_
from fastft.optim import layerwise_lr, warm_up_then_decay
from fastft.retention import distillation_loss, interpolate_
from fastft.unfreeze import GradualUnfreeze, Unfreezer

from .problem import Batch, Problem

INGREDIENTS = {
    "fresh_head": "1: the head starts at random, not from the linear probe",
    "anchor": "λ of the decoupled anchor",
    "l2sp": "α of L2-SP, the coupled anchor",
    "ewc": "λ of the decoupled anchor weighted by the Fisher information of what the model knew, mean 1 (EWC)",
    "spd": "λ of selective projection decay",
    "mixout": "p of mixout on all linear layers of the encoder",
    "lora": "the rank of LoRA on all linear layers of the encoder, α = 2 · rank",
    "gradual": "the part of the steps after which the last layer is open",
    "layer_decay": "the factor on lr from a layer to the one below",
    "frozen_embeddings": "1: the embeddings stay as they are",
    "replay": "the part of the batches in whose place come old data",
    "distill": "the weight of 1 − cos between a text's vector and its pre-trained one, on unlabelled texts",
    "relation": "the weight of the squared error of the texts' pairwise cosines, on unlabelled texts",
    "replay_mixer": "the share of old batches that ReplayMixer puts between the new ones, all of which stay",
    "token_dropout": "the probability of a token of a new batch to be masked, each by itself",
    "span_masking": "the probability of a token of a new batch to be masked, in runs of 3 on average",
    "synonyms": "the probability of a word of a new batch to be replaced by a synonym, if it is in the problem's table",
    "neftune": "α of NEFTune's noise on the encoder's input embeddings",
}
AUGMENTATIONS: dict[str, Callable[[float, Problem], Any]] = {
    "token_dropout": lambda p, problem: TokenDropout(p),
    "span_masking": lambda p, problem: SpanMasking(p),
    "synonyms": lambda p, problem: SynonymReplacement(p, problem.synonyms, problem.tokenizer),
}
"""Those of ``INGREDIENTS`` that change a new batch's tokens, with what makes a step of ``TextAugment``."""
ANCHORS = {"anchor": "decoupled", "l2sp": "l2", "ewc": "decoupled", "spd": "selective"}
"""Anchor modes; of these ingredients a method takes one."""
WEIGHT_DECAY = 0.01
MAX_GRAD_NORM = 1.0
WARMUP = 0.1


@dataclass(frozen=True)
class Method:
    """How to train."""

    lr: float
    ingredients: Mapping[str, float] = field(default_factory=dict)
    texts: int = 16
    """Unlabelled inputs a step, for the ingredients that take some."""
    text_kind: str = "generic"
    """Which; what there is depends on the problem."""

    def __post_init__(self) -> None:
        for name, strength in self.ingredients.items():
            if name not in INGREDIENTS:
                raise ValueError(f"ingredients: expected some of {', '.join(INGREDIENTS)}, got {name!r}")
            if not strength > 0:
                raise ValueError(f"{name}: expected a strength > 0, got {strength}")

        if len(self.ingredients.keys() & set(ANCHORS)) > 1:
            raise ValueError(f"ingredients: expected one of {', '.join(ANCHORS)}, got {', '.join(self.ingredients)}")

    def strength(self, ingredient: str) -> float:
        """0 where it is not in the method."""
        return self.ingredients.get(ingredient, 0.0)


class Step(NamedTuple):
    """One step of training: a batch, as a loss."""

    loss: Callable[[Any], Tensor]
    """Of a model, on one batch."""
    is_old: bool
    """Whether that batch is old data."""


class InOrder(IterableDataset[Step]):
    """Steps as a dataset that is not shuffled, as lists would be."""

    def __init__(self, steps: Iterable[Step]) -> None:
        self.steps = steps

    def __iter__(self) -> Iterator[Step]:
        return iter(self.steps)


@dataclass
class Trained:
    """A model after training, in its original form, and what that took."""

    model: Any
    first_loss: float
    last_loss: float
    steps: int
    wall_seconds: float
    cpu_seconds: float


def fine_tune(problem: Problem, method: Method, epochs: int, seed: int) -> Trained:
    """Train the problem's model on its target task."""
    model = problem.start()
    anchor = fastft.Anchor.snapshot(model, exclude=("head",))
    batches = problem.batches(epochs, seed)
    torch.manual_seed(seed)
    prepare(model, method, anchor)
    pull = sum(map(method.strength, ANCHORS))
    if method.strength("ewc"):
        anchor = anchor.with_importance(problem.importance(seed + 4))
    optimizer = fastft.AdamW(
        parameter_groups(model, method),
        weight_decay=WEIGHT_DECAY,
        max_grad_norm=MAX_GRAD_NORM,
        anchor=anchor if pull else None,
        anchor_decay=pull,
        anchor_mode=next((mode for name, mode in ANCHORS.items() if method.strength(name)), "decoupled"),
    )
    old = (Step(loss, True) for loss in problem.replay(seed + 3))
    steps = new_steps(problem, method, batches, epochs, seed + 5)
    if ratio := method.strength("replay_mixer"):
        steps = list(ReplayMixer(InOrder(steps), InOrder(old), ratio))
    schedule = LambdaLR(optimizer, warm_up_then_decay(len(steps), WARMUP))
    unfreezer = None
    if method.strength("gradual"):
        opening = GradualUnfreeze.open_by(method.strength("gradual"), len(steps), layer_groups(model))
        unfreezer = Unfreezer(model, optimizer, opening)
    extra = extra_losses(problem, method, seed + 1)
    noise = neftune(model.encoder, alpha) if (alpha := method.strength("neftune")) else nullcontext()

    losses = []
    wall, cpu = time.perf_counter(), time.process_time()
    model.train()
    # Drawn before each step, so that the target batches and their order are the same whatever is mixed in.
    random = torch.Generator().manual_seed(seed + 2)
    with noise:
        for step in steps:
            # Here old batches come in the place of new ones: a run is no longer for having them.
            if torch.rand((), generator=random) < method.strength("replay"):
                step = next(old)
            loss = step.loss(model)
            if not step.is_old:
                losses.append(loss.item())
            for term in extra:
                loss = loss + term(model)
            loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            if unfreezer is not None:
                unfreezer.step()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    if unfreezer is not None:
        unfreezer.undo()
    few = max(1, len(losses) // 10)
    restored = restore(problem, model, method)
    return Trained(restored, mean(losses[:few]), mean(losses[-few:]), len(steps), wall, cpu)


def new_steps(problem: Problem, method: Method, batches: list[Batch], epochs: int, seed: int) -> list[Step]:
    """Those on the target's batches, whose inputs are augmented only when their loss is asked for."""
    augment = augmentation(problem, method, seed)

    def loss(number: int, model: Any) -> Tensor:
        inputs, labels = batches[number]
        return cross_entropy(model(augment(inputs, number * epochs // len(batches))), labels)

    return [Step(partial(loss, number), False) for number in range(len(batches))]


def augmentation(problem: Problem, method: Method, seed: int) -> Callable[[Any, int], Any]:
    """A function of a batch's inputs and the epoch."""
    steps = [make(p, problem) for name, make in AUGMENTATIONS.items() if (p := method.strength(name))]
    if not steps:
        return lambda inputs, epoch: inputs
    collator = AugmentingCollator(problem.as_tokens, TextAugment(problem.tokenizer, *steps), seed)

    def augmented(inputs: Any, epoch: int) -> Any:
        collator.set_epoch(epoch)
        return problem.from_tokens(collator(inputs))

    return augmented


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def prepare(model: Any, method: Method, anchor: fastft.Anchor) -> None:
    """Put into the model what the method needs there."""
    if method.strength("fresh_head"):
        model.head.reset_parameters()
    if method.strength("frozen_embeddings"):
        layer_groups(model)[0].parameters[0].requires_grad_(False)
    if rank := method.strength("lora"):
        # Here, so that what only reads results does without it.
        import peft

        config = peft.LoraConfig(r=int(rank), lora_alpha=2 * int(rank), lora_dropout=0.0, target_modules="all-linear")
        model.encoder = peft.get_peft_model(model.encoder, config)
    else:
        fuse_dropout_(model)
    if p := method.strength("mixout"):
        for module in list(model.encoder.modules()):
            if isinstance(module, nn.Linear):
                parametrize.register_parametrization(module, "weight", Mixout(anchor, module.weight, p=p))


def restore(problem: Problem, model: Any, method: Method) -> Any:
    """The trained weights in a plain model, as the problem makes it."""
    if method.strength("lora"):
        model.encoder = model.encoder.merge_and_unload()
    if method.strength("mixout"):
        for module in list(model.encoder.modules()):
            if parametrize.is_parametrized(module):
                # As it was before: what is kept in evaluation is the trained weight.
                weight = module.parametrizations.weight.original
                parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)
                assert module.weight is weight
    plain = problem.start()
    plain.load_state_dict(model.state_dict())
    return plain.eval()


def parameter_groups(model: Any, method: Method) -> list[dict[str, Any]]:
    """The parameters that are trained, with their learning rates."""
    groups = [{"params": list(model.named_parameters()), "lr": method.lr}]
    if factor := method.strength("layer_decay"):
        groups = layerwise_lr(layer_groups(model), method.lr, factor)
    for group in groups:
        group["params"] = [(name, p) for name, p in group["params"] if p.requires_grad]
    return [group for group in groups if group["params"]]


def extra_losses(problem: Problem, method: Method, seed: int) -> list[Callable[[Any], Tensor]]:
    """The terms that hold the model's function, each on the same unlabelled inputs."""
    distill, relation = method.strength("distill"), method.strength("relation")
    if not distill and not relation:
        return []
    texts: Iterator[tuple[Any, Tensor]] = problem.unlabelled(method.text_kind, method.texts, seed)

    def term(model: Any) -> Tensor:
        inputs, known = next(texts)
        vectors = model.embed(inputs)
        loss = vectors.new_zeros(())
        if distill:
            loss = loss + distill * distillation_loss(vectors, known, kind="embeddings")
        if relation:
            loss = loss + relation * mse_loss(cosines(vectors), cosines(known))
        return loss

    return [term]


def cosines(vectors: Tensor) -> Tensor:
    """Of each vector with each."""
    unit = normalize(vectors, dim=1)
    return unit @ unit.T


def blended(problem: Problem, trained: Any, alpha: float, method: Method) -> Any:
    """(1 − α) · start + α · trained: WiSE-FT (Wortsman et al. 2022).

    The head too, if it started from the linear probe's. One that started at random has nothing to go back to.
    """
    model = copy.deepcopy(trained)
    start = fastft.Anchor.snapshot(problem.start(), exclude=("head",) if method.strength("fresh_head") else ())
    interpolate_(model, start, alpha)
    return model
