"""Policies: what each opens when, that it depends on nothing else, and what it refuses."""

from __future__ import annotations

import importlib
import pickle
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from unfreeze_cases import Stack, backward, drawn

from fastft.unfreeze import (
    LISA,
    Always,
    BlockCoordinate,
    Budget,
    ChainThaw,
    Event,
    GradualUnfreeze,
    LinearProbeThenFinetune,
    OnPlateau,
    Phases,
    Policy,
    Progress,
    layer_groups,
    open_at,
    policies,
)
from fastft.unfreeze.policies import GoesBack, GroupInfo, open_groups

GROUPS = (
    GroupInfo("embeddings", "embeddings"),
    *(GroupInfo(f"blocks.{i}", "block") for i in range(4)),
    GroupInfo("final_norm", "norm"),
    GroupInfo("head", "head"),
)
N = len(GROUPS)
ALL = set(range(N))
TOP = [set(range(N - k, N)) for k in range(N + 1)]


def at(step: int, epoch: float = 0.0, *values: float | None) -> Progress:
    """Progress at a step; ``values`` are those of ``loss``, one event each, None for an event without it."""
    events = [Event(i + 1, 0.0, {"other": 1.0} if value is None else {"loss": value}) for i, value in enumerate(values)]
    return Progress(step, GROUPS, epoch, tuple(events))


def opened(policy: Policy, progress: Progress) -> set[int]:
    return set(open_groups(policy, progress))


# -- what each opens -----------------------------------------------------------------------------------------


def test_always() -> None:
    assert opened(Always(), at(0)) == opened(Always(), at(9)) == ALL


@pytest.mark.parametrize(
    ("policy", "progress", "count"),
    [
        (GradualUnfreeze(10), at(0), 1),
        (GradualUnfreeze(10), at(9), 1),
        (GradualUnfreeze(10), at(10), 2),
        (GradualUnfreeze(10), at(59), 6),
        (GradualUnfreeze(10), at(60), 7),
        (GradualUnfreeze(10), at(10**6), 7),
        (GradualUnfreeze(10, start=3), at(29), 5),
        (GradualUnfreeze(1, unit="epoch"), at(500, 0.99), 1),
        (GradualUnfreeze(1, unit="epoch"), at(0, 1.0), 2),
        (GradualUnfreeze(0.5, start=2, unit="epoch"), at(0, 1.6), 5),
    ],
)
def test_gradual_unfreezing_opens_from_the_top(policy: Policy, progress: Progress, count: int) -> None:
    assert opened(policy, progress) == TOP[count]


def test_chain_thaw_goes_through_all_groups_and_ends_with_all() -> None:
    thaw = ChainThaw(10)
    assert [opened(thaw, at(10 * stage)) for stage in range(N + 2)] == [{6}, {0}, {1}, {2}, {3}, {4}, {5}, ALL, ALL]
    assert opened(thaw, at(9)) == {6}
    assert opened(ChainThaw(0.5, unit="epoch"), at(0, 1.2)) == {1}


def test_probing_opens_the_head_and_then_everything() -> None:
    policy = LinearProbeThenFinetune(5)
    assert [opened(policy, at(step)) for step in (0, 4, 5, 50)] == [{6}, {6}, ALL, ALL]
    assert opened(LinearProbeThenFinetune(0), at(0)) == ALL
    headless = Progress(0, GROUPS[:-1])
    assert opened(policy, headless) == {5}


def test_lisa_draws_blocks_and_leaves_the_rest_open() -> None:
    policy = LISA(n_layers=2, every=20, seed=3)
    draws = [opened(policy, at(20 * i)) for i in range(60)]
    for i, draw in enumerate(draws):
        assert draw >= {0, 5, 6}
        assert len(draw) == 5
        assert opened(policy, at(20 * i + 19)) == draw
    assert all(1 in draw or 2 in draw or 3 in draw or 4 in draw for draw in draws)
    counts = [sum(block in draw for draw in draws) for block in (1, 2, 3, 4)]
    assert min(counts) > 15  # 30 expected, standard deviation 3.9
    assert [opened(LISA(2, 20, seed=4), at(20 * i)) for i in range(60)] != draws
    assert opened(LISA(n_layers=4), at(0)) == ALL
    with pytest.raises(ValueError, match="n_layers: expected at most the 4 blocks, got 5"):
        opened(LISA(n_layers=5), at(0))


def test_lisa_draws_the_same_in_every_process_and_release() -> None:
    # Written down, so that a run can be resumed by another version.
    assert [sorted(opened(LISA(1, 10), at(10 * i)) - {0, 5, 6}) for i in range(6)] == [[3], [4], [3], [2], [4], [4]]


@pytest.mark.parametrize(
    ("order", "expected"),
    [("descending", [6, 5, 4, 3, 2, 1, 0, 6]), ("ascending", [0, 1, 2, 3, 4, 5, 6, 0])],
)
def test_block_coordinate_descent_takes_turns(order: Any, expected: list[int]) -> None:
    policy = BlockCoordinate(3, order)
    assert [opened(policy, at(3 * i)) for i in range(8)] == [{i} for i in expected]
    assert opened(policy, at(2)) == opened(policy, at(0))


def test_block_coordinate_descent_in_random_order_takes_each_once_a_round() -> None:
    policy = BlockCoordinate(3, "random", seed=1)
    turns = [opened(policy, at(3 * i)) for i in range(5 * N)]
    rounds = [turns[i : i + N] for i in range(0, len(turns), N)]
    assert all(set().union(*each) == ALL for each in rounds)
    assert len({tuple(map(tuple, each)) for each in rounds}) > 1


@pytest.mark.parametrize(
    ("policy", "values", "count"),
    [
        (OnPlateau("loss"), (), 1),
        (OnPlateau("loss"), (1.0, 0.9, 0.8), 1),
        (OnPlateau("loss"), (1.0, 1.0, 1.0), 2),
        (OnPlateau("loss"), (1.0, 1.0, 0.9, 1.0, 1.0), 2),
        (OnPlateau("loss"), (1.0, 1.0, 0.9, 1.0), 1),
        (OnPlateau("loss"), (1.0, 2.0, 2.0, 2.0, 2.0), 3),
        (OnPlateau("loss"), (1.0, None, 2.0, None, None), 1),
        (OnPlateau("loss", patience=1, start=2), (1.0, 0.99995), 3),
        (OnPlateau("loss", patience=1, threshold=0.0), (1.0, 0.99995), 1),
        (OnPlateau("loss", mode="max"), (1.0, 0.9, 0.8), 2),
        (OnPlateau("loss", mode="max", patience=1), (0.1, 0.2, 0.3), 1),
        (OnPlateau("loss"), (1.0, float("nan"), float("nan")), 2),
        (OnPlateau("loss", patience=1), (1.0,) * 50, 7),
    ],
)
def test_a_plateau_opens_one_more(policy: OnPlateau, values: tuple[float | None, ...], count: int) -> None:
    assert opened(policy, at(99, 0.0, *values)) == TOP[count]
    assert policy.best_event(at(99, 0.0, *values)) is None


def test_the_best_event_is_the_one_to_go_back_to() -> None:
    policy = OnPlateau("loss", restore_best=True)
    assert isinstance(policy, GoesBack)
    assert not isinstance(Always(), GoesBack)
    assert policy.best_event(at(3)) is None
    progress = at(9, 0.0, 1.0, 0.5, None, 0.49999, 0.7)
    assert policy.best_event(progress) is progress.events[1]
    assert OnPlateau("loss", mode="max", restore_best=True).best_event(progress) is progress.events[0]


class Plateau:
    """The same as a loop that keeps state, as people write it."""

    def __init__(self, policy: OnPlateau) -> None:
        self.policy, self.best, self.bad, self.open = policy, None, 0, policy.start

    def log(self, value: float) -> int:
        better = self.best is None or (
            value < self.best - self.policy.threshold
            if self.policy.mode == "min"
            else value > self.best + self.policy.threshold
        )
        if better:
            self.best, self.bad = value, 0
        else:
            self.bad += 1
            if self.bad == self.policy.patience:
                self.open, self.bad = self.open + 1, 0
        return min(self.open, N)


@pytest.mark.slow
@given(
    values=st.lists(st.sampled_from([0.0, 0.1, 0.25, 0.3, 0.5, 0.75, 1.0]), max_size=30),
    patience=st.integers(1, 4),
    mode=st.sampled_from(["min", "max"]),
    threshold=st.sampled_from([0.0, 0.2]),
)
@drawn
def test_replaying_events_is_what_a_loop_would_have_done(
    values: list[float], patience: int, mode: Any, threshold: float
) -> None:
    policy = OnPlateau("loss", patience, mode, threshold)
    loop = Plateau(policy)
    for i, value in enumerate(values):
        assert opened(policy, at(i, 0.0, *values[: i + 1])) == TOP[loop.log(value)]


@pytest.mark.parametrize(("limit", "count"), [(1.0, 1), (2.9, 2), (3.0, 3), (100.0, 7), (4.4, 5)])
def test_a_budget_is_spent_from_the_top(limit: float, count: int) -> None:
    budget = Budget([1, 2, 3, 4.5, 4.4, 6, 7], limit)
    assert opened(budget, at(0)) == opened(budget, at(10**5)) == TOP[count]
    with pytest.raises(ValueError, match="costs: expected one for each of the 3 groups, got 7"):
        budget(Progress(0, GROUPS[:3]))


WRITTEN = [
    {"from": 0, "open": ["head"]},
    {"from": 100, "open": ["final_norm", "head", "blocks.[23]"]},
    {"from": 250, "open": ["block", -1, 5]},
    {"from": 300, "open": ["*"]},
]
YAML = """
- {from: 0, open: head}
- from: 100
  open: [final_norm, head, "blocks.[23]"]
- {from: 250, open: [block, -1, 5]}
- {from: 300, open: "*"}
"""


@pytest.mark.parametrize("source", ["dict", "yaml", "file", "nested"])
def test_phases_are_what_was_written(source: str, tmp_path: Path) -> None:
    (tmp_path / "phases.yaml").write_text(YAML)
    phases = {
        "dict": lambda: Phases(WRITTEN),
        "yaml": lambda: Phases.from_yaml(YAML),
        "file": lambda: Phases.from_yaml(tmp_path / "phases.yaml"),
        "nested": lambda: Phases.from_yaml("unit: step\nphases:" + YAML.replace("\n", "\n  ")),
    }[source]()
    expected = [(0, {6}), (99, {6}), (100, {3, 4, 5, 6}), (249, {3, 4, 5, 6}), (250, {1, 2, 3, 4, 5, 6}), (300, ALL)]
    assert [(step, opened(phases, at(step))) for step, _ in expected] == expected
    assert phases == Phases(WRITTEN)


def test_phases_by_epoch_and_from_a_path_as_text(tmp_path: Path) -> None:
    (tmp_path / "p.yml").write_text("unit: epoch\nphases: [{from: 0, open: [head]}, {from: 0.5, open: [block]}]")
    phases = Phases.from_yaml(str(tmp_path / "p.yml"))
    assert [opened(phases, at(900, epoch)) for epoch in (0.4, 0.5)] == [{6}, {1, 2, 3, 4}]


def test_changing_what_phases_were_made_from_changes_nothing() -> None:
    written: list[dict[str, Any]] = [{"from": 0, "open": ["head"]}]
    phases = Phases(written)
    written[0]["open"].append("blocks.0")
    assert opened(phases, at(0)) == {6}


def test_without_pyyaml_phases_say_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.import_module

    def without(name: str) -> Any:
        if name == "yaml":
            raise ImportError(name)
        return real(name)

    monkeypatch.setattr(policies.importlib, "import_module", without)
    with pytest.raises(ImportError, match=r"Phases\.from_yaml needs PyYAML"):
        Phases.from_yaml("[]")


# -- pure functions ------------------------------------------------------------------------------------------

BUILT_IN: list[Policy] = [
    Always(),
    GradualUnfreeze(7),
    GradualUnfreeze(0.3, start=2, unit="epoch"),
    ChainThaw(4),
    LinearProbeThenFinetune(20),
    LISA(2, every=3, seed=5),
    BlockCoordinate(2),
    BlockCoordinate(2, "random", seed=9),
    OnPlateau("loss", patience=2, restore_best=True),
    Budget([1, 2, 3, 4, 5, 6, 7], 4.2),
    Phases(WRITTEN),
]


@pytest.mark.parametrize("policy", BUILT_IN, ids=lambda p: type(p).__name__)
@given(data=st.data())
@drawn
def test_policies_are_pure(policy: Policy, data: st.DataObject) -> None:
    """In any order of asking, however often, and in a policy that was saved and made anew: the same groups."""
    values = data.draw(st.lists(st.floats(0, 2) | st.none(), min_size=1, max_size=40))
    run = [at(i, i / 20, *values[: i + 1]) for i in range(len(values))]
    expected = [opened(policy, progress) for progress in run]
    assert all(expected)

    order = data.draw(st.permutations(range(len(run))))
    torch.manual_seed(data.draw(st.integers(0, 9)))
    assert [opened(policy, run[i]) for i in order] == [expected[i] for i in order]

    resumed_at = data.draw(st.integers(0, len(run) - 1))
    again, rest = pickle.loads(pickle.dumps((policy, run[resumed_at:])))
    assert [opened(again, progress) for progress in rest] == expected[resumed_at:]
    assert again == policy


@pytest.mark.parametrize("policy", BUILT_IN, ids=lambda p: type(p).__name__)
def test_policies_take_what_any_function_may_be_given(policy: Policy) -> None:
    """They draw from no global generator, and leave it as it is."""
    import random

    random.seed(1)
    torch.manual_seed(1)
    before = (random.getstate(), torch.get_rng_state())
    first = [opened(policy, at(step, step / 10)) for step in range(30)]
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])
    random.seed(2)
    assert [opened(policy, at(step, step / 10)) for step in range(30)] == first


# -- what a policy may answer --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "expected"),
    [(["head", 0], {0, 6}), ([-1, "head", 6], {6}), (range(2), {0, 1}), (iter(["blocks.2"]), {3})],
)
def test_names_and_indices_are_taken(answer: Any, expected: set[int]) -> None:
    assert opened(lambda _: answer, at(0)) == expected


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ([], r"expected at least one open group, got none at step 4"),
        ([7], r"expected names or indices of the 7 groups, got 7 at step 4"),
        ([-8], r"got -8 at step 4"),
        (["blocks.9"], r"got 'blocks\.9' at step 4; closest: blocks\."),
        ([1.0], r"got 1\.0 at step 4"),
    ],
)
def test_other_answers_are_refused(answer: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        opened(lambda _: answer, at(4))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GradualUnfreeze(0), r"every: expected an integer >= 1, got 0"),
        (lambda: GradualUnfreeze(1.5), r"every: expected an integer >= 1, got 1\.5"),
        (lambda: GradualUnfreeze(True), r"every: expected an integer >= 1, got True"),
        (lambda: GradualUnfreeze(0.0, unit="epoch"), r"every: expected a finite number > 0, got 0\.0"),
        (lambda: GradualUnfreeze(3, start=0), r"start: expected an integer >= 1, got 0"),
        (lambda: GradualUnfreeze(3, unit="hour"), r"unit: expected one of 'step', 'epoch', got 'hour'"),  # type: ignore[arg-type]
        (lambda: ChainThaw(-1), r"every: expected an integer >= 1, got -1"),
        (lambda: ChainThaw(1, unit="x"), r"unit: expected one of"),  # type: ignore[arg-type]
        (lambda: LinearProbeThenFinetune(-1), r"probe_steps: expected an integer >= 0, got -1"),
        (lambda: LISA(0), r"n_layers: expected an integer >= 1, got 0"),
        (lambda: LISA(every=0), r"every: expected an integer >= 1, got 0"),
        (lambda: BlockCoordinate(0), r"every: expected an integer >= 1"),
        (lambda: BlockCoordinate(1, "up"), r"order: expected one of 'desc"),  # type: ignore[arg-type]
        (lambda: OnPlateau(""), r"metric: expected a name, got ''"),
        (lambda: OnPlateau("loss", patience=0), r"patience: expected an integer >= 1, got 0"),
        (lambda: OnPlateau("loss", mode="lower"), r"mode: expected one of 'min', 'max', got 'lower'"),  # type: ignore[arg-type]
        (lambda: OnPlateau("loss", threshold=-1), r"threshold: expected a finite number >= 0, got -1"),
        (lambda: OnPlateau("loss", start=0), r"start: expected an integer >= 1"),
        (lambda: Budget([], 1), r"costs: expected finite numbers >= 0, got \(\)"),
        (lambda: Budget([1, float("nan")], 1), r"costs: expected finite numbers"),
        (lambda: Budget([2, 3], 1), r"limit: expected at least 2, the cheapest step, got 1"),
        (lambda: Phases([]), r"phases: expected a list of phases, got \[\]"),
        (lambda: Phases("head"), r"phases: expected a list of phases, got 'head'"),  # type: ignore[arg-type]
        (lambda: Phases([{"from": 1, "open": ["head"]}]), r"from: expected 0 and then .* got \[1\]"),
        (lambda: Phases([*WRITTEN, WRITTEN[1]]), r"ever larger numbers, got \[0, 100, 250, 300, 100\]"),
        (lambda: Phases([{"from": 0}]), r'phases: expected a dict with "from" and "open", got'),
        (lambda: Phases([{"from": "0", "open": ["head"]}]), r"from: expected a number, got '0'"),
        (lambda: Phases([{"from": 0, "open": []}]), r"open: expected a list of names, .* got \[\]"),
        (lambda: Phases([{"from": 0, "open": [None]}]), r"open: .* got \[None\]"),
        (lambda: Phases(WRITTEN, unit="steps"), r"unit: expected one of"),  # type: ignore[arg-type]
        (lambda: Phases.from_yaml("{unit: step}"), r'expected a list, or a dict with "phases" and "unit"'),
        (lambda: opened(Phases([{"from": 0, "open": ["heads"]}]), at(0)), r"'heads' matches no group; closest: head"),
    ],
)  # fmt: skip
def test_policies_refuse_what_makes_no_sense(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# -- a schedule before training -------------------------------------------------------------------------------


def test_what_is_open_after_a_step() -> None:
    groups = layer_groups(Stack())
    names = tuple(group.name for group in groups)
    assert open_at(GradualUnfreeze(every=10), groups, 0) == names[-1:]
    assert open_at(GradualUnfreeze(every=10), groups, 20) == names[-3:]
    assert open_at(GradualUnfreeze(every=1, unit="epoch"), groups, 0, epoch=1.5) == names[-2:]
    assert open_at(OnPlateau("loss", patience=1), groups, 3, events=at(0, 0.0, 1.0, 1.0).events) == names[-2:]
    assert open_at(lambda progress: ["head", 0], groups, 0) == (names[0], names[-1])  # from input to output
    with pytest.raises(ValueError, match="n_layers: expected at most the 3 blocks, got 9"):
        open_at(LISA(9), groups, 0)
    with pytest.raises(ValueError, match=r"policy: expected names .* the 6 groups, got 'haed' .*closest: head"):
        open_at(lambda progress: ["haed"], groups, 7)


@pytest.mark.parametrize(
    ("part", "total_steps", "every"), [(0.5, 100, 10), (1.0, 100, 20), (0.5, 101, 10), (0.1, 10, 1), (0.5, 1, 1)]
)
def test_all_are_open_by_a_part_of_the_run(part: float, total_steps: int, every: int) -> None:
    groups = layer_groups(Stack())
    policy = GradualUnfreeze.open_by(part, total_steps, groups)
    assert policy == GradualUnfreeze(every=every)
    assert len(open_at(policy, groups, every * 5 - 1)) == 5 and len(open_at(policy, groups, every * 5)) == 6


def test_a_model_of_one_group_can_be_opened_by_any_step() -> None:
    assert GradualUnfreeze.open_by(0.5, 100, layer_groups(nn.Sequential(nn.Linear(2, 2)))).every == 50


@pytest.mark.parametrize(
    ("part", "total_steps", "message"),
    [
        (0, 10, "open_by: expected a part of the steps above 0 up to 1, got 0"),
        (1.1, 10, "open_by: expected a part of the steps above 0 up to 1, got 1.1"),
        (0.5, 0, "total_steps: expected an integer >= 1, got 0"),
        (0.5, True, "total_steps: expected an integer >= 1, got True"),
    ],
)
def test_open_by_refuses_numbers_out_of_range(part: float, total_steps: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GradualUnfreeze.open_by(part, total_steps, layer_groups(Stack()))


def test_phases_know_their_starts() -> None:
    assert Phases(WRITTEN).starts == (0, 100, 250, 300)


def test_a_phase_opens_what_lies_in_a_module() -> None:
    groups = layer_groups(Stack())
    assert open_at(Phases([{"from": 0, "open": ["blocks"]}]), groups, 0) == ("blocks.0", "blocks.1", "blocks.2")


# -- measuring a budget --------------------------------------------------------------------------------------


class Costly(nn.Module):
    """Whose batch norm moves in every forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(5)
        self.stack = Stack(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.stack(self.bn(x))


def test_floating_point_operations_are_measured_and_nothing_is_left_changed() -> None:
    model = Costly()
    model.stack.blocks[0].fc.bias.requires_grad_(False)
    backward(model, 0)
    groups = layer_groups(model)
    flags = [p.requires_grad for p in model.parameters()]
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    buffers = [b.clone() for b in model.buffers()]
    random_state = torch.get_rng_state()

    def run() -> None:
        torch.rand(3)
        backward(model, 1)

    budget = Budget.measure(model, groups, run, limit=1e9, unit="flops")
    assert [p.requires_grad for p in model.parameters()] == flags
    for p, grad in zip(model.parameters(), grads, strict=True):
        assert (p.grad is None) == (grad is None)
        assert grad is None or torch.equal(p.grad, grad)
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), buffers, strict=True))
    assert torch.equal(torch.get_rng_state(), random_state)
    # Multiplications per row: forward, and for each open layer its weights and its inputs, below which is a norm.
    forward, embed, block, head = 256, 5 * 8, 8 * 8, 8 * 3
    opened_blocks = [forward + 2 * head + 2 * block * n for n in range(4)]
    expected = [forward + head, *opened_blocks, opened_blocks[-1] + 2 * embed]
    rows = 6
    assert list(budget.costs) == [2.0 * rows * count for count in expected]
    progress = Progress(0, tuple(GroupInfo(g.name, g.kind) for g in groups))
    assert opened(Budget(budget.costs, limit=budget.costs[2]), progress) == {3, 4, 5}


def test_seconds_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Stack(2)
    groups = layer_groups(model)
    clock = iter(range(10**6))
    runs = []

    def tick() -> float:
        # The n-th open group makes a run n² ticks long; the first of six is an outlier, which a median passes over.
        opened_now = sum(group.parameters[0].requires_grad for group in groups)
        runs.append(opened_now)
        return next(clock) * opened_now**2 + (500 if len(runs) % 12 == 2 else 0)

    monkeypatch.setattr(time, "perf_counter", tick)
    budget = Budget.measure(model, groups, lambda: backward(model, 0), limit=10, repeats=5)
    monkeypatch.undo()
    assert budget.costs == (1, 4, 9, 16, 25)
    assert runs == [k for k in range(1, 6) for _ in range(12)]


def test_flags_are_given_back_when_the_measured_run_fails() -> None:
    model = Stack(2)
    with pytest.raises(ZeroDivisionError):
        Budget.measure(model, layer_groups(model), lambda: 1 / 0, limit=1.0)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(("options", "message"), [({"unit": "hours"}, "unit"), ({"repeats": 0}, "repeats")])
def test_measuring_refuses_what_makes_no_sense(options: dict[str, Any], message: str) -> None:
    model = Stack(2)
    with pytest.raises(ValueError, match=f"{message}: expected"):
        Budget.measure(model, layer_groups(model), lambda: None, limit=1.0, **options)


def test_flags_of_a_compiled_model_are_not_flipped() -> None:
    model = torch.compile(Stack(2), backend="eager")
    with pytest.raises(ValueError, match="model: expected a plain model, got one for compile"):
        Budget.measure(model, layer_groups(model), lambda: None, limit=1.0)
