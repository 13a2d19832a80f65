"""Parameter groups with a learning rate for each layer: high at the output, lower toward the input."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

from fastft.checks import check_fraction, check_not_negative
from fastft.layers import LayerGroup


def layerwise_lr(
    groups: Iterable[LayerGroup],
    lr: float,
    decay: float = 0.75,
    *,
    no_decay: Callable[[str, Tensor], bool] | None = None,
    **group_options: Any,
) -> list[dict[str, Any]]:
    """Parameter groups whose lr is multiplied by ``decay`` from each layer group to the one below it.

    Layer-wise decay as in BEiT (Bao et al. 2021, https://arxiv.org/abs/2106.08254) and timm. ``decay=1 / 2.6`` gives
    the discriminative learning rates of ULMFiT (Howard & Ruder 2018, https://arxiv.org/abs/1801.06146).

    Args:
        groups: layer groups from input to output, of :func:`fastft.layers.layer_groups`; the last gets ``lr``.
        lr: of the topmost group.
        decay: above 0 and up to 1.
        no_decay: names and parameters for which it is true get ``weight_decay`` 0, in a group of their own; such as
            :func:`biases_and_norms`.
        **group_options: of every group, for instance ``weight_decay`` or ``anchor_decay``.

    Returns:
        The first argument of an optimizer: dicts with named parameters, and with the layer group's name under
        ``"layer_group"``.

    Raises:
        TypeError: ``groups`` are no layer groups.
        ValueError: a number out of range, or an option that differs from group to group.
    """
    layers = list(groups) if isinstance(groups, Iterable) else [groups]
    if wrong := [layer for layer in layers if not isinstance(layer, LayerGroup)]:
        raise TypeError(
            f"groups: expected layer groups, as fastft.layers.layer_groups(model) makes, got {type(wrong[0]).__name__}"
        )
    check_not_negative("lr", lr)
    check_fraction("decay", decay)
    if taken := group_options.keys() & {"params", "lr", "layer_group"}:
        raise ValueError(f"group_options: expected options for all groups, got {', '.join(sorted(taken))}")
    made = []
    for depth, layer in enumerate(reversed(layers)):
        own = {**group_options, "lr": lr * decay**depth, "layer_group": layer.name}
        named = list(zip(layer.param_names, layer.parameters, strict=True))
        bare = [(name, p) for name, p in named if no_decay is not None and no_decay(name, p)]
        decayed = [(name, p) for name, p in named if no_decay is None or not no_decay(name, p)]
        made.append(
            [{**own, "params": decayed}] * bool(decayed) + [{**own, "params": bare, "weight_decay": 0.0}] * bool(bare)
        )
    return [group for groups_of_layer in reversed(made) for group in groups_of_layer]


def biases_and_norms(name: str, param: Tensor) -> bool:
    """Whether it is a bias, or the scale or shift of a norm: these are usually left out of weight decay."""
    return param.dim() <= 1
