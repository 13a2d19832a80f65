"""``python benchmarks/run.py``: measures all cases, prints a table and writes the JSON that the README quotes."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import torch
from bench_adamw import CASES, Case, measure
from harness import Measurement, copy_bandwidth, environment

RESULTS = Path(__file__).parent / "results"
ROUNDS, QUICK_ROUNDS = 41, 5
TARGETS_HOLD_ON = "cpu"
TABLE = "{:<36.36}  {:<18}  {:>10}  {:>10}  {:>6}  {:<13}  {:>6}  {}"


def main() -> None:
    options = parse_arguments()
    device = torch.device(options.device)
    rounds = QUICK_ROUNDS if options.quick else ROUNDS
    known = environment(device)
    bandwidth = copy_bandwidth(device, rounds)
    print(
        f"fastft {known['fastft']} ({known['commit']}), torch {known['torch']}, {known['device']}, "
        f"{known['threads']} threads, {rounds} rounds; a copy runs at {bandwidth / 1e9:.0f} GB/s"
    )
    print(TABLE.format("step", "against", "fastft", "other", "ratio", "quartiles", "GB/s", "target"))
    cases = {}
    for case in CASES:
        cases[case.name] = result_of(case, measure(case, device, rounds), device)
        print("\n".join(table_rows(cases[case.name])), flush=True)
    result = {
        "environment": known,
        "rounds": rounds,
        "copy_gb_per_s": significant(bandwidth / 1e9),
        "cases": cases,
    }
    path = options.output or RESULTS / f"{slug(str(known['device']))}-torch{public_version(str(known['torch']))}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"written to {path}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure fastft's AdamW and torch's alternately in one process.")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_ROUNDS} rounds instead of {ROUNDS}")
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: results/DEVICE-torchVERSION.json")
    return parser.parse_args()


def result_of(case: Case, measured: Measurement, device: torch.device) -> dict[str, Any]:
    """One case's figures, ready for ``json``, in a fixed order."""
    against = {}
    for name in list(case.steps)[1:]:
        ratio = measured.ratio(case.subject, name)
        against[name] = {
            "median_ms": significant(1e3 * measured.median(name)),
            "ratio_of_medians": significant(ratio.of_medians),
            "ratio_quartiles": [significant(ratio.lower), significant(ratio.upper)],
        }
    seconds = measured.median(case.subject)
    return {
        "title": case.title,
        "median_ms": significant(1e3 * seconds),
        "gb_per_s": significant(case.nbytes / seconds / 1e9),
        "against": against,
        "target": case.target if device.type == TARGETS_HOLD_ON else None,
    }


def table_rows(result: dict[str, Any]) -> list[str]:
    """A case as lines of the table: one for each step that ours was measured against."""
    lines = []
    for index, (name, other) in enumerate(result["against"].items()):
        lower, upper = other["ratio_quartiles"]
        own, target = ("", "", ""), ""
        if index == 0:
            own = (result["title"], f"{result['median_ms']:.4g} ms", f"{result['gb_per_s']:.3g}")
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
    return lines


def verdict(ratio: float, target: float | None) -> str:
    return "" if target is None else f"≤ {target:.2f} {'met' if ratio <= target else 'MISSED'}"


def significant(value: float) -> float:
    """Rounded to 4 significant digits: more would be noise, and would fill every diff."""
    return float(f"{value:.4g}")


def public_version(version: str) -> str:
    return version.split("+")[0]


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


if __name__ == "__main__":
    main()
