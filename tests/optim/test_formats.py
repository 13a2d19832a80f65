"""The formulas of low bits, stochastic rounding and 8-bit codes in plain PyTorch: what they promise, at every edge."""

from __future__ import annotations

import math

import pytest
import torch
from optim_cases import normal, same_bits
from torch import Tensor

from fastft.optim import formats
from fastft.optim.formats import FIRST, SECOND, Format8, join, narrow_stochastic, resized, rounding_bits, split

BF16 = torch.bfloat16


def float_of(bits: Tensor) -> Tensor:
    """float32 of these bits, int64."""
    return torch.where(bits >= 2**31, bits - 2**32, bits).to(torch.int32).view(torch.float32)


def some_floats() -> Tensor:
    """Every exponent and sign, with mantissas around each point where rounding turns."""
    tails = [0, 1, 0x7F, 0x80, 0x81, 0x17F, 0x180, 0x7F7F, 0x7F80, 0x7FFF, 0x8000, 0x8001, 0x17FFF, 0x18000, 0x7FFFFF]
    exponents = torch.arange(255).view(-1, 1) << 23
    bits = (exponents + torch.tensor(tails)).flatten()
    return float_of(torch.cat([bits, bits + 2**31]))


# -- low bits ----------------------------------------------------------------------------------------------------


def test_16_low_bits_keep_every_float() -> None:
    x = torch.cat([some_floats(), torch.tensor([math.inf, -math.inf]), normal((1000,), seed=1)])
    weight, low = split(x, 16)
    assert weight.dtype == BF16 and low.dtype == torch.uint16
    assert same_bits(join(weight, low), x)
    finite = weight.isfinite()
    nearest = (weight.double() - x.double()).abs()
    other = (x.bfloat16().double() - x.double()).abs()
    assert torch.equal(nearest[finite], other[finite])  # it differs from torch's rounding in ties alone
    assert (weight.float().abs() >= x.bfloat16().float().abs())[finite].all()  # which go away from zero


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16])
def test_low_bits_of_another_weight_make_no_nan(dtype: torch.dtype) -> None:
    low = torch.arange(256 if dtype == torch.uint8 else 65536, dtype=torch.int32).to(dtype)
    for value in (0.0, -0.0, math.inf, -math.inf, 1.0, 3.3e38, 1e-40):
        weight = torch.full(low.shape, value, dtype=BF16)
        master = join(weight, low)
        assert not master.isnan().any()
        again = split(master, 8 * low.itemsize)[0]
        assert same_bits(again, weight)  # which it is rounded to, as it belongs to it
    assert join(torch.full(low.shape, math.nan, dtype=BF16), low).isnan().all()


def test_8_low_bits_keep_24_bits_to_nearest_even() -> None:
    x = torch.cat([some_floats(), normal((1000,), seed=1)])
    weight, low = split(x, 8)
    assert low.dtype == torch.uint8
    found = join(weight, low)
    assert not (found.view(torch.int32) & 0xFF).any()
    below = (x.view(torch.int32) & -0x100).view(torch.float32).double()
    above = ((x.view(torch.int32) & -0x100) + 0x100).view(torch.float32).double()
    fits = above.isfinite()
    expected = torch.where((x.double() - below).abs() <= (above - x.double()).abs(), below, above)
    tie = (x.double() - below).abs() == (above - x.double()).abs()
    even = torch.where((below.float().view(torch.int32) >> 8) % 2 == 0, below, above)
    expected = torch.where(tie, even, expected)
    assert torch.equal(found[fits].double(), expected[fits])


@pytest.mark.parametrize("width", [8, 16])
def test_every_weight_and_every_low_bits_go_together(width: int) -> None:
    weights = torch.arange(0, 2**16, 7).to(torch.uint16).view(BF16)
    weights = weights[weights.isfinite() & (weights.abs() < 3e38)]
    dtype = torch.uint8 if width == 8 else torch.uint16
    for low in (0, 1, 2 ** (width - 1) - 1, 2 ** (width - 1), 2**width - 1):
        bits = torch.full(weights.shape, low, dtype=torch.int32).to(dtype)
        master = join(weights, bits)
        back = split(master, width)
        # Bits below a weight of 0 would change its sign; no step leaves any there.
        right = (weights != 0) | (low < 2 ** (width - 1))
        assert same_bits(back[0][right], weights[right]) and same_bits(back[1][right], bits[right])


def test_not_a_number_has_no_low_bits() -> None:
    for pattern in (0x7F800001, 0x7FFFFFFF, 0xFFC00123):
        for width in (8, 16):
            weight, low = split(float_of(torch.tensor([pattern])), width)
            assert weight.isnan().all() and int(low) == 0


def test_other_widths_leave_the_weight() -> None:
    x = torch.cat([some_floats(), normal((1000,), seed=1)])
    weight, low = split(x, 16)
    fine = weight.isfinite()
    weight, low, x = weight[fine], low[fine], x[fine]
    eight = resized(low, torch.uint8)
    gap = (x.view(torch.int32).to(torch.int64) - join(weight, eight).view(torch.int32).to(torch.int64)).abs()
    assert int(gap.max()) < 0x100  # half a step of the 8 bits, but where that would be the next weight
    assert int((gap > 0x80).sum()) == int(((low.to(torch.int32) > 0x7F80) & (low.to(torch.int32) < 0x8000)).sum())
    assert same_bits(resized(resized(eight, torch.uint16), torch.uint8), eight)
    assert same_bits(join(weight, resized(eight, torch.uint16)), join(weight, eight))


# -- stochastic rounding -----------------------------------------------------------------------------------------


def test_known_answer_of_the_generator() -> None:
    words = formats.philox(0, 0, torch.zeros(1, dtype=torch.int64))
    assert [int(word) for word in words] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


def test_random_bits_are_even_and_independent() -> None:
    index = torch.arange(4096)
    first = rounding_bits(7, 1, index)
    assert int(first.min()) >= 0 and int(first.max()) < 2**16
    assert abs(float(first.double().mean()) / 2**16 - 0.5) < 0.02
    others = [rounding_bits(8, 1, index), rounding_bits(7, 2, index), rounding_bits(7, 1, index, True)]
    others.append(rounding_bits(7, 1, index + 4096))
    for other in others:
        assert abs(float(torch.corrcoef(torch.stack([first, other]).double())[0, 1])) < 0.06
    assert torch.equal(rounding_bits(7, 1, index[100:]), first[100:])
    assert torch.equal(rounding_bits(7, 1, index + 2**40)[0:8], rounding_bits(7, 1, torch.arange(2**40, 2**40 + 8)))


@pytest.mark.parametrize("dtype", [BF16, torch.float16])
def test_stochastic_rounding_goes_to_a_neighbour_as_often_as_it_should(dtype: torch.dtype) -> None:
    tiny = 2.0**-24 if dtype == torch.float16 else 2.0**-133
    x = torch.tensor([1.0, 1.001, -1.0011, 3.1e4, 6e-5, -6.1035e-5, 1e-6, 3.3 * tiny, 0.25 * tiny, 0.0, -0.0])
    all_bits = torch.arange(2**16).view(-1, 1)
    found = narrow_stochastic(x.expand(2**16, -1).contiguous(), all_bits, dtype)
    values = found.double()
    assert torch.equal(found[:, 0], torch.ones(2**16, dtype=dtype))
    mean = values.mean(0)
    spread = values.amax(0) - values.amin(0)
    assert ((mean - x.double()).abs() <= spread * 2.0**-12 + 1e-40).all(), (mean, x)
    assert ((values.amin(0) <= x) & (x <= values.amax(0))).all()
    assert torch.equal(found.signbit().all(0), x.signbit())
    assert all(len(values[:, i].unique()) <= 2 for i in range(len(x)))


@pytest.mark.parametrize("dtype", [BF16, torch.float16])
def test_stochastic_rounding_of_what_is_not_finite(dtype: torch.dtype) -> None:
    x = torch.tensor([math.inf, -math.inf, math.nan, 1e39, -7e4])
    for random in (0, 2**16 - 1):
        found = narrow_stochastic(x, torch.full(x.shape, random), dtype)
        assert found[0] == math.inf and found[1] == -math.inf and found[2].isnan() and found[3] == math.inf
        assert found[4] == -math.inf if dtype == torch.float16 else found[4].isfinite()


# -- 8 bits ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [FIRST, SECOND], ids=["first", "second"])
def test_every_code_comes_back(kind: Format8) -> None:
    codes = torch.arange(256).to(torch.uint8)
    for scale in (1.0, 3.7e-9, 250.0):
        scales = torch.tensor([scale])
        values = formats.decode8(codes, scales, kind)
        again, found = formats.encode8(values, kind)
        torch.testing.assert_close(found, scales, rtol=1e-6, atol=0.0)
        assert torch.equal(again, codes)
        assert values.abs().amax() == values.abs()[255]


@pytest.mark.parametrize("kind", [FIRST, SECOND], ids=["first", "second"])
def test_codes_are_right_on_average_over_the_steps(kind: Format8) -> None:
    """The threshold moves with the step, so that a value between two codes is each of them in the right share."""
    values = torch.logspace(-9, 0, 200)
    total = torch.zeros(200, dtype=torch.float64)
    for step in range(1, 513):
        decoded = formats.decode8(*formats.encode8(values, kind, step), kind)
        total += decoded.double().sqrt() if kind.second else decoded.double()
    exact = values.double().sqrt() if kind.second else values.double()
    gap = exact.amax() * formats.FLOOR / (16 if kind.second else 8) + exact / (16 if kind.second else 8)
    assert ((total / 512 - exact).abs() < 0.02 * gap + (gap if kind.second else 0.0) * (exact < 2e-6)).all()


def test_a_second_moment_never_becomes_0() -> None:
    v = torch.tensor([1.0, 1e-20, 0.0, 1e-12])
    codes, scales = formats.encode8(v, SECOND, 3)
    found = formats.decode8(codes, scales, SECOND)
    assert (found[[0, 1, 3]] > 0).all() and found[2] == 0
    codes, scales = formats.encode8(torch.zeros(3, 300), SECOND, 3)
    assert not codes.any() and not scales.any() and scales.shape == (3, 2)
    assert not formats.decode8(codes, scales, SECOND).any()
