"""``python benchmarks/bench_data.py``: what mixing and augmenting cost a DataLoader, and which near copies are found.

Loaders over the same examples take turns in one process, without workers, so that all of their work is timed: in
seconds of the processor, which others at work on the machine disturb least. The data are those of ``fastft.problems``:
movie reviews as the target, product reviews as the source, MiniLM's tokenizer.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import time
from collections.abc import Callable, Mapping
from itertools import permutations
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from fastft.commands.bench import CpuClock, Measurement, Work, alternate, environment, significant, verdict
from fastft.data import (
    Augmented,
    AugmentingCollator,
    ReplayMixer,
    SpanMasking,
    SynonymReplacement,
    TextAugment,
    TokenDropout,
    find_duplicates,
    find_leakage,
)
from fastft.problems import load_tokenizer, read_table

RESULTS = Path(__file__).resolve().parent / "results" / "data" / "loaders"
PLAIN = "plain DataLoader"
TARGET = 1.05
"""The highest ratio to the plain loader that is good enough."""
ROUNDS, QUICK_ROUNDS = 31, 5
SECONDS_A_CASE = 600.0
TARGETS, SOURCES, RATIO = 3000, 600, 1 / 6
"""The mixture then holds each example once, as the plain loader does."""
BATCH = 32
MAX_LENGTH = 512
JOINED = 8
"""Reviews in a long text."""
SYNONYMS = {"good": ["great", "fine"], "bad": ["poor"], "film": ["movie"], "movie": ["film"], "funny": ["comic"]}
CORPORA = ("movie_reviews", "amazon_reviews", "tweets")


def main() -> None:
    options = parse_arguments()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    device = torch.device("cpu")
    result: dict[str, Any] = {"environment": environment(device), "rounds": options.rounds, "batch_size": BATCH}
    result["loaders"] = {}
    for name, loaders in cases().items():
        works = {title: reading(loader) for title, loader in loaders.items()}
        clock = CpuClock(time.process_time)
        measured = alternate(works, device, options.rounds, seconds_at_most=SECONDS_A_CASE, clock=clock)
        result["loaders"][name] = figures(measured, {title: len(loader) for title, loader in loaders.items()})
        print(f"{name}: {result['loaders'][name][PLAIN]['ms_per_batch']:.3g} ms a batch")
        for title, figure in result["loaders"][name].items():
            if title != PLAIN:
                lower, upper = figure["ratio_quartiles"]
                said = verdict(figure["ratio"], TARGET)
                print(f"  {title:<44} {figure['ratio']:.3f}  {lower:.3f}-{upper:.3f}  {said}", flush=True)
    result["near_copies"] = near_copies()
    print(json.dumps(result["near_copies"], indent=1))
    known = result["environment"]
    device_slug = "-".join(str(known["device"]).lower().split())
    path = options.output or RESULTS / f"{device_slug}-torch{str(known['torch']).split('+')[0]}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"written to {path}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure fastft.data's loaders against plain ones.")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--quick", dest="rounds", action="store_const", const=QUICK_ROUNDS)
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="default: results/data/loaders/DEVICE-torchVERSION.json"
    )
    return parser.parse_args()


# -- loaders -------------------------------------------------------------------------------------------------


def cases() -> dict[str, dict[str, DataLoader[Any]]]:
    """By how the data are kept, loaders of the same examples: the plain one first."""
    import datasets
    from transformers import DataCollatorWithPadding

    datasets.disable_progress_bars()
    tokenizer = load_tokenizer()

    def parts(joined: int) -> list[Any]:
        """Target and source; a text is so many reviews, one behind the other."""
        made = []
        for name, count in (("movie_reviews", TARGETS), ("amazon_reviews", SOURCES)):
            reviews = texts(name)[:count]
            passages = [" ".join(reviews[i : i + joined]) for i in range(0, count, joined)]
            made.append(datasets.Dataset.from_dict({"text": passages, "labels": [i % 2 for i in range(len(passages))]}))
        return made

    def tokenize(rows: Mapping[str, Any]) -> Mapping[str, Any]:
        return dict(tokenizer(rows["text"], truncation=True, max_length=MAX_LENGTH))

    def tokenizing(rows: list[dict[str, Any]]) -> Any:
        batch = tokenizer(
            [row["text"] for row in rows], truncation=True, max_length=MAX_LENGTH, padding=True, return_tensors="pt"
        )
        batch["labels"] = torch.tensor([row["labels"] for row in rows])
        return batch

    sentences, passages = parts(1), parts(JOINED)
    ids = [part.map(tokenize, batched=True, remove_columns=["text"]) for part in sentences]
    lists = [[part[i] for i in range(len(part))] for part in ids]
    padding = DataCollatorWithPadding(tokenizer)
    return {
        "sentences, tokenised in the collator": loaders(*sentences, tokenizing, tokenizer),
        f"{JOINED} sentences a text, tokenised in the collator": loaders(*passages, tokenizing, tokenizer),
        "sentences, Hugging Face dataset tokenised before": loaders(*ids, padding, tokenizer),
        "sentences, list tokenised before": loaders(*lists, padding, tokenizer),
    }


def loaders(target: Any, source: Any, collate: Callable[[Any], Any], tokenizer: Any) -> dict[str, DataLoader[Any]]:
    """The plain loader and ours; texts cannot be augmented before they are tokens."""
    both = target + source if isinstance(target, list) else concatenated(target, source)
    dropout = TextAugment(tokenizer, TokenDropout(0.1))
    steps = (TokenDropout(0.1), SpanMasking(0.15), SynonymReplacement(0.2, SYNONYMS, tokenizer))
    all_three = TextAugment(tokenizer, *steps)
    mixer = ReplayMixer(target, source, RATIO)
    made = {
        PLAIN: DataLoader(both, BATCH, shuffle=True, collate_fn=collate),
        "ReplayMixer": DataLoader(mixer, BATCH, collate_fn=collate),
        "AugmentingCollator, token dropout": DataLoader(
            both, BATCH, shuffle=True, collate_fn=AugmentingCollator(collate, dropout)
        ),
        "AugmentingCollator, dropout + spans + synonyms": DataLoader(
            both, BATCH, shuffle=True, collate_fn=AugmentingCollator(collate, all_three)
        ),
        "ReplayMixer + AugmentingCollator, dropout": DataLoader(
            mixer, BATCH, collate_fn=AugmentingCollator(collate, dropout)
        ),
    }
    if "input_ids" in target[0]:
        made["Augmented, token dropout"] = DataLoader(Augmented(both, dropout), BATCH, shuffle=True, collate_fn=collate)
    return made


def concatenated(target: Any, source: Any) -> Any:
    import datasets

    return datasets.concatenate_datasets([target, source])


def reading(loader: DataLoader[Any]) -> Work:
    """Read an epoch."""

    def work() -> None:
        for _ in loader:
            pass

    return work


def figures(measured: Measurement, batches: Mapping[str, int]) -> dict[str, dict[str, Any]]:
    """Each loader's time of a batch, and of an epoch relative to the plain one's, as the median over the rounds."""
    found: dict[str, dict[str, Any]] = {}
    for title, count in batches.items():
        found[title] = {"ms_per_batch": significant(1e3 * measured.median(title) / count)}
        if title != PLAIN:
            lower, median, upper = map(significant, measured.quartiles(title, PLAIN))
            found[title] |= {"ratio": median, "ratio_quartiles": [lower, upper]}
    return found


# -- near copies ---------------------------------------------------------------------------------------------


def near_copies() -> dict[str, Any]:
    """The share of one-word edits that is found, and of texts taken for near copies of texts of another origin."""
    different = {name: without_repetitions(texts(name)) for name in CORPORA}
    draw = random.Random(0)
    originals = [text for text in different["movie_reviews"] if len(re.findall(r"\w+", text)) >= 5]
    words = " ".join(originals[:200]).split()
    found = {match.index for match in find_leakage(originals, [edited(text, draw, words) for text in originals])}
    false = {}
    for train, asked in permutations(CORPORA, 2):
        near = [match for match in find_leakage(different[train], different[asked]) if match.kind == "near"]
        false[f"{asked} in {train}"] = significant(len(near) / len(different[asked]))
    return {
        "texts": {name: len(different[name]) for name in CORPORA},
        "one_word_edits_found": significant(len(found) / len(originals)),
        "false_positive_rates": false,
    }


def without_repetitions(texts: list[str]) -> list[str]:
    """The texts that differ in more than case, spacing and punctuation."""
    repeated = {match.index for match in find_duplicates(texts, near=None)}
    return [text for i, text in enumerate(texts) if i not in repeated]


def edited(text: str, draw: random.Random, others: list[str]) -> str:
    """``text`` with one word changed, left out or added."""
    parts, new = text.split(), draw.choice(others)
    place = draw.randrange(len(parts))
    removed, added = draw.choice([(1, [new]), (1, []), (0, [new])])
    parts[place : place + removed] = added
    return " ".join(parts)


def texts(name: str) -> list[str]:
    return [row["text"] for row in read_table(name)]


if __name__ == "__main__":
    main()
