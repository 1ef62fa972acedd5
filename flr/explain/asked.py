"""Which trie nodes a model has to read for the log-probabilities of some items, and how these are sums of edges."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from flr.decode import CatalogueTrie, ItemFilter, Scoring

from .thinking import Tree

_MAX_NODES = 256  # read in one row: attention is quadratic in them


@dataclass
class Asked:
    """Some of a user's items, neighbours in the trie.

    Attributes:
        tree: what is to be read.
        columns: int64 [m], the items' places in the user's list.
        edge_row, edge_child: int64 [E] edges whose log-probabilities are wanted, as for ``edge_scores``.
        paths: int64 [m, depth], the edges that an item's log-probability is the sum of; E past their end.
    """

    tree: Tree
    columns: np.ndarray
    edge_row: np.ndarray
    edge_child: np.ndarray
    paths: np.ndarray


@dataclass
class _Paths:
    """A user's items by leaf position, on the host; the root is column 0."""

    nodes: np.ndarray  # [m, depth + 1], the leaf again past its end
    tokens: np.ndarray  # [m, depth + 1], of the edge into the node
    chosen: np.ndarray  # bool [m, depth], whether the step from this column to the next has a log-probability
    begin: np.ndarray  # [m, depth + 1], first child of the node
    end: np.ndarray

    def of(self, rows: slice) -> _Paths:
        return _Paths(*(x[rows] for x in vars(self).values()))


def asked_of(trie: CatalogueTrie, allows: ItemFilter, items: np.ndarray, scoring: Scoring) -> list[Asked]:
    """What is to be read for items.

    Under ``full`` every token has a log-probability, under ``catalogue`` those that lead from a branching of the trie
    of allowed items: what follows the last of these is not read.

    Args:
        trie, allows: as the items were ranked with; allows of B users.
        items: int64 [B, k], -1 for none.
        scoring: "full" or "catalogue".
    """
    wanted = torch.as_tensor(items, device=trie.device)
    leaf = trie.leaf_of_item[wanted.clamp_min(0)]
    column = torch.arange(trie.depth + 1, device=trie.device)
    length = trie.lengths[leaf].long()[..., None]
    nodes = trie.ancestor(leaf[..., None].expand(-1, -1, len(column)), column.minimum(length))  # [B, k, depth + 1]
    chosen = column[:-1] < length
    if scoring == "catalogue":
        flat = nodes.flatten(1)
        count = allows.count(trie.leaf_begin[flat].long(), trie.leaf_end[flat].long()).view_as(nodes)
        chosen = chosen & (count[..., 1:] < count[..., :-1])
    begin, end, tokens = trie.children[nodes], trie.children[nodes + 1], trie.tokens[nodes]
    host = [x.cpu().numpy() for x in (nodes, tokens, chosen, begin, end)]
    leaves, found = leaf.cpu().numpy(), []
    for user in range(len(items)):
        places = np.flatnonzero(items[user] >= 0)
        places = places[np.argsort(leaves[user, places])]
        paths = _Paths(*(x[user, places].astype(bool if x is host[2] else np.int64) for x in host))
        siblings = scoring == "catalogue"
        found += [_asked(user, places[rows], paths.of(rows), siblings) for rows in _runs(paths)]
    return found


def _read(paths: _Paths) -> np.ndarray:
    """bool [m, depth + 1]: nodes that are read, those up to the last choice but the root."""
    column = np.arange(paths.nodes.shape[1])
    last = np.where(paths.chosen, column[:-1], 0).max(1, initial=0)
    return (column <= last[:, None]) & (column > 0)


def _runs(paths: _Paths) -> Iterator[slice]:
    """Runs of items that have at most _MAX_NODES nodes to read together; at least one item each."""
    read = _read(paths)
    new = read.copy()  # neighbours share the beginning of their paths
    new[1:] &= paths.nodes[1:] != paths.nodes[:-1]
    first, size = 0, 0
    for row, (alone, fresh) in enumerate(zip(read.sum(1).tolist(), new.sum(1).tolist(), strict=True)):
        size += fresh if row > first else alone
        if row > first and size > _MAX_NODES:
            yield slice(first, row)
            first, size = row, alone
    if len(read):
        yield slice(first, len(read))


def _asked(user: int, columns: np.ndarray, paths: _Paths, siblings: bool) -> Asked:
    read = _read(paths)
    upper, where = np.unique(paths.nodes[read], return_index=True)  # ascending: breadth first
    item, depth = (x[where] for x in np.nonzero(read))
    rows = np.concatenate(([0], upper))
    before = np.searchsorted(upper, paths.nodes[item, depth - 1])
    parents = np.where(depth > 1, before, -1)
    tree = Tree(user, paths.tokens[item, depth], parents, depth)

    item, depth = np.nonzero(paths.chosen)
    node, child = paths.nodes[item, depth], paths.nodes[item, depth + 1]
    if siblings:
        branching, where = np.unique(node, return_index=True)
        start, end = (x[item[where], depth[where]] for x in (paths.begin, paths.end))
        size = end - start
        offset = np.cumsum(size) - size
        edge_row = np.repeat(np.searchsorted(rows, branching), size)
        edge_child = np.arange(size.sum()) + np.repeat(start - offset, size)
    else:
        edge_child, where = np.unique(child, return_index=True)
        edge_row = np.searchsorted(rows, node[where])
    edges = np.full(paths.chosen.shape, len(edge_child))
    edges[item, depth] = np.searchsorted(edge_child, child)
    return Asked(tree, columns, edge_row, edge_child, edges)
