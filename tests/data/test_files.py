"""Tables from files: every format, what is text and what is missing, and one-line errors."""

from __future__ import annotations

import gzip
import sys
from pathlib import Path
from typing import Any

import pytest

from fastft.data import FileError, read_table
from fastft.demo import corpus

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
        ("a.json", '[{"text": "one", "label": 1}, {"text": "two", "label": 0}]'),
    ],
)
def test_text_formats(name: str, content: str, tmp_path: Path) -> None:
    assert list(read_table(written(tmp_path, name, content))) == ROWS


def test_parquet(tmp_path: Path) -> None:
    datasets.Dataset.from_list(ROWS).to_parquet(tmp_path / "a.parquet")
    assert list(read_table(str(tmp_path / "a.parquet"))) == ROWS


def test_the_demo_s_data_are_read_as_they_are() -> None:
    folder = Path(str(corpus.__file__)).parent / "data"
    for name in ("tweets", "movie_reviews"):
        found = read_table(folder / f"{name}.tsv.gz")
        assert found["text"][:] == [row["text"] for row in corpus.read_table(name)]


def test_columns_are_chosen_and_ordered(tmp_path: Path) -> None:
    path = written(tmp_path, "a.csv", "a,b,c\n1,2,3\n")
    assert read_table(path, columns=["c", "a"]).column_names == ["c", "a"]
    with pytest.raises(FileError, match=r"a\.csv: has no column 'd'; it has a, b, c$"):
        read_table(path, columns=["d"])


def test_words_that_look_like_missing_values_are_words(tmp_path: Path) -> None:
    found = read_table(written(tmp_path, "a.csv", "text,label\nnull,1\nNA,2\nNone,\n,4\n"))
    assert found["text"][:] == ["null", "NA", "None", None]
    assert found["label"][:] == [1, 2, None, 4]


def test_quotes_are_quotes_in_tsv_and_hold_cells_together_in_csv(tmp_path: Path) -> None:
    tsv = read_table(written(tmp_path, "a.tsv", 'text\tlabel\nhe said "no\t1\nand "yes"\t2\n'))
    assert tsv["text"][:] == ['he said "no', 'and "yes"']
    csv = read_table(written(tmp_path, "a.csv", 'text,label\n"a, ""b""\nc",1\n'))
    assert csv["text"][:] == ['a, "b"\nc']


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", "x", r"expected a name that ends in \.csv, .*, or one of them with \.gz"),
        (".gz", "", "expected a name that ends in"),
        ("a.csv", "", "has no rows"),
        ("a.csv", "text,label\n", "has no rows"),
        ("a.jsonl", "", "has no rows"),
        ("a.csv", "a,b\n1,2\n1,2,3,4\n", "cannot be read as csv: .*Expected 2 fields in line 3, saw 4"),
        ("a.csv", "text\ncafé".encode("latin-1"), "cannot be read as csv: "),
        ("a.jsonl", '{"a": 1}\nnot json\n', "cannot be read as jsonl: "),
        ("a.parquet", "nope", "cannot be read as parquet: "),
    ],
)
def test_errors_are_one_line_that_names_the_file(
    name: str, content: Any, said: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path, name, content) if name != ".gz" else tmp_path / name
    path.touch()
    with pytest.raises(FileError, match=f"{name}: {said}") as raised:
        read_table(path)
    assert len(str(raised.value).splitlines()) == 1
    assert capfd.readouterr() == ("", "")  # nothing else is said


def test_a_file_that_is_no_gzip_file_and_others_that_are_not_there(tmp_path: Path) -> None:
    (tmp_path / "a.csv.gz").write_text("text\nx\n")
    with pytest.raises(FileError, match="Not a gzipped file"):
        read_table(tmp_path / "a.csv.gz")
    with pytest.raises(FileError, match=r"none\.csv: no such file"):
        read_table(tmp_path / "none.csv")
    with pytest.raises(FileError, match="is a folder, not a file"):
        read_table(tmp_path)


def test_progress_bars_and_logging_are_as_before(tmp_path: Path) -> None:
    path = written(tmp_path, "a.csv", "text\nx\n")
    before = datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    read_table(path)
    assert (datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()) == before


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path, "a.csv", "text\nx\n")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r'needs the package datasets: pip install "fastft\[data\]"'):
        read_table(path)
