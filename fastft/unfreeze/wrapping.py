"""Wrappers that an unfreezer has to know of, also where they hold its model from outside, and when they came."""

from __future__ import annotations

import gc
from collections.abc import Iterable

from torch import Tensor, nn

from fastft.layers.groups import GroupPatterns, LayerGroup, layer_groups
from fastft.layers.wrappers import is_fsdp1, is_fsdp2, peel, wrapped_for
from fastft.optim.processes import wrappers
from fastft.optim.tensors import is_dtensor

# Wrappers under which flags must not change, and why.
FLAGS_MUST_STAY = {
    "ddp": "DistributedDataParallel settles when it is made which gradients it waits for",
    "fsdp1": "FullyShardedDataParallel keeps parameters of several groups in one flat parameter",
    "compile": "a compiled model may run a graph that was traced with other flags (pytorch/pytorch#139476)",
}
NAMES = {
    "ddp": "wrapped in DistributedDataParallel",
    "data_parallel": "wrapped in DataParallel",
    "fsdp1": "wrapped in FullyShardedDataParallel",
    "fsdp2": "sharded with fully_shard",
    "compile": "compiled",
}
SEVERAL_PROCESSES = frozenset({"ddp", "fsdp1", "fsdp2"})
# Where one came after the unfreezer: what goes wrong, and what to do instead.
LATE = {
    "ddp": (
        "never averages the gradients of what was closed by then",
        'wrap it first, and hand the wrapper to the Unfreezer, with mode="freeze" and fastft.AdamW',
    ),
    "fsdp1": (
        "cuts up the parameters that the optimizer and the Unfreezer hold",
        'wrap it first, then make the optimizer, then the Unfreezer with the wrapper and mode="freeze"',
    ),
    "fsdp2": (
        "puts other parameters in the place of those that the optimizer and the Unfreezer hold",
        "shard it first, then make the optimizer, then the Unfreezer",
    ),
}


def found_wrappers(model: nn.Module, given: Iterable[str]) -> set[str]:
    """Those in :data:`NAMES` that are around the model, around a part of it, or given by the user."""
    found = wrapped_for(model) | set(given)
    # A search through all objects, which is not needed where it is known that several processes train.
    if not found & SEVERAL_PROCESSES and outer_wrappers(model):
        gc.collect()  # one that nobody uses any more may still lie about
        found |= outer_wrappers(model)
    return found


def outer_wrappers(model: nn.Module) -> set[str]:
    """Of "ddp" and "fsdp1", those that live in this process and run a module of the model."""
    ours = set(peel(model).modules())
    around = (wrapper for wrapper in wrappers() if not ours.isdisjoint(wrapper.modules()))
    return {"fsdp1" if is_fsdp1(wrapper) else "ddp" for wrapper in around}


def sharded_modules(model: nn.Module) -> set[nn.Module]:
    """The modules that ``fully_shard`` was applied to."""
    return {module for module in model.modules() if is_fsdp2(module)}


def late_error(wrapper: str, trouble: str | None = None) -> ValueError:
    """For a wrapper that came after the unfreezer; ``trouble`` where it is not the usual one."""
    usual, instead = LATE[wrapper]
    return ValueError(
        f"model: expected one that was wrapped before the Unfreezer was made, got one that was {NAMES[wrapper]} "
        f"after it, which {trouble or usual}; {instead}"
    )


def groups_of(model: nn.Module, patterns: GroupPatterns | None) -> tuple[LayerGroup, ...]:
    """The layer groups, each with parameters of its own.

    Raises:
        ValueError: the groups are to be read from a model in which FullyShardedDataParallel has put the weights of
            several into one flat parameter; or as ``layer_groups`` raises.
    """
    flat = [p for p in model.parameters() if is_flat(p)] if patterns is None else []
    if not flat:
        return tuple(layer_groups(model, patterns))
    try:
        groups = tuple(layer_groups(model, patterns))
    except ValueError as error:
        raise flat_error() from error
    inside = {p: {m for outer in group.modules for m in outer.modules()} for group in groups for p in group.parameters}
    if any(info.module not in inside[p] for p in flat for info in p._param_infos):  # type: ignore[attr-defined]
        raise flat_error()
    return groups


def flat_error() -> ValueError:
    """For flat parameters over several layers."""
    return ValueError(
        "model: expected FullyShardedDataParallel(..., use_orig_params=True), got flat parameters, in which the "
        "weights of several layers lie together; or say with groups= which of them belong together"
    )


def is_flat(p: Tensor) -> bool:
    """Whether it is one of FullyShardedDataParallel's flat parameters."""
    return getattr(p, "_is_flat_param", False) is True


def refuse_offload(model: nn.Module) -> None:
    """Raise for sharded parameters on an accelerator, whose moments stay there."""
    for name, p in model.named_parameters():
        if is_dtensor(p) and p.device.type != "cpu":
            raise ValueError(
                f'state_policy: expected "keep" or "reset" for sharded parameters, got "offload", and {name} is one on '
                f"{p.device.type}, whose moments cannot wait in host memory"
            )
