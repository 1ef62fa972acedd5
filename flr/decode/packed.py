"""Hypotheses of a user as tokens of one row behind one copy of the prompt's keys and values."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from flr.model.backbone import cache_argument, causal_lm, packing_obstacle
from flr.model.base import attention_mask
from flr.model.folded_heads import folded_heads
from flr.model.shared_prompt import hypotheses_attend, shares
from flr.model.verify import traits_of

from .session import last_states, model_states, slots


def obstacle(model: nn.Module, past: Cache, length: int) -> str | None:
    """Why beams cannot be packed into rows of up to ``length`` tokens behind this cache, or None."""
    lm = causal_lm(model)
    if not shares(model, preferred=False):
        if (reason := packing_obstacle(model)) is not None:
            return reason
        if not traits_of(model).packing:
            return f"{type(lm).__name__} takes no 4-D mask"
    layers: list[Any] = list(past.layers)
    plain = (DynamicLayer, DynamicSlidingWindowLayer)
    odd = next((type(x).__name__ for x in layers if type(x) not in plain or not x.is_initialized), None)
    if odd is not None:
        return f"{type(lm).__name__} keeps its state in {odd}"
    config = lm.config.get_text_config(decoder=True)
    windows = [layer.sliding_window for layer in layers if isinstance(layer, DynamicSlidingWindowLayer)]
    configured = (getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))
    windows.extend(size for size in configured if isinstance(size, int))
    if windows and length > min(windows):
        return f"prompt plus item can exceed the attention window of {min(windows)} tokens"
    return None


@contextlib.contextmanager
def pinned_attention(device: torch.device) -> Iterator[None]:
    """Attention under a mask runs one kernel on a GPU, whatever the shape: levels are captured and compared so.

    PyTorch would choose by shape and version, and its choice may move between a first run and a capture. Of what takes
    a mask that is the memory-efficient one, or plain products where it does not run.
    """
    if device.type != "cuda":
        yield
        return
    with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        yield


class _AppendLayer(DynamicLayer):
    """Keys and values in a buffer with spare room: appending copies the new columns only; ``truncate`` forgets them."""

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

    reads_runs = True
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
        self.config = causal_lm(model).config.get_text_config(decoder=True)
        self.shares = shares(model, preferred=False)
        self.reset()

    def step(
        self, tokens: torch.Tensor, parents: torch.Tensor, lengths: torch.Tensor | None = None, *, every: bool = False
    ) -> torch.Tensor:
        count, columns = tokens.shape[1], self.sees.shape[-1]
        inherited = self.sees.gather(1, parents[..., None].expand(-1, -1, columns))
        depth = self.depth.gather(1, parents)
        if lengths is None:
            own = torch.eye(count, dtype=torch.bool, device=tokens.device).expand(len(tokens), count, count)
            sees = self.sees = torch.cat([inherited, own], dim=-1)
            self.depth = depth + 1
            return self._forward(tokens, self.next_position + depth, sees)
        owner, offset = slots(lengths, count)
        hypothesis = torch.arange(lengths.shape[1], device=tokens.device)[:, None]
        mine = (owner[:, None] == hypothesis) & (offset >= 0)[:, None]
        before = torch.ones(count, count, dtype=torch.bool, device=tokens.device).tril()
        own = mine.gather(1, owner[..., None].expand(-1, -1, count)) & before
        own = own | torch.eye(count, dtype=torch.bool, device=tokens.device)  # padding sees itself
        sees = torch.cat([inherited.gather(1, owner[..., None].expand(-1, -1, columns)), own], dim=-1)
        self.sees = torch.cat([inherited, mine], dim=-1)
        self.depth = depth + lengths
        states = self._forward(tokens, self.next_position + depth.gather(1, owner) + offset.clamp_min(0), sees)
        return states if every else last_states(states, lengths)

    def read(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        seen: torch.Tensor,
        sees: torch.Tensor,
        depth: torch.Tensor,
    ) -> torch.Tensor:
        """A step whose bookkeeping is done: states after each of the tokens (fields of ``flr_kernels.Advance``)."""
        self.sees, self.depth = sees, depth
        return self._forward(tokens, positions, seen)

    def tree(self, tokens: np.ndarray, parents: np.ndarray, depths: np.ndarray) -> torch.Tensor:
        if self.sees.shape[-1]:
            raise ValueError("tree: expected a session without steps, got one that has made some")
        sees = np.eye(len(tokens), dtype=bool)
        for level in np.split(np.arange(len(tokens)), np.flatnonzero(np.diff(depths)) + 1):
            if depths[level[0]] > 1:
                sees[level] |= sees[parents[level]]
        rows, device = len(self.prompt_seen), self.prompt_seen.device
        positions = self.next_position + torch.as_tensor(depths - 1, device=device)
        ids = torch.as_tensor(tokens, device=device, dtype=torch.int64).expand(rows, -1)
        states = self._forward(ids, positions, torch.as_tensor(sees, device=device).expand(rows, -1, -1))
        for layer in self.layers:
            layer.truncate(self.length)
        return states

    def select(self, users: torch.Tensor) -> None:
        self.prompt_seen, self.next_position = self.prompt_seen[users], self.next_position[users]
        self.sees, self.depth = self.sees[users], self.depth[users]
        for layer in self.layers:
            layer.select(users)

    def empty_like(self, users: int, length: int, columns: int) -> PackedSession:
        """A session for ``users`` prompts of ``length`` tokens, ``columns`` in all; see ``copy_from``."""
        new = copy.copy(self)
        new.length = length
        new.prompt_seen = self.prompt_seen.new_zeros(users, 1, length)
        new.next_position = self.next_position.new_zeros(users, 1)
        new.layers = []
        for layer in self.layers:
            buffers = (layer.key_buffer, layer.value_buffer)
            new.layers.append(_AppendLayer(*(x.new_zeros(users, x.shape[1], columns, x.shape[3]) for x in buffers)))
        new.cache = Cache(layers=[*new.layers])
        new.reset()
        return new

    def copy_from(self, other: PackedSession) -> None:
        """Copy the prompts of a session that has made no step into this one's tensors, on the right of each row."""
        rows, start = len(other.prompt_seen), self.length - other.length
        self.prompt_seen.zero_()[:rows, :, start:] = other.prompt_seen
        self.next_position[:rows] = other.next_position
        for mine, theirs in zip(self.layers, other.layers, strict=True):
            mine.key_buffer[:rows, :, start : self.length] = theirs.key_buffer[:, :, : other.length]
            mine.value_buffer[:rows, :, start : self.length] = theirs.value_buffer[:, :, : other.length]

    def take(self, cache: Cache, inputs: Mapping[str, torch.Tensor]) -> None:
        """Copy prompts of this length, as their prefill left them, into this session's tensors."""
        self.prompt_seen.copy_(inputs["attention_mask"].bool()[:, None])
        self.next_position.copy_(inputs["position_ids"][:, -1:] + 1)
        layers: list[Any] = list(cache.layers)
        for mine, theirs in zip(self.layers, layers, strict=True):
            mine.key_buffer[:, :, : self.length] = theirs.keys
            mine.value_buffer[:, :, : self.length] = theirs.values

    def reset(self) -> None:
        """Back to the prompts."""
        rows, device = len(self.prompt_seen), self.prompt_seen.device
        self.sees = torch.zeros(rows, 1, 0, dtype=torch.bool, device=device)
        self.depth = torch.zeros(rows, 1, dtype=torch.int64, device=device)
        for layer in self.layers:
            layer.truncate(self.length)

    def _forward(self, tokens: torch.Tensor, positions: torch.Tensor, sees: torch.Tensor) -> torch.Tensor:
        dtype = self.layers[0].dtype
        apart = hypotheses_attend(self.model, self.prompt_seen[:, 0], sees, dtype) if self.shares else None
        with apart or self._masked(sees, dtype) as mask:
            arguments = {"input_ids": tokens, "attention_mask": mask, "position_ids": positions}
            return model_states(self.model, self.hidden, {**arguments, **cache_argument(self.model, self.cache)})[0]

    @contextlib.contextmanager
    def _masked(self, sees: torch.Tensor, dtype: torch.dtype) -> Iterator[torch.Tensor]:
        seen = torch.cat([self.prompt_seen.expand(-1, sees.shape[1], -1), sees], dim=-1)
        with folded_heads(), pinned_attention(self.prompt_seen.device):
            yield attention_mask(self.config, seen, dtype)
