"""Options that hold for all groups, clipping and skipping: set, shown, and refused where they would be ignored."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import fastft


def parameter() -> nn.Parameter:
    p = nn.Parameter(torch.linspace(-1.0, 1.0, 12).view(3, 4))
    p.grad = torch.full_like(p, 2.0)
    return p


@pytest.mark.parametrize("value", [0.0, 0, -1.0, float("nan"), "1"])
def test_a_norm_that_lets_nothing_through_is_refused(value: Any) -> None:
    said = r"max_grad_norm: expected None \(no clipping\) or a number > 0, got "
    with pytest.raises(ValueError, match=said):
        fastft.AdamW([parameter()], max_grad_norm=value)
    optimizer = fastft.AdamW([parameter()], max_grad_norm=0.5)
    with pytest.raises(ValueError, match=said):
        optimizer.max_grad_norm = value
    assert optimizer.max_grad_norm == 0.5


def test_clipping_may_be_changed_between_steps() -> None:
    ours, theirs = parameter(), parameter()
    optimizer = fastft.AdamW([ours], lr=0.1, weight_decay=0.1, eps=1.0)
    reference = fastft.AdamW([theirs], lr=0.1, weight_decay=0.1, eps=1.0, max_grad_norm=0.25)
    optimizer.max_grad_norm = 0.25
    for step in range(2):
        optimizer.step()
        reference.step()
        assert torch.equal(ours, theirs), step
    optimizer.max_grad_norm = None
    optimizer.step()
    reference.step()
    assert not torch.equal(ours, theirs) and optimizer.grad_norm is None


def test_skipping_may_be_changed_between_steps() -> None:
    p = parameter()
    optimizer = fastft.AdamW([p], lr=0.1)
    optimizer.step()
    before = p.detach().clone()
    optimizer.skip_nonfinite = True
    p.grad = torch.full_like(p, float("nan"))
    optimizer.step()
    assert torch.equal(p, before) and int(optimizer.skipped_steps) == 1


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("max_grad_norm", 1.0),
        ("skip_nonfinite", True),
        ("state_dtype", torch.float32),
        ("extra_bits", 8),
        ("rounding", "stochastic"),
        ("rounding_seed", 3),
        ("anchor", "init"),
    ],
)
def test_in_a_group_they_are_refused(key: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"param_groups\[0\]: {key} is for all groups; pass it to AdamW"):
        fastft.AdamW([{"params": [parameter()], key: value}])
    optimizer = fastft.AdamW([parameter()])
    with pytest.raises(ValueError, match=rf"param_groups\[1\]: {key} is for all groups"):
        optimizer.add_param_group({"params": [parameter()], key: value})
    assert len(optimizer.param_groups) == 1


def test_they_are_shown() -> None:
    optimizer = fastft.AdamW([parameter()], anchor="init", anchor_decay=3.0, max_grad_norm=0.5, skip_nonfinite=True)
    shown = repr(optimizer)
    assert shown.startswith("AdamW (\nParameter Group 0\n") and "    anchor_decay: 3.0\n" in shown
    assert shown.endswith(
        "All groups\n    anchor: 1 parameters, max_grad_norm: 0.5, skip_nonfinite: True\n"
        "    state_dtype: None, extra_bits: 0, rounding: nearest\n)"
    )
    optimizer = fastft.AdamW([parameter()], state_dtype="8bit", extra_bits=8, rounding="stochastic", rounding_seed=7)
    assert repr(optimizer).endswith("    state_dtype: 8bit, extra_bits: 8, rounding: stochastic, rounding_seed: 7\n)")
    assert "anchor: None, max_grad_norm: None" in repr(fastft.AdamW([parameter()]))


def test_what_is_no_anchor_is_not_printed_whole() -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(ValueError) as error:
        fastft.AdamW(model.parameters(), anchor=model.state_dict())  # type: ignore[arg-type]
    assert str(error.value) == (
        'anchor: expected None, "init" or a fastft.Anchor, got OrderedDict; fastft.Anchor.snapshot(model) makes one'
    )
