"""The CUDA kernels on the host: chunk tables, launches, uploads, edges, norms, skipping.

Not named test_*: it is run over the sanitized build, by test_cuda_on_cpu.py, and needs what that provides.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cuda_on_cpu.kernel_cases import (
    CASES,
    CHUNK,
    COMBINATIONS,
    DTYPES,
    UNIT,
    Outcome,
    Random,
    as_grad,
    bits,
    differing,
    misaligned,
    outcome,
    projected,
    short,
)
from cuda_on_cpu.plugin import counters
from torch import Tensor, nn

import fastft
from fastft import _C
from fastft.optim import adamw_
from fastft.optim.entries import Part
from fastft.optim.step import take_step

CPU = (1, 0)  # the DLPack device
ORDERS = ("forward", "reverse", "shuffled")
# Kernel parameters have 32,000 bytes for rows of 88 bytes and 10 bytes a tensor.
TENSORS_PER_LAUNCH = (32000 - 88) // 10


GROUP = {
    "lr": 1e-3,
    "betas": (0.9, 0.999),
    "eps": 1e-8,
    "weight_decay": 0.1,
    "anchor_decay": 0.0,
    "amsgrad": False,
    "maximize": False,
}


@pytest.fixture(scope="session")
def expected() -> dict[str, Outcome]:
    """The results of the cases, from the ordinary module."""
    return torch.load(os.environ["FASTFT_EXPECTED"])


@pytest.fixture(params=ORDERS)
def block_order(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The order in which blocks begin and threads take turns."""
    monkeypatch.setenv("FASTFT_BLOCK_ORDER", request.param)
    return request.param


def stepped(optimizer: fastft.AdamW, grads: list[Tensor | None]) -> fastft.AdamW:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for p, grad in zip(params, grads, strict=True):
        p.grad = None if grad is None else as_grad(p, grad)
    optimizer.step()
    return optimizer


def launches(optimizer: fastft.AdamW) -> int:
    """How many kernels the optimizer's plan has launched since it was made."""
    assert len(optimizer._parts) == 1
    return optimizer._parts[0].plan.launches(CPU)


# -- the same bits as from the CPU loops ---------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_bits_are_those_of_the_cpu_loops(name: str, expected: dict[str, Outcome]) -> None:
    got = CASES[name]()
    assert differing(got, expected[name]) == []
    assert len(got) > 0


# -- launches and uploads ------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("needs_norm", [False, True])
@pytest.mark.parametrize(("dtype", "state_dtype"), COMBINATIONS)
def test_one_launch_for_all_groups_and_two_with_a_norm(
    dtype: torch.dtype, state_dtype: torch.dtype | None, needs_norm: bool, weighted: bool
) -> None:
    random = Random(5)
    params = [nn.Parameter(random.values(n, dtype=dtype)) for n in (1, CHUNK, 3 * CHUNK + 1, 5, 0, 40)]
    groups = [{"params": params[i : i + 2], "lr": 10.0**-i} for i in (0, 2, 4)]
    anchor = fastft.Anchor.snapshot((f"p{i}", p) for i, p in enumerate(params[1:]))  # one is free
    if weighted:
        anchor = anchor.with_importance({f"p{i}": random.importance(*p.shape) for i, p in enumerate(params[1:])})
    optimizer = fastft.AdamW(
        groups, anchor=anchor, anchor_decay=0.1, state_dtype=state_dtype, max_grad_norm=1.0 if needs_norm else None
    )
    for step in range(1, 4):
        before = counters()
        stepped(optimizer, [random.values(*p.shape, dtype=dtype) for p in params])
        done = counters() - before
        # An importance takes the generic kernel, with which float64 goes always; what is free does not need it.
        assert done["launches"] == 1 + needs_norm + (weighted and dtype != torch.float64)
        assert launches(optimizer) == step * done["launches"]
        # A block for each chunk, and one for a tensor of nothing, whose step is counted too.
        assert done["blocks"] == (1 + needs_norm) * (1 + 1 + 4 + 1 + 1 + 1)


def test_a_launch_for_tensors_with_a_mask_of_elements() -> None:
    random = Random(19)
    params = [nn.Parameter(random.values(40, 32)) for _ in range(6)]
    optimizer = fastft.AdamW(params)
    optimizer.set_update_mask(params[1], random.mask(40, 32))
    optimizer.set_update_mask(params[2], random.mask(40))  # a list of rows, which needs no kernel of its own
    optimizer.set_update_mask(params[4], random.mask(40, 32))
    stepped(optimizer, [random.values(*p.shape) for p in params])
    assert launches(optimizer) == 2


@pytest.mark.parametrize("needs_norm", [False, True])
def test_selective_anchors_take_two_launches_of_their_own(needs_norm: bool) -> None:
    """And they alone: what is free, and what other groups pull, goes with the others in one."""
    random = Random(18)
    params = [nn.Parameter(random.values(n)) for n in (1, CHUNK, 3 * CHUNK + 1, 5, 0, 40)]
    named = [(f"p{i}", p) for i, p in enumerate(params)]
    groups = [{"params": named[:4], "anchor_mode": "selective"}, {"params": named[4:]}]
    anchor = fastft.Anchor.snapshot(named, exclude="p0")
    optimizer = fastft.AdamW(groups, anchor=anchor, anchor_decay=0.1, max_grad_norm=1.0 if needs_norm else None)
    for step in range(1, 4):
        before = counters()
        stepped(optimizer, [random.values(*p.shape) for p in params])
        assert launches(optimizer) == step * (4 if needs_norm else 3)
        done = counters() - before
        assert done["blocks"] == 2 * (1 + 4 + 1) + (1 + 1 + 1) + (9 if needs_norm else 0)
        assert done["uploads"] == (step == 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_projection_repeats_bit_for_bit_in_any_order_of_blocks(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = projected(dtype, None, capturable=True, scaler=True)
    for order in ORDERS:
        for _ in range(2):  # a shuffle is another one each time
            monkeypatch.setenv("FASTFT_BLOCK_ORDER", order)
            assert differing(projected(dtype, None, capturable=True, scaler=True), first) == []
    # And it is projection: most tensors end elsewhere without.
    free = projected(dtype, None, anchor_decay=0.0, capturable=True, scaler=True)
    moved = [name for name in differing(free, first) if name.isdigit()]
    assert len(moved) >= 12 and "4" not in moved and "17" not in moved


@pytest.mark.parametrize("needs_norm", [False, True])
def test_a_launch_for_each_combination_of_dtypes(needs_norm: bool) -> None:
    random = Random(6)
    counts = []
    for n in range(1, len(COMBINATIONS) + 1):
        chosen = COMBINATIONS[:n] * 2
        params = [random.values(50, dtype=dtype) for dtype, _ in chosen]
        moments = [torch.zeros_like(p, dtype=state) for p, (_, state) in zip(params, chosen, strict=True)]
        before = counters()
        adamw_(
            params,
            [random.values(50, dtype=p.dtype) for p in params],
            moments,
            [m.clone() for m in moments],
            [torch.zeros(()) for _ in params],
            lr=1e-2,
            max_grad_norm=1.0 if needs_norm else None,
        )
        counts.append((counters() - before)["launches"])
    assert counts == [n + needs_norm for n in range(1, len(COMBINATIONS) + 1)]


@pytest.mark.parametrize("extra", [0, 1])
def test_another_launch_only_for_more_tensors_than_fit(extra: int) -> None:
    random = Random(14)
    params = [nn.Parameter(torch.ones(2)) for _ in range(TENSORS_PER_LAUNCH + extra)]
    optimizer = fastft.AdamW(params, lr=0.1, max_grad_norm=1.0 if extra else None)
    grads = [random.sixty_fourths(2) + 2 for _ in params]
    stepped(optimizer, grads)
    assert launches(optimizer) == (4 if extra else 1)
    if extra:
        assert optimizer.grad_norm == torch.cat(grads).double().square().sum().sqrt()
    # Adam's first step is lr whatever the gradient: each tensor was stepped, and once.
    torch.testing.assert_close(torch.stack([p.detach() for p in params]), torch.full((len(params), 2), 0.899))


@pytest.mark.parametrize(("groups", "expected_launches"), [(326, 1), (327, 2)])
def test_a_second_launch_only_for_more_groups_than_fit(groups: int, expected_launches: int) -> None:
    params = [nn.Parameter(torch.ones(1)) for _ in range(groups)]
    optimizer = fastft.AdamW([{"params": [p], "lr": 1e-3 * i} for i, p in enumerate(params)], weight_decay=0.0)
    stepped(optimizer, [torch.ones(1) for _ in params])
    assert launches(optimizer) == expected_launches
    moved = torch.stack([1.0 - p.detach() for p in params]).flatten()
    torch.testing.assert_close(moved, 1e-3 * torch.arange(groups), atol=1e-6, rtol=1e-5)


def table_uploads(optimizer: fastft.AdamW, grads: list[Tensor | None]) -> int:
    before = counters()
    stepped(optimizer, grads)
    done = counters() - before
    assert done["memsets"] == done["uploads"]  # the tickets, each time
    return done["uploads"]


def test_the_table_travels_only_when_something_in_it_changed() -> None:
    random = Random(7)
    params = [nn.Parameter(random.values(n)) for n in (8, CHUNK + 8, 32)]
    rows = nn.Parameter(random.values(6, 16))
    optimizer = fastft.AdamW([*params, rows], lr=1e-2, anchor="init", anchor_decay=1.0, max_grad_norm=1.0)

    def uploads(change: Callable[[list[Tensor | None]], Any] | None = None) -> int:
        grads: list[Tensor | None] = [random.values(*p.shape) for p in [*params, rows]]
        if change is not None:
            change(grads)
        return table_uploads(optimizer, grads)

    assert uploads() == 1
    assert uploads() == 0  # gradients elsewhere in memory
    optimizer.param_groups[0]["lr"] = 3e-2
    optimizer.param_groups[0]["weight_decay"] = 0.5
    assert uploads() == 0
    assert uploads(lambda grads: grads.__setitem__(0, misaligned(grads[0]))) == 0  # wherever they begin
    assert uploads(lambda grads: grads.__setitem__(1, None)) == 1
    assert uploads() == 1
    assert uploads(lambda grads: grads.__setitem__(2, grads[2].bfloat16())) == 1
    assert uploads() == 1
    optimizer.set_update_mask(rows, random.mask(6))
    assert uploads() == 1
    assert uploads() == 0
    params[0].data = params[0].detach().clone()
    assert uploads() == 1
    optimizer.state[params[1]]["exp_avg"] = optimizer.state[params[1]]["exp_avg"].clone()
    assert uploads() == 1
    optimizer.add_param_group({"params": [nn.Parameter(random.values(5))]})
    params_now = [p for group in optimizer.param_groups for p in group["params"]]
    assert table_uploads(optimizer, [random.values(*p.shape) for p in params_now]) == 1
    assert table_uploads(optimizer, [random.values(*p.shape) for p in params_now]) == 0


# -- chunks and edges ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_every_element_of_every_chunk_is_stepped_once(dtype: torch.dtype, block_order: str) -> None:
    # Equal elements stay equal, whatever their place: one missed or stepped twice stands out.
    sizes = [n * CHUNK + extra for n in (1, 2, 3) for extra in (-9, -1, 0, 1, 2, 7, 8, 9)] + list(range(20))
    params = [nn.Parameter(torch.full((n,), 2.0, dtype=dtype)) for n in sizes]
    optimizer = fastft.AdamW(params, lr=0.25, weight_decay=0.5, anchor="init", anchor_decay=1.0)
    for p in params:
        p.data.fill_(3.0)
    for _ in range(2):
        stepped(optimizer, [torch.full_like(p, 0.5) for p in params])
    for key in ("param", "exp_avg", "exp_avg_sq"):
        values = [(p.detach() if key == "param" else optimizer.state[p][key]) for p in params if p.numel()]
        assert {t.unique().numel() for t in values} == {1}
        assert len({float(t[0]) for t in values}) == 1
    # Twice: 3 - lr·wd·3 - lr·λ·(3 - 2), and Adam's step of lr.
    first = 3 - 0.375 - 0.25 - 0.25
    second = first - 0.125 * first - 0.25 * (first - 2) - 0.25
    torch.testing.assert_close(float(params[0].detach()[0]), second, rtol=1e-2, atol=0.0)
    assert [float(optimizer.state[p]["step"]) for p in params] == [2.0] * len(params)


PLAIN = ("params", "grads", "exp_avgs", "exp_avg_sqs", "anchors", "update_masks")
ARRAYS = (*PLAIN, "max_exp_avg_sqs", "importances")


def functional_step(arrays: dict[str, Tensor], **options: Any) -> None:
    step = torch.zeros(())
    adamw_(
        steps=[step],
        lr=1e-2,
        weight_decay=0.3,
        anchor_decay=2.0,
        **{name: [array] for name, array in arrays.items()},
        **options,
    )
    assert step == 1


@pytest.mark.parametrize("which", ARRAYS)
@pytest.mark.parametrize(("dtype", "state_dtype"), COMBINATIONS)
def test_misaligned_memory_gives_the_same_bits(dtype: torch.dtype, state_dtype: torch.dtype | None, which: str) -> None:
    """For plain arrays the lean kernel against the generic one, or against its own reading of gradients."""
    random = Random(8)
    n = CHUNK + 21
    arrays = {name: random.values(n, dtype=dtype) for name in (PLAIN if which in PLAIN else ARRAYS)}
    for name in {"exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs"} & arrays.keys():
        arrays[name] = arrays[name].to(state_dtype or dtype).abs()
    if "importances" in arrays:
        arrays["importances"] = arrays["importances"].abs()
    arrays["update_masks"] = random.mask(n)
    moved = {name: misaligned(t) if name == which else t.clone() for name, t in arrays.items()}
    assert all(t.data_ptr() % 16 == 0 for t in arrays.values())
    assert moved[which].data_ptr() % 16 != 0
    functional_step(arrays)
    functional_step(moved)
    assert differing(arrays, moved) == []


@pytest.mark.parametrize("offset", [4, 8, 12])
def test_memory_aligned_to_less_than_a_vector_access(offset: int) -> None:
    # Enough for a float or two, not for four.
    random = Random(9)
    base = random.values(3, 200)
    arrays = {"params": base[0, offset // 4 : offset // 4 + 150], "grads": base[1, :150]}
    arrays |= {"exp_avgs": torch.zeros(150), "exp_avg_sqs": torch.zeros(150), "anchors": base[2, :150]}
    copies = {name: t.clone() for name, t in arrays.items()}
    functional_step(arrays)
    functional_step(copies)
    assert differing(arrays, copies) == []


@pytest.mark.parametrize("width", [16, 17, 20, 24, 31, 32, 40, 1024])
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_rows_step_as_the_same_elements_do(dtype: torch.dtype, width: int) -> None:
    random = Random(10)
    rows = 2 * CHUNK // width + 3
    live = random.mask(rows, live=0.7)
    results = []
    for mask in (live, live[:, None].expand(rows, width)):
        random = Random(11)
        p = nn.Parameter(random.values(rows, width, dtype=dtype))
        before = p.detach().clone()
        optimizer = fastft.AdamW([p], lr=1e-2, anchor="init", anchor_decay=1.0, max_grad_norm=1.0)
        optimizer.set_update_mask(p, mask)
        for _ in range(2):
            grad = random.sixty_fourths(rows, width, dtype=dtype)
            grad[~live] = float("nan")  # masked out, so it counts nowhere
            stepped(optimizer, [grad])
        results.append(outcome(optimizer))
        assert torch.equal(bits(p.detach()[~live]), bits(before[~live]))
        assert not torch.equal(p.detach()[live], before[live])
        assert (optimizer.state[p]["exp_avg"][~live] == 0).all()
    assert differing(*results) == []


@pytest.mark.parametrize("shape", [(40, 32), (33, 17)])
def test_no_live_row_at_all(shape: tuple[int, int]) -> None:
    random = Random(12)
    frozen, other = (nn.Parameter(random.values(*s)) for s in (shape, (20,)))
    before = frozen.detach().clone()
    optimizer = fastft.AdamW([frozen, other], lr=1e-2, max_grad_norm=1.0, capturable=True)
    optimizer.set_update_mask(frozen, torch.zeros(shape[0], dtype=torch.bool))
    grad = random.sixty_fourths(20)
    stepped(optimizer, [torch.full(shape, float("inf")), grad])
    assert torch.equal(frozen.detach(), before)
    assert optimizer.grad_norm == grad.double().norm()
    assert optimizer.state[frozen]["step"] == 1


# -- weights and moments in few bits -------------------------------------------------------------------------


@pytest.mark.parametrize("state_dtype", [torch.float32, "8bit"])
@pytest.mark.parametrize("extra_bits", [8, 16])
@pytest.mark.parametrize("whole", [True, False])  # the lean kernel and the generic one
def test_low_bits_count_as_0_in_units_that_somebody_has_written(
    extra_bits: Any, state_dtype: Any, whole: bool, block_order: str
) -> None:
    random = Random(21)
    weights = random.values(3 * CHUNK + 8, dtype=torch.bfloat16)
    p = nn.Parameter(weights if whole else misaligned(weights))
    optimizer = fastft.AdamW([p], lr=1e-3, weight_decay=0.0, extra_bits=extra_bits, state_dtype=state_dtype)
    mask = random.mask(p.numel())
    optimizer.set_update_mask(p, mask)
    for _ in range(2):
        stepped(optimizer, [random.values(*p.shape, dtype=torch.bfloat16)])
    before = outcome(optimizer)
    kept = before["0.low_bits"].to(torch.int32)
    assert (kept[mask] != 0).float().mean() > 0.9 and (kept[~mask] == 0).all()
    optimizer.param_groups[0]["lr"] = 0.0
    stepped(optimizer, [torch.zeros_like(p)])
    after = outcome(optimizer)
    assert torch.equal(after["0"], before["0"]) and torch.equal(after["0.low_bits"], before["0.low_bits"])
    live = mask.nonzero().flatten()
    place = int(live[live > CHUNK + 100][0])
    p.data[place] += 1.0
    for _ in range(2):  # and what is written then is known again
        stepped(optimizer, [torch.zeros_like(p)])
    after = outcome(optimizer)
    assert after["0"][place] == before["0"][place] + 1.0
    unit = place // UNIT * UNIT
    kept[unit : unit + UNIT] = 0
    assert torch.equal(after["0.low_bits"].to(torch.int32), kept)


# (row, stride, first) of a part, and the part: rows, or columns of which eight lie together, or do not.
SHARDS = {
    "rows": ((33 * 96, 33 * 96, 7 * 96), (slice(7, 40), slice(None))),
    "columns": ((32, 96, 48), (slice(None), slice(48, 80))),
    "odd columns": ((12, 96, 50), (slice(None), slice(50, 62))),
}


@pytest.mark.parametrize("shard", SHARDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_shard_is_rounded_as_the_whole_is(dtype: torch.dtype, shard: str, block_order: str) -> None:
    random = Random(22)
    p, grad = random.values(40, 96, dtype=dtype), random.values(40, 96, dtype=dtype)
    index, part = SHARDS[shard]
    results = []
    for where, cut in ((None, (slice(None), slice(None))), (index, part)):
        weight = p[cut].clone().contiguous()
        record = _C.AdamWRecord(
            weight,
            0,
            name="p",
            rounding_key=0x123456789ABCDEF0,
            index=where,
            stepped=weight,
            exp_avg=torch.zeros(weight.shape),
            exp_avg_sq=torch.zeros(weight.shape),
            step=torch.tensor(4.0),
        )
        stepped_alone = Part([record])
        stepped_alone.plan.set_grad(0, grad[cut].clone().contiguous())
        take_step([stepped_alone], [GROUP])
        results.append(weight)
    assert torch.equal(bits(results[1]), bits(results[0][part]))
    assert not torch.equal(results[1], p[part])


# -- the norm ------------------------------------------------------------------------------------------------


def norm_case(sizes: tuple[int, ...]) -> fastft.AdamW:
    random = Random(13)
    params = [nn.Parameter(random.values(n, dtype=DTYPES[i % 4])) for i, n in enumerate(sizes)]
    optimizer = fastft.AdamW(params, lr=1e-2, max_grad_norm=0.5, capturable=True)
    for _ in range(2):
        stepped(optimizer, [random.values(*p.shape, dtype=p.dtype) * 10.0 ** (i % 5) for i, p in enumerate(params)])
    return optimizer


def test_the_norm_has_the_same_bits_in_any_order_of_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = (3, 5 * CHUNK + 7, 1, 400, CHUNK, 2 * CHUNK + 1, 9, 77)
    first = outcome(norm_case(sizes))
    for order in ORDERS:
        for _ in range(2):  # a shuffle is another one each time
            monkeypatch.setenv("FASTFT_BLOCK_ORDER", order)
            assert differing(outcome(norm_case(sizes)), first) == []


@pytest.mark.parametrize("count", [1, 255, 256, 257, 600])
def test_the_last_block_adds_up_all_chunks(count: int) -> None:
    # Also more chunks than it has threads.
    random = Random(count)
    params = [nn.Parameter(torch.zeros(3)) for _ in range(count)]
    optimizer = fastft.AdamW(params, lr=1e-2, max_grad_norm=1.0)
    for _ in range(1 if count > 256 else 3):  # the ticket of one step must not be counted in the next
        grads = [random.sixty_fourths(3) for _ in params]
        stepped(optimizer, grads)
        assert optimizer.grad_norm == torch.cat(grads).double().square().sum().sqrt()


# -- skipping ------------------------------------------------------------------------------------------------


# A gradient's element and what it becomes; or what a loss scaler found, added up over its devices.
BAD = {"inf": (-1, "inf"), "-inf": (0, "-inf"), "nan": (CHUNK, "nan"), "found": (None, 1.0), "found twice": (None, 2.0)}


@pytest.mark.parametrize("mode", ["decoupled", "selective"])
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("capturable", [False, True])
def test_a_skipped_step_changes_nothing(bad: str, capturable: bool, block_order: str, mode: str) -> None:
    random = Random(15)
    position, value = BAD[bad]
    params = [nn.Parameter(random.values(2 * CHUNK + 3, dtype=dtype)) for dtype in DTYPES]
    optimizer = fastft.AdamW(
        params,
        lr=1e-2,
        weight_decay=0.5,
        anchor="init",
        anchor_decay=1.0,
        anchor_mode=mode,
        amsgrad=True,
        capturable=capturable,
        max_grad_norm=1.0,
        skip_nonfinite=position is not None,
    )
    for step in range(1, 4):
        grads = [random.values(*p.shape, dtype=p.dtype) for p in params]
        if position is None:
            optimizer.found_inf = torch.tensor(0.0)
        stepped(optimizer, grads)
        before = outcome(optimizer)
        assert before["0.step"] == step
        if position is None:
            optimizer.found_inf = torch.tensor(value)
        else:
            grads[2][position] = float(value)
        stepped(optimizer, grads)
        after = outcome(optimizer)
        assert set(differing(after, before)) <= {"skipped_steps", "grad_norm"}
        assert after["skipped_steps"] == step
        assert after["grad_norm"].isfinite() == (position is None)


def test_without_skipping_nothing_is_skipped() -> None:
    p = nn.Parameter(torch.ones(40))
    optimizer = fastft.AdamW([p], lr=1e-2, max_grad_norm=1.0)
    stepped(optimizer, [torch.full((40,), float("nan"))])
    assert p.isnan().all()
    assert optimizer.skipped_steps == 0


# -- step counts on the device -------------------------------------------------------------------------------


@pytest.mark.parametrize("option", [{"capturable": True}, {"fused": True}, {"skip_nonfinite": True}])
def test_step_counts_on_the_device(option: dict[str, bool], block_order: str) -> None:
    results = []
    for options in (option, {}):
        random = Random(16)
        params = [nn.Parameter(random.values(n)) for n in (5, 4 * CHUNK + 1, CHUNK, 300)]
        optimizer = fastft.AdamW(params, lr=1e-2, **options)
        for step in range(5):
            grads: list[Tensor | None] = [random.values(*p.shape) for p in params]
            if step < 2:
                grads[1] = None  # starts at its own t = 1
            if step == 3:
                grads[0] = None
            stepped(optimizer, grads)
        assert [float(optimizer.state[p]["step"]) for p in params] == [4.0, 3.0, 5.0, 5.0]
        results.append(outcome(optimizer))
    on_device, on_host = results
    assert differing({k: v for k, v in on_device.items() if k in on_host}, on_host) == []


@pytest.mark.parametrize("lr_dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_learning_rate_is_read_on_the_device(lr_dtype: torch.dtype) -> None:
    results = []
    for as_tensor in (True, False):
        random = Random(17)
        p = nn.Parameter(random.values(100))
        lr = torch.tensor(0.0625, dtype=lr_dtype)
        optimizer = fastft.AdamW([p], lr=lr if as_tensor else 0.0625, capturable=True, anchor="init", anchor_decay=2.0)
        for value in (0.0625, 0.25):
            if as_tensor:
                lr.fill_(value)
            else:
                optimizer.param_groups[0]["lr"] = value
            stepped(optimizer, [random.values(100)])
        results.append(outcome(optimizer))
    assert differing(*results) == []
