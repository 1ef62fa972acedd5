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
import logging
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from flr.model.backbone import causal_lm
from flr.model.head import HeadRows

from .capture import cause, graphs_allowed
from .kernel_search import KernelSearch
from .packed import PackedSession
from .prompt_graph import PromptGraph, prompts_to_capture
from .prompts import Prompts
from .replayed import Replayed, equal, padded_length, padded_users
from .search import BeamResult, Search

logger = logging.getLogger(__name__)

_KEPT = 8  # shapes whose graphs are kept for a model; each holds a prompt cache
_OVERFLOWS = 3  # calls done twice because a filter made longer ways than the trie has, before graphs are given up
_LIMIT = 0.25  # of the device's free memory that the copy of a prompt cache may take


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
    users, device = padded_users(users), search.trie.device
    shapes = tuple((type(x).__name__, tuple(x.shape)) for x in search.allows.padded(users).tensors())
    autocast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
    config = causal_lm(model).config.get_text_config(decoder=True)
    key = (
        weights, device, autocast, id(search.trie), users, padded_length(length), search.num_beams, search.k,
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
    if not (prompts.states.is_cuda and isinstance(prompts.session, PackedSession)):
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
    if not isinstance(search, KernelSearch) or not _usable(search, prompts):
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
        if not equal(result, plain):
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
        if not equal(replayed.run(len(expected.items)), expected):
            raise RuntimeError("what follows differs from what follows the same operations one by one")
        entry.prompts = made
    except Exception as error:
        entry.prompts_refused = True
        logger.warning("prefills without CUDA graphs for these shapes: %s", cause(error))


def answer(
    model: nn.Module, inputs: Mapping[str, Any], search_with: Callable[[HeadRows | None], KernelSearch]
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
