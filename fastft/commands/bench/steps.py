"""AdamW's steps, as data: ``CASES``. Torch's are the fastest that a torch user would write."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

import fastft

from .cases import FASTFT, Case, ReadyCase
from .harness import Work
from .peers import ADAMW, PEERS, SAME_RESULT, Absent

FUSED = "torch fused"
FOREACH = "torch foreach"
COMPILED = "torch compiled"
FULL = "fastft, whole step"

ANCHOR_DECAY = 10.0
MAX_GRAD_NORM = 1.0
TOLERANCE = {torch.float32: {"params": 1e-4, "moments": 1e-3}, torch.bfloat16: {"params": 5e-3, "moments": 5e-3}}
"""How far, relative to their norm, torch's numbers may be from ours: torch sums the norm in float32 (8e-5 off for 32M
elements), and where a gradient nearly vanishes, the first step has the sign of its rounding."""
COMPARED = 32
"""Of how many tensors the numbers are compared: the others are stepped alike."""

Step = tuple[Work, torch.optim.Optimizer]
Ours = tuple[Work, fastft.AdamW]
MakeStep = Callable[[Any], Step]
"""From parameters, or groups of them."""


# -- how steps are made: from parameters that have the anchor's values -------------------------------------------


def ours(params: list[Parameter], **options: Any) -> Ours:
    optimizer = fastft.AdamW(params, **ADAMW, **options)
    return optimizer.step, optimizer


def ours_frozen(params: list[Parameter], *, live: float) -> Step:
    step, optimizer = ours(params)
    optimizer.freeze(params[round(live * len(params)) :])
    return step, optimizer


def ours_row_masked(params: list[Parameter], *, live: float) -> Step:
    step, optimizer = ours(params)
    generator = torch.Generator().manual_seed(0)
    for p in params:
        rows = torch.zeros(p.shape[0], dtype=torch.bool)
        rows[torch.randperm(p.shape[0], generator=generator)[: round(live * p.shape[0])]] = True
        optimizer.set_update_mask(p, rows)
    return step, optimizer


def torch_step(params: list[Parameter], **options: Any) -> Step:
    optimizer = torch.optim.AdamW(params, **ADAMW, **options)
    return optimizer.step, optimizer


def torch_compiled(params: list[Parameter]) -> Step:
    lr = torch.tensor(ADAMW["lr"], device=params[0].device)  # as a number, each change would compile again
    optimizer = torch.optim.AdamW(params, **{**ADAMW, "lr": lr}, capturable=params[0].is_cuda)
    return torch.compile(optimizer.step), optimizer


def torch_frozen(params: list[Parameter], *, live: float, **options: Any) -> Step:
    for p in params[round(live * len(params)) :]:
        p.grad = None
    return torch_step(params, **options)


def torch_skip(params: list[Parameter], *, clip: bool, **options: Any) -> Step:
    """The norm, a check of it on the host, and the step unless it is inf or NaN."""
    optimizer = torch.optim.AdamW(params, **ADAMW, **options)

    def step() -> None:
        norm = torch.nn.utils.clip_grad_norm_(params, MAX_GRAD_NORM if clip else math.inf)
        if norm.isfinite():
            optimizer.step()

    return step, optimizer


def torch_clip(params: list[Parameter], **options: Any) -> Step:
    optimizer = torch.optim.AdamW(params, **ADAMW, **options)

    def step() -> None:
        torch.nn.utils.clip_grad_norm_(params, MAX_GRAD_NORM)
        optimizer.step()

    return step, optimizer


def torch_anchor(params: list[Parameter], **options: Any) -> Step:
    anchors = [p.detach().clone() for p in params]
    tensors: list[Tensor] = list(params)
    optimizer = torch.optim.AdamW(params, **ADAMW, **options)

    @torch.no_grad()
    def step() -> None:
        torch._foreach_lerp_(tensors, anchors, ADAMW["lr"] * ANCHOR_DECAY)
        optimizer.step()

    return step, optimizer


def peer_step(params: list[Parameter], *, name: str) -> Step:
    optimizer = PEERS[name](params)
    return optimizer.step, optimizer


def grouped(params: list[Parameter], *, groups: int, make: Callable[[Any], Step]) -> Step:
    """A step over ``groups`` groups, each with a learning rate of its own."""
    size = math.ceil(len(params) / groups)
    parts = [params[i : i + size] for i in range(0, len(params), size)]
    # Tuned apart, so that nobody may take the groups together.
    return make([{"params": part, "lr": ADAMW["lr"] / (1 + i)} for i, part in enumerate(parts)])


def torch_clip_anchor(params: list[Parameter], *, mode: str, **options: Any) -> Step:
    """Clipping, the anchor and the step one after the other, in place, nothing allocated."""
    anchors = [p.detach().clone() for p in params]
    tensors: list[Tensor] = list(params)
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
            torch._foreach_lerp_(tensors, anchors, ADAMW["lr"] * ANCHOR_DECAY)
        optimizer.step()

    return step, optimizer


def clip_anchor_steps(mode: str) -> dict[str, MakeStep]:
    return {
        FASTFT: partial(ours, anchor="init", anchor_decay=ANCHOR_DECAY, anchor_mode=mode, max_grad_norm=MAX_GRAD_NORM),
        FUSED: partial(torch_clip_anchor, mode=mode, fused=True),
        FOREACH: partial(torch_clip_anchor, mode=mode, foreach=True),
    }


# -- what is measured --------------------------------------------------------------------------------------------


Made = tuple[Work, torch.optim.Optimizer, list[Parameter]]


@dataclass(frozen=True)
class Steps:
    """Steps over parameters of these shapes: the first is measured against the others."""

    shapes: tuple[tuple[int, ...], ...]
    steps: Mapping[str, MakeStep]
    dtype: torch.dtype = torch.float32
    same_work: tuple[str, ...] = (FUSED, FOREACH, COMPILED, *SAME_RESULT)
    """Which others, where they are there, must come to the first one's numbers."""

    @property
    def numel(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes)

    def prepare(self, device: torch.device) -> ReadyCase:
        """Take one step of each and compare the results."""
        made: dict[str, Made] = {}
        absent = {}
        for name, make_step in self.steps.items():
            try:
                made[name] = self.make(make_step, device)
                made[name][0]()
            except Absent as reason:
                absent[name] = str(reason)
            except Exception as error:  # a foreign step may fail in any way; torch's and ours may not
                if name not in PEERS and name != COMPILED:
                    raise
                absent[name] = f"{type(error).__name__}: {error}".splitlines()[0]
                made.pop(name, None)
        self.compare(made)
        return ReadyCase({name: step for name, (step, _, _) in made.items()}, absent)

    def make(self, make_step: MakeStep, device: torch.device) -> Made:
        """A step over new parameters: a little off their anchor, and each with a gradient."""
        generator = torch.Generator(device).manual_seed(0)
        pools: dict[tuple[tuple[int, ...], float], list[Tensor]] = {}

        def normal(index: int, shape: tuple[int, ...], scale: float) -> Tensor:
            """Equal shapes take turns among some values: drawing takes longer than all else."""
            pool = pools.setdefault((shape, scale), [])
            if len(pool) < 4:
                values = torch.empty(shape, dtype=self.dtype, device=device)
                pool.append(values.normal_(std=scale, generator=generator))
            return pool[index % len(pool)]

        params = [Parameter(normal(i, shape, 0.02).clone()) for i, shape in enumerate(self.shapes)]
        for i, p in enumerate(params):
            p.grad = normal(i, tuple(p.shape), 1.0).clone()
        step, optimizer = make_step(params)
        with torch.no_grad():
            for i, p in enumerate(params):
                p.add_(normal(i, tuple(p.shape), 1e-3))
        return step, optimizer, params

    @torch.no_grad()
    def compare(self, made: Mapping[str, Made]) -> None:
        """Raise unless, after as many steps, the first step's parameters and moments are those of the others."""
        _, subject, our_params = made[FASTFT]
        for name, (_, optimizer, params) in made.items():
            if name not in self.same_work:
                continue
            pairs = list(zip(our_params, params, strict=True))[:COMPARED]
            stepped = [(p, q) for p, q in pairs if "exp_avg" in optimizer.state.get(q, {})]
            compared = [("params", "parameters", pairs)]
            for key in () if name in SAME_RESULT else ("exp_avg", "exp_avg_sq"):
                moments = [(subject.state[p][key], optimizer.state[q][key]) for p, q in stepped]
                compared.append(("moments", key, moments))
            for kind, what, tensors in compared:
                error = norm(x - y for x, y in tensors) / norm(y for _, y in tensors)
                if not error <= TOLERANCE[self.dtype][kind]:
                    raise AssertionError(f"{what} of {FASTFT} and {name} differ by {error:.1e}")


def norm(tensors: Iterable[Tensor]) -> float:
    return math.sqrt(sum(float(t.double().square().sum()) for t in tensors))


def case(
    name: str,
    family: str,
    title: str,
    steps: Steps,
    bytes_per_element: int | None = None,
    *,
    live: float = 1.0,
    target: float | None = None,
    axis: Mapping[str, float] | None = None,
    host: bool = False,
) -> Case:
    """``bytes_per_element``: what ours must read and write for each element that it steps."""
    # Parameter, gradient, two moments, perhaps the anchor and what is drawn.
    memory = 5.5 * steps.numel * steps.dtype.itemsize * len(steps.steps)
    nbytes = None if bytes_per_element is None else live * bytes_per_element * steps.numel
    return Case(name, family, title, steps.prepare, nbytes, memory, target, axis or {}, host)


FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16
BIG = ((2048, 2048),) * 8
MANY = ((320, 1000),) * 100
SMALL = (4,)
LIVE = (1.0, 0.75, 0.5, 0.25, 0.1, 0.05, 0.01)
SIZES = (1, 10, 100, 350, 1500)
TENSORS = (10, 100, 300, 1000, 5000)
GROUPS = (1, 2, 100)
IN_FUSED: MakeStep = partial(torch_step, fused=True)
PLAIN: dict[str, MakeStep] = {FASTFT: ours, FUSED: IN_FUSED, FOREACH: partial(torch_step, foreach=True)}
LIBRARIES: dict[str, MakeStep] = {name: partial(peer_step, name=name) for name in PEERS}
# Compiling many tensors takes minutes.
OTHERS: dict[str, MakeStep] = {COMPILED: torch_compiled, **LIBRARIES}


def torch_in(make: Callable[..., Step], **options: Any) -> dict[str, MakeStep]:
    return {FUSED: partial(make, fused=True, **options), FOREACH: partial(make, foreach=True, **options)}


ANCHOR: dict[str, Any] = {"anchor": "init", "anchor_decay": ANCHOR_DECAY}
CLIP: dict[str, Any] = {"max_grad_norm": MAX_GRAD_NORM}
SKIP: dict[str, Any] = {"skip_nonfinite": True}
STEP = (
    case("plain", "step", "plain step, 32M float32 in 8 tensors", Steps(BIG, PLAIN), 28, target=1.05),
    case(
        "anchor",
        "step",
        "anchor + step, 32M float32",
        Steps(BIG, {FASTFT: partial(ours, **ANCHOR), **torch_in(torch_anchor)}),
        32,
    ),
    case(
        "clip",
        "step",
        "clip + step, 32M float32",
        Steps(BIG, {FASTFT: partial(ours, **CLIP), **torch_in(torch_clip)}),
        32,
    ),
    case(
        "skip",
        "step",
        "skip if not finite + step, 32M float32",
        Steps(BIG, {FASTFT: partial(ours, **SKIP), **torch_in(torch_skip, clip=False)}),
        32,
    ),
    case(
        "clip_skip",
        "step",
        "clip + skip if not finite + step, 32M float32",
        Steps(BIG, {FASTFT: partial(ours, **CLIP, **SKIP), **torch_in(torch_skip, clip=True)}),
        32,
    ),
    case(
        "clip_anchor_l2",
        "step",
        "clip + L2 anchor + step, 32M float32",
        Steps(BIG, clip_anchor_steps("l2")),
        36,
        target=0.50,
    ),
    case(
        "clip_anchor_decoupled",
        "step",
        "clip + decoupled anchor + step, 32M float32",
        Steps(BIG, clip_anchor_steps("decoupled")),
        36,
    ),
    case("bf16", "step", "plain step, 32M bfloat16", Steps(BIG, PLAIN, BFLOAT16), 14),
    case(
        "bf16_float32_state",
        "step",
        "plain step, 32M bfloat16, moments in float32 (torch: bfloat16)",
        Steps(BIG, {**PLAIN, FASTFT: partial(ours, state_dtype=FLOAT32)}, BFLOAT16),
        22,
    ),
    case(
        "bf16_clip_anchor_decoupled",
        "step",
        "clip + decoupled anchor + step, 32M bfloat16",
        Steps(BIG, clip_anchor_steps("decoupled"), BFLOAT16),
        18,
    ),
)
PEER = tuple(
    case(name, "peers", title, Steps(shapes, {FASTFT: ours, FUSED: IN_FUSED, **others}, dtype), nbytes)
    for name, title, shapes, others, dtype, nbytes in (
        ("peers", "plain step, 8M float32 in 2 tensors, all peers", BIG[:2], OTHERS, FLOAT32, 28),
        ("peers_bf16", "plain step, 8M bfloat16 in 2 tensors, all peers", BIG[:2], OTHERS, BFLOAT16, 14),
        ("peers_small", "plain step, 64 tensors of 4 float32, all peers", (SMALL,) * 64, LIBRARIES, FLOAT32, None),
    )
)
SIZE = tuple(
    case(
        f"size_{millions}m_{short}",
        "size",
        f"plain step, {millions:,}M {short}",
        Steps(((1024, 1024),) * millions, {FASTFT: ours, FUSED: IN_FUSED}, dtype),
        nbytes,
        axis={"parameters": millions * 2**20},
    )
    for dtype, short, nbytes in ((FLOAT32, "float32", 28), (BFLOAT16, "bfloat16", 14))
    for millions in SIZES
)
MANY_TENSORS = tuple(
    case(
        "small" if count == 300 else f"tensors_{count}",
        "tensors",
        f"plain step, {count:,} tensors of 4 float32",
        Steps((SMALL,) * count, PLAIN),
        target=0.08 if count == 300 else None,
        axis={"tensors": count},
        host=True,
    )
    for count in TENSORS
)
MANY_GROUPS = tuple(
    case(
        f"groups_{groups}",
        "groups",
        f"plain step, 200 tensors of 1,000 float32 in {groups} group{'s' if groups > 1 else ''}",
        Steps(((1000,),) * 200, {n: partial(grouped, groups=groups, make=make) for n, make in PLAIN.items()}),
        axis={"groups": groups},
        host=True,
    )
    for groups in GROUPS
)
FROZEN_TENSORS = tuple(
    case(
        f"frozen_tensors_{100 - round(100 * live)}",
        "frozen_tensors",
        f"{100 - round(100 * live)} % of 100 tensors frozen, 32M float32",
        Steps(
            MANY,
            {
                FASTFT: partial(ours_frozen, live=live),
                FULL: ours,
                FUSED: partial(torch_frozen, live=live, fused=True),
            },
        ),
        28,
        live=live,
        target=0.13 if live == 0.1 else None,
        axis={"live": live},
    )
    for live in LIVE
)
MASKED_ROWS = tuple(
    case(
        f"masked_rows_{100 - round(100 * live)}",
        "masked_rows",
        f"{100 - round(100 * live)} % of the rows masked, 32M float32 in 8 tensors",
        Steps(BIG, {FASTFT: partial(ours_row_masked, live=live), FULL: ours, FUSED: IN_FUSED}, same_work=()),
        28,
        live=live,
        target=0.15 if live == 0.1 else None,
        axis={"live": live},
    )
    for live in LIVE
)
CASES = (*STEP, *PEER, *SIZE, *MANY_TENSORS, *MANY_GROUPS, *FROZEN_TENSORS, *MASKED_ROWS)
