"""``fastft data-report``: examine a data set before training on it."""

from __future__ import annotations

import argparse
from pathlib import Path

from fastft.data import data_report, read_table
from fastft.errors import UserError
from fastft.output import add_output_arguments, staged

HELP = "look at a data set before training on it: repetitions, leakage, balance, lengths"
DESCRIPTION = (
    "Reads a csv, tsv, jsonl or parquet file (text formats also gzipped) and writes a page on what is wrong with it "
    "and what to do about that: report.md with plot.png, and report.json."
)
EXTRA = "data"
PACKAGES = {"datasets": "datasets", "datasketch": "datasketch", "matplotlib": "matplotlib"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="FILE", help="the training data")
    parser.add_argument(
        "--eval", type=Path, metavar="FILE", help="the evaluation data, looked for in the training data"
    )
    parser.add_argument("--text-column", metavar="NAME", help="default: one with a usual name, else the longest texts")
    parser.add_argument("--label-column", metavar="NAME", help="default: one with a usual name, or none")
    add_output_arguments(parser, "fastft-data-report", "where the page goes")


def run(options: argparse.Namespace) -> str:
    """Write the page and return its findings. A run that fails writes nothing."""
    eval_name = ""
    if options.eval is not None:
        eval_name = options.eval.name if options.eval.name != options.file.name else str(options.eval)
    with staged(options.output, options.overwrite) as folder:
        try:
            report = data_report(
                read_table(options.file),
                read_table(options.eval) if options.eval is not None else None,
                text_column=options.text_column,
                label_column=options.label_column,
                name=options.file.name,
                eval_name=eval_name,
            )
            report.write(folder)
        except ValueError as error:  # no column of texts, or one that holds something else
            raise UserError(str(error)) from error
    return f"{report}\nWritten to {options.output}: report.md, plot.png, report.json"
