"""Which files and columns are read, and how little of them at a time."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flr.batch import inputs
from flr.batch.inputs import find_files, look_at, read_rows, used_columns
from flr.batch.settings import BatchSettings
from flr.batch.storage import Place

LISTS = pa.list_(pa.string())


def test_rows_of_a_shard_come_in_pieces_of_the_row_groups_that_hold_them(tmp_path, monkeypatch):
    monkeypatch.setattr(inputs, "_PIECE", 4)
    pq.write_table(pa.table({"user": range(50), "more": range(50)}), tmp_path / "x.parquet", row_group_size=11)
    touched: list[int] = []
    original = pq.ParquetFile.iter_batches

    def counted(self, size, row_groups, columns):
        assert (size, columns) == (4, ["user"])
        touched.extend(row_groups)
        return original(self, size, row_groups=row_groups, columns=columns)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", counted)
    with Place.of(str(tmp_path / "x.parquet")).parquet() as file:
        for first in range(0, 50, 3):
            for last in range(first + 1, 51, 4):
                touched.clear()
                pieces = list(read_rows(file, first, last, ["user"]))
                assert [row for piece in pieces for row in piece.column(0).to_pylist()] == list(range(first, last))
                assert max(map(len, pieces)) <= 4
                assert touched == list(range(first // 11, (last - 1) // 11 + 1))


def test_files_are_found_in_order(tmp_path):
    names = ["b.parquet", "a.parquet", "more/c.parquet", "_old/d.parquet", ".e.parquet", "f.txt"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        pq.write_table(pa.table({"user": [1]}), tmp_path / name)

    def found(*urls):
        return [place.path.removeprefix(f"{tmp_path}/") for place in find_files([str(tmp_path / url) for url in urls])]

    assert found("") == ["a.parquet", "b.parquet", "more/c.parquet"]
    assert found("*.parquet") == ["a.parquet", "b.parquet"]
    assert found("f.txt", "a.parquet") == ["f.txt", "a.parquet"]
    with pytest.raises(ValueError, match=r"histories: expected Parquet files at .*none, got none"):
        found("none")
    with pytest.raises(ValueError, match=r"expected every file once, got .*a.parquet 2 times"):
        found("a.parquet", "*.parquet")
    with pytest.raises(ValueError, match="histories: expected a path or an URL that fsspec knows, got 'what://x'"):
        find_files(["what://x"])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"history": LISTS}, r"in: expected a column user_id or user \(user=\)"),
        ({"user": pa.int64()}, "in: expected one column 'history' of lists, got"),
        ({"user": pa.int64(), "item_id": pa.string()}, "a log with a row an event is grouped by user first"),
        ({"user": pa.int64(), "history": pa.string()}, "column 'history': expected lists of text or integers, got str"),
        ({"user": pa.int64(), "history": pa.list_(pa.float32())}, "expected lists of text or integers, got list"),
        ({"user": pa.int64(), "history": LISTS, "allow": pa.string()}, "column 'allow': expected lists of text"),
        (
            {"user": pa.int64(), "history": LISTS, "exclude_seen": pa.int8()},
            "'exclude_seen': expected booleans, got int8",
        ),
        ({"user": pa.int64(), "history": LISTS, "where.x": pa.int8()}, "column 'where.x': expected lists of values"),
    ],
)
def test_columns_of_another_form_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        used_columns(pa.schema(list(fields.items())), "in", None, "history")


def test_files_of_different_forms_and_of_none_are_refused(tmp_path):
    pq.write_table(pa.table({"user": ["a"], "history": [["x"]]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"user": [1], "history": [["x"]]}), tmp_path / "b.parquet")
    with pytest.raises(ValueError, match=r"b.parquet: expected the columns of .*a.parquet, .*'user': 'string'"):
        look_at(find_files([str(tmp_path)]), None, "history")
    (tmp_path / "b.parquet").write_text("text")
    with pytest.raises(ValueError, match=r"b.parquet: expected a Parquet file, got"):
        look_at(find_files([str(tmp_path)]), None, "history")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "k: expected an integer from 1 to 1000, got 0"),
        ({"shard_size": 10**7}, "shard_size: expected an integer from 1 to 1000000, got 10000000"),
        ({"threads": True}, "threads: expected an integer from 1 to 1024, got True"),
        ({"device": "tpu"}, "device: expected one of cpu, cuda, got 'tpu'"),
        ({"scoring": "best"}, "scoring: expected one of auto, full, catalogue, got 'best'"),
    ],
)
def test_settings_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        BatchSettings(**options)
