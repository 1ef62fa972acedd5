"""Definition of a beam-search step in a trie in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from ...allowed import Allowed
from ...order import order_key


def check_indices(
    logits: Tensor, score: Tensor, node: Tensor, norm: Tensor | None, children: Tensor, tokens: Tensor,
    leaf_begin: Tensor, leaf_end: Tensor, listed: Tensor | None, offset: Tensor | None, entries: int,
    num_unfinished: int, num_all: int, widest: int, *_: object,
) -> None:  # fmt: skip
    """Raise IndexError for a number that indexing would take from the end, ValueError for a ``widest`` too small."""
    if not node.numel():
        return
    _within("node", node, len(tokens) - 1)
    first = children[node]
    _within("children", first, len(tokens))
    most = int((children[node + 1] - first).masked_fill_(score == -torch.inf, 0).max())
    if most > widest:
        raise ValueError(f"widest: expected at least {most}, the children of one of the nodes, got {widest}")
    if listed is not None and offset is not None:
        _within("offset", offset, len(listed) - entries)


def _within(name: str, x: Tensor, most: int) -> None:
    low, high = (int(value) for value in x.aminmax())
    if low < 0 or high > most:
        raise IndexError(f"{name}: expected 0 to {most}, got {low if low < 0 else high}")


def trie_step(
    logits: Tensor, score: Tensor, node: Tensor, norm: Tensor | None, children: Tensor, tokens: Tensor,
    leaf_begin: Tensor, leaf_end: Tensor, listed: Tensor | None, offset: Tensor | None, entries: int,
    num_unfinished: int, num_all: int, widest: int, unique: bool, filter: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Best continuations of hypotheses in a trie; shapes as in :func:`flr_kernels.trie_step`."""
    hypotheses = node.shape[1]
    dead = torch.iinfo(torch.int64).min
    live = (score != -torch.inf)[..., None]
    first = children[node].long()[..., None]
    child = first + torch.arange(widest, device=node.device)
    inside = live & (child < children[node + 1].long()[..., None])
    child = torch.where(inside, child, 0)
    low, high = leaf_begin[child].long(), leaf_end[child].long()
    count = Allowed(filter, listed, offset, entries, 0).count(low, high)
    inside = inside & (count > 0)
    token = torch.where(inside, tokens[child].long(), 0)
    logit = logits.gather(-1, token).float().masked_fill(~inside, -torch.inf)
    if norm is None:
        norm = logit.logsumexp(-1)
    total = logit - norm[..., None] + score[..., None]
    key = torch.where(inside & (total > -torch.inf), order_key(total, low), dead)
    ends = count == 1 if unique else children[child] == children[child + 1]

    def best(keys: Tensor, width: int) -> tuple[Tensor, ...]:
        padded = torch.nn.functional.pad(keys.flatten(1), (0, width), value=dead)  # fewer children than ``width``
        top, index = padded.topk(width, dim=1)
        alive, index = top != dead, index.clamp_max(hypotheses * widest - 1)
        values = (total.flatten(1).gather(1, index), child.flatten(1).gather(1, index), index // widest)
        fill = (-torch.inf, 0, 0)
        return *(torch.where(alive, v, f) for v, f in zip(values, fill, strict=True)), top

    invalid = (live[..., 0] & ~norm.isfinite()).any(1)
    return *best(key.masked_fill(ends, dead), num_unfinished), *best(key, num_all), invalid
