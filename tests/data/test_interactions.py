"""Interactions and data sets: rows, errors, and equality after saving and loading."""

import os

import numpy as np
import pyarrow.parquet as pq
import pytest

from flr.data import CSR, Interaction, Interactions, RecDataset, load_dataset
from tests.helpers.catalogues import small_catalogue, small_dataset


def test_interactions_rows_and_select():
    rows = Interactions(["u", "v", "w"], [[1, 2], [], [3]], [4, 5, 6], [10, 20, 30])
    assert rows.histories.values.dtype == np.int32
    assert rows.histories.offsets.dtype == np.int64
    assert rows.targets.dtype == np.int32
    assert rows.timestamps.dtype == np.int64
    assert rows[0].history.tolist() == [1, 2]
    assert rows[1]._replace(history=None) == Interaction("v", None, 5, 20, 1)
    assert rows[-1].row == 2
    assert [row.target for row in rows] == [4, 5, 6]
    chosen = rows.select([2, 0, -3])
    assert chosen.users == ["w", "u", "u"]
    assert chosen[1].history.tolist() == [1, 2]
    assert rows.select(np.array([False, True, True])) == rows.select([1, 2])
    assert len(rows.select([])) == 0
    with pytest.raises(IndexError):
        rows[3]
    with pytest.raises(TypeError, match="slice"):
        rows[:2]  # select gives several
    with pytest.raises(ValueError, match="indices: expected within 3 rows"):
        rows.select([3])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["u"], [[1], [2]], [1]), r"histories: expected one a user row \(1\), got 2"),
        ((["u"], [[1]], [1, 2]), r"targets: expected one a user row \(1\), got 2"),
        ((["u"], [[1]], [1], [1, 2]), "timestamps: expected one a user row"),
        ((np.array([1]), [[1]], [1]), "users: expected ids as text, got int64"),
        (([1, "u", None], [[1]] * 3, [1, 1, 1]), "users: expected ids as text, got NoneType, int"),
        ((["u"], [[-1]], [1]), "got a negative one"),
        ((["u"], [[1]], [2**31]), "targets: expected values that fit int32"),
        ((["u"], [[1.5]], [1]), r"rows\[0\]: expected integers"),
        ((["u"], [[1]], [1.5]), "targets: expected integers, got dtype float64"),
        ((["u"], CSR(np.array([1, 2]), np.array([0, 1])), [1]), "histories.offsets: expected ascending"),
    ],
)
def test_interactions_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        Interactions(*arguments)


@pytest.mark.parametrize("timestamps", [None, [5, 6, 7]])
@pytest.mark.parametrize("count", [0, 3])
def test_interactions_save_load(tmp_path, timestamps, count):
    rows = Interactions(["u", "ü", "u"], [[1, 2], [], [3]], [4, 5, 6], timestamps).select(range(count))
    rows.save(tmp_path / "rows.parquet")
    assert Interactions.load(tmp_path / "rows.parquet") == rows


def test_dataset_save_load_is_whole(tmp_path):
    dataset = small_dataset()
    dataset.save(tmp_path / "set")
    dataset.save(tmp_path / "set")  # over an older one
    loaded = load_dataset(tmp_path / "set")
    assert loaded.catalogue == dataset.catalogue
    assert (loaded.train, loaded.valid, loaded.test) == (dataset.train, dataset.valid, dataset.test)
    assert (loaded.name, loaded.report) == (dataset.name, dataset.report)
    assert str(loaded.report) == str(dataset.report)
    assert os.listdir(tmp_path) == ["set"]
    (tmp_path / "set" / "valid.parquet").unlink()
    with pytest.raises(ValueError, match=r"valid\.parquet"):
        load_dataset(tmp_path / "set")
    (tmp_path / "set" / "meta.json").write_text('{"format": "other"}')
    with pytest.raises(ValueError, match="expected format 'flr-dataset'"):
        load_dataset(tmp_path / "set")


def test_no_pickle_in_a_prepared_folder(tmp_path):
    small_dataset().save(tmp_path / "set")
    for file in (tmp_path / "set").glob("*.parquet"):
        assert set(pq.read_schema(file).metadata) == {b"flr"}  # no pandas or pickle metadata


def test_dataset_refuses_items_past_the_catalogue():
    rows = Interactions(["u"], [[0]], [3])
    with pytest.raises(ValueError, match="test: expected item indices below 3, got 3"):
        RecDataset(small_catalogue(), rows.select([]), rows.select([]), rows)


def test_spread_takes_evenly_and_everything_where_there_is_no_more():
    rows = Interactions([str(i) for i in range(10)], [[0]] * 10, [0] * 10)
    assert rows.spread(4).users == ["0", "2", "5", "7"]
    assert rows.spread(None) is rows
    assert rows.spread(10) is rows
    with pytest.raises(ValueError, match="most: expected at least 1, got 0"):
        rows.spread(0)
