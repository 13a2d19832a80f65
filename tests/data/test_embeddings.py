"""NEFTune: how much noise, when there is none, and that the hook can be taken off."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastft.data import neftune

IDS = torch.arange(40).reshape(4, 10)


def test_noise_is_uniform_with_the_paper_s_width() -> None:
    embedding = nn.Embedding(40, 64)
    neftune(embedding, alpha=7.0)
    noise = torch.cat([embedding(IDS) - embedding.weight[IDS] for _ in range(20)]).detach()
    width = 7.0 / (10 * 64) ** 0.5
    assert noise.abs().max() <= width * (1 + 1e-5) and noise.abs().max() > 0.99 * width
    assert noise.mean().abs() < 5 * width / 3**0.5 / noise.numel() ** 0.5
    assert noise.std().item() == pytest.approx(width / 3**0.5, rel=0.02)


def test_off_at_eval_and_gone_when_removed() -> None:
    embedding = nn.Embedding(40, 8)
    plain = embedding(IDS)
    with neftune(embedding) as handle:
        assert handle is not None and not torch.equal(embedding(IDS), plain)
        embedding.eval()
        assert torch.equal(embedding(IDS), plain)
        embedding.train()
    assert torch.equal(embedding(IDS), plain)


def test_a_seed_makes_it_repeatable_whoever_else_draws() -> None:
    def run(seed: int | None) -> list[torch.Tensor]:
        embedding = nn.Embedding.from_pretrained(torch.ones(40, 8))
        neftune(embedding, seed=seed)
        found = []
        for _ in range(2):
            torch.rand(3)
            found.append(embedding(IDS))
        return found

    first, second = run(5), run(5)
    assert all(map(torch.equal, first, second)) and not torch.equal(*first)
    assert not torch.equal(run(6)[0], first[0])
    torch.manual_seed(1)
    one = run(None)
    torch.manual_seed(1)
    assert all(map(torch.equal, run(None), one))


def test_gradients_pass_and_half_precision_stays() -> None:
    embedding = nn.Embedding(40, 8, dtype=torch.bfloat16)
    neftune(embedding)
    embedding(IDS).sum().backward()
    assert embedding.weight.grad is not None and torch.equal(
        embedding.weight.grad, torch.ones(40, 8, dtype=torch.bfloat16)
    )
    assert embedding(IDS).dtype == torch.bfloat16
    assert embedding(IDS[:, :0]).shape == (4, 0, 8)
    assert embedding(IDS[:1, :1]).shape == (1, 1, 8)


@pytest.mark.slow
def test_of_a_model_it_is_the_input_embedding() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    model = transformers.BertModel(config).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    plain = model(IDS[:, :5]).last_hidden_state
    handle = neftune(model)
    assert not torch.equal(model(IDS[:, :5]).last_hidden_state, plain)
    handle.remove()
    assert torch.equal(model(IDS[:, :5]).last_hidden_state, plain)


@pytest.mark.parametrize("alpha", [-1.0, float("inf"), float("nan")])
def test_wrong_alpha(alpha: float) -> None:
    with pytest.raises(ValueError, match="alpha: expected a finite number >= 0"):
        neftune(nn.Embedding(2, 2), alpha)
