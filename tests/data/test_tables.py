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


def test_lists_of_text_are_no_text(tmp_path):
    pq.write_table(log_table(), tmp_path / "interactions.parquet")
    pq.write_table(pa.table({"item_id": list(range(5)), "title": [["a"]] * 5}), tmp_path / "items.parquet")
    with pytest.raises(ValueError, match=r"items\.parquet: column 'title': expected text, got list"):
        load_dataset(tmp_path)
    pq.write_table(log_table(title=[["a"]] * 50), tmp_path / "interactions.parquet")
    (tmp_path / "items.parquet").unlink()
    with pytest.raises(ValueError, match=r"interactions\.parquet: column 'title': expected text, got list"):
        load_dataset(tmp_path)


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


def as_views(values):
    return values.cast(pa.string_view())


@pytest.mark.parametrize(
    "layout", [as_views, lambda values: values.cast(pa.large_string()), lambda values: values.dictionary_encode()]
)
def test_layouts_of_text_and_moments(tmp_path, layout):
    """Views, large strings and categories, as polars, DuckDB and pandas write them, in the log and in the items."""
    log = log_table(item=[str((u + i) % 5) for u in range(10) for i in range(5)])
    moments = pa.array([1_400_000_000_000 + 1000 * t for t in log["timestamp"].to_pylist()]).cast(
        pa.timestamp("ms", "Europe/Berlin")
    )
    pq.write_table(
        pa.table({"user": layout(log["user"]), "item": layout(log["item"]), "timestamp": moments}),
        tmp_path / "interactions.parquet",
    )
    column = lambda *values: layout(pa.chunked_array([values]))  # noqa: E731
    items = {
        "item": column(*"01234"),
        "title": column(*"ABCDE"),
        "brand": column(*"xyxyx"),
        "sid": pa.array([["<a>", f"<{n}>"] for n in range(5)], pa.list_(pa.string_view())),
        "released": pa.array([datetime(2020, 1, 1 + n) for n in range(5)], pa.timestamp("us", "UTC")),
        "day": pa.array([18262] * 5, pa.int32()).cast(pa.date32()),
        "stock": pa.chunked_array([range(5)]).dictionary_encode(),
    }
    pq.write_table(pa.table(items), tmp_path / "items.parquet")
    dataset = load_dataset(tmp_path, since="2014-05-13", until="2014-05-14")
    catalogue = dataset.catalogue
    assert (catalogue.item_ids, catalogue.titles) == (list("01234"), list("ABCDE"))
    assert catalogue.sids == [("<a>", f"<{n}>") for n in range(5)]
    attributes = {name: values.tolist() for name, values in catalogue.attributes.items()}
    assert attributes == {
        "brand": list("xyxyx"), "stock": [0, 1, 2, 3, 4], "day": [18262 * 86400] * 5,
        "released": [1577836800 + 86400 * n for n in range(5)],
    }  # fmt: skip
    assert dataset.train.timestamps.min() == 1_400_000_100
    assert dataset.test.targets.tolist() == load_dataset(log_table()).test.targets.tolist()


def test_what_is_left_out_because_of_one_unknown_item_is_said():
    items = pa.table({"item": list("0123"), "title": list("ABCD"), "price": [1, 2, 3, 4], "sid": list("wxyz")})
    dataset = load_dataset(log_table(), metadata=items)
    assert dataset.catalogue.titles == [*"ABCD", "4"]
    assert (dataset.catalogue.sids, dataset.catalogue.attributes) == (None, {})
    lacking = "1 items of the log are not in metadata (as '4')"
    left_out = "columns ['price', 'sid'] are left out for all items, since each one needs a value"
    assert f"{lacking}; {left_out}" in dataset.report.notes


def test_titles_beside_events_and_in_a_csv_file(tmp_path):
    titles = [f"Item {(u + i) % 5}" for u in range(10) for i in range(5)]
    beside = log_table(title=titles, label=[title.upper() for title in titles])
    assert load_dataset(beside).catalogue.titles == [f"Item {n}" for n in range(5)]
    pq.write_table(beside, tmp_path / "log.parquet")
    assert load_dataset(tmp_path / "log.parquet", title="label").catalogue.titles == [f"ITEM {n}" for n in range(5)]
    (tmp_path / "about.csv").write_text("item,title\n" + "".join(f'{n},"Cup, {n}"\n' for n in range(5)))
    dataset = load_dataset(tmp_path / "log.parquet", metadata=tmp_path / "about.csv")
    assert dataset.catalogue.titles == [f"Cup, {n}" for n in range(5)]
    with pytest.raises(ValueError, match=r"log: expected a column name \(title=\), got"):
        load_dataset(log_table(), title="name")
    with pytest.raises(ValueError, match="column 'user': expected text or integers, got decimal"):
        load_dataset(log_table(user=pa.array([1] * 50).cast(pa.decimal128(21, 1))))
    whole = load_dataset(log_table(user=pa.array([u for u in range(10) for _ in range(5)]).cast(pa.decimal128(21, 0))))
    assert whole.test.users == [name[1:] for name in load_dataset(log_table()).test.users]
