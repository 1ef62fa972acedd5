"""Which folders a prepared one may take the place of."""

import json
import os

import pytest

from flr.data import RecDataset
from flr.data.prepared_folder import check_output
from tests.helpers.catalogues import DATA, small_dataset


@pytest.mark.parametrize("name", ["log.csv", "notes/thesis.txt", "sids/mine.json", "items.parquet/part", ".hidden"])
def test_what_others_wrote_is_not_replaced(tmp_path, name):
    place = tmp_path / "set"
    small_dataset().save(place)
    file = place / name
    if name.startswith("items"):
        (place / "items.parquet").unlink()
    file.parent.mkdir(exist_ok=True)
    file.write_text("precious")
    first = name if name.startswith("sids") else name.split("/")[0]
    wanted = "output: expected a new or an empty folder, or one that flr prepare wrote"
    with pytest.raises(ValueError, match=f"^{wanted}, got {place} with {first}$"):
        DATA.save(place)
    assert file.read_text() == "precious"
    assert os.listdir(tmp_path) == ["set"]


def test_what_prepare_and_sids_wrote_is_replaced(tmp_path):
    place = tmp_path / "set"
    place.mkdir()
    small_dataset().save(place)  # over an empty one
    (place / "sids").mkdir()
    for name in ("sids/sids.json", "sids/sid.index.json", "sids/codebooks.safetensors", ".meta.json.abcd_123.tmp"):
        (place / name).write_text("ours")
    meta = json.loads((place / "meta.json").read_text())
    del meta["sha256"]
    (place / "meta.json").write_text(json.dumps({**meta, "version": 0}))  # of another version
    DATA.save(place)
    assert RecDataset.load(place).train == DATA.train
    assert not (place / "sids").exists()


@pytest.mark.parametrize("meta", [None, '{"format": "other"}'])
def test_files_of_our_names_alone_are_not_ours(tmp_path, meta):
    (tmp_path / "items.parquet").write_text("precious")
    if meta is not None:
        (tmp_path / "meta.json").write_text(meta)
    with pytest.raises(ValueError, match=r"got .* without a meta\.json of format 'flr-dataset'$"):
        small_dataset().save(tmp_path)
    assert (tmp_path / "items.parquet").read_text() == "precious"


def test_a_link_stays_and_the_folder_it_leads_to_is_replaced(tmp_path):
    small_dataset().save(tmp_path / "disk")
    (tmp_path / "link").symlink_to("disk")
    DATA.save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert RecDataset.load(tmp_path / "disk").train == DATA.train


def test_places_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("precious")
    assert check_output(tmp_path / "a/b/set") == tmp_path.resolve() / "a/b/set"
    for place, got in (
        (tmp_path / "file", "the file"),
        (tmp_path / "file/set", ".*file/set: "),
        ("/proc/x", "/proc/x: "),
        ("/", "the mount point"),
    ):
        with pytest.raises(ValueError, match=f"^output: expected .*, got {got}"):
            check_output(place)
    assert os.listdir(tmp_path) == ["file"]
