"""Fewer factors than a model was trained with: the others are gone, and the gates share out their weight.

The gates are a softmax over the factors that there are, so what is left of a sum of factors keeps its scale, and a
mixture stays one.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from .backbone import causal_lm, is_patched
from .reasoner import FactorizedReasoner
from .variants import OffsetReasoner

#: Parameters whose first dimension is the factors.
_PER_FACTOR = ("query", "factor_query", "key", "value", "output", "gate", "offset")


def own_factors(model: Any) -> FactorizedReasoner | OffsetReasoner:
    """A patched model's factors; ValueError where it has none that could be taken away."""
    lm = causal_lm(model)
    reasoner = getattr(lm, "flr", None) if is_patched(lm) else None
    if not isinstance(reasoner, (FactorizedReasoner, OffsetReasoner)):
        got = type(reasoner).__name__ if reasoner is not None else "a model without"
        if got == "ModulesToSaveWrapper":
            got = "those of an adapter, which flr merge makes one model with its base"
        raise ValueError(f"model: expected factors of variant flr or offsets, merged into one model, got {got}")
    return reasoner


def prune_factors(model: Any, keep: Sequence[int]) -> Any:
    """Leave a patched model with some of its factors, in place; an optimizer that exists does not know the new weights.

    Args:
        model: variant "flr" or "offsets", either aggregation, without an adapter (``flr merge`` makes it one model).
        keep: which, 0..K - 1, at least one, in any order; the factors keep theirs.

    Returns:
        ``model``.

    Raises:
        ValueError: a model without factors of its own, or others than it has.

    Example:
        >>> import flr
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> tiny = LlamaConfig(vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        ...                    num_attention_heads=4, num_key_value_heads=2)
        >>> model = prune_factors(flr.patch_model(LlamaForCausalLM(tiny), num_factors=4), [0, 3])
        >>> model.config.flr["num_factors"], model.config.flr["factor_size"], model.flr.key.shape
        (2, 8, torch.Size([2, 8, 32]))
    """
    lm, reasoner = causal_lm(model), own_factors(model)
    config, chosen = lm._flr_patch.config, sorted(keep)
    if not chosen or len(set(chosen)) < len(chosen) or chosen[0] < 0 or chosen[-1] >= config.num_factors:
        raise ValueError(f"keep: expected different factors of 0 to {config.num_factors - 1}, got {list(keep)}")
    size = config.head_size(reasoner.hidden_size) if config.variant == "flr" else None
    config = dataclasses.replace(config, num_factors=len(chosen), factor_size=size)
    left = copy.copy(reasoner)
    left._parameters = {
        name: nn.Parameter(p.detach()[chosen].clone(), p.requires_grad) if name in _PER_FACTOR else p
        for name, p in reasoner._parameters.items()
        if p is not None
    }
    left.config = config
    lm.flr, lm._flr_patch.config, lm.config.flr = left, config, config.to_dict()
    return model


@contextlib.contextmanager
def only_factors(model: Any, keep: Sequence[int]) -> Iterator[None]:
    """Have some factors alone within; arguments and errors as of :func:`prune_factors`."""
    lm, reasoner = causal_lm(model), own_factors(model)
    config = lm._flr_patch.config
    prune_factors(model, keep)
    try:
        yield
    finally:
        lm.flr, lm._flr_patch.config, lm.config.flr = reasoner, config, config.to_dict()
