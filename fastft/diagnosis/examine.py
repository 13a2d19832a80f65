"""``doctor``: counts the weights of a model by their bits, and computes for each value whether a step can move it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from fastft.checks import check_not_negative, check_positive
from fastft.names import named_tensors
from fastft.optim import lost_changes
from fastft.optim.low_precision import StateDtype
from fastft.optim.tensors import local
from fastft.weight_file import FILE_DTYPES, WeightFile

from .report import DoctorReport, Kind, Movement
from .settings import Stored, Weights, memory_of, name_of

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
IN_FILES = dict(zip(FILE_DTYPES, (torch.float32, torch.bfloat16, torch.float16, torch.float64), strict=True))
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
CHUNK = 1 << 18
"""Elements counted at a time."""


def doctor(
    model: nn.Module | str | os.PathLike[str],
    *,
    lr: float = 1e-5,
    dtype: torch.dtype | str | None = None,
    weight_decay: float = 0.01,
    anchor_decay: float = 0.0,
    gpu_memory: float | str | None = None,
) -> DoctorReport:
    """Before training: what share of the weights a step can move, and the memory that each setting takes.

    A weight in few bits that is rounded to nearest moves only if a step exceeds half the distance to its neighbour;
    otherwise it stands still for good. Counted are all weights of the model, for a step of lr in either direction
    (|m̂/√v̂| of Adam is 1 in the first step and smaller later: the shares are upper bounds), for the decay lr ·
    weight_decay · \\|w\\|, and for the pull lr · anchor_decay of a weight 2 % away from its anchor; the last two by
    themselves, as where a gradient is 0. Only the numbers in the files are read, a tensor at a time, with no network.

    Args:
        model: a module, whose frozen parameters count as weights only; or a folder with ``model.safetensors`` or its
            shards and their index, or one ``.safetensors`` file.
        lr: learning rate, at its peak.
        dtype: bfloat16, float16 or float32 (also as text), to train in; None: as the model is.
        weight_decay, anchor_decay: as for :class:`fastft.AdamW`; with an ``anchor_decay`` above 0 an anchor is counted,
            in the dtype of the weights.
        gpu_memory: bytes, or a text such as ``"24GB"`` or ``"80GiB"``: then the report says what fits. Activations are
            not counted.

    Returns:
        The report. ``str()`` of it is for a terminal; ``movements``, ``memories``, ``kinds``, ``notes`` and ``advice``
        are its parts, and it has ``to_markdown()``, ``to_json()``, ``plot(path)`` and ``write(folder)``.

    Raises:
        ValueError: a number out of range, an unknown dtype, no file of weights, or one that is damaged.
    """
    check_positive("lr", lr)
    check_not_negative("weight_decay", weight_decay)
    check_not_negative("anchor_decay", anchor_decay)
    wanted, room = read_dtype(dtype), None if gpu_memory is None else read_memory(gpu_memory)
    name, tensors, left_out, values = of_module(model) if isinstance(model, nn.Module) else of_file(Path(model))
    sizes: dict[torch.dtype, int] = {}
    for tensor in tensors:
        sizes[tensor.like.dtype] = sizes.get(tensor.like.dtype, 0) + tensor.like.numel()
    if not sum(sizes.values()):
        raise ValueError(f"{name}: expected weights in bfloat16, float16, float32 or float64, found none")
    stored = max(sizes, key=lambda found: sizes[found])
    kept = choices(wanted or (stored if stored in DTYPES.values() else torch.float32))
    main = stored if wanted is None else None
    movements, kinds, not_finite = look(
        tensors, values, kept, main, {"step": lr, "decay": lr * weight_decay, "pull": min(1.0, lr * anchor_decay)}
    )
    return DoctorReport(
        model=name,
        tensors=len(tensors),
        elements=sum(sizes.values()),
        trainable=sum(tensor.like.numel() for tensor in tensors if tensor.trainable),
        stored=name_of(stored),
        lr=lr,
        weight_decay=weight_decay,
        anchor_decay=anchor_decay,
        gpu_memory=room,
        movements=tuple(movements),
        kinds=tuple(kinds),
        memories=tuple(
            memory_of(tensors, each, state, main=main, anchored=anchor_decay > 0)
            for each in kept
            for state in state_dtypes(each)
        ),
        not_finite=not_finite,
        left_out=left_out,
    )


# -- arguments -------------------------------------------------------------------------------------------------


def read_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """The dtype of a text such as ``"bfloat16"``; None stays None."""
    found = DTYPES.get(dtype.removeprefix("torch.")) if isinstance(dtype, str) else dtype
    if dtype is not None and found not in DTYPES.values():
        raise ValueError(f"dtype: expected {', '.join(DTYPES)} or None, got {dtype!r}")
    return found


def read_memory(text: float | str) -> int:
    """Bytes of a text such as ``"24GB"`` (10⁹ each) or ``"80GiB"`` (2³⁰ each), or of a number of bytes."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?(?:e\d+)?)\s*([kmgt]i?)?b?\s*", str(text), re.IGNORECASE)
    nbytes = int(float(found[1]) * UNITS[(found[2] or "").upper()]) if found else 0
    if nbytes < 1e6:
        raise ValueError(f"gpu_memory: expected a size of at least 1 MB, such as 24GB or 80GiB, got {text!r}")
    return nbytes


def choices(dtype: torch.dtype) -> list[Weights]:
    """The ways to keep weights that the report compares: the dtype as it is first."""
    bits = [
        Weights(torch.bfloat16, extra_bits=8),
        Weights(torch.bfloat16, extra_bits=8, rounding="stochastic"),
        Weights(torch.bfloat16, extra_bits=16),
    ]
    if dtype == torch.float32:
        plain = [Weights(torch.bfloat16), Weights(torch.bfloat16, rounding="stochastic")]
        return [Weights(dtype), *plain, *bits]
    return [Weights(dtype), Weights(dtype, rounding="stochastic"), *bits, Weights(torch.float32)]


def state_dtypes(kept: Weights) -> list[StateDtype]:
    """The moments that the report shows beside these weights."""
    if kept.extra_bits == 16:
        return [None, torch.bfloat16, "8bit"]
    if kept.dtype == torch.float32:
        return [None, "8bit"]
    if kept.extra_bits == 8:  # with either rounding it takes as much
        return ["8bit"] if kept.rounding == "nearest" else []
    return [None] if kept.rounding == "nearest" else ["8bit"]


# -- models ----------------------------------------------------------------------------------------------------


def of_module(model: nn.Module) -> tuple[str, list[Stored], int, Iterable[Tensor]]:
    """(name, tensors, how many were left out, their values in the same order)."""
    found, values, left_out = [], [], 0
    with torch.no_grad():
        for name, p in named_tensors(model):
            if p.is_meta:
                raise ValueError(f"{name}: expected a parameter with values, got one on meta; load the weights first")
            if p.dtype not in IN_FILES.values() or p.layout != torch.strided:
                left_out += 1
                continue
            values.append(local(p.detach()))
            found.append(Stored(name, torch.empty_like(values[-1], device="meta"), p.requires_grad))
    return type(model).__name__, found, left_out, values


def of_file(path: Path) -> tuple[str, list[Stored], int, Iterable[Tensor]]:
    """The same of a file or folder, whose tensors are read as they are asked for."""
    path = path.expanduser()
    if not path.exists():
        raise ValueError(f"{path}: expected a folder with a model or a .safetensors file on this disk, found nothing")
    if path.is_file() and path.suffix not in (".safetensors", ".json"):
        raise ValueError(f"{path}: expected a .safetensors file, or a folder or index of them")
    try:
        file = WeightFile.open(path, checksum=False)
    except (ValueError, AttributeError, SafetensorError) as error:
        said = str(error) if str(path) in str(error) else f"{path}: cannot be read: {error}"
        raise ValueError(said) from error
    found = [
        Stored(name, torch.empty(shape, dtype=IN_FILES[dtype], device="meta"))
        for name, (dtype, shape) in file.headers.items()
        if dtype in IN_FILES
    ]
    return str(path), found, len(file.headers) - len(found), map(file.read, [tensor.name for tensor in found])


# -- movement --------------------------------------------------------------------------------------------------


def look(
    tensors: list[Stored],
    values: Iterable[Tensor],
    kept: list[Weights],
    main: torch.dtype | None,
    rates: dict[str, float],
) -> tuple[list[Movement], list[Kind], int]:
    """(movements in the order of ``kept``, kinds of tensors, weights that are not finite)."""

    @cache
    def asked(counted: torch.dtype, stored: torch.dtype) -> Tensor:
        """[choices, effects, (moved, to be moved), values] for tensors that are stored so."""
        ways = [(each, each.dtype_of(stored, main)) for each in kept]
        return torch.stack(
            [torch.stack([flags(counted, dtype, each, *rate) for rate in rates.items()]) for each, dtype in ways]
        )

    totals = torch.zeros(len(kept), len(rates), 2, dtype=torch.float64)
    by_kind: dict[str, tuple[Tensor, list[int]]] = {}
    not_finite = 0
    for tensor, value in zip(tensors, values, strict=True):
        if not tensor.trainable:
            continue
        # Values in 16 bits are few enough to be counted, so each is looked at once. Of float32 weights the size matters
        # alone, which the counts of their nearest bfloat16 have.
        counted = torch.float16 if torch.float16 in (tensor.like.dtype, kept[0].dtype) else torch.bfloat16
        counts = count(value, counted)
        not_finite += int(counts[~every_value(counted).isfinite()].sum())
        found = asked(counted, tensor.like.dtype) @ counts
        totals += found
        kind = re.sub(r"(?<![^.])\d+(?![^.])", "*", tensor.name)
        sums, sizes = by_kind.setdefault(kind, (torch.zeros_like(found), [0, 0]))
        sums += found
        sizes[0] += 1
        sizes[1] += tensor.like.numel()
    movements = [Movement(each, *shares(found, rates)) for each, found in zip(kept, totals, strict=True)]
    kinds = [Kind(kind, n, size, *shares(sums[0], rates)) for kind, (sums, (n, size)) in by_kind.items()]
    return movements, sorted(kinds, key=lambda kind: kind.step), not_finite


def shares(found: Tensor, rates: dict[str, float]) -> tuple[float, float | None, float | None]:
    """Moved / wanting to, for step, decay and pull; None for one whose rate is 0."""
    step, decay, pull = (float(moved / wanting) if wanting else 1.0 for moved, wanting in found)
    return step, decay if rates["decay"] else None, pull if rates["pull"] else None


def count(value: Tensor, dtype: torch.dtype) -> Tensor:
    """How often each of the 65,536 values of a 16-bit dtype occurs: float64, on the CPU."""
    counts = np.zeros(1 << 16, dtype=np.int64)
    for part in value.reshape(-1).split(CHUNK):
        counts += np.bincount(part.to("cpu", dtype).view(torch.uint16).numpy(), minlength=1 << 16)
    return torch.from_numpy(counts).double()


def every_value(dtype: torch.dtype) -> Tensor:
    """The 65,536 values of a 16-bit dtype, in the order of their bits."""
    return torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(dtype)


def flags(counted: torch.dtype, dtype: torch.dtype, kept: Weights, effect: str, rate: float) -> Tensor:
    """For each value of ``counted``, kept as ``dtype``: [whether it is moved, whether it is to be moved], float64."""
    values = every_value(counted)
    finite = values.isfinite()
    w = values.to(dtype)
    # On average a weight that is rounded stochastically moves as one that is not rounded.
    on_average = kept.rounding == "stochastic" and dtype.itemsize == 2
    at = w.float() if on_average else w
    extra_bits = kept.extra_bits if dtype == torch.bfloat16 and not on_average else 0
    if effect == "step":
        moved = sum(lost_changes.moved(at, change, extra_bits).double() for change in (-rate, rate)) / 2
        return torch.stack([moved * finite, finite.double()])
    change = lost_changes.pull(at, rate, distance=lost_changes.DISTANCE if effect == "pull" else 1.0)
    wanting = finite & (w != 0)
    return torch.stack([lost_changes.moved(at, change, extra_bits) & wanting, wanting]).double()
