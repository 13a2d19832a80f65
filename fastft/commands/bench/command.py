"""``fastft bench``: chooses cases, prints the table and writes the JSON."""

from __future__ import annotations

import argparse
import gc
import json
import warnings
from pathlib import Path
from typing import Any

import torch

from fastft.errors import UserError

from ..failure import Failure
from . import dropout, peers, steps, training
from .cases import Case, ReadyCase, select
from .harness import Measurement, alternate, copy_bandwidth, environment, free_memory

HELP = "measure fastft next to torch and other libraries, on this machine"
DESCRIPTION = (
    "Measures fastft's AdamW and dropout alternately with torch's and, where they are installed, other libraries' in "
    "one process, compares their results, and prints a table. All of it takes some minutes."
)
EXTRA = ""
PACKAGES: dict[str, str] = {}

CASES = (*steps.CASES, *dropout.CASES, *training.CASES)
ROUNDS, QUICK_ROUNDS = 41, 5
SECONDS_A_CASE = 2.0
"""Measuring a case takes about this long at most: a slow one has fewer rounds."""
SHARE_OF_MEMORY = 0.8
"""The share of the free memory that a case may take."""
TARGETS_HOLD_ON = "cpu"
TABLE = "{:<52.52}  {:<18.18}  {:>10}  {:>10}  {:>7}  {:<13}  {:>6}  {}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--case",
        action="append",
        default=[],
        metavar="NAME",
        help="a case, a family of cases (dropout, step, size, ...) or a pattern; may be repeated (default: all)",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="(default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="few rounds, and without what takes longest to prepare")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")


def run(options: argparse.Namespace) -> str:
    """Measure the chosen cases, print each when it is done, and return the closing lines."""
    device, file = torch.device(options.device), options.json
    if device.type == "cuda" and not torch.cuda.is_available():
        raise Failure("torch.cuda.is_available() is False; see fastft info", 1)
    try:
        cases = select(CASES, options.case)
    except ValueError as error:
        raise UserError(str(error)) from error
    if file is not None and not file.parent.is_dir():
        raise UserError(f"--json: expected a file in a folder that exists, got {file}")
    rounds = QUICK_ROUNDS if options.quick else ROUNDS
    known = environment(device)
    bandwidth = copy_bandwidth(device, rounds)
    print(
        f"fastft {known['fastft']} ({known['commit']}), torch {known['torch']}, {known['device']}, "
        f"{known['threads']} threads, at most {rounds} rounds; a copy runs at {bandwidth / 1e9:.0f} GB/s"
    )
    print(TABLE.format("what", "against", "fastft", "other", "ratio", "quartiles", "GB/s", "target"))
    result: dict[str, Any] = {
        "environment": known,
        "rounds": rounds,
        "copy_gb_per_s": significant(bandwidth / 1e9),
        "peers": peers.versions(),
        "cases": {},
        "skipped": {},
    }
    for case in cases:
        reason = why_not(case, device, options.quick and not options.case)
        if reason:
            result["skipped"][case.name] = reason
        else:
            with warnings.catch_warnings():  # steps that change nothing take as long
                warnings.filterwarnings("ignore", ".* are rounded to nearest", UserWarning)
                measured = result_of(case, *measure(case, device, rounds), device)
            result["cases"][case.name] = measured
            print("\n".join(table_rows(measured)), flush=True)
        if file is not None:  # after each case, so that a run that is cut short leaves what it has measured
            file.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
            options.written = True
    lines = [f"{name}: not measured: {reason}" for name, reason in result["skipped"].items()]
    return "\n".join(lines if file is None else [*lines, f"written to {file}"])


def left_behind(options: argparse.Namespace) -> str:
    """The file with the results of a run that was cut short, if it wrote one."""
    return f"what was measured is in {options.json}" if getattr(options, "written", False) else "nothing was written"


def why_not(case: Case, device: torch.device, quick: bool) -> str:
    """The reason why a case is not measured here; "" if it is."""
    free = free_memory(device)
    if case.memory > SHARE_OF_MEMORY * free:
        return f"it takes {case.memory / 1e9:.0f} GB of memory, {free / 1e9:.0f} are free"
    if quick and case.family in ("peers", "training"):
        return "quick; choose it by --case"
    if case.family == "training" and peers.versions()["transformers"] == "not installed":
        return "transformers is not installed"
    return ""


def measure(case: Case, device: torch.device, rounds: int) -> tuple[Measurement, ReadyCase]:
    """Get a case ready, and time its pieces alternately."""
    prepared = case.prepare(device)
    measured = alternate(prepared.works, device, rounds, seconds_at_most=SECONDS_A_CASE, host=case.host)
    gc.collect()  # optimizers and their hooks refer to each other
    return measured, prepared


def result_of(case: Case, measured: Measurement, prepared: ReadyCase, device: torch.device) -> dict[str, Any]:
    """One case's figures, ready for ``json``, in a fixed order."""
    against = {}
    subject, *others = prepared.works
    for name in others:
        ratio = measured.ratio(subject, name)
        against[name] = {
            "median_ms": significant(1e3 * measured.median(name)),
            "ratio_of_medians": significant(ratio.of_medians),
            "ratio_quartiles": [significant(ratio.lower), significant(ratio.upper)],
        }
    seconds = measured.median(subject)
    return {
        "family": case.family,
        "title": case.title,
        "axis": dict(case.axis),
        "rounds": measured.rounds,
        "median_ms": significant(1e3 * seconds),
        "gb_per_s": None if case.nbytes is None else significant(case.nbytes / seconds / 1e9),
        "against": against,
        "absent": prepared.absent,
        "target": case.target if device.type == TARGETS_HOLD_ON else None,
    }


def table_rows(result: dict[str, Any]) -> list[str]:
    """A case as lines of the table: one for each piece of work that fastft's was measured against."""
    lines = []
    for index, (name, other) in enumerate(result["against"].items()):
        lower, upper = other["ratio_quartiles"]
        own, target = ("", "", ""), ""
        if index == 0:
            own = (result["title"], f"{result['median_ms']:.4g} ms", gigabytes(result["gb_per_s"]))
            target = verdict(other["ratio_of_medians"], result["target"])
        lines.append(
            TABLE.format(
                own[0],
                name,
                own[1],
                f"{other['median_ms']:.4g} ms",
                f"{other['ratio_of_medians']:.3f}",
                f"{lower:.3f}-{upper:.3f}",
                own[2],
                target,
            ).rstrip()
        )
    lines += [f"{'':<54}{name}: {reason}" for name, reason in result["absent"].items()]
    return lines


def gigabytes(rate: float | None) -> str:
    return "" if rate is None else f"{rate:.3g}"


def verdict(ratio: float, target: float | None) -> str:
    return "" if target is None else f"≤ {target:.2f} {'met' if ratio <= target else 'MISSED'}"


def significant(value: float) -> float:
    """Rounded to 4 significant digits: more would be noise, and would fill every diff."""
    return float(f"{value:.4g}")
