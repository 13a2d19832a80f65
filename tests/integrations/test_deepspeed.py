"""DeepSpeed ZeRO-1 and ZeRO-2 in two processes against one; and its partitions, imitated, in one process."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import deepspeed_distributed as scenarios
import pytest
import torch
from deepspeed_distributed import CELLS_OF, OTHERS, REFUSED, WAYS, Model, Way, cell, gradients, masks, row
from needs import needs
from torch import Tensor, nn

import fastft
from fastft import Anchor
from fastft.integrations.deepspeed import attach

# -- without DeepSpeed: partitions cut as it does, in one process ----------------------------------------------------


class Engine(SimpleNamespace):
    """The attributes of a DeepSpeedEngine that ``attach`` reads."""

    mpu = None
    has_moe_layers = pipeline_parallelism = False
    device = torch.device("cpu")

    def zero_optimization_stage(self) -> int:
        return 2

    def zero_elastic_checkpoint(self) -> bool:
        return False

    def gradient_clipping(self) -> float:
        return 0.0


@pytest.fixture(autouse=True)
def _imitation(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """DeepSpeed as far as ``attach`` sees it, and two ranks in one process."""
    if "two_processes" in request.fixturenames:
        return
    package = ModuleType("deepspeed")
    package.DeepSpeedEngine = Engine  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "deepspeed", package)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda rank: rank)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *_, **__: None)


def partitioned(module: nn.Module, optimizer: fastft.AdamW, rank: int, reverse: bool) -> Engine:
    """Put one rank's flat float32 partitions in the place of the parameters, with a gap between any two of these."""
    groups, flats, parts = [], [], []
    for group in optimizer.param_groups:
        params = [p for p in group["params"] if p.requires_grad]
        places, end = {}, 0
        for p in reversed(params) if reverse else params:
            places[p] = end
            end += p.numel() + 3
        flat = torch.zeros(end + end % 2)
        for p, place in places.items():
            flat[place : place + p.numel()] = p.detach().flatten()
            p.data = flat[place : place + p.numel()].view(p.shape)
        half = flat.chunk(2)
        group["params"] = [half[rank].clone().requires_grad_()]
        groups.append(params)
        flats.append(flat)
        parts.append(list(half))
    zero = SimpleNamespace(
        optimizer=optimizer,
        bit16_groups=groups,
        bit16_groups_flat=flats,
        parallel_partitioned_bit16_groups=parts,
        real_dp_process_group=[rank] * len(groups),
        dp_process_group=None,
        torch_autocast_gradscaler=None,
        _optimizer_step=None,
    )
    return Engine(module=module, optimizer=zero)


class Imitated:
    """Both ranks' optimizers, with the arguments of ``Alone``."""

    def __init__(
        self,
        way: Way,
        *,
        anchor: Any = None,
        carried: bool = False,
        decays: tuple[float, float] = (0.0, 0.0),
        masked: bool = False,
        frozen: Iterable[str] = (),
        reverse: bool = False,
        **options: Any,
    ) -> None:
        self.engines: list[Engine] = []
        for rank in range(2):
            module = Model(0)
            params = dict(module.named_parameters())
            given = anchor(module) if anchor is not None else None
            optimizer = fastft.AdamW(
                scenarios.groups(module, False, decays if carried else (0.0, 0.0)),
                anchor=given if carried else None,
                **scenarios.OPTIONS,
                **options,
            )
            if carried:
                for name, mask in masks().items() if masked else ():
                    optimizer.set_update_mask(params[name], mask)
                optimizer.freeze([p for name, p in params.items() if name.startswith(tuple(frozen))] if frozen else [])
            engine = partitioned(module, optimizer, rank, reverse)
            if carried:
                attach(engine)
            else:
                for group, decay in zip(optimizer.param_groups, decays, strict=True):
                    group["anchor_decay"] = decay
                attach(
                    engine,
                    anchor=given,
                    update_masks=masks() if masked else None,
                    frozen=frozen if frozen else None,
                )
            self.engines.append(engine)

    def train(self, steps: Iterable[int]) -> Imitated:
        for step in steps:
            grads = gradients(step, None)
            for rank, engine in enumerate(self.engines):
                zero = engine.optimizer
                names = {p: name for name, p in engine.module.named_parameters()}
                groups = zero.optimizer.param_groups
                for group, params, flat in zip(groups, zero.bit16_groups, zero.bit16_groups_flat, strict=True):
                    whole = torch.zeros_like(flat)
                    for p in params:
                        whole[p.storage_offset() : p.storage_offset() + p.numel()] = grads[names[p]].flatten()
                    group["params"][0].grad = whole.chunk(2)[rank].clone()
                try:
                    for group in groups:  # DeepSpeed steps one after the other
                        zero.optimizer.param_groups = [group]
                        zero.optimizer.step()
                finally:
                    zero.optimizer.param_groups = groups
        return self

    def outcome(self) -> scenarios.Outcome:
        first, second = (engine.optimizer for engine in self.engines)
        names = {p: name for name, p in self.engines[0].module.named_parameters()}
        found: dict[str, dict[str, Tensor]] = {"weights": {}, "exp_avg": {}}
        for i, params in enumerate(first.bit16_groups):
            partitions = [zero.optimizer.param_groups[i]["params"][0] for zero in (first, second)]
            states = [zero.optimizer.state[p] for zero, p in zip((first, second), partitions, strict=True)]
            joined = {
                "weights": torch.cat([p.detach() for p in partitions]),
                "exp_avg": torch.cat([state["exp_avg"] for state in states]),
            }
            for p in params:
                place = p.storage_offset()
                for key, flat in joined.items():
                    found[key][names[p]] = flat[place : place + p.numel()].reshape(p.shape)
        return found


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    "name",
    ["everything", "carried", "carried_snapshot", "narrow_anchor", "anchor_in_a_file", "importance", "free_group"],
)
def test_partitions_are_stepped_as_whole_tensors(
    name: str, reverse: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scenarios, "FOLDER", tmp_path, raising=False)
    found = OTHERS[name](lambda **arguments: Imitated(WAYS["ZeRO-2"], reverse=reverse, **arguments))
    expected = scenarios.in_one_process("ZeRO-2", name)
    assert not scenarios.differences(found, {key: expected[key] for key in found})


def test_the_scenarios_are_not_trivial() -> None:
    """A tensor is cut in each group; what is masked or frozen stays, the rest moves, and the anchor pulls."""
    start = {name: p.detach() for name, p in Model(0).named_parameters()}
    end = scenarios.in_one_process("ZeRO-2", "everything")["weights"]
    free = scenarios.in_one_process("ZeRO-2", "masks")["weights"]
    moved = {name: (p != start[name]).float().mean().item() for name, p in end.items()}
    assert moved.pop("embed.weight") == moved.pop("norm.bias") == 0.0
    assert moved.pop("body.weight") == pytest.approx(10 / 16)
    assert moved.pop("norm.weight") == pytest.approx(10 / 17)
    assert moved.pop("head.weight") == 0.5
    assert moved == {"body.bias": 1.0, "head.bias": 1.0}
    assert all(not torch.equal(end[name], free[name]) for name in end)


def engine_of(**options: Any) -> tuple[Engine, fastft.AdamW]:
    module = Model(0)
    optimizer = fastft.AdamW(scenarios.groups(module, False, (0.0, 0.0)), **scenarios.OPTIONS, **options)
    return partitioned(module, optimizer, 0, False), optimizer


def element_masks(optimizer: fastft.AdamW) -> list[Tensor]:
    found = [optimizer.update_mask(group["params"][0]) for group in optimizer.param_groups]
    assert all(mask is not None for mask in found)
    return [mask for mask in found if mask is not None]


def test_a_later_call_changes_only_what_it_names() -> None:
    engine, optimizer = engine_of()
    attach(engine, update_masks=masks(), frozen="embed")
    attach(engine, anchor="init", anchor_decay=2.0)
    first = element_masks(optimizer)
    attach(engine, frozen=["embed", "body.bias"])
    second = element_masks(optimizer)
    assert torch.equal(first[0], second[0])
    assert first[1].sum() - second[1].sum() == 16
    assert [group["anchor_decay"] for group in optimizer.param_groups] == [2.0, 2.0]
    attach(engine, frozen=())  # nothing has been stepped
    third = element_masks(optimizer)
    assert torch.equal(third[1], first[1]) and third[0].sum() > second[0].sum()
    attach(engine, update_masks={})
    assert not optimizer._masks
    assert optimizer.anchor is not None and len(optimizer.anchor) == 2


def test_an_error_changes_nothing() -> None:
    engine, optimizer = engine_of()
    attach(engine, anchor="init", anchor_decay=2.0, update_masks=masks())
    before = (optimizer.anchor, element_masks(optimizer), [dict(group) for group in optimizer.param_groups])
    for wrong in ({"frozen": ["tail"]}, {"update_masks": {"tail": torch.ones(3)}}, {"anchor": "last"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            attach(engine, anchor_decay=3.0, **wrong)
    assert optimizer.anchor is before[0]
    assert all(map(torch.equal, element_masks(optimizer), before[1]))
    assert [dict(group) for group in optimizer.param_groups] == before[2]


def test_a_later_anchor_replaces_the_first() -> None:
    engine, optimizer = engine_of(anchor="init")
    attach(engine, anchor_decay=1.0)
    attach(engine, anchor=Anchor.snapshot(Model(1)))
    (partition,) = optimizer.param_groups[0]["params"]
    assert optimizer.anchor is not None
    assert torch.equal(optimizer.anchor[partition][:65], Model(1).embed.weight.detach().flatten())


def test_the_first_weights_are_those_that_deepspeed_has_sent_around() -> None:
    """It gives all processes the first one's weights, after AdamW has taken those of its own."""
    module = Model(0)
    optimizer = fastft.AdamW(module.named_parameters(), anchor="init", anchor_decay=1.0)
    with torch.no_grad():
        module.embed.weight.copy_(Model(1).embed.weight)
    engine = partitioned(module, optimizer, 0, False)
    attach(engine)
    (partition,) = optimizer.param_groups[0]["params"]
    assert optimizer.anchor is not None
    assert torch.equal(optimizer.anchor[partition], partition)


def test_a_part_of_a_group_cannot_be_anchored() -> None:
    engine, _ = engine_of()
    anchor = Anchor.snapshot(engine.module, exclude="head.weight")
    with pytest.raises(
        ValueError, match=r"param_groups\[0\]: anchor: .* got none for 'head.weight'; put these in a group"
    ):
        attach(engine, anchor=anchor, anchor_decay=1.0)


def test_after_a_step_nothing_is_thawed() -> None:
    engine, optimizer = engine_of()
    attach(engine, frozen=["embed", "norm"])
    attach(engine, frozen="embed")
    for group in optimizer.param_groups:
        group["params"][0].grad = torch.ones_like(group["params"][0])
    optimizer.step()
    attach(engine, frozen=["embed", "head"])
    with pytest.raises(ValueError, match=r"frozen: expected 'head.bias', 'head.weight' among them still"):
        attach(engine, frozen="embed")


def test_state_dicts_have_torch_s_state() -> None:
    """ds_to_universal takes every tensor in it for one of moments; the anchor and the masks come back all the same."""
    engine, optimizer = engine_of()
    attach(engine, anchor="init", anchor_decay=2.0, update_masks=masks())
    attach(engine)
    for group in optimizer.param_groups:
        group["params"][0].grad = torch.ones_like(group["params"][0])
    optimizer.step()
    saved = optimizer.state_dict()
    assert [set(state) for state in saved["state"].values()] == 2 * [{"step", "exp_avg", "exp_avg_sq"}]
    other_engine, other = engine_of()
    attach(other_engine)
    other.load_state_dict(saved)
    assert all(map(torch.equal, element_masks(other), element_masks(optimizer)))
    assert other.anchor is not None and len(other.anchor) == 2


def test_what_is_no_engine_is_refused() -> None:
    with pytest.raises(TypeError, match=r"engine: expected a DeepSpeedEngine, .* got Model"):
        attach(Model(0))


@pytest.mark.parametrize(
    ("attribute", "value", "message"),
    [
        ("pipeline_parallelism", True, "engine: expected one without pipeline parallelism"),
        ("zero_optimization_stage", lambda: 3, "engine: expected ZeRO stage 1 or 2, got 3"),
        ("zero_elastic_checkpoint", lambda: True, 'engine: expected "elastic_checkpoint": false'),
    ],
)
def test_configurations_are_refused(attribute: str, value: Any, message: str) -> None:
    engine, _ = engine_of()
    setattr(engine, attribute, value)
    with pytest.raises(ValueError, match=message):
        attach(engine)


@pytest.mark.parametrize(
    ("attribute", "value", "message"),
    [
        ("zenflow", True, 'engine: expected ZeRO without "zenflow"'),
        ("torch_autocast_gradscaler", object(), "engine: expected .* with bfloat16, got float16"),
        ("offloaded_states", {"hp_params"}, "engine: expected the partitions .* in memory"),
        ("bit16_groups_flat", [torch.zeros(500), torch.zeros(80)], "engine: embed.weight: expected a view of"),
    ],
)
def test_other_partitions_are_refused(attribute: str, value: Any, message: str) -> None:
    engine, _ = engine_of()
    setattr(engine.optimizer, attribute, value)
    with pytest.raises(ValueError, match=message):
        attach(engine)


def test_clipping_with_model_parallelism_is_refused() -> None:
    module = Model(0)
    optimizer = fastft.AdamW(module.named_parameters(), max_grad_norm=1.0)
    engine = partitioned(module, optimizer, 0, False)
    engine.mpu = object()
    with pytest.raises(ValueError, match=r'max_grad_norm: expected plain data parallelism.*"gradient_clipping"'):
        attach(engine)


@pytest.mark.parametrize(("option", "value"), [("max_grad_norm", 1.0), ("skip_nonfinite", True)])
def test_options_set_after_attach_are_refused_at_the_step(option: str, value: Any) -> None:
    run = Imitated(WAYS["ZeRO-2"], anchor=Anchor.snapshot, carried=True, decays=(5.0, 1.0)).train([0])
    before = run.outcome()
    for engine in run.engines:
        setattr(engine.optimizer.optimizer, option, value)
    with pytest.raises(ValueError, match=f"{option}: DeepSpeed steps the 2 groups one after the other.* use "):
        run.train([1])
    assert not scenarios.differences(run.outcome(), before)


@pytest.mark.parametrize("decays", [(0.0, 5.0), (5.0, 0.0), (0.0, 0.0)])
def test_an_anchor_is_idle_if_no_group_is_pulled(decays: tuple[float, float]) -> None:
    """Whichever group is stepped first."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run = Imitated(WAYS["ZeRO-2"], anchor=Anchor.snapshot, carried=True, decays=decays).train([0, 1])
    said = [warning for warning in caught if "got 0 in every group; nothing is pulled" in str(warning.message)]
    assert len(said) == (0 if any(decays) else len(run.engines))


@pytest.mark.slow
def test_deepspeed_is_not_imported() -> None:
    script = "import sys, fastft.integrations.deepspeed; print('deepspeed' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]


# -- with it, in two processes ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], list[Any]]:
    """The results of all scenarios, one for each rank, and of one process that loads what two have saved."""
    folder = tmp_path_factory.mktemp("deepspeed")
    scenarios.FOLDER = folder
    results = scenarios.start_processes(folder)
    scenarios.to_universal(folder / "checkpoint" / "half", folder / "universal" / "half")
    return {**results, **scenarios.start_processes(folder, world=1)}


MESSAGES = {
    "unattached_anchor": r"ValueError: .*came in the place of others.*fastft\.integrations\.deepspeed",
    "unattached_masks": r"ValueError: .*came in the place of others.*fastft\.integrations\.deepspeed",
    "unattached_clip": "ValueError: max_grad_norm: .*DeepSpeed: gradient_clipping",
    "clip_in_groups": 'ValueError: max_grad_norm: DeepSpeed steps the 2 groups .* use "gradient_clipping"',
    "skip_in_groups": 'ValueError: skip_nonfinite: DeepSpeed steps the 2 groups .* use "check_grad_overflow": true',
    "clipped_twice": 'ValueError: max_grad_norm: expected "gradient_clipping": 0.0 .* got 1.5',
    "partly_anchored": r"ValueError: param_groups\[0\]: anchor: .* got none for 'head.weight'; put these in a group",
    "selective": r'ValueError: param_groups\[0\]: anchor_mode: expected .* got "selective", which judges whole tensors',
    "eight_bits": 'ValueError: state_dtype: expected .* got "8bit", which goes by the rows of whole tensors',
    "elastic": 'ValueError: engine: expected "elastic_checkpoint": false',
    "stage_0": "ValueError: engine: expected ZeRO stage 1 or 2, got 0",
    "stage_3": 'ValueError: engine: expected ZeRO stage 1 or 2, got 3.* set "stage": 2',
    "thawed": "ValueError: frozen: expected 'norm.bias' among them still",
    "wrong_names": "ValueError: update_masks: 'body.wieght' is no parameter .*closest: body.weight",
    "wrong_shapes": r"ValueError: body.weight: update mask: expected shape \[16\] .* got \[17\]",
    "other_anchors": "ValueError: anchor: expected the same weights in every process, got .* for head.weight: take",
    "another_model": "ValueError: anchor: none of the optimizer's parameters is in Anchor",
    "no_anchor": "ValueError: anchor_decay: expected 0 without an anchor, got 1.0",
    "another_optimizer": "TypeError: engine: expected a fastft.AdamW given to deepspeed.initialize .* got AdamW",
    "no_engine": "TypeError: engine: expected a DeepSpeedEngine, .* got Model",
    "unfreezer": "ValueError: optimizer: expected every parameter of the model",
}


@needs("deepspeed")
@pytest.mark.slow
@pytest.mark.parametrize(
    ("way", "name"), [key for key in scenarios.scenarios(2) if key[1] not in REFUSED], ids=lambda value: str(value)
)
def test_two_processes_do_what_one_does(way: str, name: str, two_processes: dict[tuple[str, str], list[Any]]) -> None:
    assert cell(way, name, two_processes[way, name]) == {"outcome": "exact"}


@needs("deepspeed")
@pytest.mark.slow
@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_all_processes(name: str, two_processes: dict[tuple[str, str], list[Any]]) -> None:
    for result in two_processes[CELLS_OF, name]:
        with pytest.raises(Error, match=MESSAGES[name]):
            raise Error(f"{result['type']}: {result['refused']}" if "refused" in result else str(result))


class Error(Exception):
    """One of another process."""


@needs("deepspeed")
@pytest.mark.slow
def test_the_row_of_the_table(two_processes: dict[tuple[str, str], list[Any]]) -> None:
    found = json.loads(json.dumps(row(two_processes)))
    assert {column: found[column]["outcome"] for column in found} == {
        "step": "exact",
        "clip": "exact",
        "skip": "exact",
        "anchor": "exact",
        "masks": "exact",
        "freeze": "exact",
        "clip, several groups": "refused",
        "skip, several groups": "refused",
        "unfreeze": "refused",
        "Unfreezer": "refused",
        "save and resume": "exact",
        "save on 2, resume on 1": "refused",  # by DeepSpeed
        "save on 2, resume on 1, universal": "exact",
    }
    assert "world size of 2 but the current world size is 1" in found["save on 2, resume on 1"]["sentence"]
