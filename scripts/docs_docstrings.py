"""Docstrings as the documentation site reads them: roles become code, doctests become sections of examples.

mkdocs.yml names :class:`Docstrings` as an extension of griffe, which reads the package's source for mkdocstrings.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:py:)?[a-z]+:`~?([^`]+)`")
_CODE = re.compile(r"``([^`]+)``")
_SECTION = re.compile(r"^Example:$", re.M)
_DOCTEST = re.compile(r"^>>> .*(?:\n(?!\n|[A-Z][a-z]+:\n).*)*", re.M)


def as_markdown(text: str) -> str:
    """A docstring, its indentation removed, in Markdown with Google's sections.

    >>> as_markdown("See :func:`flr.load` and ``x``.")
    'See `flr.load` and `x`.'
    """

    def section(match: re.Match[str]) -> str:
        return "Examples:\n" + "\n".join(f"    {line}" for line in match[0].splitlines())

    text = _CODE.sub(r"`\1`", _ROLE.sub(r"`\1`", text))
    return _DOCTEST.sub(section, _SECTION.sub("Examples:", text))


class Docstrings(griffe.Extension):
    """Changes every docstring as it is read."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)
