"""The dropout kernels themselves, on CPU tensors: whatever the loaded core sends those to, loops or CUDA kernels."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from dropout_cases import (
    FLOATS,
    RATES,
    available_memory,
    computed,
    dropped,
    expected_mask,
    normed,
    philox,
    same_bits,
    short,
    threads,
)
from torch import Tensor

from fastft import _C

SEED, OFFSET = 0x9E3779B97F4A7C15 - 2**64, 4 * (2**32 + 5)  # both halves of key and block matter
SIZES = (0, 1, 3, 4, 5, 8, 511, 512, 513, 5003)
# Shapes [rows, columns]: one column, rows that are no multiple of four, several blocks of columns, many parts of rows.
MATRICES = ((1, 1), (3, 1), (5, 7), (4, 8), (37, 130), (3, 1030), (700, 33), (600, 64), (0, 5))
MIXED = (
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.bfloat16),
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.float16),
)


def values(*size: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers, drawn in float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*size, dtype=torch.float64, generator=generator).to(dtype)


def workspace(x: Tensor, columns: int, sums: int) -> Tensor | None:
    nbytes = _C.dropout_workspace_bytes(x, columns, sums)
    return torch.empty(nbytes, dtype=torch.uint8) if nbytes else None


def add(
    x: Tensor,
    random: Any,
    *,
    dtype: torch.dtype | None = None,
    bias: Any = None,
    minus: Any = None,
    residual: Any = None,
) -> Tensor:
    y = torch.full_like(x, 99.0, dtype=dtype)
    _C.bias_dropout_add(x, y, random, bias, minus, residual)
    return y


# -- the mask ----------------------------------------------------------------------------------------------


def test_the_words_are_those_of_the_published_known_answer() -> None:
    # Key and counter zero (Random123's kat_vectors): each word lies exactly between two thresholds.
    known = (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    x = torch.ones(4, dtype=torch.float64)
    for i, word in enumerate(known):
        dropping, keeping = 1.0 - word / 2**32, 1.0 - (word + 1) / 2**32
        assert add(x, (dropping, 0, 0))[i] == 0.0
        assert add(x, (keeping, 0, 0))[i] != 0.0


# Counter, key and result of Random123's kat_vectors: zeros, ones, and the digits of π.
KNOWN = {
    "zeros": ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    "ones": ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    "pi": ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
}


@pytest.mark.parametrize("what", KNOWN)
def test_the_restatement_gives_the_published_known_answers(what: str) -> None:
    counter, key, result = ([int(word, 16) for word in words.split()] for words in KNOWN[what])
    assert [int(word[0]) for word in philox([np.array([word]) for word in counter], key)] == result


@pytest.mark.parametrize("p", RATES)
@pytest.mark.parametrize("size", SIZES)
def test_the_mask_is_the_restated_one(size: int, p: float) -> None:
    assert torch.equal(add(torch.ones(size), (p, SEED, OFFSET)) != 0, expected_mask((size,), p, SEED, OFFSET))


@pytest.mark.parametrize("seed", (0, 1, -1, 2**32, 2**63 - 1, -(2**63)))
@pytest.mark.parametrize("offset", (0, 4, 2**33, 2**63 - 4))
def test_every_bit_of_seed_and_offset_counts(seed: int, offset: int) -> None:
    kept = add(torch.ones(1000), (0.5, seed, offset)) != 0
    assert torch.equal(kept, expected_mask((1000,), 0.5, seed, offset))


@pytest.mark.slow
@pytest.mark.parametrize("p", (1e-6, 0.1, 0.3, 0.5, 0.999999))
def test_the_mask_is_the_same_for_every_dtype_alignment_and_number_of_threads(p: float) -> None:
    n = 40_003
    expected = expected_mask((n,), p, SEED, OFFSET)
    for dtype, shift, count in itertools.product(FLOATS, (0, 1, 3), (1, 2, 3)):
        buffer = torch.ones(n + shift, dtype=dtype)
        with threads(count):
            assert torch.equal(add(buffer[shift:], (p, SEED, OFFSET)) != 0, expected), (dtype, shift, count)


def test_a_state_gives_what_its_seed_and_offset_give() -> None:
    x, state = values(1000), torch.tensor([SEED, OFFSET])
    assert same_bits(add(x, (0.3, state)), add(x, (0.3, SEED, OFFSET)))


def test_thresholds_are_rounded_and_the_extremes_are_exact() -> None:
    x = torch.ones(1 << 16)
    assert add(x, (2.0**-33, 1, 0)).all()  # rounds to a threshold of 2³²: nothing is dropped
    assert not add(x, (1.0 - 2.0**-34, 1, 0)).any()  # rounds to 0: nothing is kept
    assert torch.equal(add(x, (0.0, 1, 0)), x)


# -- residual + dropout(x + bias − minus) ------------------------------------------------------------------


@pytest.mark.parametrize(
    "parts", [p for n in range(4) for p in itertools.combinations(("bias", "minus", "residual"), n)]
)
@pytest.mark.parametrize("dtype", FLOATS, ids=short)
def test_sums_have_the_bits_of_torchs_operators(dtype: torch.dtype, parts: tuple[str, ...]) -> None:
    p, rows, columns = 0.3, 37, 130
    given = {
        name: values(*((columns,) if name == "bias" else (rows, columns)), seed=i, dtype=dtype)
        for i, name in enumerate(parts, 1)
    }
    x = values(rows, columns, dtype=dtype)
    wide = {name: t.to(computed(dtype)) for name, t in given.items()}
    expected = x.to(computed(dtype))
    if "bias" in wide:
        expected = expected + wide["bias"]
    if "minus" in wide:
        expected = expected - wide["minus"]
    expected = dropped(expected, expected_mask((rows, columns), p, SEED, OFFSET), p)
    if "residual" in wide:
        expected = wide["residual"] + expected
    assert same_bits(add(x, (p, SEED, OFFSET), **given), expected.to(dtype))


@pytest.mark.parametrize("dtypes", MIXED, ids=lambda d: "-".join(map(short, d)))
@pytest.mark.parametrize("shift", (0, 1))
def test_every_operand_may_have_a_dtype_of_its_own(dtypes: tuple[torch.dtype, torch.dtype], shift: int) -> None:
    one, other = dtypes
    p, shape = 0.5, (9, 64)
    buffers = [torch.zeros(9 * 64 + shift, dtype=t) for t in (one, other)]  # aligned, and not
    x, residual = (b[shift:].view(shape).copy_(values(*shape, seed=i)) for i, b in enumerate(buffers))
    bias = values(64, seed=3, dtype=one)
    y = add(x, (p, 5, 8), dtype=other, bias=bias, residual=residual)
    keep = expected_mask(shape, p, 5, 8)
    assert same_bits(y, (residual.float() + dropped(x.float() + bias.float(), keep, p)).to(other))


@pytest.mark.parametrize("dtype", FLOATS, ids=short)
def test_inf_and_nan_stay_where_kept_and_vanish_where_dropped(dtype: torch.dtype) -> None:
    n, p = 4096, 0.5
    x = torch.tensor([float("inf"), float("-inf"), float("nan"), 1.0], dtype=dtype).repeat(n // 4)
    keep = expected_mask((n,), p, 3)
    y = add(x, (p, 3, 0))
    assert same_bits(y[~keep], torch.zeros(int((~keep).sum()), dtype=dtype))
    assert torch.equal(y[keep].isnan(), x[keep].isnan())
    finite = ~x.isnan()
    assert torch.equal(y[keep & finite], x[keep & finite] * 2)
    assert not add(x, (1.0, 3, 0)).any()


def test_output_may_be_the_input() -> None:
    x = values(1003)
    expected = add(x, (0.3, 1, 0))
    _C.bias_dropout_add(x, x, (0.3, 1, 0))
    assert same_bits(x, expected)


def test_fresh_results_are_those_of_given_ones() -> None:
    for dtype in FLOATS:
        x = values(5, 7, dtype=dtype)
        assert same_bits(_C.dropout(x, (0.3, 1, 0)), add(x, (0.3, 1, 0)))
    assert _C.dropout(values(5, 7).t(), (0.3, 1, 0)) is None


def test_what_the_core_takes() -> None:
    x = torch.ones(4, 4)
    taken = (x, torch.nn.Parameter(x), x[1:], x.bfloat16(), x.double(), torch.empty(0), torch.ones(()), x[:1].t())
    refused: tuple[Any, ...] = (x.t()[1:], x.int(), x.bool(), x.cfloat(), x.to_sparse(), x.to("meta"), None, 1.0)
    subclass = x.as_subclass(type("Subclass", (Tensor,), {}))
    assert all(map(_C.dropout_takes, taken))
    assert not any(map(_C.dropout_takes, (*refused, subclass, torch._efficientzerotensor((3,)))))


# -- the bias's gradient -----------------------------------------------------------------------------------


@pytest.mark.parametrize("p", (0.0, 0.3, 1.0))
@pytest.mark.parametrize("shape", MATRICES, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=short)
def test_bias_gradients(dtype: torch.dtype, shape: tuple[int, int], p: float) -> None:
    dy = values(*shape, dtype=dtype)
    dx, dbias = torch.full_like(dy, 99.0), torch.full(shape[1:], 99.0, dtype=dtype)
    _C.bias_dropout_add_backward(dy, dx, dbias, (p, SEED, OFFSET), workspace(dy, shape[1], 1))
    wide = dropped(dy.to(computed(dtype)), expected_mask(shape, p, SEED, OFFSET), p)
    assert same_bits(dx, wide.to(dtype))
    # Sums of n numbers in the computed dtype, then rounded once to the stored one.
    error = shape[0] * torch.finfo(computed(dtype)).eps * wide.abs().sum(0) + torch.finfo(dtype).eps * wide.sum(0).abs()
    assert ((dbias.double() - wide.double().sum(0)).abs() <= error.double() + torch.finfo(dtype).smallest_normal).all()


@pytest.mark.parametrize("dtypes", MIXED, ids=lambda d: "-".join(map(short, d)))
def test_bias_gradients_in_dtypes_of_their_own(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    dy = values(40, 24, dtype=dtypes[0])
    dx, dbias = torch.empty_like(dy, dtype=dtypes[1]), torch.empty(24, dtype=dtypes[1])
    _C.bias_dropout_add_backward(dy, dx, dbias, (0.5, 1, 0), workspace(dy, 24, 1))
    wide = dropped(dy.float(), expected_mask((40, 24), 0.5, 1), 0.5)
    assert same_bits(dx, wide.to(dtypes[1]))
    torch.testing.assert_close(dbias, wide.sum(0).to(dtypes[1]))


def test_row_sums_do_not_depend_on_threads() -> None:
    dy = values(3000, 40)
    results = []
    for count in (1, 2, 3, 1):
        dx, dbias = torch.empty_like(dy), torch.empty(40)
        with threads(count):
            _C.bias_dropout_add_backward(dy, dx, dbias, (0.3, 1, 0), workspace(dy, 40, 1))
        results.append(dbias)
    assert all(same_bits(r, results[0]) for r in results)


# -- norms -------------------------------------------------------------------------------------------------


class Norm:
    """One call of the norm kernels, there and back, and what they should give in float64."""

    def __init__(
        self,
        shape: tuple[int, int],
        dtype: torch.dtype,
        *,
        rms: bool,
        affine: bool = True,
        p: float = 0.3,
        eps: float = 1e-3,
        x_dtype: torch.dtype | None = None,
        residual_dtype: torch.dtype | None = None,
        weight_dtype: torch.dtype | None = None,
    ) -> None:
        self.shape, self.dtype, self.rms, self.p, self.eps = shape, dtype, rms, p, eps
        self.random = (p, SEED, OFFSET)
        self.x = values(*shape, seed=1, dtype=x_dtype or dtype)
        self.residual = values(*shape, seed=2, dtype=residual_dtype or dtype) + 0.5
        self.weight = values(shape[1], seed=3, dtype=weight_dtype or dtype) if affine else None
        self.bias = values(shape[1], seed=4, dtype=weight_dtype or dtype) if affine and not rms else None
        self.dy = values(*shape, seed=5, dtype=dtype)
        self.dsum = values(*shape, seed=6, dtype=dtype)

    def forward(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        y, sum = (torch.full(self.shape, 99.0, dtype=self.dtype) for _ in range(2))
        rstd = torch.full(self.shape[:1], 99.0, dtype=computed(self.dtype))
        mean = None if self.rms else torch.full_like(rstd, 99.0)
        _C.dropout_add_norm(
            self.x, self.residual, self.weight, self.bias, y, sum, mean, rstd, self.shape[1], self.eps, self.random
        )
        return y, sum, mean, rstd

    def backward(self, with_dsum: bool = True) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        _, sum, mean, rstd = self.forward()
        dx, dresidual = torch.full_like(self.x, 99.0), torch.full_like(self.residual, 99.0)
        dweight, dbias = (None if t is None else torch.full_like(t, 99.0) for t in (self.weight, self.bias))
        columns, memory = self.shape[1], workspace(self.dy, self.shape[1], 2)
        _C.dropout_add_norm_backward(
            self.dy,
            self.dsum if with_dsum else None,
            sum,
            self.weight,
            mean,
            rstd,
            dx,
            dresidual,
            dweight,
            dbias,
            columns,
            self.random,
            memory,
        )
        return dx, dresidual, dweight, dbias

    def expected(self, with_dsum: bool = True) -> tuple[Tensor, Tensor, tuple[Tensor | None, ...]]:
        """y, sum and the gradients for x, residual, weight and bias; the sum as it is stored, the rest in float64."""
        keep = expected_mask(self.shape, self.p, SEED, OFFSET)
        wide = computed(self.dtype)
        sum = (self.residual.to(wide) + dropped(self.x.to(wide), keep, self.p)).to(self.dtype)
        inputs = [
            None if t is None else t.to(torch.float64, copy=True).requires_grad_()
            for t in (sum, self.weight, self.bias)
        ]
        s, weight, bias = inputs
        assert s is not None
        y = normed(s, self.shape[1:], weight, bias, self.eps, self.rms)
        wanted = [t for t in inputs if t is not None]
        grads = iter(torch.autograd.grad(y, wanted, self.dy.double()))
        ds, dweight, dbias = (next(grads) if t is not None else None for t in inputs)
        assert ds is not None
        if with_dsum:
            ds = ds + self.dsum.double()
        return y.detach(), sum, (dropped(ds, keep, self.p), ds, dweight, dbias)


def assert_near(actual: Tensor | None, expected: Tensor | None) -> None:
    """As near as the dtype it is stored in allows: 16 bits are rounded from float32."""
    assert (actual is None) == (expected is None)
    if actual is not None and expected is not None:
        eps = torch.finfo(actual.dtype).eps
        size = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
        loose = 4.0 if actual.dtype in (torch.bfloat16, torch.float16) else 200.0
        assert ((actual.double() - expected).abs() <= loose * eps * size).all(), (
            (actual.double() - expected).abs().max()
        )


NORM_CASES: dict[str, Callable[[tuple[int, int], torch.dtype], Norm]] = {
    "layer": lambda shape, dtype: Norm(shape, dtype, rms=False),
    "layer-plain": lambda shape, dtype: Norm(shape, dtype, rms=False, affine=False),
    "rms": lambda shape, dtype: Norm(shape, dtype, rms=True),
    "rms-plain": lambda shape, dtype: Norm(shape, dtype, rms=True, affine=False),
}


@pytest.mark.parametrize("shape", MATRICES, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=short)
@pytest.mark.parametrize("kind", NORM_CASES)
def test_norms_and_their_gradients(kind: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    case = NORM_CASES[kind](shape, dtype)
    y, sum, mean, rstd = case.forward()
    expected_y, expected_sum, expected_grads = case.expected()
    assert same_bits(sum, expected_sum)
    assert_near(y, expected_y)
    wide = expected_sum.double()
    if mean is not None:
        assert_near(mean, wide.mean(1))
        wide = wide - wide.mean(1, keepdim=True)
    assert_near(rstd, (wide.square().mean(1) + case.eps).rsqrt())
    for actual, expected in zip(case.backward(), expected_grads, strict=True):
        assert_near(actual, expected)


@pytest.mark.parametrize("p", RATES)
@pytest.mark.parametrize("rms", (False, True))
def test_norms_at_every_rate_and_without_a_gradient_for_the_sum(rms: bool, p: float) -> None:
    case = Norm((37, 64), torch.float64, rms=rms, p=p)
    expected_y, expected_sum, expected_grads = case.expected(with_dsum=False)
    y, sum, *_ = case.forward()
    assert same_bits(sum, expected_sum)
    assert_near(y, expected_y)
    for actual, expected in zip(case.backward(with_dsum=False), expected_grads, strict=True):
        assert_near(actual, expected)


@pytest.mark.parametrize("dtypes", MIXED, ids=lambda d: "-".join(map(short, d)))
@pytest.mark.parametrize("rms", (False, True))
@pytest.mark.parametrize("columns", (40, 37))
def test_norms_of_mixed_dtypes(dtypes: tuple[torch.dtype, torch.dtype], rms: bool, columns: int) -> None:
    one, other = dtypes
    for kinds in ((one, other, other), (other, one, one), (one, one, one)):
        x_dtype, residual_dtype, weight_dtype = kinds
        case = Norm(
            (20, columns),
            other,
            rms=rms,
            x_dtype=x_dtype,
            residual_dtype=residual_dtype,
            weight_dtype=weight_dtype,
        )
        expected_y, expected_sum, expected_grads = case.expected()
        y, sum, *_ = case.forward()
        assert same_bits(sum, expected_sum)
        assert_near(y, expected_y)
        for actual, expected in zip(case.backward(), expected_grads, strict=True):
            assert_near(actual, expected)


def test_the_sum_may_be_overwritten_by_the_output() -> None:
    for dtype in FLOATS:
        case = Norm((37, 130), dtype, rms=False)
        expected, *_ = case.forward()
        y, rstd = torch.empty_like(expected), torch.empty(37, dtype=computed(dtype))
        mean = torch.empty_like(rstd)
        _C.dropout_add_norm(case.x, case.residual, case.weight, case.bias, y, y, mean, rstd, 130, case.eps, case.random)
        assert same_bits(y, expected)


def test_gradients_are_made_only_where_wanted_and_do_not_depend_on_threads() -> None:
    case = Norm((2000, 40), torch.float32, rms=False)
    dx, _, dweight, dbias = case.backward()
    for count in (2, 3):
        with threads(count):
            again = case.backward()
        assert all(same_bits(a, b) for a, b in zip((dx, dweight, dbias), (again[0], again[2], again[3]), strict=True))
    _, sum, mean, rstd = case.forward()
    rest = (case.shape[1], case.random, workspace(case.dy, 40, 2))
    alone = torch.full((40,), 99.0)
    outputs = torch.empty_like(case.x), torch.empty_like(case.x)
    _C.dropout_add_norm_backward(case.dy, case.dsum, sum, case.weight, mean, rstd, *outputs, alone, None, *rest)
    assert same_bits(alone, dweight)
    _C.dropout_add_norm_backward(case.dy, case.dsum, sum, case.weight, mean, rstd, *outputs, None, alone, *rest)
    assert same_bits(alone, dbias)
    _C.dropout_add_norm_backward(case.dy, case.dsum, sum, case.weight, mean, rstd, *outputs, None, None, *rest)
    assert same_bits(outputs[0], dx)


def test_far_from_zero_the_variance_is_still_right() -> None:
    case = Norm((8, 256), torch.float32, rms=False, eps=1e-5)
    case.residual += 1000.0
    y, *_ = case.forward()
    expected_y, *_ = case.expected()
    torch.testing.assert_close(y, expected_y.float(), atol=2e-3, rtol=1e-3)  # the inputs carry 6e-5 of rounding


# -- what is refused ---------------------------------------------------------------------------------------

ROW, MATRIX = torch.ones(4), torch.ones(3, 4)
OK = (0.5, 1, 0)


def norm_arguments(**changed: Any) -> list[Any]:
    arguments = {
        "x": MATRIX,
        "residual": MATRIX,
        "weight": ROW,
        "bias": ROW,
        "y": MATRIX.clone(),
        "sum": MATRIX.clone(),
        "mean": torch.ones(3),
        "rstd": torch.ones(3),
        "columns": 4,
        "eps": 1e-5,
        "random": OK,
    }
    return list({**arguments, **changed}.values())


REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "integers": (
        lambda: _C.bias_dropout_add(ROW.int(), ROW, OK),
        "input: expected float32, bfloat16, float16 or float64",
    ),
    "no tensor": (lambda: _C.bias_dropout_add(None, ROW, OK), "input: expected a plain strided tensor"),
    "no output": (lambda: _C.bias_dropout_add(ROW, None, OK), "output: expected a plain strided tensor"),
    "no memory": (lambda: _C.bias_dropout_add(torch._efficientzerotensor((4,)), ROW, OK), "with memory of its own"),
    "strides": (
        lambda: _C.bias_dropout_add(MATRIX.t(), MATRIX.t().contiguous(), OK),
        "input: expected a contiguous tensor",
    ),
    "output's strides": (
        lambda: _C.bias_dropout_add(torch.ones(4, 3), MATRIX.t(), OK),
        r"output: expected a contiguous tensor, got shape \[4, 3\]",
    ),
    "output's shape": (lambda: _C.bias_dropout_add(MATRIX, ROW, OK), r"output: expected shape \[3, 4\], got \[4\]"),
    "output's dtype": (lambda: _C.bias_dropout_add(ROW, ROW.double(), OK), "float64 only with float64, got float64"),
    "bias's size": (
        lambda: _C.bias_dropout_add(MATRIX, MATRIX, OK, torch.ones(3)),
        r"bias: expected 4 elements, got shape \[3\]",
    ),
    "bias's dtype": (lambda: _C.bias_dropout_add(ROW, ROW, OK, ROW.int()), "bias: expected a floating dtype"),
    "two dtypes": (
        lambda: _C.bias_dropout_add(ROW, ROW, OK, None, ROW, ROW.half()),
        "residual: expected float32, got float16",
    ),
    "p above 1": (lambda: _C.bias_dropout_add(ROW, ROW, (1.5, 1, 0)), "p: expected a probability from 0 to 1, got 1.5"),
    "p below 0": (
        lambda: _C.bias_dropout_add(ROW, ROW, (-0.1, 1, 0)),
        "p: expected a probability from 0 to 1, got -0.1",
    ),
    "p NaN": (lambda: _C.bias_dropout_add(ROW, ROW, (float("nan"), 1, 0)), "p: expected a probability from 0 to 1"),
    "state": (
        lambda: _C.bias_dropout_add(ROW, ROW, (0.5, ROW)),
        r"state: expected two int64 on cpu, got shape \[4\] float32",
    ),
    "too few arguments": (lambda: _C.bias_dropout_add(ROW, ROW), "expected 3 to 6 arguments, got 2"),
    "gradient's columns": (
        lambda: _C.bias_dropout_add_backward(MATRIX, MATRIX, torch.ones(5), OK, None),
        r"grad_bias: expected 4 elements, got shape \[5\]",
    ),
    "narrow sums of float64": (
        lambda: _C.bias_dropout_add_backward(MATRIX.double(), MATRIX.double(), ROW, OK, None),
        "grad_bias: expected a floating dtype, float64 only with float64, got float32 with float64",
    ),
    "columns": (lambda: _C.dropout_add_norm(*norm_arguments(columns=5)), "columns: expected a divisor of 12, got 5"),
    "no columns": (lambda: _C.dropout_add_norm(*norm_arguments(columns=0)), "columns: expected a divisor of 12, got 0"),
    "weight": (lambda: _C.dropout_add_norm(*norm_arguments(weight=torch.ones(3))), "weight: expected 4 elements"),
    "bias and weight": (
        lambda: _C.dropout_add_norm(*norm_arguments(bias=ROW.half())),
        "bias: expected float32, got float16",
    ),
    "sum": (lambda: _C.dropout_add_norm(*norm_arguments(sum=MATRIX.half())), "sum: expected float32, got float16"),
    "statistics": (lambda: _C.dropout_add_norm(*norm_arguments(rstd=torch.ones(4))), "rstd: expected 3 elements"),
    "their dtype": (
        lambda: _C.dropout_add_norm(*norm_arguments(mean=torch.ones(3).half())),
        "mean: expected float32, got float16",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_wrong_arguments_are_named(what: str) -> None:
    call, text = REFUSED[what]
    with pytest.raises(ValueError, match=text):
        call()


# -- sizes -------------------------------------------------------------------------------------------------

HUGE = 2**31 + 9
NEEDED = 3 * 2 * HUGE  # one tensor of 16-bit numbers, in place; and room for others


@pytest.mark.slow
@pytest.mark.skipif(available_memory() < NEEDED, reason=f"less than {NEEDED >> 30} GB of memory to spare")
def test_more_elements_than_32_bits_count() -> None:
    x = torch.ones(HUGE, dtype=torch.bfloat16)
    _C.bias_dropout_add(x, x, (0.5, SEED, OFFSET))
    for first in (0, 2**31 - 5000, HUGE - 5003):
        piece = x[first : first + 5003]
        assert torch.equal(piece != 0, expected_mask(piece.shape, 0.5, SEED, OFFSET, first))
    kept = sum(int(torch.count_nonzero(part)) for part in x.split(1 << 28))
    assert abs(kept - HUGE / 2) < 5 * (HUGE / 4) ** 0.5


# -- half precision ----------------------------------------------------------------------------------------


def test_every_half_is_read_and_sums_of_halves_are_rounded_to_nearest_even() -> None:
    halves = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.float16)
    same = add(halves, (0.0, 1, 0))
    other = halves[torch.randperm(halves.numel(), generator=torch.Generator().manual_seed(0))].contiguous()
    total = add(halves, (0.0, 1, 0), residual=other)
    for got, expected in ((same, halves), (total, (other.float() + halves.float()).half())):
        nan = expected.isnan()
        assert torch.equal(got.view(torch.int16)[~nan], expected.view(torch.int16)[~nan])
        assert bool((got.view(torch.int16)[nan] & 0x7FFF == 0x7FFF).all())
