"""Results as JSON lines: one line a run, appended when it ends, so a sweep can be stopped anywhere."""

from __future__ import annotations

import base64
import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "retention"
DATA_RESULTS = RESULTS.with_name("data")
WORK = ROOT / "build" / "retention"
"""Claims on runs, and vectors of the base model: nothing that could not be made again."""


def pack(items: Tensor) -> dict[str, Any]:
    """Right or wrong for each item, as text: the mean, its standard error, and the items in eight to a byte."""
    hits = items.bool().cpu().numpy()
    n, mean = len(hits), float(hits.mean())
    return {
        "mean": mean,
        "standard_error": (mean * (1 - mean) / (n - 1)) ** 0.5,
        "items": n,
        "bits": base64.b64encode(np.packbits(hits).tobytes()).decode("ascii"),
    }


def unpack(packed: dict[str, Any]) -> Tensor:
    """The items of :func:`pack`, as booleans."""
    octets = np.frombuffer(base64.b64decode(packed["bits"]), dtype=np.uint8)
    return torch.from_numpy(np.unpackbits(octets, count=packed["items"]).astype(bool))


def load(*paths: Path) -> list[dict[str, Any]]:
    """The records of files that exist, without lines that were cut off by a killed process."""
    found = []
    for path in paths:
        for line in path.read_text("utf-8").splitlines() if path.exists() else []:
            try:
                found.append(json.loads(line))
            except json.JSONDecodeError:
                continue
    return found


def append(path: Path, record: dict[str, Any]) -> None:
    """Add a line, whatever other processes add at the same time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        # A line that was cut off must not swallow this one.
        torn = file.tell() > 0 and file.seek(-1, 2) >= 0 and file.read(1) != b"\n"
        file.write(b"\n" * torn + json.dumps(record, sort_keys=True).encode("utf-8") + b"\n")


@contextmanager
def claim(name: str) -> Iterator[bool]:
    """Whether this process is the only one at work on ``name``; the claim ends with the process, however that ends."""
    folder = WORK / "claims"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / name).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
