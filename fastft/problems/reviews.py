"""The problem: learn the polarity of reviews, go on finding a word's example by its definition."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from .classifier import Batch, Classifier, Inputs, batches_by_length, fit_linear_probe
from .corpus import Review, Sense
from .minilm import load_classifier, load_tokenizer


@dataclass(frozen=True)
class ItemScores:
    """One model's results, an entry per test item, so that two models can be compared item by item."""

    target: Tensor
    """For each item of the new task, whether the model got it right: bool [items]."""
    source: Tensor
    """The same of what it could do before."""
    ranks: Tensor | None = None
    """For each item of the source, the rank of the right answer, from 1, where there is one: int64 [items]."""


class ReviewProblem:
    """MiniLM, a choice of reviews that it learns from and is tested on, and a test of what it knew.

    Args:
        train: reviews to learn from.
        test: reviews to be tested on.
        pools: senses; each definition has to find its own example among those of its pool.
        base: the model to start from; None: the pre-trained one.
        batch_size: rows of a training batch.
        span: batches of a stretch in which rows are sorted by length: more saves more padding.
        test_batch_size: texts that are embedded at a time in a test.
        max_length: tokens of a text; longer ones are cut.
    """

    def __init__(
        self,
        train: list[Review],
        test: list[Review],
        pools: list[list[Sense]],
        base: Classifier | None = None,
        *,
        batch_size: int = 32,
        span: int = 8,
        test_batch_size: int = 64,
        max_length: int = 64,
    ) -> None:
        self.train, self.test, self.pools = train, test, pools
        self.batch_size, self.span, self.test_batch_size = batch_size, span, test_batch_size
        self.max_length = max_length
        self.base = load_classifier() if base is None else copy.deepcopy(base)
        """The model to start from; its head is as it came until :meth:`fit_head`."""
        self.tokenizer = load_tokenizer()

    def start(self) -> Classifier:
        """A fresh copy of ``base``."""
        return copy.deepcopy(self.base)

    def fit_head(self, vectors: Tensor | None = None) -> None:
        """Fit the head of ``base`` on its vectors of the training reviews, [rows, width], computed unless given."""
        if vectors is None:
            vectors = self.embed(self.base, [review.text for review in self.train], "linear probe")
        fit_linear_probe(self.base.head, vectors, classes(self.train))

    def tokenize(self, texts: list[str]) -> Inputs:
        """Inputs of a model."""
        inputs: Inputs = self.tokenizer(
            texts, padding=True, truncation=True, max_length=self.max_length, return_tensors="pt"
        )
        return inputs

    def lengths(self, texts: list[str]) -> list[int]:
        """How long texts are, to put those of like length together: in characters here."""
        return [len(text) for text in texts]

    def batches(self, epochs: int, seed: int) -> list[Batch]:
        """All batches of all epochs, in the order in which every method sees them."""
        generator = torch.Generator().manual_seed(seed)
        lengths = self.lengths([review.text for review in self.train])
        found = []
        for _ in range(epochs):
            for rows in batches_by_length(lengths, self.batch_size, generator, self.span):
                reviews = [self.train[i] for i in rows]
                found.append((self.tokenize([review.text for review in reviews]), classes(reviews)))
        return found

    @torch.no_grad()
    def embed(self, model: Classifier, texts: list[str], title: str, batch_size: int = 64) -> Tensor:
        """The vector of each text, in the order given, [texts, width]; ``title`` is the progress bar's."""
        from tqdm import tqdm

        model.eval()
        # Texts of like length together, so that little is padding; longest first, so the bar's estimate is not rosy.
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]), reverse=True)
        vectors = []
        with tqdm(total=len(texts), desc=title, unit="text", leave=False, disable=None) as bar:
            for start in range(0, len(order), batch_size):
                rows = order[start : start + batch_size]
                vectors.append(model.embed(self.tokenize([texts[i] for i in rows])))
                bar.update(len(rows))
        together = torch.cat(vectors)
        restored = torch.empty_like(together)
        restored[torch.tensor(order)] = together
        return restored

    def score(self, model: Classifier, title: str = "testing") -> ItemScores:
        """Test ``model`` on the test reviews (target) and on the pools (source)."""
        texts = [review.text for review in self.test]
        texts += [sense.gloss for pool in self.pools for sense in pool]
        texts += [sense.example for pool in self.pools for sense in pool]
        vectors = self.embed(model, texts, title, self.test_batch_size)
        sizes = [len(pool) for pool in self.pools]
        seen, glosses, examples = vectors.split([len(self.test), sum(sizes), sum(sizes)])
        with torch.no_grad():
            correct = model.head(seen).argmax(1) == classes(self.test)
        ranks = torch.cat([own_rank(*pool) for pool in zip(glosses.split(sizes), examples.split(sizes), strict=True)])
        return ItemScores(correct, ranks == 1, ranks)


def classes(reviews: list[Review]) -> Tensor:
    """0 for a negative review, 1 for a positive one: int64 [rows]."""
    return torch.tensor([int(review.positive) for review in reviews])


def own_rank(queries: Tensor, keys: Tensor) -> Tensor:
    """For each query, the rank of the key in the same row, by cosine, from 1.

    A tie counts against the query: a model that maps all texts to one point has retrieved nothing.
    """
    similarity = normalize(queries, dim=1) @ normalize(keys, dim=1).T
    return (similarity >= similarity.diagonal().unsqueeze(1)).sum(1)
