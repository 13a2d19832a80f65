"""How the kernels read and store 16 bits: every pattern, beside torch's own conversions.

The update is given numbers with which it passes a value through untouched (or halved, which is exact), so that what
is stored is the value rounded and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from optim_cases import FLOATS, SIXTEEN_BIT, Layout, Placed, bits, half_of, short, threads
from torch import Tensor

from fastft.optim import adamw_

# Misaligned, the CUDA kernels take elements one by one; aligned, in vectors.
OFFSETS = pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "misaligned"])
NARROW = pytest.mark.parametrize("dtype", SIXTEEN_BIT, ids=short)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """On shared cores threads wait for one another more than they work."""
    with threads(1):
        yield


def all_of(dtype: torch.dtype) -> Tensor:
    """Each of the 65,536 values: both zeros, subnormal ones, infinities, every NaN."""
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)


def around(dtype: torch.dtype) -> Tensor:
    """float32 at and next to every value of a 16-bit dtype, and at and next to every midpoint between two.

    So each tie is there, to even and to odd, among subnormal numbers as well, and the last midpoint before infinity.
    Then the patterns of float32 itself: each upper half, with lower halves around a tie.
    """
    infinity = torch.tensor(float("inf"), dtype=dtype).view(torch.int16).item()
    values = torch.arange(infinity, dtype=torch.int16).view(dtype).float()
    largest = values[-1]
    following = torch.cat([values[1:], (largest.double() * 2 - values[-2]).float()[None]])  # past the end: a step on
    middle = ((values.double() + following.double()) / 2).float()
    exact = torch.cat([values, middle])
    up, down = (torch.nextafter(exact, torch.tensor(to)) for to in (float("inf"), -float("inf")))
    near = torch.cat([exact, up, down])
    upper = torch.arange(-(2**15), 2**15, dtype=torch.int32) << 16
    halves = torch.tensor([0, 1, 0x0FFF, 0x1000, 0x1001, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=torch.int32)
    patterns = (upper[:, None] | halves).flatten().view(torch.float32)
    return torch.cat([near, -near, patterns])


def step(size: int, dtype: torch.dtype, state_dtype: torch.dtype, offset: int = 0, **given: Any) -> dict[str, Tensor]:
    """One step over one parameter of zeros with moments of zeros, unless given; all beginning ``offset`` items in."""
    layout = Layout((size,), offset=offset)
    given = {key: Placed(value, layout).view if isinstance(value, Tensor) else value for key, value in given.items()}

    def zeros(of: torch.dtype) -> Tensor:
        return Placed(torch.zeros(size, dtype=of), layout).view

    tensors = {
        "param": given.pop("param", None),
        "grad": given.pop("grad", None),
        "exp_avg": given.pop("exp_avg", None),
        "exp_avg_sq": given.pop("exp_avg_sq", None),
        "max_exp_avg_sq": given.pop("max_exp_avg_sq", None),
        "anchor": given.pop("anchor", None),
        "mask": given.pop("mask", None),
    }
    for key, value in tensors.items():
        if value is None and key not in ("anchor", "mask"):
            tensors[key] = zeros(dtype if key in ("param", "grad") else state_dtype)
    adamw_(
        [tensors["param"]],
        [tensors["grad"]],
        [tensors["exp_avg"]],
        [tensors["exp_avg_sq"]],
        [torch.zeros(())],
        max_exp_avg_sqs=[tensors["max_exp_avg_sq"]],
        anchors=[tensors["anchor"]],
        update_masks=[tensors["mask"]],
        **{"lr": 0.5, "weight_decay": 0.0, **given},
    )
    return tensors


def assert_stored(stored: Tensor, expected: Tensor) -> None:
    """The same bits, and NaN (of any payload) exactly where NaN is expected."""
    assert stored.dtype == expected.dtype
    assert torch.equal(stored.isnan(), expected.isnan())
    same = (bits(stored) == bits(expected)) | expected.isnan()
    wrong = (~same).nonzero().flatten()
    assert same.all(), f"{len(wrong)} differ, the first: {stored[wrong[0]]!r}, expected {expected[wrong[0]]!r}"


def positive_zero(x: Tensor) -> Tensor:
    """``x`` with every -0 as 0: adding 0 does that."""
    return x + 0.0


@OFFSETS
@NARROW
def test_the_values_around_every_tie_are_the_ones_meant(dtype: torch.dtype, offset: int) -> None:
    """The list above is what it says: torch rounds it to every finite value, to infinity and to NaN."""
    found = set(bits(around(dtype).to(dtype)).tolist())
    wanted = all_of(dtype)
    assert found >= set(bits(wanted[~wanted.isnan()]).tolist())
    assert around(dtype).to(dtype).isnan().any()


@OFFSETS
@NARROW
def test_storing_a_moment(dtype: torch.dtype, offset: int) -> None:
    """β₁ = 0: the mean becomes the gradient, rounded to nearest, ties to even."""
    x = around(dtype)
    found = step(len(x), dtype, dtype, offset, grad=x, betas=(0.0, 0.9))
    assert_stored(found["exp_avg"], positive_zero(x).to(dtype))


@OFFSETS
@NARROW
def test_storing_a_parameter(dtype: torch.dtype, offset: int) -> None:
    """lr·λ = 1 and no gradient: a parameter of 0 becomes its float32 anchor, rounded."""
    x = around(dtype)
    x = x[~x.isinf()]  # no place to be pulled to
    found = step(len(x), dtype, dtype, offset, anchor=x, anchor_decay=2.0)
    assert_stored(found["param"], positive_zero(x).to(dtype))


@OFFSETS
@NARROW
def test_storing_under_a_mask(dtype: torch.dtype, offset: int) -> None:
    """Masked elements keep a NaN that no rounding would give."""
    x = around(dtype)
    mask = half_of(x.shape, seed=1)
    nan = torch.full((len(x),), 0x7FA5, dtype=torch.int16).view(dtype)
    given = {"grad": x, "exp_avg": torch.where(mask, torch.zeros((), dtype=dtype), nan), "betas": (0.0, 0.9)}
    found = step(len(x), dtype, dtype, offset, mask=mask, **given)["exp_avg"]
    assert_stored(found[mask], positive_zero(x).to(dtype)[mask])
    assert (bits(found)[~mask] == 0x7FA5).all()


@OFFSETS
@pytest.mark.parametrize("into", [torch.float32, torch.float64], ids=short)
@NARROW
def test_reading_a_gradient(dtype: torch.dtype, into: torch.dtype, offset: int) -> None:
    """All patterns, exactly."""
    x = all_of(dtype)
    found = step(len(x), into, into, offset, grad=x, betas=(0.0, 0.9))
    assert_stored(found["exp_avg"], positive_zero(x.to(into)))


@OFFSETS
@NARROW
def test_reading_a_gradient_beside_a_sixteen_bit_parameter(dtype: torch.dtype, offset: int) -> None:
    """With moments in float32."""
    x = all_of(dtype)
    found = step(len(x), dtype, torch.float32, offset, grad=x, betas=(0.0, 0.9))
    assert_stored(found["exp_avg"], positive_zero(x.float()))


@OFFSETS
@pytest.mark.parametrize("into", FLOATS, ids=short)
@NARROW
def test_reading_an_anchor(dtype: torch.dtype, into: torch.dtype, offset: int) -> None:
    """Also bfloat16 beside float16 and the other way round, by way of float32."""
    x = all_of(dtype)
    x = x[~x.isinf()]
    found = step(len(x), into, into, offset, anchor=x, anchor_decay=2.0)
    assert_stored(
        found["param"], positive_zero(x.to(torch.float64 if into == torch.float64 else torch.float32)).to(into)
    )


@OFFSETS
@NARROW
def test_reading_and_storing_a_parameter(dtype: torch.dtype, offset: int) -> None:
    """lr·weight_decay = ½ and no gradient halve it. (The sign of a zero depends on the order of additions.)"""
    x = all_of(dtype)
    x = x[x.isfinite()]
    found = step(len(x), dtype, dtype, offset, param=x, weight_decay=1.0)
    assert_stored(positive_zero(found["param"]), positive_zero((x.float() / 2).to(dtype)))


@OFFSETS
@NARROW
def test_reading_and_storing_moments(dtype: torch.dtype, offset: int) -> None:
    """β₁ = β₂ = ½ and no gradient halve both; the running maximum stays, bit for bit."""
    x = all_of(dtype)
    x = x[x.isfinite()]
    size = x.abs()
    options = {"exp_avg": x, "exp_avg_sq": size, "max_exp_avg_sq": size, "betas": (0.5, 0.5)}
    found = step(len(x), dtype, dtype, offset, **options)
    assert_stored(positive_zero(found["exp_avg"]), positive_zero((x.float() / 2).to(dtype)))
    assert_stored(found["exp_avg_sq"], (size.float() / 2).to(dtype))
    assert_stored(found["max_exp_avg_sq"], size)
