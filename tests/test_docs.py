"""The documentation's Python snippets run: each page from top to bottom, in one namespace, as a reader would."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

DOCS = Path(__file__).resolve().parent.parent / "docs"
SNIPPET = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
PAGES = {
    page.relative_to(DOCS).as_posix(): SNIPPET.findall(page.read_text(encoding="utf-8")) for page in DOCS.rglob("*.md")
}
NEEDS = {"data.md": ("datasketch",), "trainer.md": ("transformers", "accelerate", "lightning")}
"""Packages that a page needs beyond fastft's own dependencies."""


@pytest.fixture
def names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The names that a page starts with: rows to train on; and a folder to work in."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    tokens, labels = torch.randint(50, (8, 7)), torch.randint(2, (8,))
    return {
        "__name__": "page",
        "rows": [{"input_ids": ids, "labels": label} for ids, label in zip(tokens, labels, strict=True)],
    }


@pytest.mark.parametrize("page", sorted(page for page, snippets in PAGES.items() if snippets))
def test_the_snippets_of_a_page_run_in_order(page: str, names: dict[str, Any]) -> None:
    for module in NEEDS.get(page, ()):
        pytest.importorskip(module)
    if any('"my-model"' in snippet for snippet in PAGES[page]):
        transformers = pytest.importorskip("transformers")
        config = transformers.BertConfig(
            vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
        )
        transformers.BertForSequenceClassification(config).save_pretrained("my-model")
    for number, snippet in enumerate(PAGES[page], start=1):
        exec(compile(snippet, f"{page}, snippet {number}", "exec"), names)


def test_every_guide_has_snippets() -> None:
    without = {page for page, snippets in PAGES.items() if not snippets and "/" not in page}
    assert without == {"finetune.md", "how-it-works.md", "benchmarks.md"}


def test_every_page_is_in_the_navigation() -> None:
    listed = set(re.findall(r": (\S+\.md)$", (DOCS.parent / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE))
    assert listed == set(PAGES)


def test_lines_are_short() -> None:
    tables = ("|", "<!--")
    for page in PAGES:
        if page.startswith("_generated/"):
            continue
        for number, line in enumerate((DOCS / page).read_text(encoding="utf-8").splitlines(), start=1):
            assert len(line) <= 120 or line.startswith(tables), f"{page}, line {number}: {len(line)} characters"
