"""The demo from end to end, small: the real model and data, a few steps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastft.commands import demo, shell
from fastft.commands.demo import experiment
from fastft.commands.demo.train import Config
from fastft.problems import split_reviews

pytest.importorskip("transformers")

pytestmark = pytest.mark.slow

SMALL = Config(train_rows=96, test_rows=80, pools=2, pool_size=40, batch_size=16)


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The output folder of a small run, and what it printed."""
    folder = tmp_path_factory.mktemp("demo") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiment, "config_for", lambda quick, seed: SMALL)
        lines: list[str] = []
        patch.setattr("builtins.print", lambda *parts, file=None, **_: lines.append(str(parts[0])))
        assert shell.main(["demo", "--output", str(folder)]) == 0
    return folder, "\n".join(lines)


def test_the_table_and_the_report_say_the_same(result: tuple[Path, str]) -> None:
    folder, printed = result
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    assert list(report["runs"]) == ["torch", "anchor", "anchor_unfreezing"]
    for numbers in report["runs"].values():
        (row,) = [line.rsplit(maxsplit=6) for line in printed.splitlines() if line.startswith(numbers["name"] + "  ")]
        assert [cell.strip() for cell in row] == [
            numbers["name"],
            f"{numbers['target_accuracy']['value']:.3f}",
            f"{numbers['source_recall_at_1']['value']:.3f}",
            f"{numbers['optimizer_seconds_with_clipping']:.2f}",
            f"{numbers['training_seconds']:.1f}",
            f"{numbers['peak_state_bytes'] / 1e6:.1f}",
            f"{numbers['anchor_bytes'] / 1e6:.1f}",
        ]
        assert len(numbers["steps"]["loss"]) == 6
    assert report["meaning"] in printed
    assert report["config"]["anchor_decay"] > 0


def test_the_methods_start_alike_and_clip(result: tuple[Path, str]) -> None:
    report = json.loads((result[0] / "report.json").read_text(encoding="utf-8"))
    torchs, *others = (run["steps"] for run in report["runs"].values())
    for ours in others:
        assert ours["lr"] == torchs["lr"]
        # The first loss comes before any update: same rows, same dropout.
        assert ours["loss"][0] == pytest.approx(torchs["loss"][0], rel=1e-5)
        assert max(ours["grad_norm"]) > SMALL.max_grad_norm
    assert others[0]["grad_norm"][0] == pytest.approx(torchs["grad_norm"][0], rel=1e-4)
    # What is closed has no gradient.
    assert others[1]["grad_norm"][0] < 0.99 * torchs["grad_norm"][0]


def test_state_follows_the_open_layers(result: tuple[Path, str]) -> None:
    report = json.loads((result[0] / "report.json").read_text(encoding="utf-8"))
    full, anchored, unfreezing = (run["steps"]["state_bytes"] for run in report["runs"].values())
    trained = 22_565_376  # MiniLM's encoder without its pooler, which has no part in the mean of the token vectors
    head = 2 * 384 + 2
    assert full[0] == pytest.approx(8 * (trained + head), rel=1e-4)  # the step counts are a little more
    assert anchored == pytest.approx(full, rel=1e-4)
    assert report["runs"]["anchor_unfreezing"]["steps"]["open_groups"] == [1, 2, 3, 4, 5, 6]
    block = 1_774_464
    assert unfreezing == pytest.approx([8 * (head + n * block) for n in range(6)], rel=2e-3)
    assert report["runs"]["anchor_unfreezing"]["peak_state_bytes"] == unfreezing[-1]
    assert report["runs"]["torch"]["anchor_bytes"] == 0
    # The pooler is anchored too.
    assert report["runs"]["anchor"]["anchor_bytes"] == 4 * (trained + 384 * 384 + 384)


def test_the_model_loads_and_predicts_what_the_report_says(result: tuple[Path, str]) -> None:
    from transformers import AutoModel, AutoTokenizer

    folder, _ = result
    encoder = AutoModel.from_pretrained(folder / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    head = load_file(folder / "model" / "head.safetensors")
    _, test_set = split_reviews("movie", SMALL.train_rows, SMALL.test_rows)
    inputs = tokenizer(
        [r.text for r in test_set], padding=True, truncation=True, max_length=SMALL.max_length, return_tensors="pt"
    )
    with torch.no_grad():
        tokens = encoder(**inputs).last_hidden_state
    mask = inputs["attention_mask"].unsqueeze(-1)
    logits = (tokens * mask).sum(1) / mask.sum(1) @ head["weight"].T + head["bias"]
    labels = torch.tensor([r.positive for r in test_set]).long()
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    accuracy = (logits.argmax(1) == labels).double().mean().item()
    assert accuracy == pytest.approx(
        report["runs"][experiment.SAVED]["target_accuracy"]["value"], abs=1.5 / len(test_set)
    )


def test_the_plot_is_a_picture(result: tuple[Path, str]) -> None:
    from PIL import Image

    with Image.open(result[0] / "plot.png") as picture:
        assert picture.size[0] > 1000 and picture.size[1] > 400
        assert len(picture.convert("RGB").getcolors(10**6) or []) > 50


def test_a_second_run_into_the_same_folder_is_refused(
    result: tuple[Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    before = (result[0] / "report.json").read_bytes()
    assert shell.main(["demo", "--output", str(result[0])]) == 2
    assert "is not empty; choose another output, or overwrite with --overwrite" in capsys.readouterr().err
    assert (result[0] / "report.json").read_bytes() == before


def test_missing_packages_are_named_with_the_way_to_install_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(demo, "PACKAGES", {"torch": "torch", "no_such_package_here": "no-such-package-here"})
    assert shell.main(["demo", "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert 'missing no-such-package-here; install what this needs with: pip install "fastft[demo]"' in error
    assert not (tmp_path / "out").exists()


def test_an_interrupted_run_writes_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(experiment, "compare", interrupted)
    assert shell.main(["demo", "--output", str(tmp_path / "out")]) == 130
    assert "interrupted; nothing was written" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
