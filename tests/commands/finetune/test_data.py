"""Rows from files: the same from every format, held out by their text, and refused where they are wrong."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import datasets
import finetune_cases as cases
import pytest

from fastft.commands.finetune import data
from fastft.commands.finetune.data import Data, Rows, check_labels, held_out, read, tokenized
from fastft.commands.finetune.errors import InputError
from fastft.commands.finetune.model import load_tokenizer
from fastft.commands.finetune.options import given, options_from
from fastft.errors import UserError

FORMATS = ("csv", "csv.gz", "tsv", "tsv.gz", "jsonl", "jsonl.gz", "parquet")
ROWS = [
    {"id": "1", "text": 'She said "so", I am told', "label": "a"},
    {"id": "2", "text": '"quoted', "label": "b"},
    {"id": "3", "text": "NA", "label": "null"},
    {"id": "4", "text": "2020-01-01", "label": "a"},
    {"id": "5", "text": "été, 夏 🎬", "label": "b"},
]


@pytest.mark.parametrize("ending", FORMATS)
def test_every_format_gives_the_same_rows(ending: str, tmp_path: Path) -> None:
    rows = read(cases.write_rows(tmp_path / f"my.rows.{ending}", ROWS), "text", "label")
    assert rows.texts == [row["text"] for row in ROWS]
    assert rows.labels == [row["label"] for row in ROWS]
    first = {"parquet": "row 1", "jsonl": "line 1", "jsonl.gz": "line 1"}.get(ending, "line 2")
    assert rows.places[0] == first
    assert read(rows.path, "text", None).labels is None


def test_lines_of_a_csv_file_are_counted_where_fields_hold_line_breaks(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes('\ufefftext,label\r\n"one\r\n\r\ntwo",a\r\n\r\n  three  , b \r\n'.encode())
    rows = read(path, "text", "label")
    assert rows.texts == ["one\r\n\r\ntwo", "  three  "]
    assert rows.labels == ["a", "b"]
    assert rows.places == ["line 2", "line 6"]


def test_labels_that_are_numbers(tmp_path: Path) -> None:
    path = cases.write_rows(tmp_path / "rows.jsonl", [{"text": "x", "label": label} for label in (10, 9, True, "9")])
    rows = read(path, "text", "label")
    assert rows.labels == ["10", "9", "true", "9"]
    assert list(rows.select([0, 1, 3]).counts.items()) == [("9", 2), ("10", 1)]


def test_class_labels_of_a_parquet_file_by_name(tmp_path: Path) -> None:
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["bad", "good"])}
    )
    table = datasets.Dataset.from_dict({"text": ["x", "y"], "label": [1, 0]}, features=features)
    table.to_parquet(str(tmp_path / "rows.parquet"))
    assert read(tmp_path / "rows.parquet", "text", "label").labels == ["good", "bad"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("r.csv", "text,label\na,1,2\n", "line 2: expected 2 fields, as in the header ('text', 'label'), got 3"),
        ("r.csv", "text,label\na,1\nb\n", "line 3: expected 2 fields, as in the header ('text', 'label'), got 1"),
        ("r.csv", 'text,label\nx,1\n"a,1\nb,2\n', "line 3: cannot be read: unexpected end of data; a field"),
        ("r.csv", 'text,label\n"a"b,1\n', "line 2: cannot be read: "),
        ("r.csv", "text,text\na,1\n", "expected columns of different names, got 'text' twice"),
        ("r.csv", "txt,label\na,1\n", "line 2: there is no column 'text', but 'txt', 'label'; closest: txt"),
        ("r.csv", "text,label\na,1\n ,2\n", "line 3: the text in 'text' is empty; take the row out, or fill it in"),
        ("r.csv", "text,label\na,\n", "line 2: the label in 'label' is empty"),
        ("r.csv", "text,label\n", "expected rows, found none"),
        ("r.csv", "", "expected rows, found none"),
        ("r.csv", b"text,label\na,1\n\xe9t\xe9,2\n", "line 3: cannot be read: 'utf-8' codec can't decode byte 0xe9"),
        ("r.csv.gz", "text,label\n", "line 1: cannot be read: Not a gzipped file"),
        ("r.csv.gz", gzip.compress(b"text,label\na,1\n" * 99, mtime=0)[:-9], "Compressed file ended before"),
        ("r.tsv", "text\tlabel\na\tb\t1\n", "line 2: expected 2 fields, as in the header ('text', 'label'), got 3; a"),
        ("r.jsonl", '{"text": "a", "label": 1}\n{"text": "b"\n', "line 2: not JSON: Expecting ',' delimiter"),
        ("r.jsonl", '["a", "b"]\n', "line 1: expected one JSON object a line, got ['a', 'b']"),
        ("r.jsonl", '{"text": "a", "label": 1}\n\n{"text": "b"}\n', "line 3: there is no column 'label', but 'text'"),
        ("r.jsonl", '{"text": 5, "label": 1}\n', "line 1: expected a text in 'text', got 5"),
        ("r.jsonl", '{"text": null, "label": 1}\n', "line 1: the text in 'text' is empty"),
        ("r.jsonl", '{"text": "a", "label": 0.5}\n', "expected a name or a whole number as label in 'label', got 0.5"),
        ("r.parquet", "nothing of the kind", "not a Parquet file: "),
        ("r.txt", "a", "expected a file whose name ends in .csv, .tsv, .jsonl (each also with .gz) or .parquet"),
        ("r.parquet.gz", "a", "expected a file whose name ends in"),
        ("gz", "a", "expected a file whose name ends in"),
    ],
)  # fmt: skip
def test_a_file_that_is_wrong_is_reported_with_the_place(name: str, content: Any, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as error:
        read(tmp_path / name, "text", "label")
    assert str(error.value).startswith(str(tmp_path / name))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_parquet_file_without_the_column_or_rows(tmp_path: Path) -> None:
    path = cases.write_rows(tmp_path / "rows.parquet", ROWS)
    with pytest.raises(UserError, match="there is no column 'words', but 'id', 'text', 'label'"):
        read(path, "words", "label")
    datasets.Dataset.from_dict({"text": [], "label": []}).to_parquet(str(path))
    with pytest.raises(UserError, match="expected rows, found none"):
        read(path, "text", "label")


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected a file with rows, but there is none"):
        read(tmp_path / "rows.csv", "text", None)
    with pytest.raises(UserError, match="expected a file with rows, but there is a folder"):
        read(tmp_path, "text", None)


# -- what is held out ----------------------------------------------------------------------------------------


def rows_of(texts: list[str], labels: list[str] | None = None) -> Rows:
    return Rows(Path("rows.csv"), texts, labels, [f"line {i + 2}" for i in range(len(texts))])


def test_what_is_held_out_goes_by_the_text_alone() -> None:
    texts = [row["text"] for row in cases.review_rows(400)]
    train, out = held_out(rows_of(texts), 0.2)
    assert sorted(train.texts + out.texts) == sorted(texts)
    assert 50 < len(out) < 110
    reverse_train, reverse_out = held_out(rows_of(texts[::-1]), 0.2)
    assert (set(reverse_train.texts), set(reverse_out.texts)) == (set(train.texts), set(out.texts))
    # More rows move none of the others, and a larger part holds all of a smaller one.
    assert set(held_out(rows_of(texts[:200]), 0.2)[1].texts) == set(out.texts) & set(texts[:200])
    assert set(out.texts) < set(held_out(rows_of(texts), 0.4)[1].texts)
    # Copies go where the original is.
    copies = rows_of([text.upper().replace(" ", "  ") for text in texts])
    assert len(held_out(copies, 0.2)[1]) == len(out)
    assert out.places[0] == f"line {texts.index(out.texts[0]) + 2}"


def test_nothing_to_hold_out() -> None:
    with pytest.raises(InputError, match="of its 1 rows, 0 would be held out for evaluation and 1 be trained on"):
        held_out(rows_of(["a film"]), 0.01)


@pytest.mark.parametrize(
    ("train", "evaluation", "message"),
    [
        ("aaaa", "a", "expected at least two different labels, got 'a' alone"),
        ("abcde", "a", "expected a few labels, each in several rows, got 5 different ones in 5 rows"),
        ("abab", "abca", "line 4: no row to train on has the label 'c'"),
    ],
)
def test_labels_that_cannot_be_learned(train: str, evaluation: str, message: str) -> None:
    with pytest.raises(InputError) as error:
        check_labels(labelled(train, evaluation))
    assert message in str(error.value)


def labelled(train: str, evaluation: str, replay: str = "") -> Data:
    """Rows whose labels, and texts, are single letters."""
    parts = [rows_of(list(letters), list(letters)) for letters in (train, evaluation, replay)]
    return Data(parts[0], parts[1], parts[2] if replay else None, [])


def test_a_label_of_old_rows_is_one_that_can_be_evaluated_on() -> None:
    data = labelled("abab", "abca", "ccc")
    check_labels(data)
    assert data.labels == ["a", "b", "c"]
    with pytest.raises(InputError, match="line 4: no row to train on has the label 'd'"):
        check_labels(labelled("abab", "abd", "ccc"))


def test_texts_that_are_in_both_files_are_noted(tmp_path: Path) -> None:
    rows = cases.review_rows(20)
    options = {
        "model": "m",
        "task": "text-classification",
        "text_column": "text",
        "label_column": "label",
        "output": "o",
    }
    train, evaluation = (cases.write_rows(tmp_path / f"{i}.csv", part) for i, part in enumerate((rows[:14], rows[10:])))
    found = data.load(options_from(given({**options, "train": train, "eval": evaluation}, None)))
    assert found.notes == [
        "14 rows to train on, 10 to evaluate on",
        "4 of the 10 evaluation texts are in --train too",
    ]


def test_repetitions_and_leaks_are_left_out(tmp_path: Path) -> None:
    base = "the film is a long and slow story of a man and his dog in a town by the sea number"
    texts = [f"{base} {chr(97 + i) * 3}{i}" if i < 2 else f"{'wxyz'[i % 4] * 5} {i} apart" for i in range(10)]
    rows = [{"text": text, "label": "ab"[i % 2]} for i, text in enumerate(texts)]
    # Row 1 nearly repeats row 0; the last repeats row 3 but for case.
    rows.append({"text": texts[3].upper(), "label": "b"})
    train = cases.write_rows(tmp_path / "train.csv", rows)
    old = cases.write_rows(tmp_path / "old.csv", [{"text": texts[5] + "!", "label": "a"}, {"text": "q", "label": "b"}])
    secret = cases.write_rows(tmp_path / "secret.jsonl", [{"text": texts[5]}, {"text": "elsewhere"}])
    found = data.load(
        options_for("text-classification", train=train, eval=train, replay=old, dedupe=True, check_leakage=secret)
    )
    assert found.train.texts == [text for i, text in enumerate(texts) if i not in (1, 5)]
    assert found.train.labels == ["a", "a", "b", "a", "a", "b", "a", "b"]
    assert found.replay is not None and found.replay.texts == ["q"]
    assert found.notes[:3] == [
        f"{train}: 1 rows whose text is in {secret} are left out (0 nearly the same)",
        f"{old}: 1 rows whose text is in {secret} are left out (0 nearly the same)",
        f"{train}: 2 rows whose text repeats another are left out (1 nearly the same)",
    ]
    assert found.notes[-1] == "1 old rows to mix in, 0.05 of all that is trained on"
    with pytest.raises(InputError, match=r"old\.csv: all of its 2 rows would be left out, as rows whose text is in"):
        data.load(options_for("text-classification", train=train, eval=train, replay=old, check_leakage=old))


# -- tokens --------------------------------------------------------------------------------------------------


def options_for(task: str, **flags: Any) -> Any:
    label = {"label_column": "label"} if task == "text-classification" else {}
    needed = {"model": "m", "train": "t.csv", "task": task, "text_column": "text", "output": "o", **label}
    return options_from(given({**needed, **flags}, None))


@pytest.mark.slow
def test_texts_are_cut_only_if_that_was_asked_for(home: Path) -> None:
    tokenizer = load_tokenizer(home / "bert")
    rows = rows_of(["a film", "a film " * 40, "the film"], ["x", "y", "x"])
    with pytest.raises(InputError) as error:
        tokenized(rows, tokenizer, 64, options_for("text-classification"), {"x": 0, "y": 1})
    assert str(error.value) == (
        "rows.csv: 1 of 3 texts are longer than the 64 tokens that the model can take (the longest, in line 3, "
        "has 82); cut them off with --max-length 64"
    )
    table, cut = tokenized(rows, tokenizer, 64, options_for("text-classification", max_length="10"), {"x": 0, "y": 1})
    assert cut == 1
    assert [len(ids) for ids in table["input_ids"]] == [4, 10, 4]
    assert {ids[-1] for ids in table["input_ids"]} == {tokenizer.sep_token_id}
    assert list(table["labels"]) == [0, 1, 0]
    table, cut = tokenized(rows, tokenizer, None, options_for("text-classification"), {"x": 0, "y": 1})
    assert (cut, len(table["input_ids"][1])) == (0, 82)


def test_a_text_for_a_language_model_ends_unless_it_was_cut(home: Path) -> None:
    tokenizer = load_tokenizer(home / "llama")
    rows = rows_of(["a film", "a film a film", "a", "a film </s>"])
    table, cut = tokenized(rows, tokenizer, 64, options_for("causal-lm", max_length="3"), {})
    a, film = tokenizer("a film")["input_ids"]
    end = tokenizer.eos_token_id
    assert cut == 1
    assert table["input_ids"] == [[a, film, end], [a, film, a], [a, end], [a, film, end]]
    assert table["labels"] == table["input_ids"]
    assert table["attention_mask"][1] == [1, 1, 1]


def test_one_token_leaves_nothing_to_predict(home: Path) -> None:
    tokenizer = load_tokenizer(home / "llama")
    tokenizer.eos_token = None
    with pytest.raises(InputError, match=r"rows\.csv, line 3: the text is one token, which leaves none to predict"):
        tokenized(rows_of(["a film", "a"]), tokenizer, 64, options_for("causal-lm"), {})
