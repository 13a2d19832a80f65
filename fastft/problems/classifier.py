"""A pre-trained encoder under a linear head, the head's first fit, and batches of texts of like length."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TypeAlias

import torch
from torch import Tensor, nn

from fastft.retention import linear_probe

Inputs: TypeAlias = Mapping[str, Tensor]
"""A tokenizer's output: ``input_ids`` and ``attention_mask`` [rows, tokens], and so on."""
Batch: TypeAlias = tuple[Inputs, Tensor]
"""Inputs, and the classes [rows]."""


class Classifier(nn.Module):
    """A pre-trained encoder and a linear head on the mean of its token vectors."""

    def __init__(self, encoder: nn.Module, width: int, labels: int = 2) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(width, labels)

    def embed(self, inputs: Inputs) -> Tensor:
        """One vector per text, [rows, width]: the mean over its tokens, padding left out."""
        tokens: Tensor = self.encoder(**inputs).last_hidden_state
        mask = inputs["attention_mask"].unsqueeze(-1).to(tokens.dtype)
        return (tokens * mask).sum(1) / mask.sum(1)

    def forward(self, inputs: Inputs) -> Tensor:
        """The logits of each text, [rows, labels]."""
        logits: Tensor = self.head(self.embed(inputs))
        return logits


def fit_linear_probe(head: nn.Linear, embeddings: Tensor, labels: Tensor, l2: float = 1e-2) -> None:
    """Fit ``head`` on the embeddings [rows, width] of a frozen encoder, so that all methods start from one good head.

    ``l2`` was chosen on reviews that are in neither the demo's training rows nor the test rows.
    """
    weight, bias = linear_probe(embeddings, labels, head.out_features, l2=l2, bias_l2=0.0)
    with torch.no_grad():
        head.weight.copy_(weight)
        head.bias.copy_(bias)


def batches_by_length(lengths: list[int], size: int, generator: torch.Generator, span: int = 8) -> Iterator[list[int]]:
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
