"""Folders that commands write."""

import os

import pytest

from flr.cli.written import new_folder, writing


def test_a_link_to_an_empty_folder_stays(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to("disk")
    with writing(new_folder("output", str(tmp_path / "link"))) as place:
        (place / "model").write_text("whole")
    assert (tmp_path / "link").is_symlink()
    assert os.listdir(tmp_path / "disk") == ["model"]
    with pytest.raises(ValueError, match="output: expected a new or an empty folder, got"):
        new_folder("output", str(tmp_path / "link"))
