"""Factors that are mixed for the prediction: ``aggregation="mixture"``.

Every factor makes a thought of its own, and the gates of the last refinement weigh what is predicted after it:

    thought_k  = anchor + f_k
    log p(y)   = logsumexp_k ( log g_k + Σ_s log p(y_s | prompt, thought_k, y_<s) )
    loss       = - Σ_users log p(y) / number of target tokens  +  regularisers

and the next token after y_<s has the probability Σ_k w_k p(· | prompt, thought_k, y_<s), where the w_k are the factors'
posterior weights, proportional to g_k p(y_<s | prompt, thought_k). One state under one softmax multiplies evidence, the
mixture adds it. ``log p(y_s | …)`` is over the vocabulary or, with a catalogue loss, over the siblings of y_s.

The K thoughts and what follows each of them are one packed row behind one copy of the prompt, as in the group forward:
each sees the prompt and its own tokens, all at the positions that one thought would have.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flr.config import IGNORE

from .backbone import is_checkpointing, may_look
from .base import is_filled
from .batch import Batch
from .encoder import thoughts_made
from .group_forward import target_logprobs
from .head import head
from .outputs import FLRCausalLMOutput, ThoughtInputs
from .packed_members import PackedMembers, Prompt, encode_prompts
from .pieces import Pieces, inverse_columns, take_columns, thought_columns
from .reasoner import ReasonerOutput
from .verify import traits_of


@dataclass
class FactorStates:
    """Prompts of B users, and what follows each of their K thoughts."""

    prompt: Prompt  # of L tokens
    history: Tensor  # [B, L, D], states of the prompt
    made: ReasonerOutput
    anchor: Tensor  # [B, D]
    thoughts: Tensor  # [B, K, D], embeddings
    members: PackedMembers
    hidden: Tensor  # [B, K, S, D], states after the thought and S - 1 tokens

    @property
    def log_gates(self) -> Tensor:
        return self.made.log_gates  # [B, K]


def encode_factors(model: Any, pieces: Pieces, column: int, stop: int) -> FactorStates:
    """Run prompts up to ``column``, which holds every row's thought, make the thoughts, and run columns up to ``stop``.

    Raises:
        ValueError: an empty prompt, masks or positions that several thoughts cannot share.
    """
    config, embeds = model._flr_patch.config, pieces.embeds
    mask, positions = _mask(pieces, column), _positions(pieces, column)
    ids, history_ids = pieces.ids, None
    if ids is None:
        ids = embeds.new_full(embeds.shape[:2], config.thought_token_id, dtype=torch.int64)
    elif not traits_of(model).embeds:
        history_ids = ids[:, :column]
    tokens = None if pieces.ids is None or not torch.is_grad_enabled() else pieces.ids[:, :column]
    cached = not (model.training and is_checkpointing(model))
    seen, before = mask[:, :column], embeds[:, :column]
    history, kv = encode_prompts(model, before, history_ids, seen, positions[:, :column], cached, tokens)
    made = model.flr(history, pieces.valid(column), column - 1)
    r = torch.nn.functional.dropout(made.factors, config.dropout, model.training)
    anchors = {"token": embeds.select(1, column), "last": embeds.select(1, column - 1)}
    anchor = anchors.get(config.anchor, torch.zeros_like(anchors["token"]))
    thoughts = anchor[:, None] + r.to(anchor.dtype)  # [B, K, D]
    prompt = Prompt(before, history_ids, kv, seen, positions[:, column : column + 1])
    members = PackedMembers(model, prompt, config.num_factors, stop - column)
    behind = embeds[:, None, column + 1 : stop].expand(-1, config.num_factors, -1, -1)
    tokens = ids[:, None, column:stop].expand(-1, config.num_factors, -1)
    hidden = members.run(torch.cat([thoughts[:, :, None], behind.to(thoughts.dtype)], 2), tokens)
    return FactorStates(prompt, history, made, anchor, thoughts, members, hidden)


def _mask(pieces: Pieces, column: int) -> Tensor:
    """[B, L], not 0 on tokens; behind the thought what is not one must stand at the end."""
    mask: Any = pieces.mask
    if mask is None:
        return torch.ones(pieces.embeds.shape[:2], dtype=torch.int64, device=pieces.embeds.device)
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        got = f"{mask.dim()}-D" if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"attention_mask: expected [B, L] with aggregation mixture, got {got}")
    behind = mask[:, column:].bool()
    if may_look(mask) and bool((behind[:, 1:] & ~behind[:, :-1]).any()):
        raise ValueError("attention_mask: expected no gap behind a thought with aggregation mixture, got one")
    return mask


def _positions(pieces: Pieces, column: int) -> Tensor:
    """[B, L]; from the thought on they count by one, since every thought's tokens begin at the same position."""
    batch, length = pieces.embeds.shape[:2]
    positions = pieces.positions
    if positions is None:
        return torch.arange(length, device=pieces.embeds.device).expand(batch, -1)
    if positions.dim() != 2:
        raise ValueError(f"position_ids: expected [B, L] with aggregation mixture, got {list(positions.shape)}")
    if may_look(positions):
        odd = positions[:, column:].diff(dim=1) != 1
        mask: Any = pieces.mask
        if mask is not None:
            odd = odd & mask[:, column + 1 :].bool()
        if bool(odd.any()):
            raise ValueError("position_ids: expected to count by one from a thought on with aggregation mixture")
    return positions.expand(batch, length)


def joint_logprobs(
    model: Any, states: FactorStates, targets: Tensor, catalogue_loss: Any = None
) -> tuple[Tensor, Tensor]:
    """log g_k + log p(targets | thought_k) [B, K], and which of ``targets`` int64 [B, S] count, bool [B, S].

    With a ``catalogue_loss``, targets are its nodes.
    """
    counted = targets != IGNORE
    hidden = states.hidden[:, :, : targets.shape[1]]
    logprobs = target_logprobs(model, hidden, targets[:, None], counted[:, None], catalogue_loss)  # [B, K, S]
    return states.log_gates + logprobs.sum(-1), counted


def mixture_forward(
    model: Any, batch: Batch, own: ThoughtInputs, kwargs: dict[str, Any], logits_to_keep: Any, return_dict: Any
) -> Any:
    """The forward of a batch with thoughts under ``aggregation="mixture"``; see :func:`flr.model.forward.flr_forward`.

    Logits are log-probabilities of the mixture, over the vocabulary; there is no cache.

    Raises:
        ValueError: rows without a thought or with several, labels before it, and what a mixture has no answer to: a
            cache, hidden states, label smoothing, routing losses.
    """
    _refuse(batch, own, kwargs)
    pieces, labels, source = batch.pieces, batch.labels, None
    length = pieces.embeds.shape[1]
    if own.thought_start is not None:
        column = own.thought_start
    else:
        pieces, source = pieces.shifted()
        labels = labels if labels is None or source is None else take_columns(labels, source, IGNORE)
        column = _thought_column(pieces, labels)
    skip_logits = own.skip_logits
    if skip_logits is None:
        skip_logits = model.training and labels is not None and batch.made is None
    stop = pieces.embeds.shape[1]
    if skip_logits and stop - 1 > column:
        stop -= 1  # the last token predicts nothing
    states = encode_factors(model, pieces, column, stop)
    loss = weights = None
    if labels is not None:
        loss, weights = _loss(model, states, labels[:, column + 1 : stop + 1], own)
    everyone = torch.ones(len(pieces.embeds), dtype=torch.bool, device=pieces.embeds.device)
    thoughts = thoughts_made(model._flr_patch.config, [states.made], [everyone], weights)
    logits = None
    if not skip_logits:
        inverse = None if source is None else inverse_columns(source, length)
        if batch.made is not None:
            inverse = batch.made.inverse() if inverse is None else inverse.gather(1, batch.made.inverse())
        logits = _logits(model, states, pieces, _chosen(pieces, inverse, logits_to_keep))
    if loss is not None and not own.row_losses:
        loss = loss + thoughts.loss
    out = FLRCausalLMOutput(loss=loss, logits=logits, flr=thoughts)
    return out.to_tuple() if return_dict is False else out


def _refuse(batch: Batch, own: ThoughtInputs, kwargs: dict[str, Any]) -> None:
    if is_filled(batch.past):
        raise ValueError("past_key_values: expected none with aggregation mixture, got a cache that holds tokens")
    if own.label_smoothing:
        got = own.label_smoothing
        raise ValueError(f"label_smoothing: expected 0 with aggregation mixture, got {got}")
    if batch.pieces.token_types is not None:
        raise ValueError("token_type_ids: expected None with aggregation mixture, got a tensor")
    for name, value in kwargs.items():
        if value:
            hint = "; flr.decode continues prompts of a mixture" if name == "use_cache" else ""
            raise ValueError(f"{name}: expected False with aggregation mixture, got {value!r:.80}{hint}")


def _thought_column(pieces: Pieces, labels: Tensor | None) -> int:
    """The column of every row's one thought."""
    columns = thought_columns(pieces.is_thought)
    if len(columns) != 1 or not bool(pieces.is_thought[:, columns[0]].all()):
        least, most = int(pieces.is_thought.sum(1).min()), int(pieces.is_thought.sum(1).max())
        raise ValueError(
            f"input_ids: expected one thought token in every row with aggregation mixture, got {least} to {most}"
        )
    column = columns[0]
    if column == 0:
        raise ValueError("input_ids: expected a token before the thought with aggregation mixture, got none")
    if labels is not None and bool((labels[:, 1 : column + 1] != IGNORE).any()):
        raise ValueError("labels: expected -100 up to the thought, which a mixture predicts nothing before, got others")
    return column


def _loss(model: Any, states: FactorStates, targets: Tensor, own: ThoughtInputs) -> tuple[Tensor, Tensor | None]:
    """-Σ log p of the targets [B, S] by their number, and users' shares in the regularisers (None for equal ones).

    With ``row_losses`` -log p of each row, [B].
    """
    if own.soft_targets is not None:
        counts = (targets != IGNORE).sum(1)
        total = own.soft_loss(model, states.hidden[:, :, 0], states.log_gates)
    else:
        joint, counted = joint_logprobs(model, states, targets, own.catalogue_loss)
        counts = counted.sum(1)
        losses = -joint.logsumexp(1) * (counts > 0)
        total = losses if own.row_losses else losses.sum()
    if own.row_losses:
        return total, None
    if own.num_items_in_batch is None:
        return total / counts.sum().clamp_min(1), None
    return total / own.num_items_in_batch, counts / own.num_items_in_batch


def _chosen(pieces: Pieces, inverse: Tensor | None, keep: int | Tensor) -> Tensor:
    """int64 [B, n], the encoded columns of those of the caller's that are wanted."""
    batch, length = pieces.embeds.shape[:2]
    if inverse is None:
        inverse = torch.arange(length, device=pieces.embeds.device).expand(batch, -1)
    if isinstance(keep, Tensor):
        return inverse[:, keep]
    return inverse[:, -keep:] if keep else inverse


def _logits(model: Any, states: FactorStates, pieces: Pieces, columns: Tensor) -> Tensor:
    """Log-probabilities [B, n, V] of the token after each of ``columns`` int64 [B, n]."""
    length, steps = states.history.shape[1], states.hidden.shape[2]
    weights = states.log_gates[..., None]  # [B, K, S], before normalisation
    if steps > 1 and bool((columns > length).any()):
        if pieces.ids is None:
            raise ValueError("inputs_embeds: expected input_ids for logits behind a thought of a mixture, got none")
        behind = pieces.ids[:, None, length + 1 : length + steps]
        read = target_logprobs(model, states.hidden[:, :, :-1], behind, torch.ones_like(behind, dtype=torch.bool))
        weights = torch.cat([weights, weights + read.cumsum(-1)], -1)
    weights = weights.log_softmax(1).gather(
        2, (columns - length).clamp_min(0)[:, None].expand(-1, weights.shape[1], -1)
    )
    factors = []
    for k in range(weights.shape[1]):
        hidden = torch.cat([states.history, states.hidden[:, k]], 1)
        logits = head(model, take_columns(hidden, columns, 0))
        logprobs = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
        factors.append(logprobs + weights[:, k, :, None])
    return torch.stack(factors).logsumexp(0)
