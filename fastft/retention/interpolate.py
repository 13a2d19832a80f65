"""WiSE-FT: blend fine-tuned weights back toward the anchor, and search for the best blend."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

from fastft.anchor import Anchor
from fastft.checks import check_share
from fastft.layers.wrappers import reshard

from .anchored import chunks, find_anchored, views_of
from .processes import agreed, groups_of, meshes_of
from .report import Items, RetentionReport, Scores, checked_scores, mean_score


def interpolate_(
    model: nn.Module, anchor: Anchor, alpha: float, *, keep_on: torch.device | str | None = None
) -> Interpolation:
    """Set the anchored parameters to ``(1 − alpha)·anchor + alpha·parameter``, in place, until undone.

    WiSE-FT (Wortsman et al. 2022, https://arxiv.org/abs/2109.01903), after fine-tuning. Without data to choose alpha
    on, the authors take 0.5; with some, see :func:`best_alpha`.

    .. code-block:: python

        with interpolate_(model, anchor, 0.5):
            evaluate(model)
        # here the model is as it was

        interpolation = interpolate_(model, anchor, 0.5)  # or for good; interpolation.undo() takes it back

    Of DTensors every process blends its own parts, as the whole tensors would be; nothing is sent, and each process has
    to call it. Parameters that ``fully_shard`` keeps gathered after a forward pass are put back first.

    Args:
        model: the fine-tuned model. Parameters without an anchor (a new head) stay as they are;
            ``Interpolation.unanchored`` names them. Buffers are not touched: a BatchNorm's running statistics stay
            those of the fine-tuned model, so bring them up to date with ``torch.optim.swa_utils.update_bn``, and
            keep a copy if you need them back.
        anchor: the pre-trained weights: in any dtype, on any device, or in a file. Of DTensors: whole, or DTensors that
            lie as the parameters do.
        alpha: from 0 (the anchor's values, in the parameter's dtype) to 1 (the fine-tuned weights, bit for bit).
            Values between are computed in float32 (float64 with float64 parameters) and rounded once.
        keep_on: where to keep the fine-tuned weights, which take as much memory as the anchored parameters do:
            beside these (None), or for instance on ``"cpu"``.

    Returns:
        A handle with ``alpha``, ``unanchored``, ``set(alpha)`` and ``undo()``; as a context manager it undoes itself.

    Raises:
        TypeError: ``anchor`` is no :class:`fastft.Anchor`.
        ValueError: an alpha outside [0, 1]; an anchor that has none of the parameters, or one in another shape or
            placement; the pieces of ``FullyShardedDataParallel``; or a model that is interpolated already. The model is
            then as it was.
    """
    return Interpolation(model, anchor, alpha, keep_on)


blended: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""Parameters, and a reference to the interpolation that set them last."""


class Interpolation:
    """Weights that are blended until :meth:`undo`, or until the ``with`` block that it opened ends."""

    def __init__(self, model: nn.Module, anchor: Anchor, alpha: float, keep_on: torch.device | str | None) -> None:
        check_share("alpha", alpha)
        reshard(model)
        self._model, self._anchor = model, anchor
        self._anchored, missing = find_anchored(model, anchor)
        self.unanchored = tuple(missing)
        """The names of the parameters that have no anchor, and so stay."""
        for found in self._anchored:
            # One whose handle is gone cannot be undone any more: it was for good.
            other = blended[found.parameter]() if found.parameter in blended else None
            if other is not None and other.alpha != 1.0:
                raise ValueError(
                    f"model: it is interpolated already, with alpha = {other.alpha:g}; "
                    "use that interpolation's set(alpha), or undo() it first"
                )
        self._tuned = Anchor.snapshot([(found.name, found.here) for found in self._anchored], device=keep_on)
        self.alpha = 1.0
        """The share of the fine-tuned weights in the model: 1 after :meth:`undo`."""
        self.set(alpha)
        for found in self._anchored:
            blended[found.parameter] = weakref.ref(self)

    @torch.no_grad()
    def set(self, alpha: float) -> None:
        """Blend the same two sets of weights with another ``alpha``."""
        check_share("alpha", alpha)
        reshard(self._model)
        try:
            for found in self._anchored:
                here, start, end = found.here, found.start(self._anchor), self._tuned[found.name]
                if alpha in (0.0, 1.0):
                    here.copy_(end if alpha else start)
                else:
                    for (target,), (a, b) in zip(
                        views_of((here,)), chunks((start, end), here.device, torch.float32), strict=True
                    ):
                        target.copy_(torch.lerp(a, b, alpha))
                found.written()
        except BaseException:
            self.undo()
            raise
        self.alpha = float(alpha)

    @torch.no_grad()
    def undo(self) -> None:
        """Put the fine-tuned weights back, bit for bit, also where the parameters were changed since."""
        reshard(self._model)
        for found in self._anchored:
            found.here.copy_(self._tuned[found.name])
            found.written()
        self.alpha = 1.0

    def __enter__(self) -> Interpolation:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.undo()

    def __repr__(self) -> str:
        free = f", {len(self.unanchored)} not anchored" if self.unanchored else ""
        return f"Interpolation(alpha={self.alpha:g}, {len(self._anchored)} parameters{free})"


ALPHAS = tuple(i / 10 for i in range(11))


@dataclass(frozen=True)
class AlphaPoint:
    """The model's scores with one alpha; per item if the evaluation returned them so."""

    alpha: float
    source: Items | float
    target: Items | float


@dataclass(frozen=True)
class AlphaSearch:
    """The curve that :func:`best_alpha` measured, by ascending alpha, and its choice."""

    alpha: float
    points: tuple[AlphaPoint, ...]

    def choose(self, *, source_weight: float | None = None, min_target: float | None = None) -> float:
        """The best alpha by another rule, from the same evaluations; see :func:`best_alpha`."""
        return choose_alpha(self.points, source_weight, min_target)

    def report(self, **options: Any) -> RetentionReport:
        """The curve as a :class:`RetentionReport`: alpha = 0 is "before", every other alpha a row.

        Args:
            **options: of :class:`RetentionReport`, such as ``confidence``.

        Raises:
            ValueError: 0 was not among the alphas.
        """
        first, *others = self.points
        if first.alpha != 0.0:
            raise ValueError("report: expected 0 among the alphas, to compare with")
        report = RetentionReport({"source": first.source}, {"target": first.target}, before="alpha = 0", **options)
        for point in others:
            report.add(f"alpha = {point.alpha:g}", source={"source": point.source}, target={"target": point.target})
        return report


def best_alpha(
    model: nn.Module,
    anchor: Anchor,
    evaluate: Callable[[nn.Module], Mapping[str, Scores]],
    alphas: Iterable[float] = ALPHAS,
    *,
    source_weight: float | None = None,
    min_target: float | None = None,
    keep_on: torch.device | str | None = None,
) -> AlphaSearch:
    """Evaluate the model at each alpha of :func:`interpolate_`, and choose the best. The model stays as it was.

    With DTensors among the parameters all processes of their meshes call it, with the same arguments, and choose alike.

    Args:
        model, anchor, keep_on: as in :func:`interpolate_`.
        evaluate: called with the model; returns ``{"source": scores, "target": scores}``: numbers, or an array with
            a score for each item; higher is better. Use validation data: the choice fits what it is made on. Of a
            model of DTensors it returns the same on every process: reduce or gather what each has measured.
        alphas: the values to try.
        source_weight: choose the highest ``(1 − w)·target + w·source`` of the mean scores; 0.5 if neither is given.
        min_target: choose the highest source among those whose target is this or more.

    Returns:
        The choice ``alpha``, of equal ones the largest; and the curve, ``points`` by ascending alpha, each with
        ``alpha``, ``source`` and ``target``.

    Raises:
        ValueError: wrong alphas or rules, before anything is evaluated; or no alpha reaches ``min_target``, with the
            curve. Of a model of DTensors also, on every process: other alphas, rules or scores than another process's.
    """
    given = list(alphas)
    if not given:
        raise ValueError("alphas: expected at least one, got none")
    for alpha in given:
        check_share("alpha", alpha)
    tried = sorted(set(given))
    check_rule(source_weight, min_target)
    reshard(model)
    groups = groups_of(meshes_of(model))
    rule = f"alphas {tried}, source_weight {source_weight}, min_target {min_target}"
    with agreed(
        "best_alpha: expected the same alphas, rule and anchor on every process",
        lambda: interpolate_(model, anchor, 1.0, keep_on=keep_on),
        lambda _: rule,
        groups,
    ) as interpolation:
        points = []
        for alpha in tried:
            point = agreed(
                "evaluate: expected the same scores on every process (reduce or gather them over the processes first)",
                partial(point_of, interpolation, alpha, evaluate, model),
                lambda point: f"source {outlined(point.source)}, target {outlined(point.target)}",
                groups,
            )
            points.append(point)
    return AlphaSearch(choose_alpha(points, source_weight, min_target), tuple(points))


def point_of(
    interpolation: Interpolation, alpha: float, evaluate: Callable[[nn.Module], Any], model: nn.Module
) -> AlphaPoint:
    """The result of ``evaluate`` with ``alpha`` as a point of the curve, if it is scores."""
    interpolation.set(alpha)
    scores = evaluate(model)
    if not isinstance(scores, Mapping) or not {"source", "target"} <= scores.keys():
        raise ValueError(f'evaluate: expected {{"source": scores, "target": scores}}, got {scores!r:.80}')
    return AlphaPoint(
        float(alpha),
        checked_scores(scores["source"], "evaluate: source"),
        checked_scores(scores["target"], "evaluate: target"),
    )


def outlined(scores: Items | float) -> str:
    """The mean; of a score for each item also their number and a digest, which are alike where all scores are."""
    if isinstance(scores, float):
        return repr(scores)
    return f"{mean_score(scores)!r} ({len(scores)} items, {hashlib.sha256(scores.tobytes()).hexdigest()[:16]})"


def choose_alpha(points: Iterable[AlphaPoint], source_weight: float | None, min_target: float | None) -> float:
    """The alpha that the rule prefers."""
    check_rule(source_weight, min_target)
    scored = [(point.alpha, mean_score(point.source), mean_score(point.target)) for point in points]
    if min_target is not None:
        enough = [(source, alpha) for alpha, source, target in scored if target >= min_target]
        if not enough:
            curve = "\n".join(f"  alpha {alpha:g}: source {s:g}, target {t:g}" for alpha, s, t in scored)
            raise ValueError(f"min_target: no alpha reaches {min_target:g}:\n{curve}")
        return max(enough)[1]
    weight = 0.5 if source_weight is None else source_weight
    return max(((1.0 - weight) * target + weight * source, alpha) for alpha, source, target in scored)[1]


def check_rule(source_weight: float | None, min_target: float | None) -> None:
    """Raise unless at most one is given, and makes sense."""
    if source_weight is not None and min_target is not None:
        raise ValueError("source_weight, min_target: expected one of them, got both")
    if source_weight is not None:
        check_share("source_weight", source_weight)
