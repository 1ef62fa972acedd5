"""The fingerprint that ties a compiled extension to its sources. setup.py runs this file: no imports of ours."""

from __future__ import annotations

import hashlib
from pathlib import Path

#: What setup.py compiles, or what that includes: whatever else an editor leaves beside it changes nothing.
ENDINGS = (".cpp", ".cu", ".h", ".cuh")


def source_hash(folder: Path) -> str:
    """Of the sources in ``folder`` (csrc), names included."""
    digest = hashlib.sha256()
    for path in sorted(x for x in folder.iterdir() if x.suffix in ENDINGS and not x.name.startswith(".")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]
