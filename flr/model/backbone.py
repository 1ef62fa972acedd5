"""What must be known of a backbone before it is run in pieces or in packed rows."""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

logger = logging.getLogger("flr")


@functools.cache
def warn_once(message: str) -> None:
    """Log a warning the first time that it is given."""
    logger.warning(message)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Every submodule in eval mode inside, its own mode restored afterwards (they may differ)."""
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        yield
    finally:
        for module in training:
            module.training = True


def causal_lm(model: nn.Module) -> Any:
    """The Hugging Face model inside DDP and PEFT wrappers."""
    wrapped: Any = model
    while True:
        if hasattr(wrapped, "get_base_model"):
            wrapped = wrapped.get_base_model()
        elif isinstance(wrapped, nn.parallel.DistributedDataParallel):
            wrapped = wrapped.module
        else:
            return wrapped


def is_patched(model: nn.Module) -> bool:
    """Whether :func:`flr.patch_model` has been applied to this instance."""
    return "_flr_patch" in model.__dict__


def backbone_trains(model: nn.Module) -> bool:
    """Whether anything but the reasoner needs a gradient."""
    return any(p.requires_grad and ".flr." not in f".{name}" for name, p in model.named_parameters())


def reasoner_is_frozen(model: nn.Module) -> bool:
    """Whether there is a reasoner that needs no gradient while something else does."""
    own = [p.requires_grad for name, p in model.named_parameters() if ".flr." in f".{name}"]
    return bool(own) and not any(own) and backbone_trains(model)


def is_checkpointing(model: Any) -> bool:
    """Whether gradient checkpointing is on."""
    name = "is_activation_checkpointing"  # transformers >= 5.20; the old name warns there
    return getattr(model, name) if hasattr(type(model), name) else model.is_gradient_checkpointing


@functools.cache
def forward_parameters(forward: Callable[..., Any]) -> frozenset[str]:
    """Arguments of a module class's forward: an instance's own may hide them behind ``**kwargs``."""
    return frozenset(inspect.signature(forward).parameters)


def takes_positions(model: nn.Module) -> bool:
    """Whether position_ids may be given to the causal LM and to its base model."""
    lm = causal_lm(model)
    return all("position_ids" in forward_parameters(type(module).forward) for module in (lm, lm.base_model))


def attention_types(config: Any) -> set[str]:
    """Types of the layers of a text config; sliding ones without a window attend to everything."""
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None) or ["full_attention" if window is None else "sliding_attention"]
    return set(types) if window is not None else {t.replace("sliding_attention", "full_attention") for t in types}


def packing_obstacle(model: nn.Module) -> str | None:
    """Why several continuations of a prompt cannot be packed into one row with a 4-D mask, or None.

    What layers and caches must be like differs between training and decoding: see ``packed_members`` and
    ``flr.decode.packed``.
    """
    lm = causal_lm(model)
    config = lm.config.get_text_config(decoder=True)
    attention = getattr(config, "_attn_implementation", None)
    if attention not in ("sdpa", "eager"):
        return f"{attention} attention takes no 4-D mask"
    if not takes_positions(model) or getattr(config, "alibi", False):
        return f"{type(lm).__name__} derives positions from the attention mask"
    return None
