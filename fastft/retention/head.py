"""A new head, fitted before anything else moves: what a random one does to the features is most of the forgetting."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import parametrize

from fastft.retention.batches import IGNORED, evaluating, labels_of, outputs_of

SOLVER: dict[str, Any] = {
    "max_iter": 1000,
    "tolerance_grad": 1e-9,
    "tolerance_change": 1e-15,
    "line_search_fn": "strong_wolfe",
}
"""Of L-BFGS: on to where float64 sees the minimum, far below what a float32 head holds."""


class HeadFit(NamedTuple):
    """How well a fitted head does on what it was fitted on."""

    loss: float
    """Mean cross-entropy, in nats."""
    accuracy: float
    rows: int


def fit_head_(
    model: nn.Module,
    head: nn.Linear | str,
    batches: Iterable[Any],
    *,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    l2: float = 0.3,
) -> HeadFit:
    r"""Fit a classifier's last layer while the rest of the model stays as it is: a linear probe, to fine-tune from.

    A head that starts at random sends gradients through the model that bend its features to fit that head, and what
    it knew goes with them. So fit the head first, then fine-tune (LP-FT: Kumar et al. 2022,
    https://arxiv.org/abs/2202.10054). With x [rows, features] what reaches the head and y the labels, this finds

    .. code-block:: text

        W, b = argmin  mean(cross_entropy(x Wᵀ + b, y)) + l2·σ²·‖W‖²      σ²: the features' variance, in the mean

    by L-BFGS in float64, from 0: it is convex, so the result depends on the rows alone, neither on their order nor on
    a seed. The model goes over ``batches`` once, in ``eval`` mode and without gradients. Its modes, ``.grad`` and all
    weights but those of the head are afterwards as before. All x are held on the CPU, 8 bytes a number.

    Fit the head before an :class:`fastft.Anchor` is taken if that holds the head too, and before the model is wrapped
    or sharded; with data split over several processes, give each the same batches.

    Args:
        model: the model with the new head.
        head: the ``nn.Linear`` that gives the logits, or its name in ``model``.
        batches: mappings of tensors with "labels" (such as a tokenizer and a collator make), or ``(inputs, labels)``,
            on the model's device. Labels are whole numbers from 0; -100 is left out. One label for each vector that
            reaches the head.
        forward: ``forward(model, batch)`` runs the model so that the head is called. By default, ``model(**batch)``
            without the labels, or ``model(inputs)``.
        l2: of the weights, not the biases; above 0, so that there is a minimum. By σ² it means the same at any scale
            of the features. The default was found on a sentence encoder with some thousand rows; less suits more.

    Returns the loss and accuracy on ``batches`` after fitting.

    Raises ``ValueError``, with the head as it was, for a head that is no plain ``nn.Linear`` of the model with two
    outputs or more, for batches without labels, labels that do not fit, a head that is not called once for each
    batch, no rows at all, or features that are not finite or the same in all rows.
    """
    head = found_head(model, head)
    if not l2 > 0 or l2 == float("inf"):
        raise ValueError(f"l2: expected a number above 0, got {l2!r}")
    features, labels = what_reaches(model, head, batches, forward)
    center = features.mean(0) if head.bias is not None else torch.zeros_like(features[0])
    scale = features.var(0, correction=0).mean().sqrt()
    if scale == 0.0:
        raise ValueError(f"batches: expected features that differ between rows, got the same in all {len(labels):,}")
    # Neither changes the minimum, and the solver gets there sooner.
    standard = (features - center) / scale
    weight, bias = minimum(standard, labels, head.out_features, l2, biased=head.bias is not None)
    weight /= scale
    bias -= weight @ center
    with torch.no_grad():
        head.weight.copy_(weight)
        if head.bias is not None:
            head.bias.copy_(bias)
    logits = features @ weight.T + bias
    loss, accuracy = cross_entropy(logits, labels), (logits.argmax(1) == labels).double().mean()
    return HeadFit(loss.item(), accuracy.item(), len(labels))


def found_head(model: nn.Module, head: nn.Linear | str) -> nn.Linear:
    """The head in the model, if it is one that can be fitted."""
    modules = dict(model.named_modules(remove_duplicate=False))
    if isinstance(head, str):
        if head not in modules:
            linear = [name for name, module in modules.items() if isinstance(module, nn.Linear)]
            raise ValueError(f"head: expected the name of an nn.Linear, such as {linear[-1:]}, got {head!r}")
        found: Any = modules[head]
    else:
        found = head
        if not any(module is head for module in modules.values()):
            raise ValueError("head: expected a module of the model, got one that is not in it")
    if not isinstance(found, nn.Linear) or parametrize.is_parametrized(found):
        raise ValueError(f"head: expected a plain nn.Linear, got {type(found).__name__}")
    if found.out_features < 2:
        raise ValueError(f"head: expected at least 2 outputs, one for each class, got {found.out_features}")
    return found


def what_reaches(
    model: nn.Module, head: nn.Linear, batches: Iterable[Any], forward: Callable[[nn.Module, Any], Any] | None
) -> tuple[Tensor, Tensor]:
    """The head's inputs [rows, features] in float64 and their labels [rows], on the CPU."""
    seen: list[Tensor] = []
    features, labels = [], []
    hook = head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    try:
        with evaluating(model), torch.no_grad():
            for each in batches:
                batch = tuple(each) if isinstance(each, list) else each  # as torch's DataLoader puts pairs together
                wanted = labels_of(batch)
                if not isinstance(wanted, Tensor) or wanted.is_floating_point() or wanted.dtype == torch.bool:
                    got = "none" if wanted is None else getattr(wanted, "dtype", type(wanted).__name__)
                    raise ValueError(f"batches: expected labels as a tensor of whole numbers, got {got}")
                seen.clear()
                (forward or outputs_of)(model, batch)
                if len(seen) != 1:
                    raise ValueError(f"head: expected the model to call it once for each batch, got {len(seen)} calls")
                x, y = seen[0].reshape(-1, head.in_features), wanted.reshape(-1)
                if len(x) != len(y):
                    raise ValueError(
                        f"batches: expected a label for each vector that reaches the head ({len(x):,}), got {len(y):,}"
                    )
                counts = (y != IGNORED).cpu()
                features.append(x.cpu().double()[counts])
                labels.append(y.cpu().long()[counts])
    finally:
        hook.remove()
    if not sum(map(len, labels)):
        raise ValueError("batches: expected at least one row with a label, got none")
    x, y = torch.cat(features), torch.cat(labels)
    if not x.isfinite().all():
        raise ValueError("batches: expected finite features, got inf or NaN from the model")
    if y.min() < 0 or y.max() >= head.out_features:
        raise ValueError(
            f"batches: expected labels from 0 to {head.out_features - 1}, as the head has outputs, "
            f"got {int(y.min())} to {int(y.max())}"
        )
    return x, y


def minimum(x: Tensor, y: Tensor, classes: int, l2: float, biased: bool) -> tuple[Tensor, Tensor]:
    """W [classes, features] and b [classes] that minimize ``mean(cross_entropy(x Wᵀ + b, y)) + l2·‖W‖²``.

    x [rows, features] in float64, where L-BFGS converges to the one minimum whatever the rounding of the features.
    """
    weight = torch.zeros(classes, x.shape[1], dtype=x.dtype, requires_grad=True)
    bias = torch.zeros(classes, dtype=x.dtype, requires_grad=biased)
    solver = torch.optim.LBFGS([weight, bias][: 1 + biased], **SOLVER)

    def closure() -> Tensor:
        solver.zero_grad()
        loss = cross_entropy(x @ weight.T + bias, y) + l2 * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        solver.step(closure)
    return weight.detach(), bias.detach()
