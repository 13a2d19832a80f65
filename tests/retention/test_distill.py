"""The distillation loss against its formulas in float64, and the frozen base."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from fastft.retention import FrozenBase, distillation_loss


def pair(*shape: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(shape, dtype=dtype, requires_grad=True), torch.randn(shape, dtype=dtype, requires_grad=True)


def test_by_hand() -> None:
    tuned = torch.tensor([[1.0, 0.0], [1.0, 1.0], [2.0, 0.0]])
    base = torch.tensor([[0.0, 3.0], [1.0, 0.0], [0.5, 0.0]])
    each = distillation_loss(tuned, base, kind="embeddings", reduction="none")
    torch.testing.assert_close(each, torch.tensor([1.0, 1.0 - math.sqrt(0.5), 0.0]))
    # p = (1/2, 1/2) for the base, (1/4, 3/4) for the model: KL = ½·log 2 + ½·log(2/3).
    tuned, base = torch.tensor([[0.0, math.log(3.0)]]), torch.zeros(1, 2)
    loss = distillation_loss(tuned, base, kind="logits", temperature=1.0)
    assert loss.item() == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_logits_against_the_formula(temperature: float) -> None:
    tuned, base = pair(4, 3, 6)
    p, q = (base / temperature).softmax(-1), (tuned / temperature).softmax(-1)
    expected = temperature**2 * (p * (p / q).log()).sum(-1)
    each = distillation_loss(tuned, base, kind="logits", temperature=temperature, reduction="none")
    torch.testing.assert_close(each, expected)
    mean = distillation_loss(tuned, base, kind="logits", temperature=temperature)
    torch.testing.assert_close(mean, expected.mean())
    # The gradient is that of the paper's cross-entropy, times T²; the base gets none.
    (ours,) = torch.autograd.grad(mean, tuned)
    paper = -(p.detach() * (tuned / temperature).log_softmax(-1)).sum(-1).mean()
    (theirs,) = torch.autograd.grad(paper, tuned)
    torch.testing.assert_close(ours, temperature**2 * theirs)
    assert not mean.requires_grad or base.grad is None
    distillation_loss(tuned, base, kind="logits").backward()
    assert base.grad is None


def test_embeddings_against_the_formula() -> None:
    tuned, base = pair(5, 7)
    expected = 1 - (tuned * base).sum(1) / tuned.norm(dim=1) / base.norm(dim=1)
    loss = distillation_loss(tuned, base, kind="embeddings", reduction="sum")
    torch.testing.assert_close(loss, expected.sum())
    assert distillation_loss(base, base, kind="embeddings").item() == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("kind", ["embeddings", "logits"])
def test_masked_positions_count_for_nothing(kind: Any) -> None:
    tuned, base = pair(2, 3, 4)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    with torch.no_grad():
        tuned[1, 2] = float("nan")  # what a padded position may hold
    each = distillation_loss(tuned, base, kind=kind, reduction="none")
    masked = distillation_loss(tuned, base, kind=kind, mask=mask, reduction="none")
    assert torch.equal(masked[mask], each[mask])
    assert not masked[~mask].any()
    for reduction in ("mean", "sum"):
        loss = distillation_loss(tuned, base, kind=kind, mask=mask, reduction=reduction)
        torch.testing.assert_close(loss, getattr(each[mask], reduction)())
    assert distillation_loss(tuned, base, kind=kind, mask=torch.zeros_like(mask)).item() == 0.0


def test_16_bits_are_computed_in_float32() -> None:
    tuned, base = pair(6, 50, dtype=torch.bfloat16)
    for kind in ("embeddings", "logits"):
        loss = distillation_loss(tuned, base, kind=kind)  # type: ignore[arg-type]
        assert loss.dtype == torch.float32
        wide = distillation_loss(tuned.double(), base.double(), kind=kind)  # type: ignore[arg-type]
        assert loss.item() == pytest.approx(wide.item(), rel=1e-5)


def test_errors() -> None:
    tuned, base = pair(2, 3)
    cases: list[tuple[torch.Tensor, dict[str, Any], str]] = [
        (base[:1], {"kind": "logits"}, r"base_outputs: expected the shape of outputs, .* got \[1, 3\] for \[2, 3\]"),
        (base, {"kind": "cosine"}, 'kind: expected "embeddings" or "logits", got \'cosine\''),
        (base, {"kind": "logits", "temperature": 0.0}, "temperature: expected a number > 0, got 0.0"),
        (base, {"kind": "logits", "reduction": "batch"}, 'reduction: expected "mean", "sum" or "none"'),
        (base, {"kind": "logits", "mask": torch.ones(2)}, r"mask: expected bool of shape \[2\], got torch.float32"),
        (base, {"kind": "logits", "mask": torch.ones(3) > 0}, r"mask: expected bool of shape \[2\], got .* \[3\]"),
    ]
    for other, options, message in cases:
        with pytest.raises(ValueError, match=message):
            distillation_loss(tuned, other, **options)


def test_the_base_stays_while_the_model_trains() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.BatchNorm1d(4), nn.Linear(4, 3))
    inputs = torch.randn(8, 4)
    model.eval()
    with torch.no_grad():
        before = model(inputs)
    model.train()
    base = FrozenBase(model)
    assert model.training
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    loss = distillation_loss(model(inputs), base(inputs), kind="logits") + model(inputs).square().mean()
    loss.backward()
    optimizer.step()
    assert torch.equal(base(inputs), before)
    assert not base(inputs).requires_grad
    assert not torch.equal(model(inputs), before)
    model.base = base  # type: ignore[assignment]
    assert "base" not in " ".join(model.state_dict())
    assert len(list(model.parameters())) == 6


@pytest.mark.slow
def test_the_base_of_a_compiled_model_and_casting() -> None:
    model = nn.Linear(3, 2)
    base = FrozenBase(torch.compile(model))  # type: ignore[arg-type]
    assert type(base.module) is nn.Linear
    assert base.module is not model
    assert base.to(torch.bfloat16)(torch.ones(1, 3, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert model.weight.dtype == torch.float32


def test_it_keeps_outputs_near() -> None:
    """Fine-tuned with the loss, a model's answers on other inputs stay nearer to the base's than without."""

    def run(weight: float) -> float:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 4))
        base = FrozenBase(model)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        target, generic, unseen = torch.randn(32, 6), torch.randn(64, 6), torch.randn(256, 6)
        labels = torch.randint(4, (32,))
        for _ in range(60):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(target), labels)
            loss = loss + weight * distillation_loss(model(generic), base(generic), kind="logits")
            loss.backward()
            optimizer.step()
        return distillation_loss(model(unseen), base(unseen), kind="logits").item()

    assert run(2.0) < 0.5 * run(0.0)
