"""Figures by matplotlib, which is an extra: what there is without it, and how a picture is written."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import as_file, files
from typing import TYPE_CHECKING, Any, NamedTuple

from flr.files import atomic_file

from .html import PathLike

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Inches of a picture of the documents, see flr.mplstyle.
WIDTH = 8.3
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


@contextmanager
def styled(scheme: Scheme = LIGHT) -> Iterator[None]:
    """Have what is drawn look as ``flr.mplstyle`` says, in the colours of a scheme; matplotlib's own state stays.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        from matplotlib import style
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "matplotlib":
            raise
        raise MissingExtraError("picture: expected matplotlib, got none; pip install 'flr[plots]'") from None
    colours = dict.fromkeys(("axes.facecolor", "figure.facecolor"), scheme.ground)
    colours |= dict.fromkeys(("axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"), scheme.soft)
    colours |= dict.fromkeys(("axes.edgecolor", "grid.color", "xtick.color", "ytick.color"), scheme.line)
    with (
        as_file(files("flr.report") / "flr.mplstyle") as path,
        style.context([path, {**colours, "text.color": scheme.text}]),
    ):
        yield


def new_figure(**options: Any) -> Figure:
    """A figure that no global state of matplotlib knows; ``options`` are those of ``matplotlib.figure.Figure``.

    It takes its look where it is made and where it is saved: both belong inside :func:`styled`.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(**options)
    FigureCanvasAgg(figure)
    return figure


def png(figure: Figure) -> bytes:
    """A figure as a PNG at its own size, for a page."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=150)
    return stream.getvalue()


def save_png(figure: Figure, path: PathLike, dpi: int = 160) -> None:
    """Draw a figure into a PNG file, whole or not at all."""
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=dpi, bbox_inches="tight", pad_inches=0.15)


def save_svg(figure: Figure, path: PathLike, description: str = "") -> None:
    """Draw a figure into an SVG file, whole or not at all, the same bytes each time."""
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="svg", metadata={"Date": None, "Description": description})
        lines = temporary.read_text(encoding="utf-8").splitlines()
        temporary.write_text("\n".join(line.rstrip() for line in lines) + "\n", encoding="utf-8")
