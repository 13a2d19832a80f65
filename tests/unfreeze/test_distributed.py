"""The unfreezer over two processes (fully_shard, DDP, FSDP1) against one, and wrappers that come too late for it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import unfreeze_distributed as scenarios
from contract_distributed import run_in_two_processes
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from unfreeze_cases import Stack, assert_equal, backward, bits, params

import fastft
from fastft.optim.tensors import is_dtensor
from fastft.unfreeze import GradualUnfreeze, Unfreezer

DDP = (
    "model: expected one that was wrapped before the Unfreezer was made, got one that was wrapped in "
    "DistributedDataParallel after it, which {}; wrap it first, and hand the wrapper to the Unfreezer, with "
    'mode="freeze" and fastft.AdamW'
)
DDP_WITHOUT_FLAGS = DDP.format("never averages the gradients of what was closed by then")
DDP_WITHOUT_GRAPH = DDP.format("waits for gradients of closed groups, and these already ran without a graph")
FSDP1 = (
    "model: expected one that was wrapped before the Unfreezer was made, got one that was wrapped in "
    "FullyShardedDataParallel after it, which cuts up the parameters that the optimizer and the Unfreezer hold; wrap "
    'it first, then make the optimizer, then the Unfreezer with the wrapper and mode="freeze"'
)
FSDP2 = (
    "model: expected one that was wrapped before the Unfreezer was made, got one that was sharded with fully_shard "
    "after it, which puts other parameters in the place of those that the optimizer and the Unfreezer hold; shard it "
    "first, then make the optimizer, then the Unfreezer"
)

FLAT = (
    "model: expected FullyShardedDataParallel(..., use_orig_params=True), got flat parameters, in which the weights of "
    "several layers lie together; or say with groups= which of them belong together"
)


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """The results of all scenarios, one for each rank."""
    return run_in_two_processes(scenarios.__file__, tmp_path_factory.mktemp("two_processes"))


def flat(result: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors of nested dicts, by joined keys."""
    if isinstance(result, Tensor):
        yield prefix, result
    else:
        for key, value in result.items():
            yield from flat(value, f"{prefix}/{key}")


@pytest.mark.slow
@pytest.mark.parametrize("name", scenarios.ALIKE)
def test_two_processes_do_what_one_does(name: str, two_processes: dict[str, list[Any]]) -> None:
    kind, _, options = name.partition("-")
    if kind == "resumed":  # as if it had never stopped
        _, mode, state_policy = options.split("-")
        expected = dict(flat(scenarios.schedule("blocks", mode, state_policy)))
    else:
        expected = dict(flat(scenarios.ALIKE[name]()))
    before = params(Stack(3))
    for result in two_processes[name]:
        assert isinstance(result, dict), result  # else the traceback
        got = dict(flat(result))
        assert got.keys() == expected.keys()
        for key, tensor in expected.items():
            torch.testing.assert_close(got[key], tensor, rtol=1e-4, atol=1e-5, msg=lambda m, key=key: f"{key}: {m}")
            still = before.get(key.rpartition("/")[2])
            if still is not None and torch.equal(tensor, still):
                assert torch.equal(got[key], tensor), f"{key}: closed in one process, and moved in two"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("first_forward-ddp-requires_grad", DDP_WITHOUT_FLAGS),
        ("first_forward-fsdp1-requires_grad", FSDP1),
        ("first_forward-fsdp1-freeze", FSDP1),
        ("first_forward-fsdp2-requires_grad", FSDP2),
        ("first_forward-fsdp2-freeze", FSDP2),
        ("first_step-ddp-requires_grad", DDP_WITHOUT_FLAGS),
        ("first_step-ddp-freeze", DDP_WITHOUT_GRAPH),
        ("first_step-fsdp2-requires_grad", FSDP2),
        ("first_step-fsdp2-freeze", FSDP2),
        ("opening-requires_grad", DDP_WITHOUT_FLAGS),
        ("opening-freeze", DDP_WITHOUT_GRAPH),
        ("flat_parameters-root", FLAT),
        ("flat_parameters-blocks", FLAT),
    ],
)
def test_wrappers_that_come_too_late_are_refused_by_every_process(
    name: str, message: str, two_processes: dict[str, list[Any]]
) -> None:
    assert two_processes[name] == [message] * 2


@pytest.mark.slow
def test_all_refusals_are_looked_at(two_processes: dict[str, list[Any]]) -> None:
    assert two_processes.keys() == scenarios.ALIKE.keys() | scenarios.REFUSED.keys()
    assert not [name for name in scenarios.REFUSED if "no error" in two_processes[name]]


# -- in a process group of one ---------------------------------------------------------------------------------


def made(mode: Any, model: nn.Module, **options: Any) -> tuple[fastft.AdamW, Unfreezer]:
    optimizer = fastft.AdamW(model.named_parameters(), 1e-2, eps=1e-4, anchor="init", anchor_decay=2.0)
    return optimizer, Unfreezer(model, optimizer, GradualUnfreeze(2), mode=mode, **options)


def trained(called: nn.Module, optimizer: fastft.AdamW, unfreezer: Unfreezer, steps: int = 6) -> dict[str, Tensor]:
    for step in range(steps):
        backward(called, step)
        optimizer.step()
        with torch.no_grad():
            called(torch.zeros(2, 5))
        unfreezer.step()
        optimizer.zero_grad()
    return bits({name: p for g in unfreezer.groups for name, p in zip(g.param_names, g.parameters, strict=True)})


def test_ddp_around_closed_flags_is_refused_by_the_first_forward(mesh_of_one: Any) -> None:
    model = Stack(2)
    made("requires_grad", model)
    called = DistributedDataParallel(model)
    with pytest.raises(ValueError, match="never averages the gradients of what was closed by then; wrap it first"):
        backward(called, 0)


def test_ddp_around_frozen_groups_takes_their_hooks_away(mesh_of_one: Any) -> None:
    model, twin = Stack(2), Stack(2)
    optimizer, unfreezer = made("freeze", model)
    called = DistributedDataParallel(model)
    got = trained(called, optimizer, unfreezer)
    assert_equal(got, trained(twin, *made("freeze", twin)))
    assert "as the model is wrapped in DistributedDataParallel" in unfreezer.report().notes[0]


def test_loading_a_state_before_the_first_forward_changes_nothing_in_that(mesh_of_one: Any) -> None:
    model, twin = Stack(2), Stack(2)
    optimizer, unfreezer = made("freeze", model)
    called = DistributedDataParallel(model)
    _, other = made("freeze", Stack(2))
    for _ in range(3):
        other.step()
    unfreezer.load_state_dict(other.state_dict())
    twin_optimizer, twin_unfreezer = made("freeze", twin)
    twin_unfreezer.load_state_dict(other.state_dict())
    assert_equal(trained(called, optimizer, unfreezer), trained(twin, twin_optimizer, twin_unfreezer))


def test_ddp_around_frozen_groups_that_have_run_is_refused(mesh_of_one: Any) -> None:
    model = Stack(2)
    optimizer, _ = made("freeze", model)
    model(torch.zeros(2, 5))
    called = DistributedDataParallel(model)
    backward(called, 0)
    with pytest.raises(ValueError, match="these already ran without a graph; wrap it first"):
        optimizer.step()
    assert not optimizer.state


def test_a_ddp_that_was_not_handed_over_is_found_at_once(mesh_of_one: Any) -> None:
    model = Stack(2)
    called = DistributedDataParallel(model)
    with pytest.raises(ValueError, match=r'mode: expected "freeze".*DistributedDataParallel settles when it is made'):
        made("requires_grad", model)
    with pytest.raises(ValueError, match=r'mode: expected "freeze".*DistributedDataParallel settles when it is made'):
        made("requires_grad", model.blocks, groups=["0", "1"])
    _, unfreezer = made("freeze", model)
    backward(called, 0)
    assert all(p.grad is not None for p in model.parameters())
    assert "as the model is wrapped in DistributedDataParallel" in unfreezer.report().notes[0]


def test_wrappers_of_others_and_of_the_past_are_none_of_its_business(mesh_of_one: Any) -> None:
    other = DistributedDataParallel(Stack(2))
    model = Stack(2)
    gone = DistributedDataParallel(model)
    gone.circle = [gone]  # type: ignore[assignment]  # so that only the garbage collector frees it
    del gone
    trained(model, *made("requires_grad", model))
    assert isinstance(other.module, Stack)


@pytest.mark.parametrize("mode", scenarios.MODES)
def test_an_unfreezer_before_fully_shard_is_refused(mode: Any, mesh_of_one: Any) -> None:
    mesh = init_device_mesh("cpu", (1,))
    for parts in ("blocks", "all"):
        model = Stack(2)
        if parts == "blocks":  # some were before it
            fully_shard(model.blocks[0], mesh=mesh)
        optimizer, unfreezer = made(mode, model)
        fully_shard(model, mesh=mesh)
        with pytest.raises(ValueError, match=r"sharded with fully_shard after it.*shard it first"):
            model(torch.zeros(2, 5))
        with pytest.raises(ValueError, match=r"sharded with fully_shard after it.*shard it first"):
            optimizer.step()
        with pytest.raises(ValueError, match=r"sharded with fully_shard after it.*shard it first"):
            [unfreezer.step() for _ in range(2)]


@pytest.mark.parametrize("mode", scenarios.MODES)
def test_an_unfreezer_after_fully_shard_is_not(mode: Any, mesh_of_one: Any) -> None:
    mesh = init_device_mesh("cpu", (1,))
    model, twin = Stack(2), Stack(2)
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = fastft.AdamW(model.named_parameters(), 1e-2, eps=1e-4, anchor="init", anchor_decay=2.0)
    with torch.no_grad():
        model(torch.zeros(2, 5))  # which leaves the parameters of the root put together
    assert not is_dtensor(model.embed.weight)
    unfreezer = Unfreezer(model, optimizer, GradualUnfreeze(2), mode=mode)
    got = trained(model, optimizer, unfreezer)
    expected = trained(twin, *made(mode, twin))
    assert_equal({name: p.full_tensor() for name, p in got.items()}, expected)  # type: ignore[attr-defined]


@pytest.mark.parametrize("mode", scenarios.MODES)
def test_other_parameters_in_the_optimizer_are_refused(mode: Any) -> None:
    """As accelerate's prepare puts them there."""
    model = Stack(2)
    optimizer, unfreezer = made(mode, model)
    before = params(model)
    backward(model, 0)
    group = optimizer.param_groups[0]
    kept = group["params"]
    group["params"] = [*kept[:-2], *(nn.Parameter(p.detach().clone()) for p in kept[-2:])]
    message = "optimizer: expected the parameters that it had when the Unfreezer was made, got others in the place of "
    with pytest.raises(ValueError, match=message + r"head\.weight, head\.bias; let accelerate, DeepSpeed"):
        optimizer.step()
    assert_equal(bits(params(model)), bits(before))
    with pytest.raises(ValueError, match=message):
        [unfreezer.step() for _ in range(2)]
    group["params"] = kept
    optimizer.step()


def test_moments_of_sharded_parameters_elsewhere_are_not_offloaded(mesh_of_one: Any) -> None:
    with torch.device("meta"):
        model = Stack(2)
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    optimizer = fastft.AdamW(model.named_parameters())
    with pytest.raises(ValueError, match=r'state_policy: expected "keep" or "reset".*"offload", and embed\.weight'):
        Unfreezer(model, optimizer, GradualUnfreeze(2), state_policy="offload")


def test_undo_and_copies_leave_no_hook_behind(mesh_of_one: Any) -> None:
    model = Stack(2)
    _, unfreezer = made("requires_grad", model)
    copied = copy.deepcopy(model)
    DistributedDataParallel(copied)(torch.zeros(2, 5))
    unfreezer.undo()
    assert not model._forward_pre_hooks
    DistributedDataParallel(model)(torch.zeros(2, 5))
