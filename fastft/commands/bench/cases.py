"""Cases: pieces of work that are measured against each other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch

from .harness import Work

FASTFT = "fastft"


@dataclass(frozen=True)
class ReadyCase:
    """A case's pieces of work, each done once already, with equal results."""

    works: dict[str, Work]
    """The first, fastft's, is measured against the others; the target is a ratio to the second."""
    absent: dict[str, str] = field(default_factory=dict)
    """{name: why it is not measured here}."""


@dataclass(frozen=True)
class Case:
    """A measurement, and how to get it ready."""

    name: str
    family: str
    title: str
    prepare: Callable[[torch.device], ReadyCase]
    nbytes: float | None = None
    """The least bytes that fastft's must read and write."""
    memory: float = 0.0
    """Bytes that all pieces of work together keep in memory."""
    target: float | None = None
    """The highest ratio of fastft's to the second that is good enough on a CPU with 2 threads."""
    axis: Mapping[str, float] = field(default_factory=dict)
    """Its coordinate in its family: {"live": 0.1}, {"tensors": 300}, {"parameters": 1e6}."""
    host: bool = False
    """On a GPU, the time is that until the call returns, not until the work is done."""


def select(cases: tuple[Case, ...], patterns: list[str]) -> tuple[Case, ...]:
    """The cases whose name or family is, or matches, one of the patterns; all if there is no pattern.

    Raises:
        ValueError: a pattern matches nothing.
    """

    def matches(case: Case, pattern: str) -> bool:
        return fnmatchcase(case.name, pattern) or fnmatchcase(case.family, pattern)

    for pattern in patterns:
        if not any(matches(case, pattern) for case in cases):
            families = ", ".join(dict.fromkeys(case.family for case in cases))
            raise ValueError(f"case: expected a name, a family ({families}) or a pattern of them, got {pattern!r}")
    return tuple(case for case in cases if not patterns or any(matches(case, p) for p in patterns))
