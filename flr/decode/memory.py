"""How many users are worked on at a time."""

from __future__ import annotations

from typing import Any

from flr.data.trie import CatalogueTrie
from flr.model.backbone import causal_lm, mixes

_MAX_LOGITS = 1 << 26  # of one step, 256 MiB in float32


def users_at_once(model: Any, trie: CatalogueTrie, num_beams: int, most: int) -> int:
    """``most``, or fewer where B·W·V logits of a step, of K thoughts that are mixed B·W·K·V, take more than 256 MiB.

    Args:
        model: a causal LM, wrapped or not.
        num_beams: W; 1 where the prompts alone are continued.
    """
    lm = causal_lm(model)
    config = getattr(lm, "config", None)
    if config is not None and hasattr(config, "get_text_config"):
        config = config.get_text_config(decoder=True)
    vocabulary = int(getattr(config, "vocab_size", 0) or trie.max_token + 1)
    ways = lm._flr_patch.config.num_factors if mixes(lm) else 1
    return max(1, min(most, _MAX_LOGITS // (num_beams * vocabulary * ways)))
