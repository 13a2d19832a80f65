"""The retention report: its numbers, its intervals, its round trip and its plot."""

from __future__ import annotations

import dataclasses
import doctest
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fastft.retention
from fastft.retention import Estimate, RetentionReport, backward_transfer, hypervolume, pareto_front
from fastft.retention.report import DRAWS, resampled_means


def test_the_example_in_the_docs_runs() -> None:
    results = doctest.testmod(fastft.retention)
    assert results.attempted > 10
    assert results.failed == 0


def items(seed: int, n: int, share: float) -> np.ndarray[Any, np.dtype[np.bool_]]:
    return np.random.default_rng(seed).random(n) < share


def example() -> RetentionReport:
    """Per item: bool, integer and float scores, in arrays, tensors and lists."""
    report = RetentionReport(
        {"recall": items(0, 120, 0.6), "rank": torch.linspace(0.0, 0.5, 40, dtype=torch.bfloat16)},
        {"accuracy": torch.from_numpy(items(1, 80, 0.5))},
        resamples=300,
    )
    report.add(
        "plain",
        source={"recall": items(2, 120, 0.3), "rank": np.linspace(0, 0.25, 40, dtype=np.float32)},
        target={"accuracy": items(3, 80, 0.9)},
        chain=[[0.5, float("nan")], [0.25, 0.75]],
    )
    report.add(
        "anchored",
        source={"recall": items(4, 120, 0.5), "rank": [0.2] * 40},
        target={"accuracy": items(5, 80, 0.85).astype(np.int8)},
    )
    return report


def test_the_numbers_of_plain_scores_by_hand() -> None:
    report = RetentionReport({"recall": 0.25}, {"accuracy": 0.75})
    result = report.add("tuned", source={"recall": 0.2}, target={"accuracy": 0.875})
    change = result.source["recall"]
    assert change.before == Estimate(0.25)
    assert change.after == Estimate(0.2)
    assert change.retention is not None
    assert change.retention == Estimate(0.8)
    assert change.forgetting.value == pytest.approx(5.0)
    assert result.target["accuracy"].gain == Estimate(12.5)
    assert result.source_mean == Estimate(0.2)
    assert "80.0 %" in report.to_markdown()
    assert "[" not in report.to_markdown()


def test_scores_in_percent() -> None:
    report = RetentionReport({"recall": 25.0}, points=1.0)
    assert report.add("tuned", source={"recall": 20.0}).source["recall"].forgetting == Estimate(5.0)


def test_retention_of_nothing_is_unknown() -> None:
    report = RetentionReport({"recall": [0.0, 0.0]})
    change = report.add("tuned", source={"recall": [0.0, 1.0]}).source["recall"]
    assert change.retention is None
    assert "| - |" in report.to_markdown()
    # Here some resamples hold only zeros before: there is no interval of the ratio.
    report = RetentionReport({"recall": [0.0, 1.0]})
    retention = report.add("tuned", source={"recall": [0.0, 1.0]}).source["recall"].retention
    assert retention == Estimate(1.0)


def bootstrap(values: np.ndarray[Any, Any], role: int, position: int, n: int, resamples: int) -> Any:
    """The draws, one resample after the other."""
    rng = np.random.default_rng((0, role, position))
    return np.array([rng.integers(n, size=n) for _ in range(resamples)]), values.astype(np.float64)


def test_intervals_are_paired_percentiles() -> None:
    report = example()
    result = report.result("plain")
    before, after = items(0, 120, 0.6).astype(float), items(2, 120, 0.3).astype(float)
    indices, _ = bootstrap(before, 0, 0, 120, 300)
    lost = [100 * (before[i].mean() - after[i].mean()) for i in indices]
    kept = [after[i].mean() / before[i].mean() for i in indices]
    forgetting, retention = result.source["recall"].forgetting, result.source["recall"].retention
    assert retention is not None
    assert (forgetting.low, forgetting.high) == pytest.approx(tuple(np.percentile(lost, [2.5, 97.5])))
    assert (retention.low, retention.high) == pytest.approx(tuple(np.percentile(kept, [2.5, 97.5])))
    # Between methods too: what is equal item by item differs by nothing.
    both = RetentionReport({"recall": before}, resamples=100)
    both.add("one", source={"recall": after})
    both.add("other", source={"recall": after})
    assert both.difference("one", "other", "source", "recall") == Estimate(0.0, 0.0, 0.0, 0.0)
    other = report.difference("anchored", "plain", "source", "recall")
    third = items(4, 120, 0.5).astype(float)
    assert other.value == pytest.approx(100 * (third.mean() - after.mean()))
    assert other.low == pytest.approx(np.percentile([100 * (third[i] - after[i]).mean() for i in indices], 2.5))


def test_the_mean_over_evaluations_and_its_interval() -> None:
    report = example()
    after = items(2, 120, 0.3).astype(float), np.linspace(0, 0.25, 40, dtype=np.float32).astype(float)
    draws = [
        [values[i].mean() for i in bootstrap(values, 0, position, values.size, 300)[0]]
        for position, values in enumerate(after)
    ]
    mean = report.result("plain").source_mean
    assert mean.value == pytest.approx((after[0].mean() + after[1].mean()) / 2)
    assert mean.high == pytest.approx(np.percentile((np.array(draws[0]) + draws[1]) / 2, 97.5))
    # One evaluation without items: no interval of the mean.
    report = RetentionReport({"a": [0.0, 1.0, 1.0], "b": 0.5})
    result = report.add("x", source={"a": [1.0, 0.0, 1.0], "b": 0.5})
    assert result.source_mean.low is None
    assert result.source["a"].after.low is not None


def test_resampling_in_parts_is_resampling_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).normal(size=101)
    whole = resampled_means(values, 50, 3)
    assert DRAWS > 50 * 101
    monkeypatch.setattr("fastft.retention.report.DRAWS", 700)
    np.testing.assert_array_equal(resampled_means(values, 50, 3), whole)
    assert not np.array_equal(resampled_means(values, 50, 4), whole)


def test_global_random_state_is_left_alone() -> None:
    np.random.seed(1)
    before = np.random.get_state()[1].copy()  # type: ignore[union-attr, index]
    first, second = example().result("plain"), example().result("plain")
    assert first == second
    np.testing.assert_array_equal(np.random.get_state()[1], before)  # type: ignore[index]


@pytest.mark.slow
def test_intervals_cover_what_they_promise() -> None:
    """Simulated: of 400 paired experiments, about 90 % of the 90 % intervals hold the true difference."""
    rng = np.random.default_rng(7)
    covered = 0
    for trial in range(400):
        # 0.7 before; of those, 0.8 are kept, and 0.2 of the others are new: the true loss is 8 points.
        before = rng.random(150) < 0.7
        after = np.where(before, rng.random(150) < 0.8, rng.random(150) < 0.2)
        report = RetentionReport({"s": before}, confidence=0.9, resamples=400, seed=trial)
        forgetting = report.add("m", source={"s": after}).source["s"].forgetting
        assert forgetting.low is not None and forgetting.high is not None
        covered += forgetting.low <= 8.0 <= forgetting.high
    assert 0.86 <= covered / 400 <= 0.94  # 2.7 standard errors


def test_a_paired_difference_is_known_better_than_either_mean() -> None:
    rng = np.random.default_rng(0)
    a = rng.random(1000) < 0.5
    b = a.copy()
    b[:30] = ~b[:30]
    report = RetentionReport({"s": a}, resamples=4000, points=1.0)
    difference = report.add("b", source={"s": b}).source["s"].forgetting
    assert difference.value == pytest.approx(a.mean() - b.mean())
    # The bootstrap's standard errors are those of the textbook, but for the chance of 4,000 draws.
    flips = np.where(a[:30], 1.0, -1.0)
    whole = np.concatenate([flips, np.zeros(970)])
    assert difference.standard_error == pytest.approx(whole.std(ddof=1) / 1000**0.5, rel=0.05)
    alone = report.score("source", "s").standard_error
    assert alone == pytest.approx(a.std(ddof=1) / 1000**0.5, rel=0.05)
    assert difference.standard_error is not None and alone is not None
    assert difference.standard_error < alone / 2
    again = report.difference(None, "b", "source", "s")
    assert dataclasses.astuple(again) == pytest.approx(dataclasses.astuple(difference))


# -- several training runs -----------------------------------------------------------------------------------


def seeded(seeds: int = 3, n: int = 60) -> tuple[Any, Any, Any]:
    """Scores of items before, and of a method's runs [seeds, n] on source and target items."""
    rng = np.random.default_rng(3)
    return rng.random(n) < 0.6, rng.random((seeds, n)) < 0.4, rng.random((seeds, 40)) < 0.8


def test_several_seeds_are_drawn_anew_with_the_items() -> None:
    before, source, target = seeded()
    report = RetentionReport({"s": before}, {"t": target[0]}, resamples=200)
    result = report.add("m", source={"s": source}, target={"t": torch.from_numpy(target)})
    assert result.seeds == 3
    change = result.source["s"]
    assert change.after.value == pytest.approx(source.mean())
    assert change.retention is not None and change.retention.value == pytest.approx(source.mean() / before.mean())
    # One resample after the other: the same items for all, and of the method three of its runs.
    items, _ = bootstrap(before, 0, 0, 60, 200)
    runs = np.random.default_rng((0, 2, *b"m")).integers(3, size=(3, 200)).T
    after = [source[chosen][:, drawn].mean() for chosen, drawn in zip(runs, items, strict=True)]
    kept = [score / before[drawn].mean() for score, drawn in zip(after, items, strict=True)]
    lost = [100 * (before[drawn].mean() - score) for score, drawn in zip(after, items, strict=True)]
    assert (change.after.low, change.after.high) == pytest.approx(tuple(np.percentile(after, [2.5, 97.5])))
    assert change.after.standard_error == pytest.approx(np.std(after))
    assert (change.retention.low, change.retention.high) == pytest.approx(tuple(np.percentile(kept, [2.5, 97.5])))
    assert (change.forgetting.low, change.forgetting.high) == pytest.approx(tuple(np.percentile(lost, [2.5, 97.5])))
    # In the target the same runs are drawn, since a run has both scores.
    items, _ = bootstrap(target, 1, 0, 40, 200)
    after = [target[chosen][:, drawn].mean() for chosen, drawn in zip(runs, items, strict=True)]
    assert report.score("target", "t", "m").low == pytest.approx(np.percentile(after, 2.5))


def test_seeds_of_different_methods_are_independent_and_their_items_are_not() -> None:
    before, source, _ = seeded()
    report = RetentionReport({"s": before}, resamples=300)
    report.add("m", source={"s": source})
    report.add("n", source={"s": source})
    report.add("same runs", source={"s": np.stack([source[0]] * 3)})
    report.add("one run", source={"s": source[0]})
    apart = report.difference("m", "n", "source", "s")
    assert apart.value == 0.0 and apart.is_tie and apart.standard_error is not None and apart.standard_error > 0.0
    # Runs that do not differ are as one.
    difference = report.difference("same runs", "one run", "source", "s")
    assert dataclasses.astuple(difference) == pytest.approx((0.0, 0.0, 0.0, 0.0), abs=1e-9)


def test_one_seed_is_as_none() -> None:
    before, source, _ = seeded()
    report = RetentionReport({"s": before})
    one, other = report.add("a", source={"s": source[:1]}), report.add("b", source={"s": source[0]})
    assert one.seeds == other.seeds == 1 and one.source == other.source


@pytest.mark.slow
def test_intervals_cover_training_too() -> None:
    """Simulated: how often the 90 % interval of a difference between two methods holds the true one, 0.

    Training moves each run's level by ± 6 points, more than the choice of items does. An interval over items alone is
    then far too narrow; over items and 20 seeds it is right but for √(19/20).
    """
    rng = np.random.default_rng(11)
    covered = {20: 0, 1: 0}
    for trial in range(300):
        level = rng.random(100)  # of items, so that runs agree on which are hard
        runs = [level < 0.6 + 0.06 * rng.standard_normal((20, 1)) for _ in range(2)]
        for seeds in covered:
            report = RetentionReport({"s": level < 0.7}, confidence=0.9, resamples=300, seed=trial)
            for name, scores in zip("ab", runs, strict=True):
                report.add(name, source={"s": scores[:seeds]})
            covered[seeds] += report.difference("a", "b", "source", "s").is_tie
    assert 0.85 <= covered[20] / 300 <= 0.95
    assert covered[1] / 300 < 0.7


def test_a_report_of_seeds_says_so_and_travels_through_json(tmp_path: Path) -> None:
    before, source, target = seeded()
    report = RetentionReport({"s": before}, {"t": target[0]}, resamples=100)
    report.add("one", source={"s": source[0]}, target={"t": target[0]})
    assert "they cover the choice of items, not the randomness of training" in str(report)
    report.add("three", source={"s": source}, target={"t": target})
    lines = str(report).splitlines()
    assert lines[0].startswith("| method | seeds | s |")
    assert [line.split(" | ")[1] for line in lines[2:5]] == ["", "1", "3"]
    assert "and the randomness of training where there are several seeds" in lines[-1]
    again = RetentionReport.from_json(report.to_json())
    assert again.to_json() == report.to_json() and again.results == report.results
    pytest.importorskip("matplotlib")
    report.write(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"report.md", "report.json", "plot.png"}
    assert (tmp_path / "report.md").read_text(encoding="utf-8") == f"{report}\n"
    assert RetentionReport.from_json((tmp_path / "report.json").read_text(encoding="utf-8")).results == report.results


def test_without_targets_no_plot_is_written(tmp_path: Path) -> None:
    RetentionReport({"s": 0.5}).write(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"report.md", "report.json"}


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        (np.ones((2, 60)), np.ones((3, 40)), r"expected as many seeds in all .* \{'source: s': 2, 'target: t': 3\}"),
        (np.ones((2, 60)), np.ones(40), "expected as many seeds in all evaluations"),
        (np.ones((2, 59)), np.ones((2, 40)), "source: s: expected the same items as before, 60 of them, got 59"),
        (np.ones((1, 2, 60)), np.ones(40), r"source: s: .*\[items\] or \[seeds, items\], got shape \[1, 2, 60\]"),
        (np.ones((0, 60)), np.ones(40), r"got shape \[0, 60\]"),
    ],
)
def test_bad_seeds(source: Any, target: Any, message: str) -> None:
    report = RetentionReport({"s": np.ones(60)}, {"t": np.ones(40)})
    with pytest.raises(ValueError, match=message):
        report.add("m", source={"s": source}, target={"t": target})
    assert report.names == ()


def test_a_plain_number_goes_with_any_number_of_seeds() -> None:
    report = RetentionReport({"s": np.ones(60)}, {"t": 0.5})
    result = report.add("m", source={"s": np.ones((2, 60))}, target={"t": 0.75})
    assert result.seeds == 2 and result.target["t"].gain == Estimate(25.0)


def test_estimates_as_text() -> None:
    assert Estimate(0.2419, 0.2271, 0.2583).show() == "0.242 [0.227, 0.258]"
    assert Estimate(0.031, 0.021, 0.04).show(100, 1, sign=True) == "+3.1 [+2.1, +4.0]"
    assert Estimate(-0.0001).show(unit=" %", digits=1) == "0.0 %"
    assert not Estimate(0.0).is_tie and Estimate(0.0, -0.1, 0.0).is_tie and not Estimate(0.2, 0.1, 0.3).is_tie


def test_backward_transfer_by_hand() -> None:
    # After the last task: 0.6 on the first (was 0.9) and 0.8 on the second (was 0.7).
    chain = [[0.9, 0.1, 0.1], [0.7, 0.7, 0.2], [0.6, 0.8, 1.0]]
    assert backward_transfer(chain) == pytest.approx(((0.6 - 0.9) + (0.8 - 0.7)) / 2)
    assert backward_transfer(torch.tensor(chain, dtype=torch.float64)) == pytest.approx(-0.1)
    assert example().result("plain").backward_transfer == pytest.approx(-25.0)
    assert example().result("anchored").backward_transfer is None
    with pytest.raises(ValueError, match=r"chain: expected a square matrix .* got shape \[1, 2\]"):
        backward_transfer([[1.0, 2.0]])
    with pytest.raises(ValueError, match="chain: expected finite scores"):
        backward_transfer([[float("nan"), 0.0], [0.5, 0.5]])


def test_pareto_front_against_the_definition() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        points = [tuple(map(float, p)) for p in rng.integers(0, 6, size=(8, 2))]
        front = pareto_front(points)  # type: ignore[arg-type]
        expected = {
            p
            for p in points
            if not any(q[0] >= p[0] and q[1] >= p[1] and q != p for q in points)
        }  # fmt: skip
        assert {points[i] for i in front} == expected
        assert [points[i][0] for i in front] == sorted({p[0] for p in expected})


def test_hypervolume_against_counting_cells() -> None:
    rng = np.random.default_rng(1)
    for _ in range(50):
        points = [(float(x), float(y)) for x, y in rng.integers(0, 9, size=(6, 2))]
        reference = (float(rng.integers(0, 5)), float(rng.integers(0, 5)))
        cells = sum(
            any(x + 1 <= p[0] and y + 1 <= p[1] for p in points)
            for x in range(int(reference[0]), 9)
            for y in range(int(reference[1]), 9)
        )
        assert hypervolume(points, reference) == pytest.approx(cells)
    assert hypervolume([], (0.0, 0.0)) == 0.0


def test_hypervolume_of_a_report() -> None:
    report = RetentionReport({"s": 0.5}, {"t": 0.6})
    report.add("a", source={"s": 0.4}, target={"t": 0.8})
    report.add("b", source={"s": 0.2}, target={"t": 0.9})
    report.add("worse", source={"s": 0.1}, target={"t": 0.85})
    assert report.hypervolume() == pytest.approx(0.2 * 0.4 + 0.1 * 0.2)
    assert report.hypervolume(["b"]) == pytest.approx(0.3 * 0.2)
    assert report.hypervolume(reference=(0.7, 0.3)) == pytest.approx(0.1 * 0.1)


def test_the_round_trip_through_json() -> None:
    report = example()
    text = report.to_json()
    again = RetentionReport.from_json(text)
    assert again.to_json() == text
    assert again.results == report.results
    assert again.to_markdown() == report.to_markdown()
    loaded = json.loads(text)
    assert set(loaded["source"]["recall"]) == {0, 1}
    assert loaded["results"][0]["source"]["recall"]["after"]["value"] == report.score("source", "recall", "plain").value
    with pytest.raises(ValueError, match=r"from_json: expected the format 'fastft\.retention 1', got 'other'"):
        RetentionReport.from_json('{"format": "other"}')


def test_the_table() -> None:
    lines = str(example()).splitlines()
    assert lines[0] == (
        "| method | recall | retention | forgetting, points | rank | retention | forgetting, points "
        "| accuracy | gain, points | backward transfer |"
    )
    assert [line.count("|") for line in lines[:5]] == [11] * 5
    assert lines[2].startswith("| before (base model, linear probe) |")
    assert lines[3].split("|")[-2].strip() == "-25.0"
    assert "95% bootstrap intervals" in lines[-1]
    change = example().result("plain").source["recall"]
    assert f"{change.after.value:.3f} [{change.after.low:.3f}, {change.after.high:.3f}]" in lines[3]
    report = RetentionReport({"a|b": 1.0})
    assert "a\\|b" in str(report)


def test_the_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    example().plot(tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    # Without intervals, and with nothing but the model before.
    RetentionReport({"s": 0.5}, {"t": 0.6}).plot(tmp_path / "few.png")
    with pytest.raises(ValueError, match="target: this report has no target evaluations"):
        RetentionReport({"s": 0.5}).plot(tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": {}}, "source: expected at least one evaluation"),
        ({"source": {"s": []}}, r"source: s: expected a number, or a score for each item, got shape \[0\]"),
        ({"source": {"s": np.ones((2, 2))}}, r"source: s: .* got shape \[2, 2\]"),
        ({"source": {"s": [1.0, float("nan")]}}, "source: s: expected finite scores, got 1 that are not"),
        ({"source": {"s": "high"}}, "source: s: expected a number, .* got 'high'"),
        ({"source": {"s": 1.0}, "target": {"t": float("inf")}}, "target: t: expected finite scores"),
        ({"source": {"s": 1.0}, "confidence": 95}, "confidence: expected a number between 0 and 1, got 95"),
        ({"source": {"s": 1.0}, "resamples": 0}, "resamples: expected an integer >= 1, got 0"),
        ({"source": {"s": 1.0}, "points": 0.0}, "points: expected a number > 0"),
    ],
)
def test_bad_reports(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RetentionReport(**options)


def test_bad_rows_leave_the_report_as_it_was() -> None:
    report = example()
    before = report.to_json()
    good: dict[str, Any] = {
        "source": {"recall": np.ones(120), "rank": np.ones(40)},
        "target": {"accuracy": np.ones(80)},
    }
    for name, change, message in [
        ("plain", {}, "name: 'plain' is in the report already"),
        ("base model, linear probe", {}, "is in the report already"),
        ("new", {"source": {"recall": np.ones(120)}}, r"source: expected the evaluations \['rank', 'recall'\]"),
        ("new", {"target": None}, r"target: expected the evaluations \['accuracy'\], got \[\]"),
        ("new", {"target": {"accuracy": np.ones(79)}}, "target: accuracy: expected the same items .* 80 .* got 79"),
        ("new", {"chain": [[1.0]]}, "chain: expected a square matrix"),
    ]:
        with pytest.raises(ValueError, match=message):
            report.add(name, **{**good, **change})
    assert report.to_json() == before
    with pytest.raises(KeyError, match="nobody: not in the report"):
        report.result("nobody")
    report.add("new", **good)
    assert report.names == ("plain", "anchored", "new")


def test_scores_are_copied() -> None:
    before, after = np.ones(4), torch.ones(4, dtype=torch.float64)
    report = RetentionReport({"s": before})
    report.add("m", source={"s": after})
    text = report.to_json()
    before[:] = 0.0
    after.zero_()
    assert report.to_json() == text
