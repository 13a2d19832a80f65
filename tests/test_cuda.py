"""The step on an NVIDIA GPU: the CPU's numbers, no waiting for the device, graphs, streams, large tensors."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from cuda_on_cpu.kernel_cases import (
    CHUNK,
    COMBINATIONS,
    DTYPES,
    Outcome,
    Random,
    bits,
    differing,
    every_option,
    host_counted,
    misaligned,
    outcome,
    short,
)
from torch import Tensor, nn

import fastft
import fastft.optim.entries
from fastft import _C
from fastft.optim import adamw_

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU that torch can use"),
]
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")

DEVICE = "cuda"
KEY = (2, 0)  # the same for DLPack
SIZES = (5, 3 * CHUNK + 1, CHUNK, 700, 0)
FINE_TUNING = {"lr": 1e-2, "weight_decay": 0.1, "anchor": "init", "anchor_decay": 2.0, "amsgrad": True}


def values(*shape: int, seed: int, dtype: torch.dtype = torch.float32, device: str = DEVICE) -> Tensor:
    return Random(seed).values(*shape, dtype=dtype).to(device)


def parameters(dtype: torch.dtype = torch.float32, device: str = DEVICE) -> list[nn.Parameter]:
    return [nn.Parameter(values(n, seed=i, dtype=dtype, device=device)) for i, n in enumerate(SIZES)]


def gradients(params: list[nn.Parameter], step: int) -> list[Tensor]:
    return [values(*p.shape, seed=1000 * (step + 1) + i, dtype=p.dtype) for i, p in enumerate(params)]


def run(optimizer: torch.optim.Optimizer, steps: range) -> Outcome:
    """Steps with the gradients of those numbers; what came of it."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for step in steps:
        for p, grad in zip(params, gradients(params, step), strict=True):
            p.grad = grad.to(p.device)
        optimizer.step()
    return outcome(optimizer)


def assert_near(ours: Outcome, theirs: Outcome, **tolerance: float) -> None:
    """Of all that they have in common; step counts, of any dtype, exactly."""
    for key in ours.keys() & theirs.keys():
        if key.endswith("step"):
            assert float(ours[key]) == float(theirs[key]), key
        else:
            torch.testing.assert_close(ours[key], theirs[key], **tolerance, msg=lambda text, key=key: f"{key}: {text}")


def launches(optimizer: fastft.AdamW) -> int:
    return sum(part.plan.launches(KEY) for part in optimizer._parts)


@contextmanager
def no_waiting() -> Iterator[None]:
    """Raises where torch waits for the GPU."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def keep_busy(milliseconds: float) -> None:
    """Work for the current stream, so that what does not wait for it comes too early."""
    torch.cuda._sleep(int(milliseconds * 2e6))


def test_the_build_has_kernels_for_this_gpu() -> None:
    assert _C.kernel_devices == ("cuda",)
    assert _C.cuda_unavailable() == ""


# -- numbers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", host_counted(DEVICE))
def test_bits_are_those_of_the_cpu(name: str) -> None:
    assert differing(host_counted(DEVICE)[name](), host_counted("cpu")[name]()) == []


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize(("dtype", "state_dtype"), COMBINATIONS)
def test_numbers_are_those_of_the_cpu_where_the_device_counts(
    dtype: torch.dtype, state_dtype: torch.dtype | None, capturable: bool
) -> None:
    # With a loss scaler: a step that is skipped, and gradients that carry a scale. The GPU's power function may be off
    # in a double's last place, and a rounding then fall to the other side.
    ours, cpus = (every_option(dtype, state_dtype, capturable=capturable, device=d) for d in (DEVICE, "cpu"))
    assert ours.keys() == cpus.keys()
    unit = torch.finfo(dtype).eps
    assert_near(ours, cpus, rtol=2 * unit, atol=2 * unit * unit)


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_numbers_are_those_of_torchs_fused_step(dtype: torch.dtype, amsgrad: bool) -> None:
    options = {"lr": 1e-2, "betas": (0.8, 0.95), "weight_decay": 0.3, "amsgrad": amsgrad, "maximize": True}
    ours = run(fastft.AdamW(parameters(dtype), **options), range(10))
    torchs = run(torch.optim.AdamW(parameters(dtype), **options, fused=True), range(10))
    unit = torch.finfo(dtype).eps
    assert_near(ours, torchs, rtol=16 * unit, atol=16 * unit)


def test_the_norm_and_the_step_repeat_bit_for_bit() -> None:
    sizes = (3, 100 * CHUNK + 7, 1, 400 * CHUNK, 9)
    results = []
    for _ in range(10):
        params = [nn.Parameter(values(n, seed=i)) for i, n in enumerate(sizes)]
        optimizer = fastft.AdamW(params, lr=1e-2, max_grad_norm=0.5, capturable=True)
        for step in range(2):
            for i, p in enumerate(params):
                p.grad = values(*p.shape, seed=50 + step + i) * 10.0 ** (i % 5)
            optimizer.step()
        results.append(outcome(optimizer))
    assert all(differing(result, results[0]) == [] for result in results[1:])


@pytest.mark.parametrize("which", ["params", "grads", "exp_avgs", "exp_avg_sqs", "anchors", "update_masks"])
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_misaligned_memory(dtype: torch.dtype, which: str) -> None:
    n = 2 * CHUNK + 21
    arrays = {name: values(n, seed=i, dtype=dtype) for i, name in enumerate(("params", "grads", "anchors"))}
    arrays |= {name: values(n, seed=9, dtype=dtype).abs() for name in ("exp_avgs", "exp_avg_sqs")}
    arrays["update_masks"] = Random(8).mask(n).to(DEVICE)
    moved = {name: misaligned(t) if name == which else t.clone() for name, t in arrays.items()}
    for chosen in (arrays, moved):
        adamw_(
            steps=[torch.zeros(())],
            lr=1e-2,
            weight_decay=0.3,
            anchor_decay=2.0,
            **{name: [array] for name, array in chosen.items()},
        )
    assert differing({k: v.cpu() for k, v in arrays.items()}, {k: v.cpu() for k, v in moved.items()}) == []


# -- launches and waiting ------------------------------------------------------------------------------------


@pytest.mark.parametrize("needs_norm", [False, True])
def test_one_launch_for_all_groups_and_two_with_a_norm(needs_norm: bool) -> None:
    params = parameters()
    optimizer = fastft.AdamW(
        [{"params": params[:2]}, {"params": params[2:], "lr": 1.0}], max_grad_norm=1.0 if needs_norm else None
    )
    for step in range(1, 4):
        run(optimizer, range(step, step + 1))
        assert launches(optimizer) == step * (2 if needs_norm else 1)


WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "clip": {"max_grad_norm": 1.0},
    "skip": {"skip_nonfinite": True, "max_grad_norm": 1.0},
    "fused": {"fused": True},
    "capturable": {"capturable": True},
    "lr on the CPU": {"lr": lambda: torch.tensor(1e-2)},
    "lr on the GPU": {"lr": lambda: torch.tensor(1e-2, device=DEVICE), "capturable": True},
    "offloaded anchor": {"anchor": lambda p: fastft.Anchor.snapshot(named(p), device="cpu")},
}


def named(params: list[nn.Parameter]) -> list[tuple[str, nn.Parameter]]:
    return [(f"p{i}", p) for i, p in enumerate(params)]


def fine_tuning(params: list[nn.Parameter], **options: Any) -> fastft.AdamW:
    """An optimizer with an anchor and masks; of options that are functions, what they return."""
    for key, option in options.items():
        if callable(option):
            options[key] = option(params) if key == "anchor" else option()
    optimizer = fastft.AdamW(named(params), **{**FINE_TUNING, **options})
    optimizer.set_update_mask(params[1], Random(1).mask(*params[1].shape))
    optimizer.set_update_mask(params[3], Random(2).mask(*params[3].shape))
    return optimizer


@pytest.mark.parametrize("way", WAYS)
def test_a_step_does_not_wait_for_the_gpu(way: str) -> None:
    params = parameters()
    optimizer = fine_tuning(params, **WAYS[way])
    run(optimizer, range(1))  # makes the plan
    found_inf = torch.zeros((), device=DEVICE)
    for step in range(1, 4):
        for p, grad in zip(params, gradients(params, step), strict=True):
            p.grad = grad
        if way == "skip":
            optimizer.grad_scale, optimizer.found_inf = torch.ones((), device=DEVICE), found_inf
        with no_waiting():
            keep_busy(50)
            done = torch.cuda.Event()
            optimizer.step()
            done.record()
            assert not done.query()  # not even step() itself took that long


# -- streams and graphs --------------------------------------------------------------------------------------


def test_the_step_runs_on_the_current_stream() -> None:
    expected = run(fine_tuning(parameters(), max_grad_norm=1.0), range(4))
    params = parameters()
    optimizer = fine_tuning(params, max_grad_norm=1.0)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for p in params:
            p.grad = torch.zeros_like(p)
        for step in range(4):
            grads = gradients(params, step)
            keep_busy(20)
            for p, grad in zip(params, grads, strict=True):
                p.grad.copy_(grad)  # on time only for what waits for this stream
            optimizer.step()
    torch.cuda.current_stream().wait_stream(stream)
    assert differing(outcome(optimizer), expected) == []


@pytest.mark.parametrize("lr_on_gpu", [False, True])
def test_graph_capture_and_replay(lr_on_gpu: bool) -> None:
    warm_up, replays = 3, 5
    bad = warm_up + 2

    def optimizer_for(params: list[nn.Parameter]) -> fastft.AdamW:
        lr = torch.tensor(1e-2, device=DEVICE) if lr_on_gpu else 1e-2
        return fine_tuning(params, lr=lr, capturable=True, max_grad_norm=1.0, skip_nonfinite=True)

    def fill(params: list[nn.Parameter], step: int) -> None:
        for p, grad in zip(params, gradients(params, step), strict=True):
            p.grad.copy_(grad)
        if step == bad:
            params[2].grad[-1] = float("inf")

    def schedule(optimizer: fastft.AdamW, step: int) -> None:
        if lr_on_gpu:
            optimizer.param_groups[0]["lr"].fill_(1e-2 / (1 + step))

    results = []
    for captured in (False, True):
        params = parameters()
        for p in params:
            p.grad = torch.zeros_like(p)
        optimizer = optimizer_for(params)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for step in range(warm_up):
                fill(params, step)
                schedule(optimizer, step)
                optimizer.step()
        torch.cuda.current_stream().wait_stream(stream)
        replay: Callable[[], Any] = optimizer.step
        if captured:
            graph = torch.cuda.CUDAGraph()
            before = outcome(optimizer)
            with torch.cuda.graph(graph):
                optimizer.step()
            # Nothing ran; the norm has memory of the graph's, which holds nothing yet.
            assert set(differing(outcome(optimizer), before)) <= {"grad_norm"}
            replay = graph.replay
        for step in range(warm_up, warm_up + replays):
            fill(params, step)
            schedule(optimizer, step)
            replay()
        results.append(outcome(optimizer))
        assert optimizer.skipped_steps == 1
        assert optimizer.state[params[0]]["step"] == warm_up + replays - 1
    assert differing(*results) == []


# -- offloaded anchors, loss scaling, checkpoints ------------------------------------------------------------


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=short)
@pytest.mark.parametrize("part_bytes", [64 << 20, 1000, 100_000])
def test_an_anchor_in_host_memory(part_bytes: int, dtype: torch.dtype | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fastft.optim.entries, "PART_BYTES", part_bytes)
    results = []
    for device in (None, "cpu"):
        params = parameters()
        anchor = fastft.Anchor.snapshot(named(params), dtype=dtype, device=device)
        assert all(anchor[name].is_pinned() == (device == "cpu") for name, p in named(params) if p.numel())
        optimizer = fine_tuning(params, anchor=anchor, max_grad_norm=1.0)
        for step in range(5):
            for p, grad in zip(params, gradients(params, step), strict=True):
                p.grad = grad
            keep_busy(5)  # the copies get ahead of the steps that they may not overtake
            optimizer.step()
        results.append(outcome(optimizer))
        assert (len(optimizer._parts) > 1) == (device == "cpu" and part_bytes < 64 << 20)
    assert differing(*results) == []


def test_an_anchor_in_host_memory_stays_there_wherever_its_state_is_brought() -> None:
    """As accelerate does with an optimizer's state dict."""
    params = parameters()
    anchor = fastft.Anchor.snapshot(named(params), device="cpu")
    saved = anchor.state_dict()
    saved["tensors"] = {name: tensor.to(DEVICE) for name, tensor in saved["tensors"].items()}
    again = fastft.Anchor.snapshot(named(params))
    again.load_state_dict(saved)
    assert again.offloaded
    for name, p in named(params):
        assert again[name].device.type == "cpu"
        assert torch.equal(again[name], anchor[name])
        ready = again.tensor_for(p)
        assert ready is not None and ready.device.type == "cpu"


def test_grad_scaler() -> None:
    results = []
    for cls in (fastft.AdamW, torch.optim.AdamW):
        params = parameters()
        optimizer = cls(params, lr=1e-2, weight_decay=0.3, fused=True)
        scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**14, growth_interval=3)
        scales = []
        for step in range(8):
            optimizer.zero_grad()
            # A loss whose gradients are these numbers, whatever the parameters have come to be.
            grads = gradients(params, step)
            scaler.scale(sum((p * g).sum() for p, g in zip(params, grads, strict=True))).backward()
            if step == 4:
                params[1].grad[-1] = float("inf")
            unscaled = [p.grad / scaler.get_scale() for p in params]
            before = [p.detach().clone() for p in params]
            scaler.step(optimizer)
            scaler.update()
            scales.append(scaler.get_scale())
            if cls is fastft.AdamW:  # those of the skipped step too, which torch's fused one leaves scaled
                assert all(torch.equal(bits(p.grad), bits(g)) for p, g in zip(params, unscaled, strict=True))
            stayed = {torch.equal(bits(p), bits(b)) for p, b in zip(params, before, strict=True) if p.numel()}
            assert stayed == {step == 4}
        results.append((scales, outcome(optimizer)))
        if cls is fastft.AdamW:
            assert optimizer.skipped_steps == 1
    (our_scales, ours), (their_scales, theirs) = results
    assert our_scales == their_scales
    assert_near(ours, theirs, rtol=1e-5, atol=1e-6)


def test_found_inf_is_a_sum_over_devices() -> None:
    params = parameters()
    optimizer = fastft.AdamW(params, **FINE_TUNING)
    run(optimizer, range(2))
    before = outcome(optimizer)
    optimizer.found_inf = torch.tensor(2.0, device=DEVICE)
    assert set(differing(run(optimizer, range(2, 3)), before)) <= {"grad_norm", "skipped_steps"}
    assert optimizer.skipped_steps == 1


@pytest.mark.parametrize("fused", [False, True])
def test_torchs_checkpoint_goes_on_here_and_ours_there(fused: bool) -> None:
    options = {"lr": 1e-2, "weight_decay": 0.3}
    straight = run(torch.optim.AdamW(parameters(), **options, fused=True), range(9))
    first = torch.optim.AdamW(parameters(), **options, fused=True)
    run(first, range(3))
    second = fastft.AdamW(continued(first), **options, fused=fused)
    second.load_state_dict(first.state_dict())
    run(second, range(3, 6))
    third = torch.optim.AdamW(continued(second), **options, fused=True)
    third.load_state_dict(second.state_dict())
    end = run(third, range(6, 9))
    assert_near(end, straight, rtol=1e-5, atol=1e-6)


def test_a_checkpoints_count_of_skipped_steps_goes_on() -> None:
    """It comes as a number; the kernels count where they run. Also where the first step had nothing to step."""
    optimizer = fine_tuning(parameters(), skip_nonfinite=True)
    optimizer.step()
    for step in range(3):
        for p, grad in zip(optimizer.param_groups[0]["params"], gradients(parameters(), step), strict=True):
            p.grad = grad.fill_(float("inf")) if step == 1 else grad
        optimizer.step()
    assert optimizer.skipped_steps.device.type == DEVICE and optimizer.skipped_steps == 1
    again = fine_tuning([p.detach().clone().requires_grad_() for p in parameters()], skip_nonfinite=True)
    again.load_state_dict(optimizer.state_dict())
    for p in again.param_groups[0]["params"]:
        p.grad = torch.full_like(p, float("nan"))
    again.step()
    assert again.skipped_steps.device.type == DEVICE and again.skipped_steps == 2


def continued(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [nn.Parameter(p.detach().clone()) for group in optimizer.param_groups for p in group["params"]]


# -- size ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("numel", [2**31 + 2**16, 2**32 + 2**17])
def test_more_elements_than_32_bits_count(numel: int, rows: bool) -> None:
    """Equal elements stay equal wherever they lie; masked rows at both ends stay as they were."""
    width = 2**15
    needed = 4 * 2 * numel + (2 << 30)
    free = torch.cuda.mem_get_info()[0]
    if free < needed:
        pytest.skip(f"needs {needed >> 30} GiB of GPU memory, {free >> 30} GiB are free")
    p = nn.Parameter(torch.full((numel // width, width), 2.0, dtype=torch.bfloat16, device=DEVICE))
    p.grad = torch.full_like(p, 0.5)
    optimizer = fastft.AdamW([p], lr=0.25, weight_decay=0.5, max_grad_norm=float(2**30))
    live = torch.ones(p.shape[0], dtype=torch.bool)
    if rows:
        live[[0, -1]] = False
        optimizer.set_update_mask(p, live)
    optimizer.step()
    assert optimizer.grad_norm == math.sqrt(int(live.sum()) * width * 0.25)
    first, last = int(live.nonzero()[0]), int(live.nonzero()[-1])
    moved = p.detach()[first : last + 1]
    # 2 - lr·wd·2 - lr, exactly; min and max over slices, to need no more memory.
    for part in moved.split(4096):
        assert (part.min(), part.max()) == (1.5, 1.5)
    if rows:
        assert (p.detach()[0] == 2.0).all() and (p.detach()[-1] == 2.0).all()
    del p, moved, optimizer
    torch.cuda.empty_cache()


# -- several devices -----------------------------------------------------------------------------------------


def spread(devices: list[str], **options: Any) -> fastft.AdamW:
    """Parameters that take turns on devices, clipped by their common norm."""
    params = [
        nn.Parameter(values(200 + i, seed=i, device=device))
        for i, device in zip(range(6), itertools.cycle(devices), strict=False)
    ]
    return fastft.AdamW(params, lr=1e-2, max_grad_norm=0.5, **options)


def assert_same_as_on_one(optimizer: fastft.AdamW) -> None:
    # The sum of squares is added up by device, so its last bit may differ, and with it the clip factor's.
    assert_near(run(optimizer, range(4)), run(spread([DEVICE]), range(4)), rtol=1e-5, atol=1e-7)


def test_parameters_on_the_cpu_beside_those_on_a_gpu() -> None:
    assert_same_as_on_one(spread([DEVICE, "cpu"]))


@two_gpus
def test_parameters_on_two_gpus() -> None:
    assert_same_as_on_one(spread(["cuda:0", "cuda:1"]))


@two_gpus
def test_parameters_that_are_not_on_the_current_gpu() -> None:
    optimizer = spread(["cuda:1"])
    with torch.cuda.device(0):
        assert_same_as_on_one(optimizer)
        assert torch.cuda.current_device() == 0


@two_gpus
def test_an_inf_on_one_gpu_skips_the_step_on_all() -> None:
    optimizer = spread(["cuda:0", "cuda:1"], skip_nonfinite=True)
    before = run(optimizer, range(1))
    params = optimizer.param_groups[0]["params"]
    for p in params:
        p.grad = torch.ones_like(p)
    params[1].grad[0] = float("inf")
    optimizer.step()
    assert set(differing(outcome(optimizer), before)) == {"grad_norm", "skipped_steps"}
    assert optimizer.skipped_steps == 1
