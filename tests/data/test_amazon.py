"""The raw Amazon files of both years."""

import gzip
import json
from datetime import datetime

import pytest

from flr.data import load_dataset, prepare_amazon
from flr.data.amazon import clean_title

DAY = 86400
START = 1_500_000_000


def reviews_2018(users=12, items=6):
    """Everyone reviews every item, a day apart; users begin an hour apart."""
    return [
        {
            "reviewerID": f"U{u}",
            "asin": f"B{(i + u) % items}",
            "unixReviewTime": START + i * DAY + u * 3600,
            "overall": 5.0,
        }
        for u in range(users)
        for i in range(items)
    ]


def write(path, records, compress=True):
    text = "".join((record if isinstance(record, str) else json.dumps(record)) + "\n" for record in records)
    path.write_bytes(gzip.compress(text.encode()) if compress else text.encode())
    return path


def metadata_2018():
    return [
        {"asin": "B0", "title": "Rock &amp; Roll"},
        {"asin": "B1", "title": '<span class="a-size-medium'},
        {"asin": "B2", "title": "Lone \ud83d surrogate"},
        {"asin": "B2", "title": "a second line for B2"},
        {"asin": "B3", "title": ["not text"]},
        {"asin": "B4"},
        {"asin": "B5", "title": "var aPageStart = (new Date()).getTime();"},
        {"asin": "unused", "title": "Unused"},
    ]


def test_amazon_2018(tmp_path):
    records = reviews_2018()
    records += [records[3], {"reviewerID": "once", "asin": "rare", "unixReviewTime": START}]
    file = write(tmp_path / "CDs.json.gz", records)
    meta = write(tmp_path / "meta_CDs.json.gz", metadata_2018())
    dataset = prepare_amazon(file, meta, output=tmp_path / "out")
    assert dataset.catalogue.item_ids == ["B0", "B1", "B2", "B3", "B4", "B5"]
    assert dataset.catalogue.titles == ["Rock & Roll", "B1", "Lone ? surrogate", "B3", "B4", "B5"]
    report = dataset.report
    assert (report.rows_read, report.rows_kept, report.rows_bad, report.users, report.items) == (74, 72, 0, 12, 6)
    assert "1 events left out that repeat another's user, item and time" in report.notes
    assert "1 events left out by the 5-core filter" in report.notes
    assert "4 of 6 items have no title; their id stands in" in report.notes
    rows = [*dataset.train, *dataset.valid, *dataset.test]
    assert len(rows) == 60
    times = [row.timestamp for row in rows]
    assert times == sorted(times)
    assert (len(dataset.train), len(dataset.valid), len(dataset.test)) == (48, 6, 6)
    for row in rows:
        user = int(row.user[1:])
        step = (row.timestamp - START - user * 3600) // DAY
        assert [dataset.catalogue.item_ids[item] for item in [*row.history, row.target]] == [
            f"B{(i + user) % 6}" for i in range(step + 1)
        ]
    assert load_dataset(tmp_path / "out").test == dataset.test


def test_amazon_2023_in_milliseconds_and_plain_jsonl(tmp_path):
    old = reviews_2018()
    new = [
        {
            "user_id": r["reviewerID"],
            "asin": "variant",
            "parent_asin": r["asin"],
            "timestamp": r["unixReviewTime"] * 1000 + 7,
        }
        for r in old
    ]
    left = prepare_amazon(write(tmp_path / "a.jsonl", new, compress=False), max_history=3)
    right = prepare_amazon(write(tmp_path / "b.json.gz", old), max_history=3)
    assert left.train == right.train
    assert left.test == right.test
    assert left.train.histories.lengths.max() == 3
    assert left.catalogue.titles == left.catalogue.item_ids
    with pytest.raises(ValueError, match="malformed"):
        prepare_amazon(tmp_path / "a.jsonl", release="2018")


def test_amazon_malformed_lines(tmp_path):
    bad = [
        "{not json",
        "[1, 2]",
        json.dumps({"reviewerID": "", "asin": "B1", "unixReviewTime": START}),
        json.dumps({"reviewerID": "U1", "asin": 7, "unixReviewTime": START}),
        json.dumps({"reviewerID": "U1", "asin": "B1", "unixReviewTime": "10 2, 2017"}),
        json.dumps({"reviewerID": "U1", "asin": "B1", "unixReviewTime": True}),
        '{"reviewerID": "U1", "asin": "B1", "unixReviewTime": 1' + "0" * 400 + "}",
        '{"reviewerID": "\\ud800", "asin": "B1", "unixReviewTime": 1500000000}',
        "[" * 100000,
        "\x00\xff",
    ]
    good = reviews_2018()
    file = write(tmp_path / "r.json.gz", [*good[:5], "   ", *bad, *good[5:]])
    dataset = prepare_amazon(file, max_bad_share=0.2)
    assert dataset.report.rows_bad == len(bad)
    assert dataset.report.rows_kept == len(good)
    assert [example.line for example in dataset.report.examples] == [7, 8, 9, 10, 11]
    clean = prepare_amazon(write(tmp_path / "clean.json.gz", good))
    assert dataset.train == clean.train
    with pytest.raises(ValueError, match=r"got 10 of 82.*\n  r.json.gz:7: expected JSON"):
        prepare_amazon(file)
    half = write(tmp_path / "meta.json.gz", [*metadata_2018(), *["{"] * 8])
    with pytest.raises(ValueError, match="got 8 of 16"):
        prepare_amazon(tmp_path / "clean.json.gz", half)


def test_amazon_truncated_and_empty_files(tmp_path):
    whole = write(tmp_path / "r.json.gz", reviews_2018()).read_bytes()
    (tmp_path / "half.json.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"half.json.gz: expected a whole gzip file"):
        prepare_amazon(tmp_path / "half.json.gz")
    with pytest.raises(ValueError, match="expected reviews, got an empty file"):
        prepare_amazon(write(tmp_path / "none.json.gz", []))
    with pytest.raises(ValueError, match="expected a file"):
        prepare_amazon(tmp_path / "nowhere.json.gz")
    with pytest.raises(ValueError, match="expected events after the 50-core filter, got none of 72"):
        prepare_amazon(tmp_path / "r.json.gz", min_interactions=50)
    with pytest.raises(ValueError, match="release: expected one of"):
        prepare_amazon(tmp_path / "r.json.gz", release="2014")


def test_amazon_since_until(tmp_path):
    file = write(tmp_path / "r.json.gz", reviews_2018())
    cut = datetime.fromtimestamp(START + 2 * DAY).astimezone().isoformat()
    dataset = prepare_amazon(file, since=cut, until=START + 6 * DAY, min_interactions=2, split="leave_one_out")
    assert dataset.report.rows_kept == 48
    assert "24 events outside since=" in dataset.report.notes[0]
    with pytest.raises(ValueError, match="since: expected an ISO date"):
        prepare_amazon(file, since="yesterday")


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
