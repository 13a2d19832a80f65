"""The real problem: MiniLM learns the polarity of movie reviews, and should go on finding examples for definitions."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from itertools import count as forever
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from fastft.problems import (
    Classifier,
    ReviewProblem,
    batches_by_length,
    distinct_texts,
    load_senses,
    model_folder,
    sense_pools,
    split_reviews,
)
from fastft.retention import Fisher, estimate_fisher

from .records import WORK

Inputs = Mapping[str, Tensor]
"""Of a model: ``input_ids`` and ``attention_mask`` [rows, tokens], and so on."""
BATCH = 32
VALIDATION_ROWS = 2000
POOL_SIZE = 1000
TEST_POOLS, VALIDATION_POOLS = 3, 2
# From here on a sense is in no pool: these may be replayed.
FIRST_REPLAYED = 6 * POOL_SIZE
SPAN = 64
"""Batches among which rows are sorted by length: with few padding tokens a step is a quarter cheaper."""
INVENTED_TEXTS = 8000
SCALE = 20.0
"""Of cosines in the retrieval loss, as such models are trained."""
FISHER_EXAMPLES, FISHER_CHOICES = 512, 64


class MiniLM(ReviewProblem):
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
        all_rows, test = split_reviews(target)
        train = all_rows
        if split == "validation":
            train, test = all_rows[:-VALIDATION_ROWS], all_rows[-VALIDATION_ROWS:]
        if rows is not None and rows > len(train):
            raise ValueError(f"rows: expected at most {len(train)} with split {split!r}, got {rows}")
        senses = load_senses()
        pools = sense_pools(senses, TEST_POOLS + VALIDATION_POOLS, POOL_SIZE)
        super().__init__(
            train[:rows],
            test,
            pools[TEST_POOLS:] if split == "validation" else pools[:TEST_POOLS],
            base,
            batch_size=BATCH,
            span=SPAN,
            test_batch_size=BATCH,
        )
        self.replayed = senses[FIRST_REPLAYED:]
        self.synonyms = Path(__file__).with_name("synonyms.tsv")
        self.is_pretrained = base is None
        self.token_counts: dict[str, int] = {}
        # The pre-trained model's vectors of all rows that any run trains on, so that all runs find them in one file.
        texts = [review.text for review in (all_rows if self.is_pretrained else self.train)]
        self.fit_head(self.known(texts)[: len(self.train)])

    def known(self, texts: list[str]) -> Tensor:
        """The base model's vectors of ``texts``; the pre-trained one's are kept in a file, as all runs ask for them."""
        if not self.is_pretrained:
            return self.embed(self.base, texts, "base model")
        weights = model_folder() / "model.safetensors"
        key = hashlib.blake2b("\0".join([str(weights.stat().st_size), *texts]).encode("utf-8"), digest_size=12)
        path = WORK / "vectors" / f"{key.hexdigest()}.npy"
        if not path.exists():
            vectors = self.embed(self.base, texts, "pre-trained model")
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(f".{os.getpid()}.npy")
            np.save(partial, vectors.numpy())
            partial.replace(path)
        return torch.from_numpy(np.load(path))

    def lengths(self, texts: list[str]) -> list[int]:
        """The number of tokens of each text."""
        unseen = list({text for text in texts if text not in self.token_counts})
        if unseen:
            for text, ids in zip(unseen, self.tokenizer(unseen)["input_ids"], strict=True):
                self.token_counts[text] = min(len(ids), self.max_length)
        return [self.token_counts[text] for text in texts]

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
            "generic": lambda: [distinct_texts("amazon_reviews", "tweets")],
            "tweets": lambda: [distinct_texts("tweets")],
            "words": lambda: [self.invented()],
            "mixed": lambda: [distinct_texts("amazon_reviews", "tweets"), self.invented()],
            "target": lambda: [[review.text for review in self.train]],
        }[kind]()
        texts = [text for part in lists for text in part]
        # Now, not when the first batch is asked for: what it costs is no part of a run's time.
        vectors, sizes = torch.cat([self.known(part) for part in lists]), self.lengths(texts)
        generator = torch.Generator().manual_seed(seed)
        batches = (rows for _ in forever() for rows in batches_by_length(sizes, count, generator, SPAN))
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
        sizes = self.lengths([sense.example for sense in senses])
        generator = torch.Generator().manual_seed(seed)
        while True:
            for rows in batches_by_length(sizes, BATCH, generator, SPAN):
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


def in_batch_retrieval(queries: Tensor, keys: Tensor) -> Tensor:
    """Cross-entropy over the scaled cosines of each query with all keys, its own being the right one."""
    similarity = SCALE * normalize(queries, dim=1) @ normalize(keys, dim=1).T
    return cross_entropy(similarity, torch.arange(len(queries)))
