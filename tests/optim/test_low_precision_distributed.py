"""Weights and moments in few bits over two processes, and the numbers that say where a shard lies in the whole."""

from __future__ import annotations

import math
from typing import Any

import low_precision_distributed as scenarios
import pytest
import torch
from contract_distributed import run_in_two_processes
from optim_cases import same_bits
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import fastft
from fastft.optim.low_precision import Precision, element_index


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    return run_in_two_processes(scenarios.__file__, tmp_path_factory.mktemp("two_processes"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:state_dict. has low bits", "ignore:anchor_decay")
@pytest.mark.parametrize("name", scenarios.SCENARIOS)
def test_two_processes_have_the_bits_of_one(name: str, two_processes: dict[str, list[Any]]) -> None:
    kind, _, setting = name.partition("-")
    if kind == "another_format":
        expected = scenarios.another_format(setting)
    elif kind == "written_in_one_process":
        expected = {}
    else:
        expected = scenarios.in_one_process(setting)
    if kind == "shares_of_zero":  # each process has the state of some
        expected = {name: expected[name] for name, _ in scenarios.build(setting).named_parameters()}
    for result in two_processes[name]:
        assert isinstance(result, dict), result  # else the traceback
        assert result.keys() == expected.keys()
        for key, value in expected.items():
            assert same_bits(result[key], value), f"{key}: {(result[key] != value).float().mean():.2%} differ"


# -- where a shard lies ------------------------------------------------------------------------------------------


PLACEMENTS: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[Any, ...]]] = {
    "rows": ((3,), (7, 5), (Shard(0),)),
    "columns": ((3,), (7, 5), (Shard(1),)),
    "last": ((2,), (3, 5, 6), (Shard(2),)),
    "middle": ((2,), (3, 5, 6), (Shard(1),)),
    "more_processes_than_rows": ((4,), (3, 5), (Shard(0),)),
    "one_dimension": ((4,), (13,), (Shard(0),)),
    "replicated": ((2, 2), (5, 6), (Replicate(), Replicate())),
    "hybrid": ((2, 2), (7, 6), (Replicate(), Shard(0))),
    "rows_and_columns": ((2, 2), (7, 6), (Shard(0), Shard(1))),
    "columns_and_rows": ((2, 2), (7, 6), (Shard(1), Shard(0))),
    "rows_twice": ((2, 2), (7, 6), (Shard(0), Shard(0))),
    "inner_two": ((2, 2), (1, 5, 6), (Shard(1), Shard(2))),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", PLACEMENTS)
@pytest.mark.parametrize("transposed", [False, True])
def test_the_index_of_every_element_of_every_shard(kind: str, transposed: bool, pretended: Any) -> None:
    mesh_shape, shape, placements = PLACEMENTS[kind]
    seen = set()
    for rank in range(math.prod(mesh_shape)):
        mesh = pretended(rank, mesh_shape)
        # Each element's value is its place in memory.
        places = torch.arange(math.prod(shape)).view(shape)
        if transposed:
            places = torch.arange(math.prod(shape)).view(shape[::-1]).permute(*reversed(range(len(shape))))
        p = distribute_tensor(places, mesh, placements, src_data_rank=None)
        part = p.to_local()
        if transposed:  # torch makes shards contiguous: this one is to lie as the whole does
            local = torch.empty(part.shape[::-1], dtype=part.dtype).permute(*reversed(range(part.dim()))).copy_(part)
            p = DTensor.from_local(local, mesh, placements, run_check=False, shape=p.shape, stride=places.stride())
            part = p.to_local()
        index = element_index(p, "p")
        flat = part.as_strided((part.numel(),), (1,))
        if part.numel() == 0:
            assert index is None
            continue
        assert index is not None
        row, stride, first = index
        i = torch.arange(part.numel())
        assert torch.equal(flat, first + i // row * stride + i % row)
        assert part.numel() % row == 0
        seen.update(flat.tolist())
    assert seen == set(range(math.prod(shape)))


@pytest.mark.filterwarnings("ignore")
def test_what_three_numbers_cannot_say_is_refused(pretended: Any) -> None:
    mesh = pretended(3, (2, 2))
    said = (
        r'^p: rounding: "stochastic" cannot number the elements of a DTensor placed \[.*\] on a mesh of shape \(2, 2\)'
    )
    outer_and_inner = distribute_tensor(torch.zeros(4, 4, 4), mesh, [Shard(1), Shard(2)], src_data_rank=None)
    with pytest.raises(ValueError, match=said):
        element_index(outer_and_inner, "p")
    from torch.distributed.tensor.placement_types import _StridedShard

    strided = DTensor.from_local(torch.zeros(2, 4), mesh, [_StridedShard(0, split_factor=2), Shard(0)], run_check=False)
    with pytest.raises(ValueError, match=said):
        element_index(strided, "p")
    bfloat16 = strided.to(torch.bfloat16).detach().requires_grad_()
    bfloat16.grad = torch.zeros_like(bfloat16)
    optimizer = fastft.AdamW([("p", bfloat16)], rounding="stochastic")
    with pytest.raises(ValueError, match=said):
        optimizer.step()
    assert not optimizer.state
    fastft.AdamW([("p", bfloat16)], extra_bits=16).step()  # to which it does not matter


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("placements", "kept"),
    [
        ((Shard(0), Replicate()), "8bit"),
        ((Replicate(), Replicate()), "8bit"),
        ((Shard(0), Shard(0)), "8bit"),
        ((Replicate(), Shard(1)), None),
        ((Shard(1), Shard(0)), None),
    ],
    ids=str,
)
def test_8_bits_are_for_whole_rows(placements: Any, kept: str | None, pretended: Any) -> None:
    mesh = pretended(1, (2, 2))
    p = distribute_tensor(torch.zeros(64, 128), mesh, placements, src_data_rank=None).requires_grad_()
    if kept is None:
        with pytest.raises(
            ValueError, match=r'^w: state_dtype: expected, with "8bit", a DTensor of which each process'
        ):
            fastft.AdamW([("w", p)], state_dtype="8bit")
    else:
        assert Precision("8bit").moments(p) == kept
        fastft.AdamW([("w", p)], state_dtype="8bit")
    # A sharded vector, and what is too small, is kept in float32 however it lies.
    vector = distribute_tensor(torch.zeros(8192), mesh, [Shard(0), Replicate()], src_data_rank=None)
    small = distribute_tensor(torch.zeros(32, 64), mesh, [Shard(1), Replicate()], src_data_rank=None)
    for other in (vector, small):
        Precision("8bit").check_parameter(other, "p")
        assert Precision("8bit").moments(other) == torch.float32
