"""Factors that begin by looking for groups of items, one each.

A factor starts with a random direction, and on its way to an interest two may take the same one. Where a log has groups
of items (:func:`flr.data.interest_groups`), factor k starts with the direction that tells group k from the others,

    u_k = s (m_k - m) / std_l((m_k - m) · h_l)       m_k: mean state of group k's tokens in histories, m of all tokens

for every user alike, at the deviation s = 2 that scores have in any new model; training goes on from there.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from flr.data import Interactions, RecProcessor
from flr.decode.prompts import prepare_inputs
from flr.model.backbone import causal_lm, evaluating
from flr.model.pruning import own_factors
from flr.model.reasoner import FactorizedReasoner

_DEVIATION = 2.0  # as in FactorizedReasoner.reset_parameters
_ROWS, _BATCH = 256, 32  # histories that are read, and how many at a time


@torch.no_grad()
def init_factors(model: Any, processor: RecProcessor, train: Interactions, group: np.ndarray) -> None:
    """Turn the factors of a newly patched model to the groups, in place; its other weights stay.

    Args:
        model: patched, variant "flr" with one factor a group or more, not an adapter; where it is, it reads 256
            histories.
        processor: its own.
        train: rows whose histories are read, evenly spread.
        group: int [C], the group of every item, or -1; a factor whose number no item read has keeps its direction.

    Raises:
        ValueError: other factors, groups of another number of items or of more than there are factors.

    Example:
        >>> import flr, torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from flr.data import build_tokenizer, planted_dataset
        >>> data = planted_dataset(num_items=20, num_users=50)
        >>> tokenizer = build_tokenizer(data.catalogue, "id")
        >>> processor = RecProcessor(tokenizer, data.catalogue, "id")
        >>> tiny = LlamaConfig(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        ...                    num_attention_heads=2)
        >>> model = flr.patch_model(LlamaForCausalLM(tiny), tokenizer, num_factors=4)
        >>> init_factors(model, processor, data.train, data.catalogue.attributes["interest"])
    """
    reasoner = own_factors(model)
    if not isinstance(reasoner, FactorizedReasoner):
        raise ValueError("model: expected factors that attend (variant flr), got learned vectors (offsets)")
    items, factors = len(processor.catalogue), reasoner.config.num_factors
    if group.shape != (items,):
        raise ValueError(f"group: expected [{items}], one an item, got shape {list(group.shape)}")
    if group.max(initial=-1) >= factors:
        raise ValueError(f"group: expected at most {factors}, one a factor, got {int(group.max()) + 1}")
    total, square, count = _moments(model, processor, train.spread(_ROWS), group, factors)
    everything = count.sum()
    mean = total.sum(0) / everything.clamp_min(1)
    spread = square / everything.clamp_min(1) - torch.outer(mean, mean)
    for k in torch.nonzero(count > 0).flatten().tolist():
        apart = total[k] / count[k] - mean
        deviation = (apart @ spread @ apart).clamp_min(0).sqrt()
        if deviation > 0:
            _look_for(reasoner, k, apart * (_DEVIATION / deviation))


def _look_for(reasoner: FactorizedReasoner, k: int, direction: Tensor) -> None:
    """Make ``direction`` [D] what factor k's query is in the space of states: key_kᵀ q_k / √F."""
    q, key = reasoner.factor_query[k].double(), reasoner.key[k].double()
    wanted = direction.double() * len(q) ** 0.5 - key.T @ q
    reasoner.key[k] = (key + torch.outer(q, wanted) / (q @ q)).to(reasoner.key)


def _moments(
    model: Any, processor: RecProcessor, rows: Interactions, group: np.ndarray, factors: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Of the states of history tokens: sums by group [K, D], sum of outer products [D, D] and number by group [K]."""
    reasoner, lm = own_factors(model), causal_lm(model)
    device, size = reasoner.gate.device, reasoner.hidden_size
    total, square = (torch.zeros(n, size, dtype=torch.float64, device=device) for n in (factors, size))
    count = torch.zeros(factors, dtype=torch.float64, device=device)
    seen: list[Tensor] = []
    hook = reasoner.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        for first in range(0, len(rows), _BATCH):
            part = rows.histories.take(np.arange(first, min(first + _BATCH, len(rows))))
            inputs = processor(part)
            seen.clear()
            with evaluating(model):
                lm(**prepare_inputs(model, inputs), use_cache=False, logits_to_keep=1)
            entry = inputs["item_positions"][:, : seen[0].shape[1]].numpy()  # [B, L]: place in the history, or -1
            row, column = np.nonzero(entry >= 0)
            of_token = group[part.values[part.offsets[row] + entry[row, column]]]
            known = of_token >= 0
            states = seen[0][torch.from_numpy(row[known]), torch.from_numpy(column[known])].double()
            label = torch.from_numpy(of_token[known].astype(np.int64)).to(device)
            total.index_add_(0, label, states)
            square += states.T @ states
            count += torch.bincount(label, minlength=factors)
    finally:
        hook.remove()
    return total, square, count
