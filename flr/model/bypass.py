"""Callers that go around a patched model's forward and run the base model themselves.

A fused loss (TRL's trainers, Liger-Kernel) replaces the instance's ``forward`` by one that calls the base model and
multiplies with the lm_head itself; ours would never be reached, and the thought left out in silence. So the base
model of a patched model makes the thoughts where its input shows their tokens, or where it is called by a ``forward``
that took the place of ours: a hook on the model's call has kept the labels, from which the thoughts' places follow.
The states are returned in the caller's columns, and the regularisers are added to the loss that the call returns.
"""

from __future__ import annotations

import inspect
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions, MoeModelOutputWithPast

from flr.config import IGNORE

from .backbone import OUTPUT_CACHE
from .base import base_cache_name, is_filled, text_arguments
from .batch import Batch, encode, insertion_into, plain_pieces, thoughts_among, with_thoughts
from .methods import Method
from .outputs import FLROutput, ThoughtInputs
from .verify import traits_of
from .vocabulary import refuse_shared_id

#: Arguments of a base model that the pieces are given one by one.
_OURS = (
    "input_ids",
    "inputs_embeds",
    "attention_mask",
    "position_ids",
    "past_key_values",
    "cache",
    "use_cache",
    "return_dict",
    "cache_position",
)


@dataclass
class Pending:
    """A call of the model whose forward is not ours, while it runs."""

    labels: Tensor | None
    num_items: Tensor | int | None
    made: FLROutput | None = None


def note_call(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Hook before a call of the model: keep its labels if somebody replaced our forward."""
    if not torch.compiler.is_compiling():
        refuse_shared_id(model)
    if isinstance(model.__dict__.get("forward"), Method):
        return
    model._flr_patch.pending = Pending(kwargs.get("labels"), kwargs.get("num_items_in_batch"))


def finish_call(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """Hook after it: the loss of a call that went around our forward gets the regularisers."""
    pending: Pending | None = model._flr_patch.pending
    model._flr_patch.pending = None
    if pending is not None and pending.made is not None and getattr(output, "loss", None) is not None:
        output.loss = output.loss + pending.made.loss
    return output


def flr_base_forward(self: Any, *args: Any, flr_inner: bool = False, **kwargs: Any) -> Any:
    """Forward of the base model ``self`` of a patched model.

    That of the base model it was, but for input_ids that contain thought tokens, or that should. ``flr_inner`` says
    that the call is our own, with ids beside embeddings.
    """
    model = self._flr_owner
    patch = model._flr_patch
    original = patch.base_forward(self)
    names = list(inspect.signature(type(self).forward).parameters)[1:]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    ids, past, pending = given.get("input_ids"), given.get(base_cache_name(self) or "cache"), patch.pending
    if flr_inner or ids is None or is_filled(past):
        return original(*args, **kwargs)
    mask, positions = given.get("attention_mask"), given.get("position_ids")
    is_thought = thoughts_among(patch.config, ids, None, past, None, mask)
    rest = {k: v for k, v in given.items() if k not in _OURS}
    made, labels = None, None if pending is None else pending.labels
    if is_thought is None and pending is not None:
        made = insertion_into(model, ThoughtInputs(), ids, past, mask, positions, labels, rest)
    if is_thought is None and made is None:
        if pending is None:
            _refuse_unseen(model)
        return original(*args, **kwargs)
    if patch.config.mixes:
        raise ValueError(
            "aggregation: expected thought where the base model is called by others, who take one state a token; got "
            "mixture, whose loss and predictions only the patched model's own forward knows"
        )
    embeds, keep_cache = model.get_input_embeddings()(ids), bool(given.get("use_cache"))
    seen = None if traits_of(model).embeds else ids
    if made is None:
        pieces = plain_pieces(embeds, mask, positions, is_thought, None)
        pieces.ids = seen
    else:
        pieces = with_thoughts(model, made, embeds, seen, mask, positions, None)
    batch = Batch(pieces, None, made, past, keep_cache, bool(rest.get("output_router_logits")))
    encoded = encode(model, batch, ThoughtInputs(), text_arguments(rest))
    if pending is not None:
        pending.made = encoded.encoder.output(_shares(labels, pending.num_items))
    states, layers = encoded.states(), encoded.encoder.all_layers(encoded.inverse)
    kept = {OUTPUT_CACHE: encoded.encoder.cache if keep_cache else None}
    routers: Any = encoded.encoder.all_routers()
    if routers is not None:
        return MoeModelOutputWithPast(last_hidden_state=states, hidden_states=layers, router_logits=routers, **kept)
    return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=states, hidden_states=layers, **kept)


def _refuse_unseen(model: Any) -> None:
    """Raise where a training runs the base model in a forward that replaced ours, and that was not called as a module.

    Nobody has seen the labels then, and no thought would be trained.
    """
    config, forward = model._flr_patch.config, model.__dict__.get("forward")
    replaced = forward is not None and not isinstance(forward, Method)
    trains = config.insert_thought and config.thought_count and model.training and torch.is_grad_enabled()
    if replaced and trains and _is_called(model):
        raise ValueError(
            "forward: expected a call of the model itself, whose hooks see the labels, got one of a forward that took "
            "the place of flr's; PEFT before 0.21 calls it so: upgrade it, or bring thought tokens"
        )


def _is_called(model: Any) -> bool:
    """Whether a method of ``model`` is running, somewhere above."""
    frame = sys._getframe(1)
    while frame is not None and frame.f_locals.get("self") is not model:
        frame = frame.f_back  # type: ignore[assignment]
    return frame is not None


def _shares(labels: Tensor | None, num_items: Tensor | int | None) -> Tensor | None:
    """Users' shares [B] in the regularisers, as in our own loss; None for equal ones."""
    if labels is None or num_items is None:
        return None
    return (labels[:, 1:] != IGNORE).sum(1) / num_items
