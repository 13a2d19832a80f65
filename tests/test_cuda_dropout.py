"""Dropout on an NVIDIA GPU: the CPU's masks and numbers, torch's generator, graphs, streams, large tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from dropout_cases import FLOATS, RATES, expected_mask, same_bits, short
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fastft.nn import functional as fn

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU that torch can use"),
]
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")

ops: Any = torch.ops.fastft
SEED, OFFSET = 0x9E3779B97F4A7C15 - 2**64, 4 * (2**32 + 5)
P = 0.3


def values(*size: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """On the CPU."""
    return torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def state(device: str) -> Tensor:
    return torch.tensor([SEED, OFFSET], device=device)


@contextmanager
def no_waiting() -> Iterator[None]:
    """Fails if the host waits for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


# -- the CPU's masks and numbers ---------------------------------------------------------------------------


@pytest.mark.parametrize("p", RATES)
@pytest.mark.parametrize("size", (0, 1, 3, 4, 7, 1023, 40_003))
def test_masks_are_the_cpus(size: int, p: float) -> None:
    mask = fn.dropout_mask(size, p, seed=SEED, offset=OFFSET, device="cuda")
    assert mask.is_cuda and torch.equal(mask.cpu(), expected_mask((size,), p, SEED, OFFSET))


@pytest.mark.parametrize("shift", (0, 1, 3))
@pytest.mark.parametrize("dtype", FLOATS, ids=short)
def test_sums_have_the_cpus_bits_whatever_the_alignment(dtype: torch.dtype, shift: int) -> None:
    n = 37 * 130
    x, r, b = values(n + shift, dtype=dtype), values(n + shift, seed=1, dtype=dtype), values(130, seed=2, dtype=dtype)
    results = []
    for device in ("cpu", "cuda"):
        operands = [t.to(device)[shift:].view(37, 130) for t in (x, r)]
        results.append(ops.bias_dropout_add(operands[0], b.to(device), operands[1], P, state(device)).cpu())
    assert same_bits(*results)


@pytest.mark.parametrize("dtypes", ((torch.bfloat16, torch.float32), (torch.float16, torch.bfloat16)), ids=str)
def test_mixed_dtypes_have_the_cpus_bits(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    x, r = values(40, 24, dtype=dtypes[0]), values(40, 24, seed=1, dtype=dtypes[1])
    cpu, cuda = (ops.bias_dropout_add(x.to(d), None, r.to(d), P, state(d)) for d in ("cpu", "cuda"))
    assert cuda.dtype == cpu.dtype and same_bits(cuda.cpu(), cpu)


@pytest.mark.parametrize("shape", ((5, 7), (37, 130), (700, 33), (600, 64), (3, 8200)), ids=str)
@pytest.mark.parametrize("rms", (False, True))
@pytest.mark.parametrize("dtype", FLOATS, ids=short)
def test_norms_and_gradients_are_near_the_cpus(dtype: torch.dtype, rms: bool, shape: tuple[int, int]) -> None:
    tensors = [values(*size, seed=i, dtype=dtype) for i, size in enumerate((shape, shape, shape[1:], shape[1:]))]
    results: list[list[Tensor]] = []
    for device in ("cpu", "cuda"):
        x, r, w, b = (t.to(device).requires_grad_() for t in tensors)
        bias = None if rms else b
        y, sum, *_ = ops.dropout_add_norm(x, r, w, bias, shape[1], 1e-3, rms, dtype, P, state(device))
        grads = [values(*shape, seed=8 + i, dtype=dtype).to(device) for i in range(2)]
        wanted = [t for t in (x, r, w, bias) if t is not None]
        results.append([t.detach().cpu() for t in (sum, y, *torch.autograd.grad((y, sum), wanted, grads))])
    assert same_bits(results[0][0], results[1][0])
    eps = torch.finfo(dtype).eps
    for cpu, cuda in zip(*results, strict=True):
        torch.testing.assert_close(cuda, cpu, rtol=50 * eps, atol=50 * eps * max(1.0, float(cpu.abs().max())))


def test_gradients_of_biases_and_weights_repeat_bit_for_bit() -> None:
    x = values(5000, 200).cuda()
    b, w = (values(200, seed=i).cuda().requires_grad_() for i in (1, 2))

    def grads() -> tuple[Tensor, ...]:
        y = ops.bias_dropout_add(x, b, x, P, state("cuda"))
        z, *_ = ops.dropout_add_norm(x, x, w, b, 200, 1e-5, False, torch.float32, P, state("cuda"))
        return torch.autograd.grad((y, z), (b, w), (x, x))

    first = grads()
    for _ in range(5):
        assert all(same_bits(a.cpu(), e.cpu()) for a, e in zip(grads(), first, strict=True))


def test_inf_and_nan_vanish_where_dropped() -> None:
    x = torch.tensor([float("inf"), float("nan"), 1.0, 2.0], device="cuda").repeat(1024)
    keep = fn.dropout_mask(4096, 0.5, seed=SEED, offset=OFFSET, device="cuda")
    y = ops.bias_dropout_add(x, None, None, 0.5, state("cuda"))
    assert not y[~keep].any() and torch.equal(y[keep].isnan(), x[keep].isnan())


# -- torch's generator -------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", (0.1, 0.5, 0.9))
@pytest.mark.parametrize("size", (4, 1000, 65_536))
def test_torchs_own_mask_is_ours(size: int, p: float) -> None:
    """torch's kernel takes the same words for float32 in one piece, aligned, and small enough for one pass. It compares
    them as float32 numbers: some hundred of 2³² words fall on the other side of p."""
    x = torch.ones(size, device="cuda")
    torch.cuda.manual_seed(1234)
    F.dropout(x, p)  # another offset than 0
    offset = torch.cuda.default_generators[x.device.index].get_offset()
    theirs = F.dropout(x, p) != 0
    assert torch.equal(theirs, fn.dropout_mask(size, p, seed=1234, offset=offset, device="cuda"))


def test_every_call_takes_four_words_from_torchs_generator() -> None:
    x = torch.ones(1000, device="cuda")
    generator = torch.cuda.default_generators[x.device.index]
    for seed in (7, 2**63 + 11):  # seeds are unsigned
        torch.cuda.manual_seed(seed)
        for call in range(3):
            before = generator.get_offset()
            kept = fn.dropout(x, 0.5) != 0
            assert generator.get_offset() == before + 4 and before == 4 * call
            assert torch.equal(kept, fn.dropout_mask(1000, 0.5, seed=seed, offset=before, device="cuda"))
    before = generator.get_offset()
    fn.dropout(x, 0.5, False)
    fn.dropout(x, 0.0)
    fn.dropout(x, 1.0)
    assert generator.get_offset() == before


def test_generators() -> None:
    x = torch.ones(1000, device="cuda")
    generator = torch.Generator("cuda").manual_seed(5)
    first, second = (fn.dropout(x, 0.5, generator=generator) for _ in range(2))
    generator.manual_seed(5)
    assert torch.equal(fn.dropout(x, 0.5, generator=generator), first) and not torch.equal(first, second)
    with pytest.raises(RuntimeError, match="Expected a 'cuda' device type for generator but found 'cpu'"):
        fn.dropout(x, 0.5, generator=torch.Generator())
    with pytest.raises(RuntimeError, match="Expected a 'cpu' device type for generator but found 'cuda'"):
        fn.dropout(x.cpu(), 0.5, generator=generator)


@pytest.mark.parametrize("reentrant", (True, False))
def test_checkpoints_make_the_same_masks_again(reentrant: bool) -> None:
    weight = values(64, 64).cuda()

    def block(x: Tensor) -> Tensor:
        return fn.bias_dropout_add(fn.dropout(x, 0.5) @ weight, weight[0], x, 0.3).sin()

    found = []
    for checkpointed in (False, True):
        torch.manual_seed(3)
        x = values(32, 64, seed=1).cuda().requires_grad_()
        y = checkpoint(block, x, use_reentrant=reentrant) if checkpointed else block(x)
        y.sum().backward()
        assert x.grad is not None
        found.append(x.grad)
    assert torch.equal(*found)


# -- the device --------------------------------------------------------------------------------------------


def step(x: Tensor, r: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    """Every kernel, there and back."""
    first = fn.dropout(x, 0.5)
    second = fn.bias_dropout_add(x, b, r, 0.5)
    third, sum = fn.dropout_add_layer_norm(second, r, w.shape, w, b, 0.5, return_residual=True)
    fourth = fn.dropout_add_rms_norm(third, sum, w.shape, w, 0.5)
    assert isinstance(fourth, Tensor)
    mixed = fn.mixout(w, b.detach(), 0.5)
    grads = torch.autograd.grad((first, second, fourth, mixed), (x, r, w, b), (x, r, r, b))
    return first, second, fourth, mixed, *grads


def operands(rows: int = 256, columns: int = 192) -> list[Tensor]:
    sizes = ((rows, columns), (rows, columns), (columns,), (columns,))
    return [values(*size, seed=i).cuda().requires_grad_() for i, size in enumerate(sizes)]


def test_the_host_never_waits() -> None:
    tensors = operands()
    step(*tensors)
    torch.cuda.synchronize()
    with no_waiting():
        step(*tensors)


def test_work_goes_to_the_current_stream() -> None:
    tensors, stream = operands(), torch.cuda.Stream()
    torch.manual_seed(1)
    expected = step(*tensors)
    torch.manual_seed(1)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)  # what did not wait for it would be done too early
        x = tensors[0].detach() * 1.0
        actual = step(x.requires_grad_(), *tensors[1:])
    stream.synchronize()
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


def test_replays_of_a_graph_have_new_masks_which_backward_shares() -> None:
    x, r, w, b = operands()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step(x, r, w, b)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        first, second = fn.dropout(x, 0.5), fn.dropout(x, 0.5)
        (grad,) = torch.autograd.grad((first, second), x, (torch.ones_like(x), torch.zeros_like(x)))
        rest = step(x, r, w, b)
    masks = []
    for _ in range(3):
        graph.replay()
        masks += [(first != 0).clone(), (second != 0).clone()]
        assert torch.equal(grad != 0, first != 0) and all(t.isfinite().all() for t in rest)
    n = x.numel()
    for i, one in enumerate(masks):
        assert abs(int(one.sum()) - n / 2) < 5 * (n / 4) ** 0.5
        for other in masks[i + 1 :]:
            assert abs(int((one == other).sum()) - n / 2) < 5 * (n / 4) ** 0.5


@pytest.mark.parametrize("mode", ("default", "reduce-overhead"))
def test_compiled_calls_have_new_masks_which_backward_shares(mode: str) -> None:
    torch.compiler.reset()

    @torch.compile(mode=mode, fullgraph=True)
    def call(x: Tensor) -> tuple[Tensor, Tensor]:
        return fn.dropout(x, 0.5), fn.dropout(x, 0.5)

    x, masks = values(200, 100).cuda().requires_grad_(), []
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        first, second = call(x)
        (grad,) = torch.autograd.grad(first, x, torch.ones_like(x))
        assert torch.equal(grad != 0, first != 0)
        masks += [(first != 0).clone(), (second != 0).clone()]
    for i, one in enumerate(masks):
        for other in masks[i + 1 :]:
            assert abs(int((one == other).sum()) - 10_000) < 5 * 5000**0.5


def test_autocast_gives_norms_in_float32() -> None:
    x, r = values(8, 16).cuda().bfloat16(), values(8, 16, seed=1).cuda().bfloat16()
    weight = torch.ones(16, device="cuda")
    calls: tuple[tuple[Callable[..., Any], Callable[..., Any]], ...] = (
        (fn.dropout_add_layer_norm, F.layer_norm),
        (fn.dropout_add_rms_norm, F.rms_norm),
    )
    with torch.autocast("cuda", torch.bfloat16):
        for ours, theirs in calls:
            actual, expected = ours(x, r, (16,), weight, p=0.0), theirs(x + r, (16,), weight)
            assert actual.dtype == expected.dtype
            torch.testing.assert_close(actual, expected, rtol=2e-2, atol=2e-2)


@two_gpus
def test_each_device_has_its_own_generator_and_kernels() -> None:
    x = torch.ones(1000, device="cuda:1", requires_grad=True)
    torch.cuda.manual_seed_all(9)
    before = torch.cuda.default_generators[0].get_offset()
    y = fn.dropout(x, 0.5)  # while device 0 is current
    assert torch.cuda.default_generators[0].get_offset() == before
    assert torch.equal((y != 0).cpu(), fn.dropout_mask(1000, 0.5, seed=9))
    y.sum().backward()
    assert x.grad is not None and torch.equal(x.grad != 0, y != 0)
    with pytest.raises(RuntimeError):
        fn.bias_dropout_add(x, None, torch.ones(1000, device="cuda:0"), 0.5)


def test_more_elements_than_32_bits_count() -> None:
    n = 2**31 + 9
    if torch.cuda.mem_get_info()[0] < 3 * 2 * n:
        pytest.skip("less than 12 GB of device memory to spare")
    x = torch.ones(n, dtype=torch.bfloat16, device="cuda")
    y = ops.bias_dropout_add(x, None, None, 0.5, state("cuda"))
    for first in (0, 2**31 - 5000, n - 5003):
        piece = y[first : first + 5003]
        assert torch.equal((piece != 0).cpu(), expected_mask((5003,), 0.5, SEED, OFFSET, first))
