"""The ends of long items as one CUDA graph, once every live hypothesis of a search leads to a single item.

What is left is a forward over all their tokens, which is scored token by token (see ``runs``). How many tokens there
are differs from call to call; graphs are made for few sizes, each the second time that it is needed, and compared.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .runs import Run
from .search import Search, State
from .session import Session

_KEPT = 16  # sizes
_SIZE_STEP, _COLUMN_STEP = 8, 32
_MAX_LOGITS = 1 << 26  # as for runs; larger ones are read without a graph, in several forwards


class Rests:
    """Graphs by depth, tokens that follow at most, and columns."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, int, int], tuple[Callable[[], None], list[State]]] = {}
        self._seen: set[tuple[int, int, int]] = set()
        self.refused = False

    @staticmethod
    def key(depth: int, longest: int, tokens: int, room: int) -> tuple[int, int, int]:
        """A size for items of at most ``longest`` tokens, of ``depth`` known ones, ``tokens`` of a user to read.

        ``room``: of columns.
        """
        size, columns = longest - depth, min(tokens + -tokens % _COLUMN_STEP, room)
        return depth, size + -size % _SIZE_STEP, columns

    def replay(self, key: tuple[int, int, int]) -> State | None:
        """How the search ends, by a graph of this size; None where there is none."""
        if key not in self._known:
            return None
        replay, found = self._known[key]
        replay()
        return found[-1]

    def wanted(self, key: tuple[int, int, int], users: int, vocabulary: int) -> bool:
        """Whether a graph of this size is to be made now."""
        if self.refused or users * key[2] * vocabulary > _MAX_LOGITS or len(self._known) >= _KEPT:
            return False
        again = key in self._seen
        self._seen.add(key)
        return again

    def make(
        self, key: tuple[int, int, int], rest: Callable[[], State], record: Callable[[Callable[[], None]], Any]
    ) -> State | None:
        """Capture ``rest`` as the graph of a size, and replay it. Raises what the capture raises."""
        rest()  # compile
        found: list[State] = []
        self._known[key] = record(lambda: found.append(rest())), found
        found[-1].best.items.fill_(-7)  # so that a replay that does nothing is noticed
        return self.replay(key)

    def refuse(self, key: tuple[int, int, int]) -> None:
        """Make no more, and forget this one."""
        self._known.pop(key, None)
        self.refused = True


def read_rest(search: Search, state: State, session: Session, key: tuple[int, int, int]) -> State:
    """The end of a search under ``full`` all of whose live hypotheses lead to a single item; nothing waits."""
    depth, size, columns = key
    trie, running = search.trie, state.running
    first = trie.leaf_begin[running.node].long().clamp_max(trie.num_items - 1)
    live = running.score != -torch.inf
    run = Run(size, first, trie.lengths[first].long(), live)
    search.read(state, session, depth, run, columns)
    state.overflow = state.overflow | _more(run, depth, columns)
    return state


def _more(run: Run, depth: int, columns: int) -> Tensor:
    """bool [B], who has more to read than there is room for."""
    tokens = (run.ends - depth) * run.live
    return (tokens.sum(1) > columns) | (tokens > run.size).any(1)
