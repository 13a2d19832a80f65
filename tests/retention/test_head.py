"""fit_head_: the minimum of its loss, and nothing else that moves."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import parametrizations, prune
from torch.utils.data import DataLoader, TensorDataset

from fastft.retention import fit_head_, linear_probe


def model_of(classes: int = 3, bias: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Tanh(), nn.Dropout(0.5), nn.Linear(7, classes, bias=bias)
    )


def linear_model(bias: bool = True) -> nn.Sequential:
    return nn.Sequential(nn.Identity(), nn.Linear(5, 3, bias=bias))


def rows(count: int = 200, classes: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(count, 5, generator=generator)
    noise = torch.randn(count, generator=generator)
    return inputs, torch.bucketize(inputs[:, 0] + 0.2 * noise, torch.linspace(-0.43, 0.43, classes - 1))


def in_batches(inputs: Tensor, labels: Tensor, size: int = 32) -> list[tuple[Tensor, Tensor]]:
    return list(zip(inputs.split(size), labels.split(size), strict=True))


# -- the minimum ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("l2", [1e-3, 0.1])
def test_no_other_head_has_a_lower_loss(bias: bool, l2: float) -> None:
    model, (inputs, labels) = model_of(bias=bias), rows()
    fit_head_(model, "4", in_batches(inputs, labels), l2=l2)
    features = model[:4].eval()(inputs).detach().double()
    mean = features.mean(0) if bias else torch.zeros(7, dtype=torch.float64)
    variance = (features - mean).square().mean()
    parameters = [p.detach().double().requires_grad_() for p in model[4].parameters()]

    def loss(weight: Tensor, *bias: Tensor) -> Tensor:
        logits = features @ weight.T + (bias[0] if bias else 0)
        at_the_mean = weight @ mean + bias[0] if bias else torch.zeros(1)
        penalty = l2 * variance * weight.square().sum() + 1e-4 * at_the_mean.square().sum()
        return cross_entropy(logits, labels) + penalty

    # The restatement of the loss is flat there: to the rounding of float32 weights.
    slopes = torch.autograd.grad(loss(*parameters), parameters)
    assert max(slope.abs().max().item() for slope in slopes) < 1e-6
    nearby = [p + 0.01 * torch.randn_like(p) for p in parameters]
    assert loss(*nearby) > loss(*parameters)


def test_a_head_of_one_feature_by_hand() -> None:
    # Features ±1, of variance 1, each with a quarter of its labels wrong. By symmetry W = (−w, w)/2 and b = 0, with
    # d/dw [¾·log(1 + e⁻ʷ) + ¼·log(1 + eʷ) + l2·w²/2] = σ(w) − ¾ + l2·w = 0.
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


def test_neither_order_nor_start_nor_batches_matter() -> None:
    inputs, labels = rows()
    first, second = model_of(), model_of()
    nn.init.constant_(second[4].weight, 3.0)
    one = fit_head_(first, "4", in_batches(inputs, labels))
    other = fit_head_(second, second[4], in_batches(inputs.flip(0), labels.flip(0), 7))
    torch.testing.assert_close(first[4].weight, second[4].weight, rtol=1e-5, atol=1e-6)
    assert one.rows == other.rows == 200 and one.accuracy == other.accuracy
    assert one.accuracy > 0.5  # of 0.33 by guessing


def test_the_scale_of_the_features_does_not_matter() -> None:
    inputs, labels = rows()
    fits = []
    for scale in (1e-3, 1.0, 1e3):
        model = linear_model()
        fit = fit_head_(model, "1", in_batches(scale * inputs + scale, labels))
        fits.append((fit.loss, scale * model[1].weight.detach()))
    for loss, weight in fits:
        assert loss == pytest.approx(fits[1][0], rel=1e-5)
        torch.testing.assert_close(weight, fits[1][1], rtol=1e-4, atol=1e-5)


def test_a_class_without_rows_gets_finite_weights_that_are_the_same_in_any_order() -> None:
    inputs, labels = rows()
    heads = []
    for order in (torch.arange(200), torch.arange(199, -1, -1)):
        model = model_of(classes=5)
        fit_head_(model, "4", [(inputs[order], labels[order])])
        heads.append(model[4])
        odds = model.eval()(inputs).softmax(1)
        assert 1e-5 < float(odds[:, 3].mean()) < 0.01
    torch.testing.assert_close(heads[0].bias, heads[1].bias, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_and_accuracy_are_of_the_head_that_was_written(dtype: torch.dtype) -> None:
    model, (inputs, labels) = linear_model().to(dtype), rows()
    inputs = (20 + inputs).to(dtype)  # of which a bfloat16 bias leaves little
    fit = fit_head_(model, "1", [(inputs, labels.int())], l2=1e-4)
    assert model[1].weight.dtype == dtype
    weight, bias = (p.detach().double() for p in model[1].parameters())
    logits = inputs.double() @ weight.T + bias
    assert fit.loss == pytest.approx(cross_entropy(logits, labels).item(), rel=1e-9)
    assert fit.accuracy == (logits.argmax(1) == labels).double().mean().item()


def test_features_that_hardly_differ_give_a_warning() -> None:
    inputs, labels = rows()
    with pytest.warns(UserWarning, match=r"hardly differ between rows \(0.01 of 10\)") as found:
        fit_head_(linear_model(), "1", [(10 + 0.01 * inputs, labels)])
    assert found[0].filename == __file__


# -- nothing else moves --------------------------------------------------------------------------------------


def test_only_the_head_moves() -> None:
    model, batches = model_of(), in_batches(*rows())
    model[1].eval()  # a mode of its own
    model[4].requires_grad_(False)
    model[0].weight.grad = torch.ones_like(model[0].weight)
    modes = {name: module.training for name, module in model.named_modules()}
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    fit_head_(model, "4", batches)
    after = model.state_dict()
    assert {name for name in before if not torch.equal(before[name], after[name])} == {"4.weight", "4.bias"}
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert torch.equal(torch.get_rng_state(), random)
    assert model[4].weight.grad is None and bool((model[0].weight.grad == 1).all())
    assert not model[4]._forward_hooks
    assert [p.requires_grad for p in model.parameters()] == [True] * 4 + [False] * 2


def broken(batches: list[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    yield batches[0]
    raise OSError("the disk is gone")


def test_a_loader_that_fails_leaves_all_as_it_was() -> None:
    model, batches = model_of(), in_batches(*rows())
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(OSError, match="the disk is gone"):
        fit_head_(model, "4", broken(batches))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert model.training and not model[4]._forward_hooks


# -- what models and loaders give ----------------------------------------------------------------------------


def test_a_loader_a_column_of_labels_few_bits_and_a_forward_of_ones_own() -> None:
    inputs, labels = rows()
    same = fit_head_(model_of(), "4", in_batches(inputs, labels))
    assert fit_head_(model_of(), "4", DataLoader(TensorDataset(inputs, labels), batch_size=32)) == same
    assert fit_head_(model_of(), "4", in_batches(inputs, labels.to(torch.uint8)[:, None])) == same
    wrapped = [((x, "unused"), y) for x, y in in_batches(inputs, labels)]
    assert fit_head_(model_of(), "4", wrapped, forward=lambda model, batch: model(batch[0][0])) == same
    model = model_of()
    with torch.inference_mode():
        assert fit_head_(model, "4", [(inputs, labels)]).accuracy == same.accuracy


class Tagger(nn.Module):
    """Logits for each token; the head is called by a name."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(11, 6)
        self.classifier = nn.Linear(6, 4)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Any:
        assert labels is None, "the loss is not needed"
        return self.classifier(input=self.embedding(input_ids))


class Decoder(Tagger):
    """Logits of the last position, from a head that is called for all, as decoders of transformers classify."""

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Any:
        return super().forward(input_ids, labels)[:, -1]


class Transposed(Tagger):
    """Positions first, as LSTMs have them."""

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Any:
        return super().forward(input_ids.T, labels)


def test_tokens_with_some_left_out() -> None:
    ids = torch.arange(44).reshape(4, 11) % 11
    labels = ids % 4
    labels[:, 3] = -100  # as padding is
    fit = fit_head_(Tagger(), "classifier", [{"input_ids": ids, "labels": labels}], l2=1e-4)
    assert fit.rows == 40 and fit.accuracy > 0.9
    with pytest.raises(ValueError, match=r"reaches the head, of shape \[11, 4\], got labels of shape \[4, 11\]"):
        fit_head_(Transposed(), "classifier", [{"input_ids": ids, "labels": labels}])


def test_a_decoder_that_picks_a_position() -> None:
    ids = torch.randint(11, (60, 5), generator=torch.Generator().manual_seed(0))
    labels = ids[:, -1] % 4
    model = Decoder()
    batches = [{"input_ids": x, "labels": y} for x, y in in_batches(ids, labels, 16)]
    fit = fit_head_(model, "classifier", batches, l2=1e-4)
    assert fit.rows == 60 and fit.accuracy > 0.9
    assert fit.accuracy == (model(ids).argmax(1) == labels).double().mean().item()
    with pytest.raises(ValueError, match=r"of shape \[8, 5\], got labels of shape \[7\]"):
        fit_head_(model, "classifier", [{"input_ids": ids[:8], "labels": labels[:7]}])


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU that torch can use")
def test_a_model_on_a_gpu_gets_the_same_head() -> None:
    inputs, labels = rows()
    there, here = model_of().cuda(), model_of()
    fit_head_(here, "4", in_batches(inputs, labels))
    fit = fit_head_(there, "4", in_batches(inputs.cuda(), labels.cuda()))
    assert fit.rows == 200 and there[4].weight.is_cuda
    torch.testing.assert_close(there[4].weight.cpu(), here[4].weight, rtol=1e-3, atol=1e-4)


# -- what is refused -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("head", "change", "options", "message"),
    [
        ("5", None, {}, r"head: expected the name of an nn.Linear, such as '4', got '5'"),
        ("2", None, {}, r"head: expected an nn.Linear whose weight is a parameter, got Tanh$"),
        ("", None, {}, r"whose weight is a parameter, got Sequential; in it: '0', '4'$"),
        (nn.Linear(7, 3), None, {}, r"head: expected a module of the model, got one that is not in it"),
        ("4", lambda x, y: (x, y), {"l2": 0.0}, r"l2: expected a number above 0, got 0.0"),
        ("4", lambda x, y: (x, y), {"l2": float("nan")}, r"l2: expected a number above 0, got nan"),
        ("4", lambda x, y: (x, x, y), {}, r"\(inputs, labels\) or mappings with names, got a tuple of 3"),
        ("4", lambda x, y: x, {}, r'\(inputs, labels\) or mappings with "labels", got Tensor'),
        ("4", lambda x, y: {"input": x, "label": y}, {}, r'with "labels", got the keys \'input\', \'label\''),
        ("4", lambda x, y: (x, y.float()), {}, r"whole numbers, a class for each row, got torch.float32"),
        ("4", lambda x, y: (x, y.tolist()), {}, r"whole numbers, a class for each row, got list"),
        ("4", lambda x, y: (x, y + 1), {}, r"expected labels from 0 to 2, as the head has outputs, got 1 to 3"),
        ("4", lambda x, y: (x, y[:-1]), {}, r"reaches the head, of shape \[8\], got labels of shape \[7\]"),
        ("4", lambda x, y: (x, torch.stack([y, y], 1)), {}, r"of shape \[8\], got labels of shape \[8, 2\]"),
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
    assert model.training and not model[4]._forward_hooks


def test_heads_whose_weights_are_not_their_own() -> None:
    with pytest.raises(ValueError, match=r"head: expected at least 2 outputs, one for each class, got 1"):
        fit_head_(model_of(classes=1), "4", [])
    # All of these compute the weight anew in each call, so what is written into it would not last.
    for change in (
        parametrizations.weight_norm,
        nn.utils.spectral_norm,
        lambda head: prune.l1_unstructured(head, "weight", 0.5),
    ):
        model = model_of()
        change(model[4])
        with pytest.raises(ValueError, match=r"head: expected an nn.Linear whose weight is a parameter"):
            fit_head_(model, "4", [])
    tied = nn.Sequential(nn.Embedding(3, 7), nn.Linear(7, 3))
    tied[1].weight = tied[0].weight
    with pytest.raises(ValueError, match=r"head: expected weights of its own, got '1', which shares them with '0'"):
        fit_head_(tied, tied[1], [])


# -- features that are computed already ----------------------------------------------------------------------


def test_a_probe_on_features_is_the_head_of_a_model() -> None:
    inputs, labels = rows()
    model = linear_model()
    fit_head_(model, "1", [(inputs, labels)], l2=0.1)
    x = inputs.double()
    weight, bias = linear_probe(x - x.mean(0), labels, 3, l2=0.1 * (x - x.mean(0)).square().mean().item())
    torch.testing.assert_close(model[1].weight.double(), weight, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model[1].bias.double(), bias - weight @ x.mean(0), rtol=1e-5, atol=1e-6)
    assert weight.dtype == torch.float64 and not weight.requires_grad
    assert linear_probe(inputs, labels, 3, l2=0.1, bias_l2=None)[1].tolist() == [0.0] * 3
    free = linear_probe(inputs, labels, 3, l2=0.1, bias_l2=0.0)[1]
    held = linear_probe(inputs, labels, 3, l2=0.1, bias_l2=1.0)[1]
    assert held.norm() < free.norm()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": torch.zeros(3)}, r"features: expected floating point of shape \[rows, features\], got"),
        ({"features": torch.zeros(4, 2, dtype=torch.int64)}, "features: expected floating point .* got torch.int64"),
        ({"labels": torch.tensor([0, 1])}, r"labels: expected torch.int64 of shape \[4\], got torch.int64 of shape"),
        ({"labels": torch.ones(4)}, r"labels: expected torch.int64 of shape \[4\], got torch.float32"),
        (
            {"classes": 1},
            "classes: expected at least 2, and labels from 0 to classes - 1, got 1 and labels from 0 to 1",
        ),
        ({"labels": torch.tensor([0, 1, 2, 0])}, "classes: expected .* got 2 and labels from 0 to 2"),
        ({"l2": 0.0}, "l2: expected a number above 0, got 0.0"),
        ({"bias_l2": -1.0}, "bias_l2: expected a number from 0, or None, got -1.0"),
    ],
)
def test_bad_probes(change: dict[str, Any], message: str) -> None:
    good = {"features": torch.randn(4, 2), "labels": torch.tensor([0, 1, 1, 0]), "classes": 2, "l2": 0.1}
    with pytest.raises(ValueError, match=message):
        linear_probe(**{**good, **change})
