"""What the compilers made of the code: registers and spills of each kernel, and what the module links to."""

from __future__ import annotations

import re
import runpy
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from fastft import _C

ROOT = Path(__file__).resolve().parent.parent
SETUP = runpy.run_path(str(ROOT / "setup.py"))
NVCC = SETUP["find_nvcc"]()
NVDISASM = next(
    (str(tool) for folder in sys.path if (tool := Path(folder) / "nvidia/cu13/bin/nvdisasm").exists()),
    shutil.which("nvdisasm"),
)
# Four blocks of 256 threads to a multiprocessor; three on Blackwell.
MOST_REGISTERS = {"80": 64, "90": 64, "100": 80, "120": 80}


def ptxas_report(source: Path, arch: str, folder: Path) -> dict[str, dict[str, int]]:
    """{kernel: {"registers", "spilled"}} as ptxas counts them; leaves out.cubin."""
    command = [str(NVCC), *SETUP["NVCC"], "-Xptxas", "-v", "-cubin", f"-arch=sm_{arch}", str(source)]
    result = subprocess.run([*command, "-o", str(folder / "out.cubin")], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    counted = {}
    for part in re.split(r"ptxas info\s+: Compiling entry function ", result.stdout + result.stderr)[1:]:
        name = re.match(r"'(\S+)'", part)
        spilled = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", part)
        registers = re.search(r"Used (\d+) registers", part)
        assert name and spilled and registers, part
        counted[name[1]] = {"registers": int(registers[1]), "spilled": int(spilled[1]) + int(spilled[2])}
    return counted


def number_of_kernels(source: str) -> int:
    """Three kernels for each row of the table of dtype combinations, or one for each dtype, and those of no template.

    The three are for the kinds of anchors; what comes after them, as for dropout, is for each dtype.
    """
    text = (ROOT / source).read_text(encoding="utf-8")
    rows = re.findall(r"^\s+\{DType::\w+, DType::\w+, \w+<", text, re.MULTILINE)
    stored = re.findall(r"^template <typename (?:Stored|Param)>\n__global__", text, re.MULTILINE)
    computed = re.findall(r"^template <typename T>\n__global__", text, re.MULTILINE)
    plain = re.findall(r"(?<!>\n)^__global__", text, re.MULTILINE)
    return 3 * len(rows) + 4 * len(stored) + 2 * len(computed) + len(plain)


def most_registers(kernel: str, arch: str) -> int:
    if "kernelId" in kernel:  # float64, for which two blocks must do
        return 128
    if "norm_grad_kernelINS" in kernel:  # dropout's, in 16 bits: three blocks
        return 80
    # With an importance in float64, and with the sums of selective projection: three blocks.
    if re.search(r"adamw_step(Idd.*AnchoringE2|.*AnchoringE3)E", kernel):
        return 80
    return MOST_REGISTERS[arch]


@pytest.mark.skipif(NVCC is None, reason="no nvcc")
@pytest.mark.parametrize("arch", MOST_REGISTERS)
@pytest.mark.parametrize("source", SETUP["CUDA_SOURCES"])
def test_kernels_fit_the_registers_and_spill_nothing(source: str, arch: str, tmp_path: Path) -> None:
    kernels = ptxas_report(ROOT / source, arch, tmp_path)
    assert len(kernels) == number_of_kernels(source) >= 2
    for name, counts in kernels.items():
        assert counts["registers"] <= most_registers(name, arch), (name, counts)
        assert counts["spilled"] == 0, (name, counts)


def memory_instructions(cubin: Path, nvdisasm: str) -> dict[str, Counter[str]]:
    """{kernel: {"LDG.E.128": how often, ...}}: the loads and stores in the machine code."""
    code = subprocess.run([nvdisasm, "-c", str(cubin)], check=True, capture_output=True, text=True).stdout
    found: dict[str, Counter[str]] = {}
    for function in re.split(r"^\.text\.", code, flags=re.MULTILINE)[1:]:
        name, instructions = function.split(":", 1)
        found[name] = Counter(re.findall(r"\s((?:LDG|STG|LD|ST|LDL|STL)\.\S+)", instructions))
    return found


@pytest.mark.skipif(NVCC is None or NVDISASM is None, reason="no nvcc or no nvdisasm")
def test_kernels_access_memory_sixteen_bytes_at_a_time(tmp_path: Path) -> None:
    ptxas_report(ROOT / "csrc/cuda/adamw.cu", "90", tmp_path)
    for name, counts in memory_instructions(tmp_path / "out.cubin", NVDISASM).items():
        if "adamw_step" in name:  # parameter and both moments, there and back
            assert counts["LDG.E.128"] >= 3 and counts["STG.E.128"] >= 3, (name, counts)
        else:
            assert counts["LDG.E.128"] >= 1, (name, counts)
        assert not [kind for kind in counts if kind.startswith(("LDL", "STL"))], (name, counts)
        assert not [kind for kind in counts if kind in ("LD.E.128", "ST.E.128")], (name, counts)


@pytest.mark.skipif(shutil.which("readelf") is None, reason="no readelf")
def test_the_module_links_neither_torch_nor_cuda() -> None:
    dynamic = subprocess.run(["readelf", "-d", _C.__file__], check=True, capture_output=True, text=True).stdout
    needed = re.findall(r"\(NEEDED\).*\[(.+?)\]", dynamic)
    assert needed
    assert not [name for name in needed if re.search("torch|c10|cuda|nv|gomp|omp", name)]


@pytest.mark.skipif(shutil.which("nm") is None, reason="no nm")
def test_the_module_exports_its_initialiser_alone() -> None:
    symbols = subprocess.run(
        ["nm", "-D", "--defined-only", _C.__file__], check=True, capture_output=True, text=True
    ).stdout
    exported = {line.split()[-1] for line in symbols.splitlines()}
    assert "PyInit__C" in exported
    # The C++ library's own templates are weak and may be shared; nothing of ours may be seen.
    assert not [name for name in exported if "fastft" in name or "cuda" in name]
