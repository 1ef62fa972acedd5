"""The mixture over views of a history."""

import numpy as np
import pytest
import torch

from flr.data import CSR, HistoryViews, RecProcessor
from flr.decode import score_all_items
from flr.decode.mixture import ViewMixture
from flr.evaluate import evaluate
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
    assert mixed.settings["views"] == {"weight": 0.7, "decay": 0.5}
    for wrong in ({"weight": 1.5}, {"decay": 0.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            HistoryViews(**wrong)
    with pytest.raises(ValueError, match="views: expected HistoryViews"):
        ViewMixture(model, loaded)
