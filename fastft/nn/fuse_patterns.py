"""The source of a ``forward``, and the patterns in it that ``fuse_dropout_`` fuses.

:func:`source_of` reads a class's forward, :class:`Rewriter` replaces the patterns in its syntax tree by calls of the
functions in :mod:`.fuse_calls`, :func:`compiled` makes a function of the tree.
"""

from __future__ import annotations

import ast
import functools
import inspect
import linecache
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import CodeType, FunctionType
from typing import Any, TypeAlias

from .fuse_calls import CALLS, RESIDUAL

# The part that a submodule plays in the code that calls it.
DROPOUT, NORM, TAIL = "dropout", "norm", "tail"  # a tail is a module that ends in a dropout
Roles = tuple[tuple[str, str], ...]  # (path from self, one of these)

Class: TypeAlias = Any  # a class of modules; functools.cache cannot know that these can be hashed


# -- the source of a forward -------------------------------------------------------------------------------


class NotReadable(Exception):
    """The reason why a forward cannot be rewritten."""


@dataclass(frozen=True)
class Source:
    """A class's forward: the function inside its decorators, and its syntax tree."""

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
    """The forward of a class, or the reason why it cannot be read."""
    try:
        return read_source(cls)
    except NotReadable as why:
        return why


def read_source(cls: Class) -> Source:
    """The forward of a class.

    Raises:
        NotReadable: its source cannot be found, does not match the code that runs, or uses what a rewritten function
            cannot.
    """
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
    # Defaults, annotations and decorators were evaluated when the class was made; the new function takes them over.
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
    """A function of a changed tree, without decorators, in the globals and lines of the source."""
    module = ast.parse(f"def _fastft_factory({', '.join(CALLS)}): return {tree.name}")
    factory = module.body[0]
    assert isinstance(factory, ast.FunctionDef)
    factory.body.insert(0, tree)
    old = source.function
    namespace: dict[str, Any] = {}
    code = compile(ast.fix_missing_locations(module), old.__code__.co_filename, "exec", dont_inherit=True)
    exec(code, old.__globals__, namespace)
    new: FunctionType = namespace["_fastft_factory"](**CALLS)
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
    """The path "a.b" of an expression ``self.a.b``; None for any other expression."""
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    if names and isinstance(node, ast.Name) and node.id == self_name:
        return ".".join(reversed(names))
    return None


def loads(node: ast.AST, name: str) -> int:
    """How often a variable is read in a syntax tree."""
    return sum(isinstance(n, ast.Name) and n.id == name and isinstance(n.ctx, ast.Load) for n in ast.walk(node))


@dataclass
class Rewriter:
    """Fuses the patterns in the syntax tree of one forward.

    Args:
        roles: {path from self: DROPOUT, NORM or TAIL} of its submodules.
    """

    source: Source
    roles: dict[str, str]
    found: list[tuple[str, str]] = field(default_factory=list)  # (path of the dropout or tail, the pattern)

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
        """The position of the statement whose dropout makes the (first) result; None if there is none."""
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
        """Let the dropout at the end add a residual that the caller may pass."""
        position = self.tail(tree.body)
        assert position is not None
        statement = tree.body[position]
        assert isinstance(statement, (ast.Assign, ast.Return))
        dropped = self.dropout_call(statement.value)
        assert dropped is not None and statement.value is not None
        residual = ast.Name(id=RESIDUAL, ctx=ast.Load())
        statement.value = call("_fastft_dropout_add", [*dropped, residual], statement.value)
        tree.args.kwonlyargs.append(ast.arg(arg=RESIDUAL))
        tree.args.kw_defaults.append(None)


# Expressions whose parts are evaluated later, repeatedly, or bind variables themselves.
DEFERRED = (ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp, ast.NamedExpr, ast.Await)


def call(name: str, arguments: Sequence[ast.expr], instead_of: ast.expr) -> ast.Call:
    """The expression ``name(*arguments)``, in the line of another one."""
    function = ast.Name(id=name, ctx=ast.Load())
    return ast.copy_location(ast.Call(func=function, args=list(arguments), keywords=[]), instead_of)


class Sums(ast.NodeTransformer):
    """Replaces sums of a dropout's result and a variable: ``self.dropout(x) + r``, or ``a + r`` where the statement
    before set ``a`` to ``self.dropout(x)`` or to what a tail returned."""

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
                return call("_fastft_dropout_add", [*dropped, residual], node)
        return node

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        if self.rewriter.role(node.func) != NORM or len(node.args) != 1 or node.keywords:
            return node
        inner = node.args[0]
        if isinstance(inner, ast.Call) and isinstance(inner.func, ast.Name) and inner.func.id == "_fastft_dropout_add":
            path, _ = self.rewriter.found.pop()
            self.rewriter.found.append((path, "dropout + add + norm"))
            return call("_fastft_dropout_add_norm", [node.func, *inner.args], node)
        return node

    def visit_Lambda(self, node: ast.Lambda) -> ast.AST:
        return node
