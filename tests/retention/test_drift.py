"""The drift report against its float64 restatement."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import fastft
from fastft.retention import anchored, drift_report


def tuned(dtype: torch.dtype = torch.float32) -> tuple[nn.Sequential, nn.Sequential]:
    """(base, fine-tuned)."""
    torch.manual_seed(3)
    base = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(32, 16), nn.Linear(16, 2)).to(dtype)
    base[0].to(memory_format=torch.channels_last)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(32, 16), nn.Linear(16, 2)).to(dtype)
    model.load_state_dict(base.state_dict())
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return base, model


def expected(model: nn.Module, base: nn.Module, prefix: str) -> tuple[float, float, float]:
    def vector(m: nn.Module) -> torch.Tensor:
        return torch.cat([p.detach().double().flatten() for n, p in m.named_parameters() if n.startswith(prefix)])

    a, b = vector(model), vector(base)
    return (a - b).norm().item(), ((a - b).norm() / b.norm()).item(), torch.cosine_similarity(a, b, dim=0).item()


@pytest.mark.parametrize("piece", [7, 1 << 18])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_every_group_against_float64(dtype: torch.dtype, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(anchored, "CHUNK", piece)
    base, model = tuned(dtype)
    report = drift_report(model, fastft.Anchor.snapshot(base.named_parameters()))
    assert [drift.group for drift in report.groups] == ["0", "2", "3"]
    for drift, prefix in zip([*report.groups, report.total], ["0.", "2.", "3.", ""], strict=True):
        assert (drift.distance, drift.relative, drift.cosine) == pytest.approx(expected(model, base, prefix), rel=1e-12)
        assert drift.unanchored == ()
    assert report.total.elements == sum(p.numel() for p in model.parameters())


def test_anchors_in_bfloat16_and_in_a_file(tmp_path: Path) -> None:
    base, model = tuned()
    rounded = {name: p.detach().bfloat16() for name, p in base.named_parameters()}
    save_file({name: p.contiguous() for name, p in rounded.items()}, tmp_path / "base.safetensors")
    from_file = drift_report(model, fastft.Anchor.from_safetensors(tmp_path / "base.safetensors", model))
    for p, values in zip(base.parameters(), rounded.values(), strict=True):
        p.data = values.float()
    in_memory = drift_report(model, fastft.Anchor.snapshot(base.named_parameters(), dtype=torch.bfloat16))
    assert from_file == in_memory
    assert in_memory.groups[1].distance == pytest.approx(expected(model, base, "2.")[0], rel=1e-12)


def test_nothing_has_moved_at_first() -> None:
    base, _ = tuned()
    total = drift_report(base, fastft.Anchor.snapshot(base)).total
    assert total.distance == 0.0
    assert total.relative == 0.0
    assert total.cosine == pytest.approx(1.0, abs=1e-15)


def test_groups_and_what_is_not_anchored() -> None:
    _, model = tuned()
    anchor = fastft.Anchor.snapshot(model, exclude=("3", "2.bias"))
    with torch.no_grad():
        model[2].weight.add_(1.0)
    report = drift_report(model, anchor, groups={"body": ["0", "2"], "head": "3"})
    body, head = report.groups
    assert body.unanchored == ("2.bias",)
    assert body.distance == pytest.approx((32 * 16) ** 0.5, rel=1e-6)
    assert (head.elements, head.relative, head.cosine) == (0, None, None)
    assert report.total.unanchored == ("2.bias", "3.weight", "3.bias")
    text = str(report)
    assert "Not anchored, and not counted: 2.bias, 3.weight, 3.bias" in text
    assert text.splitlines()[0].split() == ["group", "elements", "‖δ‖₂", "‖δ‖₂/‖θ₀‖₂", "cosine", "unanchored"]
    assert "| head | 0 | - | - | - | 2 |" in report.to_markdown()
    loaded = json.loads(report.to_json())
    assert loaded["groups"][0]["distance"] == body.distance
    assert loaded["total"]["unanchored"] == ["2.bias", "3.weight", "3.bias"]


def test_tied_parameters_count_once() -> None:
    model = nn.ModuleDict({"in": nn.Embedding(5, 4), "body": nn.Linear(4, 4), "out": nn.Linear(4, 5, bias=False)})
    model["out"].weight = model["in"].weight
    anchor = fastft.Anchor.snapshot(model)
    report = drift_report(model, anchor, groups=["in", "body"])
    assert report.total.elements == 20 + 20


def test_an_anchor_of_zeros_has_no_ratio() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    nn.init.zeros_(model[0].weight)
    nn.init.zeros_(model[0].bias)
    anchor = fastft.Anchor.snapshot(model)
    with torch.no_grad():
        model[0].bias.fill_(3.0)
    drift = drift_report(model, anchor).groups[0]
    assert (drift.distance, drift.relative, drift.cosine) == (pytest.approx(18**0.5), None, None)


def test_the_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    base, model = tuned()
    drift_report(model, fastft.Anchor.snapshot(base.named_parameters(), exclude="0")).plot(tmp_path / "drift.png")
    assert (tmp_path / "drift.png").read_bytes().startswith(b"\x89PNG")


def test_the_report_is_written(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    base, model = tuned()
    report = drift_report(model, fastft.Anchor.snapshot(base.named_parameters(), exclude="0"))
    report.write(tmp_path)
    assert (tmp_path / "report.md").read_text(encoding="utf-8") == report.to_markdown() + "\n"
    assert (tmp_path / "report.json").read_text(encoding="utf-8") == report.to_json() + "\n"
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_errors() -> None:
    _, model = tuned()
    with pytest.raises(TypeError, match=r"anchor: expected a fastft\.Anchor, got dict"):
        drift_report(model, {})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="anchor: holds none of the model's 6 parameters"):
        drift_report(model, fastft.Anchor())
    wrong = fastft.Anchor.snapshot([("2.weight", nn.Parameter(torch.ones(32, 16)))])
    with pytest.raises(ValueError, match=r"2.weight: expected an anchor of shape \[16, 32\], got \[32, 16\]"):
        drift_report(model, wrong)
