"""How far a model has moved from its anchor, layer group by layer group."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from fastft.anchor import Anchor
from fastft.layers import layer_groups
from fastft.layers.groups import GroupPatterns
from fastft.reports import Report
from fastft.tables import aligned, markdown

from .anchored import chunks, find_anchored


@dataclass(frozen=True)
class Drift:
    """How far one layer group has moved; δ = parameters − anchor, over its anchored parameters as one vector."""

    group: str
    elements: int
    """Anchored elements."""
    distance: float
    """‖δ‖₂"""
    relative: float | None
    """‖δ‖₂ / ‖anchor‖₂; None where the anchor is 0."""
    cosine: float | None
    """The cosine between parameters and anchor; None where either is 0."""
    unanchored: tuple[str, ...]
    """The names of its parameters that have no anchor, and do not count."""

    def cells(self) -> tuple[str, ...]:
        """As a line of the table."""
        return (
            self.group,
            f"{self.elements:,}",
            f"{self.distance:.4g}" if self.elements else "-",
            "-" if self.relative is None else f"{self.relative:.2%}",
            "-" if self.cosine is None else f"{self.cosine:.6f}",
            str(len(self.unanchored) or ""),
        )


TITLES = ("group", "elements", "‖δ‖₂", "‖δ‖₂/‖θ₀‖₂", "cosine", "unanchored")


@dataclass(frozen=True)
class DriftReport(Report):
    """The result of :func:`drift_report`; ``str()`` of it is a table."""

    groups: tuple[Drift, ...]
    """From input to output."""
    total: Drift
    """All anchored parameters as one vector."""

    def __str__(self) -> str:
        return "\n".join([*aligned(TITLES, self._rows()), *self._notes()])

    def to_markdown(self) -> str:
        """The table in Markdown."""
        return "\n".join([*markdown(TITLES, self._rows()), *(f"\n{note}" for note in self._notes())])

    def to_json(self) -> str:
        """``{"groups": [...], "total": {...}}`` with the fields of :class:`Drift`."""
        return json.dumps(dataclasses.asdict(self), indent=1)

    def plot(self, path: str | Path) -> None:
        """Draw each group's relative drift as a bar. Needs matplotlib."""
        from .plots import plot_drift

        plot_drift(self, Path(path))

    def _rows(self) -> list[tuple[str, ...]]:
        return [drift.cells() for drift in (*self.groups, self.total)]

    def _notes(self) -> list[str]:
        names = self.total.unanchored
        return [f"Not anchored, and not counted: {', '.join(names)}"] if names else []


@torch.no_grad()
def drift_report(model: nn.Module, anchor: Anchor, groups: GroupPatterns | None = None) -> DriftReport:
    """Measure how far each layer group's parameters are from their anchor, accumulated in float64.

    Args:
        model: the model, also while it trains.
        anchor: the pre-trained weights: in any dtype, on any device, or in a file, read a tensor at a time. One in
            bfloat16 is what the model is compared with, so its rounding counts as drift.
        groups: as in :func:`fastft.layers.layer_groups`.

    Raises:
        TypeError: ``anchor`` is no :class:`fastft.Anchor`.
        ValueError: groups that ``layer_groups`` refuses, or an anchor that has none of the parameters, or one in
            another shape.
    """
    layers = layer_groups(model, groups)
    found, _ = find_anchored(model, anchor)
    keys = {id(anchored.parameter): anchored.key for anchored in found}
    drifts, total = [], [0.0] * 4
    for layer in layers:
        sums, elements = [0.0] * 4, 0
        for p in layer.parameters:
            if id(p) in keys:
                sums = [a + b for a, b in zip(sums, moments(p, anchor[keys[id(p)]]), strict=True)]
                elements += p.numel()
        free = [name for name, p in zip(layer.param_names, layer.parameters, strict=True) if id(p) not in keys]
        drifts.append(drift_of(layer.name, elements, sums, free))
        total = [a + b for a, b in zip(total, sums, strict=True)]
    everything = [name for drift in drifts for name in drift.unanchored]
    return DriftReport(tuple(drifts), drift_of("total", sum(drift.elements for drift in drifts), total, everything))


def moments(p: Tensor, anchor: Tensor) -> list[float]:
    """‖p − anchor‖², ‖p‖², ‖anchor‖² and ⟨p, anchor⟩."""
    total = torch.zeros(4, dtype=torch.float64, device=p.device)
    for a, b in chunks((p, anchor), p.device, torch.float64):
        delta = a - b
        total += torch.stack([(delta * delta).sum(), (a * a).sum(), (b * b).sum(), (a * b).sum()])
    return total.tolist()


def drift_of(group: str, elements: int, sums: list[float], unanchored: list[str]) -> Drift:
    """From what :func:`moments` gives, added up."""
    delta, own, base, inner = sums
    return Drift(
        group,
        elements,
        math.sqrt(delta),
        math.sqrt(delta / base) if base else None,
        inner / math.sqrt(own) / math.sqrt(base) if own and base else None,
        tuple(unanchored),
    )
