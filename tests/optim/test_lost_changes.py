"""Whether a change moves a weight: against every weight there is, and against what AdamW does."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from fastft import AdamW, Anchor
from fastft.optim import lost_changes

LR = 1e-5
"""Moves some weights of the usual size in each 16-bit dtype, and not others."""


def usual_weights(dtype: torch.dtype, shape: tuple[int, ...] = (8, 32)) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(3)) * 0.02).to(dtype)


def shares(*weights: torch.Tensor, extra_bits: int = 0, **options: Any) -> dict[str, tuple[float, float]]:
    """(moved, rate) by effect, of anchored parameters in one group."""
    group = {"lr": 1e-3, "weight_decay": 0.0, "anchor_decay": 0.0, "anchor_mode": "decoupled", **options}
    found = lost_changes.moved_shares([(group, w, True) for w in weights], extra_bits)
    assert found is not None
    return found


def every_weight(dtype: torch.dtype) -> torch.Tensor:
    """All finite values whose neighbours are finite, but 0."""
    w = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    least, most = torch.finfo(dtype).smallest_normal, torch.finfo(dtype).max
    if dtype == torch.float16:
        least = 2.0**-24
    return w[w.isfinite() & (w.abs() >= least) & (w.abs() < most)]


def gaps(w: torch.Tensor, extra_bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Distance of each 16-bit weight to its neighbour toward zero, and to the one away from it: exact, in float32."""
    size = w.float().abs()
    if w.dtype == torch.float16:
        bits = w.view(torch.int16) & 0x7FFF
        return size - (bits - 1).view(w.dtype).float(), (bits + 1).view(w.dtype).float() - size
    bits, last = size.view(torch.int32), 1 << (16 - extra_bits)
    return size - (bits - last).view(torch.float32), (bits + last).view(torch.float32) - size


@pytest.mark.parametrize(
    ("dtype", "extra_bits"), [(torch.bfloat16, 0), (torch.bfloat16, 8), (torch.bfloat16, 16), (torch.float16, 0)]
)
@pytest.mark.parametrize("outward", [False, True])
def test_half_the_gap_is_the_limit_for_every_weight(dtype: torch.dtype, extra_bits: int, outward: bool) -> None:
    w = every_weight(dtype)
    gap = gaps(w, extra_bits)[outward]
    change = gap.double() * w.double().sign() * (1 if outward else -1)
    # torch's own rounding, of sums in float64, for what has no bits beside it.
    if extra_bits == 0:
        assert torch.equal((w.double() + change).to(dtype).double() - w.double(), change)
    if extra_bits < 16:  # otherwise half a gap is no float
        change = change.float()
        assert torch.equal(lost_changes.moved(w, change / 2 * 1.01, extra_bits), torch.ones_like(w, dtype=torch.bool))
        assert not lost_changes.moved(w, change / 2 * 0.99, extra_bits).any()
        odd = (w.view(torch.int16) & 1).bool() if extra_bits == 0 else torch.zeros_like(w, dtype=torch.bool)
        assert torch.equal(lost_changes.moved(w, change / 2, extra_bits), odd)
    else:
        assert lost_changes.moved(w, change.float(), extra_bits).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("lr", [LR, 2e-6])
def test_a_step_of_adamw_moves_that_share(dtype: torch.dtype, lr: float) -> None:
    w = usual_weights(dtype)
    moved = 0
    for sign in (-1.0, 1.0):
        p = torch.nn.Parameter(w.clone())
        p.grad = torch.full_like(p, sign)
        AdamW([p], lr=lr, weight_decay=0.0).step()
        assert torch.equal(p != w, lost_changes.moved(w, -sign * lr))
        moved += int((p != w).sum())
    if dtype in (torch.bfloat16, torch.float16):
        assert shares(w, lr=lr)["lr"][0] == pytest.approx(moved / (2 * w.numel()), abs=1e-6)
        assert 0 < moved < 2 * w.numel()
    else:
        assert moved == 2 * w.numel()


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
    assert torch.equal(moved, lost_changes.moved(w, lost_changes.pull(w, rate)))
    found = shares(w, weight_decay=rate / 1e-3)
    assert found["weight_decay"] == pytest.approx((moved.double().mean().item(), rate), abs=1e-6)
    assert 0.1 < found["weight_decay"][0] < 0.9 and "anchor_decay" not in found


@pytest.mark.parametrize(("dtype", "rate"), [(torch.bfloat16, 0.14), (torch.float16, 0.017)])
def test_the_anchor_of_adamw_moves_that_share(dtype: torch.dtype, rate: float) -> None:
    # Anchored where they are that far away.
    w = usual_weights(dtype).float()  # widened
    home = w - w * lost_changes.DISTANCE
    p = torch.nn.Parameter(w.to(dtype))
    p.grad = torch.zeros_like(p)
    anchor = Anchor.snapshot([("p", home)])
    AdamW([("p", p)], lr=1e-3, weight_decay=0.0, anchor=anchor, anchor_decay=rate / 1e-3).step()
    moved = (p != w.to(dtype)).double().mean().item()
    found = shares(w.to(dtype), anchor_decay=rate / 1e-3)["anchor_decay"][0]
    assert found == pytest.approx(moved, abs=0.05) and 0.1 < moved < 0.9


def test_weights_of_zero_have_nowhere_to_decay_to() -> None:
    w = torch.tensor([0.0, 1.0, 0.0, 0.0], dtype=torch.bfloat16)
    assert shares(w, weight_decay=0.1)["weight_decay"][0] == 0.0
    assert shares(w, weight_decay=10.0)["weight_decay"][0] == 1.0
    assert "weight_decay" not in shares(w * 0, weight_decay=0.1)
    assert shares(w[1], weight_decay=10.0)["weight_decay"][0] == 1.0
    assert shares(w, lr=1e-4)["lr"][0] == 0.75
    group = {"lr": 0.1, "weight_decay": 0.1, "anchor_decay": 0.0}
    assert lost_changes.moved_shares([(group, torch.zeros(0, dtype=torch.bfloat16), False)]) is None
    assert lost_changes.moved_shares([({**group, "lr": 0.0}, w, False)]) is None


def test_tensors_count_by_their_size_and_groups_by_their_rates() -> None:
    small, large = torch.ones(10, dtype=torch.bfloat16), torch.full((3000,), 1e-3, dtype=torch.bfloat16)
    half = torch.ones(1000, dtype=torch.float16)
    assert shares(small, large, half, lr=1e-5)["lr"] == (pytest.approx(3000 / 4010), 1e-5)
    # 1 - 1e-5 is another weight with 8 extra bits, 1 + 1e-5 is not.
    assert shares(small, large, lr=1e-5, extra_bits=8)["lr"] == (pytest.approx(3005 / 3010), 1e-5)
    group = {"lr": 1e-2, "weight_decay": 1.0, "anchor_decay": 1.0, "anchor_mode": "decoupled"}
    found = lost_changes.moved_shares([(group, small, False), ({**group, "lr": 1e-5}, large, False)])
    # At the first one's lr decay moves weights, at the second one's it does not.
    assert found == {
        "weight_decay": (pytest.approx(10 / 3010), 1e-2),
        "lr": (pytest.approx(1.0), 1e-2),
    }


@pytest.mark.parametrize("shape", [(512, 256), (256, 512), (300,), (700,), (1025,)])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_sample_of_a_large_tensor_is_like_the_whole(shape: tuple[int, ...], transposed: bool) -> None:
    # Columns of different sizes: what meets one column only would be far off.
    size = torch.logspace(-4, 0, shape[-1]).expand(shape)
    w = (size * torch.rand(shape, generator=torch.Generator().manual_seed(0))).bfloat16()
    places = torch.arange(w.numel()).view(shape)
    if transposed:
        w, places = w.t(), places.t()
    taken = lost_changes.sample(places, {}).tolist()
    assert len(set(taken)) == len(taken) == lost_changes.sample(w, {}).numel() <= 4 * lost_changes.SAMPLE
    assert len(taken) >= min(w.numel(), lost_changes.SAMPLE) and max(taken) > 0.99 * (w.numel() - 1)
    moved = lost_changes.moved(w, 1e-4).double().mean().item()
    assert 0.1 < moved < 0.9
    assert shares(w, lr=1e-4)["lr"][0] == pytest.approx(moved, abs=0.05)


def test_the_default_dtype_does_not_matter() -> None:
    w = usual_weights(torch.bfloat16)
    expected = shares(w, extra_bits=8, lr=1e-7, weight_decay=0.1)
    torch.set_default_dtype(torch.float64)
    try:
        assert shares(w, extra_bits=8, lr=1e-7, weight_decay=0.1) == expected
    finally:
        torch.set_default_dtype(torch.float32)


def test_it_is_fast_and_reads_the_result_once(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = [usual_weights(torch.bfloat16, (64, 64)) for _ in range(200)]
    shares(*weights)
    begin = time.perf_counter()
    shares(*weights)
    assert time.perf_counter() - begin < 0.25  # it takes a tenth of that on an idle core
    reads = []
    for name in ("item", "tolist", "__float__", "__bool__"):
        original = getattr(torch.Tensor, name)

        def counted(self: torch.Tensor, original: Any = original) -> Any:
            reads.append(self)
            return original(self)

        monkeypatch.setattr(torch.Tensor, name, counted)
    shares(*weights)
    assert len(reads) == 1
