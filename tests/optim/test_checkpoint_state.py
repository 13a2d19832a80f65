"""Anchor, masks and flags in each parameter's state: the way through DCP, torch's AdamW, copies and direct writes.

DCP is ``torch.distributed.checkpoint``. In one process; ``tests/distributed`` has it in several.
"""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from contract_cases import (
    CARRIED,
    anchor_in_file,
    assert_same,
    carried,
    carried_by,
    flags_of,
    give_grads,
    metadata_of,
    names_in_file,
    net,
    state_of,
    weighted_anchor,
)
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)

import fastft
from fastft import Anchor
from fastft.optim import step_in_backward
from fastft.optim.checkpoint import Has, flags_in

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def in_few_bits() -> nn.Sequential:
    """bfloat16, and the first weight large enough for moments of 8 bits; the names are those of ``net``."""
    model = nn.Sequential(nn.Linear(128, 40), nn.LayerNorm(40), nn.Tanh(), nn.Linear(40, 3))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.1)
    return model.to(torch.bfloat16)


def weighted_in_file(model: nn.Module, folder: Path) -> Anchor:
    importance = {name: p.detach().square() * 100 for name, p in model.named_parameters()}
    return anchor_in_file(model, folder).with_importance(importance)


KINDS: dict[str, dict[str, Any]] = {
    "free": {"anchor": lambda *_: None, "anchor_decay": 0.0},
    "init": {"anchor": lambda *_: "init"},
    "snapshot": {"anchor": lambda model, _: Anchor.snapshot(model, dtype=torch.bfloat16, exclude="3.*")},
    "file": {"anchor": anchor_in_file},
    "weighted": {"anchor": weighted_anchor},
    "weighted_in_file": {"anchor": weighted_in_file},
    "few_bits": {
        "anchor": lambda *_: "init",
        "state_dtype": "8bit",
        "extra_bits": 16,
        "amsgrad": False,
    },
    "stochastic": {
        "anchor": lambda *_: "init",
        "state_dtype": torch.float32,
        "extra_bits": 8,
        "rounding": "stochastic",
    },
}
IN_FEW_BITS = ("few_bits", "stochastic")
each_kind = pytest.mark.parametrize("kind", KINDS)


class Run:
    """A model under all that a checkpoint has to bring back."""

    def __init__(self, kind: str, folder: Path, *, shift: float = 0.0, named: bool = True, **options: Any) -> None:
        self.model = in_few_bits() if kind in IN_FEW_BITS else net()
        with torch.no_grad():
            for p in self.model.parameters():
                p.add_(shift)
        chosen = {"amsgrad": True, "anchor_decay": 4.0, **KINDS[kind], **options}
        if callable(chosen["anchor"]):
            chosen["anchor"] = chosen["anchor"](self.model, folder)
        params: list[Any] = list(self.model.named_parameters() if named else self.model.parameters())
        groups = [{"params": params[:2], "lr": 0.03}, {"params": params[2:], "anchor_mode": "l2"}]
        self.optimizer = fastft.AdamW(
            groups, lr=1e-2, weight_decay=0.1, max_grad_norm=2.0, skip_nonfinite=True, **chosen
        )

    def restrict(self) -> Run:
        """Masks by rows and by elements, and one parameter that never steps."""
        first, last = self.model[0].weight, self.model[3].weight
        self.optimizer.set_update_mask(first, torch.arange(len(first)) % 3 > 0)
        self.optimizer.set_update_mask(last, torch.arange(last.numel()).reshape(last.shape) % 2 == 0)
        self.optimizer.freeze(self.model[1].weight)
        return self

    def restrict_otherwise(self) -> Run:
        """Masks of the same forms, as DCP wants them for a template, of other values; others frozen."""
        first, last = self.model[0].weight, self.model[3].weight
        self.optimizer.set_update_mask(first, torch.ones(len(first), dtype=torch.bool))
        self.optimizer.set_update_mask(last, torch.zeros(last.shape, dtype=torch.bool))
        self.optimizer.freeze(self.model[3].bias)
        return self

    def train(self, steps: range) -> Run:
        """Step 1 is skipped for a gradient that is not finite."""
        for step in steps:
            give_grads(self.model.parameters(), step)
            if step == 1:
                self.model[3].weight.grad[0, 0] = float("nan")
            self.optimizer.step()
        return self

    def saved(self, **options: Any) -> dict[str, Any]:
        found = get_optimizer_state_dict(self.model, self.optimizer, options=StateDictOptions(**options))
        return copy.deepcopy(found)

    def load(self, saved: dict[str, Any], **options: Any) -> Run:
        set_optimizer_state_dict(self.model, self.optimizer, saved, options=StateDictOptions(**options))
        return self

    def take_weights(self, model: nn.Module) -> Run:
        self.model.load_state_dict(model.state_dict())
        return self


def stopped(kind: str, folder: Path, steps: int, **options: Any) -> tuple[Run, nn.Module]:
    """A run that has taken steps, after the last of which one more parameter was frozen; and its weights."""
    run = Run(kind, folder, **options).restrict().train(range(steps))
    run.optimizer.freeze(run.model[1].bias)
    return run, copy.deepcopy(run.model)


def assert_same_run(one: Run, other: Run) -> None:
    assert_same(list(one.model.parameters()), list(other.model.parameters()), "parameters")
    assert_same(state_of(one.optimizer), state_of(other.optimizer), "state")
    assert_same(one.optimizer.state_dict(), other.optimizer.state_dict(), "state dict")


WAYS: dict[str, dict[str, Any]] = {
    "nested": {},
    "flat": {"flatten_optimizer_state_dict": True},
    "full": {"full_state_dict": True},
    "to_the_host": {"cpu_offload": True},
}
each_way = pytest.mark.parametrize("way", WAYS)
FORMS = {"nested": WAYS["nested"], "flat": WAYS["flat"]}
each_form = pytest.mark.parametrize("form", FORMS)
each_start = pytest.mark.parametrize("steps", [0, 3], ids=["before_the_first_step", "after_three"])


# -- through DCP -----------------------------------------------------------------------------------------


@each_start
@each_way
@each_kind
def test_all_of_it_comes_back(kind: str, way: str, steps: int, tmp_path: Path) -> None:
    """Into an optimizer over other weights, with other masks and another frozen set."""
    run, weights = stopped(kind, tmp_path, steps)
    saved = run.saved(**WAYS[way])
    run.train(range(steps, steps + 3))
    resumed = Run(kind, tmp_path, shift=0.5).restrict_otherwise().load(saved, **WAYS[way]).take_weights(weights)
    assert int(resumed.optimizer.skipped_steps) == (steps > 0)
    assert_same_run(resumed.train(range(steps, steps + 3)), run)
    taken = {name: float(state["step"]) for name, state in by_name(resumed).items() if state}
    moved = dict.fromkeys(("0.weight", "0.bias", "3.weight", "3.bias"), 5.0 if steps else 2.0)
    assert taken == {**moved, **({"1.bias": 2.0} if steps else {})}


def by_name(run: Run) -> dict[str, Any]:
    names = [name for name, _ in run.model.named_parameters()]
    return dict(zip(names, state_of(run.optimizer), strict=True))


@each_start
@pytest.mark.parametrize("way", ["nested", "full"])
@pytest.mark.parametrize("kind", ["init", "snapshot", "weighted", "file", "few_bits"])
def test_a_nested_dict_brings_what_the_optimizer_does_not_have(kind: str, way: str, steps: int, tmp_path: Path) -> None:
    """No masks, no anchor: not even of other values."""
    run, weights = stopped(kind, tmp_path, steps)
    saved = run.saved(**WAYS[way])
    resumed = Run(kind, tmp_path, shift=0.5, anchor=None, anchor_decay=0.0).load(saved, **WAYS[way])
    resumed.take_weights(weights)
    run.train(range(steps, steps + 3))
    assert_same_run(resumed.train(range(steps, steps + 3)), run)


@each_start
@each_form
@each_kind
def test_all_of_it_comes_back_from_disk(kind: str, form: str, steps: int, tmp_path: Path) -> None:
    """Read into the tensors that the resuming optimizer has."""
    options = StateDictOptions(**FORMS[form])
    run, _ = stopped(kind, tmp_path, steps)
    saved = dict(zip(("model", "optimizer"), get_state_dict(run.model, run.optimizer, options=options), strict=True))
    dcp.save(saved, checkpoint_id=tmp_path / "checkpoint", no_dist=True)
    run.train(range(steps, steps + 3))
    resumed = Run(kind, tmp_path, shift=0.5).restrict_otherwise()
    into = dict(
        zip(("model", "optimizer"), get_state_dict(resumed.model, resumed.optimizer, options=options), strict=True)
    )
    dcp.load(into, checkpoint_id=tmp_path / "checkpoint", no_dist=True)
    set_state_dict(
        resumed.model,
        resumed.optimizer,
        model_state_dict=into["model"],
        optim_state_dict=into["optimizer"],
        options=options,
    )
    if kind not in ("free", "file", "weighted_in_file"):
        start = Run(kind, tmp_path).optimizer.anchor
        anchor = resumed.optimizer.anchor
        assert start is not None and anchor is not None
        assert_same({name: anchor[name] for name in anchor}, {name: start[name] for name in start}, "the anchor")
    assert_same_run(resumed.train(range(steps, steps + 3)), run)


@each_form
def test_unnamed_optimizers_too(form: str, tmp_path: Path) -> None:
    run, weights = stopped("weighted_in_file", tmp_path, 3, named=False)
    saved = run.saved(**FORMS[form])
    resumed = Run("weighted_in_file", tmp_path, shift=0.5, named=False).restrict_otherwise()
    resumed.load(saved, **FORMS[form]).take_weights(weights)
    run.train(range(3, 6))
    assert_same_run(resumed.train(range(3, 6)), run)


@each_form
@pytest.mark.parametrize("kind", ["init", "snapshot", "file"])
def test_a_checkpoint_takes_a_run_back_that_has_gone_on(kind: str, form: str, tmp_path: Path) -> None:
    """Into the optimizer that saved it, after more steps and with another frozen set.

    A flat dict is read by the keys that the optimizer has just then: it has to be looked at first.
    """
    run, weights = stopped(kind, tmp_path, 3)
    saved = run.saved(**FORMS[form])
    whole = Run(kind, tmp_path).restrict().train(range(3))
    whole.optimizer.freeze(whole.model[1].bias)
    run.train(range(3, 6)).optimizer.unfreeze(run.model[1].weight)
    run.optimizer.set_update_mask(run.model[0].weight, torch.ones(17, dtype=torch.bool))
    if form == "flat":
        before = copy.deepcopy((carried(run.optimizer.state_dict()), state_of(run.optimizer)))
        with pytest.raises(
            ValueError,
            match=r"^state_dict: expected all that was saved, got torch's part: with flatten_optimizer_state_dict, DCP "
            r"reads what the optimizer holds at that moment; call get_optimizer_state_dict with the same options just "
            r"before$",
        ):
            run.load(saved, **FORMS[form])
        assert_same((carried(run.optimizer.state_dict()), state_of(run.optimizer)), before, "after the error")
        run.saved(**FORMS[form])
    run.load(saved, **FORMS[form]).take_weights(weights)
    assert_same_run(run.train(range(3, 6)), whole.train(range(3, 6)))


# -- the state that DCP finds ----------------------------------------------------------------------------


@each_start
@pytest.mark.parametrize("restricted", [True, False])
@each_kind
def test_a_look_at_an_optimizer_changes_nothing(kind: str, restricted: bool, steps: int, tmp_path: Path) -> None:
    """It has state then for every parameter, and in that all that it has; which is gone at the next step."""
    whole, seen = Run(kind, tmp_path), Run(kind, tmp_path)
    for one in (whole, seen):
        if restricted:
            one.restrict()
        one.train(range(steps))
    before = copy.deepcopy(list(seen.model.parameters()))
    for way in WAYS.values():
        seen.saved(**way)
    found = seen.saved()["state"]
    assert {name: float(state["step"]) for name, state in found.items()} == {
        name: 0.0 if steps == 0 or (restricted and name == "1.weight") else 2.0
        for name, _ in seen.model.named_parameters()
    }
    assert {name for name, state in found.items() if "update_mask" in state} == (
        {"0.weight", "3.weight"} if restricted else set()
    )
    frozen = {name for name, state in found.items() if flags_in(state) & Has.FROZEN}
    assert frozen == ({"1.weight"} if restricted else set())
    assert_same(list(seen.model.parameters()), before, "parameters")
    assert all((p.grad is None) == (steps == 0) for p in seen.model.parameters())
    assert_same_run(seen.train(range(steps, steps + 3)), whole.train(range(steps, steps + 3)))
    assert not any(key in state for state in state_of(seen.optimizer) for key in CARRIED)
    assert not any("fastft" in group for group in seen.optimizer.param_groups)


def freezes(run: Run) -> None:
    run.optimizer.freeze(run.model[3].bias)
    run.optimizer.unfreeze(run.model[1].weight)


def masks(run: Run) -> None:
    run.optimizer.set_update_mask(run.model[0].weight, torch.arange(17) > 10)
    run.optimizer.set_update_mask(run.model[3].weight, None)
    run.optimizer.set_update_mask(run.model[0].bias, torch.arange(17) > 4)


def loads_torchs(run: Run) -> None:
    model = net()
    other = torch.optim.AdamW(model.named_parameters(), lr=1e-2, amsgrad=True)
    give_grads(model.parameters(), 50)
    other.step()
    saved = other.state_dict()
    saved["param_groups"] = [{**saved["param_groups"][0], "params": part} for part in ([0, 1], [2, 3, 4, 5])]
    for group in saved["param_groups"]:
        group["param_names"] = [f"{i // 2 if i < 4 else 3}.{'bias' if i % 2 else 'weight'}" for i in group["params"]]
    run.optimizer.load_state_dict(saved)


def copies(run: Run) -> None:
    run.model, run.optimizer = copy.deepcopy((run.model, run.optimizer))


def pickles(run: Run) -> None:
    run.model, run.optimizer = pickle.loads(pickle.dumps((run.model, run.optimizer)))


def adds(run: Run) -> None:
    run.model.append(nn.Linear(1, 1, bias=False))
    with torch.no_grad():
        run.model[4].weight.fill_(0.5)
    run.optimizer.add_param_group({"params": [("4.weight", run.model[4].weight)]})


def replaces(run: Run) -> None:
    for group in run.optimizer.param_groups:
        group["params"] = [nn.Parameter(p.detach() * 0.5 + 0.25) for p in group["params"]]
    for name, p in zip(
        [name for name, _ in run.model.named_parameters()],
        [p for group in run.optimizer.param_groups for p in group["params"]],
        strict=True,
    ):
        module, _, leaf = name.rpartition(".")
        setattr(run.model.get_submodule(module), leaf, p)


def saves(run: Run) -> None:
    run.optimizer.load_state_dict(through_a_file(run.optimizer.state_dict()))


def steps_in_backward(run: Run) -> None:
    run.optimizer.max_grad_norm = None
    run.optimizer.skip_nonfinite = False
    step_in_backward(run.optimizer)
    for p in run.model.parameters():
        (p * torch.linspace(-1.0, 1.0, p.numel()).view_as(p)).sum().backward()
    run.optimizer.step()


def through_a_file(saved: dict[str, Any]) -> dict[str, Any]:
    buffer = io.BytesIO()
    torch.save(saved, buffer)
    buffer.seek(0)
    loaded: dict[str, Any] = torch.load(buffer, weights_only=True)
    return loaded


@pytest.mark.parametrize(
    "then",
    [freezes, masks, loads_torchs, copies, pickles, adds, replaces, saves, steps_in_backward],
    ids=lambda function: function.__name__,
)
@pytest.mark.parametrize("kind", ["init", "weighted"])
@each_start
def test_what_is_done_after_a_look_at_an_optimizer_counts(
    steps: int, kind: str, then: Callable[[Run], None], tmp_path: Path
) -> None:
    """Also before the next step, as long as what DCP was shown still lies in the state."""
    results = []
    for looks in (False, True):
        run = Run(kind, tmp_path).restrict().train(range(steps))
        if looks:
            run.saved(flatten_optimizer_state_dict=True)
        then(run)
        had = [entry if entry.get("fastft_flags") else {} for entry in carried(run.optimizer.state_dict())]
        results.append((had, run.train(range(4, 6))))
    assert_same(results[1][0], results[0][0], "in the state dict")
    assert_same_run(results[1][1], results[0][1])


def test_only_what_dcp_wants_is_made_up(tmp_path: Path) -> None:
    """Outside of it, parameters that never stepped have no state: torch's AdamW would take it for that of a step."""
    run, _ = stopped("init", tmp_path, 3)
    run.saved()
    saved = run.optimizer.state_dict()
    assert list(saved["state"]) == [0, 1, 3, 4, 5]
    assert list(saved["fastft"]["without_moments"]) == ["2"]
    assert saved["fastft"]["frozen"] == [2, 3] and saved["fastft"]["masks"] == [0, 4]
    assert list(carried_by(saved, "anchor")) == [name for name, _ in run.model.named_parameters()]


# -- what cannot come back -------------------------------------------------------------------------------


def read_into(run: Run, folder: Path, **options: Any) -> dict[str, Any]:
    into = {"optimizer": get_optimizer_state_dict(run.model, run.optimizer, options=StateDictOptions(**options))}
    dcp.load(into, checkpoint_id=folder, no_dist=True)
    return into["optimizer"]


LACKS: dict[str, tuple[str, Callable[[Path], Run], str]] = {
    "mask": (
        "free",
        lambda folder: Run("free", folder),
        "expected its update_mask, got none. It was saved with an update mask, and torch.distributed.checkpoint reads "
        "what the optimizer has already: give it an update mask first, of any values",
    ),
    "anchor": (
        "init",
        lambda folder: Run("init", folder, anchor=None, anchor_decay=0.0).restrict_otherwise(),
        "expected its anchor, got none. It was saved with an anchor, and torch.distributed.checkpoint reads what the "
        "optimizer has already: give it an anchor first, of any values",
    ),
    "importance": (
        "weighted",
        lambda folder: Run(
            "snapshot", folder, anchor=lambda model, _: Anchor.snapshot(model, exclude="1.bias")
        ).restrict_otherwise(),
        "expected its anchor_importance, got none. It was saved with an importance, and torch.distributed.checkpoint "
        "reads what the optimizer has already: give it an importance first, of any values",
    ),
}


@each_form
@pytest.mark.parametrize("what", LACKS)
def test_what_dcp_did_not_read_is_missed(what: str, form: str, tmp_path: Path) -> None:
    kind, make, message = LACKS[what]
    run, _ = stopped(kind, tmp_path, 3)
    dcp.save({"optimizer": run.saved(**FORMS[form])}, checkpoint_id=tmp_path / "checkpoint", no_dist=True)
    resumed = make(tmp_path)
    read = read_into(resumed, tmp_path / "checkpoint", **FORMS[form])
    before = copy.deepcopy(list(resumed.model.parameters()))
    with pytest.raises(ValueError, match=r"^state_dict: state\['0\.weight'\] of 0\.weight: expected its ") as error:
        resumed.load(read, **FORMS[form])
    assert str(error.value).endswith(message)
    assert_same(list(resumed.model.parameters()), before, "parameters")


@pytest.mark.parametrize("form", ["nested", "full"])
def test_what_was_not_saved_is_noticed(form: str, tmp_path: Path) -> None:
    """A dict of tensors of the template that the checkpoint did not have."""
    saved = Run("init", tmp_path).train(range(3)).saved(**WAYS[form])
    saved["state"]["0.weight"]["update_mask"] = torch.ones(17, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"0\.weight: expected no update_mask, as it was saved without an update mask"):
        Run("init", tmp_path).load(saved, **WAYS[form])


@each_form
def test_dcp_says_itself_what_a_checkpoint_does_not_have(form: str, tmp_path: Path) -> None:
    saved = Run("init", tmp_path).train(range(3)).saved(**FORMS[form])
    dcp.save({"optimizer": saved}, checkpoint_id=tmp_path / "checkpoint", no_dist=True)
    with pytest.raises(dcp.api.CheckpointException, match=r"state\.0\.weight\.update_mask"):
        read_into(Run("init", tmp_path).restrict_otherwise(), tmp_path / "checkpoint", **FORMS[form])


@each_form
def test_moments_of_what_does_not_require_grad_are_missed(form: str, tmp_path: Path) -> None:
    """DCP leaves them out when it loads, as an unfreezer that was made too early would have it."""
    saved = Run("init", tmp_path).restrict().train(range(3)).saved(**FORMS[form])
    resumed = Run("init", tmp_path, shift=0.5).restrict_otherwise()
    resumed.saved(**FORMS[form])
    resumed.model[0].bias.requires_grad_(False)
    before = copy.deepcopy(resumed.optimizer.state_dict())
    with pytest.raises(
        ValueError,
        match=r"^state_dict: state\['0\.bias'\] of 0\.bias: expected its moments, got none: torch\.distributed\."
        r"checkpoint leaves out parameters that do not require grad\. Load the optimizer first, and make the "
        "Unfreezer then$",
    ):
        resumed.load(saved, **FORMS[form])
    assert_same(resumed.optimizer.state_dict(), before, "after the error")
    resumed.model[0].bias.requires_grad_(True)
    resumed.load(saved, **FORMS[form])
    assert float(resumed.optimizer.state[resumed.model[0].bias]["step"]) == 2.0


@each_start
@each_form
def test_what_never_stepped_and_does_not_require_grad_may_be_left_out(form: str, steps: int, tmp_path: Path) -> None:
    """An unfreezer has it closed in both."""
    runs = []
    for shift in (0.0, 0.5):
        run = Run("free", tmp_path, shift=shift)
        run.model[0].bias.requires_grad_(False)
        runs.append(run)
    run, resumed = runs
    for step in range(2, 2 + steps):
        give_grads(run.model.parameters(), step)
        run.model[0].bias.grad = None
        run.optimizer.step()
    saved, weights = run.saved(**FORMS[form]), copy.deepcopy(run.model)
    resumed.load(saved, **FORMS[form]).take_weights(weights)
    for one in (run, resumed):
        one.model[0].bias.requires_grad_(True)
        one.train(range(5, 7))
    assert_same_run(resumed, run)
    assert float(resumed.optimizer.state[resumed.model[0].bias]["step"]) == 2.0


# -- anchors that are others -----------------------------------------------------------------------------


def messages(action: Callable[[], Any]) -> list[str]:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        action()
    return [str(w.message) for w in seen if str(w.message).startswith("state_dict: ")]


@pytest.mark.parametrize("own", [True, False], ids=["with_an_anchor", "without"])
def test_an_anchor_that_got_lost_is_missed_where_something_pulls(own: bool, tmp_path: Path) -> None:
    saved = Run("init", tmp_path).train(range(3)).optimizer.state_dict()
    anchored = Run("init", tmp_path) if own else Run("free", tmp_path)
    assert messages(lambda: anchored.optimizer.load_state_dict(copy.deepcopy(saved))) == []
    for state in saved["state"].values():
        for key in CARRIED:
            state.pop(key, None)
    for group in saved["param_groups"]:
        del group["fastft"]
    del saved["fastft"]
    anchored = Run("init", tmp_path) if own else Run("free", tmp_path)
    stays = "the optimizer's own stays" if own else "the optimizer has none either"
    said = f"state_dict: has groups with anchor_decay > 0, and no anchor; {stays}"
    assert messages(lambda: anchored.optimizer.load_state_dict(copy.deepcopy(saved))) == [said]
    for group in saved["param_groups"]:
        group["anchor_decay"] = 0.0
    assert messages(lambda: anchored.optimizer.load_state_dict(saved)) == []


@pytest.mark.parametrize("through", ["plain", *FORMS])
@pytest.mark.parametrize("fewer", [True, False], ids=["fewer", "more"])
def test_what_is_anchored_is_what_was_anchored_then(fewer: bool, through: str, tmp_path: Path) -> None:
    """The saved one lacks, or has, two parameters that the resuming optimizer's own has, or lacks."""
    kinds = ["snapshot", "init"] if fewer else ["init", "snapshot"]
    run, weights = stopped(kinds[0], tmp_path, 3)
    resumed = Run(kinds[1], tmp_path, shift=0.5).restrict_otherwise()
    if through == "plain":
        resumed.optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
    elif through == "flat" and not fewer:  # of which DCP would find no place for the anchors
        with pytest.raises(ValueError, match=r"3\.weight: expected its anchor, got none"):
            resumed.load(run.saved(**FORMS[through]), **FORMS[through])
        return
    else:
        resumed.load(run.saved(**FORMS["nested"]), **FORMS["nested"])
    anchor = resumed.optimizer.anchor
    assert anchor is not None and len(anchor) == (4 if fewer else 6)
    assert (resumed.model[3].weight in anchor) == (not fewer)
    resumed.take_weights(weights)
    run.train(range(3, 6))
    assert_same_run(resumed.train(range(3, 6)), run)


# -- torch's AdamW ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["free", "init", "file", "weighted"])
def test_what_torchs_adamw_has_saved_leaves_ours_as_it_is(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """It casts masks and anchors to the parameter's dtype, and knows nothing of what has no moments."""
    run = Run(kind, tmp_path)
    run.model.to(dtype)
    run.restrict().train(range(3))
    between = torch.optim.AdamW(
        [{"params": list(run.model.named_parameters())[:2]}, {"params": list(run.model.named_parameters())[2:]}],
        amsgrad=True,
    )
    between.load_state_dict(through_a_file(run.optimizer.state_dict()))
    give_grads(run.model.parameters(), 3)
    between.step()
    resumed = Run(kind, tmp_path, shift=0.5)
    resumed.model.to(dtype)
    resumed.restrict_otherwise().train(range(1))
    masks = [resumed.optimizer.update_mask(p) for p in resumed.model.parameters()]
    before = resumed.optimizer.anchor and {name: resumed.optimizer.anchor[name] for name in resumed.optimizer.anchor}
    resumed.optimizer.load_state_dict(through_a_file(between.state_dict()))
    after = resumed.optimizer.anchor and {name: resumed.optimizer.anchor[name] for name in resumed.optimizer.anchor}
    assert_same(after, before, "anchor")
    assert_same([resumed.optimizer.update_mask(p) for p in resumed.model.parameters()], masks, "masks")
    assert resumed.optimizer.state_dict()["fastft"]["frozen"] == [5]
    assert [float(state["step"]) for state in state_of(resumed.optimizer)] == [3.0, 3.0, 1.0, 3.0, 3.0, 3.0]
    give_grads(resumed.model.parameters(), 4)
    resumed.optimizer.step()


@each_start
@pytest.mark.parametrize("way", ["nested", "flat"])
def test_torchs_adamw_loads_what_dcp_saved(way: str, steps: int, tmp_path: Path) -> None:
    """It goes on as after the plain dict, with moments of 0 where a parameter never stepped."""
    run, weights = stopped("weighted", tmp_path, steps)
    models = [copy.deepcopy(weights) for _ in range(2)]
    named = [list(model.named_parameters()) for model in models]
    optimizers = [torch.optim.AdamW([{"params": ps[:2]}, {"params": ps[2:]}], amsgrad=True) for ps in named]
    optimizers[0].load_state_dict(run.optimizer.state_dict())
    if way == "flat":  # of its own keys, which are torch's
        give_grads(models[1].parameters(), 0)
        optimizers[1].step()
        models[1].load_state_dict(weights.state_dict())
        for group in optimizers[1].param_groups:
            group.update(anchor_decay=0.0)
    set_optimizer_state_dict(models[1], optimizers[1], run.saved(**FORMS[way]), options=StateDictOptions(**FORMS[way]))
    for step in (steps, steps + 2):
        for model, optimizer in zip(models, optimizers, strict=True):
            give_grads(model.parameters(), step)
            optimizer.step()
        assert_same(list(models[1].parameters()), list(models[0].parameters()), "parameters")
    assert [float(state["step"]) for state in state_of(optimizers[1])] == [
        4.0 if steps and i != 2 else 2.0 for i in range(6)
    ]


# -- written into the state by others --------------------------------------------------------------------


def write_state(saved: dict[str, Any], optimizer: torch.optim.Optimizer) -> None:
    """As ZeroRedundancyOptimizer loads a checkpoint into the optimizer inside it."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for i, state in saved["state"].items():
        optimizer.state[params[i]] = copy.deepcopy(state)


@pytest.mark.parametrize("fresh", [True, False], ids=["fresh", "stepped"])
@each_kind
def test_what_is_written_into_the_state_is_taken_over_at_the_next_step(kind: str, fresh: bool, tmp_path: Path) -> None:
    run, weights = stopped(kind, tmp_path, 3)
    saved = through_a_file(run.optimizer.state_dict())
    resumed = Run(kind, tmp_path, shift=0.5)
    if not fresh:
        resumed.train(range(7, 8))
        resumed.optimizer.state.pop(resumed.model[1].weight)
    resumed.optimizer.freeze(resumed.model[1].weight)  # of which nothing is written, as it has no moments
    resumed.take_weights(weights)
    write_state(saved, resumed.optimizer)
    for one in (run, resumed):
        one.train(range(3, 6))
        one.optimizer.unfreeze(one.model[1].weight)
    if kind in ("free", "file"):  # the anchor of what has no moments is the file's; any other one was not written
        for one in (run, resumed):
            one.train(range(6, 8))
    others = [i for i in range(6) if i != 2]
    params = [list(one.model.parameters()) for one in (resumed, run)]
    states = [state_of(one.optimizer) for one in (resumed, run)]
    assert_same(*[[ps[i] for i in others] for ps in params], "parameters")
    assert_same(*[[of_one[i] for i in others] for of_one in states], "state")
    carries = [carried(one.optimizer.state_dict()) for one in (resumed, run)]
    assert_same(*[[of_one[i] for i in others] for of_one in carries], "carried")
    assert int(resumed.optimizer.state[resumed.model[0].weight]["step"]) == int(states[1][0]["step"])


def test_what_is_written_wrongly_is_refused(tmp_path: Path) -> None:
    run, _ = stopped("init", tmp_path, 3)
    resumed = Run("init", tmp_path)
    write_state(run.optimizer.state_dict(), resumed.optimizer)
    resumed.optimizer.state[resumed.model[0].weight]["update_mask"] = torch.ones(4, dtype=torch.bool)
    before = copy.deepcopy(list(resumed.model.parameters()))
    for _ in range(2):
        with pytest.raises(ValueError, match=r"^0\.weight: update mask: expected shape \[17\] \(rows\)"):
            resumed.train(range(2, 3))
        assert_same(list(resumed.model.parameters()), before, "parameters")


# -- metadata --------------------------------------------------------------------------------------------


def test_each_group_says_what_concerns_all(tmp_path: Path) -> None:
    run, _ = stopped("weighted_in_file", tmp_path, 3, rounding_seed=7)
    for saved in (run.optimizer.state_dict(), run.saved()):
        metas = [metadata_of(saved, i) for i in (0, 1)]
        for meta in metas:
            assert (meta["version"], meta["rounding_seed"], meta["skipped_steps"]) == (2, 7, 1)
            assert meta["anchor_file"]["path"] == str(tmp_path / "base.safetensors")
            assert len(meta["anchor_file"]["sha256"]) == 64
        anchored = ("0.weight", "0.bias", "1.weight", "1.bias", "3.weight")
        assert [meta["names_in_file"] for meta in metas] == [[f"bert.{name}" for name in anchored]] * 2
    assert names_in_file(run.optimizer.state_dict()) == {name: f"bert.{name}" for name in anchored}
    assert [meta["stepped"] for meta in metas] == [["0.weight", "0.bias"], ["1.bias", "3.weight", "3.bias"]]


def test_flags_say_what_each_parameter_has(tmp_path: Path) -> None:
    run, _ = stopped("weighted_in_file", tmp_path, 3)
    in_file = Has.ANCHOR_IN_FILE | Has.IMPORTANCE
    expected = {
        "0.weight": in_file | Has.MASK,
        "0.bias": in_file,
        "1.weight": in_file | Has.FROZEN,
        "1.bias": in_file | Has.FROZEN,
        "3.weight": in_file | Has.MASK,
    }
    saved = run.optimizer.state_dict()
    found = carried_by(saved, "fastft_flags")
    assert all(isinstance(flag, Tensor) and flag.dtype == torch.int64 and flag.shape == () for flag in found.values())
    assert flags_of(saved) == expected
    assert {name: flags_in(state) for name, state in run.saved()["state"].items()} == {**expected, "3.bias": Has(0)}


def test_one_value_of_flags_means_one_thing_for_good() -> None:
    """They lie in files."""
    assert {has.name: int(has) for has in Has} == {
        "FROZEN": 1,
        "MASK": 2,
        "ANCHOR": 4,
        "IMPORTANCE": 8,
        "ANCHOR_IN_FILE": 16,
    }


# -- state dicts of another form ------------------------------------------------------------------------


def test_a_dict_without_the_options_of_a_step_is_refused() -> None:
    """Of another optimizer's class, or of which DCP has found nothing in this process."""
    model = net()
    optimizer = fastft.AdamW(model.named_parameters(), lr=1e-2, weight_decay=0.1, anchor="init", anchor_decay=2.0)
    other = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)
    for given in (optimizer, other):
        give_grads(model.parameters(), 0)
        given.step()
    before = copy.deepcopy(state_of(optimizer))
    for loaded, said in (
        (other.state_dict(), r"param_groups\[0\]: expected lr, betas, eps and weight_decay, got none for betas, eps"),
        ({"state": {}, "param_groups": [{"params": list(range(6))}]}, r"none for lr, betas, eps, weight_decay; where"),
        ({}, "expected state and param_groups, got none for state, param_groups; .*flatten_optimizer_state_dict"),
    ):
        with pytest.raises(ValueError, match=f"^state_dict: .*{said}"):
            optimizer.load_state_dict(loaded)
    assert_same(state_of(optimizer), before, "the state")
