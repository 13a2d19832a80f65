"""``fastft info``: versions, devices, and whether CUDA can be used."""

from __future__ import annotations

import argparse
import platform
from collections.abc import Sequence

import torch

import fastft
from fastft.environment import cpu_instruction_set, cuda_architectures, why_no_cuda

HELP = "print versions, devices, and whether CUDA can be used"
DESCRIPTION = "Prints what this installation is and can do; paste it into a bug report."
EXTRA = ""
PACKAGES: dict[str, str] = {}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """This command has no options."""


def run(options: argparse.Namespace) -> str:
    """Versions, devices, and whether CUDA can be used and why not, as aligned lines."""
    archs = cuda_architectures()
    cuda_torch = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    lines = {
        "fastft": fastft.__version__,
        "python": f"{platform.python_version()} on {platform.platform()}",
        "torch": f"{torch.__version__} ({cuda_torch})",
        "cpu": f"{cpu_instruction_set()} loops, {torch.get_num_threads()} threads",
        "cuda code": f"in this build, for {named(archs)}" if archs else "not in this build",
    }
    reason = why_no_cuda()
    if reason:
        lines["cuda"] = f"cannot be used: {reason}"
    else:
        for index in range(torch.cuda.device_count()):
            lines[f"cuda:{index}"] = describe_gpu(index, archs)
    width = max(map(len, lines))
    return "\n".join(f"{name.ljust(width)}  {value}" for name, value in lines.items())


def named(archs: Sequence[int]) -> str:
    """``"sm_75, sm_80 (and newer, by PTX)"``."""
    return f"{', '.join(f'sm_{arch}' for arch in archs)} (and newer, by PTX)"


def describe_gpu(index: int, archs: Sequence[int]) -> str:
    """A GPU's name, memory, and whether there is code for it."""
    properties = torch.cuda.get_device_properties(index)
    capability = 10 * properties.major + properties.minor
    oldest = min(archs)
    usable = "" if capability >= oldest else f"; too old: the code in this build needs sm_{oldest} or newer"
    memory = properties.total_memory / 2**30
    return f"{properties.name}, sm_{capability}, {memory:.0f} GiB{usable}"
