"""The modules of ``fastft.nn``: torch's parameters and names, the functions' results; Mixout as a parametrization."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from dropout_cases import dropped, normed, same_bits
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fastft import Anchor
from fastft.nn import BiasDropoutAdd, Dropout, DropoutAddLayerNorm, DropoutAddRMSNorm, Mixout
from fastft.nn import functional as fn

SHAPE = (6, 10)


def values(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def test_dropout_is_torchs_module_with_another_forward() -> None:
    ours, theirs = Dropout(0.3), nn.Dropout(0.3)
    assert isinstance(ours, nn.Dropout) and repr(ours) == repr(theirs) == "Dropout(p=0.3, inplace=False)"
    x = values(*SHAPE)
    torch.manual_seed(1)
    y = ours(x)
    torch.manual_seed(1)
    assert same_bits(y, fn.dropout(x, 0.3)) and not torch.equal(y, x)
    assert ours.eval()(x) is x
    z = x.clone()
    assert Dropout(0.5, inplace=True)(z) is z and not torch.equal(z, x)


def test_bias_dropout_add() -> None:
    module = BiasDropoutAdd(0.3)
    x, b, r = values(*SHAPE), values(10, seed=1), values(*SHAPE, seed=2)
    torch.manual_seed(1)
    y = module(x, b, r)
    torch.manual_seed(1)
    assert same_bits(y, fn.bias_dropout_add(x, b, r, 0.3)) and repr(module) == "BiasDropoutAdd(p=0.3)"
    assert same_bits(module.eval()(x, b, r), r + (x + b)) and module(x, None, None) is x


@pytest.mark.parametrize("return_residual", (False, True))
@pytest.mark.parametrize("kind", ("layer", "rms"))
def test_norms_have_torchs_parameters_and_the_functions_results(kind: str, return_residual: bool) -> None:
    eps, p = 1e-3, 0.3
    if kind == "layer":
        module: Any = DropoutAddLayerNorm(10, p, eps, return_residual=return_residual, dtype=torch.float64)
        theirs: Any = nn.LayerNorm(10, eps, dtype=torch.float64)
    else:
        module = DropoutAddRMSNorm(10, p, eps, return_residual=return_residual, dtype=torch.float64)
        theirs = nn.RMSNorm(10, eps, dtype=torch.float64)
    assert isinstance(module, type(theirs))
    for i, parameter in enumerate(theirs.parameters()):
        nn.init.normal_(parameter, generator=torch.Generator().manual_seed(i))
    module.load_state_dict(theirs.state_dict())
    x, r = values(*SHAPE).double(), values(*SHAPE, seed=1).double()
    torch.manual_seed(1)
    result = module(x, r)
    torch.manual_seed(1)
    keep = fn.dropout(torch.ones(SHAPE), p) != 0
    sum = r + dropped(x, keep, p)
    expected = normed(sum, (10,), module.weight, getattr(module, "bias", None), eps, kind == "rms")
    y = result[0] if return_residual else result
    torch.testing.assert_close(y, expected)
    if return_residual:
        assert same_bits(result[1], sum)
    evaluated = module.eval()(x, r)
    torch.testing.assert_close(evaluated[0] if return_residual else evaluated, theirs(x + r))
    assert f"p=0.3, return_residual={return_residual}" in repr(module) and repr(theirs)[8:30] in repr(module)


def test_norms_take_torchs_options() -> None:
    assert DropoutAddLayerNorm((2, 3), elementwise_affine=False).weight is None
    assert DropoutAddLayerNorm(3, bias=False).bias is None
    assert DropoutAddRMSNorm(3, elementwise_affine=False).weight is None
    assert DropoutAddRMSNorm(3).eps is None and DropoutAddRMSNorm(3, eps=1e-3).eps == 1e-3
    assert DropoutAddLayerNorm(3, device="meta", dtype=torch.bfloat16).weight.dtype == torch.bfloat16


@pytest.mark.parametrize("make", (Dropout, BiasDropoutAdd, lambda p: DropoutAddLayerNorm(3, p)))
@pytest.mark.parametrize("p", (-0.1, 1.1))
def test_p_is_checked_as_torch_does(make: Any, p: float) -> None:
    with pytest.raises(ValueError, match=f"dropout probability has to be between 0 and 1, but got {p}"):
        make(p)


@pytest.mark.parametrize("module", (Dropout(0.3), BiasDropoutAdd(0.3), DropoutAddLayerNorm(3, 0.3)), ids=repr)
def test_modules_can_be_copied_and_pickled(module: nn.Module) -> None:
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert type(other) is type(module) and repr(other) == repr(module)


# -- mixout ------------------------------------------------------------------------------------------------


def moved(layer: nn.Linear) -> nn.Linear:
    """Away from where it was."""
    with torch.no_grad():
        layer.weight += values(*layer.weight.shape, seed=9)
    return layer


@pytest.mark.parametrize("by", ("name", "parameter", "tensor"))
def test_mixout_is_a_parametrization(by: str) -> None:
    model = nn.Sequential(nn.Linear(10, 6))
    layer = model[0]
    assert isinstance(layer, nn.Linear)
    anchor, base = Anchor.snapshot(model), layer.weight.detach().clone()
    if by == "tensor":
        mixout = Mixout(layer.weight, p=0.6)
    else:
        mixout = Mixout(anchor, "0.weight" if by == "name" else layer.weight, p=0.6)
    names = set(model.state_dict())
    parametrize.register_parametrization(moved(layer), "weight", mixout)
    assert set(model.state_dict()) == (names - {"0.weight"}) | {"0.parametrizations.weight.original"}
    weight = layer.parametrizations.weight.original  # type: ignore[union-attr]
    torch.manual_seed(2)
    mixed = layer.weight
    torch.manual_seed(2)
    keep = fn.dropout(torch.ones(weight.shape), 0.6) != 0
    assert torch.equal(mixed == base, ~keep)
    torch.testing.assert_close(mixed[keep], (base + (weight - base) / 0.4)[keep])
    assert not torch.equal(layer.weight, mixed)  # anew in every forward pass
    torch.manual_seed(2)
    layer(values(3, 10)).sum().backward()
    assert torch.equal(weight.grad != 0, keep)
    model.eval()
    assert torch.equal(layer.weight, weight)
    layer.weight = values(6, 10, seed=4)  # assigned as any weight
    assert torch.equal(weight, values(6, 10, seed=4)) and "p=0.6" in repr(mixout)
    assert torch.equal(mixout.anchor, base)  # nothing of it has moved the anchor
    parametrize.remove_parametrizations(layer, "weight")
    assert torch.equal(layer.weight, values(6, 10, seed=4)) and set(model.state_dict()) == names


def test_mixout_follows_the_model_to_another_dtype_and_into_copies() -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    anchor = Anchor.snapshot(model)
    parametrize.register_parametrization(model[0], "weight", Mixout(anchor, "0.weight"))
    twin = copy.deepcopy(model).double()
    assert twin(values(2, 4).double()).dtype == torch.float64
    assert anchor["0.weight"].dtype == torch.float32


def test_mixout_names_what_is_wrong() -> None:
    layer = nn.Linear(4, 3)
    anchor = Anchor.snapshot(layer)
    with pytest.raises(KeyError, match="wieght: not anchored; closest: weight"):
        Mixout(anchor, "wieght")
    with pytest.raises(KeyError, match=r"a parameter of shape \[4, 3\]: not anchored"):
        Mixout(anchor, nn.Parameter(torch.ones(4, 3)))
    for arguments, got in (((anchor,), "Anchor and no key"), ((layer.weight, "weight"), "Parameter and a key")):
        with pytest.raises(TypeError, match=rf"anchor: expected an Anchor and a key .*, got {got}"):
            Mixout(*arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"between 0 and 1, but got 1\.5"):
        Mixout(anchor, "weight", p=1.5)
    with pytest.raises(ValueError, match=r"anchor: expected the weight's shape \[3, 4\], got \[3\]"):
        parametrize.register_parametrization(layer, "weight", Mixout(anchor, "bias"))
