"""Wrappers around a model or inside it: DDP, FSDP, torch.compile, PEFT, gradient checkpointing.

Nothing here imports what is looked for; where it is not imported, it cannot be there.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel


def peel(module: nn.Module) -> nn.Module:
    """The module inside its wrappers."""
    while True:
        if isinstance(module, (DataParallel, DistributedDataParallel)) or is_fsdp1(module):
            inner = module.module
        elif is_compiled_wrapper(module):
            inner = module._orig_mod
        else:
            return module
        assert isinstance(inner, nn.Module)
        module = inner


def is_compiled_wrapper(module: nn.Module) -> bool:
    """Whether it is what ``torch.compile(module)`` returns."""
    return "_orig_mod" in module._modules and type(module).__name__ == "OptimizedModule"


def is_fsdp1(module: nn.Module) -> bool:
    """Whether it is a ``FullyShardedDataParallel``."""
    return any(c.__name__ == "FullyShardedDataParallel" for c in type(module).__mro__)


def flattened(p: Tensor) -> bool:
    """Whether FullyShardedDataParallel (FSDP1) has put ``p`` into a flat parameter, or it is one."""
    return bool(getattr(p, "_fsdp_flattened", False))


def is_fsdp2(module: nn.Module) -> bool:
    """Whether ``fully_shard`` was applied to it."""
    return any(c.__name__ == "FSDPModule" for c in type(module).__mro__)


def reshard(model: nn.Module) -> None:
    """Put back what ``fully_shard`` has gathered for a forward pass and kept, as it does in the root module.

    The model would go on with these copies, whatever values and flags its parameters get, which are not even
    registered.
    """
    for module in model.modules():
        if is_fsdp2(module):
            module.reshard()  # type: ignore[operator]


def wrapped_for(model: nn.Module) -> set[str]:
    """Which of "ddp", "data_parallel", "fsdp1", "fsdp2" and "compile" the model or a part of it is wrapped for."""
    found = set()
    for module in model.modules():
        if isinstance(module, DistributedDataParallel):
            found.add("ddp")
        elif isinstance(module, DataParallel):
            found.add("data_parallel")
        elif is_fsdp1(module):
            found.add("fsdp1")
        elif is_fsdp2(module):
            found.add("fsdp2")
        if is_compiled_wrapper(module) or getattr(module, "_compiled_call_impl", None) is not None:
            found.add("compile")
    return found


def reentrant_checkpointing(model: nn.Module) -> bool:
    """Whether transformers' checkpointing is on and reentrant: it loses gradients where no input requires grad."""
    return any(
        getattr(module, "gradient_checkpointing", False) is True
        and getattr(getattr(module, "_gradient_checkpointing_func", None), "keywords", {}).get("use_reentrant", True)
        for module in model.modules()
    )


def requiring_inputs(model: nn.Module) -> list[Any]:
    """The outermost modules that can make their input embeddings require grad, as transformers' models can."""
    if hasattr(model, "enable_input_require_grads"):
        return [model]
    return [found for child in model.children() for found in requiring_inputs(child)]
