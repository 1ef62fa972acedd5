"""Definition of factor attention in plain PyTorch."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from ...checks import accumulation_dtype

#: context [B, K, D], lse [B, K], overlap [B, K, K] and entropy [B, K], or their gradients.
Saved: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor]
#: Weights [B, K, L], history and mask to what is pooled, [B, K, D].
Pool: TypeAlias = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def _weights(h: Tensor, u: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Scores, log α and α, [B, K, L]; the latter two are 0 for masked tokens. α sums to 1 however large scores are."""
    scores = u @ h.transpose(1, 2)
    if mask is None:
        log_alpha = scores.log_softmax(-1)
        return scores, log_alpha, log_alpha.exp()
    masked = ~mask[:, None]
    scores = scores.masked_fill(masked, torch.finfo(scores.dtype).min)
    log_alpha = scores.log_softmax(-1).masked_fill(masked, 0)
    return scores, log_alpha, log_alpha.exp().masked_fill(masked, 0)


def _pooled(weights: Tensor, h: Tensor, mask: Tensor | None) -> Tensor:
    """``weights`` [B, K, L], 0 for masked tokens, times ``h`` [B, L, D], whatever those hold: 0 · NaN is NaN."""
    return weights @ (h if mask is None else h.masked_fill(~mask[..., None], 0))


def pooled_with_a_look(weights: Tensor, h: Tensor, mask: Tensor | None) -> Tensor:
    """The same; on a CPU a look at the result, which a traced program may not take, spares the copy of ``h``."""
    if h.device.type == "cpu" and bool((pooled := weights @ h).sum().isfinite()):
        return pooled
    return _pooled(weights, h, mask)


def factor_attention(h: Tensor, u: Tensor, mask: Tensor | None, pool: Pool = _pooled) -> Saved:
    """context [B, K, D], lse [B, K], overlap [B, K, K], entropy [B, K] of softmax(u · h) over valid tokens."""
    acc = accumulation_dtype(h.dtype)
    h, u = h.to(acc), u.to(acc)
    scores, log_alpha, alpha = _weights(h, u, mask)
    lse = scores.logsumexp(-1)
    if mask is not None:  # users without a valid token
        lse = lse.masked_fill(~mask.any(-1, keepdim=True), -math.inf)
    overlap = alpha @ alpha.transpose(1, 2)
    return pool(alpha, h, mask), lse, overlap, -(alpha * log_alpha).sum(-1)


def factor_attention_backward(
    h: Tensor, u: Tensor, mask: Tensor | None, saved: Saved, grads: Saved, needs_dh: bool
) -> tuple[Tensor, Tensor]:
    """dh [B, L, D] (empty when not needed) and du [B, K, D], from saved [B, K, ·] tensors only."""
    dtype, acc = h.dtype, accumulation_dtype(h.dtype)
    h, u = h.to(acc), u.to(acc)
    context, _, overlap, entropy = saved
    d_context, d_lse, d_overlap, d_entropy = grads
    _, log_alpha, alpha = _weights(h, u, mask)
    s = d_overlap + d_overlap.transpose(1, 2)  # [B, K, K]
    dp = d_context @ h.transpose(1, 2) + s @ alpha - d_entropy[..., None] * log_alpha
    delta = (d_context * context).sum(-1) + (s * overlap).sum(-1) + d_entropy * entropy - d_lse  # [B, K]
    ds = alpha * (dp - delta[..., None])  # [B, K, L]
    if mask is not None:
        ds = ds.masked_fill(~mask[:, None], 0)  # there h, and so dp, may be NaN
    du = pooled_with_a_look(ds, h, mask)
    dh = alpha.transpose(1, 2) @ d_context + ds.transpose(1, 2) @ u if needs_dh else h.new_empty(0)
    return dh.to(dtype), du.to(dtype)
