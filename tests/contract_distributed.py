"""The two processes of tests/optim/test_distributed.py, which starts this file as a script, once for each rank.

Each scenario trains and returns plain tensors, whole ones; rank 0 writes them to a file, and the test compares them
with a run in one process. What only one rank can see is asserted here.
"""

from __future__ import annotations

import io
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from contract_cases import net
from started import end_together, run_together
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import fastft
from fastft import Anchor

WORLD = 2
OPTIONS: dict[str, Any] = {
    "lr": 1e-2,
    "weight_decay": 0.1,
    "eps": 1e-4,
    "anchor_decay": 3.0,
    "max_grad_norm": 1.0,
    "skip_nonfinite": True,
}
BATCH = torch.linspace(-1.0, 1.0, 8 * 5).reshape(8, 5).sin()


def model() -> nn.Sequential:
    """Over two processes cut evenly (16), unevenly (17 and 3 rows) and so that the second one has nothing (1)."""
    return nn.Sequential(net(), nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 1))


def build(seed: int = 5) -> nn.Sequential:
    torch.manual_seed(seed)
    return model()


def named_optimizer(module: nn.Module, anchor: Any = "init", **options: Any) -> fastft.AdamW:
    return fastft.AdamW(module.named_parameters(), anchor=anchor, **{**OPTIONS, **options})


def restrict(module: nn.Module, optimizer: fastft.AdamW) -> None:
    """A mask of rows, one of elements, one frozen tensor; of whole shapes, whatever lies in this process."""
    params = dict(module.named_parameters())
    optimizer.set_update_mask(params["0.0.weight"], torch.arange(17) % 3 > 0)
    optimizer.set_update_mask(params["3.weight"], torch.arange(16).reshape(1, 16) % 2 == 0)
    optimizer.set_update_mask(params["1.bias"], torch.arange(16) > 6)
    optimizer.freeze(params["1.weight"])


def whole_grads(module: nn.Module, step: int) -> list[Tensor]:
    """The same in every process; the third step's are spoilt, in the last row of one parameter."""
    grads = []
    for i, (name, p) in enumerate(module.named_parameters()):
        grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * step + i))
        if step == 2 and name == "0.3.weight":
            grad[-1, 0] = float("nan")
        grads.append(grad)
    return grads


def like_param(grad: Tensor, p: Tensor) -> Tensor:
    if not isinstance(p, DTensor):
        return grad
    return distribute_tensor(grad, p.device_mesh, p.placements, src_data_rank=None)


def train(
    module: nn.Module,
    optimizer: fastft.AdamW,
    steps: Iterable[int],
    make_grad: Callable[[Tensor, Tensor], Tensor] = like_param,
) -> list[Tensor]:
    """Steps with given gradients; the norm of each."""
    norms = []
    for step in steps:
        for p, grad in zip(module.parameters(), whole_grads(module, step), strict=True):
            p.grad = make_grad(grad, p)
        optimizer.step()
        assert optimizer.grad_norm is not None
        norms.append(optimizer.grad_norm)
    return norms


@torch.no_grad()
def whole(value: Any) -> Any:
    """DTensors put together, through nested containers."""
    if isinstance(value, Tensor):
        return (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()
    if isinstance(value, dict):
        return {key: whole(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [whole(v) for v in value]
    return value


def outcome(module: nn.Module, optimizer: fastft.AdamW, norms: list[Tensor]) -> dict[str, Any]:
    state = {name: dict(optimizer.state[p]) for name, p in module.named_parameters() if p in optimizer.state}
    return whole(
        {
            "parameters": dict(module.named_parameters()),
            "state": state,
            "norms": norms,
            "skipped": optimizer.skipped_steps,
        }
    )


# -- scenarios -------------------------------------------------------------------------------------------


def sharded(seed: int = 5) -> nn.Sequential:
    module = build(seed)
    for layer in (module[0][0], module[0][3], module[1]):
        fully_shard(layer, mesh=MESH)
    return fully_shard(module, mesh=MESH)


def distributed(placement: Placement) -> nn.Sequential:
    """Every parameter with more than one dimension placed so, the rest replicated: tensor parallelism by hand."""
    module = build()
    for layer in module.modules():
        for name, p in list(layer.named_parameters(recurse=False)):
            where = placement if p.dim() > 1 else Replicate()
            setattr(layer, name, nn.Parameter(distribute_tensor(p.detach(), MESH, [where], src_data_rank=None)))
    return module


def trained(module: nn.Module, **kwargs: Any) -> dict[str, Any]:
    optimizer = named_optimizer(module)
    restrict(module, optimizer)
    return outcome(module, optimizer, train(module, optimizer, range(5), **kwargs))


def fsdp() -> dict[str, Any]:
    module = sharded()
    result = trained(module)
    assert all(isinstance(p, DTensor) and p.placements == (Shard(0),) for p in module.parameters())
    local_rows = [p.to_local().shape[0] for p in module.parameters()]  # type: ignore[attr-defined]
    assert 0 in local_rows or RANK == 0, "one process was to have nothing of some parameter"
    return result


def columns() -> dict[str, Any]:
    return trained(distributed(Shard(1)))


def replicated() -> dict[str, Any]:
    return trained(distributed(Replicate()))


def gradients_still_to_be_added_up() -> dict[str, Any]:
    """A backward pass may leave a gradient as terms that lie with different processes."""

    def partial(grad: Tensor, p: Tensor) -> Tensor:
        share = 0.25 if RANK == 0 else 0.75
        return DTensor.from_local(grad * share, p.device_mesh, [Partial()])  # type: ignore[attr-defined]

    return trained(sharded(), make_grad=partial)


def anchor_made_before_sharding() -> dict[str, Any]:
    """Whole tensors, found by name."""
    anchor = Anchor.snapshot(build())
    module = sharded()
    optimizer = named_optimizer(module, anchor)
    restrict(module, optimizer)
    return outcome(module, optimizer, train(module, optimizer, range(5)))


def anchor_in_a_file() -> dict[str, Any]:
    """Every process reads the whole file's tensors and keeps its part."""
    module = sharded()
    optimizer = named_optimizer(module, Anchor.from_safetensors(FOLDER / "base.safetensors", module))
    restrict(module, optimizer)
    return outcome(module, optimizer, train(module, optimizer, range(5)))


def importance() -> dict[str, Tensor]:
    """Whole tensors; with the options' λ some are pulled by more than an unweighted anchor may."""
    return {name: 100.0 * (37.0 * p.detach()).sin().square() for name, p in build().named_parameters()}


def weighted(module: nn.Sequential, anchor: Anchor) -> dict[str, Any]:
    optimizer = named_optimizer(module, anchor)
    restrict(module, optimizer)
    return outcome(module, optimizer, train(module, optimizer, range(5)))


def weighted_by_whole_tensors() -> dict[str, Any]:
    module = sharded()
    return weighted(module, Anchor.snapshot(module).with_importance(importance()))


def weighted_by_distributed_tensors() -> dict[str, Any]:
    """As squares of a sharded model's gradients are."""
    module = sharded()
    params = dict(module.named_parameters())
    spread = {name: like_param(f, params[name]) for name, f in importance().items()}
    return weighted(module, Anchor.snapshot(module).with_importance(spread))


def selective() -> dict[str, Any]:
    """Which a tensor that is cut to pieces refuses, before anything moves."""
    cut = sharded()
    optimizer = named_optimizer(cut, anchor_mode="selective")
    before = whole(dict(cut.named_parameters()))
    try:
        train(cut, optimizer, [0])
    except ValueError as error:
        assert "0.0.weight: anchor_mode: " in str(error) and "whole tensor in one process" in str(error), error
    else:
        raise AssertionError("took a sharded parameter")
    assert all(torch.equal(p, before[name]) for name, p in whole(dict(cut.named_parameters())).items())
    assert not optimizer.state
    module = distributed(Replicate())
    optimizer = named_optimizer(module, anchor_mode="selective")
    restrict(module, optimizer)
    return outcome(module, optimizer, train(module, optimizer, range(5)))


def resumed_from_a_state_dict() -> dict[str, Any]:
    """Each process saves and loads its own part, as with torch's optimizers."""
    module = sharded()
    optimizer = named_optimizer(module)
    restrict(module, optimizer)
    norms = train(module, optimizer, range(2))
    buffer = io.BytesIO()
    torch.save({"model": module.state_dict(), "optimizer": optimizer.state_dict()}, buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=False)
    other = sharded(seed=6)
    other_optimizer = named_optimizer(other)
    other.load_state_dict(saved["model"])
    other_optimizer.load_state_dict(saved["optimizer"])
    return outcome(other, other_optimizer, norms + train(other, other_optimizer, range(2, 5)))


def resumed_from_a_distributed_checkpoint() -> dict[str, Any]:
    """DCP: the fresh optimizer is stepped with lr 0 and zero gradients to get its state, which must move nothing."""
    module = sharded()
    optimizer = named_optimizer(module)
    restrict_without_freezing(module, optimizer)
    norms = train(module, optimizer, range(2))
    saved = dict(zip(("model", "optimizer"), get_state_dict(module, optimizer), strict=True))
    dcp.save(saved, checkpoint_id=FOLDER / "dcp")

    other = sharded()
    other_optimizer = named_optimizer(other)
    restrict_without_freezing(other, other_optimizer)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(1.0)
    before = [p.to_local().detach().clone() for p in other.parameters()]  # type: ignore[attr-defined]
    loaded = dict(zip(("model", "optimizer"), get_state_dict(other, other_optimizer), strict=True))
    for p, b in zip(other.parameters(), before, strict=True):
        assert torch.equal(p.to_local(), b), "making the state moved a parameter"  # type: ignore[attr-defined]
    dcp.load(loaded, checkpoint_id=FOLDER / "dcp")
    set_state_dict(other, other_optimizer, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])
    return outcome(other, other_optimizer, norms + train(other, other_optimizer, range(2, 5)))


def restrict_without_freezing(module: nn.Module, optimizer: fastft.AdamW) -> None:
    params = dict(module.named_parameters())
    optimizer.set_update_mask(params["0.0.weight"], torch.arange(17) % 3 > 0)
    optimizer.set_update_mask(params["3.weight"], torch.arange(16).reshape(1, 16) % 2 == 0)


def fsdp_backward() -> dict[str, Any]:
    """Gradients of a real backward pass, each process with its half of the batch."""
    module = sharded()
    return backward_run(module, module, named_optimizer(module))


def refuse_anchors_from_before_ddp() -> None:
    """The wrapper gives both processes the weights of the first; the anchor of the second is of others."""
    module = build(5 + RANK)
    snapshot = Anchor.snapshot({**dict(module.named_parameters()), "1.weight": torch.ones(16, 3)}.items())
    optimizers = {anchor: named_optimizer(module, kept) for anchor, kept in (("init", "init"), ("snapshot", snapshot))}
    wrapped = DistributedDataParallel(module)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    wrapped(BATCH).square().mean().backward()
    for anchor, optimizer in optimizers.items():
        try:
            optimizer.step()
        except ValueError as error:
            assert str(error).startswith("anchor: expected the same weights in every process"), error
            assert ("1.weight" in str(error)) == (anchor == "init") and "after DistributedDataParallel" in str(error)
        else:
            raise AssertionError(f"{anchor}: stepped")
    assert all(torch.equal(p, before[name]) for name, p in module.named_parameters())


def ddp_backward() -> dict[str, Any]:
    refuse_anchors_from_before_ddp()
    module = build()
    optimizer = named_optimizer(module)
    return backward_run(DistributedDataParallel(module), module, optimizer)


def backward_run(called: nn.Module, module: nn.Module, optimizer: fastft.AdamW) -> dict[str, Any]:
    part = BATCH if WORLD_IS_ONE else BATCH.chunk(WORLD)[RANK]
    norms = []
    for _ in range(5):
        optimizer.zero_grad()
        called(part).square().mean().backward()
        optimizer.step()
        norms.append(optimizer.grad_norm)
    return outcome(module, optimizer, norms)


def state_spread_by_zero() -> dict[str, Any]:
    """ZeroRedundancyOptimizer makes an optimizer of the class it is given, over a part of the parameters."""
    from torch.distributed.optim import ZeroRedundancyOptimizer  # warns a lot

    module = build()
    optimizer = ZeroRedundancyOptimizer(
        module.parameters(), optimizer_class=fastft.AdamW, anchor="init", **{k: OPTIONS[k] for k in LOCAL_OPTIONS}
    )
    for step in (0, 1, 3, 4):  # without a norm no step is skipped
        for p, grad in zip(module.parameters(), whole_grads(module, step), strict=True):
            p.grad = grad
        optimizer.step()
    assert type(optimizer.optim) is fastft.AdamW
    assert 0 < len(optimizer.optim.state) < len(list(module.parameters()))
    return whole({"parameters": dict(module.named_parameters())})


# A norm of one process's part of the parameters would not be the norm.
LOCAL_OPTIONS = ("lr", "weight_decay", "eps", "anchor_decay")

SCENARIOS: dict[str, Callable[[], dict[str, Any]]] = {
    f.__name__: f
    for f in (
        fsdp,
        columns,
        replicated,
        gradients_still_to_be_added_up,
        anchor_made_before_sharding,
        anchor_in_a_file,
        weighted_by_whole_tensors,
        weighted_by_distributed_tensors,
        selective,
        resumed_from_a_state_dict,
        resumed_from_a_distributed_checkpoint,
        fsdp_backward,
        ddp_backward,
        state_spread_by_zero,
    )
}

RANK = 0
WORLD_IS_ONE = True
MESH: DeviceMesh
FOLDER: Path


def run_in_two_processes(script: str, folder: Path) -> dict[str, list[Any]]:
    """The results of all scenarios of a script like this one, by their names, one for each rank."""
    paths = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "GLOO_SOCKET_IFNAME": "lo"}
    logs = [folder / f"log_{rank}.txt" for rank in range(WORLD)]
    run_together(([sys.executable, script, str(rank), str(folder)], environment, log) for rank, log in enumerate(logs))
    ranks = [torch.load(folder / f"results_{rank}.pt", weights_only=False) for rank in range(WORLD)]
    return {name: [rank[name] for rank in ranks] for name in ranks[0]}


def main(rank: int, folder: Path, scenarios: Mapping[str, Callable[[], dict[str, Any]]] = SCENARIOS) -> None:
    global RANK, WORLD_IS_ONE, MESH, FOLDER
    RANK, WORLD_IS_ONE, FOLDER = rank, False, folder
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), WORLD)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD)
    MESH = init_device_mesh("cpu", (WORLD,))
    results: dict[str, Any] = {}
    for name, scenario in scenarios.items():
        try:
            results[name] = scenario()
        except Exception:  # the other scenarios shall still be heard
            results[name] = traceback.format_exc()
    torch.save(results, folder / f"results_{rank}.pt")
    end_together()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
