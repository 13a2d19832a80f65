"""Where anchors come from, how they are kept, and that a step pulls to exactly what they hold.

With a GPU, tests marked ``cuda`` cover what cannot be had without one: pinned memory, the copies on a stream of their
own, and anchors on another device than the optimizer's.
"""

from __future__ import annotations

import copy
import gc
import io
import json
import pickle
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from contract_cases import assert_near, assert_same, give_grads, net, train
from safetensors.torch import save_file
from torch import Tensor, nn

import fastft
from fastft import _C, Anchor
from fastft.optim import AnchorDecayScheduler, reference
from fastft.optim.entries import STAGED, Part, parts_of
from fastft.optim.processes import HERE, Spread
from fastft.optim.staging import PART_BYTES, Staging, aligned, staging_for

NAMES = ("0.weight", "0.bias", "1.weight", "1.bias", "3.weight", "3.bias")


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def contents(anchor: Anchor) -> dict[str, Tensor]:
    return {name: anchor[name] for name in anchor}


# -- snapshots -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("of", [lambda m: m, lambda m: m.named_parameters(), lambda m: list(m.named_parameters())])
def test_a_snapshot_holds_the_values_of_now(of: Callable[[nn.Module], Any]) -> None:
    model = net()
    before = weights(model)
    anchor = Anchor.snapshot(of(model))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    assert_same(contents(anchor), before, "snapshot")
    assert tuple(anchor) == anchor.names == NAMES
    assert len(anchor) == 6
    assert anchor.source is None and not anchor.offloaded
    assert not any(t.requires_grad for t in contents(anchor).values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("param_dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_a_snapshot_is_kept_in_the_dtype_asked_for(param_dtype: torch.dtype, dtype: torch.dtype) -> None:
    model = net(dtype=param_dtype)
    assert_same(contents(Anchor.snapshot(model)), weights(model), "its own")
    expected = {name: w.to(dtype) for name, w in weights(model).items()}
    assert_same(contents(Anchor.snapshot(model, dtype=dtype)), expected, "asked for")


def test_a_snapshot_keeps_the_memory_order() -> None:
    """So that a step reads both in one go, without a second copy."""
    conv = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    transposed = nn.Parameter(torch.randn(5, 7).t())
    anchor = Anchor.snapshot([("conv", conv.weight), ("transposed", transposed)])
    for name, p in (("conv", conv.weight), ("transposed", transposed)):
        assert anchor[name].stride() == p.stride()
        assert anchor.tensor_for(p) is anchor[name]


def test_a_snapshot_on_a_named_device_is_the_same_on_the_cpu() -> None:
    anchor = Anchor.snapshot(net(), device="cpu")
    assert not anchor.offloaded  # host memory is where the parameters are
    assert {t.device.type for t in contents(anchor).values()} == {"cpu"}


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 6)
        self.body = nn.Linear(6, 6)
        self.head = nn.Linear(6, 9, bias=False)
        self.head.weight = self.embedding.weight


def test_tied_parameters_share_one_copy() -> None:
    model = Tied()
    anchor = Anchor.snapshot(model.named_parameters(remove_duplicate=False))
    assert set(anchor) == {"embedding.weight", "body.weight", "body.bias", "head.weight"}
    assert anchor["head.weight"] is anchor["embedding.weight"]
    assert anchor.find(model.head.weight) == "embedding.weight"
    assert anchor[model.head.weight] is anchor["head.weight"]
    assert "102 elements" not in repr(anchor) and "96 elements" in repr(anchor)  # 54 + 36 + 6, counted once


@pytest.mark.parametrize(
    ("exclude", "left"),
    [
        ((), NAMES),
        ("3", NAMES[:4]),
        (["3.weight"], (*NAMES[:4], "3.bias")),
        ("*.bias", ("0.weight", "1.weight", "3.weight")),
        (["[01].weight", "3"], ("0.bias", "1.bias")),
        (["0", "1.*", "3.*"], ()),
        (iter(["0.weight", "0.bias"]), NAMES[2:]),
    ],
    ids=["nothing", "module", "name", "glob", "several", "all", "iterator"],
)
def test_exclude_takes_names_globs_and_modules(exclude: Any, left: tuple[str, ...]) -> None:
    assert Anchor.snapshot(net(), exclude=exclude).names == left


def test_a_module_name_is_not_a_prefix_of_letters() -> None:
    named = [(name, nn.Parameter(torch.ones(2))) for name in ("head.weight", "head2.weight", "head")]
    assert Anchor.snapshot(named, exclude="head").names == ("head2.weight",)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            lambda: {"exclude": "3.wieght"},
            ValueError,
            r"exclude: '3\.wieght' matches no parameter; closest: 3\.weight",
        ),
        (lambda: {"exclude": ["0", "head"]}, ValueError, "exclude: 'head' matches no parameter"),
        (lambda: {"exclude": ""}, ValueError, "exclude: '' matches no parameter"),
        (
            lambda: {"dtype": torch.int8},
            ValueError,
            "dtype: expected float32, bfloat16, float16 or float64, got torch.int8",
        ),
        (
            lambda: {"dtype": torch.float64},
            ValueError,
            r"float64 goes with float64 parameters only, and 0\.weight is torch",
        ),
    ],
    ids=["typo", "one_of_two", "empty", "integer", "too_wide"],
)
def test_wrong_options_of_a_snapshot(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Anchor.snapshot(net(), **arguments())


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ([("a", torch.ones(2)), ("a", torch.ones(3))], ValueError, "a: expected each name once, got it twice"),
        (
            net().parameters(),
            TypeError,
            r"expected a module or \(name, parameter\) pairs.*model\.named_parameters\(\); got",
        ),
        ([("a", 3.0)], TypeError, r"expected a module or \(name, parameter\) pairs"),
        (net().state_dict(), TypeError, r"expected a module or \(name, parameter\) pairs"),
        ([("ids", torch.arange(3))], ValueError, r"ids: expected a dense float32.* got torch\.int64.*exclude"),
        ([("z", torch.ones(2, dtype=torch.complex64))], ValueError, r"z: expected a dense .* got torch\.complex64"),
        (
            [("s", torch.eye(3).to_sparse())],
            ValueError,
            r"s: expected a dense .*, got torch\.float32, torch\.sparse_coo",
        ),
        (
            [("m", torch.empty(2, device="meta"))],
            ValueError,
            "m: expected a parameter with values, got one on meta; load the weights first",
        ),
    ],
    ids=["twice", "unnamed", "no_tensor", "state_dict", "integers", "complex", "sparse", "meta"],
)
def test_what_cannot_be_anchored(source: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Anchor.snapshot(source)


def test_what_cannot_be_anchored_may_be_left_out() -> None:
    named = [("ids", torch.arange(3)), ("weight", torch.ones(2)), ("later", torch.empty(2, device="meta"))]
    assert Anchor.snapshot(named, exclude=["ids", "later"]).names == ("weight",)


# -- files -----------------------------------------------------------------------------------------------


def file_of(folder: Path, tensors: dict[str, Tensor], name: str = "model.safetensors") -> Path:
    save_file(tensors, folder / name)
    return folder / name


def shards_of(folder: Path, tensors: dict[str, Tensor], count: int = 2) -> Path:
    """As Hugging Face writes large models: numbered shards and an index."""
    weight_map = {}
    for i in range(count):
        part = dict(list(tensors.items())[i::count])
        name = f"model-{i + 1:05}-of-{count:05}.safetensors"
        save_file(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return index


@pytest.mark.parametrize("form", ["file", "path_as_text", "folder", "index", "folder_with_index"])
def test_weights_from_a_file(form: str, tmp_path: Path) -> None:
    model = net()
    stored = {name: w * 0.75 for name, w in weights(model).items()}
    path: Any = (shards_of if "index" in form else file_of)(tmp_path, stored)
    anchor = Anchor.from_safetensors(
        {"path_as_text": str(path), "folder": tmp_path, "folder_with_index": tmp_path}.get(form, path), model
    )
    assert anchor.names == NAMES
    assert_same(contents(anchor), stored, "contents")
    assert anchor.source is not None and anchor.source["path"] == str(path)
    assert not anchor.offloaded
    for name, p in model.named_parameters():
        assert anchor.find(p) == name


def test_one_file_is_preferred_to_shards_beside_it(tmp_path: Path) -> None:
    model = net()
    shards_of(tmp_path, weights(model))
    file_of(tmp_path, {name: w * 2 for name, w in weights(model).items()})
    assert torch.equal(Anchor.from_safetensors(tmp_path, model)["3.bias"], model[3].bias.detach() * 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_a_file_keeps_its_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    model = net()
    path = file_of(tmp_path, {name: w.to(dtype) for name, w in weights(model).items()})
    anchor = Anchor.from_safetensors(path, model)
    assert anchor["0.weight"].dtype == dtype
    prepared = anchor.tensor_for(model[0].weight)
    assert prepared is not None and prepared.dtype == (torch.float32 if dtype == torch.float64 else dtype)


def test_tensors_are_read_when_they_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And once only by an optimizer, however many steps it takes."""
    read: list[str] = []
    original = fastft.weight_file.WeightFile.read

    def counted(self: Any, name: str) -> Tensor:
        read.append(name)
        return original(self, name)

    monkeypatch.setattr(fastft.weight_file.WeightFile, "read", counted)
    model = net()
    anchor = Anchor.from_safetensors(file_of(tmp_path, weights(model)), model)
    optimizer = fastft.AdamW(model.parameters(), anchor=anchor, anchor_decay=2.0)
    assert read == []
    model[3].weight.grad, model[3].bias.grad = torch.ones(3, 17), torch.ones(3)
    optimizer.step()
    assert read == ["3.weight", "3.bias"]
    train(optimizer, range(4))
    assert sorted(read) == sorted(NAMES)


def test_a_file_deleted_before_it_was_read_is_missed_then(tmp_path: Path) -> None:
    model = net()
    path = file_of(tmp_path, weights(model))
    anchor = Anchor.from_safetensors(path, model)
    path.unlink()
    before = weights(model)
    optimizer = fastft.AdamW(model.parameters(), anchor=anchor, anchor_decay=2.0)
    with pytest.raises((FileNotFoundError, OSError), match=r"model\.safetensors"):
        train(optimizer, [0])
    assert_same(weights(model), before, "parameters")
    assert len(optimizer.state) == 0


@pytest.mark.parametrize(
    ("module_prefix", "file_prefix"),
    [("", ""), ("", "bert."), ("bert.", ""), ("a.b.", ""), ("", "model.encoder."), ("model.", "base_model.model.")],
)
def test_a_prefix_on_either_side_is_found(module_prefix: str, file_prefix: str, tmp_path: Path) -> None:
    model: nn.Module = net()
    stored = {file_prefix + name: w * 0.5 for name, w in weights(model).items()}
    stored["pooler.weight"] = torch.ones(2)  # files hold more than is asked for
    inner = model
    for part in reversed(module_prefix.split(".")[:-1]):
        model = nn.ModuleDict({part: model})
    anchor = Anchor.from_safetensors(file_of(tmp_path, stored), model)
    assert anchor.names == tuple(module_prefix + name for name in NAMES)
    for name, p in inner.named_parameters():
        assert torch.equal(anchor[p], stored[file_prefix + name])


def test_one_prefix_here_and_another_there_is_not_guessed(tmp_path: Path) -> None:
    model = nn.ModuleDict({"a": net()})
    path = file_of(tmp_path, {f"b.{name}": w for name, w in weights(model["a"]).items()})
    with pytest.raises(ValueError, match=r"cannot anchor 6 of 6 parameters:\n  a\.0\.weight: missing\n"):
        Anchor.from_safetensors(path, model)


def test_without_need_for_a_prefix_none_is_taken(tmp_path: Path) -> None:
    """A file with the names as they are, and the same once more under a prefix."""
    model = net()
    stored = {name: w * 2 for name, w in weights(model).items()}
    stored |= {f"teacher.{name}": w * 3 for name, w in weights(model).items()}
    anchor = Anchor.from_safetensors(file_of(tmp_path, stored), model)
    assert torch.equal(anchor["0.bias"], model[0].bias.detach() * 2)


def test_the_prefix_that_finds_most_wins(tmp_path: Path) -> None:
    """A new head beside a backbone whose names carry a prefix; some bare name that happens to be there too."""
    model = nn.ModuleDict({"encoder": net(), "head": nn.Linear(3, 2)})
    stored = {f"bert.encoder.{name}": w * 2 for name, w in weights(model["encoder"]).items()}
    stored["encoder.0.bias"] = torch.zeros(17)
    anchor = Anchor.from_safetensors(file_of(tmp_path, stored), model, exclude="head")
    assert torch.equal(anchor["encoder.0.bias"], stored["bert.encoder.0.bias"])
    assert len(anchor) == 6


@pytest.mark.parametrize("stored_name", ["embedding.weight", "head.weight"])
def test_a_tied_weight_is_found_under_any_of_its_names(stored_name: str, tmp_path: Path) -> None:
    model = Tied()
    stored = {stored_name: torch.full((9, 6), 0.5), "body.weight": torch.eye(6), "body.bias": torch.ones(6)}
    anchor = Anchor.from_safetensors(file_of(tmp_path, stored), model)
    assert torch.equal(anchor[model.head.weight], stored[stored_name])
    assert len(anchor) == 3
    with pytest.raises(ValueError, match=r"body\.bias: missing"):
        del stored["body.bias"]
        Anchor.from_safetensors(file_of(tmp_path, stored), model)


def test_all_that_is_wrong_with_a_file_is_said_at_once(tmp_path: Path) -> None:
    model = net()
    stored: dict[str, Tensor] = weights(model)
    del stored["0.bias"]
    stored["1.bias"] = torch.ones(4)
    stored["3.weight"] = stored["3.weight"].t().contiguous()
    stored["3.bias"] = torch.ones(3, dtype=torch.int32)
    path = file_of(tmp_path, stored)
    with pytest.raises(ValueError) as caught:
        Anchor.from_safetensors(path, model)
    assert str(caught.value).splitlines() == [
        f"{path}: cannot anchor 4 of 6 parameters:",
        "  0.bias: missing",
        "  1.bias: expected shape [17], the file holds [4]",
        "  3.weight: expected shape [3, 17], the file holds [17, 3]",
        "  3.bias: expected one of F32, BF16, F16, F64, the file holds I32",
        "Leave new ones out with exclude.",
    ]
    anchor = Anchor.from_safetensors(path, model, exclude=["0.bias", "1.bias", "3"])
    assert anchor.names == ("0.weight", "1.weight")


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (
            lambda folder: folder,
            r"expected model\.safetensors or model\.safetensors\.index\.json in this folder, found neither",
        ),
        (lambda folder: folder / "none.safetensors", r"none\.safetensors: the anchor's file does not exist"),
        (lambda folder: wrong_index(folder, "{}"), r'index\.json: expected an index with a "weight_map"'),
        (lambda folder: wrong_index(folder, '{"weight_map": {}}'), r'expected an index with a "weight_map"'),
        (
            lambda folder: wrong_index(folder, '{"weight_map": {"0.weight": "gone.safetensors"}}'),
            r"index\.json: shards are missing: .*gone\.safetensors",
        ),
        (
            lambda folder: wrong_index(folder, '{"weight_map": {"0.weight": "../other/gone.safetensors"}}'),
            r"expected shards beside the index, got '\.\./other/gone\.safetensors'",
        ),
    ],
    ids=["empty_folder", "no_file", "no_map", "empty_map", "shard_gone", "shard_elsewhere"],
)
def test_paths_that_lead_nowhere(prepare: Callable[[Path], Path], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        Anchor.from_safetensors(prepare(tmp_path), net())


def wrong_index(folder: Path, text: str) -> Path:
    path = folder / "model.safetensors.index.json"
    path.write_text(text)
    return path


def test_the_hash_covers_every_shard(tmp_path: Path) -> None:
    model = net()
    index = shards_of(tmp_path, weights(model), count=3)
    first = Anchor.from_safetensors(index, model).source
    changed = weights(model)
    changed["3.bias"][1] += 1.0
    shards_of(tmp_path, changed, count=3)
    second = Anchor.from_safetensors(index, model).source
    assert first is not None and second is not None
    assert first["path"] == second["path"] and first["sha256"] != second["sha256"]


def test_a_relative_path_is_kept_as_an_absolute_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint must find it from another working directory."""
    model = net()
    path = file_of(tmp_path, weights(model))
    monkeypatch.chdir(tmp_path)
    anchor = Anchor.from_safetensors("model.safetensors", model)
    assert anchor.source is not None and anchor.source["path"] == str(path)


# -- looking things up -------------------------------------------------------------------------------------


def test_lookup_by_name_and_by_parameter() -> None:
    model = net()
    anchor = Anchor.snapshot(model, exclude="3")
    assert anchor["0.bias"] is anchor[model[0].bias] is anchor.get("0.bias") is anchor.get(model[0].bias)
    assert "0.bias" in anchor and model[0].bias in anchor
    assert "3.bias" not in anchor and model[3].bias not in anchor
    assert anchor.get("3.bias") is None and anchor.get(model[3].bias, "default") == "default"
    assert anchor.find(model[0].bias) == "0.bias" and anchor.find(model[3].bias) is None
    assert anchor.find(model[0].bias.detach().clone()) is None
    assert 3 not in anchor
    with pytest.raises(KeyError, match=r"0\.biass: not anchored; closest: 0\.bias"):
        anchor["0.biass"]
    with pytest.raises(KeyError, match=r"a parameter of shape \[3, 17\]: not anchored"):
        anchor[model[3].weight]


def test_an_id_that_is_used_again_is_another_parameter() -> None:
    """Parameters are known by identity, and CPython gives addresses away a second time."""
    anchor = Anchor.snapshot([("w", nn.Parameter(torch.ones(3)))])
    gc.collect()
    for _ in range(50):
        assert anchor.find(nn.Parameter(torch.zeros(3))) is None


def test_an_anchor_keeps_no_parameter_alive() -> None:
    model = net()
    anchor = Anchor.snapshot(model)
    alive = weakref.ref(model[0].weight)
    del model
    gc.collect()
    assert alive() is None
    assert "0.weight" in anchor


def test_bind_says_which_parameters_are_meant(tmp_path: Path) -> None:
    model, other = net(), net(seed=1)
    for anchor in (Anchor.snapshot(model), Anchor.from_safetensors(file_of(tmp_path, weights(model)), model)):
        assert other[0].weight not in anchor
        anchor.bind([*other.named_parameters(), ("unknown", nn.Parameter(torch.ones(2)))])
        assert anchor.find(other[0].weight) == "0.weight"
        assert torch.equal(anchor[other[0].weight], model[0].weight)
        assert anchor.find(model[0].weight) == "0.weight"


def test_bind_refuses_other_shapes_and_then_binds_nothing() -> None:
    anchor = Anchor.snapshot(net())
    wrong = {"0.weight": (17, 6), "0.bias": (17,), "3.bias": (4,)}
    named = [(name, nn.Parameter(torch.ones(shape))) for name, shape in wrong.items()]
    with pytest.raises(ValueError) as caught:
        anchor.bind(named)
    assert str(caught.value).splitlines() == [
        "the anchor does not fit the parameters:",
        "  0.weight: expected shape [17, 6], the anchor has [17, 5]",
        "  3.bias: expected shape [4], the anchor has [3]",
    ]
    assert named[1][1] not in anchor


def test_update_takes_in_another_anchor() -> None:
    model = net()
    anchor = Anchor.snapshot(model, exclude="3")
    anchor.update(Anchor.snapshot([("3.bias", model[3].bias)], dtype=torch.bfloat16))
    assert anchor.names == (*NAMES[:4], "3.bias")
    assert anchor[model[3].bias].dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"update: both anchors hold 0\.weight, 3\.bias"):
        anchor.update(Anchor.snapshot([("3.bias", model[3].bias), ("0.weight", model[0].weight)]))


def test_update_and_files(tmp_path: Path) -> None:
    model = net()
    path = file_of(tmp_path, weights(model))
    anchor = Anchor.from_safetensors(path, model, exclude="3")
    anchor.update(Anchor.snapshot([("3.bias", model[3].bias)]))
    assert anchor.names == (*NAMES[:4], "3.bias")
    assert_same(contents(anchor), {name: weights(model)[name] for name in anchor}, "contents")
    with pytest.raises(ValueError, match="update: expected an anchor in memory, got one that lies in a file"):
        Anchor.snapshot([("new", torch.ones(2))]).update(Anchor.from_safetensors(path, model))
    with pytest.raises(ValueError, match=r"update: both anchors hold 0\.bias"):
        anchor.update(Anchor.snapshot([("0.bias", model[0].bias)]))


@pytest.mark.parametrize("change", ["update", "bind", "load_state_dict"])
def test_an_anchor_that_changes_between_steps_takes_effect_at_the_next(change: str) -> None:
    """As everything does that a step depends on."""
    model = net()
    anchor = Anchor.snapshot(model, exclude="3")
    optimizer = fastft.AdamW(model.parameters(), lr=0.125, weight_decay=0.0, anchor=anchor, anchor_decay=4.0)
    zero_step(model, optimizer)
    before, home = model[3].weight.detach().clone(), torch.full((3, 17), 2.0)
    if change == "update":
        anchor.update(Anchor.snapshot([("3.weight", nn.Parameter(home))]))
        anchor.bind([("3.weight", model[3].weight)])
    elif change == "bind":
        anchor.update(Anchor.snapshot([("3.weight", nn.Parameter(home))]))
        zero_step(model, optimizer)
        assert torch.equal(model[3].weight, before)  # the anchor does not know yet which parameter that is
        anchor.bind([("3.weight", model[3].weight)])
    else:
        anchor.load_state_dict(Anchor.snapshot([("3.weight", nn.Parameter(home))]).state_dict())
        anchor.bind([("3.weight", model[3].weight)])
    zero_step(model, optimizer)
    torch.testing.assert_close(model[3].weight.detach(), before - 0.5 * (before - home))


def zero_step(model: nn.Module, optimizer: fastft.AdamW) -> None:
    """Without gradients' influence: what moves is moved by the anchor."""
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()


def test_repr_says_how_much_it_holds_and_where(tmp_path: Path) -> None:
    model = net()
    assert repr(Anchor()) == "Anchor(0 parameters)"
    anchor = Anchor.snapshot(model)
    assert repr(anchor) == "Anchor(6 parameters, 190 elements, 0.0 MB, float32 on cpu)"
    big = Anchor.snapshot([("w", nn.Parameter(torch.zeros(1000, 1500)))], dtype=torch.bfloat16)
    assert repr(big) == "Anchor(1 parameters, 1,500,000 elements, 3.0 MB, bfloat16 on cpu)"
    path = file_of(tmp_path, weights(model))
    assert repr(Anchor.from_safetensors(path, model, exclude="3")) == f"Anchor(4 parameters, from {path})"


# -- what a step is given ------------------------------------------------------------------------------------


def test_tensor_for_is_in_the_parameters_memory_order_and_stays_the_same() -> None:
    anchor = Anchor.snapshot([("w", nn.Parameter(torch.randn(5, 7)))])
    p = nn.Parameter(torch.randn(7, 5).t())
    prepared = anchor.tensor_for(p, "w")
    assert prepared is not None
    assert prepared.stride() == p.stride() and torch.equal(prepared, anchor["w"])
    assert anchor.tensor_for(p, "w") is prepared
    p.data = p.data.contiguous()
    assert anchor.tensor_for(p, "w") is anchor["w"]
    assert anchor.tensor_for(p) is None  # not by identity
    assert anchor.tensor_for(p, "another") is None


def test_tensor_for_refuses_another_shape() -> None:
    anchor = Anchor.snapshot([("w", nn.Parameter(torch.ones(5, 7)))])
    with pytest.raises(ValueError, match=r"w: anchor: expected the parameter's shape \[7, 5\], got \[5, 7\]"):
        anchor.tensor_for(nn.Parameter(torch.ones(7, 5)), "w")


@pytest.mark.parametrize("mode", ["decoupled", "l2"])
@pytest.mark.parametrize("anchor_dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_a_step_pulls_to_what_the_anchor_holds(dtype: torch.dtype, anchor_dtype: torch.dtype, mode: str) -> None:
    """Against the reference in float64, with the values that the anchor's dtype left."""
    generator = torch.Generator().manual_seed(7)
    home = torch.randn(6, 33, generator=generator, dtype=torch.float64).to(anchor_dtype)
    p = nn.Parameter(torch.randn(6, 33, generator=generator, dtype=torch.float64).to(dtype))
    anchor = Anchor.snapshot([("w", nn.Parameter(home))])
    options: dict[str, Any] = {"lr": 0.05, "weight_decay": 0.1, "eps": 1e-4, "anchor_decay": 6.0, "anchor_mode": mode}
    optimizer = fastft.AdamW([("w", p)], anchor=anchor, state_dtype=torch.float32, **options)
    want, m, v = p.detach().double(), torch.zeros(6, 33), torch.zeros(6, 33)
    for t in range(1, 6):
        p.grad = torch.randn(6, 33, generator=generator, dtype=torch.float64).to(dtype)
        # The stored parameter is where each step starts from: what is tested is the step, not its rounding.
        want, m, v, _ = reference.adamw(p.detach(), p.grad, m, v, None, t, anchor=home, **options)
        optimizer.step()
        rounding = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
        torch.testing.assert_close(
            p.detach().double(), want, rtol=rounding * 1.01, atol=1e-6 if dtype != torch.float64 else 1e-7
        )
    no_anchor, *_ = reference.adamw(p.detach(), p.grad, m, v, None, 6, **{**options, "anchor_decay": 0.0})
    anchored, *_ = reference.adamw(p.detach(), p.grad, m, v, None, 6, anchor=home, **options)
    assert (anchored - no_anchor).abs().max() > 0.01  # the pull is no matter of rounding


@pytest.mark.parametrize("given", ["parameters", "named_parameters", "another_model_by_name"])
def test_the_optimizer_finds_parameters_by_identity_or_name(given: str) -> None:
    model = net()
    anchor = Anchor.snapshot(model, exclude=["3.bias"])
    if given == "another_model_by_name":
        model = net(seed=4)
    params = model.parameters() if given == "parameters" else model.named_parameters()
    optimizer = fastft.AdamW(params, lr=0.125, weight_decay=0.0, anchor=anchor, anchor_decay=4.0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    before = weights(model)
    zero_step(model, optimizer)
    for name, w in before.items():
        home = anchor.get(name)
        assert_near(weights(model)[name], w if home is None else w - 0.5 * (w - home), name)


def test_parameters_under_strange_names_are_told_apart_by_identity() -> None:
    """The optimizer's names need not be the anchor's: identity comes first."""
    a, b = nn.Parameter(torch.full((3,), 1.0)), nn.Parameter(torch.full((3,), 5.0))
    anchor = Anchor.snapshot([("x", a), ("y", b)])
    optimizer = fastft.AdamW([("y", a), ("x", b)], lr=0.25, weight_decay=0.0, anchor=anchor, anchor_decay=4.0)
    with torch.no_grad():
        a.zero_()
        b.zero_()
    for p in (a, b):
        p.grad = torch.zeros(3)
    optimizer.step()
    assert a.tolist() == [1.0] * 3 and b.tolist() == [5.0] * 3


def test_an_anchor_that_knows_no_parameter_is_refused() -> None:
    anchor = Anchor.snapshot(net())
    with pytest.raises(
        ValueError, match=r"anchor: none of the optimizer's parameters is in Anchor\(6 parameters.*by name"
    ):
        fastft.AdamW(net().parameters(), anchor=anchor, anchor_decay=1.0)
    fastft.AdamW(net().parameters(), anchor=Anchor(), anchor_decay=1.0)  # empty, to be filled later
    with pytest.raises(ValueError, match=r'anchor: expected None, "init" or a fastft\.Anchor, got'):
        fastft.AdamW(net().parameters(), anchor="pretrained")  # type: ignore[arg-type]


def test_an_anchor_without_a_decay_is_said_to_pull_nothing(recwarn: pytest.WarningsRecorder) -> None:
    def steps(**options: Any) -> int:
        model = net()
        optimizer = fastft.AdamW(model.named_parameters(), **options)
        train(optimizer, [0, 1])
        for group in optimizer.param_groups:  # as at the end of a schedule
            group["anchor_decay"] = 0.0
        train(optimizer, [2])
        found = [w for w in recwarn.list if "expected anchor_decay > 0" in str(w.message)]
        recwarn.clear()
        return len(found)

    assert steps(anchor="init") == 1
    assert steps(anchor="init", anchor_decay=1.0) == 0
    assert steps() == 0
    model = net()
    optimizer = fastft.AdamW(model.named_parameters(), anchor="init", anchor_decay=1.0)
    AnchorDecayScheduler(optimizer, lambda step: min(1.0, step / 10))  # which begins at 0
    train(optimizer, [0])
    assert not recwarn.list


def test_the_anchor_that_is_pulled_to_can_be_read() -> None:
    model = net()
    before = weights(model)
    optimizer = fastft.AdamW(model.named_parameters(), anchor="init", anchor_decay=1.0)
    train(optimizer, [0, 1])
    assert optimizer.anchor is not None
    assert_same(contents(optimizer.anchor), before, "anchors")
    assert fastft.AdamW(model.parameters()).anchor is None
    with pytest.raises(AttributeError):
        optimizer.anchor = None  # type: ignore[misc]


def test_a_misshapen_anchor_is_found_by_the_first_step_that_needs_it() -> None:
    model = net()
    anchor = Anchor.snapshot([("0.weight", nn.Parameter(torch.ones(17, 4))), ("0.bias", model[0].bias)])
    optimizer = fastft.AdamW(model.named_parameters(), anchor=anchor, anchor_decay=1.0)
    before = weights(model)
    with pytest.raises(ValueError, match=r"0\.weight: anchor: expected the parameter's shape \[17, 5\], got \[17, 4\]"):
        train(optimizer, [0])
    assert_same(weights(model), before, "parameters")
    assert len(optimizer.state) == 0


def test_init_anchors_every_floating_point_parameter() -> None:
    params = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3, dtype=torch.complex64))]
    optimizer = fastft.AdamW(params, lr=0.25, weight_decay=0.0, anchor="init", anchor_decay=4.0)
    with torch.no_grad():
        for p in params:
            p.zero_()
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert params[0].tolist() == [1.0] * 3
    assert params[1].tolist() == [0.0] * 3


# -- importance ----------------------------------------------------------------------------------------------


def importance_of(model: nn.Module, dtype: torch.dtype = torch.float32, seed: int = 5) -> dict[str, Tensor]:
    """Something like a Fisher information: squares, from 0 up, for each parameter by name."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (torch.randn(p.shape, generator=generator, dtype=torch.float64) ** 4).to(dtype)
        for name, p in model.named_parameters()
    }


def test_an_importance_is_a_copy_for_each_anchored_parameter() -> None:
    model = net()
    plain = Anchor.snapshot(model, exclude="3")
    given = importance_of(model)
    before = copy.deepcopy(given)
    anchor = plain.with_importance(given)
    for tensor in given.values():
        tensor.zero_()
    assert anchor.weighted and anchor.names == plain.names == NAMES[:4]
    for name, p in model.named_parameters():
        found = anchor.importance_of(name)
        assert found is anchor.importance_of(p)
        assert (found is None) == name.startswith("3")
        assert found is None or torch.equal(found, before[name])
    assert not plain.weighted and plain.importance_of("0.bias") is None
    assert all(anchor[name] is plain[name] for name in NAMES[:4])  # of the weights there is one copy
    anchor.update(Anchor.snapshot([("3.bias", model[3].bias)]))
    assert not anchor.weighted and "3.bias" not in plain


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_an_importance_is_kept_in_the_dtype_asked_for(given: torch.dtype, dtype: torch.dtype | None) -> None:
    model = net()
    weights_of = importance_of(model, given)
    anchor = Anchor.snapshot(model, dtype=torch.bfloat16).with_importance(weights_of, dtype=dtype)
    assert_same({n: anchor.importance_of(n) for n in NAMES}, {n: f.to(dtype or given) for n, f in weights_of.items()})
    prepared = anchor.importance_for(model[0].weight)
    expected = dtype or given
    assert prepared is not None and prepared.dtype == (torch.float32 if expected == torch.float64 else expected)
    assert anchor.tensor_for(model[0].weight).dtype == torch.bfloat16  # type: ignore[union-attr]


def test_an_importance_lies_in_the_anchors_memory_order() -> None:
    p = nn.Parameter(torch.randn(5, 7).t())
    values = torch.rand(7, 5)
    anchor = Anchor.snapshot([("w", p)]).with_importance({"w": values})
    kept = anchor.importance_of("w")
    assert kept is not None and kept.stride() == p.stride() and torch.equal(kept, values)
    assert anchor.importance_for(p) is kept
    p.data = p.data.contiguous()
    prepared = anchor.importance_for(p)
    assert prepared is not None and prepared.stride() == p.stride() and torch.equal(prepared, values)
    assert anchor.importance_for(p) is prepared
    assert anchor.importance_for(nn.Parameter(torch.ones(2)), "another") is None


@pytest.mark.parametrize("known", ["embedding.weight", "head.weight"])
def test_tied_parameters_have_one_importance(known: str) -> None:
    model = Tied()
    given = {known: torch.rand(9, 6), "body.weight": torch.rand(6, 6), "body.bias": torch.rand(6)}
    anchor = Anchor.snapshot(model.named_parameters(remove_duplicate=False)).with_importance(given)
    kept = anchor.importance_of(model.head.weight)
    assert kept is not None and torch.equal(kept, given[known])
    assert kept is anchor.importance_of("embedding.weight") is anchor.importance_of("head.weight")
    assert anchor.weighted


def test_an_anchor_in_a_file_takes_an_importance(tmp_path: Path) -> None:
    model = net()
    stored = {name: w * 0.5 for name, w in weights(model).items()}
    anchor = Anchor.from_safetensors(file_of(tmp_path, stored), model).with_importance(importance_of(model))
    assert anchor.weighted and anchor.source is not None
    assert_same(contents(anchor), stored, "contents")
    assert repr(anchor).endswith("model.safetensors, weighted)")
    assert repr(Anchor.snapshot(model).with_importance(importance_of(model))).endswith("float32 on cpu, weighted)")


NEGATIVE, NOT_A_NUMBER, ENDLESS = (torch.tensor([1.0, x, 2.0]) for x in (-1e-20, float("nan"), float("inf")))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("3.bias", None, r"1 of 6 anchored parameters:\n  3\.bias: missing$"),
        ("3.bias", torch.ones(4), r"3\.bias: expected shape \[3\], got \[4\]$"),
        ("3.bias", torch.ones(3, 1), r"3\.bias: expected shape \[3\], got \[3, 1\]$"),
        ("3.bias", NEGATIVE, r"3\.bias: expected finite numbers >= 0, got -1e-20 to 2$"),
        ("3.bias", NOT_A_NUMBER, r"3\.bias: expected finite numbers >= 0, got nan to nan$"),
        ("3.bias", ENDLESS, r"3\.bias: expected finite numbers >= 0, got 1 to inf$"),
        ("3.bias", torch.ones(3).int(), r"3\.bias: expected a dense float32.* tensor, got tensor\("),
        ("3.bias", torch.ones(3).to_sparse(), r"3\.bias: expected a dense float32.* tensor, got tensor\("),
        ("3.bias", 1.0, r"3\.bias: expected a dense float32.* tensor, got 1\.0$"),
    ],
    ids=["missing", "short", "column", "negative", "nan", "inf", "integers", "sparse", "number"],
)
def test_an_importance_that_cannot_be(name: str, value: Any, message: str) -> None:
    model = net()
    given: dict[str, Any] = importance_of(model)
    given.pop(name)
    if value is not None:
        given[name] = value
    with pytest.raises(ValueError, match=r"^importance: cannot be taken for 1 of 6 anchored parameters:\n(.|\n)*"):
        Anchor.snapshot(model).with_importance(given)
    with pytest.raises(ValueError, match=message):
        Anchor.snapshot(model).with_importance(given)
    assert Anchor.snapshot(model, exclude="3.bias").with_importance(given).weighted  # it is no longer looked at


def test_an_importance_is_checked_as_it_is_kept() -> None:
    anchor = Anchor.snapshot([("w", nn.Parameter(torch.ones(2)))])
    given = {"w": torch.tensor([1.0, 1e5])}
    assert anchor.with_importance(given).weighted
    with pytest.raises(ValueError, match=r"w: expected finite numbers >= 0, got 1 to inf"):
        anchor.with_importance(given, dtype=torch.float16)
    with pytest.raises(ValueError, match=r"dtype: expected float32, .* or float64, got torch\.int8"):
        anchor.with_importance(given, dtype=torch.int8)
    with pytest.raises(TypeError, match="importance: expected a dict from names to tensors, got list"):
        anchor.with_importance(list(given.items()))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda s: s["importance"].update({"0.bias": -torch.ones(17)}),
            r"0\.bias: expected finite numbers >= 0, got -1",
        ),
        (lambda s: s["importance"].update({"0.bias": torch.ones(16)}), r"0\.bias: expected shape \[17\], got \[16\]"),
        (lambda s: s["importance"].update({"0.bias": torch.arange(17)}), r"0\.bias: expected a dense float32"),
        (lambda s: s["importance"].update(other=torch.ones(2)), "other: not anchored"),
    ],
    ids=["negative", "short", "integers", "unknown"],
)
def test_a_wrong_importance_in_a_state_dict_changes_nothing(edit: Callable[[Any], Any], message: str) -> None:
    model = net()
    saved = Anchor.snapshot(model).with_importance(importance_of(model)).state_dict()
    edit(saved)
    anchor = Anchor.snapshot(model, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=f"^anchor state: importance: {message}"):
        anchor.load_state_dict(saved)
    assert not anchor.weighted and anchor["0.bias"].dtype == torch.bfloat16


# -- state dicts and copies ----------------------------------------------------------------------------------


def reloaded(value: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("kind", ["snapshot", "bf16", "file", "file_and_head", "empty", "weighted", "weighted_file"])
def test_a_state_dict_brings_everything_back(kind: str, tmp_path: Path) -> None:
    model = net()
    path = file_of(tmp_path, {name: w * 2 for name, w in weights(model).items()})
    anchor = {
        "snapshot": lambda: Anchor.snapshot(model),
        "bf16": lambda: Anchor.snapshot(model, dtype=torch.bfloat16, exclude="1"),
        "file": lambda: Anchor.from_safetensors(path, model, exclude="3"),
        "file_and_head": lambda: Anchor.from_safetensors(path, model, exclude="3"),
        "empty": Anchor,
        "weighted": lambda: Anchor.snapshot(model).with_importance(importance_of(model), dtype=torch.bfloat16),
        "weighted_file": lambda: Anchor.from_safetensors(path, model, exclude="3").with_importance(
            importance_of(model)
        ),
    }[kind]()
    if kind == "file_and_head":
        anchor.update(Anchor.snapshot([("3.bias", model[3].bias)]))
    other = Anchor.snapshot([("0.weight", model[0].weight), ("gone", model[3].weight)])
    other.load_state_dict(reloaded(anchor.state_dict()))
    assert other.names == anchor.names
    assert_same(contents(other), contents(anchor), "contents")
    assert other.source == anchor.source
    assert other.weighted is anchor.weighted is kind.startswith("weighted")
    assert_same([other.importance_of(n) for n in NAMES], [anchor.importance_of(n) for n in NAMES], "importance")
    assert other.offloaded is anchor.offloaded
    # Known parameters stay known, under names that are there.
    assert other.find(model[0].weight) == ("0.weight" if kind != "empty" else None)
    assert other.find(model[3].weight) is None
    assert_same(other.state_dict(), anchor.state_dict(), "state dict")


def test_a_loaded_anchor_shares_nothing_with_the_dict() -> None:
    model = net()
    saved = Anchor.snapshot(model).with_importance(importance_of(model)).state_dict()
    anchor = Anchor()
    anchor.load_state_dict(saved)
    kept = copy.deepcopy((contents(anchor), anchor.importance_of("0.bias")))
    for tensor in (*saved["tensors"].values(), *saved["importance"].values()):
        tensor.zero_()
    assert_same((contents(anchor), anchor.importance_of("0.bias")), kept, "contents")


def test_a_moved_file_is_given_by_its_path(tmp_path: Path) -> None:
    model = net()
    path = file_of(tmp_path, weights(model))
    saved = Anchor.from_safetensors(path, model).state_dict()
    moved = tmp_path / "moved.safetensors"
    path.rename(moved)
    anchor = Anchor.snapshot([("before", model[0].weight)])
    with pytest.raises(ValueError, match=r"model\.safetensors: the anchor's file does not exist; if it was moved"):
        anchor.load_state_dict(saved)
    assert anchor.names == ("before",)
    anchor.load_state_dict(saved, path=moved)
    assert_same(contents(anchor), weights(model), "contents")
    assert anchor.source is not None and anchor.source["path"] == str(moved)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda s: s.update(version=2), "anchor state: expected version 1, got 2"),
        (lambda s: s.pop("version"), "anchor state: expected version 1, got None"),
        (lambda s: s["tensors"].update(a=torch.arange(3)), "anchor state: a: expected a floating-point tensor"),
        (lambda s: s["tensors"].update(a=[1.0]), r"anchor state: a: expected a floating-point tensor, got \[1\.0\]"),
    ],
    ids=["later", "none", "integers", "list"],
)
def test_a_wrong_state_dict_changes_nothing(edit: Callable[[dict[str, Any]], Any], message: str) -> None:
    model = net()
    anchor = Anchor.snapshot(model)
    saved = Anchor.snapshot(net(seed=2)).state_dict()
    edit(saved)
    before = copy.deepcopy(contents(anchor))
    with pytest.raises(ValueError, match=message):
        anchor.load_state_dict(saved)
    assert_same(contents(anchor), before, "contents")
    assert anchor.find(model[0].bias) == "0.bias"


def test_a_changed_file_is_refused(tmp_path: Path) -> None:
    model = net()
    path = file_of(tmp_path, weights(model))
    anchor = Anchor.from_safetensors(path, model)
    saved = anchor.state_dict()
    save_file({name: w + 1 for name, w in weights(model).items()}, path)
    with pytest.raises(ValueError, match=r"the anchor's file has changed: expected sha256 \w{64}, got \w{64}"):
        Anchor().load_state_dict(saved)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["deepcopy", "pickle"]
)
@pytest.mark.parametrize("kind", ["snapshot", "file"])
def test_a_copy_made_with_the_model_knows_the_models_copy(
    kind: str, copied: Callable[[Any], Any], tmp_path: Path
) -> None:
    model = net()
    anchor = (
        Anchor.snapshot(model)
        if kind == "snapshot"
        else Anchor.from_safetensors(file_of(tmp_path, weights(model)), model)
    )
    anchor = anchor.with_importance(importance_of(model))
    anchor.tensor_for(model[0].weight)
    other_model, other = copied((model, anchor))
    for (name, p), original in zip(other_model.named_parameters(), model.parameters(), strict=True):
        assert other.find(p) == name
        assert other.find(original) is None
        assert anchor.find(original) == name
    assert_same(contents(other), contents(anchor), "contents")
    if kind == "snapshot":
        other["0.bias"].zero_()
        assert anchor["0.bias"].any()
    assert other.importance_of("0.bias") is not anchor.importance_of("0.bias")
    assert_same(other.importance_of("0.bias"), anchor.importance_of("0.bias"), "importance")


def test_a_copy_made_alone_is_found_by_name() -> None:
    model = net()
    other = copy.deepcopy(Anchor.snapshot(model))
    assert other.find(model[0].weight) is None
    optimizer = fastft.AdamW(model.named_parameters(), lr=0.25, weight_decay=0.0, anchor=other, anchor_decay=4.0)
    with torch.no_grad():
        model[0].weight.add_(1.0)
    zero_step(model, optimizer)
    torch.testing.assert_close(model[0].weight.detach(), other["0.weight"])


# -- anchors that wait elsewhere -----------------------------------------------------------------------------
# On a GPU the host's anchors come in parts, over two buffers in turn. The division and the buffers are the same
# without one; here tensors on the meta device stand for the parameters that lie elsewhere.


def stepped_record(p: Tensor, anchor: Tensor | None, importance: Tensor | None = None) -> _C.AdamWRecord:
    """The record of a parameter that is stepped."""
    state = torch.zeros_like(p)
    kind = "none" if anchor is None else "decoupled" if importance is None else "decoupled_weighted"
    return _C.AdamWRecord(
        p,
        0,
        name="name",
        anchoring=getattr(_C.Anchoring, kind),
        stepped=p,
        exp_avg=state,
        exp_avg_sq=state.clone(),
        step=torch.zeros(()),
        anchor=anchor,
        importance=importance,
    )


def same_tensors(a: _C.AdamWRecord, b: _C.AdamWRecord, but: Sequence[str] = ()) -> bool:
    """Whether two records hold the very same tensors, those of these names aside."""
    return a.param is b.param and all(
        getattr(a, name) is getattr(b, name) for name in _C.AdamWRecord.tensors if name not in but
    )


def stepped_positions(plan: list[_C.AdamWRecord]) -> list[int]:
    return [i for i, record in enumerate(plan) if record.steps]


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> list[list[_C.AdamWRecord]]:
    """The records that plans are made of, in order; real plans read no tensor on the meta device."""
    made: list[list[_C.AdamWRecord]] = []
    monkeypatch.setattr(_C, "AdamWPlan", made.append)
    return made


def test_parameters_with_their_anchors_beside_them_make_one_part(plans: list[list[_C.AdamWRecord]]) -> None:
    params = [torch.ones(4, 4) for _ in range(5)]
    records = [stepped_record(p, torch.ones(4, 4) if i % 2 else None) for i, p in enumerate(params)]
    records[3] = _C.AdamWRecord(params[3], 0)  # never stepped
    (part,) = parts_of(records, Spread())
    assert part.staging is None and part.over == HERE
    (plan,) = plans
    assert stepped_positions(plan) == [0, 1, 2, 4]
    assert all(same_tensors(a, b) for a, b in zip(plan, records, strict=True))


def test_a_plan_of_nothing_still_notices_the_first_gradient() -> None:
    p = nn.Parameter(torch.ones(3))
    (part,) = parts_of([_C.AdamWRecord(p, 0, dormant=True)], Spread())
    assert part.plan.gather([[p]], {}) and part.plan.unread() == []
    p.grad = torch.ones(3)
    assert not part.plan.gather([[p]], {})


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> int:
    """Parts of 1000 bytes of anchor instead of megabytes."""
    monkeypatch.setattr(fastft.optim.entries, "PART_BYTES", 1000)
    return 1000


def test_offloaded_anchors_come_in_parts_of_bounded_size(small_parts: int, plans: list[list[_C.AdamWRecord]]) -> None:
    sizes = [100, 100, 60, 2000, 10, 10, 200, 30]  # floats: 400, 400, 240 | 8000 | 40, 40, 800 | 120 bytes
    where = torch.device("meta")
    beside = stepped_record(torch.empty(7, device=where), torch.empty(7, device=where))
    records = [
        beside,
        *(stepped_record(torch.empty(n, device=where), torch.full((n,), float(i))) for i, n in enumerate(sizes)),
    ]
    parts = list(parts_of(records, Spread()))
    assert parts[0].staging is None and stepped_positions(plans[0]) == [0]
    chunks = [stepped_positions(plan) for plan in plans[1:]]
    assert sorted(i for chunk in chunks for i in chunk) == list(range(1, 9))
    for part, plan, chunk in zip(parts[1:], plans[1:], chunks, strict=True):
        assert len(chunk) == 1 or sum(records[i].anchor.nbytes for i in chunk) <= small_parts
        assert part.staging is not None
        assert [host is records[i].anchor for host, i in zip(part.staging.host, chunk, strict=True)] == [True] * len(
            chunk
        )
        for view, i in zip(part.staging.views, chunk, strict=True):
            assert (view.device, view.shape, view.dtype) == (where, records[i].anchor.shape, torch.float32)
            assert plan[i].anchor is view and same_tensors(plan[i], records[i], but=["anchor"])
        assert [id(record.param) for record in plan] == [id(record.param) for record in records]
    stagings = [part.staging for part in parts[1:] if part.staging is not None]
    assert len(stagings) == len(chunks) == 4
    assert [staging.slot for staging in stagings] == [0, 1, 0, 1]
    assert len({id(staging.buffers) for staging in stagings}) == 1


def test_an_offloaded_importance_comes_with_its_anchor(small_parts: int, plans: list[list[_C.AdamWRecord]]) -> None:
    """Their bytes count together; one that lies beside its parameter stays there."""
    where = torch.device("meta")
    there = torch.empty(100, device=where)
    anchors = [torch.full((100,), float(i)) for i in range(5)]
    weights = [torch.full((100,), i + 0.5, dtype=torch.bfloat16) for i in range(5)]
    records = [stepped_record(there, a, f) for a, f in zip(anchors, weights, strict=True)]
    records.append(stepped_record(there, anchors[0], there.bfloat16()))
    records.append(stepped_record(there, there, weights[0]))
    parts = list(parts_of(records, Spread()))
    assert [stepped_positions(plan) for plan in plans] == [[0], [1], [2], [3], [4, 5], [6]]
    staged = [part.staging.host for part in parts if part.staging is not None]
    expected = [[anchors[i], weights[i]] for i in range(4)]
    expected += [[anchors[4], weights[4], anchors[0]], [weights[0]]]
    assert [[id(t) for t in host] for host in staged] == [[id(t) for t in host] for host in expected]
    for plan, part in zip(plans[:4], parts, strict=False):
        (i,) = stepped_positions(plan)
        assert part.staging is not None
        assert [id(plan[i].anchor), id(plan[i].importance)] == [id(view) for view in part.staging.views]
        assert plan[i].importance.dtype == torch.bfloat16
    assert plans[4][5].importance is records[5].importance and plans[5][6].anchor is there


def test_parts_are_large_enough_to_hide_their_launch() -> None:
    assert 16 << 20 <= PART_BYTES <= 256 << 20


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_buffers_hold_the_parts_in_turn_and_in_each_anchors_layout(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)

    def anchor(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    parts = [
        [anchor(3, 5), anchor(7, 2).t(), anchor(2, 3, 4, 4).to(memory_format=torch.channels_last)],
        [anchor(), anchor(0, 4), anchor(300)],
        [anchor(11)],
    ]
    stagings = staging_for(torch.device("cpu"), parts)
    assert len(stagings) == 3 and len(stagings[0].buffers.memory) == 2
    stagings[0].fetch()
    stagings[1].fetch()
    check_staged(stagings[0], parts[0])
    stagings[0].done()
    stagings[2].fetch()  # takes the first one's buffer
    check_staged(stagings[1], parts[1])
    check_staged(stagings[2], parts[2])
    assert stagings[2].views[0].data_ptr() == stagings[0].views[0].data_ptr()
    largest = max(sum(aligned(a.nbytes) for a in part) for part in parts)
    assert [memory.nbytes for memory in stagings[0].buffers.memory] == [largest] * 2


def check_staged(staging: Staging, anchors: list[Tensor]) -> None:
    staging.wait()
    assert_same(staging.views, anchors, "staged")
    start = staging.buffers.memory[staging.slot].data_ptr()
    for view, anchor in zip(staging.views, anchors, strict=True):
        assert view.stride() == anchor.stride()
        assert (view.data_ptr() - start) % 256 == 0 or view.numel() == 0


@pytest.mark.parametrize(("nbytes", "expected"), [(0, 0), (1, 256), (256, 256), (257, 512), (1 << 33, 1 << 33)])
def test_alignment(nbytes: int, expected: int) -> None:
    assert aligned(nbytes) == expected


@pytest.mark.parametrize("weighted", [False, True])
def test_a_step_through_staged_parts_is_the_step_without(
    weighted: bool, small_parts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parameters and anchors both in host memory, but treated as if they lay apart."""
    results = []
    for staged in (False, True):
        model = net()
        anchor = Anchor.snapshot(model)
        if weighted:
            anchor = anchor.with_importance(importance_of(model))
        optimizer = fastft.AdamW(
            model.parameters(), lr=1e-2, anchor=anchor, anchor_decay=3.0, max_grad_norm=0.7, skip_nonfinite=True
        )
        if staged:
            monkeypatch.setattr(fastft.optim.step_plans, "parts_of", all_offloaded)
        for step in range(4):
            give_grads(model.parameters(), step)
            optimizer.step()
        count = sum(part.staging is not None for part in optimizer._parts)
        assert count == (3 if staged else 0)
        results.append((weights(model), optimizer.state_dict()["state"], optimizer.grad_norm))
    torch.testing.assert_close(results[0][2], results[1][2], rtol=1e-12, atol=0.0)  # summed in another order
    for name, w in results[0][0].items():
        torch.testing.assert_close(results[1][0][name], w, rtol=1e-6, atol=1e-7)


def all_offloaded(records: list[_C.AdamWRecord], spread: Spread) -> Any:
    """Parts as if every anchor lay on another device: one for each two parameters."""
    positions = stepped_positions(records)
    chunks = [positions[i : i + 2] for i in range(0, len(positions), 2)]
    names = [name for name in STAGED if getattr(records[positions[0]], name) is not None]
    kept = [[getattr(records[i], name) for i in chunk for name in names] for chunk in chunks]
    for chunk, staging in zip(chunks, staging_for(torch.device("cpu"), kept), strict=True):
        chosen = [record.unstepped() for record in records]
        views = iter(staging.views)
        for position in chunk:
            chosen[position] = records[position].replaced(**{name: next(views) for name in names})
        yield Part(chosen, (), staging)
