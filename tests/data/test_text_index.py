"""Positions of texts by checksum: those of a dict, whatever collides."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from flr.data import Catalogue
from flr.data.text_index import TextColumn, TextIndex

TEXTS = ["", "a", "A", "ß", "SS", "a", "\U0001f600", "codding", "gnu", "a b"]  # "codding" and "gnu" have one CRC-32


@pytest.mark.parametrize("fold", [str, str.casefold])
@pytest.mark.parametrize("bits", [32, 1, 0])
def test_positions_are_those_of_a_dict_even_where_checksums_collide(monkeypatch, fold, bits):
    whole = TextIndex._key
    monkeypatch.setattr(TextIndex, "_key", staticmethod(lambda text: whole(text) & ((1 << bits) - 1)))
    index = TextIndex(TEXTS, fold)
    for text in [*TEXTS, "b", "aa"]:
        wanted = [place for place, other in enumerate(TEXTS) if fold(other) == fold(text)]
        assert index(text) == wanted
        assert index.first(text) == (wanted[0] if wanted else None)
    assert index.repeated() == (5 if fold is str else 2)
    assert TextIndex(["x", "y"]).repeated() is None


def test_a_catalogue_travels_with_its_index():
    catalogue = pickle.loads(pickle.dumps(Catalogue(["b", "a"], ["One", "Two"])))
    assert (catalogue.index("a"), catalogue.lookup("two")) == (1, [1])


def test_memory_is_a_few_bytes_a_text():
    texts = [f"text {i}" for i in range(1000)]
    index = TextIndex(texts)
    held = [value for value in vars(index).values() if isinstance(value, np.ndarray)]
    assert sum(array.nbytes for array in held) == 8 * len(texts)


def test_a_column_tells_where_texts_stand():
    texts = [*TEXTS, "a\0", "a"]
    column = TextColumn(np.array(texts, np.dtypes.StringDType()))
    for wanted in ([], ["a"], ["a\0", "codding", "gnu"], ["nothing", "\ud800", ""], texts):
        assert column(wanted).tolist() == [text in wanted for text in texts]
    assert TextColumn(np.array([], np.dtypes.StringDType()))(["a"]).tolist() == []
