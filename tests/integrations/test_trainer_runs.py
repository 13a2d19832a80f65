"""Trainers in processes of their own: killed and resumed, and two of them under DDP."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import trainer_runs
from safetensors.torch import load_file
from started import free_port
from trainer_runs import KILL_AT, RESUME_AT, RUNS
from transformers import AutoModelForSequenceClassification
from unfreeze_cases import assert_equal, one_thread

from fastft.problems import model_folder

pytestmark = pytest.mark.slow
SCRIPT = Path(trainer_runs.__file__)
NAMES = ("embeddings", *(f"bert.encoder.layer.{i}" for i in range(3)), "head")


def run(*command: Any, code: int = 0) -> None:
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "TOKENIZERS_PARALLELISM": "false",
    }
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=400,
    )
    assert done.returncode == code, done.stdout


# -- killed and resumed --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the checkpoints of runs that another process was killed in."""
    folder = tmp_path_factory.mktemp("killed")
    run(SCRIPT, "train", folder, code=-signal.SIGKILL)
    yield folder
    shutil.rmtree(folder)  # hundreds of megabytes


@pytest.fixture(scope="module")
def resumed(killed: Path) -> dict[str, dict[str, Any]]:
    """The results when they go on here."""
    ends = {}
    with one_thread():
        for name, make in RUNS.items():
            again = make(killed / name)
            torch.rand(7)  # not where the other process was
            ends[name] = again.train(killed / name / f"checkpoint-{RESUME_AT[name]}")
    return ends


@pytest.mark.parametrize("name", RUNS)
def test_a_run_that_was_killed_goes_on_bit_for_bit(
    name: str, resumed: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    expected, got = RUNS[name](tmp_path / "whole").train(), resumed[name]
    shutil.rmtree(tmp_path)
    later = [step for step in expected["opened"] if step > RESUME_AT[name]]
    assert list(got["opened"]) == later
    assert RESUME_AT[name] < KILL_AT < later[-1]
    assert_equal(got["params"], expected["params"])
    assert_equal(got["moments"], expected["moments"])  # with step counts and the anchor
    assert_equal(got["model"], expected["model"])
    assert {step: expected["lr"][step] for step in later} == got["lr"]
    assert {step: expected["opened"][step] for step in later} == got["opened"]
    # Groups opened before the break and after it.
    assert len({opened for step, opened in expected["opened"].items() if step not in later}) > 1
    assert len(set(got["opened"].values())) > 1


def test_the_anchor_of_a_resumed_run_is_the_pretrained_model(resumed: dict[str, dict[str, Any]]) -> None:
    got = resumed["minilm"]
    pretrained = dict(
        AutoModelForSequenceClassification.from_pretrained(model_folder(), local_files_only=True).named_parameters()
    )
    anchors = {key.removeprefix("anchor."): value for key, value in got["moments"].items() if key.startswith("anchor.")}
    assert set(pretrained) - set(anchors) == {"classifier.weight", "classifier.bias"}
    assert_equal(anchors, {name: pretrained[name].detach() for name in anchors})
    moved = {name for name in anchors if not torch.equal(got["params"][name], anchors[name])}
    assert any("layer.5" in name for name in moved)
    assert not any("layer.0" in name for name in moved)  # closed to the end


def test_the_best_model_is_loaded_at_the_end(resumed: dict[str, dict[str, Any]]) -> None:
    got = resumed["minilm"]
    assert got["best"] is not None
    assert_equal(got["model"], load_file(Path(got["best"]) / "model.safetensors"))
    assert any(not torch.equal(tensor, got["params"][name]) for name, tensor in got["model"].items())


# -- two processes -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """A folder, and what each of two processes came to."""
    folder = tmp_path_factory.mktemp("pair")
    trainer_runs.tiny_bert(folder / "tiny-bert", dropout=0.0)
    port = free_port()
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", 2, "--num_machines", 1]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", port]
    run(*launch, SCRIPT, "ddp", folder)
    return folder, [torch.load(folder / f"{rank}.end", weights_only=True) for rank in range(2)]


def test_two_processes_match_one(pair: tuple[Path, list[dict[str, Any]]], tmp_path: Path) -> None:
    folder, (first, second) = pair
    one = trainer_runs.whole(tmp_path, folder / "tiny-bert", rows_at_once=4)
    assert first["run"]["opened"] == one["opened"]
    assert one["opened"][1] == NAMES[-1:]
    assert len(one["opened"][10]) == 4
    for name, expected in one["params"].items():
        torch.testing.assert_close(first["run"]["params"][name], expected, rtol=1e-4, atol=1e-5, msg=name)
    # What one process has measured counts on both, or they would part.
    assert second["run"]["opened"] == one["opened"]
    assert_equal(second["run"]["params"], first["run"]["params"])
    assert first["run"]["notes"] == (
        "backward computes gradients for closed groups too, as the model is wrapped in DistributedDataParallel",
    )


def test_two_processes_resume_from_one_checkpoint(pair: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, ends = pair
    for end in ends:
        assert min(end["resumed"]["opened"]) == 5
        assert_equal(end["resumed"]["params"], end["run"]["params"])
        assert_equal(end["resumed"]["moments"], end["run"]["moments"])
    written = {path.name for path in (folder / "ddp" / "checkpoint-4").iterdir()}
    assert {name for name in written if "optimizer" in name} == {"optimizer.pt"}  # by the first process


def test_flags_of_a_ddp_model_are_not_flipped(pair: tuple[Path, list[dict[str, Any]]]) -> None:
    assert [end["refused"] for end in pair[1]] == [
        'mode: expected "freeze", together with fastft.AdamW, for a model that is wrapped in DistributedDataParallel: '
        "DistributedDataParallel settles when it is made which gradients it waits for"
    ] * 2
