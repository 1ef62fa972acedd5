"""What a prepared folder holds, and which folders a new one may take the place of."""

from __future__ import annotations

import os
import re
from pathlib import Path

from flr.files import PathLike, read_json, temporary_folder

FORMAT = "flr-dataset"
PARTS = ("train", "valid", "test")
ITEMS, META = "items.parquet", "meta.json"
FILES = (ITEMS, *(f"{part}.parquet" for part in PARTS))
SIDS, ABOUT, INDEX, BOOKS = "sids", "sids.json", "sid.index.json", "codebooks.safetensors"  # of flr sids
_OWN = {"": {*FILES, META}, SIDS: {ABOUT, INDEX, BOOKS}}
_LEFT = re.compile(r"\.(.+)\.[a-z0-9_]{8}\.tmp")  # by a writer of one file that was killed


def check_output(path: PathLike) -> Path:
    """Where ``path`` leads, if a prepared folder can be written there and nothing of others is lost by it.

    Raises:
        ValueError: there is a file, a folder with anything that neither :meth:`RecDataset.save` nor ``flr sids``
            writes, or a place that nothing can be written to.
    """
    root = Path(path).resolve()  # where a link leads, the folder is replaced and not the link
    place = root
    while not place.parent.exists():
        place = place.parent
    try:
        with temporary_folder(place):  # puts back what a writer that was killed had moved aside
            pass
    except OSError as error:
        raise ValueError(f"output: expected a place that can be written, got {path}: {error.strerror}") from error
    wanted = "output: expected a new or an empty folder, or one that flr prepare wrote"
    if not root.exists():
        return root
    if not root.is_dir():
        raise ValueError(f"{wanted}, got the file {path}")
    if os.path.ismount(root):
        raise ValueError(f"{wanted}, got the mount point {path}, which nothing can take the place of")
    beside = root / SIDS
    others = [
        file for file in sorted(root.iterdir()) if not _is_own(file, "") and not (file == beside and file.is_dir())
    ]
    if beside.is_dir():
        others += [file for file in sorted(beside.iterdir()) if not _is_own(file, SIDS)]
    if others:
        raise ValueError(f"{wanted}, got {path} with {others[0].relative_to(root)}")
    if any(root.iterdir()) and not ((root / META).is_file() and read_json(root / META).get("format") == FORMAT):
        raise ValueError(f"{wanted}, got {path} without a {META} of format {FORMAT!r}")
    return root


def _is_own(file: Path, folder: str) -> bool:
    return not file.is_dir() and _LEFT.sub(r"\1", file.name) in _OWN[folder]
