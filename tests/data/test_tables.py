"""Logs in Parquet tables."""

from datetime import datetime

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flr.data import Catalogue, load_dataset
from tests.helpers.logs import ROWS, recbole


def log_table(**changes):
    columns = {
        "user": [f"u{u}" for u in range(10) for _ in range(5)],
        "item": [(u + i) % 5 for u in range(10) for i in range(5)],
        "timestamp": [100 * i + u for u in range(10) for i in range(5)],
    }
    return pa.table({name: values for name, values in (columns | changes).items() if values is not None})


def test_parquet(tmp_path):
    folder = tmp_path / "shop"
    folder.mkdir()
    pq.write_table(log_table(), folder / "interactions.parquet")
    items = {
        "item_id": [0, 1, 2, 3, 4, 5],
        "title": ["A", None, "C", "D", "E", "F"],
        "sid": [["<a>", "<b>"]] * 6,
        "price": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0],
        "brand": ["x", "y", "x", "y", "x", "y"],
        "tags": [["t"]] * 6,
    }
    pq.write_table(pa.table(items), folder / "items.parquet")
    dataset = load_dataset(folder)
    assert dataset.name == "shop"
    assert dataset.catalogue == Catalogue(
        list("01234"),
        ["A", "1", "C", "D", "E"],
        [("<a>", "<b>")] * 5,
        {"price": [1.0, 2.0, 3.0, 4.0, 5.0], "brand": ["x", "y", "x", "y", "x"]},
    )
    assert any("'tags'" in note for note in dataset.report.notes)
    recbole_set = load_dataset(recbole(tmp_path / "ml", ROWS))
    assert dataset.test.targets.tolist() == recbole_set.test.targets.tolist()
    stamps = pa.array([datetime.fromtimestamp(t) for t in log_table()["timestamp"].to_pylist()], pa.timestamp("us"))
    pq.write_table(log_table(timestamp=stamps), tmp_path / "stamped.parquet")
    stamped = load_dataset(tmp_path / "stamped.parquet")
    assert stamped.test.targets.tolist() == dataset.test.targets.tolist()
    shifts = set((stamped.test.timestamps - dataset.test.timestamps).tolist())
    assert len(shifts) == 1  # the zone of the machine


def test_parquet_bad_rows_and_columns(tmp_path):
    file = tmp_path / "log.parquet"
    good = log_table()
    extra = pa.table({"user": [None, "", "u1"], "item": [1, 2, None], "timestamp": [1, 2, 3]})
    pq.write_table(pa.concat_tables([good.slice(0, 2), extra.cast(good.schema), good.slice(2)]), file)
    dataset = load_dataset(file, max_bad_share=0.1)
    assert dataset.report.rows_bad == 3
    assert {example.line for example in dataset.report.examples} == {3, 4, 5}
    with pytest.raises(ValueError, match="got 3 of 53"):
        load_dataset(file)
    pq.write_table(log_table(user=None), file)
    with pytest.raises(ValueError, match="expected a column user_id or user"):
        load_dataset(file)
    pq.write_table(log_table(item=[0.5] * 50), file)
    with pytest.raises(ValueError, match="column 'item': expected text or integers, got double"):
        load_dataset(file)
    pq.write_table(log_table(timestamp=None), file)
    with pytest.raises(ValueError, match="expected 'leave_one_out' for a log without times"):
        load_dataset(file)
    assert len(load_dataset(file, split="leave_one_out").test) == 10
