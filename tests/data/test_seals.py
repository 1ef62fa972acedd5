"""A prepared folder whose files are not those that were saved together."""

import json

import pytest

from flr.data import Interactions, ReadReport, load_dataset
from tests.helpers.catalogues import DATA


def test_a_file_of_another_data_set_is_refused(tmp_path):
    DATA.save(tmp_path / "set")
    rows = DATA.train
    Interactions(rows.users, rows.histories, rows.targets[::-1].copy(), rows.timestamps).save(
        tmp_path / "set" / "train.parquet"
    )
    with pytest.raises(ValueError, match=r"train\.parquet: expected the file that was saved with meta\.json"):
        load_dataset(tmp_path / "set")
    file = tmp_path / "set" / "meta.json"
    meta = json.loads(file.read_text())
    assert set(meta.pop("sha256")) == {"items.parquet", "train.parquet", "valid.parquet", "test.parquet"}
    file.write_text(json.dumps(meta))  # as version 0.1 wrote it
    assert load_dataset(tmp_path / "set").valid == DATA.valid


@pytest.mark.parametrize(
    ("report", "message"),
    [
        ([], "report: expected an object, got list"),
        ({"rows_read": "3"}, "rows_read: expected int, got str"),
        ({"notes": [1]}, "notes: expected a list of text"),
        ({"examples": [{"file": "a"}]}, "examples: expected objects of"),
        ({"examples": [{"file": "a", "line": "1", "reason": "b"}]}, "examples: expected objects of"),
    ],
)
def test_reports_are_checked(report, message):
    with pytest.raises(ValueError, match=message):
        ReadReport.from_dict(report)


def test_what_is_not_utf8(tmp_path):
    """An id that is not is a malformed row; a title is kept, and the report says so."""
    (tmp_path / "items.txt").write_bytes(b"Caf\xe9\tx\nTea\ty\n")
    for part in ("train", "valid", "test"):
        rows = b"user_id,history_item_id,item_id\n" + b"u,\"['x']\",y\n" * 200
        (tmp_path / f"{part}.csv").write_bytes(rows + (b"\xe9,\"['x']\",y\n" if part == "train" else b""))
    dataset = load_dataset(tmp_path)
    assert dataset.catalogue.titles == ["Caf\ufffd", "Tea"]
    assert any("1 titles are not UTF-8" in note for note in dataset.report.notes)
    assert [(bad.file, bad.line) for bad in dataset.report.examples] == [("train.csv", 202)]
    (tmp_path / "items.txt").write_bytes(b"Tea\t\xe9\nTea\ty\n")
    with pytest.raises(ValueError, match=r"items\.txt:1: expected a new item id in UTF-8"):
        load_dataset(tmp_path)


def test_times_that_no_integer_holds(tmp_path):
    (tmp_path / "items.txt").write_text("Tea\tx\nCup\ty\n")
    header = "user_id,history_item_id,item_id,timestamp\n"
    for part in ("train", "valid", "test"):
        (tmp_path / f"{part}.csv").write_text(header + "u,\"['x']\",y,5\n" * 200)
    bad = "".join(f"u,\"['x']\",y,{time}\n" for time in ("1e300", "9" * 100_000, "nan", 2**63))
    (tmp_path / "train.csv").write_text(header + bad + "u,\"['x']\",y,5\n" * 600)
    dataset = load_dataset(tmp_path)
    assert [example.line for example in dataset.report.examples] == [2, 3, 4, 5]
    assert dataset.train.timestamps.tolist() == [5] * 600
