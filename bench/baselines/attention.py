"""K-factor attention from queries to factor values, in the ways that it is done today.

Every function maps hidden states ``h`` [B, L, D], factor queries ``q`` [B, K, F], ``w_k`` and ``w_v`` [D, D] and a mask
[B, L] to factor values [B, K, F] = W_v Σ_l α_l h_l with α = softmax((W_k h) · q / √F), first in the returned tuple.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def absorbed(attend: Callable, h: Tensor, q: Tensor, w_k: Tensor, w_v: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
    """W_k absorbed into the query, raw hidden states pooled; ``attend`` gives context, lse, overlap and entropy."""
    factors, head = q.shape[1:]
    u = torch.einsum("kfd,bkf->bkd", w_k.view(factors, head, -1), q) / math.sqrt(head)
    context, lse, overlap, entropy = attend(h, u, mask)
    values = torch.einsum("kfd,bkd->bkf", w_v.view(factors, head, -1), context.to(h.dtype))
    return values, lse, overlap, entropy


def plain_attend(h: Tensor, u: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
    """What one would write first: scores, softmax, products; every [B, K, L] intermediate in memory."""
    scores = (u @ h.transpose(1, 2)).float().masked_fill(~mask[:, None], -math.inf)
    lse = scores.logsumexp(-1)
    alpha = (scores - lse[..., None]).exp()
    entropy = -torch.special.xlogy(alpha, alpha).sum(-1)
    return alpha.to(h.dtype) @ h, lse, alpha @ alpha.transpose(1, 2), entropy


def eager(h: Tensor, q: Tensor, w_k: Tensor, w_v: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
    return absorbed(plain_attend, h, q, w_k, w_v, mask)


def compiled() -> Callable[..., tuple[Tensor, ...]]:
    """:func:`eager` under torch.compile, for one shape."""
    return torch.compile(eager, dynamic=False)


def projected(h: Tensor, q: Tensor, w_k: Tensor, w_v: Tensor, mask: Tensor) -> tuple[Tensor]:
    """Keys and values of all L tokens, then scaled_dot_product_attention, as LatentR3 does.

    It gives neither log-sum-exp nor overlap nor entropy: less work than the others.
    """
    batch, length, _ = h.shape
    factors, head = q.shape[1:]
    keys = (h @ w_k.T).view(batch, length, factors, head).transpose(1, 2)
    values = (h @ w_v.T).view(batch, length, factors, head).transpose(1, 2)
    out = F.scaled_dot_product_attention(q[:, :, None], keys, values, attn_mask=mask[:, None, None])
    return (out[:, :, 0],)
