"""Drift, blending and the search over DTensors: what the model in one piece gives, or a refusal that says why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import retention_distributed as processes
import torch
from contract_cases import assert_same
from retention_distributed import KINDS, MODELS, WAYS, in_one_piece, measured, searched
from safetensors.torch import save_file
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard

import fastft
from fastft.optim.dtensors import cutting_order, part_beside
from fastft.retention import MoFO, drift_report, interpolate_
from fastft.retention.processes import is_first_copy

# -- several processes -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], dict[str, list[Any]]]:
    """The results of all scenarios for a number of processes, one for each rank."""
    known: dict[int, dict[str, list[Any]]] = {}

    def of(world: int) -> dict[str, list[Any]]:
        if world not in known:
            folder = tmp_path_factory.mktemp(f"processes_{world}")
            save_file({n: p.detach() for n, p in processes.build().named_parameters()}, folder / "base.safetensors")
            known[world] = processes.run_in_processes(world, folder)
        return known[world]

    return of


def close_reports(one: dict[str, Any], other: dict[str, Any]) -> None:
    for a, b in zip([*one["groups"], one["total"]], [*other["groups"], other["total"]], strict=True):
        for key, value in b.items():
            assert a[key] == (pytest.approx(value, rel=1e-12) if isinstance(value, float) else value), key


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("world", "way"), [(world, way.__name__) for world in WAYS for way in WAYS[world]])
def test_processes_find_and_make_what_one_does(world: int, way: str, kind: str, results: Any) -> None:
    expected = measured(in_one_piece, kind.replace("file", "whole"))
    ranks = results(world)[f"{way}, {kind}"]
    for result in ranks:
        assert isinstance(result, dict), result  # else the traceback
        assert result["report"] == ranks[0]["report"]
        for alpha in ("0", "0.3"):
            assert_same(result[alpha], expected[alpha], alpha)
        close_reports(result["report"], expected["report"])


@pytest.mark.slow
@pytest.mark.parametrize(("world", "way"), [(world, way.__name__) for world in MODELS for way in MODELS[world]])
def test_processes_choose_as_one_does(world: int, way: str, results: Any) -> None:
    expected = searched(in_one_piece)
    for result in results(world)[f"{way}, search"]:
        assert isinstance(result, dict), result
        assert result["alpha"] == expected["alpha"]
        for key in ("source", "target", "tuned", "blended"):
            torch.testing.assert_close(result[key], expected[key], rtol=1e-4, atol=1e-5)


def test_the_comparisons_are_not_trivial() -> None:
    """Everything anchored has moved, each alpha is another model, and the best of them lies between."""
    found = measured(in_one_piece, "whole")
    for drift in [*found["report"]["groups"][:2], found["report"]["total"]]:
        assert drift["relative"] > 0.1 and drift["cosine"] < 0.99
    assert found["report"]["total"]["elements"] == 7 * 5 + 2 * 5 * 18 + 18 + 5 + 1
    assert found["report"]["total"]["unanchored"] == ("head.weight", "head.bias")
    for name, p in found["0.3"].items():
        assert (p != found["0"][name]).all() == (not name.startswith("head"))
    search = searched(in_one_piece)
    assert search["alpha"] == 0.6
    assert (search["source"].mean(1).diff() < -1e-3).all() and (search["target"].mean(1).diff() > 1e-3).all()
    assert not torch.allclose(search["tuned"], search["blended"], atol=1e-2)


@pytest.mark.slow
def test_every_process_hears_of_a_disagreement(results: Any) -> None:
    first, second = results(2)["disagreements"]
    scores = (
        "ValueError: evaluate: expected the same scores on every process (reduce or gather them over the processes "
        "first), got source "
    )
    both = {
        "numbers": scores + "0.5, target 0.25 on rank 0; source 0.5, target 1.25 on rank 1",
        "items": scores + "1.0 (3 items, ",
        "rules": "ValueError: best_alpha: expected the same alphas, rule and anchor on every process, got alphas [0",
    }
    for name, message in both.items():
        assert first[name].startswith(message), first
        assert second[name] == first[name]
    nothing = 'evaluate: expected {"source": scores, "target": scores}, got None'
    assert first["nothing"] == f"{scores}0.5, target 0.5 on rank 0; {nothing} on rank 1"
    assert second["nothing"] == f"ValueError: {nothing}"
    lacking = "ValueError: anchor: holds none of the model's 8 parameters: "
    assert "; anchor: holds none of the model's 8 parameters: " in first["anchors"]
    assert second["anchors"].startswith(lacking)
    assert first["drift"] == "RuntimeError: drift_report: it has failed on another process, whose error says why"
    assert second["drift"].startswith(lacking)


@pytest.mark.slow
def test_fsdp1_has_whole_parameters_only_where_they_are_summoned(results: Any) -> None:
    expected = measured(in_one_piece, "whole")["report"]
    for result in results(2)["fsdp1"]:
        assert isinstance(result, dict), result
        for name in ("drift", "blend", "search"):
            assert result[name].startswith("ValueError: model: expected whole parameters or DTensors, got the flat ")
        close_reports(result["report"], expected)


# -- one process that believes in others -------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("rows", [9, 10, 3, 1])
def test_every_process_of_eight_finds_its_part(rows: int, pretended: Any) -> None:
    """Also where the pieces of the last data parallel process are of other sizes than those of the first."""
    whole = {"weight": torch.arange(rows * 6.0).reshape(rows, 6), "bias": torch.arange(1.0, rows + 1)}
    seen = dict.fromkeys(whole, 0.0)
    for rank in range(8):
        mesh = pretended(rank, (4, 2), (f"data_{rank}", f"tensor_{rank}"))  # torch keeps meshes that look alike
        layer = nn.Linear(6, rows)
        with torch.no_grad():
            layer.weight.copy_(whole["weight"])
            layer.bias.copy_(whole["bias"])
        parallelize_module(layer, mesh[f"tensor_{rank}"], ColwiseParallel(), src_data_rank=None)
        fully_shard(layer, mesh=mesh[f"data_{rank}"])
        for name, p in layer.named_parameters():
            part = part_beside(whole[name], p)
            assert torch.equal(part, p.to_local())
            seen[name] += part.sum().item()
    assert seen == {name: values.sum().item() for name, values in whole.items()}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("factors", "order"),
    [
        ((1, 1, 1), [0, 1, 2]),
        ((2, 2, 1), [2, 0, 1]),
        ((4, 2, 1), [2, 1, 0]),
        ((1, 2, 1), [0, 2, 1]),
        ((2, 1, 1), [1, 0, 2]),
        ((None, 2, 1), [2, 1]),
        ((2, None, 1), [2, 0]),
    ],
    ids=str,
)
def test_the_order_of_the_cuts(factors: tuple[int | None, ...], order: list[int], pretended: Any) -> None:
    """A split factor is the number of pieces that were there before; None: not cut."""
    mesh = pretended(0, (2, 2, 2))
    kinds = {None: Replicate(), 1: Shard(0)}
    placements = [kinds.get(factor) or _StridedShard(0, split_factor=factor) for factor in factors]
    p = DTensor.from_local(torch.zeros(1), mesh, placements, run_check=False, shape=(8,), stride=(1,))
    assert cutting_order(p) == order


@pytest.mark.filterwarnings("ignore")
def test_copies_are_counted_once(pretended: Any) -> None:
    placements: tuple[Any, ...] = ((Replicate(), Shard(0)), (Shard(1), Replicate()), (Replicate(), Replicate()))
    whole = torch.ones(5, 3)
    counted = dict.fromkeys(placements, 0)
    for rank in range(6):
        mesh = pretended(rank, (3, 2))
        for where in placements:
            p = distribute_tensor(whole, mesh, where, src_data_rank=None)
            counted[where] += part_beside(whole, p).numel() if is_first_copy(p) else 0
    assert set(counted.values()) == {15}


@pytest.mark.filterwarnings("ignore")
def test_what_does_not_say_which_part_it_is(pretended: Any) -> None:
    mesh = pretended(3, (2, 2))
    cases = {
        "expected a DTensor that is cut or replicated": [
            (torch.zeros(4, 4), [Partial(), Shard(0)]),
            (torch.zeros(2, 4), [_StridedShard(0, split_factor=3), Shard(0)]),
        ],
        r"expected a part of shape \[1, 4\] on this process": [(torch.zeros(2, 4), [Shard(0), Shard(0)])],
    }
    for message, given in cases.items():
        for part, placements in given:
            model = nn.Module()
            shape = (4, 4)
            spread = DTensor.from_local(part, mesh, placements, run_check=False, shape=shape, stride=(4, 1))
            model.p = nn.Parameter(spread)
            anchor = fastft.Anchor.snapshot([("p", torch.zeros(shape))])
            with pytest.raises(ValueError, match=f"^p: {message}"):
                interpolate_(model, anchor, 0.5)
            with pytest.raises(ValueError, match=f"^p: {message}"):
                drift_report(model, anchor, groups=["p"])


@pytest.mark.filterwarnings("ignore")
def test_an_anchor_that_lies_otherwise_is_refused(pretended: Any) -> None:
    mesh = pretended(0, (2,))
    model = nn.Module()
    model.bias = nn.Parameter(distribute_tensor(torch.ones(3), mesh, [Shard(0)], src_data_rank=None))
    model.weight = nn.Parameter(distribute_tensor(torch.ones(3, 4), mesh, [Shard(0)], src_data_rank=None))
    columns = distribute_tensor(torch.zeros(3, 4), mesh, [Shard(1)], src_data_rank=None)
    anchor = fastft.Anchor.snapshot([("bias", torch.zeros(3)), ("weight", columns)])
    measures: list[Callable[[], Any]] = [
        lambda: interpolate_(model, anchor, 0.5),
        lambda: drift_report(model, anchor, groups=["weight", "bias"]),
    ]
    for measure in measures:
        with pytest.raises(ValueError, match=r"^weight: expected one that is whole, or lies as the parameter"):
            measure()
    assert (model.bias.to_local() == 1.0).all()
    with pytest.raises(ValueError, match=r"lies as the parameter does \(a plain tensor\), got a DTensor with"):
        interpolate_(nn.Linear(4, 3), anchor, 0.5)


# -- one process -------------------------------------------------------------------------------------------------


def test_a_backward_pass_notices_the_blend(mesh_of_one: Any) -> None:
    """As it does with plain parameters: the weights it was to use are no longer there."""
    model = nn.Linear(4, 3, bias=False)
    model.weight = nn.Parameter(distribute_tensor(model.weight.detach(), mesh_of_one, [Shard(0)]))
    anchor = fastft.Anchor.snapshot([("weight", torch.zeros(3, 4))])
    x = distribute_tensor(torch.ones(2, 4), mesh_of_one, [Replicate()]).requires_grad_()
    loss = model(x).sum()
    interpolate_(model, anchor, 0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_mofo_refuses_sharded_parameters(mesh_of_one: Any) -> None:
    model = nn.Linear(4, 3)
    model.weight = nn.Parameter(distribute_tensor(model.weight.detach(), mesh_of_one, [Shard(0)]))
    with pytest.raises(ValueError, match=r"optimizer: expected parameters that are whole, got a DTensor of \[3, 4\]"):
        MoFO(torch.optim.AdamW(model.parameters()), 0.5)
