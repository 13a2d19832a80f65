"""Builds fastft._C: one torch-free module with the CPU loops and, where nvcc is found, the CUDA kernels.

Environment: FASTFT_CUDA=0|1 (1: fail without nvcc; unset: CUDA where nvcc is found), CUDA_HOME,
FASTFT_CUDA_ARCHS ("75;80;90", default below), MAX_JOBS, FASTFT_CXXFLAGS, FASTFT_LDFLAGS (added at the end).
"""

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
ARCHS = "75;80;86;89;90;100;120"  # machine code for each, PTX for the last
SOURCES = ["csrc/module.cpp", "csrc/adamw_plan.cpp", "csrc/adamw_record.cpp", "csrc/dropout_ops.cpp"]
SOURCES += ["csrc/torch_access.cpp", "csrc/cpu/adamw.cpp", "csrc/cpu/dropout.cpp"]
KERNELS = ["csrc/cpu/adamw_kernels.cpp", "csrc/cpu/dropout_kernels.cpp"]  # compiled once per instruction set
CUDA_SOURCES = ["csrc/cuda/adamw.cu", "csrc/cuda/adamw_lean.cu", "csrc/cuda/adamw_generic.cu", "csrc/cuda/dropout.cu"]

# No reassociation, no contraction: CPU and GPU give the same bits (csrc/math/hd.h).
CXX = ["-std=c++17", "-O3", "-DNDEBUG", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-ffp-contract=off"]
LOOPS = ["-fno-math-errno", "-fno-trapping-math", "-Wno-unknown-pragmas"]
# Each kernel's parameters take 32 KB of zeros in the file, which compress to nothing.
NVCC = ["-std=c++17", "-O3", "-fmad=false", "--compress-mode=size", "-Xcompiler", "-fPIC,-fvisibility=hidden"]


def instruction_sets() -> dict[str, list[str]]:
    sets: dict[str, list[str]] = {"baseline": []}
    if platform.machine() in ("x86_64", "AMD64"):
        sets["v3"] = ["-mavx2", "-mfma", "-mf16c", "-mbmi", "-mbmi2", "-mlzcnt"]
        # GCC 12 takes what its own AVX-512 header leaves undefined on purpose for a mistake.
        quiet = ["-Wno-maybe-uninitialized"]
        wide = ["-mavx512f", "-mavx512bw", "-mavx512cd", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
        sets["v4"] = [*sets["v3"], *wide, *quiet]
    return sets


def find_nvcc() -> Path | None:
    """The compiler from CUDA_HOME, else from the build requirements, else from PATH."""
    if home := os.environ.get("CUDA_HOME"):
        return Path(home) / "bin" / "nvcc"
    for folder in sys.path:
        if (nvcc := Path(folder) / "nvidia" / "cu13" / "bin" / "nvcc").exists():
            nvcc.chmod(0o755)
            return nvcc
    found = shutil.which("nvcc")
    return Path(found).resolve() if found else None


class BuildWithNinja(build_ext):
    """One extension, its objects compiled in parallel by ninja."""

    def build_extension(self, ext: Extension) -> None:
        import ninja
        import pybind11
        from ninja.ninja_syntax import Writer

        cuda = self.cuda_home()
        out = Path(self.build_temp).absolute()
        out.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(ext.name)).absolute()
        target.parent.mkdir(parents=True, exist_ok=True)
        extra = os.environ.get("FASTFT_CXXFLAGS", "").split()
        archs = os.environ.get("FASTFT_CUDA_ARCHS", ARCHS).replace(",", ";").split(";") if cuda else []
        defines = [
            f'-DFASTFT_VERSION="{self.distribution.get_version()}"',
            f"-DFASTFT_WITH_CUDA={int(bool(cuda))}",
            f'-DFASTFT_CUDA_ARCHS="{" ".join(archs)}"',
        ]
        includes = [f"-isystem{path}" for path in (pybind11.get_include(), sysconfig.get_path("include"))]
        with open(out / "build.ninja", "w") as file:
            n = Writer(file, width=10_000)
            n.rule("cxx", f"{self.cxx()} -MMD -MF $out.d $flags -c $in -o $out", depfile="$out.d", deps="gcc")
            n.rule("nvcc", "$nvcc -MMD -MF $out.d $flags -c $in -o $out", depfile="$out.d", deps="gcc")
            n.rule("link", f"{self.cxx()} -shared $in -o $out $flags")
            objects = []

            def compile(rule: str, source: str, name: str, flags: list[str]) -> None:
                objects.append(f"{name}.o")
                n.build(f"{name}.o", rule, str(ROOT.absolute() / source), variables={"flags": shlex.join(flags)})

            for source in SOURCES:
                compile("cxx", source, Path(source).as_posix().replace("/", "_"), CXX + defines + includes + extra)
            for source in KERNELS:
                for name, flags in instruction_sets().items():
                    stem = Path(source).stem.removesuffix("_kernels")
                    chosen = [f"-DFASTFT_KERNELS={stem}_{name}", f'-DFASTFT_INSTRUCTION_SET="{name}"']
                    compile("cxx", source, f"{stem}_{name}", CXX + LOOPS + flags + chosen + extra)
            links = ["-Wl,--exclude-libs,ALL", "-ldl"]
            if cuda:
                n.variable("nvcc", str(cuda / "bin" / "nvcc"))
                codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
                codes.append(f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}")
                for source in CUDA_SOURCES:
                    compile("nvcc", source, f"cuda_{Path(source).stem}", [*NVCC, "--threads=2", *codes])
                library = next(p for p in (cuda / "lib64", cuda / "lib") if (p / "libcudart_static.a").exists())
                links += [str(library / "libcudart_static.a"), "-lrt", "-lpthread"]
            links += os.environ.get("FASTFT_LDFLAGS", "").split()
            n.build(str(target), "link", objects, variables={"flags": " ".join(links)})
        jobs = ["-j", os.environ["MAX_JOBS"]] if "MAX_JOBS" in os.environ else []
        subprocess.check_call([str(Path(ninja.BIN_DIR) / "ninja"), "-C", str(out), *jobs, str(target)])

    @staticmethod
    def cxx() -> str:
        return os.environ.get("CXX", "c++")

    @staticmethod
    def cuda_home() -> Path | None:
        wanted = os.environ.get("FASTFT_CUDA")
        if wanted not in (None, "", "0", "1"):
            raise SystemExit(f"FASTFT_CUDA: expected 0 or 1, got {wanted!r}")
        nvcc = None if wanted == "0" else find_nvcc()
        if nvcc is not None and nvcc.exists():
            print(f"fastft: building CUDA code with {nvcc}", file=sys.stderr)
            return nvcc.parent.parent
        if wanted == "1":
            raise SystemExit("FASTFT_CUDA=1, but no nvcc in CUDA_HOME, the build requirements or PATH")
        print("fastft: no nvcc found (or FASTFT_CUDA=0): building WITHOUT CUDA code", file=sys.stderr)
        return None


if __name__ == "__main__":  # the tests import this file for what it builds with
    setup(ext_modules=[Extension("fastft._C", sources=[])], cmdclass={"build_ext": BuildWithNinja})
