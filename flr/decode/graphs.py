"""Beam search as CUDA graphs: a level of the trie is one graph, so that a step costs the host one launch.

A search of fixed shapes: users are padded to a power of two, prompts on the left to a multiple of 64, every level keeps
all W hypotheses, and under ``catalogue`` every level reads as many tokens as the longest way between two branchings of
the trie. (Filters can make longer ways: the device notices, and the search is done again without graphs.) The inputs of
a call (prompt cache, states, filter) are copied into tensors that the graphs know. Levels are replayed in order until a
level that is known to be done, without waiting for it, left nothing alive.

Graphs belong to (model, trie, shapes). The first call with new shapes runs as usual; the second, too, is captured and
compared with its replay; from the third on graphs answer. What cannot be captured is logged once and runs as usual.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import nn

from .packed import PackedSession
from .prompts import Prompts
from .search import BeamResult, Search, State
from .watch import Watch

logger = logging.getLogger(__name__)

_KEPT = 8  # shapes whose graphs are kept for a model; each holds a prompt cache
_PROMPT_STEP = 64
_OVERFLOWS = 3  # calls done twice because a filter made longer ways than the trie has, before graphs are given up
_LIMIT = 0.25  # of the device's free memory that the copy of a prompt cache may take


#: A level's graph, ``Search.numbers``, and the fields of ``State`` of the same names.
_Level: TypeAlias = "tuple[torch.cuda.CUDAGraph | None, torch.Tensor, BeamResult, torch.Tensor, torch.Tensor]"


def graphs_allowed() -> bool:
    """Whether the environment lets graphs be used, those of decoding and of training."""
    return os.environ.get("FLR_CUDA_GRAPHS", "1") != "0"


@contextlib.contextmanager
def capturing(graph: torch.cuda.CUDAGraph, **options: Any) -> Iterator[None]:
    """``torch.cuda.graph``; a capture that fails leaves the random numbers of the device as they were.

    Without this its generator would refuse every later draw, since it takes the capture for one that goes on.
    """
    generator = torch.cuda.default_generators[torch.cuda.current_device()]
    before = generator.clone_state()
    try:
        with torch.cuda.graph(graph, **options):
            yield
    except BaseException:
        generator.graphsafe_set_state(before)
        raise


def _padded_users(count: int) -> int:
    return 1 << (count - 1).bit_length()


class Replayed:
    """A search of fixed shapes over tensors of its own: operation by operation, or by graphs once it was captured."""

    def __init__(self, search: Search, prompts: Prompts) -> None:
        session = prompts.session
        assert isinstance(session, PackedSession)
        users, device = _padded_users(len(prompts.states)), prompts.states.device
        length = -(-session.length // _PROMPT_STEP) * _PROMPT_STEP
        self.search = copy.copy(search)
        self.search.logits = copy.copy(search.logits)
        self.search.allows = search.allows.padded(users).copied()
        self.tokens = self._tokens()
        room = length + sum(w * n for w, n in zip(self._widths(), self.tokens, strict=True))
        self.session = session.empty_like(users, length, room)
        self.states = prompts.states.new_zeros(users, prompts.states.shape[1])
        self.live = torch.zeros(users, 1, dtype=torch.bool, device=device)
        self.levels: list[_Level] = []
        self.load(search, prompts)

    def _tokens(self) -> list[int]:
        """How many tokens a hypothesis may read before each level."""
        trie, depth = self.search.trie, self.search.trie.depth
        return trie.longest_forced_runs() if self.search.skips_forced else [int(step > 0) for step in range(depth)]

    def _widths(self) -> list[int]:
        return [1, *(self.search.widths(step)[0] for step in range(self.search.trie.depth - 1))]

    def load(self, search: Search, prompts: Prompts) -> None:
        """Take over the inputs of a call."""
        count = len(prompts.states)
        self.states[:count].copy_(prompts.states)
        self.live.zero_()[:count] = True
        assert isinstance(prompts.session, PackedSession)
        self.session.model, self.search.head_rows = prompts.session.model, search.head_rows
        self.session.copy_from(prompts.session)
        self.search.allows.load(search.allows.padded(len(self.live)))
        if self.search.logits is not None and search.logits is not None:
            self.search.logits.weight.copy_(search.logits.weight)  # which may have been trained meanwhile
            self.search.logits.head_rows = search.logits.head_rows

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
            plan = search.plan(state) if search.skips_forced else None
            search.forward(state, session, step, plan, tokens * state.running.node.shape[1])
            more = search.level(state, step) and step + 1 < len(self.tokens)
            yield state, more
            if not more:
                return

    def capture(self) -> None:
        """After a run, which compiled the kernels and chose the algorithms of products."""
        pool, steps, more = torch.cuda.graph_pool_handle(), self.steps(), True
        levels: list[_Level] = []
        while more:
            graph = torch.cuda.CUDAGraph()
            with capturing(graph, pool=pool, capture_error_mode="thread_local"):
                state, more = next(steps)
                outcome = self._outcome(state)
            levels.append((graph, *outcome))
            outcome[1].items.fill_(-7)  # so that a replay that does nothing is noticed
        self.levels = levels

    def _one_by_one(self) -> Iterator[_Level]:
        return ((None, *self._outcome(state)) for state, _ in self.steps())

    def _outcome(self, state: State) -> tuple[torch.Tensor, BeamResult, torch.Tensor, torch.Tensor]:
        return self.search.numbers(state, None), state.best, state.broken, state.overflow

    def run(self, count: int) -> BeamResult | None:
        """Items of the first ``count`` users; None where a level had more to read than it has room for.

        Raises:
            FloatingPointError: as ``beam_search``.
        """
        watch = Watch()
        outcome: list[Any] = []
        for graph, *outcome in self.levels or self._one_by_one():
            if graph is not None:
                graph.replay()
            known = watch.ask(outcome[0])
            # before a capture every level runs, so that none compiles a kernel while it is captured
            if graph is not None and known is not None and known[0] == 0:
                break
        _, best, broken, overflow = outcome
        failed = torch.stack([broken[:count].any(), overflow[:count].any()]).tolist()
        if failed[1]:
            return None
        if failed[0]:
            raise FloatingPointError("the model's logits are NaN or infinite: no ranking can be made of them")
        return type(best)(*(x[:count].clone() for x in best))


@dataclass
class _Entry:
    """What is known of some shapes: how often they came, and their graphs."""

    calls: int = 0
    overflows: int = 0
    replayed: Replayed | None = None
    refused: bool = False
    lock: Any = field(default_factory=threading.Lock)


_entries: weakref.WeakKeyDictionary[nn.Module, OrderedDict[tuple, _Entry]] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def _entry(model: nn.Module, search: Search, prompts: Prompts) -> _Entry:
    weights = hash(tuple(x.data_ptr() for x in model.parameters()))
    session = prompts.session
    assert isinstance(session, PackedSession)
    users = _padded_users(len(prompts.states))
    shapes = tuple((type(x).__name__, tuple(x.shape)) for x in search.allows.padded(users).tensors())
    key = (
        weights, prompts.states.device, prompts.states.dtype, id(search.trie), users,
        -(-session.length // _PROMPT_STEP), search.num_beams, search.k, search.scoring, search.length_penalty,
        type(search.allows), shapes, session.config._attn_implementation,
    )  # fmt: skip
    with _lock:
        known = _entries.setdefault(model, OrderedDict())
        entry = known.setdefault(key, _Entry())
        known.move_to_end(key)
        while len(known) > _KEPT:
            known.popitem(last=False)
        return entry


def _fits(prompts: Prompts) -> bool:
    session = prompts.session
    assert isinstance(session, PackedSession)
    size = sum(x.nbytes for layer in session.layers for x in (layer.key_buffer, layer.value_buffer))
    return 2 * size < _LIMIT * torch.cuda.mem_get_info(prompts.states.device)[0]


def _usable(search: Search, prompts: Prompts) -> bool:
    if not (prompts.states.is_cuda and search.kernel and isinstance(prompts.session, PackedSession)):
        return False
    return graphs_allowed() and not torch.cuda.is_current_stream_capturing()


def run(model: nn.Module, search: Search, prompts: Prompts) -> BeamResult | None:
    """The search by graphs, or None where they do not serve.

    That is on other devices, with an expanded cache, for shapes seen for the first time, while another thread uses the
    graphs, and with FLR_CUDA_GRAPHS=0.
    """
    if not _usable(search, prompts):
        return None
    entry = _entry(model, search, prompts)
    if entry.refused or not entry.lock.acquire(blocking=False):
        return None
    try:
        entry.calls += 1
        count = len(prompts.states)
        if entry.replayed is not None:
            entry.replayed.load(search, prompts)
            result = entry.replayed.run(count)
            entry.overflows += result is None
            entry.refused = entry.overflows > _OVERFLOWS
            return result
        if entry.calls < 2 or not _fits(prompts):
            return None
        replayed = Replayed(search, prompts)
        plain = replayed.run(count)
        with torch.cuda.device(prompts.states.device) if prompts.states.is_cuda else contextlib.nullcontext():
            replayed.capture()
        result = replayed.run(count)
        if not _equal(result, plain):
            raise RuntimeError("their result differs from that of the same operations one by one")
        entry.replayed = replayed
        return result
    except FloatingPointError:
        raise
    except Exception as error:
        entry.refused = True
        logger.warning("decoding without CUDA graphs for these shapes: %s", error)
        return None
    finally:
        if entry.replayed is not None:
            entry.replayed.forget_model()
        entry.lock.release()


def _equal(a: BeamResult | None, b: BeamResult | None) -> bool:
    if a is None or b is None:
        return a is b
    return torch.equal(a.items, b.items) and torch.allclose(a.scores, b.scores, rtol=1e-3, atol=1e-3)
