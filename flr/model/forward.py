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

from flr.config import IGNORE, FLRConfig

from .backbone import is_checkpointing, warn_once
from .base import base_of, cache_name, given, is_filled, text_arguments
from .encoder import Encoder
from .group_forward import group_forward
from .head import head, row_losses
from .outputs import FLRCausalLMOutput, FLROutput, GroupInputs, ThoughtInputs
from .own_forward import original_forward, router_loss, wants_router_loss
from .pieces import Pieces, inverse_columns, take_columns, thought_columns
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
    group: GroupInputs | None = None,
    **kwargs: Any,
) -> Any:
    """Forward of a patched model: that of the model it was, plus

    Args:
        group: the result is then the :class:`flr.model.outputs.GroupOutput` of a latent GRPO step.
        kwargs: those of :class:`flr.model.outputs.ThoughtInputs`, and what the base model takes.

    A thought token is recognised in ``input_ids`` only, and belongs to the prompt: after a prefill (``past_key_values``
    not empty) the prompt's hidden states are gone, and one among several tokens raises (on the CPU: a look is free).
    """
    own = ThoughtInputs.taken_from(kwargs)
    if group is not None:
        return group_forward(self, input_ids, attention_mask, position_ids, own.reasoner_mask, group)
    traits, name = traits_of(self), cache_name(base_of(self))
    if name is not None and name in kwargs:
        past_key_values = kwargs.pop(name)
    is_thought = _thoughts_among(self._flr_patch.config, input_ids, past_key_values, own.thought_start)
    if is_thought is None and labels is None:  # nothing of ours: the model as it was
        return original_forward(self)(
            **given(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                inputs_embeds=inputs_embeds,
                use_cache=use_cache,
                logits_to_keep=None if isinstance(logits_to_keep, int) and logits_to_keep == 0 else logits_to_keep,
                **{name or "past_key_values": past_key_values},
            ),
            **kwargs,
        )
    return_dict = kwargs.get("return_dict")
    token_types = kwargs.pop("token_type_ids", None)
    kwargs = text_arguments(kwargs)
    routes = wants_router_loss(self, kwargs.get("output_router_logits"))
    if routes:
        kwargs["output_router_logits"] = True
    if inputs_embeds is None:
        inputs_embeds = self.get_input_embeddings()(input_ids)
    pieces = _pieces(inputs_embeds, attention_mask, position_ids, is_thought, own.reasoner_mask)
    pieces.token_types, pieces.ids = token_types, None if traits.embeds else _tokens(self, input_ids)
    checkpointing = self.training and is_checkpointing(self)
    if checkpointing and is_thought is not None:
        warn_once("gradient checkpointing excludes the KV cache: the prompt is encoded once more for every thought")
    keep_cache = (use_cache if use_cache is not None else past_key_values is not None) and not checkpointing
    targets, source, columns = labels, None, []
    if is_thought is not None and own.thought_start is not None:
        columns = list(range(own.thought_start, own.thought_start + self._flr_patch.config.num_thoughts))
    elif is_thought is not None:
        if not keep_cache and traits.left_padding and not routes:  # routing counts the caller's columns
            pieces, source = pieces.shifted()
        if source is not None and labels is not None:
            # nothing predicts a caller's first column; a shifted row would let padding do it
            targets = take_columns(labels, source, IGNORE).masked_fill(source == 0, IGNORE)
        columns = thought_columns(pieces.is_thought)
    skip_logits = self.training and labels is not None if own.skip_logits is None else own.skip_logits
    stop = pieces.embeds.shape[1]
    if skip_logits and not keep_cache and not routes and stop > 1 and (not columns or columns[-1] < stop - 1):
        stop -= 1  # the last token predicts nothing: it needs no forward when only the loss is wanted

    in_pieces = traits.pieces and (traits.gradients or not torch.is_grad_enabled()) and not checkpointing
    in_pieces = in_pieces and (len(columns) > 0 or past_key_values is not None)
    encoder = Encoder(self, self._flr_patch.config, pieces, past_key_values, in_pieces, keep_cache, kwargs)
    encoder.run(columns, stop, own.thoughts)
    loss, made, aux_loss = _losses(self, encoder, targets, own)
    inverse = None if source is None else inverse_columns(source, inputs_embeds.shape[1])
    out = FLRCausalLMOutput(
        loss=loss,
        logits=None if skip_logits else _logits(self, encoder, inverse, logits_to_keep),
        hidden_states=encoder.all_layers(inverse),
        flr=made,
        aux_loss=aux_loss,
        router_logits=encoder.all_routers(),
    )
    if keep_cache and name is not None:
        out[name] = encoder.cache
    return out.to_tuple() if return_dict is False else out


def _thoughts_among(
    config: FLRConfig, input_ids: Tensor | None, past_key_values: Any, thought_start: int | None
) -> Tensor | None:
    """bool [B, L], where thought tokens stand; None for a batch without any."""
    if input_ids is None or config.thought_count == 0:
        return None
    past = is_filled(past_key_values)
    if past and (input_ids.device.type != "cpu" or input_ids.shape[1] == 1):
        return None  # a look would wait for the device, and a decoding step has nothing to look at
    is_thought: Any = input_ids == config.thought_token_id
    thinks = (thought_start is not None and not past) or bool(is_thought.any())
    if past and thinks:
        raise ValueError("input_ids: expected no thought token after the prefill, got one; pass it with the prompt")
    return is_thought if thinks else None


def _pieces(
    embeds: Tensor,
    attention_mask: Any,
    position_ids: Tensor | None,
    is_thought: Tensor | None,
    reasoner_mask: Tensor | None,
) -> Pieces:
    if is_thought is None:
        is_thought = torch.zeros(embeds.shape[:2], dtype=torch.bool, device=embeds.device)
    if reasoner_mask is not None and reasoner_mask.shape != is_thought.shape:
        raise ValueError(f"reasoner_mask: expected shape {tuple(is_thought.shape)}, got {tuple(reasoner_mask.shape)}")
    return Pieces(embeds, attention_mask, position_ids, is_thought, reasoner_mask)


def _logits(model: Any, encoder: Encoder, inverse: Tensor | None, keep: int | Tensor) -> Tensor:
    """Logits of the columns asked for, in the caller's order of columns."""
    hidden = encoder.last_hidden()
    if inverse is not None:
        hidden = take_columns(hidden, inverse, 0)
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
    if loss is not None and made is not None:
        loss = loss + made.loss
    if loss is not None and routers is not None:
        added, aux_loss = router_loss(model, encoder.last_hidden(), routers, encoder.inputs.mask)
        loss = loss + added.to(loss.device)
    return loss, made, aux_loss


def _loss(model: Any, encoder: Encoder, labels: Tensor, own: ThoughtInputs) -> tuple[Tensor, Tensor | None]:
    """Cross-entropy over target tokens, and users' shares in the regularisers (None for equal ones)."""
    fixed_shapes = own.thought_start is not None and encoder.in_pieces  # labels stand in the last piece only
    hidden = encoder.hidden[-1] if fixed_shapes else encoder.last_hidden()
    offset = encoder.done - hidden.shape[1]
    next_label = labels[:, offset + 1 : offset + 1 + hidden.shape[1]]
    hidden = hidden[:, : next_label.shape[1]]
    counts = (next_label != IGNORE).sum(1)  # [B]
    if fixed_shapes:
        hidden, target = hidden.flatten(0, 1), next_label.flatten()
    else:
        chosen = next_label != IGNORE
        hidden, target = hidden[chosen], next_label[chosen]
    total = (own.catalogue_loss or row_losses)(model, hidden, target, own.label_smoothing).sum()
    if own.num_items_in_batch is None:
        return total / counts.sum().clamp_min(1), None
    return total / own.num_items_in_batch, counts / own.num_items_in_batch
