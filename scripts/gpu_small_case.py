"""A few small steps with everything on, and the dropout family: what compute-sanitizer watches (gpu_check.sh).

``python scripts/gpu_small_case.py [cuda|cpu]``
"""

from __future__ import annotations

import sys

import torch

import fastft
from fastft.nn.functional import bias_dropout_add, dropout, dropout_add_layer_norm, dropout_add_rms_norm

DEVICE = sys.argv[1] if len(sys.argv) > 1 else "cuda"
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


# dtype, state_dtype, extra_bits, rounding
FEW_BITS = (
    (torch.float32, "8bit", 0, "nearest"),
    (torch.bfloat16, torch.float32, 16, "nearest"),
    (torch.bfloat16, "8bit", 8, "stochastic"),
    (torch.float16, torch.bfloat16, 0, "stochastic"),
)


def main() -> None:
    steps()
    steps_in_few_bits()
    dropouts()


def dropouts() -> None:
    """Forward and backward over rows that are short, odd, and longer than a block takes at once."""
    for dtype in DTYPES:
        for shape in ((3, 5), (33, 768), (7, 4099)):
            x, residual = (torch.randn(shape, device=DEVICE, dtype=dtype, requires_grad=True) for _ in range(2))
            weight, bias = (torch.randn(shape[-1], device=DEVICE, dtype=dtype, requires_grad=True) for _ in range(2))
            for y in (
                dropout(x, 0.3),
                bias_dropout_add(x, bias, residual, 0.3),
                dropout_add_layer_norm(x, residual, shape[-1:], weight, bias, 0.3),
                dropout_add_rms_norm(x, residual, shape[-1:], weight, 0.3),
            ):
                y.sum().backward()
            assert all(t.grad is not None and t.grad.isfinite().all() for t in (x, residual, weight, bias))


def steps() -> None:
    """Three steps over odd sizes, views, masks, several dtypes and groups."""
    for dtype in DTYPES:
        buffer = torch.randn(20_003, device=DEVICE, dtype=dtype)
        params = [
            torch.nn.Parameter(torch.randn(37, 129, device=DEVICE, dtype=dtype)),
            torch.nn.Parameter(buffer[1:]),
            torch.nn.Parameter(torch.randn(8, 32, device=DEVICE, dtype=dtype).t()),
            torch.nn.Parameter(torch.randn((), device=DEVICE, dtype=dtype)),
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
        take_steps(optimizer, params)
        assert optimizer.grad_norm is not None and optimizer.grad_norm.item() > 0.0


def take_steps(optimizer: fastft.AdamW, params: list[torch.nn.Parameter]) -> None:
    """Three, and what a kernel did wrong comes to light."""
    for _ in range(3):
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.step()
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def steps_in_few_bits() -> None:
    """Three steps by lean kernels and by generic ones, with rows that blocks divide and rows that they do not."""
    for dtype, state_dtype, extra_bits, rounding in FEW_BITS:
        for amsgrad in (False, True) if state_dtype != "8bit" else (False,):
            params = [
                torch.nn.Parameter(torch.randn(shape, device=DEVICE, dtype=dtype))
                for shape in ((37, 264), (24, 300), (20_003,), (5, 7))
            ]
            optimizer = fastft.AdamW(
                params,
                lr=1e-3,
                anchor="init",
                anchor_decay=3.0,
                amsgrad=amsgrad,
                state_dtype=state_dtype,
                extra_bits=extra_bits,
                rounding=rounding,
            )
            optimizer.set_update_mask(params[0], torch.arange(37) % 3 > 0)
            optimizer.set_update_mask(params[1], torch.arange(24 * 300).view(24, 300) % 5 > 0)
            take_steps(optimizer, params)
            assert all(p.isfinite().all() for p in params)


if __name__ == "__main__":
    main()
