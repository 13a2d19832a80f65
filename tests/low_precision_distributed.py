"""The two processes of tests/optim/test_low_precision_distributed.py: weights and moments in few bits, in shards.

Started as a script, once for each rank, as ``contract_distributed`` is. Each scenario returns whole tensors, whose bits
are to be those of a run in one process.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import contract_distributed as contract
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from contract_distributed import like_param
from low_precision_runs import SETTINGS
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

import fastft
from fastft.optim import full_precision_state, master_weights

CHOSEN = ("split16", "split8_stochastic", "stochastic", "8bit_split8_stochastic", "8bit_float32")
# Without clipping: two processes' sum of squares may differ from one's in the last bit.
OPTIONS: dict[str, Any] = {"lr": 1e-3, "weight_decay": 0.1, "anchor_decay": 30.0, "anchor": "init"}


def build(setting: str, seed: int = 5) -> nn.Sequential:
    """Rows cut evenly and unevenly, of more and less than a block; one that the second process has nothing of."""
    torch.manual_seed(seed)
    dtype = SETTINGS[setting][0]
    return nn.Sequential(
        nn.Linear(300, 31, dtype=dtype), nn.Linear(64, 64, bias=False, dtype=dtype), nn.Linear(16, 1, dtype=dtype)
    )


def make(module: nn.Module, setting: str) -> fastft.AdamW:
    optimizer = fastft.AdamW(module.named_parameters(), **OPTIONS, **SETTINGS[setting][1])
    params = dict(module.named_parameters())
    optimizer.set_update_mask(params["0.weight"], torch.arange(31) % 3 > 0)
    optimizer.set_update_mask(params["1.weight"], torch.arange(64 * 64).reshape(64, 64) % 5 > 1)
    return optimizer


def train(module: nn.Module, optimizer: fastft.AdamW, steps: Iterable[int]) -> None:
    for step in steps:
        for i, p in enumerate(module.parameters()):
            grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * step + i)) * 0.01
            p.grad = like_param(grad.to(p.dtype), p)
        optimizer.step()


@torch.no_grad()
def whole(tensor: Tensor) -> Tensor:
    """A copy, put together; uint16 as int32, since no process group sends uint16."""
    wide = tensor.to(torch.int32) if tensor.dtype == torch.uint16 else tensor
    return (wide.full_tensor() if isinstance(wide, DTensor) else wide).detach().clone()


def outcome(module: nn.Module, optimizer: fastft.AdamW) -> dict[str, Any]:
    found = {name: whole(p) for name, p in module.named_parameters()}
    for name, p in module.named_parameters():
        found |= {f"{name}.{key}": whole(value) for key, value in optimizer.state[p].items()}
    masters = master_weights(module, optimizer)
    assert all(isinstance(masters[name], DTensor) == isinstance(p, DTensor) for name, p in module.named_parameters())
    found |= {f"master of {name}": whole(w) for name, w in masters.items()}
    exported = full_precision_state(optimizer)["state"]
    return found | {f"exported {i}.{key}": whole(value) for i, kept in exported.items() for key, value in kept.items()}


def trained(module: nn.Module, setting: str, steps: int) -> fastft.AdamW:
    """The optimizer, after the first steps."""
    optimizer = make(module, setting)
    train(module, optimizer, range(steps))
    return optimizer


def in_one_process(setting: str) -> dict[str, Any]:
    module = build(setting)
    optimizer = trained(module, setting, 4)
    return outcome(module, optimizer)


# -- scenarios -------------------------------------------------------------------------------------------


def sharded(setting: str, seed: int = 5) -> nn.Sequential:
    module = build(setting, seed)
    for layer in module:
        fully_shard(layer, mesh=contract.MESH)
    return fully_shard(module, mesh=contract.MESH)


def distributed(setting: str, placement: Placement) -> nn.Sequential:
    module = build(setting)
    for layer in module.modules():
        for name, p in list(layer.named_parameters(recurse=False)):
            where = placement if p.dim() > 1 else Replicate()
            whole_one = distribute_tensor(p.detach(), contract.MESH, [where], src_data_rank=None)
            setattr(layer, name, nn.Parameter(whole_one))
    return module


def fsdp(setting: str) -> dict[str, Any]:
    module = sharded(setting)
    optimizer = trained(module, setting, 4)
    for p in module.parameters():
        for key, value in optimizer.state[p].items():
            if key != "step":
                assert value.placements == (Shard(0),), key
                assert value.to_local().shape[0] == p.to_local().shape[0], key  # type: ignore[attr-defined]
    return outcome(module, optimizer)


def replicated(setting: str) -> dict[str, Any]:
    module = distributed(setting, Replicate())
    optimizer = trained(module, setting, 4)
    return outcome(module, optimizer)


def columns(setting: str) -> dict[str, Any]:
    """Which 8-bit moments refuse, before anything is made."""
    module = distributed(setting, Shard(1))
    if "8bit" in setting:
        try:
            make(module, setting)
        except ValueError as error:
            said = '0.weight: state_dtype: expected, with "8bit", a DTensor of which each process holds whole rows'
            assert str(error).startswith(said) and "[Shard(dim=1)]" in str(error), error
            return in_one_process(setting)
        raise AssertionError("took columns")
    optimizer = trained(module, setting, 4)
    return outcome(module, optimizer)


def written_in_one_process(setting: str) -> dict[str, Any]:
    """Only one process's shard is written by somebody else; its sums are its own."""
    module = sharded(setting)
    optimizer = trained(module, setting, 2)
    for p in module.parameters():
        p.to_local().data.mul_(1.0 if contract.RANK == 0 else 1.5)  # type: ignore[attr-defined]
    masters = master_weights(module, optimizer)
    for name, p in module.named_parameters():
        if contract.RANK == 1 and name != "0.weight" and name != "1.weight":  # which have masked elements
            assert torch.equal(masters[name].to_local(), p.to_local().float()), name  # type: ignore[attr-defined]
    train(module, optimizer, range(2, 3))
    return {}


def resumed_from_a_state_dict(setting: str) -> dict[str, Any]:
    module = sharded(setting)
    optimizer = trained(module, setting, 2)
    path = contract.FOLDER / f"{setting}_{contract.RANK}.pt"
    torch.save({"model": module.state_dict(), "optimizer": optimizer.state_dict()}, path)
    saved = torch.load(path, weights_only=False)
    other = sharded(setting, seed=6)
    resumed = make(other, setting)
    other.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    train(other, resumed, range(2, 4))
    return outcome(other, resumed)


def resumed_from_a_distributed_checkpoint(setting: str) -> dict[str, Any]:
    module = sharded(setting)
    optimizer = trained(module, setting, 2)
    saved = dict(zip(("model", "optimizer"), get_state_dict(module, optimizer), strict=True))
    dcp.save(saved, checkpoint_id=contract.FOLDER / f"dcp_{setting}")
    other = sharded(setting)
    resumed = make(other, setting)
    loaded = dict(zip(("model", "optimizer"), get_state_dict(other, resumed), strict=True))
    dcp.load(loaded, checkpoint_id=contract.FOLDER / f"dcp_{setting}")
    set_state_dict(other, resumed, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])
    train(other, resumed, range(2, 4))
    return outcome(other, resumed)


def resumed_from_whole_tensors(setting: str) -> dict[str, Any]:
    """Gathered into one state dict and spread again."""
    module = sharded(setting)
    optimizer = trained(module, setting, 2)
    options = StateDictOptions(full_state_dict=True)
    saved = get_state_dict(module, optimizer, options=options)
    assert not any(isinstance(value, DTensor) for kept in saved[1]["state"].values() for value in kept.values())
    other = sharded(setting, seed=6)
    # The anchor is not DCP's: it is that of the first weights.
    with torch.no_grad():
        for p, first in zip(other.parameters(), sharded(setting).parameters(), strict=True):
            p.copy_(first)
    resumed = make(other, setting)
    set_state_dict(other, resumed, model_state_dict=saved[0], optim_state_dict=saved[1], options=options)
    train(other, resumed, range(2, 4))
    return outcome(other, resumed)


def resumed_from_the_first_process(setting: str) -> dict[str, Any]:
    """The others have read nothing; DCP sends them their parts."""
    module = sharded(setting)
    optimizer = trained(module, setting, 2)
    weights, moments = get_state_dict(module, optimizer, options=StateDictOptions(full_state_dict=True))
    other = sharded(setting, seed=6)
    resumed = make(other, setting)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    mine = contract.RANK == 0
    set_model_state_dict(other, weights if mine else {}, options=options)
    set_optimizer_state_dict(other, resumed, moments if mine else {}, options=options)
    train(other, resumed, range(2, 4))
    return outcome(other, resumed)


def shares_of_zero(setting: str) -> dict[str, Any]:
    """ZeroRedundancyOptimizer: random rounding by a parameter's place among all, not among a process's own."""
    from torch.distributed.optim import ZeroRedundancyOptimizer  # warns a lot

    def start(seed: int, **options: Any) -> tuple[nn.Module, Any, fastft.AdamW]:
        module = build(setting, seed)
        given = {**OPTIONS, **SETTINGS[setting][1], "skip_nonfinite": True, **options}
        zero = ZeroRedundancyOptimizer(module.parameters(), optimizer_class=fastft.AdamW, **given)
        own = zero.optim
        for p, mask in (
            (module[0].weight, torch.arange(31) % 3 > 0),
            (module[1].weight, torch.arange(64 * 64).reshape(64, 64) % 5 > 1),
        ):
            if any(p is known for group in own.param_groups for known in group["params"]):
                own.set_update_mask(p, mask)
        return module, zero, own

    module, zero, own = start(5)
    train(module, zero, range(2))
    for p in module.parameters():
        p.grad = torch.full_like(p, float("nan"))
    zero.step()
    zero.consolidate_state_dict(0)
    saved = [zero.state_dict() if contract.RANK == 0 else None]
    dist.broadcast_object_list(saved, 0)
    other_seed = {"rounding_seed": 11} if "stochastic" in setting else {}
    other, resumed, theirs = start(6, **other_seed)
    other.load_state_dict(module.state_dict())
    resumed.load_state_dict(saved[0])
    train(other, resumed, range(2, 4))
    assert theirs.skipped_steps == own.skipped_steps == 1, theirs.skipped_steps
    assert not other_seed or theirs._precision.rounding_seed == own._precision.rounding_seed != 11
    return {name: whole(p) for name, p in other.named_parameters()}


def another_format(setting: str) -> dict[str, Any]:
    """A sharded float32 state is brought into the setting's format, shard by shard: as the whole one is."""

    def run(first: nn.Module, second: nn.Module) -> dict[str, Any]:
        plain = fastft.AdamW(first.named_parameters(), **OPTIONS, state_dtype=torch.float32)
        train(first, plain, range(2))
        second.load_state_dict(first.state_dict())
        optimizer = make(second, setting)
        optimizer.load_state_dict(plain.state_dict())
        train(second, optimizer, range(2, 4))
        found = outcome(second, optimizer)
        back = fastft.AdamW(second.named_parameters(), **OPTIONS)
        back.load_state_dict(optimizer.state_dict())
        moments = {f"back {n}": whole(back.state[p]["exp_avg_sq"]) for n, p in second.named_parameters()}
        return found | moments

    if contract.WORLD_IS_ONE:
        return run(build(setting), build(setting, 6))
    return run(sharded(setting), sharded(setting, 6))


KINDS = (fsdp, replicated, columns, resumed_from_a_state_dict, resumed_from_a_distributed_checkpoint)
BY_MORE_WAYS = (
    resumed_from_whole_tensors,
    resumed_from_the_first_process,
    shares_of_zero,
    another_format,
    written_in_one_process,
)
SCENARIOS: dict[str, Callable[[], dict[str, Any]]] = {
    f"{kind.__name__}-{setting}": partial(kind, setting) for kind in (*KINDS, *BY_MORE_WAYS) for setting in CHOSEN
}

if __name__ == "__main__":
    contract.main(int(sys.argv[1]), Path(sys.argv[2]), SCENARIOS)
