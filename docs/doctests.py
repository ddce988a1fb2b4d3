"""Lets mkdocstrings show the doctests of our docstrings as code.

Markdown takes a paragraph that begins with ``>>>`` for three nested quotations; fenced, it is code.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

_DOCTEST = re.compile(r"^(?P<indent> *)>>> .*(?:\n(?!\s*(?:\n|$)).*)*", re.MULTILINE)


class Doctests(griffe.Extension):
    """Fences every doctest in the text of a docstring."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite one docstring."""
        if obj.docstring:
            obj.docstring.value = _DOCTEST.sub(_fence, obj.docstring.value)


def _fence(doctest: re.Match[str]) -> str:
    code = re.sub(r"  # doctest: .*", "", doctest[0])
    return f"{doctest['indent']}```pycon\n{code}\n{doctest['indent']}```"
