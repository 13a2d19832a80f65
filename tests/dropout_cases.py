"""Shared by the dropout tests: the masks worked out a second time in NumPy, and the operations in plain PyTorch."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
RATES = (0.0, 1e-6, 0.1, 0.5, 1.0)
LOW, WORD = np.uint64(0xFFFFFFFF), np.uint64(32)


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


# -- the mask ----------------------------------------------------------------------------------------------


def philox(counter: Sequence[np.ndarray], key: Sequence[int]) -> list[np.ndarray]:
    """Philox4x32-10 of arrays of counters, word by word (Salmon et al. 2011, doi 10.1145/2063384.2063405)."""
    c, k = [word.astype(np.uint64) for word in counter], [np.uint64(word) for word in key]
    for _ in range(10):
        products = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [
            (products[1] >> WORD) ^ c[1] ^ k[0],
            products[1] & LOW,
            (products[0] >> WORD) ^ c[3] ^ k[1],
            products[0] & LOW,
        ]
        k = [(k[0] + np.uint64(0x9E3779B9)) & LOW, (k[1] + np.uint64(0xBB67AE85)) & LOW]
    return c


def philox_words(seed: int, offset: int, first: int, count: int) -> np.ndarray:
    """Words first … first + count − 1 of the stream with key = seed, counter = {offset/4, i/4}."""
    groups = np.arange(first // 4, (first + count - 1) // 4 + 1, dtype=np.uint64)
    block = np.full_like(groups, offset // 4)
    words = philox(
        [block & LOW, block >> WORD, groups & LOW, groups >> WORD], [seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF]
    )
    return np.stack(words, 1).reshape(-1)[first % 4 :][:count]


def expected_mask(size: Sequence[int], p: float, seed: int, offset: int = 0, first: int = 0) -> Tensor:
    """The mask of a call, from the words: bool, of that size. ``first`` is the index of its first element."""
    count = int(np.prod(size))
    if count == 0:
        return torch.empty(tuple(size), dtype=torch.bool)
    return torch.from_numpy(philox_words(seed, offset, first, count) < round((1.0 - p) * 2**32)).view(tuple(size))


# -- the operations ----------------------------------------------------------------------------------------


def computed(dtype: torch.dtype) -> torch.dtype:
    """The dtype that a dtype is computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def dropped(x: Tensor, keep: Tensor, p: float) -> Tensor:
    """dropout(x) by the mask, in the dtype of x."""
    scale = torch.tensor(1.0 / (1.0 - p) if p < 1.0 else 0.0, dtype=x.dtype)
    return torch.where(keep, x * scale, torch.zeros((), dtype=x.dtype))


def normed(
    s: Tensor, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float, rms: bool
) -> Tensor:
    """torch's layer or rms norm."""
    if rms:
        return torch.nn.functional.rms_norm(s, tuple(shape), weight, eps)
    return torch.nn.functional.layer_norm(s, tuple(shape), weight, bias, eps)


def bits(x: Tensor) -> Tensor:
    """Its bit patterns, so that NaN equals NaN and 0 does not equal −0."""
    return x.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


def available_memory() -> int:
    """Bytes that can be had without swapping; 0 where the system does not say."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            fields = dict(line.split(":", 1) for line in file)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 0
