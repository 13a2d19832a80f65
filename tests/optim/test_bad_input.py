"""Wrong input: an error that names what was wrong, what was expected and what came, before anything is written."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from optim_cases import (
    FLOATS,
    assert_unchanged,
    bits,
    half_of,
    in_another_process,
    normal,
    parameter,
    photograph,
    same_bits,
    short,
    steps_on,
)
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor

import fastft

NAN, INF = float("nan"), float("inf")


@contextmanager
def refused(optimizer: torch.optim.Optimizer, match: str, error: type[Exception] = ValueError) -> Iterator[None]:
    """The block raises, and parameters, gradients and state are then what they were, down to which of them exist."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    before = photograph(params, optimizer)
    with pytest.raises(error, match=match):
        yield
    assert_unchanged(before, photograph(params, optimizer))


class Company:
    """A parameter among good ones: one that has state, one that is about to get its first, one behind it."""

    def __init__(self, bad: Tensor, **options: Any) -> None:
        self.bad = bad
        self.good = [parameter((7, 20), seed=1), parameter((5,), seed=2), parameter((6,), seed=3)]
        anchor = None
        if options.get("anchor_decay"):
            named = [("settled", self.good[0]), ("new", self.good[1]), ("last", self.good[2])]
            if bad.is_floating_point() and not bad.is_meta:
                named.append(("bad", bad))
            anchor = fastft.Anchor.snapshot(named)
        settled, new, last = self.good
        self.optimizer = fastft.AdamW(
            [
                {"params": [("settled", settled), ("new", new)]},
                {"params": [("bad", bad)], "weight_decay": 0.2},
                {"params": [("last", last)]},
            ],
            **{"lr": 0.01, "anchor": anchor, **options},
        )
        grad, bad.grad = bad.grad, None
        if not options.get("differentiable"):
            steps_on([settled], 1)
            self.optimizer.step()
        bad.grad = grad
        steps_on(self.good, 2)


# -- what only torch's own step can take -----------------------------------------------------------------------


def sparse() -> nn.Parameter:
    p = parameter((6, 4), seed=4)
    p.grad = normal((6, 4), seed=5).to_sparse(1)
    return p


def complex_() -> nn.Parameter:
    p = nn.Parameter(torch.complex(normal((6, 4), seed=4), normal((6, 4), seed=5)))
    p.grad = torch.complex(normal((6, 4), seed=6), normal((6, 4), seed=7))
    return p


def gaps(dtype: torch.dtype = torch.float32) -> nn.Parameter:
    p = nn.Parameter(normal((6, 9), dtype, seed=4)[:, :4])
    p.grad = normal((6, 4), dtype, seed=5)
    return p


def wrapped() -> nn.Parameter:
    p = nn.Parameter(TwoTensor(normal((6, 4), seed=4), normal((6, 4), seed=5)))
    p.grad = TwoTensor(normal((6, 4), seed=6), normal((6, 4), seed=7))
    return p


UNFUSED: dict[str, tuple[Callable[[], nn.Parameter], str]] = {
    "sparse": (sparse, "a sparse gradient"),
    "complex": (complex_, r"dtype torch\.complex64"),
    "gaps": (gaps, "gaps in its memory"),
    "subclass": (wrapped, "the tensor subclass TwoTensor"),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "max_grad_norm": {"max_grad_norm": 1.0},
    "skip_nonfinite": {"skip_nonfinite": True},
    "anchor_decay": {"anchor_decay": 2.0},
    "an update mask": {},
}


# A complex parameter has no anchor, so the decay of anchors does not concern it.
CONCERNED = [(kind, option) for kind in UNFUSED for option in OPTIONS if (kind, option) != ("complex", "anchor_decay")]


@pytest.mark.parametrize(("kind", "option"), CONCERNED)
def test_what_torch_must_step_is_refused_where_an_option_of_ours_concerns_it(kind: str, option: str) -> None:
    make, reason = UNFUSED[kind]
    company = Company(make(), **OPTIONS[option])
    if option == "an update mask":
        company.optimizer.set_update_mask(company.bad, half_of((6, 4), seed=1))
    with refused(
        company.optimizer,
        rf"^bad: has {reason}, which fastft's own .* does not support {option}$",
    ):
        company.optimizer.step()


def test_an_anchor_decay_that_does_not_concern_a_complex_parameter_lets_it_step() -> None:
    company = Company(complex_(), anchor_decay=2.0)
    company.optimizer.step()
    assert float(company.optimizer.state[company.bad]["step"]) == 1


def test_all_options_that_stand_in_the_way_are_named() -> None:
    company = Company(gaps(torch.bfloat16), max_grad_norm=1.0, skip_nonfinite=True, state_dtype=torch.float32)
    with refused(company.optimizer, r"^bad: .* torch's does not support max_grad_norm, skip_nonfinite, state_dtype$"):
        company.optimizer.step()


def test_a_differentiable_step_is_refused_with_an_option_of_ours() -> None:
    company = Company(parameter((3,), seed=4), differentiable=True, max_grad_norm=1.0)
    with refused(company.optimizer, r"^settled: has differentiable=True, .* does not support max_grad_norm$"):
        company.optimizer.step()


@pytest.mark.parametrize("option", OPTIONS)
def test_parameters_that_share_memory_are_refused_with_an_option_of_ours(option: str) -> None:
    memory = normal((10,), seed=4)
    company = Company(nn.Parameter(memory[:6]), **OPTIONS[option])
    other = nn.Parameter(memory[4:])
    company.optimizer.add_param_group({"params": [("other", other)]})
    steps_on([company.bad, other], 3)
    if option == "an update mask":
        company.optimizer.set_update_mask(company.bad, half_of((6,), seed=1))
    reason = "has memory that it shares with another parameter, which fastft's own step cannot take"
    with refused(company.optimizer, rf"^bad: {reason}; torch's does not support {option}$"):
        company.optimizer.step()


@pytest.mark.parametrize("kind", [kind for kind in UNFUSED if kind != "sparse"])
@pytest.mark.parametrize(
    "options",
    [{}, {"amsgrad": True, "maximize": True, "weight_decay": 0.3}, {"foreach": True}, {"lr": torch.tensor(0.03)}],
    ids=["defaults", "amsgrad_maximize", "foreach", "tensor_lr"],
)
def test_what_torch_must_step_takes_torchs_steps_without_options_of_ours(kind: str, options: dict[str, Any]) -> None:
    """The bits of `torch.optim.AdamW`, beside a good parameter that the kernels step."""
    make, _ = UNFUSED[kind]
    ours, theirs, good, its_good = make(), make(), parameter((9,), seed=8), parameter((9,), seed=8)
    mine = fastft.AdamW([ours, good], **options)
    torchs = [torch.optim.AdamW([p], **options) for p in (theirs, its_good)]
    for seed in range(4):
        for p in (ours, theirs):
            p.grad = make().grad * (1 - seed)
        steps_on([good], seed)
        steps_on([its_good], seed)
        for optimizer in (mine, *torchs):
            optimizer.step()
    torch.testing.assert_close(good, its_good, rtol=1e-6, atol=1e-7)
    state, expected = mine.state[ours], torchs[0].state[theirs]
    assert list(state) == list(expected)
    for a, b in [(ours, theirs), *((state[key], expected[key]) for key in state)]:
        parts = ((a.a, b.a), (a.b, b.b)) if isinstance(a, TwoTensor) else ((a, b),)
        assert all(same_bits(x, y) for x, y in parts)


def test_overlapping_parameters_take_torchs_steps_without_options_of_ours() -> None:
    """One after the other, as torch does: the part that they share moves twice."""

    def make(cls: type[torch.optim.Optimizer]) -> Tensor:
        memory = normal((10,), seed=4)
        params = [nn.Parameter(memory[:6]), nn.Parameter(memory[4:]), parameter((3,), seed=5)]
        optimizer = cls(params, lr=0.1)  # type: ignore[call-arg]
        for seed in range(3):
            steps_on(params, seed)
            optimizer.step()
        return memory

    assert same_bits(make(fastft.AdamW), make(torch.optim.AdamW))


def test_sparse_gradients_get_torchs_error_without_options_of_ours() -> None:
    """And a good parameter that would have got its first state has none."""
    company = Company(sparse())
    with refused(company.optimizer, "does not support sparse gradients", RuntimeError):
        company.optimizer.step()


def test_an_error_of_torchs_part_leaves_no_state_behind() -> None:
    """Not for another parameter that torch would have stepped, either."""
    company = Company(sparse())
    before = complex_()
    company.optimizer.add_param_group({"params": [("complex", before)]})
    company.optimizer.param_groups.reverse()
    with refused(company.optimizer, "does not support sparse gradients", RuntimeError):
        company.optimizer.step()


def test_torchs_part_is_not_stepped_either_when_ours_is_refused() -> None:
    """A wrong lr in the group of a good parameter, found when that is about to be stepped."""
    company = Company(complex_())
    company.optimizer.param_groups[0]["lr"] = torch.tensor([0.1, 0.2])
    with refused(company.optimizer, "one element|expected one", (RuntimeError, ValueError)):
        company.optimizer.step()


# -- what nobody can step --------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.0}], ids=["plain", "clipped"])
def test_meta_parameters(options: dict[str, Any]) -> None:
    p = nn.Parameter(torch.empty(3, device="meta"))
    p.grad = torch.empty(3, device="meta")
    company = Company(p, **options)
    with refused(company.optimizer, "^bad: expected a parameter with memory, got one on the meta device$"):
        company.optimizer.step()


@pytest.mark.parametrize(("shape", "into"), [((1,), (4,)), ((3, 1), (3, 5)), ((), (2, 2))])
def test_expanded_parameters(shape: tuple[int, ...], into: tuple[int, ...]) -> None:
    p = nn.Parameter(normal(shape, seed=4).expand(into))
    p.grad = torch.ones(into)
    company = Company(p)
    strides = r"\[" + ", ".join(map(str, p.stride())) + r"\]"
    got = rf"got an expanded tensor of shape \[{', '.join(map(str, into))}\] and strides {strides}"
    with refused(
        company.optimizer, rf"^bad: expected a parameter whose elements each have memory of their own, {got}; pass a"
    ):
        company.optimizer.step()


def test_an_expanded_dimension_of_size_one_is_none() -> None:
    """Its stride means nothing."""
    ours, theirs = (nn.Parameter(normal((1, 4), seed=1)[:, :1].as_strided((1, 1, 4), (0, 0, 1))) for _ in range(2))
    for p, cls in ((ours, fastft.AdamW), (theirs, torch.optim.AdamW)):
        steps_on([p], 1)
        cls([p], lr=0.1).step()
    torch.testing.assert_close(ours, theirs)


# -- options ---------------------------------------------------------------------------------------------------

CONSTRUCTION: list[tuple[dict[str, Any], str]] = [
    *[({"lr": bad}, f"^Invalid learning rate: {bad}$") for bad in (-1e-3, NAN)],
    *[({"eps": bad}, f"^Invalid epsilon value: {bad}$") for bad in (-1e-8, NAN)],
    *[({"weight_decay": bad}, f"^Invalid weight_decay value: {bad}$") for bad in (-0.1, NAN)],
    *[({"betas": (bad, 0.9)}, f"^Invalid beta parameter at index 0: {bad}$") for bad in (-0.1, 1.0, NAN, INF)],
    *[({"betas": (0.9, bad)}, f"^Invalid beta parameter at index 1: {bad}$") for bad in (-0.1, 1.0, NAN, INF)],
    *[({"lr": torch.ones(n)}, "^Tensor lr must be 1-element$") for n in (0, 2)],
    *[
        (
            {"anchor": "init", "anchor_decay": bad},
            rf"^param_groups\[0\]: anchor_decay: expected a finite number >= 0, got {bad!r}$",
        )
        for bad in (-1.0, NAN, INF, "1", None)
    ],
    *[
        (
            {"anchor_mode": bad},
            rf"^param_groups\[0\]: anchor_mode: expected one of .*'decoupled', 'l2', 'selective'.*, got {bad!r}$",
        )
        for bad in ("l1", None, 2)
    ],
    ({"anchor_decay": 0.5}, "^anchor_decay: expected 0 without an anchor, got 0.5; pass anchor="),
    *[
        ({"max_grad_norm": bad}, rf"^max_grad_norm: expected None \(no clipping\) or a number > 0, got {bad!r}$")
        for bad in (-1.0, NAN, -INF)
    ],
    *[
        ({"state_dtype": bad}, f'^state_dtype: expected None, torch.float32, torch.bfloat16 or "8bit", got {bad!r}$')
        for bad in (torch.float64, torch.float16, "float32", 8)
    ],
    *[
        ({"extra_bits": bad}, f"^extra_bits: expected 0, 8 or 16, got {re.escape(repr(bad))}$")
        for bad in (4, -8, True, "8", None, 16.0, [8])
    ],
    *[
        ({"rounding": bad}, f'^rounding: expected "nearest" or "stochastic", got {bad!r}$')
        for bad in (None, "up", True)
    ],
    *[
        ({"rounding_seed": bad, "rounding": "stochastic"}, f"^rounding_seed: expected an integer, got {bad!r}$")
        for bad in (None, 1.0, True)
    ],
    ({"rounding": "stochastic", "extra_bits": 16}, '^rounding: expected "nearest" with extra_bits=16, .*"stochastic"$'),
    *[
        ({"state_dtype": "8bit", key: value}, rf'^param_groups\[0\]: {key}: expected .* with state_dtype="8bit", got ')
        for key, value in (("amsgrad", True), ("anchor_mode", "selective"))
    ],
    *[
        ({"anchor": bad}, rf'^anchor: expected None, "init" or a fastft.Anchor, got {type(bad).__name__}; ')
        for bad in ("initial", 3, {"w": 1}, True)
    ],
]


@pytest.mark.parametrize(("options", "match"), CONSTRUCTION, ids=[repr(options) for options, _ in CONSTRUCTION])
def test_options_at_construction(options: dict[str, Any], match: str) -> None:
    p = parameter((3,), seed=1)
    before = bits(p)
    with pytest.raises(ValueError, match=match):
        fastft.AdamW([p], **options)
    assert torch.equal(bits(p), before)


IN_A_GROUP: list[tuple[dict[str, Any], str]] = [
    *[
        ({"anchor_decay": bad}, rf"^param_groups\[1\]: anchor_decay: expected a finite number >= 0, got {bad!r}$")
        for bad in (-1e-9, NAN, INF, "1")
    ],
    ({"anchor_mode": "L2"}, r"^param_groups\[1\]: anchor_mode: expected one of .*, got 'L2'$"),
]


@pytest.mark.parametrize(("options", "match"), IN_A_GROUP, ids=[repr(options) for options, _ in IN_A_GROUP])
def test_options_of_a_group(options: dict[str, Any], match: str) -> None:
    """Given with the group, added with one later, and changed in the middle of a run."""
    a, b = parameter((3,), seed=1), parameter((4,), seed=2)
    with pytest.raises(ValueError, match=match):
        fastft.AdamW([{"params": [a]}, {"params": [b], **options}], anchor="init")
    optimizer = fastft.AdamW([a], anchor="init", anchor_decay=1.0)
    with refused(optimizer, match):
        optimizer.add_param_group({"params": [b], **options})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": [b]})
    steps_on([a], 1)
    optimizer.step()
    steps_on([a, b], 2)
    good = dict(optimizer.param_groups[1])
    optimizer.param_groups[1].update(options)
    with refused(optimizer, match):
        optimizer.step()
    optimizer.param_groups[1].update(good)
    optimizer.step()
    assert float(optimizer.state[b]["step"]) == 1


def test_an_anchor_decay_set_later_without_an_anchor() -> None:
    company = Company(parameter((3,), seed=4))
    steps_on([company.bad], 1)
    company.optimizer.param_groups[1]["anchor_decay"] = 0.5
    with refused(company.optimizer, r"^param_groups\[1\]: anchor_decay: expected 0 without an anchor, got 0.5$"):
        company.optimizer.step()


@pytest.mark.parametrize("tensor", [False, True])
@pytest.mark.parametrize("lr", [0.51, 3.0, INF, NAN])
def test_a_step_beyond_the_anchor(lr: float, tensor: bool) -> None:
    """lr · anchor_decay above 1, whichever of the two was raised; no number is above it, either."""
    company = Company(parameter((3,), seed=4), anchor_decay=2.0)
    steps_on([company.bad], 1)
    company.optimizer.param_groups[1]["lr"] = torch.tensor(lr, dtype=torch.float64) if tensor else lr
    product = rf"got {lr:g} \* 2 = {2 * lr:g}$"
    with refused(
        company.optimizer, rf"^param_groups\[1\]: lr \* anchor_decay: expected at most 1 \(a step would .*\), {product}"
    ):
        company.optimizer.step()


def test_a_step_just_to_the_anchor_is_taken_and_l2_has_no_limit() -> None:
    p, q = parameter((30,), seed=1), parameter((30,), seed=2)
    optimizer = fastft.AdamW(
        [{"params": [p]}, {"params": [q], "anchor_mode": "l2", "anchor_decay": 100.0}],
        lr=0.5,
        weight_decay=0.0,
        anchor="init",
        anchor_decay=2.0,
    )
    start = p.detach().clone()
    with torch.no_grad():
        p.add_(1.0)
    p.grad, q.grad = torch.zeros(30), torch.ones(30)
    optimizer.step()
    torch.testing.assert_close(p.detach(), start, rtol=0.0, atol=2e-7)
    assert float(optimizer.state[q]["step"]) == 1


@pytest.mark.parametrize("lr", [torch.ones(2), torch.ones(0), torch.ones(1, 2)], ids=["2", "0", "1x2"])
def test_a_tensor_lr_of_several_numbers_set_later(lr: Tensor) -> None:
    company = Company(parameter((3,), seed=4))
    steps_on([company.bad], 1)
    company.optimizer.param_groups[1]["lr"] = lr
    with refused(company.optimizer, "one element|expected one", (RuntimeError, ValueError)):
        company.optimizer.step()


@pytest.mark.parametrize(
    ("attribute", "value", "match"),
    [
        ("grad_scale", torch.ones(4), "^grad_scale: expected one float32 on cpu, got 4 float32"),
        ("grad_scale", torch.ones(0), "^grad_scale: expected one float32 on cpu, got 0 float32"),
        ("found_inf", torch.zeros(3), "^found_inf: expected one float32 on cpu, got 3 float32"),
    ],
    ids=["four_scales", "no_scale", "three_infs"],
)
@pytest.mark.parametrize("beside", ["alone", "beside_torchs"])
def test_scales_of_the_wrong_size(attribute: str, value: Tensor, match: str, beside: str) -> None:
    """Also where torch's own step takes a part of the parameters."""
    company = Company(complex_() if beside == "beside_torchs" else parameter((3,), seed=4))
    setattr(company.optimizer, attribute, value)
    with refused(
        company.optimizer, match if beside == "alone" else "(?i)scalar|size|expected one", (RuntimeError, ValueError)
    ):
        company.optimizer.step()


# -- anchors ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(7,), (3, 2), (6, 1), ()])
def test_an_anchor_of_another_shape(shape: tuple[int, ...]) -> None:
    """Same number of elements or not."""
    p = parameter((6,), seed=1)
    good = parameter((4,), seed=2)
    anchor = fastft.Anchor.snapshot([("w", torch.zeros(shape)), ("good", torch.zeros(4))])
    optimizer = fastft.AdamW([("good", good), ("w", p)], anchor=anchor, anchor_decay=1.0)
    steps_on([p, good], 1)
    expected = rf"^w: anchor: expected the parameter's shape \[6\], got \[{', '.join(map(str, shape))}\]$"
    with refused(optimizer, expected):
        optimizer.step()


def test_an_anchor_that_knows_none_of_the_parameters() -> None:
    p = parameter((6,), seed=1)
    anchor = fastft.Anchor.snapshot([("w", torch.zeros(6))])
    with pytest.raises(ValueError, match=r"^anchor: none of the optimizer's parameters is in .*named_parameters\(\)"):
        fastft.AdamW([("v", p)], anchor=anchor, anchor_decay=1.0)


# -- masks and frozen parameters -------------------------------------------------------------------------------

MASKS: list[tuple[Any, type[Exception], str]] = [
    ([True] * 6, TypeError, "expected a bool tensor or None, got list"),
    (True, TypeError, "expected a bool tensor or None, got bool"),
    *[
        (torch.ones(6, dtype=dtype), ValueError, f"expected dtype torch.bool, got {dtype}")
        for dtype in (torch.uint8, torch.float32, torch.int64)
    ],
    *[
        (
            torch.ones(shape, dtype=torch.bool),
            ValueError,
            rf"expected shape \[6\] \(rows\) or \[6, 4\] \(elements\), got \[{', '.join(map(str, shape))}\]",
        )
        for shape in ((4,), (7,), (4, 6), (6, 1), (24,), (), (6, 4, 1), (0,))
    ],
    (torch.ones(6, 4, dtype=torch.bool, device="meta"), ValueError, "expected a plain dense tensor, got Tensor"),
    (torch.ones(6, 4, dtype=torch.bool).to_sparse(), ValueError, "expected a plain dense tensor, got Tensor"),
]


@pytest.mark.parametrize(
    ("mask", "error", "match"),
    MASKS,
    ids=lambda value: f"{short(value.dtype)}{list(value.shape)}" if isinstance(value, Tensor) else "",
)
def test_wrong_masks(mask: Any, error: type[Exception], match: str) -> None:
    """The mask that was there stays."""
    p = parameter((6, 4), seed=1)
    optimizer = fastft.AdamW([("w", p)])
    kept = half_of((6,), seed=2)
    optimizer.set_update_mask(p, kept)
    with refused(optimizer, rf"^w: update mask: {match}$", error):
        optimizer.set_update_mask(p, mask)
    assert torch.equal(optimizer.update_mask(p), kept)


def test_a_mask_of_rows_for_a_parameter_without_dimensions() -> None:
    p = parameter((), seed=1)
    optimizer = fastft.AdamW([("w", p)])
    with refused(optimizer, r"^w: update mask: expected shape \[\] \(elements\), got \[1\]$"):
        optimizer.set_update_mask(p, torch.ones(1, dtype=torch.bool))


@pytest.mark.parametrize(
    ("method", "call"),
    [
        ("freeze", lambda o, p: o.freeze(p)),
        ("freeze", lambda o, p: o.freeze([o.param_groups[0]["params"][0], p])),
        ("freeze", lambda o, p: o.freeze(nn.ParameterList([p]))),
        ("unfreeze", lambda o, p: o.unfreeze([p])),
        ("set_update_mask", lambda o, p: o.set_update_mask(p, torch.ones(5, dtype=torch.bool))),
        ("set_update_mask", lambda o, p: o.set_update_mask(p, None)),
        ("update_mask", lambda o, p: o.update_mask(p)),
    ],
)
def test_parameters_of_somebody_else(method: str, call: Callable[[fastft.AdamW, Tensor], Any]) -> None:
    """Equal values do not make it the same parameter; and of several, none is taken."""
    p = parameter((5,), seed=1)
    optimizer = fastft.AdamW([p])
    stranger = nn.Parameter(p.detach().clone())
    expected = rf"^{method}: expected a parameter of this optimizer, got another Parameter of shape \[5\]$"
    with refused(optimizer, expected):
        call(optimizer, stranger)
    steps_on([p], 1)
    optimizer.step()
    assert float(optimizer.state[p]["step"]) == 1


@pytest.mark.parametrize("what", ["weight", 3, None])
def test_what_is_no_parameter_at_all(what: Any) -> None:
    optimizer = fastft.AdamW([parameter((5,), seed=1)])
    for method in (optimizer.freeze, optimizer.unfreeze):
        with pytest.raises(TypeError, match=rf"^{method.__name__}: expected parameters of the optimizer, got "):
            method([what])


# -- gradients -------------------------------------------------------------------------------------------------


def test_a_gradient_of_the_shape_that_the_parameter_had() -> None:
    """torch checks it when it is assigned; but `.data` may be replaced afterwards."""
    company = Company(parameter((3, 4), seed=4))
    steps_on([company.bad], 1)
    company.bad.data = normal((4, 4), seed=5)
    with refused(company.optimizer, r"^bad: grad: expected shape \[4, 4\], got \[3, 4\]$"):
        company.optimizer.step()


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int32, torch.bool], ids=short)
def test_gradients_of_no_floating_dtype(dtype: torch.dtype) -> None:
    """Which torch lets through where `grad_dtype` is None."""
    company = Company(parameter((3,), seed=4))
    company.bad.grad_dtype = None
    company.bad.grad = torch.ones(3, dtype=dtype)
    with refused(company.optimizer, rf"^bad: grad: expected a floating dtype, got {dtype}$"):
        company.optimizer.step()


def test_a_wrapped_gradient_of_a_plain_parameter() -> None:
    """There is no memory to read it from."""
    company = Company(parameter((3,), seed=4))
    company.bad.grad = TwoTensor(torch.ones(3), torch.ones(3))
    with refused(company.optimizer, r"^bad: grad: expected a plain tensor of shape \[3\] on cpu.*, got .*TwoTensor"):
        company.optimizer.step()


# -- state -----------------------------------------------------------------------------------------------------

STATE: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "missing_exp_avg": (
        lambda s: s.pop("exp_avg"),
        r"^bad: state: expected tensors for exp_avg, got \['exp_avg_sq', 'max_exp_avg_sq', 'step'\]$",
    ),
    "missing_two": (
        lambda s: (s.pop("step"), s.pop("exp_avg_sq")),
        r"^bad: state: expected tensors for step, exp_avg_sq, got \['exp_avg', 'max_exp_avg_sq'\]$",
    ),
    "missing_amsgrad": (
        lambda s: s.pop("max_exp_avg_sq"),
        r"^bad: state: expected tensors for max_exp_avg_sq, got \['exp_avg', 'exp_avg_sq', 'step'\]$",
    ),
    "no_tensor": (lambda s: s.update(exp_avg=3.0), r"^bad: state: expected tensors for exp_avg, got "),
    "shape": (
        lambda s: s.update(exp_avg=torch.zeros(6)),
        r"^bad: exp_avg: expected the parameter's shape \[3, 2\] in the parameter's memory order, got shape \[6\]$",
    ),
    "shape_of_the_second": (
        lambda s: s.update(exp_avg_sq=torch.zeros(2, 3)),
        r"^bad: exp_avg_sq: expected the parameter's shape \[3, 2\] in .*, got shape \[2, 3\]$",
    ),
    "dtype": (
        lambda s: s.update(exp_avg=torch.zeros(3, 2).double()),
        "^bad: exp_avg: expected float32, bfloat16 or uint8 codes, got float64$",
    ),
    "whole_numbers": (
        lambda s: s.update(exp_avg=torch.zeros(3, 2).long()),
        "^bad: exp_avg: expected float32, bfloat16 or uint8 codes, got int64$",
    ),
    "two_dtypes": (
        lambda s: s.update(max_exp_avg_sq=torch.zeros(3, 2).half()),
        "^bad: max_exp_avg_sq: expected exp_avg's dtype float32, got float16$",
    ),
    "step_shape": (
        lambda s: s.update(step=torch.zeros(2)),
        r"^bad: state: step: expected one number, got shape \[2\]$",
    ),
    "meta": (  # in one line: no trace of where in torch that was found
        lambda s: s.update(exp_avg=torch.zeros(3, 2, device="meta")),
        r"^bad: exp_avg: expected [^\n]*, got [^\n]*\Z",
    ),
}


@pytest.mark.parametrize("kind", STATE)
def test_wrong_state(kind: str) -> None:
    spoil, match = STATE[kind]
    company = Company(parameter((3, 2), seed=4), amsgrad=True)
    steps_on([company.bad], 1)
    company.optimizer.step()
    spoil(company.optimizer.state[company.bad])
    new = parameter((4,), seed=5)
    company.optimizer.add_param_group({"params": [("newer", new)]})
    steps_on([new], 2)
    with refused(company.optimizer, match):
        company.optimizer.step()


@pytest.mark.slow
def test_a_wrapped_moment_of_a_plain_parameter() -> None:
    """There is no memory to write it to."""
    said = in_another_process(
        """
        import torch, fastft
        from torch.testing._internal.two_tensor import TwoTensor

        p = torch.nn.Parameter(torch.ones(3))
        p.grad = torch.ones(3)
        optimizer = fastft.AdamW([("w", p)])
        optimizer.step()
        before = p.detach().clone()
        optimizer.state[p]["exp_avg"] = TwoTensor(torch.zeros(3), torch.zeros(3))
        try:
            optimizer.step()
        except ValueError as error:
            assert torch.equal(p, before)
            print(error)
        """
    )
    assert re.match("^w: exp_avg: expected ", said), said


@pytest.mark.parametrize("dtype", [d for d in FLOATS if d != torch.float32], ids=short)
def test_float32_moments_go_with_16_bit_parameters_only(dtype: torch.dtype) -> None:
    p = parameter((3,), dtype, seed=1)
    optimizer = fastft.AdamW([("w", p)])
    steps_on([p], 1)
    optimizer.step()
    for key in ("exp_avg", "exp_avg_sq"):
        optimizer.state[p][key] = optimizer.state[p][key].float()
    if dtype == torch.float64:
        with refused(optimizer, "^w: exp_avg: expected float64, got float32$"):
            optimizer.step()
    else:
        optimizer.step()
        assert float(optimizer.state[p]["step"]) == 2


# -- checkpoints -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (
            lambda saved: saved["state"][1].update(update_mask=torch.ones(3, dtype=torch.bool)),
            r"^w: update mask: expected shape \[5\] \(rows\) or \[5, 2\] \(elements\), got \[3\]$",
        ),
        (
            lambda saved: saved["state"][1].update(update_mask=torch.ones(5)),
            "^w: update mask: expected dtype torch.bool, got torch.float32",
        ),
        (lambda saved: saved["fastft"].update(version=99), r'^state_dict\["fastft"\]: expected version 2, got 99'),
    ],
    ids=["mask_shape", "mask_dtype", "version"],
)
def test_wrong_checkpoints(change: Callable[[dict[str, Any]], Any], match: str) -> None:
    """Masks and frozen parameters stay, too."""

    def make() -> tuple[list[nn.Parameter], fastft.AdamW]:
        params = [parameter((4,), seed=1), parameter((5, 2), seed=2)]
        optimizer = fastft.AdamW(list(zip("vw", params, strict=True)), lr=0.1)
        optimizer.set_update_mask(params[1], half_of((5,), seed=3))
        optimizer.freeze(params[0])
        steps_on(params, 1)
        optimizer.step()
        return params, optimizer

    params, optimizer = make()
    saved = make()[1].state_dict()
    optimizer.param_groups[0]["lr"] = 0.3
    change(saved)
    with refused(optimizer, match):
        optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] == 0.3
    assert torch.equal(optimizer.update_mask(params[1]), half_of((5,), seed=3))
    before = bits(params[0])
    optimizer.step()
    assert torch.equal(bits(params[0]), before)
