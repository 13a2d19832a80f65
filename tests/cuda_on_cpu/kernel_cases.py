"""Runs of AdamW whose every bit is known to be the same from the CPU loops and from the CUDA kernels.

They run over the ordinary module and over the kernels compiled for the host, in a process each (see
test_cuda_on_cpu.py), and on a GPU where there is one (test_cuda.py). Nothing here may depend on which of them it is.
Where a norm is needed, gradients are multiples of 1/64, so that their squares add up exactly in any order.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import fastft

CHUNK = 16384
UNIT = 4096
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Dtypes of parameters and moments.
COMBINATIONS = (
    (torch.float32, None),
    (torch.bfloat16, None),
    (torch.bfloat16, torch.float32),
    (torch.float16, None),
    (torch.float16, torch.float32),
    (torch.float64, None),
)
MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
Outcome = dict[str, Tensor]


def short(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")


class Random:
    """Values that depend on the seed alone."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def values(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).to(dtype)

    def sixty_fourths(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return (torch.randint(-64, 65, shape, generator=self.generator) / 64).to(dtype)

    def importance(self, *shape: int) -> Tensor:
        magnitudes = 10 ** (5 * torch.rand(shape, generator=self.generator, dtype=torch.float64) - 3)
        return (magnitudes * self.mask(*shape, live=0.7)).float()

    def mask(self, *shape: int, live: float = 0.6) -> Tensor:
        return torch.rand(shape, generator=self.generator) < live


def outcome(optimizer: torch.optim.Optimizer) -> Outcome:
    """Everything a step writes."""
    found = {}
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for i, p in enumerate(params):
        found[f"{i}"] = p.detach().cpu().clone()
        for key, value in optimizer.state.get(p, {}).items():
            found[f"{i}.{key}"] = value.cpu().clone()
    if getattr(optimizer, "grad_norm", None) is not None:
        found["grad_norm"] = optimizer.grad_norm.cpu().clone()
        found["skipped_steps"] = optimizer.skipped_steps.cpu()
    return found


def differing(a: Outcome, b: Outcome) -> list[str]:
    """The names of tensors whose bits are not the same."""
    names = [name for name in {**a, **b} if name not in a or name not in b]
    for name in a.keys() & b.keys():
        x, y = a[name], b[name]
        if x.dtype != y.dtype or x.shape != y.shape or not torch.equal(bits(x), bits(y)):
            names.append(name)
    return sorted(names)


def bits(t: Tensor) -> Tensor:
    """As integers: NaN equals itself, and -0 is not 0."""
    return t.contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()])


def misaligned(t: Tensor) -> Tensor:
    """A copy that begins one element past a 16-byte boundary."""
    padded = torch.empty(t.numel() + 16 // t.element_size() + 1, dtype=t.dtype, device=t.device)
    first = -(padded.data_ptr() // t.element_size()) % (16 // t.element_size()) + 1
    return padded[first : first + t.numel()].view(t.shape).copy_(t)


def parameters(random: Random, dtype: torch.dtype, device: str = "cpu") -> list[nn.Parameter]:
    """Every shape that a kernel treats in a way of its own."""
    shapes = [(), (1,), (7,), (CHUNK - 1,), (CHUNK,), (CHUNK + 1,), (2 * CHUNK + 3,), (0,), (3, 0)]
    shapes += [(33, 17), (40, 32), (600, 64), (5, 3), (1000,), (6, 4, 8)]
    tensors = [random.values(*shape, dtype=dtype).to(device) for shape in shapes]
    tensors.append(misaligned(random.values(CHUNK + 5, dtype=dtype).to(device)))
    tensors.append(random.values(30, 20, dtype=dtype).to(device).t())
    tensors.append(random.values(2, 3, 4, 4, dtype=dtype).to(device, memory_format=torch.channels_last))
    return [nn.Parameter(t) for t in tensors]


def every_option(
    dtype: torch.dtype,
    state_dtype: torch.dtype | None,
    anchor_mode: str = "decoupled",
    anchor_dtype: torch.dtype | None = None,
    grad_dtype: torch.dtype | None = None,
    amsgrad: bool = True,
    maximize: bool = False,
    clip: bool = True,
    scaler: bool = True,
    capturable: bool = False,
    importance_dtype: torch.dtype | None = None,
    device: str = "cpu",
) -> Outcome:
    """Two groups over all shapes, with an anchor, masks by row and by element, and a late parameter.

    With a dtype for it, the anchor has an importance: of a third of the elements 0, of others from 1e-3 to 100.
    """
    random = Random(0)
    params = parameters(random, dtype, device)
    half = len(params) // 2
    named = [(f"p{i}", p) for i, p in enumerate(params)]
    groups: list[dict[str, Any]] = [
        {"params": named[:half], "lr": 1e-2, "weight_decay": 0.1, "anchor_decay": 3.0},
        {"params": named[half:], "lr": 3e-3, "betas": (0.8, 0.95), "eps": 1e-6, "anchor_decay": 0.7},
    ]
    anchor = fastft.Anchor.snapshot(named, dtype=anchor_dtype, exclude=["p3"])
    if importance_dtype is not None:
        anchor = anchor.with_importance(
            {name: random.importance(*p.shape) for name, p in named}, dtype=importance_dtype
        )
    optimizer = fastft.AdamW(
        groups,
        anchor=anchor,
        anchor_mode=anchor_mode,
        state_dtype=state_dtype,
        max_grad_norm=1.5 if clip else None,
        amsgrad=amsgrad,
        maximize=maximize,
        capturable=capturable,
    )
    for i, p in enumerate(params):
        if i % 3 == 1 and p.dim() > 0:  # both kinds, for rows that are short, long, odd and apart
            optimizer.set_update_mask(p, random.mask(p.shape[0]))
        elif i % 3 == 2:
            optimizer.set_update_mask(p, random.mask(*p.shape))
    draw = random.sixty_fourths if clip else random.values
    for step in range(4):
        for i, p in enumerate(params):
            grad = torch.empty_like(p, dtype=grad_dtype or dtype).copy_(draw(*p.shape, dtype=torch.float64))
            p.grad = None if i % 4 == 2 and step < 2 else as_grad(p, grad)
        if clip and scaler:
            optimizer.grad_scale = torch.tensor(4.0, device=device)
            optimizer.found_inf = torch.tensor(1.0 if step == 1 else 0.0, device=device)
        optimizer.step()
    return outcome(optimizer)


def host_counted(device: str) -> dict[str, Callable[[], Outcome]]:
    """Cases whose bias corrections the host works out, on any device: there the same bits too."""
    found: dict[str, Callable[[], Outcome]] = {}
    for (dtype, state), mode, weighted in itertools.product(COMBINATIONS, ("decoupled", "l2"), (False, True)):
        found[f"{short(dtype)}-{short(state)}-{mode}{'-weighted' * weighted}"] = functools.partial(
            every_option,
            dtype,
            state,
            anchor_mode=mode,
            maximize=mode == "l2",
            scaler=False,
            importance_dtype=torch.bfloat16 if weighted else None,
            device=device,
        )
    for dtype, state in COMBINATIONS:
        if dtype != torch.float64:
            found[f"{short(dtype)}-{short(state)}-selective"] = functools.partial(
                projected, dtype, state, device=device
            )
    for form, mode in itertools.product(FORMATS, ("decoupled", "l2")):
        found[f"few-bits-{format_name(*form)}-{mode}"] = functools.partial(
            few_bits, *form, anchor_mode=mode, anchor_dtype=torch.float16 if mode == "l2" else None, device=device
        )
    return found


def as_grad(p: Tensor, grad: Tensor) -> Tensor:
    """Ready for ``p.grad = ...``, which otherwise wants the parameter's dtype."""
    p.grad = None
    p.grad_dtype = grad.dtype
    return grad


def projected(
    dtype: torch.dtype,
    state_dtype: torch.dtype | None,
    anchor_decay: float = 0.7,
    capturable: bool = False,
    scaler: bool = False,
    device: str = "cpu",
) -> Outcome:
    """Selective projection of every shape, beside tensors that are free and a group that is pulled.

    Gradients lead away from the anchor and then back a little, so that momentum takes most tensors on and they are
    projected. Their sums depend on the order of additions, but what becomes of them in float32 nearly never does.
    """
    random = Random(1)
    params = parameters(random, dtype, device)
    named = [(f"p{i}", p) for i, p in enumerate(params)]
    groups = [
        {
            "params": named[:-1],
            "lr": 1e-2,
            "weight_decay": 0.1,
            "anchor_mode": "selective",
            "anchor_decay": anchor_decay,
        },
        {"params": named[-1:], "lr": 1e-2, "anchor_decay": 3.0},
    ]
    homes = [(name, p.detach() + random.values(*p.shape, dtype=dtype).to(device)) for name, p in named]
    anchor = fastft.Anchor.snapshot(homes, exclude=["p4"])
    optimizer = fastft.AdamW(groups, anchor=anchor, state_dtype=state_dtype, capturable=capturable)
    for i, p in enumerate(params):
        if i % 3 == 1 and p.dim() > 0:
            optimizer.set_update_mask(p, random.mask(p.shape[0]))
        elif i % 3 == 2:
            optimizer.set_update_mask(p, random.mask(*p.shape))
    for step in range(6):
        for i, (p, (_, home)) in enumerate(zip(params, homes, strict=True)):
            p.grad = None if i == 3 and step == 2 else (p.detach() - home) * (-1.0 if step % 3 < 2 else 0.125)
        if scaler:
            optimizer.grad_scale = torch.tensor(4.0, device=device)
            optimizer.found_inf = torch.tensor(1.0 if step == 3 else 0.0, device=device)
        optimizer.step()
    return outcome(optimizer)


# Weights and moments in few bits: dtype, state_dtype, extra_bits, rounding.
FORMATS: tuple[tuple[torch.dtype, Any, int, str], ...] = (
    *((torch.float32, state, 0, "nearest") for state in (torch.bfloat16, "8bit")),
    (torch.bfloat16, "8bit", 0, "nearest"),
    *(
        (torch.bfloat16, state, extra_bits, rounding)
        for extra_bits, rounding in ((16, "nearest"), (8, "nearest"), (0, "stochastic"), (8, "stochastic"))
        for state in (torch.float32, torch.bfloat16, "8bit")
    ),
    (torch.float16, torch.bfloat16, 0, "nearest"),
    (torch.float16, "8bit", 0, "nearest"),
    (torch.float16, torch.float32, 0, "stochastic"),
    (torch.float16, "8bit", 0, "stochastic"),
)


def format_name(dtype: torch.dtype, state_dtype: Any, extra_bits: int, rounding: str) -> str:
    state = state_dtype if isinstance(state_dtype, str) else short(state_dtype)
    return f"{short(dtype)}-{state}-{extra_bits}-{rounding}"


def blocky_parameters(random: Random, dtype: torch.dtype, device: str = "cpu") -> list[nn.Parameter]:
    """Rows that blocks of 8-bit moments and random bits divide, and rows that they do not; below and above a chunk."""
    shapes = [(7,), (CHUNK + 1,), (24, 704), (70, 64), (40, 257), (33, 17), (2 * CHUNK + 24,), (40, 512), (65, 72)]
    tensors = [random.values(*shape, dtype=dtype).to(device) for shape in shapes]
    tensors.append(misaligned(random.values(4104, dtype=dtype).to(device)))
    tensors.append(random.values(30, 200, dtype=dtype).to(device).t())
    return [nn.Parameter(t) for t in tensors]


def few_bits(
    dtype: torch.dtype,
    state_dtype: Any,
    extra_bits: int,
    rounding: Any,
    *,
    anchor_mode: str = "decoupled",
    anchor_dtype: torch.dtype | None = None,
    grad_dtype: torch.dtype | None = None,
    importance_dtype: torch.dtype | None = None,
    amsgrad: bool = False,
    clip: bool = False,
    capturable: bool = False,
    device: str = "cpu",
) -> Outcome:
    """Some steps that are small beside the weights, with an anchor, decay, masks, a skip and foreign writes."""
    random = Random(20)
    params = blocky_parameters(random, dtype, device)
    named = [(f"p{i}", p) for i, p in enumerate(params)]
    homes = [(name, p.detach() + random.values(*p.shape, dtype=dtype).to(device)) for name, p in named]
    anchor = fastft.Anchor.snapshot(homes, dtype=anchor_dtype, exclude=["p3", "p6"])
    if importance_dtype is not None:
        anchor = anchor.with_importance(
            {name: random.importance(*p.shape) for name, p in named}, dtype=importance_dtype
        )
    optimizer = fastft.AdamW(
        [
            {"params": named[:5], "lr": 1e-3, "weight_decay": 0.1, "anchor_decay": 3.0},
            {"params": named[5:], "lr": 3e-3, "betas": (0.8, 0.95), "anchor_decay": 0.7, "maximize": True},
        ],
        anchor=anchor,
        anchor_mode=anchor_mode,
        state_dtype=state_dtype,
        extra_bits=extra_bits,
        rounding=rounding,
        rounding_seed=7,
        max_grad_norm=1.5 if clip else None,
        amsgrad=amsgrad,
        capturable=capturable,
    )
    draw = random.sixty_fourths if clip else random.values
    for step in range(5):
        for i, p in enumerate(params):
            if step % 3 == 0 and i % 3 == 1 and p.dim() > 1:
                optimizer.set_update_mask(p, random.mask(p.shape[0]))
            elif step % 3 == 0 and i % 3 == 2:
                mask, half = random.mask(*p.shape), p.numel() // 2
                if step > 0:  # in blocks that have had live elements, one or none
                    mask.view(-1)[:half] &= random.mask(half, live=0.004)
                optimizer.set_update_mask(p, mask)
            grad = torch.empty_like(p, dtype=grad_dtype or dtype).copy_(draw(*p.shape, dtype=torch.float64))
            p.grad = None if i % 4 == 2 and step < 2 else as_grad(p, grad)
            if step == 3 and i % 2 == 0:
                p.data.mul_(1.25)
            elif step == 2 or step == 4:  # a row, or an element
                p.data[p.shape[0] // 2 if step == 2 else tuple(n // 3 for n in p.shape)] += 0.5
        if clip:
            optimizer.grad_scale = torch.tensor(4.0, device=device)
            optimizer.found_inf = torch.tensor(1.0 if step == 1 else 0.0, device=device)
        optimizer.step()
    return outcome(optimizer)


def few_bits_cases() -> Iterator[tuple[str, Callable[[], Outcome]]]:
    for number, (dtype, state, extra_bits, rounding) in enumerate(FORMATS):
        name = format_name(dtype, state, extra_bits, rounding)
        eight = state == "8bit"
        one = functools.partial(few_bits, dtype, state, extra_bits, rounding)
        yield f"lean-{name}", functools.partial(one, capturable=number % 2 == 1)
        yield (
            f"generic-{name}",
            functools.partial(
                one,
                anchor_mode="l2" if number % 2 else "decoupled",
                anchor_dtype=torch.float16,
                grad_dtype=None if number % 3 else torch.float32,
                importance_dtype=torch.float32 if number % 3 or eight else None,
                amsgrad=not eight,
                clip=True,
            ),
        )
        if not eight and state != torch.float32:
            yield f"selective-{name}", functools.partial(one, anchor_mode="selective", capturable=number % 2 == 0)


def many_groups() -> Outcome:
    """More groups and step counts than one launch has room for."""
    count = 170
    random = Random(2)
    params = [nn.Parameter(random.values(3 + i % 7)) for i in range(2 * count)]
    groups = [
        {"params": params[2 * i : 2 * i + 2], "lr": 1e-2 / (i + 1), "weight_decay": 0.01 * i, "maximize": i % 2 == 1}
        for i in range(count)
    ]
    optimizer = fastft.AdamW(groups, max_grad_norm=1.0, anchor="init", anchor_decay=0.5)
    for step in range(2):
        for i, p in enumerate(params):
            p.grad = random.sixty_fourths(*p.shape) if step > 0 or i % 2 else None
        optimizer.step()
    return outcome(optimizer)


def mixed_dtypes() -> Outcome:
    """All dtypes in one group."""
    random = Random(3)
    params = [nn.Parameter(random.values(CHUNK + 9 * i, dtype=DTYPES[i % 4])) for i in range(9)]
    optimizer = fastft.AdamW(params, lr=1e-2, anchor="init", anchor_decay=2.0, max_grad_norm=1.0)
    for _ in range(3):
        for p in params:
            p.grad = random.sixty_fourths(*p.shape, dtype=p.dtype)
        optimizer.step()
    return outcome(optimizer)


def special_values() -> Outcome:
    """Infinities, NaN, subnormals and signed zeros, in every dtype, with nothing that would skip them."""
    random = Random(4)
    values = torch.tensor([0.0, -0.0, 1e-40, -1e-7, 6e-5, 3e38, 65504.0, 65520.0, float("inf"), float("nan")])
    pairs = torch.cartesian_prod(values, values)
    params = [nn.Parameter(pairs[:, 0].to(dtype)) for dtype in DTYPES]
    optimizer = fastft.AdamW(params, lr=1e-2, weight_decay=0.1, amsgrad=True)
    for _ in range(2):
        for p in params:
            p.grad = pairs[:, 1].to(p.dtype)
        optimizer.step()
        for p in params:
            p.grad = random.values(*p.shape, dtype=p.dtype)
        optimizer.step()
    return outcome(optimizer)


def cases() -> Iterator[tuple[str, Callable[[], Outcome]]]:
    """(name, what to run)."""
    for (dtype, state), clip in itertools.product(COMBINATIONS, (True, False)):
        suffix = f"{short(dtype)}-{short(state)}-{'clip' if clip else 'plain'}"
        yield f"all-{suffix}", lambda d=dtype, s=state, c=clip: every_option(d, s, clip=c)  # type: ignore[misc]
    for (dtype, state), capturable in itertools.product(COMBINATIONS, (True, False)):
        yield (
            f"l2-{short(dtype)}-{short(state)}-{'device' if capturable else 'host'}",
            lambda d=dtype, s=state, c=capturable: every_option(  # type: ignore[misc]
                d, s, anchor_mode="l2", amsgrad=False, maximize=True, clip=False, capturable=c
            ),
        )
    for dtype, other in itertools.product(DTYPES, DTYPES):
        if other != dtype and (other != torch.float64):
            yield (
                f"grads-and-anchors-{short(dtype)}-{short(other)}",
                lambda d=dtype, o=other: every_option(d, None, anchor_dtype=o, grad_dtype=o),  # type: ignore[misc]
            )
    for (dtype, state), (mode, other) in itertools.product(COMBINATIONS, (("decoupled", None), ("l2", torch.bfloat16))):
        yield (
            f"weighted-{short(dtype)}-{short(state)}-{mode}",
            lambda d=dtype, s=state, m=mode, o=other: every_option(  # type: ignore[misc]
                d, s, anchor_mode=m, importance_dtype=o or d, amsgrad=m == "l2", capturable=o is None
            ),
        )
    for (dtype, state), on_device in itertools.product(COMBINATIONS, (False, True)):
        if dtype != torch.float64:  # which shows every rounding of the sums
            yield (
                f"projected-{short(dtype)}-{short(state)}-{'device' if on_device else 'host'}",
                lambda d=dtype, s=state, o=on_device: projected(d, s, capturable=o, scaler=o),  # type: ignore[misc]
            )
    yield from few_bits_cases()
    yield "many-groups", many_groups
    yield "mixed-dtypes", mixed_dtypes
    yield "special-values", special_values


CASES: dict[str, Callable[[], Outcome]] = dict(cases())
