"""The features of the table as runs over a few steps, the same for one process and for several."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.amp import GradScaler

from distributed.given_gradients import STEPS, gradients, model
from distributed.ways import Way, pieces, wait_for_all
from fastft import Anchor
from fastft.unfreeze import GradualUnfreeze, Unfreezer

Outcome = dict[str, Any]
"""Whole tensors and numbers: equal in every process, and to those of one process."""

HALF = STEPS // 2
"""Steps before a checkpoint is written."""


class Run:
    """A model wrapped in one way, with its optimizer."""

    def __init__(self, way: Way, seed: int = 0, layers: Collection[str] = (), snapshot: bool = False) -> None:
        """Make and wrap the model.

        Args:
            way: in which.
            seed: of its values.
            layers: as ``model`` takes them.
            snapshot: whether to keep an anchor of the model as it is before it is wrapped.
        """
        self.way = way
        module = model(way.dtype, seed, layers)
        self.snapshot = Anchor.snapshot(module) if snapshot else None
        self.shapes = {name: p.shape for name, p in module.named_parameters()}
        self.wrapped = way.wrap(module)
        self.before: list[Tensor] | None = pieces(self.wrapped.parameters())
        self.norms: list[float | None] = []
        self.unfreezer: Unfreezer | None = None
        self.scaler: GradScaler | None = None
        self.scales: list[float] = []

    def begin(self, **options: Any) -> Run:
        """Make the optimizer."""
        self.optimizer = self.way.optimizer(self.wrapped, **options)
        return self

    def train(self, steps: Iterable[int], *, spoilt: bool = False, exact: bool = True) -> None:
        """Steps with given gradients; see :func:`distributed.given_gradients.gradients`."""
        for step in steps:
            grads = gradients(self.shapes, self.way.dtype, step, spoilt=spoilt, exact=exact)
            self.way.give(self.wrapped, grads, self.scaler)
            self.before = pieces(self.wrapped.parameters())
            if self.scaler is None:
                self.way.step(self.wrapped, self.optimizer)
            else:
                self.scaler.step(self.optimizer)
                self.scaler.update()
                self.scales.append(self.scaler.get_scale())
            norm = self.way.core(self.optimizer).grad_norm
            self.norms.append(None if norm is None else float(norm))
            self.optimizer.zero_grad()
            if self.unfreezer is not None:
                self.unfreezer.step()

    def load(self, folder: Path) -> None:
        """Load what was saved, the weights too."""
        self.before = None
        self.way.load(self.wrapped, self.optimizer, folder)
        self.before = pieces(self.wrapped.parameters())

    def wrote(self) -> bool:
        """Whether the call or step that was interrupted has written a parameter; loading may."""
        return self.before is not None and not all(map(torch.equal, pieces(self.wrapped.parameters()), self.before))

    def freeze(self, names: Iterable[str], frozen: bool = True) -> None:
        """Freeze, or unfreeze, the parameters whose name begins with one of these."""
        self.before = pieces(self.wrapped.parameters())
        self.way.freeze(self.wrapped, self.optimizer, tuple(names), frozen)

    def set_masks(self, opposite: bool = False) -> None:
        """Two of rows, one of elements, all of whole shapes."""
        made = {name: mask(self.shapes[name]) ^ opposite for name, mask in MASKS.items()}
        self.way.set_masks(self.wrapped, self.optimizer, made)

    def outcome(self) -> Outcome:
        found = {
            "parameters": self.way.whole(self.wrapped),
            "norms": self.norms,
            "skipped": int(self.way.core(self.optimizer).skipped_steps),
        }
        if self.way.dtype == torch.bfloat16:
            found["master weights"] = self.way.whole_master_weights(self.wrapped, self.optimizer)
        return found


MASKS: dict[str, Callable[[Any], Tensor]] = {
    "first.weight": lambda shape: torch.arange(shape[0]) % 3 > 0,
    "norm.bias": lambda shape: torch.arange(shape[0]) > 6,
    "second.weight": lambda shape: torch.arange(shape.numel()).reshape(shape) % 2 == 0,
}
Start = Callable[..., Run]
"""``Run`` for one way, as the caller wants it kept track of."""

# -- the columns -------------------------------------------------------------------------------------------------


def step(start: Start, folder: Path) -> Outcome:
    """AdamW's step, with weight decay and two groups of parameters."""
    run = start().begin()
    run.train(range(STEPS))
    return run.outcome()


def clip(start: Start, folder: Path) -> Outcome:
    """Clipping to a global norm: `max_grad_norm`."""
    run = start().begin(max_grad_norm=1.5)
    run.train(range(STEPS))
    other = start().begin(max_grad_norm=1.5)
    other.train(range(1), exact=False)
    return {**run.outcome(), "rounded": {"parameters": other.way.whole(other.wrapped), "norms": other.norms}}


def skip(start: Start, folder: Path) -> Outcome:
    """Leaving out a step with an inf, which lies in one process only: `skip_nonfinite`."""
    run = start().begin(skip_nonfinite=True)
    run.train(range(STEPS), spoilt=True)
    return run.outcome()


def grad_scaler(start: Start, folder: Path) -> Outcome:
    """Loss scaling, with clipping and such an inf: `torch.amp.GradScaler`, with FSDP1 `ShardedGradScaler`."""
    run = start().begin(max_grad_norm=1.5)
    run.scaler = run.way.scaler()
    run.train(range(STEPS), spoilt=True)
    # Where a wrapper stands between scaler and optimizer, the scaler itself leaves the step out: nothing is counted.
    return {"parameters": run.way.whole(run.wrapped), "scales": run.scales}


def anchor(start: Start, folder: Path) -> Outcome:
    """The pull to the first weights: `anchor="init"`."""
    run = start().begin(anchor="init")
    run.train(range(STEPS))
    return run.outcome()


def anchor_file(start: Start, folder: Path) -> Outcome:
    """The pull to weights in a file, saved and resumed in the middle: `Anchor.from_safetensors`."""
    run = start()
    run.begin(anchor=Anchor.from_safetensors(folder / WEIGHTS, run.wrapped))
    run.train(range(HALF))
    (folder / "with_file").mkdir(exist_ok=True)
    run.way.save(run.wrapped, run.optimizer, folder / "with_file")
    wait_for_all()
    other = start(seed=1)
    other.begin(anchor=Anchor.from_safetensors(folder / WEIGHTS, other.wrapped))
    other.load(folder / "with_file")
    other.train(range(HALF, STEPS))
    return other.outcome()


WEIGHTS = "weights.safetensors"
"""A file of other weights of the model."""


def write_weights(way: Way, folder: Path) -> None:
    """Write :data:`WEIGHTS`."""
    save_file({name: p.detach() for name, p in model(way.dtype, seed=2).named_parameters()}, folder / WEIGHTS)


def masks(start: Start, folder: Path) -> Outcome:
    """Update masks of rows and of elements, with clipping: `set_update_mask`."""
    run = start().begin(max_grad_norm=1.5)
    run.set_masks()
    run.train(range(STEPS))
    return run.outcome()


def freeze(start: Start, folder: Path) -> Outcome:
    """Frozen layers and tensors, with clipping: `freeze`."""
    run = start().begin(max_grad_norm=1.5)
    run.freeze(frozen(run))
    run.train(range(STEPS))
    return run.outcome()


def unfreeze(start: Start, folder: Path) -> Outcome:
    """The same, with a layer that is frozen for a while only: `unfreeze`."""
    run = start().begin(max_grad_norm=1.5)
    run.freeze(frozen(run))
    run.train(range(HALF))
    run.freeze(["norm."], frozen=False)
    run.train(range(HALF, STEPS))
    return run.outcome()


def unfreezer(start: Start, folder: Path) -> Outcome:
    """An `Unfreezer` that opens one more layer after every two steps, with clipping."""
    run = start().begin(max_grad_norm=1.5)
    run.unfreezer = Unfreezer(run.wrapped, run.optimizer, GradualUnfreeze(every=2), mode=run.way.unfreezer_mode)
    run.train(range(STEPS))
    return run.outcome()


def resume(start: Start, folder: Path) -> Outcome:
    """Saved in the middle, with anchor, masks and frozen tensors; gone on with from other weights, nothing frozen."""
    run = start().begin(**RESUMED)
    restrict(run)
    run.train(range(HALF))
    run.way.save(run.wrapped, run.optimizer, folder)
    wait_for_all()
    return resumed(start, folder)


def rest_of(run: Run, folder: Path) -> Outcome:
    """Go on from what was saved in the middle."""
    run.load(folder)
    run.train(range(HALF, STEPS))
    return run.outcome()


def resumed(start: Start, folder: Path) -> Outcome:
    """The rest of a run that was saved, with other weights, and an optimizer that knows of no frozen tensor.

    It knows of no mask either; or, for checkpoints that are read into what is there already, of the opposite ones.
    """
    run = start(seed=1).begin(**RESUMED)
    if run.way.takes_masks and run.way.masks_before_loading:
        run.set_masks(opposite=True)
    return rest_of(run, folder)


def given_again(start: Start, folder: Path) -> Outcome:
    """The same, where all that a checkpoint does not bring back is given to the first weights."""
    run = start().begin(**RESUMED)
    restrict(run)
    return rest_of(run, folder)


def without_masks(start: Start, folder: Path) -> Outcome:
    """A resumed run where nobody has given the optimizer masks that the checkpoint can be read into."""
    run = start(seed=1).begin(**RESUMED)
    return rest_of(run, folder)


def uninterrupted(start: Start, folder: Path) -> Outcome:
    """The run of which :func:`resume` and :func:`resumed` give the last steps."""
    run = start().begin(**RESUMED)
    restrict(run)
    run.train(range(STEPS))
    del run.norms[:HALF]
    return run.outcome()


RESUMED: dict[str, Any] = {"anchor": "init", "max_grad_norm": 1.5}


def restrict(run: Run) -> None:
    run.freeze(frozen(run))
    if run.way.takes_masks:
        run.set_masks()


def frozen(run: Run) -> list[str]:
    """A layer, and one tensor of another where that can be named."""
    return ["norm."] if run.way.flat else ["norm.", "second.bias"]


def mask_that_fits_a_piece(start: Start, folder: Path) -> Outcome:
    """A mask of rows whose shape is by chance that of what each of four processes holds: one row of four elements."""
    run = start(layers=["square"]).begin()
    (p,) = run.way.own_parameters(run.wrapped, run.optimizer).values()
    run.way.core(run.optimizer).set_update_mask(p, torch.tensor([True, False, True, True]))
    run.train(range(STEPS))
    return run.outcome()


def anchor_made_before_wrapping(start: Start, folder: Path) -> Outcome:
    """An anchor of the model as it was before it was wrapped: `Anchor.snapshot`."""
    run = start(snapshot=True)
    run.begin(anchor=run.snapshot)
    run.train(range(STEPS))
    return run.outcome()


def more_processes_than_tensors(start: Start, folder: Path) -> Outcome:
    """A model of two parameters, so that with ZeRO two of four processes have none; with both kinds of anchors."""
    run = start(layers=["second"]).begin(max_grad_norm=1.5, skip_nonfinite=True, anchor="init")
    run.train(range(STEPS), spoilt=True)
    other = start(layers=["second"], snapshot=True)
    other.begin(anchor=other.snapshot)
    other.train(range(STEPS))
    return {**run.outcome(), "with a snapshot": other.outcome()}


def clip_in_two_groups(start: Start, folder: Path) -> Outcome:
    """Clipping to the norm of two groups of parameters: `max_grad_norm`."""
    run = start().begin(max_grad_norm=1.5, together=False)
    run.train(range(STEPS))
    return run.outcome()


def skip_in_two_groups(start: Start, folder: Path) -> Outcome:
    """Leaving out a step for an inf in one of two groups of parameters: `skip_nonfinite`."""
    run = start().begin(skip_nonfinite=True, together=False)
    run.train(range(STEPS), spoilt=True)
    return run.outcome()


Scenario = Callable[[Start, Path], Outcome]
COLUMNS: dict[str, Scenario] = {
    "step": step,
    "clip": clip,
    "skip": skip,
    "GradScaler": grad_scaler,
    "anchor": anchor,
    "anchor file": anchor_file,
    "masks": masks,
    "freeze": freeze,
    "unfreeze": unfreeze,
    "Unfreezer": unfreezer,
    "save and resume": resume,
}
RESHARD = "reshard"
RESHARD_MEANING = "The same, saved by four processes and gone on with in two, and in one with the wrapper and without."
RESUMING = ("save and resume", "resume without masks", RESHARD)
OTHERS: dict[str, Scenario] = {
    "anchor made before wrapping": anchor_made_before_wrapping,
    "more processes than tensors": more_processes_than_tensors,
    "mask that fits a piece": mask_that_fits_a_piece,
    "resume without masks": without_masks,
    "clip in two groups": clip_in_two_groups,
    "skip in two groups": skip_in_two_groups,
}
"""Scenarios that are no column of the table, for ways that ask for them."""
REFERENCES: dict[str, Scenario] = {**COLUMNS, **OTHERS, **dict.fromkeys(RESUMING, uninterrupted)}
"""The same in one process."""

# -- comparing ---------------------------------------------------------------------------------------------------


def differences(found: Any, expected: Any, where: str = "") -> list[str]:
    """Where an outcome differs from that of one process: no tolerance, but for the part called "rounded"."""
    if isinstance(expected, dict):
        if not isinstance(found, dict) or found.keys() != expected.keys():
            return [f"{where}: expected {list(expected)}, got {list(found)}"]
        compare = {key: rounding_apart if key == "rounded" else differences for key in expected}
        return [line for key in expected for line in compare[key](found[key], expected[key], f"{where} {key}".strip())]
    if isinstance(expected, Tensor):
        kinds = [f"{tensor.dtype} of {list(tensor.shape)}" for tensor in (expected, found)]
        if kinds[0] != kinds[1]:
            return [f"{where}: expected {kinds[0]}, got {kinds[1]}"]
        wrong = found != expected
        if not bool(wrong.any()):
            return []
        most = (found.double() - expected.double()).abs().max().item()
        return [f"{where}: {int(wrong.sum())} of {wrong.numel()} elements, by up to {most:.3g}"]
    if isinstance(expected, list):
        return [] if repr(found) == repr(expected) else [f"{where}: expected {expected}, got {found}"]
    return [] if found == expected else [f"{where}: expected {expected}, got {found}"]


MOST_EPS = 4
"""How many times their dtype's eps parameters may differ after one step with a norm that is one unit off."""


def rounding_apart(found: Any, expected: Any, where: str) -> list[str]:
    """The same, for a norm whose sum rounds: it may be one unit in the last place off, and parameters little more."""
    problems = []
    for norm, wanted in zip(found["norms"], expected["norms"], strict=True):
        if abs(norm - wanted) > math.ulp(wanted):
            problems.append(f"{where} norm: expected {wanted!r}, got {norm!r}")
    for name, p in expected["parameters"].items():
        gap = (found["parameters"][name] - p).abs()
        if bool((gap > MOST_EPS * torch.finfo(p.dtype).eps * p.abs()).any()):
            problems.append(f"{where} {name}: by up to {gap.max().item():.3g}")
    return problems
