"""Figures of a part, kept in a file from which ``scripts/reliability.py`` makes the tables of docs/reliability.md."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.machine import facts
from flr.files import read_json, write_json


def keep(path: Path | None, results: Mapping[str, Mapping[str, Any]]) -> None:
    """Add to the file ``path``, if there is one, a column of figures for each thing that was tried.

    Figures that are objects become one row for each of their members.
    """
    if path is None:
        return
    before = read_json(path) if path.exists() else {}
    columns = {name: dict(_rows(figures)) for name, figures in results.items()}
    options = [word for word in sys.argv[1:] if not word.endswith(".json") and word != "--json"]
    command = shlex.join(["python", "-m", f"tests.chaos.{path.stem.removeprefix('chaos_')}", *options])
    write_json(path, {**before, **columns, "facts": {**facts(), "command": command}})


def _rows(figures: Mapping[str, Any]) -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for name, value in figures.items():
        if isinstance(value, Mapping):
            rows += [(f"{name} {key}", part) for key, part in value.items()]
        elif not isinstance(value, list):
            rows.append((name, value))
    return rows
