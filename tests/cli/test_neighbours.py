"""``flr neighbours``: which tables it tries, and which of them it takes. With a trained model: test_saved.py."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from flr.cli import main
from flr.cli.neighbours import METHODS, NeighbourOptions
from flr.data import HistoryViews, NeighbourTable, fit_linear, planted_dataset
from flr.data.item_knn import KEPT_NEIGHBOURS
from flr.evaluate.neighbours import NeighbourFit

DATA = planted_dataset(num_items=40, num_users=60)


def assert_same(tables, item_knn, linear):
    for found, wanted in zip((tables["item-knn"], tables["linear"]), (item_knn, linear), strict=True):
        assert found.history_decay == wanted.history_decay
        np.testing.assert_array_equal(found.similarity.toarray(), wanted.similarity.toarray())


def test_both_tables_get_the_options_that_are_given_and_their_own_where_none_are():
    given = {"history_decay": 0.3, "backward": 0.25, "top": 7}
    tables = NeighbourOptions(**given).tables(DATA)
    assert_same(tables, NeighbourTable.fit(DATA.train, 40, **given), fit_linear(DATA.train, 40, **given))
    own = NeighbourTable.fit(DATA.train, 40, top=KEPT_NEIGHBOURS)
    assert_same(NeighbourOptions().tables(DATA), own, fit_linear(DATA.train, 40))
    assert [*NeighbourOptions(method="linear").tables(DATA)] == ["linear"]


@pytest.mark.parametrize("better", METHODS)
def test_the_method_whose_best_weight_ranks_better_is_taken(better, monkeypatch, capsys):
    means = dict.fromkeys(METHODS, (0.2, 0.3)) | {better: (0.4, 0.1)}  # which is worse at the last weight
    tried, saved = [], []

    def fits(model, processor, tables, rows, weights, **sizes):
        assert len(rows) == 7
        assert processor.views == HistoryViews(0.3)
        tried.append(tables)
        found = {name: np.array(values)[:, None].repeat(7, 1) for name, values in means.items()}
        return {name: NeighbourFit((0.0, 1.0), {"ndcg@10": x, "hr@10": x}, 0.0) for name, x in found.items()}

    monkeypatch.setattr("flr.evaluate.neighbours.fit_tables", fits)
    monkeypatch.setattr(NeighbourOptions, "loaded", lambda *_: (None, SimpleNamespace(views=None)))
    data = ["--data", "planted", "--planted_items", "40", "--planted_users", "60"]
    call = ["neighbours", *data, "--model", ".", "--max_users", "7", "--views_weight", "0.3", "--json"]
    monkeypatch.setattr(NeighbourOptions, "save", lambda self, *what: saved.append(what))
    assert main([*call, "--dry_run"]) == 0
    assert json.loads(capsys.readouterr().out)["method"] == better
    assert saved == []
    assert main(call) == 0
    views = HistoryViews(0.3)
    assert saved == [(views, views, tried[1][better])]


@pytest.mark.parametrize(("table", "share", "dropped"), [(None, 0.3, False), (None, 0.4, True), ("another", 0.3, True)])
def test_metrics_go_where_answers_are_others(table, share, dropped, monkeypatch):
    seen = []
    monkeypatch.setattr("flr.data.processor_folder.save_views", lambda *what: seen.append(what))
    monkeypatch.setattr("flr.cli.card.drop_measured", lambda folder: seen.append("dropped"))
    views = HistoryViews(share)
    NeighbourOptions(model="here").save(HistoryViews(0.3), views, table)
    assert seen == [("here", views, table), *["dropped"] * dropped]
