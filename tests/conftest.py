"""For all tests: which cases of a large product are slow, what is collected, and process groups of one process."""

from __future__ import annotations

import gc
import math
import os
from collections.abc import Iterator
from typing import Any

import one_per_axis
import pytest

# Read when torch is imported: threads that spin while they wait take the core from those that work.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

LARGE = 40
"""Of a test with more cases than this, the quick set has one case for each value of each axis."""


@pytest.hookimpl(tryfirst=True)  # before -m is applied
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for cases in one_per_axis.by_test(items):
        kept = one_per_axis.chosen(cases) if len(cases) > LARGE else cases
        for case in set(cases).difference(kept):
            case.add_marker(pytest.mark.slow)


def pytest_collection_finish() -> None:
    """Modules and tests live to the end: without them a full collection takes a tenth of the time."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def mesh_of_one() -> Iterator[Any]:
    """A mesh of this process, with a process group of it."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()


@pytest.fixture
def pretended() -> Iterator[Any]:
    """Makes a mesh in a process group of a rank that is alone in believing in the others."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    def begin(rank: int, shape: tuple[int, ...], names: tuple[str, ...] | None = None) -> Any:
        if dist.is_initialized():
            dist.destroy_process_group()
        dist.init_process_group("fake", rank=rank, world_size=math.prod(shape), store=FakeStore())
        return init_device_mesh("cpu", shape, mesh_dim_names=names)

    try:
        yield begin
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
