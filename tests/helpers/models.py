"""Tiny random models, plain and patched, and what is built around them: trainers' models, recommenders.

One table of shapes, ``CONFIGS``. ``tiny_model`` makes every term of a forward or a gradient matter; ``toy_model`` makes
rankings spread; ``tiny_llama`` has the vocabulary of a tokenizer. The others patch one of these.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

import flr
from flr.data import Catalogue, HistoryViews, PromptTemplate, RecProcessor, build_tokenizer
from flr.recommend.recommender import Recommender
from scripts.families.tiny import enlarge_weights
from tests.helpers.catalogues import DATA, UNEVEN, named_catalogue

VOCAB, HIDDEN = 61, 32
THOUGHT = 60
_SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GPT2_NAMES = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
}
#: What a family has beside the common shape: its class, its options.
CONFIGS: dict[str, tuple[type[transformers.PretrainedConfig], dict[str, Any]]] = {
    "llama": (transformers.LlamaConfig, {}),
    "qwen2": (transformers.Qwen2Config, {"tie_word_embeddings": True}),
    "qwen3": (transformers.Qwen3Config, {"head_dim": 8}),
    "mistral": (transformers.MistralConfig, {"sliding_window": 6}),
    "gemma2": (transformers.Gemma2Config, {"head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 8}),
    "phi": (transformers.PhiConfig, {"partial_rotary_factor": 0.5}),
    "gpt2": (transformers.GPT2Config, {"embd_pdrop": 0, "attn_pdrop": 0, "resid_pdrop": 0}),
}
FAMILIES = tuple(CONFIGS)


def tiny_config(family: str = "llama", **options: Any) -> transformers.PretrainedConfig:
    """The configuration of a family; ``options`` go before those of the table."""
    config_type, own = CONFIGS[family]
    merged = {**_SHAPE, **own, **options}
    if family == "gpt2":
        merged = {_GPT2_NAMES.get(name, name): value for name, value in merged.items()}
        for name in ("intermediate_size", "num_key_value_heads"):
            merged.pop(name)
    return config_type(**merged)


def tiny_model(family: str = "llama", seed: int = 0, **options: Any) -> PreTrainedModel:
    """A model of two layers with large weights; ``options`` are those of its configuration."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(family, **options))
    enlarge_weights(model)
    return model


def toy_model(
    family: str, attention: str | None = None, sliding_window: int | None = None, seed: int = 0
) -> PreTrainedModel:
    """A random model of two layers whose logits spread enough for rankings to be stable; token 9 ends a sequence."""
    options: dict[str, Any] = {"max_position_embeddings": 256, "initializer_range": 0.25, "eos_token_id": 9}
    if family == "gemma2":
        options |= {"sliding_window": sliding_window or 128}
        options |= {"attn_logit_softcapping": 20.0, "final_logit_softcapping": 15.0}
    elif family == "mistral":
        options["sliding_window"] = sliding_window
    elif family == "qwen2":
        options["tie_word_embeddings"] = False
    elif family == "gpt2":
        options |= {"embd_pdrop": 0.1, "attn_pdrop": 0.1, "resid_pdrop": 0.1}
    attention = attention or ("eager" if family == "gemma2" else "sdpa")
    config = tiny_config(family, **options)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    model.generation_config.do_sample = True  # must not matter
    model.generation_config.top_k = 1
    return model.eval()


def tiny_llama(vocab_size: int, **shape: Any) -> PreTrainedModel:
    """A Llama with as many tokens as a tokenizer has."""
    sizes = {"hidden_size": HIDDEN, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{"vocab_size": vocab_size, **sizes, **shape}))


def wake(model: PreTrainedModel) -> None:
    """Make the reasoner's effect large and its gates uneven, so that a test that ignores them fails."""
    with torch.no_grad():
        model.flr.rescale(50)
        for name in ("gate", "gate_factor"):
            getattr(model.flr, name).normal_(std=0.3)
        model.flr.query.normal_(std=HIDDEN**-0.5)


def patched_model(
    family: str = "llama", dtype: torch.dtype = torch.float32, seed: int = 0, **config: Any
) -> PreTrainedModel:
    """``tiny_model`` with a reasoner that is awake; ``config`` is that of the reasoner."""
    model = tiny_model(family, seed).to(dtype)
    flr.patch_model(model, config=flr.FLRConfig(**{"thought_token_id": THOUGHT, **config}))
    if config.get("variant", "flr") == "flr":
        wake(model)
    return model


def trainable(
    codec: str = "id", views: HistoryViews | None = None, layers: int = 1, uneven: bool = False, **config: Any
):
    """A patched Llama and its processor over the items of ``DATA``, with titles of ``uneven`` length where wanted."""
    torch.manual_seed(0)
    catalogue = UNEVEN if uneven else DATA.catalogue
    tokenizer = build_tokenizer(catalogue, codec, vocab_size=400)
    options = flr.FLRConfig(**{"anchor": "last", **config})
    processor = RecProcessor(
        tokenizer,
        catalogue,
        codec,
        num_thoughts=options.thought_count,
        views=views,
        max_title_tokens=4 if codec == "title" else None,
    )
    model = tiny_llama(len(tokenizer), num_hidden_layers=layers, tie_word_embeddings=True, initializer_range=0.2)
    return flr.patch_model(model, tokenizer, options), processor


def build_recommender(
    codec: str = "id", family: str = "llama", catalogue: Catalogue | None = None, **options: Any
) -> Recommender:
    """A recommender with factors that matter, over forty items unless a catalogue is given."""
    catalogue = catalogue or named_catalogue()
    config = flr.FLRConfig(**{"num_factors": 3, **options})
    processor = RecProcessor(
        build_tokenizer(catalogue, codec, vocab_size=300),
        catalogue,
        codec,
        PromptTemplate(),
        num_thoughts=config.thought_count,
    )
    model = tiny_model(family)
    if len(processor.tokenizer) > model.config.vocab_size:
        model.resize_token_embeddings(len(processor.tokenizer), mean_resizing=False)
    with torch.no_grad():  # resized rows are alike otherwise
        model.get_input_embeddings().weight.add_(0.3 * torch.randn_like(model.get_input_embeddings().weight))
    flr.patch_model(model, processor.tokenizer, config)
    if config.variant == "flr":
        wake(model)
    return Recommender(model.eval(), processor)
