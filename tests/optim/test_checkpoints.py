"""State dicts: exchanged with ``torch.optim.AdamW`` in the middle of a run, resumed bit for bit, refused when wrong."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from contract_cases import (
    CARRIED,
    Twins,
    assert_near,
    assert_same,
    carried,
    carried_by,
    change_metadata,
    flags_of,
    give_grads,
    metadata_of,
    names_in_file,
    net,
    state_of,
    train,
)
from safetensors.torch import save_file
from torch import Tensor, nn

import fastft
from fastft import Anchor
from fastft.optim.checkpoint import Has


def saved_and_loaded(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Through a file, by the loader that allows nothing but tensors and plain values."""
    buffer = io.BytesIO()
    torch.save(state_dict, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def everything(optimizer: fastft.AdamW) -> dict[str, Any]:
    """All that a failed load must not have touched."""
    return copy.deepcopy(optimizer.state_dict())


# -- to and from torch.optim.AdamW -----------------------------------------------------------------------

OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "amsgrad": {"amsgrad": True},
    "maximize": {"maximize": True, "betas": (0.5, 0.9)},
    "fused": {"fused": True},
    "tensor_lr": {"lr": torch.tensor(0.0625, dtype=torch.float64)},
}
options_cases = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def two_groups(model: nn.Module) -> list[dict[str, Any]]:
    return [
        {"params": [*model[0].parameters()], "lr": 0.03},
        {"params": [*model[1].parameters(), *model[3].parameters()], "weight_decay": 0.3},
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@options_cases
def test_torchs_run_goes_on_here(options: dict[str, Any], dtype: torch.dtype) -> None:
    twins = Twins(lambda: net(dtype=dtype), two_groups, **copy.deepcopy(options))
    train(twins.theirs, range(4))
    twins.models[0].load_state_dict(twins.models[1].state_dict())
    twins.ours.load_state_dict(saved_and_loaded(twins.theirs.state_dict()))
    twins.steps = 4
    twins.check()
    twins.step(4)
    assert {float(state["step"]) for state in state_of(twins.ours)} == {8.0}
    assert [(g["anchor_decay"], g["anchor_mode"]) for g in twins.ours.param_groups] == [(0.0, "decoupled")] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@options_cases
def test_our_run_goes_on_in_torchs(options: dict[str, Any], dtype: torch.dtype) -> None:
    """With all of fastft's own state in the dict, which torch passes over."""
    fine_tuning = {"anchor": "init", "anchor_decay": 0.0, "skip_nonfinite": True}
    twins = Twins(lambda: net(dtype=dtype), two_groups, **copy.deepcopy(options))
    run = twins.models[0]
    ours = fastft.AdamW(two_groups(run), **{"lr": 1e-2, "weight_decay": 0.1, **copy.deepcopy(options)}, **fine_tuning)
    ours.set_update_mask(run[0].weight, torch.ones(17, dtype=torch.bool))
    train(ours, range(4))
    saved = saved_and_loaded(ours.state_dict())
    assert len(carried_by(saved, "update_mask")) == 1 and len(carried_by(saved, "anchor")) == 6
    twins.models[1].load_state_dict(run.state_dict())
    twins.theirs.load_state_dict(saved)
    loaded = [{key: v for key, v in state.items() if key not in CARRIED} for state in state_of(twins.theirs)]
    assert_same(loaded, state_of(ours), "loaded state")
    for step in range(4, 8):
        for optimizer, model in ((ours, run), (twins.theirs, twins.models[1])):
            give_grads(model.parameters(), step)
            optimizer.step()
        assert_near(twins.params(0), twins.params(1), "parameters")
        torchs = [{key: state[key] for key in ours.state[p]} for p, state in zip(run.parameters(), loaded, strict=True)]
        assert_near(state_of(ours), torchs, "state")


def test_there_and_back_again() -> None:
    """ours → torch → ours: the anchor's options and masks of the last one are kept."""
    model = net()
    first = fastft.AdamW(model.parameters(), lr=1e-2)
    train(first, range(2))
    between = torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=False)
    between.load_state_dict(first.state_dict())
    train(between, range(2, 4))
    last = fastft.AdamW(
        [{"params": model.parameters(), "anchor_decay": 2.0, "anchor_mode": "l2"}], anchor="init", anchor_decay=7.0
    )
    last.freeze(model[1].weight)
    last.set_update_mask(model[0].bias, torch.arange(17) > 3)
    torchs = between.state_dict()
    del torchs["param_groups"][0]["anchor_decay"], torchs["param_groups"][0]["anchor_mode"]
    last.load_state_dict(torchs)
    assert last.param_groups[0]["anchor_decay"] == 2.0
    assert last.param_groups[0]["anchor_mode"] == "l2"
    assert last.update_mask(model[0].bias).sum() == 13
    assert last.state_dict()["fastft"]["frozen"] == [2]
    assert {float(state["step"]) for state in state_of(last)} == {4.0}
    train(last, [4])


# -- resuming --------------------------------------------------------------------------------------------


class Run:
    """A model under everything that a checkpoint has to bring back."""

    def __init__(self, anchor: Any = "init", dtype: torch.dtype = torch.float32, **options: Any) -> None:
        self.model = net(dtype=dtype)
        named = list(self.model.named_parameters())
        groups = [{"params": named[:2], "lr": 0.03}, {"params": named[2:], "anchor_mode": "l2"}]
        if anchor is not None:
            groups[0]["anchor_decay"], groups[1]["anchor_decay"] = 4.0, 0.5
        if options.get("anchor_mode") == "selective":  # 4 would put small tensors right back where they were
            groups[0]["anchor_decay"] = 0.5
        self.optimizer = fastft.AdamW(
            groups,
            lr=1e-2,
            weight_decay=0.1,
            amsgrad=True,
            anchor=anchor(self.model) if callable(anchor) else anchor,
            max_grad_norm=2.0,
            skip_nonfinite=True,
            **options,
        )

    def restrict(self) -> None:
        self.optimizer.set_update_mask(self.model[0].weight, torch.arange(17) % 3 > 0)
        self.optimizer.set_update_mask(self.model[3].weight, torch.arange(51).reshape(3, 17) % 2 == 0)
        self.optimizer.freeze([self.model[1].weight])

    def train(self, steps: range) -> None:
        """Every third step has a gradient that is not finite, and is skipped."""
        for step in steps:
            give_grads(self.model.parameters(), step)
            if step % 3 == 2:
                self.model[3].bias.grad[0] = float("nan")
            self.optimizer.step()

    def checkpoint(self) -> dict[str, Any]:
        return {"model": copy.deepcopy(self.model.state_dict()), "optimizer": self.optimizer.state_dict()}

    def everything(self) -> list[Any]:
        return [
            *self.model.parameters(),
            state_of(self.optimizer),
            self.optimizer.state_dict(),
            self.optimizer.grad_norm,
        ]


def from_file(path: Path) -> Callable[[nn.Module], Anchor]:
    """An anchor that lies in a file; written once, from the weights of the first model that asks."""

    def make(model: nn.Module) -> Anchor:
        if not path.exists():
            save_file({name: p.detach() * 0.75 for name, p in model.named_parameters()}, path)
        return Anchor.from_safetensors(path, model, exclude="3.bias")

    return make


def in_bfloat16(model: nn.Module) -> Anchor:
    return Anchor.snapshot(model, dtype=torch.bfloat16, exclude="3.*")


def weighted(model: nn.Module) -> Anchor:
    """With an importance that reaches from 0 to beyond where an unweighted step would overshoot."""
    importance = {name: (p.detach() - p.detach().min()) ** 2 * 300 for name, p in model.named_parameters()}
    return Anchor.snapshot(model, exclude="3.bias").with_importance(importance, dtype=torch.bfloat16)


@pytest.mark.parametrize("state_dtype", [None, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["none", "init", "snapshot_bf16", "file", "weighted", "selective"])
def test_a_run_cut_in_two_ends_with_the_same_bits(
    kind: str, dtype: torch.dtype, state_dtype: torch.dtype | None, tmp_path: Path
) -> None:
    anchors = {
        "none": None,
        "init": "init",
        "snapshot_bf16": in_bfloat16,
        "file": from_file(tmp_path / "base.safetensors"),
        "weighted": weighted,
        "selective": "init",
    }
    options: dict[str, Any] = {"anchor": anchors[kind], "dtype": dtype, "state_dtype": state_dtype}
    if kind == "selective":
        options["anchor_mode"] = kind
    whole, resumed = Run(**options), Run(**options)
    whole.restrict()
    whole.train(range(5))
    saved = saved_and_loaded(whole.checkpoint())
    whole.train(range(5, 9))

    with torch.no_grad():
        for p in resumed.model.parameters():
            p.add_(1.0)  # had it taken its anchor from here, it would show
    resumed.model.load_state_dict(saved["model"])
    resumed.optimizer.load_state_dict(saved["optimizer"])
    assert resumed.optimizer.skipped_steps.item() == 1
    resumed.train(range(5, 9))
    assert_same(resumed.everything(), whole.everything(), "resumed")
    assert resumed.optimizer.skipped_steps.item() == 3
    moments = {state["exp_avg"].dtype for state in state_of(resumed.optimizer) if state}
    assert moments == {torch.float32 if dtype == torch.bfloat16 and state_dtype else dtype}
    frozen = [
        not torch.equal(p, q.to(dtype)) for p, q in zip(resumed.model.parameters(), net().parameters(), strict=True)
    ]
    assert frozen == [True, True, False, True, True, True]


@pytest.mark.parametrize("anchor", ["init", weighted])
def test_a_run_resumes_in_a_fresh_process_that_knows_no_anchor(anchor: Any) -> None:
    """A snapshot travels in the checkpoint: the resuming optimizer needs no anchor of its own."""
    run = Run(anchor)
    run.train(range(2))
    model = net()
    optimizer = fastft.AdamW(
        [{"params": list(model.parameters())[:2]}, {"params": list(model.parameters())[2:]}],
        max_grad_norm=2.0,
        skip_nonfinite=True,
    )
    saved = saved_and_loaded(run.checkpoint())
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    for step in (3, 4):
        for one, m in ((run.optimizer, run.model), (optimizer, model)):
            give_grads(m.parameters(), step)
            one.step()
    assert_same(list(model.parameters()), list(run.model.parameters()), "parameters")
    assert optimizer.param_groups[0]["anchor_decay"] == 4.0


def test_a_bfloat16_snapshot_is_saved_as_it_is_kept() -> None:
    run = Run(anchor=in_bfloat16)
    run.train(range(1))
    start = net()
    saved = saved_and_loaded(run.checkpoint())["optimizer"]
    assert metadata_of(saved)["anchor_file"] is None
    anchors = carried_by(saved, "anchor")
    assert list(anchors) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert_same(anchors, {name: start.get_parameter(name).detach().bfloat16() for name in anchors}, "anchors")


def test_wide_moments_of_a_torch_checkpoint_are_kept_or_rounded_as_asked() -> None:
    """float32 moments from elsewhere: torch rounds them to the parameter's dtype, ``state_dtype`` keeps them."""
    source = net()
    torchs = torch.optim.AdamW(source.parameters(), lr=1e-2)
    train(torchs, range(3))
    saved = torchs.state_dict()
    for state_dtype in (None, torch.float32):
        model = net(dtype=torch.bfloat16)
        optimizer = fastft.AdamW(model.parameters(), lr=1e-2, state_dtype=state_dtype)
        optimizer.load_state_dict(saved)
        for state, original in zip(state_of(optimizer), state_of(torchs), strict=True):
            for key in ("exp_avg", "exp_avg_sq"):
                expected = original[key] if state_dtype else original[key].bfloat16()
                assert_same(state[key], expected, key)
                assert state[key] is not original[key]
        train(optimizer, [3])


# -- an anchor in a file ---------------------------------------------------------------------------------


@pytest.fixture
def file_run(tmp_path: Path) -> tuple[Run, Path]:
    path = tmp_path / "base.safetensors"
    run = Run(anchor=from_file(path))
    run.train(range(2))
    return run, path


def test_an_anchor_in_a_file_is_saved_as_its_path_and_hash(file_run: tuple[Run, Path]) -> None:
    run, path = file_run
    saved = run.optimizer.state_dict()
    assert carried_by(saved, "anchor") == {}
    anchored = ["0.weight", "0.bias", "1.weight", "1.bias", "3.weight"]
    for group in (0, 1):
        meta = metadata_of(saved, group)
        assert meta["anchor_file"]["path"] == str(path)
        assert len(meta["anchor_file"]["sha256"]) == 64
    assert names_in_file(saved) == {name: name for name in anchored}
    assert [name for name, flags in flags_of(saved).items() if flags & Has.ANCHOR_IN_FILE] == anchored


def overwritten(path: Path) -> None:
    save_file({name: p.detach() * 0.5 for name, p in net().named_parameters()}, path)


@pytest.mark.parametrize(
    ("happened", "message"),
    [
        (overwritten, r"base\.safetensors: the anchor's file has changed: expected sha256 \w{64}, got \w{64}"),
        (
            Path.unlink,
            r"base\.safetensors: the anchor's file does not exist; if it was moved, make the anchor from its",
        ),
        (lambda path: path.rename(path.with_name("moved.safetensors")), "does not exist; if it was moved"),
    ],
    ids=["changed", "deleted", "moved"],
)
def test_a_file_that_is_not_what_it_was_is_refused(
    happened: Callable[[Path], Any], message: str, file_run: tuple[Run, Path]
) -> None:
    run, path = file_run
    saved = saved_and_loaded(run.checkpoint())["optimizer"]
    happened(path)
    fresh = Run()
    before = everything(fresh.optimizer)
    with pytest.raises(ValueError, match=message):
        fresh.optimizer.load_state_dict(saved)
    assert_same(everything(fresh.optimizer), before, "after the error")


def test_a_moved_file_is_found_through_an_anchor_made_from_its_new_place(file_run: tuple[Run, Path]) -> None:
    run, path = file_run
    saved = saved_and_loaded(run.checkpoint())
    moved = path.with_name("moved.safetensors")
    path.rename(moved)
    resumed = Run(anchor=from_file(moved))
    resumed.model.load_state_dict(saved["model"])
    resumed.optimizer.load_state_dict(saved["optimizer"])
    run.train(range(2, 6))
    resumed.train(range(2, 6))
    assert_same(list(resumed.model.parameters()), list(run.model.parameters()), "parameters")
    assert metadata_of(resumed.optimizer.state_dict())["anchor_file"]["path"] == str(moved)


def test_a_moved_file_with_other_content_is_refused(file_run: tuple[Run, Path]) -> None:
    run, path = file_run
    saved = saved_and_loaded(run.checkpoint())["optimizer"]
    path.unlink()
    other = path.with_name("other.safetensors")
    overwritten(other)
    resumed = Run(anchor=from_file(other))
    before = everything(resumed.optimizer)
    with pytest.raises(ValueError, match=r"base\.safetensors: the anchor's file does not exist"):
        resumed.optimizer.load_state_dict(saved)
    assert_same(everything(resumed.optimizer), before, "after the error")


@pytest.mark.parametrize("resumer", ["knows_the_file", "took_a_head_in_as_well"])
def test_what_was_taken_into_an_anchor_in_a_file_comes_back_too(resumer: str, tmp_path: Path) -> None:
    """The file's part is the same file; the rest must come from the checkpoint, whatever the resuming one holds."""
    in_file = from_file(tmp_path / "base.safetensors")

    def with_head(model: nn.Module) -> Anchor:
        anchor = in_file(model)
        anchor.update(Anchor.snapshot([("3.bias", model[3].bias)]))
        return anchor

    run = Run(anchor=with_head)
    run.train(range(2))
    saved = saved_and_loaded(run.checkpoint())
    assert list(carried_by(saved["optimizer"], "anchor")) == ["3.bias"]
    run.train(range(3, 5))

    def of_another_start(model: nn.Module) -> Anchor:
        with torch.no_grad():
            model[3].bias.add_(1.0)
        return with_head(model) if resumer == "took_a_head_in_as_well" else in_file(model)

    resumed = Run(anchor=of_another_start)
    resumed.model.load_state_dict(saved["model"])
    resumed.optimizer.load_state_dict(saved["optimizer"])
    resumed.train(range(3, 5))
    assert_same(list(resumed.model.parameters()), list(run.model.parameters()), "parameters")


# -- older, odd and wrong state dicts --------------------------------------------------------------------


def drop_group_keys(*keys: str) -> Callable[[dict[str, Any]], None]:
    def edit(saved: dict[str, Any]) -> None:
        for group in saved["param_groups"]:
            for key in keys:
                group.pop(key)

    return edit


def steps_as(make: Callable[[Tensor], Any]) -> Callable[[dict[str, Any]], None]:
    def edit(saved: dict[str, Any]) -> None:
        for state in saved["state"].values():
            state["step"] = make(state["step"])

    return edit


def without_extras(saved: dict[str, Any]) -> None:
    """As torch 1.x wrote it: no flags that are younger, numbers for steps, nothing of ours."""
    young = ("amsgrad", "maximize", "foreach", "capturable", "differentiable", "fused", "decoupled_weight_decay")
    drop_group_keys(*young, "anchor_decay", "anchor_mode", "fastft")(saved)
    steps_as(lambda step: int(step.item()))(saved)
    del saved["fastft"]


OLDER: dict[str, Callable[[dict[str, Any]], Any]] = {
    "torch_1": without_extras,
    "no_fastft_key": lambda saved: saved.pop("fastft"),
    "no_fastft_key_in_groups": drop_group_keys("fastft"),
    "no_group_options_of_ours": drop_group_keys("anchor_decay", "anchor_mode"),
    "no_amsgrad": drop_group_keys("amsgrad"),
    "adam_not_adamw": lambda saved: [g.update(decoupled_weight_decay=False) for g in saved["param_groups"]],
    "integer_steps": steps_as(lambda step: int(step)),
    "float_steps": steps_as(lambda step: float(step)),
    "one_element_steps": steps_as(lambda step: step.reshape(1)),
    "float64_steps": steps_as(lambda step: step.double()),
    "int64_steps": steps_as(lambda step: step.long()),
}


@pytest.mark.parametrize("name", OLDER)
def test_older_and_odd_state_dicts_load(name: str) -> None:
    twins = Twins()
    twins.step(3)
    saved = copy.deepcopy(twins.ours.state_dict())
    OLDER[name](saved)
    fresh = Twins()
    for which in (0, 1):
        fresh.models[which].load_state_dict(twins.models[which].state_dict())
    fresh.ours.load_state_dict(saved)
    fresh.theirs.load_state_dict(twins.theirs.state_dict())
    for step in (3, 4):
        for model, optimizer in zip(fresh.models, fresh.optimizers, strict=True):
            give_grads(model.parameters(), step)
            optimizer.step()
        assert_near(fresh.params(0), fresh.params(1), "parameters")
    assert {float(state["step"]) for state in state_of(fresh.ours)} == {5.0}
    group = fresh.ours.param_groups[0]
    assert (group["amsgrad"], group["decoupled_weight_decay"], group["anchor_decay"]) == (False, True, 0.0)


def test_a_partial_state_loads_and_the_rest_starts_at_one() -> None:
    model = net()
    optimizer = fastft.AdamW(model.parameters())
    train(optimizer, range(3))
    saved = copy.deepcopy(optimizer.state_dict())
    del saved["state"][0], saved["state"][4]
    optimizer.load_state_dict(saved)
    train(optimizer, [3])
    assert [float(state["step"]) for state in state_of(optimizer)] == [1.0, 4.0, 4.0, 4.0, 1.0, 4.0]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda s: s["state"][2].pop("exp_avg"),
            r"param_groups\[0\]\['params'\]\[2\]: state: expected tensors for exp_avg, got \['exp_avg_sq', 'step'\]",
        ),
        (
            lambda s: s["state"][2].update(exp_avg=torch.zeros(3)),
            r"\['params'\]\[2\]: exp_avg: expected .* shape \[17\]",
        ),
        (
            lambda s: s["state"][2].update(step=torch.zeros(2)),
            r"\[2\]: state: step: expected one number, got shape \[2\]",
        ),
        (
            lambda s: s["param_groups"][0].update(amsgrad=True),
            r"\[0\]: state: expected tensors for max_exp_avg_sq, got \['exp_avg', 'exp_avg_sq', 'step'\]",
        ),
    ],
    ids=["no_moment", "wrong_shape", "two_steps", "amsgrad_without_maximum"],
)
def test_a_state_that_cannot_be_stepped_says_so_before_anything_is_written(
    edit: Callable[[dict[str, Any]], Any], message: str
) -> None:
    model = net()
    optimizer = fastft.AdamW(model.parameters())
    train(optimizer, range(2))
    saved = copy.deepcopy(optimizer.state_dict())
    edit(saved)
    optimizer.load_state_dict(saved)
    before = copy.deepcopy((list(model.parameters()), state_of(optimizer)))
    with pytest.raises(ValueError, match=message):
        train(optimizer, [2])
    assert_same((list(model.parameters()), state_of(optimizer)), before, "after the error")


def in_version_1(saved: dict[str, Any]) -> None:
    """As the releases before wrote it: everything of ours beside torch's part."""
    anchors = {"version": 1, "source": None, "names": [], "offloaded": False, "tensors": {}, "importance": {}}
    masks = {i: entry["update_mask"] for i, entry in enumerate(carried(saved)) if "update_mask" in entry}
    for state in saved["state"].values():
        for key in CARRIED:
            state.pop(key, None)
    drop_group_keys("fastft")(saved)
    skipped = torch.tensor(1)
    saved["fastft"] = {"version": 1, "frozen": [2], "masks": masks, "anchor": anchors, "skipped_steps": skipped}


WRONG: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "version_1": (
        in_version_1,
        r'state_dict\["fastft"\]: expected version 2, got 1: it was written by another release of fastft',
    ),
    "a_later_version": (lambda s: s["fastft"].update(version=3), r'state_dict\["fastft"\]: expected version 2, got 3'),
    "no_version": (lambda s: s["fastft"].pop("version"), "expected version 2, got None"),
    "a_later_version_in_groups": (
        lambda s: change_metadata(s, version=3),
        r'state_dict: param_groups\[0\]\["fastft"\]: expected version 2, got 3: it was written by another release',
    ),
    "a_seed_that_is_none": (lambda s: change_metadata(s, rounding_seed="7"), "rounding_seed: expected an integer, got"),
    "an_anchor_that_got_lost": (
        lambda s: s["state"][0].pop("anchor"),
        r"state\[0\] of 0\.weight: expected its anchor, got none\. It was saved with an anchor",
    ),
    "a_mask_that_got_lost": (
        lambda s: s["state"][0].pop("update_mask"),
        r"state\[0\] of 0\.weight: expected its update_mask, got none\. It was saved with an update mask",
    ),
    "a_mask_that_nobody_saved": (
        lambda s: s["state"][1].update(update_mask=torch.ones(17, dtype=torch.bool)),
        r"state\[1\] of 0\.bias: expected no update_mask, as it was saved without an update mask, got one",
    ),
    "a_mask_of_another_shape": (
        lambda s: s["state"][0].update(update_mask=torch.ones(4, dtype=torch.bool)),
        r"0\.weight: update mask: expected shape \[17\] \(rows\) or \[17, 5\] \(elements\), got \[4\]",
    ),
    "a_mask_of_another_dtype": (
        lambda s: s["state"][0].update(update_mask=torch.ones(17)),
        r"0\.weight: update mask: expected dtype torch.bool, got torch.float32",
    ),
    "an_anchor_of_another_shape": (
        lambda s: s["state"][5].update(anchor=torch.zeros(4)),
        r"3\.bias: anchor: expected a floating-point tensor of shape \[3\], got torch\.float32 of shape \[4\]",
    ),
    "an_anchor_of_integers": (
        lambda s: s["state"][5].update(anchor=torch.zeros(3, dtype=torch.int64)),
        r"3\.bias: anchor: expected a floating-point tensor of shape \[3\], got torch\.int64",
    ),
    "another_number_of_groups": (
        lambda s: s["param_groups"].pop(),
        r"state_dict: param_groups\[1\]: expected the state of 1\.weight, 1\.bias, 3\.weight, 3\.bias, got none",
    ),
    "another_number_of_groups_without_names": (
        lambda s: (drop_group_keys("param_names")(s), s["param_groups"].pop()),
        "loaded state dict has a different number of parameter groups",
    ),
    "another_number_of_parameters": (
        lambda s: s["param_groups"][1]["params"].pop(),
        "that doesn't match the size of optimizer's group",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_load_that_fails_changes_nothing(name: str) -> None:
    edit, message = WRONG[name]
    run = Run()
    run.restrict()
    run.train(range(3))
    saved = copy.deepcopy(run.optimizer.state_dict())
    run.optimizer.unfreeze(run.model[1].weight)
    run.optimizer.set_update_mask(run.model[0].weight, None)
    run.train(range(3, 5))
    edit(saved)
    untouched = copy.deepcopy(saved)
    other = copy.deepcopy(run)
    before = everything(run.optimizer)
    with pytest.raises(ValueError, match=message):
        run.optimizer.load_state_dict(saved)
    assert_same(everything(run.optimizer), before, "after the error")
    assert_same(saved, untouched, "the dict")
    run.train(range(5, 7))
    other.train(range(5, 7))
    assert_same(list(run.model.parameters()), list(other.model.parameters()), "the run after the error")


# -- who owns what ---------------------------------------------------------------------------------------


def own_part(saved: dict[str, Any]) -> list[Any]:
    """The parts of a state dict that torch's lacks."""
    return [saved["fastft"], carried(saved), [metadata_of(saved, i) for i in range(len(saved["param_groups"]))]]


def test_a_saved_dict_does_not_change_with_the_run() -> None:
    """Of torch's part that holds as far as in torch: moments are shared until the dict is written or copied."""
    run = Run()
    run.restrict()
    run.train(range(3))
    saved = run.optimizer.state_dict()
    groups, ours = copy.deepcopy(saved["param_groups"]), copy.deepcopy(own_part(saved))
    run.optimizer.set_update_mask(run.model[0].weight, None)
    run.optimizer.unfreeze(run.model[1].weight)
    run.optimizer.param_groups[0]["lr"] = 0.2
    run.train(range(3, 7))
    assert_same(own_part(saved), ours, "fastft's part")
    assert_same(saved["param_groups"], groups, "groups")
    assert metadata_of(run.optimizer.state_dict())["skipped_steps"] == metadata_of(saved)["skipped_steps"] + 1 == 2


def test_a_loaded_dict_and_the_run_do_not_share_what_is_ours() -> None:
    run, other = (
        Run(dtype=torch.bfloat16, state_dtype=torch.float32),
        Run(dtype=torch.bfloat16, state_dtype=torch.float32),
    )
    run.restrict()
    run.train(range(3))
    saved = copy.deepcopy(run.optimizer.state_dict())
    untouched = copy.deepcopy(saved)
    for one in (run, other):
        one.optimizer.load_state_dict(saved)
    run.train(range(3, 6))
    for state in saved["state"].values():
        state.pop("step")
    for state in untouched["state"].values():
        state.pop("step")
    assert_same(saved, untouched, "the dict")
    before = copy.deepcopy(own_part(other.optimizer.state_dict()))
    tensors = [tensor for entry in carried(saved) for tensor in entry.values()]
    assert len(tensors) == 6 + 6 + 2  # flags, anchors, masks
    for tensor in tensors:
        tensor.zero_()
    saved["fastft"]["frozen"].clear()
    saved["fastft"]["without_moments"].clear()
    assert_same(own_part(other.optimizer.state_dict()), before, "the other run")


def test_moments_are_shared_with_a_loaded_dict_exactly_where_torch_shares_them() -> None:
    shared = []
    for cls in (fastft.AdamW, torch.optim.AdamW):
        model = net()
        optimizer = cls(model.parameters())
        train(optimizer, range(2))
        saved = copy.deepcopy(optimizer.state_dict())
        optimizer.load_state_dict(saved)
        shared.append(
            [
                {key: value.data_ptr() == saved["state"][i][key].data_ptr() for key, value in state.items()}
                for i, state in enumerate(state_of(optimizer))
            ]
        )
    assert shared[0] == shared[1]


def test_loading_leaves_the_users_anchor_object_alone() -> None:
    model = net()
    anchor = Anchor.snapshot(model)
    optimizer = fastft.AdamW(model.named_parameters(), lr=1e-2, anchor=anchor, anchor_decay=3.0)
    kept = {name: anchor[name].clone() for name in anchor}
    saved = copy.deepcopy(optimizer.state_dict())
    for tensor in carried_by(saved, "anchor").values():
        tensor.mul_(2.0)
    optimizer.load_state_dict(saved)
    assert_same({name: anchor[name] for name in anchor}, kept, "the user's anchor")
    doubled = {name: 2.0 * tensor for name, tensor in kept.items()}
    assert_same(carried_by(optimizer.state_dict(), "anchor"), doubled, "the optimizer's")


def test_a_checkpoint_without_an_anchor_keeps_the_optimizers() -> None:
    model = net()
    plain = fastft.AdamW(model.parameters(), lr=1e-2)
    train(plain, range(2))
    saved = plain.state_dict()
    anchored = fastft.AdamW(model.parameters(), lr=1e-2, anchor="init", anchor_decay=3.0)
    anchored.load_state_dict(saved)
    assert anchored.param_groups[0]["anchor_decay"] == 0.0  # an option of the group, and so the checkpoint's
    assert_same(
        carried_by(anchored.state_dict(), "anchor"), dict(enumerate(p.detach() for p in model.parameters())), "anchor"
    )
