"""Self-contained HTML pages from templates. Plain values come in, so that whoever measured need not be here.

A page holds no script and loads nothing; text from data (titles hold HTML fragments in real catalogues) is escaped by
Jinja2, and a value that a template lacks is an error.
"""

from __future__ import annotations

import base64
import functools
import os
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from flr.files import atomic_file

if TYPE_CHECKING:
    from jinja2 import Environment

PathLike = str | os.PathLike[str]

#: Okabe and Ito's colours, told apart with any colour vision; black left out.
FACTOR_COLOURS = ("#56b4e9", "#e69f00", "#009e73", "#cc79a7", "#f0e442", "#d55e00", "#0072b2", "#999999")
_STRONG = 0.63  # of a cell's shade: in the dark scheme black reads better on it than white from here on


@functools.cache
def _templates() -> Environment:
    from jinja2 import Environment, FunctionLoader, StrictUndefined

    def source(name: str) -> str:
        return (files("flr.report") / "templates" / name).read_text(encoding="utf-8")

    made = Environment(
        loader=FunctionLoader(source), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    made.filters |= {"line": line, "short": short, "shade": shade, "colour": colour}
    made.globals |= {"style": source("page.css")}
    return made


def render(template: str, **values: Any) -> str:
    """A page by the name of its template; jinja2's ``UndefinedError`` for a value that is missing."""
    return _templates().get_template(template).render(**values)


def write_page(path: PathLike, template: str, **values: Any) -> None:
    """Write a page, whole or not at all."""
    text = render(template, **values)
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def line(text: Any) -> str:
    """Text in one line."""
    return " ".join(str(text).split())


def short(text: str, length: int) -> str:
    """Text in one line of at most ``length`` characters."""
    text = line(text)
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"


def colour(factor: int) -> str:
    """Of a factor, counted from 0."""
    return FACTOR_COLOURS[factor % len(FACTOR_COLOURS)]


def shade(value: float, largest: float) -> dict[str, Any]:
    """How a heat map's cell is shown: ``alpha`` of its colour, ``strong`` where that needs another ink in the dark."""
    alpha = 0.9 * min(max(value / largest, 0.0), 1.0) if largest > 0 else 0.0
    return {"alpha": f"{alpha:.3f}", "strong": alpha > _STRONG}


def png_data(content: bytes) -> str:
    """The bytes of a PNG file as data for a page."""
    return f"data:image/png;base64,{base64.b64encode(content).decode('ascii')}"
