"""The mixture over views of a history."""

import numpy as np
import pytest
import torch

from flr.data import CSR, HistoryViews, NeighbourTable, RecProcessor
from flr.decode import score_all_items
from flr.decode.mixture import ViewMixture
from flr.evaluate import evaluate
from flr.model.folder import BESIDE
from tests.helpers.catalogues import DATA
from tests.helpers.models import trainable


@pytest.mark.parametrize("codec", ["id", "sid", "title"])
@pytest.mark.parametrize("weight", [0.0, 0.4, 1.0])
def test_views_are_a_mixture_of_probabilities(codec, weight):
    views = HistoryViews(weight, decay=0.6)
    model, processor = trainable(codec, views)
    model.eval()
    histories = [[1, 2, 3], [7], [], [5, 5, 9, 30], list(range(12))]
    mixture = ViewMixture(model, processor, num_beams=40, batch_size=2)
    scores = mixture.scores(CSR.from_rows(histories))
    again = ViewMixture(model, processor, num_beams=40).scores(CSR.from_rows(histories[::-1]))[::-1]
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
    assert whole.metrics == evaluate(model, loaded, DATA.test, progress=False).metrics
    assert mixed.metrics != whole.metrics
    assert mixed.settings["views"] == {"weight": 0.7, "decay": 0.5, "neighbours": 0.0}
    for wrong in ({"weight": 1.5}, {"decay": 0.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            HistoryViews(**wrong)
    with pytest.raises(ValueError, match="views: expected HistoryViews"):
        ViewMixture(model, loaded)


@pytest.mark.parametrize("codec", ["id", "sid"])
def test_item_knn_takes_part_with_its_weight(codec):
    model, processor = trainable(codec, HistoryViews(0.3, 0.6))
    model.eval()
    histories = CSR.from_rows([[1, 2, 3], [7], []])
    alone = ViewMixture(model, processor, num_beams=40).scores(histories)
    processor.item_knn = NeighbourTable.fit(DATA.train, len(processor.catalogue))
    processor.views = HistoryViews(0.3, 0.6, neighbours=0.4)
    mixture = ViewMixture(model, processor, num_beams=40)
    expected = 0.6 * alone + 0.4 * processor.item_knn.probabilities(histories)
    np.testing.assert_allclose(mixture.scores(histories), expected, rtol=1e-4, atol=1e-7)
    best = mixture.best(histories, 5)
    np.testing.assert_array_equal(best.items, np.argsort(-expected, axis=1, kind="stable")[:, :5])
    whole, rest = (np.exp(part) for part in best.parts)
    prompts = np.take_along_axis(
        ViewMixture(model, processor, HistoryViews(0.0), num_beams=40).scores(histories), best.items, 1
    )
    np.testing.assert_allclose(whole * prompts + rest, np.exp(best.scores), rtol=1e-3, atol=1e-7)


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
