"""A training in which the prompts' states are kept from epoch to epoch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from flr.model.prompt_cache import PLACES, PromptCache

#: Arguments under which a prompt's states change from step to step, or under which there is no cache to keep.
_EXCLUDED = ("embedding_dropout", "neftune_noise_alpha", "gradient_checkpointing", "activation_checkpointing")


def check_prompt_cache(args: Any) -> None:
    """ValueError where the arguments ask for a prompt cache that cannot be."""
    if args.prompt_cache not in PLACES:
        raise ValueError(f"prompt_cache: expected one of {', '.join(PLACES)}, got {args.prompt_cache!r}")
    if args.prompt_cache == "none":
        return
    for name in _EXCLUDED:
        if value := getattr(args, name, None):
            raise ValueError(f"prompt_cache: expected none with {name} {value}, got {args.prompt_cache!r}")


@contextlib.contextmanager
def keeping_prompts(model: Any, args: Any) -> Iterator[PromptCache | None]:
    """Training forwards of ``model`` take prompts from a cache inside, where the arguments ask for one.

    Raises:
        ValueError: the states of this model's prompts cannot be kept.
    """
    if args.prompt_cache == "none":
        yield None
        return
    folder = args.output_dir if args.prompt_cache == "disk" else None
    with PromptCache(model, args.prompt_cache_gb, folder).used() as kept:
        yield kept
