"""What was forgotten and what was learned: scores before and after, their intervals, and the trade-off between them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from torch import Tensor

from fastft.tables import markdown

FORMAT = "fastft.retention 1"
Scores: TypeAlias = "float | Sequence[float] | npt.NDArray[Any] | Tensor"
"""An evaluation: a number, or a score for each item (1-d; bool, integer or floating point). Higher is better."""
Items: TypeAlias = "npt.NDArray[np.float64]"
# Indices drawn at a time: 32 MiB of them.
DRAWS = 1 << 22


@dataclass(frozen=True)
class Estimate:
    """A number, and its bootstrap interval where it was measured item by item."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Change:
    """One evaluation, before and after."""

    before: Estimate
    after: Estimate
    retention: Estimate | None
    """after / before; None where before is not positive."""
    gain: Estimate
    """after − before, in points."""

    @property
    def forgetting(self) -> Estimate:
        """before − after, in points."""
        return negated(self.gain)


@dataclass(frozen=True)
class Row:
    """One method."""

    name: str
    source: Mapping[str, Change]
    target: Mapping[str, Change]
    source_mean: Estimate
    """The mean of the source scores after it."""
    target_mean: Estimate | None
    """The mean of the target scores after it; None without targets."""
    backward_transfer: float | None
    """Over the chain of tasks that was given for it, in points."""


class RetentionReport:
    """Compares methods of fine-tuning by what they kept (source evaluations) and what they brought (target).

    For an evaluation with mean score S: retention = S_after / S_before; forgetting = S_before − S_after; gain =
    S_after − S_before. Items are the same before, after and for every method, so each bootstrap resample of the
    items is used for all of them: intervals are paired.

    Args:
        source: what the model could do before: evaluation → :data:`Scores`. At least one.
        target: the new task before, in the same form: usually a linear probe's scores on the base model, so that the
            gain is what fine-tuning brought beyond it. May be empty.
        before: what to call the model that these are of.
        confidence: of the intervals.
        resamples: how many times the items are drawn anew, with replacement; intervals are percentiles over these.
        seed: of the draws. The global random state is not used.
        points: how many points a score of 1 is; 1 if scores are percentages already.

    Raises ``ValueError`` for scores that are empty, not finite or of more than one dimension, and for wrong options.
    """

    def __init__(
        self,
        source: Mapping[str, Scores],
        target: Mapping[str, Scores] | None = None,
        *,
        before: str = "base model, linear probe",
        confidence: float = 0.95,
        resamples: int = 2000,
        seed: int = 0,
        points: float = 100.0,
    ) -> None:
        if not 0.0 < confidence < 1.0:
            raise ValueError(f"confidence: expected a number between 0 and 1, got {confidence!r}")
        if not isinstance(resamples, int) or resamples < 1:
            raise ValueError(f"resamples: expected an integer >= 1, got {resamples!r}")
        if not points > 0.0:
            raise ValueError(f"points: expected a number > 0, got {points!r}")
        if not source:
            raise ValueError("source: expected at least one evaluation, got none")
        self.before = before
        self.confidence = confidence
        self.resamples = resamples
        self.seed = seed
        self.points = points
        self._before = {"source": checked_all(source, "source"), "target": checked_all(target or {}, "target")}
        self._after: dict[str, dict[str, dict[str, Items | float]]] = {}
        self._chains: dict[str, list[list[float]]] = {}
        self._draws: dict[tuple[str, str, str | None], Items | None] = {}
        for role, evaluations in self._before.items():
            for name, scores in evaluations.items():
                self._draws[role, name, None] = self._resampled(role, name, scores)

    def add(
        self,
        name: str,
        *,
        source: Mapping[str, Scores],
        target: Mapping[str, Scores] | None = None,
        chain: Sequence[Sequence[float]] | npt.NDArray[Any] | Tensor | None = None,
    ) -> Row:
        """Add a method: the scores after it, for all evaluations that the report was made with.

        Args:
            name: of the method.
            source, target: evaluation → :data:`Scores`, per item in the same order as before. An interval needs
                both to be per item.
            chain: R, for a chain of tasks; see :func:`backward_transfer`.

        Raises ``ValueError`` for a name that was added before, evaluations that are missing or unknown, and another
        number of items than before; the report is then as it was.
        """
        if name in self._after or name == self.before:
            raise ValueError(f"name: {name!r} is in the report already")
        after = {"source": checked_all(source, "source"), "target": checked_all(target or {}, "target")}
        for role, evaluations in after.items():
            known = self._before[role]
            if evaluations.keys() != known.keys():
                raise ValueError(f"{role}: expected the evaluations {sorted(known)}, got {sorted(evaluations)}")
            for evaluation, scores in evaluations.items():
                start = known[evaluation]
                if isinstance(scores, np.ndarray) and isinstance(start, np.ndarray) and scores.size != start.size:
                    raise ValueError(
                        f"{role}: {evaluation}: expected the same items as before, {start.size} of them, "
                        f"got {scores.size}"
                    )
        if chain is not None:
            self._chains[name] = checked_chain(chain).tolist()
        self._after[name] = after
        for role, evaluations in after.items():
            for evaluation, scores in evaluations.items():
                self._draws[role, evaluation, name] = self._resampled(role, evaluation, scores)
        return self.row(name)

    # -- results -------------------------------------------------------------------------------------------

    @property
    def names(self) -> tuple[str, ...]:
        """The methods, in the order in which they were added."""
        return tuple(self._after)

    def evaluations(self, role: str) -> tuple[str, ...]:
        """The names of the evaluations of a role, "source" or "target"."""
        return tuple(self._before[role])

    def row(self, name: str) -> Row:
        """What a method did."""
        if name not in self._after:
            raise KeyError(f"{name}: not in the report, which has {', '.join(self._after) or 'no methods'}")
        chain = self._chains.get(name)
        return Row(
            name,
            {evaluation: self._change("source", evaluation, name) for evaluation in self._before["source"]},
            {evaluation: self._change("target", evaluation, name) for evaluation in self._before["target"]},
            self._mean("source", name),
            self._mean("target", name) if self._before["target"] else None,
            None if chain is None else self.points * backward_transfer(chain),
        )

    @property
    def rows(self) -> tuple[Row, ...]:
        """All methods."""
        return tuple(self.row(name) for name in self._after)

    def score(self, role: str, evaluation: str, name: str | None = None) -> Estimate:
        """The mean score in an evaluation (``role``: "source" or "target") after a method, or before (None)."""
        return self._estimate(mean_score(self._scores(role, name)[evaluation]), self._draws[role, evaluation, name])

    def difference(self, name: str, other: str, role: str, evaluation: str) -> Estimate:
        """``name`` − ``other`` in one evaluation, in points; paired, so often much surer than either score."""
        return self._difference((role, evaluation, name), (role, evaluation, other))

    def means(self, name: str | None = None) -> tuple[Estimate, Estimate]:
        """(target, source): the means over their evaluations after a method, or before (None).

        Raises ``ValueError`` without targets.
        """
        if not self._before["target"]:
            raise ValueError("target: this report has no target evaluations")
        return self._mean("target", name), self._mean("source", name)

    def hypervolume(self, names: Iterable[str] | None = None, reference: tuple[float, float] | None = None) -> float:
        """The area that methods reach in the plane of (target, source) means: the larger, the better the trade-off.

        Args:
            names: the methods to take together; None: all.
            reference: (target, source) of the corner that the area is measured from. None: the target as before, and
                a source of 0, so that what counts is the gain times what is left of the source.

        Raises ``ValueError`` without targets.
        """
        if reference is None:
            reference = (self.means()[0].value, 0.0)
        chosen = [self.means(name) for name in (self.names if names is None else names)]
        return hypervolume([(x.value, y.value) for x, y in chosen], reference)

    # -- output --------------------------------------------------------------------------------------------

    def __str__(self) -> str:
        return self.to_markdown()

    def to_markdown(self) -> str:
        """A table: a line for the model before and for each method; intervals in brackets."""
        titles = ["method"]
        for evaluation in self._before["source"]:
            titles += [evaluation, "retention", "forgetting, points"]
        for evaluation in self._before["target"]:
            titles += [evaluation, "gain, points"]
        if self._chains:
            titles.append("backward transfer")
        first = [f"before ({self.before})"]
        first += [cell for name in self._before["source"] for cell in (shown(self.score("source", name)), "", "")]
        first += [cell for name in self._before["target"] for cell in (shown(self.score("target", name)), "")]
        lines = [first + [""] * bool(self._chains)]
        for row in self.rows:
            line = [row.name]
            for change in row.source.values():
                kept = "-" if change.retention is None else shown(change.retention, scale=100.0, unit=" %", digits=1)
                line += [shown(change.after), kept, shown(change.forgetting, digits=1)]
            for change in row.target.values():
                line += [shown(change.after), shown(change.gain, digits=1)]
            if self._chains:
                line.append("" if row.backward_transfer is None else f"{row.backward_transfer:.1f}")
            lines.append(line)
        table = "\n".join(markdown(titles, lines))
        if all(draws is None for draws in self._draws.values()):
            return table
        return (
            f"{table}\n\nIn brackets: {self.confidence:.0%} bootstrap intervals over the items, paired "
            f"({self.resamples:,} resamples); they cover the choice of items, not the randomness of training."
        )

    def to_json(self) -> str:
        """All scores, which :meth:`from_json` reads, and the results, which are there to be read."""
        return json.dumps(
            {
                "format": FORMAT,
                "before": self.before,
                "confidence": self.confidence,
                "resamples": self.resamples,
                "seed": self.seed,
                "points": self.points,
                **{role: plain(evaluations) for role, evaluations in self._before.items()},
                "methods": [
                    {
                        "name": name,
                        **{role: plain(evaluations) for role, evaluations in after.items()},
                        "chain": self._chains.get(name),
                    }
                    for name, after in self._after.items()
                ],
                "results": [dataclasses.asdict(row) for row in self.rows],
            }
        )

    @classmethod
    def from_json(cls, text: str) -> RetentionReport:
        """The report that :meth:`to_json` wrote; its results are computed again."""
        loaded = json.loads(text)
        if not isinstance(loaded, dict) or loaded.get("format") != FORMAT:
            found = loaded.get("format") if isinstance(loaded, dict) else type(loaded).__name__
            raise ValueError(f"from_json: expected the format {FORMAT!r}, got {found!r}")
        options = {key: loaded[key] for key in ("before", "confidence", "resamples", "seed", "points")}
        report = cls(loaded["source"], loaded["target"], **options)
        for method in loaded["methods"]:
            report.add(method["name"], source=method["source"], target=method["target"], chain=method["chain"])
        return report

    def plot(self, path: str | Path) -> None:
        """Draw source against target: all methods, their intervals, the Pareto front and its hypervolume.

        Needs matplotlib. Raises ``ValueError`` without targets.
        """
        from .plots import plot_retention

        plot_retention(self, Path(path))

    # -- numbers -------------------------------------------------------------------------------------------

    def _scores(self, role: str, name: str | None) -> dict[str, Items | float]:
        return self._before[role] if name is None else self._after[name][role]

    def _resampled(self, role: str, evaluation: str, scores: Items | float) -> Items | None:
        """The mean over each resample; None for a plain number. The draws depend on the evaluation alone."""
        if not isinstance(scores, np.ndarray):
            return None
        position = list(self._before[role]).index(evaluation)
        return resampled_means(scores, self.resamples, (self.seed, ("source", "target").index(role), position))

    def _estimate(self, value: float, draws: Items | None) -> Estimate:
        if draws is None or not np.isfinite(draws).all():
            return Estimate(value)
        tail = (1.0 - self.confidence) / 2.0
        low, high = np.quantile(draws, [tail, 1.0 - tail])
        return Estimate(value, float(low), float(high))

    def _difference(self, minuend: tuple[str, str, str | None], subtrahend: tuple[str, str, str | None]) -> Estimate:
        values = [mean_score(self._scores(role, name)[evaluation]) for role, evaluation, name in (minuend, subtrahend)]
        a, b = self._draws[minuend], self._draws[subtrahend]
        draws = None if a is None or b is None else self.points * (a - b)
        return self._estimate(self.points * (values[0] - values[1]), draws)

    def _change(self, role: str, evaluation: str, name: str) -> Change:
        before, after = self.score(role, evaluation), self.score(role, evaluation, name)
        a, b = self._draws[role, evaluation, None], self._draws[role, evaluation, name]
        retention = None
        if before.value > 0.0:
            with np.errstate(divide="ignore", invalid="ignore"):
                ratios = None if a is None or b is None else b / a
            retention = self._estimate(after.value / before.value, ratios)
        return Change(before, after, retention, self._difference((role, evaluation, name), (role, evaluation, None)))

    def _mean(self, role: str, name: str | None) -> Estimate:
        values = [mean_score(scores) for scores in self._scores(role, name).values()]
        draws = [self._draws[role, evaluation, name] for evaluation in self._before[role]]
        known = [d for d in draws if d is not None]
        return self._estimate(float(np.mean(values)), np.mean(known, axis=0) if len(known) == len(draws) else None)


def backward_transfer(chain: Sequence[Sequence[float]] | npt.NDArray[Any] | Tensor) -> float:
    """How much learning later tasks changed earlier ones, on average: negative is forgetting.

    mean over i < T of (R[T, i] − R[i, i]): Lopez-Paz & Ranzato 2017, https://arxiv.org/abs/1706.08840.

    Args:
        chain: R, ``[T, T]``: R[i][j] is the score on task j after training on tasks 0 to i; T ≥ 2. What is above
            the diagonal is not used.
    """
    matrix = checked_chain(chain)
    return float((matrix[-1] - matrix.diagonal())[:-1].mean())


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Where in the list the points are that no other beats in one coordinate without losing in the other.

    Higher is better in both; ascending in the first coordinate. Of equal points, the first.
    """
    best = float("-inf")
    front = []
    for i in sorted(range(len(points)), key=lambda i: (-points[i][0], -points[i][1], i)):
        if points[i][1] > best:
            best = points[i][1]
            front.append(i)
    return front[::-1]


def hypervolume(points: Sequence[tuple[float, float]], reference: tuple[float, float]) -> float:
    """The area of what the points dominate and what dominates ``reference``; higher is better in both coordinates.

    A point that is not above the reference in both adds nothing.
    """
    above = [point for point in points if point[0] > reference[0] and point[1] > reference[1]]
    area, left = 0.0, reference[0]
    for i in pareto_front(above):
        area += (above[i][0] - left) * (above[i][1] - reference[1])
        left = above[i][0]
    return area


def resampled_means(items: Items, resamples: int, seed: int | Sequence[int]) -> Items:
    """The mean of ``items`` over each of so many draws with replacement; the draws depend on size and seed alone."""
    rng = np.random.default_rng(seed)
    at_once = max(1, DRAWS // items.size)
    sizes = [min(at_once, resamples - start) for start in range(0, resamples, at_once)]
    return np.concatenate([items[rng.integers(items.size, size=(size, items.size))].mean(axis=1) for size in sizes])


def mean_score(scores: Items | float) -> float:
    """The mean over the items, or the number itself."""
    return float(np.mean(scores))


def as_array(values: Any) -> Items:
    """A float64 copy."""
    return np.array(values.detach().cpu().double().numpy() if isinstance(values, Tensor) else values, dtype=np.float64)


def checked_scores(scores: Scores, where: str) -> Items | float:
    """Scores as a number or as a float64 array of their own; raises ``ValueError`` where they are neither."""
    try:
        array = as_array(scores)
    except (TypeError, ValueError):
        raise ValueError(f"{where}: expected a number, or a score for each item, got {scores!r:.80}") from None
    if array.ndim > 1 or array.size == 0:
        raise ValueError(f"{where}: expected a number, or a score for each item, got shape {list(array.shape)}")
    if not np.isfinite(array).all():
        raise ValueError(f"{where}: expected finite scores, got {np.count_nonzero(~np.isfinite(array))} that are not")
    return array if array.ndim else float(array)


def checked_all(evaluations: Mapping[str, Scores], role: str) -> dict[str, Items | float]:
    """All of a role's scores, checked."""
    return {name: checked_scores(scores, f"{role}: {name}") for name, scores in evaluations.items()}


def checked_chain(chain: Sequence[Sequence[float]] | npt.NDArray[Any] | Tensor) -> Items:
    """R as an array; raises ``ValueError`` unless it is square and what is used of it is finite."""
    matrix = as_array(chain)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or matrix.shape[0] < 2:
        raise ValueError(f"chain: expected a square matrix of at least 2 tasks, got shape {list(matrix.shape)}")
    if not np.isfinite([*matrix[-1], *matrix.diagonal()]).all():
        raise ValueError("chain: expected finite scores on the diagonal and in the last row")
    return matrix


def negated(estimate: Estimate) -> Estimate:
    """The same with the other sign."""
    if estimate.low is None or estimate.high is None:
        return Estimate(-estimate.value)
    return Estimate(-estimate.value, -estimate.high, -estimate.low)


def shown(estimate: Estimate, scale: float = 1.0, unit: str = "", digits: int = 3) -> str:
    """As it stands in the table."""

    def number(value: float) -> str:
        return f"{round(scale * value, digits) + 0.0:.{digits}f}"  # + 0.0: no "-0.0"

    text = f"{number(estimate.value)}{unit}"
    if estimate.low is None or estimate.high is None:
        return text
    return f"{text} [{number(estimate.low)}, {number(estimate.high)}]"


def plain(evaluations: Mapping[str, Items | float]) -> dict[str, Any]:
    """Ready for ``json``; whole numbers without a fraction, as most items are right or wrong."""
    return {name: scores if isinstance(scores, float) else compact(scores) for name, scores in evaluations.items()}


def compact(scores: Items) -> list[float | int]:
    """Floats, or integers where they say the same."""
    return [int(x) if x == int(x) else x for x in scores.tolist()]
