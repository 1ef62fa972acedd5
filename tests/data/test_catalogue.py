"""Catalogue, interactions, data set and report: behaviour, errors, and equality after saving and loading."""

import os
import subprocess
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flr.data import CSR, BadRow, Catalogue, Interaction, Interactions, ReadReport, RecDataset, load_dataset
from flr.data._io import atomic_file, atomic_folder

TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=8)


def small_catalogue() -> Catalogue:
    return Catalogue(
        ["a", "b", "c"],
        ["Kind of Blue", "Blue Train", "Blue Train"],
        [("<a_1>", "<b_1>"), ("<a_1>", "<b_2>"), ("<a_1>", "<b_2>")],
        {"interest": np.array([0, 1, 1]), "price": [1.5, float("nan"), 2.0], "kind": ["cd", "lp", ""]},
    )


def test_find_by_id_then_title_then_folded_title():
    catalogue = Catalogue(["a", "blue", "c"], ["blue", "Blue", "BLUE  Train"])
    assert catalogue.find("blue") == [1]  # the id, not the title of item 0
    assert catalogue.find("Blue") == [1]
    assert catalogue.find("BLUE") == [0, 1]
    assert catalogue.find(" blue train ") == [2]


def test_find_suggests_near_titles_and_index_near_ids():
    catalogue = small_catalogue()
    with pytest.raises(ValueError, match=r"text: 'Kind of Blu'.*did you mean 'Kind of Blue'"):
        catalogue.find("Kind of Blu")
    with pytest.raises(ValueError, match="item_id: 'zz' is not in the catalogue"):
        catalogue.index("zz")
    many = Catalogue([f"i{n}" for n in range(6000)], [f"Volume {n} of Tales" for n in range(5999)] + ["Moby Dick"])
    with pytest.raises(ValueError, match="did you mean 'Moby Dick'"):
        many.find("Moby Dik")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["a", "a"], ["x", "y"]), r"item_ids: expected 2 different ids, got 1 \('a' repeats\)"),
        ((["a", ""], ["x", "y"]), "item_ids: expected text, got an empty string at 1"),
        ((["a", 3], ["x", "y"]), "item_ids: expected strings, got int 3 at 1"),
        ((["a"], ["x", "y"]), r"titles: expected one an item \(1\), got 2"),
        ((["a", "b"], ["x", "\ud800"]), r"titles: expected valid Unicode.*at 1"),
        ((["a", "b"], ["x", "y"], [("1",), ()]), "sids: expected at least one code an item, got none at 1"),
        ((["a", "b"], ["x", "y"], [("1",)]), r"sids: expected one an item \(2\), got 1"),
        ((["a", "b"], ["x", "y"], None, {"n": [1]}), r"attributes\['n'\]: expected shape \(2,\), got \(1,\)"),
        ((["a", "b"], ["x", "y"], None, {"n": [1j, 2]}), "got dtype complex128"),
    ],
)
def test_catalogue_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        Catalogue(*arguments)


def test_catalogue_save_load(tmp_path):
    catalogue = small_catalogue()
    catalogue.save(tmp_path / "items.parquet")
    loaded = Catalogue.load(tmp_path / "items.parquet")
    assert loaded == catalogue
    assert loaded.attributes["interest"].dtype == np.int64
    assert loaded != Catalogue(catalogue.item_ids, catalogue.titles)
    assert sorted(os.listdir(tmp_path)) == ["items.parquet"]
    with pytest.raises(ValueError, match="expected a Parquet file"):
        Catalogue.load(tmp_path / "none.parquet")
    (tmp_path / "junk.parquet").write_bytes(b"junk")
    with pytest.raises(ValueError, match="expected a Parquet file"):
        Catalogue.load(tmp_path / "junk.parquet")


@settings(max_examples=25, deadline=None)
@given(st.lists(TEXT.filter(bool), min_size=1, max_size=6, unique=True), st.data())
def test_catalogue_round_trip_of_any_text(tmp_path_factory, ids, data):
    titles = data.draw(st.lists(TEXT, min_size=len(ids), max_size=len(ids)))
    file = tmp_path_factory.mktemp("catalogue") / "items.parquet"
    catalogue = Catalogue(ids, titles)
    catalogue.save(file)
    assert Catalogue.load(file) == catalogue


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


def small_dataset() -> RecDataset:
    rows = Interactions(["u", "v"], [[0], [1, 2]], [1, 0], [3, 4])
    report = ReadReport("somewhere", 3, 2, 1, 2, 3, [BadRow("f.csv", 7, "no")], ["a note"])
    return RecDataset(small_catalogue(), rows, rows.select([0]), rows.select([1]), "small", report)


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


def test_atomic_writes_leave_the_old_and_no_litter(tmp_path):
    (tmp_path / "file").write_text("old")

    def fail(context, write):
        with context as temporary:
            write(temporary)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail(atomic_file(tmp_path / "file"), lambda file: file.write_text("half"))
    assert (tmp_path / "file").read_text() == "old"
    small_dataset().save(tmp_path / "set")
    with pytest.raises(RuntimeError):
        fail(atomic_folder(tmp_path / "set"), lambda folder: (folder / "items.parquet").write_text("half"))
    assert load_dataset(tmp_path / "set").name == "small"
    assert sorted(os.listdir(tmp_path)) == ["file", "set"]
    with pytest.raises(ValueError, match="got the file"), atomic_folder(tmp_path / "file"):
        pass


def test_report_counts_and_refuses():
    report = ReadReport("log", rows_read=1000)
    for line in range(8):
        report.add_bad("log.csv", line, "x" * 500)
    assert report.rows_bad == 8
    assert len(report.examples) == 5
    assert len(report.examples[0].reason) < 250
    report.check(0.01)
    with pytest.raises(ValueError, match=r"8 of 1000 rows are malformed, more than max_bad_share 0\.001"):
        report.check(0.001)
    with pytest.raises(ValueError, match=r"max_bad_share: expected 0\.\.1, got 2"):
        report.check(2)
    assert ReadReport.from_dict(report.to_dict()) == report


PROBE = """
import hashlib, sys
import numpy as np, torch
from flr.data import *
dataset = planted_dataset(60, 80, seed=3)
digest = hashlib.sha256()
for codec in ("title", "sid", "id"):
    processor = RecProcessor(build_tokenizer(dataset.catalogue, codec, vocab_size=400), dataset.catalogue, codec)
    collator = SFTCollator(processor, Augment(prefix=.3, suffix=.3, drop_item=.3, shuffle=.5), seed=5)
    rows = InteractionDataset(expand_prefixes(dataset.train, max_history=6))
    sampler = EpochSampler(len(rows), seed=1)
    sampler.set_epoch(4)
    batch = collator([rows[index] for index in list(sampler)[:32]])
    for name in sorted(batch):
        digest.update(name.encode() + batch[name].numpy().tobytes())
    digest.update(processor.item_codec.tokens.tobytes())
print(digest.hexdigest())
"""


def test_same_result_in_every_process(capsys):
    """Python's hash randomisation, thread counts and the process play no part in tokenizers, planted data or batches."""
    exec(PROBE, {})
    here = capsys.readouterr().out
    environment = {**os.environ, "PYTHONHASHSEED": "1", "OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "3"}
    there = subprocess.run([sys.executable, "-c", PROBE], env=environment, capture_output=True, text=True, check=True)
    assert len(here) == 65
    assert here == there.stdout
