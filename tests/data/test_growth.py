"""A catalogue that grows: places, titles, codes and tokens of known items stay."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flr.data import Catalogue, Interactions, NeighbourTable, RecDataset, RecProcessor, build_codec, build_tokenizer
from flr.data.growth import cut, grow_catalogue, in_catalogue, joined, replaced
from tests.helpers.catalogues import DATA

CODES = st.lists(st.sampled_from(["<a_1>", "<a_2>", "x"]), min_size=2, max_size=2)


def catalogue(titles, sids=None) -> Catalogue:
    return Catalogue([f"i{n}" for n in range(len(titles))], titles, sids)


def prefix_free(sequences) -> bool:
    return not any(
        i != j and a == b[: len(a)] for i, a in enumerate(sequences) for j, b in enumerate(sequences)
    )  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(st.data(), st.lists(st.tuples(st.sampled_from(["Blue", "Red", ""]), CODES), min_size=1, max_size=14))
def test_tokens_stay_however_a_catalogue_grows(data, items):
    titles, sids = [title for title, _ in items], [sid for _, sid in items]
    cuts = data.draw(st.sets(st.integers(1, len(items)), max_size=3).map(sorted))
    for codec in ("title", "sid"):
        processor = tokenizer = None
        for size in [*cuts, *([len(items)] if len(items) not in cuts else [])]:
            part = catalogue(titles[:size], sids[:size])
            if processor is None:
                tokenizer = build_tokenizer(part, codec, vocab_size=300)
                processor = RecProcessor(tokenizer, part, codec)
                continue
            known = [processor.item_codec.encode(i) for i in range(len(processor.catalogue))]
            processor = processor.grown(part)
            sequences = [processor.item_codec.encode(i) for i in range(size)]
            assert sequences[: len(known)] == known
            assert prefix_free(sequences)
        size = len(processor.tokenizer)
        again = build_codec(codec, part, processor.tokenizer, growth=processor.growth)
        assert len(processor.tokenizer) == size
        assert again.tokens.tolist() == processor.item_codec.tokens.tolist()


def test_a_later_item_differs_from_the_known_one_that_has_its_codes():
    sids = [("a", "b"), ("a", "c"), ("a", "c"), ("a", "b"), ("a", "b"), ("a", "c"), ("d", "e"), ("d", "e")]
    items = catalogue(["t"] * 8, sids)
    tokenizer = build_tokenizer(items, "sid")
    codec = build_codec("sid", items, tokenizer, growth=[3])
    names = [" ".join(tokenizer.convert_ids_to_tokens(codec.encode(item))) for item in range(8)]
    same = [f"<|same_{n}|>" for n in range(3)]
    assert names == ["a b", f"a c {same[0]}", f"a c {same[1]}", f"a {same[0]}", f"a {same[1]}", f"a c {same[2]}",
                     f"d e {same[0]}", f"d e {same[1]}"]  # fmt: skip
    titles = build_tokenizer(items, "title", vocab_size=300)
    codec = build_codec("title", catalogue(["t", "u", "t"]), titles, growth=[2])
    assert titles.decode(codec.encode(0)) == "t<|item_end|>"
    assert titles.decode(codec.encode(2)) == "t<|same_1|><|item_end|>"


def test_sizes_that_cannot_have_been_are_refused():
    items = catalogue(["a", "b"])
    tokenizer = build_tokenizer(items, "id")
    for growth in ([2], [0], [1, 1]):
        with pytest.raises(ValueError, match="growth: expected"):
            build_codec("id", items, tokenizer, growth=growth)
    with pytest.raises(ValueError, match="growth: expected at most 1, got 2"):
        RecProcessor(tokenizer, items, growth=[2])
    processor = RecProcessor(tokenizer, items)
    with pytest.raises(ValueError, match="catalogue: expected the 2 items that are known at its beginning"):
        processor.grown(Catalogue(["i1", "i0"], ["b", "a"]))
    titled = RecProcessor(build_tokenizer(items, "title", vocab_size=300), items, "title")
    with pytest.raises(ValueError, match="catalogue: expected known items with the titles and codes that they had"):
        titled.grown(catalogue(["a", "c", "b"]))


def test_growth_is_saved(tmp_path):
    items = catalogue(["t", "u"])
    grown = RecProcessor(build_tokenizer(items, "title", vocab_size=300), items, "title").grown(
        catalogue(["t", "u", "t"])
    )
    grown.save_pretrained(tmp_path)
    (tmp_path / "item_tokens.safetensors").unlink()
    again = RecProcessor.from_pretrained(tmp_path)
    assert again.growth == (2,)
    assert again.item_codec.tokens.tolist() == grown.item_codec.tokens.tolist()


def test_known_items_keep_places_titles_and_codes():
    sids = [("a",), ("b",), ("c",), ("d",)]
    prices = {"price": [1, 2, 3, 4], "kind": ["cd", "lp", "cd", "cd"]}
    known = Catalogue(["w", "x", "y", "v"], ["White", "Blue", "Red", "Violet"], sids, prices)
    more = {"price": [3.5, 4.5, 5.5, 6.5], "kind": ["mc", "cd", "lp", "lp"], "new": [1, 2, 3, 4]}
    codes = [("e",), ("b",), ("a",), ("d",)]
    later = Catalogue(["z", "x", "w", "v"], ["Gold", "BLUE", "White", "Violet"], codes, more)
    grown = grow_catalogue(known, later, codes=True)
    assert grown.catalogue.item_ids == ["w", "x", "y", "v", "z"]
    assert grown.catalogue.titles == ["White", "Blue", "Red", "Violet", "Gold"]
    assert grown.catalogue.sids == [*sids, ("e",)]
    assert grown.catalogue.attributes["price"].tolist() == [5.5, 4.5, 3, 6.5, 3.5]
    assert grown.catalogue.attributes["kind"].tolist() == ["lp", "cd", "cd", "lp", "mc"]
    assert (grown.places.tolist(), grown.absent, grown.retitled, grown.left_out) == ([4, 1, 0, 3], 1, 1, ["new"])
    whole = Catalogue(["v", "y", "x", "w"], ["Violet", "Red", "Blue", "White"], None, {"new": [1, 2, 3, 4]})
    grown = grow_catalogue(known, whole)
    assert grown.catalogue.attributes["new"].tolist() == [4, 3, 2, 1]
    assert grown.catalogue.attributes["price"].tolist() == [1, 2, 3, 4]
    assert grown.catalogue.sids == known.sids


def test_data_in_another_order_are_data_of_the_model():
    order = np.random.default_rng(0).permutation(40)
    items = DATA.catalogue
    mixed = Catalogue([items.item_ids[i] for i in order], [items.titles[i] for i in order])
    places = np.argsort(order)
    data = RecDataset(mixed, *(replaced(part, places) for part in (DATA.train, DATA.valid, DATA.test)))
    found = in_catalogue(data, items, "runs/a")
    assert (found.train, found.valid, found.test) == (DATA.train, DATA.valid, DATA.test)
    assert found.catalogue is items
    with pytest.raises(
        ValueError, match="data: expected the catalogue that runs/a was trained on, or items of it, got"
    ):
        in_catalogue(data, catalogue(["t"]), "runs/a")
    other = RecDataset(Catalogue(mixed.item_ids, ["t"] * 40), data.train, data.valid, data.test)
    for call in (lambda: in_catalogue(other, items, "runs/a"), lambda: grow_catalogue(items, other.catalogue)):
        with pytest.raises(ValueError, match=r"data: expected the model's items, as .*, and other titles for 40 of 40"):
            call()


def test_what_does_not_fit_is_refused():
    known = Catalogue(["x"], ["Blue"], [("a",)], {"price": [1]})
    for later, expected in (
        (Catalogue(["z"], ["Gold"], [("c",)]), "data: expected the attribute 'price' of the model's catalogue"),
        (Catalogue(["z"], ["Gold"], None, {"price": [1]}), "data: expected semantic IDs for its new items"),
        (Catalogue(["x"], ["Blue"], [("b",)], {"price": [1]}), r"data: expected the codes \('a',\) of the model"),
        (Catalogue(["x"], ["Blue"], [("a",)], {"price": ["1"]}), "data: expected int64 in the attribute 'price'"),
    ):
        with pytest.raises(ValueError, match=expected):
            grow_catalogue(known, later, codes=True)


def test_rows_are_moved_joined_and_cut():
    rows = Interactions(["u", "v"], [[0, 1], [2]], [2, 1], [5, 6])
    moved = replaced(rows, np.array([3, 0, 1]))
    assert ([r.history.tolist() for r in moved], moved.targets.tolist()) == ([[3, 0], [1]], [1, 0])
    both = joined(rows, moved)
    assert [r.history.tolist() for r in both] == [[0, 1], [2], [3, 0], [1]]
    assert both.timestamps.tolist() == [5, 6, 5, 6]
    assert joined(rows, Interactions(["w"], [[0]], [1])).timestamps is None
    some, kept = cut(both, 2)
    assert ([r.history.tolist() for r in some], some.targets.tolist()) == ([[], [0], [1]], [1, 1, 0])
    assert kept.tolist() == [False, True, True, True]


def test_a_table_of_neighbours_says_nothing_of_new_items():
    table = NeighbourTable.fit(DATA.train, 40)
    larger = table.padded(43)
    histories = DATA.valid.histories
    assert np.allclose(larger.scores(histories)[:, :40], table.scores(histories))
    assert not larger.scores(histories)[:, 40:].any()
    with pytest.raises(ValueError, match="num_items: expected at least 40, got 39"):
        table.padded(39)
