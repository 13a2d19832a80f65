"""``AdamW``: torch's, in one pass over memory, with an anchor, clipping, skipping and masks in the same pass."""

from __future__ import annotations

import dataclasses
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from fastft._core import disable_dynamo
from fastft.anchor import Anchor
from fastft.layers.wrappers import flattened

from . import checkpoint
from .anchoring import ANCHOR_MODES, AnchorMode, check_anchor_options, check_pull
from .checks import check_max_grad_norm, check_scalar
from .entries import Part
from .low_precision import Precision, Rounding, StateDtype
from .masks import UpdateMask
from .processes import ZERO, KeptGroup, Spread, groups_of_flat, initialized, larger, looks_at_one_process
from .replaced import KnownParameters, has_names
from .state import LOW_BITS, as_kept, as_saved
from .step import global_sums, take_step, unscale_
from .step_plans import plans_of, warn_of_idle_anchor, warn_without_gradients
from .tensors import fit_grad, local, torch_device
from .torch_step import TorchStep
from .weight_sums import WeightSums

# torch's warning about steps captured without capturable=True; newer ones renamed it.
check_graph_capture: Callable[[torch.optim.Optimizer], None] = getattr(
    torch.optim.Optimizer, "_accelerator_graph_capture_health_check", None
) or getattr(torch.optim.Optimizer, "_cuda_graph_capture_health_check")  # noqa: B009
# Attributes that a copy or a pickle must carry beyond torch's own.
OWN_ATTRIBUTES = (
    "_anchor",
    "_anchors_new_params",
    "_max_grad_norm",
    "_skip_nonfinite",
    "_precision",
    "_anchor_defaults",
    "_masks",
    "_frozen",
    "_weight_sums",
    "_warned_of_rounding",
    "_looked_for_idle_anchor",
    "_skipped",
    "_kept_group",
    "grad_norm",
)


class AdamW(torch.optim.AdamW):
    r"""AdamW as a drop-in for :class:`torch.optim.AdamW`, with an anchor, clipping and masks in the same pass.

    For each element that is not frozen or masked, t counting the steps of its tensor:

    .. code-block:: text

        g  = grad · grad_scale⁻¹ · min(1, max_grad_norm / (‖grad‖₂ + 1e-6))
        p  = p − lr·weight_decay·p − pull·(p − anchor)             pull = min(1, lr·anchor_decay)
        m  = β₁·m + (1−β₁)·g
        v  = β₂·v + (1−β₂)·g²
        p  = p − lr/(1−β₁ᵗ) · m / (√v/√(1−β₂ᵗ) + eps)

    Everything is computed in float32 (float64 for float64 parameters) whatever the dtype it is stored in. State
    dicts are exchanged with ``torch.optim.AdamW`` in both directions, mid-run; with ``state_dtype="8bit"`` torch's
    loads that of :func:`fastft.optim.full_precision_state`.

    Args:
        params: parameters, named parameters or group dicts, as for any torch optimizer. float32, bfloat16,
            float16 and float64 on CPU or CUDA, any dense memory order, take the fused step, DTensors by their
            local part. Others (complex parameters, memory with gaps or shared
            with another parameter, tensor subclasses, other devices) take torch's own step as long as no
            option below concerns it, and raises a ``ValueError`` naming the parameter and the option otherwise.
        lr, betas, eps, weight_decay, amsgrad, maximize, foreach, capturable, differentiable, fused: as in
            torch. ``foreach`` and ``fused`` choose between torch's implementations and change nothing here,
            except that ``fused`` and ``capturable`` keep the step count on the parameter's device.
        anchor: where the weights are pulled back to: ``"init"`` (their values now), an :class:`fastft.Anchor`,
            or None. With an importance F for each element (:meth:`fastft.Anchor.with_importance`) this is elastic
            weight consolidation (EWC; Kirkpatrick et al. 2017, https://arxiv.org/abs/1612.00796): then
            ``pull = lr·anchor_decay·F / (1 + lr·anchor_decay·F)``, the implicit step on
            ``anchor_decay/2·F·(p − anchor)²``.
        anchor_decay: λ ≥ 0 of the pull, scaled by lr as weight_decay is. In groups: the key ``anchor_decay``.
            Without an importance, ``lr·anchor_decay`` above 1 would overshoot and raises a ``ValueError``; with an
            lr that lies on a GPU it counts as 1 instead.
        anchor_mode: ``"decoupled"`` as above, or ``"l2"``: ``anchor_decay·F·(p − anchor)`` is added to g instead
            and so preconditioned by Adam (F = 1: L2-SP; Li et al. 2018, https://arxiv.org/abs/1802.01483). Or
            ``"selective"``, selective projection decay (Tian et al. 2024, https://arxiv.org/abs/2411.01713): no pull,
            but once a tensor has been stepped from p to p̃, in a second pass, and only if ``⟨g, p − anchor⟩ > 0``
            (the gradient would have it come back) and it moved away,

            .. code-block:: text

                p = p̃ − min(1, anchor_decay·r)·(p̃ − anchor)      r = 1 − ‖p − anchor‖₂ / ‖p̃ − anchor‖₂

            so that 1 puts it back to the distance it had, and more brings it nearer. Here ``anchor_decay`` is not
            scaled by lr. Each tensor is judged by itself, by its elements that are not masked; an importance raises a
            ``ValueError``, and so does a DTensor that lies spread over several processes. In groups: the key
            ``anchor_mode``.
        max_grad_norm: clip to this global 2-norm over all groups and devices, or None. What is frozen or
            masked does not count.
        skip_nonfinite: leave everything as it is in a step whose gradients' norm is inf or NaN.
        state_dtype: of the moments: None, the parameter's dtype, as in torch, or float32 beside one with extra bits;
            ``torch.float32``; ``torch.bfloat16``; or ``"8bit"``: codes of 8 bits with a float32 scale for each block of
            up to 256 elements of a row, as Dettmers et al. 2021 (https://arxiv.org/abs/2110.02861) have them. Moments
            of less than 4096 elements, of rows (``p[i]``; a tensor of one dimension is one row) below 64, not
            contiguous, or sharded with one dimension, are float32 instead. float64 parameters have float64 moments
            always. With ``"8bit"``, amsgrad and ``"selective"`` raise a ``ValueError``.
        extra_bits: 8 or 16 low bits kept beside each bfloat16 parameter, which steps are added to, so that those far
            below the weight's last bit are not lost (cf. Zamirai et al. 2020, https://arxiv.org/abs/2010.06192). With
            16, weight and bits together are exactly a float32 weight; with 8, one of 24 bits. What somebody else
            writes into the parameter between steps is noticed, and its bits start at 0; but not between
            ``load_state_dict`` and the next step, so load the weights first. float32 and float64 parameters
            have none; float16 ones raise a ``ValueError``. :func:`fastft.optim.master_weights` gives the float32.
        rounding: of 16-bit parameters, with 8 extra bits of the 24: ``"nearest"``, or ``"stochastic"``: up or down at
            random, right on average, by ``rounding_seed``, the step number and the place of the element in the whole
            tensor alone: the same on every device, and however DTensors are sharded. With ``extra_bits=16`` nothing is
            rounded, and ``"stochastic"`` raises a ``ValueError``.
        rounding_seed: any integer. It is in state dicts; the optimizer that loads one goes on with that seed.
        process_group: of ``torch.distributed``: over which processes the parameters lie spread, beside what they say
            themselves, each process having other ones or other parts (pipeline stages, a framework's flat partitions);
            norm and skipping are then over all of them, and a DTensor that is cut within them is counted once. DTensors
            of any placement, FullyShardedDataParallel and ZeroRedundancyOptimizer are known without.

    All but lr, betas, eps, weight_decay, amsgrad, anchor_decay, anchor_mode and torch's flags hold for all groups. The
    first step warns where 16-bit weights are rounded to nearest and steps, decay or the decoupled anchor's pull are
    lost in that for most of them; and where ``state_dtype``, ``extra_bits`` or ``rounding`` change nothing, since no
    parameter is of the dtype or size that they are for.

    After a step with clipping or skipping, :attr:`grad_norm` and :attr:`skipped_steps` hold its outcome, without
    having waited for the GPU.

    Raises:
        ValueError: for an option out of range, for those that do not go together or that a parameter cannot have, and
            for an anchor that holds none of the parameters.

    Decoupled weight decay: Loshchilov & Hutter 2019, https://arxiv.org/abs/1711.05101.
    """

    _in_backward: Any = None  # the handle of step_in_backward: only gradients that are still there were not used
    _kept_group = KeptGroup(None)  # of those that were pickled without
    _is_part = False  # of another optimizer, which looks after the parameters
    _first_position = 0  # of its parameters; other than 0 where it stands for one of another optimizer's
    _plan_key: Any
    _lent: dict[Tensor, checkpoint.Lent]
    _has_checked_scaler: bool  # that it may look at this process only
    _compared: tuple[Any, ...] | None  # what was compared between the processes
    _spread_of: list[tuple[int, type]] | None
    _steps_without_gradients: int | None  # since it was made or loaded; None: one had gradients
    _parts: list[Part]
    _torch_step: TorchStep

    grad_norm: Tensor | None
    """Global 2-norm of the last step's gradients, unscaled, before clipping: 0-d, float64; None if not needed."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        anchor: Anchor | Literal["init"] | None = None,
        anchor_decay: float = 0.0,
        anchor_mode: AnchorMode = "decoupled",
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = False,
        state_dtype: StateDtype = None,
        extra_bits: Literal[0, 8, 16] = 0,
        rounding: Rounding = "nearest",
        rounding_seed: int = 0,
        process_group: Any = None,
    ) -> None:
        if not (anchor is None or anchor == "init" or isinstance(anchor, Anchor)):
            raise ValueError(
                f'anchor: expected None, "init" or a fastft.Anchor, got {type(anchor).__name__}; '
                "fastft.Anchor.snapshot(model) makes one"
            )
        check_max_grad_norm(max_grad_norm)
        self._anchor = Anchor() if anchor == "init" else anchor
        self._anchors_new_params = anchor == "init"
        self._max_grad_norm = max_grad_norm
        self._skip_nonfinite = bool(skip_nonfinite)
        self._precision = Precision(state_dtype, extra_bits, rounding, rounding_seed)
        self._kept_group = KeptGroup(process_group)
        self._anchor_defaults = {"anchor_decay": anchor_decay, "anchor_mode": anchor_mode}
        self._masks: dict[Tensor, UpdateMask] = {}
        self._frozen: set[Tensor] = set()
        self._weight_sums = WeightSums()
        self._warned_of_rounding = self._looked_for_idle_anchor = False
        self._skipped: Tensor | None = None
        self.grad_norm = None
        self._forget_processes()
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
        )
        self.defaults.update(self._anchor_defaults)
        if (
            isinstance(anchor, Anchor)
            and len(anchor)
            and not checkpoint.asked_by(ZERO)  # a process's share of the parameters may have none, and others some
            and not any(self._anchor_name(p, name) for _, p, name in self._parameters())
        ):
            late = any(flattened(p) for _, p, _ in self._parameters())
            raise ValueError(
                f"anchor: none of the optimizer's parameters is in {anchor!r}: "
                + (
                    "FullyShardedDataParallel has flattened them; take the anchor after wrapping"
                    if late
                    else "it knows parameters by identity (those it was made from) or by name (pass "
                    "model.named_parameters() to the optimizer)"
                )
            )
        self._known_parameters.note(self)

    # -- the step ------------------------------------------------------------------------------------------

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Perform a single optimization step.

        Args:
            closure: re-evaluates the model and returns the loss; called with gradients enabled.
        """
        check_graph_capture(self)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._in_backward is None or any(p.grad is not None for group in self.param_groups for p in group["params"]):
            self._step()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in torch. With ``step_in_backward`` it also begins a step anew, after a backward pass that failed."""
        super().zero_grad(set_to_none)
        if self._in_backward is not None:
            self._in_backward.begin()

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether a GradScaler leaves scale and inf check to the step.

        Not where gradients lie spread and do not say so: a ShardedGradScaler looks at all processes only where it
        unscales them itself, and would set other scales in each.

        Raises:
            ValueError: a GradScaler asks that looks at its own process only.
        """
        flat = [p for group in self.param_groups for p in group["params"] if flattened(p)] if initialized() else []
        if not flat and not (initialized() and larger([self._process_group])):
            return True
        asking = sys._getframe(1).f_locals.get("self")
        if not self._has_checked_scaler and looks_at_one_process(asking):
            if not flat or groups_of_flat(flat):
                where = "the pieces of FullyShardedDataParallel" if flat else "process_group"
                raise ValueError(
                    f"scaler: expected a torch.distributed.fsdp.sharded_grad_scaler.ShardedGradScaler with {where}, "
                    f"which looks at the gradients of all processes, got a {type(asking).__name__}, which would come "
                    "to another scale in each"
                )
            self._has_checked_scaler = True
        return False

    @_step_supports_amp_scaling.setter
    def _step_supports_amp_scaling(self, value: bool) -> None:
        """torch's own ``__init__`` sets it with ``fused=True``."""

    @property
    def anchor(self) -> Anchor | None:
        """The anchor, also for ``drift_report``; with ``"init"``, the values that the parameters had then."""
        return self._anchor

    @property
    def max_grad_norm(self) -> float | None:
        """The global norm that gradients are clipped to, or None; may be set between steps."""
        return self._max_grad_norm

    @max_grad_norm.setter
    def max_grad_norm(self, value: float | None) -> None:
        check_max_grad_norm(value)
        self._max_grad_norm = value
        self._forget_plan()

    @property
    def skip_nonfinite(self) -> bool:
        """Whether steps with inf or NaN are left out; may be set between steps."""
        return self._skip_nonfinite

    @skip_nonfinite.setter
    def skip_nonfinite(self, value: bool) -> None:
        self._skip_nonfinite = bool(value)
        self._forget_plan()

    def __repr__(self) -> str:
        anchor = None if self._anchor is None else f"{len(self._anchor)} parameters"
        own = f"anchor: {anchor}, max_grad_norm: {self._max_grad_norm}, skip_nonfinite: {self._skip_nonfinite}"
        groups = super().__repr__().rstrip().removesuffix(")").rstrip()
        return f"{groups}\nAll groups\n    {own}\n    {self._precision}\n)"

    @disable_dynamo
    def _step(self) -> None:
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            grad_scale: Tensor | None = getattr(self, "grad_scale", None)
            found_inf: Tensor | None = getattr(self, "found_inf", None)
            self._check_groups()
            check_scalar(grad_scale, "grad_scale")
            if isinstance(found_inf, (int, float)):  # torch's GradScaler gives 0 where it has found no gradient
                found_inf = torch.tensor(float(found_inf))
            check_scalar(found_inf, "found_inf")
            if self._lent and not self._is_part:
                checkpoint.take_back(self)
            if not self.state and checkpoint.asked_by(checkpoint.DCP):
                self._known_parameters.follow(self)
                checkpoint.lend(self)
                return
            may_skip = self._skip_nonfinite or found_inf is not None
            self._gather(counts_on_device=may_skip)
            warn_without_gradients(self)
            if may_skip:
                self._skipped = self._skipped_on_first_device()
            try:
                needs_norm = self._max_grad_norm is not None or self._skip_nonfinite
                sums, found_inf = global_sums(self._parts, self._spread, needs_norm, found_inf)
                self._torch_step.step(grad_scale, found_inf)
                self.grad_norm = take_step(
                    self._parts,
                    self.param_groups,
                    sums=sums,
                    max_grad_norm=self._max_grad_norm,
                    skip_nonfinite=self._skip_nonfinite,
                    grad_scale=grad_scale,
                    found_inf=found_inf,
                    skipped_steps=self._skipped if may_skip else None,
                )
                if grad_scale is not None:
                    unscale_([p.grad for group in self.param_groups for p in group["params"]], grad_scale)
            finally:
                for part in self._parts:
                    part.plan.release()
                if self._torch_step.params:
                    self._forget_plan()  # next time their gradients may be dense

    def _check_groups(self) -> None:
        """Raise where a group's numbers make no sense; schedulers and users may have changed them."""
        for index, group in enumerate(self.param_groups):
            decay, lr = group["anchor_decay"], group["lr"]
            where = f"param_groups[{index}]"
            self._precision.check_group(group, where)
            if isinstance(lr, Tensor) and lr.numel() != 1:
                raise ValueError(
                    f"{where}: lr: expected a number or a tensor of one element, got shape {list(lr.shape)}"
                )
            if decay == 0.0 and group["anchor_mode"] in ANCHOR_MODES:
                continue
            check_anchor_options(decay, group["anchor_mode"], where)
            if self._anchor is None:
                raise ValueError(f"{where}: anchor_decay: expected 0 without an anchor, got {decay}")
            if not self._anchor.weighted:
                check_pull(lr, decay, group["anchor_mode"], where)

    def _gather(self, counts_on_device: bool) -> None:
        """Make sure that the plan is up to date, and hand it this step's gradients. Writes no parameter."""
        key = (
            counts_on_device,
            self._anchor,
            self._anchor.changes if self._anchor is not None else 0,
            [
                (
                    g["anchor_decay"] != 0.0,
                    *(g[key] for key in ("anchor_mode", "amsgrad", "capturable", "fused", "differentiable")),
                )
                for g in self.param_groups
            ],
        )
        if key == self._plan_key and all(self._gather_part(part) for part in self._parts):
            return
        self._forget_plan()
        before = set(self.state)
        try:
            self._parts, self._torch_step = plans_of(self, counts_on_device)
            if not all(self._gather_part(part) for part in self._parts):
                raise RuntimeError("the parameters, their gradients or their state changed during the step")
        except BaseException:
            self._forget_plan()
            for p in set(self.state) - before:  # nothing stepped, so nothing has state that had none
                del self.state[p]
            raise
        self._plan_key = key

    def _gather_part(self, part: Part) -> bool:
        """Whether the part's plan still holds; if so it now has its gradients."""
        if not part.plan.gather([group["params"] for group in self.param_groups], self.state):
            return False
        unread = part.plan.unread()
        parameters = list(self._parameters()) if unread else []
        for position in unread:
            _, p, name = parameters[position]
            stepped = part.plan.stepped(position)
            # The plan watches the local tensor; a DTensor may have got another one.
            if p.grad is None or p.grad.layout != torch.strided or (stepped is not None and local(p) is not stepped):
                return False
            part.plan.set_grad(position, fit_grad(p.grad, p, p if stepped is None else stepped, name))
        return True

    def _skipped_on_first_device(self) -> Tensor:
        """The count of skipped steps where the kernels count; it may be out of a checkpoint, and so lie elsewhere."""
        devices = [torch_device(device) for part in self._parts for device in part.plan.devices()]
        if self._skipped is None:
            return torch.zeros((), dtype=torch.int64, device=devices[0] if devices else None)
        return self._skipped.to(devices[0]) if devices else self._skipped

    @property
    def _process_group(self) -> Any:
        return self._kept_group.group

    def _look_again(self) -> None:
        """Notice which parameters were replaced, and what others have put into the state."""
        checkpoint.take_back(self)
        self._known_parameters.look(self)
        checkpoint.adopt(self)

    def _forget_processes(self) -> None:
        """Find out anew which parameters there are, and how they lie spread."""
        self._known_parameters = KnownParameters()
        self._lent = {}
        self._spread = Spread()
        self._spread_of = None
        self._compared = None
        self._has_checked_scaler = False
        self._steps_without_gradients = 0
        self._forget_plan()

    def _forget_plan(self) -> None:
        self._plan_key = None
        self._parts = []
        self._torch_step = TorchStep()

    # -- freezing and masks --------------------------------------------------------------------------------

    def freeze(self, params: Tensor | nn.Module | Iterable[Tensor]) -> None:
        """Leave parameters untouched, bit for bit, whatever their ``.grad`` holds.

        ``requires_grad`` stays as it is, their state is kept, and their gradients count in no norm.
        """
        self._frozen.update(self._own_parameters(params, "freeze"))
        self._forget_plan()

    def unfreeze(self, params: Tensor | nn.Module | Iterable[Tensor]) -> None:
        """Step frozen parameters again. One that never stepped starts at its own t = 1."""
        self._frozen.difference_update(self._own_parameters(params, "unfreeze"))
        self._forget_plan()

    def set_update_mask(self, param: Tensor, mask: Tensor | None) -> None:
        """Step only the rows or elements of ``param`` where ``mask`` is true; all of it with None.

        Args:
            param: one of the optimizer's parameters.
            mask: bool, of shape ``[param.shape[0]]`` (rows) or ``param.shape`` (elements), on any device;
                copied. What is masked out is left untouched bit for bit: parameter, moments, decay, anchor; its
                gradient does not count in the norm. A step's cost follows the fraction of active rows.
        """
        (known,) = self._own_parameters([param], "set_update_mask")
        checked = None if mask is None else UpdateMask(mask, known, self._name_of(known))
        self._weight_sums.set_mask(known, self.state.get(known, {}).get(LOW_BITS), checked)
        if checked is None:
            self._masks.pop(known, None)
        else:
            self._masks[known] = checked
        self._forget_plan()

    def update_mask(self, param: Tensor) -> Tensor | None:
        """A copy of the mask that was set for ``param``, or None."""
        (known,) = self._own_parameters([param], "update_mask")
        return self._masks[known].mask.clone() if known in self._masks else None

    @property
    def skipped_steps(self) -> Tensor:
        """How many steps were skipped for non-finite gradients: 0-d, int64, on the device that counts."""
        return torch.zeros((), dtype=torch.int64) if self._skipped is None else self._skipped.clone()

    def _own_parameters(self, params: Tensor | nn.Module | Iterable[Tensor], method: str) -> list[Tensor]:
        self._look_again()
        if isinstance(params, nn.Module):
            params = params.parameters()
        found = [params] if isinstance(params, Tensor) else list(params)
        known = {id(p) for _, p, _ in self._parameters()}
        for p in found:
            if not isinstance(p, Tensor):
                raise TypeError(f"{method}: expected parameters of the optimizer, got {type(p).__name__}")
            if id(p) not in known:
                raise ValueError(
                    f"{method}: expected a parameter of this optimizer, got another {type(p).__name__} of shape "
                    f"{list(p.shape)}"
                )
        return found

    # -- groups and names ----------------------------------------------------------------------------------

    def _for_all_groups(self) -> dict[str, Any]:
        """The options that hold for all groups."""
        return {
            "max_grad_norm": self._max_grad_norm,
            "skip_nonfinite": self._skip_nonfinite,
            **dataclasses.asdict(self._precision),
            "anchor": "init" if self._anchors_new_params else self._anchor,
            "process_group": self._process_group,
        }

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, as in torch; ``anchor_decay`` and ``anchor_mode`` may be among the keys.

        With ``anchor="init"`` the new parameters' values are now taken as their anchor.
        """
        if self._known_parameters.noted:
            self._look_again()
        options = self._anchor_defaults
        if isinstance(param_group, dict):
            for key, value in self._for_all_groups().items():
                # The same again, as ZeroRedundancyOptimizer passes it, is no contradiction.
                if key in param_group and param_group[key] is not value and param_group[key] != value:
                    raise ValueError(
                        f"param_groups[{len(self.param_groups)}]: {key} is for all groups; pass it to AdamW"
                    )
            options = {key: param_group.get(key, default) for key, default in options.items()}
            check_anchor_options(**options, where=f"param_groups[{len(self.param_groups)}]")
            if options["anchor_decay"] != 0.0 and self._anchor is None:
                raise ValueError(
                    f"anchor_decay: expected 0 without an anchor, got {options['anchor_decay']}; "
                    'pass anchor="init" or a fastft.Anchor'
                )
            where = f"param_groups[{len(self.param_groups)}]"
            self._precision.check_group({**self.defaults, **param_group, **options}, where)
        super().add_param_group(param_group)
        try:
            for index, p, name in self._parameters():
                if index == len(self.param_groups) - 1:
                    self._precision.check_parameter(p, name)
        except ValueError:
            self.param_groups.pop()
            raise
        for key, value in options.items():
            self.param_groups[-1].setdefault(key, value)
        if self._anchors_new_params and self._anchor is not None:
            last = len(self.param_groups) - 1
            # A parameter that comes from another group keeps its anchor. Two modules may use one name; what is
            # anchored here is found by parameter.
            known = set(self._anchor)
            new = [
                (name, p)
                for i, p, name in self._parameters()
                if i == last and p.is_floating_point() and p not in self._anchor
            ]
            self._anchor.update(
                Anchor.snapshot([(f"param_groups[{last}].{name}" if name in known else name, p) for name, p in new])
            )
        if self._known_parameters.noted:
            self._known_parameters.note(self)
        self._forget_plan()

    def _parameters(self) -> Iterator[tuple[int, Tensor, str]]:
        """(group index, parameter, name) for each parameter, in order."""
        for index, group in enumerate(self.param_groups):
            names = group["param_names"] if has_names(group) else None
            for i, p in enumerate(group["params"]):
                yield index, p, names[i] if names else f"param_groups[{index}]['params'][{i}]"

    def _name_of(self, param: Tensor) -> str:
        return next(name for _, p, name in self._parameters() if p is param)

    def _anchor_name(self, p: Tensor, name: str) -> str | None:
        """The parameter's name in the anchor; None if it is not anchored."""
        return None if self._anchor is None else self._anchor.find(p, name)

    def _take_over(self, anchor: Anchor | None, masks: dict[Tensor, UpdateMask], process_group: Any) -> None:
        """Step the parameters that are in the groups now as its own, after a framework has put them there.

        Args:
            anchor: of these.
            masks: of these. Nothing is frozen.
            process_group: over which they lie spread.
        """
        self._anchor, self._masks, self._frozen = anchor, masks, set()
        self._kept_group = KeptGroup(process_group)
        self._forget_processes()
        self._known_parameters.note(self)
        warn_of_idle_anchor(self)  # now, as DeepSpeed's steps each see one group

    # -- copies and checkpoints ----------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        self._look_again()
        kept = super().__getstate__()
        saved = defaultdict(dict, {p: as_saved(state) for p, state in kept["state"].items()})
        return {**kept, "state": saved, **{key: self.__dict__[key] for key in OWN_ATTRIBUTES}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Also called by load_state_dict, with the new state and groups: torch's know no anchor_decay.
        before = self.__dict__.get("param_groups", [])
        if before:
            self._forget_plan()
        else:  # a copy, or out of a pickle
            self._forget_processes()
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        for p, kept in self.state.items():
            if LOW_BITS in kept:
                kept[LOW_BITS] = as_kept(kept[LOW_BITS], p)
        for index, group in enumerate(self.param_groups):
            known = before[index] if index < len(before) else self._anchor_defaults
            for key in self._anchor_defaults:
                group.setdefault(key, known[key])
        if not before:
            self._known_parameters.note(self)
        loading = self.__dict__.pop("_loading", None)
        if loading is not None:
            loading.apply()

    def state_dict(self) -> dict[str, Any]:
        """torch's state dict, with the anchor, masks, frozen set, counters and rounding seed in it.

        They lie in each parameter's state (``anchor``, ``anchor_importance``, ``update_mask``, ``fastft_flags``) and in
        the groups (``fastft``), where ``torch.optim.AdamW``, which loads the dict, lets them be; but with
        ``state_dtype="8bit"``, or where an unfreezer has dropped moments and left low bits, it takes
        :func:`fastft.optim.full_precision_state`. An anchor that came from a file is saved as the file's path and
        content hash, any other with its tensors. 16 low bits are given as bytes, of one more dimension; tensors are not
        copied.
        """
        self._look_again()
        if checkpoint.asked_by(checkpoint.DCP):
            checkpoint.lend(self)

        # A hook put first, so that the user's own hooks see the whole dict.
        def add_own_state(_: Any, packed: dict[str, Any]) -> None:
            checkpoint.pack(self, packed)

        handle = self.register_state_dict_post_hook(add_own_state, prepend=True)
        try:
            return super().state_dict()
        finally:
            handle.remove()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of this class, which resumes exactly, or of ``torch.optim.AdamW``.

        Load the weights too, those that were saved together with it: low bits are taken to belong to the weights that
        the next step finds. One of torch's leaves the anchor, the masks, the frozen set and the anchor's options as
        they are. An anchor that came from a file is read from there again, after its content has been verified; if the
        file was moved, give the optimizer an ``Anchor.from_safetensors`` of its new place first. Moments and low bits
        are brought into the formats that this optimizer's ``state_dtype`` and ``extra_bits`` ask for, from any other;
        low bits that were not saved start at 0, and those that are not kept here are dropped with a warning. Where both
        sides know the parameters' names, these say which is which, whatever the order. On an error nothing has changed.

        Raises:
            ValueError: state that does not fit, that belongs to other parameters, or of which a part got lost on the
                way, such as an anchor.
        """
        self._look_again()

        def check_own_state(_: Any, loaded: dict[str, Any]) -> dict[str, Any]:
            self._loading = checkpoint.Loading(self, loaded)
            return self._loading.for_torch

        # A hook put last, so that it sees the dict as the user's own hooks left it.
        handle = self.register_load_state_dict_pre_hook(check_own_state)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
            self.__dict__.pop("_loading", None)
