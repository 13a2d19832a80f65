"""``fastft.doctor``: its shares against steps that AdamW takes, its bytes against the state that AdamW keeps."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import fastft
from fastft.diagnosis.settings import Memory, Weights, memory_of, name_of

# Among what is compared is what it warns of.
pytestmark = pytest.mark.filterwarnings("ignore:.*are rounded to nearest, and so small a change is lost")

INDEX = "model.safetensors.index.json"
SHAPES = {
    "embed.weight": (96, 80),  # 8-bit moments, with a short last block in each row
    "layers.0.up.weight": (9, 700),
    "layers.1.up.weight": (9, 700),
    "layers.0.up.bias": (5000,),
    "layers.1.up.bias": (90,),  # small
    "rows.weight": (200, 40),  # short rows
    "norm.weight": (80,),
}


def weights(dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """Of sizes from 1e-4 to 1."""
    g = torch.Generator().manual_seed(1)
    sizes = torch.logspace(-3, 0, len(SHAPES))
    return {
        name: (size * torch.randn(shape, generator=g)).to(dtype)
        for (name, shape), size in zip(SHAPES.items(), sizes, strict=True)
    }


def parameters(dtype: torch.dtype = torch.bfloat16) -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(w) for name, w in weights(dtype).items()}


def optimizer_of(
    named: dict[str, nn.Parameter], kept: Weights, state_dtype: Any = None, **options: Any
) -> fastft.AdamW:
    return fastft.AdamW(
        list(named.items()),
        extra_bits=kept.extra_bits,
        rounding=kept.rounding,
        state_dtype=state_dtype,
        **options,
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_file(weights(), tmp_path / "model.safetensors")
    return tmp_path


# -- movement ------------------------------------------------------------------------------------------------------


def moved(kept: Weights, grad: float, **options: Any) -> tuple[int, int]:
    """How many weights, or low bits of them, a first step changes, and how many there are that are not 0."""
    named = {name: nn.Parameter(w.to(kept.dtype)) for name, w in weights().items()}
    before = {name: p.detach().clone() for name, p in named.items()}
    for p in named.values():
        p.grad = torch.full_like(p, grad)
    if options.get("anchor_decay"):
        homes = [(name, p.detach().float() * 0.98) for name, p in named.items()]
        options["anchor"] = fastft.Anchor.snapshot(homes)
    optimizer = optimizer_of(named, kept, **options)
    optimizer.step()
    changed = 0
    for name, p in named.items():
        low = optimizer.state[p].get("low_bits")
        differs = p != before[name]
        changed += int((differs if low is None else differs | (low.to(torch.int32) != 0)).sum())
    return changed, sum(int((w != 0).sum()) for w in before.values())


@pytest.mark.parametrize("lr", [3e-5, 1e-8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_step_moves_the_share_that_it_says(folder: Path, dtype: torch.dtype, lr: float) -> None:
    report = fastft.doctor(folder, lr=lr, dtype=dtype)
    partly = 0
    for found in report.movements:
        if found.kept.rounding == "nearest":
            counts = [moved(found.kept, grad, lr=lr, weight_decay=0.0) for grad in (-1.0, 1.0)]
            elements = sum(w.numel() for w in weights().values())
            measured = sum(n for n, _ in counts) / (2 * elements)
            assert found.step == pytest.approx(measured, abs=2e-3 if found.kept.dtype == torch.float32 else 1e-12)
            partly += 0.02 < measured < 0.98
    assert partly


@pytest.mark.parametrize(("rate", "dtype"), [(3e-3, torch.bfloat16), (1e-5, torch.bfloat16), (4e-4, torch.float16)])
def test_decay_moves_the_share_that_it_says(folder: Path, rate: float, dtype: torch.dtype) -> None:
    report = fastft.doctor(folder, lr=1e-3, dtype=dtype, weight_decay=rate / 1e-3)
    partly = 0
    for found in report.movements:
        if found.kept.rounding == "nearest":
            changed, elements = moved(found.kept, 0.0, lr=1e-3, weight_decay=rate / 1e-3)
            assert found.decay == pytest.approx(changed / elements, abs=1e-12)
            partly += 0.02 < changed / elements < 0.98
    assert partly


@pytest.mark.parametrize("rate", [0.15, 5e-4])
def test_the_anchor_moves_the_share_that_it_says(folder: Path, rate: float) -> None:
    report = fastft.doctor(folder, lr=1e-3, weight_decay=0.0, anchor_decay=rate / 1e-3)
    partly = 0
    for found in report.movements:
        assert found.decay is None
        if found.kept.rounding == "nearest":
            changed, elements = moved(found.kept, 0.0, lr=1e-3, weight_decay=0.0, anchor_decay=rate / 1e-3)
            assert found.pull == pytest.approx(changed / elements, abs=2e-3)
            partly += 0.02 < changed / elements < 0.98
    assert partly


def test_stochastic_rounding_moves_on_average_what_float32_moves(folder: Path) -> None:
    report = fastft.doctor(folder, lr=4e-6, weight_decay=0.01)
    wide = report.movements[-1]
    assert wide.kept.dtype == torch.float32
    assert wide.step > 0.99 > report.movements[0].step
    for found in report.movements:
        if found.kept.rounding == "stochastic":
            assert (found.step, found.decay) == (wide.step, wide.decay)
    # lr * weight_decay = 4e-8 is half a unit in the last place of some float32 weights, and less of others.
    assert wide.decay is not None and 0.02 < wide.decay < 0.98


def test_kinds_are_tensors_that_differ_by_a_number(folder: Path) -> None:
    report = fastft.doctor(folder, lr=1e-4)
    kinds = {kind.kind: kind for kind in report.kinds}
    assert set(kinds) == {"embed.weight", "layers.*.up.weight", "layers.*.up.bias", "rows.weight", "norm.weight"}
    assert (kinds["layers.*.up.weight"].tensors, kinds["layers.*.up.weight"].elements) == (2, 12600)
    assert [kind.step for kind in report.kinds] == sorted(kind.step for kind in report.kinds)
    alone = fastft.doctor(nn.ParameterDict({"w": parameters()["norm.weight"]}), lr=1e-4)
    assert kinds["norm.weight"].step == alone.movements[0].step
    total = sum(kind.step * kind.elements for kind in report.kinds) / report.elements
    assert total == pytest.approx(report.movements[0].step)


# -- memory --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_bytes_are_those_that_adamw_keeps(folder: Path, dtype: torch.dtype) -> None:
    report = fastft.doctor(folder, dtype=dtype, anchor_decay=30.0)
    assert len({(str(m.kept), m.moments_as) for m in report.memories}) == len(report.memories) >= 8
    for memory in report.memories:
        measured(memory)


def measured(memory: Memory) -> None:
    """Compare with an optimizer after a step."""
    named = parameters(memory.kept.dtype)
    for p in named.values():
        p.grad = torch.ones_like(p)
    optimizer = optimizer_of(named, memory.kept, memory.state_dtype, anchor="init", anchor_decay=1.0)
    optimizer.step()
    kept = {"low": 0, "moments": 0}
    for p in named.values():
        for key, value in optimizer.state[p].items():
            if key != "step":
                kept["low" if key == "low_bits" else "moments"] += value.nbytes
        known = optimizer._weight_sums.known(p)
        kept["low"] += 0 if known is None else known.nbytes
    assert optimizer.anchor is not None
    assert memory.weights == memory.gradients == sum(p.nbytes for p in named.values())
    assert memory.largest_gradient == named["rows.weight"].nbytes
    assert (memory.low_bits, memory.moments) == (kept["low"], kept["moments"])
    assert memory.anchor == sum(optimizer.anchor[name].nbytes for name in named)
    whole = memory.total(), memory.total(in_backward=True), memory.total(anchor_on_host=True)
    assert whole[0] == memory.weights + memory.gradients + memory.moments + memory.low_bits + memory.anchor
    assert whole[0] - whole[1] == memory.gradients - memory.largest_gradient
    assert whole[0] - whole[2] == memory.anchor


def test_large_tensors_take_the_bytes_of_the_design() -> None:
    tensors = fastft.diagnosis.examine.of_module(nn.Linear(4096, 4096, bias=False, dtype=torch.bfloat16))[1]
    expected = {
        (8, "8bit"): 7.03,
        (16, "8bit"): 8.03,
        (16, torch.float32): 14.0,
        (16, torch.bfloat16): 10.0,
        (0, "8bit"): 6.03,
    }
    for (bits, state), each in expected.items():
        found = memory_of(tensors, Weights(torch.bfloat16, bits), state, main=None, anchored=False)
        assert found.total() / found.elements == pytest.approx(each, abs=7e-3)


def test_frozen_parameters_take_only_their_own_bytes_and_are_not_asked() -> None:
    model = nn.ParameterDict({name.replace(".", "-"): p for name, p in parameters().items()})
    whole = fastft.doctor(model, lr=1e-4)
    model["embed-weight"].requires_grad_(False)
    part = fastft.doctor(model, lr=1e-4)
    frozen = model["embed-weight"].numel()
    assert (whole.trainable - part.trainable, part.elements) == (frozen, whole.elements)
    for before, after in zip(whole.memories, part.memories, strict=True):
        assert after.weights == before.weights
        assert before.gradients - after.gradients == frozen * before.kept.dtype.itemsize
        assert after.moments < before.moments
    assert "embed-weight" not in {kind.kind for kind in part.kinds}
    assert any(f"{frozen:,} weights are frozen" in note for note in part.notes)


def test_a_norm_in_float32_stays_as_it_is_unless_a_dtype_is_asked_for(tmp_path: Path) -> None:
    save_file(weights() | {"norm.weight": torch.ones(80)}, tmp_path / "a.safetensors")
    kept = fastft.doctor(tmp_path / "a.safetensors")
    converted = fastft.doctor(tmp_path / "a.safetensors", dtype="bfloat16")
    assert kept.stored == "bfloat16"
    assert kept.memories[0].weights - converted.memories[0].weights == 80 * 2
    assert [k.step for k in kept.kinds if k.kind == "norm.weight"] == [1.0]
    assert [k.step for k in converted.kinds if k.kind == "norm.weight"] == [0.0]
    wide = [(a, b) for a, b in zip(kept.memories, converted.memories, strict=True) if a.kept.dtype == torch.float32]
    assert wide and all(a == b for a, b in wide)


# -- what is read ----------------------------------------------------------------------------------------------


def test_a_file_a_folder_shards_and_a_module_are_the_same(folder: Path, tmp_path: Path) -> None:
    sharded = tmp_path / "sharded"
    sharded.mkdir()
    names = list(SHAPES)
    parts = {"a.safetensors": names[:3], "b.safetensors": names[3:]}
    for file, inside in parts.items():
        save_file({name: weights()[name] for name in inside}, sharded / file)
    index = {"weight_map": {name: file for file, inside in parts.items() for name in inside}}
    (sharded / INDEX).write_text(json.dumps(index))
    model = nn.Module()
    for name, p in parameters().items():
        *path, last = name.split(".")
        at = model
        for step in path:
            if not hasattr(at, step):
                at.add_module(step, nn.Module())
            at = getattr(at, step)
        at.register_parameter(last, p)
    reports = [
        fastft.doctor(source, lr=1e-4, anchor_decay=3.0)
        for source in (folder, folder / "model.safetensors", sharded, str(sharded / INDEX), model)
    ]
    for report in reports[1:]:
        assert report.movements == reports[0].movements
        assert report.memories == reports[0].memories
        assert {k.kind: k for k in report.kinds} == {k.kind: k for k in reports[0].kinds}
    assert reports[-1].model == "Module"


def test_what_is_not_a_weight_is_left_out_and_what_is_damaged_is_counted(tmp_path: Path) -> None:
    damaged = weights()
    damaged["norm.weight"][3:6] = float("nan")
    damaged["norm.weight"][7] = float("inf")
    save_file({**damaged, "position_ids": torch.arange(512)}, tmp_path / "model.safetensors")
    report = fastft.doctor(tmp_path)
    assert (report.not_finite, report.left_out, report.tensors) == (4, 1, len(SHAPES))
    said = {
        "The model is damaged: 4 weights of inf or NaN.",
        "Left out, being integers or in 8 bits or less: 1 tensor.",
    }
    assert said < set(report.notes)
    assert next(k for k in report.kinds if k.kind == "norm.weight").elements == 80


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"lr": 0.0}, "lr: expected a finite number > 0, got 0.0"),
        ({"weight_decay": -1.0}, "weight_decay: expected a finite number >= 0, got -1.0"),
        ({"anchor_decay": float("inf")}, "anchor_decay: expected a finite number >= 0, got inf"),
        ({"dtype": "int8"}, "dtype: expected bfloat16, float16, float32 or None, got 'int8'"),
        ({"dtype": torch.float64}, "dtype: expected bfloat16, float16, float32 or None, got torch.float64"),
        ({"gpu_memory": "lots"}, "gpu_memory: expected a size of at least 1 MB, such as 24GB or 80GiB, got 'lots'"),
        ({"gpu_memory": -24e9}, "gpu_memory: expected a size"),
        ({"gpu_memory": "24"}, "gpu_memory: expected a size"),
    ],
)
def test_a_wrong_option_is_named(folder: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError) as raised:
        fastft.doctor(folder, **options)
    assert said in str(raised.value)


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("24GB", 24e9), ("80 GiB", 80 * 2**30), ("1.5g", 1.5e9), (24e9, 24e9), ("40000mb", 4e10), ("1TiB", 2**40)],
)
def test_sizes_are_read(folder: Path, text: str | float, nbytes: float) -> None:
    assert fastft.doctor(folder, gpu_memory=text).gpu_memory == nbytes


def test_a_wrong_model_is_named(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    torch.save({}, tmp_path / "model.bin")
    (tmp_path / "torn.safetensors").write_bytes(b"\x10\0\0\0")
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "torn.json").write_text("{")
    (tmp_path / "gone.json").write_text('{"weight_map": {"a": "a.safetensors"}}')
    save_file({"ids": torch.arange(3)}, tmp_path / "ids.safetensors")
    for path, said in {
        "Qwen/Qwen3": "expected a folder with a model or a .safetensors file on this disk, found nothing",
        "empty": "expected model.safetensors or model.safetensors.index.json in this folder, found neither",
        "model.bin": "expected a .safetensors file, or a folder or index of them",
        "torn.safetensors": "cannot be read: ",
        "list.json": "cannot be read: ",
        "torn.json": "cannot be read: ",
        "gone.json": "shards are missing: ",
        "ids.safetensors": "expected weights in bfloat16, float16, float32 or float64, found none",
    }.items():
        with pytest.raises(ValueError) as raised:
            fastft.doctor(tmp_path / path)
        assert str(raised.value).startswith(f"{tmp_path / path}: "), path
        assert said in str(raised.value)
    with pytest.raises(ValueError, match="weight: expected a parameter with values, got one on meta"):
        fastft.doctor(nn.Linear(3, 3, device="meta"))


def layers(dtype: torch.dtype) -> nn.Module:
    """Ten equal ones, of 1.03 million weights."""
    return nn.Sequential(*(nn.Linear(256, 400, dtype=dtype) for _ in range(10)))


# -- conclusions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_what_is_recommended_fits_and_can_be_run(dtype: torch.dtype) -> None:
    """From more bytes a weight than any setting needs to fewer than all do."""
    seen = set()
    wide = layers(dtype)
    size = sum(p.numel() for p in wide.parameters())
    found = fastft.doctor(wide, anchor_decay=30.0, gpu_memory=30 * size)
    for each in (30.0, 18.5, 15.5, 13.0, 10.5, 9.5, 8.5, 7.7, 6.0, 4.0):
        report = dataclasses.replace(found, gpu_memory=int(each * size))
        best = report.recommended
        if best is None:
            assert "othing here fits" in report.advice
            assert not report.code
            continue
        assert best.total <= 0.9 * each * size
        trained = layers(best.memory.kept.dtype)
        names: dict[str, Any] = {"fastft": fastft, "torch": torch, "model": trained}
        exec("\n".join(report.code), names)
        optimizer = names["optimizer"]
        torch.stack([p.float().sum() for p in trained.parameters()]).sum().backward()
        assert (next(trained.parameters()).grad is None) == best.in_backward
        optimizer.step()
        state = sum(v.nbytes for s in optimizer.state.values() for key, v in s.items() if key != "step")
        sums = sum(s.nbytes for p in trained.parameters() if (s := optimizer._weight_sums.known(p)) is not None)
        assert state + sums == best.memory.moments + best.memory.low_bits
        seen.add((str(best.memory.kept), best.memory.moments_as, best.in_backward, best.anchor_on_host))
    assert len(seen) >= 4, seen
    first = {torch.float32: "float32"}.get(dtype, "bfloat16, extra_bits=16")
    assert (first, "float32", False, False) in seen


def test_small_memory_asks_for_an_anchor_on_the_host_before_a_step_in_backward() -> None:
    model = layers(torch.bfloat16)
    size = sum(p.numel() for p in model.parameters())
    free = [fastft.doctor(model, anchor_decay=9.0, gpu_memory=each * size).recommended for each in (7.7, 5.5)]
    assert all(free)
    assert [(way.in_backward, way.anchor_on_host) for way in free if way] == [(False, True), (True, True)]
    without = fastft.doctor(model, gpu_memory=5.5 * size).recommended
    assert without is not None and (without.in_backward, without.anchor_on_host) == (True, False)


def test_few_extra_bits_are_rounded_stochastically_where_a_pull_would_be_lost() -> None:
    model = layers(torch.bfloat16)
    size = 8 * sum(p.numel() for p in model.parameters())
    small = fastft.doctor(model, lr=1e-5, weight_decay=0.01, gpu_memory=size)
    large = fastft.doctor(model, lr=1e-3, weight_decay=0.1, gpu_memory=size)
    assert (small.movements[2].decay, large.movements[2].decay) == (0.0, 1.0)
    assert 'extra_bits=8, rounding="stochastic", state_dtype="8bit")' in small.code[-1]
    assert 'extra_bits=8, state_dtype="8bit")' in large.code[-1]


def test_advice_says_what_is_lost(folder: Path) -> None:
    report = fastft.doctor(folder, lr=1e-6, anchor_decay=3.0)
    assert report.advice.startswith("Rounded to nearest in bfloat16, a step of lr 1e-06 moves ")
    assert "the decay by itself none and the anchor's pull by itself none; this loses nothing, takes " in report.advice
    wide = fastft.doctor(folder, dtype=torch.float32, lr=1e-6, weight_decay=1e-3)
    assert wide.advice.startswith("This loses nothing, takes 16.0 bytes a weight, ")
    assert wide.code == (
        "# load the model with dtype=torch.float32",
        "optimizer = fastft.AdamW(model.named_parameters(), lr=1e-06, weight_decay=0.001)",
    )
    assert any("too small for float32, too" in note for note in wide.notes)
    assert not any("too small for float32, too" in note for note in fastft.doctor(folder, weight_decay=1.0).notes)


def test_second_moments_in_bfloat16_do_not_shrink_as_the_note_says(folder: Path) -> None:
    shrunk = {}
    for state_dtype in (torch.bfloat16, torch.float32):
        p = nn.Parameter(weights()["rows.weight"])
        optimizer = fastft.AdamW([p], extra_bits=16, state_dtype=state_dtype)
        seen = []
        for grad in (p.detach() * 5, torch.zeros_like(p)):
            p.grad = grad.clone()
            optimizer.step()
            seen.append(optimizer.state[p]["exp_avg_sq"].clone())
        shrunk[state_dtype] = (seen[1] < seen[0]).double().mean().item()
    assert shrunk[torch.bfloat16] == 0.0 < 0.99 < shrunk[torch.float32]
    assert any(note.startswith("Second moments in bfloat16 grow") for note in fastft.doctor(folder).notes)


# -- faces -------------------------------------------------------------------------------------------------------------


def test_the_text_has_both_tables_and_the_advice(folder: Path) -> None:
    model = layers(torch.bfloat16)
    report = fastft.doctor(model, lr=1e-5, anchor_decay=30.0, gpu_memory="10MB")
    text = str(report)
    assert text.splitlines()[0] == "Sequential: 1,028,000 weights in 20 tensors, stored in bfloat16"
    movement = next(line for line in text.splitlines() if line.startswith("bfloat16  "))
    plain = report.movements[0]
    assert movement.split()[1:] == [f"{plain.step:.1%}", "none", "none"]
    assert report.advice in text
    assert all(f"    {line}" in text.splitlines() for line in report.code)
    assert all(f"- {note}" in text.splitlines() for note in report.notes)
    titles, *rows = text.split("\n\n")[2].splitlines()
    assert titles.endswith("left of 10 MB")
    assert len(rows) == len(report.memories)
    marks = set()
    for row, memory in zip(rows, report.memories, strict=True):
        way = report.way(memory)
        left = "too large" if way is None else f"{10 - way.total / 1e6:.1f}"
        mark = "" if way is None else "b" * way.in_backward + "h" * way.anchor_on_host
        assert row.endswith(f"  {left} {mark}".rstrip()), row
        marks.add(mark or left[:3])
    assert {"too", "h", "bh"} < marks


def test_shares_that_are_not_quite_all_are_not_called_all() -> None:
    percent = fastft.diagnosis.report.percent
    assert [percent(x) for x in (1.0, 0.99999, 0.5, 1e-6, 0.0)] == ["all", ">99.9%", "50.0%", "<0.1%", "none"]


def test_json_and_markdown_hold_the_numbers(folder: Path, tmp_path: Path) -> None:
    report = fastft.doctor(folder, lr=1e-5, anchor_decay=30.0, gpu_memory="1GB")
    found = json.loads(report.to_json())
    assert [m["step"] for m in found["movements"]] == [m.step for m in report.movements]
    assert [m["total"]["plain"] for m in found["memories"]] == [m.total() for m in report.memories]
    assert found["memories"][0]["kept"]["dtype"] == name_of(report.memories[0].kept.dtype)
    assert found["memories"][0]["total"]["bh"] == report.memories[0].total(in_backward=True, anchor_on_host=True)
    assert found["code"] == list(report.code)
    page = report.to_markdown()
    assert page.count("| --- |") == 3
    assert "| `layers.*.up.weight` | 2 | 12,600 |" in page


@pytest.mark.slow
def test_it_is_written_with_a_plot(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "out"
    out.mkdir()
    fastft.doctor(folder, anchor_decay=3.0, gpu_memory="2MB").write(out)
    assert {file.name for file in out.iterdir()} == {"report.md", "report.json", "plot.png"}
