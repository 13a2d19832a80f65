"""The error that is the user's to mend."""

from __future__ import annotations


class InputError(Exception):
    """Something the user gave cannot be used: one line that says what is wrong and what to change."""
