"""The mixture over views of a history."""

import numpy as np
import pytest
import torch

from flr.data import CSR, Catalogue, HistoryViews, NeighbourTable, RecProcessor, build_tokenizer
from flr.decode import score_all_items
from flr.decode.mixture import ViewMixture
from flr.evaluate import evaluate, fit_views
from flr.model.folder import BESIDE
from tests.helpers.catalogues import DATA
from tests.helpers.models import tiny_llama, trainable


@pytest.mark.parametrize("codec", ["id", "sid", "title"])
@pytest.mark.parametrize("weight", [0.0, 0.4, 1.0])
def test_views_are_a_mixture_of_probabilities(codec, weight):
    views = HistoryViews(weight, decay=0.6)
    model, processor = trainable(codec, views)
    model.eval()
    histories = [[1, 2, 3], [7], [], [5, 5, 9, 30], list(range(12))]
    mixture = ViewMixture(model, processor, num_beams=40, batch_size=2)
    scores = np.exp(mixture.scores(CSR.from_rows(histories)))
    again = np.exp(ViewMixture(model, processor, num_beams=None).scores(CSR.from_rows(histories[::-1]))[::-1])
    np.testing.assert_allclose(scores, again, rtol=1e-3, atol=1e-6)

    def probabilities(history):
        with torch.inference_mode():
            return score_all_items(model, processor([history]), processor.item_codec)[0].exp().numpy()

    for row, history in zip(scores, histories, strict=True):
        kept = history[-processor.max_history :]
        share = 0.6 ** np.arange(len(kept))[::-1]
        w = weight if kept else 0.0
        expected = (1 - w) * probabilities(history)
        for item, s in zip(kept, share, strict=True):
            expected = expected + w * s / share.sum() * probabilities([item])
        np.testing.assert_allclose(row, expected, rtol=1e-3, atol=1e-6)


def test_views_are_saved_and_used_by_evaluation(tmp_path):
    model, processor = trainable(views=HistoryViews(0.7, 0.5))
    processor.save_pretrained(tmp_path)
    loaded = RecProcessor.from_pretrained(tmp_path)
    assert loaded.views == processor.views
    mixed = evaluate(model, loaded, DATA.test, progress=False)
    whole = evaluate(model, loaded, DATA.test, progress=False, views=HistoryViews(0.0))
    loaded.views = None
    alone = evaluate(model, loaded, DATA.test, progress=False)
    assert whole.metrics == alone.metrics
    np.testing.assert_array_equal(whole.scores, alone.scores)
    assert mixed.metrics != whole.metrics
    assert mixed.settings["views"] == {"weight": 0.7, "decay": 0.5, "neighbours": 0.0}
    for wrong in ({"weight": 1.5}, {"decay": 0.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            HistoryViews(**wrong)
    with pytest.raises(ValueError, match="views: expected HistoryViews"):
        ViewMixture(model, loaded)


def unlikely_items(words):
    """Forty items of so many words, and a model that was not trained."""
    rng = np.random.default_rng(0)
    titles = [" ".join(rng.choice(["kaban", "lorel", "mivin", "nator"], words)) + f" {i}" for i in range(40)]
    catalogue = Catalogue([f"item_{i}" for i in range(40)], titles)
    processor = RecProcessor(build_tokenizer(catalogue, "title", vocab_size=400), catalogue, "title")
    return tiny_llama(len(processor.tokenizer), num_hidden_layers=1).eval(), processor


@pytest.fixture(scope="module")
def unlikely():
    """So many words that float32 holds the probability of none."""
    return unlikely_items(30)


def test_items_that_float32_holds_with_few_digits_are_told_apart():
    """Below 1.2e-38 its numbers lose digits before they become 0."""
    model, processor = unlikely_items(15)
    scores = ViewMixture(model, processor, HistoryViews(1.0), num_beams=None).scores(CSR.from_rows([[5]]))
    alone = score_all_items(model, processor([[5]]), processor.item_codec).numpy()
    assert -103 < alone.min() < alone.max() < -88
    np.testing.assert_allclose(scores, alone, rtol=1e-6)


@pytest.mark.parametrize("views", [HistoryViews(0.3), HistoryViews(1.0), HistoryViews(0.3, neighbours=0.4)])
def test_items_that_no_float_holds_are_ranked_and_listed(unlikely, views):
    model, processor = unlikely
    processor.item_knn = NeighbourTable.fit(DATA.train.select([0]), 40)
    histories = CSR.from_rows([[1, 2], []])
    best = ViewMixture(model, processor, views, num_beams=40).best(histories, 40)
    assert (np.sort(best.items) == np.arange(40)).all()
    assert best.scores.min() < -104
    logs = np.logaddexp(best.parts[0] + _whole(model, processor, histories, best.items), best.parts[1])
    np.testing.assert_allclose(logs, best.scores, rtol=1e-5)
    fit = fit_views(model, processor, DATA.valid.select(np.arange(5)), [0.5], num_beams=40)
    found = evaluate(
        model, processor, DATA.valid.select(np.arange(5)), method="exhaustive", progress=False, samples=2,
        views=HistoryViews(0.5),
    )  # fmt: skip
    np.testing.assert_allclose(fit.metrics["ndcg@10"].mean(), found.metrics["item"]["ndcg@10"])
    assert (found.ranks["item"] > 0).all()
    assert len(np.unique(found.ranks["item"])) > 1


def _whole(model, processor, histories, items):
    """log p(item | history)."""
    prompts = processor(histories)
    with torch.inference_mode():
        return score_all_items(model, prompts, processor.item_codec).gather(1, torch.from_numpy(items)).numpy()


@pytest.mark.parametrize("scoring", ["full", "catalogue"])
@pytest.mark.parametrize("views", [HistoryViews(0.3), HistoryViews(1.0), HistoryViews(0.0, neighbours=0.4)])
@pytest.mark.parametrize("options", [{}, {"aggregation": "mixture", "num_factors": 2}])
def test_filters_make_no_list_shorter_and_change_no_score(scoring, views, options):
    model, processor = trainable("title", views, **options)
    model.eval()
    processor.item_knn = NeighbourTable.fit(DATA.train.select([0]), 40)
    histories = CSR.from_rows([[1, 2, 3], [7], []])
    every = ViewMixture(model, processor, num_beams=None, scoring=scoring).scores(histories)
    mixture = ViewMixture(model, processor, num_beams=5, scoring=scoring)
    first = mixture.best(histories, 5)
    few = torch.zeros(3, 40, dtype=torch.bool)
    few[0, 30:34] = few[1, 12:20] = few[2, [4]] = True
    for exclude, allowed, counts in (
        (torch.from_numpy(first.items), None, (5, 5, 5)),
        (None, few, (4, 5, 1)),
        (None, few[1], (5, 5, 5)),
        (torch.tensor([[30, 31], [-1, -1], [4, -1]]), few, (2, 5, 0)),
    ):
        best = mixture.best(histories, 5, exclude, allowed)
        assert tuple((best.items >= 0).sum(1)) == counts
        logs = mixture.scores(histories, exclude, allowed, least=5)
        assert tuple((logs > -np.inf).sum(1)) >= counts
        for row, (items, scores) in enumerate(zip(best.items, best.scores, strict=True)):
            given = items[items >= 0]
            assert allowed is None or few[row if allowed.dim() == 2 else 1][given].all()
            assert exclude is None or not set(given) & set(exclude[row].tolist())
            assert (scores[: len(given)] <= every[row, given] + 1e-4).all()  # some views may not have found it
        alone = mixture.best(CSR.from_rows([[]]), 5, None if exclude is None else exclude[2:], few[1])
        np.testing.assert_allclose(alone.scores[0, :1], every[2, alone.items[0, :1]], atol=1e-4)
    np.testing.assert_array_equal(mixture.best(histories, 5).items, first.items)


@pytest.mark.parametrize("codec", ["id", "title"])
def test_whatever_is_asked_together_and_before_a_user_gets_the_same(codec):
    """Batches of two users, each with items that may be given and that may not, and a table that grows meanwhile."""
    model, processor = trainable(codec, HistoryViews(0.4))
    sizes = {"num_beams": 6, "batch_size": 2}
    histories = CSR.from_rows([[9, 8], [1, 2, 3], [30], [4, 5], [6, 0, 9]])
    exclude = torch.tensor([[9, 8, -1], [1, 2, 3], [30, 7, 11], [12, -1, -1], [0, 6, 1]])
    allowed = torch.rand(5, 40, generator=torch.Generator().manual_seed(0)) < 0.5
    mixture = ViewMixture(model, processor, **sizes)
    mixture.scores(CSR.from_rows([[20, 3]]))
    together = mixture.scores(histories, exclude, allowed, least=5)
    best = ViewMixture(model, processor, **sizes).best(histories, 5, exclude, allowed)
    for user in range(5):
        own = histories.take(np.array([user])), exclude[user : user + 1], allowed[user : user + 1]
        alone = ViewMixture(model, processor, **sizes).scores(*own, least=5)[0]
        np.testing.assert_allclose(together[user], alone, rtol=1e-4)
        np.testing.assert_allclose(best.scores[user], -np.sort(-alone)[:5], rtol=1e-4)
        prompt = ViewMixture(model, processor, HistoryViews(0.0), **sizes).scores(*own)[0]
        np.testing.assert_array_equal(best.parts[0][user] == -np.inf, prompt[best.items[user]] == -np.inf)


def test_a_list_does_not_depend_on_how_many_items_others_want():
    """Views alone find few of the items that may be given; whoever has enough of them is not searched again."""
    model, processor = trainable("title", HistoryViews(1.0))
    rng, again = np.random.default_rng(0), 0
    for _ in range(4):
        allowed = torch.zeros(40, dtype=torch.bool)
        allowed[rng.permutation(40)[:14]] = True
        histories, wanted = CSR.from_rows([[1, 2, 30], [1, 2, 30]]), np.array([2, 10])
        mixture = ViewMixture(model, processor, num_beams=10)
        together = mixture.best(histories, wanted, allowed=allowed)
        for user, k in enumerate(wanted.tolist()):
            alone = mixture.best(CSR.from_rows([[1, 2, 30]]), k, allowed=allowed)
            np.testing.assert_array_equal(together.items[user, :k], alone.items[0])
            np.testing.assert_allclose(together.scores[user, :k], alone.scores[0], rtol=1e-5)
        again += not np.allclose(together.scores[0, :2], together.scores[1, :2], rtol=1e-3)
    assert again  # what one asks for would change what the other is given


def test_a_table_that_is_expected_is_made_at_once_of_what_takes_part():
    model, processor = trainable("id", HistoryViews(1.0))
    rows = [[9, 8], [30], list(range(processor.max_history + 5))]
    histories, asked = CSR.from_rows(rows), []
    model.register_forward_pre_hook(lambda m, a, k: asked.append(len(k["input_ids"])), with_kwargs=True)
    mixture = ViewMixture(model, processor)
    mixture.expect(histories)
    first = mixture.scores(histories.take(np.array([1])))
    assert asked == [len({9, 8, 30, *rows[2][5:]})]
    np.testing.assert_array_equal(mixture.scores(histories)[1], first[0])
    assert len(asked) == 1


def test_a_catalogue_too_large_for_a_table_of_every_item_is_refused(monkeypatch):
    monkeypatch.setattr("flr.decode.mixture._MAX_DENSE", 40 * 40 - 1)
    model, processor = trainable("id", HistoryViews(0.4))
    with pytest.raises(ValueError, match=r"views: expected at most 39 items where each is scored .*, got 40"):
        ViewMixture(model, processor)
    ViewMixture(model, processor, HistoryViews(0.0))


def test_evaluation_scores_every_item_where_it_is_asked_to():
    model, processor = trainable("title", HistoryViews(0.4))
    shared = {"progress": False, "samples": 2, "num_beams": 20}
    exact = evaluate(model, processor, DATA.test, method="exhaustive", **shared)
    assert (exact.settings["method"], exact.settings["num_beams"]) == ("exhaustive", None)
    every = ViewMixture(model, processor, num_beams=None).scores(DATA.test.histories)
    own = every[np.arange(len(DATA.test)), DATA.test.targets]
    np.testing.assert_array_equal(exact.ranks["item"], (every >= own[:, None]).sum(1))
    found = evaluate(model, processor, DATA.test, **shared)
    assert (found.settings["method"], found.settings["num_beams"]) == ("beam", 20)
    given = ViewMixture(model, processor, num_beams=20).scores(DATA.test.histories) > -np.inf
    given = given[np.arange(len(DATA.test)), DATA.test.targets]
    assert 0 < given.sum() < len(given)
    np.testing.assert_array_equal(found.ranks["item"] > 0, given)
    assert (found.scores[found.items >= 0] > -np.inf).all()


def test_prompts_of_views_are_cut_so_that_logits_fit(monkeypatch):
    model, processor = trainable("title", HistoryViews(0.4))
    sizes, vocabulary = [], model.config.vocab_size
    handle = model.register_forward_hook(lambda m, a, k, o: sizes.append(len(k["input_ids"])), with_kwargs=True)
    monkeypatch.setattr("flr.decode.memory._MAX_LOGITS", 3 * 5 * vocabulary)
    ViewMixture(model, processor, num_beams=5).scores(CSR.from_rows([[i, i + 1] for i in range(7)]))
    handle.remove()
    assert max(sizes) == 3
    mixing, processor = trainable("title", HistoryViews(0.4), aggregation="mixture", num_factors=3)
    assert ViewMixture(mixing, processor, num_beams=5).batch_size == 1


@pytest.mark.parametrize("codec", ["id", "sid"])
def test_item_knn_takes_part_with_its_weight(codec):
    model, processor = trainable(codec, HistoryViews(0.3, 0.6))
    model.eval()
    histories = CSR.from_rows([[1, 2, 3], [7], []])
    alone = np.exp(ViewMixture(model, processor, num_beams=40).scores(histories))
    processor.item_knn = NeighbourTable.fit(DATA.train, len(processor.catalogue))
    processor.views = HistoryViews(0.3, 0.6, neighbours=0.4)
    mixture = ViewMixture(model, processor, num_beams=40)
    expected = 0.6 * alone + 0.4 * processor.item_knn.probabilities(histories)
    np.testing.assert_allclose(np.exp(mixture.scores(histories)), expected, rtol=1e-4, atol=1e-7)
    best = mixture.best(histories, 5)
    np.testing.assert_array_equal(best.items, np.argsort(-expected, axis=1, kind="stable")[:, :5])
    whole, rest = (np.exp(part) for part in best.parts)
    prompts = np.take_along_axis(
        ViewMixture(model, processor, HistoryViews(0.0), num_beams=40).scores(histories), best.items, 1
    )
    np.testing.assert_allclose(whole * np.exp(prompts) + rest, np.exp(best.scores), rtol=1e-3, atol=1e-7)


def test_item_knn_alone_asks_the_model_nothing():
    model, processor = trainable("title", HistoryViews(0.3, neighbours=1.0))
    processor.item_knn = NeighbourTable.fit(DATA.train.select([0]), 40)  # knows few items
    histories, exclude = CSR.from_rows([[1, 2, 3], []]), torch.tensor([[4, 5], [-1, -1]])
    model.register_forward_pre_hook(lambda *_: pytest.fail("asked"))
    scores = np.exp(ViewMixture(model, processor).scores(histories, exclude, least=40))
    expected = processor.item_knn.probabilities(histories)
    expected[0, [4, 5]] = 0
    np.testing.assert_allclose(scores, expected)


def test_views_are_not_asked_again_where_item_knn_has_enough_items():
    model, processor = trainable("title", HistoryViews(1.0, neighbours=0.4))
    processor.item_knn = NeighbourTable.fit(DATA.train, len(processor.catalogue))
    mixture, histories = ViewMixture(model, processor, num_beams=5), CSR.from_rows([[1, 2, 3]])
    exclude = torch.arange(30)[None]
    first = mixture.scores(histories, exclude)
    model.register_forward_pre_hook(lambda *_: pytest.fail("asked again"))
    given = mixture.best(histories, 5, exclude)
    np.testing.assert_allclose(given.scores[0], -np.sort(-first[0])[:5], rtol=1e-6)
    assert given.scores.min() > -np.inf


def test_a_weight_of_item_knn_without_a_table_is_refused(tmp_path):
    model, processor = trainable(views=HistoryViews(0.0, neighbours=0.5))
    with pytest.raises(ValueError, match=r"neighbours: expected 0 without a table of item-kNN, got 0\.5"):
        ViewMixture(model, processor)
    processor.item_knn = NeighbourTable.fit(DATA.train, len(processor.catalogue))
    processor.save_pretrained(tmp_path)
    assert RecProcessor.from_pretrained(tmp_path).views == processor.views
    for path in tmp_path.iterdir():  # what a download from the Hub takes
        assert any(path.match(pattern) for pattern in BESIDE), path.name
    (tmp_path / "item_knn.safetensors").unlink()
    with pytest.raises(ValueError, match=r"item_knn\.safetensors: expected the table of item-kNN"):
        RecProcessor.from_pretrained(tmp_path)


def test_a_processor_without_a_table_leaves_none_of_an_earlier_one(tmp_path):
    _, processor = trainable()
    processor.item_knn = NeighbourTable.fit(DATA.train, len(processor.catalogue))
    processor.save_pretrained(tmp_path)
    loaded = RecProcessor.from_pretrained(tmp_path)
    assert loaded.item_knn is not None
    loaded.item_knn = None
    loaded.save_pretrained(tmp_path)
    assert RecProcessor.from_pretrained(tmp_path).item_knn is None
