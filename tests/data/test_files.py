"""Tables from files: every format, what is text and what is missing, and one-line errors."""

from __future__ import annotations

import gzip
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from fastft.data import read_rows, read_table
from fastft.data.files import FileError
from fastft.errors import UserError
from fastft.problems import corpus

datasets = pytest.importorskip("datasets")


def written(folder: Path, name: str, content: str | bytes) -> Path:
    data = content.encode() if isinstance(content, str) else content
    path = folder / name
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return path


ROWS = [{"text": "one", "label": 1}, {"text": "two", "label": 0}]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", "text,label\none,1\ntwo,0\n"),
        ("a.CSV.gz", "text,label\none,1\ntwo,0\n"),
        ("with.dots.tsv", "text\tlabel\none\t1\ntwo\t0\n"),
        ("a.tsv.gz", "text\tlabel\none\t1\ntwo\t0\n"),
        ("a.jsonl", '{"text": "one", "label": 1}\n{"text": "two", "label": 0}\n'),
        ("a.jsonl.gz", '{"text": "one", "label": 1}\n{"text": "two", "label": 0}\n'),
    ],
)
def test_text_formats(name: str, content: str, tmp_path: Path) -> None:
    assert list(read_table(written(tmp_path, name, content))) == ROWS


def test_parquet(tmp_path: Path) -> None:
    datasets.Dataset.from_list(ROWS).to_parquet(tmp_path / "a.parquet")
    assert list(read_table(str(tmp_path / "a.parquet"))) == ROWS


@pytest.mark.slow
def test_the_demo_s_data_are_read_as_they_are() -> None:
    folder = Path(str(corpus.__file__)).parent / "data"
    for name in ("tweets", "movie_reviews"):
        found = read_table(folder / f"{name}.tsv.gz")
        assert found["text"][:] == [row["text"] for row in corpus.read_table(name)]


def test_rows_come_with_their_places(tmp_path: Path) -> None:
    path = written(tmp_path, "a.csv", 'text,label\n"one\nand more",1\ntwo,01\n')
    rows = [("line 2", {"text": "one\nand more", "label": "1"}), ("line 4", {"text": "two", "label": "01"})]
    assert list(read_rows(str(path))) == list(read_rows(path, ["label", "text"])) == rows
    datasets.Dataset.from_list(ROWS).to_parquet(tmp_path / "a.parquet")
    assert list(read_rows(tmp_path / "a.parquet", ["label"])) == [("row 1", {"label": 1}), ("row 2", {"label": 0})]
    uneven = written(tmp_path, "a.jsonl", '{"text": "one"}\n{"txt": "two"}\n')
    with pytest.raises(FileError, match=r"a\.jsonl, line 2: there is no column 'text', but 'txt'; closest: txt"):
        list(read_rows(uneven, ["text"]))


def test_a_wrong_file_is_a_value_error_and_the_user_s() -> None:
    assert issubclass(FileError, ValueError) and issubclass(FileError, UserError)


def test_columns_are_chosen_and_ordered(tmp_path: Path) -> None:
    path = written(tmp_path, "a.csv", "a,b,c\n1,2,3\n")
    assert read_table(path, columns=["c", "a"]).column_names == ["c", "a"]
    with pytest.raises(FileError, match=r"a\.csv: there is no column 'd', but 'a', 'b', 'c'$"):
        read_table(path, columns=["d"])


def test_words_that_look_like_missing_values_are_words(tmp_path: Path) -> None:
    found = read_table(written(tmp_path, "a.csv", "text,label\nnull,1\nNA,2\nNone,\n,4\n"))
    assert found["text"][:] == ["null", "NA", "None", None]
    assert found["label"][:] == [1, 2, None, 4]


@pytest.mark.parametrize(
    ("cells", "read"),
    [
        (["1", "-20", "", "999999999999999999"], [1, -20, None, 999999999999999999]),
        (["1", "2.5", "-1e-3", ".5"], [1.0, 2.5, -1e-3, 0.5]),
        (["1", "two"], ["1", "two"]),
        (["007", "8"], ["007", "8"]),
        (["nan", "1"], ["nan", "1"]),
        (["9999999999999999999999"], [1e22]),
        (["", ""], [None, None]),
    ],
)
def test_a_column_of_numbers_becomes_numbers(cells: list[str], read: list[Any], tmp_path: Path) -> None:
    content = "".join(f"{cell}\tx\n" for cell in ("value", *cells))
    assert read_table(written(tmp_path, "a.tsv", content))["value"][:] == read


def test_class_labels_of_a_parquet_file_by_name(tmp_path: Path) -> None:
    features = datasets.Features({"label": datasets.ClassLabel(names=["bad", "good"])})
    datasets.Dataset.from_dict({"label": [1, None, 0]}, features=features).to_parquet(tmp_path / "a.parquet")
    assert read_table(tmp_path / "a.parquet")["label"][:] == ["good", None, "bad"]


def test_rows_of_jsonl_may_lack_a_value_but_not_mix_kinds(tmp_path: Path) -> None:
    found = read_table(written(tmp_path, "a.jsonl", '{"a": 1}\n\n{"b": [2], "a": 3}\n'))
    assert found["a"][:] == [1, 3] and found["b"][:] == [None, [2]]
    with pytest.raises(FileError, match=r"b\.jsonl: a column holds values of different kinds: ") as raised:
        read_table(written(tmp_path, "b.jsonl", '{"a": 1}\n{"a": {"b": 2}}\n'))
    assert len(str(raised.value).splitlines()) == 1


def test_quotes_are_quotes_in_tsv_and_hold_cells_together_in_csv(tmp_path: Path) -> None:
    tsv = read_table(written(tmp_path, "a.tsv", 'text\tlabel\nhe said "no\t1\nand "yes"\t2\n'))
    assert tsv["text"][:] == ['he said "no', 'and "yes"']
    csv = read_table(written(tmp_path, "a.csv", 'text,label\n"a, ""b""\nc",1\n'))
    assert csv["text"][:] == ['a, "b"\nc']


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", "x", r"expected a file whose name ends in \.csv, "),
        (".gz", "", "expected a file whose name ends in"),
        ("a.parquet.gz", "", "expected a file whose name ends in"),
        ("a.csv", "", "expected rows, found none"),
        ("a.csv", "text,label\n", "expected rows, found none"),
        ("a.jsonl", "", "expected rows, found none"),
        ("a.parquet", "nope", "not a Parquet file: "),
    ],
)
def test_errors_are_one_line_that_names_the_file(
    name: str, content: Any, said: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path, name, content) if name != ".gz" else tmp_path / name
    path.touch()
    with pytest.raises(FileError, match=f"{re.escape(name)}: {said}") as raised:
        read_table(path)
    assert len(str(raised.value).splitlines()) == 1
    assert capfd.readouterr() == ("", "")  # nothing else is said


def test_a_file_that_is_no_gzip_file_and_others_that_are_not_there(tmp_path: Path) -> None:
    (tmp_path / "a.csv.gz").write_text("text\nx\n")
    with pytest.raises(FileError, match="Not a gzipped file"):
        read_table(tmp_path / "a.csv.gz")
    with pytest.raises(FileError, match=r"none\.csv: expected a file with rows, but there is none"):
        read_table(tmp_path / "none.csv")
    with pytest.raises(FileError, match="expected a file with rows, but there is a folder"):
        read_table(tmp_path)


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path, "a.csv", "text\nx\n")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r'needs the package datasets: pip install "fastft\[data\]"'):
        read_table(path)
