"""The interface of a fine-tuning problem, which every method is tried on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from fastft.problems import ItemScores

Batch = tuple[Any, Tensor]
"""Inputs and labels."""


class Model(Protocol):
    """An encoder under a new head. A module, such as ``fastft.problems.Classifier``."""

    encoder: nn.Module
    head: nn.Linear

    def embed(self, inputs: Any) -> Tensor:
        """One vector per input, which fine-tuning should keep."""


class Problem(Protocol):
    """A pre-trained model, a task to learn, and a test of what it knew."""

    tokenizer: Any
    """Of transformers, for what :meth:`as_tokens` gives."""
    synonyms: Mapping[str, Sequence[str]] | Path
    """Words of the target task and their synonyms, as :class:`fastft.data.SynonymReplacement` takes them."""

    def start(self) -> Any:
        """A fresh copy of the pre-trained model, under a head fitted by a linear probe."""

    def batches(self, epochs: int, seed: int) -> list[Batch]:
        """All batches of a run, the same for every method."""

    def as_tokens(self, inputs: Any) -> dict[str, Any]:
        """A batch's inputs with ``input_ids`` [rows, tokens], in a dict that may be changed."""

    def from_tokens(self, tokens: dict[str, Any]) -> Any:
        """Inputs again."""

    def unlabelled(self, kind: str, count: int, seed: int) -> Iterator[tuple[Any, Tensor]]:
        """Without end: inputs that belong to no task, and the vectors that the pre-trained model gives them."""

    def replay(self, seed: int) -> Iterator[Callable[[Any], Tensor]]:
        """Without end: functions from a model to its loss on a batch of old data."""

    def importance(self, seed: int) -> Mapping[str, Tensor]:
        """How much each of the encoder's weights matters to what the model knew: its Fisher information, mean 1."""

    def score(self, model: Any) -> ItemScores:
        """Test the model."""
