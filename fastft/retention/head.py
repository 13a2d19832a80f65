"""A new head, fitted before anything else moves, as a random one spoils the features that the model came with."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fastft.layers.wrappers import reshard
from fastft.optim.dtensors import like, whole
from fastft.retention.batches import IGNORED, evaluating, labels_of, outputs_of
from fastft.retention.processes import common_groups, refuse_fsdp1, same_everywhere
from fastft.warning import warn

SOLVER: dict[str, Any] = {
    "max_iter": 1000,
    "tolerance_grad": 1e-9,
    "tolerance_change": 1e-15,
    "line_search_fn": "strong_wolfe",
}
"""Of L-BFGS: on to where float64 sees the minimum, far below what a float32 head holds."""
BIAS_L2 = 1e-4
"""Enough for there to be one minimum, also with classes that have no rows."""
ALIKE = 0.01
"""Features whose standard deviation is below this part of their size hardly differ."""


class HeadFit(NamedTuple):
    """How well a fitted head does on the rows that it was fitted on."""

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
    https://arxiv.org/abs/2202.10054). With x [rows, features] what reaches the head, less its mean, and y the labels,
    this finds

    .. code-block:: text

        W, b = argmin  mean(cross_entropy(x Wᵀ + b, y)) + l2·σ²·‖W‖² + 1e-4·‖b‖²      σ²: the mean of x²

    by L-BFGS in float64, from 0, and gives b what the mean makes of it. There is one minimum, so the result depends on
    the rows alone, neither on their order nor on a seed. The model goes over ``batches`` once, in ``eval`` mode and
    without gradients. Its modes, ``.grad`` and all weights but those of the head are afterwards as before. All x are
    held on the CPU, 8 bytes a number, twice that while they are put together.

    Only this layer is fitted: where a model has other new layers below it, they stay at random. Fit the head before an
    :class:`fastft.Anchor` is taken if that holds the head too.

    With several processes, give each the same batches. Where parameters are DTensors (``fully_shard``, tensor
    parallelism, or both) or the model is wrapped for DistributedDataParallel, it is a collective, and raises on every
    process if one has another batch.

    Args:
        model: the model with the new head.
        head: the ``nn.Linear`` that gives the logits, or its name in ``model``.
        batches: mappings of tensors with "labels" (such as a tokenizer and a collator make), or ``(inputs, labels)``,
            on the model's device. Labels are whole numbers from 0, one for each vector that reaches the head, or for
            each output of the model if that picks or averages over positions (as decoders do that classify); -100 is
            left out.
        forward: ``forward(model, batch)`` runs the model so that the head is called, and returns its output. By
            default, ``model(**batch)`` without the labels, or ``model(inputs)``.
        l2: of the weights; above 0. By σ² it means the same at any scale of the features. The default was found on a
            sentence encoder with some thousand rows; less suits more.

    Returns:
        A named tuple ``(loss, accuracy, rows)`` of the head on ``batches``: the mean cross-entropy in nats, the share
        of right answers, and how many rows there were.

    Raises:
        ValueError: the head is no plain ``nn.Linear`` of the model with two outputs or more and weights of its own, or
            is not called once for each batch; batches have no labels, or labels that do not fit, or differ between
            processes; there are no rows at all; features are not finite, or the same in all rows; or the model is
            wrapped by ``FullyShardedDataParallel``. The head is then as it was.

    Warns of features that hardly differ between rows, as it takes large weights to tell them apart.
    """
    refuse_fsdp1(model, "call fit_head_ before the model is wrapped, or use torch.distributed.fsdp.fully_shard")
    reshard(model)
    head = found_head(model, head)
    if not 0 < l2 < float("inf"):
        raise ValueError(f"l2: expected a number above 0, got {l2!r}")
    with torch.inference_mode(False):
        x, labels = features_and_labels(model, head, batches, forward)
        center = x.mean(0) if head.bias is not None else torch.zeros_like(x[0])
        size = x.square().mean().sqrt().item()
        x -= center  # in place, as there may be many
        scale = x.square().mean().sqrt().item()
        if scale <= 1e-12 * size:
            raise ValueError(
                f"batches: expected features that differ between rows, got the same in all {len(labels):,}"
            )
        if scale < ALIKE * size:
            warn(
                f"fit_head_: the features that reach the head hardly differ between rows ({scale:.2g} of {size:.2g}); "
                "to tell them apart its weights get large, and so will gradients; a larger l2 keeps them small"
            )
        x /= scale  # changes no minimum, and the solver gets there sooner
        bias_l2 = None if head.bias is None else BIAS_L2
        weight, bias = linear_probe(x, labels, head.out_features, l2=l2, bias_l2=bias_l2)
        bias = bias - weight @ center / scale
        # As the head is from now on, rounded to its dtype.
        weight = written_to(head.weight, weight / scale)
        bias = weight @ center + (0.0 if head.bias is None else written_to(head.bias, bias))
        logits = x @ (scale * weight).T + bias
    loss, accuracy = cross_entropy(logits, labels), (logits.argmax(1) == labels).double().mean()
    return HeadFit(loss.item(), accuracy.item(), len(labels))


def found_head(model: nn.Module, head: nn.Linear | str) -> nn.Linear:
    """The head in the model, if it is one that can be fitted."""
    modules = dict(model.named_modules(remove_duplicate=False))
    if isinstance(head, str) and head not in modules:
        linear = [name for name, module in modules.items() if isinstance(module, nn.Linear)]
        expected = f"the name of an nn.Linear{f', such as {linear[-1]!r}' if linear else ''}"
        raise ValueError(f"head: expected {expected}, got {head!r}")
    found: Any = modules[head] if isinstance(head, str) else head
    names = [name for name, module in modules.items() if module is found]
    if not names:
        raise ValueError("head: expected a module of the model, got one that is not in it")
    # Parametrizations and the hooks of pruning and norms compute the weight anew, and would undo the fit.
    if not isinstance(found, nn.Linear) or "weight" not in found._parameters:
        below = [
            ".".join(filter(None, (names[0], name)))
            for name, module in found.named_modules()
            if name and isinstance(module, nn.Linear)
        ]
        instead = f"; in it: {', '.join(map(repr, below))}" if below else ""
        raise ValueError(
            f"head: expected an nn.Linear whose weight is a parameter, got {type(found).__name__}{instead}"
        )
    if found.out_features < 2:
        raise ValueError(f"head: expected at least 2 outputs, one for each class, got {found.out_features}")
    for name, module in modules.items():
        if module is not found and any(
            p is not None and p is q for p in module._parameters.values() for q in (found.weight, found.bias)
        ):
            raise ValueError(f"head: expected weights of its own, got {names[0]!r}, which shares them with {name!r}")
    return found


@torch.no_grad()
def written_to(p: Tensor, values: Tensor) -> Tensor:
    """Set a parameter to whole ``values``, of a DTensor each process its own part; returns them as they are rounded."""
    rounded = values.to(p.dtype)
    p.copy_(like(rounded, p))
    return rounded.to(values.dtype)


class Tap:
    """Records a module's inputs; with ``pass_on``, the module returns its input, so the model gives features."""

    def __init__(self, module: nn.Module) -> None:
        self.seen: list[Tensor] = []
        self.pass_on = False
        self.handle = module.register_forward_hook(self.hook, with_kwargs=True)

    def hook(self, _: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any], output: Any) -> Any:
        x = arguments[0] if arguments else named["input"]
        self.seen.append(whole(x))  # as tensor parallelism hands it to the head
        return self.seen[-1] if self.pass_on else None

    def features(self, run: Callable[[], Any], labels: Tensor) -> Tensor:
        """Those of one batch [*labels.shape, features]."""
        self.seen.clear()
        output = run()
        if len(self.seen) != 1:
            raise ValueError(f"head: expected the model to call it once for each batch, got {len(self.seen)} calls")
        x = self.seen[0]
        flat = x.dim() == 2 and len(x) == labels.numel()  # some models put rows and positions into one dimension
        if not self.pass_on:
            if flat or x.shape[:-1] == labels.shape:
                return x
            # A decoder gives logits for all positions and picks the last. What picks logits picks features as well.
            self.pass_on = True
            return self.features(run, labels)
        picked = getattr(output, "logits", output)
        if not isinstance(picked, Tensor) or picked.shape != (*labels.shape, x.shape[-1]):
            raise ValueError(
                f"batches: expected a label for each vector that reaches the head, of shape {list(x.shape[:-1])}, "
                f"got labels of shape {list(labels.shape)}"
            )
        return picked


def features_and_labels(
    model: nn.Module, head: nn.Linear, batches: Iterable[Any], forward: Callable[[nn.Module, Any], Any] | None
) -> tuple[Tensor, Tensor]:
    """The head's inputs [rows, features] in float64 and their labels [rows], on the CPU."""
    features, labels = [], []
    tap = Tap(head)
    try:
        with evaluating(model), torch.no_grad():
            for each in same_everywhere(batches, common_groups(model)):
                batch = tuple(each) if isinstance(each, list) else each  # as torch's DataLoader puts pairs together
                wanted = checked_labels(batch)
                x = tap.features(partial(forward or outputs_of, model, batch), wanted)
                y = wanted.reshape(-1).long().cpu()
                counts = y != IGNORED
                features.append(x.reshape(-1, head.in_features).cpu().double()[counts])
                labels.append(y[counts])
    finally:
        tap.handle.remove()
        reshard(model)  # what fully_shard has kept gathered would be written to in the head's place
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


def checked_labels(batch: Any) -> Tensor:
    """The batch's labels, one class for each row or position."""
    if isinstance(batch, tuple) and len(batch) != 2:
        raise ValueError(f"batches: expected (inputs, labels) or mappings with names, got a tuple of {len(batch)}")
    labels = labels_of(batch)
    if labels is None:
        got = f"the keys {', '.join(map(repr, batch))}" if hasattr(batch, "keys") else type(batch).__name__
        raise ValueError(f'batches: expected (inputs, labels) or mappings with "labels", got {got}')
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.dtype == torch.bool:
        got = getattr(labels, "dtype", type(labels).__name__)
        raise ValueError(f"batches: expected labels as a tensor of whole numbers, a class for each row, got {got}")
    return labels.squeeze(-1) if labels.dim() > 1 and labels.shape[-1] == 1 else labels


def linear_probe(
    features: Tensor, labels: Tensor, classes: int, *, l2: float, bias_l2: float | None = BIAS_L2
) -> tuple[Tensor, Tensor]:
    r"""Fit a linear classifier on features that are computed already; :func:`fit_head_` fits a model's head.

    Finds the one minimum, by L-BFGS in float64, from 0, so that the result depends on the rows alone:

    .. code-block:: text

        W, b = argmin  mean(cross_entropy(x Wᵀ + b, y)) + l2·‖W‖² + bias_l2·‖b‖²

    Args:
        features: x, floating point, ``[rows, features]``.
        labels: y, int64 ``[rows]``, from 0 to ``classes - 1``, on the features' device.
        classes: at least 2.
        l2: of the weights; above 0. Not relative to the features' size, other than in :func:`fit_head_`.
        bias_l2: of the bias, at least 0; None: no bias, b = 0. With 0, each class needs a row for there to be a
            minimum.

    Returns:
        W ``[classes, features]`` and b ``[classes]``, in float64.

    Raises:
        ValueError: the shapes or labels do not fit, or a number is out of its range.
    """
    if features.dim() != 2 or not features.is_floating_point() or len(features) == 0:
        raise ValueError(
            f"features: expected floating point of shape [rows, features], got {features.dtype} of shape "
            f"{list(features.shape)}"
        )
    if labels.shape != features.shape[:1] or labels.dtype != torch.int64:
        raise ValueError(
            f"labels: expected torch.int64 of shape {list(features.shape[:1])}, got {labels.dtype} of shape "
            f"{list(labels.shape)}"
        )
    if classes < 2 or labels.min() < 0 or labels.max() >= classes:
        raise ValueError(
            f"classes: expected at least 2, and labels from 0 to classes - 1, got {classes} and labels from "
            f"{int(labels.min())} to {int(labels.max())}"
        )
    if not 0 < l2 < float("inf"):
        raise ValueError(f"l2: expected a number above 0, got {l2!r}")
    if bias_l2 is not None and not 0 <= bias_l2 < float("inf"):
        raise ValueError(f"bias_l2: expected a number from 0, or None, got {bias_l2!r}")
    x = features.detach().double()
    weight = torch.zeros(classes, x.shape[1], dtype=x.dtype, device=x.device, requires_grad=True)
    bias = torch.zeros(classes, dtype=x.dtype, device=x.device, requires_grad=bias_l2 is not None)
    solver = torch.optim.LBFGS([p for p in (weight, bias) if p.requires_grad], **SOLVER)

    def closure() -> Tensor:
        solver.zero_grad()
        penalty = l2 * weight.square().sum() + (bias_l2 or 0.0) * bias.square().sum()
        loss = cross_entropy(x @ weight.T + bias, labels) + penalty
        loss.backward()
        return loss

    with torch.enable_grad():
        solver.step(closure)
    return weight.detach(), bias.detach()
