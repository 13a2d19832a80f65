"""fit_head_: the minimum of its loss, and nothing else that moves."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from fastft.retention import fit_head_


def model_of(classes: int = 3, bias: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Tanh(), nn.Dropout(0.5), nn.Linear(7, classes, bias=bias)
    )


def rows(count: int = 200, classes: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(count, 5, generator=generator)
    noise = torch.randn(count, generator=generator)
    return inputs, torch.bucketize(inputs[:, 0] + 0.2 * noise, torch.linspace(-0.43, 0.43, classes - 1))


def in_batches(inputs: Tensor, labels: Tensor, size: int = 32) -> list[tuple[Tensor, Tensor]]:
    return list(zip(inputs.split(size), labels.split(size), strict=True))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("l2", [1e-3, 0.1])
def test_no_other_head_has_a_lower_loss(bias: bool, l2: float) -> None:
    model, (inputs, labels) = model_of(bias=bias), rows()
    fit_head_(model, "4", in_batches(inputs, labels), l2=l2)
    head = model[4]
    features = model[:4].eval()(inputs).detach().double()
    parameters = [p.detach().double().requires_grad_() for p in head.parameters()]

    def loss(weight: Tensor, *bias: Tensor) -> Tensor:
        logits = features @ weight.T + (bias[0] if bias else 0)
        return cross_entropy(logits, labels) + l2 * features.var(0, correction=0).mean() * weight.square().sum()

    # The restatement of the loss is flat there: to the rounding of float32 weights.
    slopes = torch.autograd.grad(loss(*parameters), parameters)
    assert max(slope.abs().max().item() for slope in slopes) < 1e-6
    nearby = [p + 0.01 * torch.randn_like(p) for p in parameters]
    assert loss(*nearby) > loss(*parameters)


def test_a_head_of_one_feature_by_hand() -> None:
    # Features ±1, of variance 1, each with a quarter of its labels wrong. By symmetry W = (−w, w)/2 and b = 0, with
    # d/dw [¾·log(1 + e⁻ʷ) + ¼·log(1 + eʷ) + l2·w²/2] = σ(w) − ¾ + l2·w = 0; with l2 = 1/40, w = 0.9979.
    model = nn.Sequential(nn.Identity(), nn.Linear(1, 2))
    inputs = torch.tensor([1.0, 1.0, 1.0, 1.0, -1.0, -1.0, -1.0, -1.0])[:, None]
    labels = torch.tensor([1, 1, 1, 0, 0, 0, 0, 1])
    fit = fit_head_(model, model[1], [(inputs, labels)], l2=1 / 40)
    w = (model[1].weight[1] - model[1].weight[0]).item()
    assert torch.sigmoid(torch.tensor(w)).item() - 0.75 + w / 40 == pytest.approx(0.0, abs=1e-6)
    assert model[1].weight.sum().item() == pytest.approx(0.0, abs=1e-6)
    assert model[1].bias.tolist() == pytest.approx([0.0, 0.0], abs=1e-6)
    assert fit.rows == 8 and fit.accuracy == 0.75
    expected = 0.75 * torch.log1p(torch.exp(torch.tensor(-w))) + 0.25 * torch.log1p(torch.exp(torch.tensor(w)))
    assert fit.loss == pytest.approx(expected.item(), rel=1e-6)


def test_only_the_head_moves() -> None:
    model, batches = model_of(), in_batches(*rows())
    model[1].eval()  # a mode of its own
    model[0].weight.grad = torch.ones_like(model[0].weight)
    modes = {name: module.training for name, module in model.named_modules()}
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    fit_head_(model, "4", batches)
    after = model.state_dict()
    assert {name for name in before if not torch.equal(before[name], after[name])} == {"4.weight", "4.bias"}
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert torch.equal(torch.get_rng_state(), random)
    assert model[4].weight.grad is None and bool((model[0].weight.grad == 1).all())
    assert not model[4]._forward_pre_hooks
    assert all(p.requires_grad for p in model.parameters())


def test_neither_order_nor_start_nor_batches_matter() -> None:
    inputs, labels = rows()
    first, second = model_of(), model_of()
    nn.init.constant_(second[4].weight, 3.0)
    one = fit_head_(first, "4", in_batches(inputs, labels))
    with torch.no_grad():
        other = fit_head_(second, second[4], in_batches(inputs.flip(0), labels.flip(0), 7))
    torch.testing.assert_close(first[4].weight, second[4].weight, rtol=1e-5, atol=1e-6)
    assert one.rows == other.rows == 200 and one.accuracy == other.accuracy
    logits = first.eval()(inputs)
    assert one.accuracy == pytest.approx((logits.argmax(1) == labels).double().mean().item())
    assert one.loss == pytest.approx(cross_entropy(logits, labels).item(), rel=1e-5)
    assert one.accuracy > 0.5  # of 0.33 by guessing


class Tagger(nn.Module):
    """Logits for each token, as models of transformers give them."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.classifier = nn.Linear(6, 4)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Any:
        assert labels is None, "the loss is not needed"
        return self.classifier(self.embedding(input_ids))


def test_the_scale_of_the_features_does_not_matter() -> None:
    inputs, labels = rows()
    fits = []
    for scale in (1e-3, 1.0, 1e3):
        model = nn.Sequential(nn.Identity(), nn.Linear(5, 3))
        fit = fit_head_(model, "1", in_batches(scale * inputs + scale, labels))
        fits.append((fit.loss, scale * model[1].weight.detach()))
    for loss, weight in fits:
        assert loss == pytest.approx(fits[1][0], rel=1e-5)
        torch.testing.assert_close(weight, fits[1][1], rtol=1e-4, atol=1e-5)


def test_mappings_lists_a_loader_tokens_and_a_forward_of_ones_own() -> None:
    torch.manual_seed(0)
    model = Tagger()
    ids = torch.arange(44).reshape(4, 11) % 11
    labels = ids % 4
    labels[:, 3] = -100  # as padding is: nothing says what class 3 is for
    fit = fit_head_(model, "classifier", [{"input_ids": ids, "labels": labels}], l2=1e-4)
    assert fit.rows == 40 and fit.accuracy > 0.9

    other, (inputs, targets) = model_of(), rows()
    same = fit_head_(model_of(), "4", in_batches(inputs, targets))
    loader = DataLoader(TensorDataset(inputs, targets), batch_size=32)
    assert fit_head_(other, "4", loader) == same
    wrapped = [((x, "unused"), y) for x, y in in_batches(inputs, targets)]
    assert fit_head_(model_of(), "4", wrapped, forward=lambda model, batch: model(batch[0][0])) == same


def test_a_bfloat16_model_keeps_its_dtype() -> None:
    model = model_of().bfloat16()
    inputs, labels = rows()
    fit = fit_head_(model, "4", [(inputs.bfloat16(), labels.int())], l2=1e-4)
    assert model[4].weight.dtype == torch.bfloat16 and fit.accuracy > 0.6


def broken(batches: list[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    yield batches[0]
    raise OSError("the disk is gone")


@pytest.mark.parametrize(
    ("head", "change", "options", "message"),
    [
        ("5", None, {}, r"head: expected the name of an nn.Linear, such as \['4'\], got '5'"),
        ("2", None, {}, r"head: expected a plain nn.Linear, got Tanh"),
        (nn.Linear(7, 3), None, {}, r"head: expected a module of the model, got one that is not in it"),
        ("4", lambda x, y: (x, y), {"l2": 0.0}, r"l2: expected a number above 0, got 0.0"),
        ("4", lambda x, y: (x, y), {"l2": float("nan")}, r"l2: expected a number above 0, got nan"),
        ("4", lambda x, y: (x,), {}, r"batches: expected labels as a tensor of whole numbers, got none"),
        ("4", lambda x, y: (x, y.float()), {}, r"labels as a tensor of whole numbers, got torch.float32"),
        ("4", lambda x, y: (x, y.tolist()), {}, r"labels as a tensor of whole numbers, got list"),
        ("4", lambda x, y: (x, y + 1), {}, r"expected labels from 0 to 2, as the head has outputs, got 1 to 3"),
        ("4", lambda x, y: (x, y[:-1]), {}, r"expected a label for each vector that reaches the head \(8\), got 7"),
        ("4", lambda x, y: (x * float("nan"), y), {}, r"batches: expected finite features, got inf or NaN"),
        ("4", lambda x, y: (x, y * 0 - 100), {}, r"batches: expected at least one row with a label, got none"),
        ("4", lambda x, y: (x * 0, y), {}, r"expected features that differ between rows, got the same in all 8"),
        (
            "4",
            lambda x, y: (x, y),
            {"forward": lambda model, batch: model[:4](batch[0])},
            r"head: expected the model to call it once for each batch, got 0 calls",
        ),
    ],
)
def test_what_is_wrong_is_named_and_nothing_changes(
    head: Any, change: Any, options: dict[str, Any], message: str
) -> None:
    model, (inputs, labels) = model_of(), rows(16)
    labels[:8] = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])
    batches = in_batches(inputs, labels, 8) if change is None else [change(inputs[:8], labels[:8])]
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        fit_head_(model, head, batches, **options)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert model.training and not model[4]._forward_pre_hooks


def test_a_head_of_one_output_and_a_parametrized_one_are_refused() -> None:
    with pytest.raises(ValueError, match=r"head: expected at least 2 outputs, one for each class, got 1"):
        fit_head_(model_of(classes=1), "4", [])
    model = model_of()
    nn.utils.parametrizations.weight_norm(model[4])
    with pytest.raises(ValueError, match=r"head: expected a plain nn.Linear, got ParametrizedLinear"):
        fit_head_(model, "4", [])


def test_a_loader_that_fails_leaves_all_as_it_was() -> None:
    model, batches = model_of(), in_batches(*rows())
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(OSError, match="the disk is gone"):
        fit_head_(model, "4", broken(batches))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert model.training and not model[4]._forward_pre_hooks


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU that torch can use")
def test_a_model_on_a_gpu_gets_the_same_head() -> None:
    inputs, labels = rows()
    there, here = model_of().cuda(), model_of()
    fit_head_(here, "4", in_batches(inputs, labels))
    fit = fit_head_(there, "4", in_batches(inputs.cuda(), labels.cuda()))
    assert fit.rows == 200 and there[4].weight.is_cuda
    torch.testing.assert_close(there[4].weight.cpu(), here[4].weight, rtol=1e-3, atol=1e-4)
