"""Starts the processes in which the scenarios run, and is the script that runs in each of them.

``measure`` starts four processes for all scenarios, then two and one for the checkpoints that these have left.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from started import end_together
from torch.distributed.checkpoint.api import CheckpointException

from distributed.scenarios import (
    COLUMNS,
    OTHERS,
    REFERENCES,
    RESHARD,
    Outcome,
    Run,
    Scenario,
    differences,
    given_again,
    resumed,
    write_weights,
)
from distributed.ways import SAVED_BY, WAYS, Way

EXACT, REFUSED, FAILED, UNTRIED = "exact", "refused", "failed", "not tried"
Cell = dict[str, str]
"""``{"outcome": EXACT | REFUSED | FAILED | UNTRIED}``, with a ``"sentence"`` if it is refused or not tried, or a
``"detail"`` if it failed."""

COLLECTIVE = timedelta(seconds=30)
"""After which a collective operation that other processes do not join is given up."""
DEADLINE = 480
"""Seconds after which all processes are killed."""


def measure(folder: Path, ways: list[Way] = WAYS) -> dict[str, dict[str, Cell]]:
    """{way: {column: cell}} of all ways that can be tried here.

    Args:
        folder: an empty one, for checkpoints and logs.
        ways: those to try.
    """
    tried = [way for way in ways if way.missing() is None]
    for way in tried:
        folder_of(folder, way).mkdir()
        write_weights(way, folder_of(folder, way))
    torch.save({way.name: references(way, folder_of(folder, way)) for way in tried}, folder / "references.pt")
    deadline = time.monotonic() + DEADLINE
    names = [way.name for way in tried]
    reports = finished(start(SAVED_BY, folder, names), deadline)
    cells: dict[str, dict[str, Cell]] = {}
    for way in tried:
        cells[way.name] = {
            column: {"outcome": UNTRIED, "sentence": way.untried[column]}
            if column in way.untried
            else merged(reports, way.name, column, SAVED_BY)
            for column in (*COLUMNS, *way.others)
        }
        if cells[way.name]["save and resume"]["outcome"] == EXACT:
            way.prepare_resharding(folder_of(folder, way))
    two, one = start(2, folder, names), start(1, folder, names)
    fewer = [*finished(two, deadline), *finished(one, deadline)]
    for way in tried:
        saved, count = cells[way.name]["save and resume"], 3 if way.unwrapped() is None else 4
        cells[way.name][RESHARD] = saved if saved["outcome"] == REFUSED else merged(fewer, way.name, RESHARD, count)
    return cells


def failures(cells: dict[str, dict[str, Cell]]) -> list[str]:
    """A line for each cell that is silently different, hung, or was stopped by an error."""
    return [
        f"{way}, {column}: {cell.get('detail')}"
        for way, columns in cells.items()
        for column, cell in columns.items()
        if cell["outcome"] not in (EXACT, REFUSED, UNTRIED)
    ]


def references(way: Way, folder: Path) -> dict[str, Outcome]:
    """The outcomes of one process, by scenario."""
    alone = way.in_one_process()
    return {name: scenario(lambda **options: Run(alone, **options), folder) for name, scenario in REFERENCES.items()}


def folder_of(folder: Path, way: Way) -> Path:
    """Where a way's checkpoint lies."""
    return folder / str([each.name for each in WAYS].index(way.name))


# -- starting ----------------------------------------------------------------------------------------------------


@dataclass
class Started:
    """Processes that run this file, one for each rank, with the files that each writes."""

    processes: list[subprocess.Popen[Any]]
    logs: list[Path]
    reports: list[Path]


def start(world: int, folder: Path, names: list[str]) -> Started:
    """Start as many processes as ``world`` says, for the ways of these names."""
    here = str(Path(__file__).resolve().parent.parent)
    path = os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    environment |= {"DS_ACCELERATOR": "cpu", "WORLD_SIZE": str(world)}  # DeepSpeed asks for these
    started = Started([], [], [])
    for rank in range(world):
        started.logs.append(folder / f"log_{world}_{rank}.txt")
        started.reports.append(report_file(folder, rank, world))
        command = [sys.executable, "-m", "distributed.processes", str(rank), str(world), str(folder), *names]
        ranked = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        with open(started.logs[-1], "w") as log:
            started.processes.append(subprocess.Popen(command, env=ranked, stdout=log, stderr=subprocess.STDOUT))
    return started


def report_file(folder: Path, rank: int, world: int) -> Path:
    return folder / f"report_{rank}_of_{world}.jsonl"


def finished(started: Started, deadline: float) -> list[dict[str, Any]]:
    """The reports of processes that have ended; those that have not by the deadline are killed.

    The last line of each says how its process ended.
    """
    for process in started.processes:
        try:
            process.wait(timeout=max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            break
    reports: list[dict[str, Any]] = []
    for rank, (process, log, file) in enumerate(zip(started.processes, started.logs, started.reports, strict=True)):
        ended = process.poll()
        process.kill()
        process.wait()
        lines = file.read_text().splitlines() if file.exists() else []
        reports += [json.loads(line) for line in lines]
        if ended != 0:
            how = "did not end" if ended is None else f"ended with {ended}"
            reports.append({"process": f"process {rank} of {len(started.logs)} {how}: {log.read_text()[-2000:]}"})
    return reports


def merged(reports: list[dict[str, Any]], way: str, column: str, count: int) -> Cell:
    """One cell out of all processes' reports, of which there must be ``count``."""
    found = [report for report in reports if report.get("way") == way and report.get("column") == column]
    outcomes = {report["outcome"] for report in found}
    if len(found) < count:
        trouble = [report["process"] for report in reports if "process" in report]
        return {"outcome": FAILED, "detail": f"{len(found)} of {count} reports; {' '.join(trouble)}"}
    if outcomes == {EXACT}:
        return {"outcome": EXACT}
    if outcomes == {REFUSED}:
        return {"outcome": REFUSED, "sentence": found[0]["sentence"]}
    details = [f"process {r['rank']} of {r['world']}: {r.get('detail') or r.get('sentence') or EXACT}" for r in found]
    return {"outcome": FAILED, "detail": "\n".join(details)}


# -- in a process ------------------------------------------------------------------------------------------------


class Process:
    """One of the processes, with the scenarios that it runs."""

    def __init__(self, rank: int, world: int, folder: Path) -> None:
        self.rank, self.world, self.folder = rank, world, folder
        self.references = torch.load(folder / "references.pt")
        self.store = dist.FileStore(str(folder / f"store_{world}"), world)
        self.store.set_timeout(2 * COLLECTIVE)
        self.groups_made = self.scenarios_done = 0
        self.join()

    def join(self) -> None:
        """Make the process group, anew if there was one: after a timeout, it cannot be used any more."""
        if dist.is_initialized():
            dist.destroy_process_group()
        store = dist.PrefixStore(f"groups {self.groups_made}", self.store)
        dist.init_process_group("gloo", store=store, rank=self.rank, world_size=self.world, timeout=COLLECTIVE)
        self.groups_made += 1
        for way in WAYS:
            way.forget_meshes()

    def run(self, ways: list[Way]) -> None:
        """All scenarios of the ways, each one's report written as soon as it is known."""
        with open(report_file(self.folder, self.rank, self.world), "w") as file:
            for way in ways:
                for column, tried, scenario in self.scenarios(way):
                    outcome = self.outcome_of(tried, column, scenario)
                    print(json.dumps(outcome), file=file, flush=True)
                    if not self.all_are(outcome["outcome"]):
                        self.join()

    def scenarios(self, way: Way) -> Iterator[tuple[str, Way, Scenario]]:
        """(column, way, scenario) of all that is tried with so many processes."""
        if self.world == SAVED_BY:
            for column in (*COLUMNS, *way.others):
                if column not in way.untried:
                    yield column, way, {**COLUMNS, **OTHERS}[column]
            return
        yield RESHARD, way, resumed if way.reshards_all else given_again
        if self.world == 1 and (alone := way.unwrapped()) is not None:
            yield RESHARD, alone, resumed

    def outcome_of(self, way: Way, column: str, scenario: Scenario) -> dict[str, Any]:
        """Run one, and compare it with one process."""
        found: dict[str, Any] = {"way": way.name, "column": column, "rank": self.rank, "world": self.world}
        runs: list[Run] = []

        def start(**options: Any) -> Run:
            runs.append(Run(way, **options))
            return runs[-1]

        try:
            wrong = differences(scenario(start, folder_of(self.folder, way)), self.references[way.name][column])
        except ValueError as error:
            if any(run.wrote() for run in runs):
                return {**found, "outcome": FAILED, "detail": f"raised after it had written parameters: {error}"}
            sentence = str(error).replace(f"{folder_of(self.folder, way)}{os.sep}", "")
            return {**found, "outcome": REFUSED, "sentence": sentence}
        except (Exception, CheckpointException):  # which is no Exception
            return {**found, "outcome": FAILED, "detail": traceback.format_exc()}
        return {**found, "outcome": EXACT} if not wrong else {**found, "outcome": FAILED, "detail": "; ".join(wrong)}

    def all_are(self, outcome: str) -> bool:
        """Whether the scenario ended well, and alike, in all processes. Waits for those that are still in it."""
        self.scenarios_done += 1
        keys = [f"scenario {self.scenarios_done} in {rank}" for rank in range(self.world)]
        self.store.set(keys[self.rank], outcome)
        return outcome != FAILED and all(self.store.get(key).decode() == outcome for key in keys)


def main(rank: int, world: int, folder: Path, names: list[str]) -> None:
    torch.set_num_threads(1)
    process = Process(rank, world, folder)
    process.run([way for way in WAYS if way.name in names])
    end_together()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
