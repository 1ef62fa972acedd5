"""The atomic files of RecBole."""

import pytest

from flr.data import load_dataset
from tests.helpers.logs import ROWS, recbole

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
    with pytest.raises(ValueError, match=r"got 5 of 55.*\n  ml.inter:5: expected 4 cells, got 3 cells"):
        load_dataset(folder)


def test_recbole_errors_and_options(tmp_path):
    with pytest.raises(ValueError, match="expected a header of different NAME:TYPE cells"):
        load_dataset(recbole(tmp_path / "a", ROWS, header="user_id\titem_id\trating\ttimestamp"))
    renamed = recbole(tmp_path / "b", ROWS, header="uid:token\titem_id:token\trating:float\tt:float")
    with pytest.raises(ValueError, match="split: expected 'leave_one_out' for a log without times"):
        load_dataset(renamed)
    timed = load_dataset(renamed, time="t")
    assert timed.test == load_dataset(recbole(tmp_path / "usual", ROWS)).test
    assert "ml.inter: fields taken for user uid, time t" in timed.report.notes
    ordered = load_dataset(renamed, split="leave_one_out")  # without times: the order of the file
    assert ordered.test.timestamps is None
    assert len(ordered.test) == 10
    with pytest.raises(ValueError, match=r"user: expected a field of .*ml.inter, \['uid', .* got 'who'"):
        load_dataset(renamed, user="who")
    with pytest.raises(ValueError, match=r"title: expected ml.item beside ml.inter, or metadata, got none"):
        load_dataset(renamed, title="name", split="leave_one_out")
    (tmp_path / "b" / "other.inter").write_text("")
    with pytest.raises(ValueError, match="a folder with exactly one, got"):
        load_dataset(renamed)
    two = ["item_id:token\tx_title:token_seq\ty_title:token\tname:token", "i0\tA\tB\tC"]
    dataset = load_dataset(recbole(tmp_path / "c", ROWS, items=two))
    assert dataset.catalogue.titles[0] == "C"
    assert load_dataset(tmp_path / "c", title="y_title").catalogue.titles[0] == "B"
    none = ["item_id:token\tclass:token_seq", "i0\tA"]
    dataset = load_dataset(recbole(tmp_path / "d", ROWS, items=none))
    assert any("no single field for titles" in note for note in dataset.report.notes)


def test_fields_of_other_data_sets(tmp_path):
    """Headers of LastFM, Steam and Yelp as RecBole writes them."""
    untimed = [row.rpartition("\t")[0] for row in ROWS]
    artists = ["artist_id:token\tname:token_seq\turl:token", *(f"i{n}\tBand {n}\thttp://x" for n in range(5))]
    header = "user_id:token\tartist_id:token\tweight:float"
    dataset = load_dataset(recbole(tmp_path / "lastfm", untimed, header, artists), split="leave_one_out")
    assert dataset.catalogue.titles == [f"Band {n}" for n in range(5)]
    assert "ml.inter: fields taken for item artist_id" in dataset.report.notes

    rows = ["\t".join([*row.split("\t")[:2], "1.5", "3", "yes", row.split("\t")[3]]) for row in ROWS]
    header = "user_id:token\tproduct_id:token\ttimes:float\tproducts:token\tearly_access:token\ttimestamp:float"
    with pytest.raises(ValueError, match="split: expected 'leave_one_out' for a log without times"):
        load_dataset(recbole(tmp_path / "counted", rows, header.replace("timestamp", "page")))
    games = [
        "app_name:token_seq\ttitle:token_seq\tid:token\ttags:token_seq",
        *(f"x\tGame {n}\ti{n}\tfun" for n in range(5)),
    ]
    dataset = load_dataset(recbole(tmp_path / "steam", rows, header, games))
    assert dataset.catalogue.titles == [f"Game {n}" for n in range(5)]
    assert dataset.test == load_dataset(recbole(tmp_path / "usual", ROWS)).test

    places = ["business_id:token\tname:token_seq\tcity:token", *(f"i{n}\tCafé {n}\tBern" for n in range(5))]
    header = "user_id:token\tbusiness_id:token\tstars:float\tdate:float"
    dataset = load_dataset(recbole(tmp_path / "yelp", ROWS, header, places))
    assert dataset.catalogue.titles == [f"Café {n}" for n in range(5)]
    assert dataset.train.timestamps is not None

    header = "user_id:token\ta_id:token\tb_id:token\tdate:float"
    with pytest.raises(ValueError, match=r"expected one field for item, got \['a_id', 'b_id'\]; choose with item="):
        load_dataset(recbole(tmp_path / "two", ROWS, header))
