"""The command ``fastft bench``: choosing cases, printing the table and writing the JSON."""

from __future__ import annotations

import gc
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from . import dropout, peers, steps, training
from .cases import Case, Prepared, select
from .harness import Measurement, alternate, copy_bandwidth, environment, free_memory

CASES = (*steps.CASES, *dropout.CASES, *training.CASES)
ROUNDS, QUICK_ROUNDS = 41, 5
SECONDS_A_CASE = 2.0
"""Measuring one takes about this long at most: slow ones have fewer rounds."""
SHARE_OF_MEMORY = 0.8
"""Of what is free, that a case may take."""
TARGETS_HOLD_ON = "cpu"
TABLE = "{:<52.52}  {:<18.18}  {:>10}  {:>10}  {:>7}  {:<13}  {:>6}  {}"


def run(
    patterns: Sequence[str] = (), *, device: str = "cpu", quick: bool = False, json_file: Path | None = None
) -> int:
    """Measure the cases that match ``patterns`` (all where there is none), print a table and write ``json_file``.

    ``quick`` takes few rounds, and leaves out what takes longest to prepare. Returns the process's exit status.
    """
    chosen_device = torch.device(device)
    if chosen_device.type == "cuda" and not torch.cuda.is_available():
        print("fastft bench: torch.cuda.is_available() is False; see fastft info")
        return 1
    try:
        cases = select(CASES, list(patterns))
    except ValueError as error:
        print(f"fastft bench: {error}")
        return 2
    if json_file is not None and not json_file.parent.is_dir():
        print(f"fastft bench: --json: expected a file in a folder that exists, got {json_file}")
        return 2
    rounds = QUICK_ROUNDS if quick else ROUNDS
    known = environment(chosen_device)
    bandwidth = copy_bandwidth(chosen_device, rounds)
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
        reason = why_not(case, chosen_device, quick and not patterns)
        if reason:
            result["skipped"][case.name] = reason
        else:
            measured = result_of(case, *measure(case, chosen_device, rounds), chosen_device)
            result["cases"][case.name] = measured
            print("\n".join(table_rows(measured)), flush=True)
        if json_file is not None:  # after each: a run that is cut short has told what it found
            json_file.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    for name, reason in result["skipped"].items():
        print(f"{name}: not measured: {reason}")
    if json_file is not None:
        print(f"written to {json_file}")
    return 0


def why_not(case: Case, device: torch.device, quick: bool) -> str:
    """Why a case is not measured here, or ""."""
    free = free_memory(device)
    if case.memory > SHARE_OF_MEMORY * free:
        return f"it takes {case.memory / 1e9:.0f} GB of memory, {free / 1e9:.0f} are free"
    if quick and case.family in ("peers", "training"):
        return "quick; choose it by --case"
    if case.family == "training" and peers.versions()["transformers"] == "not installed":
        return "transformers is not installed"
    return ""


def measure(case: Case, device: torch.device, rounds: int) -> tuple[Measurement, Prepared]:
    """Get a case ready, and time its pieces alternately."""
    prepared = case.prepare(device)
    measured = alternate(prepared.works, device, rounds, seconds_at_most=SECONDS_A_CASE, host=case.host)
    gc.collect()  # optimizers and their hooks refer to each other
    return measured, prepared


def result_of(case: Case, measured: Measurement, prepared: Prepared, device: torch.device) -> dict[str, Any]:
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
    """A case as lines of the table: one for each step that ours was measured against."""
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
