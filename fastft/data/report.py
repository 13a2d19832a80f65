"""A page on a data set: its size, what is wrong with it, and what to do about that."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from fastft.reports import Report
from fastft.tables import markdown

from .duplicates import Match, find_leakage
from .examine import (
    KINDS,
    MOST_CLASSES,
    Examined,
    Finding,
    find_problems,
    guess_label_column,
    guess_text_column,
    make_part,
    part_json,
    quantiles,
    rows,
    unseen_words,
)
from .files import check_column

EXAMPLES = 5
"""How many examples of a finding are shown."""


class DataReport(Report, Examined):
    """A data set's faults and figures, as :func:`data_report` returns them; ``str()`` of it is its findings."""

    @cached_property
    def findings(self) -> list[Finding]:
        """Each with ``what`` is wrong and what to ``do`` about it, the worst first."""
        return find_problems(self)

    def __str__(self) -> str:
        lines = [size_of(self)]
        lines += [f"{number}. {finding.what}" for number, finding in enumerate(self.findings, start=1)]
        return "\n".join(lines if self.findings else [*lines, "Nothing wrong was found."])

    def to_markdown(self) -> str:
        """The page; it shows ``plot.png`` beside it."""
        sections = [f"# {escaped(self.train.name)}", size_of(self), findings_section(self), "![](plot.png)"]
        sections += [lengths_section(self), labels_section(self), duplicates_section(self), leakage_section(self)]
        return "\n\n".join(section for section in sections if section) + "\n"

    def to_json(self) -> str:
        """All figures, as JSON."""
        figures = {
            "text_column": self.text_column,
            "label_column": self.label_column,
            "train": part_json(self.train),
            "eval": part_json(self.eval) if self.eval is not None else None,
            "conflicting_labels": [asdict(match) for match in self.conflicts],
            "leakage": [asdict(match) for match in self.leakage] if self.eval is not None else None,
            "unseen_words": unseen_words(self) if self.eval is not None else None,
            "findings": [asdict(finding) for finding in self.findings],
        }
        return json.dumps(figures, indent=1, ensure_ascii=False)

    def plot(self, path: str | Path) -> None:
        """Draw lengths, labels and repetitions. Needs matplotlib."""
        from .plots import plot_report

        plot_report(self, Path(path))


def data_report(
    dataset: Any,
    eval_dataset: Any = None,
    *,
    text_column: str | None = None,
    label_column: str | None = None,
    near: float | None = 0.8,
    name: str = "train",
    eval_name: str = "eval",
) -> DataReport:
    """Examine a data set before training on it.

    Args:
        dataset: a Hugging Face ``Dataset``, as :func:`~fastft.data.read_table` gives.
        eval_dataset: what the model will be tested on, with the same columns.
        text_column: by default one with a usual name, else the one with the longest texts.
        label_column: by default one with a usual name, or none.
        near: as in :func:`~fastft.data.find_duplicates`.
        name, eval_name: what to call the two.

    Returns:
        The report. ``str()`` of it is its findings; its ``to_markdown()`` a page, its ``to_json()`` all figures,
        ``plot(path)`` draws it, and ``write(folder)`` writes ``report.md``, ``report.json`` and ``plot.png``. Its
        ``findings`` each have ``what`` is wrong and what to ``do`` about it.

    Raises:
        ValueError: a column is not there, or there is no column of texts.
    """
    text_column = text_column or guess_text_column(dataset, name)
    label_column = label_column or guess_label_column(dataset, text_column)
    check_column(name, dataset.column_names, text_column)
    if label_column is not None:
        check_column(name, dataset.column_names, label_column)
    train = make_part(dataset, text_column, label_column, near, name)
    tested, leakage = None, []
    if eval_dataset is not None:
        check_column(eval_name, eval_dataset.column_names, text_column)
        eval_label = label_column if label_column in eval_dataset.column_names else None
        tested = make_part(eval_dataset, text_column, eval_label, near, eval_name)
        leakage = find_leakage(train.texts, tested.texts, near=near)
    conflicts = [match for match in train.duplicates if match.kind != "near" and train.labels_differ(match)]
    return DataReport(train, tested, text_column, label_column, leakage, conflicts)


# -- the page ---------------------------------------------------------------------------------------------------


def escaped(text: str, longest: int = 90) -> str:
    """A text in one short line, without anything that Markdown would format; :func:`markdown` escapes ``|``."""
    line = " ".join(text.split())
    line = line if len(line) <= longest else line[: longest - 1] + "…"
    line = html.escape(line, quote=False)
    return "".join(f"\\{sign}" if sign in "\\`*_{}[]#~$" else sign for sign in line)


def size_of(report: DataReport) -> str:
    labels = f", labels from `{report.label_column}`" if report.label_column else ", no labels"
    beside = f"; {report.eval.name}: {rows(len(report.eval.texts))}" if report.eval is not None else ""
    return (
        f"{report.train.name}: {rows(len(report.train.texts))}{beside}; texts from `{report.text_column}`{labels}. "
        "Rows are counted from 0."
    )


def table(titles: Sequence[str], body: Sequence[Sequence[str]], left: int = 1) -> str:
    return "\n".join(markdown(titles, body, left))


def findings_section(report: DataReport) -> str:
    if not report.findings:
        return "## Nothing wrong was found\n\nNo empty texts, no repetitions" + (
            ", and no evaluation text in the training data." if report.eval is not None else "."
        )
    lines = [f"{i}. **{finding.what}** {finding.do}" for i, finding in enumerate(report.findings, start=1)]
    return "## What to do\n\n" + "\n".join(lines)


def lengths_section(report: DataReport) -> str:
    body = []
    for part in report.parts:
        for what, values in (("words", part.words), ("characters", [len(text) for text in part.texts])):
            body.append([f"{escaped(part.name)}, {what}", *(f"{value:,.0f}" for value in quantiles(values).values())])
    head = ["", "shortest", "5 %", "half", "95 %", "99 %", "longest"]
    limit = round_up(quantiles(report.train.words)["p99"] * 4 / 3)
    note = f"At about 4/3 tokens to an English word, a `max_length` of {limit} holds 99 % of the texts whole."
    return f"## Lengths\n\n{table(head, body)}\n\n{note}"


def round_up(tokens: float) -> int:
    """The next multiple of 8, which hardware likes."""
    return max(8, -(-int(tokens) // 8) * 8)


def labels_section(report: DataReport) -> str:
    train = report.train
    if train.labels is None:
        return ""
    balance = train.balance
    if balance is None:
        found = [part for part in report.parts if part.labels is not None]
        body = [[escaped(part.name), *(f"{v:.3g}" for v in quantiles(part.numbers).values())] for part in found]
        head = ["", "least", "5 %", "half", "95 %", "99 %", "most"]
        return (
            f"## Labels: `{report.label_column}`\n\nNumbers, not classes.\n\n{table(head, body)}"
            if train.numbers
            else ""
        )
    tested = report.eval.balance if report.eval is not None else None
    head = ["label", "rows", "share"] + (["eval rows", "eval share"] if tested is not None else [])
    body = []
    for label, count in list(balance.counts.items())[:MOST_CLASSES]:
        line = [escaped(str(label)), f"{count:,}", f"{count / sum(balance.counts.values()):.1%}"]
        if tested is not None:
            other = tested.counts.get(label, 0)
            line += [f"{other:,}", f"{other / sum(tested.counts.values()):.1%}"]
        body.append(line)
    more = len(balance.counts) - len(body)
    return f"## Labels: `{report.label_column}`\n\n{table(head, body)}" + (f"\n\nand {more} more." if more else "")


def duplicates_section(report: DataReport) -> str:
    train = report.train
    if not train.duplicates:
        return ""
    shown = spread(report.conflicts)
    for kind in KINDS:
        shown += spread([match for match in train.duplicates if match.kind == kind and match not in shown])
    head = ["row", "repeats row", "how", "text", "as in"]
    body = []
    for match in shown:
        how = f"{match.similarity:.0%} alike" if match.kind == "near" else KINDS[match.kind]
        if train.labels is not None and train.labels_differ(match):
            how += f"; label {train.labels[match.index]} instead of {train.labels[match.of]}"
        body.append(
            [*numbers_of(match), escaped(how), escaped(train.texts[match.index]), escaped(train.texts[match.of])]
        )
    return f"## Repetitions\n\n{some_of(len(shown), len(train.duplicates))}\n\n{table(head, body, left=5)}"


def leakage_section(report: DataReport) -> str:
    if report.eval is None or not report.leakage:
        return ""
    shown: list[Match] = []
    for kind in KINDS:
        shown += spread([match for match in report.leakage if match.kind == kind])
    head = ["eval row", "training row", "how", "evaluation text", "training text"]
    body = [
        [
            *numbers_of(match),
            f"{match.similarity:.0%} alike" if match.kind == "near" else KINDS[match.kind],
            escaped(report.eval.texts[match.index]),
            escaped(report.train.texts[match.of]),
        ]
        for match in shown
    ]
    some = some_of(len(shown), len(report.leakage))
    return f"## Evaluation texts in the training data\n\n{some}\n\n{table(head, body, left=5)}"


def numbers_of(match: Match) -> tuple[str, str]:
    return str(match.index), str(match.of)


def spread(matches: Sequence[Match]) -> list[Match]:
    """A few examples, from the most to the least alike, of different texts where there are."""
    ranked = sorted(matches, key=lambda match: -match.similarity)
    firsts = list({match.of: match for match in reversed(ranked)}.values())[::-1]
    return (
        [firsts[i] for i in np.unique(np.linspace(0, len(firsts) - 1, EXAMPLES).round().astype(int))] if firsts else []
    )


def some_of(shown: int, total: int) -> str:
    return "All of them:" if shown == total else f"{shown} of {total:,}; all are in `report.json`:"
