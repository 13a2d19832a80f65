"""Fine-tune large pre-trained models without losing what they know."""

from fastft import _core as _core  # connects the compiled core to torch, or says why it cannot
from fastft import data as data
from fastft import layers as layers
from fastft import nn as nn
from fastft import optim as optim
from fastft import retention as retention
from fastft import unfreeze as unfreeze
from fastft._core import __version__
from fastft.anchor import Anchor
from fastft.diagnosis import DoctorReport, doctor
from fastft.optim import AdamW
from fastft.recipes import Recipe, recipe

__all__ = ["AdamW", "Anchor", "DoctorReport", "Recipe", "__version__", "doctor", "recipe"]
