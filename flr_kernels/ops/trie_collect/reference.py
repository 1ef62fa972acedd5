"""Definition of what a step of a beam search leaves behind, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from ...allowed import Allowed
from ...order import order_key

_DEAD = torch.iinfo(torch.int64).min


def trie_collect(
    items: Tensor, scores: Tensor, broken: Tensor, invalid: Tensor, open_score: Tensor, open_node: Tensor,
    score: Tensor, node: Tensor, key: Tensor, children: Tensor, leaf_begin: Tensor, leaf_end: Tensor, item: Tensor,
    lengths: Tensor, scale: Tensor, listed: Tensor | None, offset: Tensor | None, entries: int, depth: int,
    longest: int, unique: bool, filter: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The best items after a step, and who goes on; shapes as in :func:`flr_kernels.trie_collect`."""
    best_items, best_scores = _merged(
        items, scores, score, node, key, children, leaf_begin, leaf_end, item, lengths, scale, unique,
        Allowed(filter, listed, offset, entries, len(lengths)),
    )  # fmt: skip
    hopeless = open_score / scale[longest] < best_scores[:, -1:]
    going = open_score.masked_fill(hopeless, -torch.inf)
    live = going != -torch.inf
    ahead = torch.zeros_like(open_node)
    if not unique:
        below = leaf_begin[open_node].long()
        ahead = lengths[below.clamp_max(len(lengths) - 1)].long()
        several = leaf_end[open_node] - below > 1
    else:
        several = torch.zeros_like(live)
    most = len(scale)
    furthest = ahead.masked_fill(several, most).masked_fill(~live, 0)
    furthest = furthest.amax(1) if live.shape[1] else furthest.sum(1)
    to_read = ((ahead - depth).clamp_min(0) * live).sum(1)
    return best_items, best_scores, broken | invalid, going, torch.stack([live.sum(1), furthest, to_read], dim=1)


def _merged(
    items: Tensor, scores: Tensor, score: Tensor, node: Tensor, key: Tensor, children: Tensor, leaf_begin: Tensor,
    leaf_end: Tensor, item: Tensor, lengths: Tensor, scale: Tensor, unique: bool, allowed: Allowed,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The k best of items so far and of continuations that end one."""
    leaf = leaf_begin[node].long()
    if unique:
        is_item = allowed.count(leaf, leaf_end[node].long()) == 1
        leaf = allowed.first(leaf).clamp_max(len(lengths) - 1)
    else:
        is_item = children[node] == children[node + 1]
    is_item = is_item & (key != _DEAD)
    new = torch.where(is_item, score / scale[lengths[leaf].long()], -torch.inf)
    items = torch.cat([items, torch.where(is_item, item[leaf].long(), -1)], dim=1)
    scores, count = torch.cat([scores, new], dim=1), scores.shape[1]
    index = order_key(scores, items.clamp_min(0)).topk(count, dim=1).indices
    found = scores.gather(1, index)
    return items.gather(1, index).masked_fill(found == -torch.inf, -1), found
