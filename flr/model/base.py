"""How a causal LM's base model is called: its arguments, its cache, its embeddings, and what it returns."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .backbone import CACHE_NAMES, attention_types, forward_parameters, may_look, packing_obstacle

#: What families call the cache, in their base model's arguments and in its output; the last two are not KV caches.
_CACHE_NAMES = (*CACHE_NAMES, "cache_params", "state")
_OPTIONAL = ("attention_mask", "position_ids", "token_type_ids")
_MASK_STEP = 16  # numbers, to which SDPA's kernels want a mask's rows aligned


def base_of(lm: Any) -> Any:
    """The module of a causal LM that makes hidden states; the LM itself where it has none."""
    base = lm.base_model
    if base is lm:
        base = getattr(lm, "model", lm)  # Llama 4's prefix names no attribute
    inner = getattr(base, "decoder", None)  # what Bart, OPT and their kin call
    if isinstance(inner, nn.Module) and "inputs_embeds" in forward_parameters(type(inner).forward):
        return inner
    return base


def base_parameters(base: nn.Module) -> frozenset[str]:
    """Arguments of a base model's forward; of the text model that it passes ``**kwargs`` to as well."""
    names = forward_parameters(type(base).forward)
    inner = getattr(base, "language_model", None)
    if "kwargs" in names and isinstance(inner, nn.Module) and not names.intersection(_CACHE_NAMES):
        return names | base_parameters(inner)
    return names


def base_cache_name(base: nn.Module) -> str | None:
    """What the base model calls its cache; None where it has none."""
    return next((name for name in _CACHE_NAMES if name in base_parameters(base)), None)


@contextlib.contextmanager
def embeddings_given(table: nn.Module, embeds: Tensor) -> Iterator[None]:
    """``table`` gives ``embeds`` for the ids of its next call, whatever they are; other threads are left alone."""
    thread = threading.get_ident()
    used: list[bool] = []

    def replace(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if used or threading.get_ident() != thread or output.shape != embeds.shape:
            return None
        used.append(True)
        return embeds.clone()

    handle = table.register_forward_hook(replace)
    try:
        yield
    finally:
        handle.remove()


def run_base(
    model: Any,
    embeds: Tensor,
    ids: Tensor | None = None,
    *,
    cache: Any = None,
    use_cache: bool = False,
    **arguments: Any,
) -> tuple[Any, Any]:
    """The base model's output for embeddings [B, L, D], and its cache.

    Args:
        model: causal LM.
        embeds: what the tokens are read as.
        ids: int64 [B, L] for families that look at the tokens, too (embeddings of every layer, routing by token);
            None for the others.
        cache: what came before; None for nothing.
        use_cache: whether a cache is wanted.
        arguments: of the base model. Masks, positions and token types that it does not know are left out.
    """
    base = base_of(model)
    taken, name = base_parameters(base), base_cache_name(base)
    mask = arguments.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2 and not may_look(mask):
        arguments["attention_mask"] = _prepared_mask(model, mask, embeds)
    arguments = {k: v for k, v in arguments.items() if v is not None and (k not in _OPTIONAL or k in taken)}
    if cache is not None and name is not None:
        arguments[name] = cache
    if "use_cache" in taken:
        arguments["use_cache"] = use_cache
    if ids is None:
        out = base(inputs_embeds=embeds.clone(), return_dict=True, **arguments)  # CTRL scales them in place
    else:
        own = {"flr_inner": True} if "_flr_owner" in base.__dict__ else {}  # see flr.model.bypass
        with embeddings_given(model.get_input_embeddings(), embeds):
            out = base(input_ids=ids, return_dict=True, **own, **arguments)
    return out, None if name is None else getattr(out, name, None)


def _prepared_mask(model: Any, mask: Tensor, embeds: Tensor) -> Tensor:
    """A mask [B, c + L] as the 4-D one that SDPA takes, where transformers would look whether it has padding at all.

    A row of padding sees itself, so that nothing in it is without a number. As it is where layers differ, where other
    attention makes use of the two dimensions, and while the model's traits are being found.
    """
    patch = model.__dict__.get("_flr_patch")
    config = model.config.get_text_config(decoder=True)
    known = patch is not None and patch.traits is not None and patch.traits.packing and packing_obstacle(model) is None
    if not known or config._attn_implementation != "sdpa" or attention_types(config) != {"full_attention"}:
        return mask
    columns = torch.arange(mask.shape[1], device=mask.device)
    own = columns[-embeds.shape[1] :, None]
    seen = ((own >= columns) & mask[:, None].bool()) | (own == columns)
    return attention_mask(config, seen, embeds.dtype)


def is_recurrent(cache: Any) -> bool:
    """Whether all layers of a cache are recurrent: such a one does not know how many tokens it has seen."""
    layers: Any = getattr(cache, "layers", None)
    return bool(layers) and all(hasattr(x, "has_previous_state") and not hasattr(x, "keys") for x in layers)


def is_filled(cache: Any) -> bool:
    """Whether a cache holds tokens."""
    if cache is None:
        return False
    if is_recurrent(cache):
        return any(any(layer.has_previous_state.values()) for layer in cache.layers)
    if hasattr(cache, "get_seq_length"):
        return bool(cache.get_seq_length() > 0)
    return bool(getattr(cache, "seqlen_offset", 1) > 0)  # xLSTM counts; RWKV's is a list that begins as None


def given(**arguments: Any) -> dict[str, Any]:
    """Arguments that are not None: some forwards do not know those that most have."""
    return {name: value for name, value in arguments.items() if value is not None}


def text_arguments(kwargs: dict[str, Any]) -> dict[str, Any]:
    """What of a forward's other arguments goes to the base model at every piece of a batch.

    Raises:
        ValueError: a tensor, which belongs to the whole input and cannot be cut, or attentions.
    """
    if kwargs.get("output_attentions"):
        raise ValueError("output_attentions: expected False for a batch that is encoded in pieces, got True")
    whole = ("cache_position", "return_dict", "output_attentions")  # a piece's positions follow from the cache
    kept = {name: value for name, value in kwargs.items() if name not in whole and value is not None}
    for name, value in kept.items():
        if isinstance(value, (Tensor, list, tuple, dict)):
            raise ValueError(f"{name}: expected nothing but text in a batch with thoughts or labels, got it")
    return kept


def right_padded(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Columns [B, L] of a mask [B, L] that put what is seen first, in its order; and how many are seen, [B]."""
    return (mask == 0).to(torch.int8).argsort(dim=1, stable=True), (mask != 0).sum(1)


def attention_mask(config: Any, seen: Tensor, dtype: torch.dtype) -> Tensor:
    """A 4-D mask [B, 1, q, n] of what is ``seen``, bool [B, q, n], as the config's attention takes it.

    On a GPU SDPA makes numbers of truth values in every layer, and moves them where rows are not multiples of 16 bytes:
    it is given them so.

    Args:
        config: of the text model. dtype: of the states.
    """
    eager = config._attn_implementation == "eager"
    if not eager and not seen.is_cuda:
        return seen[:, None]
    columns = seen.shape[-1]
    room = columns if eager else columns + -columns % _MASK_STEP
    zeros = torch.zeros(*seen.shape[:-1], room, dtype=dtype, device=seen.device)[..., :columns]
    return zeros.masked_fill_(~seen, torch.finfo(dtype).min if eager else -torch.inf)[:, None]


def masks_by_type(config: Any, seen: Tensor, position: Tensor, dtype: torch.dtype) -> Any:
    """What the attention takes for the last q of L + c columns that see ``seen`` bool [B, q, L + c] of all.

    A 4-D mask [B, 1, q, L + c], or one for every type of layer where they differ.

    Args:
        config: of the text model, its layers "full_attention" or "sliding_attention".
        position: int64 [L + c], of every column; differences between those of the last q and others matter.
        dtype: of the states.
    """
    types = attention_types(config)
    if types == {"full_attention"}:
        return attention_mask(config, seen, dtype)
    near = seen & (position[-seen.shape[1] :, None] - position < config.sliding_window)
    near = attention_mask(config, near, dtype)
    if len(types) == 1:
        return near
    return {"full_attention": attention_mask(config, seen, dtype), "sliding_attention": near}
