"""One thread: these models are so small that waiting for a second one takes most of the time on a busy machine."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from unfreeze_cases import one_thread


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield
