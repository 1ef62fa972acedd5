"""Figures by matplotlib, which is an extra: what there is without it, and how a picture is written."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any, NamedTuple

from flr.files import atomic_file

from .html import PathLike

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: What a command that can do without pictures says.
WITHOUT = "pictures are left out, matplotlib is not installed: pip install 'flr[plots]'"


class Scheme(NamedTuple):
    """Colours of a picture: its ground, text, softer text, lines, and two that tell things apart."""

    ground: str
    text: str
    soft: str
    line: str
    first: str
    second: str


#: As ``templates/page.css`` has them.
LIGHT = Scheme("#ffffff", "#1b1f24", "#57606a", "#d9dee3", "#0072b2", "#b35c00")
DARK = Scheme("#15181b", "#e4e7ea", "#a4adb6", "#3a4149", "#62b5ea", "#e69f00")


class MissingExtraError(ImportError, ValueError):
    """Something was asked for that needs a package of an extra; commands print it like any refused input."""


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def new_figure(**options: Any) -> Figure:
    """A figure that no global state of matplotlib knows; ``options`` are those of ``matplotlib.figure.Figure``.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "matplotlib":
            raise
        raise MissingExtraError("picture: expected matplotlib, got none; pip install 'flr[plots]'") from None
    figure = Figure(**options)
    FigureCanvasAgg(figure)
    return figure


def save_png(figure: Figure, path: PathLike, dpi: int = 160, ground: str = LIGHT.ground) -> None:
    """Draw a figure into a PNG file, whole or not at all."""
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=dpi, facecolor=ground, bbox_inches="tight", pad_inches=0.15)
