"""What ``doctor`` found: a table of movement, a table of memory, and a sentence of advice."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from fastft.optim.precision import DISTANCE
from fastft.reports import Report
from fastft.tables import aligned, markdown

from .settings import Memory, Weights, name_of

ROOM = 0.1
"""The part of the memory that has to be left for activations if a setting is to be recommended."""
SHOWN_KINDS = 3
WAYS = {
    (False, False): "",
    (False, True): "anchor on host",
    (True, False): "in backward",
    (True, True): "in backward, anchor on host",
}
"""{(step_in_backward, the anchor in host memory): in words}, the cheapest in time first."""


@dataclass(frozen=True)
class Movement:
    """Shares of the weights, from 0 to 1, that a step changes; None where a rate is 0."""

    kept: Weights
    step: float
    """Of lr, in either direction."""
    decay: float | None
    """Of the decay by itself."""
    pull: float | None
    """Of the anchor's pull by itself."""


@dataclass(frozen=True)
class Kind:
    """Tensors whose names differ by numbers only, with the shares that a step moves in the dtype as it is."""

    kind: str
    """Their name, with ``*`` for numbers."""
    tensors: int
    elements: int
    step: float
    decay: float | None
    pull: float | None


@dataclass(frozen=True)
class Recommendation:
    """A setting, and what else makes it fit."""

    memory: Memory
    in_backward: bool = False
    """Step in the backward pass (:func:`fastft.optim.step_in_backward`)."""
    anchor_on_host: bool = False

    @property
    def total(self) -> int:
        """Bytes on the device that trains."""
        return self.memory.total(in_backward=self.in_backward, anchor_on_host=self.anchor_on_host)


@dataclass(frozen=True)
class DoctorReport(Report):
    """What :func:`fastft.doctor` found; ``str()`` of it is for a terminal."""

    model: str
    tensors: int
    elements: int
    trainable: int
    """Elements."""
    stored: str
    """The dtype of most of the model."""
    lr: float
    weight_decay: float
    anchor_decay: float
    gpu_memory: int | None
    """Bytes."""
    movements: tuple[Movement, ...]
    """For each way to keep the weights; the first is the dtype as it is."""
    kinds: tuple[Kind, ...]
    """Those that move least first."""
    memories: tuple[Memory, ...]
    not_finite: int
    """Weights that are inf or NaN."""
    left_out: int
    """Tensors in other dtypes, which are not trained."""

    # -- conclusions -------------------------------------------------------------------------------------------

    def way(self, memory: Memory) -> Recommendation | None:
        """The setting as it fits into ``gpu_memory`` with room for activations; None if it does not."""
        for in_backward, on_host in WAYS:
            found = Recommendation(memory, in_backward, on_host)
            if self.gpu_memory is None or found.total <= (1 - ROOM) * self.gpu_memory:
                return found
            if on_host and not memory.anchor:
                continue
        return None

    @property
    def recommended(self) -> Recommendation | None:
        """The most exact setting that fits, if possible without a change to how it is stepped; None if none fits."""
        plain = self.movements[0].kept.dtype
        exact = [m for m in self.memories if m.kept.dtype == torch.float32] if plain == torch.float32 else []
        bits = [m for m in self.memories if m.kept.extra_bits == 16 and m.state_dtype != torch.bfloat16]
        small = [m for m in self.memories if m.state_dtype == "8bit" and m.kept.dtype != torch.float32]
        small = sorted(small, key=lambda m: m.kept.extra_bits == 0)
        candidates = list(dict.fromkeys([*exact, *bits, *small]))
        found = [way for memory in candidates if (way := self.way(memory)) is not None]
        return min(found, key=lambda way: list(WAYS).index((way.in_backward, way.anchor_on_host)), default=None)

    @property
    def advice(self) -> str:
        """A sentence: what is lost, and the call that loses nothing and fits."""
        plain, best = self.movements[0], self.recommended
        lost = []
        if plain.step < 0.9995:
            lost.append(f"{percent(1 - plain.step)} of the weights cannot move in a step of lr {self.lr:g}")
        for what, moved in (("the decay", plain.decay), ("the anchor's pull", plain.pull)):
            if moved is not None and moved < 0.5:
                lost.append(f"{what} by itself moves {percent(moved)} of them")
        dtype = name_of(plain.kept.dtype)
        said = f"As {dtype} rounded to nearest, {listed(lost)}: " if lost and plain.kept.dtype != torch.float32 else ""
        if best is None:
            least = min(self.memories, key=lambda m: m.total(in_backward=True, anchor_on_host=True))
            needed = least.total(in_backward=True, anchor_on_host=True)
            return (
                f"{said}Nothing here fits: the least, {least.kept} with {least.moments_as} moments and a step in the "
                f"backward pass, takes {self.size(needed)} of {self.size(self.gpu_memory or 0)}, and activations come "
                "on top; train fewer layers, or divide the model among GPUs (FSDP)."
            )
        kept = best.memory.kept.dtype
        load = f"load the model in {name_of(kept)} and " if name_of(kept) != self.stored else ""
        use = f"{load}use {self.call(best)}"
        if best.in_backward:
            use += " with fastft.optim.step_in_backward(optimizer) (no clipping)"
        left = "" if self.gpu_memory is None else f", which leaves {self.size(self.gpu_memory - best.total)} of "
        left += "" if self.gpu_memory is None else f"{self.size(self.gpu_memory)} for activations"
        each = best.total / self.elements
        return f"{said}{use if said else use.capitalize()}: {each:.1f} bytes a weight, {self.size(best.total)}{left}."

    def call(self, way: Recommendation) -> str:
        """The optimizer, as one writes it."""
        options = [f"lr={self.lr:g}", f"weight_decay={self.weight_decay:g}"]
        if self.anchor_decay:
            host = 'anchor=fastft.Anchor.snapshot(model, device="cpu")'
            options += [host if way.anchor_on_host else 'anchor="init"', f"anchor_decay={self.anchor_decay:g}"]
        return f"fastft.AdamW({', '.join(['model.named_parameters()', *options, *way.memory.options()])})"

    @property
    def notes(self) -> tuple[str, ...]:
        """What the tables leave unsaid."""
        found = []
        if self.not_finite:
            found.append(f"{self.not_finite:,} weights are inf or NaN: this model is damaged.")
        if self.left_out:
            found.append(f"{self.left_out} tensors in other dtypes (integers, quantised) are left out.")
        if self.trainable < self.elements:
            frozen = self.elements - self.trainable
            found.append(f"{frozen:,} weights are frozen: they take their own bytes only, and do not count as moving.")
        if self.movements[0].kept.dtype == torch.float32 and (self.movements[0].decay or 1.0) < 0.5:
            found.append("The decay is too small for float32 as well: raise weight_decay, or do without.")
        by_step, *_ = self.kinds
        if by_step.step < 0.9995:
            shown = [f"{kind.kind} {percent(kind.step)}" for kind in self.kinds[:SHOWN_KINDS]]
            found.append(f"Least movable as {self.movements[0].kept}, by a step: {', '.join(shown)}.")
        found.append(
            f"A step moves each weight by lr at first, later by less; {'decay and pull are' if self.anchor_decay else 'the decay is'} "
            "by itself, as where the gradient is 0"
            + (f", with weights {DISTANCE:.0%} away from their anchor." if self.anchor_decay else ".")
        )
        anchor = sum(m.gradients for m in self.memories[:1])
        bfloat16 = 2 * self.trainable
        found.append(
            f"An anchor takes {self.size(anchor)} in the weights' dtype"
            + (
                f" or {self.size(bfloat16)} in bfloat16"
                if anchor != bfloat16
                else f", {self.size(2 * bfloat16)} in float32"
            )
            + ', and nothing on the GPU as Anchor.snapshot(model, device="cpu"). "In backward" is with step_in_backward. '
            "Activations are not counted."
        )
        return tuple(found)

    # -- faces -------------------------------------------------------------------------------------------------

    def __str__(self) -> str:
        lines = [f"{self.title}", "", *aligned(*self.movement_table()), "", *aligned(*self.memory_table()), ""]
        return "\n".join([*lines, *(f"- {note}" for note in self.notes), "", self.advice])

    def to_markdown(self) -> str:
        """Both tables, one of the kinds of tensors, and the advice."""
        kinds = [
            [f"`{kind.kind}`", f"{kind.tensors:,}", f"{kind.elements:,}", *map(percent, self.effects(kind))]
            for kind in self.kinds
        ]
        titles = ["tensors", "how many", "weights", *self.movement_table()[0][1:]]
        sections = [
            f"# {self.title}",
            self.advice,
            "## Movement",
            "\n".join(markdown(*self.movement_table())),
            f"## By tensor, as {self.movements[0].kept}",
            "\n".join(markdown(titles, kinds)),
            "## Memory",
            "\n".join(markdown(*self.memory_table())),
            "\n".join(f"- {note}" for note in self.notes),
        ]
        return "\n\n".join(sections) + "\n"

    def to_json(self) -> str:
        """All numbers: shares from 0 to 1, and bytes."""
        found: dict[str, Any] = asdict(self)
        for memory, entry in zip(self.memories, found["memories"], strict=True):
            entry["total"] = {
                words or "plain": memory.total(in_backward=b, anchor_on_host=h) for (b, h), words in WAYS.items()
            }
        return json.dumps({**found, "notes": self.notes, "advice": self.advice}, indent=1, default=str)

    def plot(self, path: str | Path) -> None:
        """Draw the bytes of each setting as bars, and ``gpu_memory`` as a line. Needs matplotlib."""
        from .plots import plot_memory

        plot_memory(self, Path(path))

    # -- tables ------------------------------------------------------------------------------------------------

    @property
    def title(self) -> str:
        """Of the report."""
        return f"{self.model}: {self.elements:,} weights in {self.tensors:,} tensors, {self.stored}"

    def effects(self, found: Movement | Kind) -> list[float]:
        """The shares that there are, in the order of the columns."""
        return [share for share in (found.step, found.decay, found.pull) if share is not None]

    def movement_table(self) -> tuple[list[str], list[list[str]]]:
        """(titles, rows)."""
        titles = ["weights that move, kept as", f"step of lr {self.lr:g}"]
        titles += [f"decay of {self.lr * self.weight_decay:g}"] if self.weight_decay else []
        titles += [f"pull of {self.lr * self.anchor_decay:g}"] if self.anchor_decay else []
        average = {"stochastic": " (on average)"}
        return titles, [
            [f"{found.kept}{average.get(found.kept.rounding, '')}", *map(percent, self.effects(found))]
            for found in self.movements
        ]

    def memory_table(self) -> tuple[list[str], list[list[str]]]:
        """(titles, rows), in one unit."""
        unit, divisor = self.unit
        parts = ["weights", "gradients", "moments", "low bits", *(["anchor"] if self.anchor_decay else [])]
        titles = [f"memory in {unit}, kept as", "moments as", *parts, "total", "a weight", "in backward"]
        if self.gpu_memory is not None:
            titles.append(f"left of {self.gpu_memory / divisor:.5g} {unit}")
        rows = []
        for m in self.memories:
            sizes = [
                m.weights,
                m.gradients,
                m.moments,
                m.low_bits,
                *([m.anchor] if self.anchor_decay else []),
                m.total(),
            ]
            numbers = [f"{size / divisor:.1f}" if size else "-" for size in sizes]
            row = [str(m.kept), m.moments_as, *numbers, f"{m.total() / m.elements:.2f} B"]
            row.append(f"{m.total(in_backward=True) / divisor:.1f}")
            rows.append(row + ([self.left(m)] if self.gpu_memory is not None else []))
        return titles, rows

    def left(self, memory: Memory) -> str:
        """The last cell of a row: what is left of the GPU's memory, and with what."""
        assert self.gpu_memory is not None
        way = self.way(memory)
        if way is None:
            return "too large"
        words = WAYS[way.in_backward, way.anchor_on_host]
        return f"{(self.gpu_memory - way.total) / self.unit[1]:.1f}{f' ({words})' if words else ''}"

    @property
    def unit(self) -> tuple[str, float]:
        """Of all sizes: (name, bytes)."""
        most = max(memory.total() for memory in self.memories)
        return ("GB", 1e9) if most >= 1e9 else ("MB", 1e6) if most >= 1e6 else ("kB", 1e3)

    def size(self, nbytes: float) -> str:
        """``"14.5 GB"``."""
        unit, divisor = self.unit
        return f"{nbytes / divisor:,.1f} {unit}"


def percent(share: float | None) -> str:
    """``"15.6%"``; "all" and "none" where it is exactly that."""
    if share is None:
        return "-"
    return "all" if share == 1.0 else "none" if share == 0.0 else f"{min(max(share, 0.0005), 0.9995):.1%}"


def listed(clauses: list[str]) -> str:
    """``"a, b and c"``."""
    return " and ".join([", ".join(clauses[:-1]), clauses[-1]] if len(clauses) > 1 else clauses)
