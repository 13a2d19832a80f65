"""The command line: what it accepts, what it says, and how it leaves."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastft
from fastft import _C, _core
from fastft.commands import cli, demo


def test_info_names_versions_devices_and_why_cuda_cannot_be_used(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "why_no_cuda", lambda: "no NVIDIA driver is installed")
    assert cli.main(["info"]) == 0
    lines = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    lines = {name: value.strip() for name, value in lines.items()}
    assert lines["fastft"] == fastft.__version__
    assert lines["torch"].startswith(torch.__version__)
    assert lines["cpu"] == f"{_C.cpu_instruction_set()} loops, {torch.get_num_threads()} threads"
    for arch in _C.cuda_archs.split():
        assert f"sm_{arch}" in lines["cuda code"]
    assert lines["cuda"] == "cannot be used: no NVIDIA driver is installed"


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine can use CUDA")
def test_there_is_a_reason_where_cuda_cannot_be_used() -> None:
    assert cli.why_no_cuda()


def test_info_works_as_a_process() -> None:
    done = subprocess.run([sys.executable, "-m", "fastft.commands.cli", "info"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("fastft ")


def test_demo_passes_its_options_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls = []
    monkeypatch.setattr(demo, "run", lambda *arguments: calls.append(arguments) or 130)
    assert cli.main(["demo", "--output", str(tmp_path), "--quick", "--seed", "7", "--overwrite"]) == 130
    assert cli.main(["demo"]) == 130
    assert calls == [(tmp_path, True, 7, True), (Path("fastft-demo"), False, 0, False)]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "COMMAND"),
        (["sing"], "invalid choice: 'sing'"),
        (["demo", "--seed", "-1"], "expected a whole number from 0 to 2**63 - 1, got '-1'"),
        (["demo", "--seed", "1e3"], "expected a whole number from 0 to 2**63 - 1, got '1e3'"),
        (["demo", "--seed", str(2**63)], "expected a whole number"),
        (["info", "--quick"], "unrecognized arguments: --quick"),
    ],
)
def test_wrong_usage_leaves_with_2_and_says_why(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main(arguments)
    assert left.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("version", "expected"), [("2.10.0", (2, 10)), ("2.9.1+cu128", (2, 9)), ("3.0.0a0+git12", (3, 0))]
)
def test_torch_versions_are_read(version: str, expected: tuple[int, int]) -> None:
    assert _core._version_tuple(version) == expected


def test_an_older_torch_is_refused_with_what_to_do() -> None:
    program = "import torch; torch.__version__ = '2.9.1'; import fastft"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 1
    assert "ImportError: fastft needs torch >= 2.10, found torch 2.9.1: upgrade torch" in done.stderr
