"""The loops for each instruction set: the same bits from v3 and v4, and which of them run."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from fastft import _C

pytestmark = pytest.mark.slow
SETS = ("baseline", "v3", "v4")
STEPS = """
import hashlib, torch, fastft
from fastft import _C
from fastft.nn.functional import dropout_add_layer_norm
digest = hashlib.sha256()
for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
    for mode in ("decoupled", "l2", "selective"):
        torch.manual_seed(0)
        p = torch.nn.Parameter(torch.randn(77, 131).to(dtype))
        optimizer = fastft.AdamW([p], lr=0.01, weight_decay=0.1, anchor="init", anchor_decay=3.0, anchor_mode=mode,
                                 max_grad_norm=1.0, amsgrad=mode == "l2")
        optimizer.set_update_mask(p, torch.rand(p.shape) < 0.7)
        for _ in range(3):
            p.grad = torch.randn(p.shape).to(dtype)
            optimizer.step()
        digest.update(p.detach().view(torch.uint8).numpy().tobytes())
    x = torch.randn(7, 131).to(dtype)
    ones = torch.ones(131, dtype=dtype)
    y = dropout_add_layer_norm(x, x.flip(0), [131], ones, ones, p=0.3)
    digest.update(y.view(torch.uint8).numpy().tobytes())
print(_C.cpu_instruction_set(), digest.hexdigest())
"""


def with_loops(name: str, code: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "FASTFT_CPU_CAPABILITY": name}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)


def digest_with(name: str) -> tuple[str, str]:
    done = with_loops(name, STEPS)
    assert done.returncode == 0, done.stderr
    used, digest = done.stdout.split()
    return used, digest


@pytest.mark.skipif(_C.cpu_instruction_set() != "v4", reason="this CPU has no AVX-512")
def test_wider_loops_give_the_same_bits() -> None:
    (v3, from_v3), (v4, from_v4) = digest_with("v3"), digest_with("v4")
    assert (v3, v4) == ("v3", "v4")
    assert from_v3 == from_v4


@pytest.mark.parametrize("name", SETS)
def test_no_more_is_used_than_was_asked_for_and_is_there(name: str) -> None:
    done = with_loops(name, "from fastft import _C; print(_C.cpu_instruction_set())")
    here = _C.cpu_instruction_set()
    assert done.stdout.strip() == min(name, here, key=SETS.index), done.stderr


def test_an_unknown_set_is_refused_at_import() -> None:
    done = with_loops("v5", "import fastft")
    assert done.returncode != 0
    assert "FASTFT_CPU_CAPABILITY: expected baseline, v3 or v4, got v5" in done.stderr
