"""``fastft finetune`` from end to end: real files, a real model, and tiny ones."""

from __future__ import annotations

import json
import math
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import finetune_cases as cases
import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from fastft.commands import finetune, shell

pytestmark = pytest.mark.slow

Options = dict[str, Any]


def report_of(output: Path) -> Any:
    return json.loads((output / "report.json").read_text(encoding="utf-8"))


def rows_of(path: Path) -> list[dict[str, str]]:
    import csv

    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def classified(output: Path, rows: list[dict[str, str]], max_length: int) -> tuple[float, float]:
    """(accuracy, loss) of the model in a folder, as its user computes them."""
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(output), AutoTokenizer.from_pretrained(output)
    texts = [row["text"] for row in rows]
    inputs = tokenizer(texts, padding=True, truncation=True, max_length=max_length, return_tensors="pt")
    with torch.no_grad():
        logits = model.eval()(**inputs).logits
    labels = torch.tensor([model.config.label2id[row["label"]] for row in rows])
    named = [model.config.id2label[i] for i in logits.argmax(1).tolist()]
    right = [name == row["label"] for name, row in zip(named, rows, strict=True)]
    return sum(right) / len(right), cross_entropy(logits, labels).item()


@pytest.fixture(scope="module")
def minilm_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, cases.Done, list[dict[str, str]]]:
    """A short run of the real MiniLM with all that keeps and opens: (output, what was said, evaluation rows)."""
    folder = tmp_path_factory.mktemp("minilm")
    rows = cases.review_rows(64)
    done = cases.finetune(
        model=cases.minilm(folder / "model"),
        train=cases.write_rows(folder / "train.tsv.gz", rows[:40]),
        eval=cases.write_rows(folder / "eval.parquet", rows[40:]),
        task="text-classification",
        text_column="text",
        label_column="label",
        output=folder / "a" / "tuned",
        steps=6,
        checkpoint_every=3,
        batch_size=8,
        lr=1e-3,
        max_length=12,
        anchor_decay=50,
        unfreeze=["gradual", "every=2"],
        layer_decay=0.9,
        rewarm_steps=1,
        fuse_dropout=True,
        keep="last",
    )
    assert done.status == 0, done.err
    return folder / "a" / "tuned", done, rows[40:]


def test_the_output_loads_and_scores_what_was_reported(minilm_run: tuple[Path, cases.Done, Any]) -> None:
    output, _, rows = minilm_run
    report = report_of(output)
    accuracy, loss = classified(output, rows, max_length=12)
    assert report["after"]["accuracy"] == pytest.approx(accuracy)
    assert report["after"]["loss"] == pytest.approx(loss, rel=1e-5)
    assert report["after"]["loss"] != pytest.approx(report["before"]["loss"], rel=1e-3)
    config = json.loads((output / "config.json").read_text())
    assert config["id2label"] == {"0": "negative", "1": "positive"}
    assert config["label2id"] == {"negative": 0, "positive": 1}
    assert {p.name for p in output.iterdir()} == {
        "config.json", "model.safetensors", "plot.png", "report.json", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert len({p.stat().st_mode for p in output.iterdir()}) == 1


def test_the_tokenizer_is_saved_without_this_run_s_max_length(minilm_run: tuple[Path, cases.Done, Any]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(minilm_run[0])
    assert len(tokenizer("a film " * 30)["input_ids"]) == 62


def test_the_table_says_what_the_report_says(minilm_run: tuple[Path, cases.Done, Any]) -> None:
    output, done, rows = minilm_run
    report = report_of(output)
    lines = done.out.splitlines()
    assert lines[0].split() == [str(len(rows)), "evaluation", "rows", "before", "after"]
    for name in ("accuracy", "loss"):
        (line,) = [line for line in lines if line.startswith(f"{name} ")]
        assert line.split()[1:] == [f"{report[when][name]:.3f}" for when in ("before", "after")]
    for name, moved in report["drift"]["layers"].items():
        (line,) = [line for line in lines if line.startswith(f"{name} ")]
        assert line.endswith(f"{100 * moved:.2f} %")
    assert f"Moved from pre-trained: {100 * report['drift']['all']:.2f} %" in done.out
    assert "Kept: the model after the last step, 6." in done.out
    assert str(output) in lines[-1]
    assert "new: 'classifier.weight', 'classifier.bias'" in done.err
    assert "step 3 of 6: accuracy" in done.err


def test_layers_open_as_the_policy_says_and_closed_ones_stay(minilm_run: tuple[Path, cases.Done, Any]) -> None:
    output, _, _ = minilm_run
    report = report_of(output)
    names = list(report["model"]["layers"])
    assert [(e["step"], len(e["layers"])) for e in report["history"]["open"]] == [(0, 1), (2, 2), (4, 3)]
    assert set(report["history"]["open"][1]["layers"]) == set(names[-2:])
    moved = report["drift"]["layers"]
    assert [moved[name] > 0 for name in names] == [name in names[-3:] for name in names]
    before, after = (
        load_file(output.parents[1] / "model" / "model.safetensors"),
        load_file(output / "model.safetensors"),
    )
    assert torch.equal(before["encoder.layer.3.output.dense.weight"], after["bert.encoder.layer.3.output.dense.weight"])


def test_drift_is_the_distance_between_the_files(minilm_run: tuple[Path, cases.Done, Any]) -> None:
    output, _, _ = minilm_run
    before, after = (
        load_file(output.parents[1] / "model" / "model.safetensors"),
        load_file(output / "model.safetensors"),
    )
    squares = torch.zeros(2, dtype=torch.float64)
    for name, start in before.items():
        if start.is_floating_point():
            end = after[f"bert.{name}"].double()
            squares += torch.stack([(end - start.double()).square().sum(), start.double().square().sum()])
    assert report_of(output)["drift"]["all"] == pytest.approx((squares[0] / squares[1]).sqrt().item(), rel=1e-9)


def test_lr_falls_from_the_topmost_layer_down_and_is_warmed_up(minilm_run: tuple[Path, cases.Done, Any]) -> None:
    report = report_of(minilm_run[0])
    training = report["history"]["training"]
    layers = len(report["model"]["layers"])
    assert [entry["step"] for entry in training] == [1, 2, 3, 4, 5, 6]
    assert [entry["lr"][1] for entry in training] == pytest.approx([0, 1e-3, 8e-4, 6e-4, 4e-4, 2e-4])
    assert training[1]["lr"][0] == pytest.approx(1e-3 * 0.9 ** (layers - 1))


def test_the_plot_is_a_picture(minilm_run: tuple[Path, cases.Done, Any]) -> None:
    from PIL import Image

    with Image.open(minilm_run[0] / "plot.png") as picture:
        assert picture.size[0] > 1000 and picture.size[1] > 800
        assert len(picture.convert("RGB").getcolors(10**6) or []) > 50


def perplexity_of(output: Path, rows: list[dict[str, str]]) -> float:
    """Of the model in a folder, one text at a time, each with the end-of-sequence token behind it."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(output).eval(), AutoTokenizer.from_pretrained(output)
    total, count = 0.0, 0
    for row in rows:
        ids = torch.tensor([tokenizer(row["text"])["input_ids"] + [tokenizer.eos_token_id]])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0]
        total += cross_entropy(logits[:-1], ids[0, 1:], reduction="sum").item()
        count += ids.shape[1] - 1
    return math.exp(total / count)


@pytest.mark.parametrize(
    ("kind", "policy"), [("llama", ["lisa", "n_layers=1", "every=2"]), ("gpt2", ["gradual", "every=1"])]
)
def test_a_language_model_loads_and_has_the_perplexity_that_was_reported(
    continue_text: Options, home: Path, tmp_path: Path, kind: str, policy: list[str]
) -> None:
    rows = rows_of(home / "eval.csv")
    name = "eval.jsonl.gz" if kind == "llama" else "eval.jsonl"
    continue_text.update(model=home / kind, eval=cases.write_rows(tmp_path / name, rows), unfreeze=policy)
    continue_text.update(anchor_decay=10, anchor_mode="l2", discriminative_lr=1.5, steps=6, schedule="cosine")
    done = cases.finetune(**continue_text)
    assert done.status == 0, done.err
    output = continue_text["output"]
    report = report_of(output)
    assert report["after"]["perplexity"] == pytest.approx(perplexity_of(output, rows), rel=1e-4)
    assert report["before"]["perplexity"] == pytest.approx(perplexity_of(home / kind, rows), rel=1e-4)
    assert report["after"]["perplexity"] < report["before"]["perplexity"]
    assert report["after"]["loss"] == pytest.approx(math.log(report["after"]["perplexity"]))
    assert report["drift"]["all"] > 0
    assert AutoModelForCausalLM.from_pretrained(output).config.use_cache
    ids = AutoTokenizer.from_pretrained(output)("the film", return_tensors="pt")["input_ids"]
    assert AutoModelForCausalLM.from_pretrained(output).generate(ids, max_new_tokens=2, do_sample=False).shape == (1, 4)


def test_bfloat16_and_a_fraction_of_train_held_out(classify: Options) -> None:
    del classify["eval"], classify["steps"]
    classify.update(precision="bfloat16", eval_fraction=0.2, epochs=0.5, max_grad_norm=0, weight_decay=0.1)
    done = cases.finetune(**classify)
    assert done.status == 0, done.err
    report = report_of(classify["output"])
    held_out = report["data"]["evaluation_rows"]
    assert 4 < held_out < 30 and held_out + report["data"]["train_rows"] == 80
    assert f"{80 - held_out} rows to train on; {held_out} are held out to evaluate on" in done.err
    assert report["plan"]["total_steps"] == math.ceil(math.ceil((80 - held_out) / 8) / 2)
    tensors = load_file(classify["output"] / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


@pytest.mark.parametrize("task", ["classify", "continue_text"])
def test_bfloat16_weights_take_small_steps(task: str, request: pytest.FixtureRequest) -> None:
    """Steps of which rounding would lose nearly all, and an anchor's pull of which it would lose everything."""
    options = request.getfixturevalue(task)
    options.update(lr=3e-5, anchor_decay=30, schedule="constant", warmup=0, keep="last", steps=10)
    drifts = {}
    for precision in ("bfloat16-weights", "float32"):
        done = cases.finetune(**{**options, "precision": precision, "output": options["output"] / precision})
        assert done.status == 0, done.err
        drifts[precision] = report_of(options["output"] / precision)["drift"]["all"]
        tensors = load_file(options["output"] / precision / "model.safetensors")
        expected = torch.bfloat16 if precision == "bfloat16-weights" else torch.float32
        assert {tensor.dtype for tensor in tensors.values()} == {expected}
    assert drifts["bfloat16-weights"] == pytest.approx(drifts["float32"], rel=0.1)


def test_the_best_model_is_kept_and_said(classify: Options) -> None:
    # An lr that ruins the model: the first evaluation is the best.
    classify.update(steps=8, checkpoint_every=2, lr=0.3, schedule="constant", warmup=0)
    done = cases.finetune(**classify)
    assert done.status == 0, done.err
    report = report_of(classify["output"])
    evaluations = report["history"]["evaluation"]
    best = min(evaluations, key=lambda entry: entry["loss"])
    assert len(evaluations) == 4 and best["step"] < 8
    assert report["kept"] == {"step": best["step"], "of": 8, "best": True}
    assert report["after"]["loss"] == pytest.approx(best["loss"])
    assert classified(classify["output"], rows_of(classify["eval"]), 64)[1] == pytest.approx(best["loss"], rel=1e-4)
    assert f"Kept: the model after step {best['step']} of 8, which has the lowest loss of 4 evaluations" in done.out


def test_a_second_run_gives_the_same_bits(classify: Options, tmp_path: Path) -> None:
    classify.update(unfreeze=["lisa", "n_layers=1", "every=1"], fuse_dropout=True, seed=3)
    weights = []
    for name in ("first", "second"):
        assert cases.finetune(**{**classify, "output": tmp_path / name}).status == 0
        weights.append((tmp_path / name / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]
    assert cases.finetune(**{**classify, "output": tmp_path / "third", "seed": 4}).status == 0
    assert (tmp_path / "third" / "model.safetensors").read_bytes() != weights[0]


def test_the_anchor_holds_all_but_the_new_head(classify: Options, tmp_path: Path) -> None:
    moved = {}
    for decay in (0, 900):  # lr * decay = 0.9: next to nothing may move
        classify.update(output=tmp_path / str(decay), anchor_decay=decay, schedule="constant", warmup=0, keep="last")
        assert cases.finetune(**classify).status == 0
        moved[decay] = report_of(classify["output"])["drift"]["all"]
    assert moved[900] < moved[0] / 2
    heads = [load_file(tmp_path / str(decay) / "model.safetensors")["classifier.weight"] for decay in (0, 900)]
    assert (heads[1] - heads[0]).abs().max() < 2e-3  # 4 steps of 1e-3 each, in both


def test_a_fitted_head_is_what_training_starts_from(classify: Options, tmp_path: Path) -> None:
    classify.update(lr=1e-12, weight_decay=0, max_length=64, augment="token_dropout=0.5", keep="last")
    done = cases.finetune(**classify, fit_head=True)
    assert done.status == 0, done.err
    report = report_of(classify["output"])
    fit = report["model"]["fitted_head"]
    rows = rows_of(classify["train"])
    assert fit["rows"] == len(rows)
    assert f"classifier fitted on {len(rows)} rows: accuracy {fit['accuracy']:.4g}, loss {fit['loss']:.4g}" in done.err
    # The rows as they are, though they are augmented for training, and the head that was fitted, as nothing moved it.
    accuracy, loss = classified(classify["output"], rows, 64)
    assert (fit["accuracy"], fit["loss"]) == (pytest.approx(accuracy), pytest.approx(loss, rel=1e-4))
    assert fit["loss"] < report["before"]["loss"] - 0.01
    before, after = (load_file(folder / "model.safetensors") for folder in (classify["model"], classify["output"]))
    for name, value in before.items():
        torch.testing.assert_close(after[f"bert.{name}"], value, rtol=0, atol=1e-9)

    classify.update(model=classify["output"], output=tmp_path / "again")
    refused = cases.finetune(**classify, fit_head=True)
    assert refused.status == 2 and "--fit-head: expected a model with a new linear head" in refused.err
    assert not classify["output"].exists()


def test_the_head_of_a_decoder_is_fitted_on_what_it_picks(classify: Options, home: Path) -> None:
    classify.update(model=home / "llama", lr=1e-12, weight_decay=0, max_length=64, keep="last")
    done = cases.finetune(**classify, fit_head=True)
    assert done.status == 0, done.err
    fit = report_of(classify["output"])["model"]["fitted_head"]
    assert fit["rows"] == 80 and "score fitted on 80 rows" in done.err
    _, loss = classified(classify["output"], rows_of(classify["train"]), 64)
    assert fit["loss"] == pytest.approx(loss, rel=1e-4)
    assert fit["loss"] < 0.69


def test_a_config_file_and_flags_that_override_it(classify: Options, tmp_path: Path) -> None:
    output = classify["output"]
    options = {name.replace("_", "-"): str(v) if isinstance(v, Path) else v for name, v in classify.items()}
    options |= {"lr": "2e-3", "fuse-dropout": True}
    low, head = ["bert.embeddings", "bert.encoder.layer.0"], ["bert.encoder.layer.[12].*", "bert.pooler", "classifier"]
    options["layer-groups"] = {"low": low, "head": head}
    options["unfreeze"] = {"phases": [{"from": 0, "open": ["head"]}, {"from": 1, "open": ["low", "head"]}]}
    (tmp_path / "run.yaml").write_text(json.dumps(options))  # JSON is YAML
    done = cases.finetune(config=tmp_path / "run.yaml", lr="5e-4", no_fuse_dropout=True)
    assert done.status == 0, done.err
    report = report_of(output)
    assert report["options"]["lr"] == 5e-4 and report["options"]["fuse_dropout"] is False
    assert report["options"]["batch_size"] == 8
    assert list(report["model"]["layers"]) == ["low", "head"]
    assert report["history"]["open"] == [{"step": 0, "layers": ["head"]}, {"step": 1, "layers": ["head", "low"]}]


# -- what is trained on --------------------------------------------------------------------------------------


def spied(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The rows of each batch that the model is trained on, as (ids, labels)."""
    from fastft.commands.finetune import training

    seen: list[Any] = []
    compute = training.Trainer.compute_loss

    def spy(self: Any, model: Any, inputs: Any, *args: Any, **more: Any) -> Any:
        if model.training:
            shown = inputs["attention_mask"].bool()
            rows = zip(inputs["input_ids"], shown, strict=True)
            seen.append(([tuple(ids[mask].tolist()) for ids, mask in rows], inputs["labels"].clone()))
        return compute(self, model, inputs, *args, **more)

    monkeypatch.setattr(training.Trainer, "compute_loss", spy)
    return seen


def test_old_rows_come_in_every_window_in_their_share(
    classify: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = [{"text": f"the film is {word}", "label": "mixed"} for word in ("old", "good", "bad")]
    seen = spied(monkeypatch)
    del classify["steps"]
    classify.update(replay=cases.write_rows(tmp_path / "old.csv", old), replay_ratio=0.25, epochs=2)
    done = cases.finetune(**classify)
    assert done.status == 0, done.err
    assert "3 old rows to mix in, 0.25 of all that is trained on" in done.err
    report = report_of(classify["output"])
    assert list(report["data"]["labels"]) == ["mixed", "negative", "positive"]
    assert report["data"]["replay_rows"] == 3
    epoch = math.ceil(80 / 0.75) // 8 + 1  # steps
    assert report["plan"]["steps_per_epoch"] == epoch and len(seen) == 2 * epoch
    assert "27 steps of 8 rows (2 epochs)" in done.err.replace(str(2 * epoch), "27")
    for _, labels in seen[: epoch - 1]:
        assert (labels == 0).sum() == 2
    first, second = ([row for rows, _ in seen[start : start + epoch] for row in rows] for start in (0, epoch))
    assert sorted(first) != first and first != second  # another order each epoch
    ordinary = [[row for row in rows if rows.count(row) == 1] for rows in (first, second)]
    assert sorted(ordinary[0]) == sorted(ordinary[1]) and len(ordinary[0]) > 60


def test_texts_are_augmented_while_training_and_their_labels_are_not(
    continue_text: Options, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = spied(monkeypatch)
    tokenizer = AutoTokenizer.from_pretrained(home / "gpt2")
    continue_text.update(model=home / "gpt2", augment=["token_dropout=0.3", "span_masking=0.2:2"], steps=20)
    done = cases.finetune(**continue_text)
    assert done.status == 0, done.err
    pairs = [
        (ids, labels[: len(ids)].tolist()) for rows, batch in seen for ids, labels in zip(rows, batch, strict=True)
    ]
    changed = sum(a != b for ids, labels in pairs for a, b in zip(ids, labels, strict=True))
    every = sum(len(ids) for ids, _ in pairs)
    assert 0.25 < changed / every < 0.5  # 1 − 0.7 · 0.8 = 0.44 of what is not special
    texts = {tuple(tokenizer(row["text"])["input_ids"]) for row in rows_of(home / "train.csv")}
    assert all(tuple(i for i in labels if i != tokenizer.eos_token_id) in texts for _, labels in pairs)
    assert report_of(continue_text["output"])["after"]["perplexity"] == pytest.approx(
        perplexity_of(continue_text["output"], rows_of(home / "eval.csv")), rel=1e-4
    )


def test_layers_that_will_not_open_are_named_beforehand(classify: Options) -> None:
    classify.update(unfreeze=["gradual", "every=2"])
    done = cases.finetune(**classify)
    assert done.status == 0, done.err
    layers = len(report_of(classify["output"])["model"]["layers"])
    assert (
        f"{layers - 2} of {layers} layers stay closed, as 4 steps are too few for every=2; "
        "with every=1 all are open after about half of the steps" in done.err
    )
    done = cases.finetune(**{**classify, "steps": 20}, overwrite=True)
    assert done.status == 0 and "stay closed" not in done.err


def test_synonyms_and_noise(classify: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "words.tsv").write_text("film\tmovie\nmovie\tfilm\n")
    weights = []
    for name, more in (
        ("plain", {}),
        ("synonyms", {"augment": "synonyms=0.9:words.tsv"}),
        ("noise", {"neftune": 5}),
    ):
        done = cases.finetune(**{**classify, "output": tmp_path / name}, **more)
        assert done.status == 0, done.err
        weights.append((tmp_path / name / "model.safetensors").read_bytes())
    assert len(set(weights)) == 3
    assert report_of(tmp_path / "synonyms")["data"]["sha256"].keys() == {"model", "train", "eval", "augment"}


ROOT = Path(__file__).resolve().parents[3]


def test_the_commands_of_the_documentation_run(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "docs" / "finetune.md").read_text(encoding="utf-8")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    # From the start of a line to its end, with the lines that a backslash continues.
    blocks = re.findall(r"^fastft finetune(?:.*\\\n)*.*\n", page + readme, re.MULTILINE)
    (config,) = re.findall(r"^```yaml\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    assert len(blocks) == 3
    monkeypatch.chdir(tmp_path)
    shutil.copytree(home / "bert", "my-model")
    rows = cases.review_rows(200)
    for name, part in (("reviews", rows[:100]), ("old_reviews", rows[100:]), ("secret_test", rows[90:110])):
        cases.write_rows(Path(f"{name}.csv"), part)
    Path("run.yaml").write_text(config, encoding="utf-8")
    for block in (*blocks, config.splitlines()[0].removeprefix("# ")):
        command = shlex.split(block.replace("\\\n", " "))
        assert shell.main([*command[1:], "--overwrite"]) == 0, block
        assert AutoModelForSequenceClassification.from_pretrained("tuned").config.label2id.keys() == {
            "negative",
            "positive",
        }


# -- the output folder ---------------------------------------------------------------------------------------


def test_a_second_run_into_the_same_folder_is_refused_unless_it_may_overwrite(
    classify: Options, tmp_path: Path
) -> None:
    output = classify["output"]
    assert cases.finetune(**classify).status == 0
    (output / "notes.txt").write_text("mine")
    before = cases.tree(output)
    done = cases.finetune(**classify)
    assert (done.status, done.out) == (2, "")
    assert done.err == (
        f"fastft finetune: --output: {output} is not empty; choose another, or write into it with --overwrite\n"
    )
    assert cases.tree(output) == before
    # One that is wrong is refused as well, before it overwrites anything.
    assert cases.finetune(**{**classify, "text_column": "txet"}, overwrite=True).status == 2
    assert cases.tree(output) == before
    assert cases.finetune(**{**classify, "lr": 2e-3}, overwrite=True).status == 0
    after = cases.tree(output)
    assert set(after) == set(before) and after["notes.txt"] == b"mine"
    assert after["model.safetensors"] != before["model.safetensors"]


def test_output_onto_the_model_is_refused(classify: Options, home: Path) -> None:
    before = cases.tree(home)
    done = cases.finetune(**{**classify, "output": home / "bert"}, overwrite=True)
    assert done.status == 2 and "--output: expected another folder than --model" in done.err
    assert cases.tree(home) == before


def test_missing_packages_are_named_with_the_way_to_install_them(
    classify: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finetune, "PACKAGES", {"torch": "torch", "no_such_module": "its-package"})
    done = cases.finetune(**classify)
    assert done.status == 2
    assert done.err == (
        'fastft finetune: missing its-package; install what this needs with: pip install "fastft[finetune]"\n'
    )
    assert not classify["output"].exists()


def test_help_names_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    from fastft.commands.finetune.options import FIELDS, flag_of

    with pytest.raises(SystemExit) as left:
        shell.main(["finetune", "--help"])
    shown = capsys.readouterr().out
    assert left.value.code == 0
    assert all(f"  {flag_of(name)}" in shown for name in FIELDS)
