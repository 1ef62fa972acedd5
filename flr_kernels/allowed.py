"""Which items of a catalogue are allowed, asked of ranges of leaf positions, in plain PyTorch.

What ``filter``, ``listed``, ``offset`` and ``entries`` mean is said in :func:`flr_kernels.trie_step`.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Allowed:
    """A user's allowed leaf positions. Questions are int64 [B, …], C the number of items."""

    def __init__(self, filter: str, listed: Tensor | None, offset: Tensor | None, entries: int, items: int) -> None:
        self.kind, self.items, self.row = filter, items, None
        if listed is not None and offset is not None:
            self.row = listed[offset[:, None] + torch.arange(entries, device=listed.device)].long()  # [B, entries]

    def count(self, low: Tensor, high: Tensor) -> Tensor:
        """Allowed positions low..high-1."""
        if self.row is None:
            return high - low
        if self.kind == "prefix":
            return self._at(self.row, high) - self._at(self.row, low)
        listed = self._rank(high) - self._rank(low)
        return high - low - listed if self.kind == "exclude" else listed

    def first(self, low: Tensor) -> Tensor:
        """The lowest allowed position >= low, C where there is none."""
        if self.row is None:
            return low
        if self.kind == "prefix":  # counts first exceed what lies before ``low`` just behind the position looked for
            return self._rank(self._at(self.row, low) + 1) - 1
        rank = self._rank(low)
        if self.kind == "only":
            return self._at(torch.nn.functional.pad(self.row, (0, 1), value=self.items), rank)
        # entries rank, rank + 1, … are low, low + 1, … as long as the gap before them is that before ``low``
        return low + self._rank(low - rank + 1, self._gaps()) - rank

    def last(self, high: Tensor) -> Tensor:
        """The highest allowed position < high, -1 where there is none."""
        if self.row is None:
            return high - 1
        if self.kind == "prefix":
            return self._rank(self._at(self.row, high)) - 1
        rank = self._rank(high)
        if self.kind == "only":
            return self._at(torch.nn.functional.pad(self.row, (1, 0), value=-1), rank)
        return high - 1 - (rank - self._rank(high - rank, self._gaps()).minimum(rank))

    def _gaps(self) -> Tensor:
        """Allowed positions before each entry, which never fall."""
        assert self.row is not None
        gap = self.row - torch.arange(self.row.shape[1], device=self.row.device)
        return gap.masked_fill(self.row == self.items, self.items + 1)

    @staticmethod
    def _at(row: Tensor, place: Tensor) -> Tensor:
        return row.gather(1, place.flatten(1)).view(place.shape)

    def _rank(self, position: Tensor, row: Tensor | None = None) -> Tensor:
        """How many numbers of a row are smaller."""
        row = self.row if row is None else row
        assert row is not None
        return torch.searchsorted(row, position.flatten(1).contiguous()).view(position.shape)
