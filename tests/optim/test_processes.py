"""Over which processes parameters lie spread, and the one sum over them, in one process that believes in others.

The others of a ``fake`` process group are never there: a collective leaves each tensor as it is, unless a test says
what would come back. In real processes all of it is compared with one process under ``tests/distributed``.
"""

from __future__ import annotations

import copy
import gc
import math
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from contract_cases import assert_same, give_grads, net, state_of, train
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

import fastft
from fastft import Anchor
from fastft.optim import processes
from fastft.optim.dtensors import like
from fastft.optim.processes import (
    HERE,
    KeptGroup,
    Over,
    Spread,
    averaged_together,
    cut_over,
    device_for,
    fingerprint,
    groups_of_flat,
    larger,
    wrappers,
    zero_around,
)

WORLD = 4


@pytest.fixture
def four(pretended: Any) -> Iterator[DeviceMesh]:
    """The first of four processes, as a mesh of 2 by 2."""
    yield pretended(0, (2, 2), ("data", "tensor"))
    gc.collect()  # wrappers are looked for among all objects


class Reductions:
    """The numbers that are added up over processes, and the sums."""

    def __init__(self) -> None:
        self.seen: list[tuple[Any, list[float]]] = []
        self.answer: Callable[[Tensor, int], Any] = lambda tensor, size: tensor.mul_(size)
        """In place; by default all processes have the same."""

    def __call__(self, tensor: Tensor, *args: Any, group: Any = None) -> None:
        self.seen.append((group, tensor.tolist()))
        self.answer(tensor, dist.get_world_size(group))


@pytest.fixture
def reductions(monkeypatch: pytest.MonkeyPatch) -> Reductions:
    found = Reductions()
    monkeypatch.setattr(dist, "all_reduce", found)
    return found


def distributed(
    mesh: DeviceMesh, placements: list[Any], shape: tuple[int, ...] = (2, 3), seed: int = 0
) -> nn.Parameter:
    """A parameter of which this process has a piece of that shape."""
    part = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return nn.Parameter(DTensor.from_local(part, mesh, placements, run_check=False))


# -- DTensors --------------------------------------------------------------------------------------------

PLACEMENTS: dict[str, tuple[list[Any], tuple[str, ...]]] = {
    "replicated": ([Replicate(), Replicate()], ()),
    "rows": ([Shard(0), Replicate()], ("data",)),
    "columns": ([Replicate(), Shard(1)], ("tensor",)),
    "rows_and_columns": ([Shard(0), Shard(1)], ("data", "tensor")),
    "strided": ([_StridedShard(0, split_factor=2), Shard(0)], ("data", "tensor")),
    "strided_alone": ([_StridedShard(0, split_factor=2), Replicate()], ("data",)),
}
each_placement = pytest.mark.parametrize("placed", PLACEMENTS)


@each_placement
def test_a_dtensor_says_over_which_groups_it_is_cut(placed: str, four: DeviceMesh) -> None:
    """A strided shard is one, though it is none to ``Placement.is_shard``."""
    placements, over = PLACEMENTS[placed]
    p = distributed(four, placements)
    groups = tuple(four.get_group(name) for name in over)
    assert cut_over(p) == groups
    spread = Spread([p, nn.Parameter(torch.ones(2))])
    assert spread.over(p) == Over(groups)
    assert spread.cuts(p) == bool(spread) == bool(groups)
    assert cut_over(nn.Parameter(torch.ones(2))) == ()


@each_placement
def test_the_norm_of_a_dtensor_is_that_of_all_its_pieces(placed: str, four: DeviceMesh, reductions: Reductions) -> None:
    """Each piece once, where others repeat it; here all pieces are alike. One sum for all parameters."""
    placements, over = PLACEMENTS[placed]
    params = [distributed(four, placements), nn.Parameter(torch.ones(2))]
    optimizer = fastft.AdamW(params, lr=1e-2, max_grad_norm=1.0)
    params[0].grad = DTensor.from_local(torch.full((2, 3), 0.5), four, placements, run_check=False)
    params[1].grad = torch.full((2,), 0.25)
    optimizer.step()
    expected = math.sqrt(2 ** len(over) * 6 * 0.25 + 2 * 0.0625)
    assert optimizer.grad_norm is not None
    assert optimizer.grad_norm.item() == pytest.approx(expected, rel=1e-12)
    assert len(reductions.seen) == (1 if over else 0)


@pytest.mark.parametrize("with_gradients", [True, False])
@pytest.mark.parametrize("option", ["max_grad_norm", "skip_nonfinite"])
def test_a_process_takes_part_in_each_sum_whatever_has_a_gradient_in_it(
    option: str, with_gradients: bool, four: DeviceMesh, reductions: Reductions
) -> None:
    p = distributed(four, [Shard(0), Replicate()])
    optimizer = fastft.AdamW([p, nn.Parameter(torch.ones(2))], lr=1e-2, **{option: 1.0})
    for _ in range(3):
        if with_gradients:
            p.grad = DTensor.from_local(torch.ones(2, 3), four, p.placements, run_check=False)
        optimizer.step()
    assert len(reductions.seen) == 3
    assert all(len(values) == 2 for _, values in reductions.seen)


def test_what_is_over_fewer_processes_is_added_up_there(four: DeviceMesh, reductions: Reductions) -> None:
    """No parameter lies on all processes: there may be several models."""
    p = distributed(four["data"], [Shard(0)])
    optimizer = fastft.AdamW([p, nn.Parameter(torch.ones(2))], lr=1e-2, max_grad_norm=1.0)
    p.grad = DTensor.from_local(torch.full((2, 3), 0.5), four["data"], [Shard(0)], run_check=False)
    optimizer.param_groups[0]["params"][1].grad = torch.full((2,), 0.25)
    optimizer.step()
    assert optimizer.grad_norm is not None
    assert optimizer.grad_norm.item() == pytest.approx(math.sqrt(2 * 6 * 0.25 + 2 * 0.0625), rel=1e-12)
    assert [group for group, _ in reductions.seen] == [four.get_group("data")]


# -- groups that the user gives --------------------------------------------------------------------------


def test_a_group_of_one_process_changes_nothing(four: DeviceMesh, reductions: Reductions) -> None:
    runs = []
    for group in (None, dist.new_group([0])):
        model = net()
        optimizer = fastft.AdamW(model.parameters(), lr=1e-2, max_grad_norm=0.5, process_group=group)
        train(optimizer, range(3))
        assert not optimizer._spread
        runs.append([list(model.parameters()), state_of(optimizer), optimizer.grad_norm])
    assert_same(runs[1], runs[0], "runs")
    assert reductions.seen == []


def test_plain_parameters_are_added_up_over_a_group_that_is_given(four: DeviceMesh, reductions: Reductions) -> None:
    group = dist.new_group([0, 2])
    models = [net(), net()]
    optimizer = fastft.AdamW(models[0].parameters(), lr=1e-2, max_grad_norm=0.5, process_group=group)
    alone = fastft.AdamW(models[1].parameters(), lr=1e-2, max_grad_norm=0.5)
    for one in (optimizer, alone):
        train(one, [0])
    assert optimizer.grad_norm is not None and alone.grad_norm is not None
    assert optimizer.grad_norm.item() == pytest.approx(math.sqrt(2.0) * alone.grad_norm.item(), rel=1e-12)
    assert [where for where, _ in reductions.seen] == [group]


def test_dtensors_and_a_group_beside_them_add_up_over_both(four: DeviceMesh, reductions: Reductions) -> None:
    """As pipeline stages over fully_shard: the group is of one process in each stage."""
    stages = four.get_group("data")
    p, whole = distributed(four["tensor"], [Shard(0)]), nn.Parameter(torch.ones(2))
    optimizer = fastft.AdamW([p, whole], lr=1e-2, max_grad_norm=1.0, process_group=stages)
    p.grad = DTensor.from_local(torch.full((2, 3), 0.5), four["tensor"], [Shard(0)], run_check=False)
    whole.grad = torch.full((2,), 0.25)
    optimizer.step()
    assert optimizer._spread.over(p) == Over((four.get_group("tensor"),))
    assert optimizer._spread.over(whole) == HERE
    assert optimizer.grad_norm is not None
    assert optimizer.grad_norm.item() == pytest.approx(math.sqrt(4 * 6 * 0.25 + 2 * 2 * 0.0625), rel=1e-12)
    assert len(reductions.seen) == 2


@each_placement
@pytest.mark.parametrize("given", ["data", "tensor", "the same processes as data", "all processes"])
def test_a_dtensor_counts_once_whatever_group_lies_beside(
    given: str, placed: str, four: DeviceMesh, reductions: Reductions
) -> None:
    """It says itself which processes of the group have other pieces, and which have copies."""
    placements, over = PLACEMENTS[placed]
    if given in ("data", "tensor"):
        group = four.get_group(given)
    else:
        own = dist.get_process_group_ranks(four.get_group("data"))
        group = dist.group.WORLD if given == "all processes" else dist.new_group(own)
    p, plain = distributed(four, placements), nn.Parameter(torch.ones(2))
    optimizer = fastft.AdamW([p, plain], lr=1e-2, weight_decay=0.1, max_grad_norm=1.0, process_group=group)
    p.grad = DTensor.from_local(torch.full((2, 3), 0.5), four, placements, run_check=False)
    plain.grad = torch.full((2,), 0.25)  # of which each process of the group has another one
    optimizer.step()
    expected = math.sqrt(2 ** len(over) * 6 * 0.25 + dist.get_world_size(group) * 2 * 0.0625)
    assert optimizer.grad_norm is not None
    assert optimizer.grad_norm.item() == pytest.approx(expected, rel=1e-12)
    assert [where for where, _ in reductions.seen][-1] is group


def test_experts_beside_what_all_processes_share(four: DeviceMesh, reductions: Reductions) -> None:
    """Each column of the mesh has experts of its own, over its rows; everything else is over all four processes."""
    dense = distributed(four, [Shard(0), Shard(0)])
    copied = distributed(four, [Replicate(), Replicate()])
    expert = distributed(four["data"], [Shard(0)])
    optimizer = fastft.AdamW([dense, copied, expert], max_grad_norm=1.0, process_group=four.get_group("tensor"))
    for p, value in ((dense, 0.5), (copied, 0.25), (expert, 0.125)):
        p.grad = DTensor.from_local(torch.full((2, 3), value), p.device_mesh, p.placements, run_check=False)  # type: ignore[attr-defined]
    optimizer.step()
    expected = math.sqrt(6 * (4 * 0.25 + 0.0625 + 2 * 2 * 0.015625))
    assert optimizer.grad_norm is not None
    assert optimizer.grad_norm.item() == pytest.approx(expected, rel=1e-12)


def test_terms_of_a_sum_are_refused(four: DeviceMesh) -> None:
    """Their step is no term of the sum's step."""
    p = distributed(four, [Partial(), Replicate()])
    optimizer = fastft.AdamW([("w", p)], lr=1e-2)
    p.grad = DTensor.from_local(torch.ones(2, 3), four, p.placements, run_check=False)
    before = p.detach().to_local().clone()
    with pytest.raises(ValueError, match=r"^w: expected a DTensor that is cut or replicated, got \(Partial\(sum\)"):
        optimizer.step()
    assert torch.equal(p.detach().to_local(), before) and not optimizer.state


def test_a_parameter_of_other_processes_is_refused(four: DeviceMesh) -> None:
    others = DeviceMesh("cpu", [2, 3])
    p = nn.Parameter(DTensor.from_local(torch.ones(0, 3), others, [Shard(0)], run_check=False))
    optimizer = fastft.AdamW([("there", p), ("here", nn.Parameter(torch.ones(2)))], lr=1e-2, max_grad_norm=1.0)
    with pytest.raises(ValueError, match=r"^there: expected a parameter of which this process has a part, .*\[2, 3\]"):
        optimizer.step()


@pytest.mark.filterwarnings("ignore:.*use_orig_params|.*FSDP|.*deprecated")
@pytest.mark.parametrize("use_orig_params", [True, False])
@pytest.mark.parametrize(
    "options", [{"extra_bits": 16}, {"extra_bits": 8}, {"state_dtype": torch.float32}, {}], ids=str
)
def test_fsdp1_says_which_state_its_checkpoints_cannot_hold(
    options: dict[str, Any], use_orig_params: bool, four: DeviceMesh, recwarn: pytest.WarningsRecorder
) -> None:
    """With the first step, hours before the first checkpoint; and there in a sentence."""
    module = FullyShardedDataParallel(
        nn.Linear(8, 8, bias=False).bfloat16(), use_orig_params=use_orig_params, device_id=torch.device("cpu")
    )
    named = module.named_parameters()
    optimizer = fastft.AdamW(named, lr=1e-2, weight_decay=0.1, anchor="init", anchor_decay=20.0, **options)
    for p in module.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    fault = "expected one floating dtype for all of its state, as FSDP.optim_state_dict needs, got "
    said = [str(w.message) for w in recwarn if fault in str(w.message)]
    cannot = "extra_bits" in options or (bool(options) and use_orig_params)
    assert len(said) == (1 if cannot else 0)
    assert optimizer.state_dict()["state"]  # of this process, always
    if cannot:
        with pytest.raises(ValueError, match=f"^state_dict: .*: {fault}.*in .*; save optimizer.state_dict"):
            FullyShardedDataParallel.optim_state_dict(module, optimizer)
        assert ("low_bits" in said[0]) == ("extra_bits" in options)


@pytest.mark.parametrize("kind", ["process_group", "FullyShardedDataParallel"])
def test_each_process_would_come_to_a_scale_of_its_own(kind: str, four: DeviceMesh) -> None:
    """A plain GradScaler knows of this process's gradients only; ShardedGradScaler of all."""
    model = net() if kind == "process_group" else flat(True)
    group = dist.group.WORLD if kind == "process_group" else None
    optimizer = fastft.AdamW(model.parameters(), lr=1e-2, max_grad_norm=0.5, process_group=group)
    plain, sharded = torch.amp.GradScaler("cpu", init_scale=4.0), ShardedGradScaler("cpu", init_scale=4.0)
    before = [p.detach().clone() for p in model.parameters()]
    for scaler in (plain, sharded):
        for p in model.parameters():
            p.grad = torch.full_like(p, 0.25)
        scaler.scale(torch.ones(()))
        if scaler is plain:
            with pytest.raises(
                ValueError, match=rf"^scaler: expected .*ShardedGradScaler with .*{kind}, .* got a GradScaler"
            ):
                scaler.step(optimizer)
            assert all(torch.equal(p, start) for p, start in zip(model.parameters(), before, strict=True))
            continue
        scaler.step(optimizer)
        scaler.update()
        assert not any(torch.equal(p, start) for p, start in zip(model.parameters(), before, strict=True) if p.numel())
    assert not optimizer._step_supports_amp_scaling  # whoever else asks


@pytest.mark.parametrize("strategy", [ShardingStrategy.FULL_SHARD, ShardingStrategy.NO_SHARD])
def test_where_each_process_has_all_a_plain_scaler_serves(
    strategy: ShardingStrategy, pretended: Any, four: DeviceMesh
) -> None:
    """``NO_SHARD``, or one process."""
    if strategy == ShardingStrategy.FULL_SHARD:
        pretended(0, (1,))
    model = flat(True, strategy)
    optimizer = fastft.AdamW(model.parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for p in model.parameters():
        p.grad = torch.full_like(p, 0.25)
    before = [p.detach().clone() for p in model.parameters()]
    scaler.scale(torch.ones(()))
    scaler.step(optimizer)
    assert not any(torch.equal(p, start) for p, start in zip(model.parameters(), before, strict=True))


class ScalerOfTheirOwn(torch.amp.GradScaler):
    """Which may well look at all processes."""


def test_a_scaler_from_elsewhere_is_not_judged(four: DeviceMesh) -> None:
    model = net()
    optimizer = fastft.AdamW(model.parameters(), lr=1e-2, process_group=dist.group.WORLD)
    scaler = ScalerOfTheirOwn("cpu", init_scale=4.0)
    give_grads(model.parameters(), 0)
    scaler.scale(torch.ones(()))
    scaler.step(optimizer)
    assert optimizer.state


def test_groups_of_one_are_left_out_and_each_is_named_once(four: DeviceMesh) -> None:
    pair, alone = dist.new_group([0, 1]), dist.new_group([0])
    assert larger([pair, None, alone, pair]) == (pair,)


def test_what_another_process_found_decides_here_too(four: DeviceMesh, reductions: Reductions) -> None:
    """Its gradients count in the norm; its inf is skipped here, and counted, by a GradScaler and without."""
    models = [net(), net()]
    group = dist.new_group([0, 1])
    optimizer = fastft.AdamW(
        models[0].parameters(), lr=1e-2, max_grad_norm=0.5, skip_nonfinite=True, process_group=group
    )
    alone = fastft.AdamW(models[1].parameters(), lr=1e-2)
    give_grads(models[0].parameters(), 0)
    own = math.sqrt(sum(float(p.grad.double().square().sum()) for p in models[0].parameters()))
    reductions.answer = lambda tensor, size: tensor.add_(torch.tensor([9.0, 0.0], dtype=torch.float64))
    optimizer.step()
    assert optimizer.grad_norm is not None
    assert optimizer.grad_norm.item() == pytest.approx(math.hypot(own, 3.0), rel=1e-12)
    train(alone, [0])
    assert state_of(optimizer)[0]["exp_avg"].norm() < 0.6 * state_of(alone)[0]["exp_avg"].norm()

    before = copy.deepcopy((list(models[0].parameters()), state_of(optimizer)))
    answers = {
        "a gradient that is none": torch.tensor([math.nan, 0.0], dtype=torch.float64),
        "a scaler's flag": torch.tensor([9.0, 1.0], dtype=torch.float64),
    }
    for count, (what, answer) in enumerate(answers.items(), 1):
        give_grads(models[0].parameters(), count)
        optimizer.grad_scale, optimizer.found_inf = torch.ones(()), torch.zeros(())  # type: ignore[attr-defined]
        reductions.answer = lambda tensor, size, answer=answer: tensor.add_(answer)
        optimizer.step()
        assert_same((list(models[0].parameters()), state_of(optimizer)), before, what)
        assert optimizer.skipped_steps.item() == count
    assert len(reductions.seen) == 3


def test_a_process_without_gradients_counts_the_steps_that_others_skip(
    four: DeviceMesh, reductions: Reductions
) -> None:
    model = net()
    optimizer = fastft.AdamW(model.parameters(), lr=1e-2, skip_nonfinite=True, process_group=dist.group.WORLD)
    for value in (1.0, math.inf, math.nan, 2.0):
        reductions.answer = lambda tensor, size, value=value: tensor.add_(torch.tensor([value, 0.0]).double())
        optimizer.step()
    assert optimizer.skipped_steps.item() == 2
    optimizer.found_inf = torch.zeros(())  # type: ignore[attr-defined]
    reductions.answer = lambda tensor, size: tensor.add_(torch.tensor([0.0, 1.0]).double())
    optimizer.step()
    assert optimizer.skipped_steps.item() == 3


def test_without_clipping_or_skipping_nothing_is_added_up(four: DeviceMesh, reductions: Reductions) -> None:
    optimizer = fastft.AdamW(net().parameters(), lr=1e-2, process_group=dist.group.WORLD)
    train(optimizer, range(2))
    assert optimizer._spread and reductions.seen == []


# -- a group as it is kept -------------------------------------------------------------------------------


def test_copies_of_an_optimizer_share_its_group(four: DeviceMesh) -> None:
    group = dist.new_group([0, 1])
    kept = KeptGroup(group)
    assert copy.deepcopy(kept) is kept
    model = net()
    optimizer = fastft.AdamW(model.parameters(), lr=1e-2, max_grad_norm=0.5, process_group=group)
    _, copied = copy.deepcopy((model, optimizer))
    train(copied, [0])
    assert copied._process_group is group and copied._spread._beside == (group,)


def test_a_group_is_not_pickled(four: DeviceMesh) -> None:
    optimizer = fastft.AdamW(net().parameters(), process_group=dist.new_group([0, 1]))
    with pytest.raises(
        TypeError, match=r"^process_group: cannot be pickled; save the optimizer's state_dict\(\) instead"
    ):
        pickle.dumps(optimizer)
    assert pickle.loads(pickle.dumps(KeptGroup(None))).group is None
    assert pickle.loads(pickle.dumps(fastft.AdamW(net().parameters())))._process_group is None


def test_the_group_is_for_all_parameters(four: DeviceMesh) -> None:
    optimizer = fastft.AdamW(net().parameters(), process_group=dist.group.WORLD)
    with pytest.raises(ValueError, match=r"^param_groups\[1\]: process_group is for all groups; pass it to AdamW$"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], "process_group": None})


# -- wrappers of plain tensors ---------------------------------------------------------------------------


def flat(use_orig_params: bool, strategy: ShardingStrategy = ShardingStrategy.FULL_SHARD) -> nn.Module:
    return FullyShardedDataParallel(
        net(), use_orig_params=use_orig_params, sharding_strategy=strategy, device_id=torch.device("cpu")
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("use_orig_params", [True, False])
def test_the_pieces_of_fully_sharded_data_parallel_are_known_by_their_wrapper(
    use_orig_params: bool, four: DeviceMesh, reductions: Reductions
) -> None:
    module = flat(use_orig_params)
    params = list(module.parameters())
    optimizer = fastft.AdamW(params, lr=1e-2, max_grad_norm=0.5)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert all(optimizer._spread.cuts(p) for p in params)
    (where, values), group = reductions.seen[0], module.process_group  # type: ignore[attr-defined]
    assert where is group and len(reductions.seen) == 1
    assert values[0] == sum(p.numel() for p in params)


@pytest.mark.filterwarnings("ignore")
def test_those_that_are_whole_are_not_added_up(four: DeviceMesh) -> None:
    module = flat(True, ShardingStrategy.NO_SHARD)
    params = list(module.parameters())
    assert groups_of_flat(params) == {}
    assert not Spread(params)


@pytest.mark.filterwarnings("ignore")
def test_parameters_whose_wrapper_is_gone_are_refused(four: DeviceMesh) -> None:
    module = flat(False)
    params = list(module.parameters())
    del module
    gc.collect()
    optimizer = fastft.AdamW(params, lr=1e-2, max_grad_norm=0.5)
    for p in params:
        p.grad = torch.ones_like(p)
    with pytest.raises(
        RuntimeError,
        match=rf"^params: expected .* got some \({len(params)}\) of one that is gone; make the ",
    ):
        optimizer.step()


@pytest.mark.filterwarnings("ignore")
def test_a_share_of_zero_redundancy_optimizer_is_known_by_it(four: DeviceMesh, reductions: Reductions) -> None:
    model = net()
    zero = ZeroRedundancyOptimizer(model.parameters(), fastft.AdamW, lr=1e-2, max_grad_norm=0.5)
    optimizer = zero.optim
    share = [p for group in optimizer.param_groups for p in group["params"]]
    assert 0 < len(share) < 6
    assert zero_around(optimizer) is zero
    give_grads(model.parameters(), 0)
    optimizer.step()
    own = sum(float(p.grad.double().square().sum()) for p in share)
    ((where, values),) = reductions.seen
    assert where is zero.process_group and values[0] == pytest.approx(own, rel=1e-12)
    assert optimizer.grad_norm.item() == pytest.approx(math.sqrt(WORLD * own), rel=1e-12)
    other = fastft.AdamW(net().parameters(), max_grad_norm=0.5)
    assert zero_around(other) is None and zero_around(None) is None


@pytest.mark.filterwarnings("ignore")
def test_wrappers_are_found_whatever_the_garbage_collector_was_asked_to_leave_alone(four: DeviceMesh) -> None:
    """``gc.freeze()``, as those call it who want short pauses, hides all that there is from ``gc.get_objects()``."""
    model = net()
    zero = ZeroRedundancyOptimizer(model.parameters(), fastft.AdamW, lr=1e-2)
    ddp = nn.parallel.DistributedDataParallel(model)
    gc.freeze()
    try:
        count = gc.get_freeze_count()
        assert zero_around(zero.optim) is zero
        assert ddp in list(wrappers())
        assert gc.get_freeze_count() >= count  # they are left alone again
    finally:
        gc.unfreeze()


@pytest.mark.filterwarnings("ignore")
def test_a_zero_redundancy_optimizer_that_was_never_made_does_no_harm(four: DeviceMesh) -> None:
    abandoned = ZeroRedundancyOptimizer.__new__(ZeroRedundancyOptimizer)
    optimizer = fastft.AdamW(net().parameters(), lr=1e-2, max_grad_norm=0.5)
    give_grads((p for group in optimizer.param_groups for p in group["params"]), 0)
    optimizer.step()
    assert optimizer.grad_norm is not None and zero_around(optimizer) is None
    del abandoned


@pytest.mark.filterwarnings("ignore")
def test_a_share_without_parameters_is_where_those_of_the_others_are(
    four: DeviceMesh, reductions: Reductions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one parameter four processes cannot all have a share; and all have to send from the same kind of device."""
    zero = ZeroRedundancyOptimizer([nn.Parameter(torch.ones(3))], fastft.AdamW, lr=1e-2, max_grad_norm=0.5)
    zero.param_groups[0]["params"] = [torch.ones(3, device="meta")]
    assert Spread([], None, zero.optim).device == torch.device("meta")
    monkeypatch.setattr(processes, "device_for", lambda group: torch.device("cuda", 3))
    assert Spread([], dist.group.WORLD).device == torch.device("cuda", 3)
    assert Spread([torch.ones(2)], dist.group.WORLD).device == torch.device("cpu")


@pytest.mark.parametrize(
    ("config", "given", "expected"),
    [
        ("cpu:gloo", "cpu", "cpu"),
        ("cpu:gloo,cuda:nccl", "cpu", "cpu"),
        ("cpu:gloo,cuda:nccl", "cuda:0", "cuda:0"),
        ("cpu:gloo,cuda:nccl", None, "cuda:1"),
        ("cuda:nccl", "cpu", "cuda:1"),  # what waits in host memory has to be sent from a GPU
        ("cuda:nccl", None, "cuda:1"),
        ("cpu:gloo", "cuda:0", "cpu"),
        ("cpu:gloo", None, "cpu"),
        ("cpu:fake,no_such_kind:fake", None, "cpu"),
    ],
)
def test_numbers_are_sent_from_where_a_backend_sends(
    config: str, given: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dist, "get_backend_config", lambda group: config)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert device_for(None, torch.device(given) if given else None) == torch.device(expected)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("rows_only", [True, False])
def test_a_process_keeps_the_mask_of_its_part(rows_only: bool, four: DeviceMesh) -> None:
    p = nn.Parameter(DTensor.from_local(torch.ones(4, 40), four, [Shard(0), Shard(0)], run_check=False))
    mask = torch.arange(16) % 3 == 0 if rows_only else torch.arange(640).reshape(16, 40) % 3 == 0
    optimizer = fastft.AdamW([p], lr=0.1)
    optimizer.set_update_mask(p, mask)
    elements, _ = optimizer._masks[p].for_core(p)
    assert elements is not None
    assert torch.equal(elements, (mask[:, None].expand(16, 40) if rows_only else mask)[:4])
    owned = elements.untyped_storage().nbytes()
    assert owned == elements.numel() or elements.data_ptr() == optimizer._masks[p].mask.data_ptr()
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert torch.equal(p.detach().to_local() != 1.0, elements)


def test_an_anchor_keeps_the_part_beside_a_sharded_parameter(four: DeviceMesh) -> None:
    p = nn.Parameter(DTensor.from_local(torch.ones(4, 40), four, [Shard(0), Shard(0)], run_check=False))
    whole = torch.arange(640.0).reshape(16, 40)
    anchor = Anchor.snapshot([("w", whole)]).with_importance({"w": whole + 1.0})
    for kept, values in (
        (anchor.tensor_for(p, "w", like), whole[:4]),
        (anchor.importance_for(p, "w", like), whole[:4] + 1.0),
    ):
        assert isinstance(kept, DTensor)
        assert kept.shape == p.shape and torch.equal(kept.to_local(), values)


def test_wrappers_are_looked_for_where_several_processes_train(four: DeviceMesh) -> None:
    ddp, fsdp = nn.parallel.DistributedDataParallel(net()), flat(True)
    found = {id(wrapper) for wrapper in wrappers()}
    assert {id(ddp), id(fsdp)} <= found


def test_in_one_process_nothing_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Among all objects, it takes some tenths of a second."""
    assert not processes.initialized()
    monkeypatch.delattr(processes, "living")
    p = nn.Parameter(torch.ones(3))
    p._fsdp_flattened = True  # type: ignore[attr-defined]
    spread = Spread([p])
    assert not spread and spread.over(p) == HERE and not spread.cuts(p)
    assert list(wrappers()) == []


def test_copies_that_fully_shard_has_freed_are_refused(four: DeviceMesh) -> None:
    """An optimizer made between a forward pass and the backward pass has those that were gathered for it."""
    model = net()
    optimizer = fastft.AdamW(model.named_parameters(), lr=1e-2)
    model[3].weight.untyped_storage().resize_(0)
    give_grads(list(model.parameters())[:4], 0)
    before = copy.deepcopy(list(model.parameters())[:4])
    with pytest.raises(
        ValueError,
        match=r"^params: expected the model's parameters, got copies that fully_shard had gathered for a forward pass "
        r"and freed since: 3\.weight\. Make the optimizer before the first forward pass, or call "
        r"model\.reshard\(\) first$",
    ):
        optimizer.step()
    assert_same(list(model.parameters())[:4], before, "parameters")


# -- what needs a whole tensor ---------------------------------------------------------------------------


@pytest.mark.parametrize("placed", ["rows", "strided_alone", "replicated"])
def test_selective_projection_needs_the_whole_tensor(placed: str, four: DeviceMesh) -> None:
    placements, over = PLACEMENTS[placed]
    p = distributed(four, placements)
    start = p.detach().to_local().clone()
    optimizer = fastft.AdamW([("w", p)], lr=1e-2, anchor="init", anchor_decay=0.5, anchor_mode="selective")
    p.grad = DTensor.from_local(torch.ones(2, 3), four, placements, run_check=False)
    if not over:
        optimizer.step()
        assert (p.detach().to_local() != start).all()
        return
    with pytest.raises(ValueError, match=r'^w: anchor_mode: "selective" needs the whole tensor in one') as error:
        optimizer.step()
    assert str(placements) in str(error.value)
    assert torch.equal(p.detach().to_local(), start)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("use_orig_params", [True, False])
def test_selective_projection_of_a_flat_piece_is_refused_too(use_orig_params: bool, four: DeviceMesh) -> None:
    module = flat(use_orig_params)
    params = [p for p in module.parameters() if p.numel()]
    optimizer = fastft.AdamW(params, lr=1e-2, anchor="init", anchor_decay=0.5, anchor_mode="selective")
    for p in params:
        p.grad = torch.ones_like(p)
    with pytest.raises(
        ValueError, match="needs the whole tensor in one process, and this is a piece of a flat parameter"
    ):
        optimizer.step()


# -- anchors beside DTensors -----------------------------------------------------------------------------


@pytest.mark.parametrize("importance", [False, True])
def test_an_anchor_has_to_lie_as_the_parameter_does(importance: bool, four: DeviceMesh) -> None:
    """Here by chance its part has the shape of the parameter's; and beside a plain parameter."""
    lies = distributed(four, [Shard(0), Replicate()])
    other = distributed(four, [Replicate(), Shard(0)], seed=1)
    anchor = Anchor.snapshot([("w", lies)])
    if importance:
        plain = torch.ones(4, 3)
        anchor = Anchor.snapshot([("w", plain)]).with_importance({"w": lies.detach().abs()})
    part = "importance" if importance else "anchor"
    for p, got in ((other, "Shard"), (nn.Parameter(torch.ones(4, 3)), "a plain tensor")):
        optimizer = fastft.AdamW([("w", p)], lr=1e-2, weight_decay=0.1, anchor=anchor, anchor_decay=4.0)
        p.grad = torch.zeros_like(p)
        with pytest.raises(
            ValueError, match=rf"^w: {part}: expected one that is whole, or lies as .*{got}.*got a DTensor"
        ):
            optimizer.step()
        assert not optimizer.state


@pytest.mark.filterwarnings("ignore:params. parameters of another kind")
def test_a_parameter_replaced_by_one_that_is_placed_otherwise_gets_its_own_part(four: DeviceMesh) -> None:
    """Shape, stride and device of the whole are the same; the part of the anchor is another."""
    whole = torch.arange(12.0).reshape(4, 3)
    first = distributed(four, [Replicate(), Shard(0)])
    optimizer = fastft.AdamW([("w", first)], lr=1e-2, anchor=Anchor.snapshot([("w", whole)]), anchor_decay=100.0)
    first.grad = torch.zeros_like(first)
    optimizer.step()  # lr * anchor_decay = 1: the weights are nearly the anchor's
    torch.testing.assert_close(first.detach().to_local(), whole[:2], atol=1e-2, rtol=1e-3)
    second = nn.Parameter(
        DTensor.from_local(
            torch.zeros(4, 2), four, [Replicate(), Shard(1)], run_check=False, shape=first.shape, stride=first.stride()
        )
    )
    optimizer.param_groups[0]["params"] = [second]
    second.grad = torch.zeros_like(second)
    optimizer.step()
    torch.testing.assert_close(second.detach().to_local(), whole[:, :2], atol=1e-2, rtol=1e-3)


# -- an anchor that each process has whole ---------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64, torch.complex128]
)
def test_a_fingerprint_is_of_every_bit(dtype: torch.dtype) -> None:
    """Also of the last of an element in the middle of many, and the same whatever the order in memory."""
    whole = torch.randn(640, 501, generator=torch.Generator().manual_seed(3)).to(dtype)
    whole[5, 7] = float("nan")
    first = fingerprint(whole)
    assert first.dtype == torch.int64 and first.shape == ()
    assert torch.equal(fingerprint(whole.clone()), first)
    assert torch.equal(fingerprint(whole.t().contiguous().t()), first)
    assert torch.equal(fingerprint(whole[:, :1].contiguous()), fingerprint(whole[:, :1]))
    part = torch.view_as_real(whole)[..., 0] if dtype.is_complex else whole
    part[333, 201] = torch.nextafter(part[333, 201], torch.full_like(part[333, 201], 9.0))
    assert not torch.equal(fingerprint(whole), first)
    assert fingerprint(torch.ones((), dtype=dtype)).shape == ()


class Gathered:
    """A stand-in for ``all_gather_object``; ``other`` makes the part of the other processes from that of this one."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, dict[str, int]]] = []
        self.other: Callable[[dict[str, int]], dict[str, int]] = dict

    def __call__(self, everyones: list[Any], own: dict[str, int], group: Any = None) -> None:
        self.calls.append((group, own))
        everyones[:] = [own, *[self.other(own)] * (len(everyones) - 1)]


@pytest.fixture
def gathered(monkeypatch: pytest.MonkeyPatch) -> Gathered:
    found = Gathered()
    monkeypatch.setattr(dist, "all_gather_object", found)
    return found


def changed(own: dict[str, int], *names: str) -> dict[str, int]:
    return {name: number + (name in names) for name, number in own.items()}


@pytest.mark.parametrize("given", ["init", "snapshot"])
def test_an_anchor_from_before_ddp_has_to_be_the_same_in_every_process(
    given: str, four: DeviceMesh, gathered: Gathered
) -> None:
    """DDP gives all processes the weights of the first, not the anchors that were taken before."""
    model = net()
    anchor: Any = Anchor.snapshot(model) if given == "snapshot" else given
    optimizer = fastft.AdamW(model.named_parameters(), lr=1e-2, weight_decay=0.1, anchor=anchor, anchor_decay=4.0)
    ddp = nn.parallel.DistributedDataParallel(model)
    give_grads(model.parameters(), 0)
    before = [p.detach().clone() for p in model.parameters()]
    names = [name for name, _ in model.named_parameters()]
    gathered.other = lambda own: changed(own, names[1])
    with pytest.raises(ValueError, match=rf"different ones for {names[1]}: .*after DistributedDataParallel"):
        optimizer.step()
    assert all(torch.equal(p, start) for p, start in zip(model.parameters(), before, strict=True))
    gathered.other = lambda own: {"another": 3, names[0]: own[names[0]]}  # who has other parts of the model
    optimizer.step()
    assert [group for group, _ in gathered.calls] == [ddp.process_group] * 2 and list(gathered.calls[0][1]) == names
    for norm in (1.0, None):
        optimizer.max_grad_norm = norm
        optimizer.step()
    assert len(gathered.calls) == 2  # looked at once


def test_what_nothing_pulls_and_what_ddp_ignores_may_differ(four: DeviceMesh, gathered: Gathered) -> None:
    """A new head in a group of its own; experts."""
    model = net()
    names = [name for name, _ in model.named_parameters()]
    nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, [names[0]])
    params = list(model.named_parameters())
    optimizer = fastft.AdamW(
        [{"params": params[:-1], "anchor_decay": 4.0}, {"params": params[-1:], "anchor_decay": 0.0}],
        lr=1e-2,
        anchor="init",
    )
    ddp = nn.parallel.DistributedDataParallel(model)
    give_grads(model.parameters(), 0)
    gathered.other = lambda own: changed(own, names[0], names[-1])
    optimizer.step()
    assert [list(own) for _, own in gathered.calls] == [names[1:-1]]
    optimizer.param_groups[1]["anchor_decay"] = 1.0  # from now on
    with pytest.raises(ValueError, match=f"different ones for {names[-1]}: "):
        optimizer.step()
    del ddp


def test_a_ddp_that_was_never_made_does_no_harm(four: DeviceMesh, gathered: Gathered) -> None:
    model = net().requires_grad_(False)
    with pytest.raises(RuntimeError, match="not needed") as kept:  # its traceback has it
        nn.parallel.DistributedDataParallel(model)
    optimizer = fastft.AdamW(model.named_parameters(), lr=1e-2, anchor="init", anchor_decay=4.0)
    give_grads(model.requires_grad_(True).parameters(), 0)
    optimizer.step()
    assert gathered.calls == [] and list(averaged_together(model.parameters())) == []
    del kept


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("given", ["init", "snapshot"])
def test_shares_of_zero_are_compared_where_each_has_all(given: str, four: DeviceMesh, gathered: Gathered) -> None:
    """With "init" each process has the anchor of its own share, and others have other names; once, for all of them."""
    model = net()
    anchor: Any = Anchor.snapshot(model) if given == "snapshot" else given
    zero = ZeroRedundancyOptimizer(model.parameters(), fastft.AdamW, lr=1e-2, anchor=anchor, anchor_decay=4.0)
    ddp = nn.parallel.DistributedDataParallel(model)
    share = {id(p) for group in zero.optim.param_groups for p in group["params"]}
    names = [name for name, p in model.named_parameters() if given == "snapshot" or id(p) in share]
    give_grads(model.parameters(), 0)
    gathered.other = lambda own: {f"other {name}": number for name, number in own.items()}
    zero.optim.step()
    assert [(group, list(own)) for group, own in gathered.calls] == [(ddp.process_group, names)]
    zero.optim._anchor = copy.copy(zero.optim._anchor)  # as a checkpoint brings it, to those with a share
    zero.optim.step()
    assert len(gathered.calls) == 1


@pytest.mark.parametrize("differs", [True, False])
def test_an_anchor_has_to_be_the_same_in_every_process(
    differs: bool, four: DeviceMesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Looked at once: where a framework loads weights in one process only, the others have a snapshot of nothing."""
    p = distributed(four, [Shard(0), Replicate()])
    whole = torch.linspace(-1.0, 1.0, 12).reshape(4, 3)
    optimizer = fastft.AdamW([("w", p)], lr=1e-2, anchor=Anchor.snapshot([("w", whole)]), anchor_decay=4.0)
    calls = []

    def all_reduce(tensor: Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None) -> None:
        calls.append(op)
        if differs and op == dist.ReduceOp.MAX:
            tensor += 1

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    p.grad = DTensor.from_local(torch.ones(2, 3), four, p.placements, run_check=False)
    if differs:
        with pytest.raises(
            ValueError, match=r"^anchor: expected the same weights in every process, got different ones for w: "
        ):
            optimizer.step()
        return
    for norm in (1.0, 2.0, None):  # each time with a new plan
        optimizer.max_grad_norm = norm
        optimizer.step()
    calls = [op for op in calls if op != dist.ReduceOp.SUM]
    assert set(calls) == {dist.ReduceOp.MIN, dist.ReduceOp.MAX} and len(calls) == 4
