"""How a chain of tasks changed each of them, and what the model knew: a table from chain.jsonl and nothing else.

``python benchmarks/plot.py`` puts it into the documentation.
"""

from __future__ import annotations

from typing import Any

from fastft.retention import Estimate
from fastft.tables import markdown

from . import plan, records
from .report import Array, Result, described, retention_report, signed

FILE = records.RESULTS / "chain.jsonl"
TASKS = ("movie", "amazon")
NAMES = {"full": "LP-FT", "anchor+gradual": "anchor + gradual"}
"""Of methods, as in the other tables; each stage starts from a linear probe's head."""


class Chain:
    """One chain: movie, Amazon, movie again."""

    def __init__(self, record: dict[str, Any], base: Result) -> None:
        settings = plan.Settings(**record["settings"])
        self.name = NAMES.get(settings.method, settings.method)
        self.settings = described(plan.Choice(self.name, settings, "1"))
        self.seconds = sum(stage["cpu_seconds"] for stage in record["stages"])
        self.hits: list[dict[str, Array]] = [
            {name: records.unpack(packed).numpy() for name, packed in stage["scores"].items()}
            for stage in record["stages"]
        ]
        self.before = base.source[0]

    def transfer(self, name: str, learned: int, later: int) -> Estimate:
        """How a later stage changed the accuracy on a task since the stage that learned it, in points."""
        report = retention_report("learned", self.hits[learned][name])
        return report.add("later", source={"source": self.hits[later][name]}).source["source"].gain

    def kept(self, stage: int) -> Estimate:
        """The part of the pre-trained model's source recall after a stage."""
        report = retention_report("pre-trained", self.before)
        kept = report.add("stage", source={"source": self.hits[stage]["source"]}).source["source"].retention
        assert kept is not None
        return kept

    def cells(self) -> list[str]:
        """A row of the table."""
        movie, amazon = ([f"{hits[name].mean():.3f}" for hits in self.hits if name in hits] for name in TASKS)
        transfers = (self.transfer("movie", 0, 1), self.transfer("amazon", 1, 2))
        return [
            self.name,
            self.settings,
            *(" → ".join(scores) for scores in (movie, amazon)),
            *map(signed, transfers),
            *(self.kept(stage).show(100, 1) for stage in range(len(self.hits))),
            f"{self.seconds:.0f}",
        ]


def chain_table(found: list[dict[str, Any]], base: Result) -> list[str]:
    """Markdown: a row a chain."""
    titles = ["method", "settings", "movie accuracy", "Amazon accuracy", "Amazon on movie, points"]
    titles += ["movie on Amazon, points", *(f"kept after {stage}, %" for stage in ("movie", "Amazon", "movie again"))]
    return markdown([*titles, "CPU s"], [Chain(record, base).cells() for record in found], left=2)
