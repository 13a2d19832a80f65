"""Scripts that train with the Hugging Face Trainer: killed and resumed, and in two processes."""

from __future__ import annotations

import os
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from contract_cases import carried_by
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2Model,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from fastft.integrations.transformers import UnfreezeCallback, optimizer_cls_and_kwargs
from fastft.optim import biases_and_norms, layerwise_lr
from fastft.problems import corpus, model_folder
from fastft.unfreeze import LISA, GradualUnfreeze, OnPlateau, layer_groups

Rows = list[dict[str, Any]]


# -- models and data -----------------------------------------------------------------------------------------


def tiny_bert(folder: Path, dropout: float = 0.1, layers: int = 3) -> nn.Module:
    """A BERT that was pre-trained, as far as transformers knows, with a new head."""
    if not folder.exists():
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=50,
            hidden_size=16,
            num_hidden_layers=layers,
            num_attention_heads=2,
            intermediate_size=32,
            initializer_range=0.2,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
        )
        BertModel(config).save_pretrained(folder)
    torch.manual_seed(1)
    return BertForSequenceClassification.from_pretrained(folder)


def tiny_gpt2(folder: Path, cls: Any) -> Any:
    if not folder.exists():
        torch.manual_seed(0)
        config = GPT2Config(
            vocab_size=50,
            n_embd=16,
            n_layer=3,
            n_head=2,
            n_positions=16,
            initializer_range=0.2,
            bos_token_id=1,
            eos_token_id=1,
            pad_token_id=0,
        )
        GPT2Model(config).save_pretrained(folder)
    torch.manual_seed(1)
    return cls.from_pretrained(folder)


def token_rows(count: int, seed: int = 0) -> Rows:
    """Whether the first token is even."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(2, 50, (count, 6), generator=generator)
    return [{"input_ids": row, "labels": row[0] % 2} for row in tokens]


def review_rows(train: int, test: int, length: int = 16) -> tuple[Rows, Rows]:
    tokenizer = AutoTokenizer.from_pretrained(model_folder(), local_files_only=True)

    def rows(reviews: list[corpus.Review]) -> Rows:
        inputs = tokenizer(
            [review.text for review in reviews], padding="max_length", truncation=True, max_length=length
        )
        return [
            {"input_ids": ids, "attention_mask": mask, "labels": int(review.positive)}
            for ids, mask, review in zip(inputs["input_ids"], inputs["attention_mask"], reviews, strict=True)
        ]

    for_training, for_testing = corpus.split_reviews("movie", train, test)
    return rows(for_training), rows(for_testing)


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    """Non-neutral values all around, and every kind of step: micro-steps, evaluations, checkpoints."""
    defaults: dict[str, Any] = {
        "learning_rate": 1e-3,
        "weight_decay": 0.1,
        "adam_beta2": 0.98,
        "adam_epsilon": 1e-6,
        "max_grad_norm": 0.0,
        "warmup_steps": 2,
        "lr_scheduler_type": "cosine",
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 3,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_steps": 2,
        "logging_steps": 1,
        "seed": 3,
    }
    return TrainingArguments(
        str(folder), **{**defaults, **options}, report_to=[], use_cpu=True, disable_tqdm=True, log_level="error"
    )


class Recorder(TrainerCallback):
    """Writes down the state after each optimizer step; ``kill_at`` ends the process there, as a power cut would."""

    def __init__(self, unfreeze: UnfreezeCallback | None = None, kill_at: int | None = None) -> None:
        self.unfreeze = unfreeze
        self.kill_at = kill_at
        self.opened: dict[int, tuple[str, ...]] = {}
        self.lr: dict[int, list[float]] = {}
        self.last: dict[str, Any] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        optimizer = kwargs["optimizer"]
        if self.unfreeze is not None:
            assert self.unfreeze.unfreezer is not None
            self.opened[state.global_step] = self.unfreeze.unfreezer.open_groups
        self.lr[state.global_step] = [float(group["lr"]) for group in optimizer.param_groups]
        if state.global_step == state.max_steps:
            self.last = {"params": values(model.named_parameters()), "moments": moments(optimizer)}

    def end(self) -> dict[str, Any]:
        return {"opened": self.opened, "lr": self.lr, **self.last}


def values(named: Any) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in named}


def moments(optimizer: Any) -> dict[str, Tensor]:
    """The whole state: moments, step counts, and the anchor."""
    saved = optimizer.state_dict()
    found = {
        f"{i}.{key}": value.clone()
        for i, state in saved["state"].items()
        for key, value in state.items()
        if isinstance(value, Tensor)
    }
    return found | {f"anchor.{name}": t.clone() for name, t in carried_by(saved, "anchor").items()}


# -- runs that are killed ------------------------------------------------------------------------------------


class Run:
    """A Trainer with all that hangs on it."""

    def __init__(self, trainer: Trainer, unfreeze: UnfreezeCallback, kill_at: int | None) -> None:
        self.trainer = trainer
        self.recorder = Recorder(unfreeze, kill_at)
        trainer.add_callback(self.recorder)

    def train(self, resume: Path | None = None) -> dict[str, Any]:
        self.trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
        return {
            **self.recorder.end(),
            "model": values(self.trainer.model.named_parameters()),
            "best": self.trainer.state.best_model_checkpoint,
        }


def minilm(folder: Path, kill_at: int | None = None) -> Run:
    """The real model: anchor, weight decay and clipping in the step, gradual unfreezing with layer-wise lr."""
    train, test = review_rows(24, 8)
    torch.manual_seed(1)  # the new head
    model = AutoModelForSequenceClassification.from_pretrained(model_folder(), local_files_only=True)
    args = arguments(
        folder,
        per_device_train_batch_size=2,
        num_train_epochs=2,
        eval_steps=4,
        save_steps=4,
        load_best_model_at_end=True,
        save_total_limit=2,
    )
    unfreeze = UnfreezeCallback(GradualUnfreeze(every=3), rewarm_steps=2)
    layers = layerwise_lr(layer_groups(model), args.learning_rate, 0.8, no_decay=biases_and_norms, weight_decay=0.1)
    adamw = optimizer_cls_and_kwargs(args, model, anchor_decay=30.0, params=layers, max_grad_norm=0.5)
    trainer = Trainer(
        model,
        args,
        train_dataset=train,
        eval_dataset=test,
        optimizer_cls_and_kwargs=adamw,
        callbacks=[unfreeze],
    )
    return Run(trainer, unfreeze, kill_at)


def tiny(folder: Path, kill_at: int | None, policy: Any, **options: Any) -> Run:
    model = tiny_bert(folder.parent / "tiny-bert")
    args = arguments(folder, learning_rate=1e-2)
    unfreeze = UnfreezeCallback(policy, **options)
    trainer = Trainer(
        model,
        args,
        train_dataset=token_rows(40),
        eval_dataset=token_rows(16, seed=1),
        optimizer_cls_and_kwargs=optimizer_cls_and_kwargs(args, model, anchor_decay=3.0, max_grad_norm=0.5),
        callbacks=[unfreeze],
    )
    return Run(trainer, unfreeze, kill_at)


def lisa(folder: Path, kill_at: int | None = None) -> Run:
    return tiny(folder, kill_at, LISA(1, every=2, seed=3), mode="freeze", state_policy="reset")


def plateau(folder: Path, kill_at: int | None = None) -> Run:
    policy = OnPlateau("eval_loss", patience=1, threshold=0.02, restore_best=True)
    return tiny(folder, kill_at, policy, state_policy="offload")


RUNS: dict[str, Callable[..., Run]] = {"lisa": lisa, "plateau": plateau, "minilm": minilm}
KILL_AT = 7
RESUME_AT = {"lisa": 6, "plateau": 6, "minilm": 4}


def train_and_die(folder: Path) -> None:
    *others, last = RUNS
    for name in others:
        if os.fork() == 0:
            RUNS[name](folder / name, KILL_AT).train()
            os._exit(0)
        _, status = os.wait()
        assert os.WIFSIGNALED(status)
    RUNS[last](folder / last, KILL_AT).train()


# -- two processes -------------------------------------------------------------------------------------------


def whole(
    folder: Path, model: Path, rows_at_once: int, resume: Path | None = None, mode: str = "freeze", rank: int = 0
) -> dict[str, Any]:
    """A run of 8 rows a step, however many processes these are spread over; ``eval_m`` is another on each of them."""
    bert = tiny_bert(model, dropout=0.0)
    args = arguments(folder, per_device_train_batch_size=rows_at_once, adam_epsilon=1e-4, num_train_epochs=2)
    measured = []

    def compute_metrics(_: Any) -> dict[str, float]:
        measured.append(float(len(measured)))
        return {"m": measured[-1] if rank == 0 else -measured[-1]}

    unfreeze = UnfreezeCallback(OnPlateau("eval_m", patience=1), mode=mode)
    recorder = Recorder(unfreeze)
    trainer = Trainer(
        bert,
        args,
        train_dataset=token_rows(40),
        eval_dataset=token_rows(16, seed=1),
        compute_metrics=compute_metrics,
        optimizer_cls_and_kwargs=optimizer_cls_and_kwargs(args, bert, anchor_decay=3.0, max_grad_norm=0.5),
        callbacks=[unfreeze, recorder],
    )
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    assert unfreeze.unfreezer is not None
    return {**recorder.end(), "notes": unfreeze.unfreezer.report().notes}


def ddp(folder: Path) -> None:
    rank = int(os.environ["RANK"])
    shared = folder / "tiny-bert"
    try:
        whole(folder / "refused", shared, 2, mode="requires_grad")
        refused = ""
    except ValueError as error:
        refused = str(error)
    run = whole(folder / "ddp", shared, 2, rank=rank)
    resumed = whole(folder / "ddp", shared, 2, resume=folder / "ddp" / "checkpoint-4", rank=rank)
    torch.save({"refused": refused, "run": run, "resumed": resumed}, folder / f"{rank}.end")


if __name__ == "__main__":
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.simplefilter("error", UserWarning)
    {"train": train_and_die, "ddp": ddp}[sys.argv[1]](Path(sys.argv[2]))
