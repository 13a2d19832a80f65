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

from . import records
from .digits import Digits
from .run import ALPHAS, Settings, run

EPOCHS = 6
RECIPES: tuple[tuple[float, dict[str, float]], ...] = (
    (0.0, {}),
    (3e-3, {}),
    (3e-4, {}),
    (3e-3, {"fresh_head": 1}),
    (3e-3, {"anchor": 30}),
    (3e-3, {"l2sp": 0.1}),
    (3e-3, {"mixout": 0.7}),
    (3e-3, {"lora": 8}),
    (3e-3, {"gradual": 0.5, "anchor": 30}),
    (3e-3, {"layer_decay": 0.5}),
    (3e-3, {"frozen_embeddings": 1}),
    (3e-3, {"replay": 0.1}),
    (3e-3, {"distill": 10}),
    (3e-3, {"relation": 10}),
    (3e-3, {"distill": 10, "anchor": 10}),
)


def quick(results: Path) -> list[dict[str, Any]]:
    """Run every recipe, append the records to ``digits.jsonl`` in ``results``, and return them."""
    problem = Digits()
    found = []
    for lr, ingredients in RECIPES:
        settings = Settings.of(lr, ingredients, rows=len(problem.batches(1, 0)), epochs=EPOCHS, split="test")
        record = run(settings, problem, ALPHAS)
        records.append(results / "digits.jsonl", record)
        found.append(record)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.retention.quick", description=__doc__)
    parser.add_argument("--results", type=Path, help="a folder to leave the JSON lines in")
    parsed = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found = quick(parsed.results or Path(folder))
    print(f"{'method':<24} {'lr':>7}  {'target':>6}  {'source':>6}  {'source, α = ' + format(ALPHAS[-1], 'g'):>6}")
    for record in found:
        scores = list(record["scores"].values())
        print(
            f"{record['settings']['method']:<24} {record['settings']['lr']:>7g}  {scores[0]['target']['mean']:>6.3f}  "
            f"{scores[0]['source']['mean']:>6.3f}  {scores[-1]['source']['mean']:>6.3f}"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
