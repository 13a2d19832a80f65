"""Tables, plots and sentences of docs/precision.md, from the results and nothing else; ``benchmarks/plot.py`` asks."""

from __future__ import annotations

import json
import statistics
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastft.plotting import BLUE, GREEN, GREY, ORANGE, figure
from fastft.tables import markdown

from ..retention.records import load
from .settings import RESULTS
from .training import SETTINGS

SECTIONS = ("stall", "pull", "training", "memory", "speed")
MOMENTS = ("float32", "bfloat16", "8bit")
CAPTIONS = {
    "pull": "Distance to the anchor that is left",
    "training": "Final loss above that of float32",
    "memory": "Bytes per parameter",
    "speed": "Time of a step relative to float32",
}
MISSING = "Not measured yet."
FLOAT32 = "float32"
STALL_GOALS = {"bfloat16, extra_bits=16": 0.999, "bfloat16, extra_bits=8": 0.99, "bfloat16, stochastic": 0.99}
"""The least cosine, with float32 moments."""
PULL_GOAL = (0.048, 0.052)
TRAINING_GOALS = {"bfloat16, extra_bits=16": 0.1, "bfloat16, extra_bits=8": 0.3, "bfloat16, stochastic": 0.3}
"""The most that the loss may be above float32's, in %."""
SPEED_GOAL = 1.15
"""The most of the time over its bytes' share of the plain float32 step's."""
COMPOSITION_GOAL = 0.7
PEER_GOAL = 10.0
"""How many times as long others' steps with 8-bit moments take at least."""
Result = dict[str, Any]


class PrecisionResults:
    """The measurements, as sections of a page."""

    names = SECTIONS
    """Of the sections, and of their markers in the page."""

    def __init__(self, folder: Path = RESULTS) -> None:
        self.results: dict[str, Any] = {}
        for name in SECTIONS:
            path = folder / f"{name}.json"
            if path.exists():
                self.results[name] = json.loads(path.read_text(encoding="utf-8"))
        if runs := load(folder / "training.jsonl"):
            self.results["training"] = runs

    def section(self, name: str) -> str:
        """In Markdown."""
        write: Callable[[Any], str] = {
            "stall": stall_section,
            "pull": pull_section,
            "training": training_section,
            "memory": memory_section,
            "speed": speed_section,
        }[name]
        if name not in self.results:
            return MISSING
        plot = f"precision-{name}.png"
        images = [f"![{CAPTIONS[name]}](_generated/{plot})"] if plot in self.plots() else []
        return "\n\n".join([write(self.results[name]), *images])

    def plots(self) -> dict[str, Callable[[Path], None]]:
        """{file name: how it is drawn}, of what there are results for."""
        drawn: dict[str, Callable[[Path], None]] = {}
        if "pull" in self.results:
            drawn["precision-pull.png"] = lambda path: plot_pull(self.results["pull"], path)
        if "training" in self.results:
            drawn["precision-training.png"] = lambda path: plot_training(self.results["training"], path)
        if "memory" in self.results:
            drawn["precision-memory.png"] = lambda path: plot_memory(self.results["memory"], path)
        if "speed" in self.results:
            drawn["precision-speed.png"] = lambda path: plot_speed(self.results["speed"], path)
        return drawn


def where(result: Result) -> str:
    known = result["environment"]
    threads = f"{known['threads']} thread{'s' if known['threads'] != 1 else ''}"
    return f"{known['device']}, {threads}, torch {known['torch']}, fastft at {known['commit']}"


def goal(said: str, reached: bool) -> str:
    return f"{said}: {'reached' if reached else '**not reached**'}"


# -- stall -----------------------------------------------------------------------------------------------------


def by_setting(rows: list[Result]) -> dict[tuple[str, str], Result]:
    return {(row["weights"], row["moments"]): row for row in rows}


def stall_section(result: Result) -> str:
    problem, found = result["problem"], by_setting(result["rows"])
    rows = []
    for weights in dict.fromkeys(weights for weights, _ in found):
        exact = found[weights, "float32"]
        cells = [f"{found[weights, moments]['cosine']:.4f}" for moments in MOMENTS]
        one = f"{exact['cosine_of_one']:.4f}" if exact["seeds"] > 1 else ""
        rows.append([weights, *cells, one, f"{exact['along']:.3f}", f"{100 * exact['moved']:.0f} %"])
    titles = ["weights", *(f"{moments} moments" for moments in MOMENTS), "one seed", "length along", "moved"]
    goals = [
        goal(f"{weights}, at least {least:g}", found[weights, "float32"]["cosine"] >= least)
        for weights, least in STALL_GOALS.items()
    ]
    about = (
        f"Cosine between the way that the weights went and that of float32 weights with float32 moments; "
        f"{problem['steps']:,} steps, lr {problem['lr']:g}, {problem['elements']:,} weights of standard deviation "
        f"{problem['weight']:g}, the same bfloat16 gradients for all: a constant direction, noise {problem['noise']:g} "
        f'times as large. Where rounding is stochastic, of the mean over {problem["seeds"]} seeds; "one seed": of each '
        'alone, with float32 moments. "Length along": how far along float32\'s way, as a share of it. "Moved": '
        "weights with another bfloat16 (float32) value than at the start."
    )
    return "\n\n".join(["\n".join(markdown(titles, rows)), wrapped(f"{about} {where(result)}."), goals_of(goals)])


# -- pull ------------------------------------------------------------------------------------------------------


def pull_section(result: Result) -> str:
    problem = result["problem"]
    pulls = list(dict.fromkeys(row["pull"] for row in result["rows"]))
    found = {(row["weights"], row["pull"]): row for row in result["rows"]}
    exact = {row["pull"]: row["exact"] for row in result["rows"]}
    names = list(dict.fromkeys(row["weights"] for row in result["rows"]))
    rows = [["exact: (1 − lr·λ) to the number of steps", *(f"{exact[pull]:.4f}" for pull in pulls)]]
    for name in names:
        cells = []
        for pull in pulls:
            along, length = found[name, pull]["along"], found[name, pull]["length"]
            cells.append(f"{along:.4f}" + (f" ({length:.2f})" if abs(length - along) > 0.005 else ""))
        rows.append([name, *cells])
    low, high = PULL_GOAL
    judged = [pull for pull in pulls if low <= found[FLOAT32, pull]["along"] <= high]
    goals = []
    for name in names:
        if name not in (FLOAT32, "bfloat16"):
            off = max(abs(found[name, pull]["along"] - found[FLOAT32, pull]["along"]) for pull in pulls)
            inside = [pull for pull in judged if low <= found[name, pull]["along"] <= high]
            said = f"{name}: between {low:g} and {high:g} wherever float32 is (at most {off:.4f} off it)"
            goals.append(goal(said, inside == judged))
    about = (
        f"The distance to the anchor that is left after lr·λ·steps = {problem['total']:g} of pull alone, gradients "
        f"being 0, as a share of the {100 * problem['distance']:g} % of each weight at the start; along the way to the "
        "anchor, in which random parts cancel, and in brackets as a length, where that differs. Of the float32 that "
        f"weights and low bits stand for; {problem['elements']:,} weights."
    )
    titles = ["weights", *(f"lr·λ = {100 * pull:g} %" for pull in pulls)]
    return "\n\n".join(["\n".join(markdown(titles, rows)), wrapped(f"{about} {where(result)}."), goals_of(goals)])


def plot_pull(result: Result, path: Path) -> None:
    names = list(dict.fromkeys(row["weights"] for row in result["rows"]))
    # Smaller markers over larger ones, so that all are seen where they lie on one another.
    with figure(path, 8, 3.6, dpi=130) as axes:
        for k, name in enumerate(names):
            rows = [row for row in result["rows"] if row["weights"] == name]
            color = (GREY, ORANGE, BLUE, GREEN)[k % 4]
            x, y = [100 * row["pull"] for row in rows], [row["along"] for row in rows]
            axes.plot(x, y, "o-", color=color, markersize=14 - 2 * k, linewidth=1, alpha=0.8, label=name)
        axes.set_xscale("log")
        axes.set_ylim(bottom=0)
        axes.set_xlabel("pull of a step, lr·λ, %", fontsize=9)
        axes.set_ylabel("distance left", fontsize=9)
        axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))


# -- training --------------------------------------------------------------------------------------------------


class Training:
    """Runs by setting and seed."""

    def __init__(self, records: list[Result]) -> None:
        self.before = next((record for record in records if record["key"] == "before"), None)
        runs = [record for record in records if record["key"] != "before"]
        self.example = runs[0] if runs else None
        self.runs: dict[tuple[str, str], dict[int, Result]] = {}
        for record in runs:
            settings = record["settings"]
            self.runs.setdefault((settings["weights"], settings["moments"]), {})[settings["seed"]] = record
        # Processes that share the runs end them in no order.
        order = {key: i for i, key in enumerate(SETTINGS)}
        self.runs = dict(sorted(self.runs.items(), key=lambda item: order.get(item[0], len(order))))
        self.reference = self.runs.get((FLOAT32, "float32"), {})

    def mean(self, key: tuple[str, str], figure: str) -> float:
        return statistics.fmean(run[figure] for run in self.runs[key].values())

    def above(self, key: tuple[str, str]) -> list[float]:
        """How far the loss is above float32's with the same batches, in %, for each seed that both have."""
        return [
            100 * (run["loss"] / self.reference[seed]["loss"] - 1)
            for seed, run in sorted(self.runs[key].items())
            if seed in self.reference
        ]

    @property
    def spread(self) -> float:
        """Of float32's loss between seeds: highest less lowest, in % of the mean."""
        losses = [run["loss"] for run in self.reference.values()]
        return 100 * (max(losses) - min(losses)) / statistics.fmean(losses) if losses else 0.0


def training_section(records: list[Result]) -> str:
    training = Training(records)
    if training.example is None or not training.reference:
        return MISSING
    rows = []
    for key, runs in training.runs.items():
        above = training.above(key)
        mean = f"{statistics.fmean(above):+.3f} %" if above and key != (FLOAT32, "float32") else ""
        span = f"{min(above):+.3f} to {max(above):+.3f}" if mean else ""
        moved = f"{100 * training.mean(key, 'moved'):.0f} %"
        losses = [f"{training.mean(key, figure):.4f}" for figure in ("loss", "loss_of_model")]
        rows.append([*key, f"{len(runs)}", losses[0], mean, span, losses[1], moved])
    titles = ["weights", "moments", "seeds", "loss", "above float32", "by seed, %", "of the model as it is", "moved"]
    goals = []
    for weights, most in TRAINING_GOALS.items():
        if above := training.above((weights, "float32")) if (weights, "float32") in training.runs else []:
            mean = statistics.fmean(above)
            goals.append(goal(f"{weights}: within {most:g} % of float32 ({mean:+.3f} %)", abs(mean) <= most))
    for key in training.runs:
        if key[1] == "8bit" and len(training.reference) > 1:
            above = training.above(key)
            mean = statistics.fmean(above)
            said = f"within the spread of the seeds ({mean:+.3f} % against {training.spread:.2f} %)"
            goals.append(goal(f"{key[0]}, 8bit moments: {said}", abs(mean) <= training.spread))
    example, before = training.example, training.before
    settings = example["settings"]
    about = (
        f"A Llama of {example['parameters'] / 1e6:.1f}M parameters, pre-trained on WordNet's definitions and "
        f"examples, rounded to bfloat16, then {settings['steps']} steps on movie reviews with lr {settings['lr']:g}, "
        "weight decay and clipping; the loss in nats a token, on reviews held out"
        + (f" ({before['loss']:.3f} before)" if before else "")
        + ', computed in float32 from the float32 that weights and low bits stand for. "Above float32": against '
        "float32 weights, forward and gradients with the same batches, the mean over seeds. "
        '"Float32 beside a bfloat16 model": the classical master weights. Between seeds float32\'s loss differs by '
        f"{training.spread:.2f} %."
    )
    versions = f"{where(example)}, transformers {example['transformers']}."
    return "\n\n".join(["\n".join(markdown(titles, rows, left=2)), wrapped(f"{about} {versions}"), goals_of(goals)])


def plot_training(records: list[Result], path: Path) -> None:
    training = Training(records)
    keys = [key for key in training.runs if training.above(key) and key != (FLOAT32, "float32")]
    with figure(path, 8, 0.3 * len(keys) + 1.2, dpi=130) as axes:
        for y, key in enumerate(keys):
            above = training.above(key)
            color = GREEN if key[1] == "8bit" else BLUE
            axes.plot(above, [y] * len(above), "o", color=color, markersize=4, alpha=0.6)
            axes.plot([statistics.fmean(above)], [y], "|", color=color, markersize=14, markeredgewidth=2)
        axes.axvline(0, color=GREY, linewidth=1)
        axes.axvspan(-training.spread / 2, training.spread / 2, color=GREY, alpha=0.12, linewidth=0)
        axes.set_xscale("symlog", linthresh=0.1)
        axes.set_yticks(range(len(keys)), [f"{weights}, {moments} moments" for weights, moments in keys], fontsize=8)
        axes.invert_yaxis()
        axes.set_xlabel("final loss above float32's, %; a point a seed, a bar their mean; grey: its seeds", fontsize=8)


# -- memory ----------------------------------------------------------------------------------------------------


def memory_section(result: Result) -> str:
    rows = [
        [
            row["title"],
            f"{row['counted']:.2f}",
            f"{row['bytes_per_parameter']:.2f}",
            f"{row['peak_bytes_per_parameter']:.2f}",
        ]
        for row in result["rows"]
    ]
    millions = result["rows"][0]["parameters"] / 1e6
    about = (
        f"Bytes per parameter with gradients, {millions:.0f}M parameters. Counted: by what each part takes. Measured: "
        "the memory of a process after two steps, less that of the same process before the model; highest: at any "
        "time until then."
    )
    titles = ["weights, moments", "counted", "measured", "highest"]
    return "\n\n".join(["\n".join(markdown(titles, rows)), wrapped(f"{about} {where(result)}.")])


def plot_memory(result: Result, path: Path) -> None:
    rows = result["rows"]
    with figure(path, 8, 0.32 * len(rows) + 1.0, dpi=130) as axes:
        axes.barh([row["title"] for row in rows], [row["peak_bytes_per_parameter"] for row in rows], color=BLUE)
        for y, row in enumerate(rows):
            peak = row["peak_bytes_per_parameter"]
            axes.text(peak + 0.1, y, f"{peak:.1f}", va="center", fontsize=8)
        axes.invert_yaxis()
        axes.tick_params(axis="y", labelsize=7)
        axes.set_xlabel("bytes per parameter with gradients: the highest of two training steps", fontsize=9)


# -- speed -----------------------------------------------------------------------------------------------------


def speed_section(result: Result) -> str:
    parts = []
    for size, measured in result["sizes"].items():
        rows = []
        for row in measured["rows"]:
            moved = ["", "", ""]
            if "bytes" in row:
                moved = [f"{row['bytes']:.1f}", f"{row['gb_per_s']:.0f}", f"{row['over_share']:.2f}"]
            lower, upper = row["ratio_quartiles"]
            rows.append(
                [row["title"], f"{row['ms']:.3g} ms", f"{row['ratio']:.2f}", f"{lower:.2f}–{upper:.2f}", *moved]
            )
        titles = [f"{size} elements", "time", "of float32's", "quartiles", "bytes each", "GB/s", "of its bytes' share"]
        parts.append("\n".join(markdown(titles, rows)))
        over = [row["title"] for row in measured["rows"] if row.get("over_share", 0.0) > SPEED_GOAL]
        composed = measured["composition"]["ratio"]
        goals = [
            goal(
                f"at most {SPEED_GOAL:g} of the bytes' share" + (f", but for {'; '.join(over)}" if over else ""),
                not over,
            ),
            goal(
                f"at most {COMPOSITION_GOAL:g} of torch's clip, anchor and step ({composed:.2f})",
                composed <= COMPOSITION_GOAL,
            ),
        ]
        parts.append(goals_of(goals))
    if result["peers"]:
        rows = []
        for row in result["peers"]:
            lower, upper = row["ratio_quartiles"]
            times = [
                f"{row['ms']:.3g} ms",
                f"{row['own_ms']:.3g} ms",
                f"{row['ratio']:.1f}",
                f"{lower:.1f}–{upper:.1f}",
            ]
            rows.append([f"{row['title']} ({row['version']})", *times])
        against = result["peers"][0]["against"]
        first = next(iter(result["sizes"]))
        titles = [f"{first} elements", "time", f"fastft: {against}", "ratio", "quartiles"]
        parts.append("\n".join(markdown(titles, rows)))
        coded = [row for row in result["peers"] if "8bit" in row["title"]]
        said = [goal(f"at least {PEER_GOAL:g} × {row['title']}", row["ratio"] >= PEER_GOAL) for row in coded]
        parts.append(goals_of(said))
    parts += [f"Not measured: {title}: {reason}" for title, reason in result["absent"].items()]
    about = (
        'Medians of steps that take turns in one process. "Of its bytes\' share": the time over that of the plain '
        "float32 step, divided by the bytes that both must move; 1 is as near to the memory's speed as that step comes."
        " On a shared machine the memory's speed changes (GB/s): where it is high, arithmetic shows."
    )
    return "\n\n".join([*parts, wrapped(f"{about} {where(result)}.")])


def plot_speed(result: Result, path: Path) -> None:
    size, measured = next(reversed(result["sizes"].items()))
    rows = [row for row in measured["rows"] if "bytes" in row]
    with figure(path, 8, 0.3 * len(rows) + 1.2, dpi=130) as axes:
        for y, row in enumerate(rows):
            axes.barh(y, row["ratio"], 0.6, color=BLUE)
            axes.plot([row["share"]] * 2, [y - 0.38, y + 0.38], color=ORANGE, linewidth=2)
        axes.set_yticks(range(len(rows)), [row["title"] for row in rows], fontsize=7)
        axes.invert_yaxis()
        axes.set_xlabel(f"time of a step, {size} elements, relative to float32's; orange: its bytes'", fontsize=8)


# -- words -----------------------------------------------------------------------------------------------------


def wrapped(text: str) -> str:
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def bullets(lines: list[str]) -> str:
    """A list, its lines as long as the documentation's may be."""
    filled = (textwrap.fill(line, 118, break_long_words=False, break_on_hyphens=False) for line in lines)
    return "\n".join("- " + text.replace("\n", "\n  ") for text in filled)


def goals_of(goals: list[str]) -> str:
    return f"Goals:\n\n{bullets(goals)}" if goals else ""
