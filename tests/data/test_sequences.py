"""Sequences: one user's items in order."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flr.data import load_dataset

SEQUENCES = {"ann": [3, 1, 2, 3], "bob": [1, 2], "cid": [2, 3, 1], "dan": [1, 3, 2, 2, 1]}


def rows(part, dataset):
    ids = dataset.catalogue.item_ids
    return [(row.user, [ids[i] for i in row.history], ids[row.target]) for row in part]


def check(dataset):
    """Leave-one-out of SEQUENCES, histories of two."""
    assert dataset.catalogue.item_ids == ["3", "1", "2"]
    assert rows(dataset.test, dataset) == [("ann", ["1", "2"], "3"), ("cid", ["2", "3"], "1"), ("dan", ["2", "2"], "1")]
    assert rows(dataset.valid, dataset) == [("ann", ["3", "1"], "2"), ("cid", ["2"], "3"), ("dan", ["3", "2"], "2")]
    assert rows(dataset.train, dataset) == [
        ("ann", ["3"], "1"), ("bob", ["1"], "2"), ("dan", ["1"], "3"), ("dan", ["1", "3"], "2")
    ]  # fmt: skip
    assert (dataset.report.rows_read, dataset.report.rows_kept, dataset.report.users) == (14, 14, 4)
    assert dataset.test.timestamps is None
    assert any("how many is not known without times" in note for note in dataset.report.notes)


def lines(separator=" ", end="\n"):
    return "".join(separator.join(map(str, [user, *items])) + end for user, items in SEQUENCES.items())


def test_every_form_gives_the_same_rows(tmp_path):
    def read(path, **options):
        return load_dataset(path, "sequences", max_history=2, **options)

    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "inter.json").write_text(json.dumps(SEQUENCES, indent=4))
    check(read(folder))
    check(read(folder / "inter.json"))
    check(load_dataset(folder, max_history=2))  # recognised
    texts = {"spaces": lines(), "tabs": lines("\t", "\r\n"), "commas": lines(","), "mark": "\ufeff" + lines() + "\n"}
    pairs = "".join(f"{user} {item}\n" for user, items in SEQUENCES.items() for item in items)  # as SASRec's files
    for name, text in {**texts, "pairs": pairs}.items():
        file = tmp_path / f"{name}.txt"
        file.write_text(text)
        check(read(file))
    (tmp_path / "packed.txt.gz").write_bytes(gzip.compress(lines().encode()))
    check(read(tmp_path / "packed.txt.gz"))
    bare = tmp_path / "bare.txt"
    bare.write_text("".join(" ".join(map(str, items)) + "\n" for items in SEQUENCES.values()))
    numbered = read(bare, user="none")
    assert rows(numbered.test, numbered)[0] == ("1", ["1", "2"], "3")
    assert rows(numbered.test, numbered)[-1] == ("4", ["2", "2"], "1")


def test_codes_titles_and_maps(tmp_path):
    (tmp_path / "Toy.inter.json").write_text(json.dumps(SEQUENCES))
    (tmp_path / "Toy.index.json").write_text(json.dumps({str(n): ["<a_1>", f"<b_{n // 2}>"] for n in (1, 2, 3, 9)}))
    (tmp_path / "Toy.item.json").write_text(json.dumps({"1": {"title": "Tea &amp; Co", "brand": "X"}, "2": {}}))
    dataset = load_dataset(tmp_path, "sequences")
    assert dataset.catalogue.sids == [("<a_1>", "<b_1>"), ("<a_1>", "<b_0>"), ("<a_1>", "<b_1>")]
    assert dataset.catalogue.titles == ["3", "Tea & Co", "2"]
    assert "1 items have a semantic ID that an earlier item has too" in dataset.report.notes
    assert load_dataset(tmp_path, "sequences", title="brand").catalogue.titles == ["3", "X", "2"]
    with pytest.raises(ValueError, match=r"title: expected a field of .*, \['brand', 'title'\], got 'name'"):
        load_dataset(tmp_path, "sequences", title="name")

    alone = tmp_path / "alone.txt"
    alone.write_text(lines())
    about = tmp_path / "about.json"
    about.write_text(json.dumps({"1": "Tea", "2": "Cup", "3": "Pot"}))
    assert load_dataset(alone, "sequences", metadata=about).catalogue.titles == ["Pot", "Tea", "Cup"]
    maps = {"item2id": {"A": "1", "B": 2, "C": 3}, "id2user": {name: name.upper() for name in SEQUENCES}}
    about.write_text(json.dumps(maps))
    named = load_dataset(alone, "sequences", metadata=about)
    assert named.catalogue.item_ids == ["C", "A", "B"]
    assert named.test.users == ["ANN", "CID", "DAN"]
    about.write_text(json.dumps({"id2item": {"1": "A"}}))
    with pytest.raises(ValueError, match="datamaps: expected a name for every item, got none for '3'"):
        load_dataset(alone, "sequences", metadata=about)
    about.write_text(json.dumps({"1": ["<a_1>"]}))
    with pytest.raises(ValueError, match=r"about.json: expected codes for every item, got none for 2 of 3 \(as '3'\)"):
        load_dataset(alone, "sequences", metadata=about)
    about.write_text(json.dumps({"1": 5}))
    with pytest.raises(ValueError, match=r"about.json: expected item → codes, item → title, item → object, or maps"):
        load_dataset(alone, "sequences", metadata=about)
    (tmp_path / "titles.csv").write_text("item_id,title\n1,Tea\n3,Pot\n")
    assert load_dataset(alone, "sequences", metadata=tmp_path / "titles.csv").catalogue.titles == ["Pot", "Tea", "2"]
    pq.write_table(pa.table({"item": [1, 3], "title": ["Tea", "Pot"]}), tmp_path / "titles.parquet")
    assert load_dataset(alone, "sequences", metadata=tmp_path / "titles.parquet").catalogue.titles == [
        "Pot",
        "Tea",
        "2",
    ]


def test_malformed_rows_and_options(tmp_path):
    file = tmp_path / "inter.json"
    bad = {"": [1], "e": [], "f": "12", "g": [1, [2]], "h": [True], "i": [1.5], "j": None, "k": ["\ud800"]}
    file.write_text(json.dumps({**SEQUENCES, **bad}))
    dataset = load_dataset(file, "sequences", max_bad_share=0.5, max_history=2)
    assert (dataset.report.rows_read, dataset.report.rows_bad) == (22, 8)
    assert [example.line for example in dataset.report.examples] == [5, 6, 7, 8, 9]
    with pytest.raises(ValueError, match=r"got 8 of 22\n  inter.json:5: expected a user in UTF-8, got ''"):
        load_dataset(file, "sequences")
    text = tmp_path / "log.txt"
    text.write_bytes(lines().encode() + b"eve\nf\xff 1\n")
    assert load_dataset(text, "sequences", max_bad_share=0.5).report.rows_bad == 2
    for option in ({"item": "x"}, {"time": "x"}, {"since": "2015-01-01"}, {"until": 5}):
        [(name, value)] = option.items()
        wanted = rf"{name}: expected none for .* \(sequences; a sequence has neither columns nor times\), got {value!r}"
        with pytest.raises(ValueError, match=wanted):
            load_dataset(text, "sequences", **option)
    with pytest.raises(ValueError, match=r"split: expected 'leave_one_out' for .* nor times"):
        load_dataset(text, "sequences", split="time")
    with pytest.raises(ValueError, match=r"user: expected none .* got 'who'"):
        load_dataset(text, "sequences", user="who")
    with pytest.raises(ValueError, match="user: expected nothing for a JSON object, whose keys are the users"):
        load_dataset(file, "sequences", user="none")
    text.write_text(lines())
    with pytest.raises(ValueError, match="title: expected metadata with titles, got 'name' without"):
        load_dataset(text, "sequences", title="name")
    text.write_text("\n")
    with pytest.raises(ValueError, match=r"log.txt: expected sequences, got an empty file"):
        load_dataset(text, "sequences")
    (tmp_path / "other.txt").write_text("")
    (tmp_path / "inter.json").unlink()
    with pytest.raises(ValueError, match=r"expected one file \*.txt, got \['log.txt', 'other.txt'\]; name it"):
        load_dataset(tmp_path, "sequences")
