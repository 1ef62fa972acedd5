"""The factorized reasoner: from the prompt's hidden states to the latent thought.

State z⁰ = H[last prompt token]. For refinement t = 1..T and factor k = 1..K:

    q_k = W_q^k z^{t-1} + e_k
    u_k = (W_k^k)ᵀ q_k / √F                        key projection absorbed into the query
    α_k = softmax over valid l of u_k · h_l,       c_k = Σ_l α_kl h_l        (flr_kernels.factor_attention)
    f_k = W_o^k W_v^k c_k
    g   = softmax((W_g z^{t-1} + w_f · rms(f_k)) / τ),   r^t = Σ_k g_k f_k   (flr_kernels.factor_aggregate)
    z^t = rms(z^{t-1} + r^t)

Regularisers, each in [0, 1], averaged over users and refinements:

    orthogonality  mean_{j≠k} (f̂_j · f̂_k)²
    diversity      mean_{j≠k} O_jk / √(O_jj O_kk),   O_jk = Σ_l α_jl α_kl
    sparsity       entropy(g) / log K, or mean_k entropy(α_k) / log L_valid, or the mean of both
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from flr.config import FLRConfig
from flr_kernels import factor_aggregate, factor_attention

LOSSES = ("orthogonality", "diversity", "sparsity")


def _autocast(h: Tensor) -> Tensor:
    """Float32 hidden states on a GPU in the dtype of autocast, as PyTorch's own attention takes them there.

    The kernels multiply 16-bit numbers in tensor cores and add up in float32; float32 has none to give equal results.
    What rounding h and u does is bounded: with ε = 2⁻⁸ for bfloat16 (2⁻¹¹ for float16, within its range) a score moves
    by at most Δ = (2 ε + ε²) max_l Σ_d |u_d h_ld|, the log-sum-exp by at most Δ, and the context by at most
    (e^{2Δ} (1 + ε) - 1) Σ_l α_l |h_ld|.
    """
    if h.is_cuda and h.dtype == torch.float32 and torch.is_autocast_enabled("cuda"):
        return h.to(torch.get_autocast_dtype("cuda"))
    return h


class ReasonerOutput(NamedTuple):
    """What the reasoner made of B users.

    A tuple, in which FSDP and ZeRO-3 find the tensors before whose backward they gather weights.

    Attributes:
        thought: r^T [B, D], in the reasoner's dtype, before dropout and without the anchor.
        gates: [B, T, K].
        factors: f_k of the last refinement [B, K, D].
        log_gates: log g_k of the last refinement [B, K], finite where a gate is too small for its dtype.
        contributions: g_k f_k of the last refinement [B, K, D]; they sum to ``thought``.
        user_losses: regulariser by name, averaged over refinements, [B].
        attend, score: make ``attention`` and ``scores``.
        attention: [B, T, K, L], made on access from the saved queries (nothing of that size is kept), no gradient.
        scores: u_k · h_l [B, T, K, L] of every column, masked or not, likewise: attention before it is normalised.
    """

    thought: Tensor
    gates: Tensor
    factors: Tensor
    log_gates: Tensor
    contributions: Tensor
    user_losses: dict[str, Tensor]
    attend: Callable[[], Tensor]
    score: Callable[[], Tensor]

    @property
    def attention(self) -> Tensor:
        with torch.no_grad():
            return self.attend()

    @property
    def scores(self) -> Tensor:
        with torch.no_grad():
            return self.score()

    @property
    def losses(self) -> dict[str, Tensor]:
        """Regulariser by name, averaged over the batch: scalars."""
        return {name: value.mean() for name, value in self.user_losses.items()}


def rms_norm(x: Tensor, eps: float) -> Tensor:
    """x / √(mean(x²) + ε²) over the last dimension."""
    return x * (x.square().mean(-1, keepdim=True) + eps * eps).rsqrt()


class Reasoner(nn.Module):
    """What both variants share: the interface, checks, and weights that never fall below float32.

    bfloat16 weights do not move at small learning rates, so ``.to(torch.bfloat16)`` and ``.half()`` leave these in
    float32; ``.double()`` works.
    """

    def __init__(self, hidden_size: int, config: FLRConfig):
        super().__init__()
        self.hidden_size = hidden_size
        self.config = config
        self.take_unit()

    def take_unit(self) -> None:
        """Go by ``config.input_scale``, which has been set."""
        # as text: a number that two models have differently is a symbol to a compiler, whose guards round its products
        self._unit = repr(float(self.config.input_scale or 1.0))

    @property
    def unit(self) -> float:
        """``config.input_scale``, 1 where nobody measured it."""
        return float(self._unit)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        def keep_precision(t: Tensor) -> Tensor:
            new = fn(t)
            low = new.is_floating_point() and new.dtype.itemsize < 4
            return new.to(torch.float32) if low else new

        return super()._apply(keep_precision, recurse)

    def forward(
        self, hidden_states: Tensor, mask: Tensor | None = None, query_index: Tensor | int | None = None
    ) -> ReasonerOutput:
        """Make the thought.

        Args:
            hidden_states: [B, L, D], last layer, after the final norm.
            mask: bool [B, L], the tokens that factors may attend to (the history); None for all.
            query_index: column of the last prompt token, one or int64 [B]; by default the last true column of
                ``mask``. It need not be true in the mask: the mask may be narrowed to item tokens.

        Raises:
            ValueError: a shape or dtype does not fit.
        """
        if hidden_states.dim() != 3 or hidden_states.shape[2] != self.hidden_size:
            raise ValueError(
                f"hidden_states: expected [B, L, {self.hidden_size}], got shape {tuple(hidden_states.shape)}"
            )
        batch, length = hidden_states.shape[:2]
        if mask is not None:
            if mask.shape != (batch, length):
                raise ValueError(f"mask: expected shape {(batch, length)}, got {tuple(mask.shape)}")
            mask = mask.bool()
        if length == 0:  # an empty prompt: nothing to attend to
            hidden_states = hidden_states.new_zeros(batch, 1, self.hidden_size)
            mask = torch.zeros(batch, 1, dtype=torch.bool, device=hidden_states.device)
        if query_index is None:
            query_index = length - 1
            if mask is not None:
                query_index = (mask * torch.arange(mask.shape[1], device=mask.device)).argmax(-1)
        return self._think(hidden_states, mask, query_index)

    def _think(self, h: Tensor, mask: Tensor | None, query_index: Tensor | int) -> ReasonerOutput:
        raise NotImplementedError

    @staticmethod
    def _state(h: Tensor, query_index: Tensor | int) -> Tensor:
        """Hidden states [B, D] at the query columns."""
        if isinstance(query_index, Tensor):
            return h[torch.arange(len(h), device=h.device), query_index.clamp_min(0)]
        return h.select(1, max(query_index, 0))  # an int, or in an export or compiled a symbol for one

    def rescale(self, factor: float) -> None:
        """Multiply the thought by ``factor``, in place."""
        raise NotImplementedError


class FactorizedReasoner(Reasoner):
    """K factors, T refinements. Parameters, with K factors of head size F on hidden size D:

    ``query`` [K, F, D], ``factor_query`` [K, F], ``key`` [K, F, D], ``value`` [K, F, D], ``output`` [K, D, F],
    ``gate`` [K, D], ``gate_factor`` [D].

    Example:
        >>> import torch
        >>> reasoner = FactorizedReasoner(32, FLRConfig(num_factors=4, num_refinements=2))
        >>> out = reasoner(torch.randn(3, 7, 32), mask=torch.ones(3, 7, dtype=torch.bool))
        >>> out.thought.shape, out.attention.shape, out.gates.shape
        (torch.Size([3, 32]), torch.Size([3, 2, 4, 7]), torch.Size([3, 2, 4]))
        >>> sorted(out.losses)
        ['diversity', 'orthogonality', 'sparsity']
    """

    #: ε of the norms, relative to values of order 1 (states) and to the input embeddings' RMS (contributions).
    EPS = 1e-4

    def __init__(self, hidden_size: int, config: FLRConfig):
        super().__init__(hidden_size, config)
        factors, head = config.num_factors, config.head_size(hidden_size)
        self.query = nn.Parameter(torch.empty(factors, head, hidden_size))
        self.factor_query = nn.Parameter(torch.empty(factors, head))
        self.key = nn.Parameter(torch.empty(factors, head, hidden_size))
        self.value = nn.Parameter(torch.empty(factors, head, hidden_size))
        self.output = nn.Parameter(torch.empty(factors, hidden_size, head))
        self.gate = nn.Parameter(torch.empty(factors, hidden_size))
        self.gate_factor = nn.Parameter(torch.empty(hidden_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Projections of unit gain, orthogonal factor queries, uniform gates, small contributions.

        ``query`` starts at 0: what a factor attends to depends on the factor alone, so that factors part by content
        (and not by position, which the state knows best); what the state adds is learned.
        """
        head, size = self.query.shape[1:]
        nn.init.zeros_(self.query)
        for weight in (self.key, self.value):
            nn.init.normal_(weight, std=size**-0.5)
        nn.init.orthogonal_(self.factor_query, gain=2 * head**0.5)  # scores of deviation 2, so that factors differ
        nn.init.normal_(self.output, std=head**-0.5)
        nn.init.zeros_(self.gate)
        nn.init.zeros_(self.gate_factor)

    @torch.no_grad()
    def rescale(self, factor: float) -> None:
        self.output.mul_(factor)

    def _think(self, h: Tensor, mask: Tensor | None, query_index: Tensor | int) -> ReasonerOutput:
        config = self.config
        z = self._state(h, query_index).to(self.query.dtype)
        h = _autocast(h)
        eps = self.EPS * self.unit
        valid_tokens = mask.sum(-1) if mask is not None else torch.full((h.shape[0],), h.shape[1], device=h.device)
        gates, queries, totals = [], [], dict.fromkeys(LOSSES, torch.zeros((), device=h.device))
        aggregated = f = logits = None
        for refinement in range(config.num_refinements):
            q = torch.einsum("kfd,bd->bkf", self.query, z) + self.factor_query
            u = torch.einsum("kfd,bkf->bkd", self.key, q) / q.shape[-1] ** 0.5
            u = u.to(h.dtype).contiguous()  # einsum promises no layout, the kernels need one
            # back and forth over the users: what one refinement read last is in the L2 for the next
            attended = factor_attention(h, u, mask, last_first=refinement % 2 == 1)
            v = torch.einsum("kfd,bkd->bkf", self.value, attended.context.to(self.value.dtype))
            f = torch.einsum("kdf,bkf->bkd", self.output, v).contiguous()
            logits = (z @ self.gate.T + rms_norm(f, eps) @ self.gate_factor) / config.gate_temperature
            aggregated = factor_aggregate(f, logits, eps * self.hidden_size**0.5)
            z = rms_norm(z + aggregated.thought, self.EPS)
            terms = (
                aggregated.orthogonality,
                pairwise_overlap(attended.overlap),
                self._sparsity(aggregated.gate_entropy, attended.entropy, valid_tokens),
            )
            totals = {name: totals[name] + x for name, x in zip(LOSSES, terms, strict=True)}
            gates.append(aggregated.gates)
            queries.append((u.detach(), attended.lse.detach()))
        assert aggregated is not None
        assert f is not None
        assert logits is not None
        history = h.detach()

        def scores() -> Tensor:
            return torch.stack([(u @ history.transpose(1, 2)).to(lse.dtype) for u, lse in queries], 1)

        def attention() -> Tensor:
            lse = torch.stack([lse for _, lse in queries], 1)
            log_alpha = scores() - lse.masked_fill(lse.isneginf(), 0)[..., None]
            if mask is not None:  # before exp, which is infinite where a masked score is far above the others
                log_alpha = log_alpha.masked_fill(~mask[:, None, None].bool(), -math.inf)
            return log_alpha.exp()

        return ReasonerOutput(
            thought=aggregated.thought,
            gates=torch.stack(gates, 1),
            factors=f,
            log_gates=logits.log_softmax(-1),
            contributions=aggregated.gates[..., None].to(f.dtype) * f,
            user_losses={name: x / config.num_refinements for name, x in totals.items()},
            attend=attention,
            score=scores,
        )

    def _sparsity(self, gate_entropy: Tensor, entropy: Tensor, valid_tokens: Tensor) -> Tensor:
        target, factors = self.config.sparsity_target, self.config.num_factors
        of_gates = gate_entropy / math.log(factors) if factors > 1 else torch.zeros_like(gate_entropy)
        if target == "gate":
            return of_gates
        # log 1 = 0: a user with one valid token has entropy 0 whatever it is divided by
        of_attention = entropy.mean(-1) / valid_tokens.clamp_min(2).to(entropy.dtype).log()
        return of_attention if target == "attention" else (of_gates + of_attention) / 2


def pairwise_overlap(overlap: Tensor) -> Tensor:
    """mean_{j≠k} O_jk / √(O_jj O_kk) of [B, K, K]: [B], 0 for K = 1 and for users without a valid token."""
    factors = overlap.shape[1]
    if factors == 1:
        return overlap.new_zeros(len(overlap))
    norm = overlap.diagonal(dim1=1, dim2=2).clamp_min(torch.finfo(overlap.dtype).tiny).rsqrt()  # [B, K]
    cosines = overlap * norm[:, :, None] * norm[:, None, :]
    total = cosines.sum((1, 2)) - cosines.diagonal(dim1=1, dim2=2).sum(-1)
    return total / (factors * (factors - 1))
