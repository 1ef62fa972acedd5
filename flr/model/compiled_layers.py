"""A backbone's layers by TorchInductor: one program for all of them, fused norms, rotations and activations.

A layer of a Llama or Qwen2 is 7 products, an attention and some 35 small kernels; Inductor leaves about 6 of those, and
products with frozen weights that share their input are joined (:mod:`flr.model.joint_products`). A model compiled as a
whole would be compiled for minutes. Here a layer is: all layers are one function of their weights, of the tokens'
states and of their own part of the cache, so that what was compiled for the first serves the others.

    layer i:  states, mask, positions, (K_i, V_i) ──> states, (K_i, V_i) with the new tokens' behind them
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer

from .attention_entry import inside
from .backbone import causal_lm, forward_parameters
from .base import base_of
from .joint_products import joint_products, share_products
from .merged_attention import apart
from .shared_prompt import Shared, SharedLayer, SharedRows, attention_of, shared_attention, shares

_PROGRAMS = 64  # compiled forms of a layer: shapes, masks, with and without gradients and cache
_LOCK = threading.RLock()


class _OneLayer:
    """The cache as a single layer sees it, whatever number the layer gives; traced by the compiler.

    Of members that share a prompt it has the own part alone (:class:`.shared_prompt.SharedLayer`).
    """

    def __init__(self, keys: Tensor | None, values: Tensor | None, members: int) -> None:
        self.keys, self.values, self.members = keys, values, members

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        keys, values = apart(keys, self.members), apart(values, self.members)
        if self.keys is not None and self.values is not None:
            keys, values = torch.cat([self.keys, keys], -2), torch.cat([self.values, values], -2)
        self.keys, self.values = keys, values
        return keys, values


def _layer(layer: nn.Module, cached: str | None, before: tuple[Any, Any], args: Any, kwargs: Any) -> Any:
    """What a layer returns, its keys and its values; ``cached`` names the argument that takes the cache."""
    if cached is None:
        return type(layer).forward(layer, *args, **kwargs), None, None
    shared: Shared | None = kwargs.get("flr_shared")
    cache = _OneLayer(*before, 1 if shared is None else shared.members)
    out = type(layer).forward(layer, *args, **kwargs, **{cached: cache})
    return out, cache.keys, cache.values


def compiled(backend: str | Callable[..., Any] = "inductor") -> Callable[..., Any]:
    """The one function of all layers, by a backend of ``torch.compile``; it raises where something cannot be traced."""
    compiler = torch._dynamo.lookup_backend(backend) if isinstance(backend, str) else backend

    def with_joint_products(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        return compiler(share_products(graph), inputs)

    return torch.compile(_layer, fullgraph=True, backend=with_joint_products)


def obstacle(model: Any) -> str | None:
    """Why the layers of ``model`` cannot be compiled as one, or None. What else is in the way shows in a run."""
    layers = getattr(base_of(causal_lm(model)), "layers", None)
    if not isinstance(layers, nn.ModuleList) or not len(layers):
        return "its base model has no list of layers"
    if len({type(layer) for layer in layers}) > 1:
        return "its layers are of several classes"
    if any("forward" in layer.__dict__ for layer in layers):
        return "its layers have forwards of their own"
    return None


def _forward(layer: nn.Module, number: int, program: Callable[..., Any], name: str) -> Callable[..., Any]:
    """A forward for ``layer``, the ``number``-th: the cache is taken apart before the program, and put together.

    ``name`` is that of the model's attention.
    """
    tells = "kwargs" in forward_parameters(type(layer).forward)

    def forward(*args: Any, **kwargs: Any) -> Any:
        cached = next((name for name, x in kwargs.items() if isinstance(x, Cache)), None)
        attention = inside(name) if tells else None
        if tells:
            kwargs["flr_attention"] = attention
        if cached is None:
            return program(layer, None, (None, None), args, kwargs)[0]
        mine = _cache_layer(kwargs.pop(cached), number)
        if isinstance(attention, SharedRows) and isinstance(mine, SharedLayer):
            kwargs |= {"flr_attention": shared_attention, "flr_shared": attention.of(mine)}
            out, *own = program(layer, cached, mine.own or (None, None), args, kwargs)
            mine.take(*own)
            return out
        before = (mine.keys, mine.values) if mine.is_initialized else (None, None)
        out, keys, values = program(layer, cached, before, args, kwargs)
        if not mine.is_initialized:
            mine.lazy_initialization(keys, values)
        mine.keys, mine.values = keys, values
        return out

    return forward


def _cache_layer(cache: Any, number: int) -> Any:
    while len(cache.layers) <= number:
        cache.layers.append(cache.layer_class_to_replicate())
    layer = cache.layers[number]
    if type(layer) not in (DynamicLayer, SharedLayer):
        raise ValueError(f"cache: expected layers of keys and values for compiled layers, got {type(layer).__name__}")
    return layer


@contextlib.contextmanager
def compiled_layers(model: Any, program: Callable[..., Any]) -> Iterator[list[nn.Module]]:
    """The layers of ``model`` run by ``program`` (of :func:`compiled`) inside, in every thread; gives the layers.

    Frozen weights that are joined lie in one memory from then on; their values are what they were.

    Raises:
        ValueError: see :func:`obstacle`; and, where a layer is called, a cache that is more than keys and values.
        torch._dynamo.exc.TorchDynamoException: where a layer is called that cannot be traced.
    """
    reason = obstacle(model)
    if reason is not None:
        raise ValueError(f"layers: expected ones to compile, got a model that has none: {reason}")
    layers = list(base_of(causal_lm(model)).layers)
    shares(model, preferred=True)  # tried now, not by the programs
    with _LOCK, torch._dynamo.config.patch(recompile_limit=_PROGRAMS), joint_products(layers):
        try:
            for number, layer in enumerate(layers):
                layer.forward = _forward(layer, number, program, attention_of(model))
            yield layers
        finally:
            for layer in layers:
                layer.__dict__.pop("forward", None)
