"""The quick problem: a small network that knows the digits 0 to 4 learns 5 to 9. Nothing to download, a few seconds."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import torch
from sklearn.datasets import load_digits
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerFast

from fastft.problems import ItemScores, fit_linear_probe
from fastft.retention import Fisher, estimate_fisher

from .problem import Batch

BATCH = 32
WIDTH = 48
SHADES = 17
FISHER_EXAMPLES = 64
TEST_PART = 3
"""One image of so many is for testing."""


class Block(nn.Module):
    """A convolution and a linear layer over the channels, so that methods for linear layers apply too."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, width, 3, stride, padding=1)
        self.mix = nn.Linear(width, width)

    def forward(self, images: Tensor) -> Tensor:
        mixed: Tensor = self.mix(self.conv(images).relu().movedim(1, -1)).movedim(-1, 1)
        return mixed.relu()


class Net(nn.Module):
    """An encoder of images [n, 1, 8, 8] and a head for five digits."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(Block(1, 16, 1), Block(16, 32, 2), Block(32, WIDTH, 2))
        self.head = nn.Linear(WIDTH, 5)

    def embed(self, images: Tensor) -> Tensor:
        vectors: Tensor = self.encoder(images).mean((2, 3))
        return vectors

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.embed(images))
        return logits


def shades_tokenizer() -> PreTrainedTokenizerFast:
    """The 17 shades of a pixel as words, 0 (black) being what stands for a pixel that is not shown."""
    words = Tokenizer(WordLevel({str(shade): shade for shade in range(SHADES)}, unk_token="0"))
    return PreTrainedTokenizerFast(tokenizer_object=words, mask_token="0")


class Digits:
    """0–4 is what the network knows, under a head that is kept aside; 5–9 is what it learns."""

    def __init__(self) -> None:
        self.tokenizer = shades_tokenizer()
        self.synonyms = {str(shade): [str(shade - 1), str(shade + 1)] for shade in range(2, SHADES - 1)}
        images, labels = load_digits(return_X_y=True)
        x = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / (SHADES - 1)
        y = torch.tensor(labels)
        test = torch.arange(len(y)) % TEST_PART == 0
        self.old, self.new = y < 5, y >= 5
        self.x, self.y, self.test = x, y % 5, test
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.base = Net()
            self.learn_old(epochs=12)
        self.old_head = copy.deepcopy(self.base.head)
        mine, labels = self.rows(self.new & ~test)
        with torch.no_grad():
            fit_linear_probe(self.base.head, self.base.embed(mine), labels)

    def rows(self, which: Tensor) -> Batch:
        """Images and labels, 0 to 4 in either task."""
        return self.x[which], self.y[which]

    def learn_old(self, epochs: int) -> None:
        """The pre-training."""
        optimizer = torch.optim.AdamW(self.base.parameters(), lr=3e-3)
        for x, y in self.shuffled(self.old & ~self.test, epochs, BATCH, seed=0):
            optimizer.zero_grad()
            cross_entropy(self.base(x), y).backward()
            optimizer.step()

    def shuffled(self, which: Tensor, epochs: int, size: int, seed: int) -> Iterator[Batch]:
        x, y = self.rows(which)
        generator = torch.Generator().manual_seed(seed)
        for _ in range(epochs):
            for rows in torch.randperm(len(y), generator=generator).split(size):
                yield x[rows], y[rows]

    def start(self) -> Net:
        return copy.deepcopy(self.base)

    def batches(self, epochs: int, seed: int) -> list[Batch]:
        return list(self.shuffled(self.new & ~self.test, epochs, BATCH, seed))

    def as_tokens(self, inputs: Tensor) -> dict[str, Tensor]:
        return {"input_ids": ((SHADES - 1) * inputs.flatten(1)).long()}

    def from_tokens(self, tokens: dict[str, Tensor]) -> Tensor:
        return tokens["input_ids"].view(-1, 1, 8, 8) / (SHADES - 1)

    def unlabelled(self, kind: str, count: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """``kind`` "target": the new digits; any other: images of noise, as smooth as digits are."""
        generator = torch.Generator().manual_seed(seed)
        mine, _ = self.rows(self.new & ~self.test)
        while True:
            if kind == "target":
                x = mine[torch.randint(len(mine), (count,), generator=generator)]
            else:
                coarse = torch.rand(count, 1, 4, 4, generator=generator)
                x = nn.functional.interpolate(coarse, 8, mode="bilinear").mul(2).sub(0.5).clamp(0, 1)
            with torch.no_grad():
                known = self.base.embed(x)
            yield x, known

    def replay(self, seed: int) -> Iterator[Callable[[Net], Tensor]]:
        for x, y in self.shuffled(self.old & ~self.test, 1000, BATCH, seed):
            yield lambda model, x=x, y=y: cross_entropy(self.old_head(model.embed(x)), y)

    def importance(self, seed: int) -> Fisher:
        x, _ = next(self.shuffled(self.old & ~self.test, 1, FISHER_EXAMPLES, seed))
        batches = [x]
        return estimate_fisher(self.base, batches, forward=lambda model, x: self.old_head(model.embed(x))).normalized()

    @torch.no_grad()
    def score(self, model: Net) -> ItemScores:
        new, new_labels = self.rows(self.new & self.test)
        old, old_labels = self.rows(self.old & self.test)
        return ItemScores(model(new).argmax(1) == new_labels, self.old_head(model.embed(old)).argmax(1) == old_labels)
