"""A few small steps with everything on, for compute-sanitizer to watch (scripts/gpu_check.sh)."""

from __future__ import annotations

import torch

import fastft


def main() -> None:
    """Three steps over odd sizes, views, masks, several dtypes and groups."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        buffer = torch.randn(20_003, device="cuda", dtype=dtype)
        params = [
            torch.nn.Parameter(torch.randn(37, 129, device="cuda", dtype=dtype)),
            torch.nn.Parameter(buffer[1:]),
            torch.nn.Parameter(torch.randn(8, 32, device="cuda", dtype=dtype).t()),
            torch.nn.Parameter(torch.randn((), device="cuda", dtype=dtype)),
        ]
        optimizer = fastft.AdamW(
            [{"params": params[:2]}, {"params": params[2:], "anchor_mode": "l2"}],
            lr=1e-2,
            weight_decay=0.1,
            amsgrad=True,
            anchor="init",
            anchor_decay=3.0,
            max_grad_norm=0.5,
            skip_nonfinite=True,
        )
        optimizer.set_update_mask(params[0], torch.arange(37) % 3 > 0)
        optimizer.set_update_mask(params[1], torch.arange(20_002) % 5 > 0)
        for _ in range(3):
            for p in params:
                p.grad = torch.randn_like(p)
            optimizer.step()
        torch.cuda.synchronize()
        assert optimizer.grad_norm is not None and optimizer.grad_norm.item() > 0.0


if __name__ == "__main__":
    main()
