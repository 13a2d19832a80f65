"""Tables, as aligned text and in Markdown."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["aligned", "markdown"]


def aligned(titles: Sequence[str], rows: Sequence[Sequence[str]], *, over: Sequence[str] | None = None) -> list[str]:
    """Lines of a table: the first column to the left, the others to the right.

    ``over``: a line of titles above the titles; with it a rule parts them from the rows.
    """
    head = [titles] if over is None else [over, titles]
    table = [*head, *rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip() for line in table]
    if over is not None:
        lines.insert(2, "-" * (sum(widths) + 2 * (len(widths) - 1)))
    return lines


def markdown(titles: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """Lines of a table in Markdown: the first ``left`` columns to the left, the others to the right."""
    rule = ["---"] * left + ["---:"] * (len(titles) - left)
    lines = [[cell.replace("|", "\\|") for cell in line] for line in (titles, *rows)]
    return [f"| {' | '.join(line)} |" for line in (lines[0], rule, *lines[1:])]
