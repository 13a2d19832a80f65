"""For pytest, ``-p one_per_axis``: of each parametrised test, few cases that hold every value of every axis.

An axis is one ``parametrize`` or one parametrised fixture. Where a test has several, the plain suite runs their whole
product. Under sanitizers, where a test takes some ten times as long, ``--one-per-axis`` keeps one case for each value
of each axis, in combinations as different as can be had.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest

Value = tuple[str, tuple[int, ...]]
"""An axis, and the identities of the objects that stand on it."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--one-per-axis", action="store_true", help="of each test, one case for each value of each axis")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--one-per-axis"):
        return
    kept = {case for cases in by_test(items) for case in chosen(cases)}
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]


def by_test(items: Sequence[pytest.Item]) -> list[list[pytest.Item]]:
    """The cases of each test."""
    tests: dict[str, list[pytest.Item]] = {}
    for item in items:
        tests.setdefault(item.nodeid.partition("[")[0], []).append(item)
    return list(tests.values())


def chosen(cases: Sequence[pytest.Item]) -> list[pytest.Item]:
    """Of the cases of one test, one for each value of each axis."""
    return [cases[i] for i in covering([values_of(case) for case in cases])]


def values_of(item: pytest.Item) -> frozenset[Value]:
    callspec = getattr(item, "callspec", None)
    if callspec is None:
        return frozenset()
    params = callspec.params
    together = [names(mark) for mark in item.iter_markers("parametrize")]
    apart = [(name,) for name in params if not any(name in axis for axis in together)]  # fixtures
    return frozenset((",".join(axis), tuple(id(params[name]) for name in axis)) for axis in together + apart)


def names(mark: pytest.Mark) -> tuple[str, ...]:
    given = mark.kwargs["argnames"] if "argnames" in mark.kwargs else mark.args[0]
    return tuple(name.strip() for name in given.split(",") if name.strip()) if isinstance(given, str) else tuple(given)


def covering(cases: Sequence[frozenset[Value]]) -> list[int]:
    """Which cases to keep: each next one is the first that holds most values not held yet."""
    missing: set[Value] = set().union(*cases)
    kept = [] if missing else [0]
    while missing:
        best = max(range(len(cases)), key=lambda i: len(cases[i] & missing))
        missing -= cases[best]
        kept.append(best)
    return kept
