"""Fused operations of factorized latent reasoning. Needs only torch; never imports ``flr``.

Every op has one definition in :mod:`flr_kernels.reference`, is registered with ``torch.library`` (fake
implementation and autograd, so ``torch.compile(fullgraph=True)`` works) and is dispatched by device and the
environment variable ``FLR_BACKEND`` (see :mod:`flr_kernels.dispatch`).
"""

from .dispatch import BackendUnavailable
from .factor_aggregate import FactorAggregate, factor_aggregate
from .factor_attention import FactorAttention, factor_attention
from .group_advantage import GroupAdvantage, group_advantage
from .log_normaliser import log_normaliser
from .token_logprob import token_logprob
from .trie_step import Continuations, TrieStep, trie_step

__version__ = "0.1.0"

__all__ = [
    "BackendUnavailable",
    "Continuations",
    "FactorAggregate",
    "FactorAttention",
    "GroupAdvantage",
    "TrieStep",
    "factor_aggregate",
    "factor_attention",
    "group_advantage",
    "log_normaliser",
    "token_logprob",
    "trie_step",
]
