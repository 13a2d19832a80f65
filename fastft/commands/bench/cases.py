"""A case: pieces of work that are measured against each other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch

from .harness import Work

FASTFT = "fastft"


@dataclass(frozen=True)
class ReadyCase:
    """Work that was done once, and that came to the same as the others'."""

    works: dict[str, Work]
    """The first, ours, is measured against the others, above all against the second."""
    absent: dict[str, str] = field(default_factory=dict)
    """Why others that belong here are not measured: {name: reason}."""


@dataclass(frozen=True)
class Case:
    """What is measured, and how to get it ready."""

    name: str
    family: str
    title: str
    prepare: Callable[[torch.device], ReadyCase]
    nbytes: float | None = None
    """What ours must at least read and write."""
    memory: float = 0.0
    """Bytes that all pieces of work hold together."""
    target: float | None = None
    """What the ratio of ours to the second ought not to exceed on a CPU with 2 threads."""
    axis: Mapping[str, float] = field(default_factory=dict)
    """Where it stands among its family: {"live": 0.1}, {"tensors": 300}, {"parameters": 1e6}."""
    host: bool = False
    """Whether on a GPU the time counts until the call returns, not until the work is done."""


def select(cases: tuple[Case, ...], patterns: list[str]) -> tuple[Case, ...]:
    """The cases whose name or family is, or matches, one of the patterns; all where there is none.

    Raises ``ValueError`` for a pattern that nothing matches.
    """

    def matches(case: Case, pattern: str) -> bool:
        return fnmatchcase(case.name, pattern) or fnmatchcase(case.family, pattern)

    for pattern in patterns:
        if not any(matches(case, pattern) for case in cases):
            families = ", ".join(dict.fromkeys(case.family for case in cases))
            raise ValueError(f"case: expected a name, a family ({families}) or a pattern of them, got {pattern!r}")
    return tuple(case for case in cases if not patterns or any(matches(case, p) for p in patterns))
