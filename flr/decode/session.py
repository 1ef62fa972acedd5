"""A prompt encoded once, continued by many hypotheses at a time.

`start(model, inputs, reserve)` prefills (a patched model thinks inside this call) and returns the states after the prompt
and a session that continues from it. Two kinds, chosen by what the model can do:

`PackedSession`    The W hypotheses of a user are W tokens of one row. The prompt's keys and values exist once a user; the
                   hypotheses' own ones are appended behind them and never moved. Who sees what is a 4-D mask
                   [B, 1, W, L + columns], kept up to date from ancestor pointers. Needs sdpa or eager attention,
                   position_ids, and no sliding window shorter than prompt plus item.
`ExpandedSession`  The cache is expanded to B·W rows and reordered, as transformers does it. Works with every attention.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import logging
import threading
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, NamedTuple, Protocol, cast

import numpy as np
import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from .scoring import HeadRows

logger = logging.getLogger(__name__)

_NOT_MODEL_INPUTS = ("item_positions",)


class Session(Protocol):
    """The prompt of B users, continued by w hypotheses each (1 at the start: the prompt itself).

    States are logits [..., V] in the model's dtype or, where `start` was asked for them, hidden states [..., D].
    """

    def step(self, tokens: torch.Tensor, parents: torch.Tensor, lengths: torch.Tensor | None = None) -> torch.Tensor:
        """Append tokens to w hypotheses a user.

        Args:
            tokens: int64 [B, n] tokens of the first new hypothesis, then of the second, …; padded at the end.
            parents: int64 [B, w] which hypothesis of the previous step (column, 0 at the first) each continues.
            lengths: int64 [B, w] how many tokens each adds, at most n a user; None for one each (n = w).

        Returns:
            states [B, w, …] after the last token of each; undefined where the length is 0.
        """

    def tree(self, tokens: np.ndarray, parents: np.ndarray, depths: np.ndarray) -> torch.Tensor:
        """States [B, n, …] at n trie nodes behind the prompt, the same for all users; the session stays as it was.

        Args:
            tokens: int [n] last token of each node.
            parents: int [n] index of its parent among the n, -1 for the prompt; parents stand before children.
            depths: int [n] tokens from the prompt to the node, 1 for children of the root, ascending.
        """

    def select(self, users: torch.Tensor) -> None:
        """Go on with the users of these rows, int64 ascending, alone."""


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Every submodule in eval mode inside, its own mode restored afterwards (they may differ)."""
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        yield
    finally:
        for module in training:
            module.training = True


def causal_lm(model: nn.Module) -> Any:
    """The Hugging Face model inside DDP and PEFT wrappers."""
    wrapped: Any = model
    while True:
        if hasattr(wrapped, "get_base_model"):
            wrapped = wrapped.get_base_model()
        elif isinstance(wrapped, nn.parallel.DistributedDataParallel):
            wrapped = wrapped.module
        else:
            return wrapped


def _forward_parameters(model: nn.Module) -> frozenset[str]:
    """Arguments of the class's forward: an instance's own may hide them behind **kwargs."""
    return frozenset(inspect.signature(type(causal_lm(model)).forward).parameters)


@cache
def _log_once(message: str) -> None:
    logger.warning(message)


def num_prompts(inputs: Mapping[str, Any]) -> int:
    """B, from input_ids [B, L]."""
    if "input_ids" not in inputs:
        raise ValueError(f"inputs must hold input_ids, got {sorted(inputs)}")
    return len(inputs["input_ids"])


def prepare_inputs(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Inputs of the prefill on the model's device, with attention_mask and position_ids present.

    `item_positions` is dropped, `reasoner_mask` too where the model is not patched; every other key is passed on.

    Raises:
        ValueError: no input_ids, a shape that does not fit them, right padding, labels.
    """
    if "labels" in inputs:
        raise ValueError("inputs of decoding must not hold labels: give the prompt alone")
    num_prompts(inputs)
    lm = causal_lm(model)
    device = next(lm.parameters()).device
    dropped = set(_NOT_MODEL_INPUTS)
    if "reasoner_mask" not in inspect.signature(lm.forward).parameters:
        dropped.add("reasoner_mask")
    prepared = {
        key: value.to(device) if isinstance(value, torch.Tensor) else value
        for key, value in inputs.items()
        if key not in dropped
    }
    ids = prepared["input_ids"]
    if ids.ndim != 2 or ids.shape[1] == 0:
        raise ValueError(f"input_ids must be [B, L] with L >= 1, got {list(ids.shape)}")
    mask = prepared.get("attention_mask")
    if mask is None:
        mask = torch.ones_like(ids)
    if mask.shape != ids.shape:
        raise ValueError(f"attention_mask must be {list(ids.shape)} like input_ids, got {list(mask.shape)}")
    if not bool((mask[:, -1] != 0).all()):
        raise ValueError("prompts must be padded on the left: attention_mask is 0 in the last column")
    prepared["attention_mask"] = mask
    if prepared.get("position_ids") is None:
        prepared["position_ids"] = (mask.long().cumsum(1) - 1).clamp_min(0)
    elif prepared["position_ids"].shape != ids.shape:
        raise ValueError(
            f"position_ids must be {list(ids.shape)} like input_ids, got {list(prepared['position_ids'].shape)}"
        )
    return prepared


class Prompts(NamedTuple):
    """Prompts of B users after the prefill: states [B, …], the session that continues them, and how to make logits of
    hidden states (None where the states are logits)."""

    states: torch.Tensor
    session: Session
    rows: HeadRows | None
    vocabulary: int


def start(model: nn.Module, inputs: Mapping[str, Any], reserve: int, want_hidden: bool = False) -> Prompts:
    """Prefill.

    Args:
        model: any causal LM of transformers, patched or not, in eval mode.
        inputs: see `prepare_inputs`; input_ids [B, L], left-padded.
        reserve: how many tokens an item has at most.
        want_hidden: states shall be hidden states; where the lm_head does not allow it they are logits all the same.
    """
    prepared = prepare_inputs(model, inputs)
    parameters = _forward_parameters(model)
    if "position_ids" not in parameters:
        del prepared["position_ids"]
    extra = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}
    with _head_input(model, skip=False) as hidden:
        out = model(**prepared, use_cache=True, **extra)
    past, states, rows = out.past_key_values, out.logits[:, -1], None
    vocabulary = states.shape[-1]
    length = prepared["input_ids"].shape[1]
    if not isinstance(past, Cache):
        raise ValueError(f"the model must return a transformers Cache from its prefill, got {type(past).__name__}")
    if past.get_seq_length() != length:
        raise ValueError(f"the prefill must cache all {length} prompt tokens, its cache holds {past.get_seq_length()}")
    if want_hidden:
        rows = HeadRows.of(causal_lm(model), hidden[-1][:, -1], states)
        if rows is None:
            _log_once("logits of the whole vocabulary are computed: the lm_head's rows cannot be used one by one")
        else:
            states = hidden[-1][:, -1]
    obstacle = _packing_obstacle(model, past, length, reserve)
    session: Session
    if obstacle is None:
        session = PackedSession(model, past, prepared, rows is not None)
    else:
        _log_once(f"decoding expands the prompt's cache to every beam instead of sharing it: {obstacle}")
        session = ExpandedSession(model, past, prepared, rows is not None)
    return Prompts(states, session, rows, vocabulary)


@contextlib.contextmanager
def _head_input(model: nn.Module, skip: bool) -> Iterator[list[torch.Tensor]]:
    """What the lm_head is given inside, call by call; with `skip` it works on no row, and the model's logits are empty.

    Other threads that use the model meanwhile are left alone.
    """
    seen: list[torch.Tensor] = []
    thread = threading.get_ident()

    def look(_: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
        if threading.get_ident() != thread:
            return None
        seen.append(args[0])
        return (args[0][:, :0], *args[1:]) if skip else None

    handle = causal_lm(model).get_output_embeddings().register_forward_pre_hook(look)
    try:
        yield seen
    finally:
        handle.remove()


def _states(model: nn.Module, hidden: bool, arguments: Mapping[str, Any]) -> tuple[torch.Tensor, Cache]:
    """Hidden states [B, n, D] or logits [B, n, V] of the model's forward, and its cache."""
    if not hidden:
        out = model(**arguments, use_cache=True)
        return out.logits, out.past_key_values
    with _head_input(model, skip=True) as seen:
        out = model(**arguments, use_cache=True)
    return seen[-1], out.past_key_values


def _packing_obstacle(model: nn.Module, past: Cache, length: int, reserve: int) -> str | None:
    """Why beams cannot be packed into one row for this model, or None."""
    lm = causal_lm(model)
    config = lm.config.get_text_config(decoder=True)
    attention = getattr(config, "_attn_implementation", None)
    if attention not in ("sdpa", "eager"):
        return f"{attention} attention takes no 4-D mask"
    if "position_ids" not in _forward_parameters(model) or getattr(config, "alibi", False):
        return f"{type(lm).__name__} derives positions from the attention mask"
    plain = (DynamicLayer, DynamicSlidingWindowLayer)
    layers: list[Any] = list(past.layers)
    odd = next((type(x).__name__ for x in layers if type(x) not in plain or not x.is_initialized), None)
    if odd is not None:
        return f"{type(lm).__name__} keeps its state in {odd}"
    windows = [layer.sliding_window for layer in layers if isinstance(layer, DynamicSlidingWindowLayer)]
    configured = (getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))
    windows.extend(size for size in configured if isinstance(size, int))
    if windows and length + reserve > min(windows):
        return f"prompt plus item can exceed the attention window of {min(windows)} tokens"
    return None


class _AppendLayer(DynamicLayer):
    """Keys and values in a buffer with spare room: appending copies the new columns only; `truncate` forgets them."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        super().__init__()
        self.dtype, self.device = keys.dtype, keys.device
        self.is_initialized = True
        self.key_buffer, self.value_buffer = keys, values
        self.keys, self.values = keys, values

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        before = self.get_seq_length()
        after = before + key_states.shape[-2]
        if after > self.key_buffer.shape[-2]:
            self.key_buffer = self._grown(self.key_buffer, before, after)
            self.value_buffer = self._grown(self.value_buffer, before, after)
        self.key_buffer[:, :, before:after] = key_states
        self.value_buffer[:, :, before:after] = value_states
        self.truncate(after)
        return self.key_buffer[:, :, :after], self.value_buffer[:, :, :after]

    def truncate(self, length: int) -> None:
        self.keys = self.key_buffer[:, :, :length]
        self.values = self.value_buffer[:, :, :length]

    def select(self, rows: torch.Tensor) -> None:
        used = self.get_seq_length()
        self.key_buffer, self.value_buffer = self.key_buffer[rows, :, :used], self.value_buffer[rows, :, :used]
        self.truncate(used)

    @staticmethod
    def _grown(buffer: torch.Tensor, used: int, needed: int) -> torch.Tensor:
        room = needed + (needed >> 1)
        grown = buffer.new_empty(*buffer.shape[:2], room, buffer.shape[3])
        grown[:, :, :used] = buffer[:, :, :used]
        return grown


class PackedSession:
    """Hypotheses of a user are the tokens of one row; see the module's text."""

    sees: torch.Tensor  # bool [B, w, columns], of each hypothesis the suffix columns it may look at
    depth: torch.Tensor  # int64 [B, w], how many tokens it has

    def __init__(self, model: nn.Module, past: Cache, prepared: Mapping[str, torch.Tensor], hidden: bool) -> None:
        self.model, self.hidden = model, hidden
        self.prompt_seen = prepared["attention_mask"].bool()[:, None]  # [B, 1, L]
        self.next_position = prepared["position_ids"][:, -1:] + 1  # [B, 1]
        self.length = self.prompt_seen.shape[-1]
        layers: list[Any] = list(past.layers)
        self.layers = [_AppendLayer(layer.keys, layer.values) for layer in layers]
        self.cache = Cache(layers=[*self.layers])
        config = causal_lm(model).config.get_text_config(decoder=True)
        self.additive = config._attn_implementation == "eager"
        self.rewind()

    def step(self, tokens: torch.Tensor, parents: torch.Tensor, lengths: torch.Tensor | None = None) -> torch.Tensor:
        count, columns = tokens.shape[1], self.sees.shape[-1]
        inherited = self.sees.gather(1, parents[..., None].expand(-1, -1, columns))
        depth = self.depth.gather(1, parents)
        if lengths is None:
            own = torch.eye(count, dtype=torch.bool, device=tokens.device).expand(len(tokens), count, count)
            sees = self.sees = torch.cat([inherited, own], dim=-1)
            self.depth = depth + 1
            return self._forward(tokens, self.next_position + depth, sees)
        owner, offset = slots(lengths, count)
        mine = (owner[:, None] == torch.arange(lengths.shape[1], device=tokens.device)[:, None]) & (offset >= 0)[
            :, None
        ]
        before = torch.ones(count, count, dtype=torch.bool, device=tokens.device).tril()
        own = mine.gather(1, owner[..., None].expand(-1, -1, count)) & before
        own = own | torch.eye(count, dtype=torch.bool, device=tokens.device)  # padding sees itself
        sees = torch.cat([inherited.gather(1, owner[..., None].expand(-1, -1, columns)), own], dim=-1)
        self.sees = torch.cat([inherited, mine], dim=-1)
        self.depth = depth + lengths
        states = self._forward(tokens, self.next_position + depth.gather(1, owner) + offset.clamp_min(0), sees)
        last = (lengths.cumsum(1) - 1).clamp(0, count - 1)
        return states.gather(1, last[..., None].expand(-1, -1, states.shape[-1]))

    def tree(self, tokens: np.ndarray, parents: np.ndarray, depths: np.ndarray) -> torch.Tensor:
        if self.sees.shape[-1]:
            raise ValueError("tree() continues the prompt: the session has already made steps")
        sees = np.eye(len(tokens), dtype=bool)
        for level in np.split(np.arange(len(tokens)), np.flatnonzero(np.diff(depths)) + 1):
            if depths[level[0]] > 1:
                sees[level] |= sees[parents[level]]
        rows, device = len(self.prompt_seen), self.prompt_seen.device
        positions = self.next_position + torch.as_tensor(depths - 1, device=device)
        states = self._forward(
            torch.as_tensor(tokens, device=device, dtype=torch.int64).expand(rows, -1),
            positions,
            torch.as_tensor(sees, device=device).expand(rows, -1, -1),
        )
        for layer in self.layers:
            layer.truncate(self.length)
        return states

    def select(self, users: torch.Tensor) -> None:
        self.prompt_seen, self.next_position = self.prompt_seen[users], self.next_position[users]
        self.sees, self.depth = self.sees[users], self.depth[users]
        for layer in self.layers:
            layer.select(users)

    def of_size(self, users: int, length: int, columns: int) -> PackedSession:
        """A session for `users` prompts of `length` tokens and so many columns in all, with nothing in it: see `load`."""
        new = copy.copy(self)
        new.length = length
        new.prompt_seen = self.prompt_seen.new_zeros(users, 1, length)
        new.next_position = self.next_position.new_zeros(users, 1)
        new.layers = []
        for layer in self.layers:
            keys, values = (
                x.new_zeros(users, x.shape[1], columns, x.shape[3]) for x in (layer.key_buffer, layer.value_buffer)
            )
            new.layers.append(_AppendLayer(keys, values))
        new.cache = Cache(layers=[*new.layers])
        new.rewind()
        return new

    def load(self, other: PackedSession) -> None:
        """Copy the prompts of a session that has made no step into this one's tensors, on the right of each row."""
        rows, start = len(other.prompt_seen), self.length - other.length
        self.prompt_seen.zero_()[:rows, :, start:] = other.prompt_seen
        self.next_position[:rows] = other.next_position
        for mine, theirs in zip(self.layers, other.layers, strict=True):
            mine.key_buffer[:rows, :, start : self.length] = theirs.key_buffer[:, :, : other.length]
            mine.value_buffer[:rows, :, start : self.length] = theirs.value_buffer[:, :, : other.length]

    def rewind(self) -> None:
        """Back to the prompts."""
        rows, device = len(self.prompt_seen), self.prompt_seen.device
        self.sees = torch.zeros(rows, 1, 0, dtype=torch.bool, device=device)
        self.depth = torch.zeros(rows, 1, dtype=torch.int64, device=device)
        for layer in self.layers:
            layer.truncate(self.length)

    def _forward(self, tokens: torch.Tensor, positions: torch.Tensor, sees: torch.Tensor) -> torch.Tensor:
        mask = torch.cat([self.prompt_seen.expand(-1, tokens.shape[1], -1), sees], dim=-1)[:, None]
        if self.additive:
            dtype = self.layers[0].dtype
            mask = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)
        arguments = {
            "input_ids": tokens,
            "attention_mask": mask,
            "position_ids": positions,
            "past_key_values": self.cache,
        }
        return _states(self.model, self.hidden, arguments)[0]


class ExpandedSession:
    """Every hypothesis is a row with a cache of its own."""

    def __init__(self, model: nn.Module, past: Cache, prepared: Mapping[str, torch.Tensor], hidden: bool) -> None:
        self.model, self.hidden = model, hidden
        self.cache = past
        self.mask = prepared["attention_mask"]  # [B·w, L + t]
        self.positioned = "position_ids" in prepared
        self.next_position = prepared["attention_mask"].long().sum(1)  # [B]
        if self.positioned:
            self.next_position = prepared["position_ids"][:, -1] + 1
        self.rows = len(self.mask)
        # tokens of each hypothesis, int64 [B, w, t] padded at the end, and how many [B, w]; None once steps were of one token
        self.paths: torch.Tensor | None = self.mask.new_zeros((self.rows, 1, 0), dtype=torch.int64)
        self.depth = self.mask.new_zeros((self.rows, 1), dtype=torch.int64)

    def step(self, tokens: torch.Tensor, parents: torch.Tensor, lengths: torch.Tensor | None = None) -> torch.Tensor:
        if lengths is not None:
            return self._again(tokens, parents, lengths)
        rows, width = tokens.shape
        before = len(self.mask) // self.rows
        source = (torch.arange(rows, device=tokens.device)[:, None] * before + parents).flatten()
        self.cache.reorder_cache(cast(torch.LongTensor, source))
        self.mask = torch.cat([self.mask[source], self.mask.new_ones(rows * width, 1)], dim=1)
        self.depth, self.paths = self.depth.gather(1, parents) + 1, None
        states, self.cache = self._run(self.cache, self.mask, tokens.reshape(-1, 1), self.depth.flatten() - 1)
        return states.view(rows, width, -1)

    def _again(self, tokens: torch.Tensor, parents: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Steps of several tokens. Caches of hypotheses that differ in length do not go together without padding, which
        sliding windows would count: hypotheses are encoded anew from the prompt's cache, those of one length at a time."""
        earlier = self.paths
        if earlier is None:
            raise ValueError("lengths: expected None, as in the session's earlier steps")
        rows, width = lengths.shape
        depth = self.depth.gather(1, parents)
        owner, offset = slots(lengths, tokens.shape[1])
        longest = int((depth + lengths).max())
        before = earlier.gather(1, parents[..., None].expand(-1, -1, earlier.shape[-1]))[..., :longest]
        paths = before.new_zeros(rows, width, longest + 1)  # the last column takes padding
        paths[..., : before.shape[-1]] = before
        place = torch.where(offset >= 0, depth.gather(1, owner) + offset, longest)
        paths[torch.arange(rows, device=tokens.device)[:, None], owner, place] = tokens
        self.paths, self.depth = paths[..., :longest], depth + lengths
        out: torch.Tensor | None = None
        for length in self.depth[lengths > 0].unique().tolist():
            user, column = ((self.depth == length) & (lengths > 0)).nonzero(as_tuple=True)
            cache = copy.deepcopy(self.cache)
            cache.reorder_cache(cast(torch.LongTensor, user))
            mask = torch.cat([self.mask[user], self.mask.new_ones(len(user), length)], dim=1)
            states, _ = self._run(cache, mask, self.paths[user, column, :length], torch.zeros_like(user), user)
            if out is None:
                out = states.new_zeros(rows, width, states.shape[-1])
            out[user, column] = states[:, -1]
        if out is None:
            raise ValueError("lengths: expected a hypothesis with new tokens, got none")
        return out

    def _run(
        self,
        cache: Cache,
        mask: torch.Tensor,
        tokens: torch.Tensor,
        depth: torch.Tensor,
        user: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, Cache]:
        """States of tokens [R, n] whose first stands `depth` [R] behind the prompt."""
        start = (
            self.next_position.repeat_interleave(len(tokens) // self.rows) if user is None else self.next_position[user]
        )
        positions = (start + depth)[:, None] + torch.arange(tokens.shape[1], device=tokens.device)
        arguments = {"input_ids": tokens, "attention_mask": mask, "past_key_values": cache}
        return _states(self.model, self.hidden, arguments | ({"position_ids": positions} if self.positioned else {}))

    def tree(self, tokens: np.ndarray, parents: np.ndarray, depths: np.ndarray) -> torch.Tensor:
        kept = copy.deepcopy(self.cache), self.mask, self.depth, self.paths
        if self.depth.any():
            raise ValueError("tree() continues the prompt: the session has already made steps")
        states, start_of_level = [], 0
        for level in np.split(np.arange(len(tokens)), np.flatnonzero(np.diff(depths)) + 1):
            within = np.maximum(parents[level] - start_of_level, 0)  # column of the parent among the previous level
            start_of_level = int(level[0])
            states.append(
                self.step(
                    torch.as_tensor(tokens[level], device=self.mask.device, dtype=torch.int64).expand(self.rows, -1),
                    torch.as_tensor(within, device=self.mask.device).expand(self.rows, -1),
                )
            )
        self.cache, self.mask, self.depth, self.paths = kept
        return torch.cat(states, dim=1)

    def select(self, users: torch.Tensor) -> None:
        width = len(self.mask) // self.rows
        source = (users[:, None] * width + torch.arange(width, device=users.device)).flatten()
        self.cache.reorder_cache(cast(torch.LongTensor, source))
        self.mask, self.depth, self.next_position = self.mask[source], self.depth[users], self.next_position[users]
        self.paths = None if self.paths is None else self.paths[users]
        self.rows = len(users)


def slots(lengths: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Layout of `lengths` [B, w] tokens side by side in `count` columns: which hypothesis a column belongs to and the
    token's place in it, int64 [B, count] each; (w - 1, -1) past the end.

    >>> owner, offset = slots(torch.tensor([[2, 0, 1]]), 4)
    >>> owner.tolist(), offset.tolist()
    ([[0, 0, 2, 2]], [[0, 1, 0, -1]])
    """
    ends = lengths.cumsum(1)
    column = torch.arange(count, device=lengths.device).expand(len(lengths), -1).contiguous()
    owner = torch.searchsorted(ends, column, right=True).clamp_max(lengths.shape[1] - 1)
    offset = column - (ends - lengths).gather(1, owner)
    return owner, offset.masked_fill(column >= ends[:, -1:], -1)
