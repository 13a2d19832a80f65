"""Loads the compiled core and connects it to the torch that is installed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

OLDEST_TORCH = (2, 10)
Function = TypeVar("Function", bound=Callable[..., Any])


def _version_tuple(version: str) -> tuple[int, int]:
    major, minor = version.split("+")[0].split(".")[:2]
    return int(major), int(minor)


if _version_tuple(torch.__version__) < OLDEST_TORCH:
    raise ImportError(
        f"fastft needs torch >= {OLDEST_TORCH[0]}.{OLDEST_TORCH[1]}, found torch {torch.__version__}: "
        "upgrade torch (older ones lack the DLPack exchange table that fastft reads tensors through)"
    )

try:
    from fastft import _C
except ImportError as error:
    raise ImportError(
        f"the compiled part of fastft could not be loaded ({error}). In a source checkout, build it with "
        '`python -m pip install -e ".[test]"`; elsewhere, reinstall fastft.'
    ) from error

# torch.compiler.disable, but without importing the compiler, which takes as long as torch itself; as torch.optim does.
disable_dynamo: Callable[[Function], Function] = getattr(torch, "_disable_dynamo", torch.compiler.disable)

# Inductor's own way to hand a tensor to C code; without it the core reads tensors the slower way.
_aoti = getattr(torch._C, "_aoti", None)
_C.connect_torch(
    torch.Tensor,
    getattr(_aoti, "unsafe_alloc_void_ptrs_from_tensors", None),
    [torch.empty(3), torch.nn.Parameter(torch.empty(2)), torch.empty(2, 2, dtype=torch.bfloat16)],
)

__version__: str = _C.version
