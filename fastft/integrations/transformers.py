"""fastft in the Hugging Face ``Trainer``: the optimizer is one argument, the unfreezer a callback.

.. code-block:: python

    trainer = Trainer(
        model,
        args,
        train_dataset=rows,
        optimizer_cls_and_kwargs=optimizer_cls_and_kwargs(args, model, anchor_decay=100.0),
        callbacks=[UnfreezeCallback(GradualUnfreeze(every=100))],
    )

``(fastft.AdamW, {"lr": 2e-5, ...})`` does as well. The function takes lr, betas and eps from ``args``, which the
Trainer ignores for an optimizer class that it is given, and finds the parameters that are new and so have no anchor.
"""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fastft.anchor import Anchor
from fastft.integrations.progress import go_on, numbers, whole_tensors
from fastft.layers.wrappers import wrapped_for
from fastft.names import matching
from fastft.optim import AdamW
from fastft.optim.anchoring import check_anchor_options, check_pull
from fastft.optim.processes import initialized
from fastft.unfreeze import Policy, Unfreezer
from fastft.unfreeze.unfreezer import unwrapped
from fastft.warning import warn

try:
    from accelerate.state import AcceleratorState
    from accelerate.utils import broadcast_object_list
    from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ImportError as error:
    raise ImportError(
        f"fastft.integrations.transformers needs transformers and accelerate ({error}): "
        'python -m pip install "fastft[transformers]"'
    ) from error

__all__ = ["UnfreezeCallback", "new_parameters", "optimizer_cls_and_kwargs", "optimizer_of"]

STATE_KEY = "fastft_unfreezer"
BEST_FILE = "fastft_unfreezer_best.pt"
# LoRA's factors, also of embeddings: where they are 0, the model is as it was pre-trained.
LORA_FACTOR = re.compile(r"\.lora_(?:embedding_)?[AB]\b")
# PEFT trains a copy of a whole module; the original stays beside it.
PEFT_COPY = re.compile(r"\.modules_to_save\.[^.]+\.")


def optimizer_cls_and_kwargs(
    args: TrainingArguments,
    model: nn.Module,
    *,
    anchor_decay: float = 0.0,
    anchor: Anchor | None = None,
    exclude: str | Iterable[str] | None = None,
    params: Iterable[dict[str, Any]] | None = None,
    **options: Any,
) -> tuple[type[AdamW], dict[str, Any]]:
    """The argument ``Trainer(optimizer_cls_and_kwargs=...)`` that makes it train with :class:`fastft.AdamW`.

    Call it before the Trainer resumes a run, with the model as it was pre-trained: its values now are the anchor.
    Resuming brings back the anchor of the first run, whatever the model holds by then.

    Args:
        args: lr, betas, eps and weight_decay are taken from it.
        model: the model that the Trainer gets; with PEFT, after ``get_peft_model``.
        anchor_decay: λ of the pull toward the pre-trained weights, as in :class:`fastft.AdamW`. LoRA's factors are
            pulled to 0, where the model is as it was pre-trained: that is weight decay, so λ is added to theirs, and
            nothing is copied.
        anchor: where to pull to; None: the present values of the trained parameters that are not new.
        exclude: names, glob patterns or module names of new parameters, which nothing pulls. None: those that
            :func:`new_parameters` finds.
        params: groups of named parameters, such as ``layerwise_lr(layer_groups(model), args.learning_rate)`` of
            :mod:`fastft.optim` makes. None: as the Trainer divides them, into those with and without weight decay.
        **options: more of :class:`fastft.AdamW`'s. With ``max_grad_norm``, pass ``max_grad_norm=0.0`` to
            ``TrainingArguments``, or the Trainer clips too.

    Returns:
        The optimizer's class and its arguments.

    Raises:
        ValueError: the new parameters cannot be found out, there is nothing to anchor, a number is out of range, or
            only the first process has the weights (``cpu_ram_efficient_loading`` of FSDP).
    """
    refuse_weights_elsewhere(model)
    mode = options.get("anchor_mode", "decoupled")
    check_anchor_options(anchor_decay, mode, "optimizer_cls_and_kwargs")
    check_pull(options.get("lr", args.learning_rate), anchor_decay, mode, "optimizer_cls_and_kwargs")
    groups = decay_groups(args, model) if params is None else list(params)
    if anchor_decay and anchor is None:
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        factors = {name for name in trained if LORA_FACTOR.search(name)}
        if exclude is not None:
            free = set(matching(exclude, trained))
            factors -= free
        else:
            free = new_parameters(model) if factors < set(trained) else set()
        anchor = Anchor.snapshot((name, p) for name, p in trained.items() if name not in free | factors)
        if not len(anchor) and not factors:
            raise ValueError(f"anchor_decay: expected 0 where all that is trained is new, got {anchor_decay}")
        if factors and mode != "decoupled":
            raise ValueError(f'anchor_mode: expected "decoupled" with LoRA, whose anchor is weight decay, got {mode!r}')
        pulled: set[Tensor] = {trained[name] for name in factors}
        groups = [part for group in groups for part in divided(group, pulled, args.weight_decay, anchor_decay)]
    kwargs = {
        "params": [group for group in groups if group["params"]],
        "lr": args.learning_rate,
        "betas": (args.adam_beta1, args.adam_beta2),
        "eps": args.adam_epsilon,
        "weight_decay": args.weight_decay,
        "anchor": anchor,
        "anchor_decay": anchor_decay,
    }
    return AdamW, {**kwargs, **options}


def refuse_weights_elsewhere(model: nn.Module) -> None:
    """Raise, in every process, where a process has parameters without values.

    An anchor taken there would be of nothing, and accelerate goes by the memory of parameters.
    """
    empty = next((name for name, p in model.named_parameters() if p.is_meta), None)
    asked = [os.environ.get(key, "").lower() for key in ("ACCELERATE_USE_FSDP", "FSDP_CPU_RAM_EFFICIENT_LOADING")]
    if initialized() and asked == ["true", "true"]:
        each: list[str | None] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(each, empty)
        empty = next((name for name in each if name is not None), None)
    if empty is not None:
        raise ValueError(
            f"model: expected its weights in every process, got {empty} without values in some; set "
            '"cpu_ram_efficient_loading" to False, and each process loads all of them'
        )


def optimizer_of(trainer: Trainer) -> AdamW:
    """The :class:`fastft.AdamW` that a Trainer trains with, without what accelerate wraps around it.

    For what the wrapper does not pass on, such as ``grad_norm`` and ``skipped_steps``. The Trainer makes its optimizer
    when training begins.

    Raises:
        TypeError: it has no optimizer yet, or one of another class.
    """
    inner = unwrapped(trainer.optimizer)
    if not isinstance(inner, AdamW):
        raise TypeError(f"trainer: expected one that trains with fastft.AdamW, got {type(inner).__name__}")
    return inner


def new_parameters(model: nn.Module) -> set[str]:
    """The names of the parameters that ``from_pretrained`` did not find in the checkpoint: a new head, often.

    Raises:
        ValueError: this is not known, as the model was made from a config, copied, or loaded by transformers 4.
    """
    loaded = {
        name
        for name, p in model.named_parameters(remove_duplicate=False)
        if getattr(p, "_is_hf_initialized", False)  # transformers' mark of what it has loaded
    }
    if not loaded:
        raise ValueError(
            "exclude: cannot tell which parameters are new, as none is known to come from a checkpoint; pass their "
            'names, such as info["missing_keys"] of from_pretrained(..., output_loading_info=True), or () if none is'
        )
    return {
        name for name, _ in model.named_parameters() if not {name, PEFT_COPY.sub(".original_module.", name)} & loaded
    }


def decay_groups(args: TrainingArguments, model: nn.Module) -> list[dict[str, Any]]:
    """The Trainer's groups, with names."""
    decayed = set(Trainer.get_decay_parameter_names(None, model))  # type: ignore[arg-type]  # it uses no self
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return [
        {"params": [(n, p) for n, p in named if n in decayed], "weight_decay": args.weight_decay},
        {"params": [(n, p) for n, p in named if n not in decayed], "weight_decay": 0.0},
    ]


def divided(
    group: dict[str, Any], pulled: set[Tensor], weight_decay: float, anchor_decay: float
) -> list[dict[str, Any]]:
    """The group, and one apart for the parameters that weight decay pulls to 0 in place of an anchor."""
    apart = [(name, p) for name, p in group["params"] if p in pulled]
    if not apart:
        return [group]
    more = {"params": apart, "weight_decay": group.get("weight_decay", weight_decay) + anchor_decay}
    return [{**group, "params": [(n, p) for n, p in group["params"] if p not in pulled]}, {**group, **more}]


class UnfreezeCallback(TrainerCallback):
    """Opens layer groups while a ``Trainer`` trains: an :class:`Unfreezer` that lives as long as ``train()``.

    It counts optimizer steps, whatever ``gradient_accumulation_steps`` is. Policies that depend on metrics get those
    of each evaluation under the Trainer's names: ``OnPlateau("eval_loss")``. Its state is saved with the
    optimizer's, with FSDP in the Trainer's, so ``resume_from_checkpoint`` goes on in the middle of the schedule.

    With DDP, FSDP1, ``torch_compile``, and for models that are compiled, ``mode="freeze"`` is needed; FSDP2 takes
    either mode.

    Args:
        policy: as for :class:`Unfreezer`.
        **options: of :class:`Unfreezer`, but for ``wrapped``, which is found out.
    """

    unfreezer: Unfreezer | None
    """The one of the current or the last ``train()``; ``print(callback.unfreezer.report())``."""

    def __init__(self, policy: Policy, **options: Any) -> None:
        inspect.signature(Unfreezer).bind(
            None, None, policy, wrapped=(), **options
        )  # raises at once for what it does not take
        self.policy = policy
        self.options = options
        self.unfreezer = None
        self._training = False
        self._handle: Any = None
        self._trainer_state: TrainerState | None = None  # with FSDP

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        optimizer: Optimizer | None = None,
        **kwargs: Any,
    ) -> None:
        """Make the unfreezer; the Trainer has loaded its checkpoint by now."""
        self.undo()  # of a run that was interrupted
        assert model is not None
        inner = unwrapped(optimizer)
        self.unfreezer = unfreezer = Unfreezer(model, inner, self.policy, wrapped=around(args), **self.options)
        self._training = True
        self._handle = inner.register_state_dict_post_hook(self._add_state)
        self._trainer_state = state if AcceleratorState().distributed_type.value == "FSDP" else None
        saved = inner.param_groups[0].pop(STATE_KEY, None)
        if self._trainer_state is not None:
            refuse_flat_copies(unfreezer)
            saved = saved_beside(args, state)
        go_on(unfreezer, saved, state.global_step, state.epoch)
        warn_of_clipping(args, unfreezer)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Count an optimizer step."""
        assert self.unfreezer is not None
        self.unfreezer.step(epoch=state.epoch)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Log the metrics; in several processes, those of the first."""
        if not self._training:
            return
        assert self.unfreezer is not None
        measured = numbers(metrics or {})
        if args.world_size > 1:
            (measured,) = broadcast_object_list([measured])
        self.unfreezer.update(epoch=state.epoch, **measured)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """With FSDP, save the tensors that the policy may go back to, whole."""
        if not self._training or self._trainer_state is None:
            return
        assert self.unfreezer is not None
        best = whole_tensors(self.unfreezer.state_dict()["best"])
        if best is not None and args.should_save:
            torch.save(best, saved_in(args, state) / BEST_FILE)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the model as it came: everything open."""
        self.undo()

    def close(self) -> None:
        """The old name of :meth:`undo`."""
        warn("UnfreezeCallback.close() is called undo() now", DeprecationWarning)
        self.undo()

    def undo(self) -> None:
        """Open everything; only needed where ``train()`` was cut short by an exception, and is not called again."""
        if self._training:
            assert self.unfreezer is not None
            self._training = False
            self._handle.remove()
            self.unfreezer.undo()

    def _add_state(self, optimizer: Optimizer, packed: dict[str, Any]) -> None:
        """Into a group, as that is what every optimizer takes back as it was; so it is saved wherever moments are.

        With FSDP, into the Trainer's state, which it writes after the optimizer's and reads in every process: of
        groups torch.distributed.checkpoint reads only what the new optimizer has, and on the first process only.
        """
        assert self.unfreezer is not None
        state = self.unfreezer.state_dict()
        if self._trainer_state is None:
            packed["param_groups"][0][STATE_KEY] = state
        else:
            assert isinstance(self._trainer_state.stateful_callbacks, dict)
            self._trainer_state.stateful_callbacks[STATE_KEY] = {**state, "best": state["best"] is not None}


def saved_beside(args: TrainingArguments, state: TrainerState) -> dict[str, Any] | None:
    """An unfreezer's state from the Trainer's, and from the file beside that; None if there is none."""
    assert isinstance(state.stateful_callbacks, dict)
    saved: dict[str, Any] | None = state.stateful_callbacks.pop(STATE_KEY, None)
    if saved is None or not saved["best"]:
        return None if saved is None else {**saved, "best": None}
    given = args.resume_from_checkpoint
    folder = saved_in(args, state)
    file = (Path(given) if isinstance(given, str) and Path(given).name == folder.name else folder) / BEST_FILE
    if not file.exists():
        raise FileNotFoundError(
            f"{file}: expected the tensors that the policy may go back to (restore_best=True), got no such file; pass "
            "the checkpoint's folder also as TrainingArguments(resume_from_checkpoint=...)"
        )
    return {**saved, "best": torch.load(file, weights_only=True)}


def saved_in(args: TrainingArguments, state: TrainerState) -> Path:
    """Where the Trainer saves this step."""
    return Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"


def refuse_flat_copies(unfreezer: Unfreezer) -> None:
    """Raise where a policy would go back to copies of pieces that are of no use to another process."""
    if getattr(unfreezer.policy, "restore_best", False) and "fsdp1" in wrapped_for(unfreezer.model):
        raise ValueError(
            "policy: expected restore_best=False with FullyShardedDataParallel, whose checkpoints cannot hold copies "
            'of its pieces; use FSDP2 (fsdp_config={"version": 2})'
        )


def around(args: TrainingArguments) -> set[str]:
    """The Trainer's wrappers around the model that callbacks get, for ``Unfreezer(wrapped=...)``."""
    accelerator = AcceleratorState()
    found = set()
    if accelerator.distributed_type.value.startswith("MULTI_"):
        found.add("ddp")
    elif args.n_gpu > 1:
        found.add("data_parallel")
    if args.torch_compile or accelerator.dynamo_plugin.backend.value != "NO":
        found.add("compile")
    return found


def warn_of_clipping(args: TrainingArguments, unfreezer: Unfreezer) -> None:
    """Warn of gradients that the Trainer clips before the step does, or by a norm that closed groups count in."""
    optimizer = unfreezer.optimizer
    if not args.max_grad_norm:
        return
    if isinstance(optimizer, AdamW) and optimizer._max_grad_norm is not None:
        trouble = "the Trainer clips before fastft.AdamW does"
    elif unfreezer.mode == "freeze" and around(args):
        trouble = "the norm that the Trainer clips by counts closed groups, too"
    else:
        return
    warn(
        f"{trouble}: pass max_grad_norm to fastft.AdamW and max_grad_norm=0.0 to TrainingArguments (it is "
        f"{args.max_grad_norm})"
    )
