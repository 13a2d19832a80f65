"""The cases under pytest-benchmark: its table shows ours, ``extra_info`` how it compares with the others.

``python -m pytest benchmarks -k plain``; some minutes for all.
"""

from __future__ import annotations

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from fastft.commands.bench import CASES, FASTFT, Case, measure, result_of, why_not

ROUNDS = 15

needs_gpu = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]


@pytest.mark.parametrize("device_type", ["cpu", pytest.param("cuda", marks=needs_gpu)])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_case(benchmark: BenchmarkFixture, case: Case, device_type: str) -> None:
    device = torch.device(device_type)
    if reason := why_not(case, device, quick=False):
        pytest.skip(reason)
    measured, ready = measure(case, device, rounds=1 if benchmark.disabled else ROUNDS)
    benchmark.extra_info.update(result_of(case, measured, ready, device))
    work = ready.works[FASTFT]

    def finished() -> None:
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    benchmark.pedantic(finished, rounds=ROUNDS, iterations=measured.calls[FASTFT], warmup_rounds=1)
