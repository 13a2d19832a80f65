"""``AdamW`` with weights and moments in few bits, and beside it the same steps in float32, rounded by ``reference``.

Every bit is known: a step in few bits is the float32 step of what they stand for, rounded again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from optim_cases import importances, normal, same_bits
from torch import Tensor, nn

import fastft
from fastft.optim import reference
from fastft.optim.low_precision import rounding_key
from fastft.optim.state import CODED, moment_of

BF16 = torch.bfloat16
# (dtype of the weights, options)
SETTINGS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "split16": (BF16, {"extra_bits": 16}),
    "split16_float32_moments": (BF16, {"extra_bits": 16, "state_dtype": torch.float32}),
    "split8": (BF16, {"extra_bits": 8}),
    "split8_stochastic": (BF16, {"extra_bits": 8, "rounding": "stochastic", "rounding_seed": 5}),
    "stochastic": (BF16, {"rounding": "stochastic", "rounding_seed": 5}),
    "stochastic_float16": (torch.float16, {"rounding": "stochastic", "state_dtype": torch.float32}),
    "8bit": (BF16, {"state_dtype": "8bit"}),
    "8bit_split16": (BF16, {"state_dtype": "8bit", "extra_bits": 16}),
    "8bit_split8_stochastic": (BF16, {"state_dtype": "8bit", "extra_bits": 8, "rounding": "stochastic"}),
    "8bit_float32": (torch.float32, {"state_dtype": "8bit"}),
    "8bit_float16": (torch.float16, {"state_dtype": "8bit"}),
    "bfloat16_moments": (torch.float32, {"state_dtype": BF16}),
    "bfloat16_moments_float16": (torch.float16, {"state_dtype": BF16, "rounding": "stochastic"}),
}
HAVE_LOW_BITS = [name for name, (_, options) in SETTINGS.items() if options.get("extra_bits")]
# The first and the third take 8-bit moments, the third in a last block that is shorter.
SHAPES = ((40, 128), (33,), (13, 5, 70), (9, 7))


def parameters(dtype: torch.dtype, shapes: Sequence[Sequence[int]] = SHAPES, scale: float = 0.1) -> list[nn.Parameter]:
    return [nn.Parameter(normal(shape, dtype, seed=i, scale=scale)) for i, shape in enumerate(shapes)]


def named(params: Sequence[Tensor]) -> list[tuple[str, Tensor]]:
    return [(f"p{i}", p) for i, p in enumerate(params)]


def give_grads(params: Sequence[Tensor], step: int, scale: float = 1e-2) -> None:
    """Those of a step, of sizes that lie some orders of magnitude apart from tensor to tensor and row to row."""
    for i, p in enumerate(params):
        grad = normal(p.shape, seed=1000 * step + i, scale=scale) * (1.0 + 10.0 * (i % 2))
        if p.dim() > 1:
            grad = grad * torch.logspace(-3, 0, p.shape[0]).view(-1, *[1] * (p.dim() - 1))
        p.grad = grad.to(p.dtype)


def kept_moment(state: Mapping[str, Tensor], key: str) -> Tensor | tuple[Tensor, Tensor]:
    """A moment as it is kept: a tensor, or codes and scales; copies."""
    if key in state:
        return state[key].clone()
    return state[CODED[key][0]].clone(), state[CODED[key][1]].clone()


@dataclass
class Beside:
    """An optimizer, and another one over float32 weights that is given the first one's numbers before each step."""

    setting: str
    shapes: Sequence[Sequence[int]] = SHAPES
    anchored: bool = True
    weighted: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        dtype, chosen = SETTINGS[self.setting]
        self.params = parameters(dtype, self.shapes)
        self.exact = [nn.Parameter(p.detach().float().clone()) for p in self.params]
        self.extra_bits: int = chosen.get("extra_bits", 0)
        self.seed: int | None = chosen.get("rounding_seed", 0) if chosen.get("rounding") == "stochastic" else None
        anchors: list[fastft.Anchor | None] = [None, None]
        if self.anchored:
            values = [(f"p{i}", normal(p.shape, seed=50 + i, scale=0.1)) for i, p in enumerate(self.params)]
            # Not the last, so that one is free.
            anchors = [fastft.Anchor.snapshot(values[:-1]) for _ in range(2)]
            if self.weighted:
                found = {name: importances(value.shape, seed=9) for name, value in values[:-1]}
                anchors = [anchor.with_importance(found) for anchor in anchors if anchor is not None]
        shared = {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.8, 0.9), **self.options}
        if self.anchored:
            shared.setdefault("anchor_decay", 3.0)
        self.optimizer = fastft.AdamW(named(self.params), anchor=anchors[0], **{**shared, **chosen})
        self.beside = fastft.AdamW(named(self.exact), anchor=anchors[1], **shared)

    def set_mask(self, position: int, mask: Tensor | None) -> None:
        self.optimizer.set_update_mask(self.params[position], mask)
        self.beside.set_update_mask(self.exact[position], mask)

    def freeze(self, position: int) -> None:
        self.optimizer.freeze(self.params[position])
        self.beside.freeze(self.exact[position])

    def unfreeze(self, position: int) -> None:
        self.optimizer.unfreeze(self.params[position])
        self.beside.unfreeze(self.exact[position])

    @torch.no_grad()
    def step(self, step: int, grad_scale: float | None = None, found_inf: float | None = None) -> None:
        """A step of both, compared bit for bit."""
        give_grads(self.params, step)
        for p, exact in zip(self.params, self.exact, strict=True):
            assert p.grad is not None
            exact.grad = p.grad.to(torch.float32, copy=True)  # each step unscales its own
        for optimizer in (self.optimizer, self.beside):
            for key, value in (("grad_scale", grad_scale), ("found_inf", found_inf)):
                if value is not None:
                    setattr(optimizer, key, torch.tensor(value))
        before = [self._adopt(p, exact) for p, exact in zip(self.params, self.exact, strict=True)]
        self.optimizer.step()
        self.beside.step()
        if self.beside.grad_norm is not None:
            assert self.optimizer.grad_norm is not None
            torch.testing.assert_close(self.optimizer.grad_norm, self.beside.grad_norm, equal_nan=True)
        for position in range(len(self.params)):
            self._check(position, before[position])

    def _adopt(self, p: Tensor, exact: Tensor) -> dict[str, Any]:
        """The float32 optimizer's numbers are now those of the other; returns what this one keeps."""
        state = self.optimizer.state.get(p, {})
        before: dict[str, Any] = {"p": p.detach().clone(), "state": {k: v.clone() for k, v in state.items()}}
        exact.copy_(reference.read_weight(p, state.get("low_bits")))
        for key, value in self.beside.state.get(exact, {}).items():
            if key in ("exp_avg", "exp_avg_sq"):  # both have state, or neither
                value.copy_(moment_of(state, p, key))
            elif key == "step":
                value.copy_(state[key])
        return before

    def _check(self, position: int, before: dict[str, Any]) -> None:
        p, exact = self.params[position], self.exact[position]
        old, state, wide = before["state"], self.optimizer.state.get(p, {}), self.beside.state.get(exact, {})
        name = f"{self.setting}: p{position}"
        assert bool(state) == bool(wide), name
        if not state:
            assert same_bits(p, before["p"]), name
            return
        t = int(state["step"])
        assert t == int(wide["step"]), name
        if t == int(old.get("step", torch.tensor(0.0))):  # frozen or skipped
            assert same_bits(p, before["p"]), name
            assert all(same_bits(value, state[key]) for key, value in old.items()), name
            return
        mask = self.optimizer.update_mask(p)
        live = torch.ones_like(p, dtype=torch.bool)
        if mask is not None:
            live = mask.view(mask.shape + (1,) * (p.dim() - mask.dim())).expand(p.shape)
        stochastic = self.seed is not None and p.dtype != torch.float32
        random = reference.random_bits(rounding_key(self.seed or 0, position), t, p.shape) if stochastic else None
        weight, low = reference.write_weight(exact.detach().double(), p.dtype, self.extra_bits, random)
        assert same_bits(p, torch.where(live, weight, before["p"])), f"{name}: weight, step {t}"
        assert ("low_bits" in state) == (low is not None), name
        if low is not None:
            was = old.get("low_bits", torch.zeros_like(low))
            assert same_bits(state["low_bits"], torch.where(live, low, was)), f"{name}: low bits, step {t}"
        for key in ("exp_avg", "exp_avg_sq"):
            now = kept_moment(state, key)
            zeros = torch.zeros_like(now) if isinstance(now, Tensor) else tuple(map(torch.zeros_like, now))
            was = kept_moment(old, key) if "step" in old else zeros
            expected = reference.write_moment(wide[key], key, t, was, mask)
            if isinstance(expected, Tensor) and isinstance(was, Tensor) and isinstance(now, Tensor):
                assert same_bits(now, torch.where(live, expected, was)), f"{name}: {key}, step {t}"
            else:
                assert same_bits(now[0], expected[0]), f"{name}: codes of {key}, step {t}"
                assert same_bits(now[1], expected[1]), f"{name}: scales of {key}, step {t}"


def state_of(optimizer: fastft.AdamW, params: Sequence[Tensor]) -> list[dict[str, Tensor]]:
    return [{key: value.clone() for key, value in optimizer.state.get(p, {}).items()} for p in params]


def assert_same_run(ours: Any, theirs: Any) -> None:
    """Two (params, optimizer) have the same bits."""
    for i, (p, q) in enumerate(zip(ours[0], theirs[0], strict=True)):
        assert same_bits(p, q), f"p{i}"
        mine, others = ours[1].state.get(p, {}), theirs[1].state.get(q, {})
        assert mine.keys() == others.keys(), f"p{i}"
        for key in mine:
            assert same_bits(mine[key], others[key]), f"p{i}: {key}"
