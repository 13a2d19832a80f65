"""Representative examples against brute force, coverage against its definition, and counts of classes."""

from __future__ import annotations

import math
from itertools import combinations, pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastft.data import class_balance, coverage, select_representative, selection


def points(n: int, d: int, seed: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).normal(size=(n, d))


def radius(x: np.ndarray[Any, Any], chosen: tuple[int, ...] | list[int]) -> float:
    """The largest distance of a point to its nearest chosen one."""
    return float(np.linalg.norm(x[:, None] - x[None, list(chosen)], axis=2).min(1).max())


def served(x: np.ndarray[Any, Any], chosen: tuple[int, ...] | list[int]) -> float:
    """Σᵢ maxⱼ max(0, cos(xᵢ, xⱼ))."""
    units = x / np.linalg.norm(x, axis=1, keepdims=True)
    return float(np.maximum(units @ units[list(chosen)].T, 0).max(1).sum())


# -- representative examples ---------------------------------------------------------------------------------


@given(st.integers(2, 9), st.integers(1, 3), st.integers(0, 10_000), st.data())
@settings(deadline=None, max_examples=80)
def test_greedy_choices_keep_their_bounds_against_brute_force(n: int, d: int, seed: int, data: st.DataObject) -> None:
    k, x = data.draw(st.integers(1, n)), points(n, d, seed)
    every = list(combinations(range(n), k))
    centres = select_representative(x, k, "k_center")
    assert radius(x, centres) <= 2 * min(radius(x, chosen) for chosen in every) + 1e-9
    facilities = select_representative(x, k, "facility_location")
    best = max(served(x, chosen) for chosen in every)
    assert served(x, facilities) >= (1 - 1 / math.e) * best - 1e-9
    for chosen in (centres, facilities):
        assert len(set(chosen)) == k and all(0 <= index < n for index in chosen)


@given(st.integers(2, 12), st.integers(0, 10_000))
@settings(deadline=None, max_examples=40)
def test_each_choice_is_the_greedy_one(n: int, seed: int) -> None:
    x = points(n, 3, seed)
    centres = select_representative(x, n, "k_center")
    from_mean = np.linalg.norm(x - x.mean(0), axis=1)
    assert from_mean[centres[0]] == pytest.approx(from_mean.min())
    facilities = select_representative(x, n, "facility_location")
    for step in range(1, n):
        distances = np.linalg.norm(x[:, None] - x[None, centres[:step]], axis=2).min(1)
        assert distances[centres[step]] == pytest.approx(distances.max())
        gains = [served(x, [*facilities[:step], j]) for j in range(n) if j not in facilities[:step]]
        assert served(x, facilities[: step + 1]) == pytest.approx(max(gains))
    assert served(x, facilities[:1]) == pytest.approx(max(served(x, [j]) for j in range(n)))


def test_one_of_each_cluster_is_chosen() -> None:
    middles = np.eye(6) * 10
    x = np.concatenate([middle + 0.1 * points(20, 6, i) for i, middle in enumerate(middles)])
    for method in ("k_center", "facility_location"):
        assert sorted(index // 20 for index in select_representative(x, 6, method)) == list(range(6))  # type: ignore[arg-type]


def test_they_differ_in_what_they_make_of_an_outlier() -> None:
    x = np.concatenate([points(50, 2, 0) * 0.1 + 5, [[-9.0, 9.0]]])
    assert 50 in select_representative(x, 2, "k_center")
    assert 50 not in select_representative(x, 1, "facility_location")


def test_copies_zeros_tensors_and_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    x = np.concatenate([np.ones((4, 2)), np.zeros((2, 2))])
    for method in ("k_center", "facility_location"):
        assert sorted(select_representative(x, 6, method)) == list(range(6))  # type: ignore[arg-type]
    y = torch.randn(40, 3, generator=torch.Generator().manual_seed(0), dtype=torch.bfloat16, requires_grad=True)
    whole = select_representative(y, 10), coverage(y[:20], y[20:])
    monkeypatch.setattr(selection, "BLOCK_ELEMENTS", 100)  # a few rows at a time
    assert (select_representative(y, 10), coverage(y[:20], y[20:])) == whole


# -- coverage ------------------------------------------------------------------------------------------------


def by_definition(source: Any, target: Any, k: int) -> tuple[float, float, float]:
    """Precision, density and coverage, written out."""
    among = np.linalg.norm(source[:, None] - source[None], axis=2)
    radii = np.sort(among, axis=1)[:, k]  # the first is the point itself
    inside = np.linalg.norm(source[:, None] - target[None], axis=2) < radii[:, None]
    return inside.any(0).mean(), inside.sum() / (k * len(target)), inside.any(1).mean()


@given(st.integers(3, 30), st.integers(1, 30), st.integers(1, 4), st.integers(0, 10_000), st.data())
@settings(deadline=None, max_examples=60)
def test_coverage_is_what_it_is_defined_as(n: int, m: int, d: int, seed: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, n - 1))
    source, target = 100 + points(n, d, seed), 100.5 + points(m, d, seed + 1)
    found = coverage(source, target, k)
    assert (found.within, found.density, found.coverage) == pytest.approx(by_definition(source, target, k))
    assert found.k == k


@pytest.mark.slow
def test_coverage_and_density_are_one_for_the_same_distribution_and_zero_far_away() -> None:
    source, same = points(1500, 4, 0), points(1500, 4, 1)
    found = coverage(source, same)
    assert found.density == pytest.approx(1, abs=0.1)
    # Its expectation is 1 − Πᵢ (N − i)/(M + N − i) over i = 1 ... k, which for N = M tends to 1 − 2⁻ᵏ.
    assert found.coverage == pytest.approx(1 - 2**-5, abs=0.02)
    far = coverage(source, same + 100)
    assert (far.within, far.density, far.coverage) == (0, 0, 0)


def test_coverage_rises_as_held_out_regions_are_added() -> None:
    middles = 8 * points(5, 6, 0)
    regions = [middle + points(80, 6, i + 1) for i, middle in enumerate(middles)]
    known = np.concatenate([middle + points(80, 6, i + 50) for i, middle in enumerate(middles)])
    found = [coverage(known, np.concatenate(regions[:n])).coverage for n in range(1, 6)]
    assert all(later > earlier + 0.1 for earlier, later in pairwise(found))
    assert found[0] < 0.25 and found[-1] > 0.9
    # And the other way round: the more of its regions the model knows, the more of the target is within them.
    within = [coverage(np.concatenate(regions[:n]), known).within for n in range(1, 6)]
    assert all(later > earlier + 0.1 for earlier, later in pairwise(within))


# -- classes -------------------------------------------------------------------------------------------------


def test_classes_are_counted_and_weighed() -> None:
    balance = class_balance(["a", "b", "a", "a", "c", "b"])
    assert list(balance.counts.items()) == [("a", 3), ("b", 2), ("c", 1)]
    assert (balance.majority, balance.imbalance) == (0.5, 3.0)
    assert sum(balance.weights[label] * count for label, count in balance.counts.items()) == pytest.approx(6)
    assert balance.weights["c"] == 3 * balance.weights["a"]


# -- wrong input ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: select_representative(np.zeros(3), 1), r"embeddings: expected embeddings \[n, d\], got shape \(3,\)"),
        (lambda: select_representative(np.zeros((0, 3)), 1), "embeddings: expected embeddings"),
        (lambda: select_representative([[1.0, math.nan]], 1), "embeddings: expected finite numbers"),
        (lambda: select_representative(np.ones((3, 2)), 4), "k: expected a whole number from 1 to 3, got 4"),
        (lambda: select_representative(np.ones((3, 2)), 0), "k: expected a whole number from 1 to 3, got 0"),
        (lambda: select_representative(np.ones((3, 2)), 1, "best"), 'method: expected "k_center" or'),  # type: ignore[arg-type]
        (lambda: coverage(np.ones((3, 2)), np.ones((3, 1))), "target: expected 2 columns as the source has, got 1"),
        (lambda: coverage(np.ones((3, 2)), np.ones((3, 2)), 3), "k: expected a whole number from 1 to 2, got 3"),
        (lambda: class_balance([]), "labels: expected at least one, got none"),
    ],
)
def test_wrong_input(call: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        call()
