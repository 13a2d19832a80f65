"""The Fisher estimates against gradients written out by hand, and what they leave as it was."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

import fastft
from fastft.retention import Fisher, estimate_fisher

N, D, H, C = 6, 3, 4, 5


def two_layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(D, H), nn.Tanh(), nn.Linear(H, C)).double()


def data() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return 2 * torch.randn(N, D, dtype=torch.float64), torch.randint(C, (N,))


def by_hand(model: nn.Sequential, x: Tensor, y: int) -> dict[str, Tensor]:
    """∇ log p(y|x) of two layers: backpropagation, written out."""
    w1, b1, w2, b2 = (p.detach() for p in model.parameters())
    h = torch.tanh(w1 @ x + b1)
    at_logits = torch.eye(C, dtype=x.dtype)[y] - (w2 @ h + b2).softmax(0)
    at_h = (w2.T @ at_logits) * (1 - h * h)
    return {
        "0.weight": torch.outer(at_h, x),
        "0.bias": at_h,
        "2.weight": torch.outer(at_logits, h),
        "2.bias": at_logits,
    }


def mean_of_squares(gradients: list[tuple[float, dict[str, Tensor]]], n: int) -> dict[str, Tensor]:
    return {name: sum(w * g[name] ** 2 for w, g in gradients) / n for name in gradients[0][1]}  # type: ignore[misc]


def check(fisher: Fisher, expected: dict[str, Tensor], rtol: float = 1e-9) -> None:
    assert list(fisher) == list(expected)
    for name, values in expected.items():
        torch.testing.assert_close(fisher[name], values, rtol=rtol, atol=1e-12)


def test_exact_is_the_expectation_over_the_classes() -> None:
    model, (inputs, _) = two_layers(), data()
    gradients = [(p, by_hand(model, x, y)) for x in inputs for y, p in enumerate(model(x).softmax(0).detach().tolist())]
    fisher = estimate_fisher(model, [inputs])
    check(fisher, mean_of_squares(gradients, N))
    assert (fisher.mode, fisher.examples) == ("exact", N)


def test_empirical_is_of_the_given_labels_example_by_example() -> None:
    model, (inputs, labels) = two_layers(), data()
    gradients = [(1.0, by_hand(model, x, int(y))) for x, y in zip(inputs, labels, strict=True)]
    fisher = estimate_fisher(model, [(inputs, labels)], mode="empirical")
    check(fisher, mean_of_squares(gradients, N))
    # The square of the batch's mean gradient is something else.
    cross_entropy(model(inputs), labels).backward()
    assert not torch.allclose(fisher["0.weight"], model[0].weight.grad ** 2, rtol=0.1)


def test_sampled_is_of_one_draw_for_each_example() -> None:
    model, (inputs, _) = two_layers(), data()
    generator = torch.Generator().manual_seed(5)
    drawn = [int(torch.multinomial(model(x).softmax(0).detach(), 1, generator=generator)) for x in inputs]
    gradients = [(1.0, by_hand(model, x, y)) for x, y in zip(inputs, drawn, strict=True)]
    check(estimate_fisher(model, [inputs], mode="sampled", seed=5), mean_of_squares(gradients, N))


@pytest.mark.slow
def test_sampled_has_the_exact_expectation() -> None:
    model, (inputs, _) = two_layers(), data()
    many = estimate_fisher(model, [inputs[:1]] * 1500, mode="sampled")
    exact = estimate_fisher(model, [inputs[:1]])
    assert many.examples == 1500
    for name, values in exact.items():
        torch.testing.assert_close(many[name], values, rtol=0.2, atol=0.03 * values.max().item())


def test_the_formula_of_a_linear_model() -> None:
    """Softmax regression: F of weight [c, i] is the mean of p_c·(1 − p_c)·x_i²."""
    torch.manual_seed(2)
    model, (inputs, _) = nn.Linear(D, C, dtype=torch.float64), data()
    p = model(inputs).softmax(1).detach()
    spread = p * (1 - p)
    check(estimate_fisher(model, [inputs]), {"weight": spread.T @ inputs**2 / N, "bias": spread.mean(0)})


@pytest.mark.parametrize("mode", ["exact", "sampled", "empirical"])
def test_how_the_examples_are_batched_does_not_matter(mode: Any) -> None:
    model, (inputs, labels) = two_layers(), data()
    whole = estimate_fisher(model, [(inputs, labels)], mode=mode)
    parts = estimate_fisher(model, zip(inputs.split(4), labels.split(4), strict=True), mode=mode)
    named = estimate_fisher(
        model,
        [{"x": inputs, "labels": labels}],
        mode=mode,
        forward=lambda model, batch: model(batch["x"]),
    )
    assert (whole.mode, whole.examples) == (mode, N)
    for name, values in whole.items():
        assert torch.equal(parts[name], values)
        assert torch.equal(named[name], values)


def test_what_else_is_in_a_batch_is_cut_or_passed_on() -> None:
    model, (inputs, labels) = two_layers(), data()
    wanted = estimate_fisher(model, [(2 * inputs, labels)], mode="empirical")
    seen = []

    def forward(model: nn.Module, batch: tuple[dict[str, Any], Tensor]) -> Tensor:
        seen.append(batch[0]["names"])
        return model(batch[0]["scale"] * batch[0]["x"])  # type: ignore[no-any-return]

    batch = ({"x": inputs, "names": ["a", "b", "c", "d", "e", "f"], "scale": torch.tensor(2.0)}, labels)
    fisher = estimate_fisher(model, [batch], mode="empirical", forward=forward)
    check(fisher, dict(wanted))
    assert seen == [["a"], ["b"], ["c"], ["d"], ["e"], ["f"]]
    twice = nn.Module()
    twice.inner = model
    twice.forward = lambda x, scale: model(scale * x)  # type: ignore[method-assign]
    fisher = estimate_fisher(twice, [({"x": inputs, "scale": 2.0}, labels)], mode="empirical")
    check(fisher, {f"inner.{name}": values for name, values in wanted.items()})


def test_a_loss_of_ones_own() -> None:
    torch.manual_seed(2)
    model, (inputs, _) = nn.Linear(D, 1, dtype=torch.float64), data()
    targets = torch.randn(N, 1, dtype=torch.float64)

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return 0.5 * mse_loss(model(batch[0]), batch[1], reduction="sum")

    errors = (model(inputs) - targets).detach()
    expected = {"weight": ((errors * inputs) ** 2).mean(0, keepdim=True), "bias": (errors**2).mean(0)}
    check(estimate_fisher(model, [(inputs, targets)], mode="empirical", loss=loss), expected)


# -- transformers --------------------------------------------------------------------------------------------


def language_model() -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=7, n_positions=6, n_embd=8, n_layer=1, n_head=2)
    return transformers.GPT2LMHeadModel(config).double()


def sequences() -> dict[str, Tensor]:
    """Three sequences, one of them padded at its end."""
    ids = torch.tensor([[1, 2, 3, 4], [4, 3, 6, 0], [5, 5, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 0, 0]])
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


@pytest.mark.slow
def test_an_example_of_a_language_model_is_a_sequence() -> None:
    model, batch = language_model(), sequences()
    fisher = estimate_fisher(model, [batch], mode="empirical", next_token=True)
    model.eval()
    expected: dict[str, Tensor] = {}
    for i in range(3):
        row = {key: value[i : i + 1] for key, value in batch.items()}
        predicted = int((row["labels"] != -100).sum()) - 1
        model.zero_grad()
        (model(**row).loss * predicted).backward()
        for name, p in model.named_parameters():
            expected[name] = expected.get(name, 0) + p.grad**2 / 3
    check(fisher, expected, rtol=1e-4)  # transformers computes the loss in float32
    assert "lm_head.weight" not in fisher  # tied to the embedding


@pytest.mark.slow
def test_exact_of_a_language_model_adds_up_over_positions_and_words() -> None:
    model, batch = language_model(), sequences()
    exact = estimate_fisher(model, [{key: value[:1] for key, value in batch.items()}], next_token=True)
    model.eval()
    log_p = model(batch["input_ids"][:1]).logits.log_softmax(-1)[0]
    weight = model.transformer.wte.weight
    expected = torch.zeros_like(weight)
    for position in range(3):
        for word in range(7):
            (g,) = torch.autograd.grad(log_p[position, word], weight, retain_graph=True)
            expected += log_p[position, word].exp().detach() * g**2
    torch.testing.assert_close(exact["transformer.wte.weight"], expected.detach())
    sampled = estimate_fisher(model, [sequences()] * 40, mode="sampled", next_token=True)
    assert sampled.examples == 120


def test_token_labels_are_not_shifted() -> None:
    torch.manual_seed(0)
    model = nn.Linear(D, C, dtype=torch.float64)
    inputs, labels = torch.randn(2, 3, D, dtype=torch.float64), torch.tensor([[0, -100, 2], [-100, -100, -100]])
    fisher = estimate_fisher(model, [(inputs, labels)], mode="empirical", next_token=False)
    assert fisher.examples == 1  # nothing of the second row counts
    p = model(inputs[0]).softmax(-1).detach()
    delta = torch.stack([torch.eye(C)[0] - p[0], torch.eye(C)[2] - p[2]])
    check(fisher, {"weight": (delta.T @ inputs[0, [0, 2]]) ** 2, "bias": delta.sum(0) ** 2})


def test_a_classifier_from_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, num_labels=3
    )
    model = transformers.BertForSequenceClassification(config)
    batch = {"input_ids": torch.randint(20, (4, 5)), "labels": torch.tensor([0, 1, 2, 0])}
    exact = estimate_fisher(model, [transformers.BatchEncoding(batch)])
    assert exact.examples == 4
    assert set(exact) == {name for name, _ in model.named_parameters()}
    # A class's part of the output layer: p_c·(1 − p_c), and the bias's three add up to more than nothing.
    p = model.eval()(batch["input_ids"]).logits.softmax(-1).detach()
    torch.testing.assert_close(exact["classifier.bias"], (p * (1 - p)).mean(0), rtol=1e-4, atol=1e-7)


# -- the model, and other kinds of parameters ----------------------------------------------------------------


def test_everything_is_afterwards_as_before() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(D, H), nn.BatchNorm1d(H), nn.Dropout(0.5), nn.Linear(H, C)).double()
    model[1].eval()
    modes = [module.training for module in model.modules()]
    statistics = [b.clone() for b in model.buffers()]
    model[0].weight.grad = torch.ones_like(model[0].weight)
    inputs, _ = data()
    state = torch.get_rng_state()
    with torch.no_grad():
        first = estimate_fisher(model, [inputs], mode="sampled", seed=3)
    second = estimate_fisher(model, [inputs], mode="sampled", seed=3)
    other = estimate_fisher(model, [inputs], mode="sampled", seed=4)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), statistics, strict=True))
    assert torch.equal(model[0].weight.grad, torch.ones(H, D, dtype=torch.float64))
    assert model[3].weight.grad is None
    assert all(torch.equal(first[name], second[name]) for name in first)  # so no dropout
    assert not torch.equal(first["3.bias"], other["3.bias"])


def test_modes_come_back_after_an_error() -> None:
    model = two_layers().train()
    with pytest.raises(RuntimeError):
        estimate_fisher(model, [torch.ones(2, D + 1, dtype=torch.float64)])
    assert all(module.training for module in model.modules())


def test_only_what_requires_grad_and_what_is_used() -> None:
    model, (inputs, _) = two_layers(), data()
    model[0].weight.requires_grad_(False)
    model.extra = nn.Linear(2, 2)
    fisher = estimate_fisher(model, [inputs], forward=lambda model, x: model[:3](x))
    assert set(fisher) == {"0.bias", "2.weight", "2.bias", "extra.weight", "extra.bias"}
    assert not fisher["extra.weight"].any()
    assert fisher["0.bias"].all()
    assert not fisher["0.bias"].requires_grad


def test_16_bit_parameters_and_sparse_gradients() -> None:
    torch.manual_seed(0)
    ids = torch.tensor([[1, 1, 2], [3, 1, 0]])
    dense, sparse = (nn.EmbeddingBag(5, C, mode="sum", sparse=s) for s in (False, True))
    sparse.load_state_dict(dense.state_dict())
    wanted = estimate_fisher(dense, [ids])["weight"]
    torch.testing.assert_close(estimate_fisher(sparse, [ids])["weight"], wanted)
    assert wanted[1].min() > wanted[2].min()  # twice in one example: the gradient is doubled, then squared
    half = estimate_fisher(two_layers().bfloat16(), [data()[0].bfloat16()])
    assert {f.dtype for f in half.values()} == {torch.float32}
    for name, values in estimate_fisher(two_layers(), [data()[0]]).items():
        torch.testing.assert_close(half[name].double(), values, rtol=0.2, atol=0.02)


def test_it_weights_an_anchor() -> None:
    """Normalised to a mean of 1, and given to an anchor as it is."""
    model, (inputs, _) = two_layers(), data()
    fisher = estimate_fisher(model, [inputs]).normalized()
    together = torch.cat([values.flatten() for values in fisher.values()])
    assert together.mean().item() == pytest.approx(1.0)
    assert (fisher.mode, fisher.examples) == ("exact", N)
    anchor = fastft.Anchor.snapshot(model).with_importance(fisher)
    optimizer = fastft.AdamW(model.parameters(), lr=0.1, weight_decay=0.0, anchor=anchor, anchor_decay=3.0)
    for p in model.parameters():
        p.data += 1.0
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in model.named_parameters():
        pull = 0.1 * 3.0 * fisher[name]
        torch.testing.assert_close(p.detach(), anchor[name] + 1.0 - pull / (1.0 + pull))


def test_saved_and_loaded(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 2, 2), nn.Flatten(), nn.Linear(8, 3)).to(memory_format=torch.channels_last)
    images = torch.randn(3, 2, 3, 3)
    fisher = estimate_fisher(model, [images], mode="sampled")
    fisher.save(tmp_path / "fisher.safetensors")
    loaded = Fisher.load(tmp_path / "fisher.safetensors")
    assert (loaded.mode, loaded.examples) == ("sampled", 3)
    assert repr(loaded) == repr(fisher)
    assert set(loaded) == set(fisher)
    assert all(torch.equal(loaded[name], fisher[name]) for name in fisher)
    save_file({"a": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"other\.safetensors: expected the format 'fastft\.Fisher 1', got None"):
        Fisher.load(tmp_path / "other.safetensors")


def empty() -> Iterator[Tensor]:
    yield from ()


X, Y = torch.ones(2, D, dtype=torch.float64), torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("batches", "options", "message"),
    [
        ([X], {"mode": "true"}, r"mode: expected one of \('exact', 'sampled', 'empirical'\), got 'true'"),
        ([X], {"mode": "empirical"}, "batches: expected labels .* for empirical, got none"),
        ([X], {"loss": lambda m, b: m(b).sum()}, 'loss: expected mode="empirical"'),
        ([X], {"loss": lambda m, b: m(b), "mode": "empirical"}, r"loss: expected a tensor of one element .* \[1, 5\]"),
        ([X], {"forward": lambda m, b: m(b).sum()}, r"forward: expected logits of shape \[1, ..., classes\] .*\[\]"),
        ([X], {"forward": lambda m, b: m(X)}, r"forward: expected logits .* got shape \[2, 5\]"),
        ([X], {"forward": lambda m, b: {"scores": m(b)}}, "forward: expected logits .* got dict"),
        ([X[:, None]], {}, r"batches: expected labels .* for logits of shape \[1, 1, 5\], got none"),
        ([(X[:, None], Y[:, None])], {}, r"next_token: expected True \(causal language models\) or False"),
        ([(X, Y[:1])], {}, r"batches: expected the same number of rows in all of a batch, got \[1, 2\]"),
        (
            [(X, Y[:, None])],
            {},
            r"batches: expected integer labels of shape \[1\] .* got torch.int64 of shape \[1, 1\]",
        ),
        ([(X, X[:, 0])], {}, r"batches: expected integer labels of shape \[1\] .* got torch.float64"),
        ([(X, Y + 4)], {}, "batches: expected labels from 0 to 4, or -100, got 5"),
        ([(X, Y - 101)], {}, "batches: expected labels from 0 to 4, or -100, got -101"),
        ([3], {}, "batches: expected mappings, .* got int"),
        ([{"x": X, "extra": {1, 2}}], {}, "batches: expected tensors, lists, numbers and mappings of them, got set"),
        ([{"scale": 2.0}], {}, r"batches: expected the same number of rows in all of a batch, got \[\]"),
        (empty(), {}, "batches: expected at least one example with a label that counts, got none"),
        ([(X, torch.tensor([-100, -100]))], {}, "batches: expected at least one example"),
        ([X * float("nan")], {}, "0.weight: its gradients, or their squares, are not finite"),
    ],
)
def test_errors(batches: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        estimate_fisher(two_layers(), batches, **options)


def test_more_errors() -> None:
    with pytest.raises(ValueError, match="model: expected parameters that require grad, got none"):
        estimate_fisher(two_layers().requires_grad_(False), [X])
    with pytest.raises(ValueError, match="normalized: expected a Fisher information that is not 0 everywhere"):
        Fisher({"a": torch.zeros(2)}, "exact", 1).normalized()
