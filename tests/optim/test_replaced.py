"""Parameters that come in the place of others in ``group["params"]``: what is kept by tensor follows by name."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from contract_cases import Twins, assert_same, carried_by, give_grads, net, state_of, train
from hypothesis import given, settings
from hypothesis import strategies as st
from optim_cases import assert_unchanged, drawn, photograph
from safetensors.torch import save_file
from torch import Tensor, nn

import fastft
from fastft import Anchor
from fastft.optim import replaced, step_in_backward

ANEW = "It came in the place of another parameter; make a new optimizer from the model as it is now$"

Made = tuple[nn.Sequential, fastft.AdamW]
NAMES = ("0.weight", "0.bias", "1.weight", "1.bias", "3.weight", "3.bias")
X = torch.linspace(-1.0, 1.0, 20).reshape(4, 5)


def replace(made: Made, names: Iterable[str], value_of: Callable[[Tensor], Tensor] = Tensor.clone) -> None:
    """Put others in the place of parameters, in the model and in the optimizer, as accelerate does for FSDP2."""
    model, optimizer = made
    for name in names:
        module, _, leaf = name.rpartition(".")
        old = model.get_parameter(name)
        new = nn.Parameter(value_of(old.detach()))
        setattr(model.get_submodule(module), leaf, new)
        for group in optimizer.param_groups:
            group["params"] = [new if p is old else p for p in group["params"]]


def anchor_in_file(model: nn.Module, folder: Path) -> Anchor:
    path = folder / "base.safetensors"
    if not path.exists():
        save_file({name: p.detach() * 0.75 for name, p in model.named_parameters()}, path)
    return Anchor.from_safetensors(path, model, exclude="3.bias")


def weighted(model: nn.Module, folder: Path) -> Anchor:
    importance = {name: p.detach().square() * 100 for name, p in model.named_parameters()}
    return Anchor.snapshot(model, dtype=torch.bfloat16).with_importance(importance)


KINDS: dict[str, dict[str, Any]] = {
    "free": {"amsgrad": True},
    "init": {"anchor": "init"},
    "snapshot": {"anchor": lambda model, _: Anchor.snapshot(model, exclude="1.bias")},
    "by_name": {
        "anchor": lambda model, _: Anchor.snapshot((n, p.detach().clone()) for n, p in model.named_parameters())
    },
    "weighted": {"anchor": weighted},
    "file": {"anchor": anchor_in_file},
    "low_bits": {"anchor": "init", "dtype": torch.bfloat16, "extra_bits": 16},
}


def start(kind: str, folder: Path, named: bool = True, restricted: bool = True) -> Made:
    """Two groups; masks by rows and by elements, a frozen parameter, and an anchor that pulls."""
    options = {"lr": 1e-2, "weight_decay": 0.1, "max_grad_norm": 2.0, **KINDS[kind]}
    model = net(dtype=options.pop("dtype", torch.float32))
    if "anchor" in options:
        options["anchor_decay"] = 4.0
        if callable(options["anchor"]):
            options["anchor"] = options["anchor"](model, folder)
    params: list[Any] = list(model.named_parameters() if named else model.parameters())
    optimizer = fastft.AdamW([{"params": params[:2], "lr": 0.03}, {"params": params[2:]}], **options)
    if restricted:
        optimizer.set_update_mask(model[0].weight, torch.arange(17) % 3 > 0)
        optimizer.set_update_mask(model[3].weight, torch.arange(51).reshape(3, 17) % 2 == 0)
        optimizer.freeze(model[1].weight)
    return model, optimizer


def assert_same_run(one: Made, other: Made) -> None:
    assert_same(list(one[0].parameters()), list(other[0].parameters()), "parameters")
    assert_same(state_of(one[1]), state_of(other[1]), "state")
    assert_same(one[1].state_dict(), other[1].state_dict(), "state dict")


# -- by name ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", [NAMES, NAMES[::2]], ids=["all", "some"])
@pytest.mark.parametrize("at", [0, 3], ids=["before_the_first_step", "later"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_with_replaced_parameters_has_the_bits_of_one_without(
    kind: str, at: int, which: tuple[str, ...], tmp_path: Path
) -> None:
    whole, made = start(kind, tmp_path), start(kind, tmp_path)
    for step in range(6):
        if step == at:
            gone = [made[0].get_parameter(name) for name in which]
            replace(made, which)
            if kind != "low_bits":  # which belong to the weights as they were
                for p in gone:
                    p.data.fill_(float("nan"))
        train(whole[1], [step])
        train(made[1], [step])
    assert_same_run(made, whole)
    assert {float(state["step"]) for state in state_of(made[1]) if state} == {6.0}
    assert len(made[1].state) == 5


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "_fsdp_wrapped_module.", "base_model.model."])
def test_names_count_without_what_wrappers_add(prefix: str, tmp_path: Path) -> None:
    whole, made = start("init", tmp_path), start("init", tmp_path)
    for step in range(4):
        if step == 2:
            replace(made, NAMES)
            for group in made[1].param_groups:
                group["param_names"] = [prefix + name for name in group["param_names"]]
        train(whole[1], [step])
        train(made[1], [step])
    assert_same(list(made[0].parameters()), list(whole[0].parameters()), "parameters")
    assert_same(state_of(made[1]), state_of(whole[1]), "state")


ACTIONS = st.one_of(
    st.tuples(st.just("step"), st.just("")),
    st.tuples(st.sampled_from(["replace", "freeze", "unfreeze", "mask", "free"]), st.sampled_from(NAMES)),
)


@settings(drawn, max_examples=12)
@given(st.lists(ACTIONS, min_size=4, max_size=16), st.sampled_from(["free", "init", "by_name", "weighted"]))
def test_nothing_shows_that_parameters_were_replaced(actions: list[tuple[str, str]], kind: str) -> None:
    """Beside a run in which they stay, whatever is done in between."""
    folder = Path()  # none of these lies in a file
    whole, made = start(kind, folder, restricted=False), start(kind, folder, restricted=False)
    for step, (action, name) in enumerate([*actions, ("step", "")]):
        if action == "replace":
            replace(made, [name])
            continue
        for model, optimizer in (whole, made):
            if action == "step":
                train(optimizer, [step])
            elif action in ("freeze", "unfreeze"):
                getattr(optimizer, action)(model.get_parameter(name))
            else:
                p = model.get_parameter(name)
                optimizer.set_update_mask(p, torch.arange(len(p)) % 2 == 0 if action == "mask" else None)
        if action == "step":
            assert_same(list(made[0].parameters()), list(whole[0].parameters()), "parameters")
    assert_same_run(made, whole)


def pickled(made: Made) -> Made:
    copied: Made = pickle.loads(pickle.dumps(made))
    return copied


def loaded(made: Made) -> Made:
    made[1].load_state_dict(copy.deepcopy(made[1].state_dict()))
    return made


def extended(made: Made) -> Made:
    made[0].append(nn.Linear(1, 1, bias=False))
    with torch.no_grad():
        made[0][4].weight.fill_(0.5)
    made[1].add_param_group({"params": [("4.weight", made[0][4].weight)]})
    return made


def restricted_anew(made: Made) -> Made:
    model, optimizer = made
    optimizer.freeze(model[0].bias)
    mask = optimizer.update_mask(model[3].weight)
    assert mask is not None
    optimizer.set_update_mask(model[3].weight, ~mask)
    return made


@pytest.mark.parametrize("at", [0, 3], ids=["before_the_first_step", "later"])
@pytest.mark.parametrize(
    "then", [copy.deepcopy, pickled, loaded, extended, restricted_anew], ids=lambda function: function.__name__
)
def test_what_follows_is_there_before_the_next_step(then: Callable[[Made], Made], at: int, tmp_path: Path) -> None:
    results = []
    for replacing in (False, True):
        made = start("snapshot", tmp_path)
        train(made[1], range(at))
        if replacing:
            replace(made, NAMES)
        made = then(made)
        train(made[1], range(at, at + 2))
        results.append(made)
    assert_same_run(results[1], results[0])


def test_a_state_dict_before_the_next_step_holds_what_follows(tmp_path: Path) -> None:
    whole, made = start("snapshot", tmp_path), start("snapshot", tmp_path)
    for _, optimizer in (whole, made):
        train(optimizer, range(2))
    replace(made, NAMES)
    saved = made[1].state_dict()
    assert_same(saved, whole[1].state_dict(), "state dict")
    assert list(carried_by(saved, "update_mask")) == ["0.weight", "3.weight"]
    assert len(carried_by(saved, "anchor")) == 5 and len(saved["state"]) == 5


@pytest.mark.parametrize("which", [NAMES, NAMES[::2], ("3.bias",)], ids=["all", "some", "one"])
@pytest.mark.parametrize("at", [0, 3], ids=["before_the_first_step", "later"])
def test_a_step_in_the_backward_pass_follows_too(at: int, which: tuple[str, ...]) -> None:
    results = []
    for replacing in (False, True):
        model = net()
        optimizer = fastft.AdamW(model.named_parameters(), lr=1e-2, anchor=Anchor.snapshot(model), anchor_decay=4.0)
        optimizer.set_update_mask(model[0].weight, torch.arange(17) % 3 > 0)
        optimizer.set_update_mask(model[3].bias, torch.arange(3) > 0)
        optimizer.freeze(model[1].weight)
        step_in_backward(optimizer)
        for step in range(6):
            if replacing and step == at:
                replace((model, optimizer), which)
            (model(X) * (1 + step)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append((model, optimizer))
    assert_same_run(results[1], results[0])


@pytest.mark.parametrize("call", ["step", "state_dict"])
def test_one_tensor_in_the_place_of_two_is_refused(call: str) -> None:
    """As accelerate puts it there where the model lies on meta in this process."""
    model = net()
    optimizer = fastft.AdamW(model.named_parameters(), lr=1e-2)
    optimizer.freeze(model[0].bias)
    train(optimizer, [0])
    one = nn.Parameter(torch.full((17,), 0.5))
    params = optimizer.param_groups[0]["params"]
    params[1] = params[3] = one
    one.grad = torch.ones(17)
    for _ in range(2):
        with pytest.raises(
            ValueError,
            match=r"^params: expected a parameter of its own for each name, got one for both 0\.bias and 1\.bias in "
            r"the place of two; with accelerate, set cpu_ram_efficient_loading to false$",
        ):
            getattr(optimizer, call)()
        assert (one == 0.5).all()


# -- without names ---------------------------------------------------------------------------------------

RESTRICTIONS: dict[str, Callable[[nn.Sequential], fastft.AdamW]] = {}


def restriction(make: Callable[[nn.Sequential], fastft.AdamW]) -> Callable[[nn.Sequential], fastft.AdamW]:
    RESTRICTIONS[make.__name__] = make
    return make


@restriction
def frozen(model: nn.Sequential) -> fastft.AdamW:
    optimizer = fastft.AdamW(model.parameters(), lr=1e-2)
    optimizer.freeze(model[1].weight)
    return optimizer


@restriction
def masked(model: nn.Sequential) -> fastft.AdamW:
    optimizer = fastft.AdamW(model.parameters(), lr=1e-2)
    optimizer.set_update_mask(model[1].weight, torch.arange(17) > 3)
    return optimizer


@restriction
def anchored(model: nn.Sequential) -> fastft.AdamW:
    anchor = Anchor.snapshot([("the norm's", model[1].weight)])
    return fastft.AdamW(model.parameters(), lr=1e-2, anchor=anchor, anchor_decay=4.0)


CALLS: dict[str, Callable[[nn.Sequential, fastft.AdamW], Any]] = {
    "step": lambda _, optimizer: optimizer.step(),
    "state_dict": lambda _, optimizer: optimizer.state_dict(),
    "load_state_dict": lambda _, optimizer: optimizer.load_state_dict({"state": {}, "param_groups": []}),
    "freeze": lambda model, optimizer: optimizer.freeze(model[0].weight),
    "set_update_mask": lambda model, optimizer: optimizer.set_update_mask(model[0].bias, torch.arange(17) > 4),
    "add_param_group": lambda _, optimizer: optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]}),
    "deepcopy": lambda model, optimizer: copy.deepcopy((model, optimizer))[1].step(),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("kind", RESTRICTIONS)
def test_what_was_restricted_is_not_replaced_without_names(kind: str, call: str) -> None:
    model = net()
    optimizer = RESTRICTIONS[kind](model)
    train(optimizer, range(2))
    old = model[1].weight
    replace((model, optimizer), ["1.weight"])
    give_grads(model.parameters(), 2)
    params = optimizer.param_groups[0]["params"]
    before = photograph(params, optimizer)
    for _ in range(2):  # it is no less true the second time
        with pytest.raises(
            ValueError,
            match=r"^params: 1 of them came in the place of others; which is which is not known, and these were "
            r"masked, frozen or anchored: param_groups\[0\]\['params'\]\[2\]\. Make the optimizer from "
            r"model\.named_parameters\(\), or from the model as it is now",
        ):
            CALLS[call](model, optimizer)
    assert_unchanged(before, photograph(params, optimizer))
    params[2] = model[1].weight = old
    whole = net()
    expected = RESTRICTIONS[kind](whole)
    train(expected, range(4))
    train(optimizer, range(2, 4))
    assert_same_run((model, optimizer), (whole, expected))


def test_a_group_with_fewer_names_than_parameters_has_none(tmp_path: Path) -> None:
    made = start("snapshot", tmp_path)
    made[1].param_groups[1]["param_names"].pop()
    replace(made, ["0.weight", "1.weight"])
    with pytest.raises(ValueError, match=r"^params: 1 of them came .* frozen or anchored: 1\.weight\. Make the"):
        train(made[1], [0])


@pytest.mark.parametrize("frozen", [True, False])
def test_names_that_two_groups_share_give_no_one_anothers(frozen: bool) -> None:
    """One optimizer over two models. To find each in its own group is right, and so is to say that it cannot be."""
    results = []
    for replacing in (False, True):
        models = [net(seed) for seed in (0, 1)]
        optimizer = fastft.AdamW([{"params": list(model.named_parameters())} for model in models], lr=1e-2)
        if frozen:
            optimizer.freeze(models[1][0].weight)
        train(optimizer, range(2))
        if replacing:
            for model in models:
                replace((model, optimizer), ["0.weight"])
        try:
            train(optimizer, range(2, 4))
        except ValueError as error:
            assert frozen and "came in the place of others" in str(error)
            return
        results.append([[*models[0].parameters(), *models[1].parameters()], state_of(optimizer)])
    if not frozen and float(results[1][1][0]["step"]) == 2.0:  # none of them known
        assert float(results[1][1][6]["step"]) == 2.0
        return
    assert_same(results[1], results[0], "runs")


def test_what_nothing_is_known_of_starts_anew_as_in_torch() -> None:
    twins = Twins()
    twins.step(2)
    for which in (0, 1):
        model: Any = twins.models[which]
        replace((model, twins.optimizers[which]), ["0.weight", "3.bias"])  # type: ignore[arg-type]
    twins.step(2)
    assert [float(state["step"]) for state in state_of(twins.ours)] == [2.0, 4.0, 4.0, 4.0, 4.0, 2.0]


@pytest.mark.parametrize("kind", RESTRICTIONS)
def test_others_may_be_replaced_beside_what_is_restricted(kind: str) -> None:
    model = net()
    optimizer = RESTRICTIONS[kind](model)
    train(optimizer, range(2))
    replace((model, optimizer), ["0.weight", "3.bias"])
    train(optimizer, range(2, 4))
    steps = [float(state["step"]) if state else None for state in state_of(optimizer)]
    assert steps == [2.0, 4.0, None if kind == "frozen" else 4.0, 4.0, 4.0, 2.0]


def test_an_anchor_that_does_not_pull_is_no_reason() -> None:
    model = net()
    optimizer = fastft.AdamW(model.parameters(), lr=1e-2, anchor="init", anchor_decay=0.0)
    train(optimizer, range(2))
    replace((model, optimizer), ["1.weight"])
    train(optimizer, [2])
    assert model[1].weight not in (optimizer.anchor or ())


# -- taken out, put back, added --------------------------------------------------------------------------


@pytest.mark.parametrize("named", [True, False], ids=["named", "unnamed"])
@pytest.mark.parametrize("between", [0, 2], ids=["at_once", "later"])
def test_what_was_taken_out_and_put_back_is_restricted_as_before(between: int, named: bool, tmp_path: Path) -> None:
    model, optimizer = start("snapshot", tmp_path, named)
    train(optimizer, range(2))
    group = optimizer.param_groups[1]
    names = group.get("param_names")
    kept = model[1].weight.detach().clone()
    (p, *rest) = group["params"]
    assert p is model[1].weight
    group["params"] = rest
    if named:
        group["param_names"] = names[1:]
    train(optimizer, range(2, 2 + between))
    group["params"] = [p, *rest]
    if named:
        group["param_names"] = names
    train(optimizer, range(4, 6))
    assert torch.equal(model[1].weight, kept)
    assert list(carried_by(optimizer.state_dict(), "update_mask")) == (["0.weight", "3.weight"] if named else [0, 4])


@pytest.mark.parametrize("named", [True, False], ids=["named", "unnamed"])
@pytest.mark.parametrize("kind", ["free", "init", "snapshot"])
def test_a_parameter_may_be_added_to_a_groups_list(kind: str, named: bool, tmp_path: Path) -> None:
    """It comes in no one's place: what the others have stays theirs."""
    whole, (model, optimizer) = start(kind, tmp_path, named), start(kind, tmp_path, named)
    for one in (whole[1], optimizer):
        one.max_grad_norm = None  # the new one's gradient is in no other's step
        train(one, range(2))
    new = nn.Parameter(torch.full((3,), 0.5))
    optimizer.param_groups[1]["params"].append(new)
    if named:
        optimizer.param_groups[1]["param_names"].append("added")
    train(whole[1], range(2, 4))
    train(optimizer, range(2, 4))
    assert_same(list(model.parameters()), list(whole[0].parameters()), "the others")
    assert float(optimizer.state[new]["step"]) == 2.0
    assert (new != 0.5).all()


def test_a_parameter_may_be_added_where_a_restricted_one_was_taken_out_before() -> None:
    model = net()
    optimizer = fastft.AdamW(model.parameters(), lr=1e-2)
    optimizer.freeze(model[1].weight)
    train(optimizer, range(2))
    params = optimizer.param_groups[0]["params"]
    del params[2]
    train(optimizer, [2])
    params.append(nn.Parameter(torch.full((3,), 0.5)))
    train(optimizer, [3])
    assert [float(state["step"]) for state in state_of(optimizer)] == [4.0] * 5 + [1.0]


def test_one_may_be_taken_out_while_others_are_replaced_by_name(tmp_path: Path) -> None:
    """Nothing is left over that could have come in its place."""
    whole, made = start("snapshot", tmp_path), start("snapshot", tmp_path)
    for model, optimizer in (whole, made):
        train(optimizer, range(2))
        group = optimizer.param_groups[1]
        assert group["params"][0] is model[1].weight
        group["params"] = group["params"][1:]
        group["param_names"] = group["param_names"][1:]
    replace(made, ["0.weight", "3.weight"])
    for _, optimizer in (whole, made):
        train(optimizer, range(2, 4))
    assert_same_run(made, whole)


# -- of another kind -------------------------------------------------------------------------------------


def messages(seen: list[warnings.WarningMessage], beginning: str) -> list[str]:
    return [str(w.message) for w in seen if str(w.message).startswith(beginning)]


LARGER = torch.linspace(-1.0, 1.0, 100).reshape(20, 5)
OTHER: dict[str, Callable[[Tensor], Tensor]] = {
    "larger": lambda _: LARGER.clone(),
    "float64": lambda old: old.double(),
    "bfloat16": lambda old: old.bfloat16(),
}


@pytest.mark.parametrize("other", OTHER)
def test_moments_of_another_kind_start_anew_with_a_warning(other: str) -> None:
    model = net()
    optimizer = fastft.AdamW(model.named_parameters(), lr=1e-2, weight_decay=0.1)
    train(optimizer, range(2))
    replace((model, optimizer), ["0.weight"], OTHER[other])
    fresh = nn.Parameter(model[0].weight.detach().clone())
    beside = fastft.AdamW([fresh], lr=1e-2, weight_decay=0.1)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        train(optimizer, range(2, 5))
    train(beside, range(2, 5))  # of the same gradients, as both come first
    assert messages(seen, "params:") == [
        "params: parameters of another kind came in the place of others that had stepped: 0.weight; their moments "
        "start anew"
    ]
    assert_same(model[0].weight, fresh, "weight")
    assert [float(state["step"]) for state in state_of(optimizer)] == [3.0, 5.0, 5.0, 5.0, 5.0, 5.0]


def test_there_is_no_warning_where_nothing_had_stepped() -> None:
    model = net()
    optimizer = fastft.AdamW(model.named_parameters(), lr=1e-2)
    replace((model, optimizer), ["0.weight"], OTHER["larger"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(optimizer, range(2))
    assert float(optimizer.state[model[0].weight]["step"]) == 2.0


NO_LONGER_FITS: dict[str, tuple[Callable[[nn.Sequential], dict[str, Any]], str]] = {
    "mask": (
        lambda _: {},
        r"^0\.weight: update mask: expected shape \[20\] \(rows\) or \[20, 5\] \(elements\), got \[17\]\n" + ANEW,
    ),
    "anchor": (
        lambda model: {"anchor": Anchor.snapshot(model), "anchor_decay": 4.0},
        r"^the anchor does not fit the parameters:\n  0\.weight: expected shape \[20, 5\], the anchor has \[17, 5\]\n"
        + ANEW,
    ),
}


@pytest.mark.parametrize("at", [0, 2], ids=["before_the_first_step", "later"])
@pytest.mark.parametrize("what", NO_LONGER_FITS)
def test_a_resized_embedding_is_named_where_a_mask_or_an_anchor_no_longer_fits(what: str, at: int) -> None:
    """At each step until it is put right: a run that catches the first error must not go on without them."""
    options, message = NO_LONGER_FITS[what]
    model = net()
    optimizer = fastft.AdamW(model.named_parameters(), lr=1e-2, **options(model))
    if what == "mask":
        optimizer.set_update_mask(model[0].weight, torch.arange(17) % 3 > 0)
    optimizer.freeze(model[1].weight)
    train(optimizer, range(at))
    old = model[0].weight
    replace((model, optimizer), NAMES, lambda p: LARGER.clone() if p.dim() == 2 and p.shape[1] == 5 else p.clone())
    params = optimizer.param_groups[0]["params"]
    before = copy.deepcopy(params)
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            train(optimizer, [at])
        assert_same(params, before, "parameters")
    params[0] = model[0].weight = nn.Parameter(old.detach().clone())
    train(optimizer, range(at, 4))
    whole = net()
    expected = fastft.AdamW(whole.named_parameters(), lr=1e-2, **options(whole))
    if what == "mask":
        expected.set_update_mask(whole[0].weight, torch.arange(17) % 3 > 0)
    expected.freeze(whole[1].weight)
    train(expected, range(4))
    assert_same_run((model, optimizer), (whole, expected))


def test_low_bits_stay_with_the_weights_that_they_belong_to(tmp_path: Path) -> None:
    """Those of other values start at 0, as if somebody had written the weights."""
    model, optimizer = start("low_bits", tmp_path, restricted=False)
    train(optimizer, range(2))
    low = {name: optimizer.state[model.get_parameter(name)]["low_bits"].clone() for name in ("0.weight", "3.weight")}
    replace((model, optimizer), ["0.weight"])
    replace((model, optimizer), ["3.weight"], lambda p: p * 2.0)
    saved = optimizer.state_dict()
    assert_same(optimizer.state[model[0].weight]["low_bits"], low["0.weight"], "the same weights")
    assert low["3.weight"].int().any()
    assert "low_bits" not in saved["state"][4]
    train(optimizer, [2])
    assert "low_bits" in optimizer.state[model[3].weight]


# -- an anchor of the values at the start -----------------------------------------------------------------


def moved(p: Tensor) -> Tensor:
    return p * 0.5 + 0.25


@pytest.mark.parametrize("named", [True, False], ids=["named", "unnamed"])
def test_an_anchor_of_the_start_is_taken_anew_before_the_first_step(named: bool) -> None:
    """The old ones may have had no values yet, in this process."""
    model = net()
    optimizer = fastft.AdamW(
        model.named_parameters() if named else model.parameters(), lr=1e-2, anchor="init", anchor_decay=4.0
    )
    if not named:
        replace((model, optimizer), NAMES, moved)
        with pytest.raises(ValueError, match="6 of them came in the place of others"):
            train(optimizer, [0])
        return
    optimizer.set_update_mask(model[0].weight, torch.arange(17) % 3 > 0)
    optimizer.freeze(model[1].weight)
    replace((model, optimizer), NAMES, moved)
    whole = net()
    with torch.no_grad():
        for p in whole.parameters():
            p.copy_(moved(p))
    expected = fastft.AdamW(whole.named_parameters(), lr=1e-2, anchor="init", anchor_decay=4.0)
    expected.set_update_mask(whole[0].weight, torch.arange(17) % 3 > 0)
    expected.freeze(whole[1].weight)
    for one in (optimizer, expected):
        train(one, range(3))
    assert_same_run((model, optimizer), (whole, expected))


@pytest.mark.parametrize("kind", ["init", "snapshot"])
def test_an_anchor_is_kept_where_it_is_not_for_the_optimizer_to_take(kind: str, tmp_path: Path) -> None:
    """``"init"`` after the first step; one that the user has made always."""
    model, optimizer = start(kind, tmp_path, restricted=False)
    train(optimizer, range(1 if kind == "init" else 0))
    replace((model, optimizer), NAMES, moved)
    train(optimizer, [1])
    first = dict(net().named_parameters())
    anchor = optimizer.anchor
    assert anchor is not None and len(anchor) == (6 if kind == "init" else 5)
    for name, p in model.named_parameters():
        if name in anchor:
            assert_same(anchor[p], first[name].detach(), name)
            assert anchor.find(p) == name, "not by identity"


# -- parts that a framework hands over -------------------------------------------------------------------


@pytest.mark.parametrize(
    "option", [{"max_grad_norm": 1.0}, {"skip_nonfinite": True}], ids=lambda option: next(iter(option))
)
@pytest.mark.parametrize("processes", [1, 4])
@pytest.mark.parametrize("named", [True, False], ids=["named", "unnamed"])
def test_a_norm_over_parameters_that_somebody_put_there_is_refused_in_several_processes(
    named: bool, processes: int, option: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody says whether each process has its own parts of them, as DeepSpeed's flat partitions are."""
    monkeypatch.setattr(replaced, "initialized", lambda: True)
    monkeypatch.setattr(replaced, "size_of", lambda group: processes)
    model = net()
    optimizer = fastft.AdamW(model.named_parameters() if named else model.parameters(), lr=1e-2, **option)
    train(optimizer, [0])
    replace((model, optimizer), ["0.weight", "3.bias"])
    before = copy.deepcopy(list(model.parameters()))
    if processes == 1 or named:
        train(optimizer, [1])
        assert all(torch.ne(p, q).any() for p, q in zip(model.parameters(), before, strict=True))
        return
    for _ in range(2):
        with pytest.raises(ValueError, match=f"^{next(iter(option))}: expected parameters that are whole.*4 processes"):
            train(optimizer, [1])
        assert_same(list(model.parameters()), before, "parameters")
    for key in option:
        setattr(optimizer, key, None)
    train(optimizer, [1])


def test_one_more_beside_others_that_are_replaced_by_name_is_not_one_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replaced, "initialized", lambda: True)
    monkeypatch.setattr(replaced, "size_of", lambda group: 4)
    model = net()
    optimizer = fastft.AdamW(model.named_parameters(), lr=1e-2, max_grad_norm=1.0)
    train(optimizer, [0])
    replace((model, optimizer), ["0.weight", "3.bias"])
    optimizer.param_groups[0]["params"].append(nn.Parameter(torch.full((3,), 0.5)))
    optimizer.param_groups[0]["param_names"].append("added")
    train(optimizer, [1])
    assert [float(state["step"]) for state in state_of(optimizer)] == [2.0] * 6 + [1.0]


def test_a_process_group_says_of_what_they_are_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replaced, "initialized", lambda: True)
    monkeypatch.setattr(replaced, "size_of", lambda group: 4)
    model = net()
    optimizer = fastft.AdamW(model.parameters(), lr=1e-2, max_grad_norm=1.0, process_group=object())
    train(optimizer, [0])
    replace((model, optimizer), ["0.weight", "3.bias"])
    train(optimizer, [1])
    assert [float(state["step"]) for state in state_of(optimizer)] == [1.0, 2.0, 2.0, 2.0, 2.0, 1.0]


# -- parameters that nobody trains -----------------------------------------------------------------------

STILL = "step: none of the 6 parameters has had a gradient in the first two steps, so nothing is trained"


def warnings_of(steps: Callable[[], None]) -> list[str]:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        steps()
    return messages(seen, "step:")


@pytest.mark.parametrize("when", ["before the first step", "in a resumed run"])
def test_a_model_that_got_other_parameters_is_noticed_in_the_second_step(when: str) -> None:
    """``optimizer.state`` says nothing of it: a resumed run has one, and trains nothing."""
    model = net()
    optimizer = fastft.AdamW(model.parameters(), lr=1e-2, max_grad_norm=1.0)
    if when == "in a resumed run":
        train(optimizer, [0])
        optimizer.zero_grad()
        saved = optimizer.state_dict()
        optimizer = fastft.AdamW(model.parameters(), lr=1e-2, max_grad_norm=1.0)
        optimizer.load_state_dict(saved)
    model.load_state_dict({name: p.clone() for name, p in model.state_dict().items()}, assign=True)

    def train_on() -> None:
        model(X).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    assert warnings_of(train_on) == []
    (said,) = warnings_of(train_on)
    assert said.startswith(STILL) and "load_state_dict(assign=True)" in said
    assert warnings_of(train_on) == []


def test_it_is_not_said_of_a_run_that_trains() -> None:
    """Of several optimizers, one for each head, some may have no gradients for a while."""
    optimizer = fastft.AdamW(net().parameters(), lr=1e-2)

    def none_then_some_then_none() -> None:
        optimizer.step()
        train(optimizer, [0])
        for p in optimizer.param_groups[0]["params"]:
            p.grad = None
        for _ in range(3):
            optimizer.step()

    assert warnings_of(none_then_some_then_none) == []
    resumed = fastft.AdamW(net().parameters(), lr=1e-2)
    resumed.load_state_dict(optimizer.state_dict())
    some = resumed.param_groups[0]["params"][3]

    def one_of_them() -> None:
        for _ in range(3):
            some.grad = torch.ones_like(some)
            resumed.step()

    assert warnings_of(one_of_them) == []


@pytest.mark.parametrize("frozen", [True, False])
def test_it_is_not_said_of_steps_in_the_backward_pass(frozen: bool) -> None:
    """After which gradients are gone, and, if all is frozen, nothing has a state."""
    model = net()
    optimizer = fastft.AdamW(model.parameters(), lr=1e-2)
    if frozen:
        optimizer.freeze(model)
    step_in_backward(optimizer)

    def train_on() -> None:
        for _ in range(3):
            model(X).square().sum().backward()
            optimizer.step()

    assert warnings_of(train_on) == []
    assert [float(state["step"]) for state in state_of(optimizer) if state] == ([] if frozen else [3.0] * 6)
