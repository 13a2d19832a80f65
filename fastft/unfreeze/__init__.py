"""Open a model's layers over time: layer groups, policies that say when, and the ``Unfreezer`` that does it."""

from fastft.layers.groups import LayerGroup, layer_groups
from fastft.unfreeze.policies import (
    LISA,
    Always,
    BlockCoordinate,
    Budget,
    ChainThaw,
    Event,
    GoesBack,
    GradualUnfreeze,
    GroupInfo,
    LinearProbeThenFinetune,
    OnPlateau,
    Phases,
    Policy,
    Progress,
)
from fastft.unfreeze.report import Report
from fastft.unfreeze.unfreezer import Unfreezer

__all__ = [
    "LISA",
    "Always",
    "BlockCoordinate",
    "Budget",
    "ChainThaw",
    "Event",
    "GoesBack",
    "GradualUnfreeze",
    "GroupInfo",
    "LayerGroup",
    "LinearProbeThenFinetune",
    "OnPlateau",
    "Phases",
    "Policy",
    "Progress",
    "Report",
    "Unfreezer",
    "layer_groups",
]
