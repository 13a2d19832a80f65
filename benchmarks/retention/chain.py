"""Movie, Amazon, movie again: how a later task changes an earlier one, and each of them what the model knew.

``python -m benchmarks.retention.chain --lr 1e-4 --also distill=10 --text-kind tweets``. Each stage starts from the
encoder of the one before it, with a head of its own that is kept; what is held on to is the start of the stage.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from fastft.commands.bench import environment
from fastft.problems import Classifier

from . import records
from .methods import INGREDIENTS, Method, fine_tune
from .minilm import MiniLM
from .run import Settings, strengths

STAGES = ("movie", "amazon", "movie")


def chain(settings: Settings) -> dict[str, Any]:
    """Train on one task after the other, and test on all after each."""
    begun = time.perf_counter()
    method = Method(settings.lr, settings.ingredients, settings.texts or 16, settings.text_kind or "tweets")
    model: Classifier | None = None
    heads: dict[str, torch.nn.Linear] = {}
    stages = []
    for stage, target in enumerate(STAGES):
        problem = MiniLM(settings.rows, "test", target, model)
        trained = fine_tune(problem, method, settings.epochs, settings.seed + 100 * stage)
        model = trained.model
        assert model is not None
        heads[target] = model.head
        tests = {name: MiniLM(None, "test", name, model) for name in heads}
        scores: dict[str, Any] = {}
        for name, test in tests.items():
            candidate = test.start()
            candidate.head = heads[name]
            tested = test.score(candidate)
            scores[name] = records.pack(tested.target)
            scores["source"] = records.pack(tested.source)  # which the head has no part in
        stages.append({"target": target, "scores": scores, "cpu_seconds": trained.cpu_seconds})
    return {
        "key": settings.key,
        "settings": asdict(settings),
        "stages": stages,
        "wall_seconds": time.perf_counter() - begun,
        "environment": environment(torch.device("cpu")),
    }


def summary(record: dict[str, Any]) -> str:
    """A line a stage, and the backward transfer."""
    lines = []
    for stage in record["stages"]:
        parts = [f"{name} {packed['mean']:.4f}" for name, packed in stage["scores"].items()]
        lines.append(f"  after {stage['target']:<7} {'  '.join(parts)}")
    first, second, third = (stage["scores"] for stage in record["stages"])
    on_movie = 100 * (second["movie"]["mean"] - first["movie"]["mean"])
    on_amazon = 100 * (third["amazon"]["mean"] - second["amazon"]["mean"])
    return "\n".join(
        [*lines, f"  backward transfer, points: amazon on movie {on_movie:+.1f}, movie on amazon {on_amazon:+.1f}"]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.retention.chain", description=__doc__)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--also", type=strengths, action="append", default=[], metavar="NAME=STRENGTH")
    parser.add_argument("--texts", type=int, default=16)
    # No Amazon reviews: they are a task here.
    parser.add_argument("--text-kind", default="tweets", choices=["tweets", "words", "target"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", type=int, help="training rows of each stage; all by default")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--results", type=Path, default=records.RESULTS)
    parsed = parser.parse_args(arguments)
    torch.set_num_threads(1)
    unknown = dict(parsed.also).keys() - INGREDIENTS.keys()
    if unknown:
        parser.error(f"--also: expected some of {', '.join(INGREDIENTS)}, got {', '.join(sorted(unknown))}")
    settings = Settings.of(
        parsed.lr,
        dict(parsed.also),
        parsed.texts,
        parsed.text_kind,
        seed=parsed.seed,
        rows=parsed.rows,
        epochs=parsed.epochs,
        split="test",
    )
    path = parsed.results / "chain.jsonl"
    with records.claim(f"{settings.key}-chain") as mine:
        found = next((r for r in records.load(path) if r["key"] == settings.key), None)
        if not mine and found is None:
            print(f"under way: {settings.title}")
            return 0
        record = found or chain(settings)
        if found is None:
            records.append(path, record)
    print(settings.title)
    print(summary(record))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
