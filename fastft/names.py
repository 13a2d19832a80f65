"""Parameter names: patterns over them, the parts that wrappers add, and the closest to a mistyped one."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase

from torch import Tensor, nn

__all__ = ["NameIndex", "bare", "clean", "closest", "covers", "listed", "matching", "named_tensors"]

# Parts of a path that wrappers inside a model add: torch.compile, FSDP, activation checkpointing.
ADDED = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
PEFT_PREFIX = "base_model.model."
DDP_PREFIX = "module."

MOST_LISTED = 12  # names in an error


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


def covers(pattern: str, name: str) -> bool:
    """Whether a pattern (a name, a glob pattern, or a module that the name lies in) covers a name."""
    return name == pattern or name.startswith(pattern + ".") or fnmatchcase(name, pattern)


def matching(patterns: str | Iterable[str], names: Iterable[str], argument: str = "exclude") -> list[str]:
    """The names that any of the patterns covers, each once.

    Raises:
        ValueError: a pattern covers none; ``argument`` is where it was given.
    """
    known = list(names)
    found: dict[str, None] = {}
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        hits = [name for name in known if covers(pattern, name)]
        if not hits:
            raise ValueError(f"{argument}: {pattern!r} matches no parameter{closest(pattern, known)}")
        found.update(dict.fromkeys(hits))
    return list(found)


def closest(name: str, names: Iterable[str]) -> str:
    """A hint at what may have been meant."""
    near = difflib.get_close_matches(name, list(names), n=3, cutoff=0.5)
    return f"; closest: {', '.join(near)}" if near else ""


def clean(name: str) -> str:
    """The name of a parameter or module without the parts that wrappers inside a model add."""
    return ADDED.sub("", name).removeprefix(PEFT_PREFIX)


def bare(name: str) -> str:
    """The name without the prefix of DDP as well. A model may have a child called "module": look for others first."""
    name, before = clean(name), None
    while name != before:
        name, before = clean(name.removeprefix(DDP_PREFIX)), name
    return name


class NameIndex:
    """Finds the one of several names that means the same parameter, whatever wrappers have added to either."""

    def __init__(self, names: Iterable[str]) -> None:
        self.names = dict.fromkeys(names)
        self.shortened: list[tuple[Callable[[str], str], dict[str, list[str]]]] = []
        for shorten in (clean, bare):
            by_short: dict[str, list[str]] = {}
            for name in self.names:
                by_short.setdefault(shorten(name), []).append(name)
            self.shortened.append((shorten, by_short))

    def find(self, name: str) -> str | None:
        """The name itself, or the one that is equal to it without what wrappers add; None if there is none.

        Raises:
            ValueError: several are equal to it then.
        """
        if name in self.names:
            return name
        for shorten, by_short in self.shortened:
            found = by_short.get(shorten(name), [])
            if len(found) > 1:
                several = ", ".join(found)
                raise ValueError(f"{name}: expected one name that differs by wrappers' parts only, got {several}")
            if found:
                return found[0]
        return None


def listed(names: Iterable[str], *, quoted: bool = True) -> str:
    """Names separated by commas; of many the first, and how many more there are."""
    shown = [repr(name) if quoted else name for name in names]
    more = len(shown) - MOST_LISTED
    return ", ".join(shown[:MOST_LISTED]) + (f" and {more} more" if more > 0 else "")
