"""State dicts of weights and moments in few bits: resumed to the bit, and brought from any format into any other."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from contract_cases import change_metadata
from low_precision_runs import (
    BF16,
    SETTINGS,
    SHAPES,
    assert_same_run,
    give_grads,
    named,
    parameters,
)
from optim_cases import Layout, assert_unchanged, half_of, normal, parameter, photograph, same_bits, threads
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_optimizer_state_dict, set_state_dict

import fastft
from fastft.optim import formats, full_precision_state, master_weights
from fastft.optim.formats import join
from fastft.optim.state import as_kept, moments_of

EACH = pytest.mark.parametrize("setting", SETTINGS)
OPTIONS: dict[str, Any] = {
    "lr": 1e-3,
    "weight_decay": 0.1,
    "betas": (0.8, 0.9),
    "anchor": "init",
    "anchor_decay": 30.0,
    "max_grad_norm": 0.5,
}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """On shared cores threads wait for one another more than they work."""
    with threads(1):
        yield


def start(setting: str, values: list[Tensor] | None = None, **options: Any) -> tuple[nn.ParameterList, fastft.AdamW]:
    """A model and its optimizer, one tensor of which is masked."""
    dtype, chosen = SETTINGS[setting]
    model = nn.ParameterList(
        parameters(dtype) if values is None else [nn.Parameter(v.detach().clone()) for v in values]
    )
    optimizer = fastft.AdamW(named(list(model)), **{**OPTIONS, **chosen, **options})
    optimizer.set_update_mask(model[2], half_of(model[2].shape[:1], seed=2))
    return model, optimizer


def train(model: nn.ParameterList, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        give_grads(list(model), step)
        optimizer.step()


# -- resumed -----------------------------------------------------------------------------------------------------


def by_torch_save(saved: dict[str, Any], folder: Path) -> dict[str, Any]:
    buffer = io.BytesIO()
    torch.save(saved, buffer)
    buffer.seek(0)
    loaded: dict[str, Any] = torch.load(buffer, weights_only=True)
    return loaded


def by_pickle(saved: dict[str, Any], folder: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = pickle.loads(pickle.dumps(saved))
    return loaded


def by_safetensors(saved: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The state's tensors in a file, the rest beside it."""
    tensors = {f"{i}.{key}": value for i, state in saved["state"].items() for key, value in state.items()}
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "state.safetensors")
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in load_file(folder / "state.safetensors").items():
        i, _, key = name.partition(".")
        state.setdefault(int(i), {})[key] = value
    return {**saved, "state": state}


@EACH
@pytest.mark.parametrize("through", [by_torch_save, by_pickle, by_safetensors])
def test_a_run_resumes_to_the_bit(
    setting: str, through: Callable[[dict[str, Any], Path], dict[str, Any]], tmp_path: Path
) -> None:
    model, optimizer = start(setting)
    train(model, optimizer, range(3))
    saved = through({**optimizer.state_dict()}, tmp_path)
    other, resumed = start(setting, list(model))
    train(other, resumed, range(7, 8))  # it has a state of its own
    with torch.no_grad():
        for p, q in zip(other, model, strict=True):
            p.copy_(q)
    resumed.load_state_dict(saved)
    assert_same_run((list(other), resumed), (list(model), optimizer))
    for run in ((model, optimizer), (other, resumed)):
        train(*run, range(3, 6))
    assert_same_run((list(other), resumed), (list(model), optimizer))


@pytest.mark.parametrize("setting", ["stochastic", "8bit_split8_stochastic"])
def test_the_rounding_seed_is_resumed(setting: str) -> None:
    model, optimizer = start(setting, rounding_seed=7)
    train(model, optimizer, range(2))
    saved = copy.deepcopy(optimizer.state_dict())
    other, resumed = start(setting, list(model), rounding_seed=8)
    train(other, resumed, range(1))  # a plan with the other seed
    with torch.no_grad():
        for p, q in zip(other, model, strict=True):
            p.copy_(q)
    resumed.load_state_dict(saved)
    for run in ((model, optimizer), (other, resumed)):
        train(*run, range(2, 4))
    assert_same_run((list(other), resumed), (list(model), optimizer))
    assert repr(resumed) == repr(optimizer)


def test_a_state_dict_without_a_seed_or_with_a_wrong_one() -> None:
    model, optimizer = start("stochastic", rounding_seed=7)
    train(model, optimizer, range(1))
    saved = copy.deepcopy(optimizer.state_dict())
    change_metadata(saved, rounding_seed="7")
    before = photograph(model, optimizer)
    with pytest.raises(ValueError, match=r"^rounding_seed: expected an integer, got '7'"):
        optimizer.load_state_dict(saved)
    assert_unchanged(before, photograph(model, optimizer))
    for group in saved["param_groups"]:  # as in a state dict of torch's
        del group["fastft"]
    optimizer.load_state_dict(saved)
    assert "rounding_seed: 7" in repr(optimizer)


@pytest.mark.parametrize("kind", ["", "channels_last", "transposed", "scalar", "empty", "pair"])
def test_16_low_bits_are_saved_as_bytes_of_the_same_memory(kind: str) -> None:
    shape = {"scalar": (), "empty": (0, 3), "pair": (2,)}.get(kind, (4, 3, 5, 2))
    p = nn.Parameter(normal(shape, seed=1).to(BF16))
    if kind == "channels_last":
        p.data = p.data.to(memory_format=torch.channels_last)
    elif kind == "transposed":
        p.data = p.data.transpose(0, 3)
    optimizer = fastft.AdamW([p], lr=1e-3, extra_bits=16)
    give_grads([p], 0)
    optimizer.step()
    before = photograph([p], optimizer)
    saved = optimizer.state_dict()["state"][0]["low_bits"]
    assert_unchanged(before, photograph([p], optimizer))
    low = optimizer.state[p]["low_bits"]
    assert low.dtype == torch.uint16 and low.shape == p.shape and low.stride() == p.stride()
    assert saved.dtype == torch.uint8 and saved.shape == (*p.shape, 2) and saved.data_ptr() == low.data_ptr()
    assert same_bits(as_kept(saved, p), low) and as_kept(saved, p).data_ptr() == low.data_ptr()
    assert same_bits(as_kept(torch.stack(saved.unbind(-1)).movedim(0, -1), p), low)


@pytest.mark.parametrize("extra_bits", [8, 16])
@pytest.mark.parametrize("form", ["bytes", "plain"])
def test_low_bits_are_loaded_from_either_form(extra_bits: int, form: str) -> None:
    model, optimizer = start("split16", extra_bits=extra_bits)
    model.append(nn.Parameter(normal((64, 2), seed=3).to(BF16)))  # whose last dimension is as that of bytes
    optimizer.add_param_group({"params": [("p4", model[4])]})
    train(model, optimizer, range(2))
    saved = copy.deepcopy(optimizer.state_dict())
    if form == "plain":
        for i, p in enumerate(model):
            saved["state"][i]["low_bits"] = optimizer.state[p]["low_bits"].clone()
    other, loaded = start("split16", list(model)[:4], extra_bits=extra_bits)
    other.append(nn.Parameter(model[4].detach().clone()))
    loaded.add_param_group({"params": [("p4", other[4])]})
    loaded.load_state_dict(saved)
    assert_same_run((list(other), loaded), (list(model), optimizer))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_checkpoint_is_loaded_into_the_memory_of_the_state(tmp_path: Path) -> None:
    """As DCP does with what ``state_dict()`` gives; low bits do not count for the weights that were there before."""
    model, optimizer = start("split16")
    train(model, optimizer, range(2))
    dcp.save({"optimizer": optimizer.state_dict()["state"]}, checkpoint_id=tmp_path, no_dist=True)
    saved = copy.deepcopy(model.state_dict())
    expected = master_weights(model, optimizer)
    train(model, optimizer, range(2, 4))
    given = optimizer.state_dict()
    dcp.load({"optimizer": given["state"]}, checkpoint_id=tmp_path, no_dist=True)
    model.load_state_dict(saved)
    optimizer.load_state_dict(given)
    assert all(map(same_bits, master_weights(model, optimizer).values(), expected.values()))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.filterwarnings("ignore:anchor_decay")
@pytest.mark.parametrize("setting", ["split16", "8bit_split8_stochastic", "8bit_float32", "bfloat16_moments"])
def test_a_run_resumes_from_a_distributed_checkpoint(setting: str, tmp_path: Path) -> None:
    model, optimizer = start(setting)
    before = [p.detach().clone() for p in model]
    train(model, optimizer, range(3))
    saved = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    dcp.save(saved, checkpoint_id=tmp_path, no_dist=True)
    other, resumed = start(setting, before)
    loaded = dict(zip(("model", "optimizer"), get_state_dict(other, resumed), strict=True))
    assert all(map(same_bits, other, before)), "making the state moved a parameter"
    dcp.load(loaded, checkpoint_id=tmp_path, no_dist=True)
    set_state_dict(other, resumed, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])
    for run in ((model, optimizer), (other, resumed)):
        train(*run, range(3, 6))
    assert_same_run((list(other), resumed), (list(model), optimizer))


class Tagger(nn.Module):
    """A model of the Trainer's kind, whose embedding is large enough for 8-bit moments."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(64, 64, dtype=BF16)
        self.drop = nn.Dropout(0.1)
        self.head = nn.Linear(64, 2, dtype=BF16)

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.head(self.drop(self.embedding(input_ids)).mean(1)).float()
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["split16", "8bit_split8_stochastic"])
def test_a_trainer_resumes_to_the_bit(setting: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from trainer_runs import arguments, token_rows
    from transformers import Trainer

    def run(resume: str | None = None) -> tuple[list[Tensor], fastft.AdamW]:
        model = Tagger()
        optimizer = fastft.AdamW(model.named_parameters(), **{**OPTIONS, **SETTINGS[setting][1]})
        args = arguments(tmp_path, num_train_epochs=1, save_steps=3, eval_strategy="no")
        trainer = Trainer(model, args, train_dataset=token_rows(40), optimizers=(optimizer, None))
        trainer.train(resume_from_checkpoint=resume)
        return list(model.parameters()), optimizer

    whole = run()
    assert "low_bits" in whole[1].state[whole[0][0]]
    resumed = run(str(tmp_path / "checkpoint-3"))
    assert_same_run(resumed, whole)


# -- from one format into another --------------------------------------------------------------------------------

FORMATS: dict[str, Any] = {"float32": torch.float32, "bfloat16": BF16, "8bit": "8bit", "parameter": None}


def coarseness(kept: Any, dtype: torch.dtype) -> float:
    """By how much a moment may be off in a format, relative to itself."""
    kept = dtype if kept is None else kept
    return 0.0 if kept == torch.float32 else 2.0**-8 if kept == BF16 else 2.0**-4


@pytest.mark.filterwarnings("ignore:anchor_decay")
@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
@pytest.mark.parametrize("before", FORMATS)
@pytest.mark.parametrize("after", FORMATS)
def test_moments_are_brought_into_the_format_that_is_asked_for(dtype: torch.dtype, before: str, after: str) -> None:
    values = parameters(dtype)
    first = fastft.AdamW(named(values), **OPTIONS, state_dtype=FORMATS[before])
    train(nn.ParameterList(values), first, range(3))
    copies = [nn.Parameter(p.detach().clone()) for p in values]
    second = fastft.AdamW(named(copies), **OPTIONS, state_dtype=FORMATS[after])
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for p, q in zip(values, copies, strict=True):
        assert int(second.state[q]["step"]) == 3
        small = FORMATS[after] == "8bit" and q.numel() < 4096
        for mine, theirs in zip(moments_of(second, q), moments_of(first, p), strict=True):
            kept = torch.float32 if small else FORMATS[after]
            assert mine.dtype == (torch.float32 if kept == "8bit" else kept or dtype)
            if before == after:
                assert same_bits(mine, theirs)
                continue
            theirs, mine = theirs.float(), mine.float()
            # Below 2^-16 of the block's largest, codes are evenly spaced; the second moment's are those of its root.
            floor = theirs.abs().amax(-1, keepdim=True) * (2.0**-19 if kept == "8bit" else 2.0**-40)
            coarse = 2.1 * coarseness(kept, dtype)
            assert ((mine - theirs).abs() <= coarse * theirs.abs() + floor).all()
    train(nn.ParameterList(copies), second, range(3, 4))
    assert all(p.isfinite().all() for p in copies)


@pytest.mark.parametrize("before", [0, 8, 16])
@pytest.mark.parametrize("after", [0, 8, 16])
def test_low_bits_are_brought_into_the_width_that_is_asked_for(before: int, after: int) -> None:
    model, optimizer = start("split16", extra_bits=before)
    train(model, optimizer, range(3))
    other, loaded = start("split16", list(model), extra_bits=after)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    dropped = [str(w.message) for w in seen if "they are dropped" in str(w.message)]
    assert len(dropped) == (before > 0 and after == 0)
    ours, theirs = master_weights(other, loaded), master_weights(model, optimizer)
    for name, p in other.named_parameters():
        assert same_bits(p, model.get_parameter(name)), "loading state wrote a weight"
        low = loaded.state[p].get("low_bits")
        assert (None if low is None else low.dtype) == {0: None, 8: torch.uint8, 16: torch.uint16}[after]
        if 0 < before <= after:
            assert same_bits(ours[name], theirs[name])
        elif after == 0 or before == 0:
            assert same_bits(ours[name], p.float())
        else:
            # As near as the weight that stays allows.
            gap = p.float().abs().clamp(min=2.0**-126).log2().floor().exp2() * 2.0**-15
            assert ((ours[name] - theirs[name]).abs() <= gap).all() and not torch.equal(ours[name], p.float())


def test_low_bits_are_trusted_after_loading() -> None:
    """Sums of the weights before loading do not count: weights and state come from one file."""
    model, optimizer = start("split16")
    train(model, optimizer, range(2))
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    train(model, optimizer, range(2, 4))
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    found = master_weights(model, optimizer)
    for name, p in model.named_parameters():
        low = as_kept(saved[1]["state"][int(name)]["low_bits"], p)
        assert same_bits(found[name], join(p.detach(), low))
    train(model, optimizer, range(2, 4))
    again, other = start("split16")
    train(again, other, range(4))
    assert_same_run((list(model), optimizer), (list(again), other))


def test_codes_of_another_memory_order() -> None:
    """A tensor whose memory order changes keeps its moments, in numbers."""
    p = parameter(Layout((16, 8, 6, 6)), torch.float32, seed=1)
    optimizer = fastft.AdamW([p], lr=1e-3, state_dtype="8bit")
    give_grads([p], 0)
    optimizer.step()
    expected = moments_of(optimizer, p)
    saved = copy.deepcopy(optimizer.state_dict())
    p.data = p.data.to(memory_format=torch.channels_last)
    optimizer.load_state_dict(saved)
    for mine, theirs in zip(moments_of(optimizer, p), expected, strict=True):
        assert same_bits(mine, theirs)
    p.data = p.data.contiguous()
    give_grads([p], 1)
    optimizer.step()
    assert "exp_avg_codes" in optimizer.state[p]
    p.data = p.data.to(memory_format=torch.channels_last)
    expected = moments_of(optimizer, p)
    give_grads([p], 2)
    optimizer.step()
    first = optimizer.state[p]["exp_avg"]
    assert first.dtype == torch.float32 and first.stride() == p.stride()
    torch.testing.assert_close(first, 0.9 * expected[0] + 0.1 * p.grad, rtol=1e-4, atol=1e-7)


def test_an_error_in_the_last_parameter_changes_nothing() -> None:
    model, optimizer = start("8bit_split16")
    train(model, optimizer, range(2))
    saved = copy.deepcopy(optimizer.state_dict())
    train(model, optimizer, range(2, 3))
    saved["state"][3]["low_bits"] = saved["state"][3]["low_bits"][:2]
    before = photograph(model, optimizer)
    with pytest.raises(
        ValueError, match=r"^state_dict: state\[3\] of p3: low_bits: expected uint16 or uint8 of shape "
    ):
        optimizer.load_state_dict(saved)
    assert_unchanged(before, photograph(model, optimizer))
    saved["state"][3].pop("low_bits")
    saved["state"][2] = {"step": torch.tensor(2.0), "exp_avg": torch.zeros(3), "exp_avg_sq": torch.zeros(3)}
    with pytest.raises(ValueError, match=r"^state_dict: state\[2\] of p2: exp_avg: expected shape \[13, 5, 70\]"):
        optimizer.load_state_dict(saved)
    assert_unchanged(before, photograph(model, optimizer))


# -- float32, and torch's AdamW ----------------------------------------------------------------------------------

PLAIN: dict[str, Any] = {"lr": 1e-3, "weight_decay": 0.1, "betas": (0.8, 0.9)}


@pytest.mark.parametrize("by_name", [False, True])
def test_to_torchs_adamw_in_float32_and_back(by_name: bool) -> None:
    """bfloat16 weights with 16 extra bits and 8-bit moments; what torch goes on with is what they stand for."""
    first = nn.ParameterList(parameters(BF16))
    ours = fastft.AdamW(named(list(first)), **PLAIN, state_dtype="8bit", extra_bits=16)
    train(first, ours, range(3))
    second = nn.ParameterList([torch.zeros(shape) for shape in SHAPES])
    second.load_state_dict(master_weights(first, ours))
    theirs = torch.optim.AdamW(second.parameters(), **PLAIN)
    before = photograph(first, ours)
    saved = full_precision_state(ours)
    theirs.load_state_dict(saved)
    for p, q in zip(first, second, strict=True):
        assert set(theirs.state[q]) == {"step", "exp_avg", "exp_avg_sq"}
        for key, value in zip(("exp_avg", "exp_avg_sq"), moments_of(ours, p), strict=True):
            assert theirs.state[q][key].dtype == torch.float32 and torch.equal(theirs.state[q][key], value.float())
    assert_unchanged(before, photograph(first, ours))
    # One step on, both have taken the same from the same.
    for run in ((first, ours), (second, theirs)):
        train(*run, range(3, 4))
    for (name, master), q in zip(master_weights(first, ours).items(), second, strict=True):
        # The gradient is rounded to bfloat16 for ours.
        torch.testing.assert_close(master, q.detach(), rtol=1e-6, atol=0.02 * PLAIN["lr"], msg=name)
    # And back.
    third = nn.ParameterList([nn.Parameter(q.detach().bfloat16()) for q in second])
    back = fastft.AdamW(named(list(third)), lr=0.5, state_dtype="8bit", extra_bits=16)
    if by_name:
        names = {i: name for i, (name, _) in enumerate(third.named_parameters())}
        packed = theirs.state_dict()
        packed["state"] = {names[i]: state for i, state in packed["state"].items()}
        packed["param_groups"][0]["params"] = list(names.values())
        back = fastft.AdamW(third.named_parameters(), lr=0.5, state_dtype="8bit", extra_bits=16)
        set_optimizer_state_dict(third, back, packed)
    else:
        back.load_state_dict(theirs.state_dict())
    assert back.param_groups[0]["lr"] == PLAIN["lr"]
    for p, q in zip(third, second, strict=True):
        state = back.state[p]
        assert state["low_bits"].dtype == torch.uint16 and not state["low_bits"].any()
        assert int(state["step"]) == 4
        for mine, key in zip(moments_of(back, p), ("exp_avg", "exp_avg_sq"), strict=True):
            largest = theirs.state[q][key].abs().amax()
            assert ((mine - theirs.state[q][key]).abs() <= 0.13 * theirs.state[q][key].abs() + 2e-6 * largest).all()
    train(third, back, range(4, 6))


@EACH
def test_a_full_precision_state_goes_on_in_any_setting(setting: str) -> None:
    """fastft's own optimizer loads it, with its anchor and masks; what was float32 comes back to the bit."""
    model, optimizer = start(setting)
    train(model, optimizer, range(2))
    saved = full_precision_state(optimizer)
    wide = nn.ParameterList([nn.Parameter(w.clone()) for w in master_weights(model, optimizer).values()])
    plain = fastft.AdamW(named(list(wide)), **OPTIONS)
    plain.load_state_dict(saved)
    assert torch.equal(plain.update_mask(wide[2]), optimizer.update_mask(model[2]))  # type: ignore[arg-type]
    for p, q in zip(model, wide, strict=True):
        for mine, theirs in zip(moments_of(plain, q), moments_of(optimizer, p), strict=True):
            assert mine.dtype == torch.float32 and torch.equal(mine, theirs.float())
    train(wide, plain, range(2, 3))
    train(model, optimizer, range(2, 3))
    for master, q in zip(master_weights(model, optimizer).values(), wide, strict=True):
        torch.testing.assert_close(master, q.detach(), rtol=2**-7, atol=2e-5)


def test_a_full_precision_state_of_other_dtypes() -> None:
    params = [nn.Parameter(torch.ones(3, dtype=dtype)) for dtype in (torch.float64, torch.complex64, torch.float16)]
    optimizer = fastft.AdamW(params, amsgrad=True)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    saved = full_precision_state(optimizer)["state"]
    dtypes = [saved[i]["max_exp_avg_sq"].dtype for i in range(3)]
    assert dtypes == [torch.float64, torch.complex64, torch.float32]
    with pytest.raises(TypeError, match=r"^optimizer: expected a fastft.AdamW, got AdamW$"):
        full_precision_state(torch.optim.AdamW(params))  # type: ignore[arg-type]


def test_float16_weights_and_normal_values_stay(tmp_path: Path) -> None:
    """Loading the state of bfloat16 weights into float32 ones keeps nothing that float32 does not need."""
    model, optimizer = start("8bit_split16")
    train(model, optimizer, range(2))
    wide = [nn.Parameter(normal(p.shape, seed=i)) for i, p in enumerate(model)]
    plain = fastft.AdamW(named(wide), **OPTIONS, state_dtype="8bit", extra_bits=16)
    with pytest.warns(UserWarning, match="they are dropped"):
        plain.load_state_dict(optimizer.state_dict())
    for p, q in zip(model, wide, strict=True):
        assert "low_bits" not in plain.state[q]
        assert all(map(same_bits, moments_of(plain, q), moments_of(optimizer, p)))


@pytest.mark.parametrize("shape", [(50, 70), (7, 3, 300)])
def test_large_tensors_are_converted_in_pieces(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    values = normal(shape, seed=1).square()
    whole = [(formats.encode8(values, kind), kind) for kind in (formats.FIRST, formats.SECOND)]
    decoded = [formats.decode8(*pair, kind) for pair, kind in whole]
    for piece in (1, 1000):
        monkeypatch.setattr(formats, "PIECE", piece)
        for (pair, kind), value in zip(whole, decoded, strict=True):
            assert all(map(same_bits, formats.encode8(values, kind), pair))
            assert same_bits(formats.decode8(*pair, kind), value)
