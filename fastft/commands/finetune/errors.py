"""Raised when an option cannot be used."""

from __future__ import annotations

from fastft.errors import UserError


class InputError(UserError):
    """An option of ``fastft finetune``, or the file or model that it names, cannot be used."""
