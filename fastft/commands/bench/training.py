"""Whole training steps: forward, backward, clipping, anchor and AdamW, of models shaped as well-known ones."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import fastft
from fastft.nn import fuse_dropout_

from .cases import FASTFT, Case, ReadyCase
from .harness import Work
from .peers import ADAMW
from .steps import ANCHOR_DECAY, FUSED, MAX_GRAD_NORM, torch_clip_anchor

TOLERANCE = 0.1
"""How far apart, relatively, the losses of the first step may be: the masks of dropout differ."""


def minilm(transformers: Any) -> tuple[nn.Module, dict[str, Tensor]]:
    """MiniLM-L6-H384 with a classifier, and 8 texts of 64 tokens."""
    config = transformers.BertConfig(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
    )
    tokens = torch.randint(config.vocab_size, (8, 64), generator=torch.Generator().manual_seed(0))
    return transformers.BertForSequenceClassification(config), {"input_ids": tokens, "labels": tokens[:, 0] % 2}


def gpt2(transformers: Any) -> tuple[nn.Module, dict[str, Tensor]]:
    """GPT-2 small, and one text of 64 tokens."""
    config = transformers.GPT2Config()
    tokens = torch.randint(config.vocab_size, (1, 64), generator=torch.Generator().manual_seed(0))
    return transformers.GPT2LMHeadModel(config), {"input_ids": tokens, "labels": tokens}


def prepare(make: Callable[[Any], tuple[nn.Module, dict[str, Tensor]]], device: torch.device) -> ReadyCase:
    torch.manual_seed(0)
    model, batch = make(importlib.import_module("transformers"))
    model, batch = model.to(device).train(), {name: tensor.to(device) for name, tensor in batch.items()}
    other = copy.deepcopy(model)
    fuse_dropout_(model)
    optimizer = fastft.AdamW(
        model.parameters(), **ADAMW, anchor="init", anchor_decay=ANCHOR_DECAY, max_grad_norm=MAX_GRAD_NORM
    )
    torch_step, torch_optimizer = torch_clip_anchor(list(other.parameters()), mode="decoupled", fused=True)
    losses: list[float] = []

    def whole_step(of: nn.Module, step: Work, zero_grad: Work) -> Work:
        def work() -> None:
            loss = of(**batch).loss
            loss.backward()
            step()
            zero_grad()
            if len(losses) < 2:
                losses.append(float(loss.detach()))

        return work

    works = {
        FASTFT: whole_step(model, optimizer.step, optimizer.zero_grad),
        FUSED: whole_step(other, torch_step, torch_optimizer.zero_grad),
    }
    for work in works.values():
        work()
    if not abs(losses[0] - losses[1]) <= TOLERANCE * losses[1]:
        raise AssertionError(f"training: the first losses are {losses[0]:.4f} and {losses[1]:.4f}")
    return ReadyCase(works)


CASES = tuple(
    Case(
        f"training_{make.__name__}",
        "training",
        f"training step with dropout, clip and anchor: {title}",
        partial(prepare, make),
        memory=memory,
    )
    for make, title, memory in ((minilm, "MiniLM, 8 × 64 tokens", 2e9), (gpt2, "GPT-2, 64 tokens", 6e9))
)
