"""Public data sets in their own files, with the quirks of each."""

import gzip
import json
import zipfile
from datetime import datetime, timezone

import pytest

from flr.data import load_dataset

DAY = 86400
START = 1_500_000_000


def amazon(reviews, metadata=None, output=None, min_interactions=5, **options):
    dataset = load_dataset(reviews, "amazon", metadata=metadata, min_interactions=min_interactions, **options)
    if output is not None:
        dataset.save(output)
    return dataset


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
    dataset = amazon(file, meta, output=tmp_path / "out")
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
    left = amazon(write(tmp_path / "a.jsonl", new, compress=False), max_history=3)
    right = amazon(write(tmp_path / "b.json.gz", old), max_history=3)
    assert left.train == right.train
    assert left.test == right.test
    assert left.train.histories.lengths.max() == 3
    assert left.catalogue.titles == left.catalogue.item_ids


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
    dataset = amazon(file, max_bad_share=0.2)
    assert dataset.report.rows_bad == len(bad)
    assert dataset.report.rows_kept == len(good)
    assert [example.line for example in dataset.report.examples] == [7, 8, 9, 10, 11]
    clean = amazon(write(tmp_path / "clean.json.gz", good))
    assert dataset.train == clean.train
    with pytest.raises(ValueError, match=r"got 10 of 82.*\n  r.json.gz:7: expected JSON"):
        amazon(file)
    half = write(tmp_path / "meta.json.gz", [*metadata_2018(), *["{"] * 8])
    with pytest.raises(ValueError, match="got 8 of 16"):
        amazon(tmp_path / "clean.json.gz", half)


def test_amazon_truncated_and_empty_files(tmp_path):
    whole = write(tmp_path / "r.json.gz", reviews_2018()).read_bytes()
    (tmp_path / "half.json.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"half.json.gz: expected a whole gzip file"):
        amazon(tmp_path / "half.json.gz")
    with pytest.raises(ValueError, match="expected events, got an empty file"):
        amazon(write(tmp_path / "none.json.gz", []))
    with pytest.raises(ValueError, match="path: expected a folder or a file, got nothing"):
        amazon(tmp_path / "nowhere.json.gz")
    with pytest.raises(ValueError, match="expected events after the 50-core filter, got none of 72"):
        amazon(tmp_path / "r.json.gz", min_interactions=50)


def test_amazon_since_until(tmp_path):
    file = write(tmp_path / "r.json.gz", reviews_2018())
    cut = datetime.fromtimestamp(START + 2 * DAY).astimezone().isoformat()
    dataset = amazon(file, since=cut, until=START + 6 * DAY, min_interactions=2, split="leave_one_out")
    assert dataset.report.rows_kept == 48
    assert "24 events outside since=" in dataset.report.notes[0]
    with pytest.raises(ValueError, match="since: expected an ISO date"):
        amazon(file, since="yesterday")


def events(users=8, items=5):
    """(user, item, time): everyone takes every item, a day apart, users an hour apart, the latest event first."""
    listed = [(u + 1, (u + i) % items + 1, START + i * DAY + u * 3600) for u in range(users) for i in range(items)]
    return listed[::-1]


def histories(dataset):
    """What the rows say, whatever users and items are called."""
    rows = [*dataset.train, *dataset.valid, *dataset.test]
    return [(row.history.tolist(), row.target, row.timestamp) for row in rows]


def summary(dataset):
    return (len(dataset.catalogue), len(dataset.train), len(dataset.valid), len(dataset.test))


def movielens(folder, release):
    """A folder of MovieLens in the form of a release; the titles hold what the real ones hold."""
    folder.mkdir()
    rows = events()
    if release == "100k":
        lines = [f"{u}\t{i}\t3\t{t}" for u, i, t in rows]
        (folder / "u.data").write_text("\n".join(lines) + "\n")
        titles = [
            "Misérables, Les (1995)",
            'Dante"s | Peak'.replace(" | ", " "),
            "Toy Story (1995)",
            "unknown",
            "Gö (1)",
        ]
        about = [
            f"{n}|{title}|01-Jan-1995||http://us.imdb.com/x|{'|'.join('0' * 19)}" for n, title in enumerate(titles, 1)
        ]
        (folder / "u.item").write_bytes(("\n".join(about) + "\n").encode("latin-1"))
        (folder / "u.user").write_text("1|24|M|technician|85711\n")
        return titles
    if release == "1m":
        lines = [f"{u}::{i}::5::{t}" for u, i, t in rows]
        (folder / "ratings.dat").write_text("\n".join(lines) + "\n")
        titles = ["Léon: The Professional (1994)", "Star Wars: Episode IV (1977)", "A", "B, The", "Æon"]
        about = [f"{n}::{title}::Drama|War" for n, title in enumerate(titles, 1)]
        (folder / "movies.dat").write_bytes(("\n".join(about) + "\n").encode("latin-1"))
        return titles
    lines = ["userId,movieId,rating,timestamp", *(f"{u},{i},4.0,{t}" for u, i, t in rows)]
    (folder / "ratings.csv").write_text("\r\n".join(lines) + "\r\n")
    titles = ["American President, The (1995)", 'The "Quoted" One', "Amélie", "D", "E"]
    quoted = [title.replace('"', '""') for title in titles]
    about = ["movieId,title,genres", *(f'{n},"{title}",Drama' for n, title in enumerate(quoted, 1))]
    (folder / "movies.csv").write_text("\ufeff" + "\r\n".join(about) + "\r\n", encoding="utf-8")
    (folder / "tags.csv").write_text("userId,movieId,tag,timestamp\n1,1,fun,1\n")
    return titles


@pytest.mark.parametrize("release", ["100k", "1m", "32m"])
def test_movielens(tmp_path, release):
    titles = movielens(tmp_path / "ml", release)
    dataset = load_dataset(tmp_path / "ml", "movielens", max_history=3)
    assert dict(zip(dataset.catalogue.item_ids, dataset.catalogue.titles, strict=True)) == {
        str(n): title for n, title in enumerate(titles, 1)
    }
    assert dataset.report.rows_bad == 0
    assert summary(dataset) == (5, 26, 3, 3)
    times = [time for *_, time in histories(dataset)]
    assert times == sorted(times)  # the file has the latest first
    assert max(len(history) for history, *_ in histories(dataset)) == 3
    with zipfile.ZipFile(tmp_path / "ml-x.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for file in (tmp_path / "ml").iterdir():
            archive.write(file, f"ml-x/{file.name}")
    packed = load_dataset(tmp_path / "ml-x.zip", "movielens", max_history=3)
    assert (packed.catalogue, packed.test, packed.name) == (dataset.catalogue, dataset.test, "ml-x")
    (tmp_path / "cut.zip").write_bytes((tmp_path / "ml-x.zip").read_bytes()[:-30])
    with pytest.raises(ValueError, match=r"cut.zip: expected"):
        load_dataset(tmp_path / "cut.zip", "movielens")


def test_movielens_bad_rows_and_duplicates(tmp_path):
    movielens(tmp_path / "ml", "1m")
    file = tmp_path / "ml" / "ratings.dat"
    lines = file.read_text().splitlines()
    bad = ["1::2::5", "::2::5::978300760", "1::2::5::soon", "1::2::5::99999999999999", "1::2::5::-1"]
    file.write_text("\n".join([lines[0], *bad, "", *lines[1:], lines[7]]) + "\n")
    dataset = load_dataset(tmp_path / "ml", "movielens", max_bad_share=0.2)
    report = dataset.report
    assert (report.rows_read, report.rows_kept, report.rows_bad) == (46, 40, 5)
    assert [(bad.file, bad.line) for bad in report.examples] == [("ratings.dat", line) for line in range(2, 7)]
    assert "1 events left out that repeat another's user, item and time" in report.notes
    with pytest.raises(ValueError, match=r"got 5 of 46\n  ratings.dat:2: expected 4 cells, got 3 cells"):
        load_dataset(tmp_path / "ml", "movielens")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"expected a file u.data or ratings.dat or ratings.csv in .*, got \[\]"):
        load_dataset(tmp_path / "empty", "movielens")
    named = load_dataset(
        tmp_path / "ml", "movielens", max_bad_share=0.2, item="rating", split="leave_one_out", title="title"
    )
    assert named.catalogue.item_ids == ["5"]


def python_dict(record):
    """A line as Steam's files have it: the repr of Python 2."""
    return (
        "{"
        + ", ".join(f"u{key!r}: {'u' if isinstance(value, str) else ''}{value!r}" for key, value in record.items())
        + "}"
    )


def steam(folder):
    folder.mkdir()
    day = [datetime.fromtimestamp(t, timezone.utc).date().isoformat() for *_, t in events()]
    reviews = [
        python_dict(
            {"username": f"bo's {u}", "product_id": str(i), "date": date, "hours": 0.5, "text": 'a "b"\n\u00e9'}
        )
        for (u, i, _), date in zip(events(), day, strict=True)
    ]
    write(folder / "steam_reviews.json.gz", reviews)
    games = [
        {"id": "1", "title": "Lost Kitty"},
        {"id": "2", "app_name": "Other &amp; Co"},
        {"title": "no id"},
        {"id": "3"},
    ]
    write(folder / "steam_games.json.gz", [python_dict(game) for game in games])


def test_steam(tmp_path):
    steam(tmp_path / "steam")
    with pytest.raises(ValueError, match=r"got 1 of 4\n  steam_games.json.gz:3: expected text in id, got None"):
        load_dataset(tmp_path / "steam", "steam")
    dataset = load_dataset(tmp_path / "steam", "steam", max_bad_share=0.3, split="leave_one_out")
    titles = dict(zip(dataset.catalogue.item_ids, dataset.catalogue.titles, strict=True))
    assert titles == {"1": "Lost Kitty", "2": "Other & Co", "3": "3", "4": "4", "5": "5"}
    assert dataset.train.users[0].startswith("bo's ")
    assert {time % DAY for *_, time in histories(dataset)} == {0}
    code = tmp_path / "code"
    code.mkdir()
    lines = ["{'username': __import__('os').system('touch pwned'), 'product_id': '1', 'date': '2018-01-04'}"]
    write(code / "steam_reviews.json.gz", lines * 2 + ["{'a': " * 100_000, "{'" + "x" * (1 << 21) + "'}"])
    with pytest.raises(ValueError, match="expected columns username, product_id, date, got"):
        load_dataset(code, "steam")


def test_yelp(tmp_path):
    reviews = [
        {"review_id": "r", "user_id": f"u{u}", "business_id": f"b{i}", "stars": 4.0, "text": "line\nline",
         "date": datetime.fromtimestamp(t, timezone.utc).strftime("%Y-%m-%d %H:%M:%S")}
        for u, i, t in events()
    ]  # fmt: skip
    write(tmp_path / "yelp_academic_dataset_review.json", reviews, compress=False)
    places = [{"business_id": f"b{n}", "name": f"Café {n}", "city": "Zürich", "stars": n} for n in range(1, 6)]
    write(tmp_path / "yelp_academic_dataset_business.json", places, compress=False)
    dataset = load_dataset(tmp_path, "yelp")
    assert sorted(dataset.catalogue.titles) == [f"Café {n}" for n in range(1, 6)]
    assert [time for *_, time in histories(dataset)] == sorted(t for *_, t in events() if t >= START + DAY)
    by_city = load_dataset(tmp_path, "yelp", title="city", since="2017-07-16", until="2017-07-18", min_interactions=2)
    assert set(by_city.catalogue.titles) == {"Zürich"}
    assert by_city.report.rows_kept == sum(1500163200 <= t < 1500336000 for *_, t in events())
    with pytest.raises(
        ValueError, match=r"yelp_academic_dataset_business.json: expected a column owner \(title=\), got"
    ):
        load_dataset(tmp_path, "yelp", title="owner")
    with pytest.raises(
        ValueError, match=r"title: expected a file of items \(\*business.json\*, or metadata\), got none"
    ):
        load_dataset(tmp_path / "yelp_academic_dataset_review.json", "yelp", title="name")
    alone = load_dataset(tmp_path / "yelp_academic_dataset_review.json", "yelp")
    assert "5 of 5 items have no title; their id stands in" in alone.report.notes
    assert alone.train.targets.tolist() == dataset.train.targets.tolist()


def test_goodreads(tmp_path):
    form = "%a %b %d %H:%M:%S -0700 %Y"
    shelves = [
        {"user_id": f"u{u}", "book_id": str(100 * i), "is_read": True, "rating": 5, "read_at": "",
         "date_updated": datetime.fromtimestamp(t - 7 * 3600, timezone.utc).strftime(form)}
        for u, i, t in events()
    ]  # fmt: skip
    folder = tmp_path / "json"
    folder.mkdir()
    write(folder / "goodreads_interactions_poetry.json.gz", shelves)
    books = [{"book_id": str(100 * i), "title": f"Poem {i}", "title_without_series": "x"} for i in range(1, 6)]
    write(folder / "goodreads_books_poetry.json.gz", books)
    dataset = load_dataset(folder, "goodreads")
    assert sorted(dataset.catalogue.titles) == [f"Poem {i}" for i in range(1, 6)]
    assert [time for *_, time in histories(dataset)] == sorted(t for *_, t in events() if t >= START + DAY)

    numbers = tmp_path / "csv"
    numbers.mkdir()
    lines = ["user_id,book_id,is_read,rating,is_reviewed", *(f"{u},{i},1,5,0" for u, i, _ in events()[::-1])]
    (numbers / "goodreads_interactions.csv").write_text("\n".join(lines) + "\n")
    with pytest.raises(ValueError, match="split: expected 'leave_one_out' for a log without times, got 'time'"):
        load_dataset(numbers, "goodreads")
    plain = load_dataset(numbers, "goodreads", split="leave_one_out")
    assert sorted(plain.catalogue.titles) == list("12345")
    write(numbers / "goodreads_books.json.gz", [{"book_id": "1", "title": "not number 1 of the log"}, *books])
    with pytest.raises(
        ValueError, match=r"metadata: expected book_id_map.csv\* beside the log, whose numbers are no ids"
    ):
        load_dataset(numbers, "goodreads", split="leave_one_out")
    (numbers / "book_id_map.csv").write_text("book_id_csv,book_id\n" + "".join(f"{i},{100 * i}\n" for i in range(1, 6)))
    mapped = load_dataset(numbers, "goodreads", split="leave_one_out")
    assert sorted(mapped.catalogue.titles) == [f"Poem {i}" for i in range(1, 6)]
    assert mapped.train.targets.tolist() == plain.train.targets.tolist()
    with pytest.raises(ValueError, match="since: expected none for a log without times"):
        load_dataset(numbers, "goodreads", split="leave_one_out", since="2015-01-01")


def test_amazon_folders_metadata_of_2014_and_columns(tmp_path):
    write(tmp_path / "reviews_Books_5.json.gz", reviews_2018())
    games = ["{'asin': 'B1', 'title': \"Bob's \\xe9\"}", '{"asin": "B2", "title": "JSON"}', "{'asin': 'B3'}"]
    write(tmp_path / "meta_Books.json.gz", games)
    dataset = load_dataset(tmp_path, "amazon", min_interactions=5)
    assert dict(zip(dataset.catalogue.item_ids, dataset.catalogue.titles, strict=True)) == {
        "B0": "B0", "B1": "Bob's é", "B2": "JSON", "B3": "B3", "B4": "B4", "B5": "B5"
    }  # fmt: skip
    other = [{**r, "who": r["reviewerID"], "day": "2015-01-01"} for r in reviews_2018()]
    write(tmp_path / "other.json", other, compress=False)
    named = load_dataset(tmp_path / "other.json", "amazon", user="who", time="day", split="leave_one_out")
    assert set(named.test.timestamps.tolist()) == {1420070400}
    with pytest.raises(
        ValueError, match=r"expected columns whom, asin, unixReviewTime or whom, parent_asin, timestamp, got"
    ):
        load_dataset(tmp_path / "other.json", "amazon", user="whom")
    with pytest.raises(ValueError, match=r"expected one file \*.json\*, got"):
        load_dataset(tmp_path, "amazon")
