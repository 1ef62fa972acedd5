"""The search for items by a few letters."""

from __future__ import annotations

import itertools
import random

import pytest

from flr.data import Catalogue
from flr.serve import search as module
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


@pytest.mark.parametrize("window", [1, 2, 7, 1 << 20])
def test_every_hit_is_found_whatever_the_windows_and_no_scan_is_long(monkeypatch, window):
    """A scan in C lets no other thread run."""

    class Text(str):
        def find(self, word, begin, end):
            assert end - begin < window + len(word)
            return super().find(word, begin, end)

    monkeypatch.setattr(module, "_WINDOW", window)
    draw = random.Random(0)
    titles = ["".join(draw.choices("abc ", k=draw.randrange(12))) for _ in range(200)]
    search = ItemSearch(Catalogue([f"i{i}" for i in range(200)], titles))
    search._text = Text(search._text)
    for letters in itertools.chain("abc", itertools.product("abc", repeat=3), itertools.product("abc", repeat=5)):
        word = "".join(letters)
        assert sorted(search(word).indices) == [i for i, title in enumerate(titles) if word in title]
