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
    with pytest.raises(ValueError, match="expected a field 'user_id'"):
        load_dataset(recbole(tmp_path / "b", ROWS, header="uid:token\titem_id:token\trating:float\ttimestamp:float"))
    renamed = recbole(tmp_path / "b", ROWS, header="uid:token\titem_id:token\trating:float\tt:float")
    with pytest.raises(ValueError, match="split: expected 'leave_one_out' for a log without times"):
        load_dataset(renamed, user_field="uid")
    assert len(load_dataset(renamed, user_field="uid", time_field="t").test) > 0
    ordered = load_dataset(renamed, user_field="uid", split="leave_one_out")  # without times: the order of the file
    assert ordered.test.timestamps is None
    assert len(ordered.test) == 10
    with pytest.raises(ValueError, match=r"options: expected .* for format 'recbole', got 'max_histories'"):
        load_dataset(renamed, max_histories=3)
    (tmp_path / "b" / "other.inter").write_text("")
    with pytest.raises(ValueError, match="a folder with exactly one, got"):
        load_dataset(renamed)
    two = ["item_id:token\ttitle:token_seq\tname:token", "i0\tA\tB"]
    dataset = load_dataset(recbole(tmp_path / "c", ROWS, items=two))
    assert any("no single field for titles" in note for note in dataset.report.notes)
    assert load_dataset(tmp_path / "c", title_field="name").catalogue.titles[0] == "B"
