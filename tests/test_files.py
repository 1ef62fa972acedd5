"""Atomic files and folders."""

import os

import pytest

from flr.data import load_dataset
from flr.files import atomic_file, atomic_folder
from tests.helpers.catalogues import small_dataset


def test_atomic_writes_leave_the_old_and_no_litter(tmp_path):
    (tmp_path / "file").write_text("old")

    def fail(context, write):
        with context as temporary:
            write(temporary)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail(atomic_file(tmp_path / "file"), lambda file: file.write_text("half"))
    assert (tmp_path / "file").read_text() == "old"
    small_dataset().save(tmp_path / "set")
    with pytest.raises(RuntimeError):
        fail(atomic_folder(tmp_path / "set"), lambda folder: (folder / "items.parquet").write_text("half"))
    assert load_dataset(tmp_path / "set").name == "small"
    assert sorted(os.listdir(tmp_path)) == ["file", "set"]
    with pytest.raises(ValueError, match="got the file"), atomic_folder(tmp_path / "file"):
        pass
