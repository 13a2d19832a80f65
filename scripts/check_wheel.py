"""Check a wheel: it holds the whole package, is small, has machine code for every architecture, and links little.

Usage: ``python scripts/check_wheel.py dist/fastft-*.whl``. Needs ``readelf`` (binutils), and ``cuobjdump`` from a
CUDA toolkit or the package nvidia-cuda-cuobjdump.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LARGEST = 20_000_000  # bytes of the wheel
SYSTEM_LIBRARIES = {"libc.so.6", "libm.so.6", "libdl.so.2", "librt.so.1", "libpthread.so.0", "libgcc_s.so.1"}
SYSTEM_LIBRARIES |= {"libstdc++.so.6", "ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1"}


def main() -> int:
    """Check the wheel named on the command line; exit status 1 if something is wrong with it."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("wheel", type=Path)
    wheel = arguments.parse_args().wheel
    problems = []
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
        names = archive.namelist()
        (module,) = Path(folder).glob("fastft/_C.*.so")
        expected = {f"sm_{arch}" for arch in default_architectures()}
        found = architectures(module)
        if found != expected:
            problems.append(f"machine code: expected {sorted(expected)}, found {sorted(found)}")
        if foreign := needed_libraries(module) - SYSTEM_LIBRARIES:
            problems.append(f"links {sorted(foreign)}")
    if wheel.stat().st_size > LARGEST:
        problems.append(f"{wheel.stat().st_size:,} bytes, more than {LARGEST:,}")
    for wanted in [*package_files(), "licenses/LICENSE"]:
        if not any(name.endswith(wanted) for name in names):
            problems.append(f"lacks {wanted}")
    if stray := [name for name in names if name.split("/")[0] not in ("fastft",) and ".dist-info/" not in name]:
        problems.append(f"holds files outside fastft/: {stray}")
    for problem in problems:
        print(f"{wheel.name}: {problem}", file=sys.stderr)
    print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.1f} MB, code for {', '.join(sorted(found, key=natural))}")
    return 1 if problems else 0


def package_files() -> list[str]:
    """The files of the source package, but for what is made from them."""
    files = (path.relative_to(ROOT) for path in (ROOT / "fastft").rglob("*") if path.is_file())
    return sorted(path.as_posix() for path in files if path.suffix != ".so" and "__pycache__" not in path.parts)


def default_architectures() -> list[str]:
    """The architectures that setup.py builds for when nothing else is asked."""
    source = (ROOT / "setup.py").read_text(encoding="utf-8")
    match = re.search(r'^ARCHS = "([\d;]+)"', source, re.MULTILINE)
    assert match is not None
    return match[1].split(";")


def architectures(module: Path) -> set[str]:
    """The architectures that a module holds machine code for, as ``sm_90``."""
    return set(re.findall(r"\bsm_\d+", run(cuobjdump(), "--list-elf", module)))


def needed_libraries(module: Path) -> set[str]:
    """The shared libraries that a module names."""
    return set(re.findall(r"\(NEEDED\).*\[(.+?)\]", run("readelf", "--dynamic", module)))


def cuobjdump() -> str:
    """The tool from the environment's packages, else from PATH."""
    for folder in sys.path:
        if (tool := Path(folder) / "nvidia" / "cu13" / "bin" / "cuobjdump").exists():
            tool.chmod(0o755)
            return str(tool)
    return "cuobjdump"


def natural(text: str) -> tuple[int, str]:
    """A key that puts sm_90 before sm_100."""
    return len(text), text


def run(*command: str | Path) -> str:
    """A command's output."""
    return subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    sys.exit(main())
