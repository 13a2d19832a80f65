"""The base class of errors that a user can correct."""

from __future__ import annotations

__all__ = ["UserError"]


class UserError(Exception):
    """Something the user gave cannot be used; the message is one line that says what is wrong and what to change."""
