"""The published CSV form: rows, malformed rows, missing pieces, semantic IDs."""

import json

import pytest

from flr.data import load_dataset

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
        ValueError, match=f"expected malformed rows up to max_bad_share 0, got 1 of 203\n  train.csv:2: .*{reason}"
    ):
        load_dataset(tmp_path / "set", max_bad_share=0)


def test_published_open_quote_counts_the_lines_that_it_swallows(tmp_path):
    folder = published(tmp_path / "set", "u,\"['Blue'],Red,[0],2,5\n")  # closed by the next line's first quote
    dataset = load_dataset(folder)
    assert (dataset.report.rows_read, dataset.report.rows_bad, dataset.report.rows_kept) == (203, 2, 201)
    plain = "".join(f"u{n},Blue,Red,[1],2,{n}\n" for n in range(100))
    published(folder, plain + 'u,"Blue,Red,[0],2,5\n' + plain, good=0)  # never closed
    with pytest.raises(ValueError, match=r"got 101 of 203.*\n  train.csv:102"):
        load_dataset(folder)


def test_published_missing_pieces(tmp_path):
    folder = published(tmp_path / "set")
    (folder / "valid.csv").unlink()
    with pytest.raises(ValueError, match=r"expected valid\.csv"):
        load_dataset(folder)
    (published(folder) / "train.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="expected columns"):
        load_dataset(folder)
    with pytest.raises(ValueError, match=r"items.txt:2: expected a new item id in UTF-8, got '0'"):
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
