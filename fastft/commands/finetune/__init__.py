"""``fastft finetune``: fine-tune a model on one's own rows, from the command line.

A pipeline of small parts: :mod:`.options` (what can be asked for), :mod:`.data` (from a file to rows a model takes),
:mod:`.model` (the pre-trained model), :mod:`.training` (the Hugging Face Trainer), :mod:`.checkpoints` (going on after
an interruption), :mod:`.report` (what it tells), and :mod:`.pipeline`, which puts them in a row.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastft.data.files import FileError
from fastft.output import OutputError

from .errors import InputError
from .options import add_arguments, given

__all__ = ["add_arguments", "run"]

EXTRAS = {
    "transformers": "transformers", "accelerate": "accelerate", "datasets": "datasets", "matplotlib": "matplotlib",
    "tqdm": "tqdm", "yaml": "pyyaml",
}  # fmt: skip


def run(flags: Mapping[str, Any], config: Path | None = None) -> int:
    """Fine-tune as flags and a YAML file say, and print the result.

    Returns an exit status: 0 done, 1 the files could not be written, 2 something that was given cannot be used, 130
    (or 128 + the signal's number) stopped. Until the run is done the output folder holds what it held, and beside it
    the checkpoints.

    Args:
        flags: texts by the names of :class:`fastft.commands.finetune.options.Options`' fields; booleans for switches.
        config: a YAML file with more of them.
    """
    missing = [package for module, package in EXTRAS.items() if importlib.util.find_spec(module) is None]
    if missing:
        return fail(f'missing {", ".join(missing)}; install what this needs with: pip install "fastft[finetune]"', 2)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return fail("runs in one process; start it without torchrun", 2)
    # Set before the tokenizers are loaded; otherwise they warn, if the process forks later, at the wrong time.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    output: Path | None = None
    try:
        values = given(flags, config)
        output = values.get("output")

        from .pipeline import finetune
        from .training import Stopped

        try:
            summary = finetune(values)
        except Stopped as stopped:
            return fail(f"stopped after step {stopped.step:,}; {how_to_go_on(output)}", 128 + stopped.signal_number)
    except (InputError, FileError, OutputError) as error:
        return fail(str(error), 2)
    except OSError as error:
        return fail(f"could not finish: {error}; {how_to_go_on(output)}", 1)
    except KeyboardInterrupt:
        return fail(f"interrupted; {how_to_go_on(output)}", 130)
    except Exception:
        fail(how_to_go_on(output), 1)
        raise
    print(file=sys.stderr)
    print(f"{summary}\nWritten to {output}: the model and its tokenizer, report.json, plot.png")
    return 0


def how_to_go_on(output: Path | None) -> str:
    """The command that resumes the run, if it left something to go on from."""
    if output is None or not (output / "checkpoints").is_dir():
        return "nothing was written"
    return f"go on with: fastft finetune --output {shlex.quote(str(output))} --resume"


def fail(message: str, status: int) -> int:
    """Say in one line what is wrong; the exit status to leave with."""
    print(f"fastft finetune: {message}", file=sys.stderr)
    return status
