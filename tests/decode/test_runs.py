"""Runs of tokens without alternative under ``full``: the same items as token by token, in fewer forwards."""

from __future__ import annotations

import random
from unittest import mock

import pytest
import torch

import flr.decode.runs
from flr.decode import CatalogueTrie, beam_search
from flr.decode.packed import PackedSession
from tests.helpers.catalogues import codec_of
from tests.helpers.inputs import toy_inputs
from tests.helpers.models import VOCAB


def titles(seed):
    """Sequences with short heads in common and tails of their own, of different lengths."""
    rng = random.Random(seed)
    heads = {tuple(rng.choices(range(10, 13), k=rng.randint(1, 3))) for _ in range(12)}
    return [(*h, 8, *rng.choices(range(13, 30), k=rng.randint(0, 9)), 9) for h in sorted(heads)] + [(31,)]


def forwards(model, *args, **kwargs):
    """Result of a beam search and the columns of every forward of the model behind the prompt."""
    columns = []
    hook = model.register_forward_hook(lambda _, args, output: columns.append(output.logits.shape[1]))
    try:
        return beam_search(model, *args, **kwargs), columns[1:]
    finally:
        hook.remove()


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("room", [1 << 26, 3 * 100 * 9])
def test_results_equal_those_of_token_by_token(model, seed, room, monkeypatch):
    sequences, rng = titles(seed), random.Random(seed)
    trie, users = CatalogueTrie.from_codec(codec_of(sequences)), 3
    some = torch.tensor([[rng.random() < 0.6 for _ in sequences] for _ in range(3)])
    options = {"allowed": rng.choice([None, some]), "length_penalty": rng.choice([0.0, 0.7, -0.5])}
    arguments = toy_inputs(), trie, rng.randint(1, 5), rng.randint(1, 4)
    monkeypatch.setattr(flr.decode.runs, "_MAX_LOGITS", room)
    found, fewer = forwards(model, *arguments, **options)
    with mock.patch.object(PackedSession, "reads_runs", False):
        expected, each = forwards(model, *arguments, **options)
    assert found.items.tolist() == expected.items.tolist()
    torch.testing.assert_close(found.scores, expected.scores, atol=2e-5, rtol=1e-5)
    assert len(fewer) <= len(each)
    assert all(users * columns * VOCAB <= room for columns in fewer if columns > arguments[2])
    assert sum(fewer) <= sum(each) + 3 * len(fewer)  # no token is read that the other way leaves, padding aside


def test_a_forward_for_each_branching(model):
    """Three items, one branching at the root and one below a common head: two forwards instead of 22."""
    tails = (20,) * 12, (21,) * 20
    sequences = [(10, 11, *tails[0], 9), (10, 12, *tails[1], 9), (13, 14, 9)]
    trie = CatalogueTrie.from_codec(codec_of(sequences))
    found, fewer = forwards(model, toy_inputs(), trie, 3, 3)
    with mock.patch.object(PackedSession, "reads_runs", False):
        expected, each = forwards(model, toy_inputs(), trie, 3, 3)
    assert found.items.tolist() == expected.items.tolist()
    assert (len(fewer), len(each)) == (2, 22)
    # items that may not be given make no branching
    more = CatalogueTrie.from_codec(codec_of([*sequences, (10, 11, 20, 30), (10, 12, 21, 21, 31)]))
    exclude = torch.tensor([[3, 4]] * 3)
    filtered, columns = forwards(model, toy_inputs(), more, 3, 3, exclude=exclude)
    assert filtered.items.tolist() == expected.items.tolist()
    assert len(columns) == 2
    torch.testing.assert_close(found.scores, expected.scores, atol=2e-5, rtol=1e-5)


def test_logits_that_are_not_finite_in_a_run_are_refused(model):
    trie = CatalogueTrie.from_codec(codec_of([(10, 20, 21, 9), (11, 22, 9)]))
    real = model.lm_head.forward

    def broken(hidden):
        out = real(hidden)
        if out.shape[1] > 2:  # the run
            out[:, 0] = torch.nan
        return out

    with mock.patch.object(model.lm_head, "forward", broken), pytest.raises(FloatingPointError):
        beam_search(model, toy_inputs(), trie, 2, 2)
