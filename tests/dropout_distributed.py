"""A script that tests/nn/test_fuse.py runs twice, as two ranks."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from fuse_cases import Residual
from started import end_together
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fastft.nn import fuse_dropout_

WORLD = 2


def main(rank: int, folder: Path) -> dict[str, Any]:
    """The same model and batch on all ranks: gradients without wrapping, and with it, seeded alike and by rank."""
    results: dict[str, Any] = {}
    for seeding in ("alike", "by rank"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 16), Residual(16, 0.5), nn.Linear(16, 4))
        fuse_dropout_(model)
        x = torch.randn(5, 8)
        seed = 100 + (rank if seeding == "by rank" else 0)
        found = []
        for wrapped in (False, True):
            # Some parameters are not used: the norms that no forward calls.
            module = DistributedDataParallel(model, find_unused_parameters=True) if wrapped else model
            torch.manual_seed(seed)
            model.zero_grad()
            y = module(x)
            y.square().sum().backward()
            found.append((y.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]))
        results[seeding] = found
    return results


if __name__ == "__main__":
    rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    torch.save(main(rank, folder), folder / f"results_{rank}.pt")
    end_together()
