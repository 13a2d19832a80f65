"""The conditions of a run: versions, the machine, the compiled core; and transformers without its own messages."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib import metadata
from typing import Any

import torch

from fastft import _C
from fastft._core import __version__

__all__ = ["cpu_instruction_set", "cuda_architectures", "environment", "quiet_transformers", "why_no_cuda"]


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


def cpu_instruction_set() -> str:
    """The instruction set of the compiled core's loops on this CPU, such as ``"v4"`` for x86-64-v4."""
    return _C.cpu_instruction_set()


def cuda_architectures() -> list[int]:
    """The GPU architectures that this build has code for, such as 80 for sm_80; empty if it was built without CUDA."""
    return [int(arch) for arch in _C.cuda_archs.split()]


def why_no_cuda() -> str:
    """Why this build under this torch cannot step tensors on a GPU; "" if it can."""
    if reason := _C.cuda_unavailable():
        return reason
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA; install a CUDA build of torch"
    if not torch.cuda.is_available():
        return "torch.cuda.is_available() is False"
    return ""


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' progress bars and advice out of a command's output."""
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
