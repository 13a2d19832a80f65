"""Modules whose forwards ``fuse_dropout_`` looks into. No assert in them: pytest would rewrite it, and fastft only
changes code that is what its source says."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class Base(nn.Module):
    """A linear layer, a dropout and two norms."""

    def __init__(self, width: int = 8, p: float = 0.5, inplace: bool = False) -> None:
        super().__init__()
        self.dense = nn.Linear(width, width)
        self.dropout = nn.Dropout(p, inplace)
        self.norm = nn.LayerNorm(width)
        self.rms = nn.RMSNorm(width)


# -- what is fused -----------------------------------------------------------------------------------------


class PostNorm(Base):
    def forward(self, x: Tensor) -> Tensor:
        h = self.dense(x)
        h = self.dropout(h)
        h = self.norm(h + x)
        return h


class PostRMSNorm(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.rms(x + self.dropout(self.dense(x)))


class Residual(Base):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(self.dense(x))


class ReturnedSum(Base):
    def forward(self, x: Tensor, *, scale: float = 2.0) -> Tensor:
        dropped = self.dropout(self.dense(x) * scale)
        return x + dropped


class InBranches(Base):
    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            if x.shape[0] > 1:
                h = self.dropout(self.dense(x))
                h = h + x
                x = h * 0.5
            else:
                with torch.enable_grad():
                    x = self.norm(self.dropout(self.dense(x)) + x)
        try:
            last = self.dropout(x)
            x = x + last
        finally:
            x = x * 0.5
        return x


class PartOfASum(Base):
    def forward(self, x: Tensor) -> Tensor:
        h = self.dropout(self.dense(x))
        y = torch.tanh(self.norm(x + h) * 2.0) - x
        return y


class SeesWhatItDropped(Base):
    """If the dropout works in place, h changes."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.dense(x)
        y = self.dropout(h) + x
        return y * h


class Nested(nn.Module):
    """The dropout is a grandchild."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Base()
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner.dropout(self.inner.dense(x))
        return self.inner.norm(h + x) + self.dropout(x)


class Attention(Base):
    """Ends in a dropout; the first of two results."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        out = self.dense(x)
        weights = out.softmax(-1)
        out = self.dropout(out)
        return out, weights


class MLP(Base):
    """Ends in a dropout."""

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.dense(x))


class Block(nn.Module):
    """Adds to the results of two parts that end in a dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()
        self.mlp = MLP()
        self.ln_1, self.ln_2 = nn.LayerNorm(8), nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        residual = x
        x = self.ln_1(x)
        out, _ = self.attention(x)
        x = out + residual
        residual = x
        fed = self.mlp(self.ln_2(x))
        x = residual + fed
        return x


class PostNormBlock(nn.Module):
    """The sum with a part's result goes into a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = MLP()
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        fed = self.mlp(x)
        return self.norm(x + fed)


def doubled(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A decorator, as such in source."""

    @functools.wraps(forward)
    def call(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        return forward(self, *args, **kwargs) * 2.0

    return call


class Decorated(Base):
    @doubled
    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """With a docstring."""
        residual = x if residual is None else residual
        h = self.dropout(self.dense(x))
        return residual + h


class WrapsSubclasses(Base):
    """Wraps the forward of each of its subclasses, as transformers' checkpointing layers do."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        forward = cls.forward

        @functools.wraps(forward)
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            if type(self).forward is call:
                self.outermost = self.__dict__.get("outermost", 0) + 1
            return forward(self, *args, **kwargs)

        cls.forward = call  # type: ignore[method-assign]


class Wrapped(WrapsSubclasses):
    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.dense(x)) + x


# -- what is not -------------------------------------------------------------------------------------------


class UsedTwice(Base):
    def forward(self, x: Tensor) -> Tensor:
        h = self.dropout(self.dense(x))
        y = h + x
        return y * h


class UsedInTheNextRound(Base):
    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros_like(x)
        for _ in range(2):
            x = x * (1.0 + h)
            h = self.dropout(self.dense(x))
            x = h + x
        return x


class AddedToItself(Base):
    def forward(self, x: Tensor) -> Tensor:
        h = self.dropout(self.dense(x))
        h = h + h
        return h


class InALambda(Base):
    def forward(self, x: Tensor) -> Tensor:
        h = self.dropout(self.dense(x))
        add = lambda: h + x  # noqa: E731
        return add() + add()


class InAComprehension(Base):
    def forward(self, x: Tensor) -> Tensor:
        h = self.dropout(self.dense(x))
        return torch.stack([h + y for y in (x, x)])


class NotAdjacent(Base):
    def forward(self, x: Tensor) -> Tensor:
        h = self.dropout(self.dense(x))
        x = x * 2.0
        return h + x


class Subtracted(Base):
    def forward(self, x: Tensor) -> Tensor:
        h = self.dropout(self.dense(x))
        return h - x


class InPlace(Base):
    def forward(self, x: Tensor) -> Tensor:
        h = self.dropout(self.dense(x))
        h += x
        return h


class ByKeyword(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(input=self.dense(x)) + x


class ReturnsEarly(Base):
    """Does not always return its dropout's result."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] == 1:
            return x
        return self.dropout(self.dense(x))


class EarlyBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.part = ReturnsEarly()

    def forward(self, x: Tensor) -> Tensor:
        fed = self.part(x)
        return fed + x


class AddsBothResults(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()

    def forward(self, x: Tensor) -> Tensor:
        out, weights = self.attention(x)
        x = out + weights
        return x


# -- what cannot be read -----------------------------------------------------------------------------------


class CallsSuper(Residual):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.dropout(x)


class Private(Base):
    def forward(self, x: Tensor) -> Tensor:
        self.__seen = True
        return x + self.dropout(x)


class LooksAtItsVariables(Base):
    def forward(self, x: Tensor) -> Tensor:
        h = self.dropout(x)
        h = h + x
        return locals()["h"]


def made_elsewhere(scale: float) -> type[Base]:
    class Closure(Base):
        def forward(self, x: Tensor) -> Tensor:
            return x * scale + self.dropout(x)

    return Closure


Closure = made_elsewhere(2.0)


class Rewrapped(Base):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(x)


# Not by a decorator that stands in its source.
Rewrapped.forward = doubled(Rewrapped.forward)  # type: ignore[method-assign]

FUSED: dict[type[nn.Module], list[str]] = {
    PostNorm: ["dropout + add + norm"],
    PostRMSNorm: ["dropout + add + norm"],
    Residual: ["dropout + add"],
    ReturnedSum: ["dropout + add"],
    InBranches: ["dropout + add", "dropout + add + norm", "dropout + add"],
    PartOfASum: ["dropout + add + norm"],
    SeesWhatItDropped: ["dropout + add"],
    Block: ["dropout + add", "dropout + add"],
    PostNormBlock: ["dropout + add"],
    Decorated: ["dropout + add"],
    Wrapped: ["dropout + add"],
}
NOT_FUSED = (
    UsedTwice,
    UsedInTheNextRound,
    AddedToItself,
    InALambda,
    InAComprehension,
    NotAdjacent,
    Subtracted,
    InPlace,
    ByKeyword,
    ReturnsEarly,
    EarlyBlock,
    AddsBothResults,
)
NOT_READABLE: dict[type[nn.Module], str] = {
    CallsSuper: "its forward uses super() or variables of an enclosing function",
    Closure: "its forward uses super() or variables of an enclosing function",
    Private: "its forward uses names that are private to the class",
    LooksAtItsVariables: "its forward uses what cannot be rewritten",
    Rewrapped: "something else has wrapped its forward",
}
