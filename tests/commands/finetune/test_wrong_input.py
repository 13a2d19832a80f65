"""Whatever is wrong with what was given: one line that says so, exit status 2, and nothing written."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import finetune_cases as cases
import pytest

from fastft.commands import shell


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_column": "txet"}, "line 2: there is no column 'txet', but 'id', 'text', 'label'; closest: text"),
        ({"label_column": "id"}, "expected a few labels, each in several rows, got 80 different ones in 80 rows"),
        ({"train": "empty.csv"}, "empty.csv: expected rows, found none"),
        ({"train": "ragged.csv"}, "ragged.csv, line 3: expected 3 fields, as in the header"),
        ({"train": "holes.csv"}, "holes.csv, line 4: the text in 'text' is empty"),
        ({"train": "one_class.csv"}, "one_class.csv: expected at least two different labels, got 'negative' alone"),
        ({"train": "gone.csv"}, "gone.csv: expected a file with rows, but there is none"),
        ({"eval": "strange.csv"}, "strange.csv, line 2: no row to train on has the label 'odd'; --train has"),
        ({"eval": "long.csv"}, "long.csv: 1 of 1 texts are longer than the 64 tokens that the model can take"),
        ({"replay": "gone.csv"}, "gone.csv: expected a file with rows, but there is none"),
        ({"replay_ratio": 0.2}, "--replay-ratio: expected only together with --replay"),
        ({"replay": "one_class.csv", "replay_ratio": 1}, "--replay-ratio: expected a number above 0 and at most 0.99"),
        ({"check_leakage": "gone.csv"}, "gone.csv: expected a file with rows"),
        ({"augment": "token_dropuot=0.1"}, "--augment: expected one of token_dropout, span_masking, synonyms, got"),
        (
            {"augment": "token_dropout=1"},
            "augment: token_dropout=1: p: expected a number from 0 to below",
        ),
        ({"augment": "synonyms=0.1:gone.tsv"}, "No such file"),
        ({"neftune": -1}, "--neftune: expected a number above 0"),
        ({"max_length": 65}, "--max-length: expected at most 64, the most that the model can take, got 65"),
        ({"model": "nowhere"}, "there is nothing there"),
        ({"model": "bare"}, "no tokenizer; expected one of tokenizer.json"),
        ({"model": "no_weights"}, "cannot load a model with a classification head"),
        ({"task": "causal-lm", "label_column": None}, "expected a causal language model for --task causal-lm"),
        ({"lr": "fast"}, "--lr: expected a number above 0, got 'fast'"),
        ({"batch_size": "many"}, "--batch-size: expected a whole number of at least 1"),
        ({"batch_siez": "8"}, "unrecognized arguments: --batch-siez 8; see fastft finetune --help"),
        ({"layer_groups": ["bert.embeddings", "heda"]}, "'heda' matches no parameter"),
        ({"unfreeze": ["lisa", "n_layers=9"]}, "n_layers: expected at most the 3 blocks, got 9"),
        ({"config": "late.yaml"}, "open: 'bodi' matches no group"),
        ({"config": "none.yaml"}, "--config: cannot read none.yaml"),
        ({"warmup": 40}, "--warmup: expected at most the 4 steps of the run, got 40"),
        ({"steps": None, "epochs": 1, "warmup": 40}, "warmup: expected up to 10 steps"),
        ({"output": "taken"}, "--output: taken is not a folder"),
        ({"output": "taken/below"}, "taken is not a folder"),
        ({"output": "locked/below"}, "locked may not be written to"),
        ({"steps": None, "eval": None, "eval_fraction": 1e-9}, "0 would be held out for evaluation"),
    ],
)
def test_one_line_status_2_and_nothing_written(
    changes: dict[str, Any],
    message: str,
    classify: dict[str, Any],
    home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = cases.review_rows(20)
    cases.write_rows(tmp_path / "holes.csv", [*rows[:2], {**rows[2], "text": " "}])
    cases.write_rows(tmp_path / "one_class.csv", [row for row in rows if row["label"] == "negative"])
    cases.write_rows(tmp_path / "strange.csv", [{**rows[0], "label": "odd"}])
    cases.write_rows(tmp_path / "long.csv", [{**rows[0], "text": "a film " * 40}])
    (tmp_path / "empty.csv").write_text("id,text,label\n")
    (tmp_path / "ragged.csv").write_text("id,text,label\n1,fine,positive\n2,well, not so,negative\n")
    (tmp_path / "late.yaml").write_text("unfreeze: {phases: [{from: 0, open: head}, {from: 99, open: bodi}]}")
    (tmp_path / "taken").write_text("mine")
    for name, left_out in (("bare", "tokenizer*"), ("no_weights", "*.safetensors")):
        folder = shutil.copytree(home / "bert", tmp_path / name)
        for path in folder.glob(left_out):
            path.unlink()
    (tmp_path / "locked").mkdir()
    # Root may write anywhere.
    may = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "locked" and may(path, mode))
    before = cases.tree(tmp_path), sorted(tmp_path.rglob("*"))
    options = {name: value for name, value in {**classify, **changes}.items() if value is not None}

    done = cases.finetune(**options)
    assert (done.status, done.out) == (2, "")
    (line,) = done.err.splitlines()
    assert line.startswith("fastft finetune: ")
    assert message in line
    assert (cases.tree(tmp_path), sorted(tmp_path.rglob("*"))) == before


def test_all_of_the_usage_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert shell.main(["finetune"]) == 2
    said = capsys.readouterr().err
    assert said == "fastft finetune: missing --model, --train, --task, --text-column, --output\n"


def test_several_processes_are_refused(classify: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    done = cases.finetune(**classify)
    assert (done.status, done.err) == (2, "fastft finetune: runs in one process; start it without torchrun\n")
