"""Loading a data set of whatever format."""

import pytest

from flr.data import load_dataset


def test_load_dataset_errors(tmp_path):
    with pytest.raises(ValueError, match="got nothing"):
        load_dataset(tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(ValueError, match=r"got \['notes.txt'\]"):
        load_dataset(tmp_path)
    with pytest.raises(ValueError, match=r"format: expected one of .* got 'xml'"):
        load_dataset(tmp_path, format="xml")
    with pytest.raises(
        ValueError, match=r"split: expected none for .* \(prepared; it was read and split before\), got 'time'"
    ):
        load_dataset(tmp_path, format="prepared", split="time")
