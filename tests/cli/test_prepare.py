"""``flr prepare``: every kind, its options, and what it refuses."""

import json

import pytest

from flr.cli import main
from flr.cli.prepare import KINDS
from flr.data import FORMATS, load_dataset
from tests.helpers.catalogues import small_dataset

EVENTS = [(f"u{u}", f"i{(u + t) % 7}", 1_400_000_000 + 86400 * t + u) for u in range(12) for t in range(6)]


def csv_log(path, header="user_id,item_id,timestamp"):
    path.write_text("\n".join([header, *(",".join(map(str, row)) for row in EVENTS)]) + "\n")
    return path


def prepare(*words):
    return main(["prepare", *map(str, words)])


def test_kinds_are_formats():
    assert set(KINDS) == set(FORMATS) - {"prepared"}


def test_options_reach_the_reader(tmp_path, capsys):
    log = csv_log(tmp_path / "log.csv", "who,what,when")
    about = tmp_path / "about.csv"
    about.write_text("what,label\n" + "".join(f"i{n},Item {n}\n" for n in range(7)))
    words = ["csv", "--source", log, "--output", tmp_path / "out", "--user", "who", "--item", "what", "--time", "when"]
    words += ["--metadata", about, "--title", "label", "--split", "leave_one_out", "--max_history", "2", "--json"]
    assert prepare(*words, "--since", "2014-05-14", "--until", "2014-05-18", "--min_interactions", "2") == 0
    out = capsys.readouterr()
    assert json.loads(out.out) == {
        "output": str(tmp_path / "out"), "catalogue": 7, "train": 12, "valid": 12, "test": 12
    }  # fmt: skip
    assert "72 rows read, 48 kept, 0 malformed" in out.err
    dataset = load_dataset(tmp_path / "out")
    assert sorted(dataset.catalogue.titles) == [f"Item {n}" for n in range(7)]
    assert dataset.test.histories.lengths.max() == 2


def test_the_filter_is_five_unless_somebody_says(tmp_path, capsys):
    log = csv_log(tmp_path / "log.csv")
    with log.open("a") as stream:
        stream.write("once,rare,1400000000\n")
    assert prepare("csv", "--source", log, "--output", tmp_path / "out") == 0
    assert "1 events left out by the 5-core filter" in capsys.readouterr().err
    assert prepare("csv", "--source", log, "--output", tmp_path / "out", "--min_interactions", "0") == 0
    assert len(load_dataset(tmp_path / "out").catalogue) == 8


def test_sequences_keep_everyone(tmp_path):
    folder = tmp_path / "toy"
    folder.mkdir()
    (folder / "inter.json").write_text(json.dumps({"a": [1, 2, 3], "b": [3, 2]}))
    (folder / "index.json").write_text(json.dumps({str(n): ["<a_1>", f"<b_{n}>"] for n in range(1, 4)}))
    assert prepare("sequences", "--source", folder, "--output", tmp_path / "out") == 0
    dataset = load_dataset(tmp_path / "out")
    assert (len(dataset.train), len(dataset.valid), len(dataset.test)) == (1, 1, 1)
    assert dataset.catalogue.sids[0] == ("<a_1>", "<b_1>")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("sequences --source {seq} --since 2015-01-01", "since: expected none for {seq} (sequences; a sequence has"),
        ("sequences --source {seq} --time when", "time: expected none for {seq} (sequences; a sequence has neither"),
        ("sequences --source {seq} --split time", "split: expected 'leave_one_out' for {seq} (a sequence has neither"),
        ("csv --source {published} --split time", "split: expected none for {published} (csv; its rows are split"),
        ("csv --source {published} --user who", "user: expected none for {published} (csv; its rows are split"),
        ("csv --source {published} --metadata x", "metadata: expected none for {published} (csv; its rows"),
        ("csv --source {log} --since soon", "since: expected an ISO date or seconds since 1970, got 'soon'"),
        ("csv --source {log} --split random", "split: expected one of ('time', 'leave_one_out'), got 'random'"),
        ("csv --source {log} --max_bad_share 2", "max_bad_share: expected None or a number in [0, 1], got 2.0"),
        ("csv --source {log} --time noon", "{log}: expected a column noon (time=), got ['user_id', 'item_id', 'times"),
        ("yelp --source {log}", "{log}: expected columns user_id, business_id, date, got ['user_id', 'item_id', 'time"),
        ("movielens --source {seq}", "path: expected a file u.data or ratings.dat or ratings.csv in {seq}, got []"),
        ("netflix --source {log}", "kind: expected flr prepare movielens | amazon | steam | yelp | goodreads |"),
        ("parquet --source {log}", "{log}: expected a Parquet file, got"),
        ("csv --source {seq}/none", "path: expected a folder or a file, got nothing at {seq}/none"),
    ],
)  # fmt: skip
def test_what_means_nothing_is_refused(tmp_path, capsys, words, expected):
    places = {name: tmp_path / name for name in ("seq", "published")}
    for place in places.values():
        place.mkdir()
    places["log"] = csv_log(tmp_path / "log.csv")
    out = tmp_path / "out"
    assert prepare(*(word.format(**places) for word in words.split()), "--output", out) == 1
    assert f"flr prepare: {expected.format(**places)}" in " ".join(capsys.readouterr().err.split())
    assert not out.exists()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--source {logs}/log.csv --output {logs}", "output: expected a new or an empty folder, or one that flr"),
        ("--source {logs}/log.csv --output {logs}/log.csv", "output: expected a new or an empty folder, or one that"),
        ("--source {own}/items.parquet --output {own}", "source: expected a place outside of {own}, which is replaced"),
        ("--source {own} --output {own}", "source: expected a place outside of {own}, which is replaced, got {own}"),
        ("--source {log} --metadata {link}/meta.json --output {own}", "metadata: expected a place outside of {own}"),
    ],
)
def test_a_bad_output_is_refused_before_anything_is_read(tmp_path, capsys, monkeypatch, words, expected):
    places = {name: tmp_path / name for name in ("logs", "own", "link")}
    places["logs"].mkdir()
    places["log"] = csv_log(tmp_path / "logs" / "log.csv")
    small_dataset().save(places["own"])
    places["link"].symlink_to("own")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    monkeypatch.setattr("flr.data.load_dataset", lambda *_, **__: pytest.fail("it was read"))
    assert prepare("csv", *(word.format(**places) for word in words.split())) == 1
    assert f"flr prepare: {expected.format(**places)}" in " ".join(capsys.readouterr().err.split())
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
