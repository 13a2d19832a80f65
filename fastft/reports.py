"""The faces that all reports have."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path

__all__ = ["Report"]


class Report(ABC):
    """A result to be read: ``str()`` of it is text for a terminal."""

    @abstractmethod
    def to_markdown(self) -> str:
        """The report in Markdown."""

    @abstractmethod
    def to_json(self) -> str:
        """The numbers, as a JSON text."""

    @abstractmethod
    def plot(self, path: str | Path) -> None:
        """Draw it. Needs matplotlib."""

    def write(self, folder: str | Path) -> None:
        """Write ``report.md``, ``report.json`` and, where there is one, ``plot.png`` into a folder that exists."""
        folder = Path(folder)
        if self._has_plot():
            self.plot(folder / "plot.png")
        (folder / "report.json").write_text(self.to_json().rstrip("\n") + "\n", encoding="utf-8")
        (folder / "report.md").write_text(self.to_markdown().rstrip("\n") + "\n", encoding="utf-8")

    def _has_plot(self) -> bool:
        return True
