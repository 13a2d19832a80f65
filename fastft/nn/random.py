"""Seed and offset of a mask, drawn from torch's generators."""

from __future__ import annotations

import threading
from typing import TypeAlias

import torch
from torch import Tensor

# An argument of the core: (p, seed, offset), or (p, state) with an int64[2] tensor {seed, offset} on the device.
Random: TypeAlias = "tuple[float, int, int] | tuple[float, Tensor]"

# By how much one call moves a CUDA generator on. Offsets count 32-bit words and must stay multiples of four.
OFFSET_STEP = 4


class Draws(threading.local):
    """A buffer per thread for the number that a CPU generator draws: allocating one takes longer than drawing."""

    def __init__(self) -> None:
        place = torch.empty((), dtype=torch.int64, device="cpu")
        self.draw_and_number = place.random_, memoryview(place.numpy())  # type: ignore[arg-type]


draws = Draws()


def draw(p: float, tensor: Tensor, generator: torch.Generator | None) -> Random:
    """The mask of the next call on ``tensor``, drawn from the generator (None: the default one of the device)."""
    if tensor.is_cpu:
        draw_number, number = draws.draw_and_number
        if generator is None:
            draw_number()
        else:
            draw_number(generator=generator)
        return p, number[()], 0
    if torch.cuda.is_current_stream_capturing():
        return p, draw_state(tensor.device, generator)
    if generator is None:
        generator = torch.cuda.default_generators[tensor.device.index]
    elif generator.device.type != tensor.device.type:
        raise RuntimeError(
            f"Expected a '{tensor.device.type}' device type for generator but found '{generator.device.type}'"
        )
    offset = generator.get_offset()
    generator.set_offset(offset + OFFSET_STEP)
    return p, signed(generator.initial_seed()), offset


def draw_state(device: torch.device, generator: torch.Generator | None) -> Tensor:
    """A new {seed, offset} on the device, drawn by an ordinary operation: every run of a compiled or captured graph
    draws another one."""
    return torch.randint(0, 2**63 - 1, (2,), dtype=torch.int64, device=device, generator=generator)


def signed(seed: int) -> int:
    """The same 64 bits as a signed integer, which the core takes."""
    return (seed + 2**63) % 2**64 - 2**63
