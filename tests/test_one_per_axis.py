"""``--one-per-axis``: which cases of a parametrised test are kept."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest
from one_per_axis import covering

pytest_plugins = ("pytester",)

TESTS = """
import pytest

@pytest.fixture(params=["x", "y"])
def kind(request):
    return request.param

@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize(("dtype", "state"), [("a", None), ("b", None), ("b", "a")])
def test_product(dtype, state, size, kind):
    pass

@pytest.mark.parametrize("size", [1, 2, 3])
def test_axis(size):
    pass

def test_plain():
    pass
"""


def test_every_value_is_held_and_no_case_is_for_nothing() -> None:
    cases = [frozenset(enumerate(case)) for case in itertools.product("abc", "xy", "12345")]
    kept = [cases[i] for i in covering(cases)]
    assert frozenset.union(*kept) == frozenset.union(*cases)
    assert len(kept) == 5  # the longest axis
    assert covering([frozenset()]) == [0]


@pytest.mark.slow
def test_what_is_run(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)
    pytester.makepyfile(TESTS)
    whole = pytester.runpytest_subprocess("-p", "one_per_axis", "-v")
    whole.assert_outcomes(passed=18 + 3 + 1)
    few = pytester.runpytest_subprocess("-p", "one_per_axis", "--one-per-axis", "-v")
    few.assert_outcomes(passed=3 + 3 + 1, deselected=15)
    ids = {line.partition("[")[2].partition("]")[0] for line in few.outlines if "test_product[" in line}
    assert {value for name in ids for value in name.split("-")} == {"x", "y", "1", "2", "3", "a", "b", "None"}
    # The arguments of one parametrize stay together.
    assert {re.findall("[ab]-(?:None|a)", name)[0] for name in ids} == {"a-None", "b-None", "b-a"}
