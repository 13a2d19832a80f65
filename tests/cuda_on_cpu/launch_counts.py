"""Prints how many kernels an AdamW step launches, as JSON. Runs over the host build of the kernels (sanitized.py)."""

from __future__ import annotations

import itertools
import json

import torch
from cuda_on_cpu.kernel_cases import COMBINATIONS
from torch import nn

import fastft

CPU = (1, 0)  # the DLPack device
GROUPS = (1, 2, 100, 400)
DTYPES = (torch.float32,), (torch.float32, torch.bfloat16), tuple({param: None for param, _ in COMBINATIONS})


def launches(groups: int, dtypes: tuple[torch.dtype, ...], max_grad_norm: float | None) -> int:
    """Of the first step over a small parameter of each dtype in each group."""
    params = [[nn.Parameter(torch.ones(8, dtype=dtype)) for dtype in dtypes] for _ in range(groups)]
    optimizer = fastft.AdamW(
        [{"params": ps, "lr": 1e-3 / (1 + i)} for i, ps in enumerate(params)], max_grad_norm=max_grad_norm
    )
    for p in itertools.chain(*params):
        p.grad = torch.ones_like(p)
    optimizer.step()
    return sum(part.plan.launches(CPU) for part in optimizer._parts)


def main() -> None:
    rows = []
    for groups, dtypes, norm in itertools.product(GROUPS, DTYPES, (None, 1.0)):
        if groups > 2 and len(dtypes) > 1:
            continue
        rows.append(
            {
                "groups": groups,
                "dtypes": ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes),
                "norm": "no" if norm is None else "yes",
                "launches of a step": launches(groups, dtypes, norm),
            }
        )
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
