"""Neighbours of items: counted, and drawn as targets."""

import numpy as np
import pytest

from flr.data import CATALOGUE_USER, Augment, InteractionDataset
from flr.train import item_neighbours, with_catalogue_rows
from tests.helpers.catalogues import DATA


def test_neighbours_are_drawn_by_weight_and_reproducibly():
    table = item_neighbours(DATA.train, DATA.catalogue, top=5)
    assert table.items.shape == (40, 5)
    assert np.all(np.diff(table.cumulative, axis=1) >= -1e-12)
    rows = with_catalogue_rows(DATA.train, table, 50)
    assert rows.users.count(CATALOGUE_USER) == 50 * int((table.cumulative[:, -1] > 0).sum())
    dataset = InteractionDataset(rows)
    item = int(rows.histories.row(len(DATA.train))[0])
    own = [i for i in range(len(rows)) if rows.users[i] == CATALOGUE_USER and rows[i].history.tolist() == [item]]
    augment = Augment(neighbours=table)
    drawn = np.concatenate([augment([dataset[(e, i)] for i in own], seed=1)[1] for e in range(40)])
    assert np.array_equal(
        drawn, np.concatenate([augment([dataset[(e, i)] for i in own], seed=1)[1] for e in range(40)])
    )
    share = np.diff(table.cumulative[item], prepend=0)
    for neighbour, weight in zip(table.items[item], share, strict=True):
        assert abs((drawn == neighbour).mean() - weight) < 0.05
    # rows of users keep their target unless asked
    plain = [dataset[(0, i)] for i in range(20)]
    assert augment(plain, seed=1)[1].tolist() == [row.target for row in plain]
    with pytest.raises(ValueError, match="neighbours"):
        Augment(neighbour=0.5)
