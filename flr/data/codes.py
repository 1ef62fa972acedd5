"""Semantic IDs from files: JSON objects of code lists, and integer arrays."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flr.files import PathLike, check_regular, naming, read_json, shown

_CODE = re.compile(r"<[^<>]+>")
_LETTERS = "abcdefghijklmnopqrstuvwxyz"  # of the levels, as the field's papers name their codes
MAX_LEVELS = len(_LETTERS)
_MAX_BYTES = 1 << 32
_PICKLES = (".pt", ".pth", ".bin", ".pkl", ".pickle")
_NAMES = ("codes", "sids", "indices")  # of the tensor in a file that holds several


def read_codes(path: PathLike, item_ids: Sequence[str]) -> list[tuple[str, ...]]:
    """The codes of every item, in the order of ``item_ids``; items may share them.

    Args:
        path: a JSON object, id → list of codes (text, or integers by level) or one text ``"<a_1><b_2>"``; or integers
            >= 0 of shape [items, levels] or [levels, items], whose items are in the order of ``item_ids``, as .npy or
            .safetensors (one tensor, or the one named "codes"). Integer 7 of the first level is named ``<a_7>``, 3 of
            the second ``<b_3>``.
        item_ids: the items that need codes.

    Raises:
        ValueError: a pickle (.pt), another form or shape, an item without codes.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     np.save(f"{folder}/codes.npy", np.array([[7, 3], [7, 4], [0, 1]]))
        ...     read_codes(f"{folder}/codes.npy", ["x", "y", "z"])
        [('<a_7>', '<b_3>'), ('<a_7>', '<b_4>'), ('<a_0>', '<b_1>')]
    """
    file = Path(path)
    check_regular(file, "a file of codes")
    if file.suffix in _PICKLES:
        raise ValueError(f"path: expected codes as .json, .npy or .safetensors, got a pickle, which is code: {file}")
    if file.stat().st_size > _MAX_BYTES:
        raise ValueError(f"{file}: expected at most {_MAX_BYTES} bytes, got more")
    if file.suffix == ".npy":
        with naming(file, "an array of integers"):
            return codes_of_array(np.load(file, mmap_mode="r", allow_pickle=False), len(item_ids), str(file))
    if file.suffix == ".safetensors":
        return codes_of_array(_tensor(file), len(item_ids), str(file))
    return codes_of_table(read_json(file, _MAX_BYTES), item_ids, str(file))


def codes_of_table(table: Mapping[str, Any], item_ids: Sequence[str], name: str) -> list[tuple[str, ...]]:
    """Codes by id, in the order of ``item_ids``; ``name`` is what errors say.

    >>> codes_of_table({"7": ["<a_1>", "<b_2>"], "9": "<a_1><b_3>", "8": [4, 0]}, ["9", "8"], "index.json")
    [('<a_1>', '<b_3>'), ('<a_4>', '<b_0>')]
    """
    missing = [item_id for item_id in item_ids if item_id not in table]
    if missing:
        got = f"none for {len(missing)} of {len(item_ids)} (as {shown(missing[0], 80)})"
        raise ValueError(f"{name}: expected codes for every item, got {got}")
    return [_codes(table[item_id], item_id, name) for item_id in item_ids]


def _codes(value: Any, item_id: str, name: str) -> tuple[str, ...]:
    codes = split_codes(value) if isinstance(value, str) else value
    if isinstance(codes, (list, tuple)) and codes:
        if all(isinstance(code, str) and code for code in codes):
            return tuple(codes)
        if all(isinstance(code, int) and not isinstance(code, bool) and code >= 0 for code in codes):
            return tuple(map(code_name, range(len(codes)), codes))
    wanted = "a list of codes, text or integers >= 0,"
    raise ValueError(f"{name}: expected {wanted} for id {shown(item_id, 80)}, got {shown(value, 80)}")


def split_codes(text: str) -> tuple[str, ...]:
    """The codes of a semantic ID in one text; a text that is none is one code.

    >>> split_codes("<a_1><b_2>"), split_codes("shelf 7")
    (('<a_1>', '<b_2>'), ('shelf 7',))
    """
    codes = tuple(_CODE.findall(text))
    return codes if "".join(codes) == text else (text,)


def code_name(level: int, code: int) -> str:
    """The text of a code.

    >>> code_name(1, 3)
    '<b_3>'
    """
    if level >= MAX_LEVELS:
        raise ValueError(f"levels: expected at most {MAX_LEVELS}, got {level + 1}")
    return f"<{_LETTERS[level]}_{code}>"


def codes_of_array(codes: Any, items: int, name: str) -> list[tuple[str, ...]]:
    """Codes of ``items`` items out of integers [items, levels] or [levels, items]; ``name`` is what errors say.

    >>> codes_of_array(np.array([[5, 6, 7], [0, 1, 0]]), 3, "codes")
    [('<a_5>', '<b_0>'), ('<a_6>', '<b_1>'), ('<a_7>', '<b_0>')]
    """
    array = np.asarray(codes)
    wanted = f"{name}: expected integers of shape [{items}, levels] or [levels, {items}]"
    if array.dtype.kind not in "iu" or array.ndim != 2 or items not in array.shape or not array.size:
        raise ValueError(f"{wanted}, got {array.dtype} {list(array.shape)}")
    if array.shape[0] == array.shape[1] > 1:
        raise ValueError(f"{wanted}, got {list(array.shape)}, which could be either; use JSON")
    array = array if array.shape[0] == items else array.T
    if array.shape[1] > MAX_LEVELS:
        raise ValueError(f"{wanted} with at most {MAX_LEVELS} levels, got {list(array.shape)}")
    if array.min() < 0:
        raise ValueError(f"{name}: expected codes >= 0, got {array.min()}")
    return names_of(array)


def names_of(codes: np.ndarray) -> list[tuple[str, ...]]:
    """The texts of codes int [items, levels], of at most ``MAX_LEVELS`` levels."""
    return [tuple(map(code_name, range(len(row)), row)) for row in codes.tolist()]


def _tensor(file: Path) -> np.ndarray:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy") as stream:
            keys = list(stream.keys())
            chosen = keys if len(keys) == 1 else [key for key in _NAMES if key in keys]
            if len(chosen) != 1:
                raise ValueError(f"{file}: expected one tensor, or one of {_NAMES}, got {shown(keys)}")
            return stream.get_tensor(chosen[0])
    except (SafetensorError, TypeError) as error:  # damaged; bfloat16, which NumPy lacks
        raise ValueError(f"{file}: expected a safetensors file of integers, got {error}") from error
