"""Title features, and the embeddings that start from them."""

import numpy as np
import pytest
import torch

from flr.train import init_item_embeddings, item_features
from tests.helpers.catalogues import DATA
from tests.helpers.models import trainable


def test_title_features_put_items_of_one_series_together():
    features = item_features(DATA.catalogue, 16)
    assert features.shape == (40, 16)
    similarity = features @ features.T
    series = DATA.catalogue.attributes["series"]
    same = (series[:, None] == series[None]) & ~np.eye(40, dtype=bool)
    assert similarity[same].mean() > similarity[series[:, None] != series[None]].mean() + 0.2
    assert np.array_equal(features, item_features(DATA.catalogue, 16))


@pytest.mark.parametrize("codec", ["id", "sid"])
def test_item_embeddings_start_from_titles(codec):
    model, processor = trainable(codec)
    before = model.get_input_embeddings().weight.clone()
    init_item_embeddings(model, processor, scale=0.1)
    after = model.get_input_embeddings().weight
    used = torch.zeros(len(after), dtype=torch.bool)
    used[torch.from_numpy(processor.item_codec.tokens.astype(np.int64))] = True
    assert torch.equal(after[~used], before[~used])
    changed = (after != before).any(1)
    torch.testing.assert_close(after[changed].square().mean().sqrt(), torch.tensor(0.1))
    if codec == "id":
        rows = after[torch.from_numpy(processor.item_codec.tokens.astype(np.int64))]
        expected = torch.from_numpy(item_features(DATA.catalogue, 32))
        cosine = torch.nn.functional.cosine_similarity(rows[:, None], rows[None], dim=-1)
        torch.testing.assert_close(cosine, expected @ expected.T, rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match="codec"):
        init_item_embeddings(*trainable("title"))
