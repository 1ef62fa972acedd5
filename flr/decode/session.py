"""A prompt encoded once, continued by many hypotheses at a time.

`start(model, inputs, reserve)` prefills (a patched model thinks inside this call) and returns the logits after the prompt
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
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

logger = logging.getLogger(__name__)

_NOT_MODEL_INPUTS = ("item_positions",)


class Session(Protocol):
    """The prompt of B users, continued by `width` hypotheses each (1 at the start: the prompt itself)."""

    def step(self, tokens: torch.Tensor, parents: torch.Tensor) -> torch.Tensor:
        """Append one token to w hypotheses a user.

        Args:
            tokens: int64 [B, w] token each new hypothesis adds.
            parents: int64 [B, w] which hypothesis of the previous step (column, 0 at the first) it continues.

        Returns:
            logits [B, w, V] after the new tokens, in the model's dtype.
        """

    def tree(self, tokens: np.ndarray, parents: np.ndarray, depths: np.ndarray) -> torch.Tensor:
        """Logits [B, n, V] at n trie nodes behind the prompt, the same for all users; the session stays as it was.

        Args:
            tokens: int [n] last token of each node.
            parents: int [n] index of its parent among the n, -1 for the prompt; parents stand before children.
            depths: int [n] tokens from the prompt to the node, 1 for children of the root, ascending.
        """


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


def start(model: nn.Module, inputs: Mapping[str, Any], reserve: int) -> tuple[torch.Tensor, Session]:
    """Prefill.

    Args:
        model: any causal LM of transformers, patched or not, in eval mode.
        inputs: see `prepare_inputs`; input_ids [B, L], left-padded.
        reserve: how many tokens an item has at most.

    Returns:
        logits [B, V] after the prompt and the session.
    """
    prepared = prepare_inputs(model, inputs)
    parameters = _forward_parameters(model)
    if "position_ids" not in parameters:
        del prepared["position_ids"]
    extra = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}
    out = model(**prepared, use_cache=True, **extra)
    past = out.past_key_values
    length = prepared["input_ids"].shape[1]
    if not isinstance(past, Cache):
        raise ValueError(f"the model must return a transformers Cache from its prefill, got {type(past).__name__}")
    if past.get_seq_length() != length:
        raise ValueError(f"the prefill must cache all {length} prompt tokens, its cache holds {past.get_seq_length()}")
    obstacle = _packing_obstacle(model, past, length, reserve)
    if obstacle is None:
        return out.logits[:, -1], PackedSession(model, past, prepared)
    _log_once(f"decoding expands the prompt's cache to every beam instead of sharing it: {obstacle}")
    return out.logits[:, -1], ExpandedSession(model, past, prepared)


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

    @staticmethod
    def _grown(buffer: torch.Tensor, used: int, needed: int) -> torch.Tensor:
        room = needed + (needed >> 1)
        grown = buffer.new_empty(*buffer.shape[:2], room, buffer.shape[3])
        grown[:, :, :used] = buffer[:, :, :used]
        return grown


class PackedSession:
    """Hypotheses of a user are the tokens of one row; see the module's text."""

    def __init__(self, model: nn.Module, past: Cache, prepared: Mapping[str, torch.Tensor]) -> None:
        self.model = model
        self.prompt_seen = prepared["attention_mask"].bool()[:, None]  # [B, 1, L]
        self.next_position = prepared["position_ids"][:, -1:] + 1  # [B, 1]
        self.length = self.prompt_seen.shape[-1]
        layers: list[Any] = list(past.layers)
        self.layers = [_AppendLayer(layer.keys, layer.values) for layer in layers]
        self.cache = Cache(layers=[*self.layers])
        config = causal_lm(model).config.get_text_config(decoder=True)
        self.additive = config._attn_implementation == "eager"
        self.sees: torch.Tensor | None = None  # bool [B, w, columns]: suffix columns each hypothesis may look at
        self.steps = 0

    def step(self, tokens: torch.Tensor, parents: torch.Tensor) -> torch.Tensor:
        rows, width = tokens.shape
        own = torch.eye(width, dtype=torch.bool, device=tokens.device).expand(rows, width, width)
        if self.sees is None:
            self.sees = own
        else:
            inherited = self.sees.gather(1, parents[..., None].expand(-1, -1, self.sees.shape[-1]))
            self.sees = torch.cat([inherited, own], dim=-1)
        positions = (self.next_position + self.steps).expand(rows, width)
        self.steps += 1
        return self._forward(tokens, positions, self.sees)

    def tree(self, tokens: np.ndarray, parents: np.ndarray, depths: np.ndarray) -> torch.Tensor:
        if self.steps:
            raise ValueError("tree() continues the prompt: the session has already made steps")
        sees = np.eye(len(tokens), dtype=bool)
        for level in np.split(np.arange(len(tokens)), np.flatnonzero(np.diff(depths)) + 1):
            if depths[level[0]] > 1:
                sees[level] |= sees[parents[level]]
        rows, device = len(self.prompt_seen), self.prompt_seen.device
        positions = self.next_position + torch.as_tensor(depths - 1, device=device)
        logits = self._forward(
            torch.as_tensor(tokens, device=device, dtype=torch.int64).expand(rows, -1),
            positions,
            torch.as_tensor(sees, device=device).expand(rows, -1, -1),
        )
        for layer in self.layers:
            layer.truncate(self.length)
        return logits

    def _forward(self, tokens: torch.Tensor, positions: torch.Tensor, sees: torch.Tensor) -> torch.Tensor:
        mask = torch.cat([self.prompt_seen.expand(-1, tokens.shape[1], -1), sees], dim=-1)[:, None]
        if self.additive:
            dtype = self.layers[0].dtype
            mask = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)
        out = self.model(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
        )
        return out.logits


class ExpandedSession:
    """Every hypothesis is a row with a cache of its own."""

    def __init__(self, model: nn.Module, past: Cache, prepared: Mapping[str, torch.Tensor]) -> None:
        self.model = model
        self.cache = past
        self.mask = prepared["attention_mask"]  # [B·w, L + t]
        self.positioned = "position_ids" in prepared
        self.next_position = prepared["attention_mask"].long().sum(1)  # [B]
        if self.positioned:
            self.next_position = prepared["position_ids"][:, -1] + 1
        self.rows = len(self.mask)
        self.steps = 0

    def step(self, tokens: torch.Tensor, parents: torch.Tensor) -> torch.Tensor:
        rows, width = tokens.shape
        before = len(self.mask) // self.rows
        source = (torch.arange(rows, device=tokens.device)[:, None] * before + parents).flatten()
        self.cache.reorder_cache(cast(torch.LongTensor, source))
        self.mask = torch.cat([self.mask[source], self.mask.new_ones(rows * width, 1)], dim=1)
        positions = (self.next_position[:, None] + self.steps).expand(rows, width).reshape(-1, 1)
        self.steps += 1
        extra = {"position_ids": positions} if self.positioned else {}
        out = self.model(
            input_ids=tokens.reshape(-1, 1),
            attention_mask=self.mask,
            past_key_values=self.cache,
            use_cache=True,
            **extra,
        )
        self.cache = out.past_key_values
        return out.logits.view(rows, width, -1)

    def tree(self, tokens: np.ndarray, parents: np.ndarray, depths: np.ndarray) -> torch.Tensor:
        if self.steps:
            raise ValueError("tree() continues the prompt: the session has already made steps")
        kept = copy.deepcopy(self.cache), self.mask
        logits, start_of_level = [], 0
        for level in np.split(np.arange(len(tokens)), np.flatnonzero(np.diff(depths)) + 1):
            within = np.maximum(parents[level] - start_of_level, 0)  # column of the parent among the previous level
            start_of_level = int(level[0])
            logits.append(
                self.step(
                    torch.as_tensor(tokens[level], device=self.mask.device, dtype=torch.int64).expand(self.rows, -1),
                    torch.as_tensor(within, device=self.mask.device).expand(self.rows, -1),
                )
            )
        (self.cache, self.mask), self.steps = kept, 0
        return torch.cat(logits, dim=1)
