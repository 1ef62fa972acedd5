"""What is asked of a recommender: names, bounds, filters, batches of different queries."""

from __future__ import annotations

import copy
import itertools
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from flr.data import Catalogue, HistoryViews
from flr.decode import score_all_items
from flr.recommend.query import QueryBuilder
from tests.helpers.catalogues import named_catalogue
from tests.helpers.comparisons import assert_same_recommendations
from tests.helpers.models import build_recommender

HISTORIES = [["item_3", "brave jazz 1", "item_7"], ["item_1"] * 12, [], ["item_9", "item_2"]]


@pytest.fixture(scope="module")
def recommender():
    return build_recommender()


# ---------------------------------------------------------------- names


def test_ids_titles_and_indices_name_the_same_items():
    recommender = build_recommender()
    titles = recommender.processor.catalogue.titles
    forms = [["item_3", "item_7"], [titles[3], titles[7].upper() + " "], np.array([3, 7])]
    first, *others = recommender.recommend(forms, k=3, shares=True)
    for other in others:
        assert_same_recommendations(first, other)


def test_unknown_entries():
    recommender = build_recommender()
    with pytest.raises(
        ValueError, match=r"histories\[1\]\[0\]: 'Brave Jaz 1' is no id .*did you mean .*'Brave Jazz 1'"
    ):
        recommender.recommend([["item_1"], ["Brave Jaz 1"]], shares=True)
    with pytest.raises(ValueError, match=r"'item_333' .*'item_33'"):
        recommender.recommend([["item_333"]], shares=True)
    with pytest.raises(ValueError, match=r"is no id and no title of the catalogue$"):
        recommender.recommend([["qqqqq"]], shares=True)
    histories = [["item_1", "nonsense", "item_2"], ["nothing"]]
    resolved = recommender.resolve(histories, "skip")
    assert [h.tolist() for h in resolved.histories] == [[1, 2], []]
    assert resolved.unknown == [["nonsense"], ["nothing"]]
    found = recommender.recommend(histories, k=2, on_unknown="skip", shares=True)
    for a, b in zip(found, recommender.recommend(resolved.histories, k=2, shares=True), strict=True):
        assert_same_recommendations(a, b)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 0}, "k: expected an integer from 1 to 1000, got 0"),
        ({"k": 1001}, "k: expected"),
        ({"k": True}, "k: expected"),
        ({"k": 2.0}, "k: expected"),
        ({"num_beams": 1001}, "num_beams: expected"),
        ({"scoring": "best"}, "scoring: expected one of"),
        ({"on_unknown": "ignore"}, "on_unknown: expected"),
        ({"histories": "item_1"}, "histories: expected a sequence"),
        ({"histories": ["item_1"]}, r"histories\[0\]: expected a sequence of item ids"),
        ({"histories": [[3]]}, r"histories\[0\]\[0\]: expected an item id or a title \(str\), got int 3"),
        ({"histories": [np.array([40])]}, r"histories\[0\]: expected indices 0..39"),
        ({"histories": [["item_1"] * 10_001]}, "at most 10000 entries"),
        ({"histories": [[]] * 10_001}, "at most 10000, got"),
        ({"histories": [["x" * 100_000]]}, "at most 500 characters"),
    ],
)
def test_bad_arguments(recommender, arguments, message):
    with pytest.raises(ValueError, match=message):
        recommender.recommend(**{"histories": [["item_1"]], **arguments})


# ---------------------------------------------------------------- filters


@pytest.mark.parametrize("scoring", ["full", "catalogue"])
@pytest.mark.parametrize("codec", ["id", "sid", "title"])
def test_filters_equal_ranking_everything_and_striking_out(codec, scoring):
    recommender = build_recommender(codec)
    interest = recommender.processor.catalogue.attributes["interest"]
    allow, deny, wanted = [f"item_{i}" for i in range(30)], ["item_4", "item_9", "item_11"], sorted(set(interest))[:2]
    ok = np.isin(interest, wanted) & (np.arange(40) < 30) & ~np.isin(np.arange(40), [4, 9, 11])
    for history, found in zip(
        HISTORIES,
        recommender.recommend(
            HISTORIES, k=40, num_beams=40, exclude_seen=True, scoring=scoring,
            allow=allow, deny=deny, where={"interest": wanted}, shares=True,
        ),
        strict=True,
    ):  # fmt: skip
        mine = ok.copy()
        mine[recommender.resolve([history]).histories[0]] = False
        assert sorted(r.index for r in found) == np.flatnonzero(mine).tolist()
        scores = score_all_items(
            recommender.model,
            recommender.processor(recommender.resolve([history]).histories),
            recommender.trie,
            scoring,
            allowed=torch.from_numpy(mine),
        )[0].numpy()
        for r in found:
            np.testing.assert_allclose(r.score, scores[r.index], atol=1e-4)
            np.testing.assert_allclose(r.base_score + sum(r.contributions), r.score, atol=1e-4)
        order = [scores[r.index] for r in found]
        assert all(a >= b - 1e-5 for a, b in itertools.pairwise(order))


@pytest.mark.parametrize("scoring", ["full", "catalogue"])
def test_filters_under_views(scoring):
    """They strike items out, of contributions as of scores; nothing is normalised again."""
    recommender = build_recommender("sid")
    recommender.processor.views = HistoryViews(weight=0.5)
    options = {"k": 40, "num_beams": 40, "scoring": scoring, "shares": True}
    every = recommender.recommend(HISTORIES, **options)
    some = recommender.recommend(HISTORIES, allow=np.arange(20), deny=["item_2"], **options)
    for a, b in zip(every, some, strict=True):
        assert_same_recommendations([r for r in a if r.index < 20 and r.index != 2], b)


def test_a_title_in_a_filter_means_all_its_items():
    old = named_catalogue()
    recommender = build_recommender(catalogue=Catalogue(old.item_ids, ["Twin", "Twin", *old.titles[2:]], old.sids))
    assert {r.index for r in recommender.recommend([[]], k=5, allow=["twin"], shares=True)[0]} == {0, 1}
    assert {r.index for r in recommender.recommend([[]], k=40, deny=["Twin"], shares=True)[0]} == set(range(2, 40))
    assert recommender.recommend([[]], k=5, allow=[], shares=True) == [[]]
    assert recommender.selection(["item_3", "x"], ["y"], on_unknown="skip")[2] == ["x", "y"]
    assert recommender.selection(None, ["TWIN", "item_1", "Twin", "item_3"] * 9)[1].tolist() == [0, 1, 3]
    assert recommender.resolve([["Twin", "Twin", "item_1"]]).histories[0].tolist() == [0, 0, 1]


def test_filters_by_an_attribute_of_text():
    recommender = build_recommender("id")
    known = recommender.processor.catalogue
    colours = ["red", "blue\0", "x" * 1000, ""] * 10
    attributes = {"colour": colours, "sold": [True, False] * 20}
    recommender.processor.catalogue = Catalogue(known.item_ids, known.titles, known.sids, attributes)
    for wanted in (["red"], ["blue\0", "x" * 1000], ["blue"], ["\ud800"], [""], []):
        allowed = recommender.selection(where={"colour": wanted})[0]
        assert allowed.tolist() == [colour in wanted for colour in colours]
    assert recommender.selection(where={"sold": [False]})[0].tolist() == [False, True] * 20
    with pytest.raises(ValueError, match=r"where\['colour'\]: expected values of type str, got 3"):
        recommender.selection(where={"colour": [3]})


def test_a_filter_by_text_does_not_read_every_text_anew():
    size = 100_000
    names = [f"i{i}" for i in range(size)]
    brands = [f"brand {i % 500}" for i in range(size)]
    builder = QueryBuilder(SimpleNamespace(catalogue=Catalogue(names, names, None, {"brand": brands})))

    def seconds(work):
        began = time.thread_time()
        for _ in range(10):
            work()
        return time.thread_time() - began

    def ask(*wanted):
        return np.flatnonzero(builder.selection(where={"brand": wanted})[0]).tolist()

    column = builder.processor.catalogue.attributes["brand"]
    assert ask("brand 7", "nothing") == list(range(7, size, 500))
    assert seconds(lambda: ask("brand 8")) < seconds(column.tolist) / 2
    with pytest.raises(ValueError, match="read-only"):  # a change would not be seen
        column[0] = "brand 7"
    other = copy.deepcopy(builder)
    other.processor.catalogue.attributes["brand"][0] = "brand 7"
    assert 0 in np.flatnonzero(other.selection(where={"brand": ["brand 7"]})[0])
    builder.processor.catalogue.attributes["brand"] = np.array(["x"] * size, column.dtype)
    assert ask("brand 7") == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"allow": ["nothing"]}, r"allow\[0\]: 'nothing' is no id and no title"),
        ({"deny": "item_1"}, "deny: expected a sequence of item ids"),
        ({"where": {"colour": ["red"]}}, r"where: expected attributes of the catalogue \('interest'.*\), got 'colour'"),
        ({"where": {"interest": ["red"]}}, r"where\['interest'\]: expected values of type int, got 'red'"),
        ({"where": {"interest": [True]}}, r"expected values of type int, got True"),
        ({"where": {"interest": 3}}, r"expected a list of values, got 3"),
        ({"where": {"interest": np.array(3)}}, r"where\['interest'\]: expected a list of values, got array\(3\)"),
        ({"where": {"interest": {3: 4}}}, r"where\['interest'\]: expected a list of values, got {3: 4}"),
        ({"where": {"interest": [np.complex64(1)]}}, r"expected values of type int, got np.complex64"),
        ({"where": ["interest"]}, r"where: expected attributes with lists of values \(a dict\), got list"),
        ({"where": "interest"}, r"where: expected attributes with lists of values \(a dict\), got str 'interest'"),
        ({"where": 0}, r"where: expected attributes with lists of values \(a dict\), got int 0"),
        ({"allow": np.array("item_1")}, "allow: expected a sequence of item ids or titles, got ndarray"),
        ({"exclude_seen": "no"}, "exclude_seen: expected True or False, got 'no'"),
        ({"shares": "no"}, "shares: expected True or False, got 'no'"),
    ],
)
def test_bad_filters(recommender, arguments, message):
    with pytest.raises(ValueError, match=message):
        recommender.recommend([[]], **arguments)


@pytest.mark.parametrize("views", [None, HistoryViews(1.0)])
def test_queries_of_any_kind_share_a_batch(views):
    """k, seen items, allow-lists and deny-lists differ; every answer is that of the query alone."""
    recommender = build_recommender("sid")
    recommender.processor.views = views
    rng = np.random.default_rng(0)
    queries = []
    for _ in range(12):
        history = rng.integers(0, 40, rng.integers(0, 14))
        allowed = rng.random(40) < 0.5 if rng.random() < 0.5 else None
        denied = rng.integers(0, 40, rng.integers(0, 6))
        queries.append(recommender.query(history, int(rng.integers(1, 20)), bool(rng.random() < 0.5), allowed, denied))
    together, _ = recommender.ranked(queries, 20, "full", True)
    for query, found in zip(queries, together, strict=True):
        assert_same_recommendations(recommender.ranked([query], 20, "full", True)[0][0], found)
        assert len(found) <= query.k
    with pytest.raises(ValueError, match="num_beams: expected at least the largest k"):
        recommender.ranked(queries, 2, "full", False)


def test_a_mask_of_one_query_is_not_that_of_another():
    recommender = build_recommender()
    few = np.arange(40) < 3
    queries = [recommender.query(np.array([5]), 40, allowed=mask) for mask in (None, few, None)]
    lists, _ = recommender.ranked(queries, 40, "full", False)
    assert [len(found) for found in lists] == [40, 3, 40]


def test_auto_is_the_scoring_of_the_processor():
    recommender = build_recommender("title")
    for scoring in ("catalogue", "full"):
        recommender.processor.scoring = scoring
        expected = recommender.recommend(HISTORIES, k=3, scoring=scoring)
        assert recommender.recommend(HISTORIES, k=3) == expected
        other = {"full": "catalogue", "catalogue": "full"}[scoring]
        assert recommender.recommend(HISTORIES, k=3, scoring=other) != expected
