"""Loading a state dict by the parameters' names: in another order all lands on its own, and other groups are named."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from contract_cases import anchor_in_file, assert_same, carried_by, give_grads, net, weighted_anchor
from hypothesis import given, settings
from hypothesis import strategies as st
from optim_cases import drawn
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

import fastft

Layout = Sequence[tuple[str, Sequence[str]]]
"""Groups of an optimizer: a key of ``GROUPS``, and the names of its parameters."""
GROUPS: dict[str, dict[str, Any]] = {
    "weights": {"lr": 0.03, "weight_decay": 0.3, "anchor_decay": 4.0},
    "biases": {"lr": 0.01, "weight_decay": 0.0, "anchor_decay": 2.0, "anchor_mode": "l2"},
}
WEIGHTS, BIASES = ("0.weight", "1.weight", "3.weight"), ("0.bias", "1.bias", "3.bias")
SAVED: Layout = [("weights", WEIGHTS), ("biases", BIASES)]
LAYOUTS: dict[str, Layout] = {
    "other_order": [("weights", WEIGHTS[::-1]), ("biases", ("1.bias", "3.bias", "0.bias"))],
    "groups_in_another_order": [("biases", BIASES), ("weights", WEIGHTS)],
    "both": [("biases", BIASES[::-1]), ("weights", ("1.weight", "3.weight", "0.weight"))],
}


ANCHORS: dict[str, Callable[[nn.Module, Path], Any]] = {
    "init": lambda *_: "init",
    "file": anchor_in_file,
    "weighted": weighted_anchor,
}


class Run:
    """A model and an optimizer over its parameters in some order; ``named`` gives them their names there."""

    def __init__(
        self,
        layout: Layout,
        anchor: Callable[[nn.Module, Path], Any] | None = ANCHORS["init"],
        folder: Path = Path(),
        named: Callable[[str], str] | None = str,
        cls: type[torch.optim.AdamW] = fastft.AdamW,
    ) -> None:
        self.model = net()
        groups = []
        for kind, names in layout:
            params: list[Any] = [self.model.get_parameter(name) for name in names]
            if named is not None:
                params = list(zip(map(named, names), params, strict=True))
            options = {key: v for key, v in GROUPS[kind].items() if anchor is not None or "anchor" not in key}
            groups.append({"params": params, **options})
        own = {} if anchor is None else {"anchor": anchor(self.model, folder)}
        self.optimizer: Any = cls(groups, amsgrad=True, **own)
        with torch.no_grad():  # moments or an anchor taken from here would show
            for p in self.model.parameters():
                p.add_(0.5)

    def restrict(self) -> None:
        """Masks, one parameter frozen from the start, one after some steps."""
        self.optimizer.set_update_mask(self.model.get_parameter("0.weight"), torch.arange(17) % 3 > 0)
        self.optimizer.set_update_mask(self.model.get_parameter("3.weight"), torch.arange(51).reshape(3, 17) % 2 == 0)
        self.optimizer.freeze(self.model.get_parameter("1.bias"))

    def train(self, steps: range) -> Run:
        for step in steps:
            give_grads(self.model.parameters(), step)  # by the model's order, not the optimizer's
            self.optimizer.step()
        return self

    def load(self, model: nn.Module, saved: dict[str, Any]) -> Run:
        self.model.load_state_dict(model.state_dict())
        self.optimizer.load_state_dict(copy.deepcopy(saved))
        return self

    def state(self) -> dict[str, Mapping[str, Any]]:
        return {name: dict(self.optimizer.state.get(p, {})) for name, p in self.model.named_parameters()}

    def options(self) -> dict[str, Any]:
        """Of the group that each parameter is in."""
        names = {p: name for name, p in self.model.named_parameters()}
        found = {}
        for group in self.optimizer.param_groups:
            rest = {key: v for key, v in group.items() if key not in ("params", "param_names")}
            found.update({names[p]: rest for p in group["params"]})
        return found

    def masks(self) -> dict[str, Tensor | None]:
        return {name: self.optimizer.update_mask(p) for name, p in self.model.named_parameters()}

    def anchors(self) -> dict[str, Tensor | None]:
        anchor = self.optimizer.anchor
        return {name: anchor and anchor.get(p) for name, p in self.model.named_parameters()}


def assert_same_run(one: Run, other: Run) -> None:
    assert_same(dict(one.model.named_parameters()), dict(other.model.named_parameters()), "parameters")
    assert_same(one.state(), other.state(), "state")
    assert_same(one.options(), other.options(), "options")
    assert_same(one.masks(), other.masks(), "masks")
    assert_same(one.anchors(), other.anchors(), "anchors")


def saved_run(**options: Any) -> tuple[Run, dict[str, Any], nn.Module]:
    """A run, its state dict in the middle, and the weights then; the run has gone on."""
    run = Run(SAVED, **options)
    run.restrict()
    run.train(range(2))
    run.optimizer.freeze(run.model.get_parameter("1.weight"))
    saved, model = copy.deepcopy(run.optimizer.state_dict()), copy.deepcopy(run.model)
    return run.train(range(2, 5)), saved, model


# -- all of it lands on its own --------------------------------------------------------------------------


@pytest.mark.parametrize("anchor", ANCHORS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_another_order_is_put_right(layout: str, anchor: str, tmp_path: Path) -> None:
    """Moments, masks, the frozen set with and without moments, anchors, and the options of groups."""
    run, saved, model = saved_run(anchor=ANCHORS[anchor], folder=tmp_path)
    resumed = Run(LAYOUTS[layout], ANCHORS[anchor], tmp_path).load(model, saved)
    names = [list(group["param_names"]) for group in resumed.optimizer.param_groups]
    assert names == [list(names) for _, names in LAYOUTS[layout]], "the optimizer's own"
    assert_same_run(resumed.train(range(2, 5)), run)
    assert {name: float(state["step"]) for name, state in resumed.state().items() if state} == {
        **dict.fromkeys(("0.weight", "0.bias", "3.weight", "3.bias"), 5.0),
        "1.weight": 2.0,
    }


@settings(drawn, max_examples=8)
@given(st.permutations(SAVED), st.permutations(WEIGHTS), st.permutations(BIASES))
def test_any_order_is_put_right(groups: Layout, weights: list[str], biases: list[str]) -> None:
    run, saved, model = saved_run()
    order = {"weights": weights, "biases": biases}
    resumed = Run([(kind, order[kind]) for kind, _ in groups]).load(model, saved)
    assert_same_run(resumed.train(range(2, 5)), run)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_state_dict_of_torchs_is_put_right_too(layout: str) -> None:
    """Which torch's own would load by the order alone."""
    run = Run(SAVED, anchor=None, cls=torch.optim.AdamW).train(range(2))
    saved, model = copy.deepcopy(run.optimizer.state_dict()), copy.deepcopy(run.model)
    resumed, ours = Run(LAYOUTS[layout], anchor=None), Run(SAVED, anchor=None)
    for one in (resumed, ours):
        one.load(model, saved).train(range(2, 4))
    assert_same_run(resumed, ours)
    assert {float(state["step"]) for state in resumed.state().values()} == {4.0}


WRAPPED: dict[str, Callable[[str], str]] = {
    "ddp": lambda name: f"module.{name}",
    "compiled": lambda name: f"_orig_mod.{name}",
    "fsdp": lambda name: f"_fsdp_wrapped_module.{name}",
    "checkpointed": lambda name: re.sub(r"^(\d)\.", r"\1._checkpoint_wrapped_module.", name),
    "peft": lambda name: f"base_model.model.{name}",
    "ddp_of_compiled": lambda name: f"module._orig_mod.{name}",
}


@pytest.mark.parametrize("side", ["saved", "loading"])
@pytest.mark.parametrize("wrapper", WRAPPED)
def test_names_count_without_what_wrappers_add(wrapper: str, side: str, tmp_path: Path) -> None:
    names = {"saved": str, "loading": str, side: WRAPPED[wrapper]}
    run, saved, model = saved_run(anchor=anchor_in_file, folder=tmp_path, named=names["saved"])
    resumed = Run(LAYOUTS["both"], anchor_in_file, tmp_path, names["loading"]).load(model, saved)
    assert resumed.optimizer.param_groups[0]["param_names"][0] == names["loading"]("3.bias")
    assert_same_run(resumed.train(range(2, 5)), run)


# -- by torch.distributed.checkpoint's names -------------------------------------------------------------


@pytest.mark.parametrize("anchor", ANCHORS)
@pytest.mark.parametrize("named", [True, False], ids=["named", "unnamed"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_names_that_dcp_has_given_count_too(layout: str, named: bool, anchor: str, tmp_path: Path) -> None:
    """In its dict they stand for the positions; it puts them into the loading optimizer's order itself."""
    names = {"named": str if named else None}
    run = Run(SAVED, ANCHORS[anchor], tmp_path, **names)
    run.restrict()
    run.train(range(2))
    saved, model = copy.deepcopy(get_optimizer_state_dict(run.model, run.optimizer)), copy.deepcopy(run.model)
    assert saved["param_groups"][0]["params"] == list(WEIGHTS)
    resumed = Run(LAYOUTS[layout], ANCHORS[anchor], tmp_path, **names)
    resumed.model.load_state_dict(model.state_dict())
    set_optimizer_state_dict(resumed.model, resumed.optimizer, saved)
    run.train(range(2, 5))
    assert_same_run(resumed.train(range(2, 5)), run)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_dict_of_dcps_may_be_loaded_without_it(layout: str, tmp_path: Path) -> None:
    run = Run(SAVED, anchor_in_file, tmp_path)
    run.restrict()
    run.train(range(2))
    saved, model = copy.deepcopy(get_optimizer_state_dict(run.model, run.optimizer)), copy.deepcopy(run.model)
    run.train(range(2, 5))
    resumed = Run(LAYOUTS[layout], anchor_in_file, tmp_path).load(model, saved)
    assert_same_run(resumed.train(range(2, 5)), run)


@pytest.mark.parametrize("anchor", ANCHORS)
@pytest.mark.parametrize("named", [True, False], ids=["named", "unnamed"])
@pytest.mark.parametrize(
    "layout",
    [
        [("weights", (*BIASES[::-1], *WEIGHTS))],
        [("weights", WEIGHTS[1:]), ("weights", ("0.weight", "3.bias")), ("biases", ("1.bias", "0.bias"))],
        [("biases", ("3.bias", "1.weight")), ("weights", ("3.weight", "0.weight", "1.bias", "0.bias"))],
    ],
    ids=["one_group", "three_groups", "exchanged"],
)
def test_dcps_flat_dict_goes_into_other_groups(layout: Layout, named: bool, anchor: str, tmp_path: Path) -> None:
    """Each has the options of its first parameter then; what belongs to one parameter is that one's."""
    names, flat = {"named": str if named else None}, StateDictOptions(flatten_optimizer_state_dict=True)
    run = Run(SAVED, ANCHORS[anchor], tmp_path, **names)
    run.restrict()
    run.train(range(2))
    saved = copy.deepcopy(get_optimizer_state_dict(run.model, run.optimizer, options=flat))
    resumed = Run(layout, ANCHORS[anchor], tmp_path, **names)
    for name in ("0.weight", "3.weight"):
        mask = run.optimizer.update_mask(run.model.get_parameter(name))
        resumed.optimizer.set_update_mask(resumed.model.get_parameter(name), ~mask)
    set_optimizer_state_dict(resumed.model, resumed.optimizer, saved, options=flat)
    assert_same(resumed.state(), run.state(), "state")
    assert_same(resumed.masks(), run.masks(), "masks")
    assert_same(resumed.anchors(), run.anchors(), "anchors")
    frozen = {name for name, p in resumed.model.named_parameters() if p in resumed.optimizer._frozen}
    assert frozen == {"1.bias"}


# -- without names the order counts ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("saved_names", "own_names"),
    [(str, None), (None, str), (None, None), (str, "other.{}".format), (lambda name: name[::-1], str)],
    ids=["not_here", "not_saved", "nowhere", "all_others_here", "all_others_saved"],
)
def test_the_order_counts_where_no_name_is_known_to_both(saved_names: Any, own_names: Any, tmp_path: Path) -> None:
    run, saved, model = saved_run(anchor=anchor_in_file, folder=tmp_path, named=saved_names)
    resumed = Run(SAVED, anchor_in_file, tmp_path, own_names).load(model, saved)
    assert_same_run(resumed.train(range(2, 5)), run)


def test_some_groups_without_names_leave_it_at_the_order() -> None:
    run, saved, model = saved_run()
    del saved["param_groups"][1]["param_names"]
    resumed = Run(SAVED).load(model, saved)
    assert_same_run(resumed.train(range(2, 5)), run)
    with pytest.raises(ValueError, match=r"^3\.bias: update mask: expected shape .*, got \[3, 17\]$"):
        Run(LAYOUTS["groups_in_another_order"]).load(model, saved)


# -- what cannot be put right ----------------------------------------------------------------------------


def renamed(name: str) -> str:
    return name.replace("3.", "head.")


WRONG: dict[str, tuple[Layout, Callable[[str], str], str]] = {
    "one_moved": (
        [("weights", WEIGHTS[:2]), ("biases", (*BIASES, "3.weight"))],
        str,
        "param_groups[0]: expected a group of 0.weight, 1.weight, got group 0 of 0.weight, 1.weight, 3.weight",
    ),
    "exchanged": (
        [("weights", (*WEIGHTS[:2], "3.bias")), ("biases", (*BIASES[:2], "3.weight"))],
        str,
        "param_groups[0]: expected a group of 0.weight, 1.weight, 3.bias, got group 0 of 0.weight, 1.weight, "
        "3.weight; group 1 of 0.bias, 1.bias, 3.bias",
    ),
    "one_group": (
        [("weights", (*WEIGHTS, *BIASES))],
        str,
        "param_groups[0]: expected a group of 0.weight, 1.weight, 3.weight, 0.bias, 1.bias, 3.bias, got group 0 of "
        "0.weight, 1.weight, 3.weight; group 1 of 0.bias, 1.bias, 3.bias",
    ),
    "one_more_group": (
        [("weights", WEIGHTS[:2]), ("weights", WEIGHTS[2:]), ("biases", BIASES)],
        str,
        "param_groups[0]: expected a group of 0.weight, 1.weight, got group 0 of 0.weight, 1.weight, 3.weight",
    ),
    "a_group_less": (
        [("biases", BIASES)],
        str,
        "expected 1 param_groups, got 2, with one of 0.weight, 1.weight, 3.weight",
    ),
    "a_parameter_less": (
        [("weights", WEIGHTS), ("biases", BIASES[1:])],
        str,
        "param_groups[1]: expected a group of 1.bias, 3.bias, got group 1 of 0.bias, 1.bias, 3.bias",
    ),
    "another_head": (
        SAVED,
        renamed,
        "param_groups[0]: expected the state of head.weight, got that of 3.weight, 3.bias",
    ),
}


@pytest.mark.parametrize("cls", [fastft.AdamW, torch.optim.AdamW], ids=["ours", "torchs"])
@pytest.mark.parametrize("name", WRONG)
def test_other_groups_or_parameters_are_named(name: str, cls: type[torch.optim.AdamW]) -> None:
    layout, named, message = WRONG[name]
    saved = Run(SAVED, anchor=None, cls=cls).train(range(2)).optimizer.state_dict()
    resumed = Run(layout, named=named)
    masked = layout[0][1][0]
    resumed.optimizer.set_update_mask(resumed.model.get_parameter(masked), torch.arange(17) > 3)
    resumed.train(range(1))
    before = copy.deepcopy(resumed.optimizer.state_dict())
    with pytest.raises(ValueError, match="^" + re.escape(f"state_dict: {message}") + "$"):
        resumed.optimizer.load_state_dict(saved)
    assert_same(resumed.optimizer.state_dict(), before, "after the error")
    assert list(carried_by(before, "update_mask")) == [named(masked)]


def test_a_parameter_that_was_not_saved_is_named() -> None:
    saved = Run([("weights", WEIGHTS[:2]), ("biases", BIASES)]).train(range(2)).optimizer.state_dict()
    with pytest.raises(ValueError, match=r"^state_dict: param_groups\[0\]: expected the state of 3\.weight, got none$"):
        Run(SAVED).optimizer.load_state_dict(saved)
