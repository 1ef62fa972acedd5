"""The definition of ``flr_kernels.trie_step`` against plain Python, and what it refuses."""

import pytest
import torch

import flr_kernels
from flr.decode import CatalogueTrie
from tests.helpers.trie_steps import call, case, naive


def assert_equals_naive(found, arguments, unique, normalise):
    for selection, wanted in ((found.all, lambda f: True), (found.unfinished, lambda f: not f[3])):
        width = selection.score.shape[1]
        for user in range(len(selection.score)):
            expected = [f for f in naive(arguments, user, unique, normalise) if wanted(f)][:width]
            n = len(expected)
            torch.testing.assert_close(
                selection.score[user].cpu(),
                torch.tensor([*(f[0] for f in expected), *[-torch.inf] * (width - n)]),
                atol=1e-5, rtol=1e-5,
            )  # fmt: skip
            assert selection.node[user].tolist() == [*(f[1] for f in expected), *[0] * (width - n)]
            assert selection.parent[user].tolist() == [*(f[2] for f in expected), *[0] * (width - n)]
            assert (selection.key[user] != torch.iinfo(torch.int64).min).sum() == n


@pytest.mark.parametrize("kind", ["none", "prefix", "only", "exclude"])
@pytest.mark.parametrize("unique", [False, True])
@pytest.mark.parametrize(("items", "beams", "depth", "spread"), [(40, 4, 1, 6), (30, 1, 0, 30), (7, 3, 2, 3)])
def test_definition(items, beams, depth, spread, unique, kind):
    arguments = case(items + depth, 3, items, beams, depth, spread, kind)
    norm = None if unique else arguments["logits"].logsumexp(-1)
    found = flr_kernels.trie_step(**call(arguments, num_unfinished=5, num_all=7, norm=norm, unique=unique))
    assert_equals_naive(found, arguments, unique, normalise=unique)
    for user in range(3):
        with_children = {f[2] for f in naive(arguments, user, unique, unique)}
        live = (arguments["score"][user] != -torch.inf).nonzero()[:, 0].tolist()
        assert bool(found.invalid[user]) == (unique and not set(live) <= with_children)


def test_equal_scores_go_to_the_smaller_leaf():
    trie = CatalogueTrie.from_sequences([3, 1, 2], [0, 1, 2, 3])
    arrays = {name: getattr(trie, name) for name in ("children", "tokens", "leaf_begin", "leaf_end")}
    root, start = torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 1)
    found = flr_kernels.trie_step(torch.zeros(1, 1, 4), start, root, **arrays, num_unfinished=0, num_all=2, widest=3)
    assert found.all.node.tolist() == [[1, 2]]
    assert found.unfinished.node.shape == (1, 0)


def test_equal_scores_go_to_the_smaller_leaf_whatever_its_depth():
    """Nodes are numbered level by level: the deeper ones, of the smaller leaves, have the larger numbers."""
    trie = CatalogueTrie.from_sequences([1, 1, 1, 1, 1, 2, 2, 1, 2, 2], [0, 3, 6, 8, 10])
    arrays = {name: getattr(trie, name) for name in ("children", "tokens", "leaf_begin", "leaf_end")}
    node, start = torch.tensor([[2, 3]]), torch.zeros(1, 2)  # (2,) and (1, 1)
    assert trie.leaf_begin[node[0]].tolist() == [2, 0]
    found = flr_kernels.trie_step(torch.zeros(1, 2, 4), start, node, **arrays, num_unfinished=0, num_all=4, widest=2)
    assert trie.leaf_begin[found.all.node[0]].tolist() == [0, 1, 2, 3]
    assert found.all.parent.tolist() == [[1, 1, 0, 0]]


@pytest.mark.parametrize("norm", [None, torch.zeros(2, 3)])
def test_a_forbidden_token_is_no_continuation(norm):
    arguments = case(4, 2, 20, 3, 0, 30)
    arguments["score"][:] = 0.0
    trie = arguments["trie"]
    child = int(trie.children[0])
    arguments["logits"][..., int(trie.tokens[child])] = -torch.inf
    norm = None if norm is None else norm[:, : arguments["node"].shape[1]]
    most = int(trie.children[1]) - child
    found = flr_kernels.trie_step(**call(arguments, num_unfinished=0, num_all=most, norm=norm))
    assert (found.all.score > -torch.inf).sum(1).tolist() == [most - 1] * 2
    assert found.all.node[:, -1].tolist() == [0, 0]
    assert not (found.all.node == child).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_logits_of_every_dtype_are_added_in_float32(dtype):
    arguments = case(5, 3, 40, 4, 1, 6)
    arguments["logits"] = arguments["logits"].to(dtype)
    found = flr_kernels.trie_step(**call(arguments, num_unfinished=3, num_all=7))
    wanted = flr_kernels.trie_step(
        **call(arguments | {"logits": arguments["logits"].float()}, num_unfinished=3, num_all=7)
    )
    for one, other in zip((*found.unfinished, *found.all), (*wanted.unfinished, *wanted.all), strict=True):
        assert torch.equal(one, other)


def test_children_of_a_hypothesis_that_is_none_are_not_counted():
    trie = CatalogueTrie.from_sequences([1, 1, 1, 2, 1, 3, 2, 1, 2, 2], [0, 2, 4, 6, 8, 10])
    arrays = {name: getattr(trie, name) for name in ("children", "tokens", "leaf_begin", "leaf_end")}
    node = torch.tensor([[1, 2]])  # of three children and of two

    def step(score):
        return flr_kernels.trie_step(torch.zeros(1, 2, 4), score, node, **arrays, num_unfinished=0, num_all=4, widest=2)

    found = step(torch.tensor([[-torch.inf, 0.0]]))
    assert found.all.parent.tolist() == [[1, 1, 0, 0]]
    assert (found.all.score > -torch.inf).sum() == 2
    with pytest.raises(ValueError, match="widest: expected at least 3"):
        step(torch.zeros(1, 2))


def test_normalisers_that_are_not_finite_are_reported():
    arguments = case(1, 3, 20, 2, 1, 5)
    arguments["score"][:] = 0.0
    arguments["logits"][1, 0] = torch.nan
    found = flr_kernels.trie_step(**call(arguments, num_unfinished=2, num_all=2))
    assert found.invalid.tolist() == [False, True, False]


def test_registered():
    arguments = call(case(2, 2, 20, 3, 1, 5, "prefix"), num_unfinished=3, num_all=4)
    order = (
        "logits",
        "score",
        "node",
        "norm",
        "children",
        "tokens",
        "leaf_begin",
        "leaf_end",
        "listed",
        "offset",
        "entries",
    )
    values = [arguments.get(name) for name in order]
    torch.library.opcheck(torch.ops.flr.trie_step.default, (*values, 3, 4, arguments["widest"], True, "prefix"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(2, 3)}, r"logits: expected shape \[B, w, V\]"),
        ({"score": torch.zeros(2, 3, dtype=torch.float64)}, "score: expected dtype torch.float32"),
        ({"node": torch.zeros(2, 9, dtype=torch.int64)}, r"node: expected \[B, w\] of logits"),
        ({"tokens": torch.zeros(3, dtype=torch.int32)}, "children: expected length"),
        ({"children": torch.zeros(3)}, "children: expected dtype torch.int32"),
        ({"norm": torch.zeros(2, 9)}, "norm: expected"),
        ({"filter": "prefix"}, "listed, offset: expected both"),
        ({"filter": "some"}, "filter: expected one of"),
        (
            {"filter": "only", "listed": torch.zeros(9).long(), "offset": torch.zeros(1).long(), "entries": 3},
            "offset: expected B of node = 2, got 1",
        ),
        ({"widest": 0}, "widest: expected an integer from 1"),
        ({"num_all": -1}, "num_all: expected an integer from 0"),
    ],
)
def test_bad_input_is_named(change, message):
    arguments = call(case(3, 2, 20, 3, 1, 5), num_unfinished=3, num_all=4) | change
    with pytest.raises(ValueError, match=message):
        flr_kernels.trie_step(**arguments)
