"""K-factor attention from queries to factor values, in the ways that it is done today.

Every function maps hidden states ``h`` [B, L, D], factor queries ``q`` [B, K, F], ``w_k`` and ``w_v`` [D, D] and a mask
[B, L] to factor values [B, K, F] = W_v Σ_l α_l h_l with α = softmax((W_k h) · q / √F), first in the returned tuple.

``projected`` is what LatentR3 does (Shengxiang-Lin/LatentR3, src/latent/layers.py: keys and values of all tokens,
scores, softmax; its code projects queries of all tokens, too, which is left out here, and has PyTorch's fused
attention in place of its own matrix products). ``eager``, ``compiled``, ``sdpa`` and ``flex`` follow no published
code, since none has the absorbed form, which is algebra: they are the ways that PyTorch offers to write it. ``flex`` is
written after FlexAttention's documentation (`create_block_mask`, compiled `flex_attention`, torch 2.13).

Checked: ``projected`` against LatentR3's own layer with one factor, its rotation left out, in
tests/bench/test_baselines.py; the others are compared with it and with ours before each race
(bench/test_factor_attention.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

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


def _shared_heads(h: Tensor, u: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [B, 1, K, D] and the history as keys and values [B, 1, L, D]: one head, K rows."""
    return u[:, None], h[:, None], mask[:, None, None]


def sdpa(h: Tensor, q: Tensor, w_k: Tensor, w_v: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
    """The absorbed form in PyTorch's scaled_dot_product_attention; values alone, less work than ours."""

    def attend(h: Tensor, u: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        queries, keys, seen = _shared_heads(h, u, mask)
        return F.scaled_dot_product_attention(queries, keys, keys, attn_mask=seen, scale=1.0)[:, 0], u, u, u

    return absorbed(attend, h, q, w_k, w_v, mask)[:1]


def flex(shape_mask: Tensor, factors: int) -> Callable[..., tuple[Tensor, ...]]:
    """The absorbed form in FlexAttention, its kernel compiled, with the block mask of ``shape_mask`` [B, L] made once;
    values alone, raced on a CPU in the forward alone."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def seen(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return shape_mask[batch, key]

    def attend(h: Tensor, u: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        queries, keys, _ = _shared_heads(h, u, mask)
        return fused(queries, keys, keys, block_mask=blocks, scale=1.0)[:, 0], u, u, u

    def call(h: Tensor, q: Tensor, w_k: Tensor, w_v: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        return absorbed(attend, h, q, w_k, w_v, mask)[:1]

    batch, length = shape_mask.shape
    blocks: Any = create_block_mask(seen, batch, None, factors, length, device=str(shape_mask.device))
    fused: Any = torch.compile(flex_attention, dynamic=False)
    return call


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
