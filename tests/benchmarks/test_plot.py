"""benchmarks/plot.py: tables that say what the results do, and that are known to be stale when they do not."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fastft.commands.bench.command import CASES

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "plot.py"
PLOT = runpy.run_path(str(SCRIPT))


def case(family: str, axis: dict[str, float], ms: float, **against: tuple[float, float]) -> dict[str, Any]:
    """A result: of each other step its milliseconds and by how much the ratio varies."""
    others = {
        name.replace("_", " "): {
            "median_ms": other,
            "ratio_of_medians": ms / other,
            "ratio_quartiles": [ms / other - spread, ms / other + spread],
        }
        for name, (other, spread) in against.items()
    }
    title = f"{family} {axis}"
    return {"family": family, "title": title, "axis": axis, "rounds": 9, "median_ms": ms, "gb_per_s": 40.0} | {
        "against": others,
        "absent": {"apex": "for CUDA only"},
        "target": None,
    }


def result() -> dict[str, Any]:
    cases = {
        "plain": case("step", {}, 12.0, torch_fused=(10.0, 0.1)),
        "bf16": case("step", {}, 11.0, torch_fused=(10.0, 0.2)),
    }
    for live in (1.0, 0.5, 0.1):
        of_whole = case("frozen_tensors", {"live": live}, 20 * live, torch_fused=(30.0, 0.0))
        of_whole["against"]["fastft, whole step"] = {
            "median_ms": 20.0,
            "ratio_of_medians": live + (0.03 if live == 0.5 else 0.0),
            "ratio_quartiles": [live, live],
        }
        cases[f"frozen_tensors_{live}"] = of_whole
    for count in (10, 100, 5000):
        cases[f"tensors_{count}"] = case("tensors", {"tensors": count}, count / 2000, torch_fused=(count / 100, 0.0))
    environment = {"device": "Some CPU", "device_type": "cpu", "threads": 2, "torch": "2.13.0", "fastft": "0.1.0"}
    return {
        "environment": {**environment, "commit": "abcdef", "python": "3.11", "cpu_instruction_set": "v3"},
        "rounds": 41,
        "copy_gb_per_s": 80.0,
        "peers": {"torchao": "1.0"},
        "cases": cases,
        "skipped": {"size_1500m_float32": "it takes 70 GB of memory"},
    }


def plot_py(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *map(str, arguments)], capture_output=True, text=True)


@pytest.fixture
def arguments(tmp_path: Path) -> list[object]:
    speed = tmp_path / "speed"
    speed.mkdir()
    (speed / "some-cpu.json").write_text(json.dumps(result()), encoding="utf-8")
    pages: list[object] = []
    for option, page in (
        ("--readme", "README.md"),
        ("--data-page", "docs/data.md"),
        ("--retention-page", "docs/retention.md"),
        ("--precision-page", "docs/precision.md"),
    ):
        copy = tmp_path / Path(page).name
        copy.write_text((ROOT / page).read_text(encoding="utf-8"), encoding="utf-8")
        pages += [option, copy]
    return [*pages, "--precision", tmp_path / "none", "--generated", tmp_path / "docs", "--speed", speed]


@pytest.mark.slow
def test_the_committed_tables_are_those_of_the_committed_results() -> None:
    done = plot_py("--check")
    assert done.returncode == 0, done.stderr


def test_every_headline_is_a_case() -> None:
    assert set(PLOT["HEADLINES"]) <= {case.name for case in CASES}


@pytest.mark.slow
def test_tables_and_plots_are_made_and_checked(arguments: list[object], tmp_path: Path) -> None:
    assert plot_py(*arguments, "--check").returncode == 1
    done = plot_py(*arguments)
    assert done.returncode == 0, done.stderr
    assert plot_py(*arguments, "--check").returncode == 0
    made = {path.name for path in (tmp_path / "docs").iterdir()}
    assert made == {
        "benchmarks.md",
        "replay-and-augmentation.png",
        "retention.png",
        *(f"some-cpu-{name}.png" for name in ("headlines", "bandwidth", "frozen", "tensors")),
    }
    text = (tmp_path / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    assert "apex: not measured: for CUDA only" in text and "size_1500m_float32: it takes 70 GB" in text
    assert "torchao 1.0" in text and "| 50 % |" in text
    (tmp_path / "docs" / "benchmarks.md").write_text(text.replace("12 ms", "11 ms"), encoding="utf-8")
    done = plot_py(*arguments, "--check")
    assert done.returncode == 1 and "benchmarks.md is stale: run python benchmarks/plot.py" in done.stderr
    page = tmp_path / "data.md"
    page.write_text(page.read_text(encoding="utf-8").replace("| neither |", "| nothing |"), encoding="utf-8")
    assert "data.md is stale" in plot_py(*arguments, "--check").stderr
    page = tmp_path / "precision.md"
    assert page.read_text(encoding="utf-8").count("Not measured yet.") == 5


def test_cases_in_which_another_is_faster_are_listed() -> None:
    assert PLOT["lost_to"](result()).startswith("Where another was faster: step {} (torch fused: 1.20)")
    assert "1.10" not in PLOT["lost_to"](result())  # that may be chance


def test_the_line_through_the_origin_and_how_far_points_are_off_it() -> None:
    assert PLOT["slope_through_origin"]([1.0, 2.0], [2.0, 4.5]) == pytest.approx(11 / 5)
    # Σxy/Σx² = (1 + 0.5·0.53 + 0.01)/1.26; farthest off is the point in the middle.
    slope = 1.275 / 1.26
    said = PLOT["fit_sentence"](result(), "frozen_tensors")
    assert f"{slope:.3f} · share" in said and f"{100 * (0.53 - slope / 2):.1f} % of a whole step off" in said


@pytest.mark.slow
def test_no_results_at_all_is_an_error(tmp_path: Path) -> None:
    done = plot_py("--speed", tmp_path)
    assert done.returncode == 1 and "expected files of fastft bench --json in" in done.stderr
