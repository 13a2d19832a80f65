"""The two processes of tests/unfreeze/test_distributed.py, which starts this file as a script, once for each rank.

Each scenario trains while groups open and close, and returns whole tensors for the test to compare with one process.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import contract_distributed as contract
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from contract_distributed import whole
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from unfreeze_cases import Block, Listed, Stack, batch, params

import fastft
from fastft.optim import layerwise_lr
from fastft.unfreeze import OnPlateau, Policy, Unfreezer, layer_groups

STEPS, BREAK = 12, 7
# Each block opens, closes and opens again; two openings before the break, two after it.
UP_AND_DOWN = Listed(((0, (5,)), (2, (2, 3, 5)), (5, (1, 4, 5)), (8, (2, 3, 4)), (10, (0, 1, 2, 3, 4, 5))))
LOSSES = (1.0, 0.7, 0.9, 0.8, 0.75, 0.6, 0.65, 0.62, 0.61, 0.63, 0.4, 0.5)
MODES = ("requires_grad", "freeze")
STATE_POLICIES = ("keep", "reset", "offload")


def part(t: Tensor) -> Tensor:
    """This process's part of a batch."""
    return t if contract.WORLD_IS_ONE else t.chunk(contract.WORLD)[contract.RANK]


def optimizer_for(model: nn.Module, **options: Any) -> fastft.AdamW:
    """Of groups of one layer each, so that they can be warmed up again."""
    groups = layerwise_lr(layer_groups(model), 1e-2, decay=1 / 1.5, weight_decay=0.1)
    return fastft.AdamW(groups, eps=1e-4, anchor="init", anchor_decay=2.0, max_grad_norm=0.5, **options)


def train(
    called: nn.Module, model: nn.Module, optimizer: fastft.AdamW, unfreezer: Unfreezer, steps: range
) -> dict[str, Any]:
    """The parameters after each step, and what was open in it."""
    path = {}
    named = params(model)  # of a model that no forward pass has put together
    for step in steps:
        x, y = batch(step, rows=8)
        cross_entropy(called(part(x)), part(y)).backward()
        opened = ",".join(unfreezer.open_groups)
        optimizer.step()
        with torch.no_grad():  # an evaluation: fully_shard leaves the root's parameters put together
            called(part(x))
        unfreezer.step(loss=LOSSES[step])
        optimizer.zero_grad()
        path[f"{step} {opened}"] = whole(named)
    return path


def outcome(optimizer: fastft.AdamW, path: dict[str, Any]) -> dict[str, Any]:
    """With the optimizer's state by names."""
    groups = optimizer.param_groups
    named = {name: p for g in groups for name, p in zip(g["param_names"], g["params"], strict=True)}
    return {**path, "state": whole({name: dict(optimizer.state[p]) for name, p in named.items()})}


# -- fully_shard ---------------------------------------------------------------------------------------------


def sharded(layout: str, seed: int = 0) -> Stack:
    model = Stack(3, seed=seed)
    if contract.WORLD_IS_ONE:
        return model
    for block in model.blocks if layout == "blocks" else []:
        fully_shard(block, mesh=contract.MESH)
    return fully_shard(model, mesh=contract.MESH)


def masked(model: nn.Module, optimizer: fastft.AdamW) -> None:
    optimizer.set_update_mask(params(model)["blocks.1.fc.weight"], torch.arange(8) % 3 > 0)


def schedule(layout: str, mode: Any, state_policy: Any, policy: Policy = UP_AND_DOWN) -> dict[str, Any]:
    """All of a schedule."""
    model = sharded(layout)
    optimizer = optimizer_for(model)
    masked(model, optimizer)
    unfreezer = Unfreezer(model, optimizer, policy, mode=mode, state_policy=state_policy, rewarm_steps=2)
    return outcome(optimizer, train(model, model, optimizer, unfreezer, range(STEPS)))


def resumed(how: str, mode: Any, state_policy: Any) -> dict[str, Any]:
    """Saved in the middle, and loaded into another model: the anchor is that of the first."""
    model = sharded("blocks")
    optimizer = optimizer_for(model)
    masked(model, optimizer)
    unfreezer = Unfreezer(model, optimizer, UP_AND_DOWN, mode=mode, state_policy=state_policy, rewarm_steps=2)
    path = train(model, model, optimizer, unfreezer, range(BREAK))

    other = sharded("blocks", seed=1)
    other_optimizer = optimizer_for(other)
    if how == "dcp":
        folder = contract.FOLDER / f"{mode}_{state_policy}"
        saved = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
        dcp.save(saved, checkpoint_id=folder)
        if contract.RANK == 0:  # plain values, the same in every process
            torch.save(unfreezer.state_dict(), folder / "unfreezer.pt")
        dist.barrier()
        # DCP reads what there is a place for.
        other_optimizer.set_update_mask(params(other)["blocks.1.fc.weight"], torch.ones(8, dtype=torch.bool))
        # Before the unfreezer is made: DCP passes over what does not require grad.
        loaded = dict(zip(("model", "optimizer"), get_state_dict(other, other_optimizer), strict=True))
        dcp.load(loaded, checkpoint_id=folder)
        set_state_dict(other, other_optimizer, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])
        loaded["unfreezer"] = torch.load(folder / "unfreezer.pt", weights_only=True)
    else:
        parts = {"model": model, "optimizer": optimizer, "unfreezer": unfreezer}
        file = io.BytesIO()
        torch.save({name: each.state_dict() for name, each in parts.items()}, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=False)
        other.load_state_dict(loaded["model"])
        other_optimizer.load_state_dict(loaded["optimizer"])
    again = Unfreezer(other, other_optimizer, UP_AND_DOWN, mode=mode, state_policy=state_policy, rewarm_steps=2)
    again.load_state_dict(loaded["unfreezer"])
    path |= train(other, other, other_optimizer, again, range(BREAK, STEPS))
    return outcome(other_optimizer, path)


def back_to_the_best(mode: Any) -> dict[str, Any]:
    """A policy that copies parameters and puts them back."""
    policy = OnPlateau("loss", patience=1, restore_best=True)
    model = sharded("blocks")
    optimizer = optimizer_for(model)
    unfreezer = Unfreezer(model, optimizer, policy, mode=mode)
    return outcome(optimizer, train(model, model, optimizer, unfreezer, range(STEPS)))


# -- wrapped after the unfreezer was made --------------------------------------------------------------------


def wrapped_later(wrapper: str) -> dict[str, Any]:
    """DistributedDataParallel around a model whose closed modules would have run without a graph."""
    model = Stack(3)
    optimizer = optimizer_for(model)
    unfreezer = Unfreezer(model, optimizer, UP_AND_DOWN, mode="freeze", rewarm_steps=2)
    called: nn.Module = model
    if not contract.WORLD_IS_ONE:
        called = DistributedDataParallel(model, static_graph=wrapper == "static")
    return outcome(optimizer, train(called, model, optimizer, unfreezer, range(STEPS)))


def inner_model_of_ddp() -> dict[str, Any]:
    """The wrapper came first, and was not handed over."""
    model = Stack(3)
    called = model if contract.WORLD_IS_ONE else DistributedDataParallel(model)
    optimizer = optimizer_for(model)
    unfreezer = Unfreezer(model, optimizer, UP_AND_DOWN, mode="freeze", rewarm_steps=2)
    return outcome(optimizer, train(called, model, optimizer, unfreezer, range(STEPS)))


def error_of(run: Callable[[], Any], model: nn.Module, optimizer: fastft.AdamW) -> str:
    """The message; nothing may have been written by then."""
    before = whole(params(model))
    try:
        run()
    except ValueError as error:
        after = whole(params(model))
        if all(before[name].shape == p.shape for name, p in after.items()):  # FSDP1 puts them together to run
            assert all(torch.equal(before[name], p) for name, p in after.items())
        assert not optimizer.state
        return str(error)
    return "no error"


def refused_in_the_first_forward(wrapper: str, mode: Any) -> str:
    model = Stack(3)
    optimizer = optimizer_for(model)
    Unfreezer(model, optimizer, UP_AND_DOWN, mode=mode)
    called = wrap(model, wrapper)
    return error_of(lambda: called(part(batch(0)[0])), model, optimizer)


def refused_in_the_first_step(wrapper: str, mode: Any) -> str:
    """The model ran before it was wrapped, as in an evaluation of what it can do before training."""
    model = Stack(3)
    optimizer = optimizer_for(model)
    Unfreezer(model, optimizer, UP_AND_DOWN, mode=mode)
    model(batch(0)[0])
    called = wrap(model, wrapper)
    called(part(batch(0)[0])).sum().backward()
    return error_of(optimizer.step, model, optimizer)


def refused_at_an_opening(mode: Any) -> str:
    """Trained by each process on its own before it was wrapped."""
    model = Stack(3)
    optimizer = optimizer_for(model)
    unfreezer = Unfreezer(model, optimizer, UP_AND_DOWN, mode=mode)
    train(model, model, optimizer, unfreezer, range(1))
    called = wrap(model, "ddp")
    try:
        train(called, model, optimizer, unfreezer, range(1, 3))
    except ValueError as error:
        assert unfreezer.open_groups == ("head",)
        return str(error)
    return "no error"


def wrap(model: Stack, wrapper: str) -> nn.Module:
    if wrapper == "ddp":
        return DistributedDataParallel(model)
    if wrapper == "fsdp1":
        return FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    for block in model.blocks:
        fully_shard(block, mesh=contract.MESH)
    return fully_shard(model, mesh=contract.MESH)


def zero(mode: Any) -> dict[str, Any]:
    """Each process steps its share of the parameters, in groups of one layer each."""
    model = Stack(3)
    options: Any = {"eps": 1e-4, "anchor": "init", "anchor_decay": 2.0, "max_grad_norm": 0.5}
    groups = layerwise_lr(layer_groups(model), 1e-2, decay=1 / 1.5, weight_decay=0.1)
    for group in groups:
        group["params"] = [p for _, p in group["params"]]
    called: nn.Module = model
    optimizer: Any
    if contract.WORLD_IS_ONE:
        optimizer = fastft.AdamW(groups, **options)
    else:
        from torch.distributed.optim import ZeroRedundancyOptimizer  # warns a lot

        called = DistributedDataParallel(model)
        optimizer = ZeroRedundancyOptimizer(groups, optimizer_class=fastft.AdamW, lr=1e-2, **options)
        assert 0 < sum(len(g["params"]) for g in optimizer.optim.param_groups) < len(params(model))
    unfreezer = Unfreezer(called, optimizer, UP_AND_DOWN, mode=mode, state_policy="reset", rewarm_steps=2)
    return train(called, model, optimizer, unfreezer, range(STEPS))


# -- FullyShardedDataParallel --------------------------------------------------------------------------------


def fsdp1(layout: str) -> dict[str, Any]:
    model = Stack(3)
    called: nn.Module = model
    if not contract.WORLD_IS_ONE and layout == "layers, flat":
        called = flat_parameters("layers")
    elif not contract.WORLD_IS_ONE:
        wrapping = ModuleWrapPolicy({Block}) if layout == "blocks" else None
        called = FullyShardedDataParallel(
            model, auto_wrap_policy=wrapping, use_orig_params=True, device_id=torch.device("cpu")
        )
    options: Any = {"weight_decay": 0.1, "anchor": "init", "anchor_decay": 2.0, "max_grad_norm": 0.5}
    optimizer = fastft.AdamW(called.named_parameters(), 1e-2, eps=1e-4, **options)
    unfreezer = Unfreezer(called, optimizer, UP_AND_DOWN, mode="freeze")
    train(called, called, optimizer, unfreezer, range(STEPS))
    if contract.WORLD_IS_ONE:
        return {"end": whole(params(model))}
    with FullyShardedDataParallel.summon_full_params(called):
        found = {name.replace("_fsdp_wrapped_module.", ""): p for name, p in params(called).items()}
        return {"end": whole(found)}


def flat_parameters(layout: str) -> nn.Module:
    """Without names of what is in them: one for all, one for each block and one for the rest, one for each layer."""
    model = Stack(3)
    options: Any = {"use_orig_params": False, "device_id": torch.device("cpu")}
    if layout != "layers":
        wrapping = ModuleWrapPolicy({Block}) if layout == "blocks" else None
        return FullyShardedDataParallel(model, auto_wrap_policy=wrapping, **options)
    for i, block in enumerate(model.blocks):
        model.blocks[i] = FullyShardedDataParallel(block, **options)
    for name in ("embed", "norm", "head"):
        setattr(model, name, FullyShardedDataParallel(getattr(model, name), **options))
    return FullyShardedDataParallel(model, **options)


def flat_parameters_refused(layout: str) -> str:
    wrapper = flat_parameters(layout)
    optimizer = fastft.AdamW(wrapper.parameters())
    return error_of(lambda: Unfreezer(wrapper, optimizer, UP_AND_DOWN, mode="freeze"), wrapper, optimizer)


ALIKE: dict[str, Callable[[], dict[str, Any]]] = {
    **{
        f"schedule-{layout}-{mode}-{state_policy}": partial(schedule, layout, mode, state_policy)
        for layout, state_policies in (("blocks", STATE_POLICIES), ("root", ("keep",)))
        for mode in MODES
        for state_policy in state_policies
    },
    **{
        f"resumed-{how}-{mode}-{state_policy}": partial(resumed, how, mode, state_policy)
        for how, state_policies in (("torch", ("keep",)), ("dcp", STATE_POLICIES))
        for mode in MODES
        for state_policy in state_policies
    },
    **{f"back_to_the_best-{mode}": partial(back_to_the_best, mode) for mode in MODES},
    "wrapped_later-dynamic": partial(wrapped_later, "dynamic"),
    "wrapped_later-static": partial(wrapped_later, "static"),
    "inner_model_of_ddp": inner_model_of_ddp,
    "zero": partial(zero, "freeze"),
    "fsdp1-blocks": partial(fsdp1, "blocks"),
    "fsdp1-root": partial(fsdp1, "root"),
    "fsdp1-layers, flat": partial(fsdp1, "layers, flat"),
}
REFUSED: dict[str, Callable[[], str]] = {
    **{
        f"first_forward-{wrapper}-{mode}": partial(refused_in_the_first_forward, wrapper, mode)
        for wrapper in ("ddp", "fsdp1", "fsdp2")
        for mode in MODES
        if (wrapper, mode) != ("ddp", "freeze")
    },
    **{
        f"first_step-{wrapper}-{mode}": partial(refused_in_the_first_step, wrapper, mode)
        for wrapper in ("ddp", "fsdp2")
        for mode in MODES
    },
    **{f"opening-{mode}": partial(refused_at_an_opening, mode) for mode in MODES},
    "flat_parameters-root": partial(flat_parameters_refused, "root"),
    "flat_parameters-blocks": partial(flat_parameters_refused, "blocks"),
}


if __name__ == "__main__":
    contract.main(int(sys.argv[1]), Path(sys.argv[2]), {**ALIKE, **REFUSED})
