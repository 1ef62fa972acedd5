"""The recommender: names in, items out, and contributions of factors that are what they say."""

from __future__ import annotations

import itertools
import threading

import numpy as np
import pytest
import torch

from flr.attribution import coalitions, influence_shares
from flr.data import CSR, Catalogue, HistoryViews, RecProcessor
from flr.decode import CatalogueTrie, score_all_items
from flr.recommender import Recommender
from flr.views import ViewMixture
from tests.helpers.catalogues import named_catalogue
from tests.helpers.comparisons import assert_same_recommendations
from tests.helpers.models import build_recommender, tiny_model

HISTORIES = [["item_3", "brave jazz 1", "item_7"], ["item_1"] * 12, [], ["item_9", "item_2"]]


@pytest.fixture(scope="module")
def recommender():
    return build_recommender()


# ---------------------------------------------------------------- Shapley values


def shapley_by_orders(value, factors):
    total = np.zeros(factors)
    orders = list(itertools.permutations(range(factors)))
    for order in orders:
        before: frozenset[int] = frozenset()
        for k in order:
            total[k] += value(before | {k}) - value(before)
            before |= {k}
    return total / len(orders)


def as_sets(sets):
    return [frozenset(np.flatnonzero(row).tolist()) for row in sets]


@pytest.mark.parametrize("factors", [1, 2, 3, 4, 5])
def test_exact_weights_are_the_mean_over_all_orders(factors):
    sets, weights = coalitions(factors)
    rng = np.random.default_rng(factors)
    value = dict(zip(as_sets(sets), rng.normal(size=len(sets)), strict=True))
    assert len(value) == 2**factors
    values = np.array([value[s] for s in as_sets(sets)])
    np.testing.assert_allclose(weights @ values, shapley_by_orders(value.__getitem__, factors), atol=1e-12)


@pytest.mark.parametrize("factors", [7, 8, 16])
def test_rotations_are_exact_for_pairwise_games_and_always_add_up(factors):
    sets, weights = coalitions(factors)
    assert len(sets) == factors * (factors - 1) + 2
    assert not sets[0].any()
    assert sets[-1].all()
    rng = np.random.default_rng(0)
    alone, pairs = rng.normal(size=factors), np.triu(rng.normal(size=(factors, factors)), 1)
    values = sets @ alone + np.einsum("ai,ij,aj->a", sets, pairs, sets)
    np.testing.assert_allclose(weights @ values, alone + (pairs.sum(0) + pairs.sum(1)) / 2, atol=1e-12)
    values = rng.normal(size=len(sets))
    np.testing.assert_allclose((weights @ values).sum(), values[-1] - values[0], atol=1e-12)


def test_shares():
    shares = influence_shares(np.array([[1.0, -3.0], [0.0, 0.0], [1e-9, 0.0]]))
    np.testing.assert_allclose(shares, [[0.25, 0.75], [0.5, 0.5], [0.5, 0.5]])


# ---------------------------------------------------------------- recommendations


@pytest.mark.parametrize("scoring", ["full", "catalogue"])
@pytest.mark.parametrize("exclude_seen", [False, True])
@pytest.mark.parametrize(
    ("codec", "family", "options"),
    [
        ("id", "llama", {}),
        ("id", "gpt2", {"num_factors": 8}),
        ("sid", "llama", {"num_thoughts": 2, "anchor": "last"}),
        ("sid", "mistral", {"anchor": "none"}),  # the window is shorter than the prompt: no cache to cut
        ("sid", "gemma2", {"num_thoughts": 2}),
        ("title", "qwen3", {}),
        ("sid", "qwen2", {"variant": "latentr3"}),
    ],
)
def test_contributions_add_up_to_the_score(codec, family, options, scoring, exclude_seen):
    recommender = build_recommender(codec, family, **options)
    moved = 0.0
    for found in recommender.recommend(HISTORIES, k=4, scoring=scoring, exclude_seen=exclude_seen):
        assert len(found) == 4
        for r in found:
            assert len(r.factor_shares) == len(r.contributions) == recommender.model.flr.config.num_factors
            assert min(r.factor_shares) >= 0
            np.testing.assert_allclose(sum(r.factor_shares), 1, atol=1e-9)
            np.testing.assert_allclose(r.base_score + sum(r.contributions), r.score, atol=1e-4)
            moved = max(moved, abs(sum(r.contributions)))
    assert moved > 1e-3


@pytest.mark.parametrize("codec", ["id", "sid"])
def test_contributions_equal_those_of_models_without_the_factor(codec):
    """With T = 1 and gates that do not look at f, zeroed output weights take a factor's part away and nothing else."""
    recommender = build_recommender(codec, num_factors=2, num_refinements=1)
    model, processor = recommender.model, recommender.processor
    with torch.no_grad():
        model.flr.gate_factor.zero_()
    history = np.array([3, 5, 8])
    found = recommender.recommend([history], k=5)[0]
    output = model.flr.output.detach().clone()
    value = {}
    for kept in ((), (0,), (1,), (0, 1)):
        with torch.no_grad():
            model.flr.output.zero_()
            model.flr.output[list(kept)] = output[list(kept)]
            value[kept] = score_all_items(model, processor([history]), recommender.trie)[0].numpy()
    first = (value[0,] - value[()] + value[0, 1] - value[1,]) / 2
    second = (value[1,] - value[()] + value[0, 1] - value[0,]) / 2
    assert [r.index for r in found] == np.argsort(-value[0, 1], kind="stable")[:5].tolist()
    for r in found:
        np.testing.assert_allclose(r.score, value[0, 1][r.index], atol=2e-5)
        np.testing.assert_allclose(r.base_score, value[()][r.index], atol=5e-5)
        np.testing.assert_allclose(r.contributions, [first[r.index], second[r.index]], atol=5e-5)
    assert max(abs(c) for r in found for c in r.contributions) > 1e-2


@pytest.mark.parametrize("codec", ["id", "sid"])
def test_views_rank_as_they_are_evaluated_and_contributions_add_up(codec):
    recommender = build_recommender(codec)
    model, processor = recommender.model, recommender.processor
    plain = recommender.recommend(HISTORIES, k=5)
    processor.views = HistoryViews(weight=0.5, decay=0.6)
    mixed = recommender.recommend(HISTORIES, k=5, num_beams=40)
    rows = CSR.from_rows(recommender.resolve(HISTORIES).histories)
    expected = ViewMixture(model, processor, num_beams=40).scores(rows)
    for history, found, row in zip(HISTORIES, mixed, expected, strict=True):
        assert [r.index for r in found] == np.argsort(-row, kind="stable")[:5].tolist()
        assert_same_recommendations(recommender.recommend([history], k=5, num_beams=40)[0], found)
        for r in found:
            np.testing.assert_allclose(np.exp(r.score), row[r.index], rtol=1e-4)
            np.testing.assert_allclose(r.base_score + sum(r.contributions), r.score, atol=1e-4)
    assert [r.score for r in mixed[0]] != [r.score for r in plain[0]]
    for a, b in zip(mixed[2], plain[2], strict=True):  # an empty history has its prompt alone
        np.testing.assert_allclose((a.score, *a.contributions), (b.score, *b.contributions), atol=1e-4)
    seen = recommender.recommend(HISTORIES, k=40, exclude_seen=True)
    assert not {r.item_id for r in seen[1]} & {"item_1"}
    # few beams: what only single items' views gave owes nothing to the factors of the whole prompt
    few = recommender.recommend(HISTORIES, k=12, num_beams=1)
    for r in few[0]:
        np.testing.assert_allclose(r.base_score + sum(r.contributions), r.score, atol=1e-4)
    processor.views = HistoryViews(weight=1.0)
    for r in recommender.recommend(HISTORIES, k=3)[0]:
        np.testing.assert_allclose(r.contributions, 0, atol=1e-9)
        np.testing.assert_allclose(r.base_score, r.score, atol=1e-5)


def test_a_batch_equals_its_users_alone():
    recommender = build_recommender("sid")
    together = recommender.recommend(HISTORIES, k=3)
    for history, found in zip(HISTORIES, together, strict=True):
        assert_same_recommendations(recommender.recommend([history], k=3)[0], found)


def test_many_users_are_worked_off_in_parts(monkeypatch):
    recommender = build_recommender()
    whole = recommender.recommend(HISTORIES * 2, k=3)
    monkeypatch.setattr("flr.recommender._MAX_USERS", 3)
    monkeypatch.setattr("flr.attribution._MAX_ROWS", 10)
    for a, b in zip(recommender.recommend(HISTORIES * 2, k=3), whole, strict=True):
        assert_same_recommendations(a, b)


def test_seen_items_and_short_lists():
    recommender = build_recommender()
    found = recommender.recommend([["item_3", "item_4"], ["item_4"] * 11 + ["item_3"]], k=100, exclude_seen=True)
    assert [len(x) for x in found] == [38, 38]
    for x in found:
        assert not {r.item_id for r in x} & {"item_3", "item_4"}
        assert [r.score for r in x] == sorted((r.score for r in x), reverse=True)
    assert recommender.recommend([]) == []
    titles = recommender.processor.catalogue.titles
    assert all(r.title == titles[r.index] and r.item_id == f"item_{r.index}" for r in found[0])


@pytest.mark.parametrize("variant", ["anchor", "none"])
def test_variants_without_factors_have_no_shares(variant):
    for r in build_recommender(variant=variant).recommend(HISTORIES, k=2)[0]:
        assert (r.factor_shares, r.contributions, r.base_score) == ([], [], None)


def test_shares_can_be_left_out():
    recommender = build_recommender()
    with_shares, without = (recommender.recommend(HISTORIES, k=2, shares=x)[0] for x in (True, False))
    assert [r.index for r in with_shares] == [r.index for r in without]
    assert without[0].factor_shares == []


# ---------------------------------------------------------------- names


def test_ids_titles_and_indices_name_the_same_items():
    recommender = build_recommender()
    titles = recommender.processor.catalogue.titles
    forms = [["item_3", "item_7"], [titles[3], titles[7].upper() + " "], np.array([3, 7])]
    first, *others = recommender.recommend(forms, k=3)
    for other in others:
        assert_same_recommendations(first, other)


def test_unknown_entries():
    recommender = build_recommender()
    with pytest.raises(
        ValueError, match=r"histories\[1\]\[0\]: 'Brave Jaz 1' is no id .*did you mean .*'Brave Jazz 1'"
    ):
        recommender.recommend([["item_1"], ["Brave Jaz 1"]])
    with pytest.raises(ValueError, match=r"'item_333' .*'item_33'"):
        recommender.recommend([["item_333"]])
    with pytest.raises(ValueError, match=r"is no id and no title of the catalogue$"):
        recommender.recommend([["qqqqq"]])
    histories = [["item_1", "nonsense", "item_2"], ["nothing"]]
    resolved = recommender.resolve(histories, "skip")
    assert [h.tolist() for h in resolved.histories] == [[1, 2], []]
    assert resolved.unknown == [["nonsense"], ["nothing"]]
    found = recommender.recommend(histories, k=2, on_unknown="skip")
    for a, b in zip(found, recommender.recommend(resolved.histories, k=2), strict=True):
        assert_same_recommendations(a, b)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 0}, "k: expected an integer from 1 to 1000, got 0"),
        ({"k": 1001}, "k: expected"),
        ({"k": True}, "k: expected"),
        ({"k": 2.0}, "k: expected"),
        ({"num_beams": 1001}, "num_beams: expected"),
        ({"scoring": "best"}, "scoring must be one of"),
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


def test_parts_that_do_not_belong_together():
    recommender = build_recommender()
    model, processor = recommender.model, recommender.processor
    other = RecProcessor(processor.tokenizer, processor.catalogue, num_thoughts=2)
    with pytest.raises(ValueError, match="expected num_thoughts = 1 as the model's, got 2"):
        Recommender(model, other)
    with pytest.raises(ValueError, match="trie: expected 40 items, got 2"):
        Recommender(model, processor, CatalogueTrie.from_sequences([5, 6], [0, 1, 2]))
    with pytest.raises(ValueError, match="expected num_thoughts = 0"):
        Recommender(tiny_model(), processor)


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
            HISTORIES, k=40, num_beams=40, exclude_seen=True, scoring=scoring, allow=allow, deny=deny, where={"interest": wanted}
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


def test_filters_under_views():
    recommender = build_recommender("sid")
    recommender.processor.views = HistoryViews(weight=0.5)
    every = recommender.recommend(HISTORIES, k=40, num_beams=40)
    some = recommender.recommend(HISTORIES, k=40, num_beams=40, allow=np.arange(20), deny=["item_2"])
    for a, b in zip(every, some, strict=True):
        assert_same_recommendations([r for r in a if r.index < 20 and r.index != 2], b)


def test_a_title_in_a_filter_means_all_its_items():
    old = named_catalogue()
    recommender = build_recommender(catalogue=Catalogue(old.item_ids, ["Twin", "Twin", *old.titles[2:]], old.sids))
    assert {r.index for r in recommender.recommend([[]], k=5, allow=["twin"])[0]} == {0, 1}
    assert {r.index for r in recommender.recommend([[]], k=40, deny=["Twin"])[0]} == set(range(2, 40))
    assert recommender.recommend([[]], k=5, allow=[]) == [[]]
    assert recommender.selection(["item_3", "x"], ["y"], on_unknown="skip")[2] == ["x", "y"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"allow": ["nothing"]}, r"allow\[0\]: 'nothing' is no id and no title"),
        ({"deny": "item_1"}, "deny: expected a sequence of item ids"),
        ({"where": {"colour": ["red"]}}, r"where: expected attributes of the catalogue \('interest'.*\), got 'colour'"),
        ({"where": {"interest": ["red"]}}, r"where\['interest'\]: expected values of type int, got 'red'"),
        ({"where": {"interest": [True]}}, r"expected values of type int, got True"),
        ({"where": {"interest": 3}}, r"expected a list of values, got 3"),
    ],
)
def test_bad_filters(recommender, arguments, message):
    with pytest.raises(ValueError, match=message):
        recommender.recommend([[]], **arguments)


def test_queries_of_any_kind_share_a_batch():
    """k, seen items, allow-lists and deny-lists differ; every answer is that of the query alone."""
    recommender = build_recommender("sid")
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


# ---------------------------------------------------------------- threads, files


def test_threads_get_the_answers_of_one():
    recommender = build_recommender("sid")
    alone = [recommender.recommend([history], k=3)[0] for history in HISTORIES]
    old = recommender.processor.catalogue
    recommender.processor.catalogue = Catalogue(old.item_ids, old.titles, old.sids)  # its title tables are made again
    recommender.model.train()
    answers, errors = {}, []

    def work(number):
        try:
            for turn in range(4):
                answers[number, turn] = recommender.recommend([HISTORIES[number % 4]], k=3)[0]
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert len(answers) == 32
    for (number, _), found in answers.items():
        assert_same_recommendations(found, alone[number % 4])
    assert all(module.training for module in recommender.model.modules())


def test_saved_and_loaded(tmp_path):
    recommender = build_recommender("sid")
    recommender.model.save_pretrained(tmp_path)
    recommender.processor.save_pretrained(tmp_path)
    loaded = Recommender.from_pretrained(tmp_path, device="cpu")
    for a, b in zip(loaded.recommend(HISTORIES, k=3), recommender.recommend(HISTORIES, k=3), strict=True):
        assert_same_recommendations(a, b)
    assert not list(tmp_path.glob("*.bin"))


def test_peft_model():
    peft = pytest.importorskip("peft")
    recommender = build_recommender()
    config = peft.LoraConfig(target_modules=["q_proj"], r=2, modules_to_save=["flr"])
    wrapped = peft.get_peft_model(recommender.model, config).eval()
    for a, b in zip(
        Recommender(wrapped, recommender.processor).recommend(HISTORIES, k=3),
        recommender.recommend(HISTORIES, k=3),
        strict=True,
    ):
        assert_same_recommendations(a, b)


def test_a_csr_row_is_a_history():
    rows = CSR.from_rows([[3, 7], [1]])
    recommender = build_recommender()
    assert_same_recommendations(*recommender.recommend([rows.row(0), ["item_3", "item_7"]], k=2))
