"""Layer groups: a model's parameters, cut from input to output into what opens and closes together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, count, groupby, takewhile
from typing import Any, Literal

from torch import nn

from fastft.names import MOST_LISTED, clean, listed, matching

from .wrappers import peel

Kind = Literal["embeddings", "block", "norm", "head", "other"]
# The kind of a group that was given under one of these names; all others are blocks.
KIND_OF_NAME: dict[str, Kind] = {"embeddings": "embeddings", "norm": "norm", "final_norm": "norm", "head": "head"}
TREE_LEVELS = 3
TREE_LINES = 40


@dataclass(frozen=True, eq=False, repr=False)
class LayerGroup:
    """Parameters that open and close together, and the modules that use them."""

    name: str
    kind: Kind
    parameters: tuple[nn.Parameter, ...]
    """Each parameter of the model is in exactly one group; a tied one in the first."""
    param_names: tuple[str, ...]
    """The name of each, without the prefixes of wrappers (DDP, compiled models, PEFT)."""
    modules: tuple[nn.Module, ...]
    """The largest modules that are called and hold nothing of another group, but for ``shared``."""
    shared: tuple[str, ...] = ()
    """Names under which its modules use parameters that belong to an earlier group (tied weights)."""

    @property
    def numel(self) -> int:
        """The number of elements of its parameters."""
        return sum(p.numel() for p in self.parameters)

    def __repr__(self) -> str:
        shared = f", shares {', '.join(self.shared)}" if self.shared else ""
        return f"LayerGroup({self.name!r}, {self.kind}, {len(self.parameters)} parameters, {self.numel:,}{shared})"


GroupPatterns = Mapping[str, str | Sequence[str]] | Sequence[str | Sequence[str] | LayerGroup]
"""The argument ``groups``: patterns by name, or a list of patterns, of lists of patterns, or of ready groups."""


@dataclass(eq=False)
class Draft:
    """A group to be: its name, and the names of the parameters its modules use."""

    name: str
    kind: Kind
    uses: list[str]
    owns: list[str] = field(default_factory=list)
    shared: list[str] = field(default_factory=list)
    modules: list[nn.Module] = field(default_factory=list)


def layer_groups(model: nn.Module, groups: GroupPatterns | None = None) -> list[LayerGroup]:
    """The model's parameters in groups, from input to output.

    Without ``groups``, it looks for the outermost lists of blocks: every ``nn.ModuleList`` or ``nn.Sequential`` whose
    children with parameters are alike (one class, or a common one below ``nn.Module``) and have modules inside. Each
    of their children becomes a group of kind ``"block"``, named by its path. Modules registered before the first are
    the group ``"embeddings"``; between two lists, a group named by its path; after the last, ``"final_norm"`` (norms
    that follow directly) and ``"head"``. An ``nn.Sequential`` without such lists gives a group for each child with
    parameters, the last of which is the head. A tied parameter is in the first group that uses it; a group that is
    left with none of its own (a tied ``lm_head``) is merged into the one before it.

    Args:
        model: any module, also one that is compiled or wrapped for DDP, FSDP or PEFT.
        groups: the groups, from input to output: a list whose items are module names, parameter names or
            glob patterns, or lists of these; or a dict from group names to them (``"embeddings"``, ``"norm"``,
            ``"final_norm"`` and ``"head"`` get their kind by name, all others are blocks); or groups made before.
            Every parameter has to be in exactly one.

    Raises:
        ValueError: a model without such lists, with its tree and an example of ``groups``; or ``groups`` that leave a
            parameter out, take one in twice, or match nothing, with all names concerned.
    """
    root = peel(model)
    named = {clean(name): p for name, p in root.named_parameters(remove_duplicate=False)}
    if not named:
        raise ValueError(f"{type(root).__name__}: expected a model with parameters, got none")
    if groups is None:
        drafts = read(root)
    else:
        if not isinstance(groups, Mapping) and groups and all(isinstance(g, LayerGroup) for g in groups):
            return checked([g for g in groups if isinstance(g, LayerGroup)], named)
        drafts = chosen(groups, named)
    return build(root, drafts, named)


# -- reading a model -----------------------------------------------------------------------------------------


@dataclass
class Piece:
    """A module that stays in one group, or the parameters that a container holds itself; and its path."""

    path: str
    module: nn.Module
    is_block: bool = False
    direct: bool = False

    @property
    def names(self) -> list[str]:
        found = self.module.named_parameters(recurse=not self.direct, remove_duplicate=False)
        return [clean(f"{self.path}.{name}" if self.path else name) for name, _ in found]

    def rereads(self, seen: set[int]) -> bool:
        """Whether it holds only embeddings that an earlier piece has too, as decoders often do."""
        holders = [m for m in self.module.modules() if any(True for _ in m.parameters(recurse=False))]
        return all(isinstance(m, nn.Embedding) for m in holders) and all(
            id(p) in seen for p in self.module.parameters()
        )

    @property
    def is_norm(self) -> bool:
        return not self.direct and "norm" in type(peel(self.module)).__name__.lower()


def read(root: nn.Module) -> list[Draft]:
    """The groups that the lists of blocks suggest."""
    pieces, seen = [], set[int]()
    for piece in pieces_of(root, ""):
        if piece.names and not piece.rereads(seen):
            pieces.append(piece)
            seen.update(id(p) for p in piece.module.parameters())
    if not any(piece.is_block for piece in pieces):
        return read_sequential(root)
    first = next(i for i, piece in enumerate(pieces) if piece.is_block)
    last = max(i for i, piece in enumerate(pieces) if piece.is_block)
    tail = last + 1
    while tail < len(pieces) and pieces[tail].is_norm:
        tail += 1

    drafts: list[Draft] = []

    def add(name: str, kind: Kind, among: list[Piece]) -> None:
        if among:
            drafts.append(Draft(unique(name, drafts), kind, [name for piece in among for name in piece.names]))

    add("embeddings", "embeddings", pieces[:first])
    between: list[Piece] = []
    for piece in pieces[first : last + 1]:
        if piece.is_block:
            add(common_path(between), "norm" if all(u.is_norm for u in between) else "other", between)
            between = []
            add(clean(piece.path), "block", [piece])
        else:
            between.append(piece)
    add("final_norm", "norm", pieces[last + 1 : tail])
    add("head", "head", pieces[tail:])
    return drafts


def pieces_of(module: nn.Module, path: str) -> Iterator[Piece]:
    """The pieces of a model in the order in which they were registered."""
    inner = peel(module)
    if not holds_blocks(inner):
        yield Piece(path, module)
        return
    if any(True for _ in inner.parameters(recurse=False)):
        yield Piece(path, inner, direct=True)
    listed = is_block_list(inner)
    for name, child in inner.named_children():
        where = f"{path}.{name}" if path else name
        if listed:
            yield Piece(where, child, is_block=True)
        else:
            yield from pieces_of(child, where)


def holds_blocks(module: nn.Module) -> bool:
    """Whether it is, or has inside, a list of blocks."""
    return any(is_block_list(m) for m in module.modules())


def is_block_list(module: nn.Module) -> bool:
    """Whether it is a list of modules that are alike and have modules inside."""
    if not isinstance(module, (nn.ModuleList, nn.Sequential)):
        return False
    blocks = [peel(child) for child in module.children() if any(True for _ in child.parameters())]
    if not blocks or not all(any(True for _ in block.children()) for block in blocks):
        return False
    ancestors = [[c for c in type(b).__mro__ if issubclass(c, nn.Module) and c is not nn.Module] for b in blocks]
    return any(all(c in other for other in ancestors) for c in ancestors[0])


def read_sequential(root: nn.Module) -> list[Draft]:
    """One group for each child of the ``nn.Sequential`` that the model is, or is a wrapper around."""
    module, path = root, ""
    while not isinstance(module, nn.Sequential):
        children = [(name, child) for name, child in module.named_children() if any(True for _ in child.parameters())]
        if len(children) != 1 or any(True for _ in module.parameters(recurse=False)):
            raise unreadable(root)
        path, module = f"{path}{children[0][0]}.", peel(children[0][1])
    pieces = [Piece(path + name, child) for name, child in module.named_children()]
    pieces = [piece for piece in pieces if piece.names]
    return [Draft(clean(piece.path), "head" if piece is pieces[-1] else "block", piece.names) for piece in pieces]


def common_path(pieces: list[Piece]) -> str:
    """The path that the pieces have in common; all of theirs where they have none."""
    paths = [clean(piece.path) for piece in pieces]
    parts = zip(*(path.split(".") for path in paths), strict=False)
    common = takewhile(lambda at: len(set(at)) == 1, parts)
    return ".".join(at[0] for at in common) or "+".join(paths)


def unique(name: str, drafts: list[Draft]) -> str:
    """The name, with a number where another group has it already."""
    taken = {draft.name for draft in drafts}
    return next(n for n in chain([name], (f"{name}_{i}" for i in count(2))) if n not in taken)


def unreadable(root: nn.Module) -> ValueError:
    """The error that shows what the model looks like and what to pass."""
    children = [name for name, child in root.named_children() if any(True for _ in child.parameters())]
    suggested = [name for name, _ in root.named_parameters(recurse=False)] + children
    return ValueError(
        f"{type(root).__name__}: cannot tell its layers: it is no nn.Sequential, and has no nn.ModuleList or "
        "nn.Sequential of like modules with modules inside. Its tree:\n"
        + "\n".join(tree(root))
        + "\nPass module names or glob patterns, from input to output, for instance "
        + f"groups={suggested[:MOST_LISTED]}{' (and so on)' if len(suggested) > MOST_LISTED else ''}"
    )


def outline(module: nn.Module) -> tuple[str, int]:
    """A module's class and size."""
    return type(module).__name__, sum(p.numel() for p in module.parameters())


def tree(root: nn.Module) -> list[str]:
    """A model's outline: names, classes and sizes, three levels of it, like children in one line."""
    lines: list[str] = []

    def add(module: nn.Module, level: int) -> None:
        indent = "  " * (level + 1)
        for name, p in module.named_parameters(recurse=False):
            lines.append(f"{indent}{name}: {p.numel():,}")
        for (kind, size), alike in groupby(module.named_children(), key=lambda item: outline(item[1])):
            (name, child), *others = alike
            names = f"{name} … {others[-1][0]}" if others else name
            lines.append(f"{indent}{names}: {kind}{f', {size:,}' if size else ''}")
            if level < TREE_LEVELS and any(True for _ in child.children()):
                add(child, level + 1)

    lines.append(f"  {type(root).__name__}")
    add(root, 1)
    return lines if len(lines) <= TREE_LINES else [*lines[:TREE_LINES], "    …"]


# -- groups that were given ------------------------------------------------------------------------------


def chosen(groups: GroupPatterns, named: Mapping[str, nn.Parameter]) -> list[Draft]:
    """The groups that the patterns describe."""
    drafts: list[Draft] = []
    for name, patterns in patterns_of(groups):
        uses = matching(map(clean, patterns), named, "groups")
        drafts.append(Draft(unique(name, drafts), KIND_OF_NAME.get(name, "block"), uses))
    takers: dict[str, list[str]] = {}
    for draft in drafts:
        for name in draft.uses:
            takers.setdefault(name, []).append(draft.name)
    covered = {id(named[name]) for name in takers}
    missing = [name for i, name in first_names(named).items() if i not in covered]
    twice = [f"{name} (in {' and '.join(repr(t) for t in by)})" for name, by in takers.items() if len(by) > 1]
    refuse_cover(missing, twice)
    return drafts


def patterns_of(groups: GroupPatterns) -> Iterator[tuple[str, Sequence[str]]]:
    """(name, patterns) of each group."""
    items: Iterable[tuple[Any, Any]] = groups.items() if isinstance(groups, Mapping) else ((None, g) for g in groups)
    for name, patterns in items:
        several = [patterns] if isinstance(patterns, str) else patterns
        if not isinstance(several, Sequence) or not several or not all(isinstance(p, str) for p in several):
            raise ValueError(
                "groups: expected module names, glob patterns or lists of them (or only groups from layer_groups), "
                f"got {patterns!r:.80}"
            )
        yield name or "+".join(p.removesuffix(".*") for p in several), several


def checked(groups: list[LayerGroup], named: Mapping[str, nn.Parameter]) -> list[LayerGroup]:
    """Ready groups, if they are groups of this model."""
    takers: dict[int, list[LayerGroup]] = {}
    for group in groups:
        for p in group.parameters:
            takers.setdefault(id(p), []).append(group)
    known = first_names(named)
    strange = [group.name for group in groups if any(id(p) not in known for p in group.parameters)]
    if strange:
        raise ValueError(f"groups: {strange[0]!r} holds parameters that the model does not have")
    names = [group.name for group in groups]
    if len(set(names)) < len(names):
        raise ValueError(f"groups: expected names that differ, got {names}")
    refuse_cover(
        [name for i, name in known.items() if i not in takers],
        [f"{known[i]} (in {' and '.join(repr(g.name) for g in by)})" for i, by in takers.items() if len(by) > 1],
    )
    return groups


def first_names(named: Mapping[str, nn.Parameter]) -> dict[int, str]:
    """The first name of each parameter, by its id, in order."""
    names: dict[int, str] = {}
    for name, p in named.items():
        names.setdefault(id(p), name)
    return names


def refuse_cover(missing: list[str], twice: list[str]) -> None:
    """Raise unless every parameter is in exactly one group."""
    if missing or twice:
        problems = [("in none", missing), ("in several", twice)]
        raise ValueError(
            "\n".join(
                ["groups: expected every parameter in exactly one group, got"]
                + [f"  {what}: {listed(names, quoted=False)}" for what, names in problems if names]
            )
        )


# -- making them ---------------------------------------------------------------------------------------------


def build(root: nn.Module, drafts: list[Draft], named: Mapping[str, nn.Parameter]) -> list[LayerGroup]:
    """Assign tied parameters to groups, merge groups that are left empty, and find the modules."""
    holders = dict(holders_of(root))
    owner: dict[int, tuple[Draft, str]] = {}
    place: dict[str, Draft] = {}  # name → the group whose modules it is used in
    for draft in drafts:
        for name in draft.uses:
            first, first_name = owner.setdefault(id(named[name]), (draft, name))
            # A table of embeddings that is read in a second place (a decoder's) is the same layer there.
            same = isinstance(holders[name], nn.Embedding) and isinstance(holders[first_name], nn.Embedding)
            place[name] = first if same else draft
            if first_name == name:
                draft.owns.append(name)
            elif first is not draft and not same:
                draft.shared.append(name)
    for name, p in named.items():
        place.setdefault(name, owner[id(p)][0])
    kept: list[Draft] = []
    merged: dict[int, Draft] = {}
    for draft in drafts:
        if draft.owns or not kept:
            kept.append(draft)
        else:
            merged[id(draft)] = kept[-1]
            kept[-1].shared += [n for n in draft.shared if owner[id(named[n])][0] is not kept[-1]]
    place = {name: merged.get(id(draft), draft) for name, draft in place.items()}
    assign_modules(root, "", place, kept, set())
    return [
        LayerGroup(
            draft.name,
            draft.kind,
            tuple(named[name] for name in draft.owns),
            tuple(draft.owns),
            tuple(draft.modules),
            tuple(draft.shared),
        )
        for draft in kept
    ]


def holders_of(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, the module that holds it) for each name of each parameter."""
    for path, module in root.named_modules(remove_duplicate=False):
        for name, _ in module.named_parameters(recurse=False, remove_duplicate=False):
            yield clean(f"{path}.{name}" if path else name), module


def assign_modules(
    module: nn.Module, path: str, place: Mapping[str, Draft], drafts: list[Draft], seen: set[int], at: int = 0
) -> int:
    """Give each group the largest modules that are its own and are called; returns the last group's index.

    Modules without parameters (dropout, a norm without weights) go with the module registered before them.
    """
    prefix = f"{path}." if path else ""
    found = module.named_parameters(remove_duplicate=False)
    users = {id(d): d for name, _ in found if (d := place.get(clean(prefix + name))) is not None}
    called = type(module).forward is not nn.Module.forward
    if called and len(users) <= 1:
        draft = next(iter(users.values()), drafts[at])
        if id(module) not in seen:
            seen.add(id(module))
            draft.modules.append(module)
        return drafts.index(draft)
    for name, child in module.named_children():
        at = assign_modules(child, prefix + name, place, drafts, seen, at)
    return at
