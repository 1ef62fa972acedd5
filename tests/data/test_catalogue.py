"""The catalogue: finding items, errors, and equality after saving and loading."""

import os
import tracemalloc

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flr.data import Catalogue
from flr.data.growth import grow_catalogue
from tests.helpers.catalogues import small_catalogue

TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=8)


def test_find_by_id_then_title_then_folded_title():
    catalogue = Catalogue(["a", "blue", "c"], ["blue", "Blue", "BLUE  Train"])
    assert catalogue.find("blue") == [1]  # the id, not the title of item 0
    assert catalogue.find("Blue") == [1]
    assert catalogue.find("BLUE") == [0, 1]
    assert catalogue.find(" blue train ") == [2]


def test_find_suggests_near_titles_and_index_near_ids():
    catalogue = small_catalogue()
    with pytest.raises(ValueError, match=r"text: .*got 'Kind of Blu'.*did you mean 'Kind of Blue'"):
        catalogue.find("Kind of Blu")
    with pytest.raises(ValueError, match="item_id: expected an id of the catalogue, got 'zz'"):
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
        ((["a", "b"], ["x", "y"], None, {"n": ["x", "\ud800"]}), r"attributes\['n'\]: expected valid Unicode.*at 1"),
        ((["a", "b"], ["x", "y"], None, {"n": [1j, 2]}), "got dtype complex128"),
    ],
)
def test_catalogue_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        Catalogue(*arguments)


@pytest.mark.parametrize("form", [list, lambda texts: np.array(texts, object)])
def test_one_long_text_does_not_make_all_texts_as_wide(form, tmp_path):
    texts = ["short"] * 999 + ["x" * 200_000]  # 800 MB as an array of NumPy's str
    ids = [str(number) for number in range(1000)]
    tracemalloc.start()
    catalogue = Catalogue(ids, ids, attributes={"about": form(texts)})
    catalogue.save(tmp_path / "items.parquet")
    loaded = Catalogue.load(tmp_path / "items.parquet")
    framed = Catalogue.from_frame(pa.table({"item_id": ids, "about": texts}), attributes=["about"])
    grown = grow_catalogue(catalogue, Catalogue(["new"], ["new"], attributes={"about": ["late"]}), codes=False)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert catalogue.attributes["about"].tolist() == framed.attributes["about"].tolist() == texts
    assert catalogue == loaded
    assert grown.catalogue.attributes["about"].tolist() == [*texts, "late"]
    assert peak < 50e6


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
