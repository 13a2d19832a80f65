"""For all tests: which cases of a large product are slow, and a garbage collector that has little to look at."""

from __future__ import annotations

import gc

import one_per_axis
import pytest

LARGE = 40
"""Of a test with more cases than this, the quick set has one case for each value of each axis."""


@pytest.hookimpl(tryfirst=True)  # before -m is applied
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for cases in one_per_axis.by_test(items):
        kept = one_per_axis.chosen(cases) if len(cases) > LARGE else cases
        for case in set(cases).difference(kept):
            case.add_marker(pytest.mark.slow)


def pytest_collection_finish() -> None:
    """Modules and tests live to the end: without them a full collection takes a tenth of the time."""
    gc.collect()
    gc.freeze()
