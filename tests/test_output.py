"""Nobody ever sees half a result, and nothing a user had is lost."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from fastft.output import OutputError, staged


def write_all(folder: Path) -> None:
    (folder / "report.json").write_text("new")
    (folder / "model").mkdir()
    (folder / "model" / "weights").write_text("new")


def contents(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_new_folder_appears_whole_with_its_parents(tmp_path: Path) -> None:
    output = tmp_path / "a" / "b"
    with staged(output, overwrite=False) as folder:
        write_all(folder)
        assert not output.exists()
    assert contents(output) == {"model/weights": "new", "report.json": "new"}
    assert [p.name for p in output.parent.iterdir()] == ["b"]
    other = tmp_path / "made by hand"
    other.mkdir()
    assert stat.S_IMODE(output.stat().st_mode) == stat.S_IMODE(other.stat().st_mode)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_a_run_that_fails_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    def failing_run() -> None:
        with staged(tmp_path / "a" / "b", overwrite=False) as folder:
            write_all(folder)
            raise error

    with pytest.raises(error):
        failing_run()
    assert list(tmp_path.iterdir()) == []


def test_an_empty_folder_is_filled_in_place(tmp_path: Path) -> None:
    inode = tmp_path.stat().st_ino
    with staged(tmp_path, overwrite=False) as folder:
        write_all(folder)
    assert contents(tmp_path) == {"model/weights": "new", "report.json": "new"}
    assert tmp_path.stat().st_ino == inode


def test_a_folder_with_files_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(OutputError, match="is not empty; choose another output, or overwrite with --overwrite"):
        staged(tmp_path, overwrite=False).__enter__()
    assert contents(tmp_path) == {"thesis.tex": "years of work"}


def test_overwriting_replaces_files_of_the_same_name_and_keeps_the_others(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    (tmp_path / "report.json").write_text("old")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "notes").write_text("mine")
    with staged(tmp_path, overwrite=True) as folder:
        write_all(folder)
    assert contents(tmp_path) == {
        "model/notes": "mine",
        "model/weights": "new",
        "report.json": "new",
        "thesis.tex": "years of work",
    }


def test_overwriting_that_fails_keeps_the_old_result(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text("old")

    def failing_run() -> None:
        with staged(tmp_path, overwrite=True) as folder:
            write_all(folder)
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        failing_run()
    assert contents(tmp_path) == {"report.json": "old"}


def test_a_file_in_the_way_is_said(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("x")
    with pytest.raises(OutputError, match="taken is not a folder"):
        staged(tmp_path / "taken", overwrite=True).__enter__()
    with pytest.raises(OutputError, match="cannot write to"):
        staged(tmp_path / "taken" / "below", overwrite=False).__enter__()
