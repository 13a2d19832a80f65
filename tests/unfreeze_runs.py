"""Runs that tests/unfreeze/ starts as scripts: to be killed and resumed, and over two processes.

``python unfreeze_runs.py train FOLDER`` saves every run after some steps, and dies by SIGKILL in the step after;
``resume FOLDER`` makes everything anew, loads, finishes and saves the ends; ``ddp FILE RANK STORE`` is one of two
processes under DDP.
"""

from __future__ import annotations

import os
import signal
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from started import end_together
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from unfreeze_cases import Stack, backward, batch, bits, params, state_tensors

import fastft
from fastft.optim import RewarmLR, SlantedTriangularLR, layerwise_lr
from fastft.optim.tensors import is_dtensor
from fastft.unfreeze import LISA, GradualUnfreeze, OnPlateau, Unfreezer, layer_groups
from fastft.unfreeze.policies import dearest

STOP, TOTAL = 9, 20
# Improves, stops to, and improves again from somewhere else, before and after the break.
LOSSES = (1.0, 0.7, 0.9, 0.8, 0.75, 0.6, 0.65, 0.62, 0.61, 0.63, 0.4, 0.5, 0.6, 0.45, 0.3, 0.35, 0.36, 0.2, 0.3, 0.25)


class Run:
    """Everything that a training script has and saves."""

    def __init__(self, optimizer: Optimizer, model: nn.Module, scheduler: LRScheduler, unfreezer: Unfreezer) -> None:
        self.optimizer, self.model, self.scheduler, self.unfreezer = optimizer, model, scheduler, unfreezer
        self.opened: list[tuple[str, ...]] = []
        self.step = 0

    def train(self, until: int, in_step: Callable[[int], Any] = lambda step: None) -> None:
        for step in range(self.step, until):
            backward(self.model, step)
            in_step(step)
            self.optimizer.step()
            self.scheduler.step()
            self.unfreezer.step(epoch=(step + 1) / 4, loss=LOSSES[step])
            self.optimizer.zero_grad()
            self.opened.append(self.unfreezer.open_groups)
        self.step = until

    def parts(self) -> dict[str, Any]:
        return {"model": self.model, "optimizer": self.optimizer, "lr": self.scheduler, "unfreezer": self.unfreezer}

    def save(self, path: Path) -> None:
        states = {name: part.state_dict() for name, part in self.parts().items()}
        torch.save({**states, "random": torch.get_rng_state(), "step": self.step, "opened": self.opened}, path)

    def load(self, path: Path) -> None:
        saved = torch.load(path, weights_only=True)
        for name, part in self.parts().items():
            part.load_state_dict(saved[name])
        torch.set_rng_state(saved["random"])
        self.step, self.opened = saved["step"], saved["opened"]

    def end(self) -> dict[str, Any]:
        return {
            "params": bits(params(self.model)),
            "moments": bits(state_tensors(self.optimizer)),
            "lr": [group["lr"] for group in self.optimizer.param_groups],
            "opened": self.opened,
            "report": str(self.unfreezer.report()),
        }


def gradual() -> Run:
    model = Stack(4, dropout=0.2)
    groups = layerwise_lr(layer_groups(model), 1e-2, decay=1 / 2.6, weight_decay=0.1)
    optimizer = torch.optim.AdamW(groups)
    scheduler = SlantedTriangularLR(optimizer, TOTAL, cut_frac=0.3)
    return Run(optimizer, model, scheduler, Unfreezer(model, optimizer, GradualUnfreeze(4), rewarm_steps=3))


def lisa() -> Run:
    model = Stack(4, dropout=0.2)
    groups = layerwise_lr(layer_groups(model), 1e-2, decay=1 / 2.6, weight_decay=0.1)
    optimizer = fastft.AdamW(groups, anchor="init", anchor_decay=2.0, max_grad_norm=0.5)
    scheduler = RewarmLR(optimizer, TOTAL, 3, starts=(0, 10))
    policy = LISA(2, every=2, seed=7)
    unfreezer = Unfreezer(model, optimizer, policy, mode="freeze", state_policy="reset", rewarm_steps=2)
    return Run(optimizer, model, scheduler, unfreezer)


def plateau() -> Run:
    model = Stack(4, dropout=0.2)
    optimizer = fastft.AdamW(model.named_parameters(), 1e-2, anchor="init", anchor_decay=2.0)
    scheduler = SlantedTriangularLR(optimizer, TOTAL)
    policy = OnPlateau("loss", patience=2, restore_best=True)
    return Run(optimizer, model, scheduler, Unfreezer(model, optimizer, policy, state_policy="offload"))


RUNS: dict[str, Callable[[], Run]] = {"gradual": gradual, "lisa": lisa, "plateau": plateau}


def make(name: str) -> Run:
    run = RUNS[name]()
    torch.manual_seed(42)
    return run


def train_and_die(folder: Path) -> None:
    for name in RUNS:
        run = make(name)
        run.train(STOP)
        run.save(folder / f"{name}.saved")
        if name == list(RUNS)[-1]:
            run.train(TOTAL, in_step=lambda step: os.kill(os.getpid(), signal.SIGKILL))


def resume(folder: Path) -> None:
    for name in RUNS:
        run = make(name)
        torch.manual_seed(7)  # not where the other process was
        run.load(folder / f"{name}.saved")
        run.train(TOTAL)
        torch.save(run.end(), folder / f"{name}.end")


# -- two processes -------------------------------------------------------------------------------------------


def whole(wrap: Callable[[Stack], nn.Module], part: Callable[[Tensor], Tensor], mode: Any = "freeze") -> dict[str, Any]:
    """Trains on its part of every batch; the parameters after each step."""
    model = Stack(3)
    wrapped = wrap(model)
    groups = layerwise_lr(layer_groups(wrapped), 1e-2, decay=1 / 1.5, weight_decay=0.1)
    optimizer = fastft.AdamW(groups, eps=1e-4, anchor="init", anchor_decay=2.0, max_grad_norm=0.5)
    unfreezer = Unfreezer(wrapped, optimizer, GradualUnfreeze(2), mode=mode, rewarm_steps=2)
    path, opened = [], []
    for step in range(14):
        x, y = batch(step, rows=8)
        cross_entropy(wrapped(part(x)), part(y)).backward()
        optimizer.step()
        path.append(bits({name: p.full_tensor() if is_dtensor(p) else p for name, p in params(model).items()}))
        opened.append(unfreezer.open_groups)
        unfreezer.step()
        optimizer.zero_grad()
    return {"path": path, "opened": opened, "notes": unfreezer.report().notes}


def sharded(model: Stack) -> Stack:
    mesh = init_device_mesh("cpu", (2,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def refused(model: nn.Module) -> str:
    try:
        Unfreezer(model, torch.optim.AdamW(model.parameters()), GradualUnfreeze(2))
    except ValueError as error:
        return str(error)
    return ""


def ddp(file: Path, rank: int, store: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)

    def part(t: Tensor) -> Tensor:
        return t.chunk(2)[rank]

    ends = {
        "static": whole(partial(DistributedDataParallel, static_graph=True), part),
        "dynamic": whole(DistributedDataParallel, part),
        "views": whole(partial(DistributedDataParallel, static_graph=True, gradient_as_bucket_view=True), part),
        "sharded": whole(sharded, part),
        "sharded flags": whole(sharded, part, "requires_grad"),
    }
    message = refused(DistributedDataParallel(Stack(2)))
    measured = dearest([float(rank), 3.0 - rank])
    if rank == 0:
        torch.save({"ends": ends, "refused": message, "measured": measured}, file)
    end_together()


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("error", UserWarning)
    warnings.filterwarnings("ignore", message=".*(lr_scheduler|DDP|barrier|static).*")
    task, where, *rest = sys.argv[1:]
    if task == "ddp":
        ddp(Path(where), int(rest[0]), Path(rest[1]))
    else:
        {"train": train_and_die, "resume": resume}[task](Path(where))
