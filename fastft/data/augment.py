"""Random changes to training examples that depend on (seed, epoch, example) alone."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from .replay import fetch

Keys = NDArray[np.uint64]
Augmentation = Callable[[list[Any], Keys], list[Any]]
"""A function of examples and a random key for each; returns changed copies. The same keys give the same changes."""


MASK64 = 2**64 - 1
# Made once: for the few tokens of a batch, making them costs as much as computing with them.
SHIFTS = np.uint64(30), np.uint64(27), np.uint64(31)
FACTORS = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def mix(keys: Keys) -> Keys:
    """Random-looking 64-bit numbers, a different one for each key (the finaliser of SplitMix64; Steele et al. 2014)."""
    keys = keys ^ (keys >> SHIFTS[0])
    keys *= FACTORS[0]
    keys ^= keys >> SHIFTS[1]
    keys *= FACTORS[1]
    keys ^= keys >> SHIFTS[2]
    return keys


def mixed(*numbers: int) -> int:
    """:func:`mix` of several whole numbers together."""
    key = np.zeros(1, np.uint64)
    for number in numbers:
        key = mix(key + np.uint64(number & MASK64))
    return int(key[0])


class Switch:
    """A seed, an epoch, and whether to augment at all; the last two in shared memory, so that workers see them set."""

    def __init__(self, seed: int) -> None:
        if not isinstance(seed, int) or not 0 <= seed < 2**63:
            raise ValueError(f"seed: expected a whole number from 0 to 2**63 - 1, got {seed!r}")
        self.seed = seed
        self._state = torch.tensor([0, 1]).share_memory_()
        self._base = (-1, 0)

    @property
    def epoch(self) -> int:
        return self._read()[0]

    @property
    def training(self) -> bool:
        return bool(self._read()[1])

    def _read(self) -> list[int]:
        state: list[int] = self._state.tolist()  # at once: every access to a tensor's item takes as long
        return state

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, which changes are different for. Without it, every epoch has the same changes."""
        self._state[0] = epoch

    def train(self, mode: bool = True) -> None:
        """Augment, or with False do not."""
        self._state[1] = mode

    def eval(self) -> None:
        """Give the examples as they are."""
        self.train(False)

    def keys(self, examples: Keys) -> Keys:
        """Random keys for examples (by index or content) in this epoch."""
        epoch = self.epoch
        if self._base[0] != epoch:
            self._base = (epoch, mixed(self.seed, epoch))
        return mix(examples + np.uint64(self._base[1]))


class Augmented(Switch, Dataset[Any]):
    """A map-style dataset whose examples are changed as they are fetched, differently in each epoch.

    The change of example i depends on (seed, epoch, i) alone: not on its neighbours in the batch, on the number of
    workers, or on other uses of random numbers. ``set_epoch`` is called by transformers' ``Trainer`` and by
    :class:`~fastft.data.ReplayMixer`; a plain loop calls it itself. Evaluation data are simply not wrapped; or
    :meth:`eval`.

    Args:
        dataset: map-style (``len`` and ``[i]``).
        augment: a :class:`~fastft.data.TextAugment`, a :class:`SeededTransform`, or any function of (examples, keys).
        seed: of all changes.
    """

    def __init__(self, dataset: Any, augment: Augmentation, seed: int = 0) -> None:
        super().__init__(seed)
        self.dataset, self.augment = dataset, augment

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        """Several examples at once, which is quicker."""
        size = len(self)
        examples = fetch(self.dataset, list(indices))
        if not self.training or not examples:
            return examples
        return self.augment(examples, self.keys(np.array([index % size for index in indices], np.uint64)))

    def set_epoch(self, epoch: int) -> None:
        super().set_epoch(epoch)
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)


class SeededTransform:
    """Makes a random transform of one value, such as of ``torchvision.transforms.v2`` or albumentations, repeatable.

    While it runs, the random numbers of torch (CPU), numpy and Python are seeded from the example's key; afterwards
    they are as before. Transforms with a ``set_random_seed`` and named arguments, as albumentations', are called their
    way.

    Args:
        transform: a function of the value.
        column: where the value is in an example: a name in a dict, a position in a tuple.
    """

    def __init__(self, transform: Callable[..., Any], column: str | int = "image") -> None:
        self.transform, self.column = transform, column

    def __call__(self, examples: list[Any], keys: Keys) -> list[Any]:
        return [self._changed(example, int(key)) for example, key in zip(examples, keys, strict=True)]

    def _changed(self, example: Any, key: int) -> Any:
        value = self._transformed(example[self.column], key)
        if isinstance(example, Mapping):
            return {**example, self.column: value}
        changed = list(example)
        changed[int(self.column)] = value
        return type(example)(changed)

    def _transformed(self, value: Any, key: int) -> Any:
        if hasattr(self.transform, "set_random_seed"):
            self.transform.set_random_seed(key % 2**32)
            return self.transform(image=value)["image"]
        python, numpy = random.getstate(), np.random.get_state()
        with torch.random.fork_rng(devices=[]):
            try:
                torch.default_generator.manual_seed(key)
                np.random.seed(key % 2**32)
                random.seed(key)
                return self.transform(value)
            finally:
                random.setstate(python)
                np.random.set_state(numpy)
