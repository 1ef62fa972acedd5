"""A tiny random model of any causal-LM family: its default configuration with every size made small."""

from __future__ import annotations

from typing import Any

import torch
from transformers import CONFIG_MAPPING, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, AutoModelForCausalLM

VOCAB, THOUGHT = 61, 60
MAX_PARAMETERS = 4_000_000

#: Sizes by the names that configurations give them; whatever else is a number stays as it is.
_SIZES: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "unpadded_vocab_size", "vocab_size_per_layer_input"), VOCAB),
    **dict.fromkeys(("shape_vocab_size", "pronunciation_vocab_size"), VOCAB),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "embedding_size", "emb_dim", "embedding_dim"), 32),
    **dict.fromkeys(("word_embed_proj_dim", "input_embedding_size", "output_embedding_size", "lru_width"), 32),
    **dict.fromkeys(("pronunciation_embed_dim", "shape_embed_dim", "attention_hidden_size", "ple_embed_dim"), 32),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads", "num_encoder_attention_heads"), 4),
    **dict.fromkeys(("num_decoder_attention_heads", "swa_num_attention_heads"), 4),
    **dict.fromkeys(("linear_num_heads", "linear_num_value_heads", "n_kv_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "swa_num_key_value_heads", "num_kv_heads", "num_query_groups"), 2),
    **dict.fromkeys(("linear_num_key_heads", "n_mamba_heads", "n_groups", "mamba_n_groups"), 2),
    **dict.fromkeys(("head_dim", "kv_channels", "v_head_dim", "qk_nope_head_dim", "swa_head_dim", "dim_head"), 8),
    **dict.fromkeys(("index_head_dim", "linear_head_dim", "linear_key_head_dim", "linear_value_head_dim"), 8),
    **dict.fromkeys(("attention_head_size", "d_head", "global_head_dim", "attention_head_dim"), 8),
    **dict.fromkeys(("qk_rope_head_dim", "rotary_dim", "laurel_rank", "hidden_size_per_layer_input"), 4),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "hc_lowrank", "o_lora_rank", "gated_norm_rank"), 8),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "ffn_hidden_size", "moe_intermediate_size", "n_inner"), 48),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "dim_ff", "dff", "d_inner", "feed_forward_size"), 48),
    **dict.fromkeys(("shared_expert_intermediate_size", "shared_experts_intermediate_size"), 48),
    **dict.fromkeys(("shared_intermediate_size", "intermediate_size_mlp", "expert_ffn_hidden_size"), 48),
    **dict.fromkeys(("dense_intermediate_size", "moe_shared_expert_intermediate_size", "router_hidden_size"), 48),
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "num_selected_experts"), 2),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group", "n_shared_experts", "zero_expert_num"), 1),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "context_length"), 256),
    **dict.fromkeys(
        ("max_target_positions", "model_max_length", "rel_extent", "original_max_position_embeddings"), 256
    ),
    **dict.fromkeys(("sliding_window", "sliding_window_size", "window_size", "attention_window_size"), 6),
    "local_attention": 6,
    "index_n_heads": 16,  # enough that not all are 0 after a ReLU, where ties would choose tokens by chance
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads"), 8),
    **dict.fromkeys(("mamba_d_state", "state_size", "ssm_state_size", "mamba_d_head", "mamba_head_dim"), 8),
    **dict.fromkeys(("time_step_rank", "mamba_dt_rank", "d_rel", "adapter_rank", "conv_dim"), 4),
    **dict.fromkeys(("chunk_size", "mamba_chunk_size", "attention_chunk_size", "floor_scale"), 8),
    **dict.fromkeys(("index_topk", "index_topk_blocks", "index_block_size"), 4),
    **dict.fromkeys(("num_mel_bins", "classifier_proj_size", "max_source_positions", "block_multiple_of"), 8),
}
_DEPTH = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers", "num_blocks")
_DEPTH += ("num_encoder_layers", "num_decoder_layers")
_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}

#: What a family needs beside the general rules.
_OPTIONS: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": dict.fromkeys(("sliding_attention", "full_attention"), _ROPE),
    },
    "bamba": {"attn_layer_indices": [1]},
    "blt": {"encoder_hash_byte_group_vocab": 64},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0}},
    "deepseek_v2": {"num_experts_per_tok": 2, "topk_method": "greedy", "topk_group": 1, "n_group": 1},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "moe_intermediate_size": 48},
    "dots3_note_text": {"per_layer_config": {}, "head_dim": 12},
    "flint": {"mlp_only_layers": [0]},
    "gemma3n_text": {
        "num_kv_shared_layers": 1,
        "num_hidden_layers": 3,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "intermediate_size": 48,
        "activation_sparsity_pattern": [0.5] * 3,
    },
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8, "num_experts": 4, "moe_topk": 2},
    "jamba": {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"], "num_hidden_layers": 3, "num_dense_layers": 1},
    "mamba2": {"num_heads": 8},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
        "ngram_vocab_size_base": 61,
    },
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"axial_pos_embds": False},
    "xlstm": {"hidden_size": 64, "embedding_dim": 64, "qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
    },
    "zamba2": {"attention_hidden_size": 64, "attention_head_dim": 16, "mamba_headdim": 8, "n_mamba_heads": 8},
}


def families() -> list[str]:
    """Model types whose class ``AutoModelForCausalLM`` knows, in alphabetic order."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def _layers(values: dict[str, Any], depth: int) -> list[int]:
    """Layers that are kept of ``depth``: the first of every kind, two at least."""
    kinds = [v for v in values.values() if isinstance(v, list) and len(v) == depth and isinstance(v[0], str)]
    first: dict[tuple[str, ...], int] = {}
    for layer in range(depth):
        first.setdefault(tuple(kind[layer] for kind in kinds), layer)
    kept = sorted(first.values())[:4]
    return kept if len(kept) > 1 else [0, min(1, depth - 1)]


def _small(name: str, value: Any, depth: int, kept: list[int]) -> Any:
    """A small value for an option, or the value that it has."""
    if isinstance(value, PretrainedConfig):
        return _options(value)
    if isinstance(value, list) and len(value) == depth and len(kept) < depth:
        return [_small(name, value[layer], depth, kept) for layer in kept]
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return value
    if name in _DEPTH:
        return len(kept)
    if "drop" in name or "jitter" in name:
        return type(value)(0)
    if name in _SPECIAL:
        return min(value, _SPECIAL[name])
    return min(value, _SIZES[name]) if name in _SIZES else value


def _options(config: PretrainedConfig) -> dict[str, Any]:
    """Keyword arguments that make a configuration like ``config`` with small sizes."""
    common = {*PretrainedConfig().to_dict(), "model_type", "torch_dtype"}
    values = {k: v for k, v in vars(config).items() if not k.startswith("_") and k not in common}
    values |= {k: getattr(config, k) for k in _SPECIAL if hasattr(config, k)}
    depth = next((values[name] for name in _DEPTH if isinstance(values.get(name), int)), 0)
    kept = _layers(values, depth)
    small = {name: _small(name, value, depth, kept) for name, value in values.items()}
    if "qk_rope_head_dim" in small:  # latent attention: rotary and other parts of a head, as many keys as queries
        small |= {"head_dim": 4, "num_key_value_heads": 4, "qk_head_dim": 12}
    changed = {name: value for name, value in small.items() if name in values and value != values[name]}
    if isinstance(values.get("eos_token_id"), list):
        changed["eos_token_id"] = 2
    if "is_decoder" in values:
        changed["is_decoder"] = True
    return {**changed, **_OPTIONS.get(config.model_type, {})}


def tiny_config(family: str) -> PretrainedConfig:
    """The configuration of a family, as small as it gets; a decoder where the class can be one or not."""
    config_class = CONFIG_MAPPING[family]
    options = _OPTIONS.get(family, {})
    try:
        default = config_class()
    except Exception:
        default = config_class(**options)
    return config_class(**_options(default))


@torch.no_grad()
def enlarge_weights(model: PreTrainedModel) -> None:
    """Large weights, and random biases and norm weights too, so that no term is trivially 0 or 1."""
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.add_(0.1 * torch.randn_like(parameter))
        else:
            parameter.mul_(3)


def tiny_model(family: str, seed: int = 0) -> PreTrainedModel:
    """A random model in training mode whose every weight matters."""
    config = tiny_config(family)
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config, trust_remote_code=False).parameters())
    if size > MAX_PARAMETERS:
        raise ValueError(f"{family}: expected at most {MAX_PARAMETERS} parameters, got {size}")
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    enlarge_weights(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() != 1:
                parameter[parameter == 0] = 0.02  # the padding's row, whose deviation would be 0
    return model.train()
