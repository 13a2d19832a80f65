"""The steps that are measured, as data: ``CASES``. What torch does is what a torch user would best write."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from harness import Measurement, Work, alternate
from torch import Tensor
from torch.nn import Parameter

import fastft

FASTFT = "fastft"
FUSED = "torch fused"
FOREACH = "torch foreach"
FULL = "fastft, whole step"

ADAMW = {"lr": 1e-3, "weight_decay": 0.5}
ANCHOR_DECAY = 10.0
MAX_GRAD_NORM = 1.0
TOLERANCE = {torch.float32: {"params": 1e-4, "moments": 1e-3}, torch.bfloat16: {"params": 5e-3, "moments": 5e-3}}
"""How far, relative to their norm, torch's numbers may be from ours: torch sums the norm in float32 (8e-5 off for 32M
elements), and where a gradient nearly vanishes, the first step has the sign of its rounding."""
LIVE = 0.1
"""The part of the parameters that is stepped where the rest is frozen or masked."""

Step = tuple[Work, torch.optim.Optimizer]
MakeStep = Callable[[list[Parameter]], Step]


# -- how steps are made: from parameters that have the anchor's values -------------------------------------------


def ours(params: list[Parameter], **options: Any) -> Step:
    optimizer = fastft.AdamW(params, **ADAMW, **options)
    return optimizer.step, optimizer


def ours_frozen(params: list[Parameter]) -> Step:
    step, optimizer = ours(params)
    optimizer.freeze(frozen_of(params))
    return step, optimizer


def ours_row_masked(params: list[Parameter]) -> Step:
    step, optimizer = ours(params)
    for p in params:
        rows = torch.zeros(p.shape[0], dtype=torch.bool)
        rows[torch.randperm(p.shape[0], generator=seeded("cpu"))[: round(LIVE * p.shape[0])]] = True
        optimizer.set_update_mask(p, rows)
    return step, optimizer


def torch_step(params: list[Parameter], **options: Any) -> Step:
    optimizer = torch.optim.AdamW(params, **ADAMW, **options)
    return optimizer.step, optimizer


def torch_frozen(params: list[Parameter], **options: Any) -> Step:
    for p in frozen_of(params):
        p.grad = None
    return torch_step(params, **options)


def torch_clip_anchor(params: list[Parameter], *, mode: str, **options: Any) -> Step:
    """Clipping, the anchor and the step one after the other, in place, nothing allocated."""
    anchors = [p.detach().clone() for p in params]
    difference = torch.empty_like(params[0], requires_grad=False)
    optimizer = torch.optim.AdamW(params, **ADAMW, **options)

    @torch.no_grad()
    def step() -> None:
        torch.nn.utils.clip_grad_norm_(params, MAX_GRAD_NORM)
        if mode == "l2":
            for p, anchor in zip(params, anchors, strict=True):
                assert p.grad is not None
                p.grad.add_(torch.sub(p, anchor, out=difference), alpha=ANCHOR_DECAY)
        else:
            torch._foreach_lerp_(params, anchors, ADAMW["lr"] * ANCHOR_DECAY)
        optimizer.step()

    return step, optimizer


def clip_anchor_steps(mode: str) -> dict[str, MakeStep]:
    return {
        FASTFT: partial(ours, anchor="init", anchor_decay=ANCHOR_DECAY, anchor_mode=mode, max_grad_norm=MAX_GRAD_NORM),
        FUSED: partial(torch_clip_anchor, mode=mode, fused=True),
        FOREACH: partial(torch_clip_anchor, mode=mode, foreach=True),
    }


def frozen_of(params: list[Parameter]) -> list[Parameter]:
    return params[round(LIVE * len(params)) :]


# -- what is measured --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """Steps over equal parameters: the first is measured against the others, above all against the second."""

    name: str
    title: str
    shapes: tuple[tuple[int, ...], ...]
    steps: Mapping[str, MakeStep]
    bytes_per_element: int
    """What the first step must read and write for each element that it steps."""
    target: float | None = None
    """What the ratio of the first step to the second ought not to exceed on a CPU with 2 threads."""
    live: float = 1.0
    dtype: torch.dtype = torch.float32
    same_work: bool = True
    """Whether the first step and torch's must come to the same numbers."""

    @property
    def subject(self) -> str:
        return next(iter(self.steps))

    @property
    def baseline(self) -> str:
        return list(self.steps)[1]

    @property
    def nbytes(self) -> float:
        return self.live * self.bytes_per_element * sum(torch.Size(shape).numel() for shape in self.shapes)


BIG = ((2048, 2048),) * 8
MANY = ((400, 1000),) * 80
SMALL = ((4,),) * 300
PLAIN = {FASTFT: ours, FUSED: partial(torch_step, fused=True), FOREACH: partial(torch_step, foreach=True)}

CASES = (
    Case("plain", "plain step, 32M float32 in 8 tensors", BIG, PLAIN, bytes_per_element=28, target=1.05),
    Case(
        "clip_anchor_l2",
        "clip + L2 anchor + step, 32M float32",
        BIG,
        clip_anchor_steps("l2"),
        bytes_per_element=36,
        target=0.50,
    ),
    Case(
        "clip_anchor_decoupled",
        "clip + decoupled anchor + step, 32M float32",
        BIG,
        clip_anchor_steps("decoupled"),
        bytes_per_element=36,
    ),
    Case("small", "plain step, 300 tensors of 4 float32", SMALL, PLAIN, bytes_per_element=28, target=0.08),
    Case(
        "frozen_tensors",
        "90 % of 80 tensors frozen, 32M float32",
        MANY,
        {FASTFT: ours_frozen, FULL: ours, FUSED: partial(torch_frozen, fused=True)},
        bytes_per_element=28,
        target=0.13,
        live=LIVE,
    ),
    Case(
        "masked_rows",
        "90 % of the rows masked, 32M float32 in 8 tensors",
        BIG,
        {FASTFT: ours_row_masked, FULL: ours, FUSED: partial(torch_step, fused=True)},
        bytes_per_element=28,
        target=0.15,
        live=LIVE,
        same_work=False,
    ),
    Case("bf16", "plain step, 32M bfloat16", BIG, PLAIN, bytes_per_element=14, dtype=torch.bfloat16),
    Case(
        "bf16_float32_state",
        "plain step, 32M bfloat16, moments in float32 (torch: bfloat16)",
        BIG,
        {**PLAIN, FASTFT: partial(ours, state_dtype=torch.float32)},
        bytes_per_element=22,
        dtype=torch.bfloat16,
    ),
)


# -- measuring ---------------------------------------------------------------------------------------------------


def seeded(device: torch.device | str) -> torch.Generator:
    return torch.Generator(device).manual_seed(0)


def make(case: Case, name: str, device: torch.device) -> tuple[Work, torch.optim.Optimizer, list[Parameter]]:
    """The named step over new parameters: a little off their anchor, and each with a gradient."""
    generator = seeded(device)

    def normal(shape: tuple[int, ...], scale: float) -> Tensor:
        values = torch.empty(shape, dtype=case.dtype, device=device)
        return values.normal_(std=scale, generator=generator)

    params = [Parameter(normal(shape, 0.02)) for shape in case.shapes]
    for p in params:
        p.grad = normal(tuple(p.shape), 1.0)
    step, optimizer = case.steps[name](params)
    with torch.no_grad():
        for p in params:
            p.add_(normal(tuple(p.shape), 1e-3))
    return step, optimizer, params


@torch.no_grad()
def check_agreement(case: Case, made: Mapping[str, tuple[Work, torch.optim.Optimizer, list[Parameter]]]) -> None:
    """Raise unless, after as many steps, the first step's parameters and moments are those of torch's steps."""
    _, subject, our_params = made[case.subject]
    for name, (_, optimizer, params) in made.items():
        if not case.same_work or name not in (FUSED, FOREACH):
            continue
        stepped = [(p, q) for p, q in zip(our_params, params, strict=True) if q in optimizer.state]
        compared = [("params", "parameters", list(zip(our_params, params, strict=True)))]
        for key in ("exp_avg", "exp_avg_sq"):
            compared.append(("moments", key, [(subject.state[p][key], optimizer.state[q][key]) for p, q in stepped]))
        for kind, what, pairs in compared:
            error = norm(x - y for x, y in pairs) / norm(y for _, y in pairs)
            if not error <= TOLERANCE[case.dtype][kind]:
                raise AssertionError(f"{case.name}: {what} of {case.subject} and {name} differ by {error:.1e}")


def norm(tensors: Iterable[Tensor]) -> float:
    return sum(float(t.double().square().sum()) for t in tensors) ** 0.5


def measure(case: Case, device: torch.device, rounds: int) -> Measurement:
    """Take one step of each and compare what they did; then time them alternately."""
    made = {name: make(case, name, device) for name in case.steps}
    for step, _, _ in made.values():
        step()
    check_agreement(case, made)
    return alternate({name: step for name, (step, _, _) in made.items()}, device, rounds)
