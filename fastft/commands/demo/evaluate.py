"""What a model can do: the polarity of unseen reviews, and finding a word's example from its definition."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize
from tqdm import tqdm

from .corpus import Review, Sense
from .train import Classifier, Tokenize


@dataclass(frozen=True)
class Scores:
    """One model's results, an entry per test item, so that two models can be compared item by item."""

    correct: Tensor
    """For each test review, whether its polarity was predicted."""
    ranks: Tensor
    """For each gloss, the rank of its own example in its pool, from 1."""

    @property
    def hits(self) -> Tensor:
        """For each gloss, whether its own example came first."""
        return self.ranks == 1

    @property
    def accuracy(self) -> float:
        """The share of reviews predicted right."""
        return mean(self.correct)

    @property
    def recall(self) -> float:
        """Recall@1: the share of glosses that retrieve their own example."""
        return mean(self.hits)

    @property
    def mrr(self) -> float:
        """The mean of 1/rank."""
        return mean(1 / self.ranks.double())


def score(model: Classifier, tokenize: Tokenize, reviews: list[Review], pools: list[list[Sense]], title: str) -> Scores:
    """Test ``model`` on the reviews (target) and on the pools (source)."""
    texts = [review.text for review in reviews]
    texts += [sense.gloss for pool in pools for sense in pool]
    texts += [sense.example for pool in pools for sense in pool]
    vectors = embed(model, tokenize, texts, title)

    sizes = [len(pool) for pool in pools]
    seen, glosses, examples = vectors.split([len(reviews), sum(sizes), sum(sizes)])
    labels = torch.tensor([review.positive for review in reviews])
    with torch.no_grad():
        correct = model.head(seen).argmax(1) == labels.long()
    ranks = [own_rank(*pool) for pool in zip(glosses.split(sizes), examples.split(sizes), strict=True)]
    return Scores(correct, torch.cat(ranks))


@torch.no_grad()
def embed(model: Classifier, tokenize: Tokenize, texts: list[str], title: str, batch_size: int = 64) -> Tensor:
    """The vector of each text, in the order given."""
    model.eval()
    # Texts of like length together, so that little is padding; longest first, so the bar's estimate is not rosy.
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]), reverse=True)
    vectors = []
    with tqdm(total=len(texts), desc=title, unit="text", leave=False, disable=None) as bar:
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            vectors.append(model.embed(tokenize([texts[i] for i in rows])))
            bar.update(len(rows))
    together = torch.cat(vectors)
    restored = torch.empty_like(together)
    restored[torch.tensor(order)] = together
    return restored


def own_rank(queries: Tensor, keys: Tensor) -> Tensor:
    """For each query, the rank of the key in the same row, by cosine, from 1.

    A tie counts against the query: a model that maps all texts to one point has retrieved nothing.
    """
    similarity = normalize(queries, dim=1) @ normalize(keys, dim=1).T
    return (similarity >= similarity.diagonal().unsqueeze(1)).sum(1)


def mean(values: Tensor) -> float:
    """The mean of the entries."""
    return values.double().mean().item()


def standard_error(values: Tensor) -> float:
    """The standard error of the mean of the entries."""
    return values.double().std(correction=1).item() / math.sqrt(values.numel())


def difference(a: Tensor, b: Tensor) -> tuple[float, float]:
    """mean(a) − mean(b) over the same items, and its standard error.

    Paired: most items fall the same way for both, so the difference is known better than either mean.
    """
    paired = a.double() - b.double()
    return mean(paired), standard_error(paired)
