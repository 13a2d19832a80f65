"""One thread, and no chatter: these models are tiny."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import transformers
from unfreeze_cases import one_thread


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    log = transformers.utils.logging
    level = log.get_verbosity()
    log.set_verbosity_error()
    log.disable_progress_bar()
    yield
    log.set_verbosity(level)
    log.enable_progress_bar()
