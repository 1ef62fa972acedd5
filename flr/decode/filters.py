"""Which items a request may be given, asked of trie nodes.

A filter answers, for ranges of leaf positions, how many items in the range are allowed. A node whose count is 0 is never
entered, so a forbidden item is never emitted and no beam is spent on a subtree of forbidden items. All methods take
`begin` and `end`, int64 [B, ...] with 0 <= begin <= end <= C, and know row b as user b; nothing synchronises.

Two forms: an allow-mask (prefix sums, 4·B·C bytes), and short exclusion lists (sorted, answered by binary search,
8·B·E bytes: what `exclude_seen` uses, whatever the size of the catalogue).
"""

from __future__ import annotations

from typing import Protocol

import torch

from .trie import CatalogueTrie


class ItemFilter(Protocol):
    def count(self, begin: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
        """Allowed items among leaf positions begin..end-1, int64 of the same shape."""

    def first(self, begin: torch.Tensor) -> torch.Tensor:
        """Lowest allowed leaf position >= begin; C where there is none."""


class _Everything:
    def count(self, begin: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
        return end - begin

    def first(self, begin: torch.Tensor) -> torch.Tensor:
        return begin


class _Mask:
    def __init__(self, trie: CatalogueTrie, allowed: torch.Tensor) -> None:
        by_leaf = allowed[:, trie.items.long()]  # [B or 1, C]
        rows, num_items = by_leaf.shape
        self.before = torch.zeros(rows, num_items + 1, dtype=torch.int32, device=trie.device)
        torch.cumsum(by_leaf, dim=1, dtype=torch.int32, out=self.before[:, 1:])

    def count(self, begin: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
        return (self._before(end) - self._before(begin)).long()

    def first(self, begin: torch.Tensor) -> torch.Tensor:
        # the prefix sums first exceed what lies before `begin` just behind the position looked for
        wanted = (self._before(begin) + 1).flatten(1)
        if len(self.before) == 1:
            wanted = wanted.view(1, -1)
        return (torch.searchsorted(self.before, wanted) - 1).view(begin.shape)

    def _before(self, position: torch.Tensor) -> torch.Tensor:
        if len(self.before) == 1:
            return self.before[0][position]
        return self.before.gather(1, position.flatten(1)).view(position.shape)


class _Exclusion:
    def __init__(self, trie: CatalogueTrie, exclude: torch.Tensor) -> None:
        num_items = trie.num_items
        leaf = torch.where(exclude >= 0, trie.leaf_of_item[exclude.clamp_min(0)], num_items)
        leaf = leaf.sort(dim=1).values
        repeated = torch.zeros_like(leaf, dtype=torch.bool)
        repeated[:, 1:] = leaf[:, 1:] == leaf[:, :-1]
        self.excluded = leaf.masked_fill(repeated, num_items).sort(dim=1).values  # [B, E], C past the end
        column = torch.arange(leaf.shape[1], device=leaf.device)
        self.gap = self.excluded - column  # never falls before the padding: allowed positions before each entry
        self.gap = self.gap.masked_fill(self.excluded == num_items, num_items + 1).contiguous()

    def count(self, begin: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
        return end - begin - (self._rank(end) - self._rank(begin))

    def first(self, begin: torch.Tensor) -> torch.Tensor:
        rank = self._rank(begin)
        # entries rank..j-1 are begin, begin+1, ... as long as gap[j] == begin - rank
        run = torch.searchsorted(self.gap, (begin - rank).flatten(1), right=True).view(begin.shape)
        return begin + (run - rank)

    def _rank(self, position: torch.Tensor) -> torch.Tensor:
        return torch.searchsorted(self.excluded, position.flatten(1).contiguous()).view(position.shape)


def item_filter(
    trie: CatalogueTrie,
    batch_size: int,
    allowed: torch.Tensor | None = None,
    exclude: torch.Tensor | None = None,
) -> ItemFilter:
    """Filter for a batch.

    Args:
        trie: its device is where the filter lives.
        batch_size: B.
        allowed: bool [C] or [B, C] over item indices; None allows all.
        exclude: int64 [B, E] item indices that must not be given, padded with -1, repeats welcome; None excludes none.

    Raises:
        ValueError: wrong dtype, shape, or an item index outside 0..C-1.
    """
    num_items = trie.num_items
    if allowed is not None:
        if allowed.dtype != torch.bool or allowed.shape not in ((num_items,), (batch_size, num_items)):
            raise ValueError(
                f"allowed must be bool [{num_items}] or [{batch_size}, {num_items}], got {allowed.dtype} {list(allowed.shape)}"
            )
        allowed = allowed.to(trie.device).view(-1, num_items)  # one row serves everybody
    if exclude is not None:
        if (
            exclude.is_floating_point()
            or exclude.dtype == torch.bool
            or exclude.ndim != 2
            or len(exclude) != batch_size
        ):
            raise ValueError(f"exclude must be int64 [{batch_size}, E], got {exclude.dtype} {list(exclude.shape)}")
        if exclude.numel() and not (int(exclude.min()) >= -1 and int(exclude.max()) < num_items):
            raise ValueError(f"exclude must hold item indices 0..{num_items - 1} or -1")
        exclude = exclude.to(trie.device, torch.int64)
        if exclude.numel() == 0:
            exclude = None
    if allowed is not None and exclude is not None:
        column = torch.where(exclude >= 0, exclude, num_items)
        forbidden = torch.zeros(batch_size, num_items + 1, dtype=torch.bool, device=trie.device)
        allowed = allowed & ~forbidden.scatter_(1, column, True)[:, :num_items]
    if allowed is not None:
        return _Mask(trie, allowed)
    if exclude is not None:
        return _Exclusion(trie, exclude)
    return _Everything()
