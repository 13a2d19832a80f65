"""Dropout in graphs: ``torch.ops.fastft``, ``torch.compile``, exports, and modes that look on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from dropout_cases import FLOATS, dropped, expected_mask, same_bits, short
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

import fastft.nn
from fastft import _C
from fastft.nn import autograd, kernels
from fastft.nn import functional as fn

ops: Any = torch.ops.fastft
P = 0.3
STATE = torch.tensor([12345, 8])
SHAPE = (6, 10)
KEEP = expected_mask(SHAPE, P, 12345, 8)


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def values(*size: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, dtype=torch.float64, generator=generator).to(dtype)


def needs_grad(*size: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return values(*size, seed=seed, dtype=dtype).requires_grad_()


# -- the operations ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ("bias_dropout_add", "dropout_add_norm"))
def test_an_operation_and_its_backward_have_one_name_at_every_level(name: str) -> None:
    for level in (_C, kernels, ops):
        assert callable(getattr(level, name)) and callable(getattr(level, f"{name}_backward"))
    assert hasattr(autograd, name.title().replace("_", ""))


def norm_results(rms: bool) -> tuple[Tensor, ...]:
    results: tuple[Tensor, ...] = ops.dropout_add_norm(
        values(*SHAPE), values(*SHAPE, seed=1), values(10, seed=2), None, 10, 1e-3, rms, torch.float64, P, STATE
    )
    return results


def backward_arguments(rms: bool, **changed: Any) -> tuple[Any, ...]:
    _, sum, mean, rstd = norm_results(rms)
    arguments = {
        "dy": values(*SHAPE, seed=3),
        "dsum": values(*SHAPE, seed=4),
        "sum": sum,
        "weight": values(10, seed=2),
        "mean": mean,
        "rstd": rstd,
        "columns": 10,
        "p": P,
        "state": STATE,
        "dtype": torch.float64,
        "residual_dtype": torch.float64,
        "weight_dtype": torch.float64,
        "wants_weight": True,
        "wants_bias": True,
    }
    return tuple({**arguments, **changed}.values())


CALLS: dict[str, Callable[[], tuple[Any, tuple[Any, ...]]]] = {
    "bias_dropout_add": lambda: (
        ops.bias_dropout_add,
        (needs_grad(*SHAPE), needs_grad(10, seed=1), needs_grad(*SHAPE, seed=2), P, STATE),
    ),
    "bias_dropout_add alone": lambda: (ops.bias_dropout_add, (needs_grad(*SHAPE), None, None, P, STATE)),
    "bias_dropout_add channels_last": lambda: (
        ops.bias_dropout_add,
        (
            values(2, 3, 4, 5).contiguous(memory_format=torch.channels_last).requires_grad_(),
            None,
            needs_grad(2, 3, 4, 5, seed=1),
            P,
            STATE,
        ),
    ),
    "bias_dropout_add mixed": lambda: (
        ops.bias_dropout_add,
        (needs_grad(*SHAPE, dtype=torch.bfloat16), None, needs_grad(*SHAPE, seed=1, dtype=torch.float32), P, STATE),
    ),
    "bias_dropout_add_backward": lambda: (
        ops.bias_dropout_add_backward,
        (needs_grad(*SHAPE), P, STATE, torch.float64, torch.float64),
    ),
    "mixout": lambda: (ops.mixout, (needs_grad(*SHAPE), values(*SHAPE, seed=1), P, STATE)),
    "dropout_add_norm layer": lambda: (
        ops.dropout_add_norm,
        (
            needs_grad(*SHAPE),
            needs_grad(*SHAPE, seed=1),
            needs_grad(10, seed=2),
            needs_grad(10, seed=3),
            10,
            1e-3,
            False,
            torch.float64,
            P,
            STATE,
        ),
    ),
    "dropout_add_norm rms": lambda: (
        ops.dropout_add_norm,
        (
            needs_grad(*SHAPE),
            needs_grad(*SHAPE, seed=1),
            needs_grad(10, seed=2),
            None,
            10,
            1e-3,
            True,
            torch.float64,
            P,
            STATE,
        ),
    ),
    "dropout_add_norm mixed": lambda: (
        ops.dropout_add_norm,
        (
            needs_grad(*SHAPE, dtype=torch.bfloat16),
            needs_grad(*SHAPE, seed=1, dtype=torch.float32),
            None,
            None,
            60,
            1e-3,
            False,
            torch.float32,
            P,
            STATE,
        ),
    ),
    "dropout_add_norm_backward": lambda: (ops.dropout_add_norm_backward, backward_arguments(False)),
    "dropout_add_norm_backward rms, sparing": lambda: (
        ops.dropout_add_norm_backward,
        backward_arguments(True, dsum=None, wants_weight=False, wants_bias=False),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CALLS)
def test_opcheck(name: str) -> None:
    op, arguments = CALLS[name]()
    found = torch.library.opcheck(op.default, arguments)
    assert set(found.values()) == {"SUCCESS"}


def test_every_operation_is_checked() -> None:
    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("fastft::")]
    assert {name.removeprefix("fastft::").split(".")[0] for name in names} == {name.split()[0] for name in CALLS}


@pytest.mark.parametrize("dtype", FLOATS, ids=short)
def test_operations_are_functions_of_their_state(dtype: torch.dtype) -> None:
    x, r = values(*SHAPE, dtype=dtype), values(*SHAPE, seed=1, dtype=dtype)
    before = torch.get_rng_state()
    first, second = (ops.bias_dropout_add(x, None, r, P, STATE) for _ in range(2))
    assert same_bits(first, second) and torch.equal(torch.get_rng_state(), before)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert same_bits(first, (r.to(wide) + dropped(x.to(wide), KEEP, P)).to(dtype))
    assert not torch.equal(ops.bias_dropout_add(x, None, r, P, STATE + 4), first)


@pytest.mark.slow
@pytest.mark.parametrize("rms", (False, True))
def test_operations_and_eager_functions_have_the_same_derivatives(rms: bool) -> None:
    tensors = [needs_grad(*SHAPE), needs_grad(*SHAPE, seed=1), needs_grad(10, seed=2)]

    def op(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        y, sum, *_ = ops.dropout_add_norm(x, r, w, None, 10, 1e-3, rms, torch.float64, P, STATE)
        return y, sum

    assert torch.autograd.gradcheck(op, tensors)
    add = lambda x, r, b: ops.bias_dropout_add(x, b, r, P, STATE)  # noqa: E731
    assert torch.autograd.gradcheck(add, tensors) and torch.autograd.gradgradcheck(add, tensors)
    y, _ = op(*tensors)
    *_, mean, rstd = ops.dropout_add_norm(*tensors, None, 10, 1e-3, rms, torch.float64, P, STATE)
    assert not mean.requires_grad and not rstd.requires_grad
    with pytest.raises(NotImplementedError, match=r"dropout_add_layer_norm, .*: expected one derivative"):
        (grad,) = torch.autograd.grad(y.sum(), tensors[0], create_graph=True)
        grad.sum().backward()


# -- torch.compile -----------------------------------------------------------------------------------------


def block(x: Tensor, b: Tensor, r: Tensor, w: Tensor, a: Tensor) -> tuple[Tensor, ...]:
    """Everything at once, with dropouts of one tensor that must not be taken for one another."""
    first, second = fn.dropout(x, 0.5), fn.dropout(x, 0.5)
    added = fn.bias_dropout_add(first, b, r, 0.2)
    layer = fn.dropout_add_layer_norm(second, added, (10,), w, b, 0.1)
    assert isinstance(layer, Tensor)
    rms, sum = fn.dropout_add_rms_norm(layer, added, (10,), w, 0.1, return_residual=True)
    return first, second, added, layer, rms, sum, fn.mixout(w, a, 0.5), fn.mixout(w, a, 0.5)


def block_inputs() -> list[Tensor]:
    return [
        needs_grad(400, 10, dtype=torch.float32),
        needs_grad(10, seed=1, dtype=torch.float32),
        needs_grad(400, 10, seed=2, dtype=torch.float32),
        needs_grad(10, seed=3, dtype=torch.float32),
        values(10, seed=4, dtype=torch.float32),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("backend", ("aot_eager", "inductor"))
def test_two_calls_in_one_graph_differ_as_do_its_runs(backend: str) -> None:
    inputs = block_inputs()
    compiled = torch.compile(block, backend=backend, fullgraph=True)
    torch.manual_seed(0)
    runs = [compiled(*inputs) for _ in range(2)]
    torch.manual_seed(0)
    again = compiled(*inputs)
    for (first, second, added, *_), repeated in ((runs[0], again),):
        assert same_bits(repeated[0].detach(), first.detach()) and same_bits(repeated[2].detach(), added.detach())
        masks = [m != 0 for m in (first, second, runs[1][0], runs[1][1])]
        for i, one in enumerate(masks):
            assert abs(int(one.sum()) - 2000) < 5 * 1000**0.5  # of 4000
            for other in masks[i + 1 :]:
                assert abs(int((one == other).sum()) - 2000) < 5 * 1000**0.5
    x = inputs[0]
    (grad,) = torch.autograd.grad(runs[0][0], x, torch.ones_like(x))
    assert torch.equal(grad, (runs[0][0] != 0) * 2.0)  # the forward pass's mask


@pytest.mark.slow
@pytest.mark.parametrize("backend", ("aot_eager", "inductor"))
def test_compiled_gradients_are_those_of_the_masks_in_the_results(backend: str) -> None:
    inputs = block_inputs()

    def call(x: Tensor, b: Tensor, r: Tensor, w: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        kept = fn.dropout(x, 0.5)
        added = fn.bias_dropout_add(kept, b, r, 0.2)
        layer, sum = fn.dropout_add_layer_norm(added, r, (10,), w, b, 0.1, return_residual=True)
        return added, sum, layer

    x, b, r, w, _ = inputs
    added, sum, layer = torch.compile(call, backend=backend, fullgraph=True)(*inputs)
    grads = [values(*t.shape, seed=20 + i, dtype=torch.float32) for i, t in enumerate((added, sum, layer))]
    actual = torch.autograd.grad((added, sum, layer), (x, b, r, w), grads)
    # What was kept shows in the results, except where a sum happens to be zero.
    keep_sum = (sum - r).detach() != 0
    keep_added = (added - r).detach() != 0
    s = (r + torch.where(keep_sum, added / 0.9, 0.0)).detach()
    xs = [t.detach().double().requires_grad_() for t in (r, b, w, s)]
    y = nn.functional.layer_norm(xs[3], (10,), xs[2], xs[1])
    ds, db, dw = torch.autograd.grad(y, (xs[3], xs[1], xs[2]), grads[2].double())
    ds = ds + grads[1]
    dadded = torch.where(keep_sum, ds / 0.9, 0.0) + grads[0]
    db = db + torch.where(keep_added, dadded / 0.8, 0.0).sum(0)
    for ours, expected in zip(actual[1:], (db, ds + dadded, dw), strict=True):
        torch.testing.assert_close(ours.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_checkpoints_in_a_graph_make_the_same_masks_again() -> None:
    weight = values(10, 10, dtype=torch.float32)

    def part(x: Tensor) -> Tensor:
        h = fn.dropout(x @ weight, 0.5).sin()
        result = fn.dropout_add_rms_norm(h, x, (10,), p=0.3)
        assert isinstance(result, Tensor)
        return result

    def whole(x: Tensor, checkpointed: bool) -> Tensor:
        result = checkpoint(part, x, use_reentrant=False) if checkpointed else part(x)
        assert isinstance(result, Tensor)
        return result

    for backend in ("aot_eager", "inductor"):
        compiled, found = torch.compile(whole, backend=backend, fullgraph=True), []
        for checkpointed in (False, True):
            torch.manual_seed(3)
            x = needs_grad(*SHAPE, dtype=torch.float32)
            y = compiled(x, checkpointed)
            found.append((y.detach(), *torch.autograd.grad(y.square().sum(), x)))
        for plain, repeated in zip(*found, strict=True):
            torch.testing.assert_close(repeated, plain)


@pytest.mark.slow
def test_a_reentrant_checkpoint_around_a_compiled_part() -> None:
    part = torch.compile(lambda x: fn.dropout(x, 0.5).exp(), backend="aot_eager")
    found = []
    for checkpointed in (False, True):
        torch.manual_seed(3)
        x = needs_grad(*SHAPE)
        y = checkpoint(part, x, use_reentrant=True) if checkpointed else part(x)
        found.append((y.detach(), *torch.autograd.grad(y.sum(), x)) if not checkpointed else backward(y, x))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def backward(y: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    y.sum().backward()
    assert x.grad is not None
    return y.detach(), x.grad


@pytest.mark.slow
def test_evaluation_and_p_0_are_compiled_to_nothing_random() -> None:
    inputs = block_inputs()
    x, b, r, w, _ = inputs

    def call(x: Tensor, b: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        norm = fn.dropout_add_layer_norm(x, r, (10,), w, b, 0.5, training=False)
        assert isinstance(norm, Tensor)
        return fn.dropout(x, 0.5, False), fn.dropout(x, 0.0), fn.bias_dropout_add(x, b, r, 0.0), norm

    before = torch.get_rng_state()
    actual = torch.compile(call, backend="aot_eager", fullgraph=True)(x, b, r, w)
    assert torch.equal(torch.get_rng_state(), before)
    expected = x, x, r + (x + b), nn.functional.layer_norm(r + x, (10,), w, b)
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.slow
def test_modules_and_sizes_that_change_compile_once() -> None:
    layers = nn.ModuleList([fastft.nn.Dropout(0.5), fastft.nn.DropoutAddLayerNorm(10, 0.5)])
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, example: Any) -> Any:
        graphs.append(graph)
        return graph

    @torch.compile(backend=backend, dynamic=True, fullgraph=True)
    def call(x: Tensor) -> Tensor:
        result: Tensor = layers[1](layers[0](x), x)
        return result

    for rows in (7, 12, 30):
        assert call(values(rows, 10, dtype=torch.float32)).shape == (rows, 10)
    assert len(graphs) == 1
    names = [str(node.target) for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert sum("fastft.bias_dropout_add" in name for name in names) == 1
    assert sum("fastft.dropout_add_norm" in name for name in names) == 1


@pytest.mark.slow
def test_a_generator_in_a_graph() -> None:
    generator = torch.Generator().manual_seed(3)
    compiled = torch.compile(lambda x: fn.dropout(x, 0.5, generator=generator), backend="eager")
    x = torch.ones(1000)
    first, second = compiled(x), compiled(x)
    assert not torch.equal(first, second)
    generator.manual_seed(3)
    assert torch.equal(compiled(x), first)


# -- other graphs and modes --------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("strict", (True, False))
def test_an_export_draws_in_every_run(strict: bool) -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return fn.dropout(x, 0.5)

    exported = torch.export.export(Model(), (torch.ones(1000),), strict=strict)
    assert any("fastft.bias_dropout_add" in str(node.target) for node in exported.graph.nodes)
    run = exported.module()
    first, second = run(torch.ones(1000)), run(torch.ones(1000))
    assert set(first.tolist()) == {0.0, 2.0} and not torch.equal(first, second)


@pytest.mark.parametrize("tracing", ("real", "fake", "symbolic"))
def test_traces_see_the_operation(tracing: str) -> None:
    graph = make_fx(lambda x: fn.mixout(fn.dropout(x, 0.5), x, 0.5), tracing_mode=tracing)(torch.ones(1000))
    names = [str(node.target) for node in graph.graph.nodes]
    assert "fastft.bias_dropout_add.default" in names and "fastft.mixout.default" in names
    assert not torch.equal(graph(torch.ones(1000)), graph(torch.ones(1000)))


def test_modes_see_the_operation_and_get_the_gradient() -> None:
    seen: list[str] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func.name())
            return func(*args, **(kwargs or {}))

    x = needs_grad(*SHAPE)
    with Watch():
        y = fn.dropout(x, 0.5)
        z = fn.dropout_add_layer_norm(y, y, (10,), p=0.5)
    assert "fastft::bias_dropout_add" in seen and "fastft::dropout_add_norm" in seen
    (grad,) = torch.autograd.grad(y, x, torch.ones_like(y), retain_graph=True)
    assert torch.equal(grad != 0, y != 0)
    assert isinstance(z, Tensor) and torch.autograd.grad(z.sum(), x)[0].isfinite().all()


@pytest.mark.slow
def test_in_place_in_a_graph() -> None:
    def call(x: Tensor) -> Tensor:
        y = x * 1
        fn.dropout(y, 0.5, inplace=True)
        return y

    y = torch.compile(call, backend="aot_eager", fullgraph=True)(torch.ones(1000))
    assert set(y.tolist()) == {0.0, 2.0}
