"""Low bits, 8-bit codes and stochastic rounding in plain PyTorch, bit for bit.

The formulas are those of csrc/math/split.h, stochastic.h and block8.h, where they are explained. ``reference`` and the
conversion of checkpoints go by them; the kernels are tested against them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

QUIET_NAN = 0x7FC00000
BLOCK = 256  # elements of a block of codes, at most
PIECE = 1 << 22  # elements that are brought into another format at once, in temporaries several times as large
FLOOR_BITS = 0x37800000  # of FLOOR
FLOOR = 2.0**-16
UNSCALED_BELOW = 1e-36  # blocks whose largest value is below have scale 0
NEAREST = 1 << 31  # a dither of half a step


# -- float32 as a bfloat16 weight and low bits -----------------------------------------------------------------


def join(weight: Tensor, low: Tensor) -> Tensor:
    """The masters (float32) of bfloat16 ``weight`` and its ``low`` bits, uint16 or uint8 of its shape."""
    high = weight.view(torch.int16).to(torch.int32) << 16
    signed = low.view(torch.int8).to(torch.int32) << 8 if low.dtype == torch.uint8 else low.view(torch.int16)
    master = (high + signed).view(torch.float32)
    return torch.where(master.isnan(), high.view(torch.float32), master)  # as in split.h: bits of another weight


def split(master: Tensor, width: int, rounding: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(weight, low bits) of float32 masters: bfloat16, rounded to nearest, and uint16 or uint8.

    Args:
        master: float32.
        width: 16 or 8 low bits.
        rounding: with 8: integers in [0, 256) for stochastic rounding to 24 bits; None: to nearest, ties to even.
    """
    u = master.view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    nan = (u & 0x7FFFFFFF) > 0x7F800000
    if width == 8:
        u = (u + (0x7F + ((u >> 8) & 1) if rounding is None else rounding)) & 0xFFFFFF00
    u = torch.where(nan, QUIET_NAN, u)
    weight = (((u + 0x8000) >> 16) & 0xFFFF).to(torch.uint16).view(torch.bfloat16)
    return weight, (u & 0xFFFF).to(torch.uint16) if width == 16 else ((u >> 8) & 0xFF).to(torch.uint8)


def resized(low: Tensor, dtype: torch.dtype) -> Tensor:
    """Low bits in another width, of the same weight: to 8 bits, rounded to nearest as far as the weight stays."""
    if low.dtype == dtype:
        return low
    if dtype == torch.uint16:
        return (low.view(torch.int8).to(torch.int16) << 8).view(torch.uint16)
    signed = low.view(torch.int16).to(torch.float32) / 256.0
    return signed.round().clamp(-128, 127).to(torch.int8).view(torch.uint8)


# -- stochastic rounding ---------------------------------------------------------------------------------------


def rounding_bits(key: int, step: int, index: Tensor, projection: bool = False) -> Tensor:
    """The 16 random bits of each element, as int64.

    Args:
        key: of the tensor, 64 bits.
        step: its step number; 1 is the first.
        index: int64, where each element lies in the whole tensor, in memory order.
        projection: those of the projection that may follow the step, with the selective anchor.
    """
    words = philox(key, 2 * step + projection, index // 8)
    place = index % 8
    word = torch.stack(words).gather(0, (place // 2).unsqueeze(0)).squeeze(0)
    return (word >> (place % 2 * 16)) & 0xFFFF


def philox(key: int, counter_low: int, counter_high: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10: four words (int64, each below 2³²) for each ``counter_high`` (int64)."""

    def product(factor: int, word: Tensor) -> tuple[Tensor, Tensor]:
        wrapped = factor * word  # modulo 2⁶⁴, which has the right bits
        return (wrapped >> 32) & 0xFFFFFFFF, wrapped & 0xFFFFFFFF

    low = torch.full_like(counter_high, counter_low & 0xFFFFFFFF)
    c = (low, low.new_full(low.shape, counter_low >> 32), counter_high & 0xFFFFFFFF, counter_high >> 32)
    k = [key & 0xFFFFFFFF, (key >> 32) & 0xFFFFFFFF]
    for _ in range(10):
        high0, low0 = product(0xD2511F53, c[0])
        high1, low1 = product(0xCD9E8D57, c[2])
        c = (high1 ^ c[1] ^ k[0], low1, high0 ^ c[3] ^ k[1], low0)
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


def narrow_stochastic(x: Tensor, random: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` (float32) rounded to one of its two neighbours in bfloat16 or float16, by 16 ``random`` bits an element."""
    u = x.view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    magnitude = u & 0x7FFFFFFF
    if dtype == torch.bfloat16:
        found = torch.where(magnitude > 0x7F800000, 0x7FC0, (u + random) >> 16)
        return (found & 0xFFFF).to(torch.uint16).view(dtype)
    small = magnitude < (113 << 23)
    normal = (magnitude - (112 << 23) + (random >> 3)) >> 13
    tiny = torch.where(small, x.abs(), 0.0) * 2.0**40
    subnormal = (tiny.to(torch.int64) + random) >> 16
    half = torch.where(small, subnormal, normal.clamp(max=0x7C00))
    special = torch.where(magnitude > 0x7F800000, 0x7FFF, 0x7C00)
    half = torch.where(magnitude >= (143 << 23), special, half)
    return (half | ((u >> 16) & 0x8000)).to(torch.uint16).view(dtype)


# -- moments in 8 bits -----------------------------------------------------------------------------------------


class Format8(NamedTuple):
    """How a moment is kept in 8 bits: the second without a sign and as its root."""

    shift: int  # mantissa bits that are dropped
    most: int  # the largest code, without the sign
    top: float  # what it stands for
    second: bool


FIRST = Format8(20, 127, 0.9375 - FLOOR, False)
SECOND = Format8(19, 255, 0.96875 - FLOOR, True)
FORMATS = {"exp_avg": FIRST, "exp_avg_sq": SECOND}


def scales_shape(shape: torch.Size) -> tuple[int, ...]:
    """The shape of the scales beside codes of ``shape``: [rows, blocks in a row], or [blocks] of one dimension."""
    blocks = -(-row_of(shape) // BLOCK)
    return (shape[0], blocks) if len(shape) > 1 else (blocks,)


def row_of(shape: torch.Size) -> int:
    """Elements of a row: of the first dimension's one index, or of all of a tensor of one dimension."""
    return shape[1:].numel() if len(shape) > 1 else shape.numel()


def rows_of_piece(shape: torch.Size) -> int:
    """Rows that together have about ``PIECE`` elements, and one at least."""
    return max(1, PIECE // max(1, row_of(shape)))


def in_blocks(values: Tensor, fill: float = 0) -> Tensor:
    """Contiguous ``values`` as [rows, blocks, 256], filled up where a row's last block is shorter."""
    row = row_of(values.shape)
    flat = values.contiguous().view(values.numel() // row if row else 0, row)
    blocks = -(-row // BLOCK)
    if row % BLOCK:
        flat = torch.nn.functional.pad(flat, (0, blocks * BLOCK - row), value=fill)
    return flat.view(flat.shape[0], blocks, BLOCK)


def out_of_blocks(blocks: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of :func:`in_blocks`; contiguous."""
    return blocks.flatten(1)[:, : row_of(shape)].reshape(shape).contiguous()


def dither(step: int | None, device: torch.device | None = None) -> Tensor:
    """32 bits for each element of a block, int64, that spread evenly over the steps; without a step: to nearest."""
    i = torch.arange(BLOCK, dtype=torch.int64, device=device)
    return torch.full_like(i, NEAREST) if step is None else (step * 0x9E3779B1 + i * 0x85EBCA6B) & 0xFFFFFFFF


def code8(x: Tensor, kind: Format8, dither_bits: Tensor) -> Tensor:
    """The codes, without a sign, of scaled float32 values in [0, 1); int32."""
    threshold = (dither_bits >> (32 - kind.shift)).to(torch.int32)
    code = ((x + FLOOR).view(torch.int32) - FLOOR_BITS + threshold) >> kind.shift
    return code.clamp(max=kind.most)


def value8(code: Tensor, kind: Format8) -> Tensor:
    """The numbers of codes without their sign, before scaling: float32."""
    return (FLOOR_BITS + (code.to(torch.int32) << kind.shift)).view(torch.float32) - FLOOR


def encode8(
    moment: Tensor,
    kind: Format8,
    step: int | None = None,
    *,
    live: Tensor | None = None,
    before: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """(codes, scales) of a moment: uint8 of its shape, float32 of :func:`scales_shape`.

    Args:
        moment: contiguous; rounded to float32.
        kind: ``FIRST`` or ``SECOND``.
        step: the step that stores it, by which it is dithered; None: rounded to nearest.
        live: bool, of its shape. Elsewhere codes stay, and do not count in the scales.
        before: codes and scales to start from, with ``live``.
    """
    shape = moment.shape
    if live is None and moment.dim() > 1 and rows_of_piece(shape) < shape[0]:
        pieces = [encode8(piece, kind, step) for piece in moment.split(rows_of_piece(shape))]
        return torch.cat([codes for codes, _ in pieces]), torch.cat([scales for _, scales in pieces])
    values = moment.detach().float()
    # torch.sqrt of float32 is not rounded right everywhere.
    values = in_blocks(values.double().sqrt().float() if kind.second else values)
    alive = torch.ones_like(values, dtype=torch.bool) if live is None else in_blocks(live)
    most = torch.where(alive, values.abs(), 0.0).amax(-1, keepdim=True)
    top = torch.tensor(kind.top, dtype=torch.float32, device=values.device)
    none = most < torch.tensor(UNSCALED_BELOW, dtype=torch.float32)
    scale = torch.where(none, 0.0, most / top)
    inverse = torch.where(none, 0.0, top / most)
    codes = code8(values.abs() * inverse, kind, dither(step, values.device))
    if kind.second:
        codes = torch.where((codes == 0) & (values > 0), 1, codes)
    else:
        codes = codes | torch.where(values.signbit(), 0x80, 0)
    codes = codes.to(torch.uint8)
    if live is not None and before is not None:
        codes = torch.where(alive, codes, in_blocks(before[0]))
        scale = torch.where(alive.any(-1, keepdim=True), scale, before[1].view(scale.shape))
    return out_of_blocks(codes, shape), scale.reshape(scales_shape(shape))


def decode8(codes: Tensor, scales: Tensor, kind: Format8) -> Tensor:
    """The moment that ``codes`` and ``scales`` stand for: float32, of the shape of the codes."""
    if codes.dim() > 1 and rows_of_piece(codes.shape) < codes.shape[0]:
        rows = rows_of_piece(codes.shape)
        pieces = zip(codes.split(rows), scales.split(rows), strict=True)
        return torch.cat([decode8(*piece, kind) for piece in pieces])
    blocks = in_blocks(codes)
    scale = scales.to(codes.device).reshape(*blocks.shape[:2], 1)
    if kind.second:
        root = value8(blocks, kind) * scale
        return out_of_blocks(root * root, codes.shape)
    value = value8(blocks & 0x7F, kind) * scale
    return out_of_blocks(torch.where(blocks >= 0x80, -value, value), codes.shape)
