"""Filters of a search."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from flr.decode import CatalogueTrie, beam_search, item_filter
from tests.helpers.catalogues import codec_of, random_catalogue
from tests.helpers.inputs import toy_inputs


@pytest.mark.parametrize("kind", ["only", "categories", "all"])
@pytest.mark.parametrize("scoring", ["full", "catalogue"])
def test_lists_and_categories_equal_the_mask_they_stand_for(model, kind, scoring):
    sequences = random_catalogue(8, 50, 4, 4)
    trie, inputs = CatalogueTrie.from_codec(codec_of(sequences)), toy_inputs()
    generator = torch.Generator().manual_seed(3)
    only = torch.randint(-1, 50, (3, 20), generator=generator)
    categories = 2 ** torch.randint(0, 64, (50,), generator=generator) | 2 ** torch.randint(
        0, 4, (50,), generator=generator
    )
    wanted = torch.tensor([0b1010, -(2**63) | 1, 0b1010])
    arguments, mask = {}, torch.ones(3, 50, dtype=torch.bool)
    if kind != "categories":
        arguments["only"] = only
        mask &= (only[:, :, None] == torch.arange(50)).any(1)
    if kind != "only":
        arguments |= {"categories": categories, "wanted": wanted}
        mask &= (categories & wanted[:, None]) != 0
    if kind == "all":
        arguments["exclude"] = only[:, :3]
        mask &= ~(only[:, :3, None] == torch.arange(50)).any(1)
    found = beam_search(model, inputs, trie, 5, 5, scoring, **arguments)
    expected = beam_search(model, inputs, trie, 5, 5, scoring, mask)
    assert found.items.tolist() == expected.items.tolist()
    assert (found.items >= 0).any()
    torch.testing.assert_close(found.scores, expected.scores, atol=1e-5, rtol=1e-5)


def answers(filters, users, size):
    """Of every range of leaf positions the count, of every position the first from it on and the last before it."""
    ends = torch.arange(size + 1)
    begin, end = (x.expand(users, -1, -1) for x in torch.meshgrid(ends, ends, indexing="ij"))
    begin, end = torch.minimum(begin, end), torch.maximum(begin, end)
    each = ends.expand(users, -1)
    return filters.count(begin, end), filters.first(each), filters.last(each)


@pytest.mark.parametrize("wanted", [None, 2, (2, 2, 2), (1, 4, 6), (1, 1, 2)])
@pytest.mark.parametrize("only", [False, True])
@pytest.mark.parametrize("exclude", [False, True])
@pytest.mark.parametrize("allowed", [None, "shared", "own"])
def test_whatever_is_given_together_is_the_mask_that_it_stands_for(allowed, exclude, only, wanted):
    """For all users, and for some of them in their rows."""
    size, generator = 9, torch.Generator().manual_seed(1)
    trie = CatalogueTrie.from_sequences(torch.randperm(size, generator=generator).numpy() + 10, range(size + 1))
    mask, arguments = torch.ones(3, size, dtype=torch.bool), {}
    if allowed:
        arguments["allowed"] = torch.rand(3, size, generator=generator) < 0.7
        arguments["allowed"] = arguments["allowed"][0] if allowed == "shared" else arguments["allowed"]
        mask &= arguments["allowed"]
    if exclude:
        arguments["exclude"] = torch.tensor([[0, 4, 4, -1], [-1, -1, -1, -1], [8, 7, 6, 0]])
        mask &= ~(arguments["exclude"][..., None] == torch.arange(size)).any(1)
    if only:
        arguments["only"] = torch.tensor([[0, 1, 2, 4, 5], [3, 3, -1, 7, 8], [8, 5, 0, 1, -1]])
        mask &= (arguments["only"][..., None] == torch.arange(size)).any(1)
    if wanted is not None:
        arguments["categories"] = torch.randint(1, 8, (size,), generator=generator)
        arguments["wanted"] = torch.tensor(wanted) if isinstance(wanted, tuple) else wanted
        mask &= (arguments["categories"] & torch.tensor(wanted).expand(3)[:, None]) != 0
    found, leaves = item_filter(trie, 3, **arguments), mask[:, trie.items.long()]
    assert found.all == bool(not arguments)
    for filters, users in ((found, [0, 1, 2]), (found.select(torch.tensor([2, 0])), [2, 0])):
        counts, first, last = answers(filters, len(users), size)
        for row, user in enumerate(users):
            where = leaves[user].nonzero()[:, 0].tolist()
            for a in range(size + 1):
                assert first[row, a] == min([x for x in where if x >= a], default=size)
                assert last[row, a] == max([x for x in where if x < a], default=-1)
                for b in range(a, size + 1):
                    assert counts[row, a, b] == len([x for x in where if a <= x < b])


def test_an_allow_list_without_entries_allows_nothing():
    trie = CatalogueTrie.from_sequences([5, 6, 7], [0, 1, 2, 3])
    ends = torch.tensor([[0]]), torch.tensor([[3]])
    empty = torch.zeros(1, 0, dtype=torch.int64)
    for nothing in (empty, empty - 1, torch.tensor([[-1, -1]])):
        assert item_filter(trie, 1, only=nothing).count(*ends).item() == 0
        assert item_filter(trie, 1, exclude=nothing).count(*ends).item() == 3


@pytest.mark.parametrize("name", ["exclude", "only"])
@pytest.mark.parametrize("items", [[[-2]], [[3]], [[True]], [[0.0]], [0], [[0], [1]]])
def test_lists_that_are_none_of_items_are_refused(name, items):
    trie = CatalogueTrie.from_sequences([5, 6, 7], [0, 1, 2, 3])
    with pytest.raises(ValueError, match=rf"^{name}: expected (int64 \[1, E\]|item indices 0\.\.2 or -1), got"):
        item_filter(trie, 1, **{name: torch.tensor(items)})


@pytest.mark.parametrize("number", [5, 2**63, 2**63 | 5, -1])
def test_a_number_of_categories_is_read_by_its_bits(number):
    """Bit 63 is the sign of an int64: both ways of writing it mean the same."""
    trie = CatalogueTrie.from_sequences([5, 6, 7, 8], [0, 1, 2, 3, 4])
    bits = [1, 4, 2, 2**63]
    found = item_filter(trie, 1, categories=torch.from_numpy(np.array(bits, np.uint64).view(np.int64)), wanted=number)
    leaf = torch.arange(4)[None]
    expected = [[int(bool(each & number)) for each in bits]]
    assert found.count(leaf, leaf + 1).tolist() == expected


def test_excluded_subtree_takes_no_beam(model):
    """With one beam, the best item outside an excluded subtree is found although the subtree scores higher."""
    sequences = [(10, 20), (10, 21), (11, 20), (12, 21)]
    trie, inputs = CatalogueTrie.from_codec(codec_of(sequences)), toy_inputs()
    for first in (10, 11, 12):
        banned = torch.tensor([[i for i, s in enumerate(sequences) if s[0] == first]]).expand(3, -1)
        found = beam_search(model, inputs, trie, 1, 1, exclude=banned)
        assert (found.items >= 0).all()
        assert not (found.items == banned).any()


def test_nothing_allowed_is_empty_not_an_error(model):
    sequences = random_catalogue(1)
    trie = CatalogueTrie.from_codec(codec_of(sequences))
    allowed = torch.ones(3, len(sequences), dtype=torch.bool)
    allowed[1] = False
    found = beam_search(model, toy_inputs(), trie, 5, 5, allowed=allowed)
    assert found.items[1].tolist() == [-1] * 5
    assert found.scores[1].tolist() == [-torch.inf] * 5
    assert (found.items[[0, 2]] >= 0).all()
    unconstrained = beam_search(model, toy_inputs(), trie, 5, 5)
    assert found.items[[0, 2]].tolist() == unconstrained.items[[0, 2]].tolist()
    none = beam_search(
        model, toy_inputs(), trie, 5, 5, "catalogue", allowed=torch.zeros(len(sequences), dtype=torch.bool)
    )
    assert (none.items == -1).all()
