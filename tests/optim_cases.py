"""Tensors, comparisons and an oracle for the numerical tests of the optimizer.

Tensors in any memory order with guard elements around them, comparisons of bits, and an oracle: the update of
``fastft.optim.reference`` in float64 together with a bound on how far a computation in the kernels' dtype may be from
it. The bound is worked out element by element (a running error analysis: u is the unit roundoff, 2⁻²⁴ for everything
computed in float32, and each line counts the roundings of one line of the update), so no tolerance is guessed. What is
stored in 16 bits is rounded so in the oracle too: the optimizer must then store one of the values between the
roundings of both ends of the bound, which nearly always is a single one.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import HealthCheck, settings
from torch import Tensor, nn

import fastft
from fastft.optim import reference

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SIXTEEN_BIT = (torch.bfloat16, torch.float16)
MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
CHANNELS_LAST = (0, 2, 3, 1)

# Reproducible, and without a deadline: a build that runs the CUDA kernels on the host takes 50 times as long.
drawn = settings(
    max_examples=int(os.environ.get("FASTFT_TEST_EXAMPLES", "25")),
    deadline=None,
    derandomize=True,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


def short(dtype: object) -> str:
    """``float32`` for ``torch.float32``: for test ids."""
    return str(dtype).removeprefix("torch.")


@contextmanager
def threads(count: int) -> Iterator[None]:
    """That many threads for torch, in a ``with`` block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def in_another_process(code: str) -> str:
    """Run Python code in a process of its own, as it would crash where it should raise; returns what it printed."""
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stderr}"
    return done.stdout


# -- tensors ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """A shape, the order of its dimensions in memory (outermost first), and where in its buffer it begins."""

    shape: tuple[int, ...]
    order: tuple[int, ...] | None = None
    offset: int = 0

    @property
    def strides(self) -> tuple[int, ...]:
        """Strides of a dense tensor whose dimensions lie in this order."""
        strides = [1] * len(self.shape)
        at = 1
        for d in reversed(self.order or range(len(self.shape))):
            strides[d] = at
            at *= max(1, self.shape[d])
        return tuple(strides)


class Placed:
    """A dense tensor inside a larger buffer; an offset of odd items leaves it misaligned for vector accesses."""

    ROOM = 64  # items on each side

    def __init__(self, values: Tensor, layout: Layout | None = None, guard: float = 1234.5) -> None:
        layout = layout or Layout(tuple(values.shape))
        self.buffer = torch.full((values.numel() + 2 * self.ROOM + layout.offset,), guard, dtype=values.dtype)
        self.begin = self.ROOM + layout.offset
        self.view = self.buffer.as_strided(layout.shape, layout.strides, self.begin).copy_(values)
        self._before = self._guards()

    def _guards(self) -> Tensor:
        return bits(torch.cat([self.buffer[: self.begin], self.buffer[self.begin + self.view.numel() :]]))

    def intact(self) -> bool:
        """Whether everything around the tensor is as it was."""
        return torch.equal(self._guards(), self._before)


def generator(seed: int) -> torch.Generator:
    """A seeded one."""
    return torch.Generator().manual_seed(seed)


def normal(shape: Sequence[int], dtype: torch.dtype = torch.float32, *, seed: int, scale: float = 1.0) -> Tensor:
    """Values that differ from element to element, the same for the same seed."""
    return (torch.randn(tuple(shape), generator=generator(seed), dtype=torch.float64) * scale).to(dtype)


def parameter(
    shape: Sequence[int] | Layout, dtype: torch.dtype = torch.float32, *, seed: int, scale: float = 1.0
) -> nn.Parameter:
    """A parameter with such values, in the memory order of a layout if one is given."""
    layout = shape if isinstance(shape, Layout) else Layout(tuple(shape))
    return nn.Parameter(Placed(normal(layout.shape, dtype, seed=seed, scale=scale), layout).view)


def importances(shape: Sequence[int], dtype: torch.dtype = torch.float32, *, seed: int) -> Tensor:
    """Of a tenth of the elements none at all, of the others from 1e-4 to 100."""
    source = generator(seed)
    values = 10 ** (6 * torch.rand(tuple(shape), generator=source, dtype=torch.float64) - 4)
    return (values * (torch.rand(tuple(shape), generator=source) > 0.1)).to(dtype)


def half_of(shape: Sequence[int], *, seed: int) -> Tensor:
    """A mask of which about half is true; never all of it, where it has two elements or more."""
    mask = torch.rand(tuple(shape), generator=generator(seed)) < 0.5
    if mask.numel() > 1:
        mask.view(-1)[0], mask.view(-1)[-1] = True, False
    return mask


def steps_on(params: Iterable[Tensor], seed: int, scale: float = 1.0) -> None:
    """Give every parameter a gradient that depends on nothing but the seed and its place in the list."""
    for i, p in enumerate(params):
        p.grad = normal(p.shape, p.dtype, seed=1000 * seed + i, scale=scale)


# -- bits ------------------------------------------------------------------------------------------------------


def bits(tensor: Tensor) -> Tensor:
    """A copy of the elements' bits, in logical order: equal even where they are NaN."""
    plain = tensor.detach()
    if plain.is_complex():
        plain = torch.view_as_real(plain.resolve_conj())
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[plain.element_size()]
    return plain.clone(memory_format=torch.contiguous_format).view(integer)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Same dtype, shape and bits."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


Photograph = dict[tuple[str, int], Any]


def photograph(params: Iterable[Tensor], optimizer: torch.optim.Optimizer | None = None) -> Photograph:
    """Bits of parameters, of their gradients and of all their state, by what they are and the parameter's position.

    Tensors without memory of their own to read (sparse, meta, wrapped) are left out.
    """
    seen: Photograph = {}

    def add(what: str, position: int, value: Any) -> None:
        if not isinstance(value, Tensor):
            seen[what, position] = value
        elif type(value) in (Tensor, nn.Parameter) and value.layout == torch.strided and not value.is_meta:
            seen[what, position] = (value.dtype, tuple(value.shape), bits(value))

    for i, p in enumerate(params):
        add("parameter", i, p)
        add("grad", i, p.grad)
        if optimizer is not None:
            seen["has state", i] = p in optimizer.state
            for key, value in optimizer.state.get(p, {}).items():
                add(key, i, value)
    return seen


def assert_unchanged(before: Photograph, after: Photograph) -> None:
    """Both photographs show the same, down to which keys there are."""

    def equal(a: Any, b: Any) -> bool:
        if isinstance(a, tuple) and isinstance(b, tuple):
            return a[:2] == b[:2] and torch.equal(a[2], b[2])
        return bool(a == b)

    changes = {
        "new": [key for key in after if key not in before],
        "gone": [key for key in before if key not in after],
        "changed": [key for key in before if key in after and not equal(before[key], after[key])],
    }
    assert not any(changes.values()), changes


# -- the oracle ------------------------------------------------------------------------------------------------


@dataclass
class Bounded:
    """Values in float64, and how far from each of them a computed one may lie."""

    value: Tensor
    error: Tensor

    @classmethod
    def exact(cls, value: Tensor) -> Bounded:
        return cls(value.detach().to(torch.float64, copy=True), torch.zeros(value.shape, dtype=torch.float64))

    def stored(self, dtype: torch.dtype) -> Bounded:
        """After rounding to a 16-bit dtype. Rounding keeps order: it maps the ends of the bound to new ends."""
        if dtype not in SIXTEEN_BIT:
            return self
        value, low, high = (
            x.to(dtype).double() for x in (self.value, self.value - self.error, self.value + self.error)
        )
        return Bounded(value, torch.maximum(high - value, value - low))

    def check(self, actual: Tensor, what: str, times: float = 1.0) -> None:
        """Raise ``AssertionError`` if ``actual`` lies outside (``times`` as wide) anywhere."""
        assert actual.shape == self.value.shape, f"{what}: shape {list(actual.shape)}"
        distance = (actual.detach().double() - self.value).abs()
        wrong = ~(distance <= self.error * times)
        if wrong.any():
            worst = tuple(wrong.nonzero()[0].tolist())
            raise AssertionError(
                f"{what}: {int(wrong.sum())} of {wrong.numel()} elements are off, the first at {list(worst)}: "
                f"expected {self.value[worst].item():.17g} ± {self.error[worst].item() * times:.3g}, "
                f"got {actual[worst].item():.17g}"
            )


class Oracle:
    """One parameter's share of the update, with bounds that grow from step to step as errors are carried on."""

    def __init__(
        self,
        param: Tensor,
        state_dtype: torch.dtype,
        anchor: Tensor | None,
        amsgrad: bool,
        importance: Tensor | None = None,
    ) -> None:
        self.dtype, self.state_dtype = param.dtype, state_dtype
        # For float64 the reference's own roundings are as large as the kernels'.
        self.u = 2.0**-52 if param.dtype == torch.float64 else 2.0**-24
        self.smallest = 2.0**-1070 if param.dtype == torch.float64 else 2.0**-147  # what underflow may lose
        self.anchor = None if anchor is None else anchor.detach().double()
        self.importance = None if importance is None else importance.detach().double()
        zero = torch.zeros(param.shape)
        self.p, self.m, self.v = Bounded.exact(param), Bounded.exact(zero), Bounded.exact(zero)
        self.x = Bounded.exact(zero) if amsgrad else None
        self.t = 0

    def named(self) -> dict[str, Bounded]:
        """By the names under which the optimizer keeps them."""
        found = {"param": self.p, "exp_avg": self.m, "exp_avg_sq": self.v}
        return found if self.x is None else {**found, "max_exp_avg_sq": self.x}

    def adopt(self, param: Tensor, state: Mapping[str, Tensor]) -> None:
        """Go on from what the optimizer stored, so that only the next step's roundings count."""
        self.p, self.m = Bounded.exact(param), Bounded.exact(state["exp_avg"])
        self.v = Bounded.exact(state["exp_avg_sq"])
        if self.x is not None:
            self.x = Bounded.exact(state["max_exp_avg_sq"])

    def step(
        self,
        grad: Tensor,
        factor: float,
        mask: Tensor | None,
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        maximize: bool,
        anchor_decay: float,
        anchor_mode: str,
    ) -> None:
        """The reference's step with ``grad · factor``, and its bound."""
        self.t += 1
        u = self.u
        p, m, v, x = self.p, self.m, self.v, self.x
        selective = anchor_mode == "selective" and self.anchor is not None
        anchor = None if selective else self.anchor
        scaled = grad.double() * factor
        after = reference.adamw(
            p.value,
            scaled,
            m.value,
            v.value,
            None if x is None else x.value,
            self.t,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            anchor=anchor,
            importance=self.importance,
            anchor_decay=anchor_decay,
            anchor_mode=anchor_mode,
            maximize=maximize,
            update_mask=mask,
        )
        new_p, new_m, new_v, new_x = after
        l2 = pull = torch.zeros_like(scaled)
        if anchor is not None:
            weights = torch.ones_like(scaled) if self.importance is None else self.importance
            rate = lr * anchor_decay * weights
            if anchor_mode == "l2":
                l2 = anchor_decay * weights
            else:
                pull = rate.clamp(max=1.0) if self.importance is None else 1.0 - 1.0 / (1.0 + rate.clamp(min=0.0))
        decay = lr * weight_decay
        delta = torch.zeros_like(scaled) if anchor is None else (p.value - anchor).abs()

        # g = fma(λ·F, p − a, grad · factor); factor, λ and λ·F are rounded, and so may the gradient have been.
        g = scaled.abs() + l2 * delta
        g_error = 4 * u * scaled.abs() + l2 * (p.error + (2 if self.importance is None else 3) * u * delta) + u * g
        # m = fma(1−β₁, g − m, m)
        one_minus_1, one_minus_2 = 1 - betas[0], 1 - betas[1]
        size = m.value.abs() + m.error
        m_error = (
            betas[0] * m.error
            + one_minus_1 * g_error
            + u * new_m.abs()
            + 3 * u * one_minus_1 * (g + size)
            + 4 * 2.0**-53 * (size + one_minus_1 * g)
            + self.smallest
        )
        # v = fma((1−β₂)·g, g, β₂·v)
        v_error = (
            betas[1] * v.error
            + one_minus_2 * (2 * g * g_error + g_error.square())
            + u * (new_v + 2 * betas[1] * (v.value + v.error) + 3 * one_minus_2 * g.square())
            + (1 + g) * self.smallest
        )
        second, second_error = new_v, v_error
        x_error = None
        if x is not None and new_x is not None:
            second = new_x
            second_error = x_error = torch.maximum(x.error, v_error)
        # p = fma(−lr/(1−β₁ᵗ), m / fma(√v̂, 1/√(1−β₂ᵗ), ε), p); the powers are a unit off in the last place of 1.
        bias1, bias2 = 1 - betas[0] ** self.t, 1 - betas[1] ** self.t
        step_size, root = abs(lr) / bias1, bias2**-0.5
        denominator = second.sqrt() * root + eps
        lowest = (second - second_error).clamp(min=0).sqrt() * root * (1 - 4 * u - 2.0**-52 / bias2) + eps * (1 - u)
        lowest = lowest * (1 - u)
        largest = step_size * (new_m.abs() + m_error) / lowest
        update = step_size * new_m.abs() / denominator
        update_error = (largest - update) + (3 * u + 2.0**-52 / bias1) * largest
        # p = fma(−lr·wd, p, p); p = fma(−pull, p − a, p). x = lr·λ·F is rounded twice and x / (1 + x) twice more.
        roundings = 3 if self.importance is None else 6
        size = p.value.abs() + p.error
        decayed = size * abs(1 - decay) + pull * delta
        p_error = (
            abs(1 - decay - pull) * p.error
            + u * (abs(decay) * size + decayed + new_p.abs())
            + (u * (decayed + roundings * pull * (delta + p.error))) * (pull > 0)
            + update_error
            + self.smallest
        )

        def settle(old: Bounded, value: Tensor, error: Tensor, dtype: torch.dtype) -> Bounded:
            error = (error * (1 + 2.0**-10)).nan_to_num(nan=float("inf"))  # products of errors; ∞: nothing is known
            new = Bounded(value, error).stored(dtype)
            if mask is None:
                return new
            live = mask.view(mask.shape + (1,) * (value.dim() - mask.dim())).expand(value.shape)
            return Bounded(torch.where(live, new.value, old.value), torch.where(live, new.error, old.error))

        self.p = settle(p, new_p, p_error, self.dtype)
        if selective:
            moved = self._projected(p, self.p, -grad.double() if maximize else grad.double(), anchor_decay, mask)
            self.p = settle(self.p, moved.value, moved.error, self.dtype)
        self.m = settle(m, new_m, m_error, self.state_dtype)
        self.v = settle(v, new_v, v_error, self.state_dtype)
        if x is not None and new_x is not None and x_error is not None:
            self.x = settle(x, new_x, x_error, self.state_dtype)

    def _projected(
        self, p: Bounded, stepped: Bounded, grad: Tensor, anchor_decay: float, mask: Tensor | None
    ) -> Bounded:
        """Selective projection of what was stored, and its bound: from that of how far it goes."""
        assert self.anchor is not None
        live: Any = slice(None) if mask is None else mask
        value = reference.selective_projection(p.value, stepped.value, grad, self.anchor, anchor_decay, mask)
        sums = 4096 * 2.0**-53  # what the order of additions may change, relative to the terms: lanes are no longer
        before, after = (p.value - self.anchor)[live], (stepped.value - self.anchor)[live]
        uphill = float((grad[live] * before).sum())
        slack = float((grad[live].abs() * (p.error[live] + sums * before.abs())).sum())
        distances = [float(x.norm()) for x in (before, after)]
        errors = [float(e[live].norm()) + sums * d for e, d in zip((p.error, stepped.error), distances, strict=True)]
        lowest = pull_of(uphill - slack, distances[0] + errors[0], distances[1] - errors[1], anchor_decay)
        pull = pull_of(uphill, *distances, anchor_decay)
        highest = pull_of(uphill + slack, max(0.0, distances[0] - errors[0]), distances[1] + errors[1], anchor_decay)
        if highest == 0.0:
            return stepped
        farthest = (stepped.value - self.anchor).abs() + stepped.error
        spread = max(pull - lowest, highest - pull) + 8 * 2.0**-53 * anchor_decay
        error = stepped.error + spread * farthest + self.u * (3 * highest * farthest + value.abs()) + self.smallest
        return Bounded(value, error)


def pull_of(uphill: float, before: float, after: float, anchor_decay: float) -> float:
    """How far selective projection goes: 0 where the numbers do not ask for it, or are none."""
    if not (uphill > 0.0 and after > before):
        return 0.0
    return min(1.0, anchor_decay * (1.0 - before / after)) if after < float("inf") else min(1.0, anchor_decay)


@dataclass
class Watched:
    """One parameter under watch."""

    name: str
    param: Tensor
    near: Oracle
    free: Oracle
    mask: Tensor | None = None
    frozen: bool = False


@dataclass
class Watch:
    """A ``fastft.AdamW`` with two oracles beside every parameter.

    ``near`` starts each step from what the optimizer stored, so its bound is that of one step: about a unit in the
    last place. ``free`` sees nothing but the start and the gradients, so its bound has grown with every step: to some
    units for each step taken, and beyond all bounds for the few elements where an l2 anchor cancels a gradient in 16
    bits.
    """

    groups: list[dict[str, Any]]  # with named parameters
    anchors: Mapping[str, Tensor] = field(default_factory=dict)  # by the parameters' names
    importances: Mapping[str, Tensor] = field(default_factory=dict)
    placed: Sequence[Placed] = ()  # whose guards must hold
    max_grad_norm: float | None = None
    skip_nonfinite: bool = False
    state_dtype: torch.dtype | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        anchor = fastft.Anchor.snapshot(self.anchors.items()) if self.anchors else None
        if anchor is not None and self.importances:
            anchor = anchor.with_importance(self.importances)
        self.optimizer = fastft.AdamW(
            self.groups,
            anchor=anchor,
            max_grad_norm=self.max_grad_norm,
            skip_nonfinite=self.skip_nonfinite,
            state_dtype=self.state_dtype,
            **self.options,
        )
        self.all: list[list[Watched]] = []
        for group in self.optimizer.param_groups:
            self.all.append([])
            for name, p in zip(group["param_names"], group["params"], strict=True):
                wide = p.dtype in SIXTEEN_BIT and self.state_dtype is not None
                state_dtype = torch.float32 if wide else p.dtype
                anchored = [self.anchors.get(name), self.importances.get(name)]
                if p.dtype != torch.float64:
                    anchored = [t.float() if t is not None and t.dtype == torch.float64 else t for t in anchored]
                oracles = [Oracle(p, state_dtype, anchored[0], group["amsgrad"], anchored[1]) for _ in range(2)]
                self.all[-1].append(Watched(name, p, *oracles))
        self.steps = self.skipped = 0

    def __getitem__(self, name: str) -> Watched:
        return next(w for group in self.all for w in group if w.name == name)

    def set_mask(self, name: str, mask: Tensor | None) -> None:
        """In the optimizer and in the oracles."""
        self[name].mask = mask
        self.optimizer.set_update_mask(self[name].param, mask)

    def freeze(self, name: str) -> None:
        self[name].frozen = True
        self.optimizer.freeze(self[name].param)

    def unfreeze(self, name: str) -> None:
        self[name].frozen = False
        self.optimizer.unfreeze(self[name].param)

    def step(
        self,
        *,
        grad_scale: float | None = None,
        found_inf: float | None = None,
        assumed: Mapping[str, Any] | None = None,
    ) -> None:
        """One step, compared. ``assumed`` makes the oracles believe in other options than the optimizer's."""
        everything = [w for group in self.all for w in group]
        live = [[w for w in group if w.param.grad is not None and not w.frozen] for group in self.all]
        stepping = [w for group in live for w in group]
        grads = {w.name: as_read(w.param) for w in stepping}
        norm = reference.grad_norm([grads[w.name] for w in stepping], [w.mask for w in stepping], grad_scale or 1.0)
        skips = bool(found_inf) or (self.skip_nonfinite and not norm < float("inf"))

        params = [w.param for w in everything]
        scaled = [None if p.grad is None else p.grad.clone() for p in params]
        before = photograph(params, self.optimizer)
        for key, value in (("grad_scale", grad_scale), ("found_inf", found_inf)):
            if value is not None:
                setattr(self.optimizer, key, torch.tensor(value, dtype=torch.float32))
        with threads(2):
            self.optimizer.step()
        for key in ("grad_scale", "found_inf"):
            self.optimizer.__dict__.pop(key, None)
        after = photograph(params, self.optimizer)

        self.steps += 1
        self.skipped += skips  # also where nothing here is to be stepped: other processes count it
        assert int(self.optimizer.skipped_steps) == self.skipped
        assert all(placed.intact() for placed in self.placed), "wrote outside of a tensor"
        self._check_norm(norm if stepping else None)
        written = [] if skips else [everything.index(w) for w in stepping]
        if skips:  # a first step makes its state before the device knows that it is skipped
            made = [key for key in after if key not in before]
            assert not any(after[key][2].any() for key in made), "a skipped step wrote into new state"
            before = {key: seen for key, seen in before.items() if key[0] != "has state"}
            after = {key: seen for key, seen in after.items() if key in before}

        def still(seen: Photograph) -> Photograph:
            grads_too = grad_scale is None
            return {
                (what, i): value
                for (what, i), value in seen.items()
                if (grads_too if what == "grad" else i not in written)
            }

        assert_unchanged(still(before), still(after))
        if grad_scale is not None:
            assert_unscaled([p.grad for p in params], scaled, grad_scale)
        if skips:
            return
        assumed = dict(assumed or {})
        # The norm has just been checked; from here on its very bits count, or float64 could not be held to its own.
        norm = norm if self.optimizer.grad_norm is None else float(self.optimizer.grad_norm)
        factor = reference.clip_factor(norm, assumed.pop("max_grad_norm", self.max_grad_norm)) / (grad_scale or 1.0)
        for group, options in zip(live, self.optimizer.param_groups, strict=True):
            chosen = {
                "lr": float(options["lr"]),
                "betas": tuple(float(beta) for beta in options["betas"]),
                **{k: options[k] for k in ("eps", "weight_decay", "maximize", "anchor_decay", "anchor_mode")},
                **assumed,
            }
            for w in group:
                w.near.step(grads[w.name], factor, w.mask, **chosen)
                w.free.step(grads[w.name], factor, w.mask, **chosen)
                self._check(w)

    def _check(self, w: Watched) -> None:
        state = self.optimizer.state[w.param]
        assert float(state["step"]) == w.near.t, f"{w.name}: step"
        assert state["exp_avg"].dtype == w.near.state_dtype, f"{w.name}: dtype of the moments"
        for oracle, which in ((w.near, "one step on"), (w.free, "from the start")):
            for key, bounded in oracle.named().items():
                actual = w.param if key == "param" else state[key]
                assert oracle is w.free or bounded.error.isfinite().all()
                bounded.check(actual, f"{w.name}: {key}, step {self.steps}, {which}")
        w.near.adopt(w.param, state)

    def _check_norm(self, expected: float | None) -> None:
        found = self.optimizer.grad_norm
        if expected is None or (self.max_grad_norm is None and not self.skip_nonfinite):
            assert found is None
            return
        assert found is not None and found.shape == () and found.dtype == torch.float64
        # Squares and sums in float64: what is left is the order of additions.
        wanted = torch.tensor(expected, dtype=torch.float64)
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0.0, equal_nan=True)


def assert_unscaled(grads: Iterable[Tensor | None], scaled: Iterable[Tensor | None], scale: float) -> None:
    """Gradients after a step are those from before, divided by the loss scale as ``GradScaler.unscale_`` does it."""
    for i, (grad, before) in enumerate(zip(grads, scaled, strict=True)):
        if grad is None or before is None:
            assert grad is before, f"gradient {i}: {grad}, before the step {before}"
            continue
        # The scale's inverse is rounded to float32, and the product to the gradient's dtype.
        limits = torch.finfo(before.dtype)
        torch.testing.assert_close(
            grad,
            (before.double() / scale).to(before.dtype),
            rtol=max(limits.eps, torch.finfo(torch.float32).eps),
            atol=limits.tiny * limits.eps,
            equal_nan=True,
            msg=lambda m, i=i: f"gradient {i}: {m}",
        )


def as_read(param: Tensor) -> Tensor:
    """The gradient as the kernels read it: float64 beside a narrower parameter is rounded to float32 first."""
    assert param.grad is not None
    grad = param.grad.detach()
    return grad.float() if grad.dtype == torch.float64 and param.dtype != torch.float64 else grad.clone()


# -- runs that are compared with one another -------------------------------------------------------------------


@dataclass
class Run:
    """Parameters and an optimizer that are stepped with given gradients and then compared with others, bit for bit."""

    params: list[nn.Parameter]
    optimizer: fastft.AdamW

    @classmethod
    def of(cls, make: Callable[[list[nn.Parameter]], fastft.AdamW], params: Iterable[nn.Parameter]) -> Run:
        params = list(params)
        return cls(params, make(params))

    def copy(self) -> Run:
        """An independent one in the same state."""
        return copy.deepcopy(self)

    def go(self, seeds: Iterable[int], scale: float = 1.0) -> Run:
        """One step for each seed."""
        for seed in seeds:
            steps_on(self.params, seed, scale)
            self.optimizer.step()
        return self

    def assert_same(self, other: Run) -> None:
        """Parameters and state have the same bits."""
        ours, theirs = photograph(self.params, self.optimizer), photograph(other.params, other.optimizer)
        assert_unchanged(ours, theirs)
