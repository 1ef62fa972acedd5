"""What every op refuses, and by which exception: the ones that its docstring names."""

import math

import pytest
import torch

import flr_kernels
from tests.helpers.trie_levels import advance_call, advance_case, collect_call, collect_case
from tests.helpers.trie_steps import call, case


def arguments(name):
    """A call in order."""
    if name == "trie_step":
        return call(case(3, 2, 20, 3, 1, 5, "prefix"), num_unfinished=3, num_all=4)
    if name == "trie_advance":
        return advance_call(advance_case(3, 2, 20, 3, 1, 5, "prefix"))
    if name == "trie_collect":
        return collect_call(collect_case(3, 2, 20, 3, 1, 5, "prefix"))
    return {
        "factor_attention": {"h": torch.zeros(2, 3, 4), "u": torch.zeros(2, 2, 4), "mask": torch.ones(2, 3).bool()},
        "factor_aggregate": {"f": torch.zeros(2, 3, 4), "gate_logits": torch.zeros(2, 3)},
        "log_normaliser": {"logits": torch.zeros(2, 3)},
        "token_logprob": {"hidden": torch.zeros(2, 4), "weight": torch.zeros(5, 4), "target": torch.tensor([0, 4])},
        "group_advantage": {"token_logprobs": torch.zeros(4, 3), "mask": torch.ones(4, 3).bool(), "group_size": 2},
    }[name]


TENSORS = [
    (name, argument)
    for name in (
        "factor_attention",
        "factor_aggregate",
        "log_normaliser",
        "token_logprob",
        "group_advantage",
        "trie_step",
        "trie_advance",
        "trie_collect",
    )
    for argument, value in arguments(name).items()
    if isinstance(value, torch.Tensor)
]


@pytest.mark.parametrize(("name", "argument"), TENSORS)
def test_every_tensor_must_be_dense_and_beside_the_others(name, argument):
    function, given = getattr(flr_kernels, name), arguments(name)
    function(**given)
    value = given[argument]
    changed = {"dense": value.to_sparse(), "tensor": [1]}
    if value.dim() > 1:  # nested, by strides
        with pytest.raises(ValueError, match=rf"^{argument}: expected a dense tensor, got a nested one"):
            function(**given | {argument: torch.nested.as_nested_tensor(value)})
    if sum(isinstance(x, torch.Tensor) for x in given.values()) > 1:
        changed["device"] = value.to("meta")
    for expected, other in changed.items():
        with pytest.raises(ValueError, match=rf"^\w+: expected .*{expected}"):
            function(**given | {argument: other})


@pytest.mark.parametrize(
    ("name", "argument", "values"),
    [
        ("factor_aggregate", "eps", (None, "x", 0, -1, math.nan, math.inf, True, 1e-60, 10**400, torch.ones(2))),
        ("group_advantage", "eps", (None, "x", -1, math.nan, math.inf, True, 10**400, torch.ones(2))),
        ("group_advantage", "group_size", (None, "x", 0, 3, 2.0, True, 1 << 40)),
        ("group_advantage", "kind", (None, "x", ["grpo"], torch.ones(2))),
        ("factor_attention", "last_first", (None, "x", 1)),
        ("trie_step", "widest", (None, 0, 2.5, True, 1, 10**12)),
        ("trie_step", "num_all", (None, -1, 2.5, 10**12)),
        ("trie_step", "entries", (None, -1, 10**6)),
        ("trie_step", "unique", (None, 1)),
    ],
)
def test_numbers_and_names(name, argument, values):
    for value in values:
        with pytest.raises(ValueError, match=f"^{argument}: expected"):
            getattr(flr_kernels, name)(**arguments(name) | {argument: value})


@pytest.mark.parametrize(
    ("name", "argument", "change"),
    [
        ("token_logprob", "target", lambda x: x + 1),
        ("token_logprob", "target", lambda x: x - 1),
        ("trie_step", "node", lambda x: x + 1000),
        ("trie_step", "node", lambda x: x * 0 - 1),
        ("trie_step", "tokens", lambda x: x + 1000),
        ("trie_step", "tokens", lambda x: x * 0 - 1),
        ("trie_step", "children", lambda x: x + 1000),
        ("trie_step", "children", lambda x: x - 1000),
        ("trie_step", "leaf_end", lambda x: x + 1000),
        ("trie_step", "offset", lambda x: x - 1),
        ("trie_step", "offset", lambda x: x + 1000),
        ("trie_step", "entries", lambda x: 1),
    ],
)
def test_an_index_out_of_range_is_an_index_error(name, argument, change):
    given = arguments(name)
    for learned in (False, True) if name == "token_logprob" else (False,):
        given |= {"hidden": given["hidden"].requires_grad_(learned)} if learned else {}
        with pytest.raises(IndexError, match=rf"^[\w, ]*{argument}[\w, ]*: expected"):
            getattr(flr_kernels, name)(**given | {argument: change(given[argument])})


def test_the_first_index_past_the_end_is_one_too():
    given = arguments("trie_step")
    nodes, listed = len(given["tokens"]), len(given["listed"])
    last = given["children"].clone()
    last[given["node"]] = -1  # which would be taken from the end
    for name, value in (
        ("node", torch.full_like(given["node"], nodes)),
        ("children", torch.full_like(given["children"], nodes + 1)),
        ("children", last),
        ("offset", torch.full_like(given["offset"], listed - given["entries"] + 1)),
    ):
        with pytest.raises(IndexError, match=f"^{name}: expected"):
            flr_kernels.trie_step(**given | {name: value})


def test_no_users():
    given = arguments("trie_step")
    none = {name: given[name][:0] for name in ("logits", "score", "node", "offset")}
    found = flr_kernels.trie_step(**given | none)
    assert found.all.score.shape == (0, 4)
    assert found.invalid.shape == (0,)
