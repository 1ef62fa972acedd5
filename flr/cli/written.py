"""What commands write: a model into a folder of its own, measurements with their picture."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from . import voice


def new_folder(name: str, folder: str) -> Path:
    """``folder``, if nothing is lost by writing it; else ValueError, which calls it ``name``."""
    place = Path(folder)
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise ValueError(f"{name}: expected a new or an empty folder, got {place}")
    return place


@contextmanager
def writing(output: Path) -> Iterator[Path]:
    """A folder that becomes ``output``, new or empty, whole or not at all."""
    from flr.files import atomic_folder

    output = output.resolve()  # where a link leads, the folder is written and the link stays
    if output.is_dir():
        output.rmdir()  # empty
    with atomic_folder(output) as place:
        yield place


@contextmanager
def writing_model(output: Path, model: Any, processor: Any) -> Iterator[Path]:
    """As :func:`writing`, with model and processor in the folder."""
    with writing(output) as place:
        processor.save_pretrained(place)
        model.save_pretrained(place)
        yield place


def write_measured(root: Path, name: str, outcome: Mapping[str, Any], draw: Callable[[Path], None]) -> None:
    """``name``.json of an outcome and, with matplotlib, the picture ``name``.png that ``draw`` makes; says so."""
    from flr.files import write_json
    from flr.report.drawing import WITHOUT, can_draw

    write_json(root / f"{name}.json", outcome)
    voice.result(f"Wrote {root / f'{name}.json'}.")
    if can_draw():
        draw(root / f"{name}.png")
        voice.result(f"Wrote {root / f'{name}.png'}.")
    else:
        voice.note(WITHOUT)
