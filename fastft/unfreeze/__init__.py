"""Open a model's layers over time: policies that say when, and the ``Unfreezer`` that does it."""

# Exported by fastft.layers; importable from here as well.
from fastft.layers import LayerGroup as LayerGroup
from fastft.layers import layer_groups as layer_groups
from fastft.unfreeze.policies import (
    LISA,
    Always,
    BlockCoordinate,
    Budget,
    ChainThaw,
    Event,
    GradualUnfreeze,
    LinearProbeThenFinetune,
    OnPlateau,
    Phases,
    Policy,
    Progress,
    open_at,
)
from fastft.unfreeze.unfreezer import Unfreezer

__all__ = [
    "LISA",
    "Always",
    "BlockCoordinate",
    "Budget",
    "ChainThaw",
    "Event",
    "GradualUnfreeze",
    "LinearProbeThenFinetune",
    "OnPlateau",
    "Phases",
    "Policy",
    "Progress",
    "Unfreezer",
    "open_at",
]
