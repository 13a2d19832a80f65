"""What an unfreezer tells about itself."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One layer group."""

    group: str
    parameters: int
    """Elements."""
    open_since: int | None
    """The step at which it was opened; None while it is closed."""
    lr: tuple[float, ...]
    """The learning rates of its parameters in the next step, the lowest first."""
    state_bytes: int
    """What the optimizer keeps for it."""
    host_bytes: int
    """How much of that waits in host memory."""

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


TITLES = ("group", "parameters", "open since", "lr", "state bytes")


@dataclass(frozen=True)
class Report:
    """Where an unfreezer stands; ``str()`` of it is a table with notes below."""

    step: int
    rows: tuple[Row, ...]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        table = [TITLES, *(row.cells() for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = [
            "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip() for line in table
        ]
        opened = [row for row in self.rows if row.open_since is not None]
        share = sum(row.parameters for row in opened) / max(1, sum(row.parameters for row in self.rows))
        lines.append(
            f"step {self.step:,}: {len(opened)} of {len(self.rows)} groups open, {share:.1%} of the parameters, "
            f"{sum(row.state_bytes - row.host_bytes for row in self.rows):,} bytes of state beside them"
        )
        return "\n".join([*lines, *(f"- {note}" for note in self.notes)])
