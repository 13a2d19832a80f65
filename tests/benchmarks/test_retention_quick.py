"""The retention benchmark: every method on the quick problem, and the reports from its records."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from needs import needs

ROOT = Path(__file__).parents[2]

pytestmark = [pytest.mark.slow, needs("peft", "sklearn")]


@pytest.fixture(scope="module", autouse=True)
def importable() -> Any:
    """``benchmarks`` is a folder of the repository and in no wheel."""
    sys.path.append(str(ROOT))
    yield
    sys.path.remove(str(ROOT))


@pytest.fixture(scope="module")
def found(importable: Any, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    from benchmarks.retention import records
    from benchmarks.retention.quick import quick

    folder = tmp_path_factory.mktemp("results")
    with torch.random.fork_rng(devices=[]):
        quick(folder)
    return records.load(folder / "digits.jsonl")


def score(found: list[dict[str, Any]], method: str, role: str, alpha: str = "1") -> float:
    """Of the first record of that method."""
    record = next(r for r in found if r["settings"]["method"] == method)
    return float(record["scores"][alpha][role]["mean"])


def test_every_ingredient_is_tried_and_learns(found: list[dict[str, Any]]) -> None:
    from benchmarks.retention.methods import INGREDIENTS

    assert {name for record in found for name in record["settings"]["ingredients"]} == set(INGREDIENTS)
    probe = score(found, "probe", "target", "0")
    for record in found:
        if record["settings"]["method"] != "probe":
            assert record["scores"]["1"]["target"]["mean"] > probe, record["settings"]
            assert record["training"]["last_loss"] < record["training"]["first_loss"], record["settings"]


def test_full_fine_tuning_forgets_and_its_cures_keep(found: list[dict[str, Any]]) -> None:
    before, full = score(found, "probe", "source", "0"), score(found, "full", "source")
    assert full < before - 0.05
    for cure in ("anchor", "distill", "replay"):
        assert score(found, cure, "source") > full + 0.04, cure
    assert score(found, "fresh_head", "source") < full  # features are bent to fit a random head
    assert score(found, "full", "source", "0.6") > full + 0.04  # WiSE-FT


def test_models_leave_as_they_came(importable: Any) -> None:
    from benchmarks.retention.digits import Digits
    from benchmarks.retention.methods import Method, blended, fine_tune

    problem = Digits()
    for ingredients in ({"lora": 4}, {"mixout": 0.5}, {"gradual": 0.5, "layer_decay": 0.5}, {"fresh_head": 1}):
        method = Method(1e-2, ingredients)
        model = fine_tune(problem, method, epochs=1, seed=0).model
        assert not model.training
        start = problem.start().state_dict()
        trained = model.state_dict()
        assert list(trained) == list(start)
        moved = [name for name in start if not torch.equal(start[name], trained[name])]
        assert "encoder.2.mix.weight" in moved
        halfway = blended(problem, model, 0.5, method).state_dict()
        for name, value in start.items():
            stays = "fresh_head" in ingredients and name.startswith("head")  # it has nothing to go back to
            expected = trained[name] if stays else (value + trained[name]) / 2
            torch.testing.assert_close(halfway[name], expected)


def test_what_is_mixed_in_does_not_change_the_batches(importable: Any) -> None:
    from benchmarks.retention.digits import Digits
    from benchmarks.retention.methods import Method, fine_tune

    problem = Digits()
    plain = fine_tune(problem, Method(1e-2), epochs=1, seed=0)
    barely = fine_tune(problem, Method(1e-2, {"distill": 1e-9}), epochs=1, seed=0)
    assert barely.last_loss == pytest.approx(plain.last_loss, rel=1e-4)


def test_all_new_batches_stay_between_the_old_ones(importable: Any) -> None:
    from benchmarks.retention.digits import Digits
    from benchmarks.retention.methods import Method, fine_tune

    problem = Digits()
    new = len(problem.batches(1, 0))
    steps = fine_tune(problem, Method(1e-2, {"replay_mixer": 0.25}), epochs=1, seed=0).steps
    assert abs(steps - new / 0.75) < 1


@pytest.mark.parametrize("name", ["token_dropout", "span_masking", "synonyms"])
def test_an_augmentation_differs_by_epoch_and_leaves_the_batch_as_it_was(importable: Any, name: str) -> None:
    from benchmarks.retention.digits import Digits
    from benchmarks.retention.methods import Method, augmentation

    problem = Digits()
    augment = augmentation(problem, Method(1e-2, {name: 0.3}), seed=0)
    inputs, _ = problem.batches(1, 0)[0]
    before = inputs.clone()
    first, again, later = augment(inputs, 0), augment(inputs, 0), augment(inputs, 1)
    assert torch.equal(inputs, before) and torch.equal(first, again)
    assert not torch.equal(first, before) and not torch.equal(first, later)
    changed = first[first != before]
    assert (changed == 0).all() if name != "synonyms" else (changed > 0).all()


@pytest.mark.parametrize("ingredients", [{"ancor": 1.0}, {"anchor": 0.0}])
def test_a_wrong_method_is_refused(importable: Any, ingredients: dict[str, float]) -> None:
    from benchmarks.retention.methods import Method

    with pytest.raises(ValueError, match=r"expected"):
        Method(1e-3, ingredients)


def test_records_survive_what_a_killed_run_leaves(importable: Any, tmp_path: Path) -> None:
    from benchmarks.retention import records

    path = tmp_path / "some.jsonl"
    records.append(path, {"key": "a"})
    with path.open("a") as file:
        file.write('{"key": "cut o')
    records.append(path, {"key": "b"})
    assert [record["key"] for record in records.load(path)] == ["a", "b"]
    items = torch.rand(2001) < 0.3
    packed = records.pack(items)
    assert torch.equal(records.unpack(packed), items)
    assert packed["standard_error"] == pytest.approx(items.double().std().item() / 2001**0.5)


def test_the_rows_of_each_split_are_apart(importable: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the real model and data, with made-up vectors: the true ones take a minute."""
    from benchmarks.retention import minilm

    monkeypatch.setattr(minilm.MiniLM, "known", lambda self, texts: torch.randn(len(texts), 384))
    tuning, testing = minilm.MiniLM(64, "validation"), minilm.MiniLM(None, "test")
    texts = {
        name: {review.text for review in reviews}
        for name, reviews in {
            "tuning": tuning.train,
            "validation": tuning.test,
            "training": testing.train,
            "test": testing.test,
        }.items()
    }
    assert [len(part) for part in texts.values()] == [64, 2000, 8070, 2000]
    assert texts["tuning"] | texts["validation"] <= texts["training"]
    assert not texts["tuning"] & texts["validation"] and not texts["training"] & texts["test"]
    pools = [*tuning.pools, *testing.pools, tuning.replayed]
    assert [len(pool) for pool in pools[:-1]] == [1000] * 5
    assert len({sense for pool in pools for sense in pool}) == sum(map(len, pools))
    # Batches of like length in tokens: hardly any padding.
    inputs = [inputs["attention_mask"] for inputs, _ in minilm.MiniLM(1024, "validation").batches(1, 0)]
    assert sum(mask.sum().item() for mask in inputs) > 0.9 * sum(mask.numel() for mask in inputs)
    with pytest.raises(ValueError, match=r"rows: expected at most 6070 with split 'validation', got 7000"):
        minilm.MiniLM(7000, "validation")


def test_a_run_is_claimed_by_one(importable: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.retention import records

    monkeypatch.setattr(records, "WORK", tmp_path)
    with records.claim("x") as first, records.claim("x") as second, records.claim("y") as other:
        assert (first, second, other) == (True, False, True)
    with records.claim("x") as again:
        assert again


def test_command_lines_say_all_of_the_settings(importable: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.retention import plan, run

    seen = []
    monkeypatch.setattr(run, "run_once", lambda settings, results, alphas: seen.append(settings))
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    planned = list(plan.tuning()) + [settings.for_test(2) for settings in plan.GRIDS["distill + anchor"]]
    planned += plan.data_runs()
    for settings in planned:
        run.main(settings.arguments())
    assert seen == planned
    assert [settings.key for settings in seen] == [settings.key for settings in planned]
    assert len({settings.key for settings in planned}) == len(planned)


def test_every_method_has_the_same_budget(importable: Any) -> None:
    from benchmarks.retention import plan

    assert {len({s.key for s in grid}) for grid in plan.GRIDS.values()} == {plan.GRID_SIZE}


def test_what_keeps_most_within_a_point_is_chosen(importable: Any) -> None:
    from benchmarks.retention import plan

    def record(settings: Any, scores: dict[str, tuple[float, float]]) -> dict[str, Any]:
        means = {a: {"target": {"mean": t}, "source": {"mean": s}} for a, (t, s) in scores.items()}
        return {"key": settings.key, "scores": means}

    full, anchor = plan.GRIDS["full FT"], plan.GRIDS["anchor"]
    tuned = [
        record(full[0], {"1": (0.870, 0.10), "0.8": (0.859, 0.24)}),
        record(full[1], {"1": (0.862, 0.20), "0.8": (0.861, 0.22)}),
        record(anchor[0], {"1": (0.850, 0.24), "0.8": (0.855, 0.10)}),
    ]
    assert [(c.settings, c.alpha) for c in plan.choices("full FT", tuned)] == [
        (full[0], "1"),
        (full[1], "1"),
        (full[1], "0.8"),
    ]
    # Nothing is within a point: the most accurate.
    assert [(c.settings, c.alpha) for c in plan.choices("anchor", tuned)] == [(anchor[0], "1"), (anchor[0], "0.8")]
    planned = list(plan.full_runs(tuned, seeds=(0, 1)))
    assert planned == [
        plan.PROBES[1],
        *(settings.for_test(seed) for seed in (0, 1) for settings in (full[0], full[1], anchor[0])),
    ]


def test_the_report_is_made_of_records_alone(importable: Any, tmp_path: Path) -> None:
    from benchmarks.retention import plan, records, report

    generator = torch.Generator().manual_seed(0)
    easy = {"target": torch.rand(400, generator=generator), "source": torch.rand(600, generator=generator)}

    def record(settings: Any, scores: dict[str, tuple[float, float]]) -> dict[str, Any]:
        packed = {
            alpha: {"target": records.pack(easy["target"] < t), "source": records.pack(easy["source"] < s)}
            for alpha, (t, s) in scores.items()
        }
        return {"key": settings.key, "settings": {}, "training": {"cpu_seconds": 7.0}, "scores": packed}

    full, distill = plan.GRIDS["full FT"][0], plan.GRIDS["distill, both"][0]
    recipe = plan.GRIDS["anchor + gradual"][0]
    tuned = [
        record(plan.PROBES[0], {"0": (0.7, 0.5)}),
        record(full, {"1": (0.9, 0.2), "0.8": (0.895, 0.4)}),
        record(distill, {"1": (0.9, 0.49)}),
        record(recipe, {"1": (0.9, 0.48)}),
    ]
    tested = [
        record(plan.PROBES[1], {"0": (0.7, 0.5)}),
        *(record(full.for_test(seed), {"1": (0.9, 0.2 + seed / 100), "0.8": (0.9, 0.4)}) for seed in (0, 1)),
        record(distill.for_test(0), {"1": (0.9, 0.495)}),
        record(recipe.for_test(0), {"1": (0.9, 0.49)}),
    ]
    text = report.document(tuned, tested, tmp_path)
    assert "**distill, both** kept the most" in text.replace("\n", " ")
    assert "The goal was to keep 97% at a point at most: it is reached" in text.replace("\n", " ")
    said = text.split("## Tuning")[0].replace("\n", " ")
    ahead = float((easy["source"] < 0.49).double().mean() - (easy["source"] < 0.4).double().mean())
    assert re.search(rf"Against full FT \+ WiSE \(.*\) that is \+{100 * ahead:.1f} \[.*\] points of recall and ", said)
    assert "+0.0 [+0.0, +0.0] of accuracy (tie)" in said and "LP-FT" not in said
    rows = {line.split(" | ")[0]: line.split(" | ") for line in text.split("## Tuning")[0].splitlines()}
    assert rows["| full FT, most accurate"][2] == "2"
    assert rows["| distill, both"][2] == "1"
    kept = float(rows["| distill, both"][6].split()[0])
    source = [float((easy["source"] < s).double().mean()) for s in (0.495, 0.5)]
    assert kept == pytest.approx(100 * source[0] / source[1], abs=0.051)
    assert (tmp_path / "test.png").stat().st_size > 10_000


def test_the_report_on_data_says_what_differs(importable: Any, tmp_path: Path) -> None:
    from benchmarks.retention import data_report, plan, records

    generator = torch.Generator().manual_seed(0)
    easy = {"target": torch.rand(400, generator=generator), "source": torch.rand(600, generator=generator)}

    def record(settings: Any, alpha: str, target: float, source: float) -> dict[str, Any]:
        scores = {"target": records.pack(easy["target"] < target), "source": records.pack(easy["source"] < source)}
        environment = {"device": "Some CPU", "torch": "2.13.0", "commit": "abcdef"}
        training = {"cpu_seconds": 7.0, "steps": 85 if "replay_mixer" in settings.ingredients else 64}
        return {
            "key": settings.key,
            "training": training,
            "scores": {alpha: scores},
            "environment": environment,
        }

    reached = {"neither": (0.8, 0.2), "25 % replay": (0.8, 0.3), "token dropout": (0.7, 0.2)}
    found = [record(plan.data_settings(None), "0", 0.6, 0.4)]
    for name, (target, source) in reached.items():
        found += [record(plan.data_settings(name, s), "1", target + s / 100, source) for s in plan.SEEDS]
    results = data_report.DataResults(found)
    rows = {line.split(" | ")[0].removeprefix("| "): line.split(" | ") for line in results.to_markdown().splitlines()}
    by_seed = torch.stack([(easy["target"] < 0.8 + seed / 100).double().mean() for seed in plan.SEEDS])
    said = f"{by_seed.mean():.3f} ± {by_seed.std() / len(by_seed) ** 0.5:.3f} ["
    assert rows["neither"][2].startswith(said) and rows["neither"][3] == ""
    assert rows["25 % replay"][3].endswith("(tie)") and "(tie)" not in rows["25 % replay"][6]
    assert rows["before fine-tuning"][1] == "" and rows["neither"][1] == "3"
    assert results.verdict("source") == "higher with 25 % replay; a tie with token dropout"
    assert results.verdict("target") == "lower with token dropout; a tie with 25 % replay"
    assert "1 epoch, lr 0.0003, 3 seeds; 64 steps, 85 with 25 % replay" in results.circumstances()
    results.plot(tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_labels_are_spread(importable: Any) -> None:
    from benchmarks.retention.data_report import spread

    assert spread([0.1, 0.5], 0.2) == [0.1, 0.5]
    assert spread([0.1, 0.1, 0.9, 0.95], 0.2) == pytest.approx([0.1, 0.3, 0.8, 1.0])


def test_a_chain_says_what_each_stage_did_to_the_others(importable: Any) -> None:
    from dataclasses import asdict

    from benchmarks.retention import chain_report, plan, records, report

    generator = torch.Generator().manual_seed(0)
    easy = {name: torch.rand(n, generator=generator) for name, n in (("movie", 400), ("amazon", 100), ("source", 600))}

    def hits(name: str, level: float) -> torch.Tensor:
        return easy[name] < level

    def stage(target: str, **levels: float) -> dict[str, Any]:
        packed = {name: records.pack(hits(name, level)) for name, level in levels.items()}
        return {"target": target, "scores": packed, "cpu_seconds": 5.0}

    record = {
        "settings": asdict(plan.Settings.of(2e-4, {"anchor": 30, "gradual": 0.5}, split="test")),
        "stages": [
            stage("movie", movie=0.9, source=0.5),
            stage("amazon", movie=0.8, amazon=0.9, source=0.45),
            stage("movie", movie=0.95, amazon=0.9, source=0.4),
        ],
    }
    base = {"target": records.pack(hits("movie", 0.7)), "source": records.pack(hits("source", 0.5))}
    probe = report.result(plan.Choice("probe", plan.PROBES[1], "0"), [{"scores": {"0": base}, "training": {}}])
    assert probe is not None
    head, _, row = (line.strip("| ").split(" | ") for line in chain_report.chain_table([record], probe))
    cells = dict(zip(head, row, strict=True))
    means = {
        (name, level): hits(name, level).double().mean().item() for name in easy for level in (0.4, 0.8, 0.9, 0.95)
    }
    assert cells["method"] == "anchor + gradual" and cells["CPU s"] == "15"
    assert cells["movie accuracy"] == " → ".join(f"{means['movie', level]:.3f}" for level in (0.9, 0.8, 0.95))
    lost, low, high = map(float, re.findall(r"[+-][\d.]+", cells["Amazon on movie, points"]))
    assert lost == pytest.approx(100 * (means["movie", 0.8] - means["movie", 0.9]), abs=0.051)
    assert low < lost < high < 0
    assert cells["movie on Amazon, points"] == "+0.0 [+0.0, +0.0] (tie)"
    assert cells["kept after movie, %"] == "100.0 [100.0, 100.0]"
    kept = float(cells["kept after movie again, %"].split()[0])
    assert kept == pytest.approx(100 * means["source", 0.4] / hits("source", 0.5).double().mean().item(), abs=0.051)
