"""NEFTune: noise on the embeddings while training (Jain et al. 2023, https://arxiv.org/abs/2310.05914)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fastft.checks import check_not_negative


def neftune(model: nn.Module, alpha: float = 5.0, *, seed: int | None = None) -> RemovableHandle:
    """Add uniform noise to the embeddings of every training forward pass.

    Embeddings x [..., L, d] become x + ε·α/√(L·d), ε ~ U(−1, 1); L counts padding, as in the authors' code. In eval
    mode they pass untouched.

    Args:
        model: an embedding, whose output gets the noise; or a transformers model, whose input embedding does.
        alpha: how strong; 5 to 15 in the paper.
        seed: of a generator of its own. None: torch's, which ``torch.manual_seed`` and checkpoints cover.

    Returns:
        A handle; its ``remove()``, or leaving its ``with`` block, ends it.

    Raises:
        ValueError: alpha is negative or not finite.
    """
    check_not_negative("alpha", alpha)
    find = getattr(model, "get_input_embeddings", None)
    embedding = find() if find is not None else model
    generators: dict[torch.device, torch.Generator] = {}

    def add_noise(module: nn.Module, inputs: Any, output: Tensor) -> Tensor | None:
        if not module.training:
            return None
        if seed is None:
            generator = None
        elif output.device not in generators:
            generator = generators[output.device] = torch.Generator(output.device).manual_seed(seed)
        else:
            generator = generators[output.device]
        scale = alpha / (output.shape[-2] * output.shape[-1]) ** 0.5 if output.numel() else 0.0
        noise = torch.empty_like(output).uniform_(-scale, scale, generator=generator)
        return output + noise

    return embedding.register_forward_hook(add_noise)
