"""The loops that step weights with low bits, stochastic rounding and 8-bit moments: bit for bit, through the core."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from low_precision_cases import MOMENTS, WEIGHTS, Case, grads, joined, kept, made, random_bits, step_together
from optim_cases import threads

from fastft import _C
from fastft.optim.weight_sums import clear_units, unit_sums

SPLIT = [name for name in WEIGHTS if "split" in name]
STOCHASTIC = [name for name in WEIGHTS if name.startswith("stochastic")]
KINDS = pytest.mark.parametrize("weights", WEIGHTS)
STATES = pytest.mark.parametrize("moments", MOMENTS)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """On shared cores threads wait for one another more than they work."""
    with threads(1):
        yield


def follow_the_oracle(case: Case, dtype: torch.dtype | None = None, steps: int = 2) -> None:
    for grad in grads(case, steps, dtype):
        before, expected = case.copy(), case.expected(grad)
        case.step(grad)
        assert case.differing(expected) == []
        assert case.differing(before)


# -- what is kept of a step ------------------------------------------------------------------------------------


@KINDS
@STATES
@pytest.mark.parametrize("anchoring", ["none", "decoupled", "l2"])
@pytest.mark.parametrize("shape", [(40, 300), (33_001,)], ids=["rows", "one-row"])
def test_a_step_keeps_what_the_formulas_say(weights: str, moments: str, anchoring: str, shape: tuple[int, ...]) -> None:
    follow_the_oracle(made(weights, moments, shape, anchoring=anchoring, max_grad_norm=1.5))


@KINDS
@STATES
@pytest.mark.parametrize("anchor_dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
def test_anchors_of_other_dtypes(weights: str, moments: str, anchor_dtype: torch.dtype) -> None:
    follow_the_oracle(made(weights, moments, (3, 300), anchoring="decoupled", anchor_dtype=anchor_dtype))


@KINDS
@STATES
@pytest.mark.parametrize("anchoring", ["decoupled_weighted", "l2_weighted"])
def test_weighted_anchors_and_wide_gradients(weights: str, moments: str, anchoring: str) -> None:
    follow_the_oracle(made(weights, moments, (20, 300), anchoring=anchoring, mask="elements"), torch.float32)


@KINDS
@pytest.mark.parametrize("moments", [m for m in MOMENTS if m != "8bit"])
def test_amsgrad(weights: str, moments: str) -> None:
    follow_the_oracle(made(weights, moments, (20, 300), anchoring="l2", amsgrad=True, mask="rows"))


@KINDS
@STATES
@pytest.mark.parametrize("mask", ["elements", "rows"])
def test_what_is_masked_out_keeps_its_bits(weights: str, moments: str, mask: str) -> None:
    case = made(weights, moments, anchoring="decoupled", mask=mask, max_grad_norm=1.5)
    before, dead = case.copy(), ~case.live
    follow_the_oracle(case)
    for name in ("exp_avg", "exp_avg_sq", "low_bits"):
        if name in case.state:
            assert torch.equal(as_bytes(case.state[name])[dead], as_bytes(before.state[name])[dead])
    assert torch.equal(as_bytes(case.p)[dead], as_bytes(before.p)[dead])
    if moments == "8bit":
        untouched = ~torch.stack([dead_block.any() for dead_block in blocks(case.live)]).view(40, 2)
        assert untouched.any()
        for name in ("exp_avg_scales", "exp_avg_sq_scales"):
            same = case.state[name] == before.state[name]
            assert torch.equal(same, untouched)


def as_bytes(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().unsqueeze(-1).view(torch.uint8)


def blocks(x: torch.Tensor) -> list[torch.Tensor]:
    return [block for row in x for block in row.split(256)]


@STATES
def test_split16_is_the_float32_step(moments: str) -> None:
    """Weight and 16 low bits are a float32 throughout, over gradients in bfloat16, decayed, anchored and clipped."""
    split = made("split16", moments, anchoring="decoupled", anchor_dtype=torch.float32, max_grad_norm=1.5)
    exact = replace(split.copy(), weights="float32", p=split.master.clone())
    del exact.state["low_bits"], exact.state["weight_sums"]
    for grad in grads(split, 5, torch.bfloat16):
        step_together([split], [grad])
        step_together([exact], [grad])
        assert torch.equal(split.master, exact.p)
        assert all(torch.equal(split.state[name], exact.state[name]) for name in exact.state)
    assert not torch.equal(split.p.float(), exact.p)


@pytest.mark.parametrize("weights", SPLIT)
def test_nan_has_no_low_bits(weights: str) -> None:
    case = made(weights, "float32", (64,))
    (grad,) = grads(case, 1)
    grad[3], grad[60] = float("nan"), float("inf")
    case.step(grad)
    assert case.p.isnan().nonzero().flatten().tolist() == [3, 60]
    assert case.master.isnan().nonzero().flatten().tolist() == [3, 60]
    assert case.state["low_bits"].int()[[3, 60]].tolist() == [0, 0]


# -- one result, however it is computed --------------------------------------------------------------------------


@KINDS
@STATES
@pytest.mark.parametrize("anchoring", ["none", "decoupled"])
def test_a_mask_of_all_elements_changes_no_bit(weights: str, moments: str, anchoring: str) -> None:
    """Masked, the loops over blocks run; unmasked, those without detours."""
    shape = (5, 3 * 256 + 77)
    plain, masked = (made(weights, moments, shape, anchoring=anchoring, mask=mask) for mask in ("none", "all"))
    for grad in grads(plain, 3):
        plain.step(grad)
        masked.step(grad)
        assert plain.differing(masked) == []
    assert (
        plain.state.get("weight_sums", torch.zeros(1)).tolist()
        == masked.state.get("weight_sums", torch.zeros(1)).tolist()
    )


@KINDS
@STATES
@pytest.mark.slow
def test_threads_change_no_bit(weights: str, moments: str) -> None:
    """Rows of 300 elements: nearly every chunk would end amid a block."""
    shape = (500, 300)
    one, many = (made(weights, moments, shape, anchoring="decoupled") for _ in range(2))
    for grad in grads(one, 2):
        one.step(grad)
        with threads(3):
            many.step(grad)
        assert one.differing(many) == []
        if "weight_sums" in one.state:
            assert torch.equal(one.state["weight_sums"], many.state["weight_sums"])


@pytest.mark.parametrize("weights", STOCHASTIC)
@STATES
def test_shards_round_as_the_whole(weights: str, moments: str) -> None:
    """Whole rows, some columns of all rows (not with blocks), and a piece that begins at an odd element."""
    if moments == "8bit":
        whole = made(weights, moments, (40, 300))
        cuts = [((0, 40), (0, 300)), ((0, 7), (0, 300)), ((13, 40), (0, 300))]
    else:
        whole = made(weights, moments, (40, 300))
        cuts = [((0, 7), (0, 300)), ((0, 40), (3, 130)), ((0, 40), (130, 300)), ((5, 6), (11, 300))]
    (grad,) = grads(whole, 1)
    shards = []
    for (top, bottom), (left, right) in cuts:
        part = (slice(top, bottom), slice(left, right))
        state = {
            name: t[top:bottom].clone() if "scales" in name else t if name == "weight_sums" else t[part].clone()
            for name, t in whole.state.items()
        }
        columns = right - left
        shard = replace(whole, p=whole.p[part].clone(), state=state, index=(columns, 300, top * 300 + left))
        shards.append((part, shard))
    for part, shard in shards:
        if "weight_sums" in shard.state:
            shard.state["weight_sums"] = torch.zeros_like(shard.state["weight_sums"])
        shard.step(grad[part].clone())
    whole.step(grad)
    for part, shard in shards:
        assert torch.equal(as_bytes(shard.p), as_bytes(whole.p[part]))
        if "low_bits" in shard.state:
            assert torch.equal(shard.state["low_bits"], whole.state["low_bits"][part])


@pytest.mark.parametrize("weights", STOCHASTIC)
def test_rounding_depends_on_key_and_step(weights: str) -> None:
    first = made(weights, "float32")
    (grad,) = grads(first, 1)
    same, other_key, later = first.copy(), first.copy(key=1), first.copy(taken=first.taken + 1)
    for case in (first, same, other_key, later):
        case.step(grad)
    assert same.differing(first) == []
    for case in (other_key, later):
        assert any(name in difference for difference in case.differing(first) for name in ("p:", "low_bits:"))


@pytest.mark.slow
@pytest.mark.skipif(_C.cpu_instruction_set() != "v4", reason="this CPU has no AVX-512")
def test_wider_loops_give_the_same_bits() -> None:
    digests = {}
    for name in ("v3", "v4"):
        path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
        environment = {**os.environ, "FASTFT_CPU_CAPABILITY": name, "PYTHONPATH": path}
        code = f"import {Path(__file__).stem} as tests; tests.print_digest()"
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        used, digests[name] = done.stdout.split()
        assert used == name
    assert digests["v3"] == digests["v4"]


def print_digest() -> None:
    """The instruction set, and a hash of what all kinds of parameters become in two steps."""
    digest = hashlib.sha256()
    for weights in WEIGHTS:
        for moments in MOMENTS:
            for mask in ("none", "elements"):
                case = made(weights, moments, (9, 300), anchoring="decoupled", mask=mask)
                for grad in grads(case, 2):
                    case.step(grad)
                for tensor in (case.p, *case.state.values()):
                    digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    print(_C.cpu_instruction_set(), digest.hexdigest())


# -- weights written by somebody else ----------------------------------------------------------------------------


FOREIGN_SHAPES = [(40, 300), (64, 257), (24, 2000)]  # several units each, which end amid rows or do not


@pytest.mark.parametrize("weights", SPLIT)
@STATES
@pytest.mark.parametrize("mask", ["none", "elements", "rows"])
@pytest.mark.parametrize("shape", FOREIGN_SHAPES, ids=str)
@pytest.mark.parametrize("written", ["one", "masked out", "row"])
def test_low_bits_of_foreign_weights_count_as_zero(
    weights: str, moments: str, mask: str, shape: tuple[int, int], written: str
) -> None:
    """Those of all elements of the unit, masked out or not; other units keep theirs."""
    if written == "masked out" and mask == "none":
        pytest.skip("no element is masked out")
    case = made(weights, moments, shape, mask=mask)
    first, second, third = grads(case, 3)
    case.step(first)
    places = (~case.live if written == "masked out" else case.live).nonzero()
    place = tuple(places[len(places) // 2].tolist())
    where = place[0] if written == "row" else place
    case.p[where] += 1.0
    units = set(case.units[where].flatten().tolist())
    assert len(units) < int(case.units.max()) + 1
    expected = case.without_bits(sorted(units - {-1})) if units != {-1} else case.copy()
    expected.state["weight_sums"].zero_()
    expected = expected.expected(second)
    case.step(second)
    assert case.differing(expected) == []
    follows = case.expected(third)  # and from then on they count again
    case.step(third)
    assert case.differing(follows) == []


@pytest.mark.parametrize("weights", SPLIT)
def test_two_weights_that_change_places_are_seen(weights: str) -> None:
    case = made(weights, "float32", (3000,))
    first, second = grads(case, 2)
    case.step(first)
    a, b = case.p[10].clone(), case.p[2001].clone()
    assert a != b
    case.p[10], case.p[2001] = b, a
    expected = case.without_bits([0]).expected(second)
    case.step(second)
    assert case.differing(expected) == []


@pytest.mark.parametrize("weights", SPLIT)
@STATES
@pytest.mark.parametrize("mask", ["none", "all"])  # the loops without detours, and those over blocks
def test_low_bits_of_another_weight_make_no_nan(weights: str, moments: str, mask: str) -> None:
    """Those below a weight of 0, where it is not known who wrote it."""
    case = made(weights, moments, (4, 300), mask=mask)
    low = case.state["low_bits"]
    low[0] = 2 ** (8 * low.itemsize) - 3
    case.p[0, ::2], case.p[0, 1::2] = 0.0, -0.0
    clean = case.copy()
    clean.state["low_bits"][0] = 0
    (grad,) = grads(case, 1)
    case.step(grad)
    clean.step(grad)
    assert case.differing(clean) == []
    assert case.p.isfinite().all()


@pytest.mark.parametrize("weights", SPLIT)
@STATES
@pytest.mark.parametrize("mask", ["none", "elements", "rows"])
@pytest.mark.parametrize("shape", [*FOREIGN_SHAPES, (9000,)], ids=str)
def test_sums_of_units_in_python(weights: str, moments: str, mask: str, shape: tuple[int, ...]) -> None:
    """Those that the step writes; a foreign write of one element is found in its unit alone."""
    if len(shape) == 1 and moments == "8bit" and mask == "rows":
        pytest.skip("one row")
    case = made(weights, moments, shape, mask=mask)
    case.step(grads(case, 1)[0])
    sums, coded = case.state["weight_sums"], moments == "8bit"
    found = unit_sums(case.p, coded, case.rows)
    assert torch.equal(found, sums[: len(found)])
    assert not sums[len(found) :].any()
    assert len(found) == int(case.units.max()) + 1
    place = tuple(case.live.nonzero()[-1].tolist())
    case.p[place] *= -1.0
    changed = unit_sums(case.p, coded, case.rows) != found
    assert changed.nonzero().flatten().tolist() == [int(case.units[place])]
    cleared = case.state["low_bits"].clone()
    clear_units(cleared, changed, coded, case.rows)
    assert torch.equal(cleared, case.without_bits([int(case.units[place])]).state["low_bits"])


# -- selective projection ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["bfloat16", "split8", "split16", *STOCHASTIC])
@pytest.mark.parametrize("moments", ["float32", "bfloat16"])
@pytest.mark.parametrize("mask", ["none", "elements", "rows"])
def test_selective_projection(weights: str, moments: str, mask: str) -> None:
    """After a step whose gradient led uphill, what was stepped is moved and kept once more, with bits of its own."""
    case = made(weights, moments, (40, 300), anchoring="selective", mask=mask)
    assert case.anchor is not None
    case.group["anchor_decay"] = 0.7
    case.state["exp_avg"].copy_((case.anchor.float() - case.p.float()) * 0.5)  # momentum leads away, grad back
    grad = ((case.p.float() - case.anchor.float()) * 0.01).to(case.p.dtype)
    stepped = case.copy(anchoring="none", anchor=None)
    stepped.step(grad)
    before, after, a = case.master.double(), stepped.master.double(), case.anchor.double()
    live = case.live
    far, near = ((x - a)[live].square().sum().sqrt() for x in (after, before))
    ratio = float((far - near) / far)
    assert ratio > 0.0
    pull = torch.tensor(min(1.0, 0.7 * ratio), dtype=torch.float32)
    delta = (stepped.master - case.anchor.float()).double()
    step = -pull.double() * delta
    if _C.cpu_instruction_set() == "baseline":  # which has no fused multiply-add
        step = step.float().double()
    moved = (step + after).float()
    case.step(grad)
    places = torch.arange(case.p.numel()).view(case.p.shape)
    random = random_bits(case.key, case.taken, places, second_pass=True) if case.stochastic else None
    weight, low = kept(moved, case.p, case.state.get("low_bits"), random)
    close = (case.p.float() - torch.where(live, weight, stepped.p).float()).abs() > 0
    assert close.float().mean() < 1e-3  # the sums' last bits may move the pull by one
    if low is not None:
        difference = (case.master - torch.where(live, joined(weight, low), stepped.master)).abs().max()
        assert difference < 1e-4 * 2.0**-7
        again = case.copy()
        (following,) = grads(case, 1)
        again.state["weight_sums"].zero_()
        case.step(following)
        again.step(following)
        assert case.differing(again) == []  # the projection's own writing is not foreign
