"""The report of ``doctor``: a table of movement, a table of memory, and a sentence of advice."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from fastft.optim.lost_changes import DISTANCE
from fastft.reports import Report
from fastft.tables import aligned, markdown

from .settings import Memory, Weights, name_of

ROOM = 0.1
"""The part of the memory that has to be left for activations if a setting is to be recommended."""
SHOWN_KINDS = 3
WAYS = {(False, False): "", (False, True): "h", (True, False): "b", (True, True): "bh"}
"""{(step_in_backward, the anchor in host memory): the mark of a setting that fits so}, the cheapest in time first."""


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
    """The findings of :func:`fastft.doctor`; ``str()`` of it is for a terminal."""

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
        return None

    @property
    def recommended(self) -> Recommendation | None:
        """The most exact setting that fits, if possible without a change to how it is stepped; None if none fits."""
        exact = [m for m in self.memories if m.kept.dtype == torch.float32] if not self.is_narrow else []
        bits = [m for m in self.memories if m.kept.extra_bits == 16 and m.state_dtype != torch.bfloat16]
        small = [m for m in self.memories if m.state_dtype == "8bit" and m.kept.dtype != torch.float32]
        candidates = dict.fromkeys([*exact, *bits, *sorted(small, key=lambda m: -m.kept.extra_bits)])
        found = [way for memory in candidates if (way := self.way(memory)) is not None]
        best = min(found, key=lambda way: list(WAYS).index((way.in_backward, way.anchor_on_host)), default=None)
        if best is None or best.memory.kept.extra_bits != 8:
            return best
        nearest = next(found for found in self.movements if found.kept == best.memory.kept)
        if min(self.shares(nearest)) > 0.5:
            return best
        kept = replace(best.memory.kept, rounding="stochastic")
        return replace(best, memory=replace(best.memory, kept=kept))

    @property
    def is_narrow(self) -> bool:
        """Whether the dtype as it is has 16 bits."""
        return self.movements[0].kept.dtype.itemsize == 2

    @property
    def lost(self) -> str:
        """A clause on what cannot move; "" where all does."""
        plain = self.movements[0]
        found = [f"a step of lr {self.lr:g} moves {percent(plain.step)} of the weights"] if plain.step < 0.9995 else []
        pulls = {"the decay": plain.decay, "the anchor's pull": plain.pull}
        found += [
            f"{what} by itself {percent(share)}" for what, share in pulls.items() if share is not None and share < 0.5
        ]
        return listed(found)

    @property
    def advice(self) -> str:
        """A sentence: what is lost, and what to use; :attr:`code` follows it."""
        lost = f"Rounded to nearest in {name_of(self.movements[0].kept.dtype)}, {self.lost}" * bool(self.lost)
        lost = lost if self.is_narrow else ""
        best = self.recommended
        if best is None:
            least = min((Recommendation(m, True, True) for m in self.memories), key=lambda way: way.total)
            assert self.gpu_memory is not None
            return (
                f"{lost}{'; n' if lost else 'N'}othing here fits: {least.memory.kept} with {least.memory.moments_as} "
                f"moments and a step in the backward pass takes {self.size(least.total)} of "
                f"{self.size(self.gpu_memory)}, and activations come on top: train fewer layers or divide the model "
                "among GPUs."
            )
        room = ""
        if self.gpu_memory is not None:
            left = (self.gpu_memory - best.total) / self.unit[1]
            room = f", and leaves {left:.1f} of {self.size(self.gpu_memory)} for activations"
        nothing = "loses nothing, " if self.is_lossless(best) else ""
        numbers = f"takes {best.total / self.elements:.1f} bytes a weight, {self.size(best.total)}"
        return f"{lost}{'; t' if lost else 'T'}his {nothing}{numbers}{room}:"

    def is_lossless(self, way: Recommendation) -> bool:
        """Whether weights and moments are those of a float32 run."""
        wide = way.memory.kept.dtype == torch.float32 or way.memory.kept.extra_bits == 16
        return wide and way.memory.moments_as == "float32"

    @property
    def code(self) -> tuple[str, ...]:
        """The lines that make the recommended optimizer; none where nothing fits."""
        best = self.recommended
        if best is None:
            return ()
        kept = name_of(best.memory.kept.dtype)
        lines = [f"# load the model with dtype=torch.{kept}"] if kept != self.stored else []
        options = [f"lr={self.lr:g}", f"weight_decay={self.weight_decay:g}"]
        if self.anchor_decay:
            anchor = "anchor" if best.anchor_on_host else '"init"'
            options += [f"anchor={anchor}", f"anchor_decay={self.anchor_decay:g}"]
        if best.anchor_on_host:
            lines.append('anchor = fastft.Anchor.snapshot(model, device="cpu")')
        options = ["model.named_parameters()", *options, *best.memory.options()]
        lines.append(f"optimizer = fastft.AdamW({', '.join(options)})")
        if best.in_backward:
            lines.append("handle = fastft.optim.step_in_backward(optimizer)")
        return tuple(lines)

    @property
    def notes(self) -> tuple[str, ...]:
        """Facts that the tables leave unsaid."""
        plain = self.movements[0]
        found = []
        if self.not_finite:
            found.append(f"The model is damaged: {plural(self.not_finite, 'weight')} of inf or NaN.")
        if self.left_out:
            found.append(f"Left out, being integers or in 8 bits or less: {plural(self.left_out, 'tensor')}.")
        if self.trainable < self.elements:
            frozen = self.elements - self.trainable
            found.append(f"{frozen:,} weights are frozen: they take only their own bytes, and count in no share.")
        if plain.step < 0.9995:
            least = [f"{kind.kind} ({percent(kind.step)})" for kind in self.kinds[:SHOWN_KINDS]]
            found.append(f"Moved least by the step: {', '.join(least)}.")
        if self.decay_is_lost:
            found.append("The decay is too small for float32, too: a larger weight_decay, or none, says what happens.")
        pulls = "decay and pull" if self.anchor_decay else "the decay"
        distance = f", and {DISTANCE:.0%} away from the anchor" if self.anchor_decay else ""
        found.append(
            f"A step counts as lr, which it is at first; later it is less. For {pulls}: by itself, as where the "
            f"gradient is 0{distance}."
        )
        found.append(
            "Second moments in bfloat16 grow but do not shrink: β₂ = 0.999 takes off less than half their last bit."
        )
        wide, narrow = self.size(4 * self.trainable), self.size(2 * self.trainable)
        found.append(
            f"An anchor takes {narrow} in 16 bits, {wide} in float32, and nothing on the GPU (h) with "
            'Anchor.snapshot(model, device="cpu").'
        )
        found.append('"In backward" (b) is with step_in_backward. Activations are not counted.')
        return tuple(found)

    @property
    def decay_is_lost(self) -> bool:
        """Whether even float32 weights are not moved by the decay."""
        wide = [found.decay for found in self.movements if found.kept.dtype == torch.float32]
        return any(share is not None and share < 0.5 for share in wide)

    # -- faces -------------------------------------------------------------------------------------------------

    def __str__(self) -> str:
        lines = [f"{self.title}", "", *aligned(*self.movement_table()), "", *aligned(*self.memory_table()), ""]
        code = ["", *(f"    {line}" for line in self.code)] if self.code else []
        return "\n".join([*lines, *(f"- {note}" for note in self.notes), "", self.advice, *code])

    def to_markdown(self) -> str:
        """Both tables, one of the kinds of tensors, and the advice."""
        kinds = [
            [f"`{kind.kind}`", f"{kind.tensors:,}", f"{kind.elements:,}", *map(percent, self.shares(kind))]
            for kind in self.kinds
        ]
        titles = ["tensors", "how many", "weights", *self.movement_table()[0][1:]]
        sections = [
            f"# {self.title}",
            self.advice,
            *(["\n".join(["```python", *self.code, "```"])] if self.code else []),
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
        """All numbers: shares from 0 to 1, and bytes. Totals: ``b``, in backward; ``h``, the anchor on the host."""
        found: dict[str, Any] = asdict(self)
        for memory, entry in zip(self.memories, found["memories"], strict=True):
            entry["total"] = {
                mark or "plain": memory.total(in_backward=in_backward, anchor_on_host=on_host)
                for (in_backward, on_host), mark in WAYS.items()
            }
        texts = {"notes": self.notes, "advice": self.advice, "code": self.code}
        return json.dumps({**found, **texts}, indent=1, default=as_text)

    def plot(self, path: str | Path) -> None:
        """Draw the bytes of each setting as bars, and ``gpu_memory`` as a line. Needs matplotlib."""
        from .plots import plot_memory

        plot_memory(self, Path(path))

    def _has_plot(self) -> bool:
        return find_spec("matplotlib") is not None

    # -- tables ------------------------------------------------------------------------------------------------

    @property
    def title(self) -> str:
        """Of the report."""
        size = f"{plural(self.elements, 'weight')} in {plural(self.tensors, 'tensor')}"
        return f"{self.model}: {size}, stored in {self.stored}"

    def shares(self, found: Movement | Kind) -> list[float]:
        """The shares that there are, in the order of the columns."""
        return [share for share in (found.step, found.decay, found.pull) if share is not None]

    def movement_table(self) -> tuple[list[str], list[list[str]]]:
        """(titles, rows)."""
        titles = ["weights that move, kept as", f"step of lr {self.lr:g}"]
        titles += [f"decay of {self.lr * self.weight_decay:g}"] if self.weight_decay else []
        titles += [f"pull of {self.lr * self.anchor_decay:g}"] if self.anchor_decay else []
        average = {"stochastic": " (on average)"}
        return titles, [
            [f"{found.kept}{average.get(found.kept.rounding, '')}", *map(percent, self.shares(found))]
            for found in self.movements
        ]

    def memory_table(self) -> tuple[list[str], list[list[str]]]:
        """(titles, rows), in one unit."""
        unit, divisor = self.unit
        parts = ["weights", "gradients", "moments", "low bits", *(["anchor"] if self.anchor_decay else [])]
        titles = [f"memory in {unit}, kept as", "moments as", *parts, "total", "bytes each", "in backward"]
        if self.gpu_memory is not None:
            titles.append(f"left of {self.gpu_memory / divisor:,.5g} {unit}")
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
            row = [str(m.kept), m.moments_as, *numbers, f"{m.total() / m.elements:.2f}"]
            row.append(f"{m.total(in_backward=True) / divisor:.1f}")
            rows.append(row + ([self.left(m)] if self.gpu_memory is not None else []))
        return titles, rows

    def left(self, memory: Memory) -> str:
        """The last cell of a row: what is left of the GPU's memory, and the mark of how."""
        assert self.gpu_memory is not None
        way = self.way(memory)
        if way is None:
            return "too large"
        mark = WAYS[way.in_backward, way.anchor_on_host]
        return f"{(self.gpu_memory - way.total) / self.unit[1]:.1f}{f' {mark}' if mark else ''}"

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
    if share in (0.0, 1.0):
        return "all" if share else "none"
    return "<0.1%" if share < 0.001 else ">99.9%" if share > 0.999 else f"{share:.1%}"


def plural(count: int, noun: str) -> str:
    """``"1 tensor"``, ``"1,000 tensors"``."""
    return f"{count:,} {noun}{'s' * (count != 1)}"


def listed(clauses: list[str]) -> str:
    """``"a, b and c"``."""
    return " and ".join([", ".join(clauses[:-1]), clauses[-1]] if len(clauses) > 1 else clauses)


def as_text(value: object) -> str:
    """Of a dtype: ``"bfloat16"``."""
    return name_of(value) if isinstance(value, torch.dtype) else str(value)
