"""The state of an unfreezer, group by group."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from fastft.reports import Report
from fastft.tables import aligned, markdown

TITLES = ("group", "parameters", "open since", "lr", "state bytes")


@dataclass(frozen=True)
class GroupStatus:
    """One layer group."""

    group: str
    parameters: int
    """Elements."""
    open_since: int | None
    """The step at which it was opened; None while it is closed."""
    lr: tuple[float, ...]
    """The learning rates of its parameters in the next step, the lowest first."""
    state_bytes: int
    """The size of its optimizer state."""
    host_bytes: int
    """The part of it that waits in host memory."""

    def cells(self) -> tuple[str, ...]:
        """As a line of the table."""
        ends = dict.fromkeys((self.lr[0], self.lr[-1])) if self.lr else ()
        return (
            self.group,
            f"{self.parameters:,}",
            "closed" if self.open_since is None else f"step {self.open_since:,}",
            " … ".join(f"{lr:.3g}" for lr in ends) or "-",
            f"{self.state_bytes:,}{' (host)' if self.host_bytes else ''}",
        )


@dataclass(frozen=True)
class UnfreezeReport(Report):
    """The state of an unfreezer; ``str()`` of it is a table with notes below."""

    step: int
    """Optimizer steps done."""
    groups: tuple[GroupStatus, ...]
    """From input to output."""
    notes: tuple[str, ...]

    def __str__(self) -> str:
        return "\n".join([*aligned(TITLES, self._rows()), self._total(), *(f"- {note}" for note in self.notes)])

    def to_markdown(self) -> str:
        """The table in Markdown, with the notes below."""
        notes = [f"- {note}" for note in self.notes]
        return "\n".join([*markdown(TITLES, self._rows()), "", self._total(), *([""] if notes else []), *notes])

    def to_json(self) -> str:
        """``{"step", "groups": [...], "notes": [...]}`` with the fields of each group."""
        return json.dumps(dataclasses.asdict(self), indent=1)

    def plot(self, path: str | Path) -> None:
        """Draw the groups' sizes as bars, open and closed ones in different colours. Needs matplotlib."""
        from .plots import plot_groups

        plot_groups(self, Path(path))

    def _rows(self) -> list[tuple[str, ...]]:
        return [status.cells() for status in self.groups]

    def _total(self) -> str:
        opened = [status for status in self.groups if status.open_since is not None]
        share = sum(s.parameters for s in opened) / max(1, sum(s.parameters for s in self.groups))
        return (
            f"step {self.step:,}: {len(opened)} of {len(self.groups)} groups open, {share:.1%} of the parameters, "
            f"{sum(s.state_bytes - s.host_bytes for s in self.groups):,} bytes of state beside them"
        )
