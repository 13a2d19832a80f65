"""The loops that step weights with low bits, stochastic rounding and 8-bit moments: bit for bit, through the core."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from low_precision_cases import MOMENTS, WEIGHTS, Case, grads, joined, made, random_bits, step_together
from optim_cases import threads

SPLIT = [name for name in WEIGHTS if "split" in name]
STOCHASTIC = [name for name in WEIGHTS if name.startswith("stochastic")]
KINDS = pytest.mark.parametrize("weights", WEIGHTS)
STATES = pytest.mark.parametrize("moments", MOMENTS)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """On shared cores threads wait for one another more than they work."""
    with threads(1):
        yield


def follows_the_oracle(case: Case, dtype: torch.dtype | None = None, steps: int = 3) -> None:
    for grad in grads(case, steps, dtype):
        expected = case.expected(grad)
        before = case.copy()
        case.step(grad)
        assert case.differing(expected) == []
        assert case.differing(before)


@KINDS
@STATES
@pytest.mark.parametrize("anchoring", ["none", "decoupled", "l2"])
def test_a_step_keeps_what_the_formulas_say(weights: str, moments: str, anchoring: str) -> None:
    follows_the_oracle(made(weights, moments, anchoring=anchoring, max_grad_norm=1.5))


@KINDS
@STATES
@pytest.mark.parametrize("mask", ["elements", "rows"])
def test_what_is_masked_out_keeps_its_bits_codes_and_scales(weights: str, moments: str, mask: str) -> None:
    case = made(weights, moments, anchoring="decoupled", mask=mask, max_grad_norm=1.5)
    before, dead = case.copy(), ~case.live
    follows_the_oracle(case)
    for name in ("exp_avg", "exp_avg_sq", "low_bits"):
        if name in case.state:
            assert torch.equal(case.state[name].view(torch.uint8)[dead.repeat_interleave(case.state[name].itemsize, 1)],
                               before.state[name].view(torch.uint8)[dead.repeat_interleave(case.state[name].itemsize, 1)])
    if moments == "8bit":
        assert case.state["exp_avg_scales"].view(-1)[0] == before.state["exp_avg_scales"].view(-1)[0] or mask == "rows"
