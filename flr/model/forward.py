"""The forward of a patched causal LM: the prompt is encoded once, the thought is made, only the rest follows.

Attention is causal, so neither the prompt's hidden states nor its keys and values depend on the thought. The input is
cut at the thought columns c_1 < c_2 < … and the base model runs over each piece once, on one KV cache:

    [0, c_1) ──> H ──> reasoner ──> embedding at c_1;   [c_1, c_2) ──> more of H ──> …;   [c_n, L)

Rows whose thoughts stand in different columns are shifted (whole rows, so that distances between tokens stay) until
the first thoughts share a column. The lm_head runs only on rows that have a label, or that the caller asked for.
Where no KV cache can be used (gradient checkpointing) every piece starts from column 0 again: the two-pass way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flr.config import IGNORE, FLRConfig

from .backbone import (
    OUTPUT_CACHE,
    cache_argument,
    is_checkpointing,
    position_limit,
    position_rows,
    reasoner_is_frozen,
    warn_once,
)
from .encoder import Encoder
from .group_forward import group_forward
from .head import head, row_losses
from .insertion import Insertion, follow, insertion, refuse_packed_positions, remember, warn_of_labels_everywhere
from .outputs import FLRCausalLMOutput, GroupInputs, ThoughtInputs
from .pieces import Pieces, inverse_columns, take_columns, thought_columns
from .vocabulary import embedding_of


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
    thought_start: int | None = None,
    insert_thought: bool | None = None,
    cache: Any = None,
    **kwargs: Any,
) -> Any:
    """Forward of a patched model: that of the model it was, plus

    Args:
        group: the result is then the :class:`flr.model.outputs.GroupOutput` of a latent GRPO step.
        thought_start, insert_thought: see :class:`flr.model.outputs.ThoughtInputs`; with ``inputs_embeds`` the first
            says that there are thoughts at all.
        kwargs: the others of :class:`flr.model.outputs.ThoughtInputs`, and what the base model takes.

    A thought token is recognised in ``input_ids`` only, and belongs to the prompt: after a prefill (``cache``, before
    transformers 5.24 ``past_key_values``, not empty) the prompt's hidden states are gone, and one among several tokens
    raises. A batch without thought tokens gets them unless ``insert_thought`` is False (see
    :mod:`flr.model.insertion`).
    """
    own = ThoughtInputs.taken_from(kwargs)
    own.thought_start, own.insert_thought = thought_start, insert_thought
    past_key_values = past_key_values if cache is None else cache  # two names of one argument
    if group is not None:
        return group_forward(self, input_ids, attention_mask, position_ids, own.reasoner_mask, group)
    config = self._flr_patch.config
    self._flr_patch.pending = None  # the call has come to us: see flr.model.bypass
    given: Any = input_ids if inputs_embeds is None else inputs_embeds
    attention_mask, position_ids = follow(past_key_values, given, attention_mask, position_ids)
    is_thought = thoughts_among(config, input_ids, inputs_embeds, past_key_values, own.thought_start)
    made = None
    if is_thought is None and not goes_on(past_key_values):
        made = place_of_thoughts(self, own, given, attention_mask, position_ids, labels, kwargs)
    if is_thought is None and made is None and labels is None:  # nothing of ours: the model as it was
        return self._flr_patch.original(self)(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            **cache_argument(self, past_key_values),
            **kwargs,
        )
    return_dict = kwargs.pop("return_dict", None)
    kwargs.pop("cache_position", None)  # of the whole input; a piece's follows from the cache
    if kwargs.get("output_attentions"):
        raise ValueError("output_attentions: expected False for a batch that is encoded in pieces, got True")
    if inputs_embeds is None:
        inputs_embeds = self.get_input_embeddings()(input_ids)
    keep_cache = _keeps_cache(self, use_cache, past_key_values, labels)
    if made is None:
        pieces = plain_pieces(inputs_embeds, attention_mask, position_ids, is_thought, own.reasoner_mask)
        batch = Batch(pieces, labels, None, past_key_values, keep_cache)
    else:
        pieces = with_thoughts(self, made, inputs_embeds, attention_mask, position_ids, own.reasoner_mask)
        moved = None if labels is None else take_columns(labels, made.source(), IGNORE)
        batch = Batch(pieces, moved, made, past_key_values, keep_cache)
    skip_logits = own.skip_logits
    if skip_logits is None:
        skip_logits = self.training and labels is not None and made is None
    encoded = encode(self, batch, own, kwargs, only_loss=skip_logits)
    loss = weights = None
    if encoded.labels is not None:
        loss, weights = _loss(self, encoded.encoder, encoded.labels, own)
    thoughts = encoded.encoder.output(weights)
    if loss is not None and thoughts is not None:
        loss = loss + thoughts.loss
    out = FLRCausalLMOutput(
        loss=loss,
        logits=None if skip_logits else _logits(self, encoded, logits_to_keep),
        hidden_states=encoded.encoder.all_layers(encoded.inverse),
        flr=thoughts,
        **{OUTPUT_CACHE: encoded.encoder.cache if batch.keep_cache else None},
    )
    return out.to_tuple() if return_dict is False else out


@dataclass
class Batch:
    """A batch as the base model will see it."""

    pieces: Pieces
    labels: Tensor | None  # in the columns of ``pieces``
    made: Insertion | None  # if the thoughts are not the caller's
    past: Any
    keep_cache: bool


@dataclass
class Encoded:
    """A batch that has been encoded."""

    encoder: Encoder
    labels: Tensor | None  # in the encoder's columns
    inverse: Tensor | None  # int64 [B, L], the encoder's column of each of the caller's; None where they are the same

    def states(self) -> Tensor:
        """Last hidden states [B, L, D] in the caller's columns."""
        hidden = self.encoder.last_hidden()
        return hidden if self.inverse is None else take_columns(hidden, self.inverse, 0)


def encode(model: Any, batch: Batch, own: ThoughtInputs, kwargs: dict[str, Any], only_loss: bool = False) -> Encoded:
    """Run the pieces of a batch with the thoughts between them; ``only_loss``: the last column may be left out."""
    pieces, labels, made, config = batch.pieces, batch.labels, batch.made, model._flr_patch.config
    checkpointing = model.training and is_checkpointing(model)
    source, columns, length = None, [], pieces.embeds.shape[1]
    if own.thought_start is not None and pieces.thinks:
        columns = list(range(own.thought_start, own.thought_start + config.num_thoughts))
    elif pieces.thinks:
        if not batch.keep_cache:
            pieces, source = pieces.shifted()
        if source is not None and labels is not None:
            labels = take_columns(labels, source, IGNORE)
        columns = thought_columns(pieces.is_thought)
    if checkpointing and columns:
        warn_once("gradient checkpointing excludes the KV cache: the prompt is encoded once more for every thought")
    stop = pieces.embeds.shape[1]
    if only_loss and not batch.keep_cache and stop > 1 and (not columns or columns[-1] < stop - 1):
        stop -= 1  # the last token predicts nothing: it needs no forward when only the loss is wanted
    encoder = Encoder(model, config, pieces, batch.past, not checkpointing, kwargs)
    encoder.run(columns, stop, own.thoughts)
    inverse = None if source is None else inverse_columns(source, length)
    if made is not None:
        inverse = made.inverse() if inverse is None else inverse.gather(1, made.inverse())
        if batch.keep_cache:
            remember(encoder.cache, made)
    return Encoded(encoder, labels, inverse)


def goes_on(past_key_values: Any) -> bool:
    """Whether there is a prompt before the batch."""
    return past_key_values is not None and past_key_values.get_seq_length() > 0


def _keeps_cache(model: Any, use_cache: bool | None, past_key_values: Any, labels: Tensor | None) -> bool:
    """Whether the caller gets a cache: as it asks, else as the base model does by default, but not for a loss."""
    if model.training and is_checkpointing(model):
        return False
    if use_cache is None:
        by_default = labels is None and not model.training and model.config.get_text_config().use_cache
        return past_key_values is not None or bool(by_default)
    return use_cache


def thoughts_among(
    config: FLRConfig, input_ids: Tensor | None, embeds: Tensor | None, past_key_values: Any, start: int | None
) -> Tensor | None:
    """bool [B, L], where thought tokens stand; None for a batch without any."""
    if config.thought_count == 0:
        return None
    past = goes_on(past_key_values)
    if input_ids is None:
        if embeds is None or start is None or past:
            return None
        columns = torch.arange(embeds.shape[1], device=embeds.device)
        return ((columns >= start) & (columns < start + config.num_thoughts)).expand(embeds.shape[:2])
    if past and input_ids.shape[1] == 1:
        return None  # a decoding step has nothing to look at
    is_thought: Any = input_ids == config.thought_token_id
    refusal = "input_ids: expected no thought token after the prefill, got one; pass it with the prompt"
    if past and input_ids.device.type != "cpu":  # a look would make the host wait
        if input_ids.device.type == "cuda":
            torch._assert_async(~is_thought.any(), refusal)
        return None
    thinks = (start is not None and not past) or bool(is_thought.any())
    if past and thinks:
        raise ValueError(refusal)
    return is_thought if thinks else None


def place_of_thoughts(
    model: Any,
    own: ThoughtInputs,
    given: Tensor | None,
    mask: Any,
    positions: Tensor | None,
    labels: Tensor | None,
    kwargs: dict[str, Any],
) -> Insertion | None:
    """Where thoughts go into a batch without any; None where none are wanted."""
    config = model._flr_patch.config
    wanted = config.insert_thought if own.insert_thought is None else own.insert_thought
    if not wanted or config.thought_count == 0 or given is None:
        return None
    if model.training and labels is None and kwargs.get("shift_labels") is None:
        raise ValueError(
            "labels: expected labels in training, which say where the prompt ends and the thought belongs, got none; "
            "bring thought tokens, or turn insertion off with insert_thought=False"
        )
    _refuse_too_long(model, given.shape[1], positions)
    made = insertion(given.shape[:2], given.device, config.num_thoughts, mask, labels, kwargs)
    refuse_packed_positions(positions, mask)
    if model.training and not model._flr_patch.checked:
        model._flr_patch.checked = True
        warn_of_labels_everywhere(made.place, mask)
        if reasoner_is_frozen(model):
            warn_once(
                "the reasoner is frozen while other weights are trained, so the thought stays random: give PEFT's "
                'config modules_to_save=["flr"]'
            )
    return made


def _refuse_too_long(model: Any, length: int, positions: Tensor | None) -> None:
    """Raise where the thoughts are what a learned table of positions has no row for."""
    thoughts, limit = model._flr_patch.config.num_thoughts, position_limit(model.config)
    if positions is None and limit is not None and length <= limit < length + thoughts and position_rows(model):
        raise ValueError(
            f"input_ids: expected at most {limit - thoughts} tokens, since the model has {limit} positions and "
            f"{thoughts} of them are for thoughts, got {length}"
        )


def with_thoughts(
    model: Any, made: Insertion, embeds: Tensor, mask: Any, positions: Tensor | None, reasoner_mask: Tensor | None
) -> Pieces:
    """A batch [B, L, D] that gets the thoughts ``made``."""
    token = embedding_of(model, model._flr_patch.config.thought_token_id, embeds.device)
    return made.pieces(embeds, mask, positions, reasoner_mask, token)


def plain_pieces(
    embeds: Tensor,
    attention_mask: Any,
    position_ids: Tensor | None,
    is_thought: Tensor | None,
    reasoner_mask: Tensor | None,
) -> Pieces:
    thinks = is_thought is not None
    if is_thought is None:
        is_thought = torch.zeros(embeds.shape[:2], dtype=torch.bool, device=embeds.device)
    if reasoner_mask is not None and reasoner_mask.shape != is_thought.shape:
        raise ValueError(f"reasoner_mask: expected shape {tuple(is_thought.shape)}, got {tuple(reasoner_mask.shape)}")
    return Pieces(embeds, attention_mask, position_ids, is_thought, reasoner_mask, thinks)


def _logits(model: Any, encoded: Encoded, keep: int | Tensor) -> Tensor:
    """Logits of the columns asked for, in the caller's order of columns."""
    hidden = encoded.states()
    if isinstance(keep, Tensor):
        hidden = hidden[:, keep]
    elif keep:
        hidden = hidden[:, -keep:]
    return head(model, hidden)


def _loss(model: Any, encoder: Encoder, labels: Tensor, own: ThoughtInputs) -> tuple[Tensor, Tensor | None]:
    """Cross-entropy over target tokens, and users' shares in the regularisers (None for equal ones)."""
    fixed_shapes = own.thought_start is not None and encoder.use_cache  # labels stand in the last piece only
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
