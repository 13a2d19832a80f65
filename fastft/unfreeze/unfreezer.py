"""``Unfreezer``: opens and closes layer groups while training goes on, as a policy says."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fastft.checks import check_choice, check_count
from fastft.layers.groups import GroupPatterns
from fastft.layers.wrappers import peel, reentrant_checkpointing, requiring_inputs, reshard
from fastft.names import clean, listed
from fastft.optim import AdamW
from fastft.optim.dtensors import like
from fastft.optim.in_backward import LATE, stepped_in_backward
from fastft.warning import warn

from .hooks import ClosedForward, ModuleHook, StillNorms, norms_in
from .moments import bring_back, drop, offload, state_bytes
from .policies import Event, GoesBack, GroupInfo, OnPlateau, Policy, Progress, open_groups
from .report import GroupStatus, UnfreezeReport
from .wrapping import (
    FLAGS_MUST_STAY,
    NAMES,
    found_wrappers,
    groups_of,
    late_error,
    refuse_offload,
    sharded_modules,
)

VERSION = 1
with_unfreezer: weakref.WeakSet[Optimizer] = weakref.WeakSet()


class Unfreezer:
    """Opens and closes a model's layer groups as training goes on.

    .. code-block:: python

        unfreezer = Unfreezer(model, optimizer, GradualUnfreeze(every=100))
        for batch in batches:
            loss(model, batch).backward()
            optimizer.step()
            scheduler.step()
            unfreezer.step()  # with metrics where you have some: step(epoch=1, val_loss=0.3)
            optimizer.zero_grad()

    All parameters stay in the optimizer's groups from first to last, so schedulers and checkpoints go on working. A
    closed group is left untouched bit for bit, whatever its gradients hold: no update, no weight decay, no momentum,
    no anchor. Parameters that do not require grad when the unfreezer is made stay frozen for good.

    Args:
        model: the model as it is trained: wrap, shard or compile it first, and hand over the wrapper. Where several
            processes train, wrappers that came later are refused by the first forward pass, the first step and every
            opening; only DistributedDataParallel around ``mode="freeze"`` may come until the first forward pass.
        optimizer: any torch optimizer that passes over parameters without gradients, with ``mode="requires_grad"``; a
            :class:`fastft.AdamW` with either mode, also inside ZeroRedundancyOptimizer. Its ``freeze`` and ``unfreeze``
            are then the unfreezer's.
        policy: the schedule; one of :mod:`fastft.unfreeze`, or any function from a :class:`Progress` to the indices
            or names of the open groups that depends on nothing else.
        groups: as :func:`fastft.layers.layer_groups` takes or returns them. None: read from the model.
        mode: "requires_grad" sets the flags of closed parameters to False, so autograd saves their backward work.
            "freeze" leaves the flags alone: safe for DDP, with a static graph too, and for compiled models. In a plain
            model, closed modules that have nothing open below them then run without a graph, so the backward work is
            saved too; :meth:`report` says which. In a wrapped or compiled one, closed parameters still get gradients:
            ``max_grad_norm`` of :class:`fastft.AdamW` leaves them out, ``clip_grad_norm_`` does not.
        state_policy: for the optimizer state of a group that closes. "keep"; "reset": it is dropped, and starts at
            t = 1 when the group opens again; "offload": its moments wait in pinned host memory until then, but for
            sharded parameters on a GPU, which are refused.
        norm_policy: "freeze_stats" keeps closed modules with running statistics (batch norm) in eval mode;
            "train" leaves them alone.
        rewarm_steps: a group that opens during training takes its first steps with lr · 1/n, 2/n, ..., n/n. What the
            schedulers see is the full lr. Needs optimizer groups of one layer group each, such as
            :func:`fastft.optim.layerwise_lr` makes.
        tied: for a weight that open and closed groups share. "raise"; "closed": it stays closed until all groups that
            use it are open.
        wrapped: wrappers around ``model`` where a framework hands out the inner module only: "ddp", "data_parallel",
            "fsdp1", "fsdp2", "compile". Those that ``model`` itself shows are found.

    Raises:
        TypeError: no optimizer, or a policy that is no function.
        ValueError: parameters that require grad and are not in the optimizer, a mode that the optimizer or a wrapper
            rules out, an optimizer that has an unfreezer already, a policy or groups that do not fit the model, or a
            tied weight that is open and closed at once.

    In a distributed run, call :meth:`step` with the same metrics on every process.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        policy: Policy,
        *,
        groups: GroupPatterns | None = None,
        mode: Literal["requires_grad", "freeze"] = "requires_grad",
        state_policy: Literal["keep", "reset", "offload"] = "keep",
        norm_policy: Literal["freeze_stats", "train"] = "freeze_stats",
        rewarm_steps: int = 0,
        tied: Literal["raise", "closed"] = "raise",
        wrapped: Iterable[str] = (),
    ) -> None:
        mode = current_mode(mode)
        check_choice("mode", mode, ("requires_grad", "freeze"))
        check_choice("state_policy", state_policy, ("keep", "reset", "offload"))
        check_choice("norm_policy", norm_policy, ("freeze_stats", "train"))
        check_choice("tied", tied, ("raise", "closed"))
        check_count("rewarm_steps", rewarm_steps, least=0)
        given = frozenset([wrapped] if isinstance(wrapped, str) else wrapped)
        for wrapper in given:
            check_choice("wrapped", wrapper, tuple(NAMES))
        if isinstance(policy, type):
            raise TypeError(
                f"policy: expected a function of a Progress, got a class; did you mean {policy.__name__}(...)?"
            )
        if not callable(policy):
            raise TypeError(f"policy: expected a function of a Progress, got {policy!r:.80}")
        self._whole = unwrapped(optimizer)
        optimizer = share_of(self._whole)
        if optimizer in with_unfreezer:
            raise ValueError("optimizer: it has an Unfreezer already; undo() that one first")
        self.model = model
        self.optimizer = optimizer
        self.policy = policy
        self.mode = mode
        self._sharded = sharded_modules(model)
        reshard(model)
        if state_policy == "offload":
            refuse_offload(model)
        self.groups = groups_of(model, groups)
        self._state_policy = state_policy
        self._rewarm_steps = rewarm_steps
        self._tied = tied
        self._given_wrappers = given
        self._infos = tuple(GroupInfo(group.name, group.kind) for group in self.groups)

        self._step = 0
        self._epoch: float | None = None
        self._events: tuple[Event, ...] = ()
        self._best: dict[str, Tensor] | None = None
        self._open: frozenset[int] = frozenset()
        self._opened: list[int | None] = [None] * len(self.groups)  # when last

        self._names: dict[Tensor, str] = {
            p: name for group in self.groups for name, p in zip(group.param_names, group.parameters, strict=True)
        }
        self._frozen = {p for p in self._names if not p.requires_grad}
        self._closed: set[Tensor] = set(self._frozen)  # the frozen ones are in it for good
        self._users = self._users_of_shared()
        self._check_optimizer()
        self._layer_of = self._layers_of_optimizer_groups()
        self._lrs: list[tuple[dict[str, Any], Any]] = []  # what re-warming has to put back
        self._unproven: set[int] = set()  # opened, and no optimizer step since
        self._without_gradient: list[str] = []
        self._input_hooks: list[Any] = []
        self._look_for_checkpointing = True

        self._wrapped = self._allowed(found_wrappers(model, given))
        self._ran = self._stepped = False  # the model and the optimizer, since
        self._norms = StillNorms(model, "compile" in self._wrapped) if norm_policy == "freeze_stats" else None
        self._forwards = self._hook_forwards()

        def before_step(_: Any, args: Any, kwargs: Any) -> None:
            self._before_step([*args[1:], *kwargs.values()])

        setattr(before_step, LATE, not rewarm_steps)  # re-warming sets the lr for the step
        self._handles = [
            optimizer.register_step_pre_hook(before_step),
            optimizer.register_step_post_hook(lambda *_: self._restore_lrs()),
            optimizer.register_load_state_dict_post_hook(lambda _: self._hold()),
        ]
        if "compile" not in self._wrapped:  # there it would be part of the graph; the first step looks, too
            # In front of hooks that put other parameters in place, as fully_shard's does, or take the graph away.
            first = model.register_forward_pre_hook(ModuleHook(self._before_first_forward), prepend=True)
            self._handles.append(first)
        if mode == "requires_grad":
            # Also inside the model, as a trainer may call its methods rather than itself.
            for module in dict.fromkeys([model, *requiring_inputs(model)]):
                self._handles.append(module.register_forward_pre_hook(ModuleHook(self._before_forward)))
        with_unfreezer.add(optimizer)
        try:
            wanted = open_groups(policy, self.progress)
            self._check_ties(wanted)
            self._apply(wanted, begin=True)
        except BaseException:
            self.undo()
            raise

    # -- in the training loop ----------------------------------------------------------------------------------

    @property
    def progress(self) -> Progress:
        """The argument of the policy."""
        return Progress(self._step, self._infos, self._epoch or 0.0, self._events)

    @property
    def open_groups(self) -> tuple[str, ...]:
        """The names of the open groups, from input to output."""
        return tuple(group.name for i, group in enumerate(self.groups) if i in self._open)

    def step(self, *, epoch: float | None = None, **metrics: float | Tensor) -> bool:
        """Count an optimizer step, and open and close groups as the policy says. Call it after ``optimizer.step()``.

        Args:
            epoch: epochs done, also in fractions, for policies that depend on them.
            **metrics: measured values, for policies that depend on them; they are logged as one event.

        Returns:
            Whether the open groups changed.

        Raises:
            ValueError: the policy opens no group, or one that does not exist, or cuts through a tied weight.
        """
        self._step += 1
        return self.update(epoch=epoch, **metrics)

    def update(self, *, epoch: float | None = None, **metrics: float | Tensor) -> bool:
        """As :meth:`step`, without counting one: for metrics that are only known later, such as an evaluation's.

        They are logged with the step that was counted last.
        """
        if epoch is not None:
            self._epoch = float(epoch)
        goes_back = self.policy if isinstance(self.policy, GoesBack) else None
        if metrics:
            event = Event(self._step, self._epoch or 0.0, {name: float(value) for name, value in metrics.items()})
            self._events = (*self._events, event)
            if goes_back is not None and goes_back.best_event(self.progress) is event:
                self._best = self._copy()
        wanted = open_groups(self.policy, self.progress)
        if wanted == self._open:
            return False
        self._check_ties(wanted)
        if goes_back is not None and self._best is not None and wanted - self._open:
            self._go_back(self._best)
        self._apply(wanted)
        return True

    def report(self) -> UnfreezeReport:
        """The state of each group: whether it is open and since when, its lr, and the size of its optimizer state.

        Returns:
            A report: print it, or call ``to_markdown()``, ``to_json()``, ``plot(path)`` or ``write(folder)``. It has a
            ``step``, ``groups`` with ``group``, ``parameters``, ``open_since``, ``lr``, ``state_bytes`` and
            ``host_bytes``, and ``notes`` in sentences.
        """
        self._restore_lrs()
        groups = []
        for i, group in enumerate(self.groups):
            members = set(group.parameters)
            used = [g for g in self._whole.param_groups if any(p in members for p in g["params"])]
            factor = self._warmth(i) if i in self._open else 1.0
            total, away = state_bytes(self.optimizer, group.parameters)
            since = self._opened[i] if i in self._open else None
            lrs = tuple(sorted(float(g["lr"]) * factor for g in used))
            groups.append(GroupStatus(group.name, group.numel, since, lrs, total, away))
        return UnfreezeReport(self._step, tuple(groups), tuple(self._notes()))

    def state_dict(self) -> dict[str, Any]:
        """Plain values, the same in every process, and the tensors that a policy may go back to.

        Only a policy with ``restore_best=True`` has tensors: of sharded parameters DTensors.
        """
        return {
            "version": VERSION,
            "groups": [group.name for group in self.groups],
            "step": self._step,
            "epoch": self._epoch,
            "events": [{"step": e.step, "epoch": e.epoch, "metrics": dict(e.metrics)} for e in self._events],
            "open": list(self.open_groups),
            "opened": list(self._opened),
            "best": None if self._best is None else dict(self._best),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from what was saved. Load the model and the optimizer too, before or after; with
        ``torch.distributed.checkpoint`` and ``mode="requires_grad"`` before the unfreezer is made, since that passes
        over the state of parameters that do not require grad.

        The policy is called again, so another policy may take over from here.

        Raises:
            ValueError: the state is of another version, or of other groups.
        """
        if state_dict.get("version") != VERSION:
            raise ValueError(f"state_dict: expected version {VERSION}, got {state_dict.get('version')!r}")
        names = [group.name for group in self.groups]
        if state_dict["groups"] != names:
            raise ValueError(f"state_dict: expected the groups {names}, got {state_dict['groups']}")
        events = tuple(Event(e["step"], e["epoch"], dict(e["metrics"])) for e in state_dict["events"])
        epoch = state_dict["epoch"]
        wanted = open_groups(self.policy, Progress(state_dict["step"], self._infos, epoch or 0.0, events))
        self._check_ties(wanted)
        self._step, self._epoch, self._events = state_dict["step"], epoch, events
        best = state_dict["best"]
        self._opened = list(state_dict["opened"])
        self._best = None if best is None else self._copy(best)
        self._open = frozenset(names.index(name) for name in state_dict["open"])
        self._apply(wanted)
        if self._state_policy == "reset":
            drop(self.optimizer, self._closed - self._frozen)

    def undo(self) -> None:
        """Open everything that the unfreezer closed, bring back its state, and take all hooks away.

        Warns if the policy depends on a metric that was never logged, and so opened nothing.
        """
        if isinstance(self.policy, OnPlateau) and self._step and self.optimizer in with_unfreezer:
            logged = {name for event in self._events for name in event.metrics}
            if self.policy.metric not in logged:
                got = ", ".join(map(repr, sorted(logged))) or "no metrics at all"
                expected = f"metric: expected {self.policy.metric!r} among the logged metrics"
                warn(f"{expected}, got {got}")
        self._restore_lrs()
        self._set_closed(set(self._frozen))
        if isinstance(self.optimizer, AdamW):
            self.optimizer.unfreeze(self._in_optimizer(self._frozen))
        if self._norms is not None:
            self._norms.set(())
        self._unhook_forwards()
        for handle in self._handles:
            handle.remove()
        for inputs in self._input_hooks:
            inputs.disable_input_require_grads()
        self._handles, self._input_hooks = [], []
        with_unfreezer.discard(self.optimizer)

    def close(self) -> None:
        """The old name of :meth:`undo`."""
        warn("Unfreezer.close() is called undo() now", DeprecationWarning)
        self.undo()

    # -- opening and closing -----------------------------------------------------------------------------------

    def _apply(self, wanted: frozenset[int], begin: bool = False) -> None:
        """Make these groups the open ones."""
        if not begin:
            self._check_wrappers()
            self._check_members()
        for i in wanted - self._open:
            self._opened[i] = self._step
        self._unproven = (self._unproven | (wanted - self._open)) & wanted
        self._open = wanted
        before = set(self._closed)
        self._set_closed(self._closed_with(wanted))
        if self._state_policy == "reset" and not begin:
            drop(self.optimizer, self._closed - before)
        if self._norms is not None:
            self._norms.set(norms_in(m for i, g in enumerate(self.groups) if i not in wanted for m in g.modules))
        self._look_for_checkpointing = True

    def _closed_with(self, wanted: frozenset[int]) -> set[Tensor]:
        """The parameters that are closed while these groups are open."""
        closed: set[Tensor] = set(self._frozen)
        for i, group in enumerate(self.groups):
            closed.update(group.parameters if i not in wanted else ())
        closed.update(p for p, users in self._users.items() if not users <= wanted)
        return closed

    def _set_closed(self, closed: set[Tensor]) -> None:
        reshard(self.model)
        opening, closing = self._closed - closed, closed - self._closed
        # In place: the hooks on the modules look into it.
        self._closed -= opening
        self._closed |= closing
        if self.mode == "requires_grad":
            for p in opening:
                p.requires_grad_(True)
            for p in closing:
                p.requires_grad_(False)
        for p in closing:
            p.grad = None
        bring_back(self.optimizer, opening)
        self._hold()

    def _hold(self) -> None:
        """Freeze what is closed in the optimizer, and nothing else: a state dict may have brought other frozen ones."""
        if isinstance(self.optimizer, AdamW):
            self.optimizer.unfreeze(self._in_optimizer(p for p in self._names if p not in self._closed))
            self.optimizer.freeze(self._in_optimizer(self._closed))
        if self._state_policy == "offload":
            offload(self.optimizer, self._closed)

    def _in_optimizer(self, params: Iterable[Tensor]) -> list[Tensor]:
        members = {p for group in self.optimizer.param_groups for p in group["params"]}
        return [p for p in params if p in members]

    # -- around a step, a forward pass -------------------------------------------------------------------------

    def _before_first_forward(self, *_: Any) -> None:
        if not self._ran and not torch.compiler.is_compiling():
            self._check_wrappers()
            self._ran = True

    def _before_step(self, arguments: list[Any]) -> None:
        if not self._stepped:
            self._check_wrappers()
            self._check_members()
            self._stepped = True
        if self.mode == "requires_grad":
            for p in self._closed:
                p.grad = None
        if not any(callable(argument) for argument in arguments):  # a closure has yet to compute the gradients
            self._check_gradients()
        self._unproven = set()
        self._restore_lrs()
        for group, layer in zip(self.optimizer.param_groups, self._layer_of, strict=False):
            factor = 1.0 if layer is None else self._warmth(layer)
            if factor != 1.0:
                self._lrs.append((group, group["lr"]))
                group["lr"] = group["lr"] * factor

    def _check_gradients(self) -> None:
        """Warn of groups that just opened and got no gradient."""
        without = []
        stepped = stepped_in_backward(self.optimizer)
        for i in sorted(self._unproven):
            # Of a parameter that FSDP1 has cut up a process may have nothing, and then there is no gradient.
            members = [p for p in self.groups[i].parameters if p not in self._closed and p.numel()]
            if members and all(p.grad is None and p not in stepped for p in members):
                without.append(self.groups[i].name)
        if without:
            self._without_gradient += without
            warn(
                f"no gradient arrived at open groups: {listed(without, quoted=False)}; where reentrant gradient "
                "checkpointing runs over closed groups, use use_reentrant=False"
            )

    def _restore_lrs(self) -> None:
        """Put back the very objects: schedulers fill tensors in place."""
        while self._lrs:
            group, lr = self._lrs.pop()
            group["lr"] = lr

    def _warmth(self, i: int) -> float:
        """The factor on a group's lr. Groups that were open from the start are the scheduler's to warm up."""
        since = self._opened[i]
        if i not in self._open or not since or not self._rewarm_steps:
            return 1.0
        return min(1.0, (self._step - since + 1) / self._rewarm_steps)

    def _before_forward(self, *_: Any) -> None:
        """Gradient checkpointing may have been turned on after the unfreezer was made."""
        if not self._look_for_checkpointing:
            return
        self._look_for_checkpointing = False
        if reentrant_checkpointing(self.model):
            for module in requiring_inputs(self.model):
                if getattr(module, "_require_grads_hook", None) is None:
                    module.enable_input_require_grads()
                    self._input_hooks.append(module)

    # -- the best parameters -----------------------------------------------------------------------------------

    def _what_moves(self) -> dict[str, Tensor]:
        """All that has moved since training began: parameters that have been open, and running statistics."""
        moved = {
            name: p.detach()
            for opened, group in zip(self._opened, self.groups, strict=True)
            if opened is not None
            for name, p in zip(group.param_names, group.parameters, strict=True)
            if p not in self._frozen
        }
        for i, norm in enumerate(norms_in([self.model])):
            moved.update({f"statistics.{i}.{name}": buffer for name, buffer in norm.named_buffers(recurse=False)})
        return moved

    def _copy(self, saved: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """All that has moved, in host memory; or what was saved of it, whole or in parts, as it lies here."""
        moved = self._what_moves()
        found = moved if saved is None else {name: like(tensor, moved[name]) for name, tensor in saved.items()}
        return {name: tensor.to("cpu", copy=True) for name, tensor in found.items()}

    def _go_back(self, best: Mapping[str, Tensor]) -> None:
        reshard(self.model)
        moved = self._what_moves()
        with torch.no_grad():
            for name, tensor in best.items():
                moved[name].copy_(tensor)

    # -- checks ------------------------------------------------------------------------------------------------

    def _check_optimizer(self) -> None:
        members = {p for group in self._whole.param_groups for p in group["params"]}
        missing = [name for p, name in self._names.items() if p.requires_grad and p not in members]
        if missing:
            raise ValueError(
                "optimizer: expected every parameter of the model that requires grad to be in it from the start, "
                f"got none of {listed(missing, quoted=False)}"
            )
        if self.mode == "freeze" and not isinstance(self.optimizer, AdamW):
            kind = f"{type(self.optimizer).__module__}.{type(self.optimizer).__name__}"
            raise ValueError(f'mode: expected "requires_grad" with {kind}; "freeze" needs fastft.AdamW')
        if isinstance(self.optimizer, torch.optim.LBFGS):
            raise ValueError("optimizer: LBFGS moves all parameters along one direction, so it can hold none still")

    def _check_members(self) -> None:
        """Raise if somebody has put other parameters into the optimizer."""
        members = {p for group in self._whole.param_groups for p in group["params"]}
        missing = [name for p, name in self._names.items() if p not in members and p not in self._frozen]
        if missing:
            raise ValueError(
                "optimizer: expected the parameters that it had when the Unfreezer was made, got others in the place "
                f"of {listed(missing, quoted=False)}; let accelerate, DeepSpeed or whoever put them there prepare the "
                "model and the optimizer first, then make the Unfreezer"
            )

    def _allowed(self, found: set[str]) -> set[str]:
        """These wrappers, where the mode allows them."""
        for wrapper, reason in FLAGS_MUST_STAY.items():
            if wrapper in found and self.mode == "requires_grad":
                raise ValueError(
                    f'mode: expected "freeze", together with fastft.AdamW, for a model that is {NAMES[wrapper]}: '
                    f"{reason}"
                )
        return found

    def _check_wrappers(self) -> None:
        """Raise for wrappers that came after the unfreezer, and too late for it."""
        if not sharded_modules(self.model) <= self._sharded:
            raise late_error("fsdp2")
        found = found_wrappers(self.model, self._given_wrappers)
        late = found - self._wrapped
        if "fsdp1" in late:
            raise late_error("fsdp1")
        if "ddp" in late:
            # It waits for the gradients of closed groups, too, and before the first forward pass they can still come.
            if self.mode == "requires_grad":
                raise late_error("ddp")
            if self._forwards and self._ran:
                raise late_error("ddp", "waits for gradients of closed groups, and these already ran without a graph")
            self._unhook_forwards()
        self._wrapped = self._allowed(found)

    def _layers_of_optimizer_groups(self) -> list[int | None]:
        """The layer group of each of the optimizer's groups; None where it has none, or several."""
        owner = {p: i for i, group in enumerate(self.groups) for p in group.parameters}
        layers: list[int | None] = []
        for at, group in enumerate(self.optimizer.param_groups):
            found = sorted({owner[p] for p in group["params"] if p in owner})
            if len(found) > 1 and self._rewarm_steps:
                names = [self.groups[i].name for i in found]
                raise ValueError(
                    f"rewarm_steps: expected 0, or optimizer groups of one layer group each, and param_groups[{at}] "
                    f"has parameters of {listed(names, quoted=False)}; make them with fastft.optim.layerwise_lr"
                )
            layers.append(found[0] if len(found) == 1 else None)
        return layers

    def _users_of_shared(self) -> dict[Tensor, frozenset[int]]:
        """For each weight that several groups use, which."""
        aliases = {clean(name): p for name, p in peel(self.model).named_parameters(remove_duplicate=False)}
        owner = {p: i for i, group in enumerate(self.groups) for p in group.parameters}
        users: dict[Tensor, set[int]] = {}
        for i, group in enumerate(self.groups):
            for name in group.shared:
                p = aliases[name]
                if p not in self._frozen:
                    users.setdefault(p, {owner[p]}).add(i)
        return {p: frozenset(by) for p, by in users.items()}

    def _check_ties(self, wanted: frozenset[int]) -> None:
        for p, users in self._users.items() if self._tied == "raise" else ():
            if users & wanted and not users <= wanted:
                opened = [self.groups[i].name for i in sorted(users & wanted)]
                closed = [self.groups[i].name for i in sorted(users - wanted)]
                raise ValueError(
                    f"{self._names[p]} is tied across an open and a closed group at step {self._step}: "
                    f"{', '.join(opened)} would be open, {', '.join(closed)} closed. Open them together, put them "
                    "into one group (groups=), untie the weights, or keep this one closed until all of them are "
                    'open with tied="closed"'
                )

    def _hook_forwards(self) -> list[ClosedForward]:
        """Hooks on the forward passes of modules without wrappers, for a mode that leaves the flags alone."""
        if self.mode == "requires_grad" or self._wrapped:
            return []
        modules = [module for group in self.groups for module in group.modules]
        return [ClosedForward(m, self._closed) for m in modules if any(True for _ in m.parameters())]

    def _unhook_forwards(self) -> None:
        for forward in self._forwards:
            forward.remove()
        self._forwards = []

    def _notes(self) -> Iterable[str]:
        if self._frozen:
            frozen = [name for p, name in self._names.items() if p in self._frozen]
            yield f"frozen before, and for good: {listed(frozen, quoted=False)}"
        ties = [self._names[p] for p, users in self._users.items() if p in self._closed and users & self._open]
        if ties:
            yield f"closed until all groups that use it are open: {listed(ties, quoted=False)}"
        if self.mode == "freeze":
            yield self._note_on_backward()
        elif 0 not in self._open and self._inputs_require_grad():
            yield (
                "the input embeddings are made to require grad (enable_input_require_grads), so backward runs through "
                "closed groups too; only reentrant gradient checkpointing needs that"
            )
        if self._without_gradient:
            silent = listed(self._without_gradient, quoted=False)
            yield f"no gradient arrived in the first step after it opened: {silent}"
        if self._norms is not None and self._norms.still:
            yield f"running statistics stay as they are in {len(self._norms.still)} closed modules"
        if getattr(self.policy, "unit", None) == "epoch" and self._epoch is None:
            yield "the policy depends on epochs, and step(epoch=...) has not been given any yet"

    def _note_on_backward(self) -> str:
        if self._wrapped:
            return (
                f"backward computes gradients for closed groups too, as the model is "
                f"{' and '.join(NAMES[w] for w in sorted(self._wrapped))}"
            )
        saved = {forward.module for forward in self._forwards if forward.saved}
        closed = [group for i, group in enumerate(self.groups) if i not in self._open]
        names = [group.name for group in closed if saved.intersection(group.modules)]
        if not names:
            return "in the last forward pass no closed group could go without backward work"
        return f"detached, without backward work, in the last forward pass: {listed(names, quoted=False)}"

    def _inputs_require_grad(self) -> bool:
        return any(getattr(m, "_require_grads_hook", None) is not None for m in requiring_inputs(self.model))


def current_mode(mode: Any) -> Any:
    """The mode under its present name."""
    if mode != "mask":
        return mode
    warn('mode: "mask" is called "freeze" now', DeprecationWarning)
    return "freeze"


def unwrapped(optimizer: Any) -> Optimizer:
    """The optimizer itself, where accelerate or Lightning wrapped it."""
    inner = optimizer
    while isinstance(getattr(inner, "optimizer", None), Optimizer):
        inner = inner.optimizer
    if not isinstance(inner, Optimizer):
        raise TypeError(f"optimizer: expected a torch.optim.Optimizer, got {type(optimizer).__name__}")
    return inner


def share_of(optimizer: Optimizer) -> Optimizer:
    """The optimizer of this process's parameters, inside a ZeroRedundancyOptimizer; any other itself."""
    share = getattr(optimizer, "optim", None)
    zero = any(c.__name__ == "ZeroRedundancyOptimizer" for c in type(optimizer).__mro__)
    return share if zero and isinstance(share, Optimizer) else optimizer
