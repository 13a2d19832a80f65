"""Libraries that the compiled module links to, and symbols that it exports. The CUDA kernels: test_static.py."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest

from fastft import _C


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
