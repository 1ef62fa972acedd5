"""The clipped surrogate of a group-relative policy."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Surrogate(NamedTuple):
    loss: Tensor  # [B]
    clipped: Tensor  # [B], share of a user's terms whose gradient the clip removes


def clipped_surrogate(
    logprobs: Tensor, old: Tensor, mask: Tensor | None, advantages: Tensor, low: float = 0.2, high: float = 0.2
) -> Surrogate:
    """-mean_i mean_s min(ρ_is A_i, clip(ρ_is, 1 - low, 1 + high) A_i) of every user, ρ = exp(logprobs - old).

    Args:
        logprobs, old: [B, G, S], of the policy now and when the advantages were made.
        mask: bool [B, S], terms that count; None for all.
        advantages: [B, G].
        low, high: ε >= 0.

    Example:
        >>> now, old = torch.tensor([[[0.0], [1.0]]]), torch.zeros(1, 2, 1)
        >>> clipped_surrogate(now, old, None, torch.tensor([[-1.0, 1.0]]))
        Surrogate(loss=tensor([-0.1000]), clipped=tensor([0.5000]))
    """
    a = advantages[..., None].to(logprobs.dtype)
    ratio = (logprobs - old).exp()
    clipped = ratio.clamp(1 - low, 1 + high)
    terms = torch.minimum(ratio * a, clipped * a)
    cut = (clipped * a < ratio * a).to(terms.dtype)
    weight = torch.ones_like(terms) if mask is None else mask[:, None].to(terms.dtype).expand_as(terms)
    weight = weight / weight.sum(-1, keepdim=True).clamp_min(1)
    return Surrogate(-(terms * weight).sum(-1).mean(-1), (cut * weight).sum(-1).mean(-1).detach())
