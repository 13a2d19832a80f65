"""The README's Python snippets run, one after the other, as a reader would try them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

README = Path(__file__).resolve().parent.parent / "README.md"


@pytest.mark.slow
def test_the_snippets_run_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path / "my-model")
    monkeypatch.chdir(tmp_path)
    # What a reader has: data, and an evaluation.
    batch, labels = torch.randint(50, (4, 7)), torch.tensor([0, 1, 1, 0])
    rows = [{"input_ids": ids, "labels": label} for ids, label in zip(batch, labels, strict=True)]

    def evaluate(model: torch.nn.Module) -> dict[str, torch.Tensor]:
        answers = model(input_ids=batch).logits.argmax(1)
        return {"source": answers == 1, "target": answers == labels}

    names: dict[str, Any] = {"batch": batch, "labels": labels, "rows": rows, "old_rows": rows, "evaluate": evaluate}
    snippets = re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert len(snippets) == 8
    models = {}
    for snippet in snippets:
        exec(compile(snippet, str(README), "exec"), names)
        models[id(names["model"])] = names["model"]
    before = dict(transformers.BertForSequenceClassification.from_pretrained(tmp_path / "my-model").named_parameters())
    assert len(models) == 3
    for model in models.values():
        moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
        assert moved == {"bert.pooler.dense.weight", "bert.pooler.dense.bias", "classifier.weight", "classifier.bias"}
    printed = capsys.readouterr().out
    assert "encoder.layer.1" in printed
    assert "alpha = 0.5" in printed
    assert (tmp_path / "trade-off.png").exists()
    assert sum(len(batch["labels"]) for batch in names["loader"]) == len(names["mixed"]) >= len(rows)
