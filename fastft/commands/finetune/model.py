"""The pre-trained model: loading it, its new parameters, its limit of tokens, its weights before training."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from fastft import Anchor

from .errors import InputError
from .options import CAUSAL_LM

LONGEST = 10**9
"""Tokenizers without a limit give a number far above this."""
EXPECTED = "expected a folder as save_pretrained writes it, with config.json, model.safetensors and the tokenizer"


@dataclass(frozen=True)
class Pretrained:
    """A model as it was loaded."""

    model: Any
    tokenizer: Any
    labels: list[str]
    """By their numbers; empty for a language model."""
    new: list[str]
    """The parameters that are not pre-trained, or not for these labels: they have no anchor."""
    notes: list[str]


def load(folder: Path, task: str, labels: Sequence[str], dtype: torch.dtype = torch.float32) -> Pretrained:
    """The model in a folder, in this dtype and on the CPU, with a head for these labels.

    Raises:
        InputError: the folder does not hold what the task needs.
    """
    tokenizer = load_tokenizer(folder)
    config = loaded(folder, "config.json", AutoConfig)
    if task == CAUSAL_LM:
        return load_language_model(folder, tokenizer, config, dtype)

    own = [str(config.id2label[i]) for i in sorted(config.id2label)]
    known = sorted(own) == sorted(labels)
    labels = own if known else list(labels)
    model, info = loaded(
        folder,
        "a model with a classification head",
        AutoModelForSequenceClassification,
        dtype=dtype,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
        problem_type="single_label_classification",
        id2label=dict(enumerate(labels)),
        label2id={label: i for i, label in enumerate(labels)},
    )
    new = unloaded(model, info)
    notes = []
    if not new and not known:  # as many labels as the model has, but others
        inside = f"{model.base_model_prefix}."
        new = [name for name, _ in model.named_parameters() if not name.startswith(inside)]
        notes.append(f"the model has a head for {', '.join(own)}; these become {', '.join(labels)}")
    finish(model, tokenizer, folder)
    return Pretrained(model, tokenizer, labels, new, notes)


def load_language_model(folder: Path, tokenizer: Any, config: Any, dtype: torch.dtype) -> Pretrained:
    model, info = loaded(folder, "a causal language model", AutoModelForCausalLM, dtype=dtype, output_loading_info=True)
    new = unloaded(model, info)
    masked = [name for name in config.architectures or () if name.endswith("ForMaskedLM")]
    if new or masked:
        why = f"it is {masked[0]}" if masked else f"it has no {new[0]}"
        raise InputError(f"{folder}: expected a causal language model for --task {CAUSAL_LM}, but {why}")
    finish(model, tokenizer, folder)
    return Pretrained(model, tokenizer, [], [], [])


def new_head(pretrained: Pretrained) -> str:
    """The name of the new linear layer that gives the logits.

    Raises:
        InputError: there is none.
    """
    heads = [
        str(name)
        for name, module in pretrained.model.named_modules()
        if isinstance(module, nn.Linear)
        and module.out_features == len(pretrained.labels)
        and f"{name}.weight" in pretrained.new
    ]
    if not heads:
        raise InputError(
            "--fit-head: expected a model with a new linear head, and this one's head is not new or not linear"
        )
    return heads[-1]


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model; one that has no padding token pads with its end-of-sequence token."""
    if not (folder / "config.json").is_file():
        there = "a folder without config.json" if folder.is_dir() else "a file" if folder.exists() else "nothing there"
        raise InputError(f"--model: {folder}: {EXPECTED}; there is {there}")
    tokenizer = loaded(folder, "the tokenizer", AutoTokenizer)
    files = {"tokenizer.json", *tokenizer.vocab_files_names.values()}
    if not any((folder / name).is_file() for name in files):  # transformers makes an empty one up
        raise InputError(f"--model: {folder}: no tokenizer; expected one of {', '.join(sorted(files))}")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token or tokenizer.convert_ids_to_tokens(0)
    return tokenizer


def loaded(folder: Path, what: str, loader: Any, **options: Any) -> Any:
    """Load with transformers from a folder, and from nowhere else.

    Raises:
        InputError: it cannot be loaded.
    """
    try:
        return loader.from_pretrained(folder, local_files_only=True, **options)
    except Exception as error:  # of whatever class: the folder is the user's, and so is what is wrong with it
        reason = " ".join(str(error).split())
        raise InputError(f"--model: {folder}: cannot load {what}: {reason:.300}; {EXPECTED}") from error


def unloaded(model: nn.Module, info: Mapping[str, Iterable[Any]]) -> list[str]:
    """The parameters that the files lack or hold in another shape."""
    names = {*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])}
    return [name for name, _ in model.named_parameters() if name in names]


def finish(model: Any, tokenizer: Any, folder: Path) -> None:
    """Check that model and tokenizer belong together, and give both the same padding token."""
    rows = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        raise InputError(
            f"--model: {folder}: the tokenizer has {len(tokenizer):,} tokens and the model embeddings for {rows:,}; "
            "they do not belong together"
        )
    model.config.pad_token_id = tokenizer.pad_token_id


def token_limit(model: Any, tokenizer: Any) -> int | None:
    """The most tokens that the model can take; None if it sets no limit."""
    limits = [tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", None)]
    for name, module in model.named_modules():
        # RoBERTa and its like count positions from padding_idx + 1 on.
        padded = isinstance(module, nn.Embedding) and module.padding_idx is not None
        if padded and name.rpartition(".")[2] == "position_embeddings":
            limits.append(module.num_embeddings - module.padding_idx - 1)
    known = [limit for limit in limits if limit is not None and 0 < limit < LONGEST]
    return min(known, default=None)


def weights_of(pretrained: Pretrained, folder: Path) -> Anchor:
    """The weights of a model as it was loaded from a folder, to compare with later; without those of new parameters.

    They are read from its file when they are needed, or copied where the file holds them under other names, or the
    model rounded them to bfloat16.
    """
    if pretrained.model.dtype == torch.float32:
        with suppress(OSError, ValueError):
            return Anchor.from_safetensors(folder, pretrained.model, exclude=pretrained.new)
    return Anchor.snapshot(pretrained.model, exclude=pretrained.new, device="cpu")
