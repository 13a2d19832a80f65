"""An anchor on a model's outputs instead of on its weights: stay near those of the base model."""

from __future__ import annotations

import copy
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, kl_div

from fastft.layers.wrappers import is_fsdp2, peel
from fastft.optim.dtensors import whole
from fastft.retention.processes import refuse_fsdp1


def distillation_loss(
    outputs: Tensor,
    base_outputs: Tensor,
    *,
    kind: Literal["embeddings", "logits"],
    temperature: float = 2.0,
    mask: Tensor | None = None,
    reduction: Literal["mean", "sum", "none"] = "mean",
) -> Tensor:
    """The distance of outputs from the base model's for the same inputs; add it to the loss with a weight.

    Learning without Forgetting (Li & Hoiem 2016, https://arxiv.org/abs/1606.09282). The inputs can be the new task's,
    or any text of the kind that the model should go on to handle; they need no labels.

    Args:
        outputs: ``[..., D]`` embeddings or ``[..., C]`` logits of the model that is tuned.
        base_outputs: the same of the base model, from :class:`FrozenBase` or computed before training; no gradient
            flows into them.
        kind: ``"embeddings"``: 1 − cos, from 0 to 2; ``"logits"``: T²·KL(softmax(base/T) ‖ softmax(outputs/T)), whose
            gradient is that of the paper's cross-entropy, times T² to keep its size whatever T is (Hinton et al.
            2015, https://arxiv.org/abs/1503.02531).
        temperature: T > 0, for logits; the paper's is 2.
        mask: bool ``[...]``: which vectors count, such as an attention mask for outputs per token.
        reduction: ``"mean"`` or ``"sum"`` over the vectors that count (not over D or C), a 0-d tensor; or ``"none"``,
            ``[...]``, with 0 where the mask is false. The mean over none is 0.

    Computed in float32 (float64 with float64 outputs). DTensors, of which all processes of their mesh have to be here,
    are put together first; what comes back is a plain tensor.

    Raises:
        ValueError: shapes differ, or an option is none of those above.
    """
    if outputs.shape != base_outputs.shape or outputs.dim() == 0:
        raise ValueError(
            f"base_outputs: expected the shape of outputs, [..., D], got {list(base_outputs.shape)} for "
            f"{list(outputs.shape)}"
        )
    if mask is not None and (mask.dtype != torch.bool or mask.shape != outputs.shape[:-1]):
        raise ValueError(
            f"mask: expected bool of shape {list(outputs.shape[:-1])}, got {mask.dtype} of shape {list(mask.shape)}"
        )
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f'reduction: expected "mean", "sum" or "none", got {reduction!r}')
    outputs, base_outputs = whole(outputs), whole(base_outputs)
    dtype = torch.promote_types(outputs.dtype, torch.float32)
    tuned, base = outputs.to(dtype), base_outputs.detach().to(dtype)
    if kind == "embeddings":
        distance = 1.0 - cosine_similarity(tuned, base, dim=-1)
    elif kind == "logits":
        if not temperature > 0.0:
            raise ValueError(f"temperature: expected a number > 0, got {temperature!r}")
        log_p, log_base = (tuned / temperature).log_softmax(-1), (base / temperature).log_softmax(-1)
        distance = temperature**2 * kl_div(log_p, log_base, reduction="none", log_target=True).sum(-1)
    else:
        raise ValueError(f'kind: expected "embeddings" or "logits", got {kind!r}')
    if mask is not None:
        mask = whole(mask)
        distance = torch.where(mask, distance, 0.0)
    if reduction == "none":
        return distance
    total = distance.sum()
    if reduction == "sum":
        return total
    return total / (max(1, distance.numel()) if mask is None else mask.sum().clamp(min=1))


class FrozenBase:
    """A frozen copy of a model as it is now: ``base(...)`` is the model's output, without gradients.

    Made before training. It is in ``eval`` mode, so without dropout, and takes as much memory as the model's
    parameters and buffers. It is no module: as an attribute of one it is in no state dict and gives an optimizer no
    parameters. On a fixed set of inputs its outputs can be computed once and kept, and the copy dropped.

    Args:
        model: the model, also one that is compiled or wrapped for DDP (the copy is not), or of DTensors by tensor
            parallelism. Make it before ``fully_shard``, which can then cut the copy too: ``fully_shard(base.module)``.

    Raises:
        ValueError: ``fully_shard`` or ``FullyShardedDataParallel`` was applied to the model or a part of it.
    """

    def __init__(self, model: nn.Module) -> None:
        refuse_fsdp1(model, "make the FrozenBase before the model is wrapped")
        if any(is_fsdp2(module) for module in model.modules()):
            raise ValueError(
                "model: expected one that can be copied, got one that fully_shard was applied to: make the FrozenBase "
                "before, and apply fully_shard to its module as well"
            )
        self.module = copy.deepcopy(peel(model)).eval().requires_grad_(False)
        """The copy."""

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's output for these arguments."""
        return self.module(*args, **kwargs)

    def to(self, *args: Any, **kwargs: Any) -> FrozenBase:
        """Move or cast the copy, as ``nn.Module.to`` does."""
        self.module.to(*args, **kwargs)
        return self
