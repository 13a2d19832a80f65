"""``fuse_dropout_``: fastft's dropout in a model that is there already.

Every ``nn.Dropout`` becomes a :class:`fastft.nn.Dropout` by a change of its class. Where a module's ``forward`` adds to
what was dropped, it is given one that does both at once: its own source, in which

.. code-block:: python

    hidden_states = self.dropout(hidden_states)
    hidden_states = self.LayerNorm(hidden_states + input_tensor)

became one call. So it is the code that is recognised, and not the name or the release of the model: BERT, RoBERTa, ViT
and GPT-2 are written like this, and so are many others. The new ``forward`` sits in a subclass of the same name, made
for the purpose; parameters, buffers, hooks and names stay where they are.
"""

from __future__ import annotations

import ast
import copy
import functools
import inspect
import linecache
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import CodeType, FunctionType
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.nn.modules.dropout import _DropoutNd

from . import functional
from .modules import Dropout

RESIDUAL = "fastft_residual"  # the argument by which a block hands its residual to a part that ends in a dropout
SWAPPED = "_fastft_swapped"  # set on dropouts whose class was changed

# What a submodule is to the code that calls it.
DROPOUT, NORM, TAIL = "dropout", "norm", "tail"
Roles = tuple[tuple[str, str], ...]  # (path from self, one of these)

Class: TypeAlias = Any  # of modules; functools.cache cannot be told that these can be hashed


# -- what the new forwards call ----------------------------------------------------------------------------


def unhooked(module: nn.Module) -> bool:
    """Whether nobody watches the module's calls: what is watched must be called."""
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
        or "forward" in module.__dict__
    )


def drops_simply(module: nn.Module) -> bool:
    return type(module) in (Dropout, nn.Dropout) and not module.inplace and unhooked(module)


def dropout_add(drop: Any, x: Tensor, residual: Tensor | None) -> Tensor:
    """drop(x) + residual."""
    if residual is None:
        return drop(x)  # type: ignore[no-any-return]
    if drops_simply(drop):
        return functional.bias_dropout_add(x, None, residual, drop.p, drop.training)
    return drop(x) + residual  # type: ignore[no-any-return]


def dropout_add_norm(norm: Any, drop: Any, x: Tensor, residual: Tensor) -> Tensor:
    """norm(drop(x) + residual)."""
    if type(norm) in (nn.LayerNorm, nn.RMSNorm) and unhooked(norm) and drops_simply(drop):
        shape, rate, training = norm.normalized_shape, drop.p, drop.training
        if type(norm) is nn.RMSNorm:
            return functional.dropout_add_rms_norm(x, residual, shape, norm.weight, rate, training, norm.eps)
        return functional.dropout_add_layer_norm(x, residual, shape, norm.weight, norm.bias, rate, training, norm.eps)
    return norm(dropout_add(drop, x, residual))  # type: ignore[no-any-return]


def with_residual(child: Any, residual: Tensor) -> Callable[..., Any]:
    """``child``, with the residual added to (the first of) what it returns."""
    if getattr(type(child), "fastft_tail", False) and unhooked(child):
        return functools.partial(child, **{RESIDUAL: residual})

    def call(*args: Any, **kwargs: Any) -> Any:
        result = child(*args, **kwargs)
        if isinstance(result, tuple):
            return (result[0] + residual, *result[1:])
        return result + residual

    return call


HELPERS: dict[str, Callable[..., Any]] = {
    "_fastft_add": dropout_add,
    "_fastft_add_norm": dropout_add_norm,
    "_fastft_with_residual": with_residual,
}


# -- the source of a forward -------------------------------------------------------------------------------


class NotReadable(Exception):
    """Why a forward cannot be rewritten."""


@dataclass(frozen=True)
class Source:
    """A class's forward: the function inside of its decorators, and its syntax tree."""

    function: FunctionType
    tree: ast.FunctionDef
    decorators: tuple[ast.expr, ...]

    @property
    def self_name(self) -> str:
        return self.tree.args.args[0].arg

    def calls(self) -> set[str]:
        """Paths from self of what is called: {"dense", "attention.output"}."""
        found = (self_path(node.func, self.self_name) for node in ast.walk(self.tree) if isinstance(node, ast.Call))
        return {path for path in found if path is not None}


@functools.cache
def source_of(cls: Class) -> Source | NotReadable:
    """The forward of a class, or why it cannot be had."""
    try:
        return read_source(cls)
    except NotReadable as why:
        return why


def read_source(cls: Class) -> Source:
    function = inspect.unwrap(cls.forward)
    if not isinstance(function, FunctionType):
        raise NotReadable("its forward is no Python function")
    if function.__code__.co_freevars:
        raise NotReadable("its forward uses super() or variables of an enclosing function")
    try:
        lines, first = inspect.getsourcelines(function)
        # In a block of its own, so that indentation may stay what it is.
        block = ast.parse("if True:\n" + "".join(lines) if lines[0][:1].isspace() else "".join(lines))
    except (OSError, TypeError, SyntaxError) as error:
        raise NotReadable(f"the source of its forward cannot be read ({type(error).__name__})") from error
    body = block.body[0].body if isinstance(block.body[0], ast.If) else block.body
    tree = body[0]
    if len(body) != 1 or not isinstance(tree, ast.FunctionDef) or not tree.args.args:
        raise NotReadable("its forward is no plain method")
    ast.increment_lineno(tree, first - tree.decorator_list[0].lineno if tree.decorator_list else first - tree.lineno)
    decorators = tuple(tree.decorator_list)
    # What was evaluated when the class was made (defaults, annotations, decorators) is taken from the function later.
    tree.decorator_list, tree.returns = [], None
    arguments = tree.args
    arguments.defaults, arguments.kw_defaults = [], [None] * len(arguments.kwonlyargs)
    every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
    for argument in every:
        if argument is not None:
            argument.annotation = None
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr.startswith("__") and not node.attr.endswith("__"):
            raise NotReadable("its forward uses names that are private to the class")
        if isinstance(node, (ast.Global, ast.Nonlocal, ast.Yield, ast.YieldFrom)) or (
            isinstance(node, ast.Name) and node.id in ("locals", "eval", "exec")
        ):
            raise NotReadable("its forward uses what cannot be rewritten")
    filename = function.__code__.co_filename
    if function.__code__ not in functions_in("".join(linecache.getlines(filename)), filename):
        raise NotReadable("the source of its forward is not what runs")
    return Source(function, tree, decorators)


@functools.lru_cache(maxsize=4)
def functions_in(text: str, filename: str) -> list[CodeType]:
    """The code of everything that a file with this text defines."""
    try:
        found = [compile(text, filename, "exec", dont_inherit=True)]
    except (SyntaxError, ValueError):
        return []
    for code in found:  # grows on the way
        found += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return found


def compiled(source: Source, tree: ast.FunctionDef) -> FunctionType:
    """The function that a tree made from the source's describes, undecorated, in the source's module and lines."""
    module = ast.parse(f"def _fastft_factory({', '.join(HELPERS)}): return {tree.name}")
    factory = module.body[0]
    assert isinstance(factory, ast.FunctionDef)
    factory.body.insert(0, tree)
    old = source.function
    namespace: dict[str, Any] = {}
    code = compile(ast.fix_missing_locations(module), old.__code__.co_filename, "exec", dont_inherit=True)
    exec(code, old.__globals__, namespace)
    new: FunctionType = namespace["_fastft_factory"](**HELPERS)
    new.__defaults__ = old.__defaults__
    added = {RESIDUAL: None} if any(a.arg == RESIDUAL for a in tree.args.kwonlyargs) else {}
    new.__kwdefaults__ = {**(old.__kwdefaults__ or {}), **added}
    new.__annotations__ = dict(old.__annotations__)
    new.__name__, new.__qualname__, new.__module__, new.__doc__ = (
        old.__name__,
        old.__qualname__,
        old.__module__,
        old.__doc__,
    )
    return new


# -- rewriting ---------------------------------------------------------------------------------------------


def self_path(node: ast.expr, self_name: str) -> str | None:
    """ "a.b" of ``self.a.b``; None for anything else."""
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    if names and isinstance(node, ast.Name) and node.id == self_name:
        return ".".join(reversed(names))
    return None


def loads(node: ast.AST, name: str) -> int:
    """How often a variable is read in it."""
    return sum(isinstance(n, ast.Name) and n.id == name and isinstance(n.ctx, ast.Load) for n in ast.walk(node))


@dataclass
class Rewriter:
    """Finds what can be fused in one forward, given what its submodules are."""

    source: Source
    roles: dict[str, str]
    found: list[tuple[str, str]] = field(default_factory=list)  # (path of the dropout or part, what was fused)

    def role(self, node: ast.expr) -> str | None:
        path = self_path(node, self.source.self_name)
        return None if path is None else self.roles.get(path)

    def path(self, node: ast.expr) -> str:
        return self_path(node, self.source.self_name) or ""

    def dropout_call(self, node: ast.expr | None) -> tuple[ast.expr, ast.expr] | None:
        """(self.dropout, x) of ``self.dropout(x)``."""
        if isinstance(node, ast.Call) and self.role(node.func) == DROPOUT and len(node.args) == 1 and not node.keywords:
            return node.func, node.args[0]
        return None

    # -- dropout, then an addition, perhaps then a norm

    def blocks(self, body: list[ast.stmt]) -> list[ast.stmt]:
        """The statements with everything fused in them, nested ones too."""
        result: list[ast.stmt] = []
        position = 0
        while position < len(body):
            pair = self.pair(*body[position : position + 2]) if position + 1 < len(body) else None
            if pair is not None:
                result += pair
                position += 2
                continue
            statement = body[position]
            if not isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                inner = [name for name in ("body", "orelse", "finalbody") if getattr(statement, name, None)]
                for name in inner:
                    setattr(statement, name, self.blocks(getattr(statement, name)))
                if not inner:
                    statement = Sums(self).visit(statement)
            result.append(statement)
            position += 1
        return result

    def pair(self, first: ast.stmt, second: ast.stmt) -> list[ast.stmt] | None:
        """``a = self.dropout(x)`` or ``a, … = self.part(…)``, then the one use of a: ``a + r``."""
        if not isinstance(first, ast.Assign) or len(first.targets) != 1:
            return None
        if not isinstance(second, (ast.Assign, ast.Return)) or second.value is None:
            return None
        targets = first.targets[0].elts if isinstance(first.targets[0], ast.Tuple) else [first.targets[0]]
        if not targets or not all(isinstance(t, ast.Name) for t in targets):
            return None
        names = [t.id for t in targets if isinstance(t, ast.Name)]
        dropped = self.dropout_call(first.value) if len(names) == 1 else None
        part = first.value if isinstance(first.value, ast.Call) and self.role(first.value.func) == TAIL else None
        if dropped is None and part is None:
            return None
        if loads(second, names[0]) != 1 or not self.is_dead_after(names[0], first, second):
            return None
        if any(isinstance(n, DEFERRED) for s in (first, second) for n in ast.walk(s)):
            return None
        sums = Sums(self, names, dropped, part)
        second = sums.visit(second)
        if sums.replaced is None:
            return None
        if part is None:
            return [second]
        first.value = call("_fastft_with_residual", [part.func, sums.replaced], part)
        first.value = ast.copy_location(ast.Call(func=first.value, args=part.args, keywords=part.keywords), part)
        return [first, second]

    def is_dead_after(self, name: str, first: ast.Assign, second: ast.stmt) -> bool:
        """Whether the variable is not read again with the value that ``first`` gives it."""
        if isinstance(second, ast.Return):
            return True
        assert isinstance(second, ast.Assign)
        if any(isinstance(t, ast.Name) and t.id == name for t in second.targets):
            return True
        return loads(self.source.tree, name) == loads(first.value, name) + 1

    # -- a dropout whose result is returned

    def tail(self, body: list[ast.stmt]) -> int | None:
        """Where the dropout is that makes (the first of) what is returned; None if there is none."""
        last = body[-1]
        if not isinstance(last, ast.Return) or sum(isinstance(n, ast.Return) for n in ast.walk(self.source.tree)) != 1:
            return None
        if self.dropout_call(last.value) is not None:
            return len(body) - 1
        first = last.value.elts[0] if isinstance(last.value, ast.Tuple) and last.value.elts else last.value
        before = body[-2] if len(body) > 1 else None
        if (
            isinstance(first, ast.Name)
            and isinstance(before, ast.Assign)
            and len(before.targets) == 1
            and isinstance(before.targets[0], ast.Name)
            and before.targets[0].id == first.id
            and loads(last, first.id) == 1
            and self.dropout_call(before.value) is not None
        ):
            return len(body) - 2
        return None

    def take_residual(self, tree: ast.FunctionDef) -> None:
        """Let the tail add what the caller gives."""
        position = self.tail(tree.body)
        assert position is not None
        statement = tree.body[position]
        assert isinstance(statement, (ast.Assign, ast.Return))
        dropped = self.dropout_call(statement.value)
        assert dropped is not None and statement.value is not None
        residual = ast.Name(id=RESIDUAL, ctx=ast.Load())
        statement.value = call("_fastft_add", [*dropped, residual], statement.value)
        tree.args.kwonlyargs.append(ast.arg(arg=RESIDUAL))
        tree.args.kw_defaults.append(None)


# Expressions whose parts are evaluated later, repeatedly, or bind variables themselves.
DEFERRED = (ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp, ast.NamedExpr, ast.Await)


def call(name: str, arguments: Sequence[ast.expr], instead_of: ast.expr) -> ast.Call:
    function = ast.Name(id=name, ctx=ast.Load())
    return ast.copy_location(ast.Call(func=function, args=list(arguments), keywords=[]), instead_of)


class Sums(ast.NodeTransformer):
    """Replaces sums of something dropped and a variable: ``self.dropout(x) + r``, or ``a + r`` with an ``a`` that was
    dropped before, or that a part of the module returned."""

    def __init__(
        self,
        rewriter: Rewriter,
        names: Sequence[str] = (),
        dropped: tuple[ast.expr, ast.expr] | None = None,
        part: ast.Call | None = None,
    ) -> None:
        self.rewriter, self.names, self.dropped, self.part = rewriter, names, dropped, part
        self.replaced: ast.expr | None = None  # the residual of what was replaced

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        self.generic_visit(node)
        if not isinstance(node.op, ast.Add):
            return node
        for term, residual in ((node.left, node.right), (node.right, node.left)):
            if not isinstance(residual, ast.Name) or residual.id in self.names:
                continue
            if self.names:
                if not isinstance(term, ast.Name) or term.id != self.names[0]:
                    continue
                self.replaced = residual
                if self.part is not None:
                    self.rewriter.found.append((self.rewriter.path(self.part.func), "dropout + add"))
                    return term
                dropped = self.dropped
            else:
                dropped = self.rewriter.dropout_call(term)
            if dropped is not None:
                self.rewriter.found.append((self.rewriter.path(dropped[0]), "dropout + add"))
                return call("_fastft_add", [*dropped, residual], node)
        return node

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        if self.rewriter.role(node.func) != NORM or len(node.args) != 1 or node.keywords:
            return node
        inner = node.args[0]
        if isinstance(inner, ast.Call) and isinstance(inner.func, ast.Name) and inner.func.id == "_fastft_add":
            path, _ = self.rewriter.found.pop()
            self.rewriter.found.append((path, "dropout + add + norm"))
            return call("_fastft_add_norm", [node.func, *inner.args], node)
        return node

    def visit_Lambda(self, node: ast.Lambda) -> ast.AST:
        return node


# -- the classes -------------------------------------------------------------------------------------------


class Fused:
    """What the classes made here have in common; each of them has these."""

    fastft_original: Class
    fastft_roles: Roles
    fastft_tail: bool  # takes the residual as an argument
    fastft_found: tuple[tuple[str, str], ...]

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced = super().__reduce_ex__(protocol)
        cls = type(self)
        if "fastft_original" not in cls.__dict__ or protocol < 2:  # a class that was made from ours
            return reduced
        return (rebuild, (cls.fastft_original, cls.fastft_roles, cls.fastft_tail), *reduced[2:])


def rebuild(original: Class, roles: Roles, tail: bool) -> nn.Module:
    """An empty module for ``pickle`` and ``copy``; of the original class where it no longer can be rewritten."""
    try:
        cls = fused_class(original, roles, tail) or original
    except NotReadable:
        cls = original
    return cls.__new__(cls)  # type: ignore[no-any-return]


@functools.cache
def fused_class(cls: Class, roles: Roles, tail: bool) -> Class | None:
    """A subclass whose forward does at once what can be done at once; None if there is nothing.

    Args:
        roles: what the submodules are.
        tail: let it take a residual for the dropout that it ends in.
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
    """The code of what a function is wrapped in."""
    while hasattr(function, "__wrapped__"):
        yield getattr(function, "__code__", type(function))
        function = function.__wrapped__


# -- the model ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FuseReport:
    """What :func:`fuse_dropout_` did. ``str()`` of it is a table."""

    fused: tuple[tuple[str, str], ...] = ()
    """(module, what its forward now does at once: "dropout + add", "dropout + add + norm")."""
    swapped: tuple[str, ...] = ()
    """The dropouts that are fastft's now."""
    left: tuple[tuple[str, str], ...] = ()
    """(module or attribute, why it was left as it is)."""

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
    a part that ends in a dropout: in Hugging Face's BERT, RoBERTa, ViT and GPT-2, and what is written like them.

    Parameter names, state dicts, hooks and modes stay as they are, evaluation gives the same outputs (up to rounding
    where a norm is fused), and copies and pickles of the model are like it. A module that is watched by hooks when it
    is called is computed as before. What does not match is left and reported, such as dropout inside of attention
    functions, which get a probability and no module.

    Args:
        model: any module.

    Returns what was done. Calling it again does what is left to do. See :func:`unfuse_dropout_` for the way back.
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

    parts: set[int] = set()  # modules to which a block above hands its residual
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
    return FuseReport(tuple(fused), tuple(swapped), tuple(left))


def unfuse_dropout_(model: nn.Module) -> None:
    """Undo :func:`fuse_dropout_`: every module gets its class back. Dropouts that were fastft's before stay so."""
    for module in model.modules():
        cls: Class = type(module)
        if "fastft_original" in cls.__dict__:
            module.__class__ = cls.fastft_original
        elif cls is Dropout and module.__dict__.pop(SWAPPED, False):
            module.__class__ = nn.Dropout


def roles_of(module: nn.Module, source: Source) -> Roles:
    """What the submodules are that a forward calls."""
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
    """Whether a module returns what a dropout of its own made."""
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
    """Dropouts of which a forward takes the probability instead of calling them."""
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
