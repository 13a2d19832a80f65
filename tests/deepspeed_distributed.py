"""The processes of tests/integrations/test_deepspeed.py, which starts this file as a script, once for each rank.

A scenario is a run of a few steps, the same for DeepSpeed and for one process without it: :class:`Alone` and
:class:`Partitioned` take the same arguments. Gradients are given: the model's loss is linear in its parameters. They
differ between the two processes, and neither their averages nor sums of squares round, in float32 or in bfloat16.
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from started import end_together, run_together
from torch import Tensor, nn

import fastft
from fastft import Anchor

WORLD = 2
STEPS, HALF = 6, 3
SPOILT_STEP = 2
"""The step in which one process has an inf in one gradient, where a scenario asks for it."""

OPTIONS: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1, "eps": 1e-4}
REST_OPTIONS: dict[str, Any] = {"lr": 3e-3, "weight_decay": 0.02}
ANCHOR_DECAY, REST_ANCHOR_DECAY = 3.0, 11.0
CLIP = 1.5

Outcome = dict[str, Any]


class Model(nn.Module):
    """Two groups of 385 and 53 elements: over two processes one tensor of each is cut, and both groups are padded."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(13, 5)
        self.body = nn.Linear(17, 16)
        self.norm = nn.LayerNorm(17)
        self.head = nn.Linear(16, 3)
        self.fixed = nn.Linear(1, 7, bias=False)
        self.fixed.requires_grad_(False)
        with torch.no_grad():
            for i, p in enumerate(self.parameters()):
                p.copy_(numbers(p.shape, 100 * seed + i) * 0.5)

    def forward(self, factors: Mapping[str, Tensor]) -> Tensor:
        terms = [(p * factors[name]).sum() for name, p in self.named_parameters() if name in factors]
        return torch.stack(terms).sum()


def numbers(shape: Iterable[int], seed: int) -> Tensor:
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed))


def gradients(step: int, rank: int | None, spoilt: bool = False) -> dict[str, Tensor]:
    """Of a step in one of the two processes; None: their average."""
    found = {}
    for i, (name, p) in enumerate(Model(0).named_parameters()):
        if not p.requires_grad:
            continue
        average = (numbers(p.shape, 1000 * step + i) * 8).round() / 8
        apart = (numbers(p.shape, 1000 * step + i + 500) * 4).round() / 8
        found[name] = average if rank is None else average + apart * (1 - 2 * rank)
    if spoilt and step == SPOILT_STEP and rank != 0:
        found["head.weight"][-1, 0] = float("inf")
    return found


def masks() -> dict[str, Tensor]:
    """One of rows, of the tensor that is cut, and two of elements."""
    return {
        "body.weight": torch.arange(16) % 3 > 0,
        "norm.weight": torch.arange(17) > 6,
        "head.weight": torch.arange(48).reshape(3, 16) % 2 == 0,
    }


FROZEN = ("embed", "norm.bias")


def groups(module: nn.Module, one_group: bool, decays: tuple[float, float]) -> list[dict[str, Any]]:
    """Matrices and the rest, with options of their own; or all together."""
    named = list(module.named_parameters())
    if one_group:
        return [{"params": named, "anchor_decay": decays[0]}]
    matrices = [(name, p) for name, p in named if p.dim() > 1]
    rest = [(name, p) for name, p in named if p.dim() == 1]
    return [
        {"params": matrices, "anchor_decay": decays[0]},
        {"params": rest, **REST_OPTIONS, "anchor_decay": decays[1]},
    ]


@dataclass
class Way:
    """A configuration of DeepSpeed."""

    stage: int
    dtype: torch.dtype = torch.float32
    zero: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    kind: str = "DeepSpeedZeroOptimizer"

    def whole_config(self) -> dict[str, Any]:
        formats: dict[torch.dtype, dict[str, Any]] = {
            torch.float32: {},
            # Else it would be DeepSpeed that leaves out a step with an inf, as it does in float32.
            torch.bfloat16: {"bf16": {"enabled": True, "check_grad_overflow": False}},
        }
        return {
            "train_micro_batch_size_per_gpu": 1,
            "zero_allow_untested_optimizer": True,
            "gradient_clipping": 0.0,
            "zero_optimization": {"stage": self.stage, **self.zero},
            **formats[self.dtype],
            **self.config,
        }


WAYS: dict[str, Way] = {
    "ZeRO-1": Way(1),
    "ZeRO-1, bfloat16": Way(1, torch.bfloat16),
    "ZeRO-1, bfloat16, float32 gradients": Way(
        1, torch.bfloat16, config={"data_types": {"grad_accum_dtype": "fp32"}}, kind="BF16_Optimizer"
    ),
    "ZeRO-2": Way(2),
    "ZeRO-2, bfloat16": Way(2, torch.bfloat16),
    "ZeRO-2, round robin": Way(2, zero={"round_robin_gradients": True}),
    "ZeRO-2, aligned": Way(2, torch.bfloat16, zero={"parameter_alignment": True}),
    "ZeRO-2, offloaded": Way(
        2,
        zero={"offload_optimizer": {"device": "cpu", "pin_memory": False}},
        config={"zero_force_ds_cpu_optimizer": False},
    ),
}


class Alone:
    """One process: float32 weights that the model has in the way's dtype."""

    def __init__(
        self,
        way: Way,
        *,
        seed: int = 0,
        one_group: bool = False,
        anchor: Callable[[nn.Module], Any] | None = None,
        carried: bool = False,
        decays: tuple[float, float] = (0.0, 0.0),
        masked: bool = False,
        frozen: Iterable[str] = (),
        clipping: float = 0.0,
        attached: bool = True,
        **options: Any,
    ) -> None:
        """Make it.

        Args:
            way: its dtype counts.
            seed: of the weights.
            one_group: instead of two.
            anchor: makes it from the model.
            carried: whether DeepSpeed comes to an optimizer that has anchor, masks and frozen parameters already.
            decays: of the groups' anchor.
            masked: with those of :func:`masks`.
            frozen: names, or modules.
            clipping: to this norm, of all gradients, before the step.
            attached: of no account without DeepSpeed.
            **options: of the optimizer.
        """
        self.way, self.clipping = way, clipping
        self.module = Model(seed)
        made = None if anchor is None or not carried else anchor(self.module)
        with torch.no_grad():
            for p in self.module.parameters():
                p.copy_(p.to(way.dtype))
        if anchor is not None and not carried:
            made = anchor(self.module)
        self.optimizer = fastft.AdamW(groups(self.module, one_group, decays), anchor=made, **OPTIONS, **options)
        params = dict(self.module.named_parameters())
        for name, mask in masks().items() if masked else ():
            self.optimizer.set_update_mask(params[name], mask)
        self.optimizer.freeze([p for name, p in params.items() if name.startswith(tuple(frozen))] if frozen else [])

    def train(self, steps: Iterable[int], spoilt: bool = False) -> Alone:
        params = dict(self.module.named_parameters())
        for step in steps:
            for name, grad in gradients(step, None, spoilt).items():
                params[name].grad = grad
            if self.clipping:
                nn.utils.clip_grad_norm_(self.module.parameters(), self.clipping)
            self.optimizer.step()
        return self

    def outcome(self) -> Outcome:
        named = [(name, p) for name, p in self.module.named_parameters() if p.requires_grad]
        moments = {name: self.optimizer.state.get(p, {}) for name, p in named}
        return {
            "weights": {name: p.detach() for name, p in named},
            "model": {name: p.detach().to(self.way.dtype) for name, p in self.module.named_parameters()},
            "exp_avg": {name: state.get("exp_avg", torch.zeros(p.shape)) for (name, p), state in both(named, moments)},
            "skipped": int(self.optimizer.skipped_steps),
        }


def both(named: Iterable[tuple[str, Tensor]], other: Mapping[str, Any]) -> list[tuple[tuple[str, Tensor], Any]]:
    return [((name, p), other[name]) for name, p in named]


class Partitioned:
    """Two processes under DeepSpeed, with the arguments of :class:`Alone`."""

    def __init__(
        self,
        way: Way,
        *,
        seed: int = 0,
        one_group: bool = False,
        anchor: Callable[[nn.Module], Any] | None = None,
        carried: bool = False,
        decays: tuple[float, float] = (0.0, 0.0),
        masked: bool = False,
        frozen: Iterable[str] = (),
        clipping: float = 0.0,
        attached: bool = True,
        config: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        """Make it; ``attached=False`` leaves that to the scenario, ``config`` is added to the way's."""
        import deepspeed

        from fastft.integrations.deepspeed import attach

        self.way = way
        self.module = module = Model(seed)
        params = dict(module.named_parameters())
        early = carried and anchor is not None
        self.optimizer = fastft.AdamW(
            groups(module, one_group, decays if early else (0.0, 0.0)),
            anchor=anchor(module) if early and anchor is not None else None,
            **OPTIONS,
            **options,
        )
        if carried and masked:
            for name, mask in masks().items():
                self.optimizer.set_update_mask(params[name], mask)
        if carried and frozen:
            self.optimizer.freeze([p for name, p in params.items() if name.startswith(tuple(frozen))])
        whole = {**way.whole_config(), "gradient_clipping": clipping, **(config or {})}
        self.engine, self.zero, *_ = deepspeed.initialize(model=module, optimizer=self.optimizer, config=whole)
        if not attached:
            return
        if not early:
            for group, decay in zip(self.optimizer.param_groups, decays, strict=False):
                group["anchor_decay"] = decay
        attach(
            self.engine,
            anchor=anchor(module) if anchor is not None and not early else None,
            update_masks=masks() if masked and not carried else None,
            frozen=frozen if frozen and not carried else None,
        )

    def train(self, steps: Iterable[int], spoilt: bool = False) -> Partitioned:
        for step in steps:
            factors = gradients(step, RANK if COUNT > 1 else None, spoilt)
            loss = self.engine({name: factor.to(self.way.dtype) for name, factor in factors.items()})
            self.engine.backward(loss)
            self.engine.step()
        return self

    def outcome(self) -> Outcome:
        zero = self.zero
        bf16 = type(zero).__name__ == "BF16_Optimizer"
        flats = zero.bf16_groups_flat if bf16 else zero.bit16_groups_flat
        weights: dict[str, Tensor] = {}
        first_moments: dict[str, Tensor] = {}
        for flat, group in zip(flats, self.optimizer.param_groups, strict=True):
            (partition,) = group["params"]
            state = self.optimizer.state.get(partition, {})
            for found, part in (
                (weights, partition.detach()),
                (first_moments, state.get("exp_avg", torch.zeros_like(partition))),
            ):
                parts = [torch.empty_like(part) for _ in range(COUNT)]
                dist.all_gather(parts, part.detach().contiguous())
                joined = torch.cat(parts)
                for name, p in self.module.named_parameters():
                    if p.untyped_storage().data_ptr() == flat.untyped_storage().data_ptr():
                        start = p.storage_offset() - flat.storage_offset()
                        found[name] = joined[start : start + p.numel()].reshape(p.shape)
        names = [name for name, p in self.module.named_parameters() if p.requires_grad]
        return {
            "weights": {name: weights[name].clone() for name in names},
            "model": {name: p.detach().clone() for name, p in self.module.named_parameters()},
            "exp_avg": {name: first_moments[name].clone() for name in names},
            "skipped": int(self.optimizer.skipped_steps) + self.engine.skipped_steps,
        }


Start = Callable[..., Any]
"""``Alone`` or ``Partitioned`` for one way."""


# -- the columns of a table, each the same for one process and for two -----------------------------------------------


def initial(module: nn.Module) -> Any:
    return "init"


def step(start: Start) -> Outcome:
    """AdamW's step, with weight decay and two groups of parameters."""
    return start().train(range(STEPS)).outcome()


def clip(start: Start) -> Outcome:
    """Clipping to a global norm that leaves out what is masked and frozen, with one group: `max_grad_norm`."""
    run = start(one_group=True, max_grad_norm=CLIP, masked=True, frozen=FROZEN)
    return run.train(range(STEPS)).outcome()


def skip(start: Start) -> Outcome:
    """Leaving out a step with an inf, which one process has, with one group: `skip_nonfinite`."""
    return start(one_group=True, skip_nonfinite=True).train(range(STEPS), spoilt=True).outcome()


def anchor(start: Start) -> Outcome:
    """The pull to the first weights: `anchor="init"`."""
    return start(anchor=initial, decays=(ANCHOR_DECAY, REST_ANCHOR_DECAY)).train(range(STEPS)).outcome()


def masked(start: Start) -> Outcome:
    """Update masks of rows and of elements."""
    return start(masked=True).train(range(STEPS)).outcome()


def freeze(start: Start) -> Outcome:
    """A frozen layer and a frozen tensor."""
    return start(frozen=FROZEN).train(range(STEPS)).outcome()


ALL: dict[str, Any] = {
    "anchor": initial,
    "decays": (ANCHOR_DECAY, REST_ANCHOR_DECAY),
    "masked": True,
    "frozen": FROZEN,
}


def everything(start: Start) -> Outcome:
    """Anchor, masks and frozen parameters together."""
    return start(**ALL).train(range(STEPS)).outcome()


def carried(start: Start) -> Outcome:
    """The same, of an optimizer that has them before DeepSpeed comes."""
    return start(**ALL, carried=True).train(range(STEPS)).outcome()


def snapshot(module: nn.Module) -> Anchor:
    return Anchor.snapshot(module)


def carried_snapshot(start: Start) -> Outcome:
    """The same with an anchor from before DeepSpeed rounds the weights, which is not rounded."""
    return start(**{**ALL, "anchor": snapshot}, carried=True).train(range(STEPS)).outcome()


# -- others, the same for one process and for two --------------------------------------------------------------------


def clipped_by_deepspeed(start: Start) -> Outcome:
    """DeepSpeed's own clipping, as in one process that clips before the step: it counts what is masked, too."""
    return start(**ALL, clipping=CLIP).train(range(STEPS)).outcome()


def in_bfloat16(module: nn.Module) -> Anchor:
    return Anchor.snapshot(module, dtype=torch.bfloat16)


def narrow_anchor(start: Start) -> Outcome:
    """An anchor that is kept in bfloat16."""
    return start(**{**ALL, "anchor": in_bfloat16}, anchor_mode="l2").train(range(STEPS)).outcome()


def in_a_file(module: nn.Module) -> Anchor:
    path = FOLDER / f"weights of {os.getpid()}.safetensors"
    save_file({name: p.detach().clone() for name, p in module.named_parameters()}, path)
    return Anchor.from_safetensors(path, module)


def anchor_in_a_file(start: Start) -> Outcome:
    """Each process reads the tensors of its part of the file."""
    return start(**{**ALL, "anchor": in_a_file}).train(range(STEPS)).outcome()


def weighted(module: nn.Module) -> Anchor:
    """All of the matrices but the head's, by importance; of the rest the norm."""
    importance = {name: 100.0 * (37.0 * p.detach().float()).sin().square() for name, p in module.named_parameters()}
    return Anchor.snapshot(module, exclude=["head", "body.bias"]).with_importance(importance)


def importance(start: Start) -> Outcome:
    """An anchor with an importance may hold a part of a group: what it lacks is free."""
    return start(**{**ALL, "anchor": weighted}).train(range(STEPS)).outcome()


def of_matrices(module: nn.Module) -> Anchor:
    return Anchor.snapshot(module, exclude=[name for name, p in module.named_parameters() if p.dim() == 1])


def free_group(start: Start) -> Outcome:
    """An anchor that has nothing of one of the groups."""
    return start(anchor=of_matrices, decays=(ANCHOR_DECAY, 0.0)).train(range(STEPS)).outcome()


def unattached(start: Start) -> Outcome:
    """AdamW's step alone needs no call."""
    return start(attached=False).train(range(STEPS)).outcome()


COLUMNS: dict[str, Callable[[Start], Outcome]] = {
    "step": step,
    "clip": clip,
    "skip": skip,
    "anchor": anchor,
    "masks": masked,
    "freeze": freeze,
}
OTHERS: dict[str, Callable[[Start], Outcome]] = {
    f.__name__: f
    for f in (
        everything,
        carried,
        carried_snapshot,
        clipped_by_deepspeed,
        narrow_anchor,
        anchor_in_a_file,
        importance,
        free_group,
        unattached,
    )
}
EVERY_WAY = ("everything", "carried_snapshot", "clipped_by_deepspeed")
"""The scenarios for each configuration; the rest are for ZeRO-2."""
ROUNDED = ("clipped_by_deepspeed",)
"""Those in which DeepSpeed's float32 norm rounds in another order; all others are compared bit for bit."""
CELLS_OF = "ZeRO-2, bfloat16"
"""The way of the table's row: in float32 it would be DeepSpeed itself that leaves out a step with an inf."""


# -- checkpoints -----------------------------------------------------------------------------------------------------


def resume(start: Start) -> Outcome:
    """Save in the middle; load with other weights, in an optimizer that knows of no anchor, mask or frozen tensor."""
    from fastft.integrations.deepspeed import attach

    folder = str(FOLDER / "checkpoint")
    start(**ALL).train(range(HALF)).engine.save_checkpoint(folder, tag="half")
    dist.barrier()
    run = start(seed=1)
    run.engine.load_checkpoint(folder, tag="half")
    attach(run.engine)  # which leaves everything as it was loaded
    return run.train(range(HALF, STEPS)).outcome()


def resharded(start: Start) -> Outcome:
    """Load the same checkpoint with another number of processes."""
    run = start(**ALL)
    run.engine.load_checkpoint(str(FOLDER / "checkpoint"), tag="half")
    return run.train(range(HALF, STEPS)).outcome()


def resharded_universal(start: Start) -> Outcome:
    """Load it after DeepSpeed's ds_to_universal has made a universal checkpoint of it."""
    run = start(**ALL, config={"checkpoint": {"load_universal": True}})
    run.engine.load_checkpoint(str(FOLDER / "universal"), tag="half")
    return run.train(range(HALF, STEPS)).outcome()


# -- what is refused -------------------------------------------------------------------------------------------------


def unattached_anchor(start: Start) -> Outcome:
    run = start(anchor=initial, carried=True, decays=(ANCHOR_DECAY, REST_ANCHOR_DECAY), attached=False)
    return run.train(range(STEPS)).outcome()


def unattached_masks(start: Start) -> Outcome:
    return start(masked=True, carried=True, attached=False).train(range(STEPS)).outcome()


def unattached_clip(start: Start) -> Outcome:
    return start(one_group=True, max_grad_norm=CLIP, attached=False).train(range(STEPS)).outcome()


def clip_in_groups(start: Start) -> Outcome:
    return start(max_grad_norm=CLIP).train(range(STEPS)).outcome()


def skip_in_groups(start: Start) -> Outcome:
    return start(skip_nonfinite=True).train(range(STEPS)).outcome()


def clipped_twice(start: Start) -> Outcome:
    return start(one_group=True, max_grad_norm=CLIP, clipping=CLIP).outcome()


def partly_anchored(start: Start) -> Outcome:
    return start(**{**ALL, "anchor": lambda module: Anchor.snapshot(module, exclude="head")}).outcome()


def selective(start: Start) -> Outcome:
    return start(anchor=initial, decays=(1.0, 1.0), anchor_mode="selective").outcome()


def eight_bits(start: Start) -> Outcome:
    return start(state_dtype="8bit").outcome()


def elastic(start: Start) -> Outcome:
    return start(config={"zero_optimization": {"stage": 2, "elastic_checkpoint": True}}).outcome()


def stage_0(start: Start) -> Outcome:
    return start(config={"zero_optimization": {"stage": 0}, "bf16": {"enabled": False}}).outcome()


def stage_3(start: Start) -> Outcome:
    return start(config={"zero_optimization": {"stage": 3}}).outcome()


def thawed(start: Start) -> Outcome:
    """A tensor that is frozen for a while."""
    from fastft.integrations.deepspeed import attach

    run = start(frozen=FROZEN)
    attach(run.engine, frozen=("embed", "norm"))  # nothing has stepped, and more may be frozen at any time
    attach(run.engine, frozen=FROZEN)
    run.train(range(HALF))
    attach(run.engine, frozen=["embed"])
    return run.train(range(HALF, STEPS)).outcome()


def wrong_names(start: Start) -> Outcome:
    from fastft.integrations.deepspeed import attach

    attach(start().engine, update_masks={"body.wieght": torch.ones(16, dtype=torch.bool)})
    return {}


def wrong_shapes(start: Start) -> Outcome:
    from fastft.integrations.deepspeed import attach

    attach(start().engine, update_masks={"body.weight": torch.ones(17, dtype=torch.bool)})
    return {}


def other_anchors(start: Start) -> Outcome:
    """A snapshot of a new head that each process has made for itself."""

    def own(module: nn.Module) -> Anchor:
        torch.manual_seed(RANK)
        nn.init.normal_(module.head.weight)
        return Anchor.snapshot(module)

    return start(**{**ALL, "anchor": own}, carried=True).outcome()


def another_model(start: Start) -> Outcome:
    from fastft.integrations.deepspeed import attach

    attach(start().engine, anchor=Anchor.snapshot(nn.Linear(3, 3)), anchor_decay=1.0)
    return {}


def no_anchor(start: Start) -> Outcome:
    from fastft.integrations.deepspeed import attach

    attach(start().engine, anchor_decay=1.0)
    return {}


def another_optimizer(start: Start) -> Outcome:
    import deepspeed

    from fastft.integrations.deepspeed import attach

    module = Model(0)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=WAYS["ZeRO-2"].whole_config())
    attach(engine)
    return {}


def no_engine(start: Start) -> Outcome:
    from fastft.integrations.deepspeed import attach

    attach(Model(0))
    return {}


def unfreezer(start: Start) -> Outcome:
    """An Unfreezer that opens one more layer after every two steps."""
    from fastft.unfreeze import GradualUnfreeze, Unfreezer

    run = start()
    names = ["embed", "body", "norm", "head", "fixed"]
    opened = Unfreezer(run.module, run.optimizer, GradualUnfreeze(every=2), groups=names, mode="freeze")
    for number in range(STEPS):
        run.train([number])
        opened.step()
    return run.outcome()


REFUSED: dict[str, Callable[[Start], Outcome]] = {
    f.__name__: f
    for f in (
        unattached_anchor,
        unattached_masks,
        unattached_clip,
        clip_in_groups,
        skip_in_groups,
        clipped_twice,
        partly_anchored,
        selective,
        eight_bits,
        elastic,
        stage_0,
        stage_3,
        thawed,
        wrong_names,
        wrong_shapes,
        other_anchors,
        another_model,
        no_anchor,
        another_optimizer,
        no_engine,
        unfreezer,
    )
}


# -- comparing -------------------------------------------------------------------------------------------------------

EXPECTED: dict[str, Callable[[Start], Outcome]] = {
    **COLUMNS,
    **OTHERS,
    "resume": everything,
    "resharded": everything,
    "resharded_universal": everything,
}
"""The run in one process that each scenario is to be equal to."""


def differences(found: Outcome, expected: Outcome, rounded: bool = False, where: str = "") -> list[str]:
    """Where an outcome differs from that of one process."""
    if found.keys() != expected.keys():
        return [f"{where}: expected {list(expected)}, got {list(found)}"]
    wrong = []
    for key, value in expected.items():
        place = f"{where} {key}".strip()
        if isinstance(value, dict):
            wrong += differences(found[key], value, rounded, place)
        elif isinstance(value, Tensor):
            tolerance = {"rtol": 1e-6, "atol": 1e-7} if rounded else {"rtol": 0.0, "atol": 0.0}
            if value.dtype == torch.bfloat16 and rounded:
                tolerance["rtol"] = 2**-7  # a unit in the last place
            try:
                torch.testing.assert_close(found[key], value, **tolerance)
            except AssertionError as error:
                wrong.append(f"{place}: {error}")
        elif found[key] != value:
            wrong.append(f"{place}: expected {value}, got {found[key]}")
    return wrong


def in_one_process(way: str, scenario: str) -> Outcome:
    return EXPECTED[scenario](lambda **arguments: Alone(WAYS[way], **arguments))


def row(results: Mapping[tuple[str, str], list[Any]]) -> dict[str, dict[str, str]]:
    """A row of the table of what holds with several processes: {column: cell}, as JSON takes it.

    A cell is ``{"outcome": "exact"}``, ``{"outcome": "refused", "sentence": ...}`` or ``{"outcome": "failed",
    "detail": ...}``.
    """
    columns = {
        **{name: name for name in COLUMNS},
        "clip, several groups": "clip_in_groups",
        "skip, several groups": "skip_in_groups",
        "unfreeze": "thawed",
        "Unfreezer": "unfreezer",
        "save and resume": "resume",
        "save on 2, resume on 1": "resharded",
        "save on 2, resume on 1, universal": "resharded_universal",
    }
    return {column: cell(CELLS_OF, scenario, results[CELLS_OF, scenario]) for column, scenario in columns.items()}


def cell(way: str, scenario: str, ranks: list[Any]) -> dict[str, str]:
    """One cell, out of all ranks' results."""
    sentences = {rank.get("refused") for rank in ranks}
    if len(sentences) == 1 and None not in sentences:
        return {"outcome": "refused", "sentence": ranks[0]["refused"]}
    if scenario not in EXPECTED:
        return {"outcome": "failed", "detail": f"expected to be refused in all processes, got {ranks}"}
    expected = in_one_process(way, scenario)
    wrong = [r["failed"] if "failed" in r else differences(r, expected, scenario in ROUNDED) for r in ranks]
    return {"outcome": "failed", "detail": f"{wrong}"} if any(wrong) else {"outcome": "exact"}


# -- processes -------------------------------------------------------------------------------------------------------

RANK = 0
COUNT = 1
FOLDER: Path


def scenarios(world: int) -> dict[tuple[str, str], Callable[[Start], Outcome]]:
    """{(way, scenario): function} of all that is run in so many processes."""
    if world == 1:
        return {(CELLS_OF, f.__name__): f for f in (resharded, resharded_universal)}
    shared = {**COLUMNS, **OTHERS}
    chosen = {(way, name): shared[name] for way in WAYS for name in EVERY_WAY}
    chosen.update({("ZeRO-2", name): f for name, f in shared.items()})
    chosen.update({(CELLS_OF, name): f for name, f in {**COLUMNS, "resume": resume, **REFUSED}.items()})
    return chosen


def start_processes(folder: Path, world: int = WORLD) -> dict[tuple[str, str], list[Any]]:
    """The results of all scenarios, one for each rank: an outcome, or why there is none."""
    paths = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "WORLD_SIZE": str(world),
    }
    logs = [folder / f"log_{world}_{rank}.txt" for rank in range(world)]
    run_together(
        (
            [sys.executable, __file__, str(rank), str(world), str(folder)],
            {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            log,
        )
        for rank, log in enumerate(logs)
    )
    ranks = [torch.load(folder / f"results_{world}_{rank}.pt", weights_only=False) for rank in range(world)]
    return {name: [rank[name] for rank in ranks] for name in ranks[0]}


def to_universal(source: Path, target: Path) -> None:
    """DeepSpeed's own conversion of a checkpoint's folder."""
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    command += ["--input_folder", str(source), "--num_extract_workers", "1"]
    command += ["--output_folder", str(target), "--num_merge_workers", "1"]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def result_of(way: Way, scenario: Callable[[Start], Outcome]) -> Any:
    """The outcome; or ``{"refused": sentence, "type": of the error}``, or ``{"failed": traceback}`` of any other."""
    runs: list[Partitioned] = []

    def start(**arguments: Any) -> Partitioned:
        run = Partitioned(way, **arguments)
        kind = type(run.zero).__name__
        assert kind == way.kind or "config" in arguments, f"expected {way.kind}, got {kind}"
        runs.append(run)
        return run

    try:
        return scenario(start)
    except Exception as error:  # the other scenarios shall still be heard
        if isinstance(error, (ValueError, TypeError)) or type(error).__name__ == "ZeRORuntimeException":
            return {"refused": str(error), "type": type(error).__name__}
        return {"failed": traceback.format_exc()}
    finally:
        for run in runs:
            run.engine.destroy()


def imported() -> Any:
    """The package, with the processes that torch.distributed has."""
    import deepspeed

    # Otherwise it compiles an all_reduce over shared memory first.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo")
    return deepspeed


def main(rank: int, world: int, folder: Path) -> None:
    global RANK, COUNT, FOLDER
    RANK, COUNT, FOLDER = rank, world, folder
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store_{world}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=60),
    )
    imported()
    results = {}
    for (way, name), scenario in scenarios(world).items():
        print(f"== {way}: {name}", flush=True)
        results[way, name] = result_of(WAYS[way], scenario)
        gc.collect()
        dist.barrier()
    torch.save(results, folder / f"results_{world}_{rank}.pt")
    end_together()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
