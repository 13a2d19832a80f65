"""``fastft bench``: what fastft costs next to what else there is, measured alternately in one process.

:mod:`.harness` measures; :mod:`.steps`, :mod:`.dropout` and :mod:`.training` hold the cases, as data; :mod:`.peers`
makes other libraries' steps; :mod:`.run` chooses cases, prints the table and writes the JSON.
"""

from .run import run

__all__ = ["run"]
