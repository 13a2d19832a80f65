"""One run: ``python -m benchmarks.retention.run --method anchor --strength 30 --lr 2e-4 --seed 0``."""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from fastft.commands.bench import environment

from . import records
from .methods import INGREDIENTS, Method, blended, fine_tune
from .problem import Problem

EPOCHS = 2
TUNING_ROWS = 6070
"""All that are neither for testing nor for validation."""
ALPHAS = (1.0, 0.8, 0.6)
"""Of WiSE-FT. Any run is tested at all of them, as that needs no training."""
TEXT_USERS = ("distill", "relation")


@dataclass(frozen=True)
class Settings:
    """All that a result depends on but the code and the machine."""

    method: str
    """"probe" (the pre-trained model under its linear probe), "full", or ingredients joined by "+"."""
    lr: float = 0.0
    ingredients: dict[str, float] = field(default_factory=dict)
    texts: int = 0
    text_kind: str = ""
    seed: int = 0
    rows: int | None = None
    """None: all."""
    epochs: int = EPOCHS
    split: str = "validation"

    @classmethod
    def of(
        cls,
        lr: float = 0.0,
        ingredients: dict[str, float] | None = None,
        texts: int = 16,
        text_kind: str = "generic",
        **rest: Any,
    ) -> Settings:
        """Settings whose method is named by their ingredients; texts count only where something uses them."""
        # As numbers of one kind: the key of 10 and of 10.0 must be the same.
        mixture = {name: float(strength) for name, strength in sorted((ingredients or {}).items())}
        method = "+".join(sorted(mixture, key=list(INGREDIENTS).index)) or ("full" if lr else "probe")
        if not any(name in mixture for name in TEXT_USERS):
            texts, text_kind = 0, ""
        return cls(method, float(lr), mixture, texts, text_kind, **rest)

    @property
    def key(self) -> str:
        """The same for the same settings."""
        text = json.dumps(asdict(self), sort_keys=True)
        return hashlib.blake2b(text.encode("utf-8"), digest_size=8).hexdigest()

    @property
    def title(self) -> str:
        """For people."""
        mixture = " ".join(f"{name}={strength:g}" for name, strength in self.ingredients.items())
        texts = f" {self.texts} {self.text_kind}" if self.texts else ""
        return f"{self.method} lr={self.lr:g} {mixture}{texts} rows={self.rows} {self.split} seed={self.seed}"

    def arguments(self) -> list[str]:
        """The command line that makes them."""
        mixture = [f"--also={name}={strength!r}" for name, strength in self.ingredients.items()]
        texts = [f"--texts={self.texts}", f"--text-kind={self.text_kind}"] if self.texts else []
        rows = [f"--rows={self.rows}"] if self.rows is not None else []
        basis = "full" if self.lr else "probe"
        common = [f"--lr={self.lr!r}", f"--seed={self.seed}", f"--epochs={self.epochs}", f"--split={self.split}"]
        return [f"--method={basis}", *mixture, *texts, *rows, *common]

    def for_test(self, seed: int) -> Settings:
        """The same method, trained on all rows."""
        return replace(self, rows=None, split="test", seed=seed)

    @property
    def file(self) -> str:
        """The name of the file that its result goes to."""
        return f"{self.split}.jsonl"


def run(settings: Settings, problem: Problem, alphas: Sequence[float]) -> dict[str, Any]:
    """Train, test at each α, and return the record."""
    wall, cpu = time.perf_counter(), time.process_time()
    # Before the work: by its end another commit may be checked out.
    where = environment(torch.device("cpu"))
    scores, training = {}, {}
    method = Method(settings.lr, settings.ingredients, settings.texts, settings.text_kind)
    if settings.method == "probe":
        model, alphas = problem.start().eval(), (0.0,)
    else:
        trained = fine_tune(problem, method, settings.epochs, settings.seed)
        model = trained.model
        training = {
            "steps": trained.steps,
            "first_loss": trained.first_loss,
            "last_loss": trained.last_loss,
            "wall_seconds": trained.wall_seconds,
            "cpu_seconds": trained.cpu_seconds,
        }
    for alpha in alphas:
        tested = problem.score(model if alpha in (0.0, 1.0) else blended(problem, model, alpha, method))
        scores[f"{alpha:g}"] = {"target": records.pack(tested.target), "source": records.pack(tested.source)}
    return {
        "key": settings.key,
        "settings": asdict(settings),
        "training": training,
        "scores": scores,
        "wall_seconds": time.perf_counter() - wall,
        "cpu_seconds": time.process_time() - cpu,
        "environment": {
            **where,
            **{package: metadata.version(package) for package in ("transformers", "peft")},
        },
    }


def run_once(settings: Settings, results: Path, alphas: Sequence[float]) -> dict[str, Any] | None:
    """Run and append the record, unless it is there already or another process is at it; None then."""
    with records.claim(settings.key) as mine:
        if not mine or any(r["key"] == settings.key for r in records.load(results / settings.file)):
            return None
        # Here, as it takes seconds to import.
        from .minilm import MiniLM

        record = run(settings, MiniLM(settings.rows, settings.split), alphas)
        records.append(results / settings.file, record)
        return record


def summary(record: dict[str, Any]) -> str:
    """A line for each α."""
    lines = []
    for alpha, scores in record["scores"].items():
        target, source = scores["target"]["mean"], scores["source"]["mean"]
        lines.append(f"  α={alpha:>4}  target {target:.4f}  source {source:.4f}")
    spent = record["training"].get("cpu_seconds", 0.0)
    return "\n".join([*lines, f"  {spent:.0f} s of CPU in training, {record['wall_seconds']:.0f} s in all"])


def strengths(text: str) -> tuple[str, float]:
    name, _, strength = text.partition("=")
    return name, float(strength)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.retention.run", description=__doc__)
    names = ["probe", "full", *INGREDIENTS]
    parser.add_argument("--method", required=True, choices=names, help="see methods.py")
    parser.add_argument("--strength", type=float, default=1.0, help="of the method, if it has one")
    parser.add_argument("--also", type=strengths, action="append", default=[], metavar="NAME=STRENGTH", help="combine")
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--texts", type=int, default=16, help="unlabelled texts a step")
    parser.add_argument("--text-kind", default="generic", choices=["generic", "words", "mixed", "target"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", type=int, help="training rows; all by default, but for validation those for it")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--split", choices=["validation", "test"], default="validation")
    parser.add_argument("--alphas", type=float, nargs="+", default=ALPHAS, help="of WiSE-FT; 1 is as trained")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path, default=records.RESULTS, help="the folder of the JSON lines")
    parsed = parser.parse_args(arguments)
    torch.set_num_threads(parsed.threads)
    rows = parsed.rows or (TUNING_ROWS if parsed.split == "validation" else None)
    ingredients = dict(parsed.also)
    if parsed.method not in ("probe", "full"):
        ingredients[parsed.method] = parsed.strength
    settings = Settings.of(
        0.0 if parsed.method == "probe" else parsed.lr,
        ingredients,
        parsed.texts,
        parsed.text_kind,
        seed=parsed.seed,
        rows=rows,
        epochs=parsed.epochs,
        split=parsed.split,
    )
    record = run_once(settings, parsed.results, parsed.alphas)
    print(settings.title if record else f"there already, or under way: {settings.title}")
    if record:
        print(summary(record))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
