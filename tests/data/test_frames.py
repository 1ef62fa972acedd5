"""Tables in memory: every kind gives the same data set, and what cannot be read is refused by table and column."""

import datetime

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flr.data import Catalogue, Interactions, load_dataset
from flr.data.frames import KINDS, as_table, is_frame, kind_of, to_frame

LOG = pa.table(
    {
        "user_id": [f"u{u}" for u in range(10) for _ in range(5)],
        "item_id": [(u + i) % 5 for u in range(10) for i in range(5)],
        "timestamp": [100 * i + u for u in range(10) for i in range(5)],
        "note": [None] * 50,
    }
)
ITEMS = pa.table({"item_id": [0, 1, 2, 3, 4], "title": ["A", "B", "C", None, "E"], "price": [0.5, 1.0, 2.0, 3.0, 4.0]})
CATALOGUE = Catalogue(list("01234"), ["A", "B", "C", "3", "E"])
ZONE = datetime.timezone(datetime.timedelta(hours=2))


def frame(table: pa.Table, kind: str):
    """A table as a frame of a kind; "lazy" is polars' lazy frame."""
    if kind != "pyarrow":
        pytest.importorskip("polars" if kind == "lazy" else kind)
    return to_frame(table, "polars").lazy() if kind == "lazy" else to_frame(table, kind)


@pytest.mark.parametrize("kind", [*KINDS, "lazy"])
def test_every_kind_gives_what_the_file_gives(tmp_path, kind):
    pq.write_table(LOG, tmp_path / "interactions.parquet")
    pq.write_table(ITEMS, tmp_path / "items.parquet")
    expected = load_dataset(tmp_path)
    given = frame(LOG, kind)
    assert is_frame(given)
    assert kind_of(given) == ("polars" if kind == "lazy" else kind)
    dataset = load_dataset(given, metadata=frame(ITEMS, kind))
    assert (dataset.catalogue, dataset.train, dataset.test) == (expected.catalogue, expected.train, expected.test)
    assert dataset.catalogue == Catalogue(
        CATALOGUE.item_ids, CATALOGUE.titles, attributes={"price": ITEMS["price"].to_numpy()}
    )
    assert load_dataset(given, metadata=tmp_path / "items.parquet").catalogue == expected.catalogue
    rows = Interactions.from_frame(given, CATALOGUE)
    assert rows[0].history.tolist() == [0]
    assert len(rows) == 40
    assert rows.timestamps.tolist()[:4] == [100, 200, 300, 400]
    assert Catalogue.from_frame(frame(ITEMS, kind)) == CATALOGUE
    assert to_frame(LOG, like=given).shape == (50, 4)
    assert kind_of(to_frame(LOG, like=given)) == kind_of(given)


def test_columns_go_by_name():
    log = LOG.rename_columns(["who", "what", "when", "user_id"])
    named = {"user": "who", "item": "what", "time": "when"}
    expected = load_dataset(LOG)
    assert load_dataset(log, **named).train == expected.train
    assert Interactions.from_frame(log, CATALOGUE, **named) == Interactions.from_frame(LOG, CATALOGUE)
    items = pa.table({"what": [4, 3, 2, 1, 0], "called": list("EDCBA"), "code": [["x", "y"]] * 5, "n": [1] * 5})
    dataset = load_dataset(log, metadata=items, title="called", **named)
    assert dataset.catalogue.titles == list("ABCDE")
    catalogue = Catalogue.from_frame(items, item="what", title="called", sid="code", attributes=["n"])
    assert catalogue == Catalogue(list("43210"), list("EDCBA"), [("x", "y")] * 5, {"n": np.ones(5, int)})
    with pytest.raises(ValueError, match=r"log: expected a column where \(time=\), got \['who', 'what', 'when'"):
        load_dataset(log, user="who", item="what", time="where")
    both = LOG.append_column("user", LOG["user_id"])
    with pytest.raises(ValueError, match=r"expected one column for user, got \['user_id', 'user'\]; choose with user="):
        load_dataset(both)
    assert load_dataset(both, user="user").train == expected.train


def changed(name: str, values) -> pa.Table:
    return LOG.set_column(LOG.column_names.index(name), name, values)


SECONDS = LOG["timestamp"].cast(pa.timestamp("s"))
NANOSECONDS = pa.chunked_array([[1_700_000_000_000_000_000 + 10**9 * t for t in LOG["timestamp"].to_pylist()]])
ITEM_TEXT = LOG["item_id"].cast(pa.string())


@pytest.mark.parametrize(
    ("name", "values", "shift"),
    [
        ("item_id", ITEM_TEXT, 0),
        ("item_id", ITEM_TEXT.cast(pa.large_string()), 0),
        ("item_id", ITEM_TEXT.cast(pa.string_view()), 0),
        ("item_id", ITEM_TEXT.dictionary_encode(), 0),
        ("item_id", LOG["item_id"].dictionary_encode(), 0),
        ("item_id", LOG["item_id"].cast(pa.uint64()), 0),
        ("timestamp", LOG["timestamp"].cast(pa.float64()), 0),
        ("timestamp", LOG["timestamp"].cast(pa.uint16()), 0),
        ("timestamp", SECONDS, 0),
        ("timestamp", SECONDS.cast(pa.timestamp("ms", "Europe/Berlin")), 0),
        ("timestamp", SECONDS.cast(pa.timestamp("us")), 0),
        ("timestamp", NANOSECONDS.cast(pa.timestamp("ns")), 1_700_000_000),
    ],
    ids=str,
)
def test_types_of_columns(name, values, shift):
    rows = Interactions.from_frame(changed(name, values), CATALOGUE)
    expected = Interactions.from_frame(LOG, CATALOGUE)
    assert (rows.timestamps - shift).tolist() == expected.timestamps.tolist()
    assert rows.users == expected.users
    assert np.array_equal(rows.targets, expected.targets)


def test_moments_of_zones_are_compared_and_whole_seconds_stay():
    """Summer time goes by the moment: 02:30 comes twice in Berlin, and the first time is the earlier one."""
    first = datetime.datetime(2023, 10, 29, 2, 30, tzinfo=ZONE)
    log = pd.DataFrame({"user": "u", "item": [1, 0], "time": [first + datetime.timedelta(hours=1), first]})
    log["time"] = log["time"].dt.tz_convert("Europe/Berlin")
    [row] = Interactions.from_frame(log, CATALOGUE)
    assert (row.history.tolist(), row.target, row.timestamp) == ([0], 1, int(first.timestamp()) + 3600)
    days = pa.table(
        {"user": ["u", "u"], "item": [1, 0], "time": [datetime.date(1970, 1, 3), datetime.date(1970, 1, 2)]}
    )
    assert Interactions.from_frame(days, CATALOGUE)[0].timestamp == 2 * 86400
    ids = [2**63 - 1, 2**63 - 2]  # not told apart as floats
    late = pa.table({"user": ["u", "u"], "item": [1, 0], "time": ids})
    assert Interactions.from_frame(late, CATALOGUE)[0].target == 1
    assert Catalogue.from_frame(pa.table({"item": ids})).item_ids == [str(2**63 - 1), str(2**63 - 2)]


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("user_id", [None, "a"], r"frame: expected malformed rows .* got 1 of 2\n  frame:1: user_id: .* got None"),
        ("user_id", ["", "a"], r"frame:1: user_id: expected a value, got ''"),
        ("user_id", [0.5, 1.0], r"frame: column 'user_id': expected text or integers, got double \(pandas turns"),
        ("user_id", [True, False], "column 'user_id': expected text or integers, got bool"),
        ("user_id", [b"a", b"b"], "column 'user_id': expected text or integers, got binary"),
        ("user_id", [["a"], ["b"]], "column 'user_id': expected text or integers, got list"),
        ("item_id", [None, None], "frame:1: item_id: expected a value, got None"),
        ("item_id", [1, 77], "expected items of the catalogue, got '77' and 0 others that it lacks"),
        ("timestamp", [float("nan"), 1.0], "frame:1: timestamp: expected a value, got nan"),
        ("timestamp", [1.0, float("inf")], "frame:2: timestamp: expected a value, got inf"),
        ("timestamp", [1.0, 1e300], r"frame:2: timestamp: expected a value, got 1e\+300"),
        ("timestamp", ["2020-01-01", "2020-01-02"], "expected numbers, dates or timestamps, got string"),
        ("timestamp", [datetime.time(1), datetime.time(2)], "expected numbers, dates or timestamps, got time64"),
    ],
)
def test_bad_columns(name, values, message):
    columns = {"user_id": ["a", "a"], "item_id": [1, 2], "timestamp": [1, 2], name: values}
    with pytest.raises(ValueError, match=message):
        Interactions.from_frame(pa.table(columns), CATALOGUE)


def test_bad_frames():
    columns = {"user_id": ["a", "a"], "item_id": [1, 2], "timestamp": [1, 2]}
    for bad in ([1], columns, 3):
        with pytest.raises(ValueError, match="frame: expected a pandas, polars or pyarrow table"):
            Interactions.from_frame(bad, CATALOGUE)
    with pytest.raises(ValueError, match="choose one, or make a table"):
        Interactions.from_frame(columns, CATALOGUE)
    twice = pa.Table.from_arrays([pa.array(["a"]), pa.array([1]), pa.array([1])], ["user", "item", "item"])
    for table in (twice, twice.to_pandas()):
        with pytest.raises(ValueError, match=r"frame: expected (one column 'item', got 2|different columns)"):
            Interactions.from_frame(table, CATALOGUE)
    for mixed in ([1, "x"], [2**70, 3]):
        with pytest.raises(ValueError, match="frame: expected different columns, each of one type"):
            Interactions.from_frame(pd.DataFrame(columns | {"item_id": mixed}), CATALOGUE)
    odd = pd.DataFrame(columns | {"other": [1, "x"]})  # a column that nobody asks for does no harm
    assert len(Interactions.from_frame(odd, CATALOGUE)) == 1
    with pytest.raises(ValueError, match="expected times that fit int64"):
        Interactions.from_frame(pa.table(columns | {"timestamp": pa.array([1, 2**63], pa.uint64())}), CATALOGUE)
    with pytest.raises(ValueError, match=r"log: expected a pandas, polars or pyarrow table, .* got list"):
        load_dataset([1])
    with pytest.raises(ValueError, match="format: expected 'auto' for a table in memory, got 'csv'"):
        load_dataset(LOG, "csv")
    with pytest.raises(TypeError, match="user_field"):
        load_dataset(LOG, user_field="x")
    with pytest.raises(ValueError, match="max_history: expected at least 1, got 0"):
        Interactions.from_frame(LOG, CATALOGUE, max_history=0)
    with pytest.raises(ValueError, match=r"max_history: expected a whole number, got 5\.5"):
        Interactions.from_frame(LOG, CATALOGUE, max_history=5.5)
    years = pa.table({"user_id": [1, 1], "item_id": ["x", "x"], "timestamp": [2012.5, 2013.0]})
    with pytest.raises(ValueError, match="got fractions of an unknown unit"):
        Interactions.from_frame(years, CATALOGUE)


def test_bad_items():
    def refused(message, table, **options):
        with pytest.raises(ValueError, match=message):
            Catalogue.from_frame(table, **options)

    refused(r"frame: expected a column item_id or item \(item=\), got \['x'\]", pa.table({"x": [1]}))
    refused("frame: column 'item': expected an id, got None in row 2", pa.table({"item": [1, None]}))
    refused("frame: item_ids: expected 2 different ids, got 1 .'1' repeats.", pa.table({"item": [1, 1]}))
    refused("frame: column 'title': expected text, got int64", pa.table({"item": [1], "title": [2]}))
    refused("frame: column 'sid': expected text or a list of codes .* got None", pa.table({"item": [1], "sid": [None]}))
    refused(r"frame: expected one column 'price' \(attributes=\)", pa.table({"item": [1]}), attributes=["price"])
    nulls = pa.table({"item": [1, 2], "price": [None, 1.0]})
    refused("column 'price': expected numbers, bools or text .* 1 nulls", nulls, attributes=["price"])
    with pytest.raises(ValueError, match="metadata: expected different ids, one an item, got repeated"):
        load_dataset(LOG, metadata=pa.table({"item": [1, 1]}))


def test_datasets_streams_and_dictionaries_are_refused_with_advice():
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset(LOG)
    with pytest.raises(ValueError, match="load it without streaming"):
        load_dataset(rows.to_iterable_dataset())
    with pytest.raises(ValueError, match="choose one"):
        as_table(datasets.DatasetDict({"train": rows}), "log")
    backwards = rows.select(range(49, -1, -1))  # its rows lie in another order than its table's
    assert as_table(backwards, "log")["timestamp"].to_pylist() == LOG["timestamp"].to_pylist()[::-1]


def test_to_frame_errors(monkeypatch):
    for options in ({}, {"kind": "pandas", "like": LOG}, {"kind": "spark"}):
        with pytest.raises(ValueError, match="kind: expected one of"):
            to_frame(LOG, **options)
    with pytest.raises(ValueError, match="like: expected a frame, got int"):
        to_frame(LOG, like=3)
    monkeypatch.setitem(__import__("sys").modules, "polars", None)
    with pytest.raises(ModuleNotFoundError, match="kind: expected polars to be installed"):
        to_frame(LOG, "polars")
