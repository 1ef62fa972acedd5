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
    summed = [_by_entry(step.attention.double(), item_positions, num_items) for step in prompts.output.steps]
    return torch.stack(summed, 1).cpu().numpy()


@torch.no_grad()
def item_scores(prompts: ThinkingPrompts, item_positions: torch.Tensor, num_items: int) -> np.ndarray:
    """Score of each history entry, log Σ exp(u_k · h_l) over its tokens, float64 [B, N, T, K, M]; -inf without tokens.

    The logarithm of :func:`item_attention` is this less a number of the factor and the user: what is left out is how
    much else there was to look at. Arguments as there.
    """
    thoughts = []
    for step in prompts.output.steps:
        scores = step.scores.double()
        top = scores.amax(-1, keepdim=True)
        thoughts.append(_by_entry((scores - top).exp(), item_positions, num_items).log() + top)
    return torch.stack(thoughts, 1).cpu().numpy()


def _by_entry(values: torch.Tensor, item_positions: torch.Tensor, num_items: int) -> torch.Tensor:
    """Values [B, T, K, columns before the thought] summed over each entry's tokens, [B, T, K, M]."""
    entry = item_positions[:, : values.shape[-1]].to(values.device)
    place = torch.where(entry >= 0, entry, num_items)[:, None, None].expand_as(values)
    return values.new_zeros(*values.shape[:3], num_items + 1).scatter_add_(-1, place, values)[..., :num_items]
