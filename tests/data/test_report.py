"""The data report: what it finds and says, the files it leaves, and how the command line fails."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from fastft.commands import shell
from fastft.data import data_report
from fastft.data.report import DataReport

datasets = pytest.importorskip("datasets")
pytest.importorskip("datasketch")
pytest.importorskip("matplotlib")

TRAIN = [
    ("a wonderful film about nothing at all", "good"),
    ("the plot is thin and the actors are bored", "bad"),
    ("A wonderful film, about nothing at all!", "bad"),  # the same but for punctuation, and labelled otherwise
    ("the plot is thin and the actors are bored", "bad"),  # letter for letter
    ("the plot was thin and the actors are bored", "bad"),  # nearly
    ("", "good"),
    ("seen | once, *never* again <br> with a `friend`", None),
    *((f"review number {i} says that it was {'fine' * (i % 3)} {i * i}", "good") for i in range(20)),
]
EVAL = [
    ("THE PLOT IS THIN AND THE ACTORS ARE BORED", "bad"),
    ("quite unlike everything that was written above", "odd"),
]


def table(rows: list[tuple[str, Any]], **columns: Any) -> Any:
    return datasets.Dataset.from_dict({"text": [row[0] for row in rows], "label": [row[1] for row in rows], **columns})


def found(report: DataReport, words: str) -> str:
    """The advice for the one finding with these words."""
    (finding,) = (finding for finding in report.findings if re.search(words, finding.what))
    return finding.do


def test_every_fault_is_found_with_what_to_do() -> None:
    report = data_report(table(TRAIN), table(EVAL))
    assert "remove_leakage" in found(report, r"1 of 2 evaluation texts \(50\.0%\) are in the training data too, 0 of")
    assert "filter" in found(report, "1 row of 27 has no text")
    assert "one label for each text" in found(report, "1 row has the same text as an earlier one, but another label")
    assert "near=None" in found(report, r"2 rows of 27 \(7\.4%\) repeat an earlier one, 1 letter for letter")
    assert "deduplicate" in found(report, "1 row nearly repeats an earlier one")
    assert "leave them out" in found(report, "1 row has no label in `label`")
    assert "macro F1" in found(report, r"out of balance, 5\.5 to 1: always guessing “good” is 84\.6% right")
    assert "Collect more" in found(report, "1 of 2 classes have fewer than 5 examples: “bad”")
    assert found(report, "evaluation data that are never trained: “odd”")
    assert "ReplayMixer" in found(report, r"\d+% of the words in the evaluation data never occur")
    assert len(report.findings) == 10
    assert report.findings[0].what.startswith("1 of 2 evaluation texts")  # the worst first
    assert [(match.index, match.of) for match in report.conflicts] == [(2, 0)]
    assert len(str(report).splitlines()) == 11


def test_a_clean_set_is_called_so() -> None:
    clean = [(f"all {word} differ in what they say of {word}", i % 2) for i, word in enumerate("abcdefghijkl")]
    report = data_report(table(clean), table([("what they say of all they differ in", 0)]), near=None)
    assert report.findings == [] and "Nothing wrong was found." in str(report)
    assert "and no evaluation text in the training data" in report.to_markdown()


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.25 * (i % 7) for i in range(40)], None),  # fractions: measurements
        ([float(i) for i in range(40)], None),  # too many to be classes
        ([float(i % 3) for i in range(40)], {0.0: 14, 1.0: 13, 2.0: 13}),
        ([i % 2 == 0 for i in range(40)], {True: 20, False: 20}),
        ([[i % 2] for i in range(40)], {"[0]": 20, "[1]": 20}),
    ],
)
def test_numbers_are_distinguished_from_classes(values: list[Any], expected: dict[Any, int] | None) -> None:
    report = data_report(table([(f"text {i} {i * i}", value) for i, value in enumerate(values)]), near=None)
    balance = report.train.balance
    assert (balance.counts if balance is not None else None) == expected
    assert ("Numbers, not classes." in report.to_markdown()) == (expected is None)
    assert json.loads(report.to_json())["train"]["labels"].keys() >= ({"numbers"} if expected is None else {"counts"})


def test_labels_that_are_numbers_conflict_where_they_are_far_apart() -> None:
    numbers = [-2.5, 2.5, -2.4, 0.1, 0.2, -0.1, 1.1]
    rows = [(text, number) for text, number in zip(["a b", "A b", "a, b", "c", "d", "e", "f"], numbers, strict=True)]
    report = data_report(table(rows))
    assert [match.index for match in report.conflicts] == [1]
    assert found(report, "1 row has the same text as an earlier one, but a label more than a standard deviation away")


def test_columns_are_guessed_or_given() -> None:
    data = table([("a long text that goes on", 1.5)], title=["b"], mean_rating=[3])
    assert (data_report(data).text_column, data_report(data).label_column) == ("text", "label")
    without = data.remove_columns(["label"]).rename_column("text", "words")
    report = data_report(without)
    assert (report.text_column, report.label_column) == ("words", "mean_rating")
    report = data_report(without, text_column="title", label_column="words")
    assert (report.text_column, report.label_column) == ("title", "words")
    with pytest.raises(ValueError, match="train: has no column of texts; it has mean_rating"):
        data_report(without.select_columns(["mean_rating"]))


@pytest.mark.slow
def test_it_goes_without_labels_and_without_texts(tmp_path: Path) -> None:
    report = data_report(table([("", None), ("", None)]).select_columns(["text"]))
    report.write(tmp_path)
    assert "2 rows of 2 have no text" in (tmp_path / "report.md").read_text()
    assert json.loads(report.to_json())["train"]["labels"] is None
    data_report(table([("a b c", None), ("d e", None)])).write(tmp_path)


def test_the_page_the_figures_and_the_plot(tmp_path: Path) -> None:
    report = data_report(table(TRAIN), table(EVAL), name="reviews.csv", eval_name="test_set.csv")
    report.write(tmp_path)
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG") and (tmp_path / "plot.png").stat().st_size > 9999
    figures = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert figures["train"]["rows"] == 27 and figures["train"]["empty"] == [5]
    assert figures["train"]["rows_without_repetition"] == 24
    assert [d["kind"] for d in figures["train"]["duplicates"]] == ["normalised", "exact", "near"]
    assert figures["leakage"] == [{"index": 0, "of": 1, "kind": "normalised", "similarity": 1.0}]
    assert figures["train"]["labels"] == {
        "missing": 1,
        "counts": {"good": 22, "bad": 4},
        "majority": pytest.approx(22 / 26),
        "imbalance": 5.5,
    }
    assert 0 < figures["unseen_words"]["share_of_words"] < 1 and "quite" in figures["unseen_words"]["most_frequent"]
    page = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert page.startswith("# reviews.csv\n") and "![](plot.png)" in page and "test\\_set.csv" in page
    for line in page.splitlines():
        if line.startswith("|"):
            assert line.count("|") - line.count("\\|") in (5, 6, 8), line  # no text breaks a table
    assert "label bad instead of good" in page
    assert len(page.split("## ")) == 6


def test_the_faces_of_a_report_say_the_same(tmp_path: Path) -> None:
    report = data_report(table(TRAIN), table(EVAL))
    (tmp_path / "new").mkdir()
    report.write(tmp_path / "new")
    report.plot(str(tmp_path / "alone.png"))
    assert (tmp_path / "alone.png").read_bytes() == (tmp_path / "new" / "plot.png").read_bytes()
    assert (tmp_path / "new" / "report.json").read_text(encoding="utf-8") == report.to_json() + "\n"
    assert (tmp_path / "new" / "report.md").read_text(encoding="utf-8") == report.to_markdown()
    for finding in report.findings:
        assert finding.what in str(report) and f"**{finding.what}** {finding.do}" in report.to_markdown()


def test_texts_cannot_break_the_page() -> None:
    odd = "a | b <img src=x> `c` *d*\n# e"
    page = data_report(table([(odd, 1), (odd, 1)])).to_markdown()
    assert "a \\| b &lt;img src=x&gt; \\`c\\` \\*d\\* \\# e" in page


# -- the command line ----------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a training and an evaluation file, to be in."""
    monkeypatch.chdir(tmp_path)
    table(TRAIN).to_json(tmp_path / "train.jsonl")
    (tmp_path / "other").mkdir()
    table(EVAL).to_csv(tmp_path / "other" / "train.csv", index=False)
    return tmp_path


@pytest.mark.slow
def test_the_command_writes_a_folder(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert shell.main(["data-report", "train.jsonl", "--eval", "other/train.csv", "--output", "page"]) == 0
    printed = capsys.readouterr()
    assert "evaluation texts" in printed.out and "Written to page" in printed.out and not printed.err
    assert sorted(path.name for path in (files / "page").iterdir()) == ["plot.png", "report.json", "report.md"]
    assert shell.main(["data-report", "train.jsonl"]) == 0
    assert (files / "fastft-data-report" / "report.md").exists()
    assert shell.main(["data-report", "train.jsonl"]) == 2  # there already
    assert shell.main(["data-report", "train.jsonl", "--overwrite", "--label-column", "text"]) == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["none.csv"], "none.csv: expected a file with rows, but there is none"),
        (["train.jsonl", "--eval", "none.csv"], "none.csv: expected a file with rows, but there is none"),
        (
            ["train.jsonl", "--text-column", "txet"],
            "train.jsonl: there is no column 'txet', but 'text', 'label'; closest: text",
        ),
        (["train.jsonl", "--label-column", "x"], "train.jsonl: there is no column 'x', but 'text', 'label'"),
        (
            ["train.jsonl", "--text-column", "label", "--eval", "only.csv"],
            "only.csv: there is no column 'label', but 'text'",
        ),
        (["train.jsonl", "--output", "train.jsonl"], "train.jsonl is not a folder"),
        (["number.csv"], "number.csv: has no column of texts; it has n"),
        (["number.csv", "--text-column", "n"], "text_column: expected texts, got int in row 0"),
    ],
)
def test_wrong_usage_is_one_line_and_leaves_nothing(
    arguments: list[str], said: str, files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (files / "only.csv").write_text("text\nx\n")
    (files / "number.csv").write_text("n\n1\n")
    before = sorted(files.rglob("*"))
    assert shell.main(["data-report", *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("fastft data-report: ") and said in printed.err and printed.err.count("\n") == 1
    assert not printed.out and sorted(files.rglob("*")) == before


def test_failures_on_the_way_leave_nothing(
    files: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = sorted(files.rglob("*"))
    for error, status, said in ((OSError("disk full"), 1, "disk full"), (KeyboardInterrupt(), 130, "interrupted")):

        def fail(report: DataReport, folder: Path, error: BaseException = error) -> None:
            (folder / "report.md").write_text("half")
            raise error

        monkeypatch.setattr(DataReport, "write", fail)
        assert shell.main(["data-report", "train.jsonl"]) == status
        assert said in capsys.readouterr().err and sorted(files.rglob("*")) == before


def test_missing_packages_are_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert shell.main(["data-report", "train.jsonl"]) == 2
    assert 'missing datasets, datasketch, matplotlib; install what this needs with: pip install "fastft[data]"' in (
        capsys.readouterr().err
    )
