"""How much attention each history item got."""

from __future__ import annotations

import numpy as np
import torch

from .thinking import ThinkingPrompts


@torch.no_grad()
def item_attention(prompts: ThinkingPrompts, item_positions: torch.Tensor, num_items: int) -> np.ndarray:
    """Attention summed over each history entry's tokens, float64 [B, N, T, K, M], for M = num_items.

    Tokens that belong to no item (template, earlier thoughts; -1 in item_positions [B, L + N]) count for none.
    """
    thoughts = []
    for step in prompts.output.steps:
        attention = step.attention.double()  # [B, T, K, columns before the thought]
        entry = item_positions[:, : attention.shape[-1]].to(attention.device)
        place = torch.where(entry >= 0, entry, num_items)[:, None, None].expand_as(attention)
        summed = attention.new_zeros(*attention.shape[:3], num_items + 1).scatter_add_(-1, place, attention)
        thoughts.append(summed[..., :num_items])
    return torch.stack(thoughts, 1).cpu().numpy()


@torch.no_grad()
def item_scores(prompts: ThinkingPrompts, item_positions: torch.Tensor, num_items: int) -> np.ndarray:
    """Score of each history entry, log Σ exp(u_k · h_l) over its tokens, float64 [B, N, T, K, M]; -inf without tokens.

    The logarithm of :func:`item_attention` is this less a number of the factor and the user: what is left out is how
    much else there was to look at. Arguments as there.
    """
    thoughts = []
    for step in prompts.output.steps:
        scores = step.scores.double()  # [B, T, K, columns before the thought]
        entry = item_positions[:, : scores.shape[-1]].to(scores.device)
        place = torch.where(entry >= 0, entry, num_items)[:, None, None].expand_as(scores)
        top = scores.amax(-1, keepdim=True)
        summed = scores.new_zeros(*scores.shape[:3], num_items + 1)
        summed = summed.scatter_add_(-1, place, (scores - top).exp()).log() + top
        thoughts.append(summed[..., :num_items])
    return torch.stack(thoughts, 1).cpu().numpy()
