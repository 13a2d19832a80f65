"""Several processes against one, in every way and for every feature of the table; and whether the table is true."""

from __future__ import annotations

import json
import math
import runpy
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from distributed import processes, scenarios
from distributed.given_gradients import SPOILT_STEP, model
from distributed.processes import EXACT, FAILED, REFUSED, UNTRIED, Started, finished, measure, merged
from distributed.scenarios import REFERENCES, RESHARD, Outcome, differences
from distributed.ways import WAYS, Way

TABLE = runpy.run_path(str(Path(__file__).resolve().parents[2] / "scripts" / "distributed_table.py"))
RESULTS: dict[str, Any] = json.loads(TABLE["RESULTS"].read_text(encoding="utf-8"))


@pytest.mark.slow
def test_no_way_is_silently_different_and_the_results_are_true(tmp_path: Path) -> None:
    cells = measure(tmp_path)
    assert not processes.failures(cells), "\n".join(processes.failures(cells))
    unknown = cells.keys() - RESULTS["cells"].keys()
    assert not unknown, f"python scripts/distributed_table.py --measure has yet to measure {sorted(unknown)}"
    stale = [
        f"{way}, {column}: the results say {RESULTS['cells'][way].get(column)}, and it is {cell}"
        for way, columns in cells.items()
        for column, cell in columns.items()
        if RESULTS["cells"][way].get(column) != cell
    ]
    assert not stale, "\n".join([*stale, "python scripts/distributed_table.py --measure measures anew"])


def test_the_table_agrees_with_the_results() -> None:
    assert TABLE["TABLE"].read_text(encoding="utf-8") == TABLE["document"](RESULTS)


def test_the_table_has_all_ways_and_no_failures() -> None:
    """Those too that are not measured here, for want of a package."""
    assert RESULTS["cells"].keys() == {way.name for way in WAYS}
    assert RESULTS["measured_with"].keys() == {way.name for way in WAYS if way.package is not None}
    assert not processes.failures(RESULTS["cells"])
    columns = {*scenarios.COLUMNS, RESHARD}
    for way in WAYS:
        cells = RESULTS["cells"][way.name]
        assert cells.keys() == {*columns, *way.others}
        assert {column for column in cells if cells[column]["outcome"] == UNTRIED} == way.untried.keys()
        # Else checkpoints would have been tried with masks, or without.
        assert (cells["masks"]["outcome"] == EXACT) == way.takes_masks


# -- the scenarios, in one process -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    """The outcomes of one process, by scenario."""
    folder = tmp_path_factory.mktemp("alone")
    scenarios.write_weights(Way(), folder)
    return processes.references(Way(), folder)


def share_moved(found: Outcome, name: str) -> float:
    start = dict(model(torch.float64).named_parameters())[name]
    return float((found["parameters"][name] != start).double().mean())


def test_every_scenario_does_something_of_its_own(alone: dict[str, Outcome]) -> None:
    assert set(alone) == set(REFERENCES)
    compared = [name for name in REFERENCES if name not in (*scenarios.OTHERS, RESHARD)]
    for i, name in enumerate(compared):
        for other in compared[:i]:
            assert differences(alone[name]["parameters"], alone[other]["parameters"]), (name, other)


def test_the_scenarios_do_what_they_are_called(alone: dict[str, Outcome]) -> None:
    assert all(norm > 1.5 for name in ("clip", "masks", "freeze", "unfreeze") for norm in alone[name]["norms"])
    assert [norm == float("inf") for norm in alone["skip"]["norms"]].index(True) == SPOILT_STEP
    assert alone["skip"]["skipped"] == 1
    assert alone["GradScaler"]["scales"] == [8.0, 16.0, 8.0, 8.0, 16.0, 16.0]
    assert share_moved(alone["masks"], "first.weight") == pytest.approx(11 / 17)
    assert share_moved(alone["masks"], "norm.bias") == pytest.approx(10 / 17)
    assert share_moved(alone["masks"], "second.weight") == pytest.approx(26 / 51)
    assert share_moved(alone["freeze"], "second.bias") == share_moved(alone["freeze"], "norm.bias") == 0.0
    assert share_moved(alone["unfreeze"], "second.bias") == 0.0 < share_moved(alone["unfreeze"], "norm.bias")
    assert [share_moved(alone["Unfreezer"], f"{layer}.weight") for layer in ("first", "norm", "second", "head")] == [
        0.0,
        1.0,
        1.0,
        1.0,
    ]
    resumed = alone["save and resume"]
    assert share_moved(resumed, "norm.weight") == share_moved(resumed, "second.bias") == 0.0
    assert share_moved(resumed, "first.weight") == pytest.approx(11 / 17)


@pytest.mark.parametrize("name", REFERENCES)
def test_sums_of_squares_do_not_round(name: str, alone: dict[str, Outcome]) -> None:
    """Else the order of a sum over processes could be seen, and nothing be compared bit for bit."""
    for norm in alone[name].get("norms", ()):
        if norm is not None and norm != float("inf"):
            sixteenths = 256 * norm**2
            assert sixteenths == pytest.approx(round(sixteenths), abs=1e-9)


# -- comparing, merging, killing ---------------------------------------------------------------------------------


def test_one_bit_is_a_difference(alone: dict[str, Outcome]) -> None:
    for path in (("parameters", "head.bias"), ("norms",), ("skipped",)):
        changed = {**alone["clip"], "parameters": {k: p.clone() for k, p in alone["clip"]["parameters"].items()}}
        assert not differences(changed, alone["clip"])
        if path == ("norms",):
            changed["norms"] = [*changed["norms"][:-1], math.nextafter(changed["norms"][-1], 0.0)]
        elif path == ("skipped",):
            changed["skipped"] += 1
        else:
            p = changed["parameters"][path[1]]
            p.copy_(torch.nextafter(p, p + 1))
        (line,) = differences(changed, alone["clip"])
        assert line.startswith(path[-1] if len(path) == 1 else " ".join(path))


@pytest.mark.parametrize("units", [1, 3])
def test_a_rounded_norm_may_be_one_unit_off(units: int, alone: dict[str, Outcome]) -> None:
    rounded = alone["clip"]["rounded"]
    (norm,) = rounded["norms"]
    changed = {**alone["clip"], "rounded": {**rounded, "norms": [norm + units * math.ulp(norm)]}}
    assert bool(differences(changed, alone["clip"])) == (units > 1)


def report(rank: int, outcome: str, **more: str) -> dict[str, Any]:
    return {"way": "a", "column": "b", "rank": rank, "world": 2, "outcome": outcome, **more}


def test_processes_that_disagree_are_a_failure() -> None:
    sentence = {"sentence": "expected"}
    assert merged([report(0, EXACT), report(1, EXACT)], "a", "b", 2) == {"outcome": EXACT}
    refused = [report(0, REFUSED, **sentence), report(1, REFUSED, sentence="expected, too")]
    assert merged(refused, "a", "b", 2) == {"outcome": REFUSED, **sentence}
    mixed = merged([report(0, EXACT), report(1, REFUSED, **sentence)], "a", "b", 2)
    assert mixed["outcome"] == FAILED and "process 1 of 2: expected" in mixed["detail"]
    lost = merged([report(0, EXACT), {"process": "process 1 of 2 did not end"}], "a", "b", 2)
    assert lost == {"outcome": FAILED, "detail": "1 of 2 reports; process 1 of 2 did not end"}
    assert processes.failures({"a": {"b": lost, "c": {"outcome": EXACT}}}) == [f"a, b: {lost['detail']}"]


def test_a_process_that_hangs_is_killed(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"])
    (tmp_path / "log").write_text("the last words")
    (said,) = finished(Started([process], [tmp_path / "log"], [tmp_path / "none"]), deadline=time.monotonic())
    assert said == {"process": "process 0 of 1 did not end: the last words"}
    assert process.returncode != 0
