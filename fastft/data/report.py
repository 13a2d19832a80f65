"""A page on a data set: what is in it, what is wrong with it, and what to do about that."""

from __future__ import annotations

import html
import json
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from .duplicates import Match, column, find_duplicates, find_leakage, words_of
from .files import check_column
from .selection import Balance, class_balance

TEXT_NAMES = ("text", "sentence", "content", "review", "document", "body", "prompt", "question")
LABEL_NAMES = ("label", "labels", "class", "target", "category", "sentiment", "intent", "rating", "score", "stars")
MOST_CLASSES = 20
"""A column of more different numbers than this is a measurement; any with fractions is."""
EXAMPLES = 5
"""How many examples of a finding are shown."""
QUANTILES = {"min": 0.0, "p05": 0.05, "median": 0.5, "p95": 0.95, "p99": 0.99, "max": 1.0}
IMBALANCED = 3.0
"""Classes count as out of balance where the largest has so many times the examples of the smallest."""
RARE = 5
"""A class with fewer examples than this can hardly be learned or measured."""
KINDS = {
    "exact": "letter for letter",
    "normalised": "but for case, spacing, punctuation",
    "near": "nearly",
}
GREY, BLUE, ORANGE, RED, LIGHT = "#6b6b6b", "#0072b2", "#e69f00", "#d55e00", "#cfd8dc"  # Okabe and Ito's


@dataclass(frozen=True)
class Finding:
    """Something wrong, and what to do about it."""

    what: str
    do: str


@dataclass(frozen=True)
class Part:
    """One of the two files: its texts, its labels, and what was found in them alone."""

    name: str
    texts: list[str]
    labels: list[Any] | None
    empty: list[int]
    """Rows without a text."""
    words: list[int]
    """How many words each text has."""
    duplicates: list[Match]
    vocabulary: Counter[str]

    def count(self, kind: str) -> int:
        """How many texts repeat an earlier one in this way."""
        return sum(match.kind == kind for match in self.duplicates)

    @cached_property
    def balance(self) -> Balance | None:
        """How often each label occurs; None if there are no labels, or they are measurements."""
        labels = [label for label in self.labels or () if label is not None]
        different = {label for label in labels if isinstance(label, float)}
        if not labels or len(different) > MOST_CLASSES or any(label % 1 for label in different):
            return None
        return class_balance(label if isinstance(label, (str, int, float)) else str(label) for label in labels)

    @cached_property
    def numbers(self) -> list[float]:
        """The labels that are measurements."""
        return [] if self.balance else [float(label) for label in self.labels or () if label is not None]

    @cached_property
    def spread(self) -> float:
        """The standard deviation of labels that are measurements."""
        return statistics.pstdev(self.numbers)

    def labels_differ(self, match: Match) -> bool:
        """Whether a repetition has another label: another class, or a number more than a standard deviation away."""
        label, other = (self.labels[i] if self.labels is not None else None for i in (match.index, match.of))
        if label is None or other is None:
            return False
        return abs(float(label) - float(other)) > self.spread if self.balance is None else bool(label != other)


@dataclass(frozen=True)
class DataReport:
    """What :func:`data_report` found; :meth:`write` makes a page of it."""

    train: Part
    eval: Part | None
    text_column: str
    label_column: str | None
    leakage: list[Match]
    conflicts: list[Match]
    """Exact and normalised repetitions whose labels differ, see :meth:`Part.labels_differ`."""
    findings: list[Finding]

    def write(self, folder: Path) -> None:
        """Write ``report.md``, ``report.json`` and ``plot.png`` into a folder."""
        plot(self, folder / "plot.png")
        (folder / "report.json").write_text(json.dumps(self.as_json(), indent=1, ensure_ascii=False) + "\n", "utf-8")
        (folder / "report.md").write_text(self.markdown(), "utf-8")

    def summary(self) -> str:
        """The findings in a few lines."""
        lines = [size_of(self)]
        lines += [f"{number}. {finding.what}" for number, finding in enumerate(self.findings, start=1)]
        return "\n".join(lines if self.findings else [*lines, "Nothing wrong was found."])

    def as_json(self) -> dict[str, Any]:
        """All figures, ready for ``json``."""
        return {
            "text_column": self.text_column,
            "label_column": self.label_column,
            "train": part_json(self.train),
            "eval": part_json(self.eval) if self.eval is not None else None,
            "conflicting_labels": [asdict(match) for match in self.conflicts],
            "leakage": [asdict(match) for match in self.leakage] if self.eval is not None else None,
            "unseen_words": unseen_words(self) if self.eval is not None else None,
            "findings": [asdict(finding) for finding in self.findings],
        }

    def markdown(self) -> str:
        """The page; it shows ``plot.png`` beside it."""
        sections = [f"# {escaped(self.train.name)}", size_of(self), findings_section(self), "![](plot.png)"]
        sections += [lengths_section(self), labels_section(self), duplicates_section(self), leakage_section(self)]
        return "\n\n".join(section for section in sections if section) + "\n"


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
    """Look at a data set before training on it.

    Args:
        dataset: a Hugging Face ``Dataset``, as :func:`~fastft.data.read_table` gives.
        eval_dataset: what the model will be tested on, with the same columns.
        text_column: by default one with a usual name, else the one with the longest texts.
        label_column: by default one with a usual name, or none.
        near: as in :func:`~fastft.data.find_duplicates`.
        name, eval_name: what to call the two.

    Raises:
        FileError: a column is not there.
        ValueError: there is no column of texts.
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
    report = DataReport(train, tested, text_column, label_column, leakage, conflicts, [])
    report.findings.extend(find_problems(report))
    return report


def make_part(dataset: Any, text_column: str, label_column: str | None, near: float | None, name: str) -> Part:
    texts = column(dataset, text_column)
    words = [words_of(text) for text in texts]
    return Part(
        name=name,
        texts=texts,
        labels=None if label_column is None else list(dataset[label_column]),
        empty=[number for number, text in enumerate(texts) if not text.strip()],
        words=[len(text) for text in words],
        duplicates=find_duplicates(texts, near=near),
        vocabulary=Counter(word for text in words for word in text),
    )


def guess_text_column(dataset: Any, name: str) -> str:
    """A column with a usual name that holds texts, or else the one with the longest."""
    first = dataset.select(range(min(1000, len(dataset))))
    lengths: dict[str, int] = {
        key: sum(len(text or "") for text in first[key])
        for key, feature in dataset.features.items()
        if getattr(feature, "dtype", None) in ("string", "large_string")
    }
    if not lengths:
        raise ValueError(f"{name}: has no column of texts; it has {', '.join(dataset.column_names)}")
    usual = [key for wanted in TEXT_NAMES for key in lengths if key.lower() == wanted]
    return usual[0] if usual else max(lengths, key=lambda key: lengths[key])


def guess_label_column(dataset: Any, text_column: str) -> str | None:
    """A column with a usual name, also as a part of it: ``mean_rating``."""
    others = [key for key in dataset.column_names if key != text_column]
    return next((key for wanted in LABEL_NAMES for key in others if wanted in key.lower().split("_")), None)


# -- what is wrong -------------------------------------------------------------------------------------------


def find_problems(report: DataReport) -> list[Finding]:
    """The worst first."""
    train, text = report.train, report.text_column
    problems = [*leakage_problems(report)]
    if train.empty:
        problems.append(
            Finding(
                f"{rows(len(train.empty))} of {len(train.texts):,} {have(len(train.empty))} no text.",
                f'Leave them out: `dataset.filter(lambda row: (row["{text}"] or "").strip())`.',
            )
        )
    if report.conflicts:
        problems.append(
            Finding(
                f"{rows(len(report.conflicts))} {have(len(report.conflicts))} the same text as an earlier one, but "
                + ("another label." if train.balance else "a label more than a standard deviation away."),
                "Decide on one label for each text, or leave such rows out: no model can get both right.",
            )
        )
    sure = train.count("exact") + train.count("normalised")
    if sure:
        problems.append(
            Finding(
                f"{rows(sure)} of {len(train.texts):,} ({sure / len(train.texts):.1%}) {repeat(sure)} an earlier one, "
                f"{train.count('exact'):,} letter for letter.",
                f'Leave them out: `fastft.data.deduplicate(dataset, "{text}", near=None)`. They count twice in '
                "training, and a random split puts copies on both sides.",
            )
        )
    if near := train.count("near"):
        problems.append(
            Finding(
                f"{rows(near)} nearly {repeat(near)} an earlier one.",
                f'Look at them below; a "not" may be all that differs. If they are copies: '
                f'`fastft.data.deduplicate(dataset, "{text}")`.',
            )
        )
    return [*problems, *label_problems(report), *length_problems(report), *vocabulary_problems(report)]


def leakage_problems(report: DataReport) -> list[Finding]:
    if report.eval is None or not report.leakage:
        return []
    count, total = len(report.leakage), len(report.eval.texts)
    sure = sum(match.kind != "near" for match in report.leakage)
    return [
        Finding(
            f"{count:,} of {total:,} evaluation texts ({count / total:.1%}) are in the training data too, "
            f"{count - sure:,} of them nearly.",
            "Take them out of the training data, or the scores will promise too much: "
            f'`fastft.data.remove_leakage(dataset, eval_dataset, "{report.text_column}")`.',
        )
    ]


def label_problems(report: DataReport) -> list[Finding]:
    train, problems = report.train, []
    if train.labels is None:
        return []
    if missing := sum(label is None for label in train.labels):
        problems.append(
            Finding(
                f"{rows(missing)} {have(missing)} no label in `{report.label_column}`.",
                "Label them or leave them out.",
            )
        )
    balance = train.balance
    if balance is None:
        return problems
    if len(balance.counts) == 1:
        problems.append(
            Finding(f"All rows have the same label, {label_name(next(iter(balance.counts)))}.", "Check the column.")
        )
    elif balance.imbalance >= IMBALANCED:
        problems.append(
            Finding(
                f"The classes are out of balance, {balance.imbalance:,.1f} to 1: always guessing "
                f"{label_name(next(iter(balance.counts)))} is {balance.majority:.1%} right.",
                "Judge by macro F1 or balanced accuracy, and weigh the loss with "
                "`fastft.data.class_balance(labels).weights`.",
            )
        )
    rare = [label for label, count in balance.counts.items() if count < RARE]
    if rare and len(balance.counts) > 1:
        problems.append(
            Finding(
                f"{len(rare)} of {len(balance.counts)} classes have fewer than {RARE} examples: {listed(rare)}.",
                "Collect more of them, merge them with others, or leave them out.",
            )
        )
    tested = report.eval.balance if report.eval is not None else None
    unknown = [label for label in tested.counts if label not in balance.counts] if tested is not None else []
    if unknown:
        problems.append(
            Finding(f"Labels of the evaluation data that are never trained: {listed(unknown)}.", "Check both columns.")
        )
    return problems


def length_problems(report: DataReport) -> list[Finding]:
    words = [count for count in report.train.words if count]
    if not words or max(words) < 50 * statistics.median(words):
        return []
    longest = max(range(len(report.train.words)), key=lambda row: report.train.words[row])
    return [
        Finding(
            f"The longest text, row {longest}, has {max(words):,} words; half have at most "
            f"{statistics.median(words):,.0f}.",
            "See whether several rows ran into one; otherwise split or truncate it, as it makes its whole batch long.",
        )
    ]


def vocabulary_problems(report: DataReport) -> list[Finding]:
    if report.eval is None or not report.eval.vocabulary:
        return []
    unseen = unseen_words(report)
    if unseen["share_of_words"] < 0.1:
        return []
    return [
        Finding(
            f"{unseen['share_of_words']:.0%} of the words in the evaluation data never occur in the training data.",
            "Add training data from where the evaluation data come from, or mix such data in with "
            "`fastft.data.ReplayMixer`; keep more of the model with an anchor.",
        )
    ]


def unseen_words(report: DataReport) -> dict[str, Any]:
    """What of the evaluation data's words is not in the training data."""
    assert report.eval is not None
    known, asked = report.train.vocabulary, report.eval.vocabulary
    unseen = {word: count for word, count in asked.items() if word not in known}
    return {
        "share_of_words": sum(unseen.values()) / max(1, sum(asked.values())),
        "share_of_different_words": len(unseen) / max(1, len(asked)),
        "most_frequent": [word for word, _ in Counter(unseen).most_common(10)],
    }


# -- figures -------------------------------------------------------------------------------------------------


def part_json(part: Part) -> dict[str, Any]:
    repeated = {match.index for match in part.duplicates}
    return {
        "name": part.name,
        "rows": len(part.texts),
        "empty": part.empty,
        "words": quantiles(part.words),
        "characters": quantiles([len(text) for text in part.texts]),
        "different_words": len(part.vocabulary),
        "labels": labels_json(part),
        "duplicates": [asdict(match) for match in part.duplicates],
        "rows_without_repetition": len(part.texts) - len(repeated),
    }


def labels_json(part: Part) -> dict[str, Any] | None:
    if part.labels is None:
        return None
    missing = sum(label is None for label in part.labels)
    balance = part.balance
    if balance is None:
        return {"missing": missing, "numbers": quantiles(part.numbers)}
    counts = {str(label): count for label, count in balance.counts.items()}
    return {"missing": missing, "counts": counts, "majority": balance.majority, "imbalance": balance.imbalance}


def quantiles(values: Sequence[float]) -> dict[str, float]:
    if not values:
        return {}
    return {name: round(float(np.quantile(values, q)), 4) for name, q in QUANTILES.items()}


# -- words ---------------------------------------------------------------------------------------------------


def rows(count: int) -> str:
    return f"{count:,} row{'s' if count != 1 else ''}"


def have(count: int) -> str:
    return "have" if count != 1 else "has"


def repeat(count: int) -> str:
    return "repeat" if count != 1 else "repeats"


def label_name(label: Any) -> str:
    return f"“{label}”" if isinstance(label, str) else str(label)


def listed(labels: Sequence[Any]) -> str:
    names = [label_name(label) for label in labels[:10]]
    return ", ".join(names) + (f" and {len(labels) - 10} more" if len(labels) > 10 else "")


def escaped(text: str, longest: int = 90) -> str:
    """A text in one short line that Markdown leaves alone."""
    line = " ".join(text.split())
    line = line if len(line) <= longest else line[: longest - 1] + "…"
    line = html.escape(line, quote=False)
    return "".join(f"\\{sign}" if sign in "\\`*_{}[]#|~$" else sign for sign in line)


def size_of(report: DataReport) -> str:
    labels = f", labels from `{report.label_column}`" if report.label_column else ", no labels"
    beside = f"; {report.eval.name}: {rows(len(report.eval.texts))}" if report.eval is not None else ""
    return (
        f"{report.train.name}: {rows(len(report.train.texts))}{beside}; texts from `{report.text_column}`{labels}. "
        "Rows are counted from 0."
    )


def table(head: Sequence[str], body: Iterable[Sequence[Any]]) -> str:
    """A Markdown table; numbers to the right."""
    lines = [list(map(str, line)) for line in body]
    numeric = [
        all(line[i].replace(",", "").replace(".", "").replace("%", "").strip("- ").isdigit() for line in lines)
        for i in range(len(head))
    ]
    rule = ["---:" if right else "---" for right in numeric]
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, rule, *lines])


def findings_section(report: DataReport) -> str:
    if not report.findings:
        return "## Nothing wrong was found\n\nNo empty texts, no repetitions" + (
            ", and no evaluation text in the training data." if report.eval is not None else "."
        )
    lines = [f"{i}. **{finding.what}** {finding.do}" for i, finding in enumerate(report.findings, start=1)]
    return "## What to do\n\n" + "\n".join(lines)


def lengths_section(report: DataReport) -> str:
    parts = [part for part in (report.train, report.eval) if part is not None]
    body = []
    for part in parts:
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
        found = [part for part in (train, report.eval) if part is not None and part.labels is not None]
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
            [match.index, match.of, escaped(how), escaped(train.texts[match.index]), escaped(train.texts[match.of])]
        )
    return f"## Repetitions\n\n{some_of(len(shown), len(train.duplicates))}\n\n{table(head, body)}"


def leakage_section(report: DataReport) -> str:
    if report.eval is None or not report.leakage:
        return ""
    shown: list[Match] = []
    for kind in KINDS:
        shown += spread([match for match in report.leakage if match.kind == kind])
    head = ["eval row", "training row", "how", "evaluation text", "training text"]
    body = [
        [
            match.index,
            match.of,
            f"{match.similarity:.0%} alike" if match.kind == "near" else KINDS[match.kind],
            escaped(report.eval.texts[match.index]),
            escaped(report.train.texts[match.of]),
        ]
        for match in shown
    ]
    return (
        f"## Evaluation texts in the training data\n\n{some_of(len(shown), len(report.leakage))}\n\n{table(head, body)}"
    )


def spread(matches: Sequence[Match]) -> list[Match]:
    """A few examples, from the most to the least alike, of different texts where there are."""
    ranked = sorted(matches, key=lambda match: -match.similarity)
    firsts = list({match.of: match for match in reversed(ranked)}.values())[::-1]
    return (
        [firsts[i] for i in np.unique(np.linspace(0, len(firsts) - 1, EXAMPLES).round().astype(int))] if firsts else []
    )


def some_of(shown: int, total: int) -> str:
    return "All of them:" if shown == total else f"{shown} of {total:,}; all are in `report.json`:"


# -- the plot ------------------------------------------------------------------------------------------------


def plot(report: DataReport, path: Path) -> None:
    """Draw lengths, labels and repetitions."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawers = [plot_lengths, *([plot_labels] if report.train.labels else []), plot_repetitions]
    figure = Figure(figsize=(4.6 * len(drawers), 4), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)  # drawn without pyplot: no display, and no global state of the caller's touched
    for axes, draw in zip(np.atleast_1d(figure.subplots(1, len(drawers))), drawers, strict=True):
        draw(report, axes)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def parts_and_colours(report: DataReport) -> list[tuple[Part, str]]:
    return [(part, colour) for part, colour in ((report.train, BLUE), (report.eval, ORANGE)) if part is not None]


def style_of(part: Part, report: DataReport) -> dict[str, Any]:
    """A histogram's: the evaluation data's is an outline over the training data's."""
    return {"alpha": 0.6} if part is report.train else {"histtype": "step", "linewidth": 1.8}


def plot_lengths(report: DataReport, axes: Any) -> None:
    most = max(quantiles(part.words)["p99"] for part, _ in parts_and_colours(report))
    bins = np.arange(0, max(2.0, most) + 1.5, max(1, round(most / 30))) - 0.5
    for part, colour in parts_and_colours(report):
        shares = np.full(len(part.words), 100 / len(part.words))
        clipped = np.minimum(part.words, bins[-1] - 0.25)
        axes.hist(clipped, bins=bins, weights=shares, color=colour, label=part.name, **style_of(part, report))
    axes.set_xlabel("words in a text (the longest 1 % in the last bar)")
    axes.set_ylabel("% of rows")
    axes.set_title("Lengths", loc="left", fontweight="bold")
    if report.eval is not None:
        axes.legend(frameon=False)


def plot_labels(report: DataReport, axes: Any) -> None:
    axes.set_title(f"Labels: {report.label_column}", loc="left", fontweight="bold")
    balance = report.train.balance
    parts = [(part, colour) for part, colour in parts_and_colours(report) if part.labels is not None]
    if balance is None:
        for part, colour in parts:
            if numbers := part.numbers:
                shares = np.full(len(numbers), 100 / len(numbers))
                axes.hist(numbers, bins=30, weights=shares, color=colour, label=part.name, **style_of(part, report))
        axes.set_xlabel(str(report.label_column))
        axes.set_ylabel("% of rows")
        return
    classes = list(balance.counts)[:12]
    height = 0.8 / len(parts)
    for number, (part, colour) in enumerate(parts):
        found = part.balance
        total = sum(found.counts.values()) if found is not None else 1
        parts_of = [100 * (found.counts.get(label, 0) if found is not None else 0) / total for label in classes]
        places = [place + number * height for place in range(len(classes))]
        axes.barh(places, parts_of, height=height, color=colour, alpha=0.85, label=part.name)
    middle = height * (len(parts) - 1) / 2
    axes.set_yticks([place + middle for place in range(len(classes))], [str(label)[:20] for label in classes])
    axes.invert_yaxis()
    axes.set_xlabel(
        "% of rows" + (f"; the 12 largest of {len(balance.counts)} classes" if len(balance.counts) > 12 else "")
    )


def plot_repetitions(report: DataReport, axes: Any) -> None:
    """For each file, and for leakage, the shares of rows that are fine, repeated, and empty."""
    bars: list[tuple[str, dict[str, int], int]] = []
    for part, _ in parts_and_colours(report):
        counts = {kind: part.count(kind) for kind in KINDS}
        bars.append((f"within\n{part.name}", {**counts, "no text": len(part.empty)}, len(part.texts)))
    if report.eval is not None:
        counts = Counter(str(match.kind) for match in report.leakage)
        bars.append((f"{report.eval.name}\nin {report.train.name}", dict(counts), len(report.eval.texts)))
    colours = {"exact": RED, "normalised": ORANGE, "near": BLUE, "no text": GREY}
    names = {**KINDS, "no text": "no text"}
    starts = [0.0] * len(bars)
    for kind, colour in colours.items():
        if not any(counts.get(kind) for _, counts, _ in bars):
            continue
        widths = [100 * counts.get(kind, 0) / total for _, counts, total in bars]
        axes.barh(
            range(len(bars)),
            widths,
            left=list(starts),
            color=colour,
            height=0.5,
            label=names[kind],
        )
        for i, width in enumerate(widths):
            starts[i] += width
    for i in range(len(bars)):
        axes.text(starts[i], i, f" {starts[i]:.1f} %", va="center", fontsize=9)
    axes.set_yticks(range(len(bars)), [name for name, _, _ in bars], fontsize=9)
    axes.set_xlim(0, max(1.0, 1.25 * max(starts)))
    axes.set_ylim(max(0.9, len(bars) - 0.4), -0.6)
    axes.set_xlabel("% of rows")
    axes.set_title("Repetitions", loc="left", fontweight="bold")
    if any(starts):
        axes.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(0, -0.14), ncols=2)
