"""Groups of test rows: where should several factors help?

Thirds of the rows by the length of the history, by how often the target is a target in training, and by how many
interests a history has: kinds of items, an item's first code, per item of the history. Rows of one value stay together.
"""

from __future__ import annotations

import numpy as np

from flr.data import RecDataset

PARTS = 3


def traits(dataset: RecDataset) -> dict[str, np.ndarray]:
    """Values [rows] of the test rows by trait."""
    rows, catalogue = dataset.test, dataset.catalogue
    counts = np.bincount(dataset.train.targets, minlength=len(catalogue))
    found = {"items in the history": rows.histories.lengths, "target's count in training": counts[rows.targets]}
    if catalogue.sids is not None:
        _, first = np.unique([codes[0] for codes in catalogue.sids], return_inverse=True)
        each = [len(np.unique(first[rows.histories.row(row)])) for row in range(len(rows))]
        found["kinds of items per item of the history"] = np.array(each) / np.maximum(rows.histories.lengths, 1)
    return found


def groups(values: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """Thirds of the rows by a trait: what they are, and which rows."""
    inner = np.unique(np.quantile(values, np.arange(1, PARTS) / PARTS, method="lower"))
    group, found = np.searchsorted(inner, values, side="left"), []
    for index in np.unique(group):
        own = values[group == index]
        low, high = (f"{x:.2g}" if values.dtype.kind == "f" else f"{x:,}" for x in (own.min(), own.max()))
        found.append((low if low == high else f"{low} to {high}", np.flatnonzero(group == index)))
    return found
