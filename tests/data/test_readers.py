"""Readers on small files with awkward rows, and the two splits."""

import gzip
import json
from datetime import datetime

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flr.data import Catalogue, ReadReport, load_dataset, prepare_amazon
from flr.data.amazon import clean_title
from flr.data.splits import InteractionLog, LogBuilder, k_core, split_log, titled_catalogue

# ---- published CSV form ----

HEADER = "user_id,history_item_title,item_title,history_item_id,item_id,timestamp\n"
GOOD = 'u{n},"[\'Blue\']",Red,"[0, 1]",2,{n}\n'
ITEMS = 'Blue\t0\nGreen, "big"\t1\nRed\t2\nBlue\t3\n'


def published(folder, train="", items=ITEMS, good=200):
    folder.mkdir(exist_ok=True)
    (folder / "items.txt").write_text(items, encoding="utf-8")
    rows = "".join(GOOD.format(n=n) for n in range(good))
    (folder / "train.csv").write_text(HEADER + train + rows, encoding="utf-8-sig")
    for part in ("valid", "test"):
        (folder / f"{part}.csv").write_text(HEADER + GOOD.format(n=7), encoding="utf-8")
    return folder


def test_published_rows(tmp_path):
    quoted = 'v,"[\'it\'\'s\', ""b\'s""]",Red,"[\'0\', ""3""]",2,1518134400.0\n\n'
    dataset = load_dataset(published(tmp_path, quoted))
    assert dataset.train[0].history.tolist() == [0, 3]
    assert dataset.train[0].timestamp == 1518134400
    assert len(dataset.train) == 201
    assert dataset.report.rows_bad == 0
    assert dataset.report.rows_read == dataset.report.rows_kept == 203
    assert dataset.catalogue.titles[1] == 'Green, "big"'
    assert dataset.catalogue.find("Blue") == [0, 3]
    assert "1 items have a title that an earlier item has too" in str(dataset.report)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ('u,"[\'Blue\']",Red,"[0, 9]",2,5\n', "expected an item id of items.txt, got '9'"),
        ('u,"[\'Blue\']",Red,"[0, None]",2,5\n', "expected an item id of items.txt, got 'None'"),
        ('u,"[\'Blue\']",Red,"[0]",,5\n', "expected an item id of items.txt, got ''"),
        ('u,"[\'Blue\']",Red,"[0",2,5\n', "expected a list literal, got '\\[0'"),
        ('u,"[\'Blue\']",Red,"(0,)",2,5\n', "expected a list, got tuple"),
        ("u,\"['Blue']\",Red,\"__import__('os').getcwd()\",2,5\n", "expected a list literal, got .__import__"),
        ("u,\"['Blue']\",Red," + "[" * 5000 + ",2,5\n", "expected a list literal"),
        ('u,"[\'Blue\']",Red,"[' + "0," * 70000 + ']",2,5\n', "field larger than field limit"),
        ("u,['Blue'],Red,[0]\n", "expected 6 cells, got 4"),
        (',"[\'Blue\']",Red,"[0]",2,5\n', "user_id: expected an id"),
        ('u,"[\'Blue\']",Red,"[0]",2,soon\n', "timestamp: expected a number, got 'soon'"),
        ('u,"[\'Blue\']",Red,"[0]",2,inf\n', "timestamp: expected a number, got 'inf'"),
    ],
)
def test_published_malformed_rows(tmp_path, row, reason):
    dataset = load_dataset(published(tmp_path / "set", row))
    assert dataset.report.rows_bad == 1
    assert dataset.report.rows_kept == 202
    assert len(dataset.train) == 200
    bad = dataset.report.examples[0]
    assert (bad.file, bad.line) == ("train.csv", 2)
    with pytest.raises(
        ValueError, match=f"1 of 203 rows are malformed, more than max_bad_share 0 allows\n  train.csv:2: .*{reason}"
    ):
        load_dataset(tmp_path / "set", max_bad_share=0)


def test_published_open_quote_counts_the_lines_that_it_swallows(tmp_path):
    folder = published(tmp_path / "set", "u,\"['Blue'],Red,[0],2,5\n")  # closed by the next line's first quote
    dataset = load_dataset(folder)
    assert (dataset.report.rows_read, dataset.report.rows_bad, dataset.report.rows_kept) == (203, 2, 201)
    plain = "".join(f"u{n},Blue,Red,[1],2,{n}\n" for n in range(100))
    published(folder, plain + 'u,"Blue,Red,[0],2,5\n' + plain, good=0)  # never closed
    with pytest.raises(ValueError, match=r"101 of 203 rows are malformed.*\n  train.csv:102"):
        load_dataset(folder)


def test_published_missing_pieces(tmp_path):
    folder = published(tmp_path / "set")
    (folder / "valid.csv").unlink()
    with pytest.raises(ValueError, match=r"expected valid\.csv"):
        load_dataset(folder)
    (published(folder) / "train.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="expected columns"):
        load_dataset(folder)
    with pytest.raises(ValueError, match=r"items.txt:2: expected a new item id, got '0'"):
        load_dataset(published(folder, items="Blue\t0\nRed\t0\n"))
    with pytest.raises(ValueError, match=r"items.txt:1: expected 2 or 3 tab-separated cells, got 1"):
        load_dataset(published(folder, items="Blue\n"))


def test_published_semantic_ids(tmp_path):
    items = "<a_1><b_2>\tBlue\t0\n<a_1><b_2>\tRed\t1\nplain\tGreen\t2\n"
    dataset = load_dataset(published(tmp_path / "set", items=items))
    assert dataset.catalogue.sids == [("<a_1>", "<b_2>"), ("<a_1>", "<b_2>"), ("plain",)]
    assert "1 items have a semantic ID that an earlier item has too" in dataset.report.notes
    (tmp_path / "set" / "sid.index.json").write_text(json.dumps({"0": ["<a_1>", "<b_2>"], "1": ["<a_9>"]}))
    dataset = load_dataset(tmp_path / "set")
    assert dataset.catalogue.sids == [("<a_1>", "<b_2>"), ("<a_9>",), ("plain",)]
    assert "1 semantic IDs differ between items.txt and sid.index.json; the latter's are used" in dataset.report.notes
    published(tmp_path / "set", items="Blue\t0\nGreen\t1\nRed\t2\n")
    with pytest.raises(ValueError, match="expected a semantic ID for every item, got none for id '2'"):
        load_dataset(tmp_path / "set")
    (tmp_path / "set" / "sid.index.json").write_text("[1]")
    with pytest.raises(ValueError, match="expected a JSON object"):
        load_dataset(tmp_path / "set")


# ---- raw Amazon ----

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
    with pytest.raises(ValueError, match=r"10 of 82 rows are malformed.*\n  r.json.gz:7: expected JSON"):
        prepare_amazon(file)
    half = write(tmp_path / "meta.json.gz", [*metadata_2018(), *["{"] * 8])
    with pytest.raises(ValueError, match="8 of 16 rows are malformed"):
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


# ---- RecBole ----


def recbole(folder, rows, header="user_id:token\titem_id:token\trating:float\ttimestamp:float", items=None):
    folder.mkdir(exist_ok=True)
    (folder / "ml.inter").write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    if items is not None:
        (folder / "ml.item").write_text("\n".join(items) + "\n", encoding="utf-8")
    return folder


ROWS = [f"u{u}\ti{(u + i) % 5}\t4\t{100 * i + u}.0" for u in range(10) for i in range(5)]
ITEM_ROWS = [
    "item_id:token\tmovie_title:token_seq\tclass:token_seq",
    *[f"i{n}\tMovie {n} (1995)\tDrama" for n in range(4)],
]


def test_recbole(tmp_path):
    dataset = load_dataset(recbole(tmp_path / "ml", ROWS, items=ITEM_ROWS))
    assert dataset.name == "ml"
    assert dataset.catalogue.item_ids == ["i0", "i1", "i2", "i3", "i4"]
    assert dataset.catalogue.titles == ["Movie 0 (1995)", "Movie 1 (1995)", "Movie 2 (1995)", "Movie 3 (1995)", "i4"]
    assert len(dataset.train) + len(dataset.valid) + len(dataset.test) == 40
    assert dataset.train.timestamps.max() < dataset.test.timestamps.min()
    same = load_dataset(tmp_path / "ml" / "ml.inter")
    assert same.train == dataset.train


def test_recbole_awkward_rows(tmp_path):
    bad = ["u1\ti1\t4", "\ti1\t4\t5", "u1\ti1\t4\tnan", "u1\ti1\t4\tsoon", "u" * 2_000_000]
    folder = recbole(tmp_path / "ml", [*ROWS[:3], *bad, "", *ROWS[3:]])
    dataset = load_dataset(folder, max_bad_share=0.2)
    assert dataset.report.rows_bad == 5
    assert [(bad.file, bad.line) for bad in dataset.report.examples] == [("ml.inter", line) for line in range(5, 10)]
    assert dataset.train == load_dataset(recbole(tmp_path / "good", ROWS)).train
    with pytest.raises(ValueError, match=r"5 of 55 rows are malformed.*\n  ml.inter:5: expected 4 cells, got 3 cells"):
        load_dataset(folder)


def test_recbole_errors_and_options(tmp_path):
    with pytest.raises(ValueError, match="expected a header of different NAME:TYPE cells"):
        load_dataset(recbole(tmp_path / "a", ROWS, header="user_id\titem_id\trating\ttimestamp"))
    with pytest.raises(ValueError, match="expected a field 'user_id'"):
        load_dataset(recbole(tmp_path / "b", ROWS, header="uid:token\titem_id:token\trating:float\ttimestamp:float"))
    renamed = recbole(tmp_path / "b", ROWS, header="uid:token\titem_id:token\trating:float\tt:float")
    with pytest.raises(ValueError, match="split: 'time' needs a time for every event"):
        load_dataset(renamed, user_field="uid")
    assert len(load_dataset(renamed, user_field="uid", time_field="t").test) > 0
    ordered = load_dataset(renamed, user_field="uid", split="leave_one_out")  # without times: the order of the file
    assert ordered.test.timestamps is None
    assert len(ordered.test) == 10
    with pytest.raises(ValueError, match=r"options: format 'recbole' has .* got 'max_histories'"):
        load_dataset(renamed, max_histories=3)
    (tmp_path / "b" / "other.inter").write_text("")
    with pytest.raises(ValueError, match="a folder with exactly one, got"):
        load_dataset(renamed)
    two = ["item_id:token\ttitle:token_seq\tname:token", "i0\tA\tB"]
    dataset = load_dataset(recbole(tmp_path / "c", ROWS, items=two))
    assert any("no single field for titles" in note for note in dataset.report.notes)
    assert load_dataset(tmp_path / "c", title_field="name").catalogue.titles[0] == "B"


# ---- Parquet ----


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
    with pytest.raises(ValueError, match="3 of 53 rows are malformed"):
        load_dataset(file)
    pq.write_table(log_table(user=None), file)
    with pytest.raises(ValueError, match="expected a column user or user_id"):
        load_dataset(file)
    pq.write_table(log_table(item=[0.5] * 50), file)
    with pytest.raises(ValueError, match="column 'item': expected text or integers, got double"):
        load_dataset(file)
    pq.write_table(log_table(timestamp=None), file)
    with pytest.raises(ValueError, match="needs a time for every event"):
        load_dataset(file)
    assert len(load_dataset(file, split="leave_one_out").test) == 10


def test_load_dataset_errors(tmp_path):
    with pytest.raises(ValueError, match="found nothing"):
        load_dataset(tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(ValueError, match=r"found \['notes.txt'\]"):
        load_dataset(tmp_path)
    with pytest.raises(ValueError, match=r"format: expected one of .* got 'xml'"):
        load_dataset(tmp_path, format="xml")
    with pytest.raises(ValueError, match="options: format 'prepared' has none, got 'split'"):
        load_dataset(tmp_path, format="prepared", split="time")


# ---- splits ----

EVENTS = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 5), st.integers(0, 9)), min_size=1, max_size=40)


def build(events) -> InteractionLog:
    log = LogBuilder()
    for user, item, time in events:
        log.add(f"u{user}", f"i{item}", time)
    return log.build()


@settings(max_examples=100, deadline=None)
@given(EVENTS, st.integers(1, 3))
def test_k_core_equals_plain_peeling(events, minimum):
    left = list(events)
    while True:
        kept = [
            e for e in left if sum(f[0] == e[0] for f in left) >= minimum and sum(f[1] == e[1] for f in left) >= minimum
        ]
        if len(kept) == len(left):
            break
        left = kept
    core = k_core(build(events), minimum)
    got = [
        (core.user_names[u], core.item_ids[i], t) for u, i, t in zip(core.users, core.items, core.times, strict=True)
    ]
    assert got == [(f"u{u}", f"i{i}", float(t)) for u, i, t in left]


@settings(max_examples=150, deadline=None)
@given(EVENTS, st.sampled_from(["time", "leave_one_out"]), st.integers(1, 4))
def test_split_equals_plain_construction(events, split, max_history):
    report = ReadReport("log")
    arguments = {"split": split, "max_history": max_history, "min_interactions": 1, "name": "x", "report": report}
    try:
        dataset = split_log(build(events), describe=lambda ids: titled_catalogue(ids, {}, report), **arguments)
    except ValueError as error:
        assert "rows from split=" in str(error)  # noqa: PT017
        return
    plain: dict[str, list[tuple[int, str]]] = {}
    for user, item, time in dict.fromkeys(events):
        plain.setdefault(f"u{user}", []).append((time, f"i{item}"))
    expected = []
    for user, sequence in plain.items():
        sequence.sort(key=lambda event: event[0])  # stable: ties stay in the order of the file
        for place in range(1, len(sequence)):
            history = tuple(item for _, item in sequence[max(0, place - max_history) : place])
            left = len(sequence) - place
            part = "train" if len(sequence) < 3 or left > 2 else {1: "test", 2: "valid"}[left]
            expected.append((part, user, history, sequence[place][1], sequence[place][0]))
    names = dataset.catalogue.item_ids
    got = [
        (part, row.user, tuple(names[item] for item in row.history), names[row.target], row.timestamp)
        for part in ("train", "valid", "test")
        for row in getattr(dataset, part)
    ]
    if split == "leave_one_out":
        assert sorted(got) == sorted(expected)
        assert any("leaks" in note for note in report.notes)
    else:
        assert sorted(row[1:] for row in got) == sorted(row[1:] for row in expected)
        latest = {part: [row[4] for row in got if row[0] == part] for part in ("train", "valid", "test")}
        assert max(latest["train"]) < min(latest["valid"])
        assert max(latest["valid"]) < min(latest["test"])


def test_leave_one_out_states_its_leak():
    events = [(user, item, 10 * user + item) for user in range(4) for item in range(4)]
    report = ReadReport("log")
    arguments = {"split": "leave_one_out", "max_history": 10, "min_interactions": 1, "name": "x", "report": report}
    split_log(build(events), describe=lambda ids: titled_catalogue(ids, {}, report), **arguments)
    # users one after the other: seen from user u's test event, the training targets of the later users lie in the future
    assert "38 % of the training targets lie in the future" in report.notes[-1]
    assert "leak" in prepare_amazon.__doc__


def test_split_errors():
    log = build([(0, 0, 0), (0, 1, 1), (0, 2, 2)])
    arguments = {"split": "time", "max_history": 1, "min_interactions": 1, "name": "x", "report": ReadReport("log")}
    for change, message in (
        ({"split": "random"}, "split: expected one of"),
        ({"max_history": 0}, "max_history: expected at least 1, got 0"),
        ({"min_interactions": 0}, "min_interactions: expected at least 1, got 0"),
        ({}, "expected .* rows from split='time', got none of 2"),
    ):
        with pytest.raises(ValueError, match=message):
            split_log(log, describe=lambda ids: Catalogue(ids, ids), **(arguments | change))
