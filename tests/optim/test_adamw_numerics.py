"""The step against the float64 reference and against torch's, over everything that changes its arithmetic."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from optim_cases import (
    CHANNELS_LAST,
    FLOATS,
    SIXTEEN_BIT,
    Bounded,
    Layout,
    Placed,
    Run,
    Watch,
    bits,
    drawn,
    generator,
    half_of,
    importances,
    normal,
    parameter,
    same_bits,
    short,
    steps_on,
    threads,
)
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastft

# Around the block (512) and chunk (32,768) of the CPU and the chunk (16,384) of CUDA, and around vector lengths.
SMALL = (0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 63, 65, 127, 129, 255, 257, 511, 512, 513, 1023, 1025)
LARGE = ((16383,), (16385,), (32767,), (32769,), (129, 257), (3, 33, 331), (70001,))

STEPS = 50


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """For all but the steps under watch: where cores are shared, threads wait for one another more than they work."""
    with threads(1):
        yield


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    """Shapes of all kinds in all memory orders, aligned and not."""
    shape = draw(
        st.one_of(
            st.sampled_from([(), (0,), (0, 5), (3, 0), (1, 1), (1, 17), (2, 1, 3)]),
            st.sampled_from(SMALL).map(lambda n: (n,)),
            st.tuples(st.integers(1, 9), st.sampled_from([1, 2, 3, 15, 16, 17, 31, 64, 100, 513])),
            st.tuples(*[st.integers(1, 6)] * 3),
            st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 4), st.integers(1, 4)),
            st.sampled_from(LARGE),
        )
    )
    order = draw(st.permutations(range(len(shape)))) if draw(st.booleans()) else None
    return Layout(shape, None if order is None else tuple(order), draw(st.sampled_from([0, 1, 3, 8])))


def masks(layout: Layout) -> st.SearchStrategy[str]:
    """Kinds of masks that such a parameter can have."""
    return st.sampled_from(["none", "elements", "nothing"] + ["rows"] * (len(layout.shape) > 0))


@st.composite
def tensors(draw: st.DrawFn) -> dict[str, Any]:
    """A parameter, its gradients, its anchor and what happens to it."""
    layout = draw(layouts())
    dtype = draw(st.sampled_from(FLOATS))
    other = draw(st.permutations(range(len(layout.shape))))
    return {
        "layout": layout,
        "dtype": dtype,
        "grad_dtype": draw(st.sampled_from([dtype, dtype, *FLOATS])),
        "grad_layout": draw(st.sampled_from([layout, Layout(layout.shape, tuple(other), draw(st.integers(0, 3)))])),
        "grad_scale": draw(st.sampled_from([0.03, 1.0, 3.0])),
        "zeros": draw(st.sampled_from([0.0, 0.3])),
        "missing": draw(st.sampled_from([0.0, 0.0, 0.3])),
        "starts_at": draw(st.sampled_from([0, 0, 7])),
        "anchor": draw(st.sampled_from([None, *FLOATS])),
        "importance": draw(st.sampled_from(FLOATS)),
        "masks": draw(st.tuples(masks(layout), masks(layout), masks(layout))),
        "frozen": draw(st.sampled_from([range(0), range(0), range(9), range(20, 31)])),
    }


@st.composite
def groups(draw: st.DrawFn) -> dict[str, Any]:
    """The options of a group; with the largest lr and decay a step goes nine tenths of the way to the anchor."""
    return {
        "lr": draw(st.sampled_from([1e-4, 3e-3, 3e-2])),
        "lr_is": draw(st.sampled_from([None, torch.float32, torch.float64])),
        "lr_later": draw(st.sampled_from([1.0, 0.3, 0.0])),
        "betas": draw(st.sampled_from([(0.9, 0.999), (0.0, 0.9), (0.95, 0.98)])),
        "eps": draw(st.sampled_from([1e-8, 1e-3])),
        "weight_decay": draw(st.sampled_from([0.0, 0.01, 0.3])),
        "anchor_decay": draw(st.sampled_from([0.0, 0.5, 30.0])),
        "anchor_mode": draw(st.sampled_from(["decoupled", "l2", "selective"])),
        "amsgrad": draw(st.booleans()),
        "maximize": draw(st.booleans()),
        "tensors": draw(st.lists(tensors(), min_size=1, max_size=2)),
    }


CASES = st.fixed_dictionaries(
    {
        "groups": st.lists(groups(), min_size=1, max_size=3),
        "weighted": st.booleans(),
        "max_grad_norm": st.sampled_from([None, 0.5, 1e6]),
        "skip_nonfinite": st.booleans(),
        "state_dtype": st.sampled_from([None, torch.float32]),
        "grad_scale": st.sampled_from([None, None, 3.0, 1024.0]),
        "found_inf": st.sampled_from([{}, {}, {0: 1.0, 13: 2.0}]),
        "options": st.sampled_from([{}, {"fused": True}, {"capturable": True}, {"foreach": True}]),
        "seed": st.integers(0, 2**31),
    }
)


def watched(case: dict[str, Any]) -> tuple[Watch, dict[str, dict[str, Any]]]:
    """The optimizer of a case under watch, and the tensors' descriptions by name."""
    described: dict[str, dict[str, Any]] = {}
    placed, anchors, weights, made = [], {}, {}, []
    anchored = any(t["anchor"] is not None for g in case["groups"] for t in g["tensors"])
    for g in case["groups"]:
        options = {k: v for k, v in g.items() if k not in ("tensors", "lr_is", "lr_later")}
        if g["lr_is"] is not None and not case["options"].get("foreach"):
            options["lr"] = torch.tensor(g["lr"], dtype=g["lr_is"])
        if not anchored:
            options["anchor_decay"] = 0.0
        if case["weighted"] and options["anchor_mode"] == "selective":  # which go together nowhere
            options["anchor_mode"] = "decoupled"
        named = []
        for t in g["tensors"]:
            name = f"p{len(described)}"
            described[name] = t
            seed = case["seed"] + 10 * len(described)
            placed.append(Placed(normal(t["layout"].shape, t["dtype"], seed=seed), t["layout"]))
            named.append((name, nn.Parameter(placed[-1].view)))
            named[-1][1].grad_dtype = None
            if t["anchor"] is not None:
                anchors[name] = normal(t["layout"].shape, t["anchor"], seed=seed + 1)
                if case["weighted"]:
                    weights[name] = importances(t["layout"].shape, t["importance"], seed=seed + 2)
        made.append({**options, "params": named})
    keys = ("max_grad_norm", "skip_nonfinite", "state_dtype", "options")
    return Watch(made, anchors, weights, placed, **{key: case[key] for key in keys}), described


def mask_of(kind: str, shape: tuple[int, ...], seed: int) -> Tensor | None:
    """A mask of that kind."""
    if kind == "none":
        return None
    if kind == "nothing":
        return torch.zeros(shape, dtype=torch.bool)
    return half_of(shape[:1] if kind == "rows" else shape, seed=seed)


def gradient(t: dict[str, Any], narrow_state: bool, source: torch.Generator) -> Tensor:
    """Random, in the dtype and memory order described.

    float16 moments of tiny gradients would underflow, and the parameter overflow: those get a floor.
    """
    shape = t["layout"].shape
    values = torch.randn(shape, generator=source, dtype=torch.float64)
    if narrow_state:
        values = values.sign() * (0.3 + 0.7 * torch.rand(shape, generator=source, dtype=torch.float64))
    else:
        values = values * (torch.rand(shape, generator=source) >= t["zeros"])
    grad = (values * t["grad_scale"]).to(t["grad_dtype"])
    return Placed(grad, t["grad_layout"], guard=float("nan")).view


def take_steps_against_the_reference(case: dict[str, Any], count: int) -> None:
    """Every option at once; parameters and state after each step, guards, gradients, norm and counters too."""
    watch, described = watched(case)
    source = generator(case["seed"])
    for step in range(count):
        for group, g in zip(watch.optimizer.param_groups, case["groups"], strict=True):
            if step == count // 2 and isinstance(group["lr"], Tensor):
                group["lr"].fill_(g["lr"] * g["lr_later"])
            elif step == count // 2:
                group["lr"] = g["lr"] * g["lr_later"]
        for i, (name, t) in enumerate(described.items()):
            p = watch[name].param
            narrow_state = p.dtype == torch.float16 and case["state_dtype"] is None
            p.grad = gradient(t, narrow_state, source)
            if case["grad_scale"]:
                p.grad.mul_(case["grad_scale"])
            if step < t["starts_at"] or torch.rand((), generator=source) < t["missing"]:
                p.grad = None
            elif case["skip_nonfinite"] and step in (0, 29) and p.numel():
                p.grad[(-1,) * p.dim()] = float("inf") if step else float("nan")
            if step % 17 == 0:
                kind = t["masks"][step // 17 % 3]
                watch.set_mask(name, mask_of(kind, t["layout"].shape, case["seed"] + 100 * step + i))
            if (step in t["frozen"]) != watch[name].frozen:
                (watch.freeze if step in t["frozen"] else watch.unfreeze)(name)
        watch.step(grad_scale=case["grad_scale"], found_inf=case["found_inf"].get(step))


@pytest.mark.slow
@drawn
@given(CASES)
def test_fifty_steps_against_the_reference(case: dict[str, Any]) -> None:
    take_steps_against_the_reference(case, STEPS)


@settings(drawn, max_examples=4)
@given(CASES)
def test_a_few_steps_against_the_reference(case: dict[str, Any]) -> None:
    """The same in short, for a quick verdict."""
    take_steps_against_the_reference(case, 20)


def plain(case: dict[str, Any]) -> dict[str, Any]:
    """The case with nothing in it that torch lacks, in the dtypes whose roundings in torch are as many as ours."""
    made = []
    for g in case["groups"]:
        ts = []
        for t in g["tensors"]:
            dtype = torch.float32 if t["dtype"] in SIXTEEN_BIT else t["dtype"]
            ts.append({**t, "dtype": dtype, "grad_dtype": dtype, "anchor": None})
        # Beside float64 parameters torch would compute with a float32 lr in float32.
        lr_is = torch.float64 if g["lr_is"] and any(t["dtype"] == torch.float64 for t in ts) else g["lr_is"]
        made.append({**g, "tensors": ts, "lr_is": lr_is})
    ours = {"max_grad_norm": None, "skip_nonfinite": False, "state_dtype": None, "options": {}}
    return {**case, **ours, "groups": made}


@pytest.mark.slow
@drawn
@given(CASES.map(plain))
def test_fifty_steps_against_torch(case: dict[str, Any]) -> None:
    """torch rounds as often as the kernels do, in other places: it must end within the same bounds, twice as wide."""
    watch, described = watched(case)
    torchs = {name: nn.Parameter(watch[name].param.detach().clone()) for name in described}
    their_groups = [
        {
            **{k: v for k, v in group.items() if not k.startswith("anchor")},
            "params": [torchs[n] for n in group["param_names"]],
        }
        for group in watch.optimizer.param_groups
    ]
    for group in their_groups:
        del group["param_names"]
        group["lr"] = copy.deepcopy(group["lr"])
    theirs = torch.optim.AdamW(their_groups, foreach=False)
    source = generator(case["seed"])
    for step in range(STEPS):
        for name, t in described.items():
            grad = gradient(t, False, source)
            missing = step < t["starts_at"] or torch.rand((), generator=source) < t["missing"]
            watch[name].param.grad = None if missing else grad
            torchs[name].grad = None if missing else grad.clone()
        watch.step()
        theirs.step()
    for name, q in torchs.items():
        w = watch[name]
        if w.param not in watch.optimizer.state:
            assert q not in theirs.state
            continue
        ours, state = watch.optimizer.state[w.param], theirs.state[q]
        assert float(ours["step"]) == float(state["step"])
        assert set(ours) == set(state)
        for key, bounded in w.free.named().items():
            mine, other = (w.param, q) if key == "param" else (ours[key], state[key])
            bounded.check(other, f"torch's {name}: {key}", times=2.0)
            Bounded(mine.detach().double(), bounded.error).check(other, f"{name} beside torch's: {key}", times=3.0)


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("dtype", SIXTEEN_BIT, ids=short)
def test_sixteen_bit_steps_beside_torchs(dtype: torch.dtype, amsgrad: bool) -> None:
    """torch rounds to 16 bits after each operation, the kernels only when they store.

    So each of 50 steps starts from the same values: the mean is within a unit in the last place, the second moment
    within two (one for each of torch's two operations), and the parameter within two of its own (decay, update) and
    as much of the update as four roundings (root, correction, eps, quotient) can change.
    """
    ours, theirs = (parameter((37, 29), dtype, seed=1) for _ in range(2))
    options = {"lr": 1e-2, "betas": (0.8, 0.9), "weight_decay": 0.1, "amsgrad": amsgrad, "maximize": True}
    mine = fastft.AdamW([ours], **options)
    torchs = torch.optim.AdamW([theirs], **options, foreach=False)
    unit = torch.finfo(dtype).eps
    torch.manual_seed(0)
    for step in range(STEPS):
        before = ours.detach().double().clone()
        # No tiny gradients: torch divides by the root of the stored second moment, which they would leave subnormal.
        ours.grad = normal(ours.shape, dtype, seed=step).sign() * (1.5 + torch.rand(ours.shape)).to(dtype)
        theirs.grad = ours.grad.clone()
        mine.step()
        torchs.step()
        a, b = mine.state[ours], torchs.state[theirs]
        near = [(a["exp_avg"], b["exp_avg"], unit), (a["exp_avg_sq"], b["exp_avg_sq"], 2 * unit)]
        near += [(a["max_exp_avg_sq"], b["max_exp_avg_sq"], 2 * unit)] if amsgrad else []
        for x, y, rtol in near:
            # Where the mean's terms cancel, what is left is the rounding of float32 terms as large as the gradient.
            torch.testing.assert_close(x, y, rtol=rtol, atol=2.5 * torch.finfo(torch.float32).eps)
        update = (ours.double() - before * (1 - 1e-3)).abs()
        allowed = 2 * unit * before.abs() + 8 * unit * update
        assert ((ours.double() - theirs.double()).abs() <= allowed).all()
        with torch.no_grad():
            theirs.copy_(ours)
            for key in a:
                b[key].copy_(a[key])


@pytest.mark.parametrize(
    ("option", "change"),
    [
        ("lr", 1e-5),
        ("betas", (1e-5, 0.0)),
        ("betas", (0.0, 1e-5)),
        ("eps", 1e-4),
        ("weight_decay", 1e-4),
        ("anchor_decay", 1e-4),
        ("max_grad_norm", 1e-5),
        ("maximize", True),
        ("anchor_mode", "l2"),
    ],
)
@pytest.mark.parametrize("weighted", [False, True])
def test_the_bounds_are_tight_enough_to_notice(option: str, change: Any, weighted: bool) -> None:
    """An oracle that believes in an option off by a hundred-thousandth does not agree with a float32 step."""
    options = {"lr": 0.05, "betas": (0.8, 0.9), "eps": 0.03, "weight_decay": 0.7, "anchor_decay": 6.0}
    p = parameter((50,), seed=1)
    weights = {"p": importances((50,), seed=5)} if weighted else {}
    watch = Watch([{"params": [("p", p)], **options}], {"p": normal((50,), seed=2)}, weights, max_grad_norm=0.5)
    steps_on([p], seed=3)
    watch.step()
    steps_on([p], seed=4)
    value = {"max_grad_norm": 0.5, **options}.get(option)
    if isinstance(value, tuple):
        wrong = tuple(beta * (1 + by) for beta, by in zip(value, change, strict=True))
    else:
        wrong = change if value is None else value * (1 + change)
    with pytest.raises(
        AssertionError, match=r"p: (param|exp_avg|exp_avg_sq), step 2, one step on: \d+ of 50 elements are off"
    ):
        watch.step(assumed={option: wrong})


# -- edges of blocks, chunks and tables ------------------------------------------------------------------------

EDGES = (511, 512, 513, 1023, 1024, 1025, 16383, 16384, 16385, 32767, 32768, 32769, 65537)
# Rows that begin and end inside of blocks and chunks, longer than any of them, and many to a chunk.
ROWS = ((2, 40000), (3, 16385), (67, 1000), (1025, 33), (2049, 16), (4100, 17), (1, 513), (40, 3, 5, 7))


@pytest.mark.parametrize(
    ("mask", "weighted"),
    [
        ("none", False),
        ("elements", False),
        pytest.param("rows", False, marks=pytest.mark.slow),
        pytest.param("none", True, marks=pytest.mark.slow),
        ("rows", True),
    ],
)
@pytest.mark.parametrize(
    ("dtype", "state_dtype"),
    [
        (torch.float32, None),
        *[pytest.param(dtype, None, marks=pytest.mark.slow) for dtype in FLOATS[1:]],
        pytest.param(torch.bfloat16, torch.float32, marks=pytest.mark.slow),
    ],
    ids=lambda dtype: short(dtype),
)
def test_sizes_around_every_edge(
    dtype: torch.dtype, state_dtype: torch.dtype | None, mask: str, weighted: bool
) -> None:
    """All of them in one optimizer, so that the table of chunks has every kind of neighbour in it."""
    shapes = ROWS if mask == "rows" else tuple((n,) for n in EDGES)
    placed = [Placed(normal(shape, dtype, seed=i), Layout(shape, offset=i % 3)) for i, shape in enumerate(shapes)]
    named = [(f"p{i}", nn.Parameter(at.view)) for i, at in enumerate(placed)]
    anchors = {name: normal(p.shape, torch.bfloat16, seed=i + 100) for i, (name, p) in enumerate(named)}
    group = {"params": named, "lr": 0.01, "weight_decay": 0.3, "anchor_decay": 7.0, "amsgrad": True}
    weights = {name: importances(p.shape, torch.bfloat16, seed=i + 200) for i, (name, p) in enumerate(named)}
    watch = Watch([group], anchors, weights if weighted else {}, placed, max_grad_norm=1.0, state_dtype=state_dtype)
    for i, (name, p) in enumerate(named):
        watch.set_mask(name, mask_of(mask, p.shape, seed=i))
    for step in range(3):
        for i, (_, p) in enumerate(named):
            p.grad = normal(p.shape, dtype, seed=100 * step + i)
        watch.step()


@pytest.mark.slow
def test_thousands_of_tensors_in_hundreds_of_groups() -> None:
    """More tensors and more groups than one launch has room for, at different step counts."""

    def make(cls: type[torch.optim.Optimizer]) -> tuple[list[nn.Parameter], torch.optim.Optimizer]:
        values = normal((4000, 2), seed=1)
        params = [nn.Parameter(row.clone()) for row in values]
        made = [
            {"params": params[first : first + 10], "lr": 1e-3 * (1 + first / 10), "weight_decay": 0.1}
            for first in range(0, 4000, 10)
        ]
        return params, cls(made, foreach=cls is torch.optim.AdamW)

    ours, mine = make(fastft.AdamW)
    theirs, torchs = make(torch.optim.AdamW)
    for step in range(3):
        grads = normal((4000, 2), seed=step + 2)
        for i, (p, q) in enumerate(zip(ours, theirs, strict=True)):
            stays = i % 7 == step
            p.grad, q.grad = (None, None) if stays else (grads[i].clone(), grads[i].clone())
        mine.step()
        torchs.step()
    torch.testing.assert_close(torch.stack(ours), torch.stack(theirs), rtol=1e-6, atol=1e-6)
    counts = [float(mine.state[p]["step"]) for p in ours]
    assert counts == [float(torchs.state[q]["step"]) for q in theirs] and set(counts) == {2.0, 3.0}


# -- the same bits, whatever should not matter -----------------------------------------------------------------


def fine_tuning(**more: Any) -> Callable[[list[nn.Parameter]], fastft.AdamW]:
    """An optimizer with everything on."""
    options = {"lr": 1e-2, "weight_decay": 0.1, "amsgrad": True, "anchor": "init", "anchor_decay": 3.0}
    return lambda params: fastft.AdamW(params, **{**options, "max_grad_norm": 1.0, **more})


def several(dtype: torch.dtype) -> list[nn.Parameter]:
    """Parameters of more than a chunk and of less, for the threads to share."""
    shapes = [(70001,), (300, 129), (17,), (), (5, 7, 3), (0,)]
    return [parameter(shape, dtype, seed=i) for i, shape in enumerate(shapes)]


@pytest.mark.parametrize(
    "dtype", [torch.float32, *[pytest.param(d, marks=pytest.mark.slow) for d in FLOATS[1:]]], ids=short
)
def test_bits_do_not_depend_on_threads_nor_on_the_run(dtype: torch.dtype) -> None:
    """The norm's sum has an order of its own, and so the clipped step repeats bit for bit."""
    runs = []
    for count in (1, 2, 1, 3):
        run = Run.of(fine_tuning(), several(dtype))
        run.optimizer.set_update_mask(run.params[1], half_of((300,), seed=9))
        with threads(count):
            runs.append(run.go(range(5)))
    for other in runs[1:]:
        runs[0].assert_same(other)
        assert same_bits(runs[0].optimizer.grad_norm, other.optimizer.grad_norm)


LAYOUTS = {
    "misaligned": Layout((12, 7, 5, 3), offset=1),
    "transposed": Layout((12, 7, 5, 3), (3, 2, 1, 0)),
    "channels_last": Layout((12, 7, 5, 3), CHANNELS_LAST),
    "permuted_and_misaligned": Layout((12, 7, 5, 3), (1, 3, 0, 2), offset=3),
}


@pytest.mark.parametrize("mask", ["none", "rows", "elements"])
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("dtype", FLOATS, ids=short)
def test_bits_do_not_depend_on_the_memory_order(dtype: torch.dtype, name: str, mask: str) -> None:
    """Elements do not know where they lie: gradients, anchor, masks and moments must follow them."""
    layout = LAYOUTS[name]
    contiguous = Run.of(fine_tuning(max_grad_norm=None), [parameter(layout.shape, dtype, seed=1)])
    other = Run.of(fine_tuning(max_grad_norm=None), [parameter(layout, dtype, seed=1)])
    for run in (contiguous, other):
        run.optimizer.set_update_mask(run.params[0], mask_of(mask, layout.shape, seed=5))
        run.go(range(4))
    contiguous.assert_same(other)


@pytest.mark.parametrize("name", LAYOUTS)
def test_parameters_and_state_may_be_moved_in_memory_between_steps(name: str) -> None:
    """As `model.to(memory_format=...)`, `.data = ...` and a loaded state do."""
    layout = LAYOUTS[name]
    still, moved = (Run.of(fine_tuning(), [parameter(layout.shape, seed=1)]) for _ in range(2))
    (p,) = moved.params
    still.go(range(9))
    moved.go(range(3))
    p.data = Placed(p.detach(), layout).view
    moved.go(range(3, 5))
    state = moved.optimizer.state[p]
    for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
        state[key] = state[key].clone(memory_format=torch.contiguous_format)
    moved.go(range(5, 7))
    p.data = p.detach().clone(memory_format=torch.contiguous_format)
    moved.go(range(7, 9))
    still.assert_same(moved)


def test_dense_views_never_write_to_their_neighbours() -> None:
    """Every other element of memory belongs to another parameter's view or to nobody."""
    buffer = torch.full((3, 400), 7.0)
    views = [buffer[1, 50:120].view(10, 7).t(), buffer[1, 121:191].view(7, 2, 5).permute(2, 0, 1), buffer[1, 191:192]]
    inside = torch.zeros_like(buffer, dtype=torch.bool)
    inside[1, 50:120] = inside[1, 121:192] = True
    params = [nn.Parameter(view) for view in views]
    optimizer = fastft.AdamW(params, lr=0.1, fused=True, max_grad_norm=1.0, anchor="init", anchor_decay=1.0)
    for seed in range(3):
        steps_on(params, seed)
        optimizer.step()
    assert (buffer[~inside] == 7.0).all()
    assert (buffer[inside] != 7.0).all()


@pytest.mark.parametrize("fused", [None, True])
def test_views_with_gaps_never_write_into_the_gaps(fused: bool | None) -> None:
    """Columns of a matrix: torch's step takes them, and of torch's implementations one that keeps to the view."""
    buffer = normal((6, 8), seed=1)
    others = buffer[:, 3:].clone()
    p, q = nn.Parameter(buffer[:, :3]), nn.Parameter(buffer[:, :3].clone())
    optimizers = fastft.AdamW([p], lr=0.1, fused=fused), torch.optim.AdamW([q], lr=0.1, foreach=False)
    for seed in range(3):
        for param, optimizer in zip((p, q), optimizers, strict=True):
            steps_on([param], seed)
            optimizer.step()
    assert same_bits(buffer[:, 3:], others)
    torch.testing.assert_close(p, q)


def test_betas_may_be_tensors() -> None:
    """As in torch; read as the numbers they hold."""
    betas = torch.tensor(0.85), torch.tensor(0.95)
    a = Run.of(fine_tuning(betas=betas), several(torch.float32)).go(range(3))
    b = Run.of(fine_tuning(betas=tuple(map(float, betas))), several(torch.float32)).go(range(3))
    a.assert_same(b)


@pytest.mark.parametrize("lr_dtype", [torch.float32, torch.float64], ids=short)
@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_tensor_lr_gives_the_bits_of_the_number(shape: tuple[int, ...], lr_dtype: torch.dtype) -> None:
    lr = torch.full(shape, 0.0123, dtype=lr_dtype)
    a = Run.of(fine_tuning(lr=lr), several(torch.float32)).go(range(3))
    b = Run.of(fine_tuning(lr=float(lr)), several(torch.float32)).go(range(3))
    a.assert_same(b)
    assert same_bits(lr, torch.full(shape, 0.0123, dtype=lr_dtype))


# -- the norm --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [*[(dtype, scale) for dtype in FLOATS if dtype != torch.float16 for scale in (1e-6, 1.0, 1e6)]]
    + [(torch.float16, scale) for scale in (0.1, 1.0, 10.0)],
    ids=str,
)
def test_grad_norm_and_clipping_are_those_of_clip_grad_norm_(dtype: torch.dtype, scale: float) -> None:
    """Before clipping, over all groups; the step is that of clipped gradients, and the gradients are not clipped."""
    ours, theirs = several(dtype), several(dtype)
    limit = 30 * scale  # about a tenth of the norm
    mine = fastft.AdamW([{"params": ours[:2]}, {"params": ours[2:], "lr": 0.1}], max_grad_norm=limit, eps=1e-6)
    for group in (ours, theirs):
        steps_on(group, seed=1, scale=scale)
    before = [bits(p.grad) for p in ours]
    mine.step()
    norm = nn.utils.clip_grad_norm_(theirs, limit, foreach=False)
    assert mine.grad_norm is not None and mine.grad_norm > 5 * limit
    rtol = {torch.float32: 1e-5, torch.float64: 1e-12}.get(dtype, torch.finfo(dtype).eps)
    torch.testing.assert_close(mine.grad_norm, norm.double(), rtol=rtol, atol=0.0)
    assert all(torch.equal(bits(p.grad), was) for p, was in zip(ours, before, strict=True))
    atol = 2**-24 if dtype == torch.float16 else 0.0  # one unit among subnormal numbers
    for p, q in zip(ours, theirs, strict=True):
        expected = 0.1 * q.grad.double()
        torch.testing.assert_close(mine.state[p]["exp_avg"].double(), expected, rtol=3 * rtol, atol=atol)


def test_a_norm_below_the_limit_changes_nothing() -> None:
    """Not even a bit: the factor is exactly 1, though the norm is close below the limit."""
    limit = float(torch.stack([p.grad.double().square().sum() for p in stepped(several(torch.float32))]).sum().sqrt())
    clipped = Run.of(fine_tuning(max_grad_norm=limit + 2e-6), several(torch.float32)).go([1])
    free = Run.of(fine_tuning(max_grad_norm=None), several(torch.float32)).go([1])
    clipped.assert_same(free)
    assert clipped.optimizer.grad_norm is not None and free.optimizer.grad_norm is None
    assert float(clipped.optimizer.grad_norm) == pytest.approx(limit, rel=1e-13)


def stepped(params: list[nn.Parameter]) -> list[nn.Parameter]:
    """With the gradients of `Run.go([1])`."""
    steps_on(params, 1)
    return params


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nonfinite_gradients_go_where_torchs_clipping_sends_them(bad: float) -> None:
    """An infinite norm makes the factor 0 and so every other gradient; a NaN reaches everything."""
    ours, theirs = parameter((40,), seed=1), parameter((40,), seed=1)
    mine = fastft.AdamW([ours], lr=0.1, max_grad_norm=1.0)
    torchs = torch.optim.AdamW([theirs], lr=0.1, foreach=False)
    for seed in range(3):
        for p in (ours, theirs):
            steps_on([p], seed)
            if seed == 1:
                p.grad[3] = bad
        nn.utils.clip_grad_norm_([theirs], 1.0)
        mine.step()
        torchs.step()
    torch.testing.assert_close(ours, theirs, equal_nan=True)
    assert ours.isnan().sum() == (1 if bad == bad else 40)


def test_eps_zero_and_no_gradient_yet_is_torchs_nan() -> None:
    """0 / 0 where a gradient was 0 from the start."""
    ours, theirs = parameter((8,), seed=1), parameter((8,), seed=1)
    for p, cls in ((ours, fastft.AdamW), (theirs, torch.optim.AdamW)):
        p.grad = torch.tensor([0.0, 1.0] * 4)
        cls([p], eps=0.0).step()
    torch.testing.assert_close(ours, theirs, equal_nan=True)
    assert ours.isnan().tolist() == [True, False] * 4


def test_a_negative_lr_set_later_is_taken_as_torch_takes_it() -> None:
    """Schedulers end a hair below 0 now and then."""
    ours, theirs = parameter((40,), seed=1), parameter((40,), seed=1)
    for p, cls in ((ours, fastft.AdamW), (theirs, torch.optim.AdamW)):
        optimizer = cls([p], weight_decay=0.3)
        for seed, lr in enumerate((1e-2, -1e-2, -1e-12)):
            optimizer.param_groups[0]["lr"] = lr
            steps_on([p], seed)
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_a_million_steps_in() -> None:
    """Bias corrections at a count that float32 still holds, though no power of the betas does."""
    p = parameter((40,), seed=1)
    watch = Watch([{"params": [("p", p)], "lr": 1e-2}])
    steps_on([p], 1)
    watch.step()
    watch.optimizer.state[p]["step"].fill_(1e6)
    watch["p"].near.t = watch["p"].free.t = 10**6
    steps_on([p], 2)
    watch.step()


# -- what a step leaves alone ----------------------------------------------------------------------------------


class Operations(TorchDispatchMode):
    """Notes what torch is asked to do."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def operations_of_a_step(count: int, **options: Any) -> list[str]:
    """The torch operations in one step of a settled optimizer over that many parameters."""
    params = [parameter((33,), seed=i) for i in range(count)]
    optimizer = fine_tuning(**options)(params)
    optimizer.grad_scale, optimizer.found_inf = torch.ones(()), torch.zeros(())
    for seed in range(2):
        steps_on(params, seed)
        optimizer.step()
    with Operations() as seen:
        optimizer.step()
    return seen.names


@pytest.mark.parametrize("skip_nonfinite", [False, True])
def test_a_settled_step_neither_copies_nor_waits(skip_nonfinite: bool) -> None:
    """On a GPU `item()` (`_local_scalar_dense`) would wait, a copy would cost memory, and many launches time."""
    few = operations_of_a_step(2, skip_nonfinite=skip_nonfinite)
    assert few == operations_of_a_step(60, skip_nonfinite=skip_nonfinite)
    few = [name for name in few if not name.startswith("_record_function")]
    norm, inverse = ["empty", "sqrt", "_to_copy", "div"], ["_to_copy", "reciprocal", "_to_copy", "view"]
    assert few == [*norm, *inverse, "_foreach_mul_"]  # all but the last, which unscales the gradients, of scalars


def test_a_settled_step_writes_in_place() -> None:
    """Parameters, gradients and state are the same objects at the same addresses."""
    run = Run.of(fine_tuning(skip_nonfinite=True), several(torch.bfloat16)).go(range(2))

    def everything() -> list[tuple[int, int]]:
        tensors = [t for p in run.params for t in (p, p.grad, *run.optimizer.state[p].values())]
        return [(id(t), t.data_ptr()) for t in tensors]

    before, grads = everything(), [bits(p.grad) for p in run.params]
    for _ in range(3):
        run.optimizer.step()
    assert everything() == before
    assert all(torch.equal(bits(p.grad), g) for p, g in zip(run.params, grads, strict=True))
