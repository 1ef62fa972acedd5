"""Beam search as CUDA graphs: a level of the trie is one graph, so that a step costs the host one launch.

A search of fixed shapes: users are padded to a power of two, prompts on the left to a multiple of 64, every level keeps
all W hypotheses, and under ``catalogue`` every level reads as many tokens as the longest way between two branchings of
the trie. (Filters can make longer ways: the device notices, and the search is done again without graphs.) The inputs of
a call (prompt cache, states, filter) are copied into tensors that the graphs know. Levels are replayed in order until a
level that is known to be done, without waiting for it, left nothing alive.

Under ``full`` a hypothesis that leads to a single item has one continuation at every level. Once that holds for all and
items end far below, the rest is read in one forward, without graphs (see ``runs``).

Graphs belong to (model, trie, shapes). The first call with new shapes runs as usual; the second, too, is captured and
compared with its replay; from the third on graphs answer. The third captures the prefill as well (``prompt_graph``) and
compares again. What cannot be captured is logged once and runs as usual.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import nn
from transformers.cache_utils import Cache

from flr.model.backbone import causal_lm
from flr.model.head import HeadRows
from flr_kernels import Continuations

from .packed import PackedSession
from .prompt_graph import PromptGraph, prompts_to_capture
from .prompts import Prompts
from .rest import Rests, read_rest
from .search import BeamResult, Search, State
from .watch import Watch

logger = logging.getLogger(__name__)

_KEPT = 8  # shapes whose graphs are kept for a model; each holds a prompt cache
_PROMPT_STEP = 64
_OVERFLOWS = 3  # calls done twice because a filter made longer ways than the trie has, before graphs are given up
_LIMIT = 0.25  # of the device's free memory that the copy of a prompt cache may take
_AHEAD = 1  # levels that the device has to do while the host looks how an earlier one ended
_SHORT = 8  # levels that cost as much as a forward without graphs


class _Ended(NamedTuple):
    """A level's end: what another way on needs, numbers, and the result so far."""

    running: Continuations
    sees: torch.Tensor  # of the session
    depth: torch.Tensor
    columns: int
    numbers: torch.Tensor  # int64 [5], ``Search.numbers`` and ``Search.left`` (0 under ``catalogue``)
    best: BeamResult  # fields of ``State``
    broken: torch.Tensor
    overflow: torch.Tensor


_Level: TypeAlias = "tuple[torch.cuda.CUDAGraph | None, _Ended]"


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


def cause(error: BaseException) -> str:
    """A line that says what was raised and, since the end of a failed capture raises again, what was raised first."""
    first = error
    while (before := first.__cause__ or first.__context__) is not None:
        first = before
    said = [(str(x).splitlines() or [""])[0] or type(x).__name__ for x in (error, first)]
    return said[0] if first is error or said[0] == said[1] else f"{said[0]} (after {type(first).__name__}: {said[1]})"


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

    def load(self, search: Search, prompts: Prompts) -> None:
        """Take over the inputs of a call."""
        count = len(prompts.states)
        self.states[:count].copy_(prompts.states)
        assert isinstance(prompts.session, PackedSession)
        self.load_search(search, prompts.session.model, count)
        self.session.copy_from(prompts.session)

    def load_search(self, search: Search, model: nn.Module, count: int) -> None:
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
            plan = search.plan(state) if search.skips_forced else None
            search.forward(state, session, step, plan, tokens * state.running.node.shape[1])
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
                ended = self.ended(state, len(levels) + 1)
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
        return ((None, self.ended(state, depth)) for depth, (state, _) in enumerate(self.steps(), start=1))

    def ended(self, state: State, depth: int) -> _Ended:
        """What is kept of a level, whose hypotheses have ``depth`` tokens."""
        search, session = self.search, self.session
        left = state.depth.new_zeros(2) if search.skips_forced else search.left(state, depth)
        numbers = torch.cat([search.numbers(state, None), left])
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
                if made is None or bool(made.overflow.any()) or not _equal(made.best, state.best):
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
            if known is not None and depth + _SHORT <= known[3] <= self.search.trie.depth:
                end = self._rest(ended, depth, known[3], known[4])
                break
        assert end is not None
        failed = torch.stack([end.broken[:count].any(), end.overflow[:count].any()]).tolist()
        if failed[1]:
            return None
        if failed[0]:
            raise FloatingPointError("the model's logits are NaN or infinite: no ranking can be made of them")
        return BeamResult(*(x[:count].clone() for x in end.best))


@dataclass
class _Entry:
    """What is known of some shapes: how often they came, and their graphs."""

    calls: int = 0
    overflows: int = 0
    replayed: Replayed | None = None
    prompts: PromptGraph | None = None
    refused: bool = False
    prompts_refused: bool = False
    lock: Any = field(default_factory=threading.Lock)


_entries: weakref.WeakKeyDictionary[nn.Module, OrderedDict[tuple, _Entry]] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def _entry(model: nn.Module, search: Search, users: int, length: int) -> _Entry:
    """What is known of ``users`` prompts of ``length`` tokens."""
    weights = hash(tuple(x.data_ptr() for x in model.parameters()))
    users, device = _padded_users(users), search.trie.device
    shapes = tuple((type(x).__name__, tuple(x.shape)) for x in search.allows.padded(users).tensors())
    autocast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
    config = causal_lm(model).config.get_text_config(decoder=True)
    key = (
        weights, device, autocast, id(search.trie), users, -(-length // _PROMPT_STEP), search.num_beams, search.k,
        search.scoring, search.length_penalty, type(search.allows), shapes, config._attn_implementation,
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


def run(
    model: nn.Module, search: Search, prompts: Prompts, inputs: Mapping[str, Any] | None = None
) -> BeamResult | None:
    """The search by graphs, or None where they do not serve.

    That is on other devices, with an expanded cache, for shapes seen for the first time, while another thread uses the
    graphs, and with FLR_CUDA_GRAPHS=0.

    Args:
        inputs: what ``prompts`` were made from, so that the next call can be answered from there; None for others.
    """
    if not _usable(search, prompts):
        return None
    assert isinstance(prompts.session, PackedSession)
    count = len(prompts.states)
    entry = _entry(model, search, count, prompts.session.length)
    if entry.refused or not entry.lock.acquire(blocking=False):
        return None
    try:
        entry.calls += 1
        if entry.replayed is not None:
            entry.replayed.load(search, prompts)
            result = _answered(entry, count)
            if inputs is not None and result is not None and entry.prompts is None and not entry.prompts_refused:
                _capture_prompts(entry, model, inputs, result)
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
        logger.warning("decoding without CUDA graphs for these shapes: %s", cause(error))
        return None
    finally:
        _leave(entry)


def _answered(entry: _Entry, count: int) -> BeamResult | None:
    assert entry.replayed is not None
    result = entry.replayed.run(count)
    entry.overflows += result is None
    entry.refused = entry.overflows > _OVERFLOWS
    return result


def _leave(entry: _Entry) -> None:
    if entry.replayed is not None:
        entry.replayed.forget_model()
    entry.lock.release()


def _capture_prompts(entry: _Entry, model: nn.Module, inputs: Mapping[str, Any], expected: BeamResult) -> None:
    """Make the prefill of these prompts a graph; what it leads to must be ``expected``."""
    prepared = prompts_to_capture(model, inputs)
    if prepared is None:
        return
    replayed = entry.replayed
    assert replayed is not None
    users, length = len(replayed.live), replayed.session.length
    made = PromptGraph(prepared, users, length, replayed.session.hidden, replayed.take_prompts)
    try:
        with torch.cuda.device(replayed.states.device) if replayed.states.is_cuda else contextlib.nullcontext():
            made.capture(model, replayed.record)
        replayed.states.zero_()  # so that a replay that does nothing is noticed
        made.run(model)
        if not _equal(replayed.run(len(expected.items)), expected):
            raise RuntimeError("what follows differs from what follows the same operations one by one")
        entry.prompts = made
    except Exception as error:
        entry.prompts_refused = True
        logger.warning("prefills without CUDA graphs for these shapes: %s", cause(error))


def answer(
    model: nn.Module, inputs: Mapping[str, Any], search_with: Callable[[HeadRows | None], Search]
) -> BeamResult | None:
    """The whole call by graphs, prefill included; None where these shapes have none.

    Args:
        model, inputs: as for ``beam_search``, the model in eval mode.
        search_with: the search, given how to make logits of hidden states.
    """
    if not _serves(model) or (prepared := prompts_to_capture(model, inputs)) is None:
        return None
    count, length = prepared["input_ids"].shape
    search = search_with(None)
    entry = _entry(model, search, count, length)
    if entry.prompts is None or entry.refused or not entry.lock.acquire(blocking=False):
        return None
    try:
        assert entry.replayed is not None
        if set(prepared) != set(entry.prompts.inputs):
            return None
        if entry.replayed.session.hidden:
            search = search_with(HeadRows(causal_lm(model)))
        entry.replayed.load_search(search, model, count)
        entry.prompts.load(prepared)
        entry.prompts.run(model)
        return _answered(entry, count)
    finally:
        _leave(entry)


def _serves(model: nn.Module) -> bool:
    """Whether graphs may answer calls of a model at all."""
    if model not in _entries or not next(model.parameters()).is_cuda:
        return False
    return graphs_allowed() and not torch.cuda.is_current_stream_capturing()


def _equal(a: BeamResult | None, b: BeamResult | None) -> bool:
    if a is None or b is None:
        return a is b
    return torch.equal(a.items, b.items) and torch.allclose(a.scores, b.scores, rtol=1e-3, atol=1e-3)
