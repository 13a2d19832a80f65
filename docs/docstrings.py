"""Docstrings as the Markdown that mkdocstrings expects: Sphinx's roles and code blocks, and doctests, become it."""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:class|func|meth|mod|attr|data|obj):`~?([^`]+)`")
CODE_BLOCK = re.compile(r"^( *)\.\. code-block:: (\w+)\n\n((?:\1 +.*\n|\n)+)", re.MULTILINE)
INDEX = re.compile(r"(?<=\w\])\[(?=\w+\])")
DOCTEST = re.compile(r"^( *)>>> .*\n(?:\1\S.*(?:\n|\Z))*", re.MULTILINE)


def markdown(text: str) -> str:
    """The docstring's text, with what only Sphinx understands in Markdown's words."""
    text = CODE_BLOCK.sub(fenced, text + "\n")
    text = DOCTEST.sub(lambda found: fence(found[1], "pycon", found[0]), text)
    text = INDEX.sub(r"\[", text)  # R[i][j] is no link
    return ROLE.sub(r"``\1``", text).rstrip()


def fenced(found: re.Match[str]) -> str:
    """A ``.. code-block::`` as a fence, its lines moved out to where the fence is."""
    indent, language, body = found.groups()
    inner = min(len(line) - len(line.lstrip()) for line in body.splitlines() if line.strip())
    lines = [indent + line[inner:] if line.strip() else "" for line in body.rstrip("\n").splitlines()]
    return fence(indent, language, "\n".join(lines)) + "\n"


def fence(indent: str, language: str, body: str) -> str:
    """Lines of code between fences."""
    return f"{indent}```{language}\n{body.rstrip()}\n{indent}```\n"


class Docstrings(griffe.Extension):
    """Rewrites every docstring as it is loaded."""

    def on_instance(self, *, obj: griffe.Object | griffe.Alias, **kwargs: Any) -> None:
        if not obj.is_alias and obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value)
