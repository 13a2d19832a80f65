"""Warnings name the line of the program that uses fastft, not one of fastft's or torch's."""

import inspect
import subprocess
import sys
import warnings

import pytest
import torch

import fastft
from fastft.optim import step_in_backward
from fastft.unfreeze import GradualUnfreeze, Unfreezer
from fastft.warning import warn


def model() -> torch.nn.Module:
    """In bfloat16: steps of lr 1e-6 move none of its weights."""
    return torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64)).bfloat16()


def loss(module: torch.nn.Module) -> torch.Tensor:
    return module(torch.ones(2, 64, dtype=torch.bfloat16)).float().square().mean()


def line_of(text: str) -> int:
    """Of this file: the only line with it, but for the one that asks."""
    found = [i for i, line in enumerate(inspect.getsource(inspect.getmodule(line_of)).split("\n"), 1) if text in line]
    assert len(found) == 1
    return found[0]


def test_in_a_step_that_a_scheduler_has_wrapped():
    module = model()
    optimizer = fastft.AdamW(module.parameters(), lr=1e-6, weight_decay=0.1)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    loss(module).backward()
    with pytest.warns(UserWarning, match="rounded to nearest") as caught:
        optimizer.step()  # wrapped
    assert [(w.filename, w.lineno) for w in caught] == [(__file__, line_of("# " + "wrapped"))]


def test_in_a_step_within_the_backward_pass():
    module = model()
    optimizer = fastft.AdamW(module.parameters(), lr=1e-6, weight_decay=0.1)
    step_in_backward(optimizer)
    with pytest.warns(UserWarning, match="rounded to nearest") as caught:
        loss(module).backward()
    assert {w.filename for w in caught} == {__file__}


def test_in_a_constructor_and_while_loading():
    module = model()
    optimizer = fastft.AdamW(module.parameters(), lr=1e-3, extra_bits=16)
    loss(module).backward()
    optimizer.step()
    with pytest.warns(DeprecationWarning, match="freeze") as caught:
        Unfreezer(module, optimizer, GradualUnfreeze(every=1), mode="mask")
    assert caught[0].filename == __file__
    other = fastft.AdamW(module.parameters(), lr=1e-3)
    with pytest.warns(UserWarning, match="low bits") as caught:
        other.load_state_dict(optimizer.state_dict())
    assert caught[0].filename == __file__


def test_with_nobody_outside():
    """In a program of which every line is fastft's, the outermost is named."""
    code = "from fastft.warning import warn\n__name__ = 'fastft.__main__'\nwarn('all the way')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "<string>:3: UserWarning: all the way\n")


def test_one_line_is_shown_once():
    """As the interpreter shows a warning of one line and text once, so is it with fastft's."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            warn("again")
    assert len(caught) == 1
