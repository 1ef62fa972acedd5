"""Definition of factor aggregation in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from ...checks import accumulation_dtype


def factor_aggregate(f: Tensor, gate_logits: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """thought [B, D], gates [B, K], orthogonality [B], gate_entropy [B] (nats)."""
    acc = accumulation_dtype(f.dtype)
    f, log_gates = f.to(acc), gate_logits.to(acc).log_softmax(-1)
    gates = log_gates.exp()
    thought = (gates[..., None] * f).sum(1)
    unit = f * (f.square().sum(-1, keepdim=True) + eps * eps).rsqrt()
    num_factors = f.shape[1]
    cosines = (unit @ unit.transpose(1, 2)).square()  # [B, K, K]
    off_diagonal = cosines.sum((1, 2)) - cosines.diagonal(dim1=1, dim2=2).sum(-1)
    orthogonality = off_diagonal / max(num_factors * (num_factors - 1), 1)
    gate_entropy = -(gates * log_gates.clamp_min(torch.finfo(acc).min)).sum(-1)
    return thought, gates, orthogonality, gate_entropy


def factor_aggregate_backward(
    f: Tensor, gates: Tensor, d_thought: Tensor, d_gates: Tensor, d_orth: Tensor, d_entropy: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    dtype = f.dtype
    f = f.to(gates.dtype)
    factors = f.shape[1]
    scale = (f.square().sum(-1, keepdim=True) + eps * eps).rsqrt()  # [B, K, 1]
    unit = f * scale
    cosines = unit @ unit.transpose(1, 2)
    cosines = cosines - torch.diag_embed(cosines.diagonal(dim1=1, dim2=2))
    d_unit = (4 / max(factors * (factors - 1), 1)) * d_orth[:, None, None] * (cosines @ unit)
    d_f = gates[..., None] * d_thought[:, None] + scale * (d_unit - unit * (unit * d_unit).sum(-1, keepdim=True))
    log_gates = gates.clamp_min(torch.finfo(gates.dtype).tiny).log()
    d_g = d_gates + (f @ d_thought[..., None])[..., 0] - d_entropy[:, None] * (log_gates + 1)
    d_logits = gates * (d_g - (gates * d_g).sum(-1, keepdim=True))
    return d_f.to(dtype), d_logits
