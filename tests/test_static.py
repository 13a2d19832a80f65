"""The CUDA kernels as compiled: registers, spills, wide accesses, and whether the table of them is true.

No GPU is needed. Tools and table are scripts/kernel_table.py's.
"""

from __future__ import annotations

import re
import runpy
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from cuda_on_cpu import sanitized

ROOT = Path(__file__).resolve().parent.parent
STATIC = runpy.run_path(str(ROOT / "scripts" / "kernel_table.py"))
# Four blocks of 256 threads to a multiprocessor; three on Blackwell.
MOST_REGISTERS = {"80": 64, "90": 64, "100": 80, "120": 80}
# 128-bit loads and stores that a kernel must have.
WIDE = {
    "adamw_lean": (2, 2),  # both moments, there and back; see wide_accesses()
    "adamw_generic": (0, 0),  # an element at a time
    "grad_sum_of_squares": (1, 0),
    "selective_project": (0, 0),
    "bias_dropout_add_kernel": (1, 1),
    "bias_dropout_add_backward_kernel": (1, 0),
    "dropout_add_norm_kernel": (1, 1),
    "dropout_add_norm_backward_kernel": (1, 1),
    "dropout_add_norm_weight_backward_kernel": (1, 0),
    "part_sums_kernel": (0, 0),  # a column a thread
}

pytestmark = pytest.mark.slow
needs_compiler = pytest.mark.skipif(bool(STATIC["MISSING"]), reason=f"no {', '.join(STATIC['MISSING'])}")


@cache
def compiled(source: str, arch: str) -> dict[str, Any]:
    kernels: dict[str, Any] = STATIC["compile_kernels"](source, arch)
    return kernels


def number_of_kernels(source: str) -> int:
    """Two for each lean kind (without and with masks), or one for each dtype, and those of no template."""
    text = (ROOT / source).read_text(encoding="utf-8")
    lean = re.findall(r"^\s+lean<\w+, \w+>\(", text, re.MULTILINE)
    stored = re.findall(r"^template <typename Stored>\n__global__", text, re.MULTILINE)
    computed = re.findall(r"^template <typename T>\n__global__", text, re.MULTILINE)
    selective = re.findall(r"^template <typename T, bool kSelective>\n__global__", text, re.MULTILINE)
    plain = re.findall(r"(?<!>\n)^__global__", text, re.MULTILINE)
    return 2 * len(lean) + 4 * len(stored) + 2 * len(computed) + 4 * len(selective) + len(plain)


def most_registers(kernel: str, arch: str) -> int:
    if "kernel<double>" in kernel:  # for which two blocks must do
        return 128
    # Two blocks, on Blackwell also without low bits.
    if re.fullmatch(r"adamw_lean<.* stochastic, Codes.*>", kernel) and ("+ 8" in kernel or int(arch) >= 100):
        return 128
    if re.fullmatch(r"adamw_lean<.* \+ 16, Codes.*>", kernel) and int(arch) >= 100:
        return 128
    # Three blocks: moments in 8 bits, random bits; and what is no common case.
    three = r"adamw_lean<.*(stochastic|Codes).*>|(adamw_generic|selective_project)<.*>"
    if re.fullmatch(rf"dropout_add_norm_backward_kernel<b?float16>|{three}", kernel):
        return 80
    return MOST_REGISTERS[arch]


def wide_accesses(kernel: str) -> tuple[int, int]:
    """128-bit loads and stores that a kernel must have.

    Beside the moments, or in place of them where they are codes, the weights of a lean kernel; but those of 16 bits
    with float32 moments, of which a thread takes four.
    """
    loads, stores = WIDE[kernel.split("<")[0]]
    if kernel.startswith("adamw_lean"):
        weight, moment = re.findall(r"[^<>,]+", kernel)[1:3]
        codes, four = "Codes" in moment, moment.strip() == "float" and weight != "float" and "stochastic" not in weight
        if codes:
            return 2, 1
        if moment.strip() == "bfloat16" and weight == "float":
            return 2, 1
        return (2, 2) if four else (4, 3)
    return loads, stores


@needs_compiler
@pytest.mark.parametrize("arch", MOST_REGISTERS)
@pytest.mark.parametrize("source", STATIC["SOURCES"])
def test_kernels_fit_the_registers_and_spill_nothing(source: str, arch: str) -> None:
    kernels = compiled(source, arch)
    assert len(kernels) == number_of_kernels(source) >= 2
    for name, kernel in kernels.items():
        assert kernel.registers <= most_registers(name, arch), (name, kernel)
        assert kernel.spilled == 0 and not kernel.local, (name, kernel)


@needs_compiler
@pytest.mark.parametrize("arch", MOST_REGISTERS)
@pytest.mark.parametrize("source", STATIC["SOURCES"])
def test_kernels_access_global_memory_sixteen_bytes_at_a_time(source: str, arch: str) -> None:
    for name, kernel in compiled(source, arch).items():
        loads, stores = wide_accesses(name)
        assert kernel.wide("LDG") >= loads and kernel.wide("STG") >= stores, (name, kernel)
        # Generic ones would have to find out at run time where they lead.
        assert not [kind for kind in kernel.accesses if re.match(r"(LD|ST)\.E\.128", kind)], (name, kernel)


@needs_compiler
def test_the_table_of_kernels_is_true() -> None:
    written = STATIC["TABLE"].read_text(encoding="utf-8")
    made_with, here = STATIC["stated_version"](written), STATIC["compiler_version"]()
    if made_with != here:
        pytest.skip(f"the table was made with nvcc {made_with}, here is {here}")
    rows = STATIC["kernel_rows"]({(s, a): compiled(s, a) for s in STATIC["SOURCES"] for a in STATIC["ARCHS"]})
    assert "\n".join(rows) in written, "stale: run python scripts/kernel_table.py"


def test_the_table_of_launches_is_true() -> None:
    try:
        sanitized.sanitizer_libraries()
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no compiler with sanitizers: {error}")
    rows = STATIC["launch_rows"](STATIC["launch_counts"]())
    written = STATIC["TABLE"].read_text(encoding="utf-8")
    assert written.endswith("\n".join([*rows, ""])), "stale: run python scripts/kernel_table.py"
