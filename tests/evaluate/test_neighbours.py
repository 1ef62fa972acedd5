"""The weights of item-kNN and of a model's own views, chosen on valid."""

import numpy as np
import pytest

from flr.data import HistoryViews, NeighbourTable
from flr.decode import CatalogueTrie, beam_search
from flr.evaluate import evaluate, evaluate_scorer
from flr.evaluate.baselines import ItemKNN
from flr.evaluate.neighbours import fit_neighbours, fit_views
from tests.helpers.catalogues import DATA
from tests.helpers.models import trainable


def test_each_weight_is_what_evaluation_gives_with_it():
    model, processor = trainable()
    size = len(processor.catalogue)
    table = NeighbourTable.fit(DATA.train, size)
    fit = fit_neighbours(model, processor, table, DATA.valid, [1.0, 0.0, 0.4, 0.4], batch_size=7)
    assert fit.weights == (0.0, 0.4, 1.0)
    means = fit.metrics["ndcg@10"].mean(1)
    assert fit.best == fit.weights[int(means.argmax())]
    processor.item_knn = table
    for weight, mean in zip(fit.weights, means, strict=True):
        views = HistoryViews(0.0, neighbours=weight)
        result = evaluate(model, processor, DATA.valid, progress=False, views=views)
        assert result.metrics["item"]["ndcg@10"] == pytest.approx(mean, abs=1e-9)
    knn = evaluate_scorer(ItemKNN(DATA.train, size), DATA.valid, DATA.catalogue)
    assert knn.metrics["item"]["ndcg@10"] == pytest.approx(means[-1], abs=1e-3)
    assert len(np.unique(means)) == 3


def test_views_of_the_processor_are_kept_and_its_own_table_is_not():
    model, processor = trainable()
    table = NeighbourTable.fit(DATA.train, len(processor.catalogue))
    processor.item_knn, processor.views = table.padded(len(table)), HistoryViews(0.5, decay=0.9, neighbours=0.3)
    fit = fit_neighbours(model, processor, table, DATA.valid, [0.0, 0.4])
    for weight, mean in zip(fit.weights, fit.metrics["ndcg@10"].mean(1), strict=True):
        views = HistoryViews(0.5, decay=0.9, neighbours=weight)
        result = evaluate(model, processor, DATA.valid, progress=False, views=views)
        assert result.metrics["item"]["ndcg@10"] == pytest.approx(mean, abs=1e-9)


def test_as_many_items_take_part_as_there_are_beams():
    """One beam gives one item, and a target that is another one is not found."""
    model, processor = trainable("sid")
    table = NeighbourTable.fit(DATA.train, len(processor.catalogue))
    trie = CatalogueTrie.from_codec(processor.item_codec)
    best = beam_search(model, processor(DATA.valid.histories), trie, 1, 1, processor.scoring).items[:, 0]
    found = (best.numpy() == DATA.valid.targets).astype(float).tolist()
    for fit in (
        fit_neighbours(model, processor, table, DATA.valid, [0.0], num_beams=1),
        fit_views(model, processor, DATA.valid, [0.0], num_beams=1),
    ):
        assert fit.metrics["hr@10"][0].tolist() == found
    assert 0 < sum(found) < len(found)


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_each_weight_of_views_is_what_evaluation_gives_with_it(share):
    """Beside a table as well, whose share stays, and with the decay that the processor has."""
    model, processor = trainable()
    processor.item_knn = NeighbourTable.fit(DATA.train, len(processor.catalogue))
    processor.views = HistoryViews(0.5, decay=0.9, neighbours=share)
    fit = fit_views(model, processor, DATA.valid, [1.0, 0.0, 0.4], batch_size=7)
    assert fit.weights == (0.0, 0.4, 1.0)
    means = fit.metrics["ndcg@10"].mean(1)
    assert fit.best == fit.weights[int(means.argmax())]
    for weight, mean in zip(fit.weights, means, strict=True):
        views = HistoryViews(weight, decay=0.9, neighbours=share)
        result = evaluate(model, processor, DATA.valid, progress=False, views=views)
        assert result.metrics["item"]["ndcg@10"] == pytest.approx(mean, abs=1e-6)
    assert len(np.unique(means)) == 3
    assert processor.views == HistoryViews(0.5, decay=0.9, neighbours=share)


def test_bad_arguments_name_themselves():
    model, processor = trainable()
    table = NeighbourTable.fit(DATA.train, len(processor.catalogue))
    with pytest.raises(ValueError, match="weights"):
        fit_neighbours(model, processor, table, DATA.valid, [1.5])
    with pytest.raises(ValueError, match="rows"):
        fit_neighbours(model, processor, table, DATA.valid.select([]), [0.5])
    with pytest.raises(ValueError, match="weights"):
        fit_views(model, processor, DATA.valid, [])
    with pytest.raises(ValueError, match="rows"):
        fit_views(model, processor, DATA.valid.select([]), [0.5])
