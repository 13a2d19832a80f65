"""``fastft doctor``: before training, whether a model's weights can move, and what fits into memory."""

from __future__ import annotations

import argparse
from pathlib import Path

import fastft
from fastft.errors import UserError
from fastft.output import staged

HELP = "before training: can the weights move at this lr and dtype, and what fits into memory"
DESCRIPTION = (
    "Reads the weights of a model and says what share of them a step can move, as 16-bit weights lose steps that are "
    "too small; the memory that each setting of fastft.AdamW takes; and which one to use. Nothing is trained or "
    "downloaded."
)
EXTRA = ""
PACKAGES: dict[str, str] = {}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a folder with the model, or a .safetensors file")
    parser.add_argument("--lr", type=float, default=1e-5, help="learning rate, at its peak (default: %(default)g)")
    parser.add_argument("--dtype", metavar="NAME", help="bfloat16, float16 or float32 (default: as the model is)")
    parser.add_argument("--weight-decay", type=float, default=0.01, metavar="X", help="(default: %(default)g)")
    parser.add_argument(
        "--anchor-decay", type=float, default=0.0, metavar="X", help="λ of the anchor; 0: without one (the default)"
    )
    parser.add_argument("--gpu-memory", metavar="SIZE", help="what it has to fit into, such as 24GB or 80GiB")
    parser.add_argument(
        "--output", type=Path, metavar="FOLDER", help="also write report.md and report.json (and plot.png) here"
    )
    parser.add_argument("--overwrite", action="store_true", help="write into a folder that is not empty")


def run(options: argparse.Namespace) -> str:
    """The report as text. With ``--output`` also in files; a run that fails writes none."""
    try:
        report = fastft.doctor(
            options.model,
            lr=options.lr,
            dtype=options.dtype,
            weight_decay=options.weight_decay,
            anchor_decay=options.anchor_decay,
            gpu_memory=options.gpu_memory,
        )
    except ValueError as error:
        raise UserError(str(error)) from error
    if options.output is None:
        return str(report)
    with staged(options.output, options.overwrite) as folder:
        report.write(folder)
        written = sorted(file.name for file in folder.iterdir())
    return f"{report}\n\nWritten to {options.output}: {', '.join(written)}"
