"""``fastft doctor``: its options reach ``fastft.doctor``, its report is printed or written, errors are one line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import fastft
from fastft.commands import shell


@pytest.fixture
def model(tmp_path: Path) -> Path:
    g = torch.Generator().manual_seed(0)
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"a.weight": (torch.randn(300, 200, generator=g) * 0.05).bfloat16()}, folder / "model.safetensors")
    return folder


def test_the_report_is_printed(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert shell.main(["doctor", str(model)]) == 0
    assert capsys.readouterr() == (f"{fastft.doctor(model)}\n", "")
    options = ["--lr", "2e-4", "--dtype", "float16", "--weight-decay", "0.3", "--anchor-decay", "20"]
    assert shell.main(["doctor", str(model), *options, "--gpu-memory", "2MB"]) == 0
    report = fastft.doctor(model, lr=2e-4, dtype="float16", weight_decay=0.3, anchor_decay=20.0, gpu_memory="2MB")
    assert capsys.readouterr().out == f"{report}\n"


def test_the_report_is_written(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert shell.main(["doctor", str(model), "--output", str(out)]) == 0
    text = capsys.readouterr().out
    assert json.loads((out / "report.json").read_text())["elements"] == 60_000
    assert (out / "report.md").read_text() == fastft.doctor(model).to_markdown()
    assert text.startswith(f"{fastft.doctor(model)}\n\nWritten to {out}: ")
    assert sorted(text.splitlines()[-1].rpartition(": ")[2].split(", ")) == sorted(p.name for p in out.iterdir())
    assert shell.main(["doctor", str(model), "--output", str(out)]) == 2
    assert "is not empty" in capsys.readouterr().err
    assert shell.main(["doctor", str(model), "--output", str(out), "--overwrite"]) == 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--dtype", "int8"], "dtype: expected bfloat16, float16, float32 or None, got 'int8'"),
        (["--lr", "0"], "lr: expected a finite number > 0, got 0.0"),
        (["--gpu-memory", "big"], "gpu_memory: expected a size of at least 1 MB, such as 24GB or 80GiB, got 'big'"),
    ],
)
def test_a_wrong_value_is_one_line(
    options: list[str], said: str, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert shell.main(["doctor", str(model), *options]) == 2
    assert capsys.readouterr() == ("", f"fastft doctor: {said}\n")


def test_a_missing_model_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert shell.main(["doctor", str(tmp_path / "no")]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert "expected a folder with a model or a .safetensors file on this disk, found nothing" in err


@pytest.mark.slow
def test_it_works_as_a_process(model: Path) -> None:
    command = [sys.executable, "-m", "fastft", "doctor", str(model / "model.safetensors"), "--gpu-memory", "24GB"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "fastft.AdamW(model.named_parameters(), lr=1e-05, weight_decay=0.01, extra_bits=16" in done.stdout
