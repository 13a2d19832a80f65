"""The page of memory per GPU: up to date, and what sharded parameters and a real optimizer take."""

from __future__ import annotations

import runpy
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import fastft
from fastft.optim.state import LOW_BITS
from fastft.optim.tensors import local

PAGE = runpy.run_path(str(Path(__file__).resolve().parent.parent / "scripts" / "memory_per_gpu.py"))
SMALL = PAGE["Decoder"]("small", 256, 2, 320, 4, 2, vocabulary=500)


def test_the_page_is_up_to_date(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert PAGE["main"](["--check"]) == 0, "run python scripts/memory_per_gpu.py"
    stale = tmp_path / "page.md"
    stale.write_text(PAGE["document"]().replace("0.4", "0.5", 1))
    assert PAGE["main"](["--check", f"--page={stale}"]) == 1
    assert "is stale" in capsys.readouterr().err
    assert PAGE["main"]([f"--page={stale}"]) == 0
    assert PAGE["main"](["--check", f"--page={stale}"]) == 0


def test_the_models_have_the_parameters_of_transformers_own() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=500,
        hidden_size=256,
        num_hidden_layers=2,
        intermediate_size=320,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        shapes = [tuple(p.shape) for p in transformers.LlamaForCausalLM(config).parameters()]
    assert sorted(shapes) == sorted(shape for _, shape in SMALL.parameters())


@pytest.mark.filterwarnings("ignore:anchor_decay, weight_decay, lr")
@pytest.mark.parametrize(("kept", "state_dtype"), PAGE["SETTINGS"], ids=str)
def test_an_optimizer_of_sharded_parameters_takes_as_much(kept: Any, state_dtype: Any, pretended: Any) -> None:
    model = nn.ParameterDict(
        {name.replace(".", "_"): nn.Parameter(torch.ones(shape).to(kept.dtype)) for name, shape in SMALL.parameters()}
    )
    fully_shard(model, mesh=pretended(0, (4,)))
    optimizer = fastft.AdamW(
        model.named_parameters(),
        anchor="init",
        anchor_decay=0.1,
        state_dtype=state_dtype,
        extra_bits=kept.extra_bits,
    )
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()

    def taken(tensors: Iterator[Tensor]) -> int:
        return sum(local(tensor).nbytes for tensor in tensors)

    kinds = [(key, value) for state in optimizer.state.values() for key, value in state.items()]
    expected = PAGE["memory"](SMALL, 4, kept, state_dtype)
    assert taken(model.parameters()) == expected.weights
    assert taken(p.grad for p in model.parameters()) == expected.gradients  # type: ignore[misc]
    assert taken(optimizer.anchor[name] for name in optimizer.anchor) == expected.anchor  # type: ignore[index, union-attr]
    assert taken(value for key, value in kinds if key.startswith("exp_avg")) == expected.moments
    low = taken(value for key, value in kinds if key == LOW_BITS)
    assert low <= expected.low_bits <= 1.02 * low
    assert (low > 0) == (kept.extra_bits > 0)


def test_what_is_sent_goes_by_the_number_of_elements() -> None:
    numels = [prod(shape) for _, shape in SMALL.parameters()]
    root = sum(prod(shape) for shape in SMALL.root().values())
    weights, gradients = PAGE["sent"](SMALL, 4, 2)
    assert gradients == 0.75 * 2 * sum(numels)
    assert weights == 2 * gradients - 0.75 * 2 * root
