"""Parts of a study whose trainings are kept, so that seeds that are trained later are drawn together with these."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from .queue import Results, read_ranks
from .summary import ABOUT, MAIN, WAYS, key_of, lines_of, run_of, shared_seeds, table_of

#: The trainings of instruments with a teacher; other data and codecs by their recipes.
PARTS = ("taught", "others")


def keep(folders: list[Path], kept: Path, part: str) -> None:
    """Add the trainings of one of the ``PARTS`` to the folder ``kept``, with test ranks up to ten alone.

    Metrics at ten need no others, and a training takes 20 kB.

    Raises:
        ValueError: If a training of that name is kept with other results.
    """
    known = Results(kept)
    for line in _of_part(folders, part):
        before = known.done.get(line["name"])
        if before is not None and before["metrics"] != line["metrics"]:
            raise ValueError(f"{kept}: expected no other results of {line['name']}; remove the folder to begin anew")
        if before is None:
            ranks = {way: np.where(x <= 10, x, 0) for way, x in read_ranks(line["folder"], line).items() if way in WAYS}
            known.add({name: line[name] for name in (*ABOUT, "metrics", "beside") if name in line}, ranks)


def of_part(folders: list[Path], data: Path, part: str) -> dict[str, Any]:
    """The tables of one of the ``PARTS``, one for each data set and codec, of seeds that every model there has."""
    parts: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for line in _of_part(folders, part):
        parts.setdefault(key_of(line["tags"]), []).append(line)
    tables, runs = [], []
    for (name, codec, change), lines in sorted(parts.items()):
        own = shared_seeds(lines)
        tables.append({"data": name, "codec": codec, "change": change, **table_of(data / name, own, [])})
        runs += [run_of(line) for line in own]
    return {"tables": tables, "runs": runs}


def _of_part(folders: list[Path], part: str) -> list[dict[str, Any]]:
    lines = lines_of(folders)
    if part == "taught":
        return [line for line in lines if line["setting"] == part and key_of(line["tags"]) == MAIN]
    return [line for line in lines if key_of(line["tags"])[:2] != MAIN[:2]]
