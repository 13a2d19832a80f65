"""An error with an exit status."""

from __future__ import annotations

__all__ = ["Failure"]


class Failure(Exception):
    """Ends a command with a line on stderr and this exit status."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status
