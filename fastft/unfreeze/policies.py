"""Policies: pure functions from how far training has got to the layer groups that are open."""

from __future__ import annotations

import importlib
import random
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, cast, runtime_checkable

import torch
from torch import nn

from fastft.checks import check_choice, check_count, check_not_negative, check_positive
from fastft.layers.groups import LayerGroup
from fastft.layers.wrappers import wrapped_for
from fastft.names import closest, covers

ScheduleUnit = Literal["step", "epoch"]


@dataclass(frozen=True)
class Event:
    """Metrics that were logged, and when."""

    step: int
    epoch: float
    metrics: Mapping[str, float]


class GroupInfo(NamedTuple):
    """A layer group as a policy sees it."""

    name: str
    kind: str


@dataclass(frozen=True)
class Progress:
    """How far training has got: all that a policy may depend on."""

    step: int
    """Optimizer steps done."""
    groups: tuple[GroupInfo, ...]
    """From input to output, each with a ``name`` and a ``kind``."""
    epoch: float = 0.0
    """The epoch last passed to :meth:`Unfreezer.step`; 0 if none was."""
    events: tuple[Event, ...] = ()
    """All metrics that were logged, the oldest first: each with a ``step``, an ``epoch`` and a dict ``metrics``."""


Policy = Callable[[Progress], Iterable[int | str]]
"""A function from a :class:`Progress` to the indices or names of the open groups; it depends on its argument alone.

One that also has a method ``best_event(progress) -> Event | None`` makes the :class:`Unfreezer` go back, when a group
opens, to the parameters that the model had at this event; None: it goes on from the present ones.
"""


@runtime_checkable
class GoesBack(Protocol):
    """A policy that, when it opens a group, sets the parameters back to those of an earlier event."""

    def best_event(self, progress: Progress) -> Event | None:
        """The event whose parameters to go back to; None: stay with the present ones."""


def open_at(
    policy: Policy,
    groups: Iterable[LayerGroup],
    step: int,
    *,
    epoch: float = 0.0,
    events: Iterable[Event] = (),
) -> tuple[str, ...]:
    """The names of the groups that a policy opens after ``step`` optimizer steps, from input to output.

    To look at a schedule, or to check that it fits a model, before training.

    Args:
        policy: one of :mod:`fastft.unfreeze`, or a function of your own.
        groups: of :func:`fastft.layers.layer_groups`.
        step: optimizer steps done.
        epoch: epochs done, for policies that count these.
        events: metrics that were logged, for policies that depend on them.

    Raises:
        ValueError: the policy opens no group, or one that does not exist.
    """
    infos = tuple(GroupInfo(group.name, group.kind) for group in groups)
    opened = open_groups(policy, Progress(step, infos, epoch, tuple(events)))
    return tuple(info.name for i, info in enumerate(infos) if i in opened)


def open_groups(policy: Policy, progress: Progress) -> frozenset[int]:
    """The indices of the groups that the policy opens.

    Raises:
        ValueError: it opens none, or one that does not exist.
    """
    names = [group.name for group in progress.groups]
    found = set()
    chosen = policy(progress)
    if isinstance(chosen, str) or not isinstance(chosen, Iterable):
        raise ValueError(
            f"policy: expected a list of names or indices of groups, got {chosen!r:.80} at step {progress.step}"
        )
    for item in chosen:
        if isinstance(item, str) and item in names:
            found.add(names.index(item))
        elif isinstance(item, int) and -len(names) <= item < len(names):
            found.add(item % len(names))
        else:
            hint = closest(item, names) if isinstance(item, str) else ""
            raise ValueError(
                f"policy: expected names or indices of the {len(names)} groups, got {item!r} at step "
                f"{progress.step}{hint}"
            )
    if not found:
        raise ValueError(f"policy: expected at least one open group, got none at step {progress.step}")
    return frozenset(found)


def last(progress: Progress, count: int) -> Iterable[int]:
    """The ``count`` groups nearest to the output, or all."""
    return range(max(0, len(progress.groups) - count), len(progress.groups))


def elapsed(progress: Progress, unit: ScheduleUnit) -> float:
    """Steps or epochs done."""
    return progress.step if unit == "step" else progress.epoch


def check_period(name: str, value: Any, unit: Any) -> None:
    """Raise a ``ValueError`` unless ``value`` is a whole number of steps, or a number of epochs."""
    if unit == "step":
        check_count(name, value)
    else:
        check_positive(name, value)


# -- by the clock --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Always:
    """All groups, all the time: full fine-tuning."""

    def __call__(self, progress: Progress) -> Iterable[int]:
        return range(len(progress.groups))


@dataclass(frozen=True)
class GradualUnfreeze:
    """From the top down: ``start`` groups at first, one more after ``every`` steps or epochs.

    ULMFiT (Howard & Ruder 2018, https://arxiv.org/abs/1801.06146) opens one more each epoch.
    """

    every: float
    start: int = 1
    unit: ScheduleUnit = "step"

    def __post_init__(self) -> None:
        check_choice("unit", self.unit, ("step", "epoch"))
        check_period("every", self.every, self.unit)
        check_count("start", self.start)

    def __call__(self, progress: Progress) -> Iterable[int]:
        return last(progress, self.start + int(elapsed(progress, self.unit) // self.every))

    @classmethod
    def open_by(cls, part: float, total_steps: int, groups: Sequence[LayerGroup]) -> GradualUnfreeze:
        """One group at first, and more at equal distances, so that all are open after a part of the run.

        Args:
            part: of the run's steps, above 0 and up to 1.
            total_steps: optimizer steps of the run.
            groups: of :func:`fastft.layers.layer_groups`. Where there are more of them than steps, one opens each step.

        Raises:
            ValueError: a number out of range.
        """
        check_count("total_steps", total_steps)
        if not 0 < part <= 1:
            raise ValueError(f"open_by: expected a part of the steps above 0 up to 1, got {part!r}")
        later = max(1, len(groups) - 1)
        return cls(every=max(1, round(part * total_steps / later)))


@dataclass(frozen=True)
class ChainThaw:
    """The head alone, then each other group alone from the bottom up, then all; ``every`` steps or epochs each.

    DeepMoji (Felbo et al. 2017, https://arxiv.org/abs/1708.00524).
    """

    every: float
    unit: ScheduleUnit = "step"

    def __post_init__(self) -> None:
        check_choice("unit", self.unit, ("step", "epoch"))
        check_period("every", self.every, self.unit)

    def __call__(self, progress: Progress) -> Iterable[int]:
        n = len(progress.groups)
        stage = int(elapsed(progress, self.unit) // self.every)
        return range(n) if stage >= n else [(stage - 1) % n]


@dataclass(frozen=True)
class LinearProbeThenFinetune:
    """The head alone for ``probe_steps``, then everything, so that features are not bent to fit a random head.

    LP-FT (Kumar et al. 2022, https://arxiv.org/abs/2202.10054). Without a head, the last group is probed.
    """

    probe_steps: int

    def __post_init__(self) -> None:
        check_count("probe_steps", self.probe_steps, least=0)

    def __call__(self, progress: Progress) -> Iterable[int]:
        if progress.step >= self.probe_steps:
            return range(len(progress.groups))
        return [i for i, group in enumerate(progress.groups) if group.kind == "head"] or last(progress, 1)


@dataclass(frozen=True)
class LISA:
    """``n_layers`` random blocks, drawn anew ``every`` steps; all that is no block is always open.

    (Pan et al. 2024, https://arxiv.org/abs/2403.17919.) The draw is a function of (seed, step // every) alone.
    """

    n_layers: int = 2
    every: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        check_count("n_layers", self.n_layers)
        check_count("every", self.every)

    def __call__(self, progress: Progress) -> Iterable[int]:
        blocks = [i for i, group in enumerate(progress.groups) if group.kind == "block"]
        if len(blocks) < self.n_layers:
            raise ValueError(f"n_layers: expected at most the {len(blocks)} blocks, got {self.n_layers}")
        drawn = random.Random(f"{self.seed}/{progress.step // self.every}").sample(blocks, self.n_layers)
        return ({*range(len(progress.groups))} - {*blocks}) | {*drawn}


@dataclass(frozen=True)
class BlockCoordinate:
    """One group at a time, ``every`` steps each, round and round.

    BAdam (Luo et al. 2024, https://arxiv.org/abs/2404.02827) drops a group's moments when it leaves the group:
    ``state_policy="reset"``. ``order="descending"`` begins at the output; "random" is another order each round.
    """

    every: int
    order: Literal["descending", "ascending", "random"] = "descending"
    seed: int = 0

    def __post_init__(self) -> None:
        check_count("every", self.every)
        check_choice("order", self.order, ("descending", "ascending", "random"))

    def __call__(self, progress: Progress) -> Iterable[int]:
        n = len(progress.groups)
        turn, at = divmod(progress.step // self.every, n)
        if self.order == "random":
            return [random.Random(f"{self.seed}/{turn}").sample(range(n), n)[at]]
        return [at if self.order == "ascending" else n - 1 - at]


# -- by what was measured ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OnPlateau:
    """From the top down: one more group each time that a metric has stopped improving.

    Replays the logged events that hold ``metric``, so log it where you evaluate, ``unfreezer.step(val_loss=...)``,
    rather than in every step. In a distributed run, log the same value on every process.

    Args:
        metric: the name it is logged under.
        patience: open one more after so many events in a row without improvement.
        mode: whether lower ("min") or higher ("max") is better.
        threshold: a value has improved if it is better than the best so far by more than this.
        start: open at first.
        restore_best: when a group opens, go on from the parameters of the best event. Moments stay as they are.
    """

    metric: str
    patience: int = 2
    mode: Literal["min", "max"] = "min"
    threshold: float = 1e-4
    start: int = 1
    restore_best: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.metric, str) or not self.metric:
            raise ValueError(f"metric: expected a name, got {self.metric!r}")
        check_count("patience", self.patience)
        check_choice("mode", self.mode, ("min", "max"))
        check_count("start", self.start)
        check_not_negative("threshold", self.threshold)

    def __call__(self, progress: Progress) -> Iterable[int]:
        return last(progress, self._replay(progress)[0])

    def best_event(self, progress: Progress) -> Event | None:
        """The event with the best value so far."""
        return self._replay(progress)[1] if self.restore_best else None

    def _replay(self, progress: Progress) -> tuple[int, Event | None]:
        """(how many groups are open, the best event)."""
        sign = 1.0 if self.mode == "min" else -1.0
        opened, waited = self.start, 0
        best, lowest = None, float("inf")
        for event in progress.events:
            value = event.metrics.get(self.metric)
            if value is None:
                continue
            if sign * value < lowest - self.threshold:
                best, lowest, waited = event, sign * value, 0
            else:
                waited += 1
            if waited == self.patience:
                opened, waited = opened + 1, 0
        return opened, best


@dataclass(frozen=True)
class Budget:
    """As many groups, from the top down, as fit a budget.

    Args:
        costs: the cost of a step with the last k groups open, for k = 1, 2, ...; see :meth:`measure`.
        limit: the highest cost of a step, in the unit of ``costs``.
    """

    costs: Sequence[float]
    limit: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "costs", tuple(float(cost) for cost in self.costs))
        if not self.costs or not all(0 <= cost < float("inf") for cost in self.costs):
            raise ValueError(f"costs: expected finite numbers >= 0, got {self.costs}")
        if not min(self.costs) <= self.limit:
            raise ValueError(f"limit: expected at least {min(self.costs):g}, the cheapest step, got {self.limit}")

    def __call__(self, progress: Progress) -> Iterable[int]:
        if len(self.costs) != len(progress.groups):
            raise ValueError(
                f"costs: expected one for each of the {len(progress.groups)} groups, got {len(self.costs)}"
            )
        return last(progress, max(k for k, cost in enumerate(self.costs, start=1) if cost <= self.limit))

    @classmethod
    def measure(
        cls,
        model: nn.Module,
        groups: Sequence[LayerGroup],
        run: Callable[[], Any],
        *,
        limit: float,
        unit: Literal["seconds", "flops"] = "seconds",
        repeats: int = 5,
    ) -> Budget:
        """Measure the cost of a step with the last k groups open, for every k.

        The returned policy does not measure again. ``requires_grad``, gradients, buffers and random states are
        as before afterwards. In a distributed run the highest cost of all processes counts.

        Args:
            model: the plain model, neither compiled nor wrapped for DDP: its ``requires_grad`` flags are changed.
            groups: of :func:`fastft.layers.layer_groups`.
            run: does a forward and a backward pass, and no optimizer step.
            limit: the highest cost of a step, in ``unit``.
            unit: "seconds", the median of ``repeats`` runs after one to warm up; or "flops" as
                ``torch.utils.flop_counter`` counts them, in one run.
            repeats: timed runs for each k.

        Raises:
            ValueError: a wrapped or compiled model, an unknown unit, or no k that fits the limit.
        """
        check_choice("unit", unit, ("seconds", "flops"))
        check_count("repeats", repeats)
        if wrappers := wrapped_for(model) & {"ddp", "compile", "fsdp1"}:
            raise ValueError(f"model: expected a plain model, got one for {', '.join(sorted(wrappers))}")
        trained = [[p for p in group.parameters if p.requires_grad] for group in groups]
        parameters = list(model.parameters())
        grads = [(p, p.grad) for p in parameters]
        buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
        devices = {p.device for p in parameters if p.device.type == "cuda"}
        costs = []
        try:
            with torch.random.fork_rng(devices):
                for k in range(1, len(groups) + 1):
                    for i, members in enumerate(trained):
                        for p in members:
                            p.requires_grad_(i >= len(groups) - k)
                            p.grad = None
                    costs.append(flops(run) if unit == "flops" else seconds(run, repeats, devices))
        finally:
            for p in (p for members in trained for p in members):
                p.requires_grad_(True)
            for p, grad in grads:
                p.grad = grad
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)
        return cls(dearest(costs), limit)


def seconds(run: Callable[[], Any], repeats: int, devices: Iterable[torch.device]) -> float:
    """The median time of a run, after one to warm up."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        run()
        for device in devices:
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def flops(run: Callable[[], Any]) -> float:
    """The floating-point operations of a run."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        run()
    return float(counter.get_total_flops())


def dearest(costs: list[float]) -> list[float]:
    """The largest of all processes' costs, since all of them have to open the same groups."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return costs
    everywhere: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everywhere, costs)
    return [max(at) for at in zip(*everywhere, strict=True)]


# -- by hand -------------------------------------------------------------------------------------------------


class Phase(NamedTuple):
    """The groups that are open from a step or epoch on."""

    start: float
    open: tuple[str | int, ...]


@dataclass(frozen=True)
class Phases:
    """A schedule in a list: ``Phases([{"from": 0, "open": ["head"]}, {"from": 100, "open": ["block", "head"]}])``.

    Args:
        phases: dicts with ``from``, the step or epoch at which the phase begins (the first at 0), and ``open``, a
            list of group names, of modules that hold groups, glob patterns, kinds of groups, or indices. The last
            phase has no end.
        unit: of ``from``.

    Raises:
        ValueError: phases that are not of this form, or, when asked about a model, match none of its groups.
    """

    phases: Sequence[Phase | Mapping[str, Any]]
    unit: ScheduleUnit = "step"

    def __post_init__(self) -> None:
        check_choice("unit", self.unit, ("step", "epoch"))
        if not isinstance(self.phases, Sequence) or isinstance(self.phases, str) or not self.phases:
            raise ValueError(f"phases: expected a list of phases, got {self.phases!r:.80}")
        phases = tuple(phase if isinstance(phase, Phase) else as_phase(phase) for phase in self.phases)
        starts = [phase.start for phase in phases]
        if starts[0] != 0 or any(a >= b for a, b in pairwise(starts)):
            raise ValueError(f"from: expected 0 and then ever larger numbers, got {starts}")
        object.__setattr__(self, "phases", phases)

    def __call__(self, progress: Progress) -> Iterable[int]:
        now = elapsed(progress, self.unit)
        phase = next(p for p in reversed(cast(tuple[Phase, ...], self.phases)) if p.start <= now)
        return [i for wanted in phase.open for i in indices_of(wanted, progress.groups)]

    @property
    def starts(self) -> tuple[float, ...]:
        """The steps or epochs at which the phases begin, the first of them 0."""
        return tuple(phase.start for phase in cast(tuple[Phase, ...], self.phases))

    @classmethod
    def from_yaml(cls, path_or_text: str | Path) -> Phases:
        """From a YAML file (a path that ends in .yaml or .yml) or text; needs PyYAML.

        The document is the list of phases, or a dict with ``phases`` and ``unit``.

        Raises:
            ValueError: the document is something else.
            ImportError: PyYAML is not installed.
        """
        try:
            yaml: Any = importlib.import_module("yaml")
        except ImportError as error:
            raise ImportError("Phases.from_yaml needs PyYAML: pip install pyyaml") from error
        is_path = isinstance(path_or_text, Path) or path_or_text.endswith((".yaml", ".yml"))
        document = yaml.safe_load(Path(path_or_text).read_text("utf-8") if is_path else path_or_text)
        options = document if isinstance(document, dict) else {"phases": document}
        if "phases" not in options or options.keys() - {"phases", "unit"}:
            raise ValueError(f'phases: expected a list, or a dict with "phases" and "unit", got {sorted(options)}')
        return cls(**options)


def as_phase(phase: Any) -> Phase:
    """A phase from its dict."""
    if not isinstance(phase, Mapping) or set(phase) != {"from", "open"}:
        raise ValueError(f'phases: expected a dict with "from" and "open", got {phase!r:.80}')
    start, names = phase["from"], phase["open"]
    if not isinstance(start, (int, float)) or isinstance(start, bool):
        raise ValueError(f"from: expected a number, got {start!r}")
    names = [names] if isinstance(names, (str, int)) else names
    if not isinstance(names, Sequence) or not names or not all(isinstance(name, (str, int)) for name in names):
        raise ValueError(f"open: expected a list of names, patterns, kinds or indices, got {names!r:.80}")
    return Phase(start, tuple(names))


def indices_of(wanted: str | int, groups: Sequence[GroupInfo]) -> Iterable[int]:
    """The indices of the groups that a name, pattern, kind or index means."""
    if isinstance(wanted, int):
        return [wanted]
    names = [group.name for group in groups]
    if wanted in names:
        return [names.index(wanted)]
    hits = [i for i, group in enumerate(groups) if group.kind == wanted or covers(wanted, group.name)]
    if not hits:
        raise ValueError(f"open: {wanted!r} matches no group{closest(wanted, names)}")
    return hits
