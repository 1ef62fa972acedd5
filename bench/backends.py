"""Another backend of the operations than the one that dispatch picks."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def backend(spec: str) -> Iterator[None]:
    """``FLR_BACKEND=spec`` inside of the block, or of the function that this decorates."""
    before = os.environ.get("FLR_BACKEND")
    os.environ["FLR_BACKEND"] = spec
    try:
        yield
    finally:
        os.environ.pop("FLR_BACKEND") if before is None else os.environ.update(FLR_BACKEND=before)
