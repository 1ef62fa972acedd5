"""Exact log-probability of every item: the definition that beam search is tested against, and an evaluator for small
catalogues.

Every inner node of the trie needs the model's distribution once. A block of neighbouring items is scored in one
forward: its inner nodes are tokens of one row behind the prompt, each seeing the prompt, its ancestors and itself, so
the prompt is encoded once a user and a shared prefix once a block.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from flr.config import check_normalisation
from flr.data.trie import CatalogueTrie, Codec
from flr.model.backbone import causal_lm, evaluating
from flr.model.head import HeadRows, head

from .filters import ItemFilter, item_filter
from .prompts import Prompts, num_prompts, prefill
from .scoring import Scoring, check_vocabulary, log_normaliser
from .ways import mixed, thoughts_apart, ways


class _Block(NamedTuple):
    """The trie above leaf positions begin..end-1, on the host; its n inner nodes breadth first, without root."""

    begin: int
    end: int
    tokens: np.ndarray  # [n]
    parents: np.ndarray  # [n] index among the n, -1 for the root
    depths: np.ndarray  # [n]
    edge_row: np.ndarray  # [E] row of the edge's upper node: 0 is the root, 1 + i is inner node i
    edge_child: np.ndarray  # [E] the edge = its lower node; all children of the inner nodes, root's included
    paths: np.ndarray  # [end - begin, depth] edges of an item as indices into E, E past its end


@torch.no_grad()
def score_all_items(
    model: nn.Module,
    inputs: Mapping[str, Any],
    trie: CatalogueTrie | Codec,
    scoring: Scoring = "full",
    chunk: int | None = None,
    allowed: torch.Tensor | None = None,
    exclude: torch.Tensor | None = None,
) -> torch.Tensor:
    """Log-probability of every item after each user's prompt.

    Args:
        model, inputs: as for ``beam_search``.
        trie: the catalogue's, or a codec to build one of (build it once when calling often).
        scoring: "full" or "catalogue".
        chunk: inner nodes in one forward, at least; memory is B·chunk·V logits. None: as many as 2^26 logits allow.
        allowed, exclude: as for ``beam_search``; others get -inf, and ``catalogue`` normalises over what is allowed.

    Returns:
        float32 [B, C] by item index.

    Raises:
        ValueError: as ``beam_search``.
        FloatingPointError: a score came out NaN.
    """
    check_normalisation("scoring", scoring)
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk: expected at least 1, got {chunk}")
    trie = trie if isinstance(trie, CatalogueTrie) else CatalogueTrie.from_codec(trie)
    if num_prompts(inputs) == 0:
        return torch.empty(0, trie.num_items, dtype=torch.float32, device=inputs["input_ids"].device)
    with evaluating(model):
        log_weights, prompts = ways(model, inputs, reserve=trie.depth, want_hidden=scoring == "catalogue")
        vocabulary = prompts[0].vocabulary
        check_vocabulary(trie, vocabulary)
        device, users = prompts[0].states.device, len(prompts[0].states)
        if chunk is None:
            chunk = int(np.clip((1 << 26) // max(1, users * vocabulary), 16, 512))
        trie = trie.to(device)
        allows = item_filter(trie, users, allowed, exclude)
        by_leaf = torch.empty(users, trie.num_items, dtype=torch.float32, device=device)
        for block in _blocks(trie, chunk):
            scores = [_block_scores(way, block, trie, allows, scoring) for way in prompts]
            by_leaf[:, block.begin : block.end] = mixed(scores, log_weights)
        return _by_item(by_leaf, trie, allows)


@torch.no_grad()
def rank_one_token(
    model: nn.Module,
    inputs: Mapping[str, Any],
    trie: CatalogueTrie,
    scoring: Scoring = "full",
    allowed: torch.Tensor | None = None,
    exclude: torch.Tensor | None = None,
) -> torch.Tensor:
    """``score_all_items`` for catalogues of one token an item: the prefill alone answers. Returns float32 [B, C].

    Raises:
        ValueError: an item has several tokens, and as ``beam_search``.
        FloatingPointError: a score came out NaN.
    """
    check_normalisation("scoring", scoring)
    if trie.depth != 1:
        raise ValueError(f"trie: expected items of one token, got one of {trie.depth}")
    if num_prompts(inputs) == 0:
        return torch.empty(0, trie.num_items, dtype=torch.float32, device=inputs["input_ids"].device)
    with evaluating(model):
        apart = thoughts_apart(model, inputs)
        if apart is None:
            ways_on, log_weights = [prefill(model, inputs, reserve=1).states], None
        else:
            ways_on, log_weights = list(apart[0].hidden[:, :, 0].unbind(1)), apart[0].log_gates
        users, trie = len(ways_on[0]), trie.to(ways_on[0].device)
        allows = item_filter(trie, users, allowed, exclude)
        leaf = trie.leaf_of_item.expand(users, -1)
        denied = None if allows.all else allows.count(leaf, leaf + 1) == 0
        logits = ways_on if apart is None else (head(causal_lm(model), x) for x in ways_on)
        scores = mixed((_first_token_scores(x, trie, denied, scoring) for x in logits), log_weights)
    return _checked(scores if denied is None else scores.masked_fill_(denied, -torch.inf))


def _first_token_scores(
    logits: torch.Tensor, trie: CatalogueTrie, denied: torch.Tensor | None, scoring: Scoring
) -> torch.Tensor:
    """Log-probabilities float32 [B, C] of one-token items; of denied ones as they come."""
    check_vocabulary(trie, logits.shape[-1])
    # the root's children are the leaves in order
    scores = logits.index_select(1, trie.tokens[1:][trie.leaf_of_item].long()).float()
    if scoring == "full":
        return scores.sub_(log_normaliser(logits)[:, None])
    return torch.log_softmax(scores if denied is None else scores.masked_fill_(denied, -torch.inf), dim=-1)


def _block_scores(
    prompts: Prompts, block: _Block, trie: CatalogueTrie, allows: ItemFilter, scoring: Scoring
) -> torch.Tensor:
    """Log-probabilities [B, items of the block]."""
    states = prompts.states[:, None]
    if len(block.tokens):
        below = prompts.session.tree(block.tokens, block.parents, block.depths)
        states = torch.cat([states, below], dim=1)
    row, child = (torch.as_tensor(x, device=states.device) for x in (block.edge_row, block.edge_child))
    edges = edge_scores(states, prompts.head_rows, row, child, trie, allows, scoring)
    padded = torch.cat([edges, edges.new_zeros(len(edges), 1)], dim=1)
    return padded[:, torch.as_tensor(block.paths, device=edges.device)].sum(-1)


def _allowed_leaves(trie: CatalogueTrie, allows: ItemFilter, rows: int) -> torch.Tensor:
    leaf = torch.arange(trie.num_items, device=trie.device).expand(rows, -1)
    return allows.count(leaf, leaf + 1) > 0


def _by_item(by_leaf: torch.Tensor, trie: CatalogueTrie, allows: ItemFilter) -> torch.Tensor:
    if not allows.all:
        by_leaf = by_leaf.masked_fill(~_allowed_leaves(trie, allows, len(by_leaf)), -torch.inf)
    return _checked(by_leaf)[:, trie.leaf_of_item]


def _checked(scores: torch.Tensor) -> torch.Tensor:
    if bool(scores.amax(1).isnan().any()):  # which is NaN where one of them is
        raise FloatingPointError("the model's logits are NaN or infinite: no ranking can be made of them")
    return scores


def edge_scores(
    states: torch.Tensor,
    head_rows: HeadRows | None,
    row: torch.Tensor,
    child: torch.Tensor,
    trie: CatalogueTrie,
    allows: ItemFilter,
    scoring: Scoring,
) -> torch.Tensor:
    """Log-probabilities of E edges of the trie, float32 [B, E].

    Args:
        states: [B, 1 + n, …] at the upper nodes: logits, or hidden states where there are ``head_rows``.
        row, child: int64 [E], which of the 1 + n an edge leaves, and the node that it leads to. Under ``catalogue``
            every child of an upper node that has an edge is among them.
        allows: of B users.
    """
    token = trie.tokens[child].long()
    if head_rows is None:
        raw = states[:, row, token].float()  # [B, E]
    else:
        users, nodes = states.shape[:2]
        every = (torch.arange(users, device=states.device)[:, None] * nodes + row).flatten()
        raw = head_rows(states.flatten(0, 1), every, token.repeat(users)).view(users, -1)
    if scoring == "full":
        return raw - log_normaliser(states)[:, row]
    begin, end = trie.leaf_begin[child].long(), trie.leaf_end[child].long()
    count = allows.count(begin.expand(len(raw), -1), end.expand(len(raw), -1))
    raw = raw.masked_fill(count == 0, -torch.inf)
    index = row.expand_as(raw)
    top = raw.new_full((len(raw), states.shape[1]), -torch.inf).scatter_reduce_(1, index, raw, "amax")
    total = torch.zeros_like(top).scatter_add_(1, index, (raw - top.gather(1, index)).exp())
    norm = (top + total.log()).gather(1, index)
    return (raw - norm).masked_fill(count == 0, -torch.inf)


class _HostTrie:
    """The trie as numpy arrays, with what the cutting into blocks needs besides."""

    def __init__(self, trie: CatalogueTrie) -> None:
        arrays = (trie.children, trie.leaf_begin, trie.leaf_end, trie.tokens, trie.lengths)
        self.children, self.begin, self.end, self.tokens, self.lengths = (
            x.cpu().numpy().astype(np.int64) for x in arrays
        )
        self.level_start = trie.level_start
        self.parent = np.repeat(np.arange(trie.num_nodes), np.diff(self.children))
        self.parent = np.concatenate(([-1], self.parent))
        self.depth = np.repeat(np.arange(trie.depth + 1), np.diff(trie.level_start))
        self.inner = self.children[:-1] < self.children[1:]
        self.inner[0] = False  # the root's logits come with the prompt
        leaf = np.flatnonzero(self.children[:-1] == self.children[1:])
        self.leaf_node = leaf[np.argsort(self.begin[leaf])]  # leaf position -> node

    def inner_nodes(self, first: int, last: int) -> np.ndarray:
        """Inner nodes above any leaf position first..last-1, ascending: a run on every level."""
        runs = []
        for at, to in zip(self.level_start[1:], self.level_start[2:], strict=False):
            low = at + np.searchsorted(self.end[at:to], first, side="right")
            high = at + np.searchsorted(self.begin[at:to], last, side="left")
            runs.append(np.arange(low, high))
        nodes = np.concatenate(runs)
        return nodes[self.inner[nodes]]


def _blocks(trie: CatalogueTrie, chunk: int) -> Iterator[_Block]:
    """Cut the leaves into runs whose inner nodes number at most ``chunk`` (one item's, if that is more)."""
    host = _HostTrie(trie)
    # an inner node is fresh at the first leaf below it; a block that starts later needs it as an older ancestor
    fresh = np.bincount(host.begin[host.inner], minlength=trie.num_items)
    older = host.lengths - 1 - fresh
    before = np.concatenate(([0], np.cumsum(fresh)))
    first = 0
    while first < trie.num_items:
        room = before[first] + max(chunk - older[first], 0)
        last = max(first + 1, int(np.searchsorted(before, room, side="right")) - 1)
        yield _block(host, first, last)
        first = last


def _block(host: _HostTrie, first: int, last: int) -> _Block:
    nodes = host.inner_nodes(first, last)
    upper = np.concatenate(([0], nodes))  # ascending
    fanout = host.children[upper + 1] - host.children[upper]
    start = np.cumsum(fanout) - fanout
    edge_row = np.repeat(np.arange(len(upper)), fanout)
    edge_child = np.arange(len(edge_row)) - start[edge_row] + host.children[upper][edge_row]

    current = host.leaf_node[first:last]
    paths = np.full((last - first, int(host.lengths[first:last].max())), len(edge_row))
    for step in range(paths.shape[1]):
        climbing = current > 0
        child = current[climbing]
        row = np.searchsorted(upper, host.parent[child])
        paths[climbing, step] = start[row] + child - host.children[upper[row]]
        current = np.where(climbing, host.parent[current], 0)
    parents = np.searchsorted(upper, host.parent[nodes]) - 1
    return _Block(first, last, host.tokens[nodes], parents, host.depth[nodes], edge_row, edge_child, paths)
