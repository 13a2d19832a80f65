"""``fuse_dropout_``: fastft's dropout in a model that exists already.

Every ``nn.Dropout`` becomes a :class:`fastft.nn.Dropout` by a change of its class. A module whose ``forward`` adds to a
dropout's result gets a new forward that does both at once: its own source, in which

.. code-block:: python

    hidden_states = self.dropout(hidden_states)
    hidden_states = self.LayerNorm(hidden_states + input_tensor)

became one call (:mod:`.fuse_patterns`). So models are recognised by their code, not by name or release: BERT, RoBERTa,
ViT and GPT-2 are written like this, and so are many others. The new ``forward`` is in a subclass of the same name;
parameters, buffers, hooks and names stay.
"""

from __future__ import annotations

import ast
import copy
import functools
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from .fuse_patterns import (
    DROPOUT,
    NORM,
    TAIL,
    Class,
    NotReadable,
    Rewriter,
    Roles,
    Source,
    compiled,
    self_path,
    source_of,
)
from .modules import Dropout

SWAPPED = "_fastft_swapped"  # set on dropouts whose class was changed


# -- the classes -------------------------------------------------------------------------------------------


class Fused:
    """Base of the classes that :func:`fused_class` makes. Each of them has these attributes."""

    fastft_original: Class
    fastft_roles: Roles
    fastft_tail: bool  # whether it takes a residual as an argument
    fastft_found: tuple[tuple[str, str], ...]  # (path of the dropout or tail, the pattern)

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced = super().__reduce_ex__(protocol)
        cls = type(self)
        if "fastft_original" not in cls.__dict__ or protocol < 2:  # a subclass of the fused class
            return reduced
        return (rebuild, (cls.fastft_original, cls.fastft_roles, cls.fastft_tail), *reduced[2:])


def rebuild(original: Class, roles: Roles, tail: bool) -> nn.Module:
    """An empty module for ``pickle`` and ``copy``, of the fused class; of the original where that cannot be made."""
    try:
        cls = fused_class(original, roles, tail) or original
    except NotReadable:
        cls = original
    return cls.__new__(cls)  # type: ignore[no-any-return]


@functools.cache
def fused_class(cls: Class, roles: Roles, tail: bool) -> Class | None:
    """A subclass whose forward is fused; None if nothing in it can be.

    Args:
        roles: the roles of the submodules.
        tail: whether the forward, which ends in a dropout, is to take a residual.

    Raises:
        NotReadable: the forward cannot be rewritten.
    """
    source = source_of(cls)
    if isinstance(source, NotReadable):
        raise source
    tree = copy.deepcopy(source.tree)
    rewriter = Rewriter(Source(source.function, tree, source.decorators), dict(roles))
    if tail:
        rewriter.take_residual(tree)
    tree.body = rewriter.blocks(tree.body)
    if not rewriter.found and not tail:
        return None
    forward: Any = compiled(source, tree)
    for decorator in reversed(source.decorators):
        expression = ast.fix_missing_locations(ast.Expression(body=decorator))
        filename = source.function.__code__.co_filename
        forward = eval(compile(expression, filename, "eval", dont_inherit=True), source.function.__globals__)(forward)
    namespace = {
        "forward": forward,
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,  # tools that look for a class by its name find this one too
        "__doc__": cls.__doc__,
        "fastft_original": cls,
        "fastft_roles": roles,
        "fastft_tail": tail,
        "fastft_found": tuple(rewriter.found),
    }
    made: Class = type(cls)(cls.__name__, (Fused, cls), namespace)
    if list(wrappers(made.forward)) != list(wrappers(cls.forward)):
        raise NotReadable("something else has wrapped its forward")
    return made


def wrappers(function: Any) -> Iterator[Any]:
    """The code of a function's wrappers, from the outside in."""
    while hasattr(function, "__wrapped__"):
        yield getattr(function, "__code__", type(function))
        function = function.__wrapped__


# -- the model ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FuseReport:
    """The changes that :func:`fuse_dropout_` made. ``str()`` of it is a table; :meth:`undo` takes them back."""

    model: nn.Module = field(repr=False, compare=False)
    """The model that was changed."""
    fused: tuple[tuple[str, str], ...] = ()
    """(module, the operations that its forward now does at once: "dropout + add" or "dropout + add + norm")."""
    swapped: tuple[str, ...] = ()
    """The dropouts that became fastft's."""
    left: tuple[tuple[str, str], ...] = ()
    """(module or attribute that was left as it is, the reason)."""

    def undo(self) -> None:
        """Give every module of the model its class back, also those that an earlier call changed.

        Dropouts that were fastft's before stay so. A copy of the model, or a model whose report is lost, is undone by
        the report of another call: ``fuse_dropout_(model).undo()``.
        """
        for module in self.model.modules():
            cls: Class = type(module)
            if "fastft_original" in cls.__dict__:
                module.__class__ = cls.fastft_original
            elif cls is Dropout and module.__dict__.pop(SWAPPED, False):
                module.__class__ = nn.Dropout

    def __str__(self) -> str:
        rows = [("fused", name, what) for name, what in self.fused]
        rows += [("swapped", name, "") for name in self.swapped]
        rows += [("left", name, why) for name, why in self.left]
        # Layers that differ in their number only share a line.
        lines = Counter((kind, re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", name), what) for kind, name, what in rows)
        if not lines:
            return "no dropout found"
        width = max(len(name) for _, name, _ in lines)
        return "\n".join(
            f"{kind:7}  {count:4}  {name:{width}}  {what}".rstrip() for (kind, name, what), count in lines.items()
        )


def fuse_dropout_(model: nn.Module) -> FuseReport:
    """Swap a model's dropout for fastft's, fused with the additions and norms behind it, in place.

    Every ``nn.Dropout`` becomes a :class:`fastft.nn.Dropout`. ``dropout + residual`` and ``norm(dropout + residual)``
    (LayerNorm, RMSNorm) become one operation wherever a ``forward`` spells them out, or a block adds to the result of
    a part that ends in a dropout: in Hugging Face's BERT, RoBERTa, ViT and GPT-2, and in models written like them.

    Parameter names, state dicts, hooks and modes stay as they are, evaluation gives the same outputs (up to rounding
    where a norm is fused), and copies and pickles of the model are fused too. A module that hooks watch is called as
    before. Whatever does not match is left and reported, such as dropout inside attention functions, which take a
    probability instead of a module.

    Args:
        model: any module. It may be fused already: then only what is new in it is changed.

    Returns:
        A report of the changes, whose :meth:`FuseReport.undo` takes them back.
    """
    modules = dict(model.named_modules())
    swapped, fused, left = [], [], []
    for name, module in modules.items():
        if type(module) is nn.Dropout:
            module.__class__ = Dropout
            module.__dict__[SWAPPED] = True
            swapped.append(name)
        elif isinstance(module, _DropoutNd) and not isinstance(module, Dropout):
            left.append((name, f"{type(module).__name__} is not nn.Dropout itself"))
        else:
            left += [(".".join(filter(None, (name, attribute))), why) for attribute, why in numbers_of(module)]

    parts: set[int] = set()  # tails to which the module that calls them passes its residual
    for name, module in modules.items():  # from the outside in
        cls: Class = type(module)
        if isinstance(module, (Fused, _DropoutNd, torch.jit.ScriptModule)):
            continue
        has_dropout = any(isinstance(child, nn.Dropout) for child in module.children())
        if not has_dropout and not any(ends_in_dropout(child) for child in module.children()):
            continue
        source = source_of(cls)
        try:
            if isinstance(source, NotReadable):
                raise source
            if "forward" in module.__dict__:
                raise NotReadable("its forward was replaced on the module itself")
            roles = roles_of(module, source)
            made = fused_class(cls, roles, id(module) in parts)
        except NotReadable as why:
            parts.discard(id(module))
            if has_dropout:
                left.append((name, f"{why}: dropout and what follows it were not fused"))
            continue
        left += [(".".join(filter(None, (name, path))), why) for path, why in only_read(module, source)]
        if made is None:
            continue
        module.__class__ = made
        fused += [(name, what) for _, what in made.fastft_found]
        parts.update(id(module.get_submodule(path)) for path, _ in made.fastft_found if dict(roles)[path] == TAIL)
    return FuseReport(model, tuple(fused), tuple(swapped), tuple(left))


def roles_of(module: nn.Module, source: Source) -> Roles:
    """The roles of the submodules that a forward calls."""
    roles = {}
    for path in source.calls():
        try:
            child = module.get_submodule(path)
        except AttributeError:
            continue
        if type(child) is Dropout:
            roles[path] = DROPOUT
        elif type(child) in (nn.LayerNorm, nn.RMSNorm):
            roles[path] = NORM
        elif ends_in_dropout(child):
            roles[path] = TAIL
    return tuple(sorted(roles.items()))


def ends_in_dropout(module: nn.Module) -> bool:
    """Whether a module returns the result of a dropout that is its child."""
    if isinstance(module, _DropoutNd) or not any(type(child) is Dropout for child in module.children()):
        return False
    if isinstance(module, Fused) or "forward" in module.__dict__:
        return False
    cls: Class = type(module)
    source = source_of(cls)
    if isinstance(source, NotReadable):
        return False
    dropouts = {name: DROPOUT for name, child in module.named_children() if type(child) is Dropout}
    return Rewriter(source, dropouts).tail(source.tree.body) is not None


def only_read(module: nn.Module, source: Source) -> Iterator[tuple[str, str]]:
    """Dropouts whose probability a forward reads instead of calling them."""
    reads = {
        self_path(node.value, source.self_name)
        for node in ast.walk(source.tree)
        if isinstance(node, ast.Attribute) and node.attr == "p"
    }
    for path in sorted(reads - {None}):  # type: ignore[type-var]
        if any(name == path and type(child) is Dropout for name, child in module.named_children()):
            yield path, "its p goes into an attention function, which drops by itself"  # type: ignore[misc]


def numbers_of(module: nn.Module) -> Iterator[tuple[str, str]]:
    """Probabilities that a module keeps as plain numbers."""
    for attribute, value in vars(module).items():
        if "drop" in attribute and not attribute.startswith("_") and isinstance(value, float) and 0.0 < value <= 1.0:
            yield attribute, "a number, which the module hands to a function that drops by itself"
