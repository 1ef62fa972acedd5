"""What a prompt is continued from: its one thought or, under ``aggregation="mixture"``, each of its K thoughts.

An item's probability is then Σ_k g_k p(item | thought_k). Scoring and search go K ways of the same kind, and what they
find is mixed: of a prompt of one thought there is one way, of weight 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from flr.model.backbone import causal_lm, mixes
from flr.model.batch import plain_pieces
from flr.model.factor_mixture import FactorStates, encode_factors
from flr.model.head import HeadRows, head

from .packed import PackedSession, obstacle
from .prompts import Prompts, prefill, prepare_inputs

_TAKEN = ("input_ids", "attention_mask", "position_ids", "reasoner_mask")


class Ways(NamedTuple):
    """K ways on from the prompts of B users."""

    log_weights: torch.Tensor | None  # [B, K], log g; None for one way
    prompts: list[Prompts]  # K


def thoughts_apart(model: nn.Module, inputs: Mapping[str, Any]) -> tuple[FactorStates, dict[str, Any]] | None:
    """Prompts and their K thoughts, encoded, and the prepared inputs; None where a prompt has no thought or one.

    Raises:
        ValueError: as :func:`flr.decode.prompts.prepare_inputs`, a thought in some rows alone, or inputs that a mixture
            does not take.
    """
    lm = causal_lm(model)
    if not mixes(lm) or inputs.get("thoughts") is not None:
        return None
    prepared = prepare_inputs(model, inputs)
    if odd := sorted(name for name, value in prepared.items() if name not in _TAKEN and value is not None):
        raise ValueError(f"inputs: expected {', '.join(_TAKEN)} with aggregation mixture, got {', '.join(odd)} too")
    ids = prepared["input_ids"]
    is_thought = ids == lm._flr_patch.config.thought_token_id
    if not bool(is_thought.any()):
        return None
    if not bool((is_thought[:, -1] & (is_thought.sum(1) == 1)).all()) or ids.shape[1] < 2:
        raise ValueError("input_ids: expected prompts that end with one thought token each, got others")
    embeds = lm.get_input_embeddings()(ids)
    mask, positions = prepared["attention_mask"], prepared["position_ids"]
    pieces = plain_pieces(embeds, mask, positions, is_thought, prepared.get("reasoner_mask"))
    pieces.ids = ids
    return encode_factors(lm, pieces, ids.shape[1] - 1, ids.shape[1]), prepared


def ways(model: nn.Module, inputs: Mapping[str, Any], reserve: int, want_hidden: bool = False) -> Ways:
    """As :func:`flr.decode.prompts.prefill`, once a thought."""
    apart = thoughts_apart(model, inputs)
    if apart is None:
        return Ways(None, [prefill(model, inputs, reserve, want_hidden)])
    states, prepared = apart
    prompts = _packed(model, states, prepared, reserve, want_hidden)
    if prompts is None:
        each = states.thoughts.unbind(1)
        prompts = [prefill(model, {**prepared, "thoughts": x[:, None]}, reserve, want_hidden) for x in each]
    return Ways(states.log_gates, prompts)


def _packed(
    model: nn.Module, states: FactorStates, prepared: Mapping[str, Any], reserve: int, want_hidden: bool
) -> list[Prompts] | None:
    """Ways that share the prompt's cache until their first step, each of which sees its own thought of it alone."""
    lm, members, (count, factors) = causal_lm(model), states.members, states.log_gates.shape
    cache, length = members.cache, states.history.shape[1]
    if not members.packed or cache is None or obstacle(model, cache, length + 1 + reserve) is not None:
        return None
    hidden = states.hidden[:, :, 0]
    logits = head(lm, hidden[:, 0])
    rows = HeadRows.of(lm, hidden[:, 0], logits) if want_hidden else None
    positions = prepared["position_ids"]
    positions = torch.cat([positions, positions[:, -1:].expand(-1, factors - 1)], 1)
    found = []
    for k in range(factors):
        own = torch.arange(factors, device=hidden.device) == k
        mask = torch.cat([states.prompt.mask.bool(), own.expand(count, -1)], 1)
        session = PackedSession(model, cache, {"attention_mask": mask, "position_ids": positions}, rows is not None)
        after = hidden[:, k] if rows is not None else logits if k == 0 else head(lm, hidden[:, k])
        found.append(Prompts(after, session, rows, logits.shape[-1]))
    return found


def mixed(scores: Iterable[torch.Tensor], log_weights: torch.Tensor | None) -> torch.Tensor:
    """log Σ_k g_k p_k of K log-probabilities [B, …]; their own where there is one way."""
    if log_weights is None:
        return next(iter(scores))
    total: torch.Tensor | None = None
    for score, weight in zip(scores, log_weights.unbind(1), strict=True):
        joint = score + weight.view(-1, *[1] * (score.dim() - 1)).to(score.dtype)
        total = joint if total is None else torch.logaddexp(total, joint)
    assert total is not None
    return total
