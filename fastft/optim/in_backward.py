"""``step_in_backward``: step each parameter, and free its gradient, as soon as autograd has accumulated it."""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Iterator, Set
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from fastft import _C

from .adamw import AdamW, check_graph_capture
from .checks import why_not_fused
from .masks import UpdateMask
from .processes import wrappers
from .step_plans import (
    look_at_parameters,
    refuse_other_anchors,
    warn_of_idle_anchor,
    warn_of_idle_options,
    warn_of_rounding,
)
from .tensors import local

LATE = "runs_after_step_in_backward"
"""An attribute of a step pre-hook that does what it should also when parameters have been stepped."""
PLAIN = "use the plain step for it: without step_in_backward, or after its undo()"


def step_in_backward(optimizer: AdamW) -> StepInBackward:
    """Step each parameter during ``loss.backward()``, as soon as its gradient is there, and free the gradient.

    So a few gradients live at once instead of all (Lv et al. 2023, https://arxiv.org/abs/2306.09782). Weights and state
    are, bit for bit, those of the plain step, and the training loop stays as it is:

    .. code-block:: python

        handle = fastft.optim.step_in_backward(optimizer)
        for batch in batches:
            with handle.accumulate():  # only if gradients are accumulated: all backward passes but the last
                loss_of(model, batch[0]).backward()
            loss_of(model, batch[1]).backward()  # steps
            optimizer.step()  # steps what has a gradient all the same; hooks and schedulers go by it
            optimizer.zero_grad()
            scheduler.step()

    lr and the other options of a group are those at the time of the backward pass. After it ``.grad`` is None, and
    what reads gradients there, such as ``torch.nn.utils.clip_grad_norm_``, finds none. Frozen parameters' gradients
    are freed too.

    Args:
        optimizer: any ``fastft.AdamW``; anchors, masks, freezing, schedulers, state dicts and ``add_param_group`` work
            as ever, and so do tied weights, gradient checkpointing and ``fully_shard``.

    Returns:
        A handle with ``accumulate()`` and ``undo()``; as a context manager it undoes itself. It may be dropped: the
        mode lasts as long as the optimizer.

    Raises:
        TypeError: another optimizer.
        ValueError: where the result could not be exact, because the step needs all gradients at once or gradients
            that arrive later: ``max_grad_norm``, ``skip_nonfinite``, ``differentiable``, step pre-hooks, parameters
            that share memory, DistributedDataParallel, FullyShardedDataParallel; or if it is on already. What of it
            comes only later is refused by the next backward pass or ``step()``, and so are closures. A ``GradScaler``
            is noticed only at ``scaler.step(optimizer)``, when scaled gradients have been used: weights and state have
            to be loaded again. A second gradient for a parameter that was stepped since the last ``optimizer.step()``
            or ``optimizer.zero_grad()`` raises a ``RuntimeError``. After a backward pass that failed (out of memory),
            ``zero_grad()`` and the next batch go on; what had been stepped until then stays.
    """
    return StepInBackward(optimizer)


class OneParameter(AdamW):
    """A parameter of an optimizer as an optimizer of its own, with a plan of its own.

    The step is the optimizer's, and so is all that it reads: what this does not have is asked of the optimizer.
    """

    grad_scale = None
    found_inf = None
    _is_part = True
    _warned_of_rounding = True  # these warnings are about all parameters together

    def __init__(self, whole: AdamW, group: int, position: int, param: Tensor, name: str) -> None:
        self._whole = weakref.ref(whole)
        self._group = group
        self._first_position = position
        self._param = param
        self._name = name
        self._mask: UpdateMask | None = None
        self._forget_plan()
        self._share({})

    def __getattr__(self, name: str) -> Any:
        return getattr(self._whole(), name)

    def _share(self, state: dict[str, Any]) -> None:
        self.state = defaultdict(dict, {self._param: state})

    def _check_groups(self) -> None:
        """Done for all at the beginning of the backward pass, where messages can number them."""

    def take_step(self) -> None:
        """Step the parameter by its gradient."""
        whole, p = self._whole(), self._param
        assert whole is not None
        self.param_groups = [{**whole.param_groups[self._group], "params": [p], "param_names": [self._name]}]
        known = whole.state.get(p)
        if known is not self.state[p]:
            self._share({} if known is None else known)
        mask = whole._masks.get(p)
        if mask is not self._mask:
            self._forget_plan()
            self._mask = mask
        if p.is_cuda:
            check_graph_capture(whole)
        self._step()
        if known is None:
            whole.state[p] = self.state[p]
        if any(part.staging is not None for part in self._parts):
            self._forget_plan()  # which has the anchor on the GPU


class Hook:
    """Called by autograd once it has accumulated the parameter's gradient."""

    def __init__(self, handle: StepInBackward, view: OneParameter) -> None:
        self.handle, self.view = handle, view

    def __call__(self, p: Tensor) -> None:
        self.handle._arrived(self.view, p)


class StepInBackward:
    """An optimizer that steps in the backward pass until :meth:`undo`, or until its ``with`` block ends."""

    def __init__(self, optimizer: AdamW) -> None:
        if not isinstance(optimizer, AdamW):
            raise TypeError(f"optimizer: expected a fastft.AdamW, got {type(optimizer).__name__}")
        if optimizer._in_backward is not None:
            raise ValueError("optimizer: it steps in the backward pass already; undo() that first")
        # Not a reference: the optimizer's hooks own this, and it should go when the user lets go of it.
        self._optimizer = weakref.ref(optimizer)
        self._accumulating = 0
        self._begun = False  # whether something was stepped since the last optimizer.step()
        self._stepped: set[Tensor] = set()  # since then
        self._begun_before = False
        self._layout: list[tuple[int, int]] = []
        self._views: dict[Tensor, OneParameter] = {}
        self._on_parameters: list[Any] = []
        self._on_optimizer: list[Any] = []
        self._check(optimizer)
        refuse_wrappers(optimizer)
        self._attach(optimizer)
        self._on_optimizer = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]
        optimizer._in_backward = self
        self._detach_when_gone = weakref.finalize(optimizer, remove, self._on_parameters)

    @contextmanager
    def accumulate(self) -> Iterator[None]:
        """Keep the gradients of backward passes in this block; they count in the next one outside, or in ``step()``."""
        self._accumulating += 1
        try:
            yield
        finally:
            self._accumulating -= 1

    def undo(self) -> None:
        """Let ``optimizer.step()`` do all of it again."""
        self._detach_when_gone.detach()
        remove(self._on_parameters)
        remove(self._on_optimizer)
        self._stepped.clear()
        optimizer = self._optimizer()
        if optimizer is not None:
            optimizer._in_backward = None

    def __enter__(self) -> StepInBackward:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.undo()

    def __repr__(self) -> str:
        return f"StepInBackward({len(self._on_parameters)} parameters)"

    # -- in the backward pass ----------------------------------------------------------------------------------

    def _arrived(self, view: OneParameter, p: Tensor) -> None:
        optimizer = self._optimizer()
        if optimizer is None or p.grad is None:
            return
        if p in self._stepped:
            raise RuntimeError(
                f"{view._name}: expected one gradient for each optimizer.step(), got a second one; it was stepped by "
                "the first. Put all backward passes but the last into `with handle.accumulate():`, and call "
                "optimizer.step() after the last; after a backward pass that failed, call optimizer.zero_grad(); with "
                "reentrant gradient checkpointing, use use_reentrant=False"
            )
        if self._accumulating:
            return
        if not self._begun:
            self._check(optimizer)
            if self._begun_before and self._layout == layout_of(optimizer):
                optimizer._look_again()
                refuse_other_anchors(optimizer)
            else:
                look_at_parameters(optimizer)
            optimizer._check_groups()
            if not self._begun_before:
                refuse_wrappers(optimizer)  # the model may have been wrapped since
                warn_before_first_step(optimizer)
                self._begun_before = True
            if self._layout != layout_of(optimizer):
                self._attach(optimizer)
                if p not in self._views:  # taken out of its group
                    return
                view = self._views[p]
            self._begun = True
        if p not in optimizer._frozen:
            view.take_step()
            self._stepped.add(p)
        p.grad = None

    def _attach(self, optimizer: AdamW) -> None:
        """Give each parameter its hook."""
        refuse_shared_memory(optimizer)
        for _, p, name in optimizer._parameters():
            hooks = getattr(p, "_post_accumulate_grad_hooks", None) or {}
            if any(isinstance(hook, Hook) and hook.handle is not self for hook in hooks.values()):
                raise ValueError(f"{name}: another optimizer steps it in the backward pass; undo() that first")
        remove(self._on_parameters)
        self._layout = layout_of(optimizer)
        self._views = {}
        for position, (group, p, name) in enumerate(optimizer._parameters()):
            if not (p.is_floating_point() or p.is_complex()):
                continue  # can have no gradient
            view = self._views[p] = OneParameter(optimizer, group, position, p, name)
            required = p.requires_grad
            if not required:  # it may later, when it is unfrozen
                p.requires_grad_(True)
            try:
                self._on_parameters.append(p.register_post_accumulate_grad_hook(Hook(self, view)))
            finally:
                if not required:
                    p.requires_grad_(False)

    # -- at optimizer.step() -----------------------------------------------------------------------------------

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        assert isinstance(optimizer, AdamW)
        if any(argument is not None for argument in [*args[1:], *kwargs.values()]):
            raise ValueError(
                f"closure: expected None, got one: its backward pass is the step; call it yourself, or {PLAIN}"
            )
        scaled = [vars(optimizer).pop(key, None) is not None for key in ("grad_scale", "found_inf")]
        if any(scaled):
            raise ValueError(
                "step_in_backward: expected gradients without a scale, got a GradScaler's: this backward pass has "
                "stepped by scaled gradients, and weights and state are spoilt; load them again, and use bfloat16, "
                f"which needs no scaler, or {PLAIN}"
            )
        self._check(optimizer)

    def _after_step(self, *_: Any) -> None:
        self.begin()
        optimizer = self._optimizer()
        if optimizer is not None and self._layout != layout_of(optimizer):  # or no hook might be left to see it
            self._attach(optimizer)

    def begin(self) -> None:
        """Take the next gradients as those of another step."""
        self._begun = False
        self._stepped.clear()

    # -- checks ------------------------------------------------------------------------------------------------

    def _check(self, optimizer: AdamW) -> None:
        """Raise where options ask for what is known only when all gradients are there."""
        if optimizer.max_grad_norm is not None:
            raise ValueError(
                f"max_grad_norm: expected None with step_in_backward, got {optimizer.max_grad_norm}: the norm is over "
                f"all gradients, which are never there at once; {PLAIN}"
            )
        if optimizer.skip_nonfinite:
            raise ValueError(
                "skip_nonfinite: expected False with step_in_backward, got True: when a gradient is found to be inf or "
                f"NaN, other parameters have been stepped; {PLAIN}"
            )
        if optimizer.defaults["differentiable"] or any(group["differentiable"] for group in optimizer.param_groups):
            raise ValueError(f"differentiable: expected False with step_in_backward, got True; {PLAIN}")
        hooks = optimizer._optimizer_step_pre_hooks.values()
        others = [hook for hook in hooks if hook != self._before_step and not getattr(hook, LATE, False)]
        if others:
            raise ValueError(
                f"optimizer: expected no step pre-hooks with step_in_backward, got {others[0]}: it would run when the "
                f"parameters have been stepped; use register_step_post_hook, or {PLAIN}"
            )


def stepped_in_backward(optimizer: torch.optim.Optimizer) -> Set[Tensor]:
    """The parameters that backward passes have stepped since the last ``optimizer.step()``."""
    handle = getattr(optimizer, "_in_backward", None)
    return set() if handle is None else handle._stepped


def layout_of(optimizer: AdamW) -> list[tuple[int, int]]:
    """Which parameters are in which group."""
    return [(index, id(p)) for index, group in enumerate(optimizer.param_groups) for p in group["params"]]


def remove(hooks: list[Any]) -> None:
    """Take hooks away, also from the list."""
    while hooks:
        hooks.pop().remove()


def fused_parameters(optimizer: AdamW) -> list[tuple[int, Tensor, str]]:
    """(group index, parameter, name) of those that take fastft's own step."""
    return [
        (index, p, name)
        for index, p, name in optimizer._parameters()
        if not p.is_meta and why_not_fused(p, optimizer.param_groups[index]) is None
    ]


def warn_before_first_step(optimizer: AdamW) -> None:
    """The warnings of the plain step about options that do nothing, before any parameter is written."""
    if not optimizer.state:
        warn_of_idle_anchor(optimizer)
        warn_of_idle_options(optimizer)
    stepped = [entry for entry in fused_parameters(optimizer) if entry[1].requires_grad]
    with torch.no_grad():
        warn_of_rounding(optimizer, [entry for entry in stepped if entry[1] not in optimizer._frozen])


def refuse_shared_memory(optimizer: AdamW) -> None:
    """Raise for parameters of one memory: stepping one changes the other, whose backward may still need it."""
    fused = [(p, name) for _, p, name in fused_parameters(optimizer)]
    with torch.no_grad():
        shared = _C.overlapping([local(p) for p, _ in fused])
    if shared:
        raise ValueError(
            f"{fused[shared[0]][1]}: expected memory of its own with step_in_backward, got some that "
            f"{fused[shared[1]][1]} shares; make it one parameter, or {PLAIN}"
        )


def refuse_wrappers(optimizer: AdamW) -> None:
    """Raise for parameters whose gradients other processes' are added to only after the hook."""
    ours = {id(p) for _, p, _ in optimizer._parameters()}
    for wrapper in wrappers():
        if any(id(p) in ours for p in wrapper.parameters()):
            raise ValueError(
                f"step_in_backward: expected gradients that are whole when they arrive, got {type(wrapper).__name__}, "
                f"which adds those of other processes later; use torch.distributed.fsdp.fully_shard, or {PLAIN}"
            )
