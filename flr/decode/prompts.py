"""The prompt: encoded once, and the session that continues it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.cache_utils import Cache

from flr.model.backbone import cache_of, causal_lm, forward_parameters, is_patched, takes_positions, warn_once
from flr.model.base import is_recurrent
from flr.model.head import HeadRows, is_linear
from flr.model.insertion import append_thoughts
from flr.model.verify import traits_of

from .expanded import ExpandedSession
from .packed import PackedSession, obstacle
from .recomputed import RecomputedSession
from .session import Session, lm_head_inputs

_NOT_MODEL_INPUTS = ("item_positions",)


def num_prompts(inputs: Mapping[str, Any]) -> int:
    """B, from input_ids [B, L]."""
    if "input_ids" not in inputs:
        raise ValueError(f"inputs: expected input_ids among them, got {sorted(inputs)}")
    return len(inputs["input_ids"])


def prepare_inputs(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Inputs of the prefill on the model's device, with attention_mask and position_ids present.

    A patched model's prompts that bring no thought token get theirs, unless its config says otherwise.
    ``item_positions`` is dropped, ``reasoner_mask`` too where the model is not patched; every other key is passed on.

    Raises:
        ValueError: no input_ids, a shape that does not fit them, right padding, labels.
    """
    if "labels" in inputs:
        raise ValueError("inputs: expected the prompt alone, got labels")
    num_prompts(inputs)
    lm = causal_lm(model)
    device = next(lm.parameters()).device
    dropped = set(_NOT_MODEL_INPUTS)
    if not is_patched(lm):
        dropped.add("reasoner_mask")
    prepared = {
        key: value.to(device) if isinstance(value, torch.Tensor) else value
        for key, value in inputs.items()
        if key not in dropped
    }
    ids = prepared["input_ids"]
    if ids.ndim != 2 or ids.shape[1] == 0:
        raise ValueError(f"input_ids: expected [B, L] with L >= 1, got {list(ids.shape)}")
    mask = prepared.get("attention_mask")
    if mask is None:
        mask = torch.ones_like(ids)
    if mask.shape != ids.shape:
        raise ValueError(f"attention_mask: expected {list(ids.shape)} like input_ids, got {list(mask.shape)}")
    if not bool((mask[:, -1] != 0).all()):
        raise ValueError("attention_mask: expected prompts padded on the left, got 0 in the last column")
    prepared["attention_mask"] = mask
    if prepared.get("position_ids") is None:
        prepared["position_ids"] = (mask.long().cumsum(1) - 1).clamp_min(0)
    elif prepared["position_ids"].shape != ids.shape:
        raise ValueError(
            f"position_ids: expected {list(ids.shape)} like input_ids, got {list(prepared['position_ids'].shape)}"
        )
    return append_thoughts(lm._flr_patch.config, prepared) if is_patched(lm) else prepared


class Thinking(NamedTuple):
    """A patched model's prefill: what it was given, the thoughts that it made, and the cache as it left it."""

    prepared: Mapping[str, Any]
    output: Any  # FLROutput
    past: Any


class Prompts(NamedTuple):
    """Prompts of B users after the prefill: states [B, …], the session that continues them, and how to make logits of
    hidden states (None where the states are logits). Where a patched model thought, what it made, too."""

    states: torch.Tensor
    session: Session
    head_rows: HeadRows | None
    vocabulary: int
    thinking: Thinking | None = None


def prefill_arguments(model: nn.Module) -> dict[str, Any]:
    """What a prefill asks of the model's forward: its cache, and logits of the last column alone."""
    keeps = "logits_to_keep" in forward_parameters(type(causal_lm(model)).forward)
    return {"use_cache": True, **({"logits_to_keep": 1} if keeps else {})}


def prefill(model: nn.Module, inputs: Mapping[str, Any], reserve: int, want_hidden: bool = False) -> Prompts:
    """Prefill.

    Args:
        model: any causal LM of transformers, patched or not, in eval mode.
        inputs: see ``prepare_inputs``; input_ids [B, L], left-padded.
        reserve: how many tokens an item has at most.
        want_hidden: states shall be hidden states; where the lm_head does not allow it they are logits all the same.
    """
    prepared = prepare_inputs(model, inputs)
    if not takes_positions(model):
        del prepared["position_ids"]
    traits = traits_of(model)
    if not traits.steps or (not traits.left_padding and bool((prepared["attention_mask"] == 0).any())):
        return _anew(model, prepared, want_hidden)
    with lm_head_inputs(model, skip=False) as hidden:
        out = model(**prepared, **prefill_arguments(model))
    past, states, head_rows = cache_of(out), out.logits[:, -1], None
    vocabulary = states.shape[-1]
    length = prepared["input_ids"].shape[1]
    if not isinstance(past, Cache) or type(past).__module__ != Cache.__module__ or not hasattr(past, "layers"):
        # kept under another name, or of a kind of its own, whose rows nobody else can reorder
        return _anew(model, prepared, want_hidden)
    if not is_recurrent(past) and past.get_seq_length() != length:
        raise ValueError(
            f"model: expected a cache of all {length} prompt tokens from its prefill, got {past.get_seq_length()}"
        )
    if want_hidden:
        head_rows = HeadRows.of(causal_lm(model), hidden[-1][:, -1], states)
        if head_rows is None:
            warn_once("logits of the whole vocabulary are computed: the lm_head's rows cannot be used one by one")
        else:
            states = hidden[-1][:, -1]
    reason = obstacle(model, past, length + reserve)
    session: Session
    if reason is None:
        session = PackedSession(model, past, prepared, head_rows is not None)
    else:
        warn_once(f"decoding expands the prompt's cache to every beam instead of sharing it: {reason}")
        session = ExpandedSession(model, past, prepared, head_rows is not None, traits.pieces)
    made = getattr(out, "flr", None)
    return Prompts(states, session, head_rows, vocabulary, None if made is None else Thinking(prepared, made, past))


def _anew(model: nn.Module, prepared: Mapping[str, Any], want_hidden: bool) -> Prompts:
    """Prompts whose continuations are encoded from their first token."""
    warn_once(f"decoding encodes every sequence anew: {type(causal_lm(model)).__name__} cannot go on from its cache")
    session, head_rows = RecomputedSession(model, prepared), None
    logits = states = session.root()
    if want_hidden and is_linear(causal_lm(model)):
        session.hidden = True
        hidden = session.root()
        head_rows = HeadRows.of(causal_lm(model), hidden, logits)
        session.hidden = head_rows is not None
        states = logits if head_rows is None else hidden
    return Prompts(states, session, head_rows, logits.shape[-1])
