"""``fastft finetune``: fine-tune a model on one's own rows, from the command line.

A pipeline of small parts: :mod:`.options` (the flags and YAML keys), :mod:`.data` (from a file to rows a model takes),
:mod:`.model` (the pre-trained model), :mod:`.training` (the Hugging Face Trainer), :mod:`.checkpoints` (going on after
an interruption), :mod:`.report` (the result), and :mod:`.pipeline`, which runs them in order.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from pathlib import Path

from fastft.errors import UserError

from ..failure import Failure
from .options import add_arguments, given

__all__ = ["DESCRIPTION", "EXTRA", "HELP", "PACKAGES", "add_arguments", "left_behind", "run"]

HELP = "fine-tune a model on your own rows"
DESCRIPTION = (
    "Fine-tunes a pre-trained model on a file of texts, with fastft.AdamW in the Hugging Face Trainer. Prints what it "
    "was before and is after, and leaves a folder that from_pretrained loads."
)
EXTRA = "finetune"
PACKAGES = {
    "transformers": "transformers", "accelerate": "accelerate", "datasets": "datasets", "matplotlib": "matplotlib",
    "tqdm": "tqdm", "yaml": "pyyaml",
}  # fmt: skip


def run(options: argparse.Namespace) -> str:
    """Fine-tune as the flags and the YAML file say, and return the result as a text.

    Until the run is done the output folder holds what it held, and beside it the checkpoints.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("runs in one process; start it without torchrun")
    flags = {name: value for name, value in vars(options).items() if name != "config"}
    values = given(flags, options.config)
    options.output = values.get("output")  # left_behind() finds it here, also where the YAML file names it

    from .pipeline import finetune
    from .training import Stopped

    try:
        summary = finetune(values)
    except Stopped as stopped:
        message = f"stopped after step {stopped.step:,}; {left_behind(options)}"
        raise Failure(message, 128 + stopped.signal_number) from None
    print(file=sys.stderr)
    return f"{summary}\nWritten to {options.output}: the model and its tokenizer, report.json, plot.png"


def left_behind(options: argparse.Namespace) -> str:
    """The command that resumes a run that was cut short, if it left a checkpoint."""
    output = getattr(options, "output", None)
    if output is None or not (Path(output) / "checkpoints").is_dir():
        return "nothing was written"
    return f"go on with: fastft finetune --output {shlex.quote(str(output))} --resume"
