"""Finding items by what one types: substrings of titles and ids, the best places first."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from flr.data import Catalogue

_ENOUGH = 2000  # hits that are ranked; a query that has more is too short to rank well anyway
_ROWS = 1 << 16  # that are joined at a time
_LOOKED_AT = 20_000  # rows that hold the longest word
_WINDOW = 1 << 20  # characters that are scanned at a time


class Hits(NamedTuple):
    """Catalogue indices, best first; ``complete`` is False where there were more than could be looked at."""

    indices: list[int]
    complete: bool


class ItemSearch:
    """Substring search over a catalogue: every word must occur, ignoring case, in the title or in the id.

    Titles stand in one text, so that a search is a few scans in C: a million titles take some tens of milliseconds.
    Safe from several threads.

    >>> search = ItemSearch(Catalogue(["a1", "b2", "c3"], ["Blue Train", "Kind of Blue", "Round Trip"]))
    >>> search("blue").indices, search("bl ki").indices, search("C3").indices, search("").indices
    ([0, 1], [1], [2], [0, 1, 2])
    """

    def __init__(self, catalogue: Catalogue) -> None:
        self.size = len(catalogue)
        parts: list[str] = []
        self._starts = np.zeros(self.size + 1, np.int64)
        for first in range(0, self.size, _ROWS):
            part = slice(first, first + _ROWS)
            rows = [
                f"{' '.join(title.casefold().split())}\t{' '.join(item_id.casefold().split())}\n"
                for title, item_id in zip(catalogue.titles[part], catalogue.item_ids[part], strict=True)
            ]
            parts.append("".join(rows))
            self._starts[first + 1 : first + 1 + len(rows)] = [len(row) for row in rows]
        self._text = "".join(parts)
        np.cumsum(self._starts, out=self._starts)

    def __call__(self, query: str) -> Hits:
        """Items for what was typed. An empty query gives the first ones of the catalogue."""
        words = query.casefold().split()
        if not words:
            return Hits(list(range(min(self.size, _ENOUGH))), self.size <= _ENOUGH)
        rarest = max(words, key=len)
        ranked: list[tuple[tuple[bool, bool, int], int]] = []
        place, looked_at = self._find(rarest, 0), 0
        while place >= 0 and len(ranked) < _ENOUGH and looked_at < _LOOKED_AT:
            looked_at += 1
            index = int(np.searchsorted(self._starts, place, side="right")) - 1
            row = self._text[self._starts[index] : self._starts[index + 1] - 1]
            if all(word in row for word in words):
                starts = all(f" {word}" in f" {row}" or f"\t{word}" in row for word in words)
                ranked.append(((not row.startswith(" ".join(words)), not starts, len(row)), index))
            place = self._find(rarest, int(self._starts[index + 1]))
        return Hits([index for _, index in sorted(ranked)], place < 0)

    def _find(self, word: str, first: int) -> int:
        """Where the word stands next, or -1. Other threads run between two windows, and not during a scan in C."""
        for begin in range(first, len(self._text), _WINDOW):
            if (place := self._text.find(word, begin, begin + _WINDOW + len(word) - 1)) >= 0:
                return place
        return -1
