"""The Triton kernels of `trie_advance` and `trie_collect` against their definitions, to the bit, and in a beam search.

Collected as its neighbours are; `test_triton_backend.py` runs all of them under the interpreter.
"""

import inspect

import pytest
import torch

import flr.decode.beam
import flr_kernels
from flr.decode import CatalogueTrie, beam_search, graphs
from flr_kernels import dispatch, reference
from tests.helpers.catalogues import codec_of, random_catalogue
from tests.helpers.inputs import toy_inputs
from tests.helpers.models import toy_model
from tests.helpers.trie_levels import advance_call, advance_case, collect_call, collect_case
from tests.helpers.triton import DEVICE, MARKS, apart

pytestmark = MARKS


def defined(name, given):
    """What the definition says, called as the operator calls it."""
    given = dict(given)
    if name == "trie_collect":
        unfinished, all_ = given.pop("unfinished"), given.pop("all")
        given |= {"open_score": unfinished.score, "open_node": unfinished.node}
        given |= {"score": all_.score, "node": all_.node, "key": all_.key}
    function = getattr(reference, name)
    defaults = {"keys": None, "listed": None, "offset": None, "entries": 0, "deepest": 0, "filter": "none"}
    return function(*({**defaults, **given}[parameter] for parameter in inspect.signature(function).parameters))


def assert_same(found, wanted):
    for name, got, want in zip(type(found)._fields, found, wanted, strict=True):
        assert got.dtype == want.dtype, name
        assert torch.equal(got, want), name


KINDS = ["none", "prefix", "only", "exclude"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("items", "beams", "depth", "spread", "room", "behind"),
    [(12, 4, 1, 9, 4, 3), (30, 8, 2, 4, 1, 17), (4, 1, 0, 4, 0, 0)],
)
def test_ways_equal_the_definition(items, beams, depth, spread, room, behind, kind):
    made = advance_case(items + depth, 3, items, beams, depth, spread, kind, room=room, behind=behind)
    given = advance_call(made, DEVICE)
    assert_same(flr_kernels.trie_advance(**given), defined("trie_advance", given))


@pytest.mark.parametrize(
    ("beams", "behind"), [(1, 0), (6, 9), (33, 2)]
)  # several rows of programs, widest of a size + 1
def test_a_token_each_equals_the_definition(beams, behind):
    given = advance_call(advance_case(7, 2, 90, beams, 1, 40, ways=False, behind=behind), DEVICE)
    *wanted, _ = defined("trie_advance", given)
    found = flr_kernels.trie_advance(**given)
    assert_same(found, (*wanted, wanted[-1]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("unique", [False, True])
@pytest.mark.parametrize(
    ("items", "beams", "depth", "spread", "k", "widths", "penalty"),
    [(30, 4, 1, 6, 4, (3, 5), 0.0), (30, 1, 0, 30, 6, (9, 12), 0.7), (20, 6, 1, 4, 1, (4, 0), -0.5)],
)
def test_collecting_equals_the_definition(items, beams, depth, spread, k, widths, penalty, unique, kind, monkeypatch):
    monkeypatch.setenv("FLR_BACKEND", "reference")  # for the step before, which takes the interpreter longer
    made = collect_case(items + k, 3, items, beams, depth, spread, kind, unique, k, widths, penalty)
    monkeypatch.setenv("FLR_BACKEND", "triton")
    given = collect_call(made, DEVICE)
    assert_same(flr_kernels.trie_collect(**given), defined("trie_collect", given))


@pytest.mark.parametrize("kind", ["prefix", "only"])
def test_elements_may_lie_apart_in_memory(kind):
    for name, given in (
        ("trie_advance", advance_call(advance_case(13, 3, 12, 4, 1, 9, kind), DEVICE)),
        ("trie_collect", collect_call(collect_case(34, 3, 30, 4, 1, 6, kind), DEVICE)),
    ):
        scattered = {k: apart(x) for k, x in given.items()}
        assert_same(getattr(flr_kernels, name)(**scattered), defined(name, given))


def test_ties():
    """Of items with each other, and of an unfinished one's score with the k-th best, which goes on."""
    made = collect_case(3, 1, 20, 3, 1, 5, k=3, widths=(3, 0))
    made["items"], made["scores"] = torch.tensor([[7, 2, 5]]), torch.full((1, 3), -1.0)
    made["unfinished"] = made["unfinished"]._replace(score=torch.tensor([[-0.5, -1.0, -1.0000001]]))
    found = flr_kernels.trie_collect(**collect_call(made, DEVICE))
    assert found.items.tolist() == [[2, 5, 7]]
    assert (found.score > -2).tolist() == [[True, True, False]]


def test_nothing_to_do():
    """No users; no selection at all."""
    given = advance_call(advance_case(2, 2, 20, 3, 1, 5), DEVICE)
    rows = ("score", "node", "parent", "sees", "depth", "position", "overflow")
    found = flr_kernels.trie_advance(**given | {name: given[name][:0] for name in rows})
    assert found.seen.shape == (0, given["columns"], given["sees"].shape[-1] + given["columns"])
    given = collect_call(collect_case(2, 2, 20, 3, 1, 5, widths=(0, 0)), DEVICE)
    found = flr_kernels.trie_collect(**given)
    assert torch.equal(found.items, given["items"])
    assert found.left.tolist() == [[0, 0, 0]] * 2


def test_too_wide_is_refused():
    given = collect_call(collect_case(2, 2, 20, 3, 1, 5), DEVICE)
    given |= {name: given[name].repeat(1, 75) for name in ("items", "scores")}
    with pytest.raises(ValueError, match="at most 256 a user, got 300"):
        flr_kernels.trie_collect(**given)
    given = advance_call(advance_case(2, 2, 20, 3, 1, 5, ways=False), DEVICE)
    wide = {name: given[name].repeat(1, 100) for name in ("score", "node", "parent")}
    with pytest.raises(ValueError, match="at most 256 hypotheses"):
        flr_kernels.trie_advance(**given | wide | {"columns": wide["node"].shape[1]})


@pytest.mark.parametrize("kind", ["none", "exclude"])
@pytest.mark.parametrize("scoring", ["full", "catalogue"])
def test_levels_of_a_search_of_fixed_shapes(scoring, kind, monkeypatch):
    """What graphs replay, by the kernels and without them: items that end at several depths, runs of tokens between."""
    model, inputs = toy_model("llama").to(DEVICE), toy_inputs((4, 6))
    trie = CatalogueTrie.from_codec(codec_of([(30, *s) for s in random_catalogue(3, 12, 3, 3)])).to(DEVICE)
    chosen = {} if kind == "none" else {"exclude": torch.tensor([[2, -1], [5, 7]])}
    monkeypatch.setattr(graphs, "run", lambda *_: None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLR_BACKEND", "reference")
        patch.setattr(flr.decode.beam, "runs_as_kernel", lambda *_: False)
        expected = beam_search(model, inputs, trie, 3, 4, scoring, **chosen)
    calls = []
    for name in ("trie_advance", "trie_collect"):
        original = dispatch.OPS[name].forward["triton"]
        monkeypatch.setitem(
            dispatch.OPS[name].forward,
            "triton",
            lambda *args, name=name, original=original: calls.append(name) or original(*args),
        )

    def run(_, search, prompts, __):
        return graphs.Replayed(search, prompts).run(len(prompts.states))

    monkeypatch.setattr(graphs, "run", run)
    found = beam_search(model, inputs, trie, 3, 4, scoring, **chosen)
    assert torch.equal(found.items, expected.items)
    torch.testing.assert_close(found.scores, expected.scores, atol=1e-5, rtol=1e-5)
    assert calls.count("trie_collect") == trie.depth
    assert calls.count("trie_advance") == trie.depth - (scoring == "full")
