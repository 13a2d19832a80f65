"""Parameter names: pairs of them, patterns over them, and the closest to one that was mistyped."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from fnmatch import fnmatchcase

from torch import Tensor, nn


def named_tensors(source: nn.Module | Iterable[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
    """(name, parameter) pairs, each name once."""
    named = list(source.named_parameters() if isinstance(source, nn.Module) else source)
    seen: set[str] = set()
    for item in named:
        if not (
            isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str) and isinstance(item[1], Tensor)
        ):
            raise TypeError(
                f"expected a module or (name, parameter) pairs, such as model.named_parameters(); got {item!r:.80}"
            )
        if item[0] in seen:
            raise ValueError(f"{item[0]}: expected each name once, got it twice")
        seen.add(item[0])
    return named


def matching(exclude: str | Iterable[str], names: list[str]) -> set[str]:
    """The names that any pattern (a name, a glob, a module) takes in."""
    found: set[str] = set()
    for pattern in [exclude] if isinstance(exclude, str) else exclude:
        hits = {n for n in names if n == pattern or n.startswith(pattern + ".") or fnmatchcase(n, pattern)}
        if not hits:
            raise ValueError(f"exclude: {pattern!r} matches no parameter{closest(pattern, names)}")
        found |= hits
    return found


def closest(name: str, names: Iterable[str]) -> str:
    """A hint at what may have been meant."""
    near = difflib.get_close_matches(name, list(names), n=3, cutoff=0.5)
    return f"; closest: {', '.join(near)}" if near else ""
