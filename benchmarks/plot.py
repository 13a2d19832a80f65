"""``python benchmarks/plot.py``: draws the plot and fills in README's tables, both from the files in ``results/``.

With ``--check`` it writes nothing and fails if README says anything else than the results do.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"
GREY, BLUE = "#8a8a8a", "#0072b2"


def main() -> int:
    """Exit status 1 if ``--check`` finds README stale."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--readme", type=Path, default=ROOT / "README.md")
    arguments.add_argument("--check", action="store_true", help="write nothing; fail if README is stale")
    options = arguments.parse_args()
    measured = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("*.json"))]
    demo = json.loads((RESULTS / "demo" / "report.json").read_text(encoding="utf-8"))
    before = options.readme.read_text(encoding="utf-8")
    after = filled_in(before, "benchmarks", "\n\n".join(benchmark_table(result) for result in measured))
    after = filled_in(after, "demo", demo_table(demo))
    if options.check:
        if before != after:
            print(f"{options.readme} is stale: run python benchmarks/plot.py", file=sys.stderr)
        return int(before != after)
    options.readme.write_text(after, encoding="utf-8")
    plot(measured[0], RESULTS / "adamw.png")
    return 0


def filled_in(text: str, name: str, content: str) -> str:
    """``text`` with ``content`` between its markers ``<!-- name:begin -->`` and ``<!-- name:end -->``."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    head, _, rest = text.partition(begin)
    _, found, tail = rest.partition(end)
    if not found:
        raise SystemExit(f"expected {begin} and {end} in the README")
    return f"{head}{begin}\n{content}\n{end}{tail}"


def benchmark_table(result: dict[str, Any]) -> str:
    """One device's figures as a Markdown table."""
    known = result["environment"]
    lines = [
        f"{known['device']}, {known['threads']} threads, torch {known['torch']}, fastft {known['fastft']} at "
        f"{known['commit']}; medians of {result['rounds']} rounds, alternating in one process; a copy runs at "
        f"{result['copy_gb_per_s']:.0f} GB/s. The ratio is fastft's time over the other's.",
        "",
        "| step | against | fastft | other | ratio | quartiles |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for case in result["cases"].values():
        for name, other in case["against"].items():
            lower, upper = other["ratio_quartiles"]
            lines.append(
                f"| {case['title']} | {name} | {case['median_ms']:.3g} ms | {other['median_ms']:.3g} ms "
                f"| {other['ratio_of_medians']:.3f} | {lower:.3f}–{upper:.3f} |"
            )
    return "\n".join(lines)


def demo_table(report: dict[str, Any]) -> str:
    """The demo's runs as a Markdown table, and what they mean."""
    lines = [
        "| | target accuracy | source recall@1 | optimizer | training | peak optimizer state | anchor |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    base = report["base"]
    for run in (base, *report["runs"].values()):
        row = f"| {run['name']} | {run['target_accuracy']['value']:.3f} | {run['source_recall_at_1']['value']:.3f} "
        if run is base:
            row += "| | | | |"
        else:
            row += f"| {run['optimizer_seconds_with_clipping']:.2f} s | {run['training_seconds']:.1f} s "
            row += f"| {run['peak_state_bytes'] / 1e6:.1f} MB | {run['anchor_bytes'] / 1e6:.1f} MB |"
        lines.append(row)
    steps = len(report["runs"]["torch"]["steps"]["loss"])
    versions, config = report["environment"]["versions"], report["config"]
    lines += [
        "",
        report["meaning"].replace("\n", "\\\n"),
        "",
        f"{config['train_rows']:,} reviews, {steps} steps, lr {config['lr']:g}, λ = {config['anchor_decay']:g}, "
        f"unfreezing: one more layer every {config['unfreeze_every']} steps; "
        f"{report['environment']['threads']} threads, torch {versions['torch']}, {report['seconds']:.0f} s in all.",
    ]
    return "\n".join(lines)


def plot(result: dict[str, Any], path: Path) -> None:
    """A bar for each case: our time as a share of the other's."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = []
    for case in result["cases"].values():
        name, other = next(iter(case["against"].items()))
        rows.append((f"{case['title']}\nagainst {name}", other["ratio_of_medians"], other["ratio_quartiles"]))
    figure = Figure(figsize=(10, 0.62 * len(rows) + 1.5), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for y, (_, ratio, (lower, upper)) in enumerate(rows):
        error = [[max(0.0, ratio - lower)], [max(0.0, upper - ratio)]]
        axes.barh(y, ratio, color=BLUE, height=0.6, xerr=error, error_kw={"ecolor": GREY, "capsize": 3})
        axes.text(max(ratio, upper) + 0.02, y, f"{ratio:.2f}", va="center", fontsize=10)
    axes.axvline(1.0, color=GREY, linestyle="--", linewidth=1)
    axes.set_yticks(range(len(rows)), [label for label, _, _ in rows], fontsize=9)
    axes.invert_yaxis()
    axes.set_xlabel("time relative to the other (1 = as long; shorter bars are faster)")
    known = result["environment"]
    axes.set_title(
        f"fastft.AdamW on {known['device']}, {known['threads']} threads, torch {known['torch']}",
        loc="left",
        fontweight="bold",
        fontsize=11,
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlim(0, max(1.1, max(upper for _, _, (_, upper) in rows) + 0.12))
    figure.savefig(path)


if __name__ == "__main__":
    sys.exit(main())
