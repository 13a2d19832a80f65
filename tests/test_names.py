"""One rule from a parameter to its name: an anchor is found through wrappers, whichever side is wrapped."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import fastft
from fastft import Anchor
from fastft.names import NameIndex, bare, clean, covers, matching
from fastft.optim import AdamW
from fastft.retention import child_tuning_, drift_report, interpolate_


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))


class Inside(nn.Module):
    """Holds a module under the name that a wrapper gives it."""

    def __init__(self, name: str, module: nn.Module) -> None:
        super().__init__()
        self.add_module(name, module)


def peft_like(model: nn.Module) -> nn.Module:
    return Inside("base_model", Inside("model", model))


def fsdp_like(model: nn.Module) -> nn.Module:
    assert isinstance(model, nn.Sequential)
    return nn.Sequential(*(Inside("_fsdp_wrapped_module", child) for child in model))


def compiled(model: nn.Module) -> Any:
    return torch.compile(model, backend="eager")


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "plain": lambda model: model,
    "ddp": nn.DataParallel,  # its prefix is DDP's, and it needs no process group
    "compile": compiled,
    "peft": peft_like,
    "fsdp": fsdp_like,
    "compiled_ddp": lambda model: compiled(nn.DataParallel(model)),
    "ddp_of_compiled_peft": lambda model: nn.DataParallel(compiled(peft_like(model))),
}
PREFIXES = {
    "plain": "",
    "ddp": "module.",
    "compile": "_orig_mod.",
    "peft": "base_model.model.",
    "compiled_ddp": "_orig_mod.module.",
    "ddp_of_compiled_peft": "module._orig_mod.base_model.model.",
}
EITHER_SIDE = pytest.mark.parametrize(
    ("anchored", "trained"),
    [
        *(("plain", wrapper) for wrapper in WRAPPERS),
        *((wrapper, "plain") for wrapper in WRAPPERS if wrapper != "plain"),
        ("ddp", "compile"),
        ("peft", "ddp"),
        ("fsdp", "ddp_of_compiled_peft"),
    ],
)


def wrapped(wrapper: str, seed: int) -> nn.Module:
    return WRAPPERS[wrapper](net(seed))


def values(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("wrapper", PREFIXES)
def test_the_wrappers_of_these_tests_name_parameters_as_the_real_ones_do(wrapper: str) -> None:
    names = [name for name, _ in wrapped(wrapper, 0).named_parameters()]
    assert names == [PREFIXES[wrapper] + name for name, _ in net().named_parameters()]


# -- an anchor, wherever it is looked up ---------------------------------------------------------------------


@EITHER_SIDE
@pytest.mark.parametrize("weighted", [False, True])
def test_the_optimizer_pulls_every_parameter(anchored: str, trained: str, weighted: bool) -> None:
    source, model = wrapped(anchored, 0), wrapped(trained, 1)
    anchor = Anchor.snapshot(source)
    if weighted:
        anchor = anchor.with_importance({name: torch.ones_like(p) for name, p in model.named_parameters()})
    optimizer = AdamW(model.named_parameters(), lr=0.1, weight_decay=0.0, anchor=anchor, anchor_decay=5.0)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    before = values(model)
    optimizer.step()
    pull = 0.5 / 1.5 if weighted else 0.5
    for p, old, start in zip(model.parameters(), before, source.parameters(), strict=True):
        torch.testing.assert_close(p.detach(), old - pull * (old - start.detach()))


@EITHER_SIDE
def test_a_drift_report_compares_every_parameter(anchored: str, trained: str) -> None:
    source, model = wrapped(anchored, 0), wrapped(trained, 1)
    report = drift_report(model, Anchor.snapshot(source), ["*"])
    assert report.total.unanchored == ()
    assert report.total.elements == sum(p.numel() for p in net().parameters())
    distance = sum((a - b).square().sum().item() for a, b in zip(values(model), values(source), strict=True)) ** 0.5
    assert report.total.distance == pytest.approx(distance)


@EITHER_SIDE
def test_interpolation_reaches_every_parameter(anchored: str, trained: str) -> None:
    source, model = wrapped(anchored, 0), wrapped(trained, 1)
    before = values(model)
    with interpolate_(model, Anchor.snapshot(source), 0.0) as interpolation:
        assert interpolation.unanchored == ()
        assert all(torch.equal(a, b) for a, b in zip(values(model), values(source), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(values(model), before, strict=True))


@EITHER_SIDE
def test_an_importance_is_found(anchored: str, trained: str) -> None:
    source, model = wrapped(anchored, 0), wrapped(trained, 1)
    importance = {name: torch.rand_like(p) for name, p in model.named_parameters()}
    anchor = Anchor.snapshot(source).with_importance(importance)
    assert anchor.weighted
    for (own, p), (name, other) in zip(source.named_parameters(), model.named_parameters(), strict=True):
        assert anchor.find(p) == anchor.find(name) == anchor.find(other, name) == own
        for found in (anchor.importance_of(p), anchor.importance_of(name), anchor.importance_for(other, name)):
            assert found is not None and torch.equal(found, importance[name])
        assert name in anchor and torch.equal(anchor[name], p)


@EITHER_SIDE
def test_bindings_and_states_go_on(anchored: str, trained: str) -> None:
    source, model = wrapped(anchored, 0), wrapped(trained, 1)
    anchor = Anchor.snapshot(source)
    anchor.bind(model.named_parameters())
    assert [anchor.find(p) for p in model.parameters()] == list(anchor.names)
    # An anchor that was saved under other names keeps the parameters that this one is bound to.
    own = Anchor.snapshot(model)
    own.load_state_dict(Anchor.snapshot(source).state_dict())
    assert own.names == anchor.names
    assert [own.find(p) for p in model.parameters()] == list(own.names)


@EITHER_SIDE
def test_an_optimizers_state_goes_on(anchored: str, trained: str) -> None:
    source, model = wrapped(anchored, 0), wrapped(trained, 1)
    options: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.0, "anchor_decay": 5.0}
    saved = AdamW(source.named_parameters(), anchor=Anchor.snapshot(source), **options).state_dict()
    resumed = AdamW(model.named_parameters(), anchor="init", **options)
    resumed.load_state_dict(saved)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    before = values(model)
    resumed.step()
    for p, old, start in zip(model.parameters(), before, source.parameters(), strict=True):
        torch.testing.assert_close(p.detach(), old - 0.5 * (old - start.detach()))


@EITHER_SIDE
def test_child_tuning_finds_the_parameters(anchored: str, trained: str) -> None:
    source, model = wrapped(anchored, 0), wrapped(trained, 1)
    optimizer = fastft.AdamW(model.named_parameters(), lr=0.1)
    fisher = {name: torch.rand_like(p) for name, p in source.named_parameters()}
    masks = child_tuning_(optimizer, model, fisher)
    assert list(masks) == list(fisher)
    for mask, p in zip(masks.values(), model.parameters(), strict=True):
        found = optimizer.update_mask(p)
        assert found is not None and torch.equal(found, mask)


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_files_weights_are_found(wrapper: str, tmp_path: Path) -> None:
    source, model = net(), wrapped(wrapper, 1)
    save_file(source.state_dict(), tmp_path / "model.safetensors")
    anchor = Anchor.from_safetensors(tmp_path, model)
    assert anchor.names == tuple(name for name, _ in model.named_parameters())
    for p, start in zip(model.parameters(), source.parameters(), strict=True):
        assert torch.equal(anchor[p], start)


# -- which one it is -----------------------------------------------------------------------------------------


class Holder(nn.Module):
    """A model whose own parts are called as wrappers call theirs."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(3))
        self.module = nn.Linear(3, 3)


def test_a_child_called_module_is_not_taken_for_a_wrapper() -> None:
    anchor = Anchor.snapshot(Holder(0))
    found = {name: anchor.find(p, name) for name, p in compiled(Holder(1)).named_parameters()}
    assert found == {f"_orig_mod.{name}": name for name in ("weight", "module.weight", "module.bias")}


def test_the_parameter_itself_goes_before_its_name() -> None:
    model = net()
    anchor = Anchor.snapshot(model)
    assert anchor.find(next(model.parameters()), "2.weight") == "0.weight"
    assert anchor.find(nn.Parameter(torch.ones(2)), "2.weight") == "2.weight"
    assert anchor.find(nn.Parameter(torch.ones(2))) is None
    assert anchor.find("3.weight") is anchor.find(nn.Parameter(torch.ones(2)), "module.3.weight") is None


def test_several_that_only_wrappers_tell_apart_are_an_error() -> None:
    anchor = Anchor.snapshot([("a.weight", torch.ones(2)), ("_orig_mod.a.weight", torch.zeros(2))])
    assert anchor.find("a.weight") == "a.weight" and anchor.find("_orig_mod.a.weight") == "_orig_mod.a.weight"
    message = "base_model.model.a.weight: expected one name .*, got a.weight, _orig_mod.a.weight"
    with pytest.raises(ValueError, match=message):
        anchor.find("base_model.model.a.weight")


def test_another_anchors_names_are_found_after_an_update() -> None:
    anchor = Anchor.snapshot([("a", torch.ones(2))])
    assert anchor.find("module.b") is None
    anchor.update(Anchor.snapshot([("b", torch.ones(2))]))
    assert anchor.find("module.b") == "b"


@pytest.mark.parametrize(
    ("name", "cleaned", "bared"),
    [
        ("layer.0.weight", "layer.0.weight", "layer.0.weight"),
        ("module.layer.weight", "module.layer.weight", "layer.weight"),
        ("module._orig_mod.base_model.model.x", "module.base_model.model.x", "x"),
        ("a._checkpoint_wrapped_module.b._fsdp_wrapped_module.weight", "a.b.weight", "a.b.weight"),
        ("my_orig_mod.weight", "my_orig_mod.weight", "my_orig_mod.weight"),
        ("a.module.weight", "a.module.weight", "a.module.weight"),
    ],
)
def test_names_without_what_wrappers_add(name: str, cleaned: str, bared: str) -> None:
    assert (clean(name), bare(name)) == (cleaned, bared)


def test_an_index_prefers_the_name_itself() -> None:
    index = NameIndex(["module.a", "a"])
    assert index.find("a") == "a" and index.find("module.a") == "module.a"
    assert index.find("_orig_mod.a") == "a" and index.find("_orig_mod.module.a") == "module.a"
    assert index.find("b") is None


# -- patterns ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "covered"),
    [("a.b", ["a.b", "a.b.c"]), ("a", ["a.b", "a.b.c"]), ("*.c", ["a.b.c"]), ("a.?", ["a.b"]), ("b", [])],
)
def test_a_pattern_is_a_name_a_module_or_a_glob(pattern: str, covered: list[str]) -> None:
    names = ["a.b", "a.b.c", "ab"]
    assert [name for name in names if covers(pattern, name)] == covered
    if covered:
        assert matching(pattern, names) == matching([pattern, pattern], names) == covered
    else:
        with pytest.raises(ValueError, match="groups: 'b' matches no parameter"):
            matching([pattern], names, "groups")
