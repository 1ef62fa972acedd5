"""Put factorized latent reasoning into a Hugging Face causal LM, and take it out again. Instances only."""

from __future__ import annotations

import dataclasses
import logging
import types
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from flr.config import FLRConfig

from .base import base_of
from .forward import flr_forward
from .reasoner import build_reasoner
from .verify import Traits, find_traits

logger = logging.getLogger("flr")

#: Fields of a shipped generation config that survive: token ids and lengths, nothing that changes a ranking.
_KEPT_GENERATION = ("bos_token_id", "eos_token_id", "pad_token_id", "max_length", "max_new_tokens")


@dataclass
class Patch:
    """What ``unpatch_model`` needs to put things back."""

    config: FLRConfig
    original: Any  # the bound forward that was
    had_forward: Any  # an instance attribute ``forward`` of somebody else's, or None
    generation_config: GenerationConfig | None
    ignored_keys: Any  # the config instance's own keys_to_ignore_at_inference, or None
    vocab_size: int | None  # rows of the embedding before it grew, else None
    own_vocab_size: bool  # whether the model had an attribute of that name before
    traits: Traits | None = None  # what holds for the model; None until it was tried, on the meta device


def patch_model(
    model: Any,
    tokenizer: PreTrainedTokenizerBase | None = None,
    config: FLRConfig | None = None,
    *,
    verify: bool = True,
) -> Any:
    """Give a decoder-only causal LM a latent thought, in place.

    Adds the reasoner as ``model.flr`` (weights in float32 or above), the thought token to ``tokenizer`` and, if it
    does not fit, a row to the embeddings; replaces ``forward`` of this instance. Sampling options that the base model
    ships in its ``generation_config`` are set aside (and logged), so that they never change a ranking silently; pass
    them to ``generate`` to use them. Prompts end with ``config.num_thoughts`` thought tokens; a row without one
    behaves as before.

    Args:
        model: any Hugging Face decoder-only causal LM. Patch before ``get_peft_model(..., modules_to_save=["flr"])``.
        tokenizer: extended in place; None if ``config.thought_token_id`` is given.
        config: defaults to ``FLRConfig()``. A copy is kept, as ``model.config.flr`` too.
        verify: run eight tokens through the model to check that hidden states and lm_head compose to its logits and
            to scale the thought to ``config.init_scale`` of the input embeddings; skipped on the meta device.

    Returns:
        ``model``.

    Raises:
        ValueError: patched already, not a decoder-only causal LM, no thought token, or the check failed.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> tiny = LlamaConfig(vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        ...                    num_attention_heads=4, num_key_value_heads=2)
        >>> model = patch_model(LlamaForCausalLM(tiny), config=FLRConfig(num_factors=4, thought_token_id=49))
        >>> out = model(input_ids=torch.tensor([[5, 6, 7, 49, 8]]), labels=torch.tensor([[-100, -100, -100, -100, 8]]))
        >>> out.flr.attention.shape, out.flr.gates.shape
        (torch.Size([1, 2, 4, 3]), torch.Size([1, 2, 4]))
        >>> unpatch_model(model) is model, hasattr(model, "flr")
        (True, False)
    """
    if not issubclass(type(model), PreTrainedModel):
        hint = " (patch the base model first, then get_peft_model(..., modules_to_save=['flr']))"
        peft = hint if hasattr(model, "get_base_model") else ""
        raise ValueError(f"model: expected a transformers PreTrainedModel, got {type(model).__name__}{peft}")
    if is_patched(model):
        raise ValueError("model: expected an unpatched model, got a patched one; call flr.unpatch_model first")
    text_config = model.config.get_text_config(decoder=True)
    if model.config.is_encoder_decoder or model.get_output_embeddings() is None or base_of(model) is model:
        raise ValueError(f"model: expected a decoder-only causal LM, got {type(model).__name__}")
    if not hasattr(text_config, "hidden_size"):
        raise ValueError(f"model: expected hidden_size in its config, got {type(text_config).__name__} without one")
    config = dataclasses.replace(config or FLRConfig())
    old_size, own_vocab_size = None, "vocab_size" in model.__dict__
    if config.thought_count:
        config.thought_token_id = _thought_token(config, tokenizer)
        rows = model.get_input_embeddings().weight.shape[0]
        needed = max(config.thought_token_id + 1, 0 if tokenizer is None else len(tokenizer))
        if needed > rows:
            model.resize_token_embeddings(needed, mean_resizing=False)
            old_size = rows
            _fill_new_rows(model, rows)
    embedding = model.get_input_embeddings().weight
    on_meta = embedding.device.type == "meta"
    reasoner = build_reasoner(text_config.hidden_size, config)
    if reasoner is not None:
        model.flr = reasoner.to(embedding.device, torch.promote_types(embedding.dtype, torch.float32))
    patch = Patch(
        config=config,
        original=model.forward,
        had_forward=model.__dict__.get("forward"),
        generation_config=model.generation_config,
        ignored_keys=model.config.__dict__.get("keys_to_ignore_at_inference"),
        vocab_size=old_size,
        own_vocab_size=own_vocab_size,
    )
    model.__dict__["_flr_patch"] = patch
    model.forward = types.MethodType(flr_forward, model)
    ignored = getattr(model.config, "keys_to_ignore_at_inference", None) or []
    model.config.keys_to_ignore_at_inference = [*ignored, "flr"]
    try:
        if not on_meta:
            find_traits(model, patch, scale=verify)
        _neutral_generation(model, patch)
    except BaseException:
        unpatch_model(model)
        raise
    model.config.flr = config.to_dict()
    return model


def unpatch_model(model: Any) -> Any:
    """Undo :func:`patch_model`: forward, embeddings' size, config and generation config are what they were.

    The tokenizer keeps its thought token. Weights trained meanwhile stay trained.

    Raises:
        ValueError: the model is not patched.
    """
    if not is_patched(model):
        raise ValueError("model: expected a patched model, got an unpatched one")
    patch: Patch = model.__dict__["_flr_patch"]
    del model.forward
    if patch.had_forward is not None:
        model.forward = patch.had_forward
    del model.__dict__["_flr_patch"]
    if hasattr(model, "flr"):
        del model.flr
    model.generation_config = patch.generation_config
    del model.config.keys_to_ignore_at_inference
    if patch.ignored_keys is not None:
        model.config.keys_to_ignore_at_inference = patch.ignored_keys
    if hasattr(model.config, "flr"):
        del model.config.flr
    if patch.vocab_size is not None:
        model.resize_token_embeddings(patch.vocab_size, mean_resizing=False)
        if not patch.own_vocab_size:
            model.__dict__.pop("vocab_size", None)
    return model


def is_patched(model: torch.nn.Module) -> bool:
    """Whether :func:`patch_model` has been applied to this instance."""
    return "_flr_patch" in model.__dict__


def _thought_token(config: FLRConfig, tokenizer: PreTrainedTokenizerBase | None) -> int:
    if tokenizer is None:
        if config.thought_token_id is None:
            raise ValueError("tokenizer: expected a tokenizer or config.thought_token_id, got neither")
        return config.thought_token_id
    token_id = tokenizer.get_vocab().get(config.thought_token)
    if token_id is None:
        tokenizer.add_tokens([config.thought_token], special_tokens=True)
        token_id = tokenizer.get_vocab()[config.thought_token]
    if config.thought_token_id not in (None, token_id):
        raise ValueError(
            f"thought_token_id: expected {token_id}, the tokenizer's id of {config.thought_token!r}, "
            f"got {config.thought_token_id}"
        )
    return token_id


@torch.no_grad()
def _fill_new_rows(model: Any, old_size: int) -> None:
    """New tokens start as the mean of the old embeddings, in both tables."""
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        weight = module.weight
        if weight.device.type != "meta" and weight.shape[0] > old_size:
            weight[old_size:] = weight[:old_size].float().mean(0).to(weight.dtype)


def _neutral_generation(model: Any, patch: Patch) -> None:
    """A generation config without shipped sampling options that never emits the thought token.

    It does without a cache where the model's does not continue a prompt.
    """
    shipped, config = model.generation_config, patch.config
    if shipped is None:
        return
    kept = {k: getattr(shipped, k) for k in _KEPT_GENERATION if getattr(shipped, k, None) is not None}
    dropped = {
        k: v
        for k, v in shipped.to_diff_dict().items()
        if k not in ("transformers_version", "_from_model_config", "use_cache", *_KEPT_GENERATION)
        and not k.startswith(("output_", "return_"))
        and not (k == "suppress_tokens" and v == [config.thought_token_id])
    }
    if dropped:
        logger.warning("generation_config of the base model set aside: %s", dropped)
    if config.thought_token_id is not None:
        kept["suppress_tokens"] = [config.thought_token_id]
    if patch.traits is not None and not patch.traits.steps:
        kept["use_cache"] = False
    model.generation_config = GenerationConfig(**kept)


def reasoner_parameters(model: torch.nn.Module) -> list[Tensor]:
    """Parameters of the reasoner, for an optimizer group of their own."""
    return [p for name, p in model.named_parameters() if ".flr." in f".{name}"]
