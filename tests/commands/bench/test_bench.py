"""``fastft bench``: which cases are chosen, what is measured, what is refused, and what the JSON holds."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from fastft.commands import bench, shell
from fastft.commands.bench import command, dropout, harness, peers, steps
from fastft.commands.bench.cases import FASTFT, Case, ReadyCase, select
from fastft.nn import functional as ours

CPU = torch.device("cpu")
SHAPES = ((3, 5), (7,), (2, 2, 2))


def small_case(**options: Any) -> Case:
    def prepare(device: torch.device) -> ReadyCase:
        return ReadyCase({FASTFT: lambda: None, "other": lambda: None}, {"third": "not there"})

    return Case("name", "family", "title", prepare, **options)


# -- choosing ----------------------------------------------------------------------------------------------------


def test_names_are_unique() -> None:
    names = [case.name for case in command.CASES]
    assert len(set(names)) == len(names)


def test_cases_are_chosen_by_name_family_and_pattern() -> None:
    def chosen(*patterns: str) -> list[str]:
        return [case.name for case in select(command.CASES, list(patterns))]

    assert chosen("plain") == ["plain"]
    assert chosen("groups", "plain") == ["plain", "groups_1", "groups_2", "groups_100"]
    assert chosen("size_1m_*") == ["size_1m_float32", "size_1m_bfloat16"]
    assert {"dropout_8_float32", "dropout_add_rms_norm_16m_bfloat16"} < set(chosen("dropout"))
    assert chosen() == [case.name for case in command.CASES]
    with pytest.raises(
        ValueError, match=r"case: expected a name, a family \(step, peers, .*\) or a pattern of them, got 'plane'"
    ):
        chosen("plain", "plane")


def test_more_memory_than_there_is_is_not_taken() -> None:
    assert command.why_not(small_case(memory=1e18), CPU, False).startswith("it takes 1000000000 GB of memory, ")
    assert command.why_not(small_case(memory=1e6), CPU, False) == ""


# -- measuring ---------------------------------------------------------------------------------------------------


def test_work_alternates_and_begins_with_another_each_round(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "SHORTEST", 0.0)
    done: list[str] = []
    works = {name: partial(done.append, name) for name in "abc"}
    measured = harness.alternate(works, CPU, 3, seconds_at_most=10.0)
    assert "".join(done) == "aaabbbccc" + "abc" + "bca" + "cab"
    assert measured.rounds == 3
    assert {name: len(seconds) for name, seconds in measured.seconds.items()} == {"a": 3, "b": 3, "c": 3}


def test_slow_work_has_fewer_rounds() -> None:
    works = {"slow": lambda: torch.ones(200_000).exp_().sum()}
    assert harness.alternate(works, CPU, 100, seconds_at_most=0.0).rounds == harness.FEWEST_ROUNDS


def test_ratios_are_of_medians_with_quartiles_of_the_rounds() -> None:
    measured = harness.Measurement({"a": [1.0, 2.0, 9.0], "b": [4.0, 4.0, 6.0]}, {})
    assert measured.ratio("a", "b") == harness.Ratio(0.5, 0.375, 1.0)


# -- what is compared --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [*steps.STEP, steps.MANY_GROUPS[1], steps.FROZEN_TENSORS[2], steps.MASKED_ROWS[4]])
def test_steps_come_to_the_same(case: Case) -> None:
    whole = case.prepare.__self__  # type: ignore[attr-defined]
    shapes = ((40, 8),) * 10
    small = steps.Steps(shapes, whole.steps, whole.dtype, whole.same_work)
    prepared = small.prepare(CPU)
    assert list(prepared.works) == list(whole.steps)
    assert prepared.absent == {}


def other_step(params: Any, **options: Any) -> steps.Step:
    optimizer = torch.optim.AdamW(params, **{**peers.ADAMW, **options})
    return optimizer.step, optimizer


@pytest.mark.parametrize(
    ("options", "what"),
    [({"lr": 2e-3}, "parameters"), ({"betas": (0.9, 0.99)}, "exp_avg_sq"), ({"eps": 1e-2}, "parameters")],
)
def test_a_step_that_does_something_else_is_refused(options: dict[str, Any], what: str) -> None:
    wrong = steps.Steps(SHAPES, {FASTFT: steps.ours, steps.FUSED: partial(other_step, **options)})
    with pytest.raises(AssertionError, match=rf"{what} of fastft and torch fused differ by \d\.\de"):
        wrong.prepare(CPU)


def broken(params: Any) -> steps.Step:
    raise RuntimeError("no such kernel\nand more")


def test_a_peer_that_cannot_run_is_reported_and_torch_must_run() -> None:
    name = next(iter(peers.PEERS))
    works = {FASTFT: steps.ours, steps.FUSED: steps.IN_FUSED, name: broken, "apex": steps.LIBRARIES["apex"]}
    prepared = steps.Steps(SHAPES, works).prepare(CPU)
    assert list(prepared.works) == [FASTFT, steps.FUSED]
    assert prepared.absent == {name: "RuntimeError: no such kernel", "apex": "apex's AdamW is for CUDA only"}
    with pytest.raises(RuntimeError, match="no such kernel"):
        steps.Steps(SHAPES, {FASTFT: steps.ours, steps.FUSED: broken}).prepare(CPU)


def test_a_package_that_is_not_there_is_absent() -> None:
    with pytest.raises(peers.Absent, match="nothing cannot be imported: No module named 'no_such_module'"):
        peers.module("no_such_module", "nothing")


@pytest.mark.parametrize("dtype", dropout.DTYPES, ids=str)
@pytest.mark.parametrize("name", dropout.FORMS)
def test_the_dropout_family_is_compared_with_the_exact_result(name: str, dtype: torch.dtype) -> None:
    form = dropout.FORMS[name]
    assert list(dropout.prepare(form, (40, 64), dtype, False, CPU).works) == [FASTFT, dropout.EAGER]
    other_mask = dropout.Form(
        lambda *tensors: form.composed(lambda x, p: ours.dropout(x + 0, 2 * p), *tensors), form.composed, form.inputs, 1
    )
    with pytest.raises(AssertionError, match="dropout: fused and composed differ by"):
        dropout.prepare(other_mask, (40, 64), dtype, False, CPU)


# -- the command -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_json_names_machine_versions_and_commit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "out.json"
    assert shell.main(["bench", "--case", "tensors_10", "--quick", "--json", str(file)]) == 0
    result = json.loads(file.read_text(encoding="utf-8"))
    environment = result["environment"]
    assert environment["torch"] == torch.__version__ and environment["threads"] == torch.get_num_threads()
    assert set(environment) >= {"device", "device_type", "fastft", "commit", "python", "cpu_instruction_set"}
    assert result["copy_gb_per_s"] > 0 and result["rounds"] == command.QUICK_ROUNDS and result["skipped"] == {}
    case = result["cases"]["tensors_10"]
    assert list(case["against"]) == [steps.FUSED, steps.FOREACH]
    assert case["median_ms"] > 0 and case["axis"] == {"tensors": 10} and case["rounds"] == command.QUICK_ROUNDS
    printed = capsys.readouterr().out
    assert "plain step, 10 tensors of 4 float32" in printed and f"written to {file}" in printed


def test_an_absent_peer_is_in_table_and_json() -> None:
    case = small_case(nbytes=8e6, target=0.5)
    prepared = case.prepare(CPU)
    measured = harness.Measurement({FASTFT: [1e-3, 1e-3], "other": [1e-3, 1e-3]}, {FASTFT: 1, "other": 1})
    result = command.result_of(case, measured, prepared, CPU)
    assert result["absent"] == {"third": "not there"} and result["gb_per_s"] == 8.0
    first, last = command.table_rows(result)
    assert first.endswith("≤ 0.50 MISSED") and last.strip() == "third: not there"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--case", "plane"], "case: expected a name"),
        (["--json", "/no/such/folder/out.json"], "--json: expected a file in a folder that exists"),
    ],
)
def test_wrong_usage_measures_nothing(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert shell.main(["bench", *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(f"fastft bench: {said}") and not printed.out


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine can use CUDA")
def test_cuda_where_there_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert shell.main(["bench", "--device", "cuda"]) == 1
    assert "torch.cuda.is_available() is False" in capsys.readouterr().err


def test_the_command_is_given_its_options(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(bench, "run", lambda options: calls.append(vars(options)) or "")
    line = ["bench", "--case", "dropout", "--case", "step", "--quick", "--json", "f", "--device", "cuda"]
    assert shell.main(line) == 0
    assert shell.main(["bench"]) == 0
    assert calls == [
        {"case": ["dropout", "step"], "device": "cuda", "quick": True, "json": Path("f")},
        {"case": [], "device": "cpu", "quick": False, "json": None},
    ]
