"""The Trainer with accelerate's FSDP2 over two processes, saved and resumed in the middle of a schedule."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import trainer_fsdp2
from started import free_port, run_together
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from trainer_fsdp2 import BREAK, CASES, STEPS, WORLD, Case, model_for
from transformers import TrainerState, TrainingArguments
from unfreeze_cases import Stack, assert_equal

import fastft
from fastft.integrations import transformers as integration
from fastft.integrations.progress import whole_tensors
from fastft.integrations.transformers import optimizer_cls_and_kwargs
from fastft.optim.tensors import is_dtensor
from fastft.unfreeze import GradualUnfreeze, OnPlateau, Unfreezer

Results = dict[str, dict[str, Any]]


def in_two_processes(task: str, folder: Path) -> list[Results]:
    """The results of each of two processes."""
    port = free_port()
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "TOKENIZERS_PARALLELISM": "false",
        "GLOO_SOCKET_IFNAME": "lo",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(WORLD),
        "LOCAL_WORLD_SIZE": str(WORLD),
    }
    command = [sys.executable, trainer_fsdp2.__file__, task, str(folder)]
    run_together(
        (command, {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}, folder / f"{task}_{rank}.log")
        for rank in range(WORLD)
    )
    return [torch.load(folder / f"{task}.{rank}", weights_only=True) for rank in range(WORLD)]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the pre-trained models, for all processes."""
    folder = tmp_path_factory.mktemp("fsdp2")
    for case in CASES:
        model_for(case, folder)
    return folder


@pytest.fixture(scope="module")
def trained(shared: Path) -> list[Results]:
    return in_two_processes("run", shared)


@pytest.fixture(scope="module")
def resumed(shared: Path, trained: list[Results]) -> list[Results]:
    return in_two_processes("resume", shared)


def named(case: Case) -> str:
    return case.name


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=named)
def test_two_processes_do_what_one_does(case: Case, shared: Path, trained: list[Results], tmp_path: Path) -> None:
    one = trainer_fsdp2.run(case, tmp_path, shared, sharded=False)
    assert len(set(one["opened"].values())) > 2
    for result in (each[case.name] for each in trained):
        assert result["sharded"] and not one["sharded"]
        assert result["opened"] == one["opened"]
        assert result["lr"] == one["lr"]
        for part in ("params", "state"):
            assert result[part].keys() == one[part].keys()
            for name, expected in one[part].items():
                torch.testing.assert_close(result[part][name], expected, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=named)
def test_a_resumed_run_ends_with_the_same_bits(case: Case, trained: list[Results], resumed: list[Results]) -> None:
    for before, after in zip(trained, resumed, strict=True):
        whole, rest = before[case.name], after[case.name]
        later = range(BREAK + 1, STEPS + 1)
        assert rest["opened"] == {step: whole["opened"][step] for step in later}
        assert rest["lr"] == {step: whole["lr"][step] for step in later}
        assert len(set(rest["opened"].values())) > 1  # groups opened after the break, too
        assert_equal(rest["params"], whole["params"])
        assert_equal(rest["state"], whole["state"])  # with step counts, anchors and flags


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=named)
def test_the_anchor_of_a_resumed_run_is_the_pretrained_model_and_pulls(
    case: Case, shared: Path, resumed: list[Results], tmp_path: Path
) -> None:
    got = resumed[0][case.name]
    model = model_for(case, shared)
    pretrained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    anchors = {key.removesuffix(".anchor"): value for key, value in got["state"].items() if key.endswith(".anchor")}
    new = {"classifier.weight", "classifier.bias"} if case.kind == "encoder" else set()
    assert pretrained.keys() - anchors.keys() == new
    assert_equal(anchors, {name: pretrained[name] for name in anchors})
    free = trainer_fsdp2.run(case, tmp_path, shared, sharded=False, anchor_decay=0.0)

    def distance(params: dict[str, torch.Tensor]) -> float:
        return sum(float((params[name] - anchor).square().sum()) for name, anchor in anchors.items())

    assert 0.0 < distance(got["params"]) < 0.95 * distance(free["params"])


# -- in one process --------------------------------------------------------------------------------------------


def gone_back_to(model: nn.Module) -> tuple[Unfreezer, dict[str, Any]]:
    """An unfreezer that has copied parameters to go back to, which then moved; and its state."""
    policy = OnPlateau("loss", patience=1, restore_best=True)
    unfreezer = Unfreezer(model, fastft.AdamW(model.named_parameters()), policy, mode="freeze")
    unfreezer.step(loss=1.0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    return unfreezer, unfreezer.state_dict()


def test_copies_of_sharded_parameters_are_saved_whole_and_cut_again(mesh_of_one: DeviceMesh) -> None:
    plain, sharded = Stack(1), fully_shard(Stack(1), mesh=mesh_of_one)
    _, expected = gone_back_to(plain)
    unfreezer, state = gone_back_to(sharded)
    assert all(is_dtensor(tensor) for tensor in state["best"].values())
    best = whole_tensors(state["best"])
    assert best is not None
    assert_equal(best, expected["best"])
    unfreezer.load_state_dict({**state, "best": best})
    assert_equal({n: t.full_tensor() for n, t in unfreezer.state_dict()["best"].items()}, expected["best"])
    assert unfreezer.step(loss=2.0)  # opens, from the parameters of the best event
    named = {name: p.full_tensor() for name, p in sharded.named_parameters()}
    assert_equal({name: named[name] for name in best}, best)
    assert whole_tensors(None) is None


def trainers_state(**unfreezer: Any) -> TrainerState:
    """As it is read from a checkpoint."""
    return TrainerState(global_step=4, stateful_callbacks={integration.STATE_KEY: unfreezer} if unfreezer else {})


def test_the_state_lies_in_that_of_the_trainer(tmp_path: Path) -> None:
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    _, state = gone_back_to(Stack(1))
    beside = {**state, "best": None}
    trainers_state(**{**state, "best": False}).save_to_json(str(tmp_path / "state.json"))
    read = TrainerState.load_from_json(str(tmp_path / "state.json"))
    assert integration.saved_beside(args, read) == beside
    assert integration.saved_beside(args, read) is None  # read once, so that it is not saved again as it was
    assert integration.saved_beside(args, trainers_state()) is None


@pytest.mark.parametrize("moved", [False, True])
def test_copies_lie_in_a_file_in_the_checkpoint(moved: bool, tmp_path: Path) -> None:
    _, state = gone_back_to(Stack(1))
    checkpoint = tmp_path / ("elsewhere" if moved else "out") / "checkpoint-4"
    checkpoint.mkdir(parents=True)
    resumed_from = str(checkpoint) if moved else None
    args = TrainingArguments(str(tmp_path / "out"), use_cpu=True, report_to=[], resume_from_checkpoint=resumed_from)
    with pytest.raises(FileNotFoundError, match=r"fastft_unfreezer_best\.pt: expected the tensors that the policy"):
        integration.saved_beside(args, trainers_state(**{**state, "best": True}))
    torch.save(state["best"], checkpoint / integration.BEST_FILE)
    got = integration.saved_beside(args, trainers_state(**{**state, "best": True}))
    assert got is not None
    assert_equal(got["best"], state["best"])


@pytest.mark.filterwarnings("ignore:FSDP is switching to use .NO_SHARD.")
def test_copies_of_flattened_parameters_are_refused(mesh_of_one: DeviceMesh) -> None:
    wrapper = FullyShardedDataParallel(Stack(1), use_orig_params=True, device_id=torch.device("cpu"))
    optimizer = fastft.AdamW(wrapper.named_parameters())
    unfreezer = Unfreezer(wrapper, optimizer, OnPlateau("loss", restore_best=True), mode="freeze")
    with pytest.raises(ValueError, match="policy: expected restore_best=False with FullyShardedDataParallel"):
        integration.refuse_flat_copies(unfreezer)
    unfreezer.undo()
    integration.refuse_flat_copies(Unfreezer(wrapper, optimizer, GradualUnfreeze(1), mode="freeze"))


def test_weights_that_only_the_first_process_has_are_refused(
    mesh_of_one: DeviceMesh, shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    model = model_for(CASES[0], shared)
    optimizer_cls_and_kwargs(args, model, anchor_decay=5.0)
    expected = "model: expected its weights in every process, got classifier.bias without values in some"
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")

    def all_gather_object(each: list[Any], mine: Any) -> None:
        each[:] = [mine, "classifier.bias"]

    with monkeypatch.context() as patched:
        patched.setattr(dist, "all_gather_object", all_gather_object)
        with pytest.raises(ValueError, match=expected):  # in the first process, too
            optimizer_cls_and_kwargs(args, model, anchor_decay=5.0)
    optimizer_cls_and_kwargs(args, model, anchor_decay=5.0)
    model.classifier.bias = nn.Parameter(torch.empty(2, device="meta"))
    with pytest.raises(ValueError, match=expected):
        optimizer_cls_and_kwargs(args, model)
