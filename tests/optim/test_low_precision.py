"""Weights and moments in few bits, through ``AdamW`` and ``adamw_``: what is kept and refused, each step's bits."""

from __future__ import annotations

import copy
import pickle
import random
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from low_precision_runs import (
    BF16,
    HAVE_LOW_BITS,
    SETTINGS,
    SHAPES,
    Beside,
    assert_same_run,
    give_grads,
    named,
    parameters,
)
from optim_cases import (
    Bounded,
    Layout,
    Oracle,
    assert_unchanged,
    half_of,
    importances,
    normal,
    parameter,
    photograph,
    same_bits,
    threads,
)
from torch import Tensor, nn

import fastft
from fastft.optim import adamw_, formats, full_precision_state, master_weights, reference
from fastft.optim.formats import join
from fastft.optim.low_precision import Precision, rounding_key
from fastft.optim.state import moment_of
from fastft.retention import MoFO, interpolate_
from fastft.unfreeze import moments


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """On shared cores threads wait for one another more than they work."""
    with threads(1):
        yield


EACH = pytest.mark.parametrize("setting", SETTINGS)


# -- what is kept ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float16])
@pytest.mark.parametrize(
    ("layout", "scales"),
    [
        (Layout((64, 64)), (64, 1)),
        (Layout((63, 65)), None),  # 4095 elements
        (Layout((65, 63)), None),  # rows of 63
        (Layout((3, 5, 300)), (3, 6)),
        (Layout((4096,)), (16,)),
        (Layout((4097,)), (17,)),
        (Layout((4095,)), None),
        (Layout((128, 64), (1, 0)), None),
        (Layout((16, 8, 6, 6), (0, 2, 3, 1)), None),
        (Layout(()), None),
        (Layout((0, 300)), None),
    ],
    ids=lambda value: str(value.shape) if isinstance(value, Layout) else "",
)
def test_8_bits_are_for_tensors_large_enough(
    dtype: torch.dtype, layout: Layout, scales: tuple[int, ...] | None
) -> None:
    p = parameter(layout, dtype, seed=1)
    p.grad = torch.ones_like(p)
    optimizer = fastft.AdamW([p], state_dtype="8bit", weight_decay=0.0)
    optimizer.step()
    state = optimizer.state[p]
    if scales is None:
        assert set(state) == {"step", "exp_avg", "exp_avg_sq"}
        assert {state[key].dtype for key in ("exp_avg", "exp_avg_sq")} == {torch.float32}
        return
    assert set(state) == {
        "step",
        *(f"{key}_{part}" for key in ("exp_avg", "exp_avg_sq") for part in ("codes", "scales")),
    }
    for key in ("exp_avg", "exp_avg_sq"):
        assert state[f"{key}_codes"].dtype == torch.uint8 and state[f"{key}_codes"].shape == p.shape
        assert state[f"{key}_scales"].dtype == torch.float32 and state[f"{key}_scales"].shape == scales


@pytest.mark.parametrize("state_dtype", [None, torch.float32, BF16, "8bit"], ids=str)
@pytest.mark.parametrize("extra_bits", [0, 8, 16])
def test_what_is_kept_of_each_dtype(state_dtype: Any, extra_bits: int) -> None:
    params = [nn.Parameter(normal((64, 64), dtype, seed=1)) for dtype in (torch.float32, BF16, torch.float64)]
    optimizer = fastft.AdamW(
        params, state_dtype=state_dtype, extra_bits=extra_bits, rounding="stochastic" if extra_bits < 16 else "nearest"
    )
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    for p in params:
        state = optimizer.state[p]
        low = {8: torch.uint8, 16: torch.uint16}.get(extra_bits) if p.dtype == BF16 else None
        assert (state["low_bits"].dtype if "low_bits" in state else None) == low
        plain = torch.float32 if low else p.dtype
        wanted = plain if state_dtype is None or p.dtype == torch.float64 else state_dtype
        found = {"8bit" if "exp_avg_codes" in state else state["exp_avg"].dtype}
        assert found == {wanted}


def test_low_bits_lie_as_the_parameter_does() -> None:
    p = parameter(Layout((6, 8, 5, 5), (0, 2, 3, 1)), BF16, seed=1)
    p.grad = torch.ones_like(p)
    optimizer = fastft.AdamW([p], extra_bits=16, weight_decay=0.1)
    optimizer.step()
    assert optimizer.state[p]["low_bits"].stride() == p.stride()
    # The memory order may change at any time; that is no writing.
    before = master_weights(nn.ParameterDict({"p": p}), optimizer)["p"]
    p.data = p.data.contiguous()
    assert same_bits(master_weights(nn.ParameterDict({"p": p}), optimizer)["p"], before)
    assert not torch.equal(before, p.float())
    optimizer.step()
    assert optimizer.state[p]["low_bits"].stride() == p.stride()
    after = master_weights(nn.ParameterDict({"p": p}), optimizer)["p"]
    torch.testing.assert_close(after, before, rtol=0.0, atol=2e-3)
    assert not torch.equal(after, p.float())


# -- what is refused ---------------------------------------------------------------------------------------------


def test_float16_has_no_extra_bits() -> None:
    p = nn.Parameter(normal((3, 4), torch.float16, seed=1))
    said = r"^a: extra_bits: expected bfloat16 parameters \(.*\), got torch.float16; "
    with pytest.raises(ValueError, match=said):
        fastft.AdamW([("a", p)], extra_bits=8)
    good = nn.Parameter(normal((3, 4), BF16, seed=1))
    optimizer = fastft.AdamW([("b", good)], extra_bits=16)
    with pytest.raises(ValueError, match=said):
        optimizer.add_param_group({"params": [("a", p)]})
    assert len(optimizer.param_groups) == 1
    good.data = good.data.half()
    good.grad = torch.ones_like(good)
    before = photograph([good], optimizer)
    with pytest.raises(ValueError, match=r"^b: extra_bits: "):
        optimizer.step()
    assert_unchanged(before, photograph([good], optimizer))


@pytest.mark.parametrize(("key", "value"), [("amsgrad", True), ("anchor_mode", "selective")])
def test_8_bits_refuse_amsgrad_and_selective_whenever_they_come(key: str, value: Any) -> None:
    params = parameters(BF16)
    optimizer = fastft.AdamW(named(params), state_dtype="8bit", anchor="init", anchor_decay=1.0)
    give_grads(params, 0)
    optimizer.step()
    with pytest.raises(ValueError, match=rf'^param_groups\[1\]: {key}: expected .* with state_dtype="8bit", got'):
        optimizer.add_param_group({"params": [("more", nn.Parameter(torch.zeros(3)))], key: value})
    assert len(optimizer.param_groups) == 1
    saved = optimizer.state_dict()
    saved["param_groups"][0][key] = value
    before = photograph(params, optimizer)
    with pytest.raises(ValueError, match=rf"^state_dict: param_groups\[0\]: {key}: "):
        optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0][key] != value
    optimizer.param_groups[0][key] = value
    with pytest.raises(ValueError, match=rf"^param_groups\[0\]: {key}: "):
        optimizer.step()
    assert_unchanged(before, photograph(params, optimizer))


@pytest.mark.parametrize(
    ("option", "value"),
    [("state_dtype", "8bit"), ("state_dtype", torch.float32), ("extra_bits", 8), ("rounding", "stochastic")],
)
def test_torchs_own_step_is_refused_what_it_cannot_do(option: str, value: Any) -> None:
    p = nn.Parameter(normal((128, 130), BF16, seed=1)[:, :64])  # with gaps
    p.grad = torch.ones_like(p)
    optimizer = fastft.AdamW([("a", p)], **{option: value})
    before = p.detach().clone()
    with pytest.raises(ValueError, match=f"^a: has gaps in its memory, .* does not support {option}$"):
        optimizer.step()
    assert torch.equal(p, before) and not optimizer.state
    complex_one = nn.Parameter(torch.ones(3, dtype=torch.complex64))
    complex_one.grad = torch.ones_like(complex_one)
    fastft.AdamW([complex_one], **{option: value}).step()  # which the option does not concern
    assert not torch.equal(complex_one, torch.ones(3))


STATE: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no_scales": (lambda s: s.pop("exp_avg_scales"), "exp_avg_scales: expected float32 of shape [40, 1], got NoneType"),
    "scales_shape": (
        lambda s: s.update(exp_avg_sq_scales=torch.zeros(40)),
        "exp_avg_sq_scales: expected float32 of shape [40, 1], got float32 of shape [40]",
    ),
    "codes_dtype": (
        lambda s: s.update(exp_avg_codes=s["exp_avg_codes"].float()),
        "exp_avg_codes: expected uint8 of shape [40, 128], got float32 of shape [40, 128]",
    ),
    "one_in_numbers": (
        lambda s: (s.pop("exp_avg_codes"), s.pop("exp_avg_scales"), s.update(exp_avg=torch.zeros(40, 128))),
        "exp_avg_codes: expected uint8 of shape [40, 128], got NoneType",
    ),
    "low_bits_dtype": (
        lambda s: s.update(low_bits=torch.zeros(40, 128, dtype=torch.int32)),
        "low_bits: expected uint16 or uint8 of shape [40, 128], got int32 of shape [40, 128]",
    ),
    "low_bits_shape": (
        lambda s: s.update(low_bits=s["low_bits"][1:]),
        "low_bits: expected uint16 or uint8 of shape [40, 128], got uint16 of shape [39, 128]",
    ),
}


@pytest.mark.parametrize("kind", STATE)
@pytest.mark.parametrize("loaded", [False, True])
def test_wrong_state(kind: str, loaded: bool) -> None:
    params = parameters(BF16)
    optimizer = fastft.AdamW(named(params), state_dtype="8bit", extra_bits=16)
    give_grads(params, 0)
    optimizer.step()
    spoil, said = STATE[kind]
    with pytest.raises(ValueError) as error:
        if loaded:
            saved = copy.deepcopy(optimizer.state_dict())
            spoil(saved["state"][0])
            before = photograph(params, optimizer)
            optimizer.load_state_dict(saved)
        else:
            spoil(optimizer.state[params[0]])
            before = photograph(params, optimizer)
            optimizer.step()
    assert str(error.value).endswith(said) and "p0" in str(error.value)
    assert_unchanged(before, photograph(params, optimizer))


# -- each step's bits --------------------------------------------------------------------------------------------

VARIANTS: dict[str, dict[str, Any]] = {
    "free": {"anchored": False},
    "decoupled": {},
    "l2": {"options": {"anchor_mode": "l2"}},
    "decoupled_weighted": {"weighted": True, "options": {"anchor_decay": 100.0}},
    "l2_weighted": {"weighted": True, "options": {"anchor_mode": "l2"}},
    "clipped": {"options": {"max_grad_norm": 0.05}},
    "maximize": {"options": {"maximize": True, "lr": torch.tensor(5e-3)}},
}


@EACH
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_step_in_few_bits_is_the_float32_step_rounded(setting: str, variant: str) -> None:
    run = Beside(setting, **VARIANTS[variant])
    for step in range(3):
        run.step(step)


@EACH
def test_masks_freezing_and_skipped_steps(setting: str) -> None:
    run = Beside(setting, options={"max_grad_norm": 0.05, "skip_nonfinite": True})
    run.step(0)
    run.set_mask(0, torch.arange(40) % 3 > 0)
    run.set_mask(2, half_of((13, 5, 70), seed=3))
    run.freeze(1)
    run.step(1)
    run.step(2, grad_scale=4.0, found_inf=1.0)
    run.step(3, grad_scale=4.0, found_inf=0.0)
    run.unfreeze(1)
    run.set_mask(0, half_of((40, 128), seed=4))
    run.set_mask(2, torch.arange(13) != 5)
    run.step(4)
    run.set_mask(0, None)
    run.step(5)
    assert int(run.optimizer.skipped_steps) == 1
    assert [int(run.optimizer.state[p]["step"]) for p in run.params] == [5, 3, 5, 5]


# Projection is all or nothing: only masters near enough to the exact weights decide as these do.
@pytest.mark.parametrize("setting", ["split16", "split16_float32_moments", "split8", "split8_stochastic"])
def test_amsgrad_and_selective_go_with_all_but_8_bits(setting: str) -> None:
    """Against float64: selective projection starts from what the step has stored."""
    dtype, options = SETTINGS[setting]
    (p,), (exact,) = parameters(dtype, [(40, 128)]), parameters(dtype, [(40, 128)])
    exact.data = exact.data.double()
    anchor = normal((40, 128), seed=3, scale=0.1)
    shared = {"lr": 1e-2, "amsgrad": True, "weight_decay": 0.1, "anchor_mode": "selective", "anchor_decay": 0.9}
    runs = []
    for tensor, extra in ((p, options), (exact, {})):
        optimizer = fastft.AdamW(
            [("p", tensor)], anchor=fastft.Anchor.snapshot([("p", anchor.to(tensor.dtype))]), **shared, **extra
        )  # type: ignore[arg-type]
        for step in range(6):
            give_grads([tensor], step)
            optimizer.step()
        runs.append(optimizer)
    assert "max_exp_avg_sq" in runs[0].state[p]
    master = master_weights(nn.ParameterDict({"p": p}), runs[0])["p"].double()
    bits = {8: 2**-15, 16: 2**-23}[options["extra_bits"]]
    moments = 0.03 if runs[0].state[p]["exp_avg"].dtype == BF16 else 2e-3
    distance = (master - exact).abs() / (6 * 2 * bits * exact.abs().clamp(min=2**-10) + moments * 6e-2)
    assert distance.max() < 1.0
    assert not torch.equal(master, parameters(dtype, [(40, 128)])[0])


@pytest.mark.parametrize("setting", ["split16", "8bit_split8_stochastic", "8bit_float32"])
def test_a_gradient_scaler(setting: str) -> None:
    """A scale that is a power of two leaves no trace, and a step with inf changes nothing, bits and codes included."""
    dtype, options = SETTINGS[setting]
    runs = []
    for scaled in (False, True):
        params = parameters(dtype)
        optimizer = fastft.AdamW(named(params), lr=1e-3, weight_decay=0.1, **options)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000, enabled=scaled)
        for step in range(4):
            give_grads(params, step)
            if step == 2:
                if not scaled:
                    continue
                params[0].grad[3, 3] = float("inf")  # type: ignore[index]
            before = photograph(params, optimizer)
            scaler.scale(torch.zeros(()))  # which makes the scale
            for p in params:
                p.grad.mul_(scaler.get_scale())  # type: ignore[union-attr]
            scaler.step(optimizer)
            if step == 2:
                after = photograph(params, optimizer)
                assert_unchanged(*({k: v for k, v in seen.items() if k[0] != "grad"} for seen in (before, after)))
                scaler.update(1024.0)
            else:
                scaler.update()
        runs.append((params, optimizer))
    assert_same_run(*runs)


@EACH
@pytest.mark.parametrize("masked", [False, True])
def test_the_function_does_what_the_optimizer_does(setting: str, masked: bool) -> None:
    dtype, options = SETTINGS[setting]
    shared: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1, "anchor_decay": 3.0, "max_grad_norm": 0.05}
    ours, theirs = parameters(dtype), parameters(dtype)
    anchors = [normal(p.shape, seed=30 + i, scale=0.1) for i, p in enumerate(ours)]
    optimizer = fastft.AdamW(named(ours), anchor=fastft.Anchor.snapshot(named(anchors)), **shared, **options)
    masks: list[Tensor | None] = [half_of(p.shape[:1], seed=i) if masked else None for i, p in enumerate(ours)]
    for p, mask in zip(ours, masks, strict=True):
        optimizer.set_update_mask(p, mask)
    give_grads(ours, 0)
    optimizer.step()
    for p, q in zip(ours, theirs, strict=True):  # a state that is not 0
        q.data.copy_(p.data)
    states = copy.deepcopy([optimizer.state[p] for p in ours])

    def each(*keys: str) -> list[Any]:
        return [next((state[key] for key in keys if key in state), None) for state in states]

    rounding = {key: options[key] for key in ("rounding", "rounding_seed") if key in options}
    for step in (1, 2):
        for params in (ours, theirs):
            give_grads(params, step)
        optimizer.step()
        norm = adamw_(
            theirs,
            [p.grad for p in theirs],
            each("exp_avg", "exp_avg_codes"),
            each("exp_avg_sq", "exp_avg_sq_codes"),
            each("step"),
            exp_avg_scales=each("exp_avg_scales"),
            exp_avg_sq_scales=each("exp_avg_sq_scales"),
            low_bits=each("low_bits"),
            anchors=anchors,
            update_masks=masks,
            **shared,
            **rounding,
        )
        assert torch.equal(norm, optimizer.grad_norm)  # type: ignore[arg-type]
        for i, (p, q) in enumerate(zip(ours, theirs, strict=True)):
            assert same_bits(p, q), f"p{i}"
            for key, value in optimizer.state[p].items():
                assert same_bits(value, states[i][key]), f"p{i}: {key}"


def test_the_function_refuses_what_does_not_fit() -> None:
    def call(p: Tensor, moments: torch.dtype = torch.float32, **options: Any) -> None:
        zeros = [torch.zeros_like(p, dtype=moments) for _ in range(2)]
        before = p.clone()
        try:
            adamw_([p], [torch.ones_like(p)], [zeros[0]], [zeros[1]], [torch.zeros(())], lr=0.1, **options)
        finally:
            assert torch.equal(p, before)

    p, low = torch.ones(3, 300, dtype=BF16), torch.zeros(3, 300, dtype=torch.uint16)
    scales = {"exp_avg_scales": [torch.zeros(3, 2)], "exp_avg_sq_scales": [torch.zeros(3, 2)]}
    for said, arguments in {
        r"low_bits\[0\]: expected None with a torch.float32": {"p": p.float(), "low_bits": [low]},
        r"low_bits\[0\]: expected uint8 with rounding=": {"p": p, "low_bits": [low], "rounding": "stochastic"},
        r"low_bits: expected 1 entries, one for each of params, got 2": {"p": p, "low_bits": [low, low]},
        r"params\[0\]: low_bits: expected the parameter's shape": {"p": p, "low_bits": [low[1:]]},
        r"params\[0\]: low_bits: expected uint16 or uint8": {"p": p, "low_bits": [low.int()]},
        r"exp_avg_scales\[0\]: expected a tensor with uint8 moments": {"p": p, "moments": torch.uint8},
        r"exp_avg_scales\[0\]: .*, got Tensor with torch.float32": {"p": p, **scales},
        r"exp_avg_sq_scales\[0\]: expected float32 of shape \[3, 2\], got float32 of shape \[6\]": {
            "p": p,
            "moments": torch.uint8,
            **scales,
            "exp_avg_sq_scales": [torch.zeros(6)],
        },
        r"rounding: expected ": {"p": p, "rounding": "up"},
    }.items():
        with pytest.raises(ValueError, match=f"^{said}"):
            call(**arguments)  # type: ignore[arg-type]


# -- against float64 -----------------------------------------------------------------------------------------------

DRAWN_SHAPES = (
    Layout((4096,)),
    Layout((5000,)),
    Layout((64, 64)),
    Layout((20, 257)),
    Layout((3, 7, 300)),
    Layout((90, 70), (1, 0)),
    Layout((8, 6, 5, 5), (0, 2, 3, 1)),
    Layout((1, 4200)),
    Layout((40, 13), offset=1),
    Layout((7,)),
    Layout(()),
)


@dataclass
class Drawn:
    """A parameter and options drawn by a seed, and one step at a time against float64.

    Rounding keeps order. So what is kept must lie between what the two ends of the float32 computation's bound are
    rounded to: one value in nearly all elements.
    """

    seed: int

    def __post_init__(self) -> None:
        draw = random.Random(self.seed)
        self.dtype = draw.choice([BF16, BF16, BF16, torch.float32, torch.float16])
        self.state_dtype = draw.choice([None, torch.float32, BF16, "8bit", "8bit"])
        self.extra_bits = draw.choice([0, 8, 16]) if self.dtype == BF16 else 0
        self.rounding = "nearest" if self.extra_bits == 16 else draw.choice(["nearest", "stochastic"])
        layout, seed = draw.choice(DRAWN_SHAPES), draw.randrange(1000)
        self.p = parameter(layout, self.dtype, seed=seed, scale=10 ** draw.uniform(-3, 0))
        self.amsgrad = self.state_dtype != "8bit" and draw.random() < 0.3
        self.weighted = draw.random() < 0.3
        anchored = self.weighted or draw.random() < 0.6
        anchors = [("p", normal(layout.shape, seed=seed + 1, scale=0.1))] if anchored else []
        self.anchor = anchors[0][1] if anchored else None
        self.importance = importances(layout.shape, seed=seed + 2) if self.weighted else None
        anchor = fastft.Anchor.snapshot(anchors) if anchored else None
        if anchor is not None and self.importance is not None:
            anchor = anchor.with_importance({"p": self.importance})
        self.group: dict[str, Any] = {
            "lr": 10 ** draw.uniform(-5, -2),
            "betas": (draw.choice([0.0, 0.8, 0.9]), draw.choice([0.9, 0.999])),
            "eps": 10 ** draw.uniform(-8, -3),
            "weight_decay": draw.choice([0.0, 0.1, 1.0]),
            "anchor_decay": draw.choice([1.0, 30.0]) if anchored else 0.0,
            "anchor_mode": draw.choice(["decoupled", "l2"]),
            "maximize": draw.random() < 0.3,
        }
        self.max_grad_norm = draw.choice([None, None, 0.1])
        self.optimizer = fastft.AdamW(
            [("p", self.p)],
            anchor=anchor,
            amsgrad=self.amsgrad,
            max_grad_norm=self.max_grad_norm,
            state_dtype=self.state_dtype,
            extra_bits=self.extra_bits,
            rounding=self.rounding,  # type: ignore[arg-type]
            rounding_seed=self.seed,
            **self.group,
        )
        kind = draw.choice(["none", "none", "rows", "elements"]) if layout.shape else "none"
        self.mask = None if kind == "none" else half_of(layout.shape[:1] if kind == "rows" else layout.shape, seed=seed)
        self.optimizer.set_update_mask(self.p, self.mask)
        self.places = torch.arange(self.p.numel()).as_strided(self.p.shape, self.p.stride())

    def step(self, t: int) -> None:
        p, state = self.p, self.optimizer.state.get(self.p, {})
        p.grad = normal(p.shape, p.dtype, seed=self.seed + 7 * t, scale=0.03)
        before = {key: value.clone() for key, value in state.items()}
        low = before.get("low_bits")
        master = reference.read_weight(p.detach().clone(), low)
        oracle = Oracle(master.float(), torch.float32, self.anchor, self.amsgrad, self.importance)
        if before:
            oracle.m, oracle.v = (Bounded.exact(moment_of(before, p, key)) for key in ("exp_avg", "exp_avg_sq"))
            if self.amsgrad:
                oracle.x = Bounded.exact(before["max_exp_avg_sq"])
        oracle.t = t - 1
        old_p, old_m, old_v = oracle.p, oracle.m, oracle.v
        self.optimizer.step()
        norm = self.optimizer.grad_norm
        factor = 1.0 if norm is None else reference.clip_factor(float(norm), self.max_grad_norm)
        oracle.step(p.grad, factor, self.mask, **self.group)
        live = torch.ones(p.shape, dtype=torch.bool)
        if self.mask is not None:
            live = self.mask.view(self.mask.shape + (1,) * (p.dim() - self.mask.dim())).expand(p.shape)
        state = self.optimizer.state[p]
        key, random_bits = rounding_key(self.seed, 0), None
        if self.rounding == "stochastic" and p.dtype != torch.float32:
            random_bits = formats.rounding_bits(key, t, self.places.flatten()).view(p.shape)

        def weight(value: Tensor) -> Tensor:
            return reference.read_weight(*reference.write_weight(value, p.dtype, self.extra_bits, random_bits))

        found = reference.read_weight(p.detach(), state.get("low_bits"))
        narrow = p.dtype != torch.float32 and self.extra_bits == 0
        self.between("weight", found, oracle.p, weight, live, old_p, narrow)
        moments = {"exp_avg": (oracle.m, old_m), "exp_avg_sq": (oracle.v, old_v)}
        if oracle.x is not None:
            moments["max_exp_avg_sq"] = (oracle.x, oracle.x)
        for name, (bounded, old) in moments.items():
            if name in state:
                dtype = state[name].dtype
                keep = partial(reference.write_moment, key=name, t=t, before=state[name])
                kept = state[name].double()
                self.between(
                    name, kept, bounded, lambda x, keep=keep: keep(x).double(), live, old, dtype != torch.float32
                )
            else:
                self.between_codes(name, bounded, state, before, live, t)

    def between(
        self,
        name: str,
        found: Tensor,
        bounded: Bounded,
        keep: Callable[[Tensor], Tensor],
        live: Tensor,
        old: Bounded,
        narrow: bool,
    ) -> None:
        low, high = keep(bounded.value - bounded.error), keep(bounded.value + bounded.error)
        right = torch.where(live, (low <= found) & (found <= high), found == old.value)
        assert right.all(), f"{self}: {name}: {int((~right).sum())} elements are off"
        # The bound is no excuse: in 16 bits most values are known exactly.
        if narrow and low.numel() > 100:
            assert (low == high).float().mean() > 0.5, f"{self}: {name}"

    def between_codes(
        self, name: str, bounded: Bounded, state: Any, before: dict[str, Tensor], live: Tensor, t: int
    ) -> None:
        kind = formats.FORMATS[name]
        codes, scales = state[f"{name}_codes"], state[f"{name}_scales"]
        ends = [(bounded.value.abs() + sign * bounded.error).clamp(min=0.0) for sign in (-1, 1)]
        if kind.second:
            ends = [end.sqrt() for end in ends]
        ends = [ends[0] * (1 - 2.0**-22), ends[1] * (1 + 2.0**-22)]  # the root and the scaling are float32
        blocks = [formats.in_blocks(end) for end in ends]
        alive = formats.in_blocks(live)
        scale = scales.double().reshape(*alive.shape[:2], 1)
        lowest, highest = (torch.where(alive, block, 0.0).amax(-1, keepdim=True) / kind.top for block in blocks)
        old = before[f"{name}_scales"].double().view(scale.shape) if before else torch.zeros_like(scale)
        any_live = alive.any(-1, keepdim=True)
        right = torch.where(any_live, (lowest <= scale) & (scale <= highest), scale == old)
        assert right.all(), f"{self}: scales of {name}"
        inverse = torch.where(scale > 0, 1 / scale, 0.0)
        bits = formats.dither(t)
        low, high = (formats.code8((block * inverse).float(), kind, bits) for block in blocks)
        if kind.second:
            low, high = (
                torch.where(block > 0, code.clamp(min=1), code) for block, code in zip(blocks, (low, high), strict=True)
            )
        kept = formats.in_blocks(codes).to(torch.int32)
        magnitude = kept if kind.second else kept & 0x7F
        was = formats.in_blocks(before[f"{name}_codes"]).to(torch.int32) if before else torch.zeros_like(kept)
        right = torch.where(alive, (low <= magnitude) & (magnitude <= high), kept == was)
        if not kind.second:
            sure = formats.in_blocks(bounded.value.abs() > bounded.error) & alive
            right &= ~sure | ((kept >= 0x80) == (formats.in_blocks(bounded.value) < 0))
        assert right.all(), f"{self}: codes of {name}: {int((~right).sum())} are off"
        assert ((low == high) | ~alive).float().mean() > 0.9, f"{self}: {name}"


@pytest.mark.filterwarnings("ignore:weight_decay", "ignore:anchor_decay")
@pytest.mark.parametrize("ten", [pytest.param(i, marks=[pytest.mark.slow] if i > 2 else []) for i in range(20)])
def test_drawn_steps_against_float64(ten: int) -> None:
    for seed in range(10 * ten, 10 * (ten + 1)):
        drawn = Drawn(seed)
        for t in range(1, 4):
            drawn.step(t)


# -- against a master in float32 ---------------------------------------------------------------------------------


@pytest.mark.parametrize("state_dtype", [torch.float32, "8bit"], ids=str)
def test_16_extra_bits_are_a_float32_run(state_dtype: Any) -> None:
    """Whose gradients are bfloat16, bit for bit, with anchor, decay, clipping and a mask."""
    ours = parameters(BF16)
    theirs = [nn.Parameter(p.detach().float()) for p in ours]
    anchor = fastft.Anchor.snapshot([(name, normal(p.shape, seed=70, scale=0.1)) for name, p in named(ours)])
    optimizers = []
    for params, extra in ((ours, {"extra_bits": 16}), (theirs, {})):
        optimizer = fastft.AdamW(
            named(params),
            lr=1e-3,
            weight_decay=0.1,
            anchor=copy.deepcopy(anchor),
            anchor_decay=30.0,
            max_grad_norm=0.05,
            state_dtype=state_dtype,
            **extra,  # type: ignore[arg-type]
        )
        optimizer.set_update_mask(params[2], half_of(params[2].shape, seed=1))
        optimizers.append(optimizer)
    for step in range(20):
        give_grads(ours, step)
        for p, q in zip(ours, theirs, strict=True):
            q.grad = p.grad.float()  # type: ignore[union-attr]
        for optimizer in optimizers:
            optimizer.step()
    found = master_weights(nn.ParameterDict(dict(named(ours))), optimizers[0])
    for (name, value), q in zip(found.items(), theirs, strict=True):
        assert value.dtype == torch.float32 and same_bits(value, q), name
    assert all((p.detach() - q).abs().max() > 0 for p, q in zip(ours, theirs, strict=True))


def drift(dtype: torch.dtype, steps: int, **options: Any) -> Tensor:
    """Displacement under gradients that keep their direction, at a learning rate far below half a bfloat16 ulp."""
    (p,) = parameters(dtype, [(64, 64)], scale=0.1)
    p.data = p.data.bfloat16().to(dtype)
    optimizer = fastft.AdamW([p], lr=4e-6, weight_decay=0.0, **options)
    start = (p.detach().double(), normal((64, 64), seed=5))
    for step in range(steps):
        p.grad = (start[1] + normal((64, 64), seed=100 + step)).bfloat16().to(dtype)
        optimizer.step()
    return master_weights(nn.ParameterDict({"p": p}), optimizer)["p"].double() - start[0]


def test_small_steps_add_up() -> None:
    exact = drift(torch.float32, 150)

    def cosine(**options: Any) -> float:
        return torch.nn.functional.cosine_similarity(
            drift(BF16, 150, **options).flatten(), exact.flatten(), dim=0
        ).item()

    assert cosine(extra_bits=16, state_dtype=torch.float32) > 0.9999
    assert cosine(extra_bits=16) > 0.99
    assert cosine(extra_bits=8, state_dtype="8bit") > 0.97
    assert cosine(state_dtype=torch.float32) < 0.5  # to nearest: most weights stand still
    stochastic = drift(BF16, 150, rounding="stochastic", state_dtype=torch.float32)
    assert abs(float((stochastic * exact).sum() / exact.square().sum()) - 1.0) < 0.05


@pytest.mark.parametrize("setting", ["split16", "split8", "8bit_split8_stochastic", "stochastic", "nearest"])
@pytest.mark.filterwarnings("ignore:anchor_decay")
def test_the_anchor_pulls(setting: str) -> None:
    """Gradient 0, weights 2 % from the anchor, lr · anchor_decay 1 %: e⁻² of the distance is left after 200 steps."""
    options = {"nearest": {}}.get(setting) if setting == "nearest" else SETTINGS[setting][1]
    start = normal((64, 64), BF16, seed=1)
    p = nn.Parameter((start.float() * 1.02).bfloat16())
    anchor = fastft.Anchor.snapshot([("p", start)])
    optimizer = fastft.AdamW(
        [("p", p)], lr=1e-4, weight_decay=0.0, anchor=anchor, anchor_decay=100.0, **(options or {})
    )
    p.grad = torch.zeros_like(p)
    before = p.detach().float() - start.float()
    for _ in range(200):
        optimizer.step()
    after = master_weights(nn.ParameterDict({"p": p}), optimizer)["p"] - start.float()
    left = float((after * before).sum() / before.square().sum())
    assert left == pytest.approx(1.0 if setting == "nearest" else 0.99**200, rel=0.05)


# -- stochastic rounding -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "extra_bits"), [(BF16, 0), (BF16, 8), (torch.float16, 0)])
def test_stochastic_rounding_is_right_on_average(dtype: torch.dtype, extra_bits: int) -> None:
    # One value everywhere, so that the mean is over elements and steps; decay moves it by a part of its last bit.
    p = nn.Parameter(torch.full((128, 128), 1.5, dtype=dtype))
    p.grad = torch.zeros_like(p)
    rate = 2.0**-22 if extra_bits else 2.0**-13 if dtype == torch.float16 else 2.0**-12
    optimizer = fastft.AdamW([p], lr=1.0, weight_decay=rate, rounding="stochastic", extra_bits=extra_bits)  # type: ignore[arg-type]
    for _ in range(16):
        optimizer.step()
    moved = 1.5 - master_weights(nn.ParameterDict({"p": p}), optimizer)["p"].double()
    expected = 1.5 * (1 - (1 - rate) ** 16)
    deviation = float(moved.std()) / 128
    assert deviation > 0 and abs(float(moved.mean()) - expected) < 4 * deviation


def test_stochastic_rounding_depends_on_seed_position_and_step_alone() -> None:
    def run(seed: int, shapes: Any = SHAPES, steps: int = 2) -> list[Tensor]:
        params = parameters(BF16, shapes)
        optimizer = fastft.AdamW(params, lr=1e-4, rounding="stochastic", rounding_seed=seed)
        for step in range(steps):
            give_grads(params, step)
            optimizer.step()
        return [p.detach() for p in params]

    first, again, other = run(1), run(1), run(2)
    assert all(map(torch.equal, first, again))
    assert not any(map(torch.equal, first, other))
    # Two parameters with the same values and gradients are rounded apart.
    pair = [nn.Parameter(torch.full((64, 64), 1.5, dtype=BF16)) for _ in range(2)]
    optimizer = fastft.AdamW(pair, lr=1.0, weight_decay=2.0**-10, rounding="stochastic")
    for p in pair:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert not torch.equal(*pair)


def test_positions_are_counted_through_all_groups() -> None:
    results = []
    for grouped in (False, True):
        params = parameters(BF16)
        groups: Any = [{"params": params[:1]}, {"params": params[1:]}] if grouped else params
        optimizer = fastft.AdamW(groups, lr=1e-4, rounding="stochastic", extra_bits=8)
        for step in range(2):
            give_grads(params, step)
            optimizer.step()
        results.append((params, optimizer))
    assert_same_run(*results)


def test_rounding_keys() -> None:
    assert len({rounding_key(seed, position) for seed in range(40) for position in range(40)}) == 1600
    assert all(0 <= rounding_key(seed, 3) < 2**64 for seed in (-1, 0, 2**64 - 1, 2**70))
    assert Precision(rounding="stochastic").key(torch.ones(2), 0) is None  # float32 is not rounded


# -- written by somebody else -----------------------------------------------------------------------------------


def through_a_model(p: nn.Parameter, values: Tensor) -> None:
    nn.ParameterDict({"p": p}).load_state_dict({"p": values})


def interpolated(p: nn.Parameter, values: Tensor) -> None:
    interpolate_(nn.ParameterDict({"p": p}), fastft.Anchor.snapshot([("p", values)]), 0.5)


@torch.no_grad()
def copied(p: nn.Parameter, values: Tensor) -> None:
    p.copy_(values)


WRITERS: dict[str, Callable[[nn.Parameter, Tensor], Any]] = {
    "copy_": copied,
    "data.copy_": lambda p, values: p.data.copy_(values),
    "data.mul_": lambda p, values: p.data.mul_(1.25),
    "a_row_of_data": lambda p, values: p.data[7].copy_(values[7]),
    "one_element": lambda p, values: p.data[3, 5].add_(1.0),
    "new_data": lambda p, values: setattr(p, "data", values.clone()),
    "load_state_dict": through_a_model,
    "interpolate_": interpolated,
    "swapped_rows": lambda p, values: p.data.copy_(p.data.flip(0).clone()),
}


@pytest.mark.parametrize("setting", HAVE_LOW_BITS)
@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("masked", [False, True])
def test_what_somebody_else_writes_is_noticed(setting: str, writer: str, masked: bool) -> None:
    dtype, options = SETTINGS[setting]
    (p,) = parameters(dtype, [(16, 256)])  # one unit of them
    model = nn.ParameterDict({"p": p})
    optimizer = fastft.AdamW([p], lr=1e-2, weight_decay=0.1, **options)
    if masked:
        optimizer.set_update_mask(p, torch.arange(16) % 5 > 0)
    for step in range(3):
        give_grads([p], step)
        optimizer.step()
    unwritten = master_weights(model, optimizer)["p"]
    assert (unwritten != p.float()).float().mean() > 0.5
    WRITERS[writer](p, normal((16, 256), BF16, seed=77))
    live = torch.arange(16) % 5 > 0 if masked else torch.ones(16, dtype=torch.bool)
    low = optimizer.state[p]["low_bits"].clone()
    found = master_weights(model, optimizer)["p"]
    assert torch.equal(found[live], p.detach().float()[live])
    assert same_bits(optimizer.state[p]["low_bits"], low)  # asking changes nothing
    # The next step is one whose low bits are 0.
    other = nn.Parameter(p.detach().clone())
    fresh = fastft.AdamW([other], lr=1e-2, weight_decay=0.1, **options)
    if masked:
        fresh.set_update_mask(other, torch.arange(16) % 5 > 0)
    fresh.state[other] = copy.deepcopy(optimizer.state[p])
    fresh.state[other]["low_bits"] = torch.where(live.view(-1, 1), torch.zeros_like(low), low)
    for run in ((p, optimizer), (other, fresh)):
        give_grads([run[0]], 3)
        run[1].step()
    assert_same_run(([p], optimizer), ([other], fresh))


def test_what_is_not_written_keeps_its_bits() -> None:
    """Chunks that nobody wrote, copies, and parameters that were frozen meanwhile."""
    p = nn.Parameter(normal((300, 400), BF16, seed=1))
    model = nn.ParameterDict({"p": p})
    optimizer = fastft.AdamW([p], lr=1e-3, extra_bits=16)
    for step in range(2):
        give_grads([p], step)
        optimizer.step()
    expected = join(p.detach(), optimizer.state[p]["low_bits"])
    assert same_bits(master_weights(model, optimizer)["p"], expected)
    p.data[0, 0] += 1.0
    found = master_weights(model, optimizer)["p"]
    same = found == expected
    assert same.flatten()[4096:].all() and not same[0].all()
    optimizer.freeze(p)
    optimizer.step()
    optimizer.unfreeze(p)
    assert same_bits(master_weights(model, optimizer)["p"], found)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_knows_what_was_written(how: str) -> None:
    (p,) = parameters(BF16, [(16, 256)])
    optimizer = fastft.AdamW([p], lr=1e-3, extra_bits=16)
    give_grads([p], 0)
    optimizer.step()
    other = copy.deepcopy(optimizer) if how == "deepcopy" else pickle.loads(pickle.dumps(optimizer))
    (q,) = other.param_groups[0]["params"]
    assert repr(other) == repr(optimizer)
    for run in ((p, optimizer), (q, other)):
        give_grads([run[0]], 1)
        run[1].step()
    assert_same_run(([p], optimizer), ([q], other))
    q.data[3].fill_(0.25)
    assert torch.equal(master_weights(nn.ParameterDict({"q": q}), other)["q"], q.float())
    assert not torch.equal(master_weights(nn.ParameterDict({"p": p}), optimizer)["p"], p.float())


def test_weights_that_are_not_finite_and_ends_of_the_range() -> None:
    values = torch.tensor([float("nan"), 3.3e38, -3.3e38, -1e-40, 0.0, -0.0, 1.0]).bfloat16()
    p = nn.Parameter(values.clone())
    optimizer = fastft.AdamW([p], lr=1e-3, weight_decay=0.0, extra_bits=16)
    p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.step()
    found = master_weights(nn.ParameterDict({"p": p}), optimizer)["p"]
    torch.testing.assert_close(found, values.float(), rtol=0.0, atol=0.0, equal_nan=True)


# -- others that read moments or write weights ----------------------------------------------------------------------


@pytest.mark.parametrize("setting", ["split16", "8bit_split8_stochastic", "8bit"])
def test_momentum_filtered_steps(setting: str) -> None:
    """MoFO takes weights back with their low bits, and those that moved keep theirs."""
    dtype, options = SETTINGS[setting]
    (p,), (q,) = parameters(dtype, [(40, 128)]), parameters(dtype, [(40, 128)])
    filtered, plain = (fastft.AdamW([x], lr=1e-3, weight_decay=0.1, **options) for x in (p, q))
    MoFO(filtered, fraction=0.25)
    for step in range(3):
        before = p.detach().clone(), copy.deepcopy(filtered.state.get(p, {}))
        q.data.copy_(p.data)
        plain.state[q] = copy.deepcopy(filtered.state[p]) if step else {}
        plain._weight_sums.clear()
        plain._forget_plan()
        for x, optimizer in ((p, filtered), (q, plain)):
            give_grads([x], step)
            optimizer.step()
        moments = plain.state[q]
        low = moments.get("low_bits")
        was = before[1].get("low_bits", None if low is None else torch.zeros_like(low))
        mine = torch.stack([p.detach() != before[0]])
        if low is not None and was is not None:
            mine = torch.cat([mine, (filtered.state[p]["low_bits"] != was).unsqueeze(0)])
        moved = mine.any(0)
        assert 0.15 < moved.float().mean() <= 0.25
        assert torch.equal(p[moved], q[moved])
        if low is not None:
            assert torch.equal(filtered.state[p]["low_bits"][moved], low[moved])


def test_state_that_is_dropped_leaves_the_low_bits() -> None:
    """A layer that closes with its moments dropped, as in LISA, keeps its weights, and these have low bits."""
    run = Beside("8bit_split16", anchored=False)
    for step in range(2):
        run.step(step)
    model = nn.ParameterDict(dict(named(run.params)))
    expected = master_weights(model, run.optimizer)
    moments.drop(run.optimizer, run.params)
    moments.drop(run.beside, run.exact)
    assert [set(run.optimizer.state[p]) for p in run.params] == [{"low_bits"}] * 4
    found = master_weights(model, run.optimizer)
    assert all(same_bits(found[name], value) for name, value in expected.items())
    saved = full_precision_state(run.optimizer)["state"]
    assert not any(saved.values())
    run.step(2)
    assert {int(run.optimizer.state[p]["step"]) for p in run.params} == {1}


def test_low_bits_alone_are_no_state() -> None:
    """A closed layer whose moments were dropped gets none as long as it has no gradient."""
    params = parameters(BF16)
    optimizer = fastft.AdamW(named(params), lr=1e-3, extra_bits=16, state_dtype="8bit")
    give_grads(params, 0)
    optimizer.step()
    moments.drop(optimizer, params[:1])
    give_grads(params, 1)
    params[0].grad = None
    before = photograph(params[:1], optimizer)
    optimizer.step()
    assert_unchanged(before, photograph(params[:1], optimizer))
    assert set(optimizer.state[params[0]]) == {"low_bits"} and "step" in optimizer.state[params[1]]


@pytest.mark.parametrize("state_dtype", ["8bit", torch.float32], ids=str)
def test_a_model_that_becomes_float32_has_no_low_bits_any_more(state_dtype: Any) -> None:
    model = nn.ParameterList(parameters(BF16))
    optimizer = fastft.AdamW(named(list(model)), lr=1e-3, extra_bits=16, state_dtype=state_dtype)
    for step in range(2):
        give_grads(list(model), step)
        optimizer.step()
    model.float()
    give_grads(list(model), 2)
    optimizer.step()
    assert not any("low_bits" in state for state in optimizer.state.values())
    # And back: nothing that was known of the weights when they last were bfloat16 counts.
    model.bfloat16()
    found = master_weights(model, optimizer)
    assert all(same_bits(found[name], p.float()) for name, p in model.named_parameters())
    p = model[0]
    sums = optimizer._weight_sums.known(p)
    assert sums is not None  # in this layout it is known
    p.data = p.data.half()
    assert optimizer._weight_sums.known(p) is None


# -- the warning -------------------------------------------------------------------------------------------------


def warned(
    dtype: torch.dtype = BF16, steps: int = 2, change: Callable[[Any], Any] = lambda o: None, **options: Any
) -> list[str]:
    params = parameters(dtype)
    optimizer = fastft.AdamW(named(params), **{"lr": 1e-2, "weight_decay": 0.0, **options})
    change(optimizer)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for step in range(steps):
            give_grads(params, step)
            optimizer.step()
            optimizer._forget_plan()
    return [str(warning.message) for warning in seen]


def test_a_pull_that_does_nothing_is_said_once() -> None:
    (said,) = warned(weight_decay=0.1)
    assert said.startswith(
        "weight_decay: lr * weight_decay = 0.001 moves 0% of the weights by itself: bfloat16 weights are rounded"
    )
    assert said.endswith('pass extra_bits=16 or rounding="stochastic"')
    (said,) = warned(anchor="init", anchor_decay=3.0, weight_decay=0.1)
    assert said.startswith(
        "anchor_decay, weight_decay: lr * anchor_decay = 0.03 moves 0% of the weights by itself, lr "
    )
    (said,) = warned(torch.float16, anchor="init", anchor_decay=1.0)
    assert said.startswith("anchor_decay: ") and said.endswith('pass rounding="stochastic"')
    (said,) = warned(extra_bits=8, weight_decay=1e-4)
    assert "moves 0% of the weights by itself: bfloat16 weights with 8 extra bits are rounded" in said
    (said,) = warned(lr=1e-6)
    assert said.startswith("lr: lr = 1e-06 moves ") and " of the weights by itself: bfloat16 weights are" in said
    (said,) = warned(lr=1e-6, weight_decay=0.1)
    assert said.startswith("weight_decay, lr: lr * weight_decay = 1e-07 moves 0% of the weights by itself, lr = 1e-06 ")


@pytest.mark.parametrize(
    ("dtype", "options", "said"),
    [
        (torch.float32, {"extra_bits": 16}, ["extra_bits=16 is for bfloat16 parameters"]),
        (torch.float32, {"rounding": "stochastic"}, ['rounding="stochastic" is for bfloat16 and float16 parameters']),
        (BF16, {"state_dtype": "8bit"}, ["state_dtype='8bit' is for contiguous tensors from 4096 elements on, with "]),
        (torch.float64, {"state_dtype": BF16}, ["state_dtype=torch.bfloat16 is for parameters in float32, bfloat16 "]),
        (
            torch.float32,
            {"state_dtype": "8bit", "extra_bits": 8, "rounding": "stochastic"},
            ["state_dtype='8bit' is for ", "extra_bits=8 is for ", 'rounding="stochastic" is for '],
        ),
        (torch.float32, {"state_dtype": torch.float32}, []),
        (torch.float16, {"rounding": "stochastic"}, []),
        (BF16, {"extra_bits": 16}, []),
    ],
)
@pytest.mark.parametrize("in_backward", [False, True])
def test_an_option_that_changes_nothing_is_said_once(
    dtype: torch.dtype, options: dict[str, Any], said: list[str], in_backward: bool
) -> None:
    p, other = (nn.Parameter(normal((10, 20), seed=seed).to(dtype)) for seed in range(2))
    optimizer = fastft.AdamW([p, other], lr=0.01, weight_decay=0.0, **options)
    handle = fastft.optim.step_in_backward(optimizer) if in_backward else None
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(2):
            (p.sum() + other.sum()).backward()
            optimizer.step()
            optimizer.zero_grad()
            optimizer._forget_plan()
    assert len(seen) == len(said)
    for warning, start in zip(seen, said, strict=True):
        assert str(warning.message).startswith(start)
        assert str(warning.message).endswith("; the optimizer has none, so this changes nothing")
    if handle is not None:
        handle.undo()


def test_an_option_that_one_parameter_can_use_is_no_mistake() -> None:
    params = [nn.Parameter(torch.zeros(64, 64)), nn.Parameter(torch.zeros(8, dtype=BF16))]
    optimizer = fastft.AdamW(params, lr=0.01, state_dtype="8bit", extra_bits=16)
    params[1].grad = torch.ones_like(params[1])  # the other one may have a gradient later
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()


def test_it_is_said_for_the_learning_rate_that_a_warm_up_goes_to() -> None:
    def warm_up(optimizer: fastft.AdamW) -> None:
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)

    assert len(warned(weight_decay=0.1, change=warm_up)) == 1
    assert warned(weight_decay=0.1, lr=0.0) == []


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dtype": torch.float32, "weight_decay": 0.1},
        {"weight_decay": 0.5, "extra_bits": 8},
        {"weight_decay": 0.01, "extra_bits": 8, "rounding": "stochastic"},
        {"weight_decay": 0.1, "extra_bits": 16},
        {"weight_decay": 0.1, "rounding": "stochastic"},
        {"weight_decay": 0.5, "lr": 0.02},
        {"anchor": "init", "anchor_decay": 10.0, "anchor_mode": "l2"},
        {"anchor": "init", "anchor_decay": 0.5, "anchor_mode": "selective"},
        {"lr": torch.tensor(0.02), "weight_decay": 0.5},
    ],
    ids=str,
)
def test_nothing_is_said_of_what_moves(options: dict[str, Any]) -> None:
    assert warned(**options) == []


# -- master_weights ----------------------------------------------------------------------------------------------


def test_master_weights_of_each_kind() -> None:
    model = nn.Sequential(nn.Linear(64, 64, dtype=BF16), nn.Linear(64, 2), nn.Linear(2, 2, dtype=torch.float16))
    model[1].bias.requires_grad_(False)
    optimizer = fastft.AdamW([p for p in model.parameters() if p.dtype != torch.float16], lr=1e-3, extra_bits=8)
    for p in model.parameters():
        p.grad = torch.ones_like(p) if p.requires_grad else None
    optimizer.step()
    found = master_weights(model, optimizer)
    assert list(found) == [name for name, _ in model.named_parameters()]
    assert all(value.dtype == torch.float32 and not value.requires_grad for value in found.values())
    assert not torch.equal(found["0.weight"], model[0].weight.float())
    assert same_bits(found["0.weight"].bfloat16(), model[0].weight)  # no tie among these
    assert torch.equal(found["2.weight"], model[2].weight.float()) and torch.equal(found["1.bias"], model[1].bias)
    with pytest.raises(TypeError, match=r"^optimizer: expected a fastft.AdamW, got AdamW$"):
        master_weights(model, torch.optim.AdamW(model.parameters()))  # type: ignore[arg-type]


# -- weights written between a step and a change of the mask ---------------------------------------------------


def stepped_alone(
    shape: tuple[int, ...], setting: str, mask: Tensor | None = None
) -> tuple[nn.Parameter, fastft.AdamW]:
    dtype, options = SETTINGS[setting]
    (p,) = parameters(dtype, [shape])
    optimizer = fastft.AdamW([p], lr=1e-2, weight_decay=0.1, **options)
    optimizer.set_update_mask(p, mask)
    for step in range(2):
        give_grads([p], step)
        optimizer.step()
    return p, optimizer


def masters(p: nn.Parameter, optimizer: fastft.AdamW) -> Tensor:
    return master_weights(nn.ParameterDict({"p": p}), optimizer)["p"]


MASKS: dict[str, Callable[[], Tensor | None]] = {
    "none": lambda: None,
    "elements": lambda: torch.rand(80, 257, generator=torch.Generator().manual_seed(3)) < 0.5,
    "rows": lambda: torch.arange(80) % 3 > 0,
}


@pytest.mark.parametrize("setting", ["split16", "8bit_split16", "8bit_split8_stochastic"])
@pytest.mark.parametrize("before", MASKS)
@pytest.mark.parametrize("after", MASKS)
def test_foreign_writes_before_a_change_of_the_mask_are_noticed(setting: str, before: str, after: str) -> None:
    """Also in rows that were left out; what nobody wrote keeps its bits, and the next step trusts what is left."""
    p, optimizer = stepped_alone((80, 257), setting, MASKS[before]())
    if before == "rows":  # so that rows that are left out have low bits too
        p, optimizer = stepped_alone((80, 257), setting)
        optimizer.set_update_mask(p, MASKS[before]())
        give_grads([p], 2)
        optimizer.step()
    was = masters(p, optimizer)
    assert ((was != p.float()).float().mean(1) > 0.3).all()
    p.data[:3].zero_()
    found = masters(p, optimizer)
    assert torch.equal(found[:3], torch.zeros(3, 257))
    assert torch.equal(found[-3:], was[-3:])
    low = optimizer.state[p]["low_bits"]
    optimizer.set_update_mask(p, MASKS[after]())
    assert optimizer.state[p]["low_bits"] is low
    assert torch.equal(join(p.detach(), low), found)
    assert torch.equal(masters(p, optimizer), found)
    p.data[1].fill_(0.5)  # and one more, before the step
    assert torch.equal(masters(p, optimizer)[1], p.detach()[1].float())
    p.grad = torch.zeros_like(p)
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()
    again = masters(p, optimizer)
    assert torch.equal(again[1], p.detach()[1].float())
    assert torch.equal(again[-3:], found[-3:])
    assert again.isfinite().all()


def test_a_mask_set_before_the_first_step_after_loading_trusts_the_bits() -> None:
    """A model may be loaded after its optimizer, and this one's low bits belong to it."""
    p, optimizer = stepped_alone((80, 257), "split16")
    was, weights = masters(p, optimizer), p.detach().clone()
    q = nn.Parameter(torch.zeros_like(p))
    other = fastft.AdamW([q], lr=1e-2, extra_bits=16)
    other.load_state_dict(optimizer.state_dict())
    other.set_update_mask(q, MASKS["rows"]())
    q.data.copy_(weights)
    assert torch.equal(masters(q, other), was)


@pytest.mark.parametrize("setting", ["split16", "8bit_split8_stochastic"])
@pytest.mark.parametrize("mask", MASKS)
def test_momentum_filtered_steps_notice_foreign_writes(setting: str, mask: str) -> None:
    p, optimizer = stepped_alone((80, 257), setting, MASKS[mask]())
    MoFO(optimizer, fraction=0.3)
    for step in range(2, 4):
        give_grads([p], step)
        optimizer.step()
    was = masters(p, optimizer)
    assert torch.equal(join(p.detach(), optimizer.state[p]["low_bits"]), was)  # its own writing is none
    p.data[:2].zero_()
    assert torch.equal(masters(p, optimizer)[:2], torch.zeros(2, 257))
    give_grads([p], 4)
    optimizer.step()
    found = masters(p, optimizer)
    still = p.detach()[:2] == 0
    assert still.float().mean() > 0.3
    assert (found[:2][still].abs() < 1e-30).all()
    assert found.isfinite().all()
