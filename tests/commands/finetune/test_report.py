"""``RunReport``: the same run as text, Markdown, JSON and a plot."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

from fastft.commands.finetune.report import RunReport


def made() -> RunReport:
    """A run of four steps in which the lower of two layers opened after the second."""
    losses = [{"step": i + 1, "loss": 0.7 - 0.1 * i, "learning_rate": 1e-3, "grad_norm": 1.0} for i in range(4)]
    return RunReport(
        task="text-classification",
        options={"lr": 1e-3},
        plan={"total_steps": 4},
        data={
            "evaluation_rows": 1200,
            "labels": {"bad": {"id": 0, "evaluation": 400}, "good": {"id": 1, "evaluation": 800}},
        },
        model={"layers": {"block": 12345, "head": 66}},
        before={"accuracy": 0.5, "loss": 0.75},
        after={"accuracy": 0.75, "loss": 0.5},
        kept={"step": 4, "of": 4, "best": False},
        drift=0.0123,
        layer_drift={"block": 0.01},
        history=[
            {"step": 0, "open": ["head"]},
            *losses[:2],
            {"step": 2, "open": ["block", "head"]},
            *losses[2:],
            {"step": 4, "eval_loss": 0.5, "eval_accuracy": 0.75},
        ],
        lr_ratios=(0.5, 1.0),
        skipped_steps=1,
        resumed_from=None,
        training_seconds=1.5,
        seconds=2.5,
        notes=[],
        environment={},
    )


TEXT = """\
1,200 evaluation rows  before  after
------------------------------------
accuracy                0.500  0.750
loss                    0.750  0.500

layer  parameters  open in steps  moved by step 4
-------------------------------------------------
block      12,345            3–4           1.00 %
head           66            1–4              new

One standard error of the accuracy is 0.013; always answering 'good' would score 0.667.
Kept: the model after the last step, 4.
Moved from pre-trained: 1.23 % (‖θ − θ₀‖ / ‖θ₀‖, without new parameters).
Trained in 1.5 s, 2.5 s with everything.
1 of 4 steps were skipped: their gradients held inf or NaN."""


def test_the_text_is_tables_and_their_meaning() -> None:
    assert str(made()) == TEXT


def test_markdown_says_the_same() -> None:
    page = made().to_markdown()
    assert page.startswith(
        "| 1,200 evaluation rows | before | after |\n| --- | ---: | ---: |\n| accuracy | 0.500 | 0.750 |"
    )
    assert "| head | 66 | 1–4 | new |" in page
    assert all(line in page for line in TEXT.splitlines()[-5:])


def test_the_files_are_json_and_plot(tmp_path: Path) -> None:
    report = made()
    report.write(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plot.png", "report.json"]
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "report.json").read_text(encoding="utf-8") == report.to_json() + "\n"
    found = json.loads(report.to_json())
    assert found["drift"] == {"all": 0.0123, "layers": {"block": 0.01}}
    assert found["history"]["training"][0] == {"step": 1, "loss": 0.7, "lr": [5e-4, 1e-3], "grad_norm": 1.0}
    assert found["history"]["open"][1] == {"step": 2, "layers": ["block", "head"]}
    assert found["history"]["evaluation"] == [{"step": 4, "loss": 0.5, "accuracy": 0.75}]
