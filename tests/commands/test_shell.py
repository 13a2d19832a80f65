"""The command line: the options it accepts, its messages, and its exit statuses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import fastft
from fastft import _C, _core
from fastft.commands import bench, demo, info, shell
from fastft.commands.failure import Failure
from fastft.errors import UserError


def test_info_names_versions_devices_and_why_cuda_cannot_be_used(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(info, "why_no_cuda", lambda: "no NVIDIA driver is installed")
    assert shell.main(["info"]) == 0
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
    assert info.why_no_cuda()


@pytest.mark.slow
def test_info_works_as_a_process() -> None:
    done = subprocess.run([sys.executable, "-m", "fastft", "info"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("fastft ")


def test_a_command_is_given_its_options_and_its_text_is_printed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = []
    monkeypatch.setattr(demo, "PACKAGES", {})
    monkeypatch.setattr(demo, "run", lambda options: calls.append(vars(options)) or "a table")
    assert shell.main(["demo", "--output", str(tmp_path), "--quick", "--seed", "7", "--overwrite"]) == 0
    assert shell.main(["demo"]) == 0
    assert calls == [
        {"output": tmp_path, "quick": True, "seed": 7, "overwrite": True},
        {"output": Path("fastft-demo"), "quick": False, "seed": 0, "overwrite": False},
    ]
    assert capsys.readouterr() == ("a table\na table\n", "")


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (UserError("x: expected y"), 2, "x: expected y"),
        (Failure("stopped after step 7", 143), 143, "stopped after step 7"),
        (OSError("disk full"), 1, "could not finish: disk full; what was measured is in {}"),
        (KeyboardInterrupt(), 130, "interrupted; what was measured is in {}"),
    ],
)
def test_an_error_is_one_line_and_a_status(
    error: BaseException,
    status: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def run(options: Any) -> str:
        options.written = True  # as the benchmark notes once it has written its file
        raise error

    monkeypatch.setattr(bench, "run", run)
    file = tmp_path / "out.json"
    assert shell.main(["bench", "--json", str(file)]) == status
    assert capsys.readouterr() == ("", f"fastft bench: {said.format(file)}\n")


def test_results_of_an_earlier_run_are_not_taken_for_this_ones(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(_: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "run", run)
    file = tmp_path / "out.json"
    file.write_text("{}")
    assert shell.main(["bench", "--json", str(file)]) == 130
    assert capsys.readouterr().err == "fastft bench: interrupted; nothing was written\n"


def test_an_error_of_ours_shows_where_it_arose_and_what_is_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(_: object) -> str:
        raise ZeroDivisionError

    monkeypatch.setattr(bench, "run", run)
    with pytest.raises(ZeroDivisionError):
        shell.main(["bench"])
    assert capsys.readouterr().err == "fastft bench: nothing was written\n"


@pytest.mark.slow
def test_help_imports_nothing_large() -> None:
    program = (
        "import sys; from fastft.commands import shell; shell.make_parser().format_help(); "
        "print({'transformers', 'datasets', 'matplotlib', 'yaml'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("set()\n", "")


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
        shell.main(arguments)
    assert left.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("version", "expected"), [("2.10.0", (2, 10)), ("2.9.1+cu128", (2, 9)), ("3.0.0a0+git12", (3, 0))]
)
def test_torch_versions_are_read(version: str, expected: tuple[int, int]) -> None:
    assert _core._version_tuple(version) == expected


@pytest.mark.slow
def test_an_older_torch_is_refused_with_what_to_do() -> None:
    program = "import torch; torch.__version__ = '2.9.1'; import fastft"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 1
    assert "ImportError: fastft needs torch >= 2.10, found torch 2.9.1: upgrade torch" in done.stderr
