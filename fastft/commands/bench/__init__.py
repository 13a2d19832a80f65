"""``fastft bench``: fastft's time next to torch's and other libraries', measured alternately in one process.

:mod:`.harness` measures; :mod:`.steps`, :mod:`.dropout` and :mod:`.training` hold the cases, as data; :mod:`.peers`
makes other libraries' steps; :mod:`.command` chooses cases, prints the table and writes the JSON.
"""

from .cases import FASTFT, Case, ReadyCase, select
from .command import (
    CASES,
    DESCRIPTION,
    EXTRA,
    HELP,
    PACKAGES,
    add_arguments,
    left_behind,
    measure,
    result_of,
    run,
    significant,
    verdict,
    why_not,
)
from .harness import CpuClock, Measurement, Ratio, Work, alternate, environment

__all__ = [
    "CASES",
    "DESCRIPTION",
    "EXTRA",
    "FASTFT",
    "HELP",
    "PACKAGES",
    "Case",
    "CpuClock",
    "Measurement",
    "Ratio",
    "ReadyCase",
    "Work",
    "add_arguments",
    "alternate",
    "environment",
    "left_behind",
    "measure",
    "result_of",
    "run",
    "select",
    "significant",
    "verdict",
    "why_not",
]
