"""Definition of factor attention in plain PyTorch."""

from __future__ import annotations

import math
from typing import TypeAlias

import torch
from torch import Tensor

from ...checks import accumulation_dtype

#: context [B, K, D], lse [B, K], overlap [B, K, K] and entropy [B, K], or their gradients.
Saved: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor]


def factor_attention(h: Tensor, u: Tensor, mask: Tensor | None) -> Saved:
    """context [B, K, D], lse [B, K], overlap [B, K, K], entropy [B, K] of softmax(u · h) over valid tokens."""
    acc = accumulation_dtype(h.dtype)
    h, u = h.to(acc), u.to(acc)
    scores = u @ h.transpose(1, 2)  # [B, K, L]
    valid = torch.ones_like(scores[:, :1], dtype=torch.bool) if mask is None else mask[:, None]  # [B, 1, L]
    scores = scores.masked_fill(~valid, torch.finfo(acc).min)
    some = valid.any(-1)  # [B, 1]
    lse = scores.logsumexp(-1)  # [B, K]
    log_alpha = (scores - lse[..., None]).masked_fill(~valid, 0)
    alpha = log_alpha.exp() * valid  # [B, K, L]; all zero for a user without a valid token
    context = alpha @ h
    overlap = alpha @ alpha.transpose(1, 2)
    entropy = -(alpha * log_alpha).sum(-1)
    return context, lse.masked_fill(~some, -math.inf), overlap, entropy


def factor_attention_backward(
    h: Tensor, u: Tensor, mask: Tensor | None, saved: Saved, grads: Saved, needs_dh: bool
) -> tuple[Tensor, Tensor]:
    """dh [B, L, D] (empty when not needed) and du [B, K, D], from saved [B, K, ·] tensors only."""
    dtype, acc = h.dtype, accumulation_dtype(h.dtype)
    h, u = h.to(acc), u.to(acc)
    context, lse, overlap, entropy = saved
    d_context, d_lse, d_overlap, d_entropy = grads
    empty = torch.isneginf(lse)  # users without a valid token
    log_alpha = u @ h.transpose(1, 2) - lse.masked_fill(empty, 0)[..., None]
    if mask is not None:
        log_alpha = log_alpha.masked_fill(~mask[:, None], -math.inf)
    alpha = log_alpha.exp()
    s = d_overlap + d_overlap.transpose(1, 2)  # [B, K, K]
    dp = d_context @ h.transpose(1, 2) + s @ alpha - d_entropy[..., None] * log_alpha.masked_fill(alpha == 0, 0)
    delta = (d_context * context).sum(-1) + (s * overlap).sum(-1) + d_entropy * entropy - d_lse  # [B, K]
    ds = alpha * (dp - delta[..., None])  # [B, K, L]
    du = ds @ h
    dh = alpha.transpose(1, 2) @ d_context + ds.transpose(1, 2) @ u if needs_dh else h.new_empty(0)
    return dh.to(dtype), du.to(dtype)
