"""Whether a change moves a weight: against every weight there is, and against what AdamW does."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastft import AdamW, Anchor
from fastft.optim import precision

LR = 3e-5
"""Moves some weights of the usual size in each 16-bit dtype, and not others."""


def usual_weights(dtype: torch.dtype, shape: tuple[int, ...] = (50, 70)) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(3)) * 0.02).to(dtype)


def every_weight(dtype: torch.dtype) -> torch.Tensor:
    """All finite values whose neighbours are finite, but 0."""
    w = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    least, most = torch.finfo(dtype).smallest_normal, torch.finfo(dtype).max
    if dtype == torch.float16:
        least = 2.0**-24
    return w[w.isfinite() & (w.abs() >= least) & (w.abs() < most)]


@pytest.mark.parametrize(
    ("dtype", "extra_bits"), [(torch.bfloat16, 0), (torch.bfloat16, 8), (torch.bfloat16, 16), (torch.float16, 0)]
)
@pytest.mark.parametrize("outward", [False, True])
def test_half_the_gap_is_the_limit_for_every_weight(dtype: torch.dtype, extra_bits: int, outward: bool) -> None:
    w = every_weight(dtype)
    gap = precision.gaps(w, extra_bits)[outward]
    change = gap.double() * w.double().sign() * (1 if outward else -1)
    # torch's own rounding, of sums in float64, for what has no bits beside it.
    if extra_bits == 0:
        assert torch.equal((w.double() + change).to(dtype).double() - w.double(), change)
    if extra_bits < 16:  # otherwise half a gap is no float
        change = change.float()
        assert torch.equal(precision.moved(w, change / 2 * 1.01, extra_bits), torch.ones_like(w, dtype=torch.bool))
        assert not precision.moved(w, change / 2 * 0.99, extra_bits).any()
        odd = (w.view(torch.int16) & 1).bool() if extra_bits == 0 else torch.zeros_like(w, dtype=torch.bool)
        assert torch.equal(precision.moved(w, change / 2, extra_bits), odd)
    else:
        assert precision.moved(w, change.float(), extra_bits).all()


def test_the_gaps_of_zero_are_the_smallest_numbers() -> None:
    for dtype, extra_bits, least in (
        (torch.bfloat16, 0, 2.0**-133),
        (torch.bfloat16, 8, 2.0**-141),
        (torch.float16, 0, 2.0**-24),
        (torch.float32, 0, 2.0**-149),
    ):
        below, above = precision.gaps(torch.tensor([0.0, -0.0], dtype=dtype), extra_bits)
        assert below.tolist() == above.tolist() == [least, least]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("lr", [LR, 1e-7])
def test_a_step_of_adamw_moves_that_share(dtype: torch.dtype, lr: float) -> None:
    w = usual_weights(dtype)
    moved = 0
    for sign in (-1.0, 1.0):
        p = torch.nn.Parameter(w.clone())
        p.grad = torch.full_like(p, sign)
        AdamW([p], lr=lr, weight_decay=0.0).step()
        assert torch.equal(p != w, precision.moved(w, -sign * lr))
        moved += int((p != w).sum())
    expected = precision.share_moved_by_step(w, lr)
    assert expected == pytest.approx(moved / (2 * w.numel()), abs=1e-12)
    assert (0 < expected < 1) == (dtype in (torch.bfloat16, torch.float16))


def without_gradient(w: torch.Tensor, **options: Any) -> torch.Tensor:
    """Where a step of AdamW whose gradients are 0 moves these weights."""
    p = torch.nn.Parameter(w.clone())
    p.grad = torch.zeros_like(p)
    AdamW([("p", p)], lr=1e-3, **options).step()
    return p != w


@pytest.mark.parametrize(("dtype", "rate"), [(torch.bfloat16, 3e-3), (torch.float16, 3.5e-4)])
def test_the_decay_of_adamw_moves_that_share(dtype: torch.dtype, rate: float) -> None:
    w = usual_weights(dtype)
    moved = without_gradient(w, weight_decay=rate / 1e-3)
    assert torch.equal(moved, precision.moved(w, precision.pull(w, rate)))
    stuck = precision.cannot_move(w, rate)
    assert stuck == pytest.approx(1 - moved.double().mean().item(), abs=1e-12)
    assert 0.1 < stuck < 0.9


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_anchor_of_adamw_moves_that_share(dtype: torch.dtype) -> None:
    w = usual_weights(dtype)
    home = w * (1 + 0.1 * torch.randn(w.shape, generator=torch.Generator().manual_seed(4))).to(dtype)
    w, home = w[w != home], home[w != home]
    anchor, rate = Anchor.snapshot([("p", home)]), 0.03 if dtype == torch.bfloat16 else 5e-3
    moved = without_gradient(w, weight_decay=0.0, anchor=anchor, anchor_decay=rate / 1e-3)
    assert torch.equal(moved, precision.moved(w, precision.pull(w, rate, home, precision.DISTANCE)))
    stuck = precision.cannot_move(w, rate, home, precision.DISTANCE)
    assert stuck == pytest.approx(1 - moved.double().mean().item(), abs=1e-12)
    assert 0.1 < stuck < 0.9


def test_elements_at_their_anchor_count_at_the_assumed_distance() -> None:
    w = usual_weights(torch.bfloat16)
    for rate in (1e-3, 0.2):
        assumed = precision.cannot_move(w, rate, distance=precision.DISTANCE)
        assert precision.cannot_move(w, rate, w.clone(), precision.DISTANCE) == assumed
        assert (assumed == 1.0) == (rate == 1e-3)


def test_weights_of_zero_have_nowhere_to_decay_to() -> None:
    w = torch.tensor([0.0, 1.0, 0.0, 0.0], dtype=torch.bfloat16)
    assert precision.cannot_move(w, 1e-4) == 1.0
    assert precision.cannot_move(w, 1e-2) == 0.0
    assert precision.cannot_move(w * 0, 1e-4) == 0.0
    assert precision.cannot_move(torch.zeros(0, dtype=torch.bfloat16), 1e-4) == 0.0
    assert precision.cannot_move(w[1], 1e-4) == 1.0


@pytest.mark.parametrize("transposed", [False, True])
def test_a_sample_of_a_large_tensor_is_like_the_whole(transposed: bool) -> None:
    # Columns of different sizes: what meets one column only would be far off.
    size = torch.logspace(-4, 0, 256).repeat(512, 1)
    w = (size * torch.rand(512, 256, generator=torch.Generator().manual_seed(0))).bfloat16()
    w = w.t() if transposed else w
    anchor = w + torch.full_like(w, 0.01)
    taken = precision.sample(w)
    assert taken.numel() == precision.SAMPLE
    assert len(set(precision.sample(torch.arange(w.numel()).view(w.shape)).tolist())) == precision.SAMPLE
    whole = precision.pull(w, 0.02, anchor)
    stuck = 1 - precision.moved(w, whole).double().mean().item()
    assert 0.1 < stuck < 0.9
    assert precision.cannot_move(w, 0.02, anchor) == pytest.approx(stuck, abs=0.03)
