"""Child-Tuning-D and MoFO: what moves, what does not, and MoFO's rule in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastft
from fastft.optim import reference
from fastft.retention import MoFO, child_tuning_, estimate_fisher


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5)).to(dtype)


def gradients(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)


def adamw(model: nn.Module, **options: Any) -> fastft.AdamW:
    """Decay, anchor and clipping all on, so that whatever moves a weight is there."""
    anchor = fastft.Anchor.snapshot([(n, p + 1.0) for n, p in model.named_parameters()])
    anchor.bind(model.named_parameters())
    options = {"lr": 0.01, "weight_decay": 0.1, "anchor": anchor, "anchor_decay": 3.0, "max_grad_norm": 2.0, **options}
    return fastft.AdamW(model.named_parameters(), **options)


# -- Child-Tuning-D ------------------------------------------------------------------------------------------


def test_the_highest_of_the_whole_model() -> None:
    model = network()
    optimizer = adamw(model)
    fisher = {"0.weight": torch.arange(48.0).view(8, 6), "2.bias": torch.tensor([100.0, 1.5, 0.0, 47.5, 2.0])}
    masks = child_tuning_(optimizer, model, fisher, fraction=0.1)  # ⌊5.3⌋ of 53: 100, 47.5, 47, 46, 45
    assert masks["2.bias"].tolist() == [True, False, False, True, False]
    assert masks["0.weight"].nonzero().tolist() == [[7, 3], [7, 4], [7, 5]]
    for name, p in model.named_parameters():
        assert (optimizer.update_mask(p) is None) == (name not in fisher)


def test_the_highest_of_each_tensor() -> None:
    model = network()
    optimizer = adamw(model)
    fisher = {"0.weight": torch.arange(48.0).view(8, 6), "2.bias": torch.tensor([100.0, 1.5, 0.0, 47.5, 2.0])}
    masks = child_tuning_(optimizer, model, fisher, fraction=0.25, scope="tensor")
    assert masks["2.bias"].tolist() == [True, False, False, False, False]
    assert masks["0.weight"].sum() == 12
    assert masks["0.weight"][6:].all()


def test_what_is_masked_does_not_move() -> None:
    model = network()
    optimizer = adamw(model)
    inputs = torch.randn(20, 6)
    fisher = {name: f for name, f in estimate_fisher(model, [inputs]).items() if name.startswith("0.")}
    masks = child_tuning_(optimizer, model, fisher, fraction=0.4)
    assert sum(int(mask.sum()) for mask in masks.values()) == int(0.4 * 56)
    before = copy.deepcopy(model)
    for seed in range(3):
        gradients(model, seed)
        optimizer.step()
    for (name, p), old in zip(model.named_parameters(), before.parameters(), strict=True):
        moved = p != old
        assert torch.equal(moved, masks.get(name, torch.ones_like(moved)))
    again = adamw(network())
    again.load_state_dict(optimizer.state_dict())
    mask = again.update_mask(again.param_groups[0]["params"][0])
    assert mask is not None
    assert torch.equal(mask, masks["0.weight"])


def test_where_most_is_zero_the_fraction_still_holds() -> None:
    model = network()
    fisher = {"0.weight": torch.zeros(8, 6)}
    fisher["0.weight"][2, 3] = 1.0
    masks = child_tuning_(adamw(model), model, fisher, fraction=0.5)
    assert masks["0.weight"].sum() == 24
    assert masks["0.weight"][2, 3]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fraction": 0.0}, "fraction: expected a number above 0 and up to 1, got 0.0"),
        ({"fraction": 1.5}, "fraction: expected a number above 0 and up to 1, got 1.5"),
        ({"scope": "layer"}, 'scope: expected "model" or "tensor", got \'layer\''),
        ({"fisher": {}}, "fisher: expected at least one parameter, got none"),
        ({"fisher": {"0.wight": torch.ones(8, 6)}}, "the model has no parameter '0.wight'; closest: 0.weight"),
        ({"fisher": {"0.weight": torch.ones(6, 8)}}, r"fisher: 0.weight: expected shape \[8, 6\], got \[6, 8\]"),
        ({"fisher": {"0.bias": -torch.ones(8)}}, "fisher: 0.bias: expected finite values >= 0"),
        ({"fisher": {"0.bias": torch.full((8,), float("nan"))}}, "fisher: 0.bias: expected finite values >= 0"),
    ],
)
def test_bad_input_sets_nothing(change: dict[str, Any], message: str) -> None:
    model = network()
    optimizer = adamw(model)
    fisher = {"2.bias": torch.ones(5), **change.pop("fisher", {"2.weight": torch.ones(5, 8)})}
    if message.endswith("got none"):
        fisher = {}
    with pytest.raises(ValueError, match=message):
        child_tuning_(optimizer, model, fisher, **change)
    assert all(optimizer.update_mask(p) is None for p in model.parameters())


def test_parameters_of_another_optimizer() -> None:
    model = network()
    optimizer = fastft.AdamW(model[0].parameters())
    fisher = {"0.bias": torch.ones(8), "2.bias": torch.ones(5)}
    with pytest.raises(ValueError, match=r"fisher: 2\.bias: is not one of the optimizer's parameters"):
        child_tuning_(optimizer, model, fisher)
    assert optimizer.update_mask(model[0].bias) is None
    with pytest.raises(TypeError, match=r"optimizer: expected a fastft\.AdamW, got AdamW"):
        child_tuning_(torch.optim.AdamW(model.parameters()), model, fisher)  # type: ignore[arg-type]


# -- MoFO ----------------------------------------------------------------------------------------------------


class Restated:
    """MoFO on AdamW, tensor by tensor, in float64: moments of all, the step of the largest |m|."""

    def __init__(self, model: nn.Module, fraction: float, anchor: fastft.Anchor) -> None:
        self.p = {n: p.detach().double().clone() for n, p in model.named_parameters()}
        self.m = {n: torch.zeros_like(p) for n, p in self.p.items()}
        self.v = {n: torch.zeros_like(p) for n, p in self.p.items()}
        self.fraction, self.anchor, self.t = fraction, anchor, 0

    def step(self, grads: dict[str, Tensor]) -> None:
        self.t += 1
        clip = reference.clip_factor(reference.grad_norm(list(grads.values())), 2.0)
        for name, grad in grads.items():
            p, self.m[name], self.v[name], _ = reference.adamw(
                self.p[name],
                grad * clip,
                self.m[name],
                self.v[name],
                None,
                self.t,
                lr=0.01,
                weight_decay=0.1,
                anchor=self.anchor[name],
                anchor_decay=3.0,
            )
            size = self.m[name].abs().flatten()
            kept = max(1, int(self.fraction * size.numel()))
            threshold = size.sort(descending=True).values[kept - 1]
            moves = self.m[name].abs() >= threshold if p.dim() > 1 else torch.ones_like(p, dtype=torch.bool)
            self.p[name] = torch.where(moves, p, self.p[name])


@pytest.mark.parametrize("fraction", [0.15, 0.5, 1.0])
def test_the_rule_in_float64(fraction: float) -> None:
    model = network(torch.float64)
    optimizer = adamw(model)
    anchor = fastft.Anchor.snapshot([(n, p.detach() + 1.0) for n, p in model.named_parameters()])
    restated = Restated(model, fraction, anchor)
    MoFO(optimizer, fraction)
    for seed in range(5):
        gradients(model, seed)
        restated.step({n: p.grad for n, p in model.named_parameters()})  # type: ignore[misc]
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        optimizer.step()
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.detach(), restated.p[name], rtol=1e-12, atol=1e-14)
            torch.testing.assert_close(optimizer.state[p]["exp_avg"], restated.m[name])
            torch.testing.assert_close(optimizer.state[p]["exp_avg_sq"], restated.v[name])
            moved = int((p != before[name]).sum())
            assert moved == (int(fraction * p.numel()) if p.dim() > 1 else p.numel())


def test_with_torch_and_in_bfloat16() -> None:
    """On torch's own AdamW too; what does not move keeps its bits."""
    makers: list[Callable[[nn.Module], torch.optim.Adam]] = [
        lambda model: torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1),
        lambda model: adamw(model, lr=0.1, state_dtype=torch.float32),
    ]
    for make in makers:
        model = network(torch.bfloat16)
        optimizer = make(model)
        MoFO(optimizer, 0.1)
        gradients(model, 0)
        before = copy.deepcopy(model)
        optimizer.step()
        for p, old in zip(model.parameters(), before.parameters(), strict=True):
            size = optimizer.state[p]["exp_avg"].abs().flatten()
            stays = size < size.topk(max(1, int(0.1 * size.numel()))).values[-1]
            if p.dim() > 1:
                assert torch.equal(p.flatten()[stays].view(torch.int16), old.flatten()[stays].view(torch.int16))
            assert not torch.equal(p, old)


def test_chosen_parameters_and_detaching() -> None:
    model = network()
    optimizer = adamw(model)
    mofo = MoFO(optimizer, 0.3, parameters=[model[2].bias])
    counts = []
    for _ in range(2):
        gradients(model, 1)
        before = copy.deepcopy(model)
        optimizer.step()
        counts.append([int((p != q).sum()) for p, q in zip(model.parameters(), before.parameters(), strict=True)])
        mofo.undo()
    assert counts == [[48, 8, 40, 1], [48, 8, 40, 5]]


def test_the_old_word_for_undo_still_works() -> None:
    model = network()
    optimizer = adamw(model)
    mofo = MoFO(optimizer, 0.3)
    with pytest.warns(DeprecationWarning, match=r"remove\(\) is called undo\(\) now"):
        mofo.remove()
    gradients(model, 1)
    before = copy.deepcopy(model)
    optimizer.step()
    assert all(bool((p != q).all()) for p, q in zip(model.parameters(), before.parameters(), strict=True))


def test_inside_an_update_mask_and_with_a_closure() -> None:
    model = network()
    optimizer = adamw(model)
    rows = torch.zeros(8, dtype=torch.bool)
    rows[:4] = True
    optimizer.set_update_mask(model[0].weight, rows)
    MoFO(optimizer, 0.25)
    before = copy.deepcopy(model)

    def closure() -> float:
        gradients(model, 2)
        return 1.0

    assert all(p.grad is None for p in model.parameters())
    assert optimizer.step(closure) == 1.0
    moved = model[0].weight != before[0].weight
    assert int(moved.sum()) == 12  # the moments of masked rows are 0, so all the largest are in the others
    assert not moved[4:].any()
    assert int((model[2].weight != before[2].weight).sum()) == 10


def test_skipped_steps_and_frozen_parameters() -> None:
    model = network()
    optimizer = adamw(model, skip_nonfinite=True)
    optimizer.freeze(model[2])
    MoFO(optimizer, 0.25)
    before = copy.deepcopy(model)
    gradients(model, 0)
    model[0].weight.grad[0, 0] = float("inf")  # type: ignore[index]
    optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before.parameters(), strict=True))
    gradients(model, 0)
    optimizer.step()
    assert int((model[0].weight != before[0].weight).sum()) == 12
    assert torch.equal(model[2].weight, before[2].weight)
    assert optimizer.skipped_steps == 1


def test_resuming_needs_no_state_of_its_own() -> None:
    def run(steps: int, resume_at: int | None) -> list[Tensor]:
        model = network()
        optimizer = adamw(model)
        MoFO(optimizer, 0.2)
        for seed in range(steps):
            if seed == resume_at:
                saved = optimizer.state_dict()
                optimizer = adamw(model)
                optimizer.load_state_dict(saved)
                MoFO(optimizer, 0.2)
            gradients(model, seed)
            optimizer.step()
        return [p.detach() for p in model.parameters()]

    assert all(torch.equal(a, b) for a, b in zip(run(6, None), run(6, 3), strict=True))


def test_bad_input_of_mofo() -> None:
    model = network()
    optimizer = adamw(model)
    for fraction in (0.0, -0.1, 1.1, float("nan"), "all"):
        with pytest.raises(ValueError, match="fraction: expected a number above 0 and up to 1"):
            MoFO(optimizer, fraction)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"parameters: one of shape \[3\] is not the optimizer's"):
        MoFO(optimizer, 0.1, parameters=[nn.Parameter(torch.ones(3))])
    with pytest.raises(TypeError, match=r"optimizer: expected a torch\.optim\.Adam or AdamW, got SGD"):
        MoFO(torch.optim.SGD(model.parameters()), 0.1)  # type: ignore[arg-type]
