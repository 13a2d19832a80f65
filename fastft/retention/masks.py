"""Steps that move only some of the weights: the most important to the task, or those of largest momentum."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastft.checks import check_fraction
from fastft.names import NameIndex, closest
from fastft.optim import AdamW
from fastft.optim.state import LOW_BITS, moments_of
from fastft.optim.tensors import is_dtensor
from fastft.warning import warn


def child_tuning_(
    optimizer: AdamW,
    model: nn.Module,
    fisher: Mapping[str, Tensor],
    fraction: float = 0.3,
    *,
    scope: Literal["model", "tensor"] = "model",
) -> dict[str, Tensor]:
    """Step only the weights whose Fisher information on the new task is highest: Child-Tuning-D.

    (Xu et al. 2021, https://arxiv.org/abs/2109.05687.) All other weights stay as they are, bit for bit. (The authors'
    code masks gradients only, so there weight decay and momentum still move them.)

    Args:
        optimizer: an optimizer of the model's parameters. Its update masks are set, and saved in its state dict;
            ``optimizer.set_update_mask(param, None)`` takes one back.
        model: the model, to find its parameters by name, also where wrappers have changed that.
        fisher: parameter name → values of the parameter's shape, usually ``estimate_fisher(...)`` of the pre-trained
            model on the new task's training data. Parameters that it does not have (a new head) are stepped whole:
            leave them out of it with ``{name: f for name, f in fisher.items() if ...}``.
        fraction: the share of the elements in ``fisher`` to step; above 0 and up to 1.
        scope: ``"model"``, as in the paper: the highest of all elements together, for which their values are held
            in one vector; ``"tensor"``: the highest of each tensor.

    Returns:
        The masks, bool tensors of the parameters' shapes, by the names in ``fisher``.

    Raises:
        TypeError: the optimizer is no :class:`fastft.AdamW`.
        ValueError: names that the model lacks, other shapes, values that are negative or not finite, or parameters that
            are not the optimizer's; then nothing has been set.
    """
    if not isinstance(optimizer, AdamW):
        raise TypeError(f"optimizer: expected a fastft.AdamW, got {type(optimizer).__name__}")
    check_fraction("fraction", fraction)
    if scope not in ("model", "tensor"):
        raise ValueError(f'scope: expected "model" or "tensor", got {scope!r}')
    parameters = dict(model.named_parameters(remove_duplicate=False))
    index = NameIndex(parameters)
    stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if not fisher:
        raise ValueError("fisher: expected at least one parameter, got none")
    chosen: dict[str, Tensor] = {}
    for name, values in fisher.items():
        found = index.find(name)
        if found is None:
            raise ValueError(f"fisher: the model has no parameter {name!r}{closest(name, parameters)}")
        p = chosen[name] = parameters[found]
        if values.shape != p.shape:
            raise ValueError(f"fisher: {name}: expected shape {list(p.shape)}, got {list(values.shape)}")
        if not (values.isfinite() & (values >= 0)).all():
            raise ValueError(f"fisher: {name}: expected finite values >= 0")
        if id(p) not in stepped:
            raise ValueError(f"fisher: {name}: is not one of the optimizer's parameters")
    if scope == "tensor":
        masks = {name: highest(values, fraction) for name, values in fisher.items()}
    else:
        together = highest(torch.cat([values.detach().float().cpu().flatten() for values in fisher.values()]), fraction)
        parts = together.split([values.numel() for values in fisher.values()])
        masks = {name: part.view(fisher[name].shape) for name, part in zip(fisher, parts, strict=True)}
    for name, mask in masks.items():
        optimizer.set_update_mask(chosen[name], mask)
    return masks


class MoFO:
    """Move only the weights whose momentum is largest in their tensor: MoFO, the momentum-filtered optimizer.

    (Chen et al. 2024, https://arxiv.org/abs/2407.20999.) Attached to an Adam, it lets each step update the moments of
    all elements, and then takes back the step of those whose ``abs(exp_avg)``, as it is after the step, is not among
    the ``fraction`` largest of their tensor. These keep their value bit for bit, so decay and anchor do not move them
    either. (In the authors' code weight decay moves all.)

    An update mask could not do this: it leaves moments as they are, and has to be known before the step. So this is
    a pass of its own: during a step a copy of the filtered parameters is held, and each is searched for its
    largest momenta; low bits (``extra_bits``) are taken back with their weights. It keeps nothing between steps; after
    resuming from a checkpoint, attach it again.

    Args:
        optimizer: ``fastft.AdamW``, or torch's ``Adam`` or ``AdamW``.
        fraction: the share of each tensor to move: ``max(1, ⌊fraction · numel⌋)`` elements; the authors recommend 0.05
            to 0.2.
        parameters: the tensors to filter; None: all that have two or more dimensions, so that biases and norms are
            stepped whole, as in the authors' code.

    Raises:
        TypeError: another optimizer.
        ValueError: a fraction out of range, or parameters that are not the optimizer's, or are sharded.
    """

    def __init__(
        self, optimizer: torch.optim.Adam, fraction: float = 0.1, parameters: Iterable[Tensor] | None = None
    ) -> None:
        if not isinstance(optimizer, torch.optim.Adam):
            raise TypeError(f"optimizer: expected a torch.optim.Adam or AdamW, got {type(optimizer).__name__}")
        check_fraction("fraction", fraction)
        self.fraction = fraction
        self._chosen = None if parameters is None else {id(p): p for p in parameters}
        known = {id(p): p for group in optimizer.param_groups for p in group["params"]}
        for p in [] if self._chosen is None else self._chosen.values():
            if id(p) not in known:
                raise ValueError(f"parameters: one of shape {list(p.shape)} is not the optimizer's")
        for p in self._filtered(optimizer):
            if is_dtensor(p):
                raise ValueError(f"optimizer: expected parameters that are whole, got a DTensor of {list(p.shape)}")
        self._before: list[tuple[Tensor, Tensor, Tensor | None]] = []
        self._hooks = [
            optimizer.register_step_pre_hook(self._remember),
            optimizer.register_step_post_hook(self._filter),
        ]

    def remove(self) -> None:
        """The old name of :meth:`undo`."""
        warn("MoFO.remove() is called undo() now", DeprecationWarning)
        self.undo()

    def undo(self) -> None:
        """Detach it: the optimizer's next step moves everything again."""
        for hook in self._hooks:
            hook.remove()
        self._before = []

    def _filtered(self, optimizer: torch.optim.Optimizer) -> Iterable[Tensor]:
        for group in optimizer.param_groups:
            for p in group["params"]:
                if p.dim() >= 2 if self._chosen is None else id(p) in self._chosen:
                    yield p

    def _remember(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        # A closure may bring gradients only during the step; frozen parameters without any will not move.
        self._before = [
            (p, p.detach().clone(), low if low is None else self._valid(optimizer, p, low))
            for p in self._filtered(optimizer)
            if p.requires_grad or p.grad is not None
            for low in [optimizer.state.get(p, {}).get(LOW_BITS)]
        ]

    @staticmethod
    def _valid(optimizer: torch.optim.Optimizer, p: Tensor, low: Tensor) -> Tensor:
        return optimizer._weight_sums.valid(p, low) if isinstance(optimizer, AdamW) else low.clone()

    @torch.no_grad()
    def _filter(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        try:
            for p, before, low in self._before:
                state = optimizer.state.get(p)
                if not state:  # it was not stepped
                    continue
                moved = highest(moments_of(optimizer, p)[0].abs(), self.fraction)
                p.copy_(torch.where(moved, p, before))
                if LOW_BITS in state and isinstance(optimizer, AdamW):
                    bits = state[LOW_BITS]
                    bits.copy_(torch.where(moved, bits, torch.zeros_like(bits) if low is None else low))
                    optimizer._weight_sums.renew(p, optimizer._masks.get(p))  # written here, and rightly
        finally:
            self._before = []


def highest(values: Tensor, fraction: float) -> Tensor:
    """A bool tensor of the same shape: true at the ``max(1, ⌊fraction · numel⌋)`` highest values, ties broken."""
    flat = values.detach().reshape(-1)
    count = min(flat.numel(), max(1, int(fraction * flat.numel())))
    found = torch.zeros(flat.shape, dtype=torch.bool, device=flat.device)
    # By index, not by threshold: where most values are 0, a threshold of 0 would take in all of them.
    found[flat.topk(count, sorted=False).indices] = True
    return found.view(values.shape)
