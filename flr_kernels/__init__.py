"""Fused operations of factorized latent reasoning. Needs only torch; never imports ``flr``.

Every op has one definition in :mod:`flr_kernels.reference`, is registered with ``torch.library`` (fake
implementation and autograd, so ``torch.compile(fullgraph=True)`` works) and is dispatched by device and the
environment variable ``FLR_BACKEND`` (see :mod:`flr_kernels.dispatch`).
"""

from importlib.metadata import PackageNotFoundError, version

from . import reference  # noqa: F401 - so that flr_kernels.reference is there
from .dispatch import BackendUnavailable
from .ops.factor_aggregate.op import FactorAggregate, factor_aggregate
from .ops.factor_attention.op import FactorAttention, factor_attention
from .ops.group_advantage.op import GroupAdvantage, group_advantage
from .ops.log_normaliser.op import log_normaliser
from .ops.token_logprob.op import token_logprob
from .ops.trie_advance.op import Advance, trie_advance
from .ops.trie_collect.op import Collected, trie_collect
from .ops.trie_step.op import Continuations, TrieStep, trie_step

try:
    __version__ = version("flr")  # pyproject.toml is the one place that says it
except PackageNotFoundError:  # a checkout that nobody installed
    __version__ = "unknown"

__all__ = [
    "Advance",
    "BackendUnavailable",
    "Collected",
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
    "trie_advance",
    "trie_collect",
    "trie_step",
]
