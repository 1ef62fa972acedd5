"""The recommender: names in, items out, and contributions of factors that are what they say."""

from __future__ import annotations

import copy
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from flr import FLRConfig, patch_model, unpatch_model
from flr.data import CSR, Catalogue, HistoryViews, NeighbourTable, RecProcessor
from flr.decode import CatalogueTrie, score_all_items
from flr.decode.mixture import ViewMixture
from flr.recommend import recommender as module
from flr.recommend.recommender import Recommender
from tests.helpers.catalogues import DATA
from tests.helpers.comparisons import assert_same_recommendations
from tests.helpers.models import build_recommender, tiny_model

HISTORIES = [["item_3", "brave jazz 1", "item_7"], ["item_1"] * 12, [], ["item_9", "item_2"]]


@pytest.fixture(scope="module")
def recommender():
    return build_recommender()


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
    for found in recommender.recommend(HISTORIES, k=4, scoring=scoring, exclude_seen=exclude_seen, shares=True):
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
    found = recommender.recommend([history], k=5, shares=True)[0]
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
    plain = recommender.recommend(HISTORIES, k=5, shares=True)
    processor.views = HistoryViews(weight=0.5, decay=0.6)
    mixed = recommender.recommend(HISTORIES, k=5, num_beams=40, shares=True)
    rows = CSR.from_rows(recommender.resolve(HISTORIES).histories)
    expected = ViewMixture(model, processor, num_beams=40).scores(rows)
    for history, found, row in zip(HISTORIES, mixed, expected, strict=True):
        assert [r.index for r in found] == np.argsort(-row, kind="stable")[:5].tolist()
        assert_same_recommendations(recommender.recommend([history], k=5, num_beams=40, shares=True)[0], found)
        for r in found:
            np.testing.assert_allclose(r.score, row[r.index], atol=1e-4)
            np.testing.assert_allclose(r.base_score + sum(r.contributions), r.score, atol=1e-4)
    assert [r.score for r in mixed[0]] != [r.score for r in plain[0]]
    for a, b in zip(mixed[2], plain[2], strict=True):  # an empty history has its prompt alone
        np.testing.assert_allclose((a.score, *a.contributions), (b.score, *b.contributions), atol=1e-4)
    seen = recommender.recommend(HISTORIES, k=40, exclude_seen=True, shares=True)
    assert not {r.item_id for r in seen[1]} & {"item_1"}
    # few beams: what only single items' views gave owes nothing to the factors of the whole prompt
    few = recommender.recommend(HISTORIES, k=12, num_beams=1, shares=True)
    for r in few[0]:
        np.testing.assert_allclose(r.base_score + sum(r.contributions), r.score, atol=1e-4)
    processor.views = HistoryViews(weight=1.0)
    for r in recommender.recommend(HISTORIES, k=3, shares=True)[0]:
        np.testing.assert_allclose(r.contributions, 0, atol=1e-6)  # the score is in float32
        np.testing.assert_allclose(r.base_score, r.score, atol=1e-5)


def test_a_batch_equals_its_users_alone():
    recommender = build_recommender("sid")
    together = recommender.recommend(HISTORIES, k=3, shares=True)
    for history, found in zip(HISTORIES, together, strict=True):
        assert_same_recommendations(recommender.recommend([history], k=3, shares=True)[0], found)


def test_many_users_are_worked_off_in_parts(monkeypatch):
    recommender = build_recommender()
    whole = recommender.recommend(HISTORIES * 2, k=3, shares=True)
    for history, found in zip(HISTORIES * 2, whole, strict=True):  # in their order, whatever their lengths
        assert_same_recommendations(recommender.recommend([history], k=3, shares=True)[0], found)
    monkeypatch.setattr("flr.recommend.recommender._MAX_USERS", 3)
    monkeypatch.setattr("flr.explain.attribution._MAX_ROWS", 10)
    for a, b in zip(recommender.recommend(HISTORIES * 2, k=3, shares=True), whole, strict=True):
        assert_same_recommendations(a, b)


def test_seen_items_and_short_lists():
    recommender = build_recommender()
    found = recommender.recommend(
        [["item_3", "item_4"], ["item_4"] + ["item_3"] * 11], k=100, exclude_seen=True, shares=True
    )
    assert [len(x) for x in found] == [38, 38]
    for x in found:
        assert not {r.item_id for r in x} & {"item_3", "item_4"}
        assert [r.score for r in x] == sorted((r.score for r in x), reverse=True)
    assert recommender.recommend([], shares=True) == []
    titles = recommender.processor.catalogue.titles
    assert all(r.title == titles[r.index] and r.item_id == f"item_{r.index}" for r in found[0])


@pytest.mark.parametrize("variant", ["anchor", "none"])
def test_variants_without_factors_have_no_shares(variant):
    for r in build_recommender(variant=variant).recommend(HISTORIES, k=2, shares=True)[0]:
        assert (r.factor_shares, r.contributions, r.base_score) == ([], [], None)


def test_shares_can_be_left_out():
    recommender = build_recommender()
    with_shares, without = (recommender.recommend(HISTORIES, k=2, shares=x)[0] for x in (True, False))
    assert [r.index for r in with_shares] == [r.index for r in without]
    assert without[0].factor_shares == []


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


# ---------------------------------------------------------------- threads, files


def test_threads_get_the_answers_of_one():
    recommender = build_recommender("sid")
    alone = [recommender.recommend([history], k=3, shares=True)[0] for history in HISTORIES]
    old = recommender.processor.catalogue
    recommender.processor.catalogue = Catalogue(old.item_ids, old.titles, old.sids)  # its title tables are made again
    recommender.model.train()
    answers, errors = {}, []

    def work(number):
        try:
            for turn in range(4):
                answers[number, turn] = recommender.recommend([HISTORIES[number % 4]], k=3, shares=True)[0]
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
    for a, b in zip(
        loaded.recommend(HISTORIES, k=3, shares=True), recommender.recommend(HISTORIES, k=3, shares=True), strict=True
    ):
        assert_same_recommendations(a, b)
    assert not list(tmp_path.glob("*.bin"))


def test_peft_model():
    peft = pytest.importorskip("peft")
    recommender = build_recommender()
    config = peft.LoraConfig(target_modules=["q_proj"], r=2, modules_to_save=["flr"])
    wrapped = peft.get_peft_model(recommender.model, config).eval()
    for a, b in zip(
        Recommender(wrapped, recommender.processor).recommend(HISTORIES, k=3, shares=True),
        recommender.recommend(HISTORIES, k=3, shares=True),
        strict=True,
    ):
        assert_same_recommendations(a, b)


def test_an_adapter_is_saved_with_what_it_is_read_by(tmp_path):
    """PEFT writes no config.json, without which nobody knows what kind of thought the adapter's reasoner makes."""
    peft = pytest.importorskip("peft")
    recommender = build_recommender("title")
    thought = FLRConfig.from_dict(recommender.model.config.flr)
    unpatch_model(recommender.model).save_pretrained(tmp_path / "base")
    model = patch_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), config=thought)
    config = peft.LoraConfig(target_modules=["q_proj"], r=2, modules_to_save=["flr"], init_lora_weights=False)
    adapted = Recommender(peft.get_peft_model(model, config).eval(), recommender.processor)
    adapted.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "README.md").exists()
    loaded = Recommender.from_pretrained(tmp_path / "adapter")
    assert type(loaded.model) is type(adapted.model)
    for a, b in zip(loaded.recommend(HISTORIES, k=3), adapted.recommend(HISTORIES, k=3), strict=True):
        assert_same_recommendations(a, b)


def test_a_csr_row_is_a_history():
    rows = CSR.from_rows([[3, 7], [1]])
    recommender = build_recommender()
    assert_same_recommendations(*recommender.recommend([rows.row(0), ["item_3", "item_7"]], k=2, shares=True))


class _Hub:
    """Stands in for ``HfApi``: one repository, whose files are kept in a folder."""

    folder: Path
    asked: dict

    def __init__(self, token):
        _Hub.asked = {"token": token}

    def create_repo(self, repo_id, private, exist_ok):
        self.asked |= {"repo_id": repo_id, "private": private, "exist_ok": exist_ok}
        return SimpleNamespace(repo_id=f"me/{repo_id}")

    def upload_folder(self, repo_id, folder_path, **options):
        self.asked |= {"uploaded": repo_id, **options}
        shutil.copytree(folder_path, self.folder)
        return SimpleNamespace(commit_url="https://hub/commit/1")


def test_a_published_recommender_answers_alike(tmp_path, monkeypatch):
    recommender, _Hub.folder = build_recommender(), tmp_path / "hub"
    monkeypatch.setattr(module, "HfApi", _Hub)
    assert recommender.push_to_hub("books", private=True, token="t", revision="v2") == "https://hub/commit/1"
    assert _Hub.asked == {
        "token": "t", "repo_id": "books", "private": True, "exist_ok": True, "uploaded": "me/books",
        "commit_message": "Upload recommender", "revision": "v2",
    }  # fmt: skip
    twin = Recommender.from_pretrained(_Hub.folder)
    expected = recommender.recommend([["item_3"]], k=4, shares=True)[0]
    for one, other in zip(twin.recommend([["item_3"]], k=4, shares=True)[0], expected, strict=True):
        assert (one.item_id, one.score) == (other.item_id, pytest.approx(other.score, abs=1e-5))


def test_parts_are_cut_so_that_masks_over_the_catalogue_fit(recommender, monkeypatch):
    items = len(recommender.processor.catalogue)
    assert recommender.rows_at_once(10) > 2
    monkeypatch.setattr("flr.recommend.recommender._MAX_MASKS", 2 * items + 1)
    assert recommender.rows_at_once(10) == 2
    monkeypatch.setattr("flr.recommend.recommender._MAX_MASKS", items - 1)
    assert recommender.rows_at_once(10) == 1
    monkeypatch.undo()
    monkeypatch.setattr("flr.recommend.recommender._MAX_SCORES", 2 * items)  # of a mixture over views
    assert recommender.rows_at_once(10) > 2
    monkeypatch.setattr(recommender.processor, "views", HistoryViews(0.5))
    assert recommender.rows_at_once(10) == 2


def test_parts_are_cut_by_the_logits_of_every_thought(monkeypatch):
    one, three = build_recommender(), build_recommender(aggregation="mixture")
    vocabulary = one.model.config.vocab_size
    monkeypatch.setattr("flr.decode.memory._MAX_LOGITS", 6 * 10 * vocabulary)
    assert (one.rows_at_once(10), three.rows_at_once(10)) == (6, 2)


def test_views_of_one_token_items_keep_their_table_whatever_the_beams():
    recommender = build_recommender()
    recommender.processor.views = HistoryViews(0.5)
    recommender.recommend([["item_1"]], k=3)
    kept = recommender._mixture
    recommender.recommend([["item_1"]], k=30)
    assert recommender._mixture is kept


def test_item_knn_takes_part_where_single_items_do_not():
    recommender = build_recommender()
    alone = recommender.recommend(HISTORIES, k=40)
    recommender.processor.item_knn = NeighbourTable.fit(DATA.train, 40)
    recommender.processor.views = HistoryViews(0.0, neighbours=0.5)
    rows = CSR.from_rows(recommender.resolve(HISTORIES).histories)
    shares = recommender.processor.item_knn.probabilities(rows)
    for found, own, share in zip(recommender.recommend(HISTORIES, k=40), alone, shares, strict=True):
        expected = {r.index: np.log(0.5 * np.exp(r.score) + 0.5 * share[r.index]) for r in own}
        assert len(found) == 40
        np.testing.assert_allclose([r.score for r in found], [expected[r.index] for r in found], rtol=1e-4)


def test_views_are_those_of_the_scoring_that_is_asked_for():
    recommender = build_recommender("title")
    recommender.processor.views = HistoryViews(0.5)
    first, other, again = (recommender.recommend(HISTORIES, k=3, scoring=x) for x in ("full", "catalogue", "full"))
    assert first == again
    assert other != first
    assert other == copy.deepcopy(recommender).recommend(HISTORIES, k=3, scoring="catalogue")


def test_explanations_together_say_of_each_history_what_was_read():
    recommender = build_recommender()
    longer = np.arange(recommender.processor.max_history + 3)
    queries = [recommender.query(history, 3) for history in (np.array([4, 5]), longer)]
    short, long = recommender.explained(queries, [[], ["?"]], 20, "full")
    assert [item.used for item in short.history] == [True, True]
    assert [item.used for item in long.history] == [False] * 3 + [True] * recommender.processor.max_history
    assert (short.unknown, long.unknown) == ([], ["?"])


def test_views_without_weight_are_the_model_alone():
    recommender = build_recommender("title")
    expected = recommender.recommend(HISTORIES, k=5, exclude_seen=True, scoring="catalogue")
    recommender.processor.views = HistoryViews(0.0)
    assert recommender.recommend(HISTORIES, k=5, exclude_seen=True, scoring="catalogue") == expected
