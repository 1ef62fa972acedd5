"""The forward of a patched causal LM: the prompt is encoded once, the thought is made, only the rest follows.

Attention is causal, so neither the prompt's hidden states nor its keys and values depend on the thought. The input is
cut at the thought columns c_1 < c_2 < … and the base model runs over each piece once, on one KV cache:

    [0, c_1) ──> H ──> reasoner ──> embedding at c_1;   [c_1, c_2) ──> more of H ──> …;   [c_n, L)

Rows whose thoughts stand in different columns are shifted (whole rows, so that distances between tokens stay) until
the first thoughts share a column. The lm_head runs only on rows that have a label, or that the caller asked for.
Where no KV cache can be used (gradient checkpointing) every piece starts from column 0 again: the two-pass way.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flr.config import IGNORE

from .backbone import is_checkpointing
from .base import base_cache_name, base_of, given, text_arguments
from .batch import Batch, Encoded, encode, insertion_into, plain_pieces, thoughts_among, with_thoughts
from .encoder import Encoder
from .factor_mixture import mixture_forward
from .group_forward import group_forward
from .head import head, row_losses
from .insertion import follow
from .outputs import FLRCausalLMOutput, FLROutput, ThoughtInputs
from .own_forward import original_forward, router_loss, wants_router_loss
from .pieces import take_columns
from .verify import traits_of


def flr_forward(
    self: Any,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    past_key_values: Any = None,
    inputs_embeds: Tensor | None = None,
    labels: Tensor | None = None,
    use_cache: bool | None = None,
    logits_to_keep: int | Tensor = 0,
    thought_start: int | None = None,
    insert_thought: bool | None = None,
    cache: Any = None,
    **kwargs: Any,
) -> Any:
    """Forward of a patched model: that of the model it was, plus

    Args:
        thought_start, insert_thought: see :class:`flr.model.outputs.ThoughtInputs`; with ``inputs_embeds`` the first
            says that there are thoughts at all.
        kwargs: the others of :class:`flr.model.outputs.ThoughtInputs`, and what the base model takes; ``group``, a
            :class:`flr.model.outputs.GroupInputs`, makes the result the ``GroupOutput`` of a latent GRPO step. It is no
            parameter of its own, since Trainer would pass on a column of that name.

    A thought token is recognised in ``input_ids`` only, and belongs to the prompt: after a prefill (``cache``, before
    transformers 5.24 ``past_key_values``, not empty) the prompt's hidden states are gone, and one among several tokens
    raises. A batch without thought tokens gets them unless ``insert_thought`` is False (see
    :mod:`flr.model.insertion`).
    """
    own = ThoughtInputs.taken_from(kwargs)
    own.thought_start, own.insert_thought = thought_start, insert_thought
    if (group := kwargs.pop("group", None)) is not None:
        return group_forward(self, input_ids, attention_mask, position_ids, own.reasoner_mask, group)
    self._flr_patch.pending = None  # the call has come to us: see flr.model.bypass
    name = base_cache_name(base_of(self))
    past = past_key_values if cache is None else cache  # two names of one argument; a third is the family's own
    if name is not None and name in kwargs:
        past = kwargs.pop(name)
    rows = input_ids if inputs_embeds is None else inputs_embeds
    attention_mask, position_ids = follow(past, rows, attention_mask, position_ids)
    is_thought = thoughts_among(self._flr_patch.config, input_ids, inputs_embeds, past, thought_start, attention_mask)
    made = None
    if is_thought is None:
        made = insertion_into(self, own, rows, past, attention_mask, position_ids, labels, kwargs)
    if is_thought is None and made is None and labels is None:  # nothing of ours: the model as it was
        return original_forward(self)(
            **given(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                inputs_embeds=inputs_embeds,
                use_cache=use_cache,
                logits_to_keep=None if isinstance(logits_to_keep, int) and logits_to_keep == 0 else logits_to_keep,
                **{name or "past_key_values": past},
            ),
            **kwargs,
        )
    return_dict, token_types = kwargs.get("return_dict"), kwargs.pop("token_type_ids", None)
    kwargs = text_arguments(kwargs)
    routes = wants_router_loss(self, kwargs.get("output_router_logits"))
    if routes:
        kwargs["output_router_logits"] = True
    ids = input_ids if traits_of(self).embeds else _tokens(self, input_ids)
    if inputs_embeds is None:
        inputs_embeds = self.get_input_embeddings()(input_ids)
    if made is None:
        pieces = plain_pieces(inputs_embeds, attention_mask, position_ids, is_thought, own.reasoner_mask)
        pieces.token_types, pieces.ids = token_types, ids
    else:
        pieces = with_thoughts(self, made, inputs_embeds, ids, attention_mask, position_ids, own.reasoner_mask)
        labels = None if labels is None else take_columns(labels, made.source(), IGNORE)
    if self._flr_patch.config.mixes and own.thoughts is None and pieces.thinks:
        apart = {"use_cache": use_cache, "output_router_logits": routes, **kwargs}
        return mixture_forward(self, Batch(pieces, labels, made, past, False), own, apart, logits_to_keep, return_dict)
    batch = Batch(pieces, labels, made, past, _keeps_cache(self, use_cache, past, labels), routes)
    return _result(self, batch, own, kwargs, logits_to_keep, return_dict)


def _result(
    model: Any, batch: Batch, own: ThoughtInputs, kwargs: dict[str, Any], logits_to_keep: Any, return_dict: Any
) -> Any:
    skip_logits = own.skip_logits
    if skip_logits is None:
        skip_logits = model.training and batch.labels is not None and batch.made is None
    encoded = encode(model, batch, own, kwargs, only_loss=skip_logits)
    loss, thoughts, aux_loss = _losses(model, encoded.encoder, encoded.labels, own)
    out = FLRCausalLMOutput(
        loss=loss,
        logits=None if skip_logits else _logits(model, encoded, logits_to_keep),
        hidden_states=encoded.encoder.all_layers(encoded.inverse),
        flr=thoughts,
        aux_loss=aux_loss,
        router_logits=encoded.encoder.all_routers(),
    )
    name = base_cache_name(base_of(model))
    if batch.keep_cache and name is not None:
        out[name] = encoded.encoder.cache
    out.order(name)
    return out.to_tuple() if return_dict is False else out


def _keeps_cache(model: Any, use_cache: bool | None, past: Any, labels: Tensor | None) -> bool:
    """Whether the caller gets a cache: as it asks, else as the base model does by default, but not for a loss."""
    if model.training and is_checkpointing(model):
        return False
    if use_cache is None:
        default = getattr(model.config.get_text_config(decoder=True), "use_cache", False)
        return past is not None or bool(labels is None and not model.training and default)
    return use_cache


def _logits(model: Any, encoded: Encoded, keep: int | Tensor) -> Tensor:
    """Logits of the columns asked for, in the caller's order of columns."""
    hidden = encoded.states()
    if isinstance(keep, Tensor):
        hidden = hidden[:, keep]
    elif keep:
        hidden = hidden[:, -keep:]
    return head(model, hidden)


def _tokens(model: Any, input_ids: Tensor | None) -> Tensor:
    if input_ids is None:
        name = type(model).__name__
        raise ValueError(f"input_ids: expected int64 [B, L], which {name} looks at beside embeddings, got None")
    return input_ids


def _losses(
    model: Any, encoder: Encoder, targets: Tensor | None, own: ThoughtInputs
) -> tuple[Tensor | None, FLROutput | None, Tensor | None]:
    """The loss, of cross-entropy, the reasoner's regularisers and the routers' balance; the thoughts; the last part."""
    loss = weights = aux_loss = None
    if targets is not None:
        loss, weights = _loss(model, encoder, targets, own)
    made, routers = encoder.output(weights), encoder.all_routers()
    if own.row_losses:
        return loss, made, None
    if loss is not None and made is not None:
        loss = loss + made.loss
    if loss is not None and routers is not None:
        added, aux_loss = router_loss(model, encoder.last_hidden(), routers, encoder.inputs.mask)
        loss = loss + added.to(loss.device)
    return loss, made, aux_loss


def _loss(model: Any, encoder: Encoder, labels: Tensor, own: ThoughtInputs) -> tuple[Tensor, Tensor | None]:
    """Cross-entropy over target tokens, and users' shares in the regularisers (None for equal ones)."""
    if own.thought_start is None:
        hidden = encoder.last_hidden()
    elif encoder.in_pieces:
        hidden = encoder.hidden[-1]  # labels stand in the last piece only
    else:  # and behind the thoughts
        hidden = encoder.last_hidden()[:, max(0, own.thought_start + encoder.config.thought_count - 1) :]
    offset = encoder.done - hidden.shape[1]
    next_label = labels[:, offset + 1 : offset + 1 + hidden.shape[1]]
    hidden = hidden[:, : next_label.shape[1]]
    counts = (next_label != IGNORE).sum(1)  # [B]
    if own.soft_targets is not None:
        place = (next_label != IGNORE).int().argmax(1)  # of a row's one label
        total = own.soft_loss(model, hidden[torch.arange(len(place), device=place.device), place])
    else:
        total = _hard_loss(model, hidden, next_label, own)
    if own.row_losses:
        return total, None
    if own.num_items_in_batch is None:
        return total / counts.sum().clamp_min(1), None
    return total / own.num_items_in_batch, counts / own.num_items_in_batch


def _hard_loss(model: Any, hidden: Tensor, next_label: Tensor, own: ThoughtInputs) -> Tensor:
    """Cross-entropy of labels [B, S] after hidden [B, S, D], summed; with ``row_losses`` that of each row, [B]."""
    if own.thought_start is not None or own.row_losses:
        hidden, target = hidden.flatten(0, 1), next_label.flatten()
    else:
        chosen = next_label != IGNORE
        hidden, target = hidden[chosen], next_label[chosen]
    losses = (own.catalogue_loss or row_losses)(model, hidden, target, own.label_smoothing)
    return losses.view(next_label.shape).sum(1) if own.row_losses else losses.sum()
