"""Where rows are kept: ``bench/results/<device>/<commit>.json``, appended to, never rewritten.

A file holds the runs of one commit on one device, a run the facts of its session and its rows. Where a case was run more than once the
latest counts.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from .harness import ROOT, slug

RESULTS = ROOT / "bench/results"


def file_of(facts: dict[str, Any], folder: Path) -> Path:
    name = facts["commit"] + ("-dirty" if facts["dirty"] else "")
    return folder / slug(facts["device"]) / f"{name}.json"


def append(facts: dict[str, Any], rows: list[dict[str, Any]], folder: Path) -> Path:
    """Add a run to the file of its commit and device; the file is replaced in one step."""
    path = file_of(facts, folder)
    runs = json.loads(path.read_text())["runs"] if path.exists() else []
    document = {"device": facts["device"], "commit": facts["commit"], "runs": [*runs, {**facts, "rows": rows}]}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(document, indent=1) + "\n")
    temporary.replace(path)
    return path
