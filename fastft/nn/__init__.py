"""Dropout that stores no mask: as functions, as modules, and swapped into existing models."""

from fastft.nn import functional
from fastft.nn.fuse import FuseReport, fuse_dropout_
from fastft.nn.modules import BiasDropoutAdd, Dropout, DropoutAddLayerNorm, DropoutAddRMSNorm, Mixout

__all__ = [
    "BiasDropoutAdd",
    "Dropout",
    "DropoutAddLayerNorm",
    "DropoutAddRMSNorm",
    "FuseReport",
    "Mixout",
    "functional",
    "fuse_dropout_",
]
