"""``python benchmarks/plot.py``: plots and tables from the files in ``results/``.

README gets the headline cases and the demo's table, docs/retention.md the retention benchmark, docs/data.md the effect
and cost of replay and augmentation, docs/precision.md what 16-bit weights keep, docs/_generated/benchmarks.md all
speeds; plots lie beside it. With ``--check`` nothing is written, and it fails if a table differs from the results.
"""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastft.plotting import BLUE, GREEN, GREY, ORANGE, figure, whiskers
from fastft.tables import markdown

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"
SPEED = RESULTS / "speed"
"""Files of ``fastft bench --json``, one for each device; nothing else lies there."""
LOADERS = RESULTS / "data" / "loaders"
"""Files of ``bench_data.py``, likewise."""
PRECISION = RESULTS / "precision"
"""Where ``python -m benchmarks.precision`` writes."""
GENERATED = ROOT / "docs" / "_generated"
DATA_PLOT = "replay-and-augmentation.png"
RETENTION_PLOT = "retention.png"
HEADLINES = (
    "plain",
    "clip_anchor_decoupled",
    "clip_anchor_l2",
    "bf16",
    "small",
    "groups_100",
    "frozen_tensors_90",
    "masked_rows_90",
    "dropout_16m_float32",
    "dropout_add_layer_norm_16m_float32",
    "training_minilm",
)
"""README's cases: where fastft claims something, each against the first of what it is measured against."""
SWEEPS = {"frozen_tensors": "whole tensors frozen", "masked_rows": "rows masked"}
Result = dict[str, Any]


def main() -> int:
    """Exit status 1 if ``--check`` finds a table stale."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--readme", type=Path, default=ROOT / "README.md")
    arguments.add_argument("--data-page", type=Path, default=ROOT / "docs" / "data.md")
    arguments.add_argument("--retention-page", type=Path, default=ROOT / "docs" / "retention.md")
    arguments.add_argument("--precision-page", type=Path, default=ROOT / "docs" / "precision.md")
    arguments.add_argument("--generated", type=Path, default=GENERATED, metavar="FOLDER")
    arguments.add_argument("--speed", type=Path, default=SPEED, metavar="FOLDER", help="of fastft bench's JSON files")
    arguments.add_argument(
        "--precision", type=Path, default=PRECISION, metavar="FOLDER", help="of benchmarks.precision"
    )
    arguments.add_argument("--check", action="store_true", help="write nothing; fail if a table is stale")
    options = arguments.parse_args()
    measured = {
        path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(options.speed.glob("*.json"))
    }
    if not measured:
        raise SystemExit(f"expected files of fastft bench --json in {options.speed}, found none")
    retention, chains, data = retention_results()
    precision = precision_results(options.precision)
    precision_page = options.precision_page.read_text(encoding="utf-8")
    for name in precision.names:
        precision_page = filled_in(precision_page, name, precision.section(name))
    retention_page = options.retention_page.read_text(encoding="utf-8")
    retention_page = filled_in(retention_page, "retention", retention_section(retention))
    data_page = filled_in(options.data_page.read_text(encoding="utf-8"), "replay-and-augmentation", data_section(data))
    demo = json.loads((RESULTS / "demo" / "report.json").read_text(encoding="utf-8"))
    readme = options.readme.read_text(encoding="utf-8")
    readme = filled_in(readme, "benchmarks", "\n\n".join(headline_table(result) for result in measured.values()))
    wanted = {
        options.readme: filled_in(readme, "demo", demo_table(demo)),
        options.data_page: filled_in(data_page, "loaders", loaders_section()),
        options.retention_page: filled_in(retention_page, "chain", "\n".join(chains)),
        options.precision_page: precision_page,
        options.generated / "benchmarks.md": document(measured),
    }
    if options.check:
        stale = [path for path, text in wanted.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
        for path in stale:
            print(f"{path} is stale: run python benchmarks/plot.py", file=sys.stderr)
        return int(bool(stale))
    options.generated.mkdir(parents=True, exist_ok=True)
    for path, text in wanted.items():
        path.write_text(text, encoding="utf-8")
    data.plot(options.generated / DATA_PLOT)
    retention.plot(options.generated / RETENTION_PLOT)
    for name, draw_precision in precision.plots().items():
        draw_precision(options.generated / name)
    for stem, result in measured.items():
        plot(result, options.generated / f"{stem}-headlines.png")
        for name, (_, draw) in plots_of(result).items():
            draw(result, options.generated / f"{stem}-{name}.png")
    return 0


def filled_in(text: str, name: str, content: str) -> str:
    """``text`` with ``content`` between its markers ``<!-- name:begin -->`` and ``<!-- name:end -->``."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    head, _, rest = text.partition(begin)
    _, found, tail = rest.partition(end)
    if not found:
        raise SystemExit(f"expected {begin} and {end} in the text that begins with {text[:40]!r}")
    return f"{head}{begin}\n{content}\n{end}{tail}"


def circumstances(result: Result) -> str:
    """The measurement: machine, versions, rounds and bandwidth."""
    known = result["environment"]
    return (
        f"{known['device']}, {known['threads']} threads, torch {known['torch']}, fastft {known['fastft']} at "
        f"{known['commit']}; medians of at most {result['rounds']} rounds, alternating in one process; a copy runs at "
        f"{result['copy_gb_per_s']:.0f} GB/s. The ratio is fastft's time over the other's."
    )


def milliseconds(value: float) -> str:
    return f"{value:.3g} ms"


def headline_table(result: Result) -> str:
    """One device's headline cases as a Markdown table, and what is slower than the other."""
    rows = []
    for case in headlines(result):
        name, other = next(iter(case["against"].items()))
        times = [milliseconds(case["median_ms"]), milliseconds(other["median_ms"])]
        rows.append([case["title"], name, *times, f"{other['ratio_of_medians']:.2f}"])
    table = markdown(["", "against", "fastft", "other", "ratio"], rows, left=2)
    return "\n".join([circumstances(result), "", *table, "", lost_to(result)])


def headlines(result: Result) -> list[Result]:
    """README's cases, as far as the results hold them."""
    return [result["cases"][name] for name in HEADLINES if name in result["cases"]]


def lost_to(result: Result) -> str:
    """The cases in which another is faster: the lower quartile of the ratio is above 1."""
    lost = [
        f"{case['title']} ({name}: {other['ratio_of_medians']:.2f})"
        for case in result["cases"].values()
        for name, other in case["against"].items()
        if other["ratio_quartiles"][0] > 1.0
    ]
    return f"Where another was faster: {'; '.join(lost) if lost else 'nowhere'}."


def document(measured: dict[str, Result]) -> str:
    """All results of all devices."""
    parts = ["<!-- Made by benchmarks/plot.py; do not edit. -->", "# Benchmarks"]
    for stem, result in measured.items():
        parts += [f"## {result['environment']['device']}", circumstances(result), lost_to(result)]
        parts += [fit_sentence(result, family) for family in SWEEPS if sweep(result, family)]
        parts += [f"![{caption}]({stem}-{name}.png)" for name, (caption, _) in plots_of(result).items()]
        parts.append(full_table(result))
        absent = {name: reason for case in result["cases"].values() for name, reason in case["absent"].items()}
        reasons = {**{name: f"not measured: {reason}" for name, reason in absent.items()}, **result["skipped"]}
        if reasons:
            parts.append("\n".join(f"- {name}: {reason}" for name, reason in reasons.items()))
        if result["peers"]:
            parts.append(
                "Packages: " + ", ".join(f"{name} {version}" for name, version in result["peers"].items()) + "."
            )
    return "\n\n".join(parts) + "\n"


def full_table(result: Result) -> str:
    """One device's cases as a Markdown table; of the copy: the share of its bandwidth that fastft's bytes take."""
    rows = []
    for case in result["cases"].values():
        share = share_of_copy(result, case)
        for name, other in case["against"].items():
            lower, upper = other["ratio_quartiles"]
            rows.append(
                [
                    case["title"],
                    name,
                    milliseconds(case["median_ms"]),
                    "" if share is None else f"{100 * share:.0f} %",
                    milliseconds(other["median_ms"]),
                    f"{other['ratio_of_medians']:.3f}",
                    f"{lower:.3f}–{upper:.3f}",
                    str(case["rounds"]),
                ]
            )
    titles = ["", "against", "fastft", "of the copy", "other", "ratio", "quartiles", "rounds"]
    return "\n".join(markdown(titles, rows, left=2))


def share_of_copy(result: Result, case: Result) -> float | None:
    return None if case["gb_per_s"] is None else case["gb_per_s"] / result["copy_gb_per_s"]


def sweep(result: Result, family: str) -> list[Result]:
    """The cases of a family, in the order of what they differ in; [] where there are too few to make a line."""
    cases = [case for case in result["cases"].values() if case["family"] == family and case["axis"]]
    cases.sort(key=lambda case: next(iter(case["axis"].values())))
    return cases if len(cases) > 2 else []


def costs(result: Result, family: str) -> tuple[list[float], list[float]]:
    """Live shares, and the time of each as a part of the whole step's in the same rounds."""
    cases = sweep(result, family)
    return (
        [case["axis"]["live"] for case in cases],
        [case["against"]["fastft, whole step"]["ratio_of_medians"] for case in cases],
    )


def slope_through_origin(x: list[float], y: list[float]) -> float:
    """Of the line through the origin with the least squared errors."""
    return sum(a * b for a, b in zip(x, y, strict=True)) / sum(a * a for a in x)


def fit_sentence(result: Result, family: str) -> str:
    live, cost = costs(result, family)
    slope = slope_through_origin(live, cost)
    off = max(abs(c - slope * share) for share, c in zip(live, cost, strict=True))
    return (
        f"Cost against live share, {SWEEPS[family]}: least squares give {slope:.3f} · share of a whole step's time; "
        f"the farthest point is {100 * off:.1f} % of a whole step off the line."
    )


def demo_table(report: dict[str, Any]) -> str:
    """The demo's runs as a Markdown table, and their meaning in words."""
    rows = []
    for run in (report["base"], *report["runs"].values()):
        row = [run["name"], *(f"{run[key]['value']:.3f}" for key in ("target_accuracy", "source_recall_at_1"))]
        if run is report["base"]:
            row += [""] * 4
        else:
            row += [f"{run['optimizer_seconds_with_clipping']:.2f} s", f"{run['training_seconds']:.1f} s"]
            row += [f"{run[key] / 1e6:.1f} MB" for key in ("peak_state_bytes", "anchor_bytes")]
        rows.append(row)
    titles = ["", "target accuracy", "source recall@1", "optimizer", "training", "peak optimizer state", "anchor"]
    lines = markdown(titles, rows)
    steps = len(report["runs"]["torch"]["steps"]["loss"])
    versions, config = report["environment"]["versions"], report["config"]
    lines += [
        "",
        report["meaning"].replace("\n", "\\\n"),
        "",
        f"{config['train_rows']:,} reviews, {steps} steps, lr {config['lr']:g}, λ = {config['anchor_decay']:g}; "
        "gradual unfreezing: `fastft.recipe` as it comes; "
        f"{report['environment']['threads']} threads, torch {versions['torch']}, {report['seconds']:.0f} s in all.",
    ]
    return "\n".join(lines)


def retention_results() -> tuple[Any, list[str], Any]:
    """The retention benchmark's runs on the test split, its chains' table, and runs with replay and augmentation."""
    sys.path.append(str(ROOT))  # ``benchmarks`` is a folder of the repository and in no wheel
    from benchmarks.retention import chain_report, data_report, records, report

    tuned, tested = (records.load(records.RESULTS / f"{split}.jsonl") for split in ("validation", "test"))
    comparison = report.Comparison("test", tuned, tested)
    chains = chain_report.chain_table(records.load(chain_report.FILE), comparison.base)
    return comparison, chains, data_report.DataResults(records.load(data_report.FILE))


def precision_results(folder: Path) -> Any:
    """Of 16-bit weights what is kept, bytes and speed: as many of the experiments as have results."""
    from benchmarks.precision import report

    return report.PrecisionResults(folder)


def retention_section(comparison: Any) -> str:
    """The retention benchmark: in words, as a table and as a plot."""
    return "\n\n".join(
        [
            wrapped(comparison.verdict()),
            comparison.to_markdown(),
            f"![Source recall that was kept, against target accuracy](_generated/{RETENTION_PLOT})",
        ]
    )


def data_section(results: Any) -> str:
    """The effect of replay and augmentation: in words, as a table and as a plot."""
    said = f"Source recall: {results.verdict('source')}. Target accuracy: {results.verdict('target')}."
    return "\n\n".join(
        [
            wrapped(f"Against {results.plain.choice.name}: {said}"),
            results.to_markdown(),
            f"![Source recall against target accuracy](_generated/{DATA_PLOT})",
            wrapped(results.circumstances()),
        ]
    )


def loaders_section() -> str:
    """The cost of mixing and augmenting in a DataLoader, on each device."""
    parts = []
    for path in sorted(LOADERS.glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        cases, known = result["loaders"], result["environment"]
        plain, *others = list(dict.fromkeys(title for loaders in cases.values() for title in loaders))
        rows = [[plain, *(milliseconds(case[plain]["ms_per_batch"]) for case in cases.values())]]
        rows += [[title, *(cost(case.get(title)) for case in cases.values())] for title in others]
        about = (
            f"Processor milliseconds a batch of {result['batch_size']}, and the time relative to the plain loader's "
            "(quartiles). "
            f"{known['device']}, no workers, torch {known['torch']}, fastft at {known['commit']}; medians of "
            f"at most {result['rounds']} rounds, alternating in one process."
        )
        parts += ["\n".join(markdown(["", *cases], rows)), wrapped(about)]
    return "\n\n".join(parts)


def cost(figure: dict[str, Any] | None) -> str:
    """A ratio with its quartiles; nothing where it was not measured."""
    if figure is None:
        return ""
    lower, upper = figure["ratio_quartiles"]
    return f"{figure['ratio']:.2f} ({lower:.2f}–{upper:.2f})"


def wrapped(text: str) -> str:
    """In lines as long as the documentation's may be."""
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


@contextmanager
def titled(result: Result, title: str, path: Path, height: float = 4.2) -> Iterator[Any]:
    """Axes under a title that says where it was measured; saved to ``path``."""
    known = result["environment"]
    with figure(path, 8, height, dpi=130) as axes:
        where = f"{known['device']}, {known['threads']} threads, torch {known['torch']}"
        axes.set_title(f"{title}\n{where}", loc="left", fontsize=10)
        yield axes


def plot_bandwidth(result: Result, path: Path) -> None:
    cases = bandwidths(result)
    with titled(result, "Bandwidth as a share of a copy's", path, 0.3 * len(cases) + 1.4) as axes:
        shares = [100 * (share_of_copy(result, case) or 0.0) for case in cases]
        axes.barh([case["title"] for case in cases], shares, color=BLUE)
        axes.axvline(100, color=GREY, linestyle="--", linewidth=1)
        axes.invert_yaxis()
        axes.tick_params(axis="y", labelsize=7)
        axes.set_xlabel("bytes that must move / time, in % of what a copy in the same run reaches")


def plot_frozen(result: Result, path: Path) -> None:
    with titled(result, "Time of a step against the frozen share", path) as axes:
        for color, (family, label) in zip((BLUE, ORANGE), SWEEPS.items(), strict=True):
            if not sweep(result, family):
                continue
            live, cost = costs(result, family)
            slope = slope_through_origin(live, cost)
            axes.plot([100 * (1 - x) for x in live], cost, "o", color=color, label=label)
            axes.plot([0, 100], [slope, 0], color=color, linewidth=1)
        axes.set_xlabel("frozen, %")
        axes.set_ylabel("time / time of a whole step")
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False)


def plot_tensors(result: Result, path: Path) -> None:
    cases = sweep(result, "tensors")
    x = [case["axis"]["tensors"] for case in cases]
    times = {"fastft": [case["median_ms"] for case in cases]}
    for name in list(cases[0]["against"])[:2]:
        times[name] = [case["against"][name]["median_ms"] for case in cases]
    with titled(result, "Host time of a step against the number of tensors", path) as axes:
        for color, (name, milliseconds) in zip((BLUE, ORANGE, GREEN), times.items(), strict=False):
            y = [1e3 * ms / n for ms, n in zip(milliseconds, x, strict=True)]
            axes.loglog(x, y, "o-", color=color, label=name)
        axes.axhline(1, color=GREY, linestyle="--", linewidth=1)
        axes.set_xlabel("tensors of 4 float32")
        axes.set_ylabel("µs a tensor")
        axes.legend(frameon=False)


def bandwidths(result: Result) -> list[Result]:
    families = ("step", "size", "dropout")
    return [case for case in result["cases"].values() if case["family"] in families and case["gb_per_s"]]


def plots_of(result: Result) -> dict[str, tuple[str, Callable[[Result, Path], None]]]:
    """{name: (caption, function)} of what the results hold enough points for."""
    found: dict[str, tuple[str, Callable[[Result, Path], None]]] = {}
    if bandwidths(result):
        found["bandwidth"] = ("Bandwidth as a share of a copy's", plot_bandwidth)
    if any(sweep(result, family) for family in SWEEPS):
        found["frozen"] = ("Time against the frozen share", plot_frozen)
    if sweep(result, "tensors"):
        found["tensors"] = ("Host time against the number of tensors", plot_tensors)
    return found


def plot(result: Result, path: Path) -> None:
    """A bar for each headline case: our time as a share of the other's."""
    rows = []
    for case in headlines(result):
        name, other = next(iter(case["against"].items()))
        rows.append((f"{case['title']}\nagainst {name}", other["ratio_of_medians"], other["ratio_quartiles"]))
    known = result["environment"]
    with figure(path, 10, 0.62 * len(rows) + 1.5, dpi=130) as axes:
        for y, (_, ratio, (lower, upper)) in enumerate(rows):
            look = {"ecolor": GREY, "capsize": 3}
            axes.barh(y, ratio, color=BLUE, height=0.6, xerr=whiskers(ratio, lower, upper), error_kw=look)
            axes.text(max(ratio, upper) + 0.02, y, f"{ratio:.2f}", va="center", fontsize=10)
        axes.axvline(1.0, color=GREY, linestyle="--", linewidth=1)
        axes.set_yticks(range(len(rows)), [label for label, _, _ in rows], fontsize=9)
        axes.invert_yaxis()
        axes.set_xlabel("time relative to the other (1 = as long; shorter bars are faster)")
        title = f"fastft on {known['device']}, {known['threads']} threads, torch {known['torch']}"
        axes.set_title(title, loc="left", fontweight="bold", fontsize=11)
        axes.set_xlim(0, max(1.1, max(upper for _, _, (_, upper) in rows) + 0.12))


if __name__ == "__main__":
    sys.exit(main())
