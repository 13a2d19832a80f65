"""Blending toward the anchor: its values, its undoing, and the search for the best alpha."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import fastft
from fastft.retention import anchored, best_alpha, interpolate_

ALPHAS = (0.0, 0.3, 0.5, 0.7, 1.0)


class Tied(nn.Module):
    """An embedding whose table is also the output layer, a norm with statistics, and a scalar."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 6)
        self.conv = nn.Conv2d(2, 4, 3).to(memory_format=torch.channels_last)
        self.norm = nn.BatchNorm1d(6)
        self.scale = nn.Parameter(torch.tensor(0.7))
        self.output = nn.Linear(6, 7, bias=False)
        self.output.weight = self.table.weight


def tuned(model_dtype: torch.dtype = torch.float32, **options: Any) -> tuple[nn.Module, fastft.Anchor]:
    """A model that has moved from its anchor."""
    torch.manual_seed(1)
    model = Tied().to(model_dtype)
    anchor = fastft.Anchor.snapshot(model, **options)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p))
    model.table.weight.data[0, 0] = -0.0  # type: ignore[union-attr, operator, index]
    return model, anchor


def bits(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone().view(torch.int16 if p.element_size() == 2 else torch.int32) for p in model.parameters()]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("piece", [5, 1 << 18])
@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, {}),
        (torch.float32, {"dtype": torch.bfloat16}),
        (torch.bfloat16, {}),
        (torch.bfloat16, {"dtype": torch.float32}),
        (torch.float16, {"device": "cpu"}),
    ],
)
def test_the_blend_and_its_undoing(
    dtype: torch.dtype, options: dict[str, Any], alpha: float, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(anchored, "CHUNK", piece)
    model, anchor = tuned(dtype, **options)
    before = bits(model)
    wanted = {
        name: (1 - alpha) * anchor[name].double() + alpha * p.detach().double() for name, p in model.named_parameters()
    }
    with interpolate_(model, anchor, alpha) as interpolation:
        assert interpolation.alpha == alpha
        for name, p in model.named_parameters():
            if alpha == 0.0:
                assert torch.equal(p, anchor[name].to(dtype))
            torch.testing.assert_close(
                p.detach().double(), wanted[name], rtol=torch.finfo(dtype).eps, atol=3e-7 if alpha else 1e-2
            )
        assert same(bits(model), before) == (alpha == 1.0)
    assert same(bits(model), before)
    assert interpolation.alpha == 1.0


def test_one_rounding_in_16_bits() -> None:
    model, anchor = tuned(torch.bfloat16, dtype=torch.float32)
    expected = [
        (0.3 * anchor[name].double() + 0.7 * p.detach().double()).to(torch.bfloat16)
        for name, p in model.named_parameters()
    ]
    interpolate_(model, anchor, 0.7)
    differing = sum((a != b).sum().item() for a, b in zip(model.parameters(), expected, strict=True))
    assert differing <= 1  # where float32's own rounding decides a tie


def test_without_with_until_undone() -> None:
    model, anchor = tuned()
    before = bits(model)
    interpolation = interpolate_(model, anchor, 0.25)
    quarter = bits(model)
    interpolation.set(0.75)
    assert not same(bits(model), quarter)
    interpolation.set(0.25)  # from the fine-tuned weights, not from where it is
    assert same(bits(model), quarter)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    interpolation.undo()
    assert same(bits(model), before)
    interpolation.undo()
    assert same(bits(model), before)
    assert "alpha=1, 6 parameters" in repr(interpolation)


def test_an_exception_inside_undoes() -> None:
    model, anchor = tuned(torch.bfloat16)
    before = bits(model)
    with pytest.raises(RuntimeError, match="inside"), interpolate_(model, anchor, 0.5):
        raise RuntimeError("inside")
    assert same(bits(model), before)


def test_a_failure_half_way_undoes(monkeypatch: pytest.MonkeyPatch) -> None:
    model, anchor = tuned()
    before = bits(model)
    calls = 0
    lerp = torch.lerp

    def failing(*args: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise RuntimeError("read error")
        return lerp(*args)

    monkeypatch.setattr(torch, "lerp", failing)
    with pytest.raises(RuntimeError, match="read error"):
        interpolate_(model, anchor, 0.5)
    assert calls == 3
    assert same(bits(model), before)


def test_what_is_not_anchored_stays() -> None:
    model, _ = tuned()
    anchor = fastft.Anchor.snapshot([("table.weight", nn.Parameter(torch.ones(7, 6)))])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    statistics = {name: b.clone() for name, b in model.named_buffers()}
    interpolation = interpolate_(model, anchor, 0.5)
    assert interpolation.unanchored == ("scale", "conv.weight", "conv.bias", "norm.weight", "norm.bias")
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == (name != "table.weight")
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, statistics[name])
    assert model.output.weight is model.table.weight  # type: ignore[union-attr]


def test_an_anchor_in_a_file(tmp_path: Path) -> None:
    model, anchor = tuned()
    save_file({name: anchor[name].contiguous() for name in anchor}, tmp_path / "base.safetensors")
    from_file = fastft.Anchor.from_safetensors(tmp_path / "base.safetensors", model)
    interpolate_(model, anchor, 0.4)
    wanted = bits(model)
    model, _ = tuned()
    interpolate_(model, fastft.Anchor.from_safetensors(tmp_path / "base.safetensors", model), 0.4)
    assert same(bits(model), wanted)
    assert len(from_file) == 6


@pytest.mark.parametrize("alpha", [-0.1, 1.1, float("nan"), True, "half"])
def test_wrong_alphas(alpha: Any) -> None:
    model, anchor = tuned()
    before = bits(model)
    with pytest.raises(ValueError, match="alpha: expected a number from 0 to 1, got"):
        interpolate_(model, anchor, alpha)
    interpolation = interpolate_(model, anchor, 1.0)
    with pytest.raises(ValueError, match="alpha: expected a number from 0 to 1, got"):
        interpolation.set(alpha)
    assert same(bits(model), before)


# -- best_alpha ----------------------------------------------------------------------------------------------


def line(*, base: float, tuned: float) -> tuple[nn.Module, fastft.Anchor]:
    """A model that is one number."""
    model = nn.Module()
    model.x = nn.Parameter(torch.tensor(base, dtype=torch.float64))
    anchor = fastft.Anchor.snapshot(model)
    with torch.no_grad():
        model.x.fill_(tuned)
    return model, anchor


def evaluate(model: Any) -> dict[str, float]:
    """target = x·(1.5 − x/2)... up to its maximum at 1.5, source = 1 − x²: x is alpha for a line from 0 to 1."""
    x = model.x.item()
    return {"source": 1.0 - x * x, "target": x * (1.5 - 0.5 * x)}


def test_the_best_alpha_by_each_rule() -> None:
    model, anchor = line(base=0.0, tuned=1.0)
    before = bits(model.float())
    model, anchor = line(base=0.0, tuned=1.0)
    search = best_alpha(model, anchor, evaluate)
    assert [point.alpha for point in search.points] == [i / 10 for i in range(11)]
    for point in search.points:
        assert point.source == pytest.approx(1 - point.alpha**2)
    # ½(1.5x − x²/2 + 1 − x²): maximal at 0.5.
    assert search.alpha == 0.5
    # 0.2·(1.5x − x²/2) + 0.8·(1 − x²) is maximal at 0.3/1.8; of the grid, at 0.2.
    assert search.choose(source_weight=0.8) == 0.2
    assert search.choose(source_weight=0.0) == 1.0
    assert search.choose(source_weight=1.0) == 0.0
    assert search.choose(min_target=0.5) == 0.4  # x(1.5 − x/2) is 0.405 at 0.3 and 0.52 at 0.4
    assert best_alpha(model, anchor, evaluate, min_target=0.5).alpha == 0.4
    assert best_alpha(model, anchor, evaluate, alphas=(0.9, 0.1), source_weight=0.1).alpha == 0.9
    with pytest.raises(ValueError, match=r"min_target: no alpha reaches 1.2:\n  alpha 0: source 1, target 0\n"):
        best_alpha(model, anchor, evaluate, min_target=1.2)
    assert same(bits(model.float()), before)


def test_equal_scores_keep_the_fine_tuned_weights() -> None:
    model, anchor = line(base=0.0, tuned=1.0)
    search = best_alpha(model, anchor, lambda model: {"source": 0.5, "target": 0.5})
    assert search.alpha == 1.0
    assert search.choose(min_target=0.5) == 1.0


def test_the_curve_as_a_report(tmp_path: Path) -> None:
    model, anchor = line(base=0.0, tuned=1.0)
    levels = np.linspace(0.05, 0.95, 10)

    def per_item(model: Any) -> dict[str, Any]:
        x = model.x.item()
        return {"source": 1.0 - x > levels, "target": torch.from_numpy(0.3 + 0.5 * x > levels)}

    search = best_alpha(model, anchor, per_item, alphas=(0.0, 0.5, 1.0))
    report = search.report(confidence=0.8, resamples=200)
    assert report.names == ("alpha = 0.5", "alpha = 1")
    assert report.result("alpha = 0.5").source["source"].forgetting.value == pytest.approx(50.0)
    assert report.result("alpha = 1").target["target"].gain.low is not None
    pytest.importorskip("matplotlib")
    report.plot(tmp_path / "curve.png")
    with pytest.raises(ValueError, match="report: expected 0 among the alphas"):
        best_alpha(model, anchor, per_item, alphas=(0.5, 1.0)).report()


def test_the_model_is_as_it_was_after_an_exception() -> None:
    model, anchor = tuned()
    before = bits(model)

    def failing(model: nn.Module) -> dict[str, float]:
        if not same(bits(model), before):
            raise RuntimeError("no data")
        return {"source": 0.0, "target": 0.0}

    with pytest.raises(RuntimeError, match="no data"):
        best_alpha(model, anchor, failing)
    assert same(bits(model), before)
    with pytest.raises(ValueError, match=r'evaluate: expected \{"source": scores, "target": scores\}, got 0\.5'):
        best_alpha(model, anchor, lambda model: 0.5)  # type: ignore[arg-type, return-value]
    with pytest.raises(ValueError, match="evaluate: target: expected finite scores"):
        best_alpha(model, anchor, lambda model: {"source": 0.5, "target": float("nan")})
    assert same(bits(model), before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alphas": ()}, "alphas: expected at least one, got none"),
        ({"alphas": (0.5, "1")}, "alpha: expected a number from 0 to 1, got '1'"),
        ({"alphas": (0.5, 2.0)}, "alpha: expected a number from 0 to 1, got 2.0"),
        ({"source_weight": 1.5}, "source_weight: expected a number from 0 to 1, got 1.5"),
        ({"source_weight": 0.5, "min_target": 0.5}, "source_weight, min_target: expected one of them, got both"),
    ],
)
def test_bad_searches_evaluate_nothing(options: dict[str, Any], message: str) -> None:
    model, anchor = tuned()

    def never(model: nn.Module) -> dict[str, float]:
        raise AssertionError

    with pytest.raises(ValueError, match=message):
        best_alpha(model, anchor, never, **options)


def test_a_model_is_interpolated_once_at_a_time() -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    base = fastft.Anchor.snapshot(model)
    with torch.no_grad():
        model.weight.add_(1.0)
    tuned = model.weight.detach().clone()
    first = interpolate_(model, base, 0.5)
    half = model.weight.detach().clone()
    with pytest.raises(ValueError, match=r"model: it is interpolated already, with alpha = 0\.5; use that"):
        interpolate_(model, base, 0.2)
    assert torch.equal(model.weight, half)
    first.undo()
    with interpolate_(model, base, 0.2):
        assert not torch.equal(model.weight, tuned)
    assert torch.equal(model.weight, tuned)
    # One that nobody can undo any more was for good: what it left is what the next begins with.
    interpolate_(model, base, 0.5)
    with interpolate_(model, base, 0.5):
        assert torch.allclose(model.weight, tuned - 0.75)
    assert torch.equal(model.weight, half)
