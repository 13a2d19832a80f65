"""Steps that move only some of the weights: the most important to the task, or those of largest momentum."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastft.checks import check_fraction
from fastft.layers.wrappers import flattened, reshard
from fastft.names import NameIndex, closest
from fastft.optim import AdamW
from fastft.optim.dtensors import whole
from fastft.optim.state import LOW_BITS, moments_of
from fastft.optim.tensors import is_dtensor
from fastft.retention.processes import agreed, common_groups, digest_of, refuse_fsdp1
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

    With several processes, each needs the same Fisher information. Where parameters are DTensors (``fully_shard``,
    tensor parallelism, or both) or the model is wrapped for DistributedDataParallel, it is a collective, and raises on
    every process if they would choose differently.

    Args:
        optimizer: an optimizer of the model's parameters. Its update masks are set, and saved in its state dict;
            ``optimizer.set_update_mask(param, None)`` takes one back.
        model: the model, to find its parameters by name, also where wrappers have changed that.
        fisher: parameter name → values of the parameter's shape, whole or DTensors, usually ``estimate_fisher(...)``
            of the pre-trained model on the new task's training data. Parameters that it does not have (a new head) are
            stepped whole: leave them out of it with ``{name: f for name, f in fisher.items() if ...}``.
        fraction: the share of the elements in ``fisher`` to step; above 0 and up to 1.
        scope: ``"model"``, as in the paper: the highest of all elements together, for which their values are held
            in one vector; ``"tensor"``: the highest of each tensor.

    Returns:
        The masks, bool tensors of the parameters' whole shapes, by the names in ``fisher``.

    Raises:
        TypeError: the optimizer is no :class:`fastft.AdamW`.
        ValueError: names that the model lacks, other shapes, values that are negative or not finite, or that differ
            between processes; parameters that are not the optimizer's; or a model that is wrapped by
            ``FullyShardedDataParallel``. Then nothing has been set.
    """
    if not isinstance(optimizer, AdamW):
        raise TypeError(f"optimizer: expected a fastft.AdamW, got {type(optimizer).__name__}")
    check_fraction("fraction", fraction)
    if scope not in ("model", "tensor"):
        raise ValueError(f'scope: expected "model" or "tensor", got {scope!r}')
    refuse_fsdp1(model, "use torch.distributed.fsdp.fully_shard")
    reshard(model)
    groups = common_groups(model)
    chosen = agreed(
        "fisher: expected the same parameters on every process",
        lambda: chosen_parameters(optimizer, model, fisher),
        lambda chosen: f"{len(chosen)} with the digest {digest_of(list(chosen))}",
        groups,
    )
    masks = agreed(
        "fisher: expected the same values, fraction and scope on every process",
        lambda: masks_of(fisher, fraction, scope),
        lambda masks: f"masks with the digest {digest_of(masks)}" if groups else "masks",
        groups,
    )
    for name, mask in masks.items():
        optimizer.set_update_mask(chosen[name], mask)
    return masks


def chosen_parameters(optimizer: AdamW, model: nn.Module, fisher: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The model's parameters by the names in ``fisher``, if their shapes are those and the optimizer has them."""
    if not fisher:
        raise ValueError("fisher: expected at least one parameter, got none")
    parameters = dict(model.named_parameters(remove_duplicate=False))
    index = NameIndex(parameters)
    stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
    chosen: dict[str, Tensor] = {}
    for name, values in fisher.items():
        found = index.find(name)
        if found is None:
            raise ValueError(f"fisher: the model has no parameter {name!r}{closest(name, parameters)}")
        p = chosen[name] = parameters[found]
        if values.shape != p.shape:
            raise ValueError(f"fisher: {name}: expected shape {list(p.shape)}, got {list(values.shape)}")
        if id(p) not in stepped:
            raise ValueError(f"fisher: {name}: is not one of the optimizer's parameters")
    return chosen


def masks_of(fisher: Mapping[str, Tensor], fraction: float, scope: Literal["model", "tensor"]) -> dict[str, Tensor]:
    """Whole masks of the highest values; of DTensors a collective."""

    def values_of(name: str) -> Tensor:
        values = whole(fisher[name].detach())
        if not (values.isfinite() & (values >= 0)).all():
            raise ValueError(f"fisher: {name}: expected finite values >= 0")
        return values

    if scope == "tensor":
        return {name: highest(values_of(name), fraction) for name in fisher}
    together = highest(torch.cat([values_of(name).float().cpu().flatten() for name in fisher]), fraction)
    parts = together.split([values.numel() for values in fisher.values()])
    return {name: part.view(fisher[name].shape) for name, part in zip(fisher, parts, strict=True)}


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
        ValueError: a fraction out of range, or parameters that are not the optimizer's, or are sharded (also by
            ``FullyShardedDataParallel``); of those that take the place of others later, at the next step, before it
            moves anything.
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
        self._check_whole(optimizer)
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

    def _check_whole(self, optimizer: torch.optim.Optimizer) -> None:
        """Raise where the largest of a part would not be the largest of its tensor."""
        for p in (p for group in optimizer.param_groups for p in group["params"]):
            if flattened(p) and (self._chosen is None or id(p) in self._chosen):  # whatever shape the piece has
                raise ValueError(
                    "optimizer: expected parameters that are whole, got a piece of what FullyShardedDataParallel has "
                    "flattened; use MoFO without sharding, with DistributedDataParallel for instance"
                )
            if is_dtensor(p) and self._filters(p):
                raise ValueError(f"optimizer: expected parameters that are whole, got a DTensor of {list(p.shape)}")

    def _filters(self, p: Tensor) -> bool:
        return p.dim() >= 2 if self._chosen is None else id(p) in self._chosen

    def _remember(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self._check_whole(optimizer)
        # A closure may bring gradients only during the step; frozen parameters without any will not move.
        self._before = [
            (p, p.detach().clone(), low if low is None else self._valid(optimizer, p, low))
            for group in optimizer.param_groups
            for p in group["params"]
            if self._filters(p) and (p.requires_grad or p.grad is not None)
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
