"""The way without a shared prompt: the whole sequence runs through the model once more for every thought.

After LatentR3 (arXiv 2505.19092; Shengxiang-Lin/LatentR3, src/latent for the supervised step and
src/grpo_attention_tuning at 75d08a0 for RL): hidden states of the whole input, thought, the whole input again with the
thought in its place; in RL every group member is a full copy of prompt and target. Two styles:

    published   the causal LM as a whole, lm_head on every token in the passes that make thoughts, and in the last pass
                of the supervised step; in RL that one keeps logits of target rows, as `logits_to_keep` does there, and
                a rollout without gradient gives the rewards before the same passes again with gradient
    best        lm_head on target rows in the last pass only, rewards from the pass that is differentiated

Checked by racing LatentR3's own code on one model with its own layer for a thought: equal losses and gradients, an RL
step 17.6 and 20.8 times as long as ours at 1 and 4 prompts, a supervised step 2.26 times (docs/log.md, 2026-11-26).

The prompts end in N thought tokens in the same columns (left padding); targets are padded on the right.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from flr.model.head import head


def _join(prompt: Tensor, target: Tensor, members: int) -> Tensor:
    """Rows [B·G, L + N + S] of prompts [B, L + N] and targets [B, S]."""
    return torch.cat([prompt, target], 1).repeat_interleave(members, 0)


def _passes(model, ids, mask, positions, reasoner_mask, noisy, published, start, kept=None):
    """Last hidden states [R, W, D] (logits [R, W, V] when published, of the columns ``kept`` where given) and the
    thoughts' outputs; ``noisy(n, r)`` perturbs; thoughts stand from column ``start`` on."""
    config, original = model._flr_patch.config, model._flr_patch.original(model)
    kwargs = {"attention_mask": mask, "position_ids": positions, "use_cache": False}
    embeds = model.get_input_embeddings()(ids)
    anchors = {"last": embeds[:, start - 1], "none": torch.zeros_like(embeds[:, 0])}
    outs = []

    def run(inputs, **more):
        if published:
            out = original(inputs_embeds=inputs, output_hidden_states=True, **kwargs, **more)
            return out.hidden_states[-1], out.logits
        return model.base_model(inputs_embeds=inputs, **kwargs).last_hidden_state, None

    inputs = embeds
    for n in range(config.num_thoughts):
        column = start + n
        hidden, _ = run(inputs)
        valid = mask[:, :column].bool()
        if reasoner_mask is not None:
            valid = valid & (reasoner_mask[:, :column] | (ids[:, :column] == config.thought_token_id))
        out = model.flr(hidden[:, :column], valid, column - 1)
        anchor = anchors.get(config.anchor, embeds[:, column])
        inputs = inputs.clone()
        inputs[:, column] = anchor + noisy(n, out.thought).to(anchor.dtype)
        outs.append(out)
    hidden, logits = run(inputs, **({"logits_to_keep": kept} if published and kept is not None else {}))
    return hidden if logits is None else logits, outs


def group_logprobs(model, prompts: dict[str, Tensor], group, published: bool = False) -> tuple[Tensor, list]:
    """log p of the targets [B, G, S], 0 behind a row's target, and the thoughts' outputs (B·G rows)."""
    batch, members = group.noise.shape[:2]
    width, steps = prompts["input_ids"].shape[1], group.targets.shape[1]
    ids = _join(prompts["input_ids"], group.targets, members)
    mask = _join(prompts["attention_mask"], group.target_mask.long(), members)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    narrowed = prompts.get("reasoner_mask")
    if narrowed is not None:
        narrowed = _join(narrowed, torch.zeros_like(group.target_mask), members)
    noise = group.noise.flatten(0, 1)  # [B·G, N, D]

    def noisy(n: int, r: Tensor) -> Tensor:
        rms = r.detach().square().mean(-1, keepdim=True).sqrt() if group.relative else 1.0
        return r + group.noise_scale * rms * noise[:, n].to(r.dtype)

    columns = torch.arange(width - 1, width - 1 + steps, device=ids.device)
    start = width - model._flr_patch.config.num_thoughts
    last, outs = _passes(model, ids, mask, positions, narrowed, noisy, published, start, columns)
    logits = last if published else head(model, last[:, columns])
    logits = logits if logits.dtype == torch.float64 else logits.float()
    chosen = logits.log_softmax(-1).gather(-1, ids[:, width:, None])[..., 0]
    target_mask = group.target_mask.repeat_interleave(members, 0)
    return chosen.masked_fill(~target_mask, 0).view(batch, members, steps), outs


def group_loss(logprobs: Tensor, target_mask: Tensor, kind: str = "grpo", eps: float = 1e-4) -> tuple[Tensor, Tensor]:
    """On-policy loss -mean A_i · mean_s log p_is (its gradient is that of the clipped surrogate) and the advantages [B,
    G]."""
    weight = target_mask[:, None].to(logprobs.dtype)
    mean = (logprobs * weight).sum(-1) / weight.sum(-1)
    rewards = -(-mean.detach()).exp()
    if kind == "latentr3":
        centred = rewards - rewards[:, 0].mean()
        advantages = centred / (centred.square().sum().sqrt() + eps)
    elif kind == "rloo":
        others = (rewards.sum(1, keepdim=True) - rewards) / max(rewards.shape[1] - 1, 1)
        advantages = rewards - others if rewards.shape[1] > 1 else torch.zeros_like(rewards)
    else:
        centred = rewards - rewards.mean(1, keepdim=True)
        std = rewards.std(1, keepdim=True) if rewards.shape[1] > 1 else torch.zeros_like(rewards)
        advantages = centred / (std + eps) if kind == "grpo" else centred
    return -(advantages * mean).mean(), advantages


def rl_step(model, prompts: dict[str, Tensor], group, published: bool, kind: str = "grpo") -> Tensor:
    """Loss of one RL step; gradients are left in ``.grad``."""
    if published:
        with torch.no_grad():
            rollout = group_logprobs(model, prompts, group, True)[0]
        advantages = group_loss(rollout, group.target_mask, kind)[1]
        logprobs = group_logprobs(model, prompts, group, True)[0]
        weight = group.target_mask[:, None].to(logprobs.dtype)
        loss = -(advantages * (logprobs * weight).sum(-1) / weight.sum(-1)).mean()
    else:
        loss = group_loss(group_logprobs(model, prompts, group)[0], group.target_mask, kind)[0]
    loss.backward()
    return loss.detach()


def sft_step(model, inputs: dict[str, Tensor], published: bool) -> Tensor:
    """Loss of one supervised step, regularisers included; gradients are left in ``.grad``."""
    config = model._flr_patch.config
    ids, labels = inputs["input_ids"], inputs["labels"]
    mask = inputs["attention_mask"]
    start = int((ids[0] == config.thought_token_id).int().argmax())
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    last, outs = _passes(model, ids, mask, positions, None, lambda _, r: r, published, start)
    wanted = labels[:, 1:]
    if published:
        logits, wanted = last[:, :-1].flatten(0, 1), wanted.flatten()
    else:
        chosen = wanted != -100
        logits, wanted = head(model, last[:, :-1][chosen]), wanted[chosen]
    loss = cross_entropy(logits if logits.dtype == torch.float64 else logits.float(), wanted)
    for name in ("orthogonality", "diversity", "sparsity"):
        loss = loss + getattr(config, f"{name}_weight") * torch.stack([out.losses[name] for out in outs]).mean()
    loss.backward()
    return loss.detach()
