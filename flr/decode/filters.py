"""Which items a request may be given, asked of trie nodes.

A filter answers, for ranges of leaf positions, how many items in the range are allowed. A node whose count is 0 is
never entered, so a forbidden item is never emitted and no beam is spent on a subtree of forbidden items. All methods
take ``begin`` and ``end``, int64 [B, ...] with 0 <= begin <= end <= C, and know row b as user b; nothing synchronises.

Two forms: a mask over the catalogue (prefix sums, 4·C bytes for every different row), and short lists of items that may
or may not be given (sorted, answered by binary search, 8·B·E bytes whatever the size of the catalogue).
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch

from flr.data.trie import CatalogueTrie


class FlatFilter(NamedTuple):
    """``filter``, ``listed``, ``offset`` and ``entries`` of ``flr_kernels.trie_step``."""

    filter: str
    listed: torch.Tensor | None = None
    offset: torch.Tensor | None = None
    entries: int = 0


class ItemFilter(ABC):
    """What a request allows; made by :func:`item_filter`.

    Attributes:
        all: whether every item is allowed.
        names: of the tensors that it consists of.
    """

    all = False
    names: tuple[str, ...] = ()

    @abstractmethod
    def count(self, begin: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
        """Allowed items among leaf positions begin..end-1, int64 of the same shape."""

    @abstractmethod
    def first(self, begin: torch.Tensor) -> torch.Tensor:
        """Lowest allowed leaf position >= begin; C where there is none."""

    @abstractmethod
    def last(self, end: torch.Tensor) -> torch.Tensor:
        """Highest allowed leaf position < end; -1 where there is none."""

    @abstractmethod
    def select(self, users: torch.Tensor) -> ItemFilter:
        """The filter of these rows, int64."""

    @abstractmethod
    def flat(self, users: int) -> FlatFilter:
        """The arrays behind it, as ``flr_kernels.trie_step`` reads them, for B = ``users``."""

    @abstractmethod
    def padded(self, users: int) -> ItemFilter:
        """For B = ``users``, more than now, and lists of a length that is a power of two."""

    def tensors(self) -> list[torch.Tensor]:
        """What it consists of."""
        return [getattr(self, name) for name in self.names]

    def copied(self) -> ItemFilter:
        """With tensors of its own."""
        new = copy.copy(self)
        for name in self.names:
            setattr(new, name, getattr(self, name).clone())
        return new

    def load(self, other: ItemFilter) -> None:
        """Take over the contents of another of the same shapes."""
        for mine, theirs in zip(self.tensors(), other.tensors(), strict=True):
            mine.copy_(theirs)


class _Everything(ItemFilter):
    all = True

    def count(self, begin: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
        return end - begin

    def first(self, begin: torch.Tensor) -> torch.Tensor:
        return begin

    def last(self, end: torch.Tensor) -> torch.Tensor:
        return end - 1

    def select(self, users: torch.Tensor) -> ItemFilter:
        return self

    def flat(self, users: int) -> FlatFilter:
        return FlatFilter("none")

    def padded(self, users: int) -> ItemFilter:
        return self


class _Mask(ItemFilter):
    """Masks over the catalogue, U different ones, a user's being number ``row`` [B, 1].

    before int32 or int64 [U · (C + 1)]: allowed items before a leaf position, plus u (C + 1) in row u: it rises.
    """

    names = ("before", "offset")

    def __init__(self, before: torch.Tensor, row: torch.Tensor, stride: int) -> None:
        self.before, self.offset, self.stride = before, row * stride, stride
        self._starts = self.offset[:, 0]  # for the users of the last call of ``flat``

    @classmethod
    def of(cls, trie: CatalogueTrie, allowed: torch.Tensor, row: torch.Tensor | None) -> _Mask:
        """From allowed bool [U, C] by item; row None for U = 1."""
        stride, rows = trie.num_items + 1, len(allowed)
        dtype = torch.int32 if rows * stride < 2**31 else torch.int64
        before = torch.zeros(rows, stride, dtype=dtype, device=trie.device)
        torch.cumsum(allowed[:, trie.items.long()], dim=1, dtype=dtype, out=before[:, 1:])
        before += torch.arange(0, rows * stride, stride, dtype=dtype, device=trie.device)[:, None]
        row = torch.zeros(1, 1, dtype=torch.int64, device=trie.device) if row is None else row
        return cls(before.view(-1), row, stride)

    def count(self, begin: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
        offset = self._offset(begin)
        return (self.before[end + offset] - self.before[begin + offset]).long()

    def first(self, begin: torch.Tensor) -> torch.Tensor:
        # the prefix sums first exceed what lies before ``begin`` just behind the position looked for
        offset = self._offset(begin)
        return torch.searchsorted(self.before, self.before[begin + offset] + 1) - offset - 1

    def last(self, end: torch.Tensor) -> torch.Tensor:
        offset = self._offset(end)
        return torch.searchsorted(self.before, self.before[end + offset]) - offset - 1

    def select(self, users: torch.Tensor) -> ItemFilter:
        row = self.offset // self.stride
        return _Mask(self.before, row[users] if len(row) > 1 else row, self.stride)

    def flat(self, users: int) -> FlatFilter:
        if len(self._starts) != users:
            with torch.inference_mode(False):  # it outlives the call, which may be an evaluation's
                self._starts = self.offset[:, 0].expand(users).clone()
        return FlatFilter("prefix", self.before, self._starts, self.stride)

    def copied(self) -> ItemFilter:
        new = super().copied()
        assert isinstance(new, _Mask)
        new._starts = new.offset[:, 0]
        return new

    def load(self, other: ItemFilter) -> None:
        super().load(other)
        if len(self._starts) != len(self.offset):
            self._starts.copy_(self.offset[:, 0].expand(len(self._starts)))

    def padded(self, users: int) -> ItemFilter:
        extra = 0 if len(self.offset) == 1 else users - len(self.offset)
        row = torch.nn.functional.pad(self.offset, (0, 0, 0, extra)) // self.stride
        return _Mask(self.before, row, self.stride)

    def _offset(self, like: torch.Tensor) -> torch.Tensor:
        return self.offset.view(-1, *[1] * (like.dim() - 1))


class _Listed(ItemFilter):
    """listed int64 [B, E]: leaf positions in ascending order, each once, C past the end."""

    kind: str
    names: tuple[str, ...] = ("listed",)

    def __init__(self, listed: torch.Tensor, num_items: int) -> None:
        self.listed, self.num_items = listed, num_items
        self._starts = listed.new_empty(0)  # of rows in the flat list, made at first use

    def select(self, users: torch.Tensor) -> Any:
        return type(self)(self.listed[users], self.num_items)

    def flat(self, users: int) -> FlatFilter:
        entries = self.listed.shape[1]
        if len(self._starts) != users:
            with torch.inference_mode(False):  # it outlives the call, which may be an evaluation's
                self._starts = torch.arange(users, device=self.listed.device) * entries
        return FlatFilter(self.kind, self.listed.flatten(), self._starts, entries)

    def padded(self, users: int) -> Any:
        rows, entries = self.listed.shape
        extra = (0, (1 << max(entries - 1, 0).bit_length()) - entries, 0, users - rows)
        return type(self)(torch.nn.functional.pad(self.listed, extra, value=self.num_items), self.num_items)

    def _rank(self, position: torch.Tensor) -> torch.Tensor:
        """Listed positions before ``position``."""
        return torch.searchsorted(self.listed, position.flatten(1).contiguous()).view(position.shape)


class _Selection(_Listed):
    """The listed items alone."""

    kind = "only"

    def count(self, begin: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
        return self._rank(end) - self._rank(begin)

    def first(self, begin: torch.Tensor) -> torch.Tensor:
        rank = self._rank(begin).flatten(1)
        padded = torch.nn.functional.pad(self.listed, (0, 1), value=self.num_items)
        return padded.gather(1, rank).view(begin.shape)

    def last(self, end: torch.Tensor) -> torch.Tensor:
        rank = self._rank(end).flatten(1)
        return torch.nn.functional.pad(self.listed, (1, 0), value=-1).gather(1, rank).view(end.shape)


class _Exclusion(_Listed):
    """All but the listed items."""

    kind = "exclude"
    names = ("listed", "gap")

    def __init__(self, listed: torch.Tensor, num_items: int) -> None:
        super().__init__(listed, num_items)
        column = torch.arange(listed.shape[1], device=listed.device)
        # allowed positions before each entry: never falls, and stays while entries are neighbours
        self.gap = (listed - column).masked_fill(listed == num_items, num_items + 1).contiguous()

    def count(self, begin: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
        return end - begin - (self._rank(end) - self._rank(begin))

    def first(self, begin: torch.Tensor) -> torch.Tensor:
        rank = self._rank(begin)
        # entries rank..j-1 are begin, begin+1, ... as long as gap[j] == begin - rank
        run = torch.searchsorted(self.gap, (begin - rank).flatten(1), right=True).view(begin.shape)
        return begin + (run - rank)

    def last(self, end: torch.Tensor) -> torch.Tensor:
        rank = self._rank(end)
        # entries j..rank-1 are ..., end-2, end-1 as long as gap[j] == end - rank
        run = torch.searchsorted(self.gap, (end - rank).flatten(1)).view(end.shape)
        return end - 1 - (rank - run)


def item_filter(
    trie: CatalogueTrie,
    batch_size: int,
    allowed: torch.Tensor | None = None,
    exclude: torch.Tensor | None = None,
    only: torch.Tensor | None = None,
    categories: torch.Tensor | None = None,
    wanted: torch.Tensor | int | None = None,
) -> ItemFilter:
    """Filter for a batch; an item must pass everything that is given. Items are given by index.

    Args:
        trie: its device is where the filter lives.
        batch_size: B.
        allowed: bool [C] or [B, C]; None allows all.
        exclude: deny-list, int64 [B, E] items that must not be given, padded with -1, repeats welcome; or None.
        only: allow-list, int64 [B, E] of the same form: no other item is given; or None. A row of -1 allows nothing.
        categories: int64 [C], 64 bits an item (a numpy uint64 array is viewed as int64); needs ``wanted``.
        wanted: int64 [B], or one number for all: items with one of these bits are given.

    Raises:
        ValueError: wrong dtype, shape, or an item index outside 0..C-1.

    >>> trie = CatalogueTrie.from_sequences([5, 6, 7], [0, 1, 2, 3])
    >>> fiction, sale = 1, 2
    >>> books = item_filter(trie, 1, categories=torch.tensor([fiction, sale, fiction | sale]), wanted=sale)
    >>> books.count(torch.tensor([[0]]), torch.tensor([[3]])).item(), books.first(torch.tensor([[0]])).item()
    (2, 1)
    """
    num_items = trie.num_items
    row: torch.Tensor | None = None
    if allowed is not None:
        if allowed.dtype != torch.bool or allowed.shape not in ((num_items,), (batch_size, num_items)):
            shape = f"[{num_items}] or [{batch_size}, {num_items}]"
            raise ValueError(f"allowed: expected bool {shape}, got {allowed.dtype} {list(allowed.shape)}")
        allowed = allowed.to(trie.device).view(-1, num_items)  # one row serves everybody
        if len(allowed) > 1:
            row = torch.arange(batch_size, device=trie.device)[:, None]
    exclude, only = _item_lists(trie, batch_size, "exclude", exclude), _item_lists(trie, batch_size, "only", only)
    if (categories is None) != (wanted is None):
        raise ValueError("categories, wanted: expected both or neither, got one")
    if categories is not None:
        mask, which = _category_mask(trie, batch_size, categories, wanted)
        if allowed is None:
            allowed, row = mask, which
        elif row is None:
            allowed, row = allowed & mask, which
        else:
            allowed = allowed & (mask if which is None else mask[which[:, 0]])
    if only is not None:  # a short list stays a short list
        inside = only >= 0
        item = only.clamp_min(0)
        if allowed is not None:
            inside &= allowed[0][item] if row is None else allowed[row, item]
        if exclude is not None:
            inside &= ~(item[:, :, None] == exclude[:, None]).any(-1)
        return _Selection(_leaves(trie, item, inside), num_items)
    if allowed is not None and exclude is not None:
        allowed = allowed.expand(batch_size, -1) if row is None else allowed[row[:, 0]]
        column = torch.where(exclude >= 0, exclude, num_items)
        forbidden = torch.zeros(batch_size, num_items + 1, dtype=torch.bool, device=trie.device)
        allowed = allowed & ~forbidden.scatter_(1, column, True)[:, :num_items]
        row = torch.arange(batch_size, device=trie.device)[:, None]
    if allowed is not None:
        return _Mask.of(trie, allowed, row)
    if exclude is not None:
        return _Exclusion(_leaves(trie, exclude.clamp_min(0), exclude >= 0), num_items)
    return _Everything()


def _item_lists(trie: CatalogueTrie, batch_size: int, name: str, items: torch.Tensor | None) -> torch.Tensor | None:
    """``items`` on the trie's device, checked; an empty deny-list is none."""
    if items is None:
        return None
    if items.is_floating_point() or items.dtype == torch.bool or items.ndim != 2 or len(items) != batch_size:
        raise ValueError(f"{name}: expected int64 [{batch_size}, E], got {items.dtype} {list(items.shape)}")
    if items.numel() and not (int(items.min()) >= -1 and int(items.max()) < trie.num_items):
        raise ValueError(f"{name}: expected item indices 0..{trie.num_items - 1} or -1, got others")
    if name == "exclude" and items.numel() == 0:
        return None
    return items.to(trie.device, torch.int64)


def _leaves(trie: CatalogueTrie, items: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
    """Leaf positions of the items [B, E] that are ``inside``, ascending, each once, C past the end."""
    leaf = torch.where(inside, trie.leaf_of_item[items], trie.num_items).sort(dim=1).values
    repeated = torch.zeros_like(leaf, dtype=torch.bool)
    repeated[:, 1:] = leaf[:, 1:] == leaf[:, :-1]
    return leaf.masked_fill(repeated, trie.num_items).sort(dim=1).values


def _category_mask(
    trie: CatalogueTrie, batch_size: int, categories: torch.Tensor, wanted: torch.Tensor | int | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Mask bool [U, C] for the U different requests, and which row serves a user, [B, 1] or None for the only one."""
    if categories.dtype != torch.int64 or categories.shape != (trie.num_items,):
        got = f"{categories.dtype} {list(categories.shape)}"
        raise ValueError(f"categories: expected int64 [{trie.num_items}], got {got}")
    if not isinstance(wanted, torch.Tensor):
        number = int(wanted or 0)
        number -= max(number, 0) >> 63 << 64  # as int64 reads the bits
        wanted = torch.full((batch_size,), number, dtype=torch.int64)
    if wanted.dtype != torch.int64 or wanted.shape != (batch_size,):
        raise ValueError(f"wanted: expected int64 [{batch_size}] or a number, got {wanted.dtype} {list(wanted.shape)}")
    different, which = wanted.to(trie.device).unique(return_inverse=True)
    mask = (categories.to(trie.device) & different[:, None]) != 0
    return mask, which[:, None] if len(different) > 1 else None
