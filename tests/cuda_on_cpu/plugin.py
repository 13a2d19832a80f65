"""For pytest in a sanitized build: makes sure that this build, and no other, is what the tests run."""

from __future__ import annotations

import ctypes
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

import fastft
from fastft import _C

KIND = os.environ["FASTFT_SANITIZED"]
FOLDER = Path(_C.__file__).parent
COUNTERS = ("launches", "blocks", "uploads", "uploaded_bytes", "memsets")


class Counted(ctypes.Structure):
    """The shim's counters, which only grow."""

    _fields_ = [(name, ctypes.c_uint64) for name in COUNTERS]


def counters() -> Counter[str]:
    """The shim's counters now; ``counters() - before`` counts what came since."""
    out = Counted()
    ctypes.CDLL(str(FOLDER / "libfastft_kernels.so")).cuda_on_cpu_counters(ctypes.byref(out))
    return Counter({name: getattr(out, name) for name in COUNTERS})


def pytest_configure(config: pytest.Config) -> None:
    tree = Path(os.environ["PYTHONPATH"].split(os.pathsep)[0])
    if not Path(fastft.__file__).is_relative_to(tree) or FOLDER.parent != tree:
        raise pytest.UsageError(f"expected fastft from {tree}, got {fastft.__file__} and {_C.__file__}")
    expected = ("cpu",) if KIND == "cuda-on-cpu" else ()
    if _C.kernel_devices != expected:
        raise pytest.UsageError(f"expected kernel_devices {expected}, got {_C.kernel_devices}")
    loops, wanted = _C.cpu_instruction_set(), os.environ.get("FASTFT_CPU_CAPABILITY")
    if wanted and loops != wanted:
        raise pytest.UsageError(f"expected the {wanted} loops, got {loops}")
    if KIND == "cuda-on-cpu":
        config.pluginmanager.register(LaunchCount(), "launch-count")


class LaunchCount:
    """Fails a session in which the tests of some file launched no kernel: they would have tested something else."""

    def __init__(self) -> None:
        self.launches: Counter[str] = Counter()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Iterator[None]:
        before = counters()
        yield
        self.launches[item.path.name] += (counters() - before)["launches"]

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        idle = sorted({item.path.name for item in session.items} - set(+self.launches))
        if idle or not session.items:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        for name, count in self.launches.items():
            terminalreporter.write_line(f"{name}: {count} kernel launches")
            if count == 0:
                terminalreporter.write_line(f"{name}: ERROR: expected its tests to launch kernels", red=True)
