"""What must be known of a backbone before it is run in pieces or in packed rows."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import inspect
import logging
from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithPast

logger = logging.getLogger("flr")
#: What a KV cache is called: the first since transformers 5.24, the second before.
CACHE_NAMES = ("cache", "past_key_values")
#: The field of the installed transformers' outputs that holds it.
OUTPUT_CACHE = next(name for name in CACHE_NAMES if name in {field.name for field in fields(CausalLMOutputWithPast)})


_FIXED = contextvars.ContextVar("flr.fixed_shapes", default=False)


@contextlib.contextmanager
def fixed_shapes() -> Iterator[None]:
    """On a CPU, compute inside as on another device: nothing waits for a value, no shape depends on one."""
    token = _FIXED.set(True)
    try:
        yield
    finally:
        _FIXED.reset(token)


def may_look(x: Tensor) -> bool:
    """Whether reading values of ``x`` costs nothing: it lies in the CPU's memory, and :func:`fixed_shapes` is off.

    Never while a compiler traces, for which there are no values.
    """
    return x.device.type == "cpu" and not torch.compiler.is_compiling() and not _FIXED.get()


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


def placed(model: Any, device: torch.device | str | None) -> Any:
    """The model on a device; where it is for None, and one of four or eight bits, whose loader has placed it."""
    if device is not None and not getattr(causal_lm(model), "is_quantized", False):
        model.to(device)
    return model


def is_patched(model: nn.Module) -> bool:
    """Whether :func:`flr.patch_model` has been applied to this instance."""
    return "_flr_patch" in model.__dict__


def mixes(model: nn.Module) -> bool:
    """Whether a model, wrapped or not, mixes what it predicts after the thoughts of its factors."""
    lm = causal_lm(model)
    return is_patched(lm) and lm._flr_patch.config.mixes


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


_POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_target_positions")


def position_limit(config: Any) -> int | None:
    """Positions that a model of this config was made for; None where nothing bounds them (recurrent models, ALiBi).

    A learned table of positions (GPT-2, OPT) has no more; rotary models run on and get worse.

    >>> from transformers import BloomConfig, GPT2Config
    >>> position_limit(GPT2Config(n_positions=64)), position_limit(BloomConfig())
    (64, None)
    """
    text = config.get_text_config(decoder=True)
    sizes = (getattr(text, name, None) for name in _POSITIONS)
    return next((int(size) for size in sizes if isinstance(size, int) and size > 0), None)


def position_rows(model: Any) -> int | None:
    """Positions of a learned table, past which the model cannot go at all; None for a model without one."""
    limit = position_limit(model.config)
    tokens = model.get_input_embeddings()
    tables = (m for m in model.base_model.modules() if isinstance(m, nn.Embedding) and m is not tokens)
    sizes = {table.num_embeddings for table in tables}
    return limit if limit is not None and sizes & {limit, limit + 2} else None  # OPT's table has two rows more


def cache_name(forward: Callable[..., Any]) -> str:
    """What a module class's forward calls its KV cache, one of ``CACHE_NAMES``.

    A forward that names neither (a wrapper's ``**kwargs``) is given the name of the installed transformers' outputs.
    """
    return next((name for name in CACHE_NAMES if name in forward_parameters(forward)), OUTPUT_CACHE)


def cache_argument(module: nn.Module, cache: Any) -> dict[str, Any]:
    """A KV cache as the keyword argument that the module's forward takes; wrappers pass it on to the causal LM."""
    return {cache_name(type(causal_lm(module)).forward): cache}


def cache_of(output: Any) -> Any:
    """The KV cache in a forward's output, or None."""
    found = (getattr(output, name, None) for name in CACHE_NAMES)
    return next((cache for cache in found if cache is not None), None)


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
