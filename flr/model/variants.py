"""The reasoners that the factorized one is compared with, and which of all a configuration asks for.

"latentr3" is the single factor of LatentR3. "offsets" has K learned vectors f_k in place of factors that attend, T = 1
and the same gates.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from flr.config import FLRConfig
from flr_kernels import factor_aggregate
from flr_kernels.checks import accumulation_dtype

from .reasoner import FactorizedReasoner, Reasoner, ReasonerOutput, rms_norm


class LatentR3Reasoner(Reasoner):
    """The single-factor predecessor: one attention with biases and rotary positions (base 1000, over the full D).

    Query from the token before the thought, values straight to the thought, no gate, no residual. Parameters are
    named as in LatentR3's checkpoints. Rotary keys cannot be absorbed, so this projects all L tokens in PyTorch.

    Source: LatentR3, arXiv 2505.19092.
    """

    ROTARY_BASE = 1000.0

    def __init__(self, hidden_size: int, config: FLRConfig):
        if hidden_size % 2:
            raise ValueError(f"hidden_size: expected an even size for rotary positions, got {hidden_size}")
        super().__init__(hidden_size, config)
        self.query = nn.Linear(hidden_size, hidden_size)
        self.key = nn.Linear(hidden_size, hidden_size)
        self.value = nn.Linear(hidden_size, hidden_size)

    @torch.no_grad()
    def rescale(self, factor: float) -> None:
        self.value.weight.mul_(factor)
        self.value.bias.mul_(factor)

    def _rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotary embedding of x [..., D] at positions [...]; halves paired as (i, i + D/2)."""
        half = x.shape[-1] // 2
        exponent = torch.arange(half, device=x.device, dtype=torch.float32) / half
        angle = positions[..., None].float() * self.ROTARY_BASE**-exponent
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        a, b = x[..., :half], x[..., half:]
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)

    def _think(self, h: Tensor, mask: Tensor | None, query_index: Tensor | int) -> ReasonerOutput:
        state, columns = self._state(h, query_index), torch.arange(h.shape[1], device=h.device)
        # positions relative to the query's: rotary scores depend on differences alone
        position = columns[None] - (query_index[:, None] if isinstance(query_index, Tensor) else query_index)
        weights = self.query.weight.dtype
        key = self._rotate(self.key(h.to(weights)), position)  # [B, L, D]
        scores = (key @ self.query(state.to(weights))[..., None])[..., 0] / self.hidden_size**0.5
        scores = scores.to(accumulation_dtype(h.dtype))
        valid = torch.ones_like(scores, dtype=torch.bool) if mask is None else mask
        alpha = scores.masked_fill(~valid, torch.finfo(scores.dtype).min).softmax(-1) * valid  # [B, L]
        value = self.value((alpha[:, None].to(weights) @ h.to(weights))[:, 0])  # Σ α = 1: the bias is added once
        thought = value * valid.any(-1, keepdim=True)
        entropy = -torch.special.xlogy(alpha, alpha.clamp_min(torch.finfo(alpha.dtype).tiny)).sum(-1)
        zero = torch.zeros(h.shape[0], device=h.device, dtype=scores.dtype)
        attends = self.config.sparsity_target != "gate"
        normalised = entropy / valid.sum(-1).clamp_min(2).to(entropy.dtype).log() if attends else zero
        if self.config.sparsity_target == "both":
            normalised = normalised / 2
        kept, raw = alpha.detach(), scores.detach()
        return ReasonerOutput(
            thought=thought,
            gates=torch.ones(h.shape[0], 1, 1, device=h.device, dtype=thought.dtype),
            factors=thought[:, None],
            log_gates=torch.zeros(h.shape[0], 1, device=h.device, dtype=thought.dtype),
            contributions=thought[:, None],
            user_losses={"orthogonality": zero, "diversity": zero, "sparsity": normalised},
            attend=lambda: kept[:, None, None],
            score=lambda: raw[:, None, None],
        )


class OffsetReasoner(Reasoner):
    """The control of the factors: K learned vectors instead, gated as they are by the last prompt token's state.

    Parameters: ``offset`` [K, D], ``gate`` [K, D], ``gate_factor`` [D].
    """

    def __init__(self, hidden_size: int, config: FLRConfig):
        super().__init__(hidden_size, config)
        self.offset = nn.Parameter(torch.randn(config.num_factors, hidden_size))
        self.gate = nn.Parameter(torch.zeros(config.num_factors, hidden_size))
        self.gate_factor = nn.Parameter(torch.zeros(hidden_size))

    @torch.no_grad()
    def rescale(self, factor: float) -> None:
        self.offset.mul_(factor)

    def _think(self, h: Tensor, mask: Tensor | None, query_index: Tensor | int) -> ReasonerOutput:
        config, (batch, length) = self.config, h.shape[:2]
        z = self._state(h, query_index).to(self.offset.dtype)
        eps = FactorizedReasoner.EPS * self.unit
        f = self.offset.expand(batch, -1, -1).contiguous()
        logits = (z @ self.gate.T + rms_norm(self.offset, eps) @ self.gate_factor) / config.gate_temperature
        aggregated = factor_aggregate(f, logits, eps * self.hidden_size**0.5)
        uneven, factors = aggregated.gate_entropy, config.num_factors
        return ReasonerOutput(
            thought=aggregated.thought,
            gates=aggregated.gates[:, None],
            factors=f,
            log_gates=logits.log_softmax(-1),
            contributions=aggregated.gates[..., None].to(f.dtype) * f,
            user_losses={
                "orthogonality": aggregated.orthogonality,
                "diversity": torch.zeros_like(uneven),
                "sparsity": uneven / math.log(factors) if factors > 1 else torch.zeros_like(uneven),
            },
            attend=lambda: f.new_zeros(batch, 1, factors, length),
            score=lambda: f.new_zeros(batch, 1, factors, length),
        )


def build_reasoner(hidden_size: int, config: FLRConfig) -> Reasoner | None:
    """The reasoner of a variant; None for those without factors."""
    kinds = {"flr": FactorizedReasoner, "offsets": OffsetReasoner, "latentr3": LatentR3Reasoner}
    return kinds[config.variant](hidden_size, config) if config.has_reasoner else None
