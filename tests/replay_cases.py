"""Datasets for tests/data/test_replay.py, and what the two processes do that it starts, one for each rank."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from started import end_together
from torch.utils.data import DataLoader, Dataset, IterableDataset

from fastft.data import ReplayMixer

WORLD, WORKERS = 2, 2
FIRST_SOURCE = 10_000
"""Target examples are 0, 1, ...; source examples count on from here, so that their origin shows."""


class Numbers(Dataset[int]):
    """``size`` numbers from ``first`` on."""

    def __init__(self, size: int, first: int = 0) -> None:
        self.size, self.first = size, first

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> int:
        return range(self.first, self.first + self.size)[index]


class NumberStream(IterableDataset[int]):
    """The same as a stream, which knows nothing of workers and ranks."""

    def __init__(self, size: int, first: int = 0) -> None:
        self.size, self.first = size, first

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.first, self.first + self.size))


def targets(size: int) -> Numbers:
    return Numbers(size)


def sources(size: int) -> Numbers:
    return Numbers(size, FIRST_SOURCE)


def is_source(example: int) -> bool:
    return example >= FIRST_SOURCE


def flat(batches: Any) -> list[int]:
    return [int(example) for batch in batches for example in batch]


def epochs(rank: int) -> dict[str, list[list[int]]]:
    """The items of a rank's loaders in two epochs, for map- and iterable-style datasets."""
    given: dict[str, list[list[int]]] = {"map": [], "stream": []}
    mixer = ReplayMixer(targets(101), sources(7), 0.3, seed=5)
    loader = DataLoader(mixer, batch_size=4, sampler=mixer.sampler(), num_workers=WORKERS, persistent_workers=True)
    stream = ReplayMixer(NumberStream(101), NumberStream(9, FIRST_SOURCE), 0.3, seed=5)
    stream_loader = DataLoader(stream, batch_size=4, num_workers=WORKERS)
    for epoch in range(2):
        mixer.set_epoch(epoch)
        given["map"].append(flat(loader))
        given["stream"].append(flat(stream_loader))
    return given


if __name__ == "__main__":
    rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    (folder / f"given_{rank}.json").write_text(json.dumps(epochs(rank)))
    end_together()
