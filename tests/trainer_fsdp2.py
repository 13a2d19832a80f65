"""The two processes of tests/integrations/test_trainer_fsdp2.py: the Trainer with accelerate's FSDP2, on the CPU.

``python trainer_fsdp2.py run FOLDER RANK`` trains every case and saves what came of it; ``resume``, in new processes,
goes on from the checkpoint in the middle.
"""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from started import end_together
from torch import Tensor
from torch.distributed.tensor import DTensor
from trainer_runs import token_rows
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from fastft.integrations.transformers import UnfreezeCallback, optimizer_cls_and_kwargs, optimizer_of
from fastft.optim import layerwise_lr
from fastft.unfreeze import GradualUnfreeze, OnPlateau, layer_groups

WORLD = 2
BREAK, STEPS = 4, 8


class Case(NamedTuple):
    """A run to be trained and resumed."""

    kind: str
    mode: Any
    state_dict_type: str
    policy: str = "gradual"
    option: str = "none"

    @property
    def name(self) -> str:
        return "-".join(map(str, self))


CASES = (
    Case("encoder", "requires_grad", "FULL_STATE_DICT"),
    Case("encoder", "freeze", "SHARDED_STATE_DICT"),
    Case("encoder", "freeze", "FULL_STATE_DICT", "plateau"),
    Case("decoder", "requires_grad", "SHARDED_STATE_DICT", option="layerwise"),
    Case("decoder", "freeze", "FULL_STATE_DICT"),
    Case("decoder", "freeze", "SHARDED_STATE_DICT", "plateau"),
    Case("decoder", "freeze", "FULL_STATE_DICT", option="tied"),
)


def model_for(case: Case, folder: Path) -> Any:
    """A tiny pre-trained model; the embeddings do not train, the encoder's head is new."""
    tied = case.option == "tied"
    saved = folder / f"{case.kind}-{tied}"
    if case.kind == "encoder":
        cls: Any = BertForSequenceClassification
        config: Any = BertConfig(
            vocab_size=50,
            hidden_size=16,
            num_hidden_layers=3,
            num_attention_heads=2,
            intermediate_size=32,
            initializer_range=0.2,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        base: Any = BertModel
    else:
        base = cls = LlamaForCausalLM
        config = LlamaConfig(
            vocab_size=50,
            hidden_size=16,
            num_hidden_layers=3,
            num_attention_heads=2,
            num_key_value_heads=2,
            intermediate_size=32,
            initializer_range=0.2,
            tie_word_embeddings=tied,
        )
    if not saved.exists():
        torch.manual_seed(0)
        base(config).save_pretrained(saved)
    torch.manual_seed(1)
    model = cls.from_pretrained(saved)
    if case.kind == "encoder":
        model.bert.embeddings.requires_grad_(False)
    return model


def rows_for(case: Case, count: int, seed: int = 0) -> list[dict[str, Any]]:
    rows = token_rows(count, seed)
    return rows if case.kind == "encoder" else [{"input_ids": r["input_ids"], "labels": r["input_ids"]} for r in rows]


def arguments(case: Case, folder: Path, sharded: bool) -> TrainingArguments:
    fsdp: dict[str, Any] = {}
    if sharded:
        # By name, as accelerate would wrap BertEmbeddings and then, once more, the embedding inside.
        layer = {"encoder": "BertLayer", "decoder": "LlamaDecoderLayer"}[case.kind]
        config = {"version": 2, "state_dict_type": case.state_dict_type, "transformer_layer_cls_to_wrap": [layer]}
        fsdp = {"fsdp": True, "fsdp_config": config}
    return TrainingArguments(
        str(folder),
        learning_rate=1e-2,
        weight_decay=0.1,
        adam_beta2=0.98,
        adam_epsilon=1e-4,
        max_grad_norm=0.0,
        warmup_steps=2,
        lr_scheduler_type="cosine",
        per_device_train_batch_size=2 if sharded else 2 * WORLD,
        gradient_accumulation_steps=2,
        max_steps=STEPS,
        eval_strategy="steps",
        eval_steps=2,
        save_steps=BREAK,
        logging_steps=1,
        seed=3,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        log_level="error",
        **fsdp,
    )


class Recorder(TrainerCallback):
    """Writes down the open groups, the lr and the distances to the anchor after each step."""

    def __init__(self, unfreeze: UnfreezeCallback) -> None:
        self.unfreeze = unfreeze
        self.trainer: Any = None
        self.opened: dict[int, tuple[str, ...]] = {}
        self.lr: dict[int, list[float]] = {}
        self.end: dict[str, Any] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        assert self.unfreeze.unfreezer is not None
        self.opened[state.global_step] = self.unfreeze.unfreezer.open_groups
        optimizer = optimizer_of(self.trainer)
        self.lr[state.global_step] = [float(group["lr"]) for group in optimizer.param_groups]
        if state.global_step == STEPS:
            named = dict(model.named_parameters())
            saved = optimizer.state_dict()
            names = [name for group in optimizer.param_groups for name in group["param_names"]]
            without_moments = saved["fastft"].get("without_moments", {})
            kept = {name: saved["state"].get(i, without_moments.get(str(i), {})) for i, name in enumerate(names)}
            self.end = {
                "params": {name: whole(p) for name, p in named.items()},
                "state": {f"{n}.{key}": whole(value) for n, each in kept.items() for key, value in each.items()},
                "sharded": all(isinstance(p, DTensor) for p in named.values()),
            }


@torch.no_grad()
def whole(value: Any) -> Tensor:
    tensor = value.full_tensor() if isinstance(value, DTensor) else torch.as_tensor(value)
    return tensor.detach().clone()


def run(
    case: Case, folder: Path, shared: Path, sharded: bool, resume: Path | None = None, anchor_decay: float = 5.0
) -> dict[str, Any]:
    """A run of 8 rows a step, however many processes these are spread over."""
    model = model_for(case, shared)
    args = arguments(case, folder, sharded)
    if case.policy == "plateau":
        policy: Any = OnPlateau("eval_loss", patience=1, threshold=0.02, restore_best=True)
    else:
        policy = GradualUnfreeze(every=3)
    layerwise = case.option == "layerwise"
    tied = "closed" if case.option == "tied" else "raise"
    unfreeze = UnfreezeCallback(policy, mode=case.mode, tied=tied, rewarm_steps=2 if layerwise else 0)
    recorder = Recorder(unfreeze)
    groups = layerwise_lr(layer_groups(model), args.learning_rate, decay=0.8, weight_decay=0.1) if layerwise else None
    anchored = optimizer_cls_and_kwargs(args, model, anchor_decay=anchor_decay, params=groups, max_grad_norm=0.5)
    trainer = Trainer(
        model,
        args,
        train_dataset=rows_for(case, 40),
        eval_dataset=rows_for(case, 16, seed=1),
        optimizer_cls_and_kwargs=anchored,
        callbacks=[unfreeze, recorder],
    )
    recorder.trainer = trainer
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    assert unfreeze.unfreezer is not None
    notes = unfreeze.unfreezer.report().notes
    return {"opened": recorder.opened, "lr": recorder.lr, **recorder.end, "notes": notes}


def fsdp_on_the_cpu() -> None:
    """accelerate shards on accelerators only; here on the CPU, too."""
    made = AcceleratorState.__init__

    def make(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        made(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.fsdp_plugin = fsdp_plugin
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = make


def main(task: str, folder: Path) -> None:
    fsdp_on_the_cpu()
    rank = os.environ["RANK"]
    results = {}
    for case in CASES:
        AcceleratorState._reset_state()
        at = folder / case.name
        checkpoint = at / f"checkpoint-{BREAK}" if task == "resume" else None
        results[case.name] = run(case, at, folder, sharded=True, resume=checkpoint)
    torch.save(results, folder / f"{task}.{rank}")
    end_together()


if __name__ == "__main__":
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.simplefilter("error", UserWarning)
    warnings.filterwarnings("ignore", message="Detected an existing checkpoint")  # the resumed run writes its own
    main(sys.argv[1], Path(sys.argv[2]))
