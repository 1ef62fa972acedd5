"""The fingerprint that ties a compiled extension to the sources it came from. setup.py runs this file: no imports of ours."""

from __future__ import annotations

import hashlib
from pathlib import Path


def source_hash(folder: Path) -> str:
    """Of all files in ``folder`` (csrc), names included."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]
