"""Runs in processes of their own: killed and resumed, and two of them under DDP."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import unfreeze_runs
from unfreeze_cases import assert_equal, bits, params
from unfreeze_runs import RUNS, STOP, TOTAL

pytestmark = pytest.mark.slow
SCRIPT = Path(unfreeze_runs.__file__)
NAMES = ("embeddings", "blocks.0", "blocks.1", "blocks.2", "final_norm", "head")


def start(*arguments: Any) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finished(process: subprocess.Popen[str], code: int = 0) -> None:
    try:
        output, _ = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == code, output


# -- killed and resumed --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the resumed runs ended as."""
    folder = tmp_path_factory.mktemp("killed")
    finished(start("train", folder), -signal.SIGKILL)
    finished(start("resume", folder))
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_a_run_that_was_killed_goes_on_bit_for_bit(name: str, killed: Path) -> None:
    torch.manual_seed(0)
    run = unfreeze_runs.make(name)
    run.train(STOP)
    halfway = bits(params(run.model))
    run.train(TOTAL)
    expected = run.end()
    got = torch.load(killed / f"{name}.end", weights_only=True)
    assert_equal(got["params"], expected["params"])
    assert_equal(got["moments"], expected["moments"])
    assert got["lr"] == expected["lr"]
    assert got["opened"] == expected["opened"]
    assert got["report"] == expected["report"]
    # Groups opened before the break and after it, and training did go on.
    assert len(set(expected["opened"][:STOP])) > 1
    assert len(set(expected["opened"][STOP:])) > 1
    assert not torch.equal(halfway["head.weight"], expected["params"]["head.weight"])


# -- two processes -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The results of two processes under DDP."""
    folder = tmp_path_factory.mktemp("ddp")
    processes = [start("ddp", folder / "end", rank, folder / "store") for rank in range(2)]
    try:
        for process in processes:
            finished(process)
    finally:
        for process in processes:
            process.kill()
    return torch.load(folder / "end", weights_only=True)


WRAPPED = "wrapped in DistributedDataParallel"


@pytest.mark.parametrize(
    ("how", "wrapped"),
    [
        ("static", WRAPPED),
        ("dynamic", WRAPPED),
        ("views", WRAPPED),
        ("sharded", "sharded with fully_shard"),
        ("sharded flags", None),
    ],
)
def test_two_processes_match_one(how: str, wrapped: str | None, pair: dict[str, Any]) -> None:
    got = pair["ends"][how]
    expected = unfreeze_runs.whole(lambda model: model, lambda t: t)
    assert got["opened"] == expected["opened"]
    assert got["opened"][0] == NAMES[-1:]
    assert got["opened"][-1] == NAMES
    moved: set[str] = set()
    before = params(unfreeze_runs.Stack(3))
    for step, (theirs, ours) in enumerate(zip(got["path"], expected["path"], strict=True)):
        for name, tensor in ours.items():
            torch.testing.assert_close(theirs[name], tensor, rtol=1e-4, atol=1e-5, msg=f"{name} at step {step}")
            if torch.equal(tensor, before[name]):
                # Closed in one process: closed in two, bit for bit.
                assert torch.equal(theirs[name], tensor)
            else:
                moved.add(name)
    assert moved == set(before)
    note = f"backward computes gradients for closed groups too, as the model is {wrapped}"
    assert got["notes"] == ((note,) if wrapped else ())


def test_flags_of_a_ddp_model_are_not_flipped(pair: dict[str, Any]) -> None:
    assert pair["refused"] == (
        'mode: expected "freeze", together with fastft.AdamW, for a model that is wrapped in DistributedDataParallel: '
        "DistributedDataParallel settles when it is made which gradients it waits for"
    )


def test_a_measured_budget_is_that_of_the_dearest_process(pair: dict[str, Any]) -> None:
    assert pair["measured"] == [1.0, 3.0]
