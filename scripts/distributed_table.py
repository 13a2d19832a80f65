"""``python scripts/distributed_table.py``: docs/_generated/distributed.md out of tests/distributed/results.json.

With ``--measure`` the results are measured first, in seven processes, and written; a row whose package is not installed
stays as it is. With ``--check`` nothing is written, and it fails if the table is not up to date; whether the results
are true, tests/distributed/test_matrix.py says.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from fastft.tables import markdown

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "docs" / "_generated" / "distributed.md"
RESULTS = ROOT / "tests" / "distributed" / "results.json"
sys.path.insert(0, str(ROOT / "tests"))

from distributed import processes, scenarios, ways  # noqa: E402
from distributed.given_gradients import STEPS  # noqa: E402

Results = dict[str, Any]


def measured(before: Results) -> Results:
    """The results as they are now, with the rows of ``before`` that cannot be measured here.

    ``{"torch": version, "cells": {way: {column: cell}}, "measured_with": {way: versions}}``: cells as in
    ``processes.Cell``, versions for ways that need a package.

    Raises:
        SystemExit: for a cell that has failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        cells = processes.measure(Path(folder))
    failed = processes.failures(cells)
    if failed:
        raise SystemExit("\n".join(failed))
    version = torch.__version__.partition("+")[0]
    measured_with = dict(before["measured_with"])
    for way in ways.WAYS:
        if way.package is not None and way.name in cells:
            measured_with[way.name] = f"{way.package} {metadata.version(way.package)} and torch {version}"
    rows = {**before["cells"], **cells}
    return {
        "torch": version,
        "cells": {way.name: rows[way.name] for way in ways.WAYS},
        "measured_with": measured_with,
    }


def document(results: Results) -> str:
    """The whole page."""
    sentences: list[str] = []
    columns = {name: scenario.__doc__ for name, scenario in scenarios.COLUMNS.items()}
    columns[scenarios.RESHARD] = scenarios.RESHARD_MEANING
    cells = {way.name: results["cells"][way.name] for way in ways.WAYS}
    rows = [[name, *(shown(cells[name][column], sentences) for column in columns)] for name in cells]
    others = [beside(name, cells, sentences) for name in scenarios.OTHERS]
    parts = [
        "<!-- Made by scripts/distributed_table.py; do not edit. -->",
        "# Options in several processes",
        f"Each cell is a run of {STEPS} steps in four processes, with torch {results['torch']}, held to the same run "
        "in one process. *exact*: parameters, gradient norms and the count of skipped steps are equal bit for bit, in "
        "every process. *refused*: a `ValueError` in every process, before the call or step that it refuses has "
        "written a parameter. Its sentence is below the table, as is why something was *not tried*.",
        "\n".join(markdown(["", *columns], rows, left=1 + len(columns))),
        "\n".join(f"{number}. {sentence}" for number, sentence in enumerate(sentences, start=1)),
        "The gradients' squares add up without rounding in these runs. Where they do not, as *clip* tries too, the "
        "order in which many processes add them up is another: the norm is then within one unit in the last place, in "
        f"float64, of that of one process, and parameters after a step within {scenarios.MOST_EPS} times their dtype's "
        "eps.",
        "## The rows",
        "\n".join(f"- **{way.name}**: {about(way, results['measured_with'].get(way.name))}" for way in ways.WAYS),
        "## The columns",
        "\n".join(f"- **{name}**: {first_line(meaning)}" for name, meaning in columns.items()),
        "## Beside the table",
        "\n".join(others),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def shown(cell: dict[str, str], sentences: list[str]) -> str:
    """A cell in a word, with the number of its sentence, which is added to ``sentences`` if it is new."""
    if "sentence" not in cell:
        return cell["outcome"]
    sentence = " ".join(cell["sentence"].split())
    if sentence not in sentences:
        sentences.append(sentence)
    return f"{cell['outcome']} ({1 + sentences.index(sentence)})"


def about(way: ways.Way, versions: str | None) -> str:
    """A row in words."""
    measured_with = "" if versions is None else f" Measured with {versions}."
    return f'{way.meaning} `Unfreezer(mode="{way.unfreezer_mode}")`.{measured_with}'


def beside(name: str, cells: dict[str, dict[str, dict[str, str]]], sentences: list[str]) -> str:
    """A scenario that is no column, with the ways that tried it by their outcome."""
    held: dict[str, list[str]] = {}
    for way, of_way in cells.items():
        if name in of_way:
            held.setdefault(shown(of_way[name], sentences), []).append(way)
    outcomes = "; ".join(f"{outcome} with {', '.join(tried)}" for outcome, tried in held.items())
    return f"- {first_line(scenarios.OTHERS[name].__doc__)} {outcomes[:1].upper()}{outcomes[1:]}."


def first_line(text: str | None) -> str:
    return (text or "").strip().splitlines()[0]


def main() -> int:
    """Exit status 1 if ``--check`` finds the table stale."""
    arguments = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    arguments.add_argument("--measure", action="store_true", help="measure and write the results first")
    arguments.add_argument("--check", action="store_true", help="write nothing; fail if the table is stale")
    options = arguments.parse_args()
    if options.measure:
        before = json.loads(RESULTS.read_text(encoding="utf-8"))
        RESULTS.write_text(json.dumps(measured(before), indent=1) + "\n", encoding="utf-8")
    wanted = document(json.loads(RESULTS.read_text(encoding="utf-8")))
    if options.check:
        if not TABLE.exists() or TABLE.read_text(encoding="utf-8") != wanted:
            print(f"{TABLE} is stale: run python scripts/distributed_table.py", file=sys.stderr)
            return 1
        return 0
    TABLE.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
