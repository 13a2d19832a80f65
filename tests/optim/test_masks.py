"""Frozen and masked elements keep their bits, whatever their gradients hold, and count for nothing."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from optim_cases import (
    CHANNELS_LAST,
    FLOATS,
    Layout,
    Run,
    Watch,
    assert_unchanged,
    bits,
    half_of,
    importances,
    normal,
    parameter,
    photograph,
    same_bits,
    short,
    steps_on,
    threads,
)
from torch import Tensor, nn

import fastft
from fastft.optim.masks import SHORTEST_ROW

KEYS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
POISON = {"zeros": 0.0, "nan": float("nan"), "inf": float("inf"), "huge": 3e4}
# Shapes that take each of the ways in which a mask reaches the kernels.
SHAPES = {
    "0-d": Layout(()),
    "empty": Layout((0,)),
    "no_rows": Layout((0, 20)),
    "empty_rows": Layout((4, 0)),
    "1-d": Layout((700,)),
    "one_row": Layout((1, 40)),
    "short_rows": Layout((50, SHORTEST_ROW - 1)),
    "shortest_rows": Layout((50, SHORTEST_ROW)),
    "longer_rows": Layout((50, SHORTEST_ROW + 1), offset=1),
    "single_elements": Layout((50, 1)),
    "more_than_a_chunk": Layout((300, 129)),
    "transposed": Layout((40, 24), (1, 0)),
    "channels_last": Layout((6, 8, 5, 5), CHANNELS_LAST),
    "rows_inside": Layout((6, 8, 5, 5), (1, 0, 2, 3), offset=3),
}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """On shared cores threads wait for one another more than they work."""
    with threads(1):
        yield


def fine_tuning(params: list[nn.Parameter], **more: Any) -> fastft.AdamW:
    """An optimizer that would move everything: decay, anchor (away from where the parameters are), amsgrad."""
    anchor = fastft.Anchor.snapshot((f"p{i}", p) for i, p in enumerate(params))
    if more.pop("weighted", False):
        anchor = anchor.with_importance({f"p{i}": importances(p.shape, seed=800 + i) for i, p in enumerate(params)})
    with torch.no_grad():
        for i, p in enumerate(params):
            p.add_(normal(p.shape, p.dtype, seed=900 + i))
    options = {"lr": 1e-2, "weight_decay": 0.3, "amsgrad": True, "anchor": anchor, "anchor_decay": 4.0}
    return fastft.AdamW(params, **{**options, **more})


def run_of(*layouts: Layout, dtype: torch.dtype = torch.float32, **options: Any) -> Run:
    """Parameters of these layouts under such an optimizer, three steps in."""
    run = Run.of(
        lambda params: fine_tuning(params, **options), [parameter(x, dtype, seed=i) for i, x in enumerate(layouts)]
    )
    return run.go(range(3))


def mask_for(layout: Layout, kind: str, seed: int = 7) -> Tensor:
    """About half of the rows or elements."""
    return half_of(layout.shape[:1] if kind == "rows" else layout.shape, seed=seed)


def elements(mask: Tensor, p: Tensor) -> Tensor:
    """A mask of rows, written out for each element."""
    return mask.view(mask.shape + (1,) * (p.dim() - mask.dim())).expand(p.shape)


def all_of(run: Run, position: int = 0) -> list[Tensor]:
    """The parameter and its moments."""
    p = run.params[position]
    return [p.detach(), *(run.optimizer.state[p][key] for key in KEYS)]


# -- masked elements -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("poison", POISON)
@pytest.mark.parametrize("inverted", [False, True])
@pytest.mark.parametrize("kind", ["rows", "elements"])
@pytest.mark.parametrize("name", SHAPES)
def test_masked_elements_keep_their_bits_and_live_ones_step_as_if_alone(
    name: str, kind: str, inverted: bool, poison: str
) -> None:
    """Ten steps with something bad in the masked gradients, beside a run without mask and without poison."""
    layout = SHAPES[name]
    masked = run_of(layout)
    free = masked.copy()
    (p,) = masked.params
    mask = mask_for(layout, kind) ^ inverted
    live = elements(mask, p)
    before = [bits(t) for t in all_of(masked)]
    masked.optimizer.set_update_mask(p, mask)
    for seed in range(10, 20):
        steps_on(masked.params, seed)
        steps_on(free.params, seed)
        p.grad[~live] = POISON[poison]
        masked.optimizer.step()
        free.optimizer.step()
    for now, was, unmasked in zip(all_of(masked), before, all_of(free), strict=True):
        assert torch.equal(bits(now)[~live], was[~live])
        assert torch.equal(bits(now)[live], bits(unmasked)[live])
        moved = bits(unmasked) != was  # so that both equalities above say something
        assert all(moved[where].any() for where in (live, ~live) if where.any())
    assert float(masked.optimizer.state[p]["step"]) == 13


@pytest.mark.parametrize("mode", ["decoupled", "l2", "selective", "weighted"])
@pytest.mark.parametrize("state_dtype", [None, torch.float32], ids=short)
@pytest.mark.parametrize("dtype", FLOATS, ids=short)
@pytest.mark.parametrize("kind", ["rows", "elements"])
def test_masked_elements_keep_their_bits_in_every_dtype(
    kind: str, dtype: torch.dtype, state_dtype: torch.dtype | None, mode: str
) -> None:
    """Values widened for the computation are rounded back only where they are live: even NaN keep their payload."""
    layout = Layout((60, 33), offset=1)
    kind_of_anchor: dict[str, Any] = {"weighted": True} if mode == "weighted" else {"anchor_mode": mode}
    run = run_of(layout, dtype=dtype, state_dtype=state_dtype, max_grad_norm=1.0, **kind_of_anchor)
    (p,) = run.params
    mask = mask_for(layout, kind)
    live = elements(mask, p)
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    with torch.no_grad():
        for t in all_of(run):  # any bits at all, signalling NaN among them
            random = torch.randint(-(2**15), 2**15, t.shape).to(integer[t.element_size()]) << 8 * (t.element_size() - 2)
            t.copy_(torch.where(live, t, random.view(t.dtype)))
    before = [bits(t) for t in all_of(run)]
    run.optimizer.set_update_mask(p, mask)
    for seed in range(10, 15):
        steps_on(run.params, seed)
        p.grad[~live] = float("nan")
        run.optimizer.step()
    for now, was in zip(all_of(run), before, strict=True):
        assert torch.equal(bits(now)[~live], was[~live])
        assert (bits(now)[live] != was[live]).any() and now[live].isfinite().all()


@pytest.mark.parametrize("name", [name for name, layout in SHAPES.items() if len(layout.shape) > 1])
@pytest.mark.parametrize("dtype", FLOATS, ids=short)
def test_rows_are_the_elements_of_these_rows(dtype: torch.dtype, name: str) -> None:
    """A list of active rows and a mask of elements give the same bits, and the same norm.

    Gradients are small whole numbers: their squares add up exactly in any order.
    """
    layout = SHAPES[name]
    by_row = run_of(layout, dtype=dtype, max_grad_norm=5.0)
    by_element = by_row.copy()
    rows = mask_for(layout, "rows")
    by_row.optimizer.set_update_mask(by_row.params[0], rows)
    by_element.optimizer.set_update_mask(by_element.params[0], elements(rows, by_element.params[0]))
    for seed in range(6):
        for run in (by_row, by_element):
            run.params[0].grad = normal(layout.shape, seed=seed, scale=3).round().to(dtype)
            run.optimizer.step()
        assert same_bits(by_row.optimizer.grad_norm, by_element.optimizer.grad_norm)
    by_row.assert_same(by_element)


@pytest.mark.parametrize("rows", ["first", "last", "alternate", "adjacent", "one", "all", "none"])
def test_lists_of_rows(rows: str) -> None:
    """Runs of adjacent rows are stepped in one go: across chunks, at both ends, and when there are none at all."""
    count, size = 400, 101
    mask = torch.zeros(count, dtype=torch.bool)
    chosen = {
        "first": slice(0, 1),
        "last": slice(count - 1, count),
        "alternate": slice(0, count, 2),
        "adjacent": slice(20, 390),  # more than a chunk
        "one": slice(57, 58),
        "all": slice(None),
        "none": slice(0, 0),
    }
    mask[chosen[rows]] = True
    run = run_of(Layout((count, size)), max_grad_norm=1.0)
    free, (p,) = run.copy(), run.params
    before = bits(p)
    run.optimizer.set_update_mask(p, mask)
    steps_on(run.params, 9)
    p.grad[~mask] = float("nan")
    run.optimizer.step()
    expected = p.grad[mask].double().norm()
    torch.testing.assert_close(run.optimizer.grad_norm, expected, rtol=1e-12, atol=0.0)
    assert torch.equal(bits(p)[~mask], before[~mask])
    assert mask.any() == (bits(p)[mask] != before[mask]).any()
    if rows == "all":
        free.go([9])
        torch.testing.assert_close(p, free.params[0], rtol=1e-6, atol=1e-7)


def test_masks_that_change_in_the_middle_of_a_run() -> None:
    """Each step obeys the mask of its time; None lifts it; the oracle follows."""
    named = [("rows", parameter((40, 20), seed=1)), ("any", parameter((300,), seed=2))]
    anchors = {name: normal(p.shape, seed=9) for name, p in named}
    watch = Watch([{"params": named, "lr": 0.01, "anchor_decay": 3.0, "amsgrad": True}], anchors, max_grad_norm=1.0)
    plans = [
        (None, half_of((300,), seed=3)),
        (half_of((40,), seed=4), None),
        (half_of((40, 20), seed=5), half_of((300,), seed=6)),
        (half_of((40,), seed=7), torch.zeros(300, dtype=torch.bool)),
        (None, None),
    ]
    for i, plan in enumerate(plans):
        for (name, _), mask in zip(named, plan, strict=True):
            watch.set_mask(name, mask)
        for seed in range(3):
            steps_on([p for _, p in named], 10 * i + seed)
            watch.step()


def test_lifting_a_mask_that_hid_nothing_leaves_no_trace() -> None:
    """With None, and with a mask of all elements: the bits of a run that never had one."""
    masked = run_of(Layout((40, 20)), Layout((30,)))
    never = masked.copy()
    for p in masked.params:
        masked.optimizer.set_update_mask(p, torch.ones(p.shape, dtype=torch.bool))
    masked.go(range(3, 6))
    for p in masked.params:
        masked.optimizer.set_update_mask(p, None)
        assert masked.optimizer.update_mask(p) is None
    masked.go(range(6, 9))
    never.go(range(3, 9))
    masked.assert_same(never)


def test_an_anchor_does_not_pull_what_is_masked_but_pulls_it_later() -> None:
    """Without gradients' help: zero gradients, no decay."""
    p = parameter((50,), seed=1)
    optimizer = fine_tuning([p], weight_decay=0.0)
    start = p.detach().clone()
    mask = half_of((50,), seed=2)
    optimizer.set_update_mask(p, mask)
    p.grad = torch.zeros(50)
    optimizer.step()
    assert torch.equal(bits(p)[~mask], bits(start)[~mask])
    assert (p != start)[mask].all()
    optimizer.set_update_mask(p, None)
    optimizer.step()
    assert (p != start).all()


# -- the norm --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["rows", "elements"])
def test_the_norm_counts_neither_masked_nor_frozen_gradients(kind: str) -> None:
    """Not even NaN in them; and clipping goes by this norm."""
    shape = (40, 30)
    masked, frozen, plain = (parameter(shape, seed=i) for i in range(3))
    optimizer = fastft.AdamW([masked, frozen, plain], max_grad_norm=0.5, skip_nonfinite=True, betas=(0.0, 0.9))
    mask = mask_for(Layout(shape), kind)
    live = elements(mask, masked)
    optimizer.set_update_mask(masked, mask)
    optimizer.freeze(frozen)
    steps_on([masked, frozen, plain], 1)
    masked.grad[~live] = float("nan")
    frozen.grad.fill_(float("inf"))
    optimizer.step()
    expected = torch.cat([masked.grad[live], plain.grad.flatten()]).double().norm()
    torch.testing.assert_close(optimizer.grad_norm, expected, rtol=1e-12, atol=0.0)
    assert int(optimizer.skipped_steps) == 0
    factor = 0.5 / (expected + 1e-6)
    torch.testing.assert_close(optimizer.state[plain]["exp_avg"].double(), plain.grad.double() * factor)
    torch.testing.assert_close(optimizer.state[masked]["exp_avg"].double()[live], masked.grad.double()[live] * factor)


def test_only_live_gradients_can_make_a_step_skip() -> None:
    """The mask decides, and unmasking the NaN makes the same step skip."""
    run = run_of(Layout((40, 30)), skip_nonfinite=True)
    (p,) = run.params
    mask = torch.ones(40, dtype=torch.bool)
    mask[5] = False
    run.optimizer.set_update_mask(p, mask)
    p.grad[5, 3] = float("nan")
    before = bits(p)
    run.optimizer.step()
    assert int(run.optimizer.skipped_steps) == 0 and (bits(p)[mask] != before[mask]).all()
    run.optimizer.set_update_mask(p, None)
    seen = photograph(run.params, run.optimizer)
    run.optimizer.step()
    assert int(run.optimizer.skipped_steps) == 1 and run.optimizer.grad_norm.isnan()
    assert_unchanged(seen, photograph(run.params, run.optimizer))


def test_an_all_false_mask_leaves_a_norm_of_the_rest() -> None:
    masked, plain = parameter((40, 30), seed=1), parameter((7,), seed=2)
    for mask in (torch.zeros(40, dtype=torch.bool), torch.zeros(40, 30, dtype=torch.bool)):
        optimizer = fastft.AdamW([masked, plain], max_grad_norm=1.0)
        optimizer.set_update_mask(masked, mask)
        steps_on([masked, plain], 1)
        masked.grad.fill_(float("nan"))
        before = bits(masked)
        optimizer.step()
        torch.testing.assert_close(optimizer.grad_norm, plain.grad.double().norm(), rtol=1e-12, atol=0.0)
        assert torch.equal(bits(masked), before)
        assert not optimizer.state[masked]["exp_avg"].any()


# -- frozen parameters -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("poison", [*POISON, "none"])
@pytest.mark.parametrize("when", ["from_the_start", "later"])
def test_frozen_parameters_keep_their_bits_and_state(when: str, poison: str) -> None:
    """Whatever `.grad` holds. One that never stepped has no state, one that did keeps it and goes on from there."""
    frozen, other = parameter((60, 20), seed=1), parameter((33,), seed=2)
    optimizer = fine_tuning([frozen, other], max_grad_norm=1.0)
    optimizer.set_update_mask(frozen, half_of((60,), seed=3))
    first = 0 if when == "from_the_start" else 3
    for seed in range(first):
        steps_on([frozen, other], seed)
        optimizer.step()
    optimizer.freeze(frozen)
    before = photograph([frozen], optimizer)
    assert before["has state", 0] == (first > 0)
    for seed in range(10, 20):
        steps_on([frozen, other], seed)
        frozen.grad = None if poison == "none" else torch.full_like(frozen, POISON[poison])
        optimizer.step()
        seen = photograph([frozen], optimizer)
        assert_unchanged(
            {k: v for k, v in before.items() if k[0] != "grad"}, {k: v for k, v in seen.items() if k[0] != "grad"}
        )
    assert float(optimizer.state[other]["step"]) == first + 10
    optimizer.unfreeze(frozen)
    steps_on([frozen, other], 30)
    optimizer.step()
    assert float(optimizer.state[frozen]["step"]) == first + 1


@pytest.mark.parametrize("state_dtype", [None, torch.float32], ids=short)
@pytest.mark.parametrize("dtype", FLOATS, ids=short)
@pytest.mark.parametrize("how", ["unfreeze", "first_gradient"])
def test_a_late_parameter_starts_at_its_own_first_step(
    how: str, dtype: torch.dtype, state_dtype: torch.dtype | None
) -> None:
    """Its first updates have the bits of a fresh optimizer's: the others' step count is not in them."""

    def make(params: list[nn.Parameter]) -> fastft.AdamW:
        return fastft.AdamW(params, lr=0.01, weight_decay=0.1, amsgrad=True, state_dtype=state_dtype)

    early, late, alone = (parameter((40, 20), dtype, seed=i) for i in (1, 2, 2))
    optimizer = make([early, late])
    if how == "unfreeze":
        optimizer.freeze(late)
    for seed in range(7):
        steps_on([early] if how == "first_gradient" else [early, late], seed)
        optimizer.step()
    assert late not in optimizer.state and same_bits(late, alone)
    optimizer.unfreeze(late)
    fresh = make([alone])
    for seed in range(7, 10):
        steps_on([early, late], seed)
        alone.grad = late.grad.clone()
        optimizer.step()
        fresh.step()
    assert float(optimizer.state[early]["step"]) == 10
    assert_unchanged(photograph([late], optimizer), photograph([alone], fresh))


@pytest.mark.parametrize(
    "pick",
    [
        lambda model: model[0],
        lambda model: model[0].parameters(),
        lambda model: list(model[0].parameters()),
        lambda model: tuple(model[0].parameters()),
    ],
    ids=["module", "generator", "list", "tuple"],
)
def test_freeze_takes_modules_and_any_iterable(pick: Callable[[nn.Module], Any]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 2))
    optimizer = fastft.AdamW(model.parameters(), lr=0.1)
    steps_on(model.parameters(), 1)
    before = photograph(model.parameters(), optimizer)
    optimizer.freeze(pick(model))
    optimizer.freeze(pick(model))  # once more changes nothing
    optimizer.step()
    after = photograph(model.parameters(), optimizer)
    assert [k for k in after if after[k] is True] == [("has state", 2), ("has state", 3)]
    assert_unchanged({k: v for k, v in before.items() if k[1] < 2}, {k: v for k, v in after.items() if k[1] < 2})
    assert all(p.requires_grad for p in model.parameters())
    optimizer.unfreeze(pick(model))
    optimizer.step()
    assert [float(optimizer.state[p]["step"]) for p in model.parameters()] == [1, 1, 2, 2]


def test_freeze_takes_one_parameter() -> None:
    a, b = parameter((3,), seed=1), parameter((4,), seed=2)
    optimizer = fastft.AdamW([a, b])
    optimizer.freeze(b)
    steps_on([a, b], 1)
    optimizer.step()
    assert a in optimizer.state and b not in optimizer.state


def test_unfreezing_what_is_not_frozen_does_nothing() -> None:
    run = run_of(Layout((5,)))
    other = run.copy()
    run.optimizer.unfreeze(run.params)
    run.go([4]).assert_same(other.go([4]))


# -- what is kept, and where it goes ---------------------------------------------------------------------------


def test_masks_are_copied_on_their_way_in_and_out() -> None:
    """The user's tensor and the returned one can be written to; the optimizer's cannot."""
    p = parameter((40, 20), seed=1)
    optimizer = fastft.AdamW([p], lr=0.1)
    mine = half_of((40,), seed=2)
    kept = mine.clone()
    optimizer.set_update_mask(p, mine)
    mine.fill_(True)
    out = optimizer.update_mask(p)
    assert out is not None and torch.equal(out, kept)
    out.fill_(True)
    assert torch.equal(optimizer.update_mask(p), kept)
    before = bits(p)
    steps_on([p], 1)
    optimizer.step()
    mine.fill_(True)  # also once the step has prepared it
    optimizer.step()
    assert torch.equal(bits(p)[~kept], before[~kept]) and (bits(p)[kept] != before[kept]).all()


def test_a_mask_may_lie_anyhow_in_memory() -> None:
    """Transposed, with gaps, or of expanded rows: it is read by position."""
    p = parameter((20, 30), seed=1)
    wanted = half_of((20, 30), seed=2)
    gaps = torch.zeros(20, 90, dtype=torch.bool)
    gaps[:, ::3] = wanted
    column = half_of((20, 1), seed=3)
    for mask in (wanted.t().contiguous().t(), gaps[:, ::3], column.expand(20, 30)):
        assert not mask.is_contiguous()
        q = nn.Parameter(p.detach().clone())
        optimizer = fastft.AdamW([q], lr=0.1, weight_decay=0.5)
        optimizer.set_update_mask(q, mask)
        assert torch.equal(optimizer.update_mask(q), mask)
        steps_on([q], 4)
        optimizer.step()
        assert torch.equal(q != p, mask)


def test_a_mask_follows_its_parameter_to_another_memory_order() -> None:
    """`model.to(memory_format=torch.channels_last)` in the middle of a run."""
    still = run_of(Layout((6, 8, 5, 5)))
    moved = still.copy()
    for run in (still, moved):
        run.optimizer.set_update_mask(run.params[0], half_of((6, 8, 5, 5), seed=3))
        run.go(range(3, 5))
    moved.params[0].data = moved.params[0].data.contiguous(memory_format=torch.channels_last)
    still.go(range(5, 8)).assert_same(moved.go(range(5, 8)))


def through_state_dict(run: Run) -> Run:
    """A new optimizer over new parameters, loaded from a file."""
    file = io.BytesIO()
    torch.save(run.optimizer.state_dict(), file)
    file.seek(0)
    params = [nn.Parameter(p.detach().clone(memory_format=torch.preserve_format)) for p in run.params]
    optimizer = fastft.AdamW(params)
    optimizer.load_state_dict(torch.load(file, weights_only=True))
    return Run(params, optimizer)


def through_pickle(run: Run) -> Run:
    return pickle.loads(pickle.dumps(run))


@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle, through_state_dict], ids=lambda f: f.__name__)
def test_masks_and_frozen_parameters_survive_copies_and_checkpoints(copied: Callable[[Run], Run]) -> None:
    """The copy goes on as the original does, bit for bit, and each has masks of its own."""
    run = run_of(Layout((40, 20)), Layout((6, 8, 5, 5), CHANNELS_LAST), Layout((30,)), Layout((9, 5)), Layout(()))
    rows, some = half_of((40,), seed=3), half_of((6, 8, 5, 5), seed=4)
    run.optimizer.set_update_mask(run.params[0], rows)
    run.optimizer.set_update_mask(run.params[1], some)
    run.optimizer.set_update_mask(run.params[4], torch.tensor(False))
    run.optimizer.freeze([run.params[2]])
    run.go(range(3, 5))
    other = copied(run)
    assert not any(a is b for a, b in zip(run.params, other.params, strict=True))
    assert torch.equal(other.optimizer.update_mask(other.params[0]), rows)
    assert torch.equal(other.optimizer.update_mask(other.params[1]), some)
    assert other.optimizer.update_mask(other.params[2]) is None
    run.go(range(5, 8)).assert_same(other.go(range(5, 8)))
    other.optimizer.set_update_mask(other.params[0], None)
    other.optimizer.unfreeze(other.params[2])
    frozen, masked = bits(run.params[2]), bits(run.params[0])
    run.go([8])
    assert torch.equal(bits(run.params[2]), frozen)
    assert torch.equal(bits(run.params[0])[~rows], masked[~rows])
    other.go([8])
    assert float(other.optimizer.state[other.params[2]]["step"]) == 4  # three before it was frozen


def test_loading_a_state_of_torchs_keeps_masks_and_frozen_parameters() -> None:
    """They are the optimizer's own, like its anchor."""
    run = run_of(Layout((40, 20)), Layout((30,)))
    rows = half_of((40,), seed=3)
    run.optimizer.set_update_mask(run.params[0], rows)
    run.optimizer.freeze(run.params[1])
    torchs = torch.optim.AdamW([nn.Parameter(p.detach().clone()) for p in run.params], amsgrad=True)
    steps_on(torchs.param_groups[0]["params"], 5)
    torchs.step()
    run.optimizer.load_state_dict(torchs.state_dict())
    before = [bits(p) for p in run.params]
    run.go([6])
    assert torch.equal(run.optimizer.update_mask(run.params[0]), rows)
    assert torch.equal(bits(run.params[0])[~rows], before[0][~rows])
    assert (bits(run.params[0])[rows] != before[0][rows]).all()
    assert torch.equal(bits(run.params[1]), before[1])
