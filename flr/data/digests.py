"""SHA-256 of arrays, by which saved files are known to be those that belong together."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch


def array_digest(arrays: dict[str, torch.Tensor]) -> str:
    """SHA-256 of names, dtypes, shapes and values, in hexadecimal."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].dtype} {list(arrays[name].shape)};".encode())
        digest.update(arrays[name].contiguous().cpu().numpy().data)
    return digest.hexdigest()


def integers_digest(*parts: Sequence[int] | np.ndarray) -> str:
    """SHA-256 of sequences of integers and their lengths, whatever type they are held in, in hexadecimal."""
    digest = hashlib.sha256()
    for part in parts:
        array = np.asarray(part, "<i8")
        digest.update(np.array(len(array), "<i8").tobytes() + array.tobytes())
    return digest.hexdigest()
