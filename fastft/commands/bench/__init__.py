"""``fastft bench``: what fastft costs next to what else there is, measured alternately in one process.

:mod:`.harness` measures; :mod:`.steps`, :mod:`.dropout` and :mod:`.training` hold the cases, as data; :mod:`.peers`
makes other libraries' steps; :mod:`.command` chooses cases, prints the table and writes the JSON.
"""

from .command import run

__all__ = ["run"]
