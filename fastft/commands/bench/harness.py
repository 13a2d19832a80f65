"""Measure pieces of work alternately in one process; describe the machine."""

from __future__ import annotations

import gc
import math
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

import fastft
from fastft.environment import cpu_instruction_set

ROOT = Path(__file__).resolve().parents[3]
Work = Callable[[], object]

WARM_UP = 3
FEWEST_ROUNDS = 5
MADE_FROM_RESULTS = (
    ":!benchmarks/results",
    ":!README.md",
    ":!docs/_generated",
    ":!docs/data.md",
    ":!docs/precision.md",
    ":!docs/retention.md",
)
SHORTEST = 5e-4
"""Seconds: quicker work is repeated until one timing on the CPU takes about this long."""


@dataclass(frozen=True)
class Ratio:
    """How long one piece of work takes relative to another."""

    of_medians: float
    lower: float
    upper: float
    """Quartiles of the ratios of the single rounds, which show the spread."""


@dataclass(frozen=True)
class Measurement:
    """Seconds of one call, round by round, for each piece of work."""

    seconds: dict[str, list[float]]
    calls: dict[str, int]
    """How many calls in a row each of these seconds is the mean of."""

    @property
    def rounds(self) -> int:
        return len(next(iter(self.seconds.values())))

    def median(self, name: str) -> float:
        return statistics.median(self.seconds[name])

    def ratios(self, name: str, baseline: str) -> list[float]:
        """Round by round."""
        return [ours / theirs for ours, theirs in zip(self.seconds[name], self.seconds[baseline], strict=True)]

    def quartiles(self, name: str, baseline: str) -> list[float]:
        """Lower quartile, median and upper quartile of :meth:`ratios`."""
        ratios = self.ratios(name, baseline)
        return statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3

    def ratio(self, name: str, baseline: str) -> Ratio:
        lower, _, upper = self.quartiles(name, baseline)
        return Ratio(self.median(name) / self.median(baseline), lower, upper)


class CpuClock:
    """Seconds of a call, as the mean over several in a row; by ``time.process_time``, of the processor."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self.now = now

    def __call__(self, work: Work, calls: int) -> float:
        begin = self.now()
        for _ in range(calls):
            work()
        return (self.now() - begin) / calls


class CudaClock:
    """Seconds from an idle GPU to the end of the work, launches included, with nothing of it in the L2 cache."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.begin, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # Read, not written, between calls: dirty lines would have to leave the cache while the clock runs.
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        self.other_data = torch.zeros(4 * cache // 4, dtype=torch.float32, device=device)

    def __call__(self, work: Work, calls: int) -> float:
        milliseconds = 0.0
        for _ in range(calls):
            self.other_data.sum()
            torch.cuda.synchronize(self.device)
            self.begin.record()
            work()
            self.end.record()
            torch.cuda.synchronize(self.device)
            milliseconds += self.begin.elapsed_time(self.end)
        return milliseconds / 1e3 / calls


class HostClock:
    """Seconds until a call returns, whatever it has left to an idle GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __call__(self, work: Work, calls: int) -> float:
        seconds = 0.0
        for _ in range(calls):
            torch.cuda.synchronize(self.device)
            begin = time.perf_counter()
            work()
            seconds += time.perf_counter() - begin
        torch.cuda.synchronize(self.device)
        return seconds / calls


Clock = CpuClock | CudaClock | HostClock


def clock_for(device: torch.device, host: bool) -> Clock:
    if device.type == "cpu":
        return CpuClock()
    return HostClock(device) if host else CudaClock(device)


def alternate(
    works: Mapping[str, Work],
    device: torch.device,
    rounds: int,
    *,
    seconds_at_most: float,
    host: bool = False,
    clock: Clock | None = None,
) -> Measurement:
    """Time each piece of work once a round, the first of one round being the last of the next.

    A disturbance that lasts longer than a round thus affects all alike, and none always follows the same other.
    Where ``rounds`` rounds would take longer than ``seconds_at_most``, there are fewer, at least ``FEWEST_ROUNDS``.
    Without a ``clock`` it is the device's.
    """
    clock = clock or clock_for(device, host)
    names = list(works)
    calls, one_round = {}, 0.0
    for name in names:
        once = min(clock(works[name], 1) for _ in range(WARM_UP))
        calls[name] = 1 if device.type == "cuda" else max(1, math.ceil(SHORTEST / once))
        one_round += once * calls[name]
    rounds = min(rounds, max(FEWEST_ROUNDS, int(seconds_at_most / one_round)))
    seconds: dict[str, list[float]] = {name: [] for name in names}
    collecting = gc.isenabled()
    gc.disable()
    try:
        for _ in range(rounds):
            for name in names:
                seconds[name].append(clock(works[name], calls[name]))
            names.append(names.pop(0))
    finally:
        if collecting:
            gc.enable()
    return Measurement(seconds, calls)


def copy_bandwidth(device: torch.device, rounds: int) -> float:
    """Bytes that a large copy reads and writes each second: the measure of memory-bound work."""
    source = torch.ones(1 << 28, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copied = alternate({"copy": lambda: target.copy_(source)}, device, rounds, seconds_at_most=10.0)
    return 2 * source.nbytes / copied.median("copy")


def environment(device: torch.device) -> dict[str, str | int]:
    """The machine, the versions and the commit that a measurement depends on, in a fixed order."""
    return {
        "device": device_name(device),
        "device_type": device.type,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "fastft": fastft.__version__,
        "commit": commit(),
        "python": platform.python_version(),
        "cpu_instruction_set": cpu_instruction_set(),
    }


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def commit() -> str:
    """The commit that is checked out, "-dirty" behind it if files differ; for an installed package $FASTFT_COMMIT.

    What benchmarks write does not count.
    """
    head = git("rev-parse", "--short=12", "HEAD") if (ROOT / ".git").exists() else None
    if head is None:
        return os.environ.get("FASTFT_COMMIT", "unknown")
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", *MADE_FROM_RESULTS)
    return head + ("-dirty" if changed else "")


def git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def free_memory(device: torch.device) -> float:
    """Bytes of memory that are free."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    try:
        text = Path("/proc/meminfo").read_text(encoding="utf-8")
    except OSError:
        return math.inf
    return 1024.0 * int(text.split("MemAvailable:")[1].split()[0])
