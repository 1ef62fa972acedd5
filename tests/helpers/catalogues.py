"""Catalogues and token sequences that several test modules use."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from flr.data import BadRow, Catalogue, Interactions, ReadReport, RecDataset, planted_dataset

#: What the training tests train on.
DATA = planted_dataset(num_items=40, num_users=60, seed=3)
#: Its items, every third of which has a shorter title.
UNEVEN = Catalogue(
    DATA.catalogue.item_ids,
    [title if place % 3 else str(place) for place, title in enumerate(DATA.catalogue.titles)],
    DATA.catalogue.sids,
    DATA.catalogue.attributes,
)
#: A title that breaks pages and plots which do not escape.
NASTY = "<script>alert(1)</script> & \"A $5 <b>Wonder</b>\" 'x' $y$"

#: Sequences of up to 23 tokens, of which the first two tell which it is.
LONG = [(30 + a, 40 + b, *range(10, 10 + 3 + 4 * a + b)) for a in range(5) for b in range(3)]


def named_catalogue(num_items: int = 40, seed: int = 1) -> Catalogue:
    """Items ``item_0``, ``item_1``, … with titles, semantic IDs and attributes."""
    return planted_dataset(num_items=num_items, num_users=10, seed=seed).catalogue


def nasty_catalogue() -> Catalogue:
    """Thirty items, among them markup, an empty title, and a long one that is not Latin."""
    catalogue = named_catalogue(30)
    titles = list(catalogue.titles)
    titles[0], titles[1], titles[2] = NASTY, "", "日本の歌 " * 20
    return Catalogue(catalogue.item_ids, titles, catalogue.sids, catalogue.attributes)


class Codec(NamedTuple):
    """As much of an item codec as a trie reads."""

    tokens: np.ndarray
    offsets: np.ndarray


def codec_of(sequences: list[tuple[int, ...]]) -> Codec:
    """Given token sequences as a codec."""
    lengths = [len(s) for s in sequences]
    tokens = np.array([t for s in sequences for t in s], dtype=np.int32)
    return Codec(tokens, np.concatenate(([0], np.cumsum(lengths))).astype(np.int64))


def random_catalogue(
    seed: int, num_items: int = 14, depth: int = 4, alphabet: int = 4, first: int = 10
) -> list[tuple[int, ...]]:
    """Prefix-heavy unique sequences of 1..depth tokens, closed by token 9 (so prefix-free)."""
    rng = np.random.default_rng(seed)
    found: dict[tuple[int, ...], None] = {}
    while len(found) < num_items:
        body = rng.integers(first, first + alphabet, rng.integers(1, depth + 1))
        found[(*(int(t) for t in body), 9)] = None
    return list(found)


def small_catalogue() -> Catalogue:
    """Three items with every kind of attribute."""
    return Catalogue(
        ["a", "b", "c"],
        ["Kind of Blue", "Blue Train", "Blue Train"],
        [("<a_1>", "<b_1>"), ("<a_1>", "<b_2>"), ("<a_1>", "<b_2>")],
        {"interest": np.array([0, 1, 1]), "price": [1.5, float("nan"), 2.0], "kind": ["cd", "lp", ""]},
    )


def small_dataset() -> RecDataset:
    """A data set over them."""
    rows = Interactions(["u", "v"], [[0], [1, 2]], [1, 0], [3, 4])
    report = ReadReport("somewhere", 3, 2, 1, 2, 3, [BadRow("f.csv", 7, "no")], ["a note"])
    return RecDataset(small_catalogue(), rows, rows.select([0]), rows.select([1]), "small", report)
