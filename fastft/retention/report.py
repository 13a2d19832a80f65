"""Forgetting and learning: scores before and after, their intervals, and the trade-off between them."""

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

from fastft.reports import Report
from fastft.tables import markdown

FORMAT = "fastft.retention 1"
Scores: TypeAlias = "float | Sequence[float] | npt.NDArray[Any] | Tensor"
"""An evaluation: a number, or a score for each item (1-d; bool, integer or floating point). Higher is better.

A method that was trained several times, with different seeds, may have all its scores at once: 2-d, [seeds, items].
"""
Items: TypeAlias = "npt.NDArray[np.float64]"
"""[items], or [seeds, items] with two seeds or more."""
# Indices drawn at a time: 32 MiB of them.
DRAWS = 1 << 22


@dataclass(frozen=True)
class Estimate:
    """A number; where it was measured item by item, also its bootstrap interval and standard error."""

    value: float
    low: float | None = None
    high: float | None = None
    standard_error: float | None = None
    """The standard deviation over the resamples."""

    @property
    def is_tie(self) -> bool:
        """Of a difference: whether it may be none, as its interval holds 0. False without an interval."""
        return self.low is not None and self.high is not None and self.low <= 0.0 <= self.high

    def show(self, scale: float = 1.0, digits: int = 3, *, unit: str = "", sign: bool = False) -> str:
        """As text, ``0.242 [0.227, 0.258]``.

        Args:
            scale: what the numbers are multiplied with.
            digits: after the decimal point.
            unit: what follows the value.
            sign: whether to write a plus sign.
        """

        def number(value: float) -> str:
            # + 0.0: no "-0.0"
            return f"{round(scale * value, digits) + 0.0:{'+' if sign else ''}.{digits}f}"

        text = f"{number(self.value)}{unit}"
        if self.low is None or self.high is None:
            return text
        return f"{text} [{number(self.low)}, {number(self.high)}]"


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
class MethodResult:
    """One method's line of a :class:`RetentionReport`."""

    name: str
    seeds: int
    """How many training runs its scores are of."""
    source: Mapping[str, Change]
    target: Mapping[str, Change]
    source_mean: Estimate
    """The mean of the source scores after it."""
    target_mean: Estimate | None
    """The mean of the target scores after it; None without targets."""
    backward_transfer: float | None
    """Over the chain of tasks that was given for it, in points."""


class RetentionReport(Report):
    """Compares methods of fine-tuning by what they kept (source evaluations) and what they brought (target).

    For an evaluation with mean score S: retention = S_after / S_before; forgetting = S_before − S_after; gain =
    S_after − S_before. Items are the same before, after and for every method, so each bootstrap resample of the
    items is used for all of them: intervals are paired.

    A method may have several training runs, with different seeds (2-d scores). S is then the mean over all of them,
    and each resample also draws the method's runs anew, with replacement: independently of the other methods' runs,
    the same ones in all evaluations. So the interval covers the chance of training too. From few runs it is somewhat
    too narrow, as bootstraps are: with n of them multiply their part of the standard error by √(n/(n − 1)).

    Args:
        source: what the model could do before: evaluation → :data:`Scores`. At least one.
        target: the new task before, in the same form: usually a linear probe's scores on the base model, so that the
            gain is what fine-tuning brought beyond it. May be empty.
        before: what to call the model that these are of.
        confidence: of the intervals.
        resamples: how many times the items are drawn anew, with replacement; intervals are percentiles over these.
        seed: of the draws. The global random state is not used.
        points: how many points a score of 1 is; 1 if scores are percentages already.

    Raises:
        ValueError: scores are empty, not finite or of more than one dimension, or an option is out of its range.
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
    ) -> MethodResult:
        """Add a method: the scores after it, for all evaluations that the report was made with.

        Args:
            name: of the method.
            source, target: evaluation → :data:`Scores`, per item in the same order as before: ``[items]``, or
                ``[seeds, items]``, the seeds in the same order in all evaluations. An interval needs both before and
                after to be per item.
            chain: R, for a chain of tasks; see :func:`backward_transfer`.

        Returns:
            The method's :meth:`result`.

        Raises:
            ValueError: the name was added before, evaluations are missing or unknown, or there is another number of
                items than before, or of seeds than in another evaluation. The report is then as it was.
        """
        if name in self._after or name == self.before:
            raise ValueError(f"name: {name!r} is in the report already")
        after = {role: checked_all(given or {}, role, 2) for role, given in (("source", source), ("target", target))}
        for role, evaluations in after.items():
            known = self._before[role]
            if evaluations.keys() != known.keys():
                raise ValueError(f"{role}: expected the evaluations {sorted(known)}, got {sorted(evaluations)}")
            for evaluation, scores in evaluations.items():
                start = known[evaluation]
                items = scores.shape[-1] if isinstance(scores, np.ndarray) else None
                if items is not None and isinstance(start, np.ndarray) and items != start.size:
                    raise ValueError(
                        f"{role}: {evaluation}: expected the same items as before, {start.size} of them, got {items}"
                    )
        seeds = {f"{role}: {k}": runs(v) for role, part in after.items() for k, v in part.items() if runs(v)}
        if len(set(seeds.values())) > 1:
            raise ValueError(f"source, target: expected as many seeds in all evaluations, got {seeds}")
        if chain is not None:
            self._chains[name] = checked_chain(chain).tolist()
        self._after[name] = after
        for role, evaluations in after.items():
            for evaluation, scores in evaluations.items():
                self._draws[role, evaluation, name] = self._resampled(role, evaluation, scores, name)
        return self.result(name)

    # -- results -------------------------------------------------------------------------------------------

    @property
    def names(self) -> tuple[str, ...]:
        """The methods, in the order in which they were added."""
        return tuple(self._after)

    def evaluations(self, role: str) -> tuple[str, ...]:
        """The names of the evaluations of a role, "source" or "target"."""
        return tuple(self._before[role])

    def result(self, name: str) -> MethodResult:
        """A method's scores and how they changed.

        Returns:
            Frozen dataclasses: ``.source`` and ``.target`` map each evaluation to ``.before``, ``.after`` (scores),
            ``.gain``, ``.forgetting`` (in points) and ``.retention`` (a ratio, None where before is not positive);
            ``.source_mean`` and ``.target_mean`` (None without targets) are means over the evaluations: all of them
            :class:`Estimate`. ``.backward_transfer`` is in points, of the chain, or None; ``.seeds`` the number of
            training runs.

        Raises:
            KeyError: there is no method of that name.
        """
        if name not in self._after:
            raise KeyError(f"{name}: not in the report, which has {', '.join(self._after) or 'no methods'}")
        chain = self._chains.get(name)
        after = self._after[name]
        return MethodResult(
            name,
            max(1, *(runs(scores) for part in after.values() for scores in part.values())),
            {evaluation: self._change("source", evaluation, name) for evaluation in self._before["source"]},
            {evaluation: self._change("target", evaluation, name) for evaluation in self._before["target"]},
            self._mean("source", name),
            self._mean("target", name) if self._before["target"] else None,
            None if chain is None else self.points * backward_transfer(chain),
        )

    @property
    def results(self) -> tuple[MethodResult, ...]:
        """The :meth:`result` of each method."""
        return tuple(self.result(name) for name in self._after)

    def score(self, role: str, evaluation: str, name: str | None = None) -> Estimate:
        """The mean score in an evaluation (``role``: "source" or "target") after a method, or before (None)."""
        return self._estimate(mean_score(self._scores(role, name)[evaluation]), self._draws[role, evaluation, name])

    def difference(self, name: str | None, other: str | None, role: str, evaluation: str) -> Estimate:
        """``name`` − ``other`` in one evaluation, in points; None: the model before.

        Paired over the items, so often much surer than either score.
        """
        return self._difference((role, evaluation, name), (role, evaluation, other))

    def means(self, name: str | None = None) -> tuple[Estimate, Estimate]:
        """(target, source): the means over their evaluations after a method, or before (None).

        Raises:
            ValueError: the report has no targets.
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

        Raises:
            ValueError: the report has no targets.
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
        results = self.results
        several = any(result.seeds > 1 for result in results)
        titles = ["method", *["seeds"] * several]
        for evaluation in self._before["source"]:
            titles += [evaluation, "retention", "forgetting, points"]
        for evaluation in self._before["target"]:
            titles += [evaluation, "gain, points"]
        if self._chains:
            titles.append("backward transfer")
        first = [f"before ({self.before})", *[""] * several]
        first += [cell for name in self._before["source"] for cell in (self.score("source", name).show(), "", "")]
        first += [cell for name in self._before["target"] for cell in (self.score("target", name).show(), "")]
        lines = [first + [""] * bool(self._chains)]
        for result in results:
            line = [result.name, *[str(result.seeds)] * several]
            for change in result.source.values():
                kept = "-" if change.retention is None else change.retention.show(100.0, 1, unit=" %")
                line += [change.after.show(), kept, change.forgetting.show(digits=1)]
            for change in result.target.values():
                line += [change.after.show(), change.gain.show(digits=1)]
            if self._chains:
                line.append("" if result.backward_transfer is None else f"{result.backward_transfer:.1f}")
            lines.append(line)
        table = "\n".join(markdown(titles, lines))
        if all(draws is None for draws in self._draws.values()):
            return table
        return (
            f"{table}\n\nIn brackets: {self.confidence:.0%} bootstrap intervals over the items, paired "
            f"({self.resamples:,} resamples); they cover the choice of items, {self._covered()}."
        )

    def to_json(self) -> str:
        """All scores, which :meth:`from_json` reads, and the results, for other readers of the file."""
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
                "results": [dataclasses.asdict(result) for result in self.results],
            }
        )

    @classmethod
    def from_json(cls, text: str) -> RetentionReport:
        """Read a report that :meth:`to_json` wrote; its results are computed again.

        Raises:
            ValueError: the text is something else.
        """
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

        Needs matplotlib.

        Raises:
            ValueError: the report has no targets.
        """
        from .plots import plot_retention

        plot_retention(self, Path(path))

    def _has_plot(self) -> bool:
        return bool(self._before["target"])

    # -- numbers -------------------------------------------------------------------------------------------

    def _scores(self, role: str, name: str | None) -> dict[str, Items | float]:
        return self._before[role] if name is None else self._after[name][role]

    def _covered(self) -> str:
        """A part of a sentence: whether intervals cover training."""
        seeds = [result.seeds for result in self.results]
        if max(seeds, default=1) == 1:
            return "not the randomness of training"
        return "and the randomness of training" + " where there are several seeds" * (min(seeds) == 1)

    def _resampled(self, role: str, evaluation: str, scores: Items | float, name: str = "") -> Items | None:
        """The mean over each resample, [resamples]; None for a plain number.

        The draws of items depend on the evaluation alone, those of seeds on the method's name and their number alone.
        """
        if not isinstance(scores, np.ndarray):
            return None
        position = list(self._before[role]).index(evaluation)
        means = resampled_means(scores, self.resamples, (self.seed, ("source", "target").index(role), position))
        if scores.ndim == 1:
            return means
        rng = np.random.default_rng((self.seed, 2, *name.encode("utf-8")))
        seeds = rng.integers(len(scores), size=(len(scores), self.resamples))
        drawn: Items = np.take_along_axis(means, seeds, axis=0).mean(axis=0)
        return drawn

    def _estimate(self, value: float, draws: Items | None) -> Estimate:
        if draws is None or not np.isfinite(draws).all():
            return Estimate(value)
        tail = (1.0 - self.confidence) / 2.0
        low, high = np.quantile(draws, [tail, 1.0 - tail])
        return Estimate(value, float(low), float(high), float(draws.std()))

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

    The mean over i < T of R[T, i] − R[i, i] (Lopez-Paz & Ranzato 2017, https://arxiv.org/abs/1706.08840).

    Args:
        chain: R, ``[T, T]``: R[i][j] is the score on task j after training on tasks 0 to i; T ≥ 2. What is above
            the diagonal is not used.

    Raises:
        ValueError: R is not square, has fewer than two tasks, or is not finite where it is used.
    """
    matrix = checked_chain(chain)
    return float((matrix[-1] - matrix.diagonal())[:-1].mean())


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """The indices of the points that no other beats in one coordinate without losing in the other.

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
    """The means of ``items`` [..., n] over so many draws of n of them with replacement, [..., resamples].

    The draws depend on n and the seed alone.
    """
    rng = np.random.default_rng(seed)
    n = items.shape[-1]
    at_once = max(1, DRAWS // items.size)
    sizes = [min(at_once, resamples - start) for start in range(0, resamples, at_once)]
    parts = [items[..., rng.integers(n, size=(size, n))].mean(axis=-1) for size in sizes]
    return np.concatenate(parts, axis=-1)


def mean_score(scores: Items | float) -> float:
    """The mean over the items, or the number itself."""
    return float(np.mean(scores))


def as_array(values: Any) -> Items:
    """A float64 copy."""
    return np.array(values.detach().cpu().double().numpy() if isinstance(values, Tensor) else values, dtype=np.float64)


def checked_scores(scores: Scores, where: str, dimensions: int = 1) -> Items | float:
    """Scores as a number or as a float64 array of their own, [items] or, with 2 dimensions, [seeds, items].

    Raises:
        ValueError: they are neither, or not finite.
    """
    expected = "a number, or a score for each item" + " [items] or [seeds, items]" * (dimensions == 2)
    try:
        array = as_array(scores)
    except (TypeError, ValueError):
        raise ValueError(f"{where}: expected {expected}, got {scores!r:.80}") from None
    if array.ndim > dimensions or array.size == 0:
        raise ValueError(f"{where}: expected {expected}, got shape {list(array.shape)}")
    if not np.isfinite(array).all():
        raise ValueError(f"{where}: expected finite scores, got {np.count_nonzero(~np.isfinite(array))} that are not")
    if array.ndim == 2 and len(array) == 1:
        array = array.reshape(-1)  # one training run, as if without seeds
    return array if array.ndim else float(array)


def checked_all(evaluations: Mapping[str, Scores], role: str, dimensions: int = 1) -> dict[str, Items | float]:
    """All of a role's scores, checked."""
    return {name: checked_scores(scores, f"{role}: {name}", dimensions) for name, scores in evaluations.items()}


def runs(scores: Items | float) -> int:
    """How many training runs scores per item are of; 0 for a number, which does not say."""
    return 0 if not isinstance(scores, np.ndarray) else len(scores) if scores.ndim == 2 else 1


def checked_chain(chain: Sequence[Sequence[float]] | npt.NDArray[Any] | Tensor) -> Items:
    """R as an array, if it is square and finite where it is used."""
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
    return Estimate(-estimate.value, -estimate.high, -estimate.low, estimate.standard_error)


def plain(evaluations: Mapping[str, Items | float]) -> dict[str, Any]:
    """Ready for ``json``; whole numbers without a fraction, as most items are right or wrong."""
    return {name: scores if isinstance(scores, float) else compact(scores) for name, scores in evaluations.items()}


def compact(scores: Items) -> list[Any]:
    """Nested lists of floats, or of integers where they say the same."""
    if scores.ndim == 2:
        return [compact(one) for one in scores]
    return [int(x) if x == int(x) else x for x in scores.tolist()]
