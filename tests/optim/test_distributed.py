"""Two processes over gloo (FSDP2, tensor parallelism, DDP) against one; torch.distributed.checkpoint."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import contract_distributed as scenarios
import pytest
import torch
import torch.distributed.checkpoint as dcp
from contract_cases import CARRIED, assert_near, assert_same, give_grads, net, state_of, train
from contract_distributed import run_in_two_processes
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)

import fastft
from fastft.optim.checkpoint import Has, flags_in


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """The results of all scenarios, one for each rank."""
    folder = tmp_path_factory.mktemp("two_processes")
    save_file({name: p.detach() for name, p in scenarios.build().named_parameters()}, folder / "base.safetensors")
    return run_in_two_processes(scenarios.__file__, folder)


def in_one_process(name: str) -> dict[str, Any]:
    module = scenarios.build()
    if name == "state_spread_by_zero":
        optimizer = scenarios.named_optimizer(module, max_grad_norm=None)
        scenarios.train(module, optimizer, [0, 1, 3, 4])
        return {"parameters": dict(module.named_parameters())}
    if name.startswith("weighted"):
        return scenarios.weighted(module, fastft.Anchor.snapshot(module).with_importance(scenarios.importance()))
    optimizer = scenarios.named_optimizer(module, anchor_mode="selective" if name == "selective" else "decoupled")
    if name.endswith("_backward"):
        return scenarios.backward_run(module, module, optimizer)
    if name == "resumed_from_a_distributed_checkpoint":
        scenarios.restrict_without_freezing(module, optimizer)
    else:
        scenarios.restrict(module, optimizer)
    return scenarios.outcome(module, optimizer, scenarios.train(module, optimizer, range(5)))


@pytest.mark.slow
@pytest.mark.parametrize("name", scenarios.SCENARIOS)
def test_two_processes_do_what_one_does(name: str, two_processes: dict[str, list[Any]]) -> None:
    expected = in_one_process(name)
    for result in two_processes[name]:
        assert isinstance(result, dict), result  # else the traceback
        if name.endswith("_backward"):  # sums in another order, and differences grow with Adam
            for key, p in expected["parameters"].items():
                torch.testing.assert_close(result["parameters"][key], p, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(result["norms"], expected["norms"], rtol=1e-4, atol=1e-5)
            continue
        if name == "state_spread_by_zero":
            assert_near(result["parameters"], expected["parameters"], "parameters")
            continue
        for norm, whole in zip(result["norms"], expected["norms"], strict=True):
            torch.testing.assert_close(norm, whole, rtol=1e-6, atol=0.0, equal_nan=True)
        assert_near(result["parameters"], expected["parameters"], "parameters")
        assert_near(result["state"], expected["state"], "state")
        assert result["skipped"].item() == 1
    first, second = two_processes[name]
    assert_same(first["parameters"], second["parameters"], "ranks")
    assert_same(first.get("norms"), second.get("norms"), "ranks")


def test_the_scenarios_are_not_trivial() -> None:
    """The clip clips, the skipped step is skipped, what is masked and frozen stays, the rest moves."""
    start, end = dict(scenarios.build().named_parameters()), in_one_process("fsdp")
    assert all(norm.isnan() or norm > 1.0 for norm in end["norms"])
    assert [norm.isnan().item() for norm in end["norms"]] == [False, False, True, False, False]
    assert end["state"]["0.0.weight"]["step"].item() == 4.0
    assert "1.weight" not in end["state"]
    moved = {name: (p != start[name]).float().mean().item() for name, p in end["parameters"].items()}
    assert moved.pop("1.weight") == 0.0
    assert moved.pop("0.0.weight") == pytest.approx(11 / 17)
    assert moved.pop("3.weight") == 0.5
    assert moved.pop("1.bias") == 9 / 16
    assert set(moved.values()) == {1.0}


# -- torch.distributed.checkpoint in one process -----------------------------------------------------------

FINE_TUNING: dict[str, Any] = {"anchor": "init", "anchor_decay": 3.0, "max_grad_norm": 1.5}


@pytest.mark.parametrize("tensor_lr", [False, True])
@pytest.mark.parametrize("mode", ["decoupled", "l2", "selective"])
def test_making_state_for_a_checkpoint_moves_nothing(mode: str, tensor_lr: bool) -> None:
    lr: Any = torch.tensor(0.1) if tensor_lr else 0.1
    model = net()
    optimizer = fastft.AdamW(model.parameters(), lr=lr, weight_decay=0.5, anchor_mode=mode, **FINE_TUNING)  # type: ignore[arg-type]
    optimizer.freeze(model[1].bias)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    before = copy.deepcopy(list(model.parameters()))
    state = get_optimizer_state_dict(model, optimizer)["state"]
    assert_same(list(model.parameters()), before, "parameters")
    assert optimizer.param_groups[0]["lr"] is lr
    assert [float(of_one["step"]) for of_one in state.values()] == [0.0] * 6
    assert not any(of_one[key].any() for of_one in state.values() for key in ("exp_avg", "exp_avg_sq"))
    assert_same({name: of_one["anchor"] for name, of_one in state.items()}, start, "anchors")
    assert [name for name, of_one in state.items() if flags_in(of_one) & Has.FROZEN] == ["1.bias"]
    assert all(p.grad is None for p in model.parameters())
    train(optimizer, [0])
    assert [float(of_one["step"]) for of_one in state_of(optimizer) if of_one] == [1.0] * 5, "the frozen one has none"


@pytest.mark.parametrize(
    "classes", [(fastft.AdamW, torch.optim.AdamW), (torch.optim.AdamW, fastft.AdamW)], ids=["out", "in"]
)
def test_optimizer_state_by_name_is_exchanged_with_torch(classes: tuple[type, type]) -> None:
    model = net()
    first = classes[0](model.parameters(), lr=1e-2, weight_decay=0.1)
    train(first, range(3))
    saved = copy.deepcopy(get_optimizer_state_dict(model, first))
    other = net()
    other.load_state_dict(model.state_dict())
    second = classes[1](other.parameters(), lr=0.5)
    set_optimizer_state_dict(other, second, saved)
    for step in range(3, 6):
        for m, optimizer in ((model, first), (other, second)):
            give_grads(m.parameters(), step)
            optimizer.step()
        assert_near(list(model.parameters()), list(other.parameters()), "parameters")
        ours_and_theirs = [
            [{key: v for key, v in state.items() if key not in CARRIED} for state in state_of(optimizer)]
            for optimizer in (first, second)
        ]
        assert_near(*ours_and_theirs, "state")


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("frozen", [False, True], ids=["all_live", "one_frozen"])
def test_a_run_resumes_from_a_checkpoint_on_disk(frozen: bool, tmp_path: Path) -> None:
    """With the masks and the frozen set that the resuming optimizer has as well."""

    def start() -> tuple[Any, fastft.AdamW]:
        model = net()
        optimizer = fastft.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1, **FINE_TUNING)
        optimizer.set_update_mask(model[0].weight, torch.arange(17) % 2 == 0)
        if frozen:
            optimizer.freeze(model[1].weight)
        return model, optimizer

    model, optimizer = start()
    train(optimizer, range(3))
    dcp.save(
        dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True)),
        checkpoint_id=tmp_path,
        no_dist=True,
    )
    other, resumed = start()
    loaded = dict(zip(("model", "optimizer"), get_state_dict(other, resumed), strict=True))
    dcp.load(loaded, checkpoint_id=tmp_path, no_dist=True)
    # Parameters that never stepped have state for DCP's sake, so this does not raise; none of it stays.
    set_state_dict(other, resumed, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])
    train(optimizer, range(3, 6))
    train(resumed, range(3, 6))
    assert_same(list(other.parameters()), list(model.parameters()), "parameters")
    assert_same(state_of(resumed), state_of(optimizer), "state")
    steps: list[Tensor] = [state["step"] for state in state_of(resumed) if state]
    assert {float(step) for step in steps} == {6.0} and len(steps) == 6 - frozen
