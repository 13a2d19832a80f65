"""``adamw_``: the bits of the class, every argument, and errors of its own."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from optim_cases import (
    CHANNELS_LAST,
    FLOATS,
    SIXTEEN_BIT,
    Layout,
    Placed,
    bits,
    half_of,
    importances,
    in_another_process,
    normal,
    same_bits,
    short,
    threads,
)
from torch import Tensor, nn

import fastft
from fastft import _C
from fastft.optim import adamw_

NAN, INF = float("nan"), float("inf")
LAYOUTS = (
    Layout((300, 129)),
    Layout((17,), offset=1),
    Layout(()),
    Layout((0, 4)),
    Layout((40, 24), (1, 0)),
    Layout((6, 8, 5, 5), CHANNELS_LAST, 3),
)
STATE = ("exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "steps")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """On shared cores threads wait for one another more than they work."""
    with threads(1):
        yield


def arguments(
    layouts: tuple[Layout, ...] = LAYOUTS,
    dtype: torch.dtype = torch.float32,
    *,
    state_dtype: torch.dtype | None = None,
    grad_dtype: torch.dtype | None = None,
    amsgrad: bool = False,
    **more: Any,
) -> dict[str, Any]:
    """Arguments of ``adamw_`` for a first step: the same for the same layouts."""
    params = [Placed(normal(x.shape, dtype, seed=i), x).view for i, x in enumerate(layouts)]
    made: dict[str, Any] = {
        "params": params,
        "grads": [normal(p.shape, grad_dtype or dtype, seed=i + 50) for i, p in enumerate(params)],
        "exp_avgs": [torch.zeros_like(p, dtype=state_dtype) for p in params],
        "exp_avg_sqs": [torch.zeros_like(p, dtype=state_dtype) for p in params],
        "steps": [torch.zeros(()) for _ in params],
        "lr": 0.01,
    }
    if amsgrad:
        made["max_exp_avg_sqs"] = [torch.zeros_like(p, dtype=state_dtype) for p in params]
    return {**made, **more}


def tensors(given: dict[str, Any]) -> list[tuple[str, Tensor]]:
    """All tensors among the arguments, named."""
    lists = {key: value if isinstance(value, list) else [value] for key, value in given.items()}
    return [(f"{key}[{i}]", t) for key, values in lists.items() for i, t in enumerate(values) if isinstance(t, Tensor)]


def photograph(given: dict[str, Any]) -> dict[str, Tensor]:
    """Their bits; of what has no memory, nothing."""
    return {name: bits(t) for name, t in tensors(given) if t.layout == torch.strided and not t.is_meta}


def changed(before: dict[str, Tensor], given: dict[str, Any]) -> list[str]:
    """Names of the tensors whose bits are no longer those of the photograph."""
    return [name for name, seen in photograph(given).items() if not torch.equal(seen, before[name])]


# -- beside the class ------------------------------------------------------------------------------------------

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "options": {"betas": (0.8, 0.95), "eps": 1e-5, "weight_decay": 0.3, "maximize": True},
    "amsgrad": {"amsgrad": True},
    "anchored": {"anchor_decay": 5.0},
    "anchored_l2": {"anchor_decay": 0.5, "anchor_mode": "l2"},
    "selective": {"anchor_decay": 0.7, "anchor_mode": "selective"},
    "weighted": {"anchor_decay": 500.0, "weighted": True},
    "weighted_l2": {"anchor_decay": 0.5, "anchor_mode": "l2", "weighted": True},
    "clipped": {"max_grad_norm": 2.0},
    "skipping": {"skip_nonfinite": True},
    "scaled": {"grad_scale": 8.0, "max_grad_norm": 2.0},
    "masked": {"masks": True, "max_grad_norm": 2.0},
    "tensor_lr": {"lr": torch.tensor(0.02)},
    "everything": {
        "betas": (0.8, 0.95),
        "eps": 1e-5,
        "weight_decay": 0.3,
        "maximize": True,
        "amsgrad": True,
        "masks": True,
        "anchor_decay": 5.0,
        "max_grad_norm": 2.0,
        "skip_nonfinite": True,
        "grad_scale": 8.0,
    },
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    ("dtype", "state_dtype"),
    [*[(dtype, None) for dtype in FLOATS], *[(dtype, torch.float32) for dtype in SIXTEEN_BIT]],
    ids=short,
)
def test_it_has_the_bits_of_the_class(dtype: torch.dtype, state_dtype: torch.dtype | None, variant: str) -> None:
    """Six steps, one of them skipped for an infinite gradient and one for `found_inf`; norm and counters too."""
    options = {"lr": 0.01, **VARIANTS[variant]}
    masked, scale = options.pop("masks", False), options.pop("grad_scale", None)
    weighted = options.pop("weighted", False)
    given = arguments(dtype=dtype, state_dtype=state_dtype, amsgrad=options.pop("amsgrad", False))
    anchors = [normal(p.shape, torch.bfloat16, seed=i + 80) for i, p in enumerate(given["params"])]
    anchors[1] = None  # free
    weights = [None if a is None else importances(a.shape, torch.float16, seed=i) for i, a in enumerate(anchors)]
    masks: list[Tensor | None] = [None] * len(LAYOUTS)
    if masked:
        masks = [half_of(x.shape[:1] if i % 2 else x.shape, seed=i) for i, x in enumerate(LAYOUTS)]
    params = [nn.Parameter(p.clone()) for p in given["params"]]
    named = [(f"p{i}", p) for i, p in enumerate(params)]
    kept = [(f"p{i}", a) for i, a in enumerate(anchors) if a is not None]
    anchor = fastft.Anchor.snapshot(kept) if "anchor_decay" in options else None
    if anchor is not None and weighted:
        anchor = anchor.with_importance({f"p{i}": f for i, f in enumerate(weights) if f is not None})
    optimizer = fastft.AdamW(
        named,
        anchor=anchor,
        amsgrad="max_exp_avg_sqs" in given,
        state_dtype=state_dtype,
        **options,
    )
    for p, mask in zip(params, masks, strict=True):
        optimizer.set_update_mask(p, mask)
    skipped = torch.zeros((), dtype=torch.int64)
    for step in range(6):
        found_inf = torch.tensor(float(step == 4))
        given["grads"] = [normal(p.shape, dtype, seed=10 * step + i) for i, p in enumerate(params)]
        if step == 2 and options.get("skip_nonfinite"):
            given["grads"][1][3] = INF
            masks[1] = None
            optimizer.set_update_mask(params[1], None)
        for p, grad in zip(params, given["grads"], strict=True):
            p.grad = grad.clone()
        optimizer.found_inf = found_inf
        optimizer.grad_scale = None if scale is None else torch.tensor(scale)
        norm = adamw_(
            **{**given, **options},
            anchors=anchors if "anchor_decay" in options else None,
            importances=weights if weighted else None,
            update_masks=masks,
            grad_scale=optimizer.grad_scale,
            found_inf=found_inf,
            skipped_steps=skipped,
        )
        optimizer.step()
        if norm is None:
            assert optimizer.grad_norm is None and not {"max_grad_norm", "skip_nonfinite"} & set(options)
        else:
            assert same_bits(norm, optimizer.grad_norm)
        for i, p in enumerate(params):
            state = optimizer.state[p]
            assert same_bits(given["params"][i], p.detach())
            assert float(given["steps"][i]) == float(state["step"])
            for ours, key in zip(STATE, ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"), strict=False):
                if ours in given:
                    assert same_bits(given[ours][i], state[key])
    assert int(skipped) == int(optimizer.skipped_steps) == (2 if options.get("skip_nonfinite") else 1)


# -- arguments, one by one -------------------------------------------------------------------------------------


def test_it_writes_params_moments_and_steps_and_nothing_else() -> None:
    given = arguments(amsgrad=True, anchor_decay=3.0, max_grad_norm=1.0, lr=torch.tensor(0.01))
    given["anchors"] = [normal(p.shape, torch.float16, seed=i) for i, p in enumerate(given["params"])]
    given["importances"] = [importances(p.shape, torch.bfloat16, seed=i) for i, p in enumerate(given["params"])]
    given["update_masks"] = [half_of(p.shape, seed=i) for i, p in enumerate(given["params"])]
    given["grad_scale"], given["found_inf"] = torch.tensor(2.0), torch.tensor(0.0)
    given["skipped_steps"] = torch.tensor(5)
    before = photograph(given)
    adamw_(**given)
    written = {name.split("[")[0] for name in changed(before, given)}
    assert written == {"params", *STATE}
    assert [float(step) for step in given["steps"]] == [1.0] * len(LAYOUTS)


@pytest.mark.parametrize("grad_dtype", FLOATS, ids=short)
@pytest.mark.parametrize("dtype", FLOATS, ids=short)
def test_gradients_of_any_dtype(dtype: torch.dtype, grad_dtype: torch.dtype) -> None:
    """They are read into the dtype that is computed in: the bits of gradients that had it already."""
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    mixed = arguments(dtype=dtype, grad_dtype=grad_dtype, max_grad_norm=3.0)
    wide = {**arguments(dtype=dtype, max_grad_norm=3.0), "grads": [g.to(compute) for g in mixed["grads"]]}
    norms = [adamw_(**given) for given in (mixed, wide)]
    assert same_bits(*norms)
    assert all(
        same_bits(a, b) for (_, a), (_, b) in zip(tensors(mixed), tensors(wide), strict=True) if a.dtype == b.dtype
    )
    assert all(g.dtype == grad_dtype for g in mixed["grads"])


@pytest.mark.parametrize("grad_dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=short)
def test_gradients_in_eight_bits(grad_dtype: torch.dtype) -> None:
    narrow = arguments()
    narrow["grads"] = [g.to(grad_dtype) for g in narrow["grads"]]
    wide = {**arguments(), "grads": [g.float() for g in narrow["grads"]]}
    adamw_(**narrow)
    adamw_(**wide)
    assert all(same_bits(a, b) for a, b in zip(narrow["params"], wide["params"], strict=True))


def test_gradients_and_anchors_in_any_memory_order() -> None:
    """Transposed, with gaps, expanded, lazily negated: only their values count."""
    shape = (24, 40)
    layouts = (Layout(shape), Layout(shape, (1, 0)), Layout(shape), Layout((1,)))
    strange, plain = (arguments(layouts, anchor_decay=3.0) for _ in range(2))
    wide = torch.complex(normal(shape, seed=1), normal(shape, seed=2))
    one = torch.complex(normal((1,), seed=3), normal((1,), seed=4))
    strange["grads"] = [
        normal((40, 24), seed=5).t(),
        normal((24, 80), seed=6)[:, ::2],
        wide.conj().imag,  # negated when read
        one.conj().imag,
    ]
    strange["anchors"] = [normal((1, 40), seed=7).expand(shape), wide.real, normal((40, 24), seed=8).t(), one.real]
    assert strange["grads"][2].is_neg() and strange["grads"][3].is_neg()
    for key in ("grads", "anchors"):
        plain[key] = [t.resolve_neg().clone(memory_format=torch.contiguous_format) for t in strange[key]]
    adamw_(**strange)
    adamw_(**plain)
    for key in ("params", "exp_avgs", "exp_avg_sqs"):
        assert all(same_bits(a, b) for a, b in zip(strange[key], plain[key], strict=True))


def test_a_missing_gradient_leaves_its_parameter_alone() -> None:
    given = arguments(max_grad_norm=1.0)
    present = {1, 4}
    given["grads"] = [g if i in present else None for i, g in enumerate(given["grads"])]
    before = photograph(given)
    norm = adamw_(**given)
    expected = torch.cat([given["grads"][i].flatten() for i in present]).double().norm()
    torch.testing.assert_close(norm, expected, rtol=1e-12, atol=0.0)
    assert {int(name.split("[")[1][:-1]) for name in changed(before, given)} == present


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.0, "skip_nonfinite": True}], ids=["plain", "norm"])
def test_nothing_to_step(options: dict[str, Any]) -> None:
    """No parameters at all, or no gradient: no norm, and no step."""
    assert adamw_([], [], [], [], [], lr=0.1, **options) is None
    given = arguments(**options)
    given["grads"] = [None] * len(LAYOUTS)
    before = photograph(given)
    assert adamw_(**given) is None
    assert not changed(before, given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=short)
@pytest.mark.parametrize("shape", [(), (1,)])
def test_steps_say_how_many_were_taken(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Each parameter its own: the second step of one is the first of another."""
    given = arguments()
    given["steps"] = [torch.full(shape, float(i), dtype=dtype) for i in range(len(LAYOUTS))]
    adamw_(**given)
    assert [float(step) for step in given["steps"]] == [i + 1.0 for i in range(len(LAYOUTS))]
    assert all(step.dtype == dtype and step.shape == shape for step in given["steps"])
    # m = 0.1·g, v = 0.001·g², so the step is lr · 0.1 / (1 − 0.9ᵗ) · √((1 − 0.999ᵗ) / 0.001) along the gradient's sign
    for i in (0, 1, 4, 5):
        moved = given["params"][i] - normal(LAYOUTS[i].shape, seed=i) * (1 - 1e-4)
        size = 0.01 * 0.1 / (1 - 0.9 ** (i + 1)) * ((1 - 0.999 ** (i + 1)) / 0.001) ** 0.5
        torch.testing.assert_close(moved, -size * given["grads"][i].sign(), rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize(
    "lr",
    [torch.tensor(0.5), torch.tensor([0.5]), torch.tensor(0.5, dtype=torch.float64), torch.tensor(0.5).bfloat16()],
    ids=["0-d", "1-d", "float64", "bfloat16"],
)
def test_lr_may_be_a_tensor(lr: Tensor) -> None:
    given, number = arguments(lr=lr), arguments(lr=0.5)
    adamw_(**given)
    adamw_(**number)
    assert all(same_bits(a, b) for a, b in zip(given["params"], number["params"], strict=True))
    whole, number = arguments(lr=torch.tensor(1)), arguments(lr=1)
    adamw_(**whole)
    adamw_(**number)
    assert all(same_bits(a, b) for a, b in zip(whole["params"], number["params"], strict=True))


@pytest.mark.parametrize("found_inf", [1.0, 2.0, -1.0, INF, NAN])
def test_found_inf_skips_wherever_it_is_not_zero(found_inf: float) -> None:
    """It is a sum over devices, so 2 is as good as 1."""
    given = arguments(found_inf=torch.tensor(found_inf), skipped_steps=torch.tensor(3))
    before = photograph(given)
    assert adamw_(**given) is None
    assert changed(before, given) == ["skipped_steps[0]"]
    assert int(given["skipped_steps"]) == 4


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_skip_nonfinite(bad: float) -> None:
    """And without it the step is taken."""
    given = arguments(skip_nonfinite=True, skipped_steps=torch.tensor(0))
    given["grads"][0][7, 3] = bad
    before = photograph(given)
    norm = adamw_(**given)
    assert not norm.isfinite() and int(given["skipped_steps"]) == 1
    assert changed(before, given) == ["skipped_steps[0]"]
    given["skip_nonfinite"] = False
    assert adamw_(**given) is None
    assert int(given["skipped_steps"]) == 1 and given["params"][0].isnan().sum() == 1


def test_the_norm_is_unscaled_and_from_before_clipping() -> None:
    given = arguments(max_grad_norm=0.5, grad_scale=torch.tensor(16.0), betas=(0.0, 0.9))
    expected = torch.cat([g.flatten() for g in given["grads"]]).double().norm() / 16
    norm = adamw_(**given)
    assert norm.shape == () and norm.dtype == torch.float64
    torch.testing.assert_close(norm, expected, rtol=1e-12, atol=0.0)
    factor = 0.5 / (expected + 1e-6) / 16
    for m, g in zip(given["exp_avgs"], given["grads"], strict=True):
        torch.testing.assert_close(m.double(), g.double() * factor, rtol=1e-6, atol=0.0)


def test_parameters_of_a_graph_are_written_as_torch_writes_them() -> None:
    """A backward pass through what was overwritten is refused, not silently wrong."""
    p = normal((5,), seed=1).requires_grad_()
    loss = p.square().sum()
    zero = torch.zeros(5)
    adamw_([p], [torch.ones(5)], [zero.clone()], [zero.clone()], [torch.zeros(())], lr=0.1)
    assert p.requires_grad and p.is_leaf
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# -- errors ----------------------------------------------------------------------------------------------------


def refused(given: dict[str, Any], match: str, error: type[Exception] = ValueError) -> None:
    """The call raises, and nothing has been written."""
    before = photograph(given)
    with pytest.raises(error, match=match):
        adamw_(**given)
    assert not changed(before, given)


def three(**more: Any) -> dict[str, Any]:
    """Arguments for three parameters, the middle one of which is about to be spoiled."""
    return arguments((Layout((7, 20)), Layout((4, 3)), Layout((5,))), amsgrad=True, **more)


@pytest.mark.parametrize("key", ["grads", *STATE, "anchors", "importances", "update_masks"])
@pytest.mark.parametrize("count", [2, 4])
def test_lists_of_different_lengths(key: str, count: int) -> None:
    given = three()
    given[key] = [None] * count if key in ("anchors", "importances", "update_masks") else (given[key] * 2)[:count]
    refused(given, f"^{key}: expected 3 entries, one for each of params, got {count}$")


NUMBERS: list[tuple[str, Any, str]] = [
    *[("anchor_decay", bad, f"anchor_decay: expected a finite number >= 0, got {bad!r}") for bad in (-1.0, NAN, INF)],
    ("anchor_mode", "l1", "anchor_mode: expected one of .*, got 'l1'"),
    *[("max_grad_norm", bad, f"max_grad_norm: expected .*, got {bad!r}") for bad in (-1.0, NAN)],
    *[("eps", bad, f"eps: .*{bad!r}") for bad in (-1e-8, NAN)],
    *[("weight_decay", bad, f"weight_decay: .*{bad!r}") for bad in (-0.1, NAN)],
    *[("betas", (bad, 0.9), f"betas.*: .*{bad!r}") for bad in (-0.1, 1.0, NAN)],
    *[("betas", (0.9, bad), f"betas.*: .*{bad!r}") for bad in (-0.1, 1.0, NAN)],
]


@pytest.mark.parametrize(("key", "value", "match"), NUMBERS, ids=[f"{key}={value}" for key, value, _ in NUMBERS])
def test_numbers_that_make_no_sense(key: str, value: Any, match: str) -> None:
    refused(three(**{key: value}), match)


@pytest.mark.parametrize("lr", [0.6, torch.tensor(0.6), NAN], ids=str)
def test_a_step_beyond_the_anchor(lr: Any) -> None:
    given = three(lr=lr, anchor_decay=2.0, anchors=[None] * 3)
    refused(given, r"lr \* anchor_decay: expected at most 1 \(a step would .*\), got (0.6 \* 2 = 1.2|nan \* 2 = nan)$")


@pytest.mark.parametrize("lr", [torch.ones(2), torch.ones(0)], ids=["2", "0"])
@pytest.mark.parametrize("options", [{}, {"anchor_decay": 1.0, "anchor_mode": "l2"}], ids=["plain", "l2"])
def test_an_lr_of_several_numbers(lr: Tensor, options: dict[str, Any]) -> None:
    refused(three(lr=lr, **options), "one element|expected one", (ValueError, RuntimeError))


SPOILED: dict[str, tuple[str, Callable[[Tensor], Any], str]] = {
    "param_complex": ("params", lambda p: p * 1j, r"^params\[1\]: expected a dense float32.*, got torch.complex64"),
    "param_int": ("params", lambda p: p.int(), r"^params\[1\]: expected a dense float32.*, got torch.int32"),
    "param_sparse": ("params", lambda p: p.to_sparse(), r"^params\[1\]: expected a dense .* got .*torch.sparse_coo"),
    "param_meta": ("params", lambda p: p.to("meta"), r"^params\[1\]: expected a parameter with memory, got one on the"),
    "param_gaps": (
        "params",
        lambda p: torch.zeros(4, 6)[:, ::2],
        r"^params\[1\]: expected a dense .* shape \[4, 3\], strides \[6, 2\]$",
    ),
    "param_expanded": (
        "params",
        lambda p: torch.zeros(3).expand(4, 3),
        r"^params\[1\]: expected a parameter whose elements .* shape \[4, 3\] and strides \[0, 1\]",
    ),
    "grad_shape": ("grads", lambda g: g.t(), r"^params\[1\]: grad: expected shape \[4, 3\], got \[3, 4\]$"),
    "grad_complex": ("grads", lambda g: g * 1j, r"^params\[1\]: grad: expected a floating dtype, got torch.complex64$"),
    "grad_int": ("grads", lambda g: g.int(), r"^params\[1\]: grad: expected a floating dtype, got torch.int32$"),
    "grad_sparse": ("grads", lambda g: g.to_sparse(), r"^params\[1\]: grad: expected [^\n]*, got [^\n]*\Z"),
    "grad_meta": ("grads", lambda g: g.to("meta"), r"^params\[1\]: grad: expected [^\n]*, got [^\n]*\Z"),
    "mean_shape": (
        "exp_avgs",
        lambda m: torch.zeros(3, 4),
        r"^params\[1\]: exp_avg: expected the parameter's shape \[4, 3\] in .*, got shape \[3, 4\]$",
    ),
    "mean_order": (
        "exp_avgs",
        lambda m: torch.zeros(3, 4).t(),
        r"^params\[1\]: exp_avg: expected the parameter's shape \[4, 3\] in the parameter's memory order",
    ),
    "mean_dtype": (
        "exp_avgs",
        lambda m: m.half(),
        r"^params\[1\]: exp_avg: expected float32, bfloat16 or uint8 codes, got float16$",
    ),
    "second_dtype": (
        "exp_avg_sqs",
        lambda v: v.double(),
        r"^params\[1\]: exp_avg_sq: expected exp_avg's dtype float32, got float64$",
    ),
    "maximum_shape": (
        "max_exp_avg_sqs",
        lambda v: torch.zeros(12),
        r"^params\[1\]: max_exp_avg_sq: expected the parameter's shape \[4, 3\] in .*, got shape \[12\]$",
    ),
    "steps_number": ("steps", lambda t: 0, r"^params\[1\]: step: expected a plain strided tensor, got "),
    "steps_size": ("steps", lambda t: torch.zeros(2), r"^params\[1\]: step: expected one .*, got 2 float32$"),
    "steps_dtype": ("steps", lambda t: torch.tensor(0), r"^params\[1\]: step: expected one .*, got 1 int64$"),
    "steps_none": ("steps", lambda t: None, r"^params\[1\]: step: expected a plain strided tensor, got "),
}


@pytest.mark.parametrize("kind", SPOILED)
def test_one_spoiled_tensor_among_good_ones(kind: str) -> None:
    key, spoil, match = SPOILED[kind]
    given = three()
    given[key][1] = spoil(given[key][1])
    refused(given, match)


@pytest.mark.parametrize(
    ("anchor", "match"),
    [
        (torch.zeros(3, 4), r"^anchors\[1\]: expected shape \[4, 3\], got \[3, 4\]$"),
        (torch.zeros(4, 3).double(), r"^params\[1\]: anchor: expected float32, .* got float64$"),
        (torch.zeros(4, 3).int(), r"^params\[1\]: anchor: expected float32, .* got "),
    ],
    ids=["shape", "float64", "int32"],
)
def test_wrong_anchors(anchor: Tensor, match: str) -> None:
    refused(three(anchor_decay=1.0, anchors=[None, anchor, None]), match)
    good = torch.zeros(4, 3)
    match = match.replace("anchor:", "importance:").replace("anchors", "importances")
    refused(three(anchor_decay=1.0, anchors=[None, good, None], importances=[None, anchor, None]), match)


@pytest.mark.parametrize("anchors", [None, [None] * 3])
def test_an_importance_without_an_anchor(anchors: Any) -> None:
    given = three(anchor_decay=1.0, anchors=anchors, importances=[None, torch.ones(4, 3), None])
    refused(given, r"^importances\[1\]: expected None without an anchor, got a tensor$")


def test_only_a_weighted_anchor_may_be_pulled_to_by_more_than_all() -> None:
    anchors, weights = [torch.zeros(7, 20), torch.zeros(4, 3), None], [torch.ones(7, 20), torch.ones(4, 3), None]
    beyond = {"anchor_decay": 1000.0, "anchors": anchors}
    adamw_(**three(**beyond, importances=weights))
    message = r"^adamw_: lr \* anchor_decay: expected at most 1 "
    refused(three(**beyond), message)
    refused(three(**beyond, importances=[weights[0], None, None]), message)


@pytest.mark.parametrize(
    ("mask", "match", "error"),
    [
        (
            torch.ones(3, dtype=torch.bool),
            r"expected shape \[4\] \(rows\) or \[4, 3\] \(elements\), got \[3\]",
            ValueError,
        ),
        (torch.ones(4), "expected dtype torch.bool, got torch.float32", ValueError),
        ([True] * 4, "expected a bool tensor or None, got list", TypeError),
    ],
    ids=["shape", "dtype", "type"],
)
def test_wrong_masks(mask: Any, match: str, error: type[Exception]) -> None:
    refused(three(update_masks=[None, mask, None]), rf"^params\[1\]: update mask: {match}$", error)


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("grad_scale", torch.ones(2), "^grad_scale: expected one float32 on cpu, got 2 float32"),
        ("found_inf", torch.zeros(2), "^found_inf: expected one float32 on cpu, got 2 float32"),
        ("skipped_steps", torch.zeros(2, dtype=torch.int64), "^skipped_steps: expected one int64 on cpu, got 2 int64"),
        ("skipped_steps", torch.zeros(()), "^skipped_steps: expected one int64 on cpu, got 1 float32"),
    ],
    ids=["two_scales", "two_infs", "two_counters", "float_counter"],
)
def test_wrong_counters_and_scales(key: str, value: Tensor, match: str) -> None:
    refused(three(**{key: value}), match)


def test_parameters_that_share_memory() -> None:
    given = three()
    memory = torch.ones(140 + 5)
    given["params"][0], given["params"][2] = memory[:140].view(7, 20), memory[139:144]
    refused(given, r"^params\[0\]: expected memory of its own, got some that another one shares$")
    given["grads"][0] = None  # then it is not stepped
    adamw_(**given)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "match"),
    [
        ("max_exp_avg_sqs=[None]", r"max_exp_avg_sq"),
        ("params=[wrapped()]", r"params\[0\]"),
        ("exp_avgs=[wrapped()]", r"params\[0\]: exp_avg: expected "),
        ("anchors=[wrapped()], anchor_decay=0.1", r"anchor"),
    ],
    ids=["missing_maximum", "wrapped_param", "wrapped_mean", "wrapped_anchor"],
)
def test_what_has_no_memory_to_work_on(change: str, match: str) -> None:
    said = in_another_process(
        f"""
        import torch
        from fastft.optim import adamw_
        from torch.testing._internal.two_tensor import TwoTensor

        def zeros():
            return torch.zeros(4)

        def wrapped():
            return TwoTensor(zeros(), zeros())

        given = dict(params=[zeros()], grads=[torch.ones(4)], exp_avgs=[zeros()], exp_avg_sqs=[zeros()], lr=0.1)
        try:
            adamw_(**{{**given, "steps": [torch.zeros(())], **dict({change})}})
        except (ValueError, TypeError) as error:
            assert not given["params"][0].any()
            print(error)
        """
    )
    assert re.search(match, said), said


def test_the_same_tensor_for_two_parameters() -> None:
    given = three()
    given["params"][2] = given["params"][0]
    for key in ("grads", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs"):
        given[key][2] = copy.deepcopy(given[key][0])
    refused(given, r"^params\[0\]: expected memory of its own, got some that another one shares$")


# -- the core's record ---------------------------------------------------------------------------------------


def record(**given: Any) -> _C.AdamWRecord:
    p = torch.ones(3)
    tensors = {"stepped": p, "exp_avg": torch.zeros(3), "exp_avg_sq": torch.zeros(3), "step": torch.zeros(())}
    return _C.AdamWRecord(p, 0, name="p", **{**tensors, **given})


def test_a_record_has_its_tensors_by_name() -> None:
    mask = torch.tensor([True, False, True])
    made = record(update_mask=mask)
    assert made.update_mask is mask and made.anchor is None and made.steps
    assert set(_C.AdamWRecord.tensors) >= {"stepped", "exp_avg", "exp_avg_sq", "step", "anchor", "importance"}
    anchor = torch.zeros(3)
    other = made.replaced(anchor=anchor)
    assert other.anchor is anchor and other.update_mask is mask and made.anchor is None
    assert not made.unstepped().steps and made.unstepped().param is made.param


@pytest.mark.parametrize("method", ["init", "replaced"])
def test_a_record_refuses_names_that_it_does_not_have(method: str) -> None:
    with pytest.raises(TypeError, match="unknown tensor 'exp_average'"):
        _ = record(exp_average=torch.zeros(3)) if method == "init" else record().replaced(exp_average=None)


@pytest.mark.parametrize(
    ("kind", "given"),
    [
        ("decoupled", []),
        ("none", ["anchor"]),
        ("decoupled_weighted", ["anchor"]),
        ("l2", ["anchor", "importance"]),
        ("selective", ["anchor", "importance"]),
        ("selective", []),
    ],
)
def test_a_plan_refuses_anchorings_that_its_tensors_cannot_have(kind: str, given: list[str]) -> None:
    made = record(anchoring=getattr(_C.Anchoring, kind), **{name: torch.zeros(3) for name in given})
    with pytest.raises(ValueError, match=f"^p: anchoring: {kind} does not go with the anchor and importance given$"):
        _C.AdamWPlan([made])
