"""The catalogue as a trie in compressed sparse rows.

Nodes are numbered breadth first, children of a node next to each other and ordered by token; node 0 is the root. A node
other than the root has exactly one edge into it, so the edge *is* the child: the children of node ``n`` are the nodes
``children[n] .. children[n + 1] - 1``, ``tokens[child]`` labels the edge. Items are leaves, numbered depth first ("leaf
positions"), so that the items below a node are the contiguous range ``leaf_begin[n] .. leaf_end[n] - 1``: how many of
them a request allows is a difference of two prefix sums (see ``filters``).

    children    int32 [M + 1]   first child of a node; a leaf has none
    tokens      int32 [M]       token on the edge into the node, -1 for the root
    leaf_begin  int32 [M]       leaf positions below the node
    leaf_end    int32 [M]
    items       int32 [C]       leaf position -> item index
    lengths     int32 [C]       leaf position -> number of tokens of the item

M nodes, C items; nothing is padded to the longest item: 16 bytes a node and 8 an item.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from flr.files import atomic_file, check_regular, naming

from .csr import offsets_of, places_within
from .digests import array_digest
from .trie_build import build

_FORMAT = "flr-catalogue-trie-1"
_ARRAYS = ("children", "tokens", "leaf_begin", "leaf_end", "items", "lengths")


class Codec(Protocol):
    """What the trie needs of an item codec: the token sequence of every item, unique and prefix-free."""

    @property
    def tokens(self) -> np.ndarray: ...  # int32 [total]

    @property
    def offsets(self) -> np.ndarray: ...  # int64 [C + 1]


class CatalogueTrie:
    """Trie over the token sequences of C items; see the module's text for the arrays.

    Build it with ``from_codec`` or ``from_sequences``. Level ``d`` holds the nodes reached by ``d`` tokens. Host-side
    numbers per level (``level_start``, ``max_fanout``, ``num_internal``, ``num_leaves``) let a decoder choose sizes
    without asking the device.

    Example:
        >>> trie = CatalogueTrie.from_sequences([5, 7, 5, 8, 6], [0, 2, 4, 5])     # items (5, 7), (5, 8), (6,)
        >>> trie.num_items, trie.num_nodes, trie.num_edges, trie.depth
        (3, 5, 4, 2)
        >>> trie.walk([5]), trie.allowed_tokens([5]), trie.item_at(trie.walk([5, 8]))
        (1, [7, 8], 1)
        >>> trie.walk([9])
        Traceback (most recent call last):
            ...
        ValueError: tokens: expected the beginning of an item, got [9]
    """

    def __init__(
        self,
        children: torch.Tensor,
        tokens: torch.Tensor,
        leaf_begin: torch.Tensor,
        leaf_end: torch.Tensor,
        items: torch.Tensor,
        lengths: torch.Tensor,
        level_start: Sequence[int],
    ) -> None:
        self.children = children
        self.tokens = tokens
        self.leaf_begin = leaf_begin
        self.leaf_end = leaf_end
        self.items = items
        self.lengths = lengths
        self.level_start = tuple(int(x) for x in level_start)  # [depth + 2]
        fanout = children[1:] - children[:-1]
        per_level = [fanout[a:b] for a, b in zip(self.level_start, self.level_start[1:], strict=False)]
        self.max_fanout = tuple(int(x.max()) for x in per_level)  # [depth + 1], the last is 0
        self.num_internal = tuple(int((x > 0).sum()) for x in per_level)
        self.num_leaves = tuple(len(x) - n for x, n in zip(per_level, self.num_internal, strict=True))
        self.max_token = int(tokens.max())
        self._longest_forced_runs: list[int] | None = None
        self._forget_tensors()

    def _forget_tensors(self) -> None:
        """Drop what was computed on this trie's device; it is made again at first use."""
        self._leaf_of_item: torch.Tensor | None = None
        self._node_key: torch.Tensor | None = None
        self._columns: tuple[torch.Tensor, torch.Tensor] | None = None

    @classmethod
    def from_codec(cls, codec: Codec) -> CatalogueTrie:
        """Trie of a codec: anything with ``tokens`` int [total] and ``offsets`` int [C + 1].

        A codec that keeps its own (``trie()``, as :class:`flr.data.ItemCodec` does) gives that.
        """
        own: Callable[[], CatalogueTrie] | None = getattr(codec, "trie", None)
        return cls.from_sequences(codec.tokens, codec.offsets) if own is None else own()

    @classmethod
    def from_sequences(cls, tokens: np.ndarray | Sequence[int], offsets: np.ndarray | Sequence[int]) -> CatalogueTrie:
        """Trie of the sequences ``tokens[offsets[i]:offsets[i + 1]]``, item i = 0..C-1.

        Sorts level by level (one stable sort of the items that have tokens left), vectorised: 10^6 items of 4 tokens
        take about a second. The result is on the CPU. Memory while it works: about twice the trie's, and 40 bytes an
        item.

        Raises:
            ValueError: no items, an empty or negative-token sequence, malformed offsets, or two items of which one's
                sequence equals or is a prefix of the other's (both are named).
        """
        arrays, level_start = build(tokens, offsets)
        return cls(**{name: torch.from_numpy(array) for name, array in arrays.items()}, level_start=level_start)

    def sequences(self) -> tuple[np.ndarray, np.ndarray]:
        """Tokens int32 [total] and offsets int64 [C + 1] of the items by index: what the trie was built from."""
        tokens, lengths = self.tokens.cpu().numpy(), self.lengths.cpu().numpy()
        items, begin, end = (x.cpu().numpy() for x in (self.items, self.leaf_begin, self.leaf_end))
        by_item = np.empty(self.num_items, np.int64)
        by_item[items] = lengths
        offsets = offsets_of(by_item)
        start = offsets[items]  # by leaf position
        out = np.empty(offsets[-1], np.int32)
        for level, (first, last) in enumerate(zip(self.level_start[1:], self.level_start[2:], strict=False)):
            size = end[first:last] - begin[first:last]
            leaf = np.repeat(begin[first:last], size) + places_within(size)
            out[start[leaf] + level] = np.repeat(tokens[first:last], size)
        return out, offsets

    def updated(
        self,
        tokens: np.ndarray | Sequence[int] = (),
        offsets: np.ndarray | Sequence[int] = (0,),
        remove: np.ndarray | Sequence[int] = (),
    ) -> CatalogueTrie:
        """The trie after a change of the catalogue; this one stays as it is and serves until the new one is there.

        The trie built anew from the items that stay, in their order, and then the new ones: 10^6 items of 4 tokens take
        less than a second, and a merge with the old order took as long. On this trie's device.

        Args:
            tokens, offsets: sequences of the new items, as for ``from_sequences``; their indices follow the old ones.
            remove: indices of items to take out; those behind them move up.

        Raises:
            ValueError: as ``from_sequences``, an index out of range, or nothing left.

        Example:
            >>> trie = CatalogueTrie.from_sequences([5, 7, 5, 8, 6], [0, 2, 4, 5])     # items (5, 7), (5, 8), (6,)
            >>> trie.updated([4, 9], [0, 2], remove=[1]).sequences()                   # items (5, 7), (6,), (4, 9)
            (array([5, 7, 6, 4, 9], dtype=int32), array([0, 2, 3, 5]))
        """
        gone = np.unique(np.asarray(remove, np.int64))
        if gone.size and not (gone[0] >= 0 and gone[-1] < self.num_items):
            raise ValueError(f"remove: expected item indices in 0..{self.num_items - 1}, got {gone[0]}..{gone[-1]}")
        stays = np.ones(self.num_items, bool)
        stays[gone] = False
        old_tokens, old_offsets = self.sequences()
        lengths = np.concatenate((np.diff(old_offsets)[stays], np.diff(np.asarray(offsets, np.int64))))
        new = np.asarray(tokens) if len(tokens) else old_tokens[:0]
        every = np.concatenate((old_tokens[np.repeat(stays, np.diff(old_offsets))], new))
        return self.from_sequences(every, offsets_of(lengths)).to(self.device)

    @property
    def num_items(self) -> int:
        return len(self.items)

    @property
    def num_nodes(self) -> int:
        return len(self.tokens)

    @property
    def num_edges(self) -> int:
        return self.num_nodes - 1

    @property
    def depth(self) -> int:
        """Tokens of the longest item."""
        return len(self.level_start) - 2

    @property
    def device(self) -> torch.device:
        return self.children.device

    @property
    def leaf_of_item(self) -> torch.Tensor:
        """int64 [C]: item index -> leaf position (the inverse of ``items``), made at first use."""
        if self._leaf_of_item is None:
            with torch.inference_mode(False):  # it outlives the call, which may be an evaluation's
                inverse = torch.empty(self.num_items, dtype=torch.int64, device=self.device)
                inverse[self.items.long()] = torch.arange(self.num_items, device=self.device)
            self._leaf_of_item = inverse
        return self._leaf_of_item

    def columns(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The different tokens, int64 [U] ascending, and the one that leads into each node, int32 [M]: its place among
        them (0 for the root). Made at first use."""
        if self._columns is None:
            with torch.inference_mode(False):
                different, column = self.tokens[1:].unique(return_inverse=True)
                self._columns = different.long(), torch.nn.functional.pad(column, (1, 0)).int()
        return self._columns

    def longest_forced_runs(self) -> list[int]:
        """[depth]: the most tokens from one branching to the next, from the (n + 1)-th branching on.

        The token chosen at the first of them counts, runs to single items do not; for n = 0 from the root to the first
        branching. Made at first use.

        Example:
            >>> trie = CatalogueTrie.from_sequences([5, 7, 8, 5, 7, 9, 6], [0, 3, 6, 7])    # (5, 7, 8), (5, 7, 9), (6,)
            >>> trie.longest_forced_runs()
            [0, 2, 1]
        """
        if self._longest_forced_runs is None:
            children = self.children.cpu().numpy()
            several = (self.leaf_end - self.leaf_begin).cpu().numpy() > 1
            fanout, run = np.diff(children), np.zeros(self.num_nodes, np.int64)
            longest, so_far = [], 0
            for first, last in reversed(list(zip(self.level_start, self.level_start[1:], strict=False))[:-1]):
                chain = np.flatnonzero((fanout[first:last] == 1) & several[first:last]) + first
                run[chain] = 1 + run[children[chain]]
                if several[first:last].any():
                    so_far = max(so_far, 1 + int(run[first:last][several[first:last]].max()))
                longest.append(so_far)
            longest[-1] = int(run[0])
            self._longest_forced_runs = longest[::-1]
        return self._longest_forced_runs

    def ancestor(self, leaf: torch.Tensor, depth: torch.Tensor) -> torch.Tensor:
        """Node ``depth`` tokens above the leaf at position ``leaf``, int64 of one shape; nothing synchronises.

        depth in 0 .. length of the leaf's item.
        """
        return torch.searchsorted(self.node_key, depth * (self.num_items + 1) + leaf, right=True) - 1

    @property
    def node_key(self) -> torch.Tensor:
        """int64 [M], level · (C + 1) + leaf_begin: ascending, as nodes are numbered. Made at first use."""
        if self._node_key is None:
            with torch.inference_mode(False):
                level = torch.arange(self.depth + 1, device=self.device)
                width = torch.tensor(self.level_start, device=self.device).diff()
                # the size is known: without it a device would be asked for it
                level = torch.repeat_interleave(level, width, output_size=self.num_nodes)
                key = level * (self.num_items + 1) + self.leaf_begin
            self._node_key = key  # ascending: nodes are numbered by level, within a level by their leaves
        return self._node_key

    def common_depth(self, first: torch.Tensor, last: torch.Tensor, above: torch.Tensor) -> torch.Tensor:
        """Depth, int64, of the deepest node above both leaf positions ``first`` <= ``last``; ``above``: of any such."""
        low, high = above, self.lengths[first.clamp_max(self.num_items - 1)].long()
        for _ in range(max(self.depth, 1).bit_length()):
            middle = (low + high + 1) // 2
            node = self.ancestor(first, middle)
            both = (self.leaf_begin[node] <= first) & (self.leaf_end[node] > last)
            low, high = torch.where(both, middle, low), torch.where(both, high, middle - 1)
        return low

    def __repr__(self) -> str:
        sizes = f"items={self.num_items}, nodes={self.num_nodes}, depth={self.depth}"
        return f"CatalogueTrie({sizes}, device={self.device})"

    def walk(self, tokens: Sequence[int]) -> int:
        """Node reached from the root by ``tokens``; ValueError where no item begins so. Slow: it asks the device."""
        node = 0
        for token in tokens:
            begin, end = int(self.children[node]), int(self.children[node + 1])
            at = begin + int(torch.searchsorted(self.tokens[begin:end], int(token)))
            if at >= end or int(self.tokens[at]) != int(token):
                raise ValueError(f"tokens: expected the beginning of an item, got {[int(t) for t in tokens]}")
            node = at
        return node

    def allowed_tokens(self, prefix: Sequence[int]) -> list[int]:
        """Tokens that may follow ``prefix``, ascending; none after an item, ValueError for an impossible prefix."""
        node = self.walk(prefix)
        return self.tokens[int(self.children[node]) : int(self.children[node + 1])].tolist()

    def item_at(self, node: int) -> int:
        """Item index of a leaf node, -1 for an internal one."""
        if int(self.children[node]) < int(self.children[node + 1]):
            return -1
        return int(self.items[int(self.leaf_begin[node])])

    def to(self, device: torch.device | str) -> CatalogueTrie:
        """The trie on ``device``; itself when it is there already."""
        device = torch.device(device)
        if device == self.device or (device.index is None and device.type == self.device.type):
            return self
        moved = object.__new__(CatalogueTrie)
        moved.__dict__.update(self.__dict__)
        moved._forget_tensors()
        for name in _ARRAYS:
            setattr(moved, name, getattr(self, name).to(device))
        return moved

    def save(self, path: str | Path) -> None:
        """Write the arrays to a safetensors file; the file appears complete or not at all."""
        arrays = self.arrays()
        with atomic_file(path) as temporary:
            save_file(arrays, temporary, metadata={"format": _FORMAT, "sha256": array_digest(arrays)})

    def arrays(self) -> dict[str, torch.Tensor]:
        """All that it consists of, on the CPU, by name."""
        arrays = {name: getattr(self, name).contiguous().cpu() for name in _ARRAYS}
        return {**arrays, "level_start": torch.tensor(self.level_start, dtype=torch.int64)}

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> CatalogueTrie:
        """Read what ``save`` wrote; ValueError naming the file where it is something else or damaged."""
        check_regular(path, "a catalogue trie")
        with naming(path, "a catalogue trie"):
            with safe_open(str(path), framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != _FORMAT:
                    raise ValueError(f"{path}: expected format {_FORMAT!r}, got {metadata.get('format')!r:.80}")
                arrays = {name: file.get_tensor(name) for name in (*_ARRAYS, "level_start")}
            if metadata.get("sha256") not in (None, array_digest(arrays)):  # None in older files
                raise ValueError(f"{path}: expected the arrays that were saved, got others (the digest differs)")
            return cls.from_arrays(path, arrays).to(device)

    @classmethod
    def from_arrays(cls, path: str | Path, arrays: dict[str, torch.Tensor]) -> CatalogueTrie:
        """A trie of :meth:`arrays` read from ``path``; ValueError where sizes and values do not fit each other."""
        level_start = arrays.pop("level_start").tolist()
        nodes, items = len(arrays["tokens"]), len(arrays["items"])
        sizes = {"children": nodes + 1, "leaf_begin": nodes, "leaf_end": nodes, "lengths": items}
        wrong = [name for name, size in sizes.items() if len(arrays[name]) != size]
        children = arrays["children"]
        whole = not wrong and len(level_start) > 2 and level_start[:2] == [0, 1] and level_start[-1] == nodes
        whole = whole and children[0] == 1 and children[-1] == nodes and bool((children[1:] >= children[:-1]).all())
        whole = whole and bool((arrays["items"].sort().values == torch.arange(items)).all())
        whole = whole and int(arrays["leaf_begin"].min()) >= 0 and int(arrays["leaf_end"].max()) <= items
        if not whole:
            raise ValueError(f"{path}: expected a whole trie, got damaged {', '.join(wrong) or 'levels or children'}")
        return cls(**arrays, level_start=level_start)
