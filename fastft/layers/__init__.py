"""Layer groups of a model, and the wrappers around it."""

from fastft.layers.groups import LayerGroup, layer_groups

__all__ = ["LayerGroup", "layer_groups"]
