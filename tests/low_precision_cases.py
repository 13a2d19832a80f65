"""Parameters whose weights or moments are kept in few bits, stepped by the core itself, and an oracle for them.

The oracle is the core's own step over plain float32 tensors, between the formulas of ``csrc/math/split.h``,
``stochastic.h`` and ``block8.h`` written anew in torch: what they read as float32 before the step, and what they keep
of it after. So every bit is known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from dropout_cases import philox
from torch import Tensor

from fastft import _C

CPU = (1, 0)
BLOCK = 256
WEIGHTS = (
    "float32",
    "bfloat16",
    "float16",
    "split8",
    "split16",
    "stochastic",
    "stochastic-float16",
    "stochastic-split8",
)
MOMENTS = ("float32", "bfloat16", "8bit")
FLOOR = 2.0**-16
GROUP = {
    "betas": (0.9, 0.99),
    "eps": 1e-8,
    "weight_decay": 0.1,
    "anchor_decay": 3.0,
    "amsgrad": False,
    "maximize": False,
}


def as_int(x: Tensor) -> Tensor:
    return x.float().view(torch.int32).to(torch.int64) & 0xFFFFFFFF


def as_float(u: Tensor) -> Tensor:
    u = u & 0xFFFFFFFF
    return torch.where(u >= 2**31, u - 2**32, u).to(torch.int32).view(torch.float32)


# -- weights ---------------------------------------------------------------------------------------------------


def joined(weight: Tensor, low: Tensor | None) -> Tensor:
    """The master: float32."""
    if low is None:
        return weight.float()
    if low.dtype == torch.uint16:
        return as_float(as_int(weight) + low.view(torch.int16).to(torch.int64))
    return as_float(as_int(weight) + (low.view(torch.int8).to(torch.int64) << 8))


def kept(master: Tensor, like: Tensor, low: Tensor | None, random: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Weight and low bits of a master; random: sixteen bits for each element, or None to round to nearest."""
    u = as_int(master)
    if low is None:
        if random is None or like.dtype == torch.float32:
            return master.to(like.dtype), None
        if like.dtype == torch.bfloat16:
            return (((u + random) >> 16) & 0xFFFF).to(torch.uint16).view(torch.bfloat16), None
        return half_rounded(master, random), None
    if low.dtype == torch.uint8:
        u = (u + (0x7F + (u >> 8 & 1) if random is None else random & 0xFF)) & 0xFFFFFF00
    weight = ((u + 0x8000) >> 16 & 0xFFFF).to(torch.uint16).view(torch.bfloat16)
    return weight, (u & 0xFFFF).to(torch.uint16) if low.dtype == torch.uint16 else (u >> 8 & 0xFF).to(torch.uint8)


def half_rounded(x: Tensor, random: Tensor) -> Tensor:
    """float16: up to the next one as often as ``random``, of 2^16, is at least what is missing."""
    magnitude = x.abs().double()
    ulp = torch.exp2(magnitude.clamp_min(2.0**-14).log2().floor() - 10)
    quotient = magnitude / ulp
    bits = torch.where(magnitude < 2.0**-14, 16, 13)
    down = quotient.floor()
    threshold = random >> (16 - bits)
    up = (quotient - down) * 2.0 ** bits.double() + threshold.double() >= 2.0 ** bits.double()
    return ((down + up) * ulp * x.sign()).to(torch.float16)


def random_bits(key: int, step: int, places: Tensor, second_pass: bool = False) -> Tensor:
    """Sixteen bits for elements at these places in the whole tensor."""
    groups = (places.flatten().numpy() // 8).astype(np.uint64)
    zeros, low = np.zeros_like(groups), np.uint64(0xFFFFFFFF)
    words = philox(
        [zeros + np.uint64(2 * step + second_pass), zeros, groups & low, groups >> np.uint64(32)],
        [key & 0xFFFFFFFF, key >> 32],
    )
    k = (places.flatten() % 8).numpy()
    word = np.choose(k // 2, words).astype(np.int64)
    return torch.from_numpy((word >> (k % 2 * 16)) & 0xFFFF).view(places.shape)


# -- moments ---------------------------------------------------------------------------------------------------


def blocks_of(shape: Sequence[int]) -> tuple[int, int]:
    """(rows, elements of a row): a 1-D tensor is one row."""
    count = int(np.prod(shape))
    return (1, count) if len(shape) == 1 else (shape[0], count // shape[0])


def scales_shape(shape: Sequence[int]) -> tuple[int, ...]:
    rows, row = blocks_of(shape)
    blocks = -(-row // BLOCK)
    return (blocks,) if len(shape) == 1 else (rows, blocks)


def per_element(scales: Tensor, shape: Sequence[int]) -> Tensor:
    rows, row = blocks_of(shape)
    return scales.view(rows, -1).repeat_interleave(BLOCK, 1)[:, :row].reshape(tuple(shape))


def value(code: Tensor, shift: int) -> Tensor:
    return as_float(as_int(torch.tensor(FLOOR)) + (code.to(torch.int64) << shift)) - FLOOR


def decoded(codes: Tensor, scales: Tensor, second: bool) -> Tensor:
    scale = per_element(scales, codes.shape)
    if second:
        return (value(codes, 19) * scale) ** 2
    magnitude = value(codes & 0x7F, 20) * scale
    return torch.where(codes >= 0x80, -magnitude, magnitude)


def encoded(x: Tensor, live: Tensor, codes: Tensor, scales: Tensor, step: int, second: bool) -> tuple[Tensor, Tensor]:
    """Codes and scales after the step; those given where nothing is live."""
    rows, row = blocks_of(x.shape)
    amount = x.double().sqrt().float() if second else x.abs()  # torch.sqrt of float32 is not always rounded right
    shift, most, top_value = (19, 255, 0.96875 - FLOOR) if second else (20, 127, 0.9375 - FLOOR)
    top = torch.tensor(top_value, dtype=torch.float32)
    padding = scales.numel() // rows * BLOCK - row
    pad = torch.nn.functional.pad
    largest = pad((amount * live).view(rows, row), (0, padding)).view(-1, BLOCK).amax(1)
    any_live = pad(live.view(rows, row), (0, padding)).view(-1, BLOCK).any(1)
    none = largest < 1e-36
    new = torch.where(none, 0.0, largest / top)
    inverse = torch.where(none, 0.0, top / largest)
    i = torch.arange(row) % BLOCK
    dither = ((step * 0x9E3779B1 + i * 0x85EBCA6B) & 0xFFFFFFFF).expand(rows, row).reshape(x.shape)
    scaled = amount * per_element(inverse.view(scales.shape), x.shape)
    code = (as_int(scaled + FLOOR) - as_int(torch.tensor(FLOOR)) + (dither >> (32 - shift))) >> shift
    code = code.clamp_max(most)
    if second:
        code = torch.where(amount > 0, code.clamp_min(1), code)
    else:
        code = code | (as_int(x) >> 24 & 0x80)
    return (
        torch.where(live, code.to(torch.uint8), codes),
        torch.where(any_live.view(scales.shape), new.view(scales.shape), scales),
    )


# -- a parameter and its state -----------------------------------------------------------------------------------


@dataclass
class Case:
    """A parameter, its state and the options of its step; :meth:`step` takes one by the core."""

    weights: str
    moments: str
    p: Tensor
    state: dict[str, Tensor]
    anchor: Tensor | None = None
    importance: Tensor | None = None
    mask: Tensor | None = None
    rows: Tensor | None = None
    anchoring: str = "none"
    key: int = 0x123456789ABCDEF0
    index: tuple[int, int, int] | None = None
    taken: int = 0
    group: dict[str, Any] = field(default_factory=lambda: dict(GROUP))
    max_grad_norm: float = -1.0

    @property
    def stochastic(self) -> bool:
        return self.weights.startswith("stochastic")

    def copy(self, **changes: Any) -> Case:
        """The same in tensors of its own, all beginning at the same alignment."""
        state = {name: t.clone() for name, t in self.state.items()}
        return replace(self, p=self.p.clone(), state=state, group=dict(self.group), **changes)

    def record(self) -> tuple[_C.AdamWRecord, Tensor]:
        count = torch.tensor(float(self.taken))
        given = {"anchor": self.anchor, "importance": self.importance, "update_mask": self.mask, "rows": self.rows}
        tensors: dict[str, Any] = {**self.state, **{name: t for name, t in given.items() if t is not None}}
        record = _C.AdamWRecord(
            self.p,
            0,
            name="p",
            anchoring=getattr(_C.Anchoring, self.anchoring),
            rounding_key=self.key if self.stochastic else None,
            index=self.index,
            stepped=self.p,
            step=count,
            **tensors,
        )
        return record, count

    def step(self, grad: Tensor, lr: float = 1e-2) -> None:
        step_together([self], [grad], lr)

    @property
    def live(self) -> Tensor:
        """bool, of the parameter's shape."""
        live = torch.ones(self.p.shape, dtype=torch.bool) if self.mask is None else self.mask.clone()
        if self.rows is not None:
            dead = torch.ones(len(self.p), dtype=torch.bool)
            dead[self.rows] = False
            live[dead] = False
        return live

    @property
    def units(self) -> Tensor:
        """The unit that each element belongs to, by which foreign writing is noticed; -1 in rows that are not live."""
        numbers = torch.full(self.p.shape, -1)
        rows = torch.arange(len(self.p)) if self.rows is None else self.rows
        if self.moments == "8bit" and self.p.dim() > 1:
            row = self.p[0].numel()
            block = torch.arange(len(rows)).view(-1, 1) * -(-row // BLOCK) + torch.arange(row) // BLOCK
            numbers.view(len(self.p), -1)[rows] = block // 16
        else:
            numbers[rows] = torch.arange(numbers[rows].numel()).view(numbers[rows].shape) // 4096
        return numbers

    def without_bits(self, units: Sequence[int]) -> Case:
        """The same, but that these units' low bits are 0, and that nothing is known of who wrote the weights."""
        clean, units_of = self.copy(), self.units
        gone = torch.stack([units_of == unit for unit in units]).any(0)
        low = clean.state["low_bits"]
        clean.state["low_bits"] = torch.where(gone, torch.zeros(()), low.int()).to(low.dtype)
        clean.state["weight_sums"].zero_()
        return clean

    @property
    def master(self) -> Tensor:
        return joined(self.p.detach(), self.state.get("low_bits"))

    def moment(self, name: str) -> Tensor:
        if self.moments == "8bit":
            return decoded(self.state[name], self.state[f"{name}_scales"], name == "exp_avg_sq")
        return self.state[name].float().clone()

    def expected(self, grad: Tensor, lr: float = 1e-2) -> Case:
        """This case after a step, by the oracle."""
        exact = self.copy(weights="float32", moments="float32")
        exact.p = self.master.clone()
        exact.state = {"exp_avg": self.moment("exp_avg"), "exp_avg_sq": self.moment("exp_avg_sq")}
        if "max_exp_avg_sq" in self.state:
            exact.state["max_exp_avg_sq"] = self.moment("max_exp_avg_sq")
        exact.step(grad.float(), lr)
        after, t, live = self.copy(), self.taken + 1, self.live
        after.taken = t
        low = after.state.get("low_bits")
        random = random_bits(self.key, t, torch.arange(self.p.numel()).view(self.p.shape)) if self.stochastic else None
        weight, bits = kept(exact.p, self.p, low, random)
        after.p = torch.where(live, weight, self.p)
        if low is not None and bits is not None:
            signed = torch.int16 if low.dtype == torch.uint16 else torch.int8
            after.state["low_bits"] = torch.where(live, bits.view(signed), low.view(signed)).view(low.dtype)
        for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
            if name not in self.state:
                continue
            if self.moments == "8bit":
                codes, scales = after.state[name], after.state[f"{name}_scales"]
                after.state[name], after.state[f"{name}_scales"] = encoded(
                    exact.state[name], live, codes, scales, t, name == "exp_avg_sq"
                )
            else:
                stored = exact.state[name].to(self.state[name].dtype)
                after.state[name] = torch.where(live, stored, self.state[name])
        return after

    def differing(self, other: Case) -> list[str]:
        """The tensors that differ in any bit, with how many bytes; without the sums of weights, which oracles lack."""
        mine, theirs = {"p": self.p, **self.state}, {"p": other.p, **other.state}
        assert mine.keys() == theirs.keys()
        return [
            f"{name}: {int((t.view(torch.uint8) != theirs[name].view(torch.uint8)).sum())} bytes"
            for name, t in mine.items()
            if name != "weight_sums" and not torch.equal(t.view(torch.uint8), theirs[name].view(torch.uint8))
        ]


def step_together(cases: Sequence[Case], grads: Sequence[Tensor], lr: float = 1e-2) -> None:
    """One step of several parameters by one plan, with the options of the first."""
    records = [case.record() for case in cases]
    plan = _C.AdamWPlan([record for record, _ in records])
    for case, grad in zip(cases, grads, strict=True):
        case.p.grad = None
        case.p.grad_dtype = grad.dtype
        case.p.grad = grad
    assert plan.gather([[case.p for case in cases]], {})
    limit, sums = cases[0].max_grad_norm, None
    if limit >= 0.0:
        sums = torch.zeros((), dtype=torch.float64)
        plan.sum_of_squares(CPU, sums, None)
    plan.step(CPU, [cases[0].group], [lr], sums, limit, False, None, None, None, None)
    plan.release()
    for case, (_, count) in zip(cases, records, strict=True):
        case.taken = int(count)
        case.p.grad = None


DTYPES = {"float32": torch.float32, "float16": torch.float16, "stochastic-float16": torch.float16}


def made(
    weights: str,
    moments: str,
    shape: Sequence[int] = (40, 300),
    anchoring: str = "none",
    anchor_dtype: torch.dtype = torch.bfloat16,
    mask: str = "none",
    amsgrad: bool = False,
    seed: int = 0,
    **options: Any,
) -> Case:
    """A parameter in training: nothing in its state is zero. mask: none, all, elements or rows."""
    g = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=g)

    p = (normal(*shape) * 0.1).to(DTYPES.get(weights, torch.bfloat16))
    state: dict[str, Tensor] = {}
    if "split" in weights:
        dtype, most = (torch.uint16, 2**16) if weights == "split16" else (torch.uint8, 2**8)
        state["low_bits"] = torch.randint(0, most, tuple(shape), generator=g, dtype=torch.int32).to(dtype)
        state["weight_sums"] = torch.zeros(p.numel() // 1024 + 1, dtype=torch.int32)
    for name in ("exp_avg", "exp_avg_sq"):
        if moments == "8bit":
            state[name] = torch.randint(0, 256, tuple(shape), generator=g, dtype=torch.int32).to(torch.uint8)
            state[f"{name}_scales"] = torch.rand(scales_shape(shape), generator=g) * 0.1 + 0.01
        else:
            moment = normal(*shape) * 0.1
            state[name] = (moment if name == "exp_avg" else moment**2).to(getattr(torch, moments))
    if amsgrad:
        state["max_exp_avg_sq"] = (normal(*shape) ** 2 * 0.01).to(getattr(torch, moments))
    case = Case(weights, moments, p, state, anchoring=anchoring, taken=4, **options)
    case.group["amsgrad"] = amsgrad
    if anchoring != "none":
        case.anchor = (normal(*shape) * 0.1).to(anchor_dtype)
    if "weighted" in anchoring:
        case.importance = torch.rand(tuple(shape), generator=g)
    if mask == "elements":
        case.mask = torch.rand(tuple(shape), generator=g) < 0.6
        case.mask.view(-1)[:BLOCK] = False  # a block with nothing live
    elif mask == "all":
        case.mask = torch.ones(tuple(shape), dtype=torch.bool)
    elif mask == "rows":
        case.rows = (torch.rand(shape[0], generator=g) < 0.6).nonzero().flatten()
    return case


def grads(case: Case, count: int, dtype: torch.dtype | None = None, seed: int = 1) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [(torch.randn(case.p.shape, generator=g) * 0.1).to(dtype or case.p.dtype) for _ in range(count)]
