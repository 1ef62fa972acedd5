"""Semantic IDs from files."""

import json
import pickle

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from flr.data import read_codes

IDS = ["x", "y", "z"]
CODES = np.array([[7, 3], [7, 3], [0, 12]])
EXPECTED = [("<a_7>", "<b_3>"), ("<a_7>", "<b_3>"), ("<a_0>", "<b_12>")]


def test_every_form_gives_the_same_codes(tmp_path):
    tables = {
        "lists": dict(zip(IDS, map(list, EXPECTED), strict=True)),
        "texts": dict(zip(IDS, map("".join, EXPECTED), strict=True)),
        "numbers": dict(zip(IDS, CODES.tolist(), strict=True)),
    }
    for name, table in tables.items():
        file = tmp_path / f"{name}.index.json"
        file.write_text(json.dumps({"unused": ["<a_1>"], **dict(reversed(table.items()))}))
        assert read_codes(file, IDS) == EXPECTED
    for dtype in (np.int64, np.uint8, np.int16):
        for array in (CODES, np.ascontiguousarray(CODES.T)):
            np.save(tmp_path / "codes.npy", array.astype(dtype))
            assert read_codes(tmp_path / "codes.npy", IDS) == EXPECTED
            save_file({"codes": array.astype(dtype), "other": np.zeros(3)}, tmp_path / "codes.safetensors")
            assert read_codes(tmp_path / "codes.safetensors", IDS) == EXPECTED
    save_file({"anything": CODES}, tmp_path / "one.safetensors")
    assert read_codes(tmp_path / "one.safetensors", IDS) == EXPECTED


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((3, 2)), r"expected integers of shape \[3, levels\] or \[levels, 3\], got float64 \[3, 2\]"),
        (np.zeros((4, 2), int), r"got int64 \[4, 2\]"),
        (np.zeros(3, int), r"got int64 \[3\]"),
        (np.zeros((3, 0), int), r"got int64 \[3, 0\]"),
        (np.zeros((3, 3), int), r"got \[3, 3\], which could be either"),
        (np.zeros((3, 27), int), r"with at most 26 levels, got \[3, 27\]"),
        (-np.ones((3, 2), int), "expected codes >= 0, got -1"),
    ],
)
def test_arrays_of_other_shapes_are_refused(tmp_path, array, message):
    np.save(tmp_path / "codes.npy", array)
    with pytest.raises(ValueError, match=message):
        read_codes(tmp_path / "codes.npy", IDS)


@pytest.mark.parametrize(
    ("value", "got"),
    [([], r"\[\]"), ("", "''"), (None, "None"), (["<a_1>", 2], "1"), ([-1], "-1"), ([True], "True"), ([[1]], "1")],
)
def test_tables_with_other_values_are_refused(tmp_path, value, got):
    file = tmp_path / "index.json"
    file.write_text(json.dumps({"x": [1], "y": value, "z": [1]}))
    with pytest.raises(ValueError, match=rf"index.json: expected a list of codes, .* for id 'y', got .*{got}"):
        read_codes(file, IDS)
    with pytest.raises(ValueError, match=r"expected codes for every item, got none for 1 of 2 \(as 'w'\)"):
        read_codes(file, ["x", "w"])


def test_pickles_and_damaged_files_are_refused(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "pwned"), "w"))

    for name in ("codes.pt", "codes.bin", "codes.pkl"):
        torch.save(torch.tensor(CODES), tmp_path / name)
        with pytest.raises(ValueError, match=r"path: expected codes as .json, .npy or .safetensors, got a pickle"):
            read_codes(tmp_path / name, IDS)
    np.save(tmp_path / "objects.npy", np.array([Bomb()] * 3), allow_pickle=True)
    with pytest.raises(ValueError, match=r"objects.npy: expected an array of integers"):
        read_codes(tmp_path / "objects.npy", IDS)
    (tmp_path / "pickled.npy").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ValueError, match=r"pickled.npy: expected an array of integers"):
        read_codes(tmp_path / "pickled.npy", IDS)
    assert not (tmp_path / "pwned").exists()
    (tmp_path / "cut.safetensors").write_bytes(b"\x40\x00\x00\x00\x00\x00\x00\x00{")
    with pytest.raises(ValueError, match=r"cut.safetensors: expected a safetensors file of integers"):
        read_codes(tmp_path / "cut.safetensors", IDS)
    save_file({"a": CODES, "b": CODES}, tmp_path / "two.safetensors")
    with pytest.raises(ValueError, match=r"expected one tensor, or one of .* got \['a', 'b'\]"):
        read_codes(tmp_path / "two.safetensors", IDS)
    with pytest.raises(ValueError, match=r"path: expected a file of codes at .*, got none"):
        read_codes(tmp_path / "nowhere.json", IDS)
