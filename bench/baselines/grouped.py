"""A shared-prefix group forward for latent RL: a pass for the thought, then all members behind one copy of the prompt.

The second pass follows Prefix Grouper (arXiv 2506.05433; johncaged/PrefixGrouper at 1accedc): a user's prompt and the
G suffixes are one row [L + G·(N + S - 1)] through embeddings, norms and MLPs, and every layer's attention is computed
in two calls of the model's own attention function, the prompt on itself and each suffix on the prompt's keys and
values, repeated for the members, and its own. Its code knows no latent thought, so the first pass makes one as
LatentR3 does, from the prompt alone, and a pass more for every further thought. Kindest reading: views where the
published code gathers by index, lm_head on target rows alone, no column for the last target token, rewards from the
pass that is differentiated, and a first pass without gradient where the backbone is frozen.

Checked against the published code by running its `PrefixGrouper` on the same queries, keys and values: output and
gradients of the attention are equal to the bit (docs/log.md, 2026-11-26). tests/bench/test_baselines.py compares the
whole step with the two-pass baseline, in loss and gradients, in float64.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from flr.model.head import head

from .two_pass import group_loss

NAME = "bench_grouped"


class Masks:
    """What prompts of `length` tokens and suffixes of `steps` see, from `valid` bool [B, L], false on left padding."""

    def __init__(self, valid: Tensor, members: int, steps: int) -> None:
        self.length = valid.shape[1]
        diagonal = torch.eye(self.length, dtype=torch.bool, device=valid.device)  # no row of padding is empty
        causal = torch.ones_like(diagonal).tril() & valid[:, None, None]
        capturing = valid.is_cuda and torch.cuda.is_current_stream_capturing()  # which may not look
        self.prompt = None if not capturing and bool(valid.all()) else causal | diagonal
        own = torch.ones(steps, steps, dtype=torch.bool, device=valid.device).tril()
        seen = valid.repeat_interleave(members, 0)[:, None, None]
        self.suffix = torch.cat([seen.expand(-1, 1, steps, -1), own.expand(len(seen), 1, -1, -1)], -1)


def grouped_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, _: Any, masks: Masks, members: int, **kwargs: Any
) -> tuple[Tensor, None]:
    """Attention of rows [B, heads, L + G·s, d], prompts first, as [B, L + G·s, heads, d]."""
    length = masks.length

    def suffixes(x: Tensor) -> Tensor:  # [B·G, heads, s, d]
        return x[:, :, length:].unflatten(2, (members, -1)).transpose(1, 2).flatten(0, 1)

    kwargs["is_causal"] = None
    prompts = [x[:, :, :length] for x in (query, key, value)]
    out, _ = sdpa_attention_forward(module, *prompts, masks.prompt, **kwargs)
    keys, values = (
        torch.cat([x.repeat_interleave(members, 0), suffixes(y)], 2)
        for x, y in zip(prompts[1:], (key, value), strict=True)
    )
    theirs, _ = sdpa_attention_forward(module, suffixes(query), keys, values, masks.suffix, **kwargs)
    theirs = theirs.unflatten(0, (-1, members)).flatten(1, 2)
    return torch.cat([out, theirs], 1), None


AttentionInterface.register(NAME, grouped_attention)
AttentionMaskInterface.register(NAME, lambda *_, **__: None)


def _grouped_pass(model: Any, prompt: Tensor, suffix: Tensor, mask: Tensor) -> Tensor:
    """Hidden states [B, G, s, D] of suffixes [B, G, s, D] behind prompts [B, L, D], both in one row."""
    members, steps = suffix.shape[1:3]
    before = mask.sum(1, keepdim=True)
    own = before + torch.arange(steps, device=mask.device).repeat(members)
    positions = torch.cat([(mask.cumsum(1) - 1).clamp_min(0), own], 1)
    config = model.config
    kept, config._attn_implementation = config._attn_implementation, NAME
    try:
        out = model.base_model(
            inputs_embeds=torch.cat([prompt, suffix.flatten(1, 2)], 1), position_ids=positions, use_cache=False,
            masks=Masks(mask.bool(), members, steps), members=members,
        )  # fmt: skip
    finally:
        config._attn_implementation = kept
    return out.last_hidden_state[:, prompt.shape[1] :].unflatten(1, (members, steps))


def group_logprobs(model: Any, prompts: dict[str, Tensor], group: Any) -> Tensor:
    """log p of the targets [B, G, S], 0 behind a row's target."""
    config = model._flr_patch.config
    ids, mask = prompts["input_ids"], prompts["attention_mask"]
    members, steps, thoughts = group.noise.shape[1], group.targets.shape[1], config.num_thoughts
    length = ids.shape[1] - thoughts
    embeds, mask = model.get_input_embeddings()(ids), mask[:, :length]
    prompt = embeds[:, :length]
    frozen = not any(p.requires_grad for p in model.base_model.parameters())
    with torch.no_grad() if frozen else nullcontext():
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        history = model.base_model(
            inputs_embeds=prompt, attention_mask=mask, position_ids=positions, use_cache=False
        ).last_hidden_state
    valid = mask.bool()
    if "reasoner_mask" in prompts:
        valid = valid & prompts["reasoner_mask"][:, :length]
    suffix = prompt.new_zeros(len(ids), members, 0, prompt.shape[-1])
    for n in range(thoughts):
        r = model.flr(history, valid, length - 1 + n).thought.unflatten(0, (len(ids), -1))  # [B, 1 or G, D]
        rms = r.detach().square().mean(-1, keepdim=True).sqrt() if group.relative else 1.0
        noisy = r + group.noise_scale * rms * group.noise[:, :, n].to(r.dtype)
        anchor = {"last": embeds[:, length - 1], "none": torch.zeros_like(embeds[:, 0])}.get(config.anchor)
        anchor = embeds[:, length + n] if anchor is None else anchor
        suffix = torch.cat([suffix, (anchor[:, None] + noisy.to(prompt.dtype))[:, :, None]], 2)
        if n < thoughts - 1:
            own = _grouped_pass(model, prompt, suffix, mask)[:, :, -1].flatten(0, 1)[:, None]
            repeat = len(own) // len(history)
            history, valid = (x.repeat_interleave(repeat, 0) for x in (history, valid))
            history, valid = torch.cat([history, own], 1), torch.cat([valid, valid.new_ones(len(valid), 1)], 1)
    targets = model.get_input_embeddings()(group.targets[:, : steps - 1])[:, None].expand(-1, members, -1, -1)
    hidden = _grouped_pass(model, prompt, torch.cat([suffix, targets], 2), mask)[:, :, thoughts - 1 :]
    logits = head(model, hidden)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    chosen = group.targets[:, None, :, None].expand(-1, members, -1, -1)
    chosen = logits.gather(-1, chosen)[..., 0] - logits.logsumexp(-1)
    return chosen.masked_fill(~group.target_mask[:, None], 0)


def rl_step(model: Any, prompts: dict[str, Tensor], group: Any, kind: str = "grpo") -> Tensor:
    """Loss of one RL step; gradients are left in ``.grad``."""
    loss, _ = group_loss(group_logprobs(model, prompts, group), group.target_mask, kind)
    loss.backward()
    return loss.detach()
