"""``python scripts/kernel_table.py``: the machine code of each CUDA kernel in numbers, as docs/_generated/kernels.md.

Needs nvcc, nvdisasm and c++filt, no GPU. The table holds registers, spills and shared memory as ptxas counts them, and
the 128-bit accesses to global memory in the machine code. Launch counts are those of the kernels' host build
(tests/cuda_on_cpu). With ``--check`` it writes nothing and fails if the file is not up to date.
"""

from __future__ import annotations

import argparse
import json
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from fastft.tables import markdown

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "docs" / "_generated" / "kernels.md"
SETUP = runpy.run_path(str(ROOT / "setup.py"))


def has_kernels(source: str) -> bool:
    """Whether there is one in the file or in the header of its name."""
    files = (ROOT / source, (ROOT / source).with_suffix(".cuh"))
    return any("__global__" in file.read_text(encoding="utf-8") for file in files if file.exists())


SOURCES: list[str] = [s for s in SETUP["CUDA_SOURCES"] if has_kernels(s)]
ARCHS = ("80", "90", "100")
NVCC: Path | None = SETUP["find_nvcc"]()
NVDISASM: str | None = next(
    (str(tool) for folder in sys.path if (tool := Path(folder) / "nvidia/cu13/bin/nvdisasm").exists()),
    shutil.which("nvdisasm"),
)
CXXFILT = shutil.which("c++filt")
MISSING = [name for name, tool in (("nvcc", NVCC), ("nvdisasm", NVDISASM), ("c++filt", CXXFILT)) if tool is None]

# The last parameter of a template, where it is true.
FLAGS = {"adamw_lean": "masked", "adamw_generic": "selective"}
LAUNCH_HEAD = ("groups", "dtypes", "norm", "launches of a step")
"""A launch count depends on the first three."""


@dataclass(frozen=True)
class Kernel:
    """One kernel as compiled for one architecture."""

    registers: int
    spilled: int
    """Bytes stored and loaded again for want of registers."""
    shared: int
    """Bytes of shared memory a block."""
    accesses: Counter[str]
    """How often each kind of load and store stands in the machine code: {"LDG.E.128": 6, ...}."""

    def wide(self, kind: str) -> int:
        """How many 128-bit global loads (kind "LDG") or stores ("STG")."""
        return sum(count for name, count in self.accesses.items() if re.match(rf"{kind}\b.*\.128\b", name))

    @property
    def local(self) -> list[str]:
        """Loads and stores of local memory, where spills and indexed arrays lie."""
        return [name for name in self.accesses if name.startswith(("LDL", "STL"))]


def compile_kernels(source: str, arch: str) -> dict[str, Kernel]:
    """{"adamw_lean<float, float>": ...} of a source file, in the order of names."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "out.cubin"
        report = ptxas_report(ROOT / source, arch, cubin)
        accesses = memory_instructions(cubin)
    names = dict(zip(report, map(short_name, demangled(list(report))), strict=True))
    kernels = {names[mangled]: Kernel(**counts, accesses=accesses[mangled]) for mangled, counts in report.items()}
    return dict(sorted(kernels.items()))


def ptxas_report(source: Path, arch: str, cubin: Path) -> dict[str, dict[str, int]]:
    """{mangled kernel: {"registers", "spilled", "shared"}}; leaves the machine code in ``cubin``."""
    command = [str(NVCC), *SETUP["NVCC"], "-Xptxas", "-v", "-cubin", f"-arch=sm_{arch}", str(source)]
    result = subprocess.run([*command, "-o", str(cubin)], capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(result.stderr)
    counted = {}
    for part in re.split(r"ptxas info\s+: Compiling entry function ", result.stdout + result.stderr)[1:]:
        name = re.match(r"'(\S+)'", part)
        spilled = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", part)
        registers = re.search(r"Used (\d+) registers", part)
        shared = re.search(r"(\d+) bytes smem", part)
        if not (name and spilled and registers):
            raise RuntimeError(f"cannot read what ptxas says: {part}")
        counted[name[1]] = {
            "registers": int(registers[1]),
            "spilled": int(spilled[1]) + int(spilled[2]),
            "shared": int(shared[1]) if shared else 0,
        }
    return counted


def memory_instructions(cubin: Path) -> dict[str, Counter[str]]:
    """{mangled kernel: {"LDG.E.128": how often, ...}}: the loads and stores in the machine code."""
    code = subprocess.run([str(NVDISASM), "-c", str(cubin)], check=True, capture_output=True, text=True).stdout
    found: dict[str, Counter[str]] = {}
    for function in re.split(r"^\.text\.", code, flags=re.MULTILINE)[1:]:
        name, instructions = function.split(":", 1)
        found[name] = Counter(re.findall(r"\s((?:LDG|STG|LD|ST|LDL|STL)\.\S+)", instructions))
    return found


def demangled(names: list[str]) -> list[str]:
    return subprocess.run(
        [str(CXXFILT)], input="\n".join(names), check=True, capture_output=True, text=True
    ).stdout.splitlines()


def short_name(signature: str) -> str:
    """Without namespaces, arguments and what every name has; kinds of weights and flags in words."""
    name = re.sub(r"(?:fastft|cuda|\(anonymous namespace\))::", "", signature).removeprefix("void ")
    name = re.sub(r"\(.*\)$", "", name)
    name = re.sub(r"Weight<(\w+), ([\w ]+), (\w+)>", lambda weight: weight_name(*weight.groups()), name)
    flag = FLAGS.get(name.split("<")[0], "")
    return re.sub(r", (true|false)>$", lambda last: f", {flag}>" if last[1] == "true" else ">", name)


def weight_name(stored: str, low: str, stochastic: str) -> str:
    """Of a kind of weight in csrc/cuda/adamw_lean.cuh: "bfloat16 + 8 stochastic"."""
    bits = {"void": "", "unsigned char": " + 8", "unsigned short": " + 16"}[low]
    return f"{stored}{bits}{' stochastic' if stochastic == 'true' else ''}"


def compiler_version() -> str:
    """nvcc's, such as "13.0.88"."""
    said = subprocess.run([str(NVCC), "--version"], check=True, capture_output=True, text=True).stdout
    version = re.search(r"V([\d.]+)", said)
    if not version:
        raise RuntimeError(f"cannot read nvcc's version: {said}")
    return version[1]


def launch_counts() -> list[dict[str, int | str]]:
    """Of a step, as the kernels' host build counts them; builds it where it is not there."""
    folder = str(ROOT / "tests")
    if folder not in sys.path:
        sys.path.insert(0, folder)
    from cuda_on_cpu import sanitized

    tree = sanitized.build("cuda-on-cpu")
    done = subprocess.run(
        [sys.executable, str(sanitized.HERE / "launch_counts.py")],
        cwd=tree,
        env=sanitized.environment(tree),
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        raise RuntimeError(done.stderr)
    counts: list[dict[str, int | str]] = json.loads(done.stdout)
    return counts


def kernel_rows(compiled: dict[tuple[str, str], dict[str, Kernel]]) -> list[str]:
    """{(source, arch): kernels} as lines of a Markdown table, one for each kernel."""
    head = ["kernel", *(f"sm_{arch} {what}" for arch in ARCHS for what in ("registers", "shared", "loads/stores"))]
    rows = []
    for source in SOURCES:
        for name in compiled[source, ARCHS[0]]:
            cells = [f"`{name}`"]
            for kernel in (compiled[source, arch][name] for arch in ARCHS):
                spilled = f" + {kernel.spilled} B spilled" if kernel.spilled else ""
                wide = f"{kernel.wide('LDG')}/{kernel.wide('STG')}"
                cells += [f"{kernel.registers}{spilled}", f"{kernel.shared} B", wide]
            rows.append(cells)
    return markdown(head, rows)


def launch_rows(counts: list[dict[str, int | str]]) -> list[str]:
    return markdown(LAUNCH_HEAD, [[str(count[key]) for key in LAUNCH_HEAD] for count in counts], left=3)


def document(compiled: dict[tuple[str, str], dict[str, Kernel]], launches: list[dict[str, int | str]]) -> str:
    """The whole file."""
    worst = max(kernel.spilled for kernels in compiled.values() for kernel in kernels.values())
    return "\n".join(
        [
            "<!-- Made by scripts/kernel_table.py; do not edit. -->",
            "# The CUDA kernels",
            "",
            f"As nvcc {compiler_version()} compiles them: registers a thread, shared memory a block, and how many "
            "128-bit loads/stores of global memory stand in the machine code. Most bytes that a kernel spills: "
            f"{worst}.",
            "",
            *kernel_rows(compiled),
            "",
            "## Launches of an AdamW step",
            "",
            "Counted where the kernels run as host code. Only more tensors or groups than the 32,000 bytes of a "
            "launch's parameters hold need another one.",
            "",
            *launch_rows(launches),
            "",
        ]
    )


def stated_version(text: str) -> str | None:
    """The compiler that a table was made with."""
    version = re.search(r"As nvcc ([\d.]+) compiles", text)
    return version[1] if version else None


def main() -> int:
    arguments = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    arguments.add_argument("--check", action="store_true", help="write nothing; fail if the table is stale")
    check = arguments.parse_args().check
    if MISSING:
        raise SystemExit(f"no {', '.join(MISSING)}")
    compiled = {(source, arch): compile_kernels(source, arch) for source in SOURCES for arch in ARCHS}
    wanted = document(compiled, launch_counts())
    if check:
        if not TABLE.exists() or TABLE.read_text(encoding="utf-8") != wanted:
            print(f"{TABLE} is stale: run python scripts/kernel_table.py", file=sys.stderr)
            return 1
        return 0
    TABLE.parent.mkdir(parents=True, exist_ok=True)
    TABLE.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
