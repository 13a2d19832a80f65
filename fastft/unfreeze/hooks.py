"""Hooks on closed modules: they run without a graph where no gradient needs it, and keep their statistics."""

from __future__ import annotations

import threading
from collections.abc import Callable, Container, Iterable, Iterator
from functools import partial
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.hooks import RemovableHandle

from fastft._core import disable_dynamo
from fastft.layers.wrappers import peel

# How far to look behind a tensor, or into an argument, before giving up.
MOST_NODES = 64
MOST_OBJECTS = 4096
# Types that refer to no tensor.
PLAIN = (int, float, str, bytes, complex, torch.dtype, torch.device, type, BuiltinFunctionType)


class ModuleHook:
    """A hook that stays behind when its module is copied or pickled: it belongs to the unfreezer of the original."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self.call = call

    def __call__(self, *args: Any) -> Any:
        return self.call(*args)

    def __reduce__(self) -> Any:
        return ModuleHook, (nothing,)


def nothing(*_: Any) -> None:
    """A copied hook."""


class Ends(torch.autograd.Function):
    """Gives tensors back as if they came from something trainable; backward ends there.

    So everything behind a closed module that runs without a graph sees the ``requires_grad`` that it would see
    otherwise: reentrant checkpointing goes by that, and so may a model's own code.
    """

    @staticmethod
    def forward(ctx: Any, seed: Tensor, tensor: Tensor) -> Tensor:
        """``tensor``, in the same memory."""
        return tensor.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None]:
        """No gradient for anyone."""
        return None, None


class ClosedForward:
    """Runs a module without a graph while all its parameters are closed and nothing open lies behind its arguments.

    That is what ``requires_grad=False`` would do to it, found out at each call; so it may not depend on the order in
    which modules were registered, and no gradient that an open parameter or an input is due gets lost.
    """

    def __init__(self, module: nn.Module, closed: Container[Tensor]) -> None:
        self.module = module
        self.closed = closed
        # Where the parameters are looked up: torch.func.functional_call puts others in their place.
        self.slots = [(m._parameters, name) for m in module.modules() for name in m._parameters]
        self.seed = torch.empty((), requires_grad=True)
        self.entered = Entered()
        self.saved = False
        """Whether the last forward pass with gradients enabled went without a graph."""
        self.handles: list[RemovableHandle] = [
            module.register_forward_pre_hook(ModuleHook(self.enter), with_kwargs=True),
            module.register_forward_hook(ModuleHook(self.leave), always_call=True),
        ]

    def enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Before the module runs."""
        if torch.compiler.is_compiling():
            return
        enabled = torch.is_grad_enabled()
        saves = enabled and self.needs_no_graph(args, kwargs)
        if enabled:
            self.saved = saves
        self.entered.stack.append(saves)
        if saves:
            torch.set_grad_enabled(False)

    def leave(self, module: nn.Module, args: Any, output: Any) -> Any:
        """After it ran, or failed."""
        if torch.compiler.is_compiling() or not self.entered.stack or not self.entered.stack.pop():
            return None
        torch.set_grad_enabled(True)
        return tree_map(self.ended, output)

    def needs_no_graph(self, args: Any, kwargs: Any) -> bool:
        """Whether backward through the module would reach closed parameters only."""
        if not all(p is None or p in self.closed for p in (at[name] for at, name in self.slots)):
            return False
        if torch._C._are_functorch_transforms_active():
            return False
        tensors = tensors_in((args, kwargs))
        return tensors is not None and all(self.leads_nowhere(t) for t in tensors if t.requires_grad)

    def leads_nowhere(self, tensor: Tensor) -> bool:
        """Whether backward from it reaches closed parameters only. It looks no further than some tens of nodes."""
        if tensor.grad_fn is None:
            return tensor in self.closed
        nodes: list[Any] = [tensor.grad_fn]
        seen: set[Any] = set()
        while nodes:
            node = nodes.pop()
            if node is None or node in seen or isinstance(node, Ends._backward_cls):
                continue
            if hasattr(node, "variable"):
                if node.variable not in self.closed:
                    return False
            elif isinstance(node, torch.autograd.function.BackwardCFunction) or len(seen) == MOST_NODES:
                return False  # a function in Python may hide parameters, as checkpointing does
            seen.add(node)
            nodes += [behind for behind, _ in node.next_functions]
        return True

    def ended(self, output: Any) -> Any:
        """A tensor that requires grad as it would have with a graph; anything else as it is."""
        if not isinstance(output, Tensor) or output.requires_grad or not output.is_floating_point():
            return output
        return cast(Tensor, Ends.apply(self.seed, output))  # type: ignore[no-untyped-call]

    def remove(self) -> None:
        """Take the hooks away."""
        for handle in self.handles:
            handle.remove()


class Entered(threading.local):
    """For each call that a thread is in, whether it goes without a graph; grad mode is the thread's too."""

    def __init__(self) -> None:
        self.stack: list[bool] = []


def tensors_in(arguments: Any) -> list[Tensor] | None:
    """All tensors in arguments, also inside containers and objects; None if something cannot be looked into."""
    found: list[Tensor] = []
    left = [arguments]
    seen: set[int] = set()
    while left:
        item = left.pop()
        if isinstance(item, Tensor):
            found.append(item)
        elif item is not None and not isinstance(item, PLAIN) and id(item) not in seen:
            inside = None if isinstance(item, nn.Module) or len(seen) == MOST_OBJECTS else contents(item)
            if inside is None:
                return None
            left += inside
            seen.add(id(item))
    return found


def contents(item: Any) -> list[Any] | None:
    """The objects that this one refers to; None if they cannot be known."""
    if isinstance(item, (list, tuple, set, frozenset)):
        return [*item, *vars(item).values()] if hasattr(item, "__dict__") else [*item]
    if isinstance(item, FunctionType):
        return [cell.cell_contents for cell in item.__closure__ or ()]
    if isinstance(item, MethodType):
        return [item.__self__]
    if isinstance(item, partial):
        return [item.func, item.args, item.keywords]
    slots = [getattr(item, name, None) for name in slots_of(type(item))]
    held = [*vars(item).values()] if hasattr(item, "__dict__") else []
    if isinstance(item, dict):
        return [*item.values(), *held, *slots]
    return [*held, *slots] if held or slots or type(item) is object else None


def slots_of(cls: type) -> Iterator[str]:
    """The names of a class's ``__slots__``."""
    for base in cls.__mro__:
        slots: str | Iterable[str] = base.__dict__.get("__slots__", ())
        yield from [slots] if isinstance(slots, str) else slots


class StillNorms:
    """Keeps modules with running statistics in eval mode while they are closed, whatever ``model.train()`` does."""

    def __init__(self, model: nn.Module, compiled: bool) -> None:
        self.model = model
        self.still: dict[nn.Module, None] = {}  # a set in order
        self.compiled = compiled
        self.handles: dict[nn.Module, RemovableHandle] = {}

    def set(self, closed: Iterable[nn.Module]) -> None:
        """Make these the closed ones. Those that were and are not any more get the model's mode back."""
        before, self.still = self.still, dict.fromkeys(closed)
        for module in before:
            if module not in self.still:
                module.train(peel(self.model).training)
        # Inside a compiled model a hook would be part of the graph.
        watched = [self.model] if self.compiled and self.still else [] if self.compiled else list(self.still)
        for module in [module for module in self.handles if module not in watched]:
            self.handles.pop(module).remove()
        for module in watched:
            if module not in self.handles:
                self.handles[module] = module.register_forward_pre_hook(ModuleHook(self.hold))

    @disable_dynamo
    def hold(self, module: nn.Module, args: Any) -> None:
        """Before the module, or the model, runs."""
        for norm in self.still if self.compiled else [module]:
            if norm.training:
                norm.eval()


def norms_in(modules: Iterable[nn.Module]) -> Iterator[nn.Module]:
    """The modules with running statistics (batch norm and its relatives) among these and inside them."""
    for outer in modules:
        for module in outer.modules():
            if isinstance(getattr(module, "running_mean", None), Tensor):
                yield module
