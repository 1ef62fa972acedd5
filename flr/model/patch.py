"""Put factorized latent reasoning into a Hugging Face causal LM, and take it out again. Instances only."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from flr.config import FLRConfig

from .backbone import is_patched
from .base import base_of
from .bypass import finish_call, flr_base_forward, note_call
from .forward import flr_forward
from .generate import flr_generate, flr_init_continuous_batching, flr_logits_processor, flr_stopping_criteria
from .methods import Method, add_hooks, remove_hooks
from .saved_config import flr_save_pretrained
from .shared_prompt import shares
from .variants import build_reasoner
from .verify import Traits, find_traits
from .vocabulary import Tables, flr_resize_token_embeddings, grow, teach, thought_id

logger = logging.getLogger("flr")

#: What a patch replaces in the instance.
_REPLACED: dict[str, Callable[..., Any]] = {
    "forward": flr_forward,
    "generate": flr_generate,
    "_get_logits_processor": flr_logits_processor,
    "_get_stopping_criteria": flr_stopping_criteria,
    "init_continuous_batching": flr_init_continuous_batching,
    "save_pretrained": flr_save_pretrained,
    "resize_token_embeddings": flr_resize_token_embeddings,
}

#: Fields of a shipped generation config that survive: token ids and lengths, nothing that changes a ranking.
_KEPT_GENERATION = ("bos_token_id", "eos_token_id", "pad_token_id", "max_length", "max_new_tokens")


_PEFT = " (patch the base model first, then get_peft_model(..., modules_to_save=['flr']))"


@dataclass
class Patch:
    """What ``unpatch_model`` needs to put things back."""

    config: FLRConfig
    had: dict[str, Any]  # instance attributes of somebody else's that ours hide: forward, generate, base.forward
    generation_config: GenerationConfig | None
    ignored_keys: Any  # the config instance's own keys_to_ignore_at_inference, or None
    vocab_size: int | None  # rows of the embedding before it grew, else None
    own_vocab_size: bool  # whether the model had an attribute of that name before
    hooks: list[int]  # ids of ours
    traits: Traits | None = None  # what holds for the model; None until it was tried, on the meta device
    pending: Any = None  # see flr.model.bypass
    prompt_cache: Any = None  # a PromptCache while a training uses one
    checked: bool = False  # whether the first batch that thoughts were inserted into has been looked at
    is_named: bool = True  # whether a tokenizer or the caller said the thought's id; else it follows the tokens

    def original(self, model: Any, name: str = "forward") -> Callable[..., Any]:
        """The model's own method of this name, one of those that are replaced."""
        return self.had[name] if name in self.had else partial(getattr(type(model), name), model)

    def base_forward(self, base: Any) -> Callable[..., Any]:
        """The base model's own ``forward``."""
        # not by __get__, which Dynamo takes for the instance's attribute, which is ours; nor as a method made by hand
        return self.had.get("base.forward") or partial(type(base).forward, base)


def patch_model(
    model: Any,
    tokenizer: PreTrainedTokenizerBase | None = None,
    config: FLRConfig | None = None,
    *,
    verify: bool = True,
    **options: Any,
) -> Any:
    """Give a decoder-only causal LM a latent thought, in place.

    Adds the reasoner as ``model.flr`` (weights in float32 or above), the thought token to ``tokenizer`` and, if it
    does not fit, a row to the embeddings; replaces ``forward`` and ``generate`` of this instance. Nothing else is
    needed: a batch that brings no thought token gets ``config.num_thoughts`` of them in every row, before its first
    label, or at the end of its prompt where there are no labels, and logits come back in the columns of the caller. A
    batch that brings thought tokens is left alone (a row without one has no thought then). Sampling options that the
    base model ships in its ``generation_config`` are set aside (and logged), so that they never change a ranking
    silently; pass them to ``generate`` to use them.

    Whatever fails, the model and the tokenizer are left as they were.

    Args:
        model: any Hugging Face decoder-only causal LM. Patch before ``get_peft_model(..., modules_to_save=["flr"])``.
        tokenizer: extended in place. Without one the thought's id is ``config.thought_token_id``, or the first after
            the model's embeddings, and ``model.resize_token_embeddings(len(tokenizer))`` moves it behind tokens that
            are added later; :func:`add_thought_token` teaches it to a tokenizer.
        config: defaults to ``FLRConfig()``. A copy is kept, as ``model.config.flr`` too.
        verify: run eight tokens through the model to check that hidden states and lm_head compose to its logits and
            to scale the thought to ``config.init_scale`` of the input embeddings; skipped on the meta device.
        options: fields of :class:`flr.FLRConfig` that replace those of ``config``.

    Returns:
        ``model``.

    Raises:
        ValueError: patched or with adapters already, not a decoder-only causal LM, an unknown option, or the check
            failed.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> tiny = LlamaConfig(vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        ...                    num_attention_heads=4, num_key_value_heads=2)
        >>> model = patch_model(LlamaForCausalLM(tiny), num_factors=4)
        >>> model.config.flr["thought_token_id"], model.config.vocab_size
        (50, 51)
        >>> out = model(input_ids=torch.tensor([[5, 6, 7, 8]]), labels=torch.tensor([[-100, -100, -100, 8]]))
        >>> out.logits.shape, out.flr.attention.shape, out.flr.gates.shape
        (torch.Size([1, 4, 51]), torch.Size([1, 2, 4, 3]), torch.Size([1, 2, 4]))
        >>> unpatch_model(model) is model, hasattr(model, "flr")
        (True, False)
    """
    if not issubclass(type(model), PreTrainedModel):
        peft = _PEFT if hasattr(model, "get_base_model") else ""
        raise ValueError(f"model: expected a transformers PreTrainedModel, got {type(model).__name__}{peft}")
    if is_patched(model):
        raise ValueError("model: expected an unpatched model, got a patched one; call flr.unpatch_model first")
    if getattr(model, "peft_config", None):
        raise ValueError(f"model: expected one without adapters, with which PEFT saves no reasoner, got some{_PEFT}")
    if model.config.is_encoder_decoder or model.get_output_embeddings() is None or base_of(model) is model:
        raise ValueError(f"model: expected a decoder-only causal LM, got {type(model).__name__}")
    text_config = model.config.get_text_config(decoder=True)
    if not hasattr(text_config, "hidden_size"):
        raise ValueError(f"model: expected hidden_size in its config, got {type(text_config).__name__} without one")
    unknown = set(options) - {f.name for f in dataclasses.fields(FLRConfig)}
    if unknown:
        raise ValueError(f"options: expected fields of FLRConfig, got {', '.join(sorted(unknown))}")
    config = dataclasses.replace(config or FLRConfig(), **options)
    before = _Before(model)
    try:
        _patch(model, tokenizer, config, verify)
        if tokenizer is not None and config.thought_count:
            teach(tokenizer, config)  # last: a tokenizer cannot forget
    except BaseException:
        before.restore()
        raise
    return model


def _patch(model: Any, tokenizer: PreTrainedTokenizerBase | None, config: FLRConfig, verify: bool) -> None:
    """The steps of :func:`patch_model`; any may raise."""
    old_size, own_vocab_size, is_named = None, "vocab_size" in model.__dict__, True
    if config.thought_count:
        is_named = tokenizer is not None or config.thought_token_id is not None
        config.thought_token_id = thought_id(model, config, tokenizer)
        tokens = 0 if tokenizer is None else len(tokenizer)
        old_size = grow(model, max(config.thought_token_id + 1, tokens))
    embedding = model.get_input_embeddings().weight
    reasoner = build_reasoner(model.config.get_text_config(decoder=True).hidden_size, config)
    if reasoner is not None:
        model.flr = reasoner.to(embedding.device, torch.promote_types(embedding.dtype, torch.float32))
    base = base_of(model)
    had = {name: model.__dict__[name] for name in _REPLACED if name in model.__dict__}
    if "forward" in base.__dict__:
        had["base.forward"] = base.__dict__["forward"]
    patch = Patch(
        config=config,
        had=had,
        generation_config=model.generation_config,
        ignored_keys=model.config.__dict__.get("keys_to_ignore_at_inference"),
        vocab_size=old_size,
        own_vocab_size=own_vocab_size,
        hooks=add_hooks(model, note_call, finish_call),
        is_named=is_named,
    )
    model.__dict__["_flr_patch"] = patch
    for name, function in _REPLACED.items():
        setattr(model, name, Method(function, model, more=type(model).forward if name == "forward" else None))
    base.forward = Method(flr_base_forward, base, like=type(base).forward)
    base.__dict__["_flr_owner"] = model  # not as a submodule
    # An attribute of the class in most families, absent in some, and in none from transformers 5.24 on.
    ignored = getattr(model.config, "keys_to_ignore_at_inference", None) or []
    model.config.keys_to_ignore_at_inference = [*ignored, "flr"]
    if embedding.device.type != "meta":
        find_traits(model, patch, scale=verify)
        shares(model, preferred=embedding.device.type == "cpu")  # tried here, not in somebody's first step
    _neutral_generation(model, patch)
    model.config.flr = config.to_dict()


class _Before:
    """A model as it was before :func:`patch_model` touched it."""

    def __init__(self, model: Any) -> None:
        self.model, self.tables = model, Tables(model)
        self.attributes, self.options = dict(model.__dict__), dict(model.config.__dict__)
        self.modules = dict(model._modules)
        self.base, self.base_attributes = base_of(model), dict(base_of(model).__dict__)
        self.hooks = {name: dict(hooks) for name, hooks in model.__dict__.items() if "_hooks" in name}

    def restore(self) -> None:
        model = self.model
        self.tables.restore()
        for name, hooks in self.hooks.items():
            model.__dict__[name].clear()
            model.__dict__[name].update(hooks)
        for mine, theirs in (
            (model.__dict__, self.attributes),
            (model.config.__dict__, self.options),
            (self.base.__dict__, self.base_attributes),
        ):
            for name in set(mine) - set(theirs):
                del mine[name]
            mine.update(theirs)
        model._modules.clear()
        model._modules.update(self.modules)


def unpatch_model(model: Any) -> Any:
    """Undo :func:`patch_model`: forward, embeddings' size, config and generation config are what they were.

    The tokenizer keeps its thought token. Weights trained meanwhile stay trained, and embeddings that the caller
    resized meanwhile keep the rows of the caller's tokens.

    Raises:
        ValueError: the model is not patched.
    """
    if not is_patched(model):
        raise ValueError("model: expected a patched model, got an unpatched one")
    patch: Patch = model.__dict__["_flr_patch"]
    for name in _REPLACED:
        model.__dict__.pop(name, None)
    remove_hooks(model, patch.hooks)
    for name in ("forward", "_flr_owner"):
        base_of(model).__dict__.pop(name, None)
    for name, value in patch.had.items():
        owner = base_of(model) if name.startswith("base.") else model
        owner.__dict__[name.removeprefix("base.")] = value
    del model.__dict__["_flr_patch"]
    if hasattr(model, "flr"):
        del model.flr
    model.generation_config = patch.generation_config
    model.config.__dict__.pop("keys_to_ignore_at_inference", None)
    if patch.ignored_keys is not None:
        model.config.keys_to_ignore_at_inference = patch.ignored_keys
    if hasattr(model.config, "flr"):
        del model.config.flr
    if patch.vocab_size is not None:
        model.resize_token_embeddings(patch.vocab_size, mean_resizing=False)
        if not patch.own_vocab_size:
            model.__dict__.pop("vocab_size", None)
    return model


def _neutral_generation(model: Any, patch: Patch) -> None:
    """A generation config without shipped sampling options that never emits the thought token.

    It does without a cache where the model's does not continue a prompt, or one of several thoughts.
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
    if config.mixes or (patch.traits is not None and not patch.traits.steps):
        kept["use_cache"] = False
    model.generation_config = GenerationConfig(**kept)


def reasoner_parameters(model: torch.nn.Module) -> list[Tensor]:
    """Parameters of the reasoner, for an optimizer group of their own."""
    return [p for name, p in model.named_parameters() if ".flr." in f".{name}"]
