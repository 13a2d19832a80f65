"""All methods on the digits: ``python -m benchmarks.retention.quick``. A check that everything works, in seconds.

At one setting each, so it says nothing of which method is better.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fastft.tables import aligned

from . import records
from .digits import Digits
from .run import ALPHAS, Settings, run

EPOCHS = 6
LR = 1e-2
METHODS: tuple[tuple[float, dict[str, float]], ...] = (
    (0.0, {}),
    (LR, {}),
    (LR / 10, {}),
    (LR, {"fresh_head": 1}),
    (LR, {"anchor": 10}),
    (LR, {"l2sp": 0.01}),
    (LR, {"ewc": 30}),
    (LR, {"spd": 1}),
    (LR, {"mixout": 0.7}),
    (LR, {"lora": 8}),
    (LR, {"gradual": 0.5, "anchor": 10}),
    (LR, {"layer_decay": 0.5}),
    (LR, {"frozen_embeddings": 1}),
    (LR, {"replay": 0.1}),
    (LR, {"distill": 10}),
    (LR, {"relation": 10}),
    (LR, {"distill": 10, "anchor": 3}),
    (LR, {"replay_mixer": 0.1}),
    (LR, {"token_dropout": 0.1}),
    (LR, {"span_masking": 0.15}),
    (LR, {"synonyms": 0.5}),
    (LR, {"neftune": 1}),
)


def quick(results: Path) -> list[dict[str, Any]]:
    """Run every method, append the records to ``digits.jsonl`` in ``results``, and return them."""
    problem = Digits()
    found = []
    for lr, ingredients in METHODS:
        settings = Settings.of(lr, ingredients, rows=len(problem.batches(1, 0)), epochs=EPOCHS, split="test")
        record = run(settings, problem, ALPHAS)
        records.append(results / "digits.jsonl", record)
        found.append(record)
    return found


def table(found: list[dict[str, Any]]) -> str:
    """A line for each record."""
    lines = []
    for record in found:
        settings, scores = record["settings"], list(record["scores"].values())
        numbers = [scores[0]["target"]["mean"], scores[0]["source"]["mean"], scores[-1]["source"]["mean"]]
        lines.append([settings["method"], f"{settings['lr']:g}", *(f"{number:.3f}" for number in numbers)])
    return "\n".join(aligned(["method", "lr", "target", "source", f"source at α = {ALPHAS[-1]:g}"], lines))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.retention.quick", description=__doc__)
    parser.add_argument("--results", type=Path, help="a folder to leave the JSON lines in")
    parsed = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found = quick(parsed.results or Path(folder))
    print(table(found))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
