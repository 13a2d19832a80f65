"""Sharded parameters are refused by name, before anything is written."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import fastft
from fastft.retention import MoFO, drift_report, interpolate_

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch.distributed is not available")


@pytest.fixture
def model() -> Iterator[nn.Module]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        made = nn.Linear(4, 3)
        mesh = init_device_mesh("cpu", (1,))
        made.weight = nn.Parameter(distribute_tensor(made.weight.detach(), mesh, [Shard(0)]))
        yield made
    finally:
        dist.destroy_process_group()


def test_sharded_parameters_are_refused(model: Any) -> None:
    anchor = fastft.Anchor.snapshot(model)
    with torch.no_grad():
        model.bias.add_(1.0)
    before = model.bias.detach().clone()
    measures: list[Callable[[], Any]] = [
        lambda: interpolate_(model, anchor, 0.5),
        lambda: drift_report(model, anchor, groups=["weight", "bias"]),
    ]
    for measure in measures:
        with pytest.raises(
            ValueError, match="weight: expected a parameter that is whole on this process, got a DTensor"
        ):
            measure()
    assert torch.equal(model.bias, before)
    with pytest.raises(ValueError, match=r"optimizer: expected parameters that are whole, got a DTensor of \[3, 4\]"):
        MoFO(torch.optim.AdamW(model.parameters()), 0.5)
