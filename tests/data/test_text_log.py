"""Logs of text with a header, and the titles of their items."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flr.data import load_dataset
from flr.data.text_log import clean_title

EVENTS = [(f"u{u}", f"i{(u + i) % 5}", 100 * i + u) for u in range(10) for i in range(5)]


def log(path, header="user_id,item_id,timestamp", rows=EVENTS, delimiter=","):
    lines = [header, *(delimiter.join(map(str, row)) for row in rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_logs_of_any_delimiter_and_columns(tmp_path):
    expected = load_dataset(log(tmp_path / "log.csv"), "csv")
    assert (len(expected.catalogue), len(expected.train), len(expected.test)) == (5, 32, 4)
    assert expected.name == "log"
    for delimiter in ("\t", ";", "|", "::"):
        names = delimiter.join(["who", "what", "when"])
        file = log(tmp_path / "named.txt", names, delimiter=delimiter)
        named = load_dataset(file, "csv", user="who", item="what", time="when")
        assert (named.train, named.test) == (expected.train, expected.test)
    (tmp_path / "log.csv.gz").write_bytes(gzip.compress((tmp_path / "log.csv").read_bytes()))
    assert load_dataset(tmp_path / "log.csv.gz", "csv").test == expected.test
    quoted = log(
        tmp_path / "quoted.csv", '"user_id","item_id","timestamp"', [(f'"{u}"', f'"{i}"', t) for u, i, t in EVENTS]
    )
    assert load_dataset(quoted, "csv").test == expected.test
    with pytest.raises(
        ValueError, match=r"named.txt: expected a column user_id or user \(user=\), got \['who', 'what'"
    ):
        load_dataset(file, "csv")
    with pytest.raises(ValueError, match=r"expected a column where \(time=\), got"):
        load_dataset(file, "csv", user="who", item="what", time="where")


def test_times_as_dates_and_bounds(tmp_path):
    days = [(user, item, f"2015-01-{1 + time // 100:02} 10:00:{time % 100:02}") for user, item, time in EVENTS]
    dataset = load_dataset(log(tmp_path / "log.csv", rows=days), "csv", since="2015-01-02", min_interactions=4)
    assert dataset.report.rows_kept == 40
    assert "10 events outside since='2015-01-02', until=None" in dataset.report.notes
    assert dataset.train.timestamps.min() == 1420279200  # 2015-01-03T10:00Z: the second day's items are histories
    with pytest.raises(ValueError, match="expected events after the 5-core filter, got none of 40"):
        load_dataset(tmp_path / "log.csv", "csv", since="2015-01-02", min_interactions=5)
    with pytest.raises(ValueError, match=r"log.csv: expected events, got none"):
        load_dataset(tmp_path / "log.csv", "csv", since="2016-01-01")
    file = log(tmp_path / "untimed.csv", "user,item", [event[:2] for event in EVENTS])
    with pytest.raises(ValueError, match="since: expected none for a log without times"):
        load_dataset(file, "csv", since="2015-01-01", split="leave_one_out")
    with pytest.raises(ValueError, match="split: expected 'leave_one_out' for a log without times"):
        load_dataset(file, "csv")
    assert len(load_dataset(file, "csv", split="leave_one_out").test) == 10


def test_titles_beside_events_and_in_files(tmp_path):
    rows = [(user, item, time, f'"Item, {item}"') for user, item, time in EVENTS]
    file = log(tmp_path / "log.csv", "user_id,item_id,timestamp,title", rows)
    assert load_dataset(file, "csv").catalogue.titles == [f"Item, i{n}" for n in range(5)]
    tables = {
        "about.csv": "item_id,title,price\n" + "".join(f'i{n},"Cup, ""{n}""",5\n' for n in range(5)),
        "about.jsonl": "".join(json.dumps({"item_id": f"i{n}", "title": f'Cup, "{n}"'}) + "\n" for n in range(5)),
    }
    for name, text in tables.items():
        (tmp_path / name).write_text(text)
        dataset = load_dataset(file, "csv", metadata=tmp_path / name)
        assert dataset.catalogue.titles == [f'Cup, "{n}"' for n in range(5)]
    with pytest.raises(ValueError, match=r"about.csv: expected a column label \(title=\), got"):
        load_dataset(file, "csv", metadata=tmp_path / "about.csv", title="label")
    (tmp_path / "about.csv").write_text("item_id,label\ni0,Tea\ni1\ni2,\n")
    dataset = load_dataset(file, "csv", metadata=tmp_path / "about.csv", title="label", max_bad_share=0.4)
    assert dataset.catalogue.titles == ["Tea", "i1", "i2", "i3", "i4"]
    assert "malformed item: about.csv:3: expected 2 cells, got 1 cells" in dataset.report.notes
    with pytest.raises(ValueError, match=r"expected malformed rows up to max_bad_share 0.01, got 1 of 3"):
        load_dataset(file, "csv", metadata=tmp_path / "about.csv", title="label")
    with pytest.raises(ValueError, match=r"expected a column label \(title=\), got"):
        load_dataset(file, "csv", title="label")
    items = pa.table({"item_id": [f"i{n}" for n in range(5)], "title": list("ABCDE"), "price": range(5)})
    pq.write_table(items, tmp_path / "about.parquet")
    dataset = load_dataset(file, "csv", metadata=tmp_path / "about.parquet")
    assert (dataset.catalogue.titles, dataset.catalogue.attributes) == (list("ABCDE"), {})
    left_out = "about.parquet: columns ['price'] are left out: titles alone are read unless the log is a Parquet file"
    assert any(note.startswith(left_out) for note in dataset.report.notes)
    with pytest.raises(ValueError, match=r"metadata: expected a file beside a log that is neither .*, got Table"):
        load_dataset(file, "csv", metadata=items)


def test_malformed_rows_are_counted(tmp_path):
    bad = [("", "i1", 5), ("u1", "", 5), ("u1", "i1", "soon"), ("u1", "i1"), ("u\ufffd", "i1", 5), ("u1", "i1", "")]
    file = log(tmp_path / "log.csv", rows=[*EVENTS[:3], *bad, *EVENTS[3:]])
    dataset = load_dataset(file, "csv", max_bad_share=0.2)
    assert (dataset.report.rows_read, dataset.report.rows_kept, dataset.report.rows_bad) == (56, 50, 6)
    assert [(row.line, row.reason) for row in dataset.report.examples[:4]] == [
        (5, "expected user_id and item_id in UTF-8, got '', 'i1'"),
        (6, "expected user_id and item_id in UTF-8, got 'u1', ''"),
        (7, "timestamp: expected a number, got 'soon'"),
        (8, "expected 3 cells, got 2 cells"),
    ]
    assert dataset.train == load_dataset(log(tmp_path / "good.csv"), "csv").train
    with pytest.raises(ValueError, match=r"got 6 of 56\n  log.csv:5: "):
        load_dataset(file, "csv")


def test_progress_reaches_the_size_of_the_file(tmp_path):
    file = log(tmp_path / "log.csv")
    seen = []
    load_dataset(file, "csv", progress=lambda *said: seen.append(said))
    assert seen[-1] == ("log.csv", file.stat().st_size, file.stat().st_size)


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("I <3 You", "I <3 You"),
        ("a\tb\r\nc\x00d\u200b", "a b c d"),
        ("<a href='x'>Blue</a> Train", "Blue Train"),
        ("Tom &#38; Jerry &quot;Live&quot;", 'Tom & Jerry "Live"'),
        ("", ""),
    ],
)
def test_clean_title(raw, clean):
    assert clean_title(raw) == clean
