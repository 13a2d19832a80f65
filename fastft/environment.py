"""What the numbers of a run depend on besides its options, and a quiet transformers."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib import metadata
from typing import Any

import torch

from fastft._core import __version__

__all__ = ["environment", "quiet_transformers"]


def environment(packages: Iterable[str]) -> dict[str, Any]:
    """Versions of fastft, torch, Python and these packages; the platform, and the threads that torch uses."""
    return {
        "versions": {
            "fastft": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            **{package: metadata.version(package) for package in packages},
        },
        "platform": platform.platform(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' loading bars and advice out of a command's output."""
    import transformers

    log = transformers.utils.logging
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()
