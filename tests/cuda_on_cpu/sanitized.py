"""Builds fastft's compiled module with AddressSanitizer and UBSan, and runs Python over it.

``cpu`` is the module as setup.py builds it without CUDA; FASTFT_CPU_CAPABILITY chooses its loops. ``cuda-on-cpu``
sends CPU tensors through the CUDA kernels, compiled as host code over the shim beside this file. Each lies in a tree of
its own under build/, beside links to the Python sources; the module that is installed is never touched.

    python tests/cuda_on_cpu/sanitized.py cpu tests/optim/test_masks.py -x

A test takes some ten times as long here: ``--one-per-axis`` runs one case for each value of each axis.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import runpy
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
BUILDS = ROOT / "build" / "sanitized"
CXX = os.environ.get("CXX", "c++")
KINDS = ("cpu", "cuda-on-cpu")
LIBRARY = "libfastft_kernels.so"

SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
# Behind setup.py's own flags, so these count; with pybind11's assertions.
FLAGS = [*SANITIZE, "-O1", "-g1", "-UNDEBUG", "-U_FORTIFY_SOURCE", "-fno-lto"]
ON_CPU = ["-UFASTFT_WITH_CUDA", "-DFASTFT_WITH_CUDA=1", "-DFASTFT_CUDA_ON_CPU=1"]
# The host code's allocations go through operator_new.cpp, and only the host code's.
ON_CPU_LINKS = ["-Lkernels", "-lfastft_kernels", "kernels/operator_new.o", "-Wl,-Bsymbolic", "'-Wl,-rpath,$$ORIGIN'"]

OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0:alloc_dealloc_mismatch=0:"
    "allocator_may_return_null=1:abort_on_error=0:exitcode=99",
    "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
}


def sanitizer_libraries() -> list[str]:
    """Libraries to preload: AddressSanitizer, and the C++ library whose throw it intercepts."""
    names = ("libasan.so", "libubsan.so", "libstdc++.so.6")
    paths = [subprocess.check_output([CXX, f"-print-file-name={name}"], text=True).strip() for name in names]
    missing = [name for name, path in zip(names, paths, strict=True) if not os.path.isabs(path)]
    if missing:
        raise FileNotFoundError(f"{CXX} has no {', '.join(missing)}: install its sanitizer libraries")
    return [os.path.realpath(path) for path in (paths[0], paths[2])]


def sources(kind: str) -> list[Path]:
    """All that the build of this kind is made from."""
    folders = [ROOT / "csrc", *([HERE / "shim", HERE / "native"] if kind == "cuda-on-cpu" else [])]
    return [ROOT / "setup.py", Path(__file__), *sorted(p for f in folders for p in f.rglob("*") if p.is_file())]


def fingerprint(kind: str) -> str:
    """Changes whenever a build of this kind would."""
    digest = hashlib.sha256()
    for path in sources(kind):
        digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    compiler = subprocess.check_output([CXX, "--version"], text=True)
    digest.update(f"{compiler}{sys.version}{kernel_flags()}{sys.prefix}".encode())
    return digest.hexdigest()


def kernel_flags() -> list[str]:
    """For the kernels as host code."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return []
    # A kernel's parameter, 32 KB, is copied for each thread: not by a call that checks each of its bytes.
    flags = ["-mmemcpy-strategy=rep_8byte:-1:noalign"]
    # Fused multiply-add where the CPU loops choose it, for the same bits.
    known = Path("/proc/cpuinfo").read_text(encoding="utf-8").split()
    return [*flags, "-mavx2", "-mfma"] if {"avx2", "fma"} <= set(known) else flags


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One build at a time."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def build(kind: str) -> Path:
    """The folder to put on the path for ``import fastft``; compiles what has changed."""
    sanitizer_libraries()  # says what is missing, where the compiler's error would not
    tree = BUILDS / kind
    with locked(tree):
        stamp = tree / "fingerprint"
        wanted = fingerprint(kind)
        if not stamp.exists() or stamp.read_text() != wanted:
            stamp.unlink(missing_ok=True)
            temp = tree / "objects"
            flags, links = list(FLAGS), list(SANITIZE)
            if kind == "cuda-on-cpu":
                build_kernels(temp / "kernels")
                flags += ON_CPU
                links += ON_CPU_LINKS
            environment = {"FASTFT_CUDA": "0", "FASTFT_CXXFLAGS": " ".join(flags), "FASTFT_LDFLAGS": " ".join(links)}
            command = [sys.executable, "setup.py", "build_ext", "--build-lib", str(tree), "--build-temp", str(temp)]
            run_loudly(command, {**os.environ, **environment})
            if kind == "cuda-on-cpu":
                replace_link(tree / "fastft" / LIBRARY, temp / "kernels" / LIBRARY)
            stamp.write_text(wanted)
        for path in (ROOT / "fastft").iterdir():
            if path.suffix != ".so" and path.name != "__pycache__":
                replace_link(tree / "fastft" / path.name, path)
    return tree


def build_kernels(folder: Path) -> None:
    """csrc/cuda and the shim as a shared library; thread-local memory in it is the kernels' shared memory."""
    from ninja import BIN_DIR
    from ninja.ninja_syntax import Writer

    setup = runpy.run_path(str(ROOT / "setup.py"))
    folder.mkdir(parents=True, exist_ok=True)
    flags = [f for f in setup["CXX"] if f != "-fvisibility=hidden"]
    flags += ["-Wno-unknown-pragmas", f"-I{HERE / 'shim'}"]
    with open(folder / "build.ninja", "w") as file:
        n = Writer(file, width=10_000)
        compile = f"{CXX} {' '.join(flags)} $more -MMD -MF $out.d -x c++ -c $in -o $out"
        n.rule("cxx", compile, depfile="$out.d", deps="gcc")
        n.rule("link", f"{CXX} -shared $in -o $out {' '.join(SANITIZE)} -Wl,-Bsymbolic")
        n.rule("program", f"{CXX} $in -o $out {' '.join(SANITIZE)}")
        kernels, shim = [ROOT / s for s in setup["CUDA_SOURCES"]], sorted((HERE / "shim").glob("*.cpp"))
        for path in kernels:
            n.build(f"{path.stem}.o", "cxx", str(path), variables={"more": " ".join([*FLAGS, *kernel_flags()])})
        for path in shim:  # what finds faults need not be searched for them, and is called all the time
            n.build(f"{path.stem}.o", "cxx", str(path), variables={"more": "-O2 -g1"})
        n.build(LIBRARY, "link", [f"{path.stem}.o" for path in kernels + shim])
        for path in sorted((HERE / "native").glob("*.cpp")):  # programs over the shim alone
            n.build(f"{path.stem}.o", "cxx", str(path), variables={"more": " ".join([*FLAGS, *kernel_flags()])})
            n.build(path.stem, "program", [f"{path.stem}.o", *(f"{other.stem}.o" for other in shim)])
    run_loudly([str(Path(BIN_DIR) / "ninja"), "-C", str(folder)], dict(os.environ))


def run_loudly(command: Sequence[str], environment: dict[str, str]) -> None:
    """Run, and show the output only where it fails."""
    done = subprocess.run(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout}")


def replace_link(link: Path, target: Path) -> None:
    if link.is_symlink() and link.readlink() == target:
        return
    link.unlink(missing_ok=True)
    link.symlink_to(target)


def environment(tree: Path) -> dict[str, str]:
    """For a Python that is to import the build in ``tree``."""
    return {
        **os.environ,
        **OPTIONS,
        "LD_PRELOAD": " ".join(sanitizer_libraries()),
        "PYTHONPATH": os.pathsep.join([str(tree), str(HERE.parent)]),
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTEST_ADDOPTS": "",
        "FASTFT_SANITIZED": tree.name,
        # Threads that spin while they wait take the core from those that work.
        "OMP_WAIT_POLICY": "passive",
        "OMP_NUM_THREADS": "1" if tree.name == "cuda-on-cpu" else "2",
        "OPENBLAS_NUM_THREADS": "1",
    }


def pytest_command(*arguments: str) -> list[str]:
    """pytest over the build that PYTHONPATH names; to be run from the tree, so that the checkout is not imported."""
    fixed = ["-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT), "-p", "cuda_on_cpu.plugin"]
    fixed += ["-p", "one_per_axis", "-p", "no:cacheprovider", "-p", "no:xdist", "-s"]
    return [sys.executable, "-m", "pytest", *fixed, *arguments]


def main(arguments: Sequence[str]) -> int:
    if not arguments or arguments[0] not in KINDS:
        print(__doc__, file=sys.stderr)
        return 2
    tree = build(arguments[0])
    # From the tree, with test files relative to the checkout.
    rest = [str(ROOT / a) if (ROOT / a.split("::")[0]).exists() else a for a in arguments[1:]]
    return subprocess.run(pytest_command(*rest), cwd=tree, env=environment(tree)).returncode


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
