"""A batch before it is encoded, where its thoughts are or shall be, and its encoding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flr.config import IGNORE, FLRConfig

from .backbone import is_checkpointing, may_look, position_limit, position_rows, reasoner_is_frozen, warn_once
from .base import is_filled
from .encoder import Encoder
from .insertion import (
    Insertion,
    insertion,
    refuse_packed_positions,
    remember,
    thought_tokens,
    warn_of_labels_everywhere,
)
from .outputs import ThoughtInputs
from .pieces import Pieces, inverse_columns, take_columns, thought_columns
from .verify import traits_of
from .vocabulary import embedding_of


@dataclass
class Batch:
    """A batch as the base model will see it."""

    pieces: Pieces
    labels: Tensor | None  # in the columns of ``pieces``
    made: Insertion | None  # if the thoughts are not the caller's
    past: Any
    keep_cache: bool
    routes: bool = False  # whether the routers' balance over the caller's columns is wanted


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
    traits, checkpointing = traits_of(model), model.training and is_checkpointing(model)
    source, columns, length = None, [], pieces.embeds.shape[1]
    if own.thought_start is not None and pieces.thinks:
        columns = [own.thought_start + n for n in range(config.num_thoughts)]
    elif pieces.thinks:
        if not batch.keep_cache and traits.left_padding and not batch.routes:  # routing counts the caller's columns
            pieces, source = pieces.shifted()
        if source is not None and labels is not None:
            # nothing predicts a caller's first column; a shifted row would let padding do it
            labels = take_columns(labels, source, IGNORE).masked_fill(source == 0, IGNORE)
        columns = thought_columns(pieces.is_thought)
    if checkpointing and columns:
        warn_once("gradient checkpointing excludes the KV cache: the prompt is encoded once more for every thought")
    stop = pieces.embeds.shape[1]
    cut = only_loss and not batch.keep_cache and not batch.routes and stop > 1
    if cut and (not columns or columns[-1] < stop - 1):
        stop -= 1  # the last token predicts nothing: it needs no forward when only the loss is wanted
    in_pieces = traits.pieces and (traits.gradients or not torch.is_grad_enabled()) and not checkpointing
    in_pieces = in_pieces and (len(columns) > 0 or batch.past is not None)
    encoder = Encoder(model, config, pieces, batch.past, in_pieces, batch.keep_cache, kwargs)
    encoder.run(columns, stop, own.thoughts)
    inverse = None if source is None else inverse_columns(source, length)
    if made is not None:
        inverse = made.inverse() if inverse is None else inverse.gather(1, made.inverse())
        if batch.keep_cache and encoder.cache is not None:
            remember(encoder.cache, made)
    return Encoded(encoder, labels, inverse)


def thoughts_among(
    config: FLRConfig, input_ids: Tensor | None, embeds: Tensor | None, past: Any, start: int | None, mask: Any = None
) -> Tensor | None:
    """bool [B, L], where thought tokens stand that ``mask`` does not hide; None for a batch without any."""
    if config.thought_count == 0:
        return None
    goes_on = is_filled(past)
    if input_ids is None:
        if embeds is None or start is None or goes_on:
            return None
        columns = torch.arange(embeds.shape[1], device=embeds.device)
        return ((columns >= start) & (columns < start + config.num_thoughts)).expand(embeds.shape[:2])
    if goes_on and input_ids.shape[1] == 1:
        return None  # a decoding step has nothing to look at
    is_thought: Any = thought_tokens(config, input_ids, mask)
    refusal = "input_ids: expected no thought token after the prefill, got one; pass it with the prompt"
    if not may_look(input_ids) and start is not None and not goes_on:
        return is_thought
    if goes_on and input_ids.device.type != "cpu":  # a look would make the host wait
        if input_ids.device.type == "cuda":
            torch._assert_async(~is_thought.any(), refusal)
        return None
    thinks = (start is not None and not goes_on) or bool(is_thought.any())
    if goes_on and thinks:
        raise ValueError(refusal)
    return is_thought if thinks else None


def insertion_into(
    model: Any,
    own: ThoughtInputs,
    given: Tensor | None,
    past: Any,
    mask: Any,
    positions: Tensor | None,
    labels: Tensor | None,
    kwargs: dict[str, Any],
) -> Insertion | None:
    """Where thoughts go into a batch without any; None where none are wanted, or the prompt was before it."""
    config = model._flr_patch.config
    wanted = config.insert_thought if own.insert_thought is None else own.insert_thought
    if not wanted or config.thought_count == 0 or given is None:
        return None
    if is_filled(past):
        if model.training and labels is not None:  # as PEFT's prefix tuning calls it
            raise ValueError(
                "past_key_values: expected no tokens in the cache in training, since a thought reads the states of the "
                "whole prompt, got some; turn insertion off with insert_thought=False to train without a thought"
            )
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
    model: Any,
    made: Insertion,
    embeds: Tensor,
    ids: Tensor | None,
    mask: Any,
    positions: Tensor | None,
    reasoner_mask: Tensor | None,
) -> Pieces:
    """A batch [B, L, D] that gets the thoughts ``made``; ``ids`` for families that look at them."""
    token = model._flr_patch.config.thought_token_id
    pieces = made.pieces(embeds, mask, positions, reasoner_mask, embedding_of(model, token, embeds.device))
    if ids is not None:
        pieces.ids = take_columns(ids, made.source(), token)
    return pieces


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
