"""Shared by these tests: models, and a file of rows."""

from __future__ import annotations

from pathlib import Path

import finetune_cases as cases
import pytest

pytest.importorskip("datasets")
pytest.importorskip("transformers")


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the models bert, llama and gpt2, and train.csv, eval.csv."""
    folder = tmp_path_factory.mktemp("home")
    for kind in ("bert", "llama", "gpt2"):
        cases.save_model(folder / kind, kind)
    rows = cases.review_rows(110)
    cases.write_rows(folder / "train.csv", rows[:80])
    cases.write_rows(folder / "eval.csv", rows[80:])
    return folder


@pytest.fixture
def classify(home: Path, tmp_path: Path) -> dict[str, object]:
    """Options of a short run that classifies."""
    return {
        "model": home / "bert",
        "train": home / "train.csv",
        "eval": home / "eval.csv",
        "task": "text-classification",
        "text_column": "text",
        "label_column": "label",
        "output": tmp_path / "out",
        "steps": 4,
        "batch_size": 8,
        "lr": 1e-3,
    }


@pytest.fixture
def continue_text(home: Path, tmp_path: Path) -> dict[str, object]:
    """Options of a short run of a causal language model."""
    return {
        "model": home / "llama",
        "train": home / "train.csv",
        "eval": home / "eval.csv",
        "task": "causal-lm",
        "text_column": "text",
        "output": tmp_path / "out",
        "steps": 4,
        "batch_size": 8,
        "lr": 1e-3,
    }
