"""Parameter groups with a learning rate for each layer: high at the output, lower toward the input."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

from torch import Tensor


class Layer(Protocol):
    """What is needed of a layer group, such as ``fastft.unfreeze.layer_groups`` gives."""

    @property
    def name(self) -> str: ...

    @property
    def param_names(self) -> Sequence[str]: ...

    @property
    def parameters(self) -> Sequence[Tensor]: ...


NoDecay = Callable[[str, Tensor], bool]


def discriminative_lr(
    groups: Iterable[Layer],
    lr: float,
    decay: float = 2.6,
    *,
    no_decay: NoDecay | None = None,
    **group_options: Any,
) -> list[dict[str, Any]]:
    """Parameter groups whose lr is divided by ``decay`` from each layer group to the one below it.

    Howard & Ruder 2018 (ULMFiT), https://arxiv.org/abs/1801.06146.

    Args:
        groups: layer groups from input to output; the last gets ``lr``.
        lr: of the topmost group.
        decay: at least 1.
        no_decay: names and parameters for which it is true get ``weight_decay`` 0, in a group of their own; such as
            :func:`biases_and_norms`.
        **group_options: of every group, for instance ``weight_decay`` or ``anchor_decay``.

    Returns what an optimizer takes as its first argument: dicts with named parameters, and with the layer group's
    name under ``"layer_group"``.
    """
    if not decay >= 1.0:
        raise ValueError(f"decay: expected a number >= 1, got {decay!r}")
    return by_depth(groups, lr, 1.0 / decay, no_decay, group_options)


def layer_decay(
    groups: Iterable[Layer],
    lr: float,
    decay: float = 0.75,
    *,
    no_decay: NoDecay | None = None,
    **group_options: Any,
) -> list[dict[str, Any]]:
    """Parameter groups whose lr is multiplied by ``decay`` from each layer group to the one below it, as in timm.

    ``decay`` is above 0 and up to 1; all else is as in :func:`discriminative_lr`.
    """
    if not 0.0 < decay <= 1.0:
        raise ValueError(f"decay: expected a number above 0 and up to 1, got {decay!r}")
    return by_depth(groups, lr, decay, no_decay, group_options)


def biases_and_norms(name: str, param: Tensor) -> bool:
    """Whether it is a bias, or the scale or shift of a norm: nothing that weight decay is usually meant for."""
    return param.dim() <= 1


def by_depth(
    groups: Iterable[Layer], lr: float, factor: float, no_decay: NoDecay | None, options: dict[str, Any]
) -> list[dict[str, Any]]:
    """One group for each layer group, or two where ``no_decay`` tells its parameters apart."""
    layers = list(groups) if isinstance(groups, Iterable) else [groups]
    if wrong := [layer for layer in layers if not hasattr(layer, "param_names")]:
        raise TypeError(
            "groups: expected layer groups, as fastft.unfreeze.layer_groups(model) makes, "
            f"got {type(wrong[0]).__name__}"
        )
    if not isinstance(lr, (int, float)) or not 0.0 <= lr < float("inf"):
        raise ValueError(f"lr: expected a finite number >= 0, got {lr!r}")
    if taken := options.keys() & {"params", "lr", "layer_group"}:
        raise ValueError(f"group_options: expected options for all groups, got {', '.join(sorted(taken))}")
    made = []
    for depth, layer in enumerate(reversed(layers)):
        own = {**options, "lr": lr * factor**depth, "layer_group": layer.name}
        named = list(zip(layer.param_names, layer.parameters, strict=True))
        bare = [(name, p) for name, p in named if no_decay is not None and no_decay(name, p)]
        decayed = [(name, p) for name, p in named if no_decay is None or not no_decay(name, p)]
        made.append(
            [{**own, "params": decayed}] * bool(decayed) + [{**own, "params": bare, "weight_decay": 0.0}] * bool(bare)
        )
    return [group for groups_of_layer in reversed(made) for group in groups_of_layer]
