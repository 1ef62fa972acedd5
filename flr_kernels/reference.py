"""The definition of every op in plain PyTorch. Tests, benchmarks and the ``reference`` backend use these alone.

Shapes: ``B`` users, ``L`` tokens, ``D`` hidden size, ``K`` factors, ``G`` group size, ``S`` target tokens,
``M`` token rows, ``V`` vocabulary. Reductions run in float32, or in float64 for float64 input.
"""

# ruff: noqa: F401 - a list of what stands in the ops' folders

from .ops.factor_aggregate.reference import factor_aggregate, factor_aggregate_backward
from .ops.factor_attention.reference import factor_attention, factor_attention_backward
from .ops.group_advantage.reference import (
    MAX_REWARD,
    MIN_MEAN_LOGPROB,
    batch_advantages,
    batch_partial,
    group_advantages,
    group_statistics,
    sequence_rewards,
)
from .ops.log_normaliser.reference import log_normaliser
from .ops.token_logprob.reference import token_logprob
from .ops.trie_advance.reference import trie_advance
from .ops.trie_collect.reference import trie_collect
from .ops.trie_step.reference import trie_step
from .order import order_key
