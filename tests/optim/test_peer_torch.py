"""torch's own description of AdamW (``torch.testing``'s optimizer database), pointed at ``fastft.AdamW``.

The inputs, error inputs and schedulers come from torch; each is run through ``torch.optim.AdamW(foreach=False)`` as
well, and the two must agree at every step.
"""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from contract_cases import Twins, assert_near, assert_same, net, state_of
from torch import Tensor, nn
from torch.testing._internal.common_optimizers import (
    ErrorOptimizerInput,
    OptimizerErrorEnum,
    OptimizerInfo,
    OptimizerInput,
    _get_optim_inputs_including_global_cliquey_kwargs,
    optim_db,
)

import fastft

TORCH = next(info for info in optim_db if info.optim_cls is torch.optim.AdamW)
ADAM = next(info for info in optim_db if info.optim_cls is torch.optim.Adam)  # has more schedulers listed
OURS = OptimizerInfo(
    fastft.AdamW,
    optim_inputs_func=TORCH.optim_inputs_func,
    optim_error_inputs_func=TORCH.optim_error_inputs_func,
    supported_impls=TORCH.supported_impls,
    not_og_supported_flags=TORCH.not_og_supported_flags,
    supports_fused_on=TORCH.supports_fused_on,
    has_capturable_arg=TORCH.has_capturable_arg,
)


def inputs() -> list[OptimizerInput]:
    """torch's inputs with each of foreach, differentiable and fused, and those it keeps for GPUs: tensor lr, betas."""
    listed = _get_optim_inputs_including_global_cliquey_kwargs("cpu", torch.float32, OURS)
    return listed + TORCH.optim_inputs_func("cuda")[len(TORCH.optim_inputs_func("cpu")) :]


def named(optim_input: OptimizerInput) -> str:
    return optim_input.desc.replace(" ", "_")


all_inputs = pytest.mark.parametrize("optim_input", inputs(), ids=named)
plain_inputs = pytest.mark.parametrize("optim_input", TORCH.optim_inputs_func("cpu"), ids=named)


def fresh(kwargs: dict[str, Any]) -> dict[str, Any]:
    """A copy: two optimizers must not share a tensor lr."""
    return copy.deepcopy(kwargs)


def reference_kwargs(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The same options for torch's plain loop, which refuses ``capturable`` on the CPU.

    Tensors among them become numbers: torch would go on in their dtype, float32, even with float64 parameters.
    """
    numbers = {"lr": float(kwargs.get("lr", 1e-3)), "betas": tuple(map(float, kwargs.get("betas", (0.9, 0.999))))}
    return {**kwargs, **numbers, "foreach": False, "fused": False, "capturable": False}


def leaves_or_not(params: Any, kwargs: dict[str, Any]) -> list[Tensor]:
    """The parameters, as non-leaves for a differentiable step, which refuses leaves."""
    return [p.clone() if kwargs.get("differentiable") else p for p in params]


class Convolutional(nn.Module):
    """Parameters of other kinds: an embedding, a channels_last convolution, a scalar, a normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 6)
        self.conv = nn.Conv2d(6, 4, 3, padding=1).to(memory_format=torch.channels_last)
        self.norm = nn.GroupNorm(2, 4)
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, tokens: Tensor) -> Tensor:
        image = self.embedding(tokens).permute(0, 3, 1, 2)
        return self.scale * self.norm(self.conv(image)).mean(dim=(2, 3))


def seeded(make: Callable[[], nn.Module], dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(3)
    return make().to(dtype)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 3), nn.Sigmoid(), nn.Linear(3, 1), nn.Sigmoid())


MODULES: dict[str, tuple[Callable[[], nn.Module], Callable[[torch.dtype], Tensor]]] = {
    "mlp": (mlp, lambda dtype: torch.tensor([[0.1, 0.2], [0.3, -0.4]], dtype=dtype)),
    "conv": (Convolutional, lambda dtype: torch.arange(2 * 4 * 4).reshape(2, 4, 4) % 7),
}


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    y = model(x)
    return (y - torch.linspace(-1.0, 1.0, y.numel(), dtype=y.dtype).reshape(y.shape)).square().sum()


# Adam divides by √v: where a gradient is nearly 0, a rounding difference in the backward pass becomes a difference of
# direction. So each step starts from equal parameters and equal gradients, as in torch's own comparison.
def agree(ours: torch.optim.Optimizer, theirs: torch.optim.Optimizer) -> None:
    assert_near(parameters(ours), parameters(theirs), "parameters")
    for state, expected in zip(state_of(ours), state_of(theirs), strict=True):
        assert list(state) == list(expected)
        # The dtype of the step count depends on fused, as in torch; its value does not.
        assert float(state.pop("step")) == float(expected.pop("step"))
        assert_near(state, expected, "state")


def parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


@pytest.mark.parametrize(
    ("module", "dtype"), [("mlp", torch.float32), ("mlp", torch.float64), ("conv", torch.float32)], ids=str
)
@all_inputs
def test_every_input_steps_as_torch_does(optim_input: OptimizerInput, module: str, dtype: torch.dtype) -> None:
    make, example = MODULES[module]
    models = [seeded(make, dtype) for _ in range(2)]
    params = [leaves_or_not(model.parameters(), optim_input.kwargs) for model in models]
    ours = fastft.AdamW(params[0], **fresh(optim_input.kwargs))
    theirs = torch.optim.AdamW(params[1], **reference_kwargs(optim_input.kwargs))
    leaves = list(models[1].parameters())
    for _ in range(5):
        for leaf, q in zip(leaves, params[1], strict=True):
            leaf.data.copy_(q.detach())
        grads = torch.autograd.grad(loss_of(models[1], example(dtype)), leaves)
        for p, q, grad in zip(*params, grads, strict=True):
            p.grad, q.grad = grad.clone(), grad.clone()
        ours.step()
        theirs.step()
        agree(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@plain_inputs
def test_sixteen_bit_inputs_step_as_torchs_fused_step_does(optim_input: OptimizerInput, dtype: torch.dtype) -> None:
    """torch's loop rounds after every operation; its fused step, like ours, once."""
    kwargs = next(i.kwargs for i in TORCH.optim_inputs_func("cpu", dtype) if i.desc == optim_input.desc)
    models = [net(dtype=dtype) for _ in range(2)]
    ours = fastft.AdamW(models[0].parameters(), **kwargs)
    theirs = torch.optim.AdamW(models[1].parameters(), fused=True, **kwargs)
    for step in range(7):
        for i, (p, q) in enumerate(zip(models[0].parameters(), models[1].parameters(), strict=True)):
            q.grad = torch.randn(q.shape, generator=torch.Generator().manual_seed(10 * step + i)).to(dtype)
            p.grad = q.grad.clone()
        ours.step()
        theirs.step()
        agree(ours, theirs)


# -- errors ----------------------------------------------------------------------------------------------------


def error_inputs() -> list[ErrorOptimizerInput]:
    listed = TORCH.optim_error_inputs_func("cpu", torch.float32)
    # Those that torch lists for GPUs only, because they concern fused; they make sense anywhere.
    for kwargs, message in [
        ({"foreach": True, "fused": True}, "`fused` and `foreach` cannot be `True` together"),
        ({"fused": True, "differentiable": True}, "`fused` does not support `differentiable`"),
    ]:
        made = OptimizerInput(params=None, kwargs=kwargs, desc=message)
        listed.append(ErrorOptimizerInput(made, error_type=RuntimeError, error_regex=message))
    return listed


@pytest.mark.parametrize("error", error_inputs(), ids=lambda error: named(error.optimizer_error_input))
def test_every_error_input_raises_what_torch_raises(error: ErrorOptimizerInput) -> None:
    assert error.error_on is OptimizerErrorEnum.CONSTRUCTION_ERROR
    raised = []
    for cls in (fastft.AdamW, torch.optim.AdamW):
        params = error.optimizer_error_input.params
        if params is None:
            params = [nn.Parameter(torch.randn(2, 3))]
        elif isinstance(params, list):
            params = [dict(p) if isinstance(p, dict) else p for p in params]  # add_param_group writes into them
        kwargs = error.optimizer_error_input.kwargs
        if issubclass(error.error_type, Warning):
            with pytest.warns(error.error_type, match=error.error_regex) as caught:
                cls(params, **kwargs)
            raised.append(str(caught[0].message))
        else:
            with pytest.raises(error.error_type, match=error.error_regex) as info:
                cls(params, **kwargs)
            assert type(info.value) is error.error_type
            raised.append(str(info.value))
    assert raised[0] == raised[1]


def test_a_duplicate_parameter_is_stepped_as_often_as_torch_does() -> None:
    params = [nn.Parameter(torch.tensor([1.0, -2.0])) for _ in range(2)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        ours = fastft.AdamW([params[0]] * 2, lr=0.1)
        theirs = torch.optim.AdamW([params[1]] * 2, lr=0.1, foreach=False)
    for _ in range(3):
        for p in params:
            p.grad = torch.tensor([0.3, 0.7])
        ours.step()
        theirs.step()
    agree(ours, theirs)
    assert float(ours.state[params[0]]["step"]) == 6.0


# -- nothing to do ---------------------------------------------------------------------------------------------


@all_inputs
def test_zero_gradients_move_nothing_without_decay(optim_input: OptimizerInput) -> None:
    param = torch.randn(1, 5, dtype=torch.float64, requires_grad=True)
    (stepped,) = leaves_or_not([param], optim_input.kwargs)
    optimizer = fastft.AdamW([stepped], **{**fresh(optim_input.kwargs), "weight_decay": 0.0})
    before = param.detach().clone()
    stepped.grad = torch.zeros_like(stepped)
    optimizer.step()
    assert torch.equal(stepped, before)
    assert float(optimizer.state[stepped]["step"]) == 1.0


@all_inputs
def test_missing_gradients_move_nothing_and_make_no_state(optim_input: OptimizerInput) -> None:
    param = torch.randn(1, 5, requires_grad=True)
    (stepped,) = leaves_or_not([param], optim_input.kwargs)
    before = param.detach().clone()
    optimizer = fastft.AdamW([stepped], **fresh(optim_input.kwargs))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # reading .grad of a non-leaf
        optimizer.step()
    assert torch.equal(stepped, before)
    assert len(optimizer.state) == 0


# -- groups, learning rates, schedulers ------------------------------------------------------------------------


def two_groups(option: str, value: float) -> Callable[[nn.Module], list[dict[str, Any]]]:
    return lambda model: [
        {"params": [p for p in model.parameters() if p.dim() > 1]},
        {"params": [p for p in model.parameters() if p.dim() <= 1], option: value},
    ]


@pytest.mark.parametrize(
    ("option", "value"),
    [("weight_decay", 0.7), ("lr", 0.3), ("eps", 1e-2), ("betas", (0.5, 0.6)), ("maximize", True), ("amsgrad", True)],
)
@plain_inputs
def test_options_of_a_group_hold_for_that_group(optim_input: OptimizerInput, option: str, value: Any) -> None:
    twins = Twins(groups=two_groups(option, value), **fresh(optim_input.kwargs))
    twins.step(4)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
@plain_inputs
def test_a_tensor_lr_of_any_one_element_shape(optim_input: OptimizerInput, shape: tuple[int, ...]) -> None:
    kwargs = {**fresh(optim_input.kwargs), "lr": torch.tensor(0.0625).reshape(shape)}  # exact in float32
    twins = Twins(**{**kwargs, "lr": 0.0625})
    ours = fastft.AdamW((model := net()).parameters(), **{"weight_decay": 0.1, **kwargs})
    for _ in range(4):
        twins.give_grads()
        for p, q in zip(model.parameters(), twins.params(1), strict=True):
            p.grad = q.grad
        ours.step()
        twins.theirs.step()
        agree(ours, twins.theirs)
    assert ours.param_groups[0]["lr"] is kwargs["lr"]
    assert torch.equal(kwargs["lr"], torch.tensor(0.0625).reshape(shape))


@pytest.mark.parametrize("tensor_lr", [False, True], ids=["float_lr", "tensor_lr"])
@pytest.mark.parametrize("schedulers", range(len(ADAM.scheduler_inputs)))
@plain_inputs
def test_torchs_scheduler_inputs(optim_input: OptimizerInput, schedulers: int, tensor_lr: bool) -> None:
    kwargs = fresh(optim_input.kwargs)
    if tensor_lr:
        kwargs["lr"] = torch.tensor(0.0625, dtype=torch.float64)  # as exact as the float
    twins = Twins(**kwargs)
    twins.theirs.param_groups[0]["lr"] = 0.0625 if tensor_lr else twins.theirs.param_groups[0]["lr"]
    both = [[make(optimizer) for make in ADAM.scheduler_inputs[schedulers]] for optimizer in twins.optimizers]
    for step in range(12):
        twins.step()
        for scheduler in itertools.chain(*both):
            if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
                scheduler.step(1.0 + step)
            else:
                scheduler.step()
        rates = [float(optimizer.param_groups[0]["lr"]) for optimizer in twins.optimizers]
        assert rates[0] == pytest.approx(rates[1], rel=1e-6)


# Memory with gaps takes torch's own step, which knows capturable on GPUs only.
@pytest.mark.parametrize(
    ("optim_input", "gap"),
    [(i, gap) for i in inputs() for gap in (1, 2) if gap == 1 or not i.kwargs.get("capturable")],
    ids=lambda value: named(value) if isinstance(value, OptimizerInput) else f"every_{value}",
)
def test_training_goes_in_the_right_direction(optim_input: OptimizerInput, gap: int) -> None:
    torch.manual_seed(1)
    memory = torch.randn(10, 5, gap), torch.randn(10, gap)
    between = [m[..., 1:].clone() for m in memory]
    weight, bias = (nn.Parameter(m[..., 0]) for m in memory)
    x = torch.randn(5)
    stepped = leaves_or_not([weight, bias], optim_input.kwargs)
    optimizer = fastft.AdamW(stepped, **fresh(optim_input.kwargs))

    def closure() -> Tensor:
        loss = (stepped[0].mv(x) + stepped[1]).square().sum()
        if optim_input.kwargs.get("differentiable"):
            # torch's own differentiable step would keep growing the graph: cut it here
            for p, grad in zip(stepped, torch.autograd.grad(loss, stepped), strict=True):
                p.grad = grad.detach()
        else:
            optimizer.zero_grad()
            loss.backward()
        return loss

    first = closure().item()
    for _ in range(20):
        optimizer.step(closure)
    last = closure().item()
    assert_same([m[..., 1:] for m in memory], between, "memory between the elements")
    assert last > first if optim_input.kwargs.get("maximize") else last < first


# -- complex parameters ----------------------------------------------------------------------------------------


@plain_inputs
def test_a_complex_parameter_steps_as_its_real_view_does(optim_input: OptimizerInput) -> None:
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(4, 5, dtype=torch.complex64, generator=generator, requires_grad=True)
    real = torch.view_as_real(z).detach().clone().requires_grad_()
    optimizers = [fastft.AdamW([p], **fresh(optim_input.kwargs)) for p in (z, real)]
    for _ in range(5):
        z.grad = torch.randn(4, 5, dtype=torch.complex64, generator=generator)
        real.grad = torch.view_as_real(z.grad).clone()
        for optimizer in optimizers:
            optimizer.step()
        assert_near(torch.view_as_real(z.detach()), real.detach(), "complex against real")
    assert optimizers[0].state[z]["exp_avg"].dtype == torch.complex64


@plain_inputs
def test_complex_rosenbrock(optim_input: OptimizerInput) -> None:
    def rosenbrock(x: Tensor, y: Tensor) -> Tensor:
        return ((1 - x).abs() ** 2 + 100 * (y - x**2).abs() ** 2).sum()

    z = torch.tensor([1.5 + 0.5j, -0.5 + 1.0j], requires_grad=True)
    parts = [z.real.detach().clone().requires_grad_(), z.imag.detach().clone().requires_grad_()]
    optimizers = [fastft.AdamW([z], **fresh(optim_input.kwargs)), fastft.AdamW(parts, **fresh(optim_input.kwargs))]
    for _ in range(10):
        for optimizer in optimizers:
            optimizer.zero_grad()
        rosenbrock(*z).backward()
        rosenbrock(*torch.complex(*parts)).backward()
        for optimizer in optimizers:
            optimizer.step()
        torch.testing.assert_close(z.detach(), torch.complex(*parts).detach(), rtol=1e-5, atol=1e-6)


# -- differentiable --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("amsgrad", [False, True])
def test_a_differentiable_step_has_the_gradient_of_torchs(amsgrad: bool) -> None:
    def stepped(cls: type[torch.optim.Optimizer]) -> Callable[..., tuple[Tensor, ...]]:
        def function(p: Tensor, grad: Tensor, m: Tensor, v: Tensor, v_max: Tensor) -> tuple[Tensor, ...]:
            p = p.clone()
            p.grad = grad
            optimizer = cls([p], lr=0.9, amsgrad=amsgrad, differentiable=True)  # type: ignore[call-arg]
            state = {"step": torch.tensor(3.0), "exp_avg": m.clone(), "exp_avg_sq": v.clone()}
            if amsgrad:
                state["max_exp_avg_sq"] = v_max.clone()
            optimizer.state[p].update(state)
            optimizer.step()
            return (p, *[value for key, value in optimizer.state[p].items() if key != "step"])

        return function

    generator = torch.Generator().manual_seed(5)
    p, grad, m, v, v_max = (
        torch.rand(6, dtype=torch.float64, generator=generator).add_(0.1).requires_grad_() for _ in range(5)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # reading .grad of a non-leaf
        torch.autograd.gradcheck(stepped(fastft.AdamW), (p, grad, m, v, v_max))
        for a, b in zip(
            stepped(fastft.AdamW)(p, grad, m, v, v_max), stepped(torch.optim.AdamW)(p, grad, m, v, v_max), strict=True
        ):
            assert_near(a.detach(), b.detach(), "after a step")


# -- state -----------------------------------------------------------------------------------------------------


@plain_inputs
def test_a_state_dict_without_the_younger_flags_loads(optim_input: OptimizerInput) -> None:
    model = net()
    optimizer = fastft.AdamW(model.parameters(), **fresh(optim_input.kwargs))
    for flag in OURS.not_og_supported_flags:
        saved = copy.deepcopy(optimizer.state_dict())
        for group in saved["param_groups"]:
            del group[flag]
        optimizer.load_state_dict(saved)
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        assert flag in optimizer.param_groups[0]


@plain_inputs
def test_a_state_dict_with_numbers_as_step_counts_continues(optim_input: OptimizerInput) -> None:
    twins = Twins(**fresh(optim_input.kwargs))
    twins.step(3)
    saved = copy.deepcopy(twins.ours.state_dict())
    for state in saved["state"].values():
        state["step"] = state["step"].item()
    twins.ours.load_state_dict(saved)
    assert all(isinstance(state["step"], Tensor) for state in twins.ours.state.values())
    twins.step(2)


@all_inputs
def test_the_state_dict_is_deterministic(optim_input: OptimizerInput) -> None:
    if optim_input.kwargs.get("differentiable"):
        optim_input = OptimizerInput(None, {**optim_input.kwargs, "differentiable": False}, optim_input.desc)
    x = torch.linspace(-1, 1, 5)

    def fit(optimizer: torch.optim.Optimizer, model: nn.Module, count: int) -> None:
        for _ in range(count):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()

    model = net()
    optimizer = fastft.AdamW(model.parameters(), **fresh(optim_input.kwargs))
    fit(optimizer, model, 5)
    other_model = copy.deepcopy(model)
    other = fastft.AdamW(other_model.parameters(), **fresh(optim_input.kwargs))
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    fit(optimizer, model, 5)
    fit(other, other_model, 5)
    assert_same(optimizer.state_dict(), other.state_dict(), "state dict")
    # A group listed again is described by the same ids.
    other.param_groups.extend(other.param_groups)
    assert_same(optimizer.state_dict()["param_groups"][-1], other.state_dict()["param_groups"][-1], "repeated group")


@plain_inputs
def test_parameters_of_several_dtypes_in_one_group(optim_input: OptimizerInput) -> None:
    dtypes = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64]
    kwargs = {**fresh(optim_input.kwargs), "eps": 1e-3}

    def make() -> Iterator[nn.Parameter]:
        for i, dtype in enumerate(dtypes * 2):
            yield nn.Parameter(torch.randn(3, 4, generator=torch.Generator().manual_seed(i)).to(dtype))

    together, alone = list(make()), list(make())
    optimizer = fastft.AdamW(together, **kwargs)
    single = [
        torch.optim.AdamW([p], **kwargs, **({"foreach": False} if p.is_complex() else {"fused": True})) for p in alone
    ]
    for step in range(4):
        for i, (p, q) in enumerate(zip(together, alone, strict=True)):
            q.grad = torch.randn(3, 4, generator=torch.Generator().manual_seed(100 * step + i)).to(q.dtype)
            p.grad = q.grad.clone()
        optimizer.step()
        for one in single:
            one.step()
        assert_near([p.detach() for p in together], [q.detach() for q in alone], "parameters")


@all_inputs
def test_a_deep_copy_has_all_public_attributes(optim_input: OptimizerInput) -> None:
    def public(thing: object) -> set[str]:
        return {key for key in vars(thing) if not key.startswith("_")}

    params: Any = [nn.Parameter(torch.randn(2, 3)) for _ in range(2)]
    optimizer = fastft.AdamW(params, **fresh(optim_input.kwargs))
    if not optim_input.kwargs.get("differentiable"):
        for p in params:
            p.grad = torch.rand_like(p)
        optimizer.step()
    assert public(optimizer) == public(copy.deepcopy(optimizer)) >= {"defaults", "param_groups", "state", "grad_norm"}


@pytest.mark.parametrize("found", [1.0, 2.0, float("inf")])
@plain_inputs
def test_a_step_with_found_inf_moves_nothing(optim_input: OptimizerInput, found: float) -> None:
    model = net()
    optimizer = fastft.AdamW(model.parameters(), fused=True, **fresh(optim_input.kwargs))
    optimizer.grad_scale = torch.tensor(4.0)  # type: ignore[attr-defined]
    for step, found_inf in enumerate([0.0, found, found, 0.0]):
        before = copy.deepcopy((list(model.parameters()), state_of(optimizer)))
        optimizer.found_inf = torch.tensor(found_inf)  # type: ignore[attr-defined]
        for p in model.parameters():
            p.grad = torch.full_like(p, float("inf") if found_inf else 1.0 + step)
        optimizer.step()
        if found_inf:
            assert_same((list(model.parameters()), state_of(optimizer)), before, "skipped step")
    assert {float(state["step"]) for state in state_of(optimizer)} == {2.0}
    assert optimizer.skipped_steps.item() == 2
