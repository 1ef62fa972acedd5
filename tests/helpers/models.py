"""Tiny random models of the families that are tested, and the naive two-pass computation that ours must equal."""

from __future__ import annotations

import torch
from transformers import (
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PhiConfig,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

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
CONFIGS = {
    "llama": lambda: LlamaConfig(**_SHAPE),
    "qwen2": lambda: Qwen2Config(**_SHAPE, tie_word_embeddings=True),
    "qwen3": lambda: Qwen3Config(**_SHAPE, head_dim=8),
    "mistral": lambda: MistralConfig(**_SHAPE, sliding_window=6),
    "gemma2": lambda: Gemma2Config(**_SHAPE, head_dim=8, sliding_window=6, query_pre_attn_scalar=8),
    "phi": lambda: PhiConfig(**_SHAPE, partial_rotary_factor=0.5),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCAB, n_embd=HIDDEN, n_layer=2, n_head=4, n_positions=128, embd_pdrop=0, attn_pdrop=0, resid_pdrop=0,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    ),
}  # fmt: skip
FAMILIES = list(CONFIGS)


def tiny_model(family: str = "llama", seed: int = 0, **overrides) -> torch.nn.Module:
    torch.manual_seed(seed)
    config = CONFIGS[family]()
    for name, value in overrides.items():
        setattr(config, name, value)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():  # random biases and norm weights too, so that no term is trivially 0 or 1
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
            else:
                parameter.mul_(3)
    return model


def wake(model) -> None:
    """Make the reasoner's effect large and its gates uneven, so that a test that ignores them fails."""
    with torch.no_grad():
        model.flr.rescale(50)
        for name in ("gate", "gate_factor"):
            getattr(model.flr, name).normal_(std=0.3)
        model.flr.query.normal_(std=HIDDEN**-0.5)


def batch(layout: str, num_thoughts: int = 1, seed: int = 0, rows_without: int = 1):
    """input_ids, attention_mask, labels of four users. layout: "left", "right" or "columns" (thoughts off line)."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(n):
        return torch.randint(3, THOUGHT, (n,), generator=generator)

    users = []
    for i, (prompt, target) in enumerate([(9, 3), (5, 4), (12, 2), (7, 3)]):
        if layout == "left":
            target = 3  # left padding and common thought columns: targets of one length
        thought = torch.full((0 if i < rows_without else num_thoughts,), THOUGHT)
        p, t = tokens(prompt), tokens(target)
        users.append((torch.cat([p, thought, t]), torch.cat([torch.full((len(p) + len(thought),), -100), t])))
    length = max(len(x) for x, _ in users) + 1
    ids, mask, labels = [], [], []
    for i, (x, y) in enumerate(users):
        pad = length - len(x)
        left = {"left": pad, "right": 0, "columns": i % 2 * pad}[layout]
        ids.append(torch.nn.functional.pad(x, (left, pad - left), value=0))
        labels.append(torch.nn.functional.pad(y, (left, pad - left), value=-100))
        mask.append(torch.nn.functional.pad(torch.ones_like(x), (left, pad - left), value=0))
    return {"input_ids": torch.stack(ids), "attention_mask": torch.stack(mask), "labels": torch.stack(labels)}


def naive(model, input_ids, attention_mask, labels, position_ids=None, reasoner_mask=None):
    """Loss and logits with the whole sequence encoded once more for every thought: N + 1 passes, user by user."""
    config, original = model._flr_patch.config, model._flr_patch.original
    embeds = model.get_input_embeddings()(input_ids)
    kwargs = {"attention_mask": attention_mask, "position_ids": position_ids, "use_cache": False}
    regularisers = []
    for n in range(config.num_thoughts):
        hidden = model.base_model(inputs_embeds=embeds, **kwargs).last_hidden_state
        embeds = embeds.clone()
        for b, row in enumerate(input_ids):
            where = (row == THOUGHT).nonzero()[:, 0]
            if len(where) == 0:
                continue
            first, column = int(where[0]), int(where[n])
            valid = attention_mask[b, :column].bool()
            if reasoner_mask is not None:
                valid = valid & (reasoner_mask[b, :column] | (row[:column] == THOUGHT))
            out = model.flr(hidden[b : b + 1, :column], valid[None], column - 1)
            anchors = model.get_input_embeddings()(row)
            anchor = {"token": anchors[column], "last": anchors[first - 1], "none": torch.zeros_like(anchors[0])}
            embeds[b, column] = anchor[config.anchor] + out.thought[0].to(embeds.dtype)
            regularisers.append(out.losses)
    logits = original(inputs_embeds=embeds, **kwargs).logits
    loss = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).to(torch.promote_types(logits.dtype, torch.float32)), labels[:, 1:].flatten()
    )
    for name in ("orthogonality", "diversity", "sparsity"):
        weight = getattr(config, f"{name}_weight")
        loss = loss + weight * torch.stack([r[name] for r in regularisers]).mean() if regularisers else loss
    return loss, logits


def gradients(model, loss):
    names, parameters = zip(*[(n, p) for n, p in model.named_parameters() if p.requires_grad], strict=True)
    values = torch.autograd.grad(loss, parameters, allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for n, p, g in zip(names, parameters, values, strict=True)}


def assert_same_gradients(actual, expected, relative):
    """Every parameter's gradient within ``relative`` of the expected one, by norm; none trivially zero."""
    assert actual.keys() == expected.keys()
    largest = max(g.norm() for g in expected.values())
    for name, value in expected.items():
        assert torch.isfinite(actual[name]).all(), name
        error = (actual[name] - value).norm()
        assert error <= relative * max(value.norm(), 1e-2 * largest), (name, float(error), float(value.norm()))
