"""Semantic IDs that others made, in the community's forms."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import numpy as np

from flr.files import PathLike, check_regular, naming, read_json

_MOST_LEVELS = len(string.ascii_lowercase)
_MOST_BYTES = 1 << 28


def read_codes(path: PathLike, item_ids: list[str]) -> list[tuple[str, ...]]:
    """The codes of every item, in the order of ``item_ids``.

    Args:
        path: ``.index.json``, an object from item ids to lists of code tokens, or ``.npy``/``.safetensors``, an integer
            array [levels, items] (or [items, levels], where that alone fits) in the order of ``item_ids``.
        item_ids: the items.

    Raises:
        ValueError: naming the file, where it is of another form, or lacks an item.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "codes.npy"
        >>> np.save(file, np.array([[7, 8, 7], [0, 1, 2]]))
        >>> read_codes(file, ["x", "y", "z"])
        [('<a_7>', '<b_0>'), ('<a_8>', '<b_1>'), ('<a_7>', '<b_2>')]
    """
    name = Path(path).name
    if name.endswith(".json"):
        return _of_lists(path, read_json(path), item_ids)
    check_regular(path, "a file of codes")
    if name.endswith(".npy"):
        with naming(path, "an array of integers in .npy form"):
            return _of_array(np.lib.format.open_memmap(path, mode="r"), len(item_ids))
    if name.endswith(".safetensors"):
        from safetensors.numpy import load

        with naming(path, "one tensor of integers"):
            if (size := Path(path).stat().st_size) > _MOST_BYTES:
                raise ValueError(f"size: expected at most {_MOST_BYTES} bytes, got {size}")
            (array,) = load(Path(path).read_bytes()).values()
            return _of_array(array, len(item_ids))
    raise ValueError(f"path: expected .index.json, .npy or .safetensors, got {path}")


def _of_lists(path: PathLike, lists: dict[str, Any], item_ids: list[str]) -> list[tuple[str, ...]]:
    found = []
    for item_id in item_ids:
        codes = lists.get(item_id)
        if not isinstance(codes, list) or not 1 <= len(codes) <= _MOST_LEVELS:
            expected = f"a list of 1 to {_MOST_LEVELS} codes for item {item_id!r}"
            raise ValueError(f"{path}: expected {expected}, got {codes!r:.80}")
        if not all(isinstance(code, str) and code for code in codes):
            raise ValueError(f"{path}: expected codes as text for item {item_id!r}, got {codes!r:.80}")
        found.append(tuple(codes))
    return found


def _of_array(array: np.ndarray, items: int) -> list[tuple[str, ...]]:
    if array.dtype.kind not in "iu" or array.ndim != 2 or items not in array.shape:
        raise ValueError(f"codes: expected integers [levels, {items}], got {array.dtype} {list(array.shape)}")
    columns = array if array.shape[1] == items else array.T
    if not 1 <= len(columns) <= _MOST_LEVELS:
        raise ValueError(f"codes: expected 1 to {_MOST_LEVELS} levels, got {len(columns)}")
    if int(columns.min()) < 0:
        raise ValueError(f"codes: expected integers >= 0, got {int(columns.min())}")
    letters = string.ascii_lowercase
    return [tuple(f"<{letters[level]}_{code}>" for level, code in enumerate(row)) for row in columns.T.tolist()]
