"""Loading a model: what is new in it, what it can take, what is refused; and the weights it began with."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from fastft.commands.finetune import model
from fastft.commands.finetune.errors import InputError
from fastft.layers import layer_groups
from fastft.retention import drift_report

CLASSIFY, CAUSAL = "text-classification", "causal-lm"


def copied(home: Path, kind: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(home / kind, tmp_path / kind))


def test_a_new_head_is_new_and_labels_have_names(home: Path) -> None:
    loaded = model.load(home / "bert", CLASSIFY, ["bad", "fair", "good"])
    assert loaded.new == ["classifier.weight", "classifier.bias"]
    assert loaded.model.config.id2label == {0: "bad", 1: "fair", 2: "good"}
    assert loaded.model.config.label2id == {"bad": 0, "fair": 1, "good": 2}
    assert loaded.model.dtype == torch.float32


def test_a_head_of_another_size_is_new_and_one_for_the_same_labels_is_kept(home: Path, tmp_path: Path) -> None:
    first = model.load(home / "bert", CLASSIFY, ["good", "bad"])  # in this order
    first.model.save_pretrained(tmp_path)
    first.tokenizer.save_pretrained(tmp_path)

    larger = model.load(tmp_path, CLASSIFY, ["bad", "fair", "good"])
    assert larger.new == ["classifier.weight", "classifier.bias"] and larger.notes == []
    same = model.load(tmp_path, CLASSIFY, ["bad", "good"])
    assert (same.new, same.labels, same.notes) == ([], ["good", "bad"], [])
    assert torch.equal(same.model.classifier.weight, first.model.classifier.weight)
    other = model.load(tmp_path, CLASSIFY, ["ham", "spam"])
    assert other.new == ["classifier.weight", "classifier.bias"]
    assert other.labels == ["ham", "spam"]
    assert other.notes == ["the model has a head for good, bad; these become ham, spam"]


def test_a_decoder_classifies_with_a_padding_token(home: Path) -> None:
    loaded = model.load(home / "gpt2", CLASSIFY, ["a", "b"])
    assert loaded.new == ["score.weight"]
    assert loaded.tokenizer.pad_token == "</s>"
    assert loaded.model.config.pad_token_id == loaded.tokenizer.pad_token_id


def test_tied_and_untied_language_models_are_whole(home: Path) -> None:
    for kind in ("llama", "gpt2"):
        assert model.load(home / kind, CAUSAL, []).new == []


def test_folders_that_hold_no_model(home: Path, tmp_path: Path) -> None:
    expected = "expected a folder as save_pretrained writes it, with config.json, model.safetensors and the tokenizer"
    with pytest.raises(InputError, match=f"{expected}; there is nothing there"):
        model.load(tmp_path / "nowhere", CLASSIFY, ["a", "b"])
    with pytest.raises(InputError, match=f"{expected}; there is a folder without config.json"):
        model.load(tmp_path, CLASSIFY, ["a", "b"])
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match=f"{expected}; there is a file"):
        model.load(tmp_path / "file", CLASSIFY, ["a", "b"])


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_files_that_are_broken(home: Path, tmp_path: Path, name: str) -> None:
    folder = copied(home, "bert", tmp_path)
    (folder / name).write_text("{")
    with pytest.raises(InputError, match="cannot load") as error:
        model.load(folder, CLASSIFY, ["a", "b"])
    assert "\n" not in str(error.value) and str(folder) in str(error.value)


def test_weights_or_a_tokenizer_that_are_missing(home: Path, tmp_path: Path) -> None:
    folder = copied(home, "bert", tmp_path)
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"cannot load a model with a classification head: .*model\.safetensors"):
        model.load(folder, CLASSIFY, ["a", "b"])
    folder = copied(home, "llama", tmp_path)
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(InputError, match=r"tokenizer"):
        model.load(folder, CAUSAL, [])
    # transformers makes an empty tokenizer up for a BERT that has none.
    folder = copied(home, "bert", tmp_path / "b")
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(InputError, match=r"no tokenizer; expected one of tokenizer\.json, vocab\.txt"):
        model.load(folder, CLASSIFY, ["a", "b"])


def test_a_tokenizer_of_another_model(home: Path, tmp_path: Path) -> None:
    folder = copied(home, "bert", tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"word{i}" for i in range(600)])
    tokenizer.save_pretrained(folder)
    with pytest.raises(InputError, match=r"tokens and the model embeddings for 500; they do not belong together"):
        model.load(folder, CLASSIFY, ["a", "b"])


def test_what_is_no_causal_language_model(home: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"expected a causal language model for --task causal-lm, but it has no "):
        model.load(home / "bert", CAUSAL, [])
    folder = copied(home, "bert", tmp_path)
    masked = transformers.BertForMaskedLM(transformers.AutoConfig.from_pretrained(folder))
    masked.save_pretrained(folder)
    with pytest.raises(InputError, match=r"for --task causal-lm, but it is BertForMaskedLM"):
        model.load(folder, CAUSAL, [])


def test_the_limit_is_that_of_positions_or_tokenizer(home: Path) -> None:
    loaded = model.load(home / "bert", CLASSIFY, ["a", "b"])
    assert model.token_limit(loaded.model, loaded.tokenizer) == 64
    loaded.tokenizer.model_max_length = 50
    assert model.token_limit(loaded.model, loaded.tokenizer) == 50
    loaded.tokenizer.model_max_length = 10**30
    bloom = transformers.BloomForCausalLM(transformers.BloomConfig(vocab_size=500, hidden_size=8, n_layer=1, n_head=1))
    assert model.token_limit(bloom, loaded.tokenizer) is None
    # RoBERTa's positions begin after its padding token.
    small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    config = transformers.RobertaConfig(vocab_size=500, max_position_embeddings=34, pad_token_id=1, **small)
    roberta = transformers.RobertaModel(config)
    limit = model.token_limit(roberta, loaded.tokenizer)
    assert limit == 32
    roberta(torch.full((1, limit), 5))
    with pytest.raises((IndexError, RuntimeError)):
        roberta(torch.full((1, limit + 1), 5))


def squares_apart(tuned: nn.Module, start: nn.Module, names: Iterable[str]) -> tuple[float, float]:
    """‖θ − θ₀‖² and ‖θ₀‖² of some parameters of two models."""
    ends, starts = dict(tuned.named_parameters()), dict(start.named_parameters())
    pairs = [(ends[name].detach().double(), starts[name].detach().double()) for name in names]
    return sum(float((end - at).square().sum()) for end, at in pairs), sum(float(at.square().sum()) for _, at in pairs)


@pytest.mark.parametrize("kind", ["bert", "llama", "gpt2", "renamed"])
def test_the_drift_from_the_file_is_that_from_a_second_model(home: Path, kind: str, tmp_path: Path) -> None:
    folder, task = home / ("bert" if kind == "renamed" else kind), CLASSIFY if kind in ("bert", "renamed") else CAUSAL
    labels = ["a", "b"] if task == CLASSIFY else []
    if kind == "renamed":  # names that transformers maps, and the file's own do not fit
        folder = copied(home, "bert", tmp_path)
        old = load_file(folder / "model.safetensors")
        renamed = {name.replace("LayerNorm.weight", "LayerNorm.gamma"): tensor for name, tensor in old.items()}
        save_file(renamed, folder / "model.safetensors", {"format": "pt"})
    tuned = model.load(folder, task, labels)
    anchor = model.weights_of(tuned, folder)
    assert (anchor.source is None) == (kind == "renamed")
    groups = layer_groups(tuned.model)
    with torch.no_grad():
        for i, p in enumerate(tuned.model.parameters()):
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i)), alpha=0.01 * (i % 3))

    report = drift_report(tuned.model, anchor, groups)
    start = model.load(folder, task, labels).model
    sums = []
    for group, layer in zip(groups, report.groups, strict=True):
        apart, base = squares_apart(tuned.model, start, [n for n in group.param_names if n not in tuned.new])
        sums.append((apart, base))
        assert layer.relative == (pytest.approx((apart / base) ** 0.5, rel=1e-12) if base else None)
    assert list(report.total.unanchored) == tuned.new
    apart, base = map(sum, zip(*sums, strict=True))
    assert report.total.relative == pytest.approx((apart / base) ** 0.5, rel=1e-12)
