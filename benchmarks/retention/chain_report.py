"""What a chain of tasks did to each of them, and to what the model knew: a table from chain.jsonl and nothing else.

``python benchmarks/plot.py`` puts it into the documentation.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from . import plan, records
from .report import Array, Bootstrap, Estimate, Result, described, interval

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
            {name: records.unpack(packed).numpy().astype(np.float64) for name, packed in stage["scores"].items()}
            for stage in record["stages"]
        ]
        self.hits.insert(0, {"source": base.source[0]})
        self.bootstrap = Bootstrap({name: len(hits) for name, hits in self.hits[-1].items()})

    def draws(self, stage: int, name: str) -> Array:
        return self.bootstrap.draws(name, self.hits[stage][name][None], self.name)

    def transfer(self, name: str, learned: int, later: int) -> Estimate:
        """What a later stage did to a task: its accuracy then, minus that after the stage that learned it."""
        value = self.hits[later][name].mean() - self.hits[learned][name].mean()
        return interval(float(value), self.draws(later, name) - self.draws(learned, name))

    def kept(self, stage: int) -> Estimate:
        """The part of the pre-trained model's source recall after a stage."""
        value = self.hits[stage]["source"].mean() / self.hits[0]["source"].mean()
        return interval(float(value), self.draws(stage, "source") / self.draws(0, "source"))

    def cells(self) -> list[str]:
        """A row of the table."""
        movie, amazon = ([f"{hits[name].mean():.3f}" for hits in self.hits if name in hits] for name in TASKS)
        transfers = (self.transfer("movie", 1, 2), self.transfer("amazon", 2, 3))
        return [
            self.name,
            self.settings,
            *(" → ".join(scores) for scores in (movie, amazon)),
            *(f"{transfer.show(100, 1, '+')}{' (tie)' * transfer.is_tie}" for transfer in transfers),
            *(self.kept(stage).show(100, 1) for stage in (1, 2, 3)),
            f"{self.seconds:.0f}",
        ]


def chain_table(found: list[dict[str, Any]], base: Result) -> list[str]:
    """Markdown: a row a chain."""
    head = ["method", "settings", "movie accuracy", "Amazon accuracy", "Amazon on movie, points"]
    head += ["movie on Amazon, points", *(f"kept after {stage}, %" for stage in ("movie", "Amazon", "movie again"))]
    head += ["CPU s"]
    rows = [head, ["---"] * 2 + ["---:"] * (len(head) - 2), *(Chain(record, base).cells() for record in found)]
    return [f"| {' | '.join(row)} |" for row in rows]
