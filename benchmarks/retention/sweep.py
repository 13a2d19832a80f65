"""Work through the plan: ``python -m benchmarks.retention.sweep --minutes 60``.

Stop it anywhere; started again, it goes on from there. Several may run beside each other: they share the runs.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from . import plan, records
from .run import ALPHAS, Settings


def to_do(what: str, results: Path) -> Iterator[Settings]:
    """The runs of the plan that have no record yet."""
    tuned = records.load(results / "validation.jsonl")
    done = {record["key"] for record in tuned + records.load(results / "test.jsonl")}
    wanted = {"tuning": plan.tuning, "full": partial(plan.full_runs, tuned), "data": plan.data_runs}[what]()
    return (settings for settings in wanted if settings.key not in done)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.retention.sweep", description=__doc__)
    parser.add_argument("what", choices=["tuning", "full", "data"], nargs="?", default="tuning")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no run after this time")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path, help="the folder of the JSON lines")
    parser.add_argument("--list", action="store_true", help="only list what is left to do")
    parsed = parser.parse_args(arguments)
    # What is read of replay and augmentation is the model as trained.
    default, alphas = (records.DATA_RESULTS, (1.0,)) if parsed.what == "data" else (records.RESULTS, ALPHAS)
    results = parsed.results or default
    end = time.monotonic() + 60 * parsed.minutes
    tried: set[str] = set()
    while time.monotonic() < end:
        # Asked anew each time: which full runs there are depends on the tuning that others may be doing.
        left = [s for s in to_do(parsed.what, results) if s.key not in tried]
        if parsed.list:
            print("\n".join(settings.title for settings in left))
            return 0
        if not left:
            return 0
        for settings in left:
            tried.add(settings.key)
            with records.claim(f"{settings.key}-sweep") as free:
                if free:
                    start(settings, alphas, parsed.threads, results)
                    break
    return 0


def start(settings: Settings, alphas: Sequence[float], threads: int, results: Path) -> None:
    """One run, in a process of its own; a failed one is reported and passed over."""
    command = [sys.executable, "-m", "benchmarks.retention.run", *settings.arguments()]
    command += ["--alphas", *map(str, alphas), "--threads", str(threads), "--results", str(results)]
    done = subprocess.run(command)
    if done.returncode:
        print(f"failed ({done.returncode}): {settings.title}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
