"""In how many bits a parameter and its state are kept: ``state_dtype``, ``extra_bits``, ``rounding``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from .formats import row_of
from .tensors import is_dtensor, local

StateDtype = torch.dtype | Literal["8bit"] | None
Rounding = Literal["nearest", "stochastic"]
STATE_DTYPES = (None, torch.float32, torch.bfloat16, "8bit")
ROUNDINGS = ("nearest", "stochastic")
LOW_DTYPES = {0: None, 8: torch.uint8, 16: torch.uint16}
SIXTEEN_BIT = (torch.bfloat16, torch.float16)
SMALLEST, SHORTEST_ROW = 4096, 64  # elements of a tensor, and of a row, from which on moments are kept in 8 bits
MASK64 = (1 << 64) - 1


@dataclass(frozen=True)
class Precision:
    """The options of an optimizer, checked.

    Raises:
        ValueError: for one out of range, or two that do not go together.
    """

    state_dtype: StateDtype = None
    extra_bits: int = 0
    rounding: Rounding = "nearest"
    rounding_seed: int = 0

    def __post_init__(self) -> None:
        if not any(self.state_dtype is known or self.state_dtype == known for known in STATE_DTYPES):
            raise ValueError(
                f'state_dtype: expected None, torch.float32, torch.bfloat16 or "8bit", got {self.state_dtype!r}'
            )
        if type(self.extra_bits) is not int or self.extra_bits not in LOW_DTYPES:
            raise ValueError(f"extra_bits: expected 0, 8 or 16, got {self.extra_bits!r}")
        if self.rounding not in ROUNDINGS:
            raise ValueError(f'rounding: expected "nearest" or "stochastic", got {self.rounding!r}')
        if isinstance(self.rounding_seed, bool) or not isinstance(self.rounding_seed, int):
            raise ValueError(f"rounding_seed: expected an integer, got {self.rounding_seed!r}")
        if self.rounding == "stochastic" and self.extra_bits == 16:
            raise ValueError(
                'rounding: expected "nearest" with extra_bits=16, with which nothing is rounded, got "stochastic"'
            )

    def __str__(self) -> str:
        seed = f", rounding_seed: {self.rounding_seed}" if self.rounding == "stochastic" else ""
        return f"state_dtype: {self.state_dtype}, extra_bits: {self.extra_bits}, rounding: {self.rounding}{seed}"

    # -- what is kept for a parameter --------------------------------------------------------------------------

    def moments(self, p: Tensor) -> torch.dtype | Literal["8bit"]:
        """How the moments of ``p`` are kept: without ``state_dtype`` in the dtype of ``p``, or of its master."""
        if self.state_dtype is None:
            return p.dtype if self.low_dtype(p) is None else torch.float32
        if p.dtype not in (torch.float32, *SIXTEEN_BIT):
            return p.dtype
        if isinstance(self.state_dtype, torch.dtype):
            wide = self.state_dtype == torch.float32 and p.dtype == torch.float32
            return p.dtype if wide else self.state_dtype
        return "8bit" if takes_codes(p) else torch.float32

    def low_dtype(self, p: Tensor) -> torch.dtype | None:
        """The dtype of the low bits beside ``p``; None: there are none."""
        return LOW_DTYPES[self.extra_bits] if p.dtype == torch.bfloat16 else None

    def key(self, p: Tensor, position: int) -> int | None:
        """The key by which ``p`` is rounded stochastically; None: to nearest."""
        stochastic = self.rounding == "stochastic" and p.dtype in SIXTEEN_BIT
        return rounding_key(self.rounding_seed, position) if stochastic else None

    def beyond_torch(self, p: Tensor) -> dict[str, bool]:
        """Which of the options change the step of ``p``, so that torch's own cannot take it."""
        return {
            "state_dtype": self.state_dtype is not None and self.moments(p) != p.dtype,
            "extra_bits": self.low_dtype(p) is not None,
            "rounding": self.key(p, 0) is not None,
        }

    def idle(self, params: Sequence[Tensor]) -> list[str]:
        """For each option that changes nothing for any of the parameters: the option, and what it is for."""
        found = []
        if self.state_dtype is not None and all(self.moments(p) != self.state_dtype for p in params):
            sizes = f"contiguous tensors from {SMALLEST} elements on, with rows from {SHORTEST_ROW} on"
            dtypes = "parameters in float32, bfloat16 and float16"
            found.append(f"state_dtype={self.state_dtype!r} is for {sizes if self.state_dtype == '8bit' else dtypes}")
        if self.extra_bits and all(self.low_dtype(p) is None for p in params):
            found.append(f"extra_bits={self.extra_bits} is for bfloat16 parameters")
        if self.rounding == "stochastic" and all(self.key(p, 0) is None for p in params):
            found.append('rounding="stochastic" is for bfloat16 and float16 parameters')
        return found

    # -- checks ------------------------------------------------------------------------------------------------

    def check_parameter(self, p: Tensor, name: str) -> None:
        """Raise for a parameter that an option can do nothing for."""
        if self.extra_bits and p.dtype == torch.float16:
            raise ValueError(
                f"{name}: extra_bits: expected bfloat16 parameters (or float32, which need none), got torch.float16; "
                'rounding="stochastic" takes float16'
            )
        if self.state_dtype == "8bit" and is_dtensor(p) and has_codes_shape(p) and not lies_in_rows(p):
            raise ValueError(
                f'{name}: state_dtype: expected, with "8bit", a DTensor of which each process holds whole rows '
                f"(Shard(0) or Replicate()), got one placed {list(p.placements)}; "  # type: ignore[attr-defined]
                "torch.bfloat16 and torch.float32 take it"
            )

    def check_group(self, group: dict[str, Any], where: str) -> None:
        """Raise for options of a group that 8-bit moments do not go with."""
        if self.state_dtype != "8bit":
            return
        if group.get("amsgrad"):
            raise ValueError(f'{where}: amsgrad: expected False with state_dtype="8bit", got True')
        if group.get("anchor_mode") == "selective":
            raise ValueError(
                f'{where}: anchor_mode: expected "decoupled" or "l2" with state_dtype="8bit", got "selective"'
            )


# -- 8-bit moments -----------------------------------------------------------------------------------------------


def has_codes_shape(p: Tensor) -> bool:
    """Whether a tensor and its rows are large enough for 8-bit moments, and lie in the order of their indices."""
    large = p.dim() > 0 and p.numel() >= SMALLEST and row_of(p.shape) >= SHORTEST_ROW
    return large and local(p).is_contiguous()


def takes_codes(p: Tensor) -> bool:
    """Whether its moments are kept in 8 bits, with ``state_dtype="8bit"``; else in float32."""
    if not has_codes_shape(p):
        return False
    return not is_dtensor(p) or p.dim() > 1 or not any(piece.is_shard() for piece in p.placements)  # type: ignore[attr-defined]


def lies_in_rows(p: Tensor) -> bool:
    """Whether each process of a DTensor holds whole rows. One of a single dimension is kept in float32 and may pass."""
    from torch.distributed.tensor import Replicate, Shard

    pieces = p.placements  # type: ignore[attr-defined]
    return p.dim() == 1 or all(
        type(piece) in (Replicate, Shard) and piece in (Replicate(), Shard(0)) for piece in pieces
    )


# -- stochastic rounding -----------------------------------------------------------------------------------------


def mixed(x: int) -> int:
    """The output function of SplitMix64 (Steele et al. 2014, doi 10.1145/2660193.2660195)."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & MASK64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & MASK64
    return x ^ (x >> 31)


def rounding_key(seed: int, position: int) -> int:
    """The key of the parameter at a position, counted through all groups: 64 bits."""
    step = 0x9E3779B97F4A7C15
    return mixed((mixed((seed + step) & MASK64) + (position + 1) * step) & MASK64)


def element_index(p: Tensor, name: str) -> tuple[int, int, int] | None:
    """Where what this process holds of ``p`` lies in the whole: (row, stride, first) of csrc/math/stochastic.h.

    None for a tensor that is whole.

    Raises:
        ValueError: for a DTensor cut in a way that these three numbers cannot say.
    """
    if not is_dtensor(p):
        return None
    from torch.distributed.tensor import Replicate, Shard

    mesh, pieces = p.device_mesh, p.placements  # type: ignore[attr-defined]
    refused = ValueError(
        f'{name}: rounding: "stochastic" cannot number the elements of a DTensor placed {list(pieces)} on a mesh of '
        f"shape {tuple(mesh.shape)}; extra_bits=16 takes it"
    )
    sizes, offsets = list(p.shape), [0] * p.dim()
    for i, piece in enumerate(pieces):
        if mesh.size(i) == 1 or type(piece) is Replicate:
            continue
        if type(piece) is not Shard:
            raise refused
        d = piece.dim
        chunk = -(-sizes[d] // mesh.size(i))
        start = min(sizes[d], chunk * mesh.get_local_rank(i))
        offsets[d] += start
        sizes[d] = min(chunk, sizes[d] - start)
    stepped = local(p)
    if stepped.numel() == 0:
        return None
    if list(stepped.shape) != sizes:
        raise refused
    strides = p.stride()
    order = sorted((d for d in range(p.dim()) if p.shape[d] > 1), key=lambda d: -strides[d])
    expected = 1
    for d in reversed(order):
        if sizes[d] > 1 and stepped.stride(d) != expected:
            raise refused
        expected *= sizes[d]
    # The innermost dimension that is cut ends a row. Outside of it, only the outermost that is left may be cut: then
    # rows lie one stride apart.
    cut = [place for place, d in enumerate(order) if sizes[d] != p.shape[d]]
    inner = cut[-1] if cut else 0
    outer = [d for d in order[:inner] if sizes[d] > 1]
    if any(sizes[d] != p.shape[d] for d in outer[1:]):
        raise refused
    within = order[inner:]
    first = sum(offsets[d] * strides[d] for d in order)
    return math.prod(sizes[d] for d in within), math.prod(p.shape[d] for d in within), first
