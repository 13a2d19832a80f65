"""Which layers a model has, and what is wrapped around it."""

from fastft.layers.groups import GroupPatterns, LayerGroup, layer_groups

__all__ = ["GroupPatterns", "LayerGroup", "layer_groups"]
