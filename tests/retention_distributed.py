"""The processes of tests/retention/test_sharded.py, which starts this file as a script, once for each rank.

Every scenario distributes the same model in its own way and returns plain values, which the test compares with those of
the model in one piece. What only one rank can see is asserted here.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import contract_distributed as contract
import numpy as np
import torch
from contract_distributed import like_param, run_in_two_processes, whole
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from fastft import Anchor
from fastft.retention import best_alpha, drift_report, interpolate_

TOKENS = torch.arange(12).reshape(4, 3) % 7
GROUPS = {"embeddings": "table", "body": ["up", "down", "scale"], "head": "head"}
ALPHAS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)


class Model(nn.Module):
    """With a tied table; two processes cannot share 7, 5 or 9 rows evenly, and of a single one only one has it."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 5)
        self.up = nn.Linear(5, 18)  # 9 rows for each of two tensor parallel processes
        self.down = nn.Linear(18, 5)
        self.scale = nn.Parameter(torch.tensor([0.7]))
        self.output = nn.Linear(5, 7, bias=False)
        self.output.weight = self.table.weight
        self.head = nn.Linear(5, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens)
        x = x + self.scale * self.down(self.up(x).tanh())
        return self.output(x) + self.head(x)


def build() -> Model:
    torch.manual_seed(2)
    return Model()


@torch.no_grad()
def tune(module: nn.Module) -> nn.Module:
    """As fine-tuning would move it, whichever way it is distributed."""
    for i, p in enumerate(module.parameters()):
        step = 0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
        p.add_(like_param(step, p))
    return module


# -- ways to distribute it -------------------------------------------------------------------------------------


def in_one_piece(module: nn.Module) -> nn.Module:
    return module


def fsdp(module: nn.Module) -> nn.Module:
    """``fully_shard``, first of its layers ``up`` and ``down``."""
    for layer in (module.up, module.down):
        fully_shard(layer, mesh=contract.MESH)
    return fully_shard(module, mesh=contract.MESH)


def hybrid(module: Model) -> nn.Module:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    fully_shard(module.up, mesh=mesh)
    return fully_shard(module, mesh=mesh)


def fsdp_and_tensor_parallel(module: Model) -> nn.Module:
    """Two meshes: what tensor parallelism leaves alone is cut over the first dimension only."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    parallelize_module(module, mesh["tensor"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    for layer in (module.up, module.down):
        fully_shard(layer, mesh=mesh["data"])
    module = fully_shard(module, mesh=mesh["data"])
    kinds = {name: [type(q).__name__ for q in p.placements] for name, p in module.named_parameters()}
    assert kinds["up.weight"] == ["_StridedShard", "Shard"]
    assert kinds["down.bias"] == ["Shard", "Replicate"]
    assert kinds["table.weight"] == ["Shard"]
    return module


def by_hand(module: Model) -> nn.Module:
    """In one model what is cut, what is copied, and what is no DTensor at all."""
    if contract.WORLD == 2:
        mesh, placed = contract.MESH, {"up.weight": [Shard(1)], "up.bias": [Shard(0)], "down.weight": [Replicate()]}
    else:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "inner"))
        placed = {
            "up.weight": [Shard(0), Shard(1)],
            "up.bias": [Shard(0), Shard(0)],
            "down.weight": [Shard(1), Replicate()],
            "down.bias": [Replicate(), Replicate()],
        }
        distribute(module, "scale", mesh["inner"], [Shard(0)])
    for name, placements in placed.items():
        distribute(module, name, mesh, placements)
    return module


def distribute(module: nn.Module, name: str, mesh: Any, placements: list[Any]) -> None:
    p = module.get_parameter(name)
    owner, _, own = name.rpartition(".")
    spread = distribute_tensor(p.detach(), mesh, placements, src_data_rank=None)
    setattr(module.get_submodule(owner), own, nn.Parameter(spread))


# -- the anchors -----------------------------------------------------------------------------------------------

KINDS = ("whole", "sharded", "whole in bfloat16", "sharded in bfloat16", "file")


def prepared(distributed: Callable[[Model], nn.Module], kind: str) -> tuple[nn.Module, Anchor]:
    """The model, distributed and tuned, and its anchor, which does not have the head."""
    options: dict[str, Any] = {"exclude": "head", "dtype": torch.bfloat16 if "bfloat16" in kind else None}
    module = build()
    anchor = Anchor.snapshot(module, **options)
    spread = distributed(module)
    if "sharded" in kind:
        anchor = Anchor.snapshot(spread, **options)
    elif kind == "file":
        anchor = Anchor.from_safetensors(contract.FOLDER / "base.safetensors", spread, exclude="head")
    return tune(spread), anchor


# -- scenarios -------------------------------------------------------------------------------------------------


def parts(module: nn.Module) -> list[Tensor]:
    """Copies of this process's parts."""
    with torch.no_grad():
        return [(p.to_local() if isinstance(p, DTensor) else p).clone() for p in module.parameters()]


def unchanged(module: nn.Module, before: list[Tensor]) -> bool:
    return all(
        torch.equal(a.view(torch.int32), b.view(torch.int32)) for a, b in zip(parts(module), before, strict=True)
    )


def measured(distributed: Callable[[Model], nn.Module], kind: str) -> dict[str, Any]:
    """The report, and the weights at two alphas."""
    module, anchor = prepared(distributed, kind)
    before = parts(module)
    meshes = {p.device_mesh for p in module.parameters() if isinstance(p, DTensor)}
    with CommDebugMode() as sent:
        report = drift_report(module, anchor, GROUPS)
    assert sent.get_total_counts() == sum(mesh.ndim for mesh in meshes), sent.get_comm_counts()
    assert unchanged(module, before)
    found: dict[str, Any] = {"report": dataclasses.asdict(report)}
    with CommDebugMode() as sent:
        blend = interpolate_(module, anchor, 0.3, keep_on="cpu")
    found["0.3"] = whole(dict(module.named_parameters()))
    assert [blend._tuned[found.name].shape for found in blend._anchored] == [part.shape for part in before[:6]]
    with sent:
        blend.set(0.0)
    found["0"] = whole(dict(module.named_parameters()))
    with sent:
        blend.undo()
    assert sent.get_total_counts() == 0, sent.get_comm_counts()
    assert unchanged(module, before)
    return found


def searched(distributed: Callable[[Model], nn.Module]) -> dict[str, Any]:
    """By forward passes, after which ``fully_shard`` keeps the root module's parameters gathered."""
    module, anchor = prepared(distributed, "sharded")
    before = parts(module)
    with torch.no_grad():
        base, tuned = build()(TOKENS), tune(build())(TOKENS)

    @torch.no_grad()
    def evaluate(model: nn.Module) -> dict[str, Tensor]:
        logits = model(TOKENS)
        return {
            "source": -(logits - base).square().sum((1, 2)),
            "target": -(logits - tuned).square().sum((1, 2)),
        }

    search = best_alpha(module, anchor, evaluate, ALPHAS, source_weight=0.4)
    assert unchanged(module, before)
    report = drift_report(module, anchor, GROUPS)
    with torch.no_grad():
        kept = module(TOKENS)
    if distributed in (fsdp, hybrid, fsdp_and_tensor_parallel):
        assert not isinstance(module.scale, DTensor), "it was to be kept gathered"
    assert drift_report(module, anchor, GROUPS) == report
    with torch.no_grad(), interpolate_(module, anchor, 0.5):
        blended = module(TOKENS)
    assert unchanged(module, before)
    return {
        "alpha": search.alpha,
        "source": torch.tensor(np.stack([point.source for point in search.points])),
        "target": torch.tensor(np.stack([point.target for point in search.points])),
        "tuned": kept,
        "blended": blended,
    }


def said(call: Callable[[], Any]) -> str:
    """The error, or that there was none."""
    try:
        call()
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def disagreements() -> dict[str, str]:
    """Every process is to hear of them, and the model to stay as it is."""
    module, anchor = prepared(fsdp, "sharded")
    before = parts(module)
    mine = anchor if contract.RANK == 0 else Anchor.snapshot([("other", torch.ones(2))])
    number, items = float(contract.RANK), torch.arange(3.0).roll(contract.RANK)
    searches: dict[str, tuple[Anchor, Any, dict[str, Any]]] = {
        "numbers": (anchor, lambda model: {"source": 0.5, "target": 0.25 + number}, {}),
        "items": (anchor, lambda model: {"source": items, "target": 0.5}, {}),
        "nothing": (anchor, lambda model: None if contract.RANK else {"source": 0.5, "target": 0.5}, {}),
        "rules": (anchor, lambda model: {"source": 0.5, "target": 0.5}, {"min_target": 0.25 + number}),
        "anchors": (mine, lambda model: {"source": 0.5, "target": 0.5}, {}),
    }
    heard = {name: said(partial(best_alpha, module, a, f, **rule)) for name, (a, f, rule) in searches.items()}
    heard["drift"] = said(lambda: drift_report(module, mine, GROUPS))
    assert unchanged(module, before)
    return heard


def fsdp1() -> dict[str, Any]:
    """Its pieces are refused, also where the anchor has the same; whole parameters are not."""
    module = FullyShardedDataParallel(
        build(), process_group=contract.MESH.get_group(), use_orig_params=True, device_id=torch.device("cpu")
    )
    pieces = Anchor.snapshot(module)
    heard: dict[str, Any] = {
        "drift": said(lambda: drift_report(module, pieces, GROUPS)),
        "blend": said(lambda: interpolate_(module, pieces, 0.5)),
        "search": said(lambda: best_alpha(module, pieces, lambda model: {"source": 0.5, "target": 0.5})),
    }
    with FullyShardedDataParallel.summon_full_params(module):
        tune(module)
        heard["report"] = dataclasses.asdict(drift_report(module, Anchor.snapshot(build(), exclude="head"), GROUPS))
    return heard


WAYS: dict[int, tuple[Callable[[Model], nn.Module], ...]] = {
    2: (fsdp, by_hand),
    4: (hybrid, fsdp_and_tensor_parallel, by_hand),
}
MODELS = {2: (fsdp,), 4: (hybrid, fsdp_and_tensor_parallel)}  # that can run forward


def scenarios(world: int) -> dict[str, Callable[[], dict[str, Any]]]:
    cases: dict[str, Callable[[], dict[str, Any]]] = {
        f"{way.__name__}, {kind}": partial(measured, way, kind) for way in WAYS[world] for kind in KINDS
    }
    cases |= {f"{way.__name__}, search": partial(searched, way) for way in MODELS[world]}
    return cases | ({"disagreements": disagreements, "fsdp1": fsdp1} if world == 2 else {})


def run_in_processes(world: int, folder: Path) -> dict[str, list[Any]]:
    """The results of the scenarios for so many processes, by their names, one for each rank."""
    environment = {"WORLD_SIZE": str(world), "OMP_NUM_THREADS": "1"}
    with mock.patch.object(contract, "WORLD", world), mock.patch.dict(os.environ, environment):
        return run_in_two_processes(__file__, folder)


if __name__ == "__main__":
    contract.WORLD = int(os.environ["WORLD_SIZE"])
    contract.main(int(sys.argv[1]), Path(sys.argv[2]), scenarios(contract.WORLD))
