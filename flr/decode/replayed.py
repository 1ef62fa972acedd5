"""A search of fixed shapes, level by level, as CUDA graphs or operation by operation; see ``graphs``."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple, TypeAlias

import torch
from torch import nn
from transformers.cache_utils import Cache

from flr_kernels import Continuations

from .capture import capturing, cause
from .kernel_search import KernelSearch
from .packed import PackedSession
from .prompts import Prompts
from .rest import Rests, read_rest
from .search import BeamResult, State
from .watch import Watch

logger = logging.getLogger(__name__)

PROMPT_STEP = 64
_AHEAD = 1  # levels that the device has to do while the host looks how an earlier one ended
_SHORT = 8  # levels that cost as much as a forward without graphs


class _Ended(NamedTuple):
    """A level's end: what another way on needs, numbers, and the result so far."""

    running: Continuations
    sees: torch.Tensor  # of the session
    depth: torch.Tensor
    columns: int
    numbers: torch.Tensor  # int64 [3], the most of ``left`` of ``flr_kernels.trie_collect`` of any user
    best: BeamResult  # fields of ``State``
    broken: torch.Tensor
    overflow: torch.Tensor


_Level: TypeAlias = "tuple[torch.cuda.CUDAGraph | None, _Ended]"


def padded_users(count: int) -> int:
    """Rows of a search of fixed shapes for ``count`` users."""
    return 1 << (count - 1).bit_length()


def padded_length(length: int) -> int:
    """Columns of such a search for prompts of ``length`` tokens."""
    return -(-length // PROMPT_STEP) * PROMPT_STEP


class Replayed:
    """A search of fixed shapes over tensors of its own: operation by operation, or by graphs once it was captured."""

    def __init__(self, search: KernelSearch, prompts: Prompts) -> None:
        session = prompts.session
        assert isinstance(session, PackedSession)
        users, device = padded_users(len(prompts.states)), prompts.states.device
        length = padded_length(session.length)
        self.search = copy.copy(search)
        self.search.logits = copy.copy(search.logits)
        self.search.allows = search.allows.padded(users).copied()
        self.tokens = self._tokens()
        room = length + sum(w * n for w, n in zip(self._widths(), self.tokens, strict=True))
        self.session = session.empty_like(users, length, room)
        self.vocabulary = prompts.vocabulary
        self.states = prompts.states.new_zeros(users, prompts.states.shape[1])
        self.live = torch.zeros(users, 1, dtype=torch.bool, device=device)
        self.levels: list[_Level] = []
        self.rests = Rests()
        self.columns = room
        self.load(search, prompts)

    def _tokens(self) -> list[int]:
        """How many tokens a hypothesis may read before each level."""
        trie, depth = self.search.trie, self.search.trie.depth
        return trie.longest_forced_runs() if self.search.skips_forced else [int(step > 0) for step in range(depth)]

    def _widths(self) -> list[int]:
        return [1, *(self.search.widths(step)[0] for step in range(self.search.trie.depth - 1))]

    def load(self, search: KernelSearch, prompts: Prompts) -> None:
        """Take over the inputs of a call."""
        count = len(prompts.states)
        self.states[:count].copy_(prompts.states)
        assert isinstance(prompts.session, PackedSession)
        self.load_search(search, prompts.session.model, count)
        self.session.copy_from(prompts.session)

    def load_search(self, search: KernelSearch, model: nn.Module, count: int) -> None:
        """Take over all but the prompts."""
        self.live.zero_()[:count] = True
        self.session.model, self.search.head_rows = model, search.head_rows
        self.search.allows.load(search.allows.padded(len(self.live)))
        if self.search.logits is not None and search.logits is not None:
            self.search.logits.weight.copy_(search.logits.weight)  # which may have been trained meanwhile
            self.search.logits.head_rows = search.logits.head_rows

    def take_prompts(self, states: torch.Tensor, cache: Cache, inputs: Mapping[str, torch.Tensor]) -> None:
        """Take over prompts of this shape."""
        self.states.copy_(states)
        self.session.take(cache, inputs)

    def forget_model(self) -> None:
        """Until the next ``load``, so that what is kept for a model does not keep the model."""
        self.search.head_rows = None
        vars(self.session).pop("model", None)
        if self.search.logits is not None:
            vars(self.search.logits).pop("head_rows", None)

    def steps(self) -> Iterator[tuple[State, bool]]:
        """The search, level by level, and whether there is another; nothing waits for the device."""
        search, session = self.search, self.session
        session.reset()
        state = search.begin(self.states)
        state.running = state.running._replace(score=state.running.score.masked_fill(~self.live, -torch.inf))
        for step, tokens in enumerate(self.tokens):
            if step or search.skips_forced:
                search.advance(state, session, step, tokens * state.running.node.shape[1])
            more = search.level(state, step) and step + 1 < len(self.tokens)
            yield state, more
            if not more:
                return

    def capture(self) -> None:
        """After a run, which compiled the kernels and chose the algorithms of products."""
        self.pool, steps, more = torch.cuda.graph_pool_handle(), self.steps(), True
        levels: list[_Level] = []
        while more:
            graph = torch.cuda.CUDAGraph()
            with capturing(graph, pool=self.pool, capture_error_mode="thread_local"):
                state, more = next(steps)
                ended = self.ended(state)
            levels.append((graph, ended))
            ended.best.items.fill_(-7)  # so that a replay that does nothing is noticed
        self.levels = levels

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        """A graph of ``function``, in the memory of the levels' graphs; what is returned replays it."""
        graph = torch.cuda.CUDAGraph()
        with capturing(graph, pool=self.pool, capture_error_mode="thread_local"):
            function()
        return graph.replay

    def _one_by_one(self) -> Iterator[_Level]:
        return ((None, self.ended(state)) for state, _ in self.steps())

    def ended(self, state: State) -> _Ended:
        """What is kept of a level."""
        assert state.left is not None
        session, numbers = self.session, state.left.amax(0)
        columns = session.layers[0].get_seq_length()
        kept = (session.sees, session.depth, columns, numbers, state.best, state.broken, state.overflow)
        return _Ended(state.running, *kept)

    def _state(self, level: _Ended) -> State:
        """The search at a level's end, its session included."""
        session = self.session
        session.sees, session.depth = level.sees, level.depth
        for layer in session.layers:
            layer.truncate(level.columns)
        return State(level.running, level.depth, self.states[:, None], level.best, level.broken, level.overflow)

    def finish(self, level: _Ended, depth: int) -> State:
        """The rest of a search under ``full`` without graphs, from the end of a level with ``depth`` tokens on."""
        return self.search.finish(self._state(level), self.session, depth, self.vocabulary)

    def _rest(self, level: _Ended, depth: int, longest: int, tokens: int) -> State:
        """The rest where every live hypothesis leads to one item; by a graph if one of its size was made."""
        key = Rests.key(depth, longest, tokens, self.columns - level.columns)
        if (found := self.rests.replay(key)) is not None:
            return found
        state = self.finish(level, depth)
        if self.rests.wanted(key, len(self.live), self.vocabulary):
            try:
                made = self.rests.make(
                    key, lambda: read_rest(self.search, self._state(level), self.session, key), self.record
                )
                if made is None or bool(made.overflow.any()) or not equal(made.best, state.best):
                    raise RuntimeError("what it gives differs from that of the same operations one by one")
            except Exception as error:
                self.rests.refuse(key)
                logger.warning("ends of items without CUDA graphs for these shapes: %s", cause(error))
        return state

    def run(self, count: int) -> BeamResult | None:
        """Items of the first ``count`` users; None where a level had more to read than it has room for.

        Raises:
            FloatingPointError: as ``beam_search``.
        """
        watch, end = Watch(), None  # type: tuple[Watch, _Ended | State | None]
        for depth, (graph, ended) in enumerate(self.levels or self._one_by_one(), start=1):
            end = ended
            if graph is None:  # before a capture every level runs, so that none compiles a kernel while it is captured
                continue
            graph.replay()
            known = watch.ask(ended.numbers, _AHEAD)
            if known is not None and known[0] == 0:
                break
            if known is not None and depth + _SHORT <= known[1] <= self.search.trie.depth:
                end = self._rest(ended, depth, known[1], known[2])
                break
        assert end is not None
        failed = torch.stack([end.broken[:count].any(), end.overflow[:count].any()]).tolist()
        if failed[1]:
            return None
        if failed[0]:
            raise FloatingPointError("the model's logits are NaN or infinite: no ranking can be made of them")
        return BeamResult(*(x[:count].clone() for x in end.best))


def equal(a: BeamResult | None, b: BeamResult | None) -> bool:
    """Whether two ways to the same items agree."""
    if a is None or b is None:
        return a is b
    return torch.equal(a.items, b.items) and torch.allclose(a.scores, b.scores, rtol=1e-3, atol=1e-3)
