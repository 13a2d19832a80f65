"""The Hugging Face Trainer, with scores, a progress bar, a record of open layers, and a way to stop and go on."""

from __future__ import annotations

import math
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import (
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from fastft.integrations.transformers import UnfreezeCallback, optimizer_cls_and_kwargs
from fastft.layers import LayerGroup
from fastft.optim import TrainingPlan, biases_and_norms, layerwise_lr

from . import checkpoints
from .model import Pretrained
from .options import CLASSIFICATION, Options, make_policy

SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}
POINTS = 200
"""The loss of about this many steps of a run is recorded."""


@dataclass(frozen=True)
class Training:
    """A Trainer that is ready, and the callback that stops it."""

    trainer: Trainer
    stop: Stop


def prepare(
    options: Options,
    pretrained: Pretrained,
    groups: list[LayerGroup],
    plan: TrainingPlan,
    train: Any,
    evaluation: datasets.Dataset,
    folder: Path,
) -> Training:
    """A Trainer for a run whose checkpoints go into ``folder``."""
    model, tokenizer = pretrained.model, pretrained.tokenizer
    classifies = options.task == CLASSIFICATION
    every = min(options.checkpoint_every or plan.steps_per_epoch, plan.total_steps)
    args = TrainingArguments(
        output_dir=str(folder.resolve()),
        max_steps=plan.total_steps,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=options.batch_size,
        gradient_accumulation_steps=options.gradient_accumulation,
        learning_rate=options.lr,
        weight_decay=options.weight_decay,
        lr_scheduler_type=SCHEDULES[options.schedule],
        warmup_steps=plan.warmup_steps,
        max_grad_norm=0.0,  # fastft.AdamW clips
        use_cpu=not torch.cuda.is_available(),  # fastft.AdamW knows these two
        bf16=options.precision == "bfloat16",
        seed=options.seed,
        data_seed=options.seed,
        logging_strategy="steps",
        logging_steps=max(1, plan.total_steps // POINTS),
        logging_nan_inf_filter=False,
        eval_strategy="steps",
        eval_steps=every,
        save_strategy="steps",
        save_steps=every,
        load_best_model_at_end=options.keep == "best",
        # Of a language model the Trainer's loss is a mean over batches, and perplexity goes by tokens.
        metric_for_best_model="loss" if classifies else "perplexity",
        greater_is_better=False,
        # A mixture is shuffled already, and exact in this order only.
        train_sampling_strategy="random" if options.replay is None else "sequential",
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to=[],
        disable_tqdm=True,
    )
    assert args.device is not None  # asking for it counts the GPUs
    args._n_gpu = min(1, args.n_gpu)  # otherwise a batch would be one for each of them
    parameters = layerwise_lr(
        groups,
        options.lr,
        1.0 / (options.discriminative_lr or 1.0 / (options.layer_decay or 1.0)),
        no_decay=biases_and_norms,
        weight_decay=options.weight_decay,
    )
    # Then the steps are those of float32 weights.
    extra_bits = 16 if any(p.dtype == torch.bfloat16 for p in model.parameters()) else 0
    optimizer = optimizer_cls_and_kwargs(
        args,
        model,
        anchor_decay=options.anchor_decay,
        exclude=pretrained.new,
        params=parameters,
        anchor_mode=options.anchor_mode,
        max_grad_norm=options.max_grad_norm or None,
        skip_nonfinite=True,
        extra_bits=extra_bits,
    )
    unfreeze = None
    if options.unfreeze is not None:
        unfreeze = UnfreezeCallback(
            make_policy(options.unfreeze, options.seed),
            groups=groups,
            state_policy=options.unfreeze_state,
            rewarm_steps=options.rewarm_steps,
            tied="closed",
        )
    stop = Stop()
    collate: Any = DataCollatorWithPadding(tokenizer) if classifies else DataCollatorForSeq2Seq(tokenizer)
    trainer = Trainer(
        model,
        args,
        data_collator=collate,
        train_dataset=train,
        eval_dataset=evaluation,
        processing_class=tokenizer,
        compute_metrics=accuracy if classifies else perplexity,
        preprocess_logits_for_metrics=predictions if classifies else losses_of_rows,
        optimizer_cls_and_kwargs=optimizer,
        # In this order: Record comes before open layers change, Stop marks a checkpoint when all others have saved.
        callbacks=[ProgressBar(options.task), Record(unfreeze), *([unfreeze] if unfreeze else []), stop],
    )
    trainer.remove_callback(PrinterCallback)
    return Training(trainer, stop)


# -- scores --------------------------------------------------------------------------------------------------


def predictions(logits: Any, labels: Tensor) -> Tensor:
    """The number of the likeliest label of each row."""
    return (logits[0] if isinstance(logits, tuple) else logits).argmax(-1)  # type: ignore[no-any-return]


def accuracy(outcome: Any) -> dict[str, float]:
    return {"accuracy": float((outcome.predictions == outcome.label_ids).mean())}


def losses_of_rows(logits: Any, labels: Tensor) -> Tensor:
    """(summed negative log-likelihood, number of predicted tokens) of each row."""
    scores = logits[0] if isinstance(logits, tuple) else logits
    targets = labels[:, 1:]
    loss = cross_entropy(scores[:, :-1].transpose(1, 2).float(), targets, reduction="none", ignore_index=-100)
    return torch.stack([loss.sum(1).double(), (targets != -100).sum(1).double()], dim=1)


def perplexity(outcome: Any) -> dict[str, float]:
    """Of all tokens together, whatever row or batch they are in; the Trainer's loss is a mean over batches."""
    loss, tokens = np.asarray(outcome.predictions).sum(0)
    return {"perplexity": float(np.exp(loss / tokens))}


def scores(metrics: Mapping[str, float], task: str) -> dict[str, float]:
    """Accuracy or perplexity, and the loss, from an evaluation's metrics; of a language model per token, in nats."""
    if task == CLASSIFICATION:
        return {"accuracy": metrics["eval_accuracy"], "loss": metrics["eval_loss"]}
    return {"perplexity": metrics["eval_perplexity"], "loss": math.log(metrics["eval_perplexity"])}


def described(found: Mapping[str, float]) -> str:
    """Scores in a line."""
    return ", ".join(f"{name} {value:.4g}" for name, value in found.items())


# -- callbacks -----------------------------------------------------------------------------------------------


class ProgressBar(TrainerCallback):
    """A bar on stderr, if that is a terminal, and a line for each evaluation."""

    def __init__(self, task: str) -> None:
        self.task = task
        self.training: Any = None
        self.evaluating: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.training = tqdm(
            total=state.max_steps, initial=state.global_step, desc="training", unit="step", disable=None
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.training.update()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if "loss" in logs:
            self.training.set_postfix(loss=f"{logs['loss']:.3f}", refresh=False)

    def on_prediction_step(self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **_: Any) -> None:
        if self.evaluating is None:
            batches = len(eval_dataloader)
            self.evaluating = tqdm(total=batches, desc="evaluating", unit="batch", leave=False, disable=None)
        self.evaluating.update()

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any) -> None:
        self.evaluating.close()
        self.evaluating = None
        if self.training is not None:
            found = described(scores(metrics, self.task))
            say(f"step {state.global_step:,} of {state.max_steps:,}: {found} on the evaluation rows")

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.training.close()
        self.training = None


class Record(TrainerCallback):
    """Writes which layers are open, from which step on, into the history that the Trainer saves with a checkpoint."""

    def __init__(self, unfreeze: UnfreezeCallback | None) -> None:
        self.unfreeze = unfreeze

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.unfreeze is None or self.unfreeze.unfreezer is None:
            return
        now = list(self.unfreeze.unfreezer.open_groups)
        before = next((entry["open"] for entry in reversed(state.log_history) if "open" in entry), None)
        if now != before:
            state.log_history.append({"step": state.global_step, "open": now})


class Stopped(Exception):
    """The run has stopped after a step because of a signal, and left a checkpoint."""

    def __init__(self, step: int, signal_number: int) -> None:
        super().__init__(step, signal_number)
        self.step = step
        self.signal_number = signal_number


class Stop(TrainerCallback):
    """Marks a checkpoint as whole once all callbacks have saved; after Ctrl-C or SIGTERM, ends the run with one.

    Beside the last one, only the best stays; the Trainer itself would delete others before the last one is whole.
    """

    def __init__(self) -> None:
        self.asked: int | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """While the block runs, a first signal waits for the end of the step; a second one has its usual effect."""
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

        def restore() -> None:
            for number, handler in before.items():
                signal.signal(number, handler)

        def ask(number: int, _: Any) -> None:
            self.asked = number
            restore()
            say("stopping after this step (once more: at once)")

        for number in before:
            signal.signal(number, ask)
        try:
            yield
        finally:
            restore()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        # The folder may have been moved since.
        best = Path(args.output_dir) / f"checkpoint-{state.best_global_step}"
        if state.best_global_step and best.is_dir():
            state.best_model_checkpoint = str(best)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.asked is not None:
            control.should_save = control.should_training_stop = True

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        folder = Path(args.output_dir)
        checkpoints.mark_whole(folder / f"checkpoint-{state.global_step}")
        checkpoints.keep_only(folder, {state.global_step, state.best_global_step})
        if self.asked is not None and state.global_step < state.max_steps:
            raise Stopped(state.global_step, self.asked)


def say(message: str) -> None:
    """Print a line on stderr, above the progress bar."""
    tqdm.write(f"fastft finetune: {message}", file=sys.stderr)
