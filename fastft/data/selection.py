"""Choose representative examples; measure how far they lie from what a model knows, and how classes are balanced."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

Floats = NDArray[np.float64]

BLOCK_ELEMENTS = 1 << 22
"""Of a matrix of distances, at most as many numbers (of 8 bytes) are in memory at a time."""


def select_representative(
    embeddings: Any, k: int, method: Literal["k_center", "facility_location"] = "facility_location"
) -> list[int]:
    """Choose k rows that represent all, greedily. The first few of them represent all as well as they can, too.

    "k_center" keeps the farthest point near: each next row is the one farthest from those chosen, from the row nearest
    to the mean on. The largest Euclidean distance of a row to its nearest chosen one is at most twice the least
    possible (Gonzalez 1985). It seeks out outliers. O(n·k·d).

    "facility_location" keeps the typical point near: each next row adds most to Σᵢ maxⱼ max(0, cos(xᵢ, xⱼ)). This sum
    is at least 1 − 1/e ≈ 63 % of the largest possible (Nemhauser et al. 1978). It seeks out dense regions. Lazy
    evaluation (Minoux 1978) spares most of O(n²·k·d); memory is O(n·d).

    Args:
        embeddings: [n, d], an array or a tensor; finite.
        k: how many, from 1 to n.
        method: see above.

    Returns:
        k different indices.

    Raises:
        ValueError: a wrong shape, k or method, or a number that is not finite.
    """
    points = as_points(embeddings, "embeddings")
    if not isinstance(k, int) or not 1 <= k <= len(points):
        raise ValueError(f"k: expected a whole number from 1 to {len(points)}, got {k!r}")
    if method == "k_center":
        return k_center(points, k)
    if method == "facility_location":
        return facility_location(points, k)
    raise ValueError(f'method: expected "k_center" or "facility_location", got {method!r}')


def k_center(points: Floats, k: int) -> list[int]:
    chosen = [int(np.argmin(np.square(points - points.mean(0)).sum(1)))]
    nearest = np.full(len(points), np.inf)
    while len(chosen) < k:
        nearest = np.minimum(nearest, np.square(points - points[chosen[-1]]).sum(1))
        nearest[chosen[-1]] = -1.0  # never again, also where all that is left are copies
        chosen.append(int(np.argmax(nearest)))
    return chosen


def facility_location(points: Floats, k: int) -> list[int]:
    lengths = np.linalg.norm(points, axis=1, keepdims=True)
    units = points / np.where(lengths > 0, lengths, 1.0)
    # A heap of (−gain, index). Gains only shrink as rows are chosen, so an old gain is an upper bound.
    gains = np.concatenate([np.maximum(units @ block.T, 0).sum(0) for block in blocks(units, len(units))])
    heap = [(-float(gain), index) for index, gain in enumerate(gains)]
    heapq.heapify(heap)
    served = np.zeros(len(units))
    chosen: list[int] = []
    while len(chosen) < k:
        _, index = heapq.heappop(heap)
        similar = units @ units[index]
        gain = float(np.maximum(similar - served, 0).sum())
        if not heap or gain >= -heap[0][0]:
            chosen.append(index)
            served = np.maximum(served, similar)
        else:
            heapq.heappush(heap, (-gain, index))
    return chosen


@dataclass(frozen=True)
class Coverage:
    """How a target set lies in a source set; see :func:`coverage`."""

    within: float
    """The share of the target that lies within the source, 0 to 1: the lower, the more old knowledge is at risk."""
    density: float
    """In how many source neighbourhoods a target example lies, over k: 1 for a sample of the source itself."""
    coverage: float
    """The share of the source with a target example nearby, 0 to 1: the lower, the more is never repeated."""
    k: int


def coverage(source: Any, target: Any, k: int = 5) -> Coverage:
    """How far a fine-tuning set lies from what a model knows, in a space of embeddings.

    With B(x) the open ball around source point x whose radius is the distance to its k-th nearest other source point,
    N source and M target points:

    - ``within`` = share of targets in any B(x): the improved precision of Kynkäänniemi et al. 2019
      (https://arxiv.org/abs/1904.06991);
    - ``density`` = 1/(k·M)·Σ over targets of the number of B(x) that hold it, and
    - ``coverage`` = share of the N balls that hold a target, both of Naeem et al. 2020
      (https://arxiv.org/abs/2002.09797), where the source is "real" and the target "fake".

    Args:
        source: embeddings [N, d] of data like those the model was trained on, N > k.
        target: embeddings [M, d] of the fine-tuning data, of the same model.
        k: the neighbours that set the radius; 5 in the paper.

    Returns:
        ``within``, ``density`` and ``coverage`` as above, and ``k``. The lower ``within``, the more old knowledge is at
        risk; the lower ``coverage``, the more of it is never repeated; ``density`` is 1 for a sample of the source.

    Raises:
        ValueError: wrong shapes or k, or a number that is not finite.
    """
    known, new = as_points(source, "source"), as_points(target, "target")
    if known.shape[1] != new.shape[1]:
        raise ValueError(f"target: expected {known.shape[1]} columns as the source has, got {new.shape[1]}")
    if not isinstance(k, int) or not 1 <= k < len(known):
        raise ValueError(f"k: expected a whole number from 1 to {len(known) - 1}, got {k!r}")
    middle = known.mean(0)  # near 0, squared distances lose less to rounding
    known, new = known - middle, new - middle
    balls_around = np.zeros(len(new), np.int64)
    covered = start = 0
    for block in blocks(known, max(len(known), len(new))):
        among = squared_distances(block, known)
        among[np.arange(len(block)), np.arange(start, start + len(block))] = np.inf  # a point is not its own neighbour
        radii = np.partition(among, k - 1, axis=1)[:, k - 1 : k]
        inside = squared_distances(block, new) < radii
        balls_around += inside.sum(0)
        covered += int(inside.any(1).sum())
        start += len(block)
    return Coverage(
        within=float((balls_around > 0).mean()),
        density=float(balls_around.mean() / k),
        coverage=covered / len(known),
        k=k,
    )


@dataclass(frozen=True)
class Balance:
    """How often each class occurs; see :func:`class_balance`."""

    counts: dict[Any, int]
    """By class, the most frequent first."""
    majority: float
    """The share of the most frequent class: the accuracy of always guessing it."""
    imbalance: float
    """The most frequent class's count over the least frequent one's."""
    weights: dict[Any, float]
    """examples/(classes·count) by class, for a loss in which all classes count alike."""


def class_balance(labels: Iterable[Hashable]) -> Balance:
    """Count classes.

    Returns:
        ``counts``, by class, the most frequent first; ``majority``, the most frequent class's share, which is the
        accuracy of always guessing it; ``imbalance``, its count over that of the least frequent; and ``weights``,
        examples/(classes·count) by class, for a loss in which all classes count alike.

    Raises:
        ValueError: there is no label.
    """
    counts = dict(Counter(labels).most_common())
    if not counts:
        raise ValueError("labels: expected at least one, got none")
    total, most, least = sum(counts.values()), max(counts.values()), min(counts.values())
    weights = {label: total / (len(counts) * count) for label, count in counts.items()}
    return Balance(counts, most / total, most / least, weights)


def as_points(values: Any, name: str) -> Floats:
    """A float64 array [n, d] of embeddings."""
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu().double()
    points = np.asarray(values, np.float64)
    if points.ndim != 2 or not points.size:
        raise ValueError(f"{name}: expected embeddings [n, d], got shape {tuple(points.shape)}")
    if not np.isfinite(points).all():
        raise ValueError(f"{name}: expected finite numbers, got inf or NaN")
    return points


def blocks(points: Floats, columns: int) -> Iterator[Floats]:
    """The rows in blocks, so that a matrix of a block and ``columns`` columns stays small."""
    rows = max(1, BLOCK_ELEMENTS // columns)
    for start in range(0, len(points), rows):
        yield points[start : start + rows]


def squared_distances(a: Floats, b: Floats) -> Floats:
    """Squared Euclidean distances [len(a), len(b)]."""
    squares: Floats = np.square(a).sum(1)[:, None] + np.square(b).sum(1) - 2 * (a @ b.T)
    return np.maximum(squares, 0, out=squares)
