"""examples/several_gpus.py, as torchrun starts it: killed, and gone on with."""

from __future__ import annotations

import os
import re
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from started import free_port

from fastft.layers import layer_groups

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "several_gpus.py"
LINE = re.compile(r"^step (\d+): loss (\S+), norm (\S+?)(?:, (\d+) groups open)?$", re.MULTILINE)
Line = tuple[str, ...]


def lines(output: str) -> dict[int, Line]:
    """(loss, norm, open groups) of each step, as they were printed."""
    return {int(step): rest for step, *rest in LINE.findall(output)}


def start(folder: Path, wrapper: str, processes: int = 2) -> subprocess.Popen[str]:
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "GLOO_SOCKET_IFNAME": "lo",
        "PYTHONPATH": os.pathsep.join([str(SCRIPT.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--master-port", str(free_port())]
    options = ["--cpu", "--unfreeze", "--wrapper", wrapper, "--folder", str(folder), "--steps", "60"]
    command = [sys.executable, *torchrun, str(SCRIPT), *options]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finished(process: subprocess.Popen[str]) -> str:
    try:
        output, _ = process.communicate(timeout=300)
    finally:
        process.terminate()  # torchrun then ends its processes
    assert process.returncode == 0, output
    return output


def kill_a_process(torchrun: subprocess.Popen[str], last: Path) -> str:
    """End one of two processes as a power cut would, some steps after a checkpoint; what had been printed by then."""
    started = time.monotonic()
    while not last.exists():
        assert torchrun.poll() is None and time.monotonic() < started + 200
        time.sleep(0.01)
    children = Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    output, _ = torchrun.communicate(timeout=200)
    assert torchrun.returncode != 0, output
    return output


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The output of a run with FSDP2 that nobody disturbed."""
    return finished(start(tmp_path_factory.mktemp("whole"), "fsdp2"))


@pytest.mark.slow
def test_a_killed_run_goes_on_where_it_was(whole: str, tmp_path: Path) -> None:
    before = lines(kill_a_process(start(tmp_path, "fsdp2"), tmp_path / "last"))
    saved = int((tmp_path / "last").read_text().removeprefix("step-"))
    output = finished(start(tmp_path, "fsdp2"))
    after, expected = lines(output), lines(whole)
    assert saved <= max(before) < 60
    assert list(after) == list(range(saved + 1, 61))
    assert {**before, **after} == expected
    assert output.rpartition("group ")[2] == whole.rpartition("group ")[2]  # the drift from the first weights
    opened = [int(opened) for *_, opened in expected.values()]
    assert opened[0] == 1 and opened[-1] == 7
    assert opened[saved - 1] < 7  # groups opened after the break, too


@pytest.mark.slow
def test_another_wrapper_and_another_number_of_processes_do_the_same(whole: str, tmp_path: Path) -> None:
    kill_a_process(start(tmp_path, "ddp"), tmp_path / "last")
    got, expected = lines(finished(start(tmp_path, "ddp", processes=1))), lines(whole)
    for step, (loss, norm, opened) in got.items():
        assert opened == expected[step][2]
        numbers = torch.tensor([float(loss), float(norm)])
        wanted = torch.tensor([float(number) for number in expected[step][:2]])
        torch.testing.assert_close(numbers, wanted, rtol=1e-3, atol=1e-4)
    assert max(got) == 60


def test_accelerate_takes_the_configuration() -> None:
    launch = pytest.importorskip("accelerate.commands.launch")
    config = pytest.importorskip("accelerate.commands.config.config_args")
    file = SCRIPT.with_name("fsdp2.yaml")
    read = config.load_config_from_file(str(file))
    assert read.distributed_type == "FSDP" and read.num_processes == 8
    assert read.fsdp_config["fsdp_version"] == 2
    known = vars(launch.launch_command_parser().parse_args(["script.py"]))
    assert not read.fsdp_config.keys() - known.keys()
    shown = "accelerate launch --config_file examples/fsdp2.yaml"
    assert shown in file.read_text() and shown in (SCRIPT.parents[1] / "docs" / "several-gpus.md").read_text()


def test_the_parts_of_the_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    parts = runpy.run_path(str(SCRIPT))
    tokens = parts["batch"](3)
    assert tokens.shape == (parts["ROWS"], parts["LENGTH"])
    assert torch.equal(tokens, parts["batch"](3))
    assert not torch.equal(tokens, parts["batch"](4))
    assert (tokens.diff() % parts["VOCABULARY"] == 1).all()
    assert [group.kind for group in layer_groups(parts["small_decoder"]())].count("block") == 4
    assert parts["load"](tmp_path, None, None, None) is None  # nothing was saved
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--wrapper", "fsdp3"])
    with pytest.raises(SystemExit):
        parts["arguments"]()
