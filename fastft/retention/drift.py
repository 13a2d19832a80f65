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
from fastft.layers.wrappers import reshard
from fastft.optim.dtensors import placement_of
from fastft.optim.tensors import is_dtensor
from fastft.reports import Report
from fastft.tables import aligned, markdown

from .anchored import Anchored, chunks, find_anchored
from .processes import is_first_copy, meshes_of, sum_over_mesh


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

    With DTensors among the parameters it is a collective: all processes of their meshes call it, and get the report of
    the whole model. Each reads its own parts; sums are sent, not weights. Plain parameters beside DTensors are taken to
    be the same on every process.

    Args:
        model: the model, also while it trains.
        anchor: the pre-trained weights: in any dtype, on any device, or in a file, read a tensor at a time. One in
            bfloat16 is what the model is compared with, so its rounding counts as drift. Of DTensors: whole, or
            DTensors that lie as the parameters do.
        groups: as in :func:`fastft.layers.layer_groups`.

    Raises:
        TypeError: ``anchor`` is no :class:`fastft.Anchor`.
        ValueError: groups that ``layer_groups`` refuses; or an anchor that has none of the parameters, or one in
            another shape or placement; or the pieces of ``FullyShardedDataParallel``.
        RuntimeError: it has failed on another process.
    """
    reshard(model)
    layers = layer_groups(model, groups)
    # Of the plain parameters and of those on each mesh; the last row counts failures.
    sums = {mesh: torch.zeros(len(layers) + 1, 4, dtype=torch.float64) for mesh in (None, *meshes_of(model))}
    anchored: dict[int, Anchored] = {}
    failure = None
    try:
        anchored = {id(found.parameter): found for found in find_anchored(model, anchor)[0]}
        for row, layer in enumerate(layers):
            for p in layer.parameters:
                if id(p) in anchored and is_first_copy(p):
                    mesh = placement_of(p)[0] if is_dtensor(p) else None
                    sums[mesh][row] += moments(anchored[id(p)].here, anchored[id(p)].start(anchor))
    except Exception as error:  # the other processes wait for this one's sums
        failure = error
        for own in sums.values():
            own[-1] = 1.0
    everywhere = [own if mesh is None else sum_over_mesh(own, mesh) for mesh, own in sums.items()]
    if failure is not None:
        raise failure
    *by_layer, failures = torch.stack(everywhere).sum(0).tolist()
    if failures[0]:
        raise RuntimeError("drift_report: it has failed on another process, whose error says why")
    drifts = []
    for layer, own in zip(layers, by_layer, strict=True):
        elements = sum(p.numel() for p in layer.parameters if id(p) in anchored)
        free = [name for name, p in zip(layer.param_names, layer.parameters, strict=True) if id(p) not in anchored]
        drifts.append(drift_of(layer.name, elements, own, free))
    total = [sum(column) for column in zip(*by_layer, strict=True)]
    everything = [name for drift in drifts for name in drift.unanchored]
    return DriftReport(tuple(drifts), drift_of("total", sum(drift.elements for drift in drifts), total, everything))


def moments(p: Tensor, anchor: Tensor) -> Tensor:
    """‖p − anchor‖², ‖p‖², ‖anchor‖² and ⟨p, anchor⟩ of plain tensors, on the CPU."""
    total = torch.zeros(4, dtype=torch.float64, device=p.device)
    for a, b in chunks((p, anchor), p.device, torch.float64):
        delta = a - b
        total += torch.stack([(delta * delta).sum(), (a * a).sum(), (b * b).sum(), (a * b).sum()])
    return total.cpu()


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
