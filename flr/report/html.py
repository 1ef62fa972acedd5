"""Parts of self-contained HTML pages. Plain values come in, so that whoever measured need not be here.

A page holds no script and loads nothing; text from data (titles hold HTML fragments in real catalogues) is escaped.
"""

from __future__ import annotations

import base64
import html
import math
import os
from collections.abc import Iterable, Sequence
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from flr.files import atomic_file

PathLike = str | os.PathLike[str]

#: Okabe and Ito's colours, told apart with any colour vision; black left out.
FACTOR_COLOURS = ("#56b4e9", "#e69f00", "#009e73", "#cc79a7", "#f0e442", "#d55e00", "#0072b2", "#999999")
_HEAT = "230, 159, 0"  # one hue, laid over the page's ground: readable light and dark
_PNG_MAGIC = b"\x89PNG\r\n\x1a\n"


def escape(value: Any) -> str:
    """Text that shows as it is inside an element or a quoted attribute."""
    return html.escape(" ".join(str(value).split()), quote=True)


def page(title: str, body: str) -> str:
    """A complete document around ``body`` (HTML); ``title`` is text."""
    folder = files("flr.report") / "templates"
    style = (folder / "page.css").read_text(encoding="utf-8")
    skeleton = Template((folder / "page.html").read_text(encoding="utf-8"))
    return skeleton.substitute(title=escape(title), style=style, body=body)


def write_text(path: PathLike, text: str) -> None:
    """Write UTF-8, whole or not at all."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def text_cell(text: Any) -> str:
    """Table cell that holds text."""
    return f'<td class="text">{escape(text)}</td>'


def table(head: Sequence[str], rows: Iterable[Sequence[str]], caption: str = "", kind: str = "") -> str:
    """HTML table of cells that are HTML already; a cell may bring its own ``<td …>``."""
    above = f"<caption>{caption}</caption>" if caption else ""
    top = "".join(f"<th>{cell}</th>" for cell in head)
    lines = "".join(f"<tr>{''.join(c if c.startswith('<td') else f'<td>{c}</td>' for c in row)}</tr>\n" for row in rows)
    inside = f"{above}<thead><tr>{top}</tr></thead>\n<tbody>{lines}</tbody>"
    return f'<div class="scroll"><table class="{kind}">{inside}</table></div>'


def heat_cell(value: float, largest: float, text: str) -> str:
    """Table cell shaded by value / largest."""
    alpha = 0.0 if largest <= 0 or not math.isfinite(value) else 0.9 * min(max(value / largest, 0.0), 1.0)
    strong = " strong" if alpha > 0.5 else ""
    return f'<td class="cell{strong}" style="background: rgba({_HEAT}, {alpha:.3f})">{text}</td>'


def short(text: str, length: int) -> str:
    """Text in one line of at most ``length`` characters."""
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"


def image(path: PathLike, caption: str = "") -> str:
    """A PNG file as a figure inside the page; ValueError where the file is no PNG."""
    content = Path(path).read_bytes()
    if not content.startswith(_PNG_MAGIC):
        raise ValueError(f"path: expected a PNG file, got {path}")
    code = base64.b64encode(content).decode("ascii")
    below = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f'<figure><img alt="{escape(caption) or "figure"}" src="data:image/png;base64,{code}">{below}</figure>'
