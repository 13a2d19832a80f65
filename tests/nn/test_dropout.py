"""``fastft.nn.functional`` in eager mode: masks, gradients, dtypes, layouts, generators, errors, and what is saved."""

from __future__ import annotations

import itertools
import math
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from dropout_cases import FLOATS, RATES, computed, dropped, expected_mask, normed, same_bits, short, threads
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fastft.nn import functional as fn

SHAPE = (6, 10)


def values(*size: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, dtype=torch.float64, generator=generator).to(dtype)


def seeded(seed: int = 5) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def mask_of(generator: torch.Generator, size: tuple[int, ...], p: float) -> Tensor:
    """The mask of the next call with this generator. Its seed is the generator's next int64."""
    copy = torch.Generator()
    copy.set_state(generator.get_state())
    seed = int(torch.empty((), dtype=torch.int64).random_(generator=copy))
    return expected_mask(size, p, seed)


# Each function as one of its first argument alone, with everything else non-neutral.
def _bias_dropout_add(x: Tensor, p: float, **rest: Any) -> Tensor:
    return fn.bias_dropout_add(x, values(x.shape[-1], dtype=x.dtype, seed=1), torch.ones_like(x), p, **rest)


def _layer_norm(x: Tensor, p: float, **rest: Any) -> Tensor:
    result = fn.dropout_add_layer_norm(x, torch.ones_like(x), x.shape[-1:], p=p, **rest)
    assert isinstance(result, Tensor)
    return result


def _rms_norm(x: Tensor, p: float, **rest: Any) -> Tensor:
    result = fn.dropout_add_rms_norm(x, torch.ones_like(x), x.shape[-1:], p=p, **rest)
    assert isinstance(result, Tensor)
    return result


def _mixout(x: Tensor, p: float, **rest: Any) -> Tensor:
    return fn.mixout(x, torch.ones_like(x), p, **rest)


FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "dropout": fn.dropout,
    "bias_dropout_add": _bias_dropout_add,
    "layer_norm": _layer_norm,
    "rms_norm": _rms_norm,
    "mixout": _mixout,
}
every_function = pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)


# -- the masks of a run of calls ---------------------------------------------------------------------------

SIDE = 512


@pytest.fixture(scope="module")
def masks() -> Tensor:
    """Eight consecutive masks of p = 0.3, of one generator, as ±: [call, row, column]."""
    generator = seeded(2024)
    ones = torch.ones(SIDE, SIDE)
    return torch.stack([fn.dropout(ones, 0.3, generator=generator) != 0 for _ in range(8)])


@pytest.mark.parametrize("p", (0.01, 0.1, 0.3, 0.5, 0.9))
def test_as_many_are_kept_as_should_be(p: float) -> None:
    n, generator = 1_000_003, seeded(7)
    for _ in range(4):
        kept = int(torch.count_nonzero(fn.dropout(torch.ones(n), p, generator=generator)))
        assert abs(kept - n * (1 - p)) < 5 * math.sqrt(n * p * (1 - p))


@pytest.mark.parametrize("p", (0.3, 0.5))
def test_patterns_of_eight_are_as_frequent_as_chance_has_them(p: float) -> None:
    n = 1 << 21
    kept = (fn.dropout(torch.ones(n), p, generator=seeded(3)) != 0).view(-1, 8)
    patterns = torch.bincount((kept * (1 << torch.arange(8))).sum(1), minlength=256).double()
    ones = torch.tensor([i.bit_count() for i in range(256)], dtype=torch.float64)
    expected = n / 8 * (1 - p) ** ones * p ** (8 - ones)
    statistic = float(((patterns - expected).square() / expected).sum())
    assert abs(statistic - 255) < 5 * math.sqrt(2 * 255)  # χ² of 255 degrees of freedom


def correlation(a: Tensor, b: Tensor) -> float:
    """In standard errors."""
    a, b = a.double() - 0.7, b.double() - 0.7
    return float((a * b).sum() / (0.7 * 0.3) / math.sqrt(a.numel()))


def test_elements_of_a_mask_are_independent_along_rows_and_columns(masks: Tensor) -> None:
    for lag, mask in itertools.product(range(1, 65), masks[:2]):
        assert abs(correlation(mask[:, lag:], mask[:, :-lag])) < 5, lag
        assert abs(correlation(mask[lag:], mask[:-lag])) < 5, lag


@pytest.mark.slow
def test_consecutive_masks_are_independent_at_every_shift(masks: Tensor) -> None:
    for first, second in itertools.pairwise(masks.flatten(1)):
        assert abs(correlation(first, second)) < 5
        for shift in range(1, 65):
            assert abs(correlation(first[shift:], second[:-shift])) < 5, shift
            assert abs(correlation(first[:-shift], second[shift:])) < 5, shift


# -- where a mask comes from -------------------------------------------------------------------------------


@every_function
def test_the_mask_is_that_of_the_generators_next_number(function: Callable[..., Tensor]) -> None:
    generator, p = seeded(), 0.4
    for _ in range(3):
        mask = mask_of(generator, SHAPE, p)
        x = values(*SHAPE).requires_grad_()
        # Where the input is dropped, the function does not depend on it (norms spread what is kept over the row).
        (grad,) = torch.autograd.grad(function(x, p, generator=generator), x, values(*SHAPE, seed=1))
        assert torch.equal(grad != 0, mask)


@every_function
def test_manual_seed_repeats_and_calls_differ(function: Callable[..., Tensor]) -> None:
    x = values(40, 50)
    torch.manual_seed(3)
    first, second = function(x, 0.5), function(x, 0.5)
    torch.manual_seed(3)
    assert same_bits(function(x, 0.5), first)
    assert not torch.equal(first, second)
    with torch.random.fork_rng():
        function(x, 0.5)
    assert same_bits(function(x, 0.5), second)


@every_function
@pytest.mark.parametrize(("p", "training"), ((0.5, False), (0.0, True), (1.0, True), (1.0, False)))
def test_nothing_is_drawn_where_nothing_is_left_to_chance(
    function: Callable[..., Tensor], p: float, training: bool
) -> None:
    before = torch.get_rng_state()
    function(values(*SHAPE), p, training=training)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("p", "training"), ((0.5, False), (0.0, True), (1.0, False), (0, True)))
def test_outside_training_the_input_itself_comes_back(p: float, training: bool) -> None:
    x = values(*SHAPE).requires_grad_()
    assert fn.dropout(x, p, training) is x
    assert fn.mixout(x, torch.ones(SHAPE), p, training) is x
    assert fn.bias_dropout_add(x, None, None, p, training) is x


@every_function
@pytest.mark.parametrize("p", (0.1, 0.5))
def test_the_result_does_not_depend_on_threads(function: Callable[..., Tensor], p: float) -> None:
    x = values(300, 210)
    results = []
    for count in (1, 2, 3):
        with threads(count):
            results.append(function(x, p, generator=seeded()))
    assert all(same_bits(r, results[0]) for r in results)


def test_threads_of_python_draw_numbers_of_their_own() -> None:
    x, kept = torch.ones(64), []

    def work() -> None:
        kept.extend(fn.dropout(x, 0.5).tolist() for _ in range(400))

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(kept) == len(set(map(tuple, kept))) == 1600


def test_a_generator_of_another_device_is_refused() -> None:
    class Elsewhere:
        device = torch.device("cuda")

    with pytest.raises(TypeError):
        fn.dropout(torch.ones(3), 0.5, generator=Elsewhere())  # type: ignore[arg-type]


# -- numbers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", RATES)
@pytest.mark.parametrize("size", ((), (0,), (1,), (7,), (5, 7), (2, 3, 4), (0, 4), (4, 0)), ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=short)
def test_dropout_forward_and_backward_have_one_mask(dtype: torch.dtype, size: tuple[int, ...], p: float) -> None:
    generator = seeded()
    keep = mask_of(generator, size, p)
    x = values(*size, dtype=dtype).requires_grad_()
    y = fn.dropout(x, p, generator=generator)
    wide = computed(dtype)
    assert same_bits(y.detach(), dropped(x.detach().to(wide), keep, p).to(dtype))
    grad = values(*size, seed=1, dtype=dtype)
    y.backward(grad)
    assert x.grad is not None and same_bits(x.grad, dropped(grad.to(wide), keep, p).to(dtype))


@pytest.mark.parametrize("grad_mode", (True, False))
@pytest.mark.parametrize("dtype", FLOATS, ids=short)
def test_infinite_gradients_vanish_where_dropped(dtype: torch.dtype, grad_mode: bool) -> None:
    generator, p = seeded(), 0.5
    keep = mask_of(generator, (64,), p)
    x = torch.full((64,), float("nan"), dtype=dtype, requires_grad=True)
    y = fn.dropout(x, p, generator=generator)
    assert torch.equal(y.isnan(), keep)
    (grad,) = torch.autograd.grad(y, x, torch.full((64,), float("inf"), dtype=dtype), create_graph=grad_mode)
    assert torch.equal(grad.isinf(), keep) and not grad.isnan().any()


EAGER: dict[str, tuple[Callable[..., Any], Callable[..., Any], tuple[tuple[int, ...], ...]]] = {
    # ours(p, generator, *tensors), theirs(mask, p, *tensors), shapes of the tensors
    "bias_dropout_add": (
        lambda p, g, x, b, r: fn.bias_dropout_add(x, b, r, p, generator=g),
        lambda keep, p, x, b, r: r + dropped(x + b, keep, p),
        (SHAPE, SHAPE[1:], SHAPE),
    ),
    "dropout_add": (
        lambda p, g, x, r: fn.bias_dropout_add(x, None, r, p, generator=g),
        lambda keep, p, x, r: r + dropped(x, keep, p),
        (SHAPE, SHAPE),
    ),
    "bias_dropout": (
        lambda p, g, x, b: fn.bias_dropout_add(x, b, None, p, generator=g),
        lambda keep, p, x, b: dropped(x + b, keep, p),
        (SHAPE, SHAPE[1:]),
    ),
    "layer_norm": (
        lambda p, g, x, r, w, b: fn.dropout_add_layer_norm(
            x, r, SHAPE[1:], w, b, p, eps=1e-3, return_residual=True, generator=g
        ),
        lambda keep, p, x, r, w, b: (
            normed(r + dropped(x, keep, p), SHAPE[1:], w, b, 1e-3, False),
            r + dropped(x, keep, p),
        ),
        (SHAPE, SHAPE, SHAPE[1:], SHAPE[1:]),
    ),
    "layer_norm without bias": (
        lambda p, g, x, r, w: fn.dropout_add_layer_norm(x, r, SHAPE[1:], w, p=p, generator=g),
        lambda keep, p, x, r, w: normed(r + dropped(x, keep, p), SHAPE[1:], w, None, 1e-5, False),
        (SHAPE, SHAPE, SHAPE[1:]),
    ),
    "layer_norm without weight": (
        lambda p, g, x, r, b: fn.dropout_add_layer_norm(x, r, SHAPE[1:], None, b, p=p, generator=g),
        lambda keep, p, x, r, b: normed(r + dropped(x, keep, p), SHAPE[1:], None, b, 1e-5, False),
        (SHAPE, SHAPE, SHAPE[1:]),
    ),
    "layer_norm over both": (
        lambda p, g, x, r, w, b: fn.dropout_add_layer_norm(x, r, SHAPE, w, b, p, generator=g),
        lambda keep, p, x, r, w, b: normed(r + dropped(x, keep, p), SHAPE, w, b, 1e-5, False),
        (SHAPE, SHAPE, SHAPE, SHAPE),
    ),
    "rms_norm": (
        lambda p, g, x, r, w: fn.dropout_add_rms_norm(
            x, r, SHAPE[1:], w, p, eps=1e-3, return_residual=True, generator=g
        ),
        lambda keep, p, x, r, w: (
            normed(r + dropped(x, keep, p), SHAPE[1:], w, None, 1e-3, True),
            r + dropped(x, keep, p),
        ),
        (SHAPE, SHAPE, SHAPE[1:]),
    ),
    "rms_norm alone": (
        lambda p, g, x, r: fn.dropout_add_rms_norm(x, r, SHAPE[1:], p=p, generator=g),
        lambda keep, p, x, r: normed(r + dropped(x, keep, p), SHAPE[1:], None, None, 1e-5, True),
        (SHAPE, SHAPE),
    ),
}


def outcome(function: Callable[..., Any], tensors: list[Tensor]) -> list[Tensor]:
    """Results and gradients."""
    results = function(*tensors)
    results = list(results) if isinstance(results, tuple) else [results]
    grads = [values(*r.shape, seed=50 + i, dtype=r.dtype) for i, r in enumerate(results)]
    return [*results, *torch.autograd.grad(results, tensors, grads)]


@pytest.mark.parametrize("p", (0.0, 0.3, 1.0))
@pytest.mark.parametrize("name", EAGER)
def test_fused_forms_are_what_they_are_made_of(name: str, p: float) -> None:
    ours, theirs, shapes = EAGER[name]
    generator = seeded()
    keep = mask_of(generator, SHAPE, p)
    tensors = [values(*s, seed=i, dtype=torch.float64).requires_grad_() for i, s in enumerate(shapes)]
    actual = outcome(lambda *t: ours(p, generator, *t), tensors)
    expected = outcome(lambda *t: theirs(keep, p, *t), tensors)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)
    with torch.no_grad():  # another way through the code, without anything kept
        alone = ours(p, seeded(), *tensors)
    for a, e in zip(alone if isinstance(alone, tuple) else (alone,), actual, strict=False):
        assert same_bits(a, e.detach())


@pytest.mark.parametrize("dtypes", [d for d in itertools.product(FLOATS, repeat=2) if d[0] != d[1]], ids=str)
@pytest.mark.parametrize("name", EAGER)
def test_mixed_dtypes_give_what_torchs_operators_give(name: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """The first operand has one dtype, all others another; each gradient has that of its own."""
    ours, theirs, shapes = EAGER[name]
    if torch.float64 in dtypes and dtypes[0] != torch.float64 and "norm" in name and len(shapes) > 2:
        dtypes = dtypes[1], dtypes[0]  # torch's norms refuse a wider weight
    tensors = [values(*s, seed=i, dtype=dtypes[min(i, 1)]).requires_grad_() for i, s in enumerate(shapes)]
    p = 0.3
    keep = mask_of(seeded(), SHAPE, p)
    actual = outcome(lambda *t: ours(p, seeded(), *t), tensors)
    wide = torch.promote_types(*dtypes)
    exact = [t.detach().double().requires_grad_() for t in tensors]
    expected = outcome(lambda *t: theirs(keep, p, *t), exact)
    results = len(actual) - len(tensors)
    assert all(a.dtype == wide for a in actual[:results])
    assert [a.dtype for a in actual[results:]] == [t.dtype for t in tensors]
    narrowest = max(torch.finfo(t.dtype).eps for t in tensors)
    # The gradients that were passed in are rounded too, so the comparison is as coarse as the coarsest dtype.
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.double(), e, rtol=20 * narrowest, atol=20 * narrowest)


def test_broadcasting_takes_torchs_operators() -> None:
    x, b, r = values(2, 3, 4), values(3, 4, seed=1), values(4, seed=2)
    for bias, residual in ((b, None), (None, r), (b, r), (values(1, seed=3), values(5, 2, 3, 4, seed=4))):
        keep = mask_of(seeded(), (2, 3, 4), 0.3)
        expected = dropped(x if bias is None else x + bias, keep, 0.3)
        expected = expected if residual is None else residual + expected
        assert same_bits(fn.bias_dropout_add(x, bias, residual, 0.3, generator=seeded()), expected)
    norm = fn.dropout_add_layer_norm(x, r, (4,), p=0.3, generator=seeded())
    assert same_bits(norm, F.layer_norm(r + dropped(x, mask_of(seeded(), (2, 3, 4), 0.3), 0.3), (4,)))


@pytest.mark.parametrize("dtype", FLOATS, ids=short)
def test_rms_without_eps_takes_torchs(dtype: torch.dtype) -> None:
    x, residual = values(4, 6, dtype=dtype) * 1e-2, torch.zeros(4, 6, dtype=dtype)
    result = fn.dropout_add_rms_norm(x, residual, (6,), p=0.0, eps=None)
    torch.testing.assert_close(result, F.rms_norm(x, (6,)))


# -- memory order ------------------------------------------------------------------------------------------

ARRANGED: dict[str, Callable[[Tensor], Tensor]] = {
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "permuted": lambda x: x.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
    "sliced": lambda x: torch.stack([x, x], 4)[..., 1],
    "offset": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view_as(x),
    "negated": lambda x: torch._neg_view(-x),
    "negated channels_last": lambda x: torch._neg_view((-x).contiguous(memory_format=torch.channels_last)),
}


@every_function
@pytest.mark.parametrize("arrange", ARRANGED.values(), ids=ARRANGED)
def test_any_memory_order_gives_the_same(function: Callable[..., Tensor], arrange: Callable[[Tensor], Tensor]) -> None:
    x, grad = values(2, 6, 4, 10), values(2, 6, 4, 10, seed=1)
    results = []
    for a, g in ((x.clone(), grad), (arrange(x), grad), (x.clone(), arrange(grad))):
        a.requires_grad_()
        y = function(a, 0.3, generator=seeded())
        results.append((y.detach(), *torch.autograd.grad(y, a, g)))
        if a is not x and function in (fn.dropout, _mixout):
            assert y.stride() == torch.empty_like(a).stride()
        with torch.no_grad():
            assert same_bits(function(a, 0.3, generator=seeded()), results[-1][0])
    for y, dx in results[1:]:
        assert same_bits(y, results[0][0]) and same_bits(dx, results[0][1])


def test_expanded_gradients_and_inputs() -> None:
    keep = mask_of(seeded(), SHAPE, 0.3)
    x = values(*SHAPE).requires_grad_()
    fn.dropout(x, 0.3, generator=seeded()).sum().backward()
    assert x.grad is not None and same_bits(x.grad, dropped(torch.ones(SHAPE), keep, 0.3))
    row = values(SHAPE[1]).expand(SHAPE)
    assert same_bits(fn.dropout(row, 0.3, generator=seeded()), dropped(row, keep, 0.3))


# -- in place ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arrange", (lambda x: x, lambda x: x.t()), ids=("plain", "transposed"))
@pytest.mark.parametrize("p", (0.3, 1.0))
def test_in_place(p: float, arrange: Callable[[Tensor], Tensor]) -> None:
    expected = fn.dropout(arrange(values(*SHAPE)), p, generator=seeded())
    x = arrange(values(*SHAPE))
    version = x._version
    assert fn.dropout(x, p, inplace=True, generator=seeded()) is x
    assert same_bits(x, expected) and x._version > version
    leaf = values(*SHAPE).requires_grad_()
    y = arrange(leaf * 1)
    z = fn.dropout(y, p, inplace=True, generator=seeded())
    assert z is y and same_bits(z.detach(), expected)
    (grad,) = torch.autograd.grad(z, leaf, torch.ones_like(z))
    assert torch.equal(grad, arrange(dropped(torch.ones_like(z), mask_of(seeded(), tuple(z.shape), p), p)))


def test_in_place_is_refused_where_torch_refuses_it() -> None:
    leaf = values(*SHAPE).requires_grad_()
    before = leaf.detach().clone()
    for function in (F.dropout, fn.dropout):
        with pytest.raises(RuntimeError, match="a leaf Variable that requires grad is being used in an in-place"):
            function(leaf, 0.5, True, True)
    assert torch.equal(leaf, before)
    with pytest.raises(RuntimeError, match="refers to a single memory location"):
        fn.dropout(torch.ones(1).expand(4), 0.5, inplace=True)
    saved = (leaf * 2).exp()
    fn.dropout(saved, 0.5, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved.sum().backward()
    with torch.no_grad():
        assert fn.dropout(leaf, 1.0, inplace=True) is leaf and not leaf.any()


# -- p, and what is not computed here ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "p",
    (torch.tensor(0.25), torch.tensor(0.25, dtype=torch.bfloat16), np.float32(0.25), np.float64(0.25)),
    ids=("tensor", "bfloat16 tensor", "np.float32", "np.float64"),
)
@every_function
def test_p_may_be_any_number(function: Callable[..., Tensor], p: Any) -> None:
    x = values(*SHAPE)
    assert same_bits(function(x, p, generator=seeded()), function(x, 0.25, generator=seeded()))
    assert same_bits(fn.dropout(x, 1), torch.zeros(SHAPE)) and fn.dropout(x, 0) is x


REFUSED_BY_TORCH: dict[str, tuple[Any, Any]] = {
    "above 1": (torch.ones(3), 1.5),
    "below 0": (torch.ones(3), -0.1),
    "NaN": (torch.ones(3), float("nan")),
    "a tensor above 1": (torch.ones(3), torch.tensor(1.5)),
    "text": (torch.ones(3), "0.5"),
    "integers": (torch.ones(3, dtype=torch.int64), 0.5),
    "booleans": (torch.ones(3, dtype=torch.bool), 0.5),
    "integers, above 1": (torch.ones(3, dtype=torch.int64), 1.5),
    "complex": (torch.ones(3, dtype=torch.complex64), 0.5),
}


def error_of(function: Callable[..., Any], *arguments: Any) -> tuple[type, str]:
    with pytest.raises(Exception) as caught:
        function(*arguments)
    return caught.type, str(caught.value).replace("tensor(1.5000)", "1.5").split("'str' and")[0]


@pytest.mark.parametrize("what", REFUSED_BY_TORCH)
@pytest.mark.parametrize("training", (True, False))
def test_errors_are_torchs(what: str, training: bool) -> None:
    x, p = REFUSED_BY_TORCH[what]
    try:
        expected = F.dropout(x, p, training)
    except Exception:
        kind, text = error_of(F.dropout, x, p, training)
        ours = error_of(fn.dropout, x, p, training)
        assert ours[0] is kind
        if what != "text":  # the operands of < are the other way round
            assert ours[1] == text
        if isinstance(p, float) and not 0.0 <= p <= 1.0:
            for function in FUNCTIONS.values():
                assert error_of(lambda f=function: f(torch.ones(3), p, training=training)) == (kind, text)
    else:
        assert fn.dropout(x, p, training) is x and expected is x


def test_tensors_of_several_elements_are_no_probability() -> None:
    with pytest.raises(TypeError, match=r"argument 'p' .* must be float, not Tensor of shape"):
        fn.dropout(torch.ones(3), torch.tensor([0.5, 0.1]))


def test_norms_refuse_what_torchs_refuse() -> None:
    x = torch.ones(2, 4)
    for shape, weight in (((3,), None), ((4,), torch.ones(3)), ((), None)):
        kind, text = error_of(F.layer_norm, x, shape, weight)
        assert error_of(fn.dropout_add_layer_norm, x, x, shape, weight) == (kind, text)
        kind, text = error_of(F.rms_norm, x, shape, weight)
        assert error_of(fn.dropout_add_rms_norm, x, x, shape, weight) == (kind, text)


def test_weights_wider_than_what_is_normed_are_torchs_affair() -> None:
    x, weight = values(2, 4), values(4, seed=1, dtype=torch.float64)
    kind, text = error_of(F.layer_norm, x, (4,), weight)
    assert error_of(lambda: fn.dropout_add_layer_norm(x, x, (4,), weight, p=0.0)) == (kind, text)
    with pytest.warns(UserWarning, match="Mismatch dtype between input and weight"):
        expected = F.rms_norm(x + x, (4,), weight)
    torch.testing.assert_close(fn.dropout_add_rms_norm(x, x, (4,), weight, p=0.0, eps=None), expected)


def test_mixout_names_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match=r"anchor: expected the weight's shape \[2, 3\], got \[3\]"):
        fn.mixout(torch.ones(2, 3), torch.ones(3), 0.5)


class Wrapped(Tensor):
    """A subclass that holds another tensor and has an implementation of its own for everything."""

    calls: list[str]
    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapped:
        made = Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)  # type: ignore[attr-defined]
        made.inner = inner
        return made  # type: ignore[no-any-return]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.calls.append(func.name())
        return func(*(a.inner if isinstance(a, Wrapped) else a for a in args), **(kwargs or {}))


@pytest.mark.slow
def test_what_is_not_computed_here_is_left_to_torch() -> None:
    meta = fn.dropout(torch.ones(3, device="meta"), 0.5)
    assert meta.device.type == "meta"
    norm = fn.dropout_add_layer_norm(torch.ones(2, 3, device="meta"), torch.ones(2, 3, device="meta"), (3,))
    assert isinstance(norm, Tensor) and norm.device.type == "meta"
    mixed = fn.mixout(torch.ones(3, device="meta"), torch.ones(3, device="meta"), 0.5)
    assert mixed.device.type == "meta"
    Wrapped.calls = []
    kept = fn.dropout(Wrapped(torch.ones(1000)), 0.5)
    assert Wrapped.calls and set(kept.tolist()) == {0.0, 2.0}
    with pytest.raises(ValueError, match=r"generator: expected None for a Tensor of torch.float32 on meta"):
        fn.dropout(torch.ones(3, device="meta"), 0.5, generator=seeded())


def test_subclasses_can_take_over() -> None:
    class Own(Tensor):
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return func.__name__, kwargs

    x = torch.ones(2, 3).as_subclass(Own)
    assert fn.dropout(x, 0.2) == ("dropout", {"p": 0.2, "training": True, "inplace": False, "generator": None})  # type: ignore[comparison-overlap]
    for call, name in (
        (lambda: fn.bias_dropout_add(torch.ones(2, 3), None, x), "bias_dropout_add"),
        (lambda: fn.dropout_add_layer_norm(torch.ones(2, 3), x, (3,)), "dropout_add_layer_norm"),
        (lambda: fn.dropout_add_rms_norm(torch.ones(2, 3), x, (3,)), "dropout_add_rms_norm"),
        (lambda: fn.mixout(torch.ones(2, 3), x, 0.5), "mixout"),
    ):
        assert call()[0] == name  # type: ignore[comparison-overlap]


# -- derivatives -------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("p", RATES)
@every_function
def test_first_and_second_derivatives(function: Callable[..., Tensor], p: float) -> None:
    x = values(3, 5, dtype=torch.float64).requires_grad_()
    call = lambda x: function(x, p, generator=seeded())  # noqa: E731
    assert torch.autograd.gradcheck(call, x, check_batched_grad=True, check_forward_ad=function is not _mixout)
    assert torch.autograd.gradgradcheck(call, x, check_batched_grad=function is fn.dropout)


@pytest.mark.slow
@pytest.mark.parametrize("p", (0.0, 0.3, 1.0))
@pytest.mark.parametrize("name", EAGER)
def test_derivatives_by_every_argument(name: str, p: float) -> None:
    ours, _, shapes = EAGER[name]
    small = [tuple(min(n, 4) if n == SHAPE[1] else 3 for n in s) for s in shapes]
    tensors = [values(*s, seed=i, dtype=torch.float64).requires_grad_() for i, s in enumerate(small)]

    def call(*t: Tensor) -> Any:
        if "over both" in name:
            return fn.dropout_add_layer_norm(t[0], t[1], (3, 4), t[2], t[3], p, generator=seeded())
        if "layer_norm" in name:
            weight = None if "without weight" in name else t[2]
            bias = t[2] if weight is None else (t[3] if len(t) > 3 else None)
            return fn.dropout_add_layer_norm(
                t[0], t[1], (4,), weight, bias, p, return_residual=True, generator=seeded()
            )
        if "rms_norm" in name:
            return fn.dropout_add_rms_norm(
                t[0], t[1], (4,), t[2] if len(t) > 2 else None, p, return_residual=True, generator=seeded()
            )
        return ours(p, seeded(), *t)

    assert torch.autograd.gradcheck(call, tensors, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(call, tensors)
    for i, tensor in enumerate(tensors):  # one argument alone
        rest = [t.detach() for t in tensors]
        assert torch.autograd.gradcheck(lambda t, i=i, rest=rest: call(*rest[:i], t, *rest[i + 1 :]), tensor)


def test_the_residuals_gradient_alone_does_not_need_the_norms() -> None:
    x, r = (values(*SHAPE, seed=i).requires_grad_() for i in range(2))
    _, sum = fn.dropout_add_layer_norm(x, r, SHAPE[1:], p=0.3, return_residual=True, generator=seeded())
    grad = values(*SHAPE, seed=4)
    dx, dr = torch.autograd.grad(sum, (x, r), grad)
    assert same_bits(dr, grad) and same_bits(dx, dropped(grad, mask_of(seeded(), SHAPE, 0.3), 0.3))


def test_bias_gradients_repeat_bit_for_bit() -> None:
    x, b = values(4000, 48), values(48, seed=1).requires_grad_()
    w = values(48, seed=2).requires_grad_()
    found = Counter()
    for count in (1, 2, 3, 2):
        with threads(count):
            y = fn.bias_dropout_add(x, b, x, 0.3, generator=seeded())
            z = fn.dropout_add_layer_norm(x, x, (48,), w, b, 0.3, generator=seeded())
            assert isinstance(z, Tensor)
            grads = torch.autograd.grad([y, z], [b, w], [x, x * 2])
        found[tuple(torch.cat(grads).tolist())] += 1
    assert len(found) == 1


@pytest.mark.parametrize("randomness", ("different", "same"))
def test_functorch_gets_torchs_dropout(randomness: str) -> None:
    x = torch.ones(5, 200)
    y = torch.vmap(lambda row: fn.dropout(row, 0.5), randomness=randomness)(x)
    assert set(y.flatten().tolist()) == {0.0, 2.0}
    assert torch.equal(y[0], y[1]) == (randomness == "same")
    # What is not batched itself, but used in the batch's function.
    fixed = torch.ones(200)
    z = torch.vmap(lambda row: row * fn.dropout(fixed, 0.5), randomness=randomness)(x)
    assert torch.equal(z[0], z[1]) == (randomness == "same")
    with pytest.raises(RuntimeError, match="vmap: called random operation while in randomness error mode"):
        torch.vmap(lambda row: row * fn.dropout(fixed, 0.5))(x)
    grad = torch.func.grad(lambda x: fn.bias_dropout_add(x, x[0], x, 0.5).sum())(x)
    assert set(grad[1:].flatten().tolist()) == {1.0, 3.0}
    norm = torch.func.grad(lambda x: fn.dropout_add_layer_norm(x, x, (200,), p=0.5).square().sum())(values(5, 200))
    assert norm.isfinite().all()


# -- what is kept for the backward pass --------------------------------------------------------------------


def saved_bytes(call: Callable[[], Any]) -> int:
    saved: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        saved[t.data_ptr()] = t.nbytes
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = call()
    assert result is not None
    return sum(saved.values())


def test_no_mask_is_kept() -> None:
    n, d = 1000, 64
    x, r = (values(n, d, seed=i).requires_grad_() for i in range(2))
    b, w = (values(d, seed=i).requires_grad_() for i in range(2))
    assert saved_bytes(lambda: F.dropout(x, 0.5)) >= n * d
    assert saved_bytes(lambda: fn.dropout(x, 0.5)) == 0
    assert saved_bytes(lambda: fn.bias_dropout_add(x, b, r, 0.5)) == 0
    assert saved_bytes(lambda: fn.mixout(x, r.detach(), 0.5)) == 0
    # The sum, mean and rstd, and the weight, which is there anyway.
    assert saved_bytes(lambda: fn.dropout_add_layer_norm(x, r, (d,), w, b, 0.5)) == 4 * (n * d + 2 * n + d)
    assert saved_bytes(lambda: fn.dropout_add_rms_norm(x, r, (d,), w, 0.5)) == 4 * (n * d + n + d)


@pytest.mark.parametrize("reentrant", (True, False))
@every_function
def test_checkpointing_makes_the_same_masks_again(function: Callable[..., Tensor], reentrant: bool) -> None:
    weight = values(10, 10, seed=9)

    def block(x: Tensor) -> Tensor:
        return function(function(x, 0.3) @ weight, 0.5).exp()

    grads = []
    for checkpointed in (False, True):
        torch.manual_seed(11)
        x = values(*SHAPE).requires_grad_()
        y = checkpoint(block, x, use_reentrant=reentrant) if checkpointed else block(x)
        y.sum().backward()
        grads.append((y.detach(), x.grad, torch.get_rng_state()))
    for a, b in zip(*grads, strict=True):
        assert a is not None and b is not None and torch.equal(a, b)


def test_the_backward_pass_draws_nothing() -> None:
    x = values(*SHAPE).requires_grad_()
    y = fn.dropout(x, 0.5)
    state = torch.get_rng_state()
    y.sum().backward()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(123)  # what is drawn meanwhile changes no mask
    z = fn.dropout(x, 0.5)
    torch.manual_seed(456)
    (grad,) = torch.autograd.grad(z, x, torch.ones(SHAPE))
    assert torch.equal(grad != 0, z != 0)


def test_autocast_gives_the_dtypes_of_torchs_operators() -> None:
    layer = nn.Linear(10, 10)
    x, r = values(*SHAPE), values(*SHAPE, seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        h = layer(x)
        ours = fn.bias_dropout_add(h, layer.bias, r, 0.0)
        theirs = r + (h + layer.bias)
        norm = fn.dropout_add_layer_norm(h, h, (10,), torch.ones(10), torch.zeros(10), 0.0)
        torchs = F.layer_norm(h + h, (10,), torch.ones(10), torch.zeros(10))
    assert h.dtype == torch.bfloat16 and ours.dtype == theirs.dtype == torch.float32
    assert isinstance(norm, Tensor) and norm.dtype == torchs.dtype
    torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-2)


def test_inference_mode() -> None:
    with torch.inference_mode():
        x = values(*SHAPE)
        assert same_bits(fn.dropout(x, 0.3, generator=seeded()), fn.dropout(x.clone(), 0.3, generator=seeded()))
        fn.dropout(x, 0.3, inplace=True)
        assert fn.dropout_add_rms_norm(x, x, SHAPE[1:]) is not None


# -- mixout ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("anchor_dtype", FLOATS, ids=short)
@pytest.mark.parametrize("dtype", FLOATS, ids=short)
def test_mixout_is_the_papers(dtype: torch.dtype, anchor_dtype: torch.dtype) -> None:
    p = 0.7
    weight, anchor = values(*SHAPE, dtype=dtype).requires_grad_(), values(*SHAPE, seed=1, dtype=anchor_dtype)
    keep = mask_of(seeded(), SHAPE, p)
    mixed = fn.mixout(weight, anchor, p, generator=seeded())
    if torch.float64 in (dtype, anchor_dtype):  # goes with float64 only
        anchor = anchor.to(dtype)
    w, a = weight.detach().double(), anchor.double()
    paper = (torch.where(keep, w, a) - p * a) / (1 - p)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(mixed.double(), paper, rtol=4 * eps, atol=40 * eps)
    assert mixed.dtype == dtype
    if anchor_dtype == dtype:
        assert torch.equal(mixed.detach()[~keep], anchor[~keep])
    (grad,) = torch.autograd.grad(mixed, weight, torch.ones_like(mixed))
    torch.testing.assert_close(grad.double(), keep.double() / (1 - p), rtol=eps, atol=0)


def test_mixout_at_the_extremes() -> None:
    weight, anchor = values(*SHAPE), values(*SHAPE, seed=1)
    assert torch.equal(fn.mixout(weight, anchor, 1.0), anchor)
    assert fn.mixout(weight, anchor, 0.0) is weight


def test_an_anchor_that_requires_grad_gets_one() -> None:
    weight, anchor = (values(3, 5, seed=i, dtype=torch.float64).requires_grad_() for i in range(2))
    call = lambda w, a: fn.mixout(w, a, 0.3, generator=seeded())  # noqa: E731
    assert torch.autograd.gradcheck(call, (weight, anchor))
    torch.testing.assert_close(call(weight, anchor), call(weight, anchor.detach()))


# -- the oracle --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", RATES)
@pytest.mark.parametrize("seed", (3, -3, 2**63 + 5, 2**64 - 1))
@pytest.mark.parametrize("offset", (0, 8))
def test_dropout_mask(p: float, seed: int, offset: int) -> None:
    mask = fn.dropout_mask((7, 9), p, seed=seed, offset=offset)
    assert mask.dtype == torch.bool and torch.equal(mask, expected_mask((7, 9), p, seed, offset))
    assert torch.equal(fn.dropout_mask(63, p, seed=seed, offset=offset), mask.flatten())


@pytest.mark.parametrize(
    ("arguments", "text"),
    (
        ({"seed": 2**64}, "seed: expected a 64-bit integer"),
        ({"seed": -(2**63) - 1}, "seed: expected a 64-bit integer"),
        ({"seed": 0, "offset": 2}, "offset: expected a multiple of 4"),
        ({"seed": 0, "offset": -4}, "offset: expected a multiple of 4"),
        ({"seed": 0, "p": 2.0}, "p: expected a probability from 0 to 1, got 2"),
    ),
)
def test_dropout_mask_names_what_is_wrong(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        fn.dropout_mask(**{"size": (3,), "p": 0.5, **arguments})
