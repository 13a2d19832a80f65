"""The cases under pytest-benchmark: its table shows our step, ``extra_info`` how it compares with torch's."""

from __future__ import annotations

import pytest
import torch
from bench_adamw import CASES, Case, make, measure
from pytest_benchmark.fixture import BenchmarkFixture
from run import result_of

ROUNDS = 15

needs_gpu = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]


@pytest.mark.parametrize("device_type", ["cpu", pytest.param("cuda", marks=needs_gpu)])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_adamw(benchmark: BenchmarkFixture, case: Case, device_type: str) -> None:
    device = torch.device(device_type)
    measured = measure(case, device, rounds=1 if benchmark.disabled else ROUNDS)
    benchmark.extra_info.update(result_of(case, measured, device))
    step, _, _ = make(case, case.subject, device)

    def finished_step() -> None:
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    benchmark.pedantic(finished_step, rounds=ROUNDS, iterations=measured.calls[case.subject], warmup_rounds=1)
