"""G noisy thoughts a user against one copy of the prompt: the forward of a latent GRPO step.

    prompt [L] ──> H and its keys and values, once a user, without gradient where the backbone is frozen
    H ──> reasoner ──> r_1;   member i:  e_i1 = anchor + r_1 + σ ε_i1,   ε_0 = 0
    packed row of G · (N + S - 1) tokens  ──>  log p(target | prompt, thoughts of member i)  [B, G, S]

The members of a user are tokens of one row. Each sees the prompt and itself, by a block mask or in two calls that are
merged, so the prompt's keys and values exist once; positions go on after the prompt in every member. The last target
token predicts nothing and has no column. With N > 1 thoughts each is noisy; thought n + 1 of a member is made from the
prompt's hidden states and those of the member's own earlier thoughts, so the first thought is shared and the later ones
are the member's own. Attention that can do neither gets the prompt's cache expanded to B·G rows instead; where keys and
values are not all that a model knows of a prompt, every member is encoded from its first token.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from flr.config import IGNORE

from .backbone import backbone_trains, is_checkpointing, may_look
from .catalogue_loss import CatalogueLoss
from .head import MAX_LOSS_LOGITS, head_logprob, row_losses
from .outputs import GroupInputs, GroupOutput
from .packed_members import PackedMembers, Prompt, encode_prompts
from .reasoner import LOSSES, ReasonerOutput
from .token_table import embedding_width
from .verify import traits_of


def _check(model: Any, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, group: GroupInputs) -> None:
    config = model._flr_patch.config
    batch, width = input_ids.shape
    thoughts, hidden = config.thought_count, embedding_width(model)
    if config.mixes:
        raise ValueError("aggregation: expected thought for a group forward, which perturbs one thought, got mixture")
    if not hasattr(model, "flr"):
        raise ValueError(
            f"variant: expected flr, offsets or latentr3, which make a thought to perturb, got {config.variant}"
        )
    if width <= thoughts:
        raise ValueError(f"input_ids: expected more than {thoughts} columns, prompts and thought tokens, got {width}")
    for name, x in (("attention_mask", attention_mask), ("position_ids", position_ids)):
        if x.shape != input_ids.shape:
            raise ValueError(f"{name}: expected shape {tuple(input_ids.shape)}, got {tuple(x.shape)}")
    targets, mask, noise, nodes = group.targets, group.target_mask, group.noise, group.target_nodes
    if targets.dim() != 2 or len(targets) != batch or targets.shape[1] == 0:
        raise ValueError(f"targets: expected [{batch}, S] with S >= 1, got shape {tuple(targets.shape)}")
    if mask.shape != targets.shape or mask.dtype != torch.bool:
        raise ValueError(f"target_mask: expected bool {tuple(targets.shape)}, got {mask.dtype} {tuple(mask.shape)}")
    if noise.dim() != 4 or noise.shape[1] < 1 or (noise.shape[0], *noise.shape[2:]) != (batch, thoughts, hidden):
        raise ValueError(f"noise: expected [{batch}, G, {thoughts}, {hidden}], got shape {tuple(noise.shape)}")
    if group.policy not in ("tokens", "thoughts"):
        raise ValueError(f"policy: expected tokens or thoughts, got {group.policy!r}")
    if group.likelihood and group.actions is not None:
        raise ValueError("actions: expected None with likelihood, whose targets they do not reach, got a pair")
    if group.policy == "thoughts" and torch.is_grad_enabled() and backbone_trains(model):
        raise ValueError("policy: expected tokens for a backbone that trains, got thoughts, which do not reach it")
    if (group.catalogue_loss is None) != (nodes is None) or (nodes is not None and nodes.shape != mask.shape):
        raise ValueError(
            f"target_nodes: expected {tuple(mask.shape)} with a catalogue_loss and none without, got another"
        )
    if not isinstance(group.noise_scale, Tensor) and group.noise_scale < 0:
        raise ValueError(f"noise_scale: expected a number >= 0, got {group.noise_scale}")
    if model.training and is_checkpointing(model):
        raise ValueError("gradient checkpointing: expected off, got on; it excludes the KV cache that members share")
    if not may_look(input_ids):
        return  # which would wait for the device
    if not bool((input_ids[:, -thoughts:] == config.thought_token_id).all()):
        raise ValueError(f"input_ids: expected {thoughts} thought tokens at the end of every row, got others")
    if not bool((attention_mask.diff(dim=1) >= 0).all() and (attention_mask[:, -thoughts - 1 :] != 0).all()):
        raise ValueError("attention_mask: expected prompts of one token or more, padded on the left alone, got others")
    if not bool((mask.int().diff(dim=1) <= 0).all() and mask[:, 0].all()):
        raise ValueError("target_mask: expected true from column 0 to a row's last target token, got others")
    if bool(noise[:, 0].any()):
        raise ValueError("noise: expected zeros for member 0 of every group, got others")


@contextlib.contextmanager
def _gradients(needed: bool) -> Iterator[None]:
    with torch.set_grad_enabled(needed and torch.is_grad_enabled()):
        yield


class _Thoughts:
    """The members' noisy thoughts, made one after another, and what is computed of each."""

    def __init__(self, model: Any, group: GroupInputs, history: Tensor, valid: Tensor) -> None:
        self.model, self.group, self.history, self.valid = model, group, history, valid
        self.batch, self.length = history.shape[:2]
        self.embeddings: list[Tensor] = []  # [B, G, D], as fed
        self.actions: list[Tensor] = []  # [B, G, D], r + σ ε
        self.sigmas: list[Tensor] = []  # [B, G]
        self.logprobs: list[Tensor] = []  # [B, G]
        self.outs: list[ReasonerOutput] = []
        self.kl: Any = 0.0  # [B]

    def noisy_thought(self, anchor: Tensor) -> Tensor:
        """Embeddings [B, G, D] of the next thought, anchor [B, D] + r + σ ε."""
        group, n = self.group, len(self.outs)
        position = self.length - 1 + n
        out = self.model.flr(self.history, self.valid, position)
        r = out.thought.view(self.batch, -1, out.thought.shape[-1])  # [B, 1 or G, D]: the first thought is shared
        if group.actions is None:
            sigma = torch.ones_like(r[..., :1]) * group.noise_scale  # [B, 1 or G, 1]
            if group.relative:
                sigma = sigma * r.detach().square().mean(-1, keepdim=True).sqrt()
            noisy = r + sigma * group.noise[:, :, n].to(r.dtype)
        else:
            noisy, sigma = group.actions[0][:, :, n], group.actions[1][:, :, n, None]
        if group.policy == "thoughts":
            free = noisy.detach()
            noisy = torch.cat([noisy[:, :1], free[:, 1:]], 1) if group.likelihood else free
        variance = 2 * sigma.square() + torch.finfo(r.dtype).tiny
        self.logprobs.append(-((noisy.detach() - r).square() / variance).sum(-1))
        if group.reference is not None:
            with torch.no_grad():
                theirs = group.reference(self.history, self.valid, position).thought.view_as(r)
            self.kl = self.kl + ((r - theirs).square() / variance).sum(-1).mean(1)
        self.embeddings.append(anchor[:, None] + noisy.to(anchor.dtype))
        self.actions.append(noisy.detach())
        self.sigmas.append(sigma[..., 0].expand(-1, group.noise.shape[1]))
        self.outs.append(out)
        return self.embeddings[-1]

    def extend(self, state: Tensor) -> None:
        """Let the next thought be made from the members' states [B, G, 1, D] after the last one, too."""
        state = state.flatten(0, 1)
        if len(self.history) != len(state):
            members = len(state) // len(self.history)
            self.history, self.valid = (x.repeat_interleave(members, 0) for x in (self.history, self.valid))
        self.history = torch.cat([self.history, state], 1)
        self.valid = torch.cat([self.valid, self.valid.new_ones(len(self.valid), 1)], 1)

    def regularisers(self) -> Tensor:
        """Weighted sum [B] of the reasoner's regularisers, mean over thoughts and members."""
        config, sums = self.model._flr_patch.config, []
        for out in self.outs:
            total: Any = sum(getattr(config, f"{name}_weight") * out.user_losses[name] for name in LOSSES)
            sums.append(total.view(self.batch, -1).mean(1))
        return torch.stack(sums).mean(0)


def group_forward(
    model: Any,
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    reasoner_mask: Tensor | None,
    group: GroupInputs,
) -> GroupOutput:
    """Target log-probabilities of G noisy thoughts a user; reached as ``model(**prompts, group=GroupInputs(...))``.

    The call goes through the wrapped module's forward, so DDP and FSDP average gradients. There is no dropout on the
    thought here: noise takes its place; put the model into eval mode to have none in the backbone either.

    Args:
        model: patched, variant "flr" or "latentr3".
        input_ids: int64 [B, L + N], left-padded, the last N columns the thought token.
        attention_mask, position_ids: int64 [B, L + N]; by default nothing is padding, positions count unpadded tokens.
        reasoner_mask: bool [B, L + N] or None.
        group: targets, noise and reference.

    Raises:
        ValueError: a shape does not fit, gradient checkpointing is on, and on the CPU, where a look is free: right
            padding, thought tokens elsewhere, noise on member 0.
    """
    config = model._flr_patch.config
    if input_ids is None:
        raise ValueError("input_ids: expected int64 [B, L + N], got None; a group forward takes no inputs_embeds")
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    if position_ids is None:
        position_ids = (attention_mask.long().cumsum(1) - 1).clamp_min(0)
    _check(model, input_ids, attention_mask, position_ids, group)
    thoughts = config.num_thoughts
    batch, length = len(input_ids), input_ids.shape[1] - thoughts
    members, steps = group.noise.shape[1], group.targets.shape[1]
    table = model.get_input_embeddings()

    with _gradients(backbone_trains(model)):
        embeds = table(input_ids)  # [B, L + N, D]
        ids = None if traits_of(model).embeds else input_ids[:, :length]
        prompt = embeds[:, :length]
        tokens = input_ids[:, :length]
        history, kv = encode_prompts(
            model, prompt, ids, attention_mask[:, :length], position_ids[:, :length], tokens=tokens
        )
        targets = table(group.targets[:, : steps - 1])  # [B, S - 1, D]
    begun = Prompt(prompt, ids, kv, attention_mask[:, :length], position_ids[:, length : length + 1])
    suffix = PackedMembers(model, begun, members, thoughts + steps)
    thought_ids = group.targets.new_full((batch, members, 1), config.thought_token_id)

    valid = attention_mask[:, :length].bool()
    if reasoner_mask is not None:
        valid = valid & reasoner_mask[:, :length]
    anchor = {"last": embeds.select(1, length - 1), "none": torch.zeros_like(embeds[:, 0])}.get(config.anchor)
    grad_through_targets = group.policy == "tokens" or group.likelihood  # from the targets to the thoughts
    made = _Thoughts(model, group, history, valid)
    for n in range(thoughts):
        embedding = made.noisy_thought(embeds.select(1, length + n) if anchor is None else anchor)
        if n < thoughts - 1:
            with _gradients(grad_through_targets):
                made.extend(suffix.run(embedding[:, :, None], thought_ids))
    logprobs = prompts = None
    if group.actions is None:
        target_tokens = targets[:, None].expand(-1, members, -1, -1)
        with _gradients(grad_through_targets):
            embeddings = torch.cat([embedding[:, :, None], target_tokens.to(embedding.dtype)], 2)
            target_ids = group.targets[:, None, : steps - 1].expand(-1, members, -1)
            hidden = suffix.run(embeddings, torch.cat([thought_ids, target_ids], 2))  # [B, G, S, D]
            target_ids = group.targets if group.target_nodes is None else group.target_nodes
            mask = group.target_mask[:, None]
            logprobs = target_logprobs(model, hidden, target_ids[:, None], mask, group.catalogue_loss)
        if group.decodable and suffix.packed:
            prompts = suffix.prompts(thoughts, steps, hidden[:, :, 0], position_ids[:, :length])

    first, last = made.outs[0], made.outs[-1]
    gates = first.gates[:, -1].detach()
    return GroupOutput(
        logprobs=logprobs,
        thought_logprobs=torch.stack(made.logprobs, -1),
        regularisers=made.regularisers(),
        kl=None if group.reference is None else made.kl,
        actions=(torch.stack(made.actions, 2), torch.stack(made.sigmas, -1)),
        thoughts=torch.stack(made.embeddings, 2).detach(),
        thought_norm=last.thought.detach().view(batch, -1, last.thought.shape[-1])[:, 0].norm(dim=-1),
        gate_entropy=-torch.special.xlogy(gates, gates).sum(-1),
        prompts=prompts,
    )


def target_logprobs(
    model: Any, hidden: Tensor, targets: Tensor, mask: Tensor, catalogue_loss: CatalogueLoss | None = None
) -> Tensor:
    """log p of targets [B, 1, S] given hidden states [B, G, S, D]: [B, G, S], 0 where ``mask`` [B, 1, S] is false.

    With a ``catalogue_loss``, targets are its nodes. On a CPU the lm_head runs on target rows alone; elsewhere on all,
    since a choice of rows would wait for the device. Their logits are kept for the backward where they are few, else
    recomputed.
    """
    shape = hidden.shape[:-1]
    chosen = mask.expand(shape)
    fixed = not may_look(mask)
    if fixed:
        rows, targets = hidden.flatten(0, -2), targets.expand(shape).masked_fill(~chosen, IGNORE).flatten()
    else:
        rows, targets = hidden[chosen], targets.expand(shape)[chosen]
    if catalogue_loss is not None:
        values = -catalogue_loss(model, rows, targets)
    elif not rows.is_cuda and len(rows) * model.config.get_text_config(decoder=True).vocab_size <= MAX_LOSS_LOGITS:
        values = -row_losses(model, rows, targets, 0.0)
    else:
        values = head_logprob(model, rows, targets.clamp_min(0))
    if fixed:
        return torch.where(chosen, values.view(shape), 0.0)
    return torch.zeros(shape, dtype=values.dtype, device=values.device).masked_scatter(chosen, values)
