"""The search for items by a few letters."""

from __future__ import annotations

from flr.data import Catalogue
from flr.serve.search import ItemSearch


def test_search():
    catalogue = Catalogue(
        ["b1", "b2", "B3\nx", "b4"], ["The Köln Concert", "Concert  by the Sea", "STRASSE\tnach Köln", "Blue"]
    )
    search = ItemSearch(catalogue)
    assert search("concert").indices == [1, 0]  # the title begins with it
    assert search("köln").indices == [0, 2]
    assert search("straße").indices == [2]
    assert search("sea conc").indices == [1]
    assert search("b3 x").indices == [2]
    assert search("oncert").indices == [0, 1]
    assert search("blue b4").indices == [3]
    assert search("nothing") == ([], True)
    assert search("\n\t ") == ([0, 1, 2, 3], True)
    many = ItemSearch(Catalogue([f"i{i}" for i in range(3000)], ["same"] * 3000))
    assert (len(many("same").indices), many("same").complete) == (2000, False)
