"""Test an installed fastft: run it with the Python that fastft was installed into, outside the source tree."""

from __future__ import annotations

from pathlib import Path

import torch

import fastft
from fastft import _C


def main() -> None:
    """Import, and step a small model as torch does, plain and with everything on."""
    here = Path(__file__).resolve().parent.parent
    assert here not in Path(fastft.__file__).resolve().parents, f"imported the source tree: {fastft.__file__}"
    assert _C.version == fastft.__version__

    torch.manual_seed(0)
    ours, torchs = (torch.nn.Linear(37, 11) for _ in range(2))
    torchs.load_state_dict(ours.state_dict())
    optimizers = [
        fastft.AdamW(ours.parameters(), lr=1e-2, weight_decay=0.1),
        torch.optim.AdamW(torchs.parameters(), lr=1e-2, weight_decay=0.1),
    ]
    inputs = torch.randn(5, 37)
    for _ in range(10):
        for model, optimizer in zip((ours, torchs), optimizers, strict=True):
            optimizer.zero_grad()
            model(inputs).square().mean().backward()
            optimizer.step()
    for p, q in zip(ours.parameters(), torchs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)

    start = {name: p.detach().clone() for name, p in ours.named_parameters()}
    anchored = fastft.AdamW(
        ours.named_parameters(), lr=1e-2, weight_decay=0.1, anchor="init", anchor_decay=10.0, max_grad_norm=1e-3
    )
    rows = torch.arange(11) % 2 == 0
    anchored.set_update_mask(ours.weight, rows)
    ours(inputs).square().mean().backward()
    anchored.step()
    moved = ours.weight != start["weight"]
    assert moved[rows].any() and not moved[~rows].any()
    assert anchored.grad_norm is not None and anchored.grad_norm > 0
    print(f"fastft {fastft.__version__} under torch {torch.__version__}: the installed package works")


if __name__ == "__main__":
    main()
