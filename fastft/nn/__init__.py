"""Dropout that stores no mask: as functions, as modules, and swapped into models that are there already."""

from fastft.nn import functional

__all__ = ["functional"]
