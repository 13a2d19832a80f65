"""``python -m benchmarks.precision stall pull memory speed training``: measure, and write the results."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from . import memory, pull, speed, stall, training
from .settings import RESULTS, WORK, write

MEASURED = {module.NAME: module.measure for module in (stall, pull, memory, speed)}
NAMES = (*MEASURED, training.NAME)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.precision", description=__doc__)
    parser.add_argument("experiment", nargs="+", choices=NAMES, help="done one after the other")
    parser.add_argument("--quick", action="store_true", help="seconds each, too small to mean anything")
    parser.add_argument(
        "--results", type=Path, metavar="FOLDER", help=f"default: {RESULTS}; with --quick: {WORK}/quick"
    )
    parser.add_argument("--seconds", type=float, default=float("inf"), help="training: begin no run after that")
    parser.add_argument("--only", metavar="TEXT", help="training: runs with this in their name")
    parser.add_argument("--threads", type=int, help="of torch; training is quickest as two processes with one each")
    options = parser.parse_args(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    folder = options.results or (WORK / "quick" if options.quick else RESULTS)
    for name in options.experiment:
        if name == training.NAME:
            training.measure(options.quick, folder, options.seconds, options.only)
        else:
            write(MEASURED[name](options.quick), folder / f"{name}.json")
            print(f"{name}: written to {folder / f'{name}.json'}", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
