"""The processes of tests/retention/test_sharded_siblings.py, which starts this file as a script, once for each rank.

Fisher information, masks, a fitted head and frozen copies of one model that is distributed in several ways. Scenarios
return plain values, which the test compares with those of the model in one piece; the rest is asserted here.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import contract_distributed as contract
import torch
from contract_distributed import run_in_two_processes, whole
from retention_distributed import fsdp, in_one_piece, parts, said, unchanged
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import fastft
from fastft import Anchor
from fastft.retention import Fisher, FrozenBase, MoFO, child_tuning_, distillation_loss, estimate_fisher, fit_head_

ROWS, CLASSES = 7, 3
MODES: tuple[Literal["exact", "sampled", "empirical"], ...] = ("exact", "sampled", "empirical")


class Model(nn.Module):
    """A classifier with a tied table; of 7, 5, 3 and 1 rows two processes cannot have the same number."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 5)
        self.up = nn.Linear(5, 18)
        self.down = nn.Linear(18, 5)
        self.scale = nn.Parameter(torch.tensor([0.7]))
        self.output = nn.Linear(5, 7, bias=False)
        self.output.weight = self.table.weight
        self.mix = nn.Linear(7, 6)
        self.dropout = nn.Dropout(0.4)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens).mean(1)
        x = x + self.scale * self.down(self.up(x).tanh())
        return self.head(self.dropout(self.mix(self.output(x)).tanh()))  # type: ignore[no-any-return]

    def classify(self, tokens: Tensor) -> Tensor:
        """The same by another name."""
        return self.forward(tokens)


def build() -> Model:
    torch.manual_seed(2)
    model = Model().double()
    model.up.weight.requires_grad_(False)  # no Fisher information is estimated of it
    return model


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(7, (ROWS, 4), generator=generator), torch.arange(ROWS) % CLASSES


def batches() -> list[tuple[Tensor, Tensor]]:
    tokens, labels = data()
    return list(zip(tokens.split(3), labels.split(3), strict=True))


# -- ways to distribute it -------------------------------------------------------------------------------------


def fsdp_of_the_model_only(model: Model) -> nn.Module:
    return fully_shard(model, mesh=contract.MESH)


def tensor_parallel(model: Model) -> nn.Module:
    return split(model, contract.MESH)


def split(model: Model, mesh: Any) -> nn.Module:
    """The head by its inputs, so that they reach it as DTensors."""
    plan = {"up": ColwiseParallel(), "down": RowwiseParallel(), "mix": ColwiseParallel(), "head": RowwiseParallel()}
    return parallelize_module(model, mesh, plan)


def fsdp_and_tensor_parallel(model: Model, shape: tuple[int, int]) -> nn.Module:
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("data", "tensor"))
    split(model, mesh["tensor"])
    for layer in (model.up, model.down, model.head):
        fully_shard(layer, mesh=mesh["data"])
    return fully_shard(model, mesh=mesh["data"])


def ddp(model: Model) -> nn.Module:
    return DistributedDataParallel(model)


def fsdp1(model: Model, **options: Any) -> nn.Module:
    return FullyShardedDataParallel(
        model, process_group=contract.MESH.get_group(), device_id=torch.device("cpu"), **options
    )


WAYS: dict[str, Callable[[Model], nn.Module]] = {
    "fsdp": fsdp,
    "fsdp of the model only": fsdp_of_the_model_only,
    "tensor parallel": tensor_parallel,
    "fsdp over tensor parallel": partial(fsdp_and_tensor_parallel, shape=(1, 2)),
    "fsdp over one tensor parallel process": partial(fsdp_and_tensor_parallel, shape=(2, 1)),
    "ddp": ddp,
}


@torch.no_grad()
def evaluated(model: nn.Module) -> nn.Module:
    """The model after a forward pass, from which ``fully_shard`` keeps the root's parameters gathered."""
    model(data()[0])
    assert not isinstance(model, FSDPModule) or not isinstance(model.scale, DTensor), "they were to be kept gathered"
    return model


def plain(names: dict[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors by the names of the model without a wrapper."""
    return {name.removeprefix("module."): tensor for name, tensor in whole(names).items()}


# -- Fisher information and masks ------------------------------------------------------------------------------


def fishers(distributed: Callable[[Model], nn.Module]) -> dict[str, Any]:
    """Of each mode; and that nothing else has changed."""
    model = evaluated(distributed(build()))
    model.train()
    before = parts(distributed(build()))
    found: dict[str, Any] = {}
    for mode in MODES:
        fisher = estimate_fisher(model, batches(), mode=mode, seed=4)
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        assert list(fisher) == list(parameters)
        for name, p in parameters.items():
            assert type(fisher[name]) is type(p.detach())
            assert not isinstance(p, DTensor) or fisher[name].placements == p.placements  # type: ignore[attr-defined]
            assert p.grad is None
        found[mode] = plain(dict(fisher))
        found[f"{mode}, normalized"] = plain(dict(fisher.normalized()))
    assert unchanged(model, before)
    assert model.training and model.get_submodule("module" if distributed is ddp else "").dropout.training
    assert Anchor.snapshot(parameters.items()).with_importance(fisher).weighted
    return found


def fishers_by_other_ways_forward() -> dict[str, Any]:
    """Methods and losses of one's own, the second of which leaves a layer out."""
    model = fsdp(build())
    register_fsdp_forward_method(model, "classify")
    by_method = estimate_fisher(model, batches(), forward=lambda model, batch: model.classify(batch[0]))  # type: ignore[operator]
    by_loss = estimate_fisher(
        model,
        batches(),
        mode="empirical",
        loss=lambda model, batch: -model(batch[0]).log_softmax(-1)[0, batch[1][0]],
    )
    return {"exact": plain(dict(by_method)), "empirical": plain(dict(by_loss))}


def trains_as_before(distributed: Callable[[Model], nn.Module]) -> dict[str, Any]:
    """Backward passes after an estimate: gradients arrive in the parameters, as means over the processes."""
    model = distributed(build())
    estimate_fisher(model, batches())
    model.eval()
    tokens, labels = data()
    mine = slice(contract.RANK, 6, contract.WORLD) if distributed is not in_one_piece else slice(6)
    nn.functional.cross_entropy(model(tokens[mine]), labels[mine]).backward()
    return {"grads": plain({name: p.grad for name, p in model.named_parameters() if p.grad is not None})}


def masks(distributed: Callable[[Model], nn.Module]) -> dict[str, Any]:
    """By the model's own Fisher information, in both scopes, and one that is whole; then two steps."""
    model = distributed(build())
    optimizer = fastft.AdamW(
        model.named_parameters(), lr=0.01, weight_decay=0.1, anchor="init", anchor_decay=3.0, max_grad_norm=1.0
    )
    fisher = estimate_fisher(model, batches())
    found: dict[str, Any] = {}
    found["tensor"] = plain(child_tuning_(optimizer, evaluated(model), fisher, 0.2, scope="tensor"))
    found["whole"] = plain(child_tuning_(optimizer, model, whole(dict(fisher)), 0.4))
    found["model"] = plain(child_tuning_(optimizer, model, fisher, 0.4))
    for step in range(2):
        for i, p in enumerate(model.parameters()):
            grad = torch.randn(p.shape, dtype=p.dtype, generator=torch.Generator().manual_seed(100 * step + i))
            p.grad = contract.like_param(grad, p)
        optimizer.step()
    return found | {"parameters": plain(dict(model.named_parameters()))}


# -- the head --------------------------------------------------------------------------------------------------


def fitted(distributed: Callable[[Model], nn.Module]) -> dict[str, Any]:
    """Also what the model answers afterwards."""
    model = evaluated(distributed(build()))
    prefix = "module." if distributed is ddp else ""
    result = fit_head_(model, f"{prefix}head", batches(), l2=0.01)
    if isinstance(model, FSDPModule):
        model.reshard()  # what was written elsewhere is lost now
    parameters = plain(dict(model.named_parameters()))
    model.eval()
    with torch.no_grad():
        return {"fit": result._asdict(), "parameters": parameters, "logits": whole(model(data()[0]))}


# -- frozen copies ---------------------------------------------------------------------------------------------


def frozen(distributed: Callable[[Model], nn.Module]) -> dict[str, Any]:
    """The copy's outputs after the model has moved, and their distance; cut afterwards where it must be whole first."""
    if distributed is fsdp:
        model: nn.Module = build()
        base = FrozenBase(model)
        fully_shard(base.module, mesh=contract.MESH)
        assert all(isinstance(p, DTensor) for p in base.module.parameters())
        model = fsdp(model)  # type: ignore[arg-type]
    else:
        model = distributed(build())
        base = FrozenBase(model)
    model.eval()
    tokens = data()[0]
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)
    outputs = model(tokens)
    loss = distillation_loss(outputs, base(tokens), kind="logits")
    loss.backward()
    assert not any(p.requires_grad or p.grad is not None for p in base.module.parameters())
    grads = plain({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    return {"base": base(tokens), "loss": loss.detach(), "grads": grads}


def distances(spread: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """Of outputs as tensor parallelism can leave them: in parts, some on each process."""
    base, outputs = torch.sin(torch.arange(28.0, dtype=torch.float64)).reshape(2, 7, 2).split(1)
    found: dict[str, Any] = {}
    for kind in ("logits", "embeddings"):
        tuned = spread(outputs[0]).detach().requires_grad_()
        loss = distillation_loss(tuned, spread(base[0]), kind=kind, mask=torch.arange(7) > 2)  # type: ignore[arg-type]
        loss.backward()
        found |= {kind: loss.detach(), f"{kind}, grad": whole(tuned.grad)}
    return found


def in_rows(tensor: Tensor) -> Tensor:
    return distribute_tensor(tensor, contract.MESH, [Shard(0)], src_data_rank=None)


# -- what is refused -------------------------------------------------------------------------------------------


def disagreements(distributed: Callable[[Model], nn.Module]) -> dict[str, str]:
    """Every process is to hear of them, and the model to stay as it is."""
    model = distributed(build())
    optimizer = fastft.AdamW(model.named_parameters(), lr=0.01)
    head = "module.head" if distributed is ddp else "head"
    before = parts(model)
    tokens, labels = data()
    mine = [(tokens[contract.RANK :], labels[contract.RANK :])]
    fewer = batches()[contract.RANK :]
    shorter = batches()[: 3 - contract.RANK]
    broken = iter([batches()[0], "no batch"] if contract.RANK else batches())
    weights = {name: torch.rand(p.shape, dtype=p.dtype) for name, p in build().named_parameters()}
    other = {name: w.flip(0) if contract.RANK else w for name, w in weights.items()}
    spoilt = {name: -w if contract.RANK else w for name, w in weights.items()}
    named = {name: torch.ones_like(p).detach() for name, p in model.named_parameters()}  # DTensors, if these are
    if contract.RANK:
        named["tail"] = torch.ones(3)
    heard = {
        "fisher, rows": said(lambda: estimate_fisher(evaluated(model), mine)),
        "fisher, order": said(lambda: estimate_fisher(model, fewer)),
        "fisher, number": said(lambda: estimate_fisher(model, shorter)),
        "fisher, form": said(lambda: estimate_fisher(model, broken)),
        "head, rows": said(lambda: fit_head_(evaluated(model), head, mine)),
        "head, number": said(lambda: fit_head_(model, head, shorter)),
        "masks": said(lambda: child_tuning_(optimizer, evaluated(model), other, 0.3)),
        "negative": said(lambda: child_tuning_(optimizer, model, spoilt, 0.3)),
        "names": said(lambda: child_tuning_(optimizer, model, named, 0.3)),
        "none": said(lambda: child_tuning_(optimizer, model, {} if contract.RANK else weights, 0.3)),
    }
    assert unchanged(model, before)
    assert all(optimizer.update_mask(p) is None for p in model.parameters())
    return heard


def overflow() -> dict[str, str]:
    """Squares that only the last process, which has the last row, sees to be infinite."""
    model = build().requires_grad_(False)
    model.head.requires_grad_(True)
    spread = fsdp(model)
    return {
        "fisher": said(
            lambda: estimate_fisher(
                spread, batches(), mode="empirical", loss=lambda model, batch: 1e200 * model(batch[0])[0, -1]
            )
        )
    }


def refusals() -> dict[str, str]:
    """By FullyShardedDataParallel, and by what ``fully_shard`` cannot do."""
    heard: dict[str, str] = {}
    weights = {name: torch.rand(p.shape, dtype=p.dtype) for name, p in build().named_parameters()}
    for kind in (True, False):
        model = fsdp1(build().requires_grad_(True), use_orig_params=kind)
        before = parts(model)
        optimizer = fastft.AdamW(model.parameters(), lr=0.01)
        cases: dict[str, Callable[[], Any]] = {
            "fisher": lambda model=model: estimate_fisher(model, batches()),  # type: ignore[misc]
            "head": lambda model=model: fit_head_(model, model.module.head, batches()),  # type: ignore[misc]
            "masks": lambda model=model, optimizer=optimizer: child_tuning_(optimizer, model, weights),  # type: ignore[misc]
            "base": lambda model=model: FrozenBase(model),  # type: ignore[misc]
            "mofo": lambda optimizer=optimizer: MoFO(optimizer),  # type: ignore[misc]
        }
        heard |= {f"fsdp1, {name}, {kind}": said(case) for name, case in cases.items()}
        assert unchanged(model, before)
    model = fsdp(build())
    fisher = Fisher({name: torch.ones_like(p).detach() for name, p in model.named_parameters()}, "exact", 1)
    heard["fsdp, base"] = said(lambda: FrozenBase(model))
    heard["fsdp inside, base"] = said(lambda: FrozenBase(nn.Sequential(fsdp(build()))))
    heard["fsdp, save"] = said(lambda: fisher.save(contract.FOLDER / "fisher.safetensors"))
    assert not (contract.FOLDER / "fisher.safetensors").exists()
    return heard


def replaced() -> dict[str, str]:
    """Parameters that MoFO's optimizer is given after MoFO was: it says so before anything moves."""
    model = build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    MoFO(optimizer, 0.5)
    spread = fsdp(model)
    optimizer.param_groups[0]["params"] = list(spread.parameters())
    before = parts(spread)
    for p in spread.parameters():
        p.grad = torch.ones_like(p)
    heard = said(optimizer.step)
    assert unchanged(spread, before)
    return {"mofo": heard}


def scenarios() -> dict[str, Callable[[], dict[str, Any]]]:
    cases: dict[str, Callable[[], dict[str, Any]]] = {}
    for name, way in WAYS.items():
        cases |= {f"{name}, {of.__name__}": partial(of, way) for of in (fishers, masks, fitted)}
    cases |= {f"{name}, frozen": partial(frozen, WAYS[name]) for name in FROZEN}
    cases |= {f"{name}, trains_as_before": partial(trains_as_before, WAYS[name]) for name in TRAINED}
    cases |= {f"{name}, disagreements": partial(disagreements, WAYS[name]) for name in DISAGREEING}
    others = (fishers_by_other_ways_forward, overflow, refusals, replaced)
    cases["distances"] = partial(distances, in_rows)
    return cases | {of.__name__: of for of in others}


FROZEN = ("fsdp", "tensor parallel", "ddp")
TRAINED = ("fsdp", "ddp")
DISAGREEING = ("fsdp of the model only", "ddp")


def run_in_processes(folder: Path) -> dict[str, list[Any]]:
    """The results of the scenarios by their names, one for each rank."""
    return run_in_two_processes(__file__, folder)


if __name__ == "__main__":
    contract.main(int(sys.argv[1]), Path(sys.argv[2]), scenarios())
