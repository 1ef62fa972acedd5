"""Definition of what a model reads between two steps of a beam search, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from ...allowed import Allowed


def _ancestor(keys: Tensor, leaf: Tensor, depth: Tensor, items: int) -> Tensor:
    """The node ``depth`` tokens below the root above a leaf position."""
    return torch.searchsorted(keys, depth * (items + 1) + leaf, right=True) - 1


def ways(
    node: Tensor, live: Tensor, before: Tensor, leaf_begin: Tensor, leaf_end: Tensor, lengths: Tensor, keys: Tensor,
    deepest: int, allowed: Allowed,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The next branchings of hypotheses [B, w], their depths, and allowed leaf positions below.

    A branching is the deepest node above the first and the last allowed leaf, found by halving from ``before`` on. Dead
    hypotheses stay where they are.
    """
    items = len(lengths)
    first = allowed.first(leaf_begin[node].long()).clamp_max(items - 1).masked_fill(~live, 0)
    last = allowed.last(leaf_end[node].long()).masked_fill(~live, 0)
    low, high = before, lengths[first].long()
    for _ in range(max(deepest, 1).bit_length()):
        middle = (low + high + 1) // 2
        above = _ancestor(keys, first, middle, items).clamp_min(0)
        both = (leaf_begin[above] <= first) & (leaf_end[above] > last)
        low, high = torch.where(both, middle, low), torch.where(both, high, middle - 1)
    depth = torch.where(live, low, before)
    return torch.where(live, _ancestor(keys, first, depth, items), node), depth, first


def trie_advance(
    score: Tensor, node: Tensor, parent: Tensor, sees: Tensor, depth: Tensor, position: Tensor, overflow: Tensor,
    tokens: Tensor, leaf_begin: Tensor, leaf_end: Tensor, lengths: Tensor, keys: Tensor | None, listed: Tensor | None,
    offset: Tensor | None, entries: int, columns: int, deepest: int, filter: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    """What hypotheses read next; shapes as in :func:`flr_kernels.trie_advance`."""
    users, count = node.shape
    inherited = sees.gather(1, parent[..., None].expand(-1, -1, sees.shape[-1]))
    before = depth.gather(1, parent)
    column = torch.arange(columns, device=node.device)
    if keys is None:
        node, reads = node.clone(), torch.ones_like(node)
    else:
        allowed = Allowed(filter, listed, offset, entries, len(lengths))
        live = score != -torch.inf
        node, reached, first = ways(node, live, before, leaf_begin, leaf_end, lengths, keys, deepest, allowed)
        reads = reached - before
    ends = reads.cumsum(1)
    begins, total = ends - reads, ends[:, -1:]
    mine = (begins[..., None] <= column) & (column < ends[..., None])  # [B, w, columns]
    own = torch.cat([inherited, mine], dim=-1)
    last = (ends - 1).clamp(0, max(columns - 1, 0)) + columns * torch.arange(users, device=node.device)[:, None]
    known = node, before + reads, reads, last, overflow | (total[:, 0] > columns)
    if keys is None:
        seen = own.new_empty(users, 0, own.shape[-1])
        return *known, tokens[node.clamp_min(1)].long(), position[:, None] + before, own, seen
    owner = torch.searchsorted(ends, column.expand(users, -1).contiguous(), right=True).clamp_max(count - 1)
    used = column < total
    place = (column - begins.gather(1, owner)).masked_fill(~used, 0)
    above = before.gather(1, owner) + place
    at = torch.where(used, _ancestor(keys, first.gather(1, owner), above + 1, len(lengths)), 1)
    seen = own.gather(1, owner[..., None].expand(-1, -1, own.shape[-1]))
    seen[..., sees.shape[-1] :] &= column <= column[:, None]
    seen[..., sees.shape[-1] :] |= column == column[:, None]  # padding sees itself
    return *known, tokens[at].long(), position[:, None] + above, own, seen
