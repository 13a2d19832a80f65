"""The kit for tables: aligned text and Markdown."""

from __future__ import annotations

import pytest

from fastft.tables import aligned, markdown


def test_the_first_column_is_to_the_left_and_the_others_to_the_right() -> None:
    assert aligned(["name", "ms"], [["a", "10.5"], ["longer", "1"]]) == ["name      ms", "a       10.5", "longer     1"]


def test_titles_of_two_lines_have_a_rule_below() -> None:
    lines = aligned(["", "ms"], [["a", "1"]], over=["", "time"])
    assert lines == ["   time", "     ms", "-------", "a     1"]


def test_lines_of_different_lengths_are_an_error() -> None:
    with pytest.raises(ValueError):
        aligned(["a", "b"], [["1"]])


def test_markdown_escapes_bars_and_aligns() -> None:
    assert markdown(["a|b", "c", "d"], [["1", "2", ""]], left=2) == [
        "| a\\|b | c | d |",
        "| --- | --- | ---: |",
        "| 1 | 2 |  |",
    ]
