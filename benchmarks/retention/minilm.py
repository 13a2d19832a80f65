"""The real problem: MiniLM learns the polarity of movie reviews, and should go on finding examples for definitions."""

from __future__ import annotations

import copy
import hashlib
import os
from collections.abc import Callable, Iterator
from itertools import chain
from itertools import count as forever
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from fastft.commands.demo import corpus
from fastft.commands.demo.corpus import Review
from fastft.commands.demo.evaluate import embed, own_rank
from fastft.commands.demo.experiment import load_base, load_tokenizer, model_folder, quiet_transformers
from fastft.commands.demo.train import Classifier, Config, Inputs, fit_linear_probe, shuffled
from fastft.data import read_synonyms
from fastft.retention import Fisher, estimate_fisher

from .problem import Batch, Scores
from .records import WORK

BATCH = 32
VALIDATION_ROWS = 2000
POOL_SIZE = 1000
TEST_POOLS = range(3)
VALIDATION_POOLS = range(3, 5)
# From here on a sense is in no pool: these may be replayed.
FIRST_REPLAYED = 6 * POOL_SIZE
SPAN = 64
"""Batches among which rows are sorted by length: with few padding tokens a step is a quarter cheaper."""
INVENTED_TEXTS = 8000
SCALE = 20.0
"""Of cosines in the retrieval loss, as such models are trained."""
FISHER_EXAMPLES, FISHER_CHOICES = 512, 64


class MiniLM:
    """Reviews, pools and texts of one split.

    Args:
        rows: training rows, the first by hash; None: all there are.
        split: "validation" holds ``VALIDATION_ROWS`` of the training rows back and tests on them and on pools of their
            own; "test" trains on all rows and tests on the rows and pools that nothing was chosen by.
        target: "movie" or "amazon".
        base: the model to start from; None: the pre-trained one.
    """

    def __init__(self, rows: int | None, split: str, target: str = "movie", base: Classifier | None = None) -> None:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        self.train_set, self.test_set = split_rows(target, rows, split)
        senses = corpus.load_senses()
        pools = VALIDATION_POOLS if split == "validation" else TEST_POOLS
        self.pools = [senses[i * POOL_SIZE : (i + 1) * POOL_SIZE] for i in pools]
        self.replayed = senses[FIRST_REPLAYED:]
        with quiet_transformers():
            model, tokenize = load_base(Config())
            self.tokenizer = load_tokenizer()
        self.synonyms = read_synonyms(Path(__file__).with_name("synonyms.tsv"))
        self.is_pretrained = base is None
        self.base = model if base is None else copy.deepcopy(base)
        self.lengths: dict[str, int] = {}
        self.tokenize: Callable[[list[str]], Inputs] = tokenize
        labels = torch.tensor([int(review.positive) for review in self.train_set])
        # Of all rows that any run trains on, so that all runs find them in one file.
        rows = [review.text for review in training_rows(target)]
        vectors = self.known(rows[: len(self.train_set)] if base is not None else rows)[: len(self.train_set)]
        fit_linear_probe(self.base, vectors, labels)

    def start(self) -> Classifier:
        return copy.deepcopy(self.base)

    def known(self, texts: list[str]) -> Tensor:
        """The base model's vectors of ``texts``; the pre-trained one's are kept in a file, as all runs ask for them."""
        if not self.is_pretrained:
            return embed(self.base, self.tokenize, texts, "base model")
        weights = model_folder() / "model.safetensors"
        key = hashlib.blake2b("\0".join([str(weights.stat().st_size), *texts]).encode("utf-8"), digest_size=12)
        path = WORK / "vectors" / f"{key.hexdigest()}.npy"
        if not path.exists():
            vectors = embed(self.base, self.tokenize, texts, "pre-trained model")
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(f".{os.getpid()}.npy")
            np.save(partial, vectors.numpy())
            partial.replace(path)
        return torch.from_numpy(np.load(path))

    def sizes(self, texts: list[str]) -> list[int]:
        """The number of tokens of each text."""
        unseen = list({text for text in texts if text not in self.lengths})
        if unseen:
            for text, ids in zip(unseen, self.tokenizer(unseen)["input_ids"], strict=True):
                self.lengths[text] = min(len(ids), Config.max_length)
        return [self.lengths[text] for text in texts]

    def batches(self, epochs: int, seed: int) -> list[Batch]:
        generator = torch.Generator().manual_seed(seed)
        reviews = self.train_set
        sizes = self.sizes([review.text for review in reviews])
        return [
            (self.tokenize([reviews[i].text for i in rows]), torch.tensor([int(reviews[i].positive) for i in rows]))
            for _ in range(epochs)
            for rows in shuffled(sizes, BATCH, generator, SPAN)
        ]

    def as_tokens(self, inputs: Inputs) -> dict[str, Tensor]:
        return dict(inputs)

    def from_tokens(self, tokens: dict[str, Tensor]) -> Inputs:
        return tokens

    def unlabelled(self, kind: str, count: int, seed: int) -> Iterator[tuple[Inputs, Tensor]]:
        """Texts that have nothing to do with WordNet, and their vectors.

        ``kind`` is "generic" (Amazon reviews and tweets), "tweets", "words" (words of the vocabulary drawn at random:
        no data at all), "mixed" (generic and words), or "target" (the reviews that are trained on).
        """
        lists = {
            "generic": lambda: [unlabelled_texts("amazon_reviews", "tweets")],
            "tweets": lambda: [unlabelled_texts("tweets")],
            "words": lambda: [self.invented()],
            "mixed": lambda: [unlabelled_texts("amazon_reviews", "tweets"), self.invented()],
            "target": lambda: [[review.text for review in self.train_set]],
        }[kind]()
        texts = [text for part in lists for text in part]
        # Now, not when the first batch is asked for: what it costs is no part of a run's time.
        vectors, sizes = torch.cat([self.known(part) for part in lists]), self.sizes(texts)
        generator = torch.Generator().manual_seed(seed)
        batches = (rows for _ in forever() for rows in shuffled(sizes, count, generator, SPAN))
        return ((self.tokenize([texts[i] for i in rows]), vectors[rows]) for rows in batches)

    def invented(self) -> list[str]:
        """Texts of 2 to 12 words, each drawn at random from the tokenizer's vocabulary."""
        words = sorted(
            word for word in self.tokenizer.get_vocab() if word.isascii() and word.isalpha() and len(word) > 2
        )
        random = torch.Generator().manual_seed(0)
        texts = []
        for _ in range(INVENTED_TEXTS):
            length = int(torch.randint(2, 13, (), generator=random))
            texts.append(" ".join(words[i] for i in torch.randint(len(words), (length,), generator=random).tolist()))
        return texts

    def replay(self, seed: int) -> Iterator[Callable[[Classifier], Tensor]]:
        """Batches of definitions and examples that are in no pool, under the loss that such models are trained with:
        each definition has to find its example among those of the batch."""
        senses = self.replayed
        sizes = self.sizes([sense.example for sense in senses])
        generator = torch.Generator().manual_seed(seed)
        while True:
            for rows in shuffled(sizes, BATCH, generator, SPAN):
                glosses = self.tokenize([senses[i].gloss for i in rows])
                examples = self.tokenize([senses[i].example for i in rows])
                yield lambda model, glosses=glosses, examples=examples: in_batch_retrieval(
                    model.embed(glosses), model.embed(examples)
                )

    def importance(self, seed: int) -> Fisher:
        """Of the distribution over ``FISHER_CHOICES`` examples that a definition's scaled cosines give, in the sampled
        form; over senses that are in no pool."""
        senses = self.replayed
        rows = torch.randperm(len(senses), generator=torch.Generator().manual_seed(seed))[:FISHER_EXAMPLES].tolist()
        keys = normalize(self.known([senses[i].example for i in rows[:FISHER_CHOICES]]), dim=1)

        def choices(model: Classifier, inputs: Inputs) -> Tensor:
            return SCALE * normalize(model.embed(inputs), dim=1) @ keys.T

        batches = [dict(self.tokenize([senses[i].gloss])) for i in rows]
        return estimate_fisher(self.base, batches, mode="sampled", forward=choices, seed=seed).normalized()

    def score(self, model: Classifier) -> Scores:
        texts = [review.text for review in self.test_set]
        glosses = [sense.gloss for pool in self.pools for sense in pool]
        examples = [sense.example for pool in self.pools for sense in pool]
        parts = [len(texts), len(glosses), len(examples)]
        vectors = embed(model, self.tokenize, [*texts, *glosses, *examples], "testing", batch_size=BATCH)
        seen, queries, keys = vectors.split(parts)
        labels = torch.tensor([review.positive for review in self.test_set])
        with torch.no_grad():
            correct = model.head(seen).argmax(1) == labels.long()
        ranks = [own_rank(q, k) for q, k in zip(queries.split(POOL_SIZE), keys.split(POOL_SIZE), strict=True)]
        return Scores(correct, torch.cat(ranks) == 1)


def in_batch_retrieval(queries: Tensor, keys: Tensor) -> Tensor:
    """Cross-entropy over the scaled cosines of each query with all keys, its own being the right one."""
    similarity = SCALE * normalize(queries, dim=1) @ normalize(keys, dim=1).T
    return cross_entropy(similarity, torch.arange(len(queries)))


def split_rows(target: str, rows: int | None, split: str) -> tuple[list[Review], list[Review]]:
    """Training rows, and the rows to test on."""
    rest = training_rows(target)
    test = target_reviews(target)[: -len(rest)]
    if split == "validation":
        test, rest = rest[-VALIDATION_ROWS:], rest[:-VALIDATION_ROWS]
    if rows is not None and rows > len(rest):
        raise ValueError(f"rows: expected at most {len(rest)} with split {split!r}, got {rows}")
    return rest[:rows], test


def target_reviews(target: str) -> list[Review]:
    """All reviews with a clear polarity, in hash order."""
    return corpus.clear_reviews(corpus.read_table(f"{target}_reviews"))


def training_rows(target: str) -> list[Review]:
    """Those that are not for testing."""
    reviews = target_reviews(target)
    return reviews[corpus.TEST_ROWS if target == "movie" else len(reviews) // 3 :]


def unlabelled_texts(*names: str) -> list[str]:
    """The texts of tables, in hash order, none twice."""
    rows = chain.from_iterable(corpus.read_table(name) for name in names)
    by_key = {corpus.text_key(row["text"]): row["text"] for row in rows}
    return [by_key[key] for key in sorted(by_key)]
