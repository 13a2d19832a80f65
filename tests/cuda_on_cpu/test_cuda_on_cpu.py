"""The CUDA kernels on a machine without a GPU: compiled as host code, under AddressSanitizer and UBSan.

Over them run their own tests (kernel_tests.py), the numerical tests of the optimizer and of dropout with one case for
each value of each axis, and programs that show that mistakes are found (native/misuse.cpp).
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch
from cuda_on_cpu import sanitized
from cuda_on_cpu.kernel_cases import CASES

KIND = "cuda-on-cpu"
EXAMPLES = "4"  # for hypothesis: a step takes some twenty times as long
NUMERICS = (
    "tests/optim/test_adamw_numerics.py",
    "tests/optim/test_masks.py",
    "tests/nn/test_dropout_kernels.py",
)
# What says nothing about the kernels that their own tests do not.
LEFT_OUT = (
    # What the fifty steps do, in short.
    "test_a_few_steps_against_the_reference",
    # Twenty thousand blocks; another_launch and many-groups have as many tensors and groups as matter.
    "test_thousands_of_tensors_in_hundreds_of_groups",
    # Two thousand million elements take more than a minute.
    "test_more_elements_than_32_bits_count",
)


def what_is_missing() -> str | None:
    try:
        sanitized.sanitizer_libraries()
    except (OSError, subprocess.CalledProcessError) as error:
        return str(error)
    return None


MISSING = what_is_missing()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(MISSING is not None, reason=f"no compiler with sanitizers: {MISSING}"),
]


@pytest.fixture(scope="session")
def tree() -> Path:
    """The build, as a folder to import fastft from."""
    return sanitized.build(KIND)


def run_pytest(tree: Path, *arguments: str, **variables: str) -> str:
    """The output of pytest over the build; fails, showing it, unless all tests passed and none was skipped."""
    done = subprocess.run(
        sanitized.pytest_command(*arguments),
        cwd=tree,
        env={**sanitized.environment(tree), **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode != 0 or " passed" not in done.stdout:
        pytest.fail(f"exit status {done.returncode}\n{done.stdout[-20000:]}", pytrace=False)
    return done.stdout


def test_kernels(tree: Path, tmp_path: Path) -> None:
    expected = tmp_path / "expected.pt"
    torch.save({name: case() for name, case in CASES.items()}, expected)
    output = run_pytest(tree, str(sanitized.HERE / "kernel_tests.py"), FASTFT_EXPECTED=str(expected))
    assert " skipped" not in output


def test_numerics(tree: Path) -> None:
    files = [str(sanitized.ROOT / path) for path in NUMERICS]
    left_out = " and ".join(f"not {name}" for name in LEFT_OUT)
    run_pytest(tree, *files, "--one-per-axis", "-k", left_out, FASTFT_TEST_EXAMPLES=EXAMPLES)


def run_program(tree: Path, name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(tree / "objects" / "kernels" / name), *arguments],
        env={**os.environ, **sanitized.OPTIONS},
        capture_output=True,
        text=True,
    )


def test_chunks_beyond_32_bits(tree: Path) -> None:
    done = run_program(tree, "far_chunks")
    assert (done.returncode, done.stdout, done.stderr) == (0, "ok\n", "")


# What the program says of each mistake in misuse.cpp; "" for the kernel that has none.
MISTAKES = {
    "correct": "",
    "exits before barrier": "a thread exited while others wait at a barrier",
    "waits at two barriers": "threads of a block wait at different barriers",
    "shuffles half a warp": "a shuffle, and a thread of its warp waits at a barrier",
    "shuffles after exit": "a shuffle, and a thread of its warp has exited",
    "shuffles with a partial mask": "a shuffle that is not by the whole warp",
    "shuffles in two places": "the threads of a warp are in different shuffles",
    "reads shared memory unwritten": "not a valid value for type 'bool'",
    "lacks a barrier": "a wrong result",
    "draws its ticket too early": "a wrong result",
    "reads past the end": "AddressSanitizer: heap-buffer-overflow",
    "reads a host vector": "AddressSanitizer: use-after-poison",
    "reads its host parameter": "AddressSanitizer: use-after-poison",
    "reads misaligned": "misaligned address",
    "overruns an array of its own": "AddressSanitizer: stack-buffer-overflow",
    "launches no block": "CUDA error in launch_with: invalid configuration argument",
    "launches half a warp": "a shuffle in a warp with fewer than 32 threads",
    "launches too many threads": "CUDA error in launch_with: invalid configuration argument",
    "takes too much": "CUDA error in takes_too_much: invalid argument",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_found(tree: Path, mistake: str) -> None:
    done = run_program(tree, "misuse", mistake)
    assert MISTAKES[mistake] in done.stderr
    assert (done.returncode == 0) == (mistake == "correct"), done.stderr


def test_a_build_that_runs_something_else_is_refused(tree: Path, tmp_path: Path) -> None:
    path = os.pathsep.join([str(sanitized.ROOT), str(sanitized.HERE.parent)])  # the checkout's own module
    done = subprocess.run(
        sanitized.pytest_command(str(sanitized.HERE / "kernel_tests.py")),
        cwd=tmp_path,
        env={**sanitized.environment(tree), "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert "expected kernel_devices ('cpu',)" in done.stdout + done.stderr
