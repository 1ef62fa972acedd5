"""G noisy thoughts a user against one copy of the prompt: the forward of a latent GRPO step.

    prompt [L] ──> H and its keys and values, once a user, without gradient where the backbone is frozen
    H ──> reasoner ──> r_1;   member i:  e_i1 = anchor + r_1 + σ ε_i1,   ε_0 = 0
    packed row of G · (N + S - 1) tokens  ──>  log p(target | prompt, thoughts of member i)  [B, G, S]

The members of a user are tokens of one row. A block mask lets each see the prompt and itself, so the prompt's keys and
values exist once; positions go on after the prompt in every member. The last target token predicts nothing and has no
column. With N > 1 thoughts each is noisy; thought n + 1 of a member is made from the prompt's hidden states and those
of the member's own earlier thoughts, so the first thought is shared and the later ones are the member's own.
Attention that takes no 4-D mask gets the prompt's cache expanded to B·G rows instead.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from .backbone import is_checkpointing
from .head import MAX_LOSS_LOGITS, head_logprob, row_losses
from .reasoner import LOSSES, ReasonerOutput

if TYPE_CHECKING:
    from .catalogue_loss import CatalogueLoss
from .backbone import backbone_trains, takes_positions
from .outputs import GroupInputs, GroupOutput
from .packed_members import PackedMembers

logger = logging.getLogger("flr")


def _check(model: Any, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, group: GroupInputs) -> None:
    config = model._flr_patch.config
    batch, width = input_ids.shape
    thoughts, hidden = config.thought_count, model.get_input_embeddings().weight.shape[-1]
    if not hasattr(model, "flr"):
        raise ValueError(f"variant: expected flr or latentr3, which make a thought to perturb, got {config.variant}")
    if width <= thoughts:
        raise ValueError(f"input_ids: expected more than {thoughts} columns, prompts and thought tokens, got {width}")
    for name, x in (("attention_mask", attention_mask), ("position_ids", position_ids)):
        if x.shape != input_ids.shape:
            raise ValueError(f"{name}: expected shape {tuple(input_ids.shape)}, got {tuple(x.shape)}")
    targets, mask, noise = group.targets, group.target_mask, group.noise
    if targets.dim() != 2 or len(targets) != batch or targets.shape[1] == 0:
        raise ValueError(f"targets: expected [{batch}, S] with S >= 1, got shape {tuple(targets.shape)}")
    if mask.shape != targets.shape or mask.dtype != torch.bool:
        raise ValueError(f"target_mask: expected bool {tuple(targets.shape)}, got {mask.dtype} {tuple(mask.shape)}")
    if noise.dim() != 4 or noise.shape[1] < 1 or (noise.shape[0], *noise.shape[2:]) != (batch, thoughts, hidden):
        raise ValueError(f"noise: expected [{batch}, G, {thoughts}, {hidden}], got shape {tuple(noise.shape)}")
    if group.policy not in ("tokens", "thoughts"):
        raise ValueError(f"policy: expected tokens or thoughts, got {group.policy!r}")
    if group.policy == "thoughts" and torch.is_grad_enabled() and backbone_trains(model):
        raise ValueError("policy: expected tokens for a backbone that trains, got thoughts, which do not reach it")
    if (group.catalogue is None) != (group.edges is None) or (
        group.edges is not None and group.edges.shape != mask.shape
    ):
        raise ValueError(f"edges: expected {tuple(mask.shape)} with a catalogue and none without, got another")
    if group.noise_scale < 0:
        raise ValueError(f"noise_scale: expected a number >= 0, got {group.noise_scale}")
    if model.training and is_checkpointing(model):
        raise ValueError("gradient checkpointing: expected off, got on; it excludes the KV cache that members share")
    if input_ids.device.type != "cpu":
        return  # looking at the data would wait for the device
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


def _regularisers(config: Any, out: ReasonerOutput, batch: int) -> Tensor:
    """Weighted sum [B] of a thought's regularisers; mean over members where each made its own."""
    total: Any = sum(getattr(config, f"{name}_weight") * out.user_losses[name] for name in LOSSES)
    return total.view(batch, -1).mean(1)


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
        ValueError: a shape does not fit, gradient checkpointing is on, and on the CPU, where a look is free: right padding,
            thought tokens elsewhere, noise on member 0.
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
        positions = {"position_ids": position_ids[:, :length]} if takes_positions(model) else {}
        kv = DynamicCache()  # plain layers: sliding ones must keep the whole prompt, the mask has the window
        history = model.base_model(
            inputs_embeds=embeds[:, :length],
            attention_mask=attention_mask[:, :length],
            past_key_values=kv,
            use_cache=True,
            return_dict=True,
            **positions,
        ).last_hidden_state  # [B, L, D]
        targets = table(group.targets[:, : steps - 1])  # [B, S - 1, D]
    suffix = PackedMembers(model, kv, attention_mask[:, :length], position_ids[:, length, None], members)

    valid = attention_mask[:, :length].bool()
    if reasoner_mask is not None:
        valid = valid & reasoner_mask[:, :length]
    anchor = {"last": embeds[:, length - 1], "none": torch.zeros_like(embeds[:, 0])}.get(config.anchor)
    fed, actions, sigmas, chances = [], [], [], []  # of every thought
    outs: list[ReasonerOutput] = []
    kl: Any = 0.0
    through = group.policy == "tokens"  # gradients pass from the targets to the thoughts
    for n in range(thoughts):
        out = model.flr(history, valid, length - 1 + n)
        r = out.thought.view(batch, -1, out.thought.shape[-1])  # [B, 1 or G, D]: the first thought is shared
        if group.actions is None:
            sigma = torch.full_like(r[..., :1], group.noise_scale)  # [B, 1 or G, 1]
            if group.relative:
                sigma = sigma * r.detach().square().mean(-1, keepdim=True).sqrt()
            noisy = r + sigma * group.noise[:, :, n].to(r.dtype)
        else:
            noisy, sigma = group.actions[0][:, :, n], group.actions[1][:, :, n, None]
        noisy = noisy if through else noisy.detach()
        variance = 2 * sigma.square() + torch.finfo(r.dtype).tiny
        chances.append(-((noisy.detach() - r).square() / variance).sum(-1))
        if group.reference is not None:
            with torch.no_grad():
                wanted = group.reference(history, valid, length - 1 + n).thought.view_as(r)
            kl = kl + ((r - wanted).square() / variance).sum(-1).mean(1)
        here = embeds[:, length + n] if anchor is None else anchor
        fed.append(here[:, None] + noisy.to(here.dtype))
        actions.append(noisy.detach())
        sigmas.append(sigma[..., 0].expand(-1, members))
        outs.append(out)
        if n < thoughts - 1:
            with _gradients(through):
                state = suffix.run(fed[-1][:, :, None]).flatten(0, 1)  # [B·G, 1, D]
            if n == 0:
                history, valid = (x.repeat_interleave(members, 0) for x in (history, valid))
            history = torch.cat([history, state], 1)
            valid = torch.cat([valid, valid.new_ones(len(valid), 1)], 1)
    logprobs = prompts = None
    if group.actions is None:
        behind = targets[:, None].expand(-1, members, -1, -1)
        with _gradients(through):
            hidden = suffix.run(torch.cat([fed[-1][:, :, None], behind.to(fed[-1].dtype)], 2))  # [B, G, S, D]
            wanted = group.targets if group.edges is None else group.edges
            logprobs = target_logprobs(model, hidden, wanted[:, None], group.target_mask[:, None], group.catalogue)
        if group.decodable and suffix.packed:
            prompts = suffix.prompts(thoughts, steps, hidden[:, :, 0], position_ids[:, :length])

    first, last = outs[0], outs[-1]
    gates = first.gates[:, -1].detach()
    return GroupOutput(
        logprobs=logprobs,
        thought_logprobs=torch.stack(chances, -1),
        regularisers=torch.stack([_regularisers(config, out, batch) for out in outs]).mean(0),
        kl=None if group.reference is None else kl,
        actions=(torch.stack(actions, 2), torch.stack(sigmas, -1)),
        thoughts=torch.stack(fed, 2).detach(),
        thought_norm=last.thought.detach().view(batch, -1, last.thought.shape[-1])[:, 0].norm(dim=-1),
        gate_entropy=-torch.special.xlogy(gates, gates).sum(-1),
        prompts=prompts,
    )


def target_logprobs(
    model: Any, hidden: Tensor, targets: Tensor, mask: Tensor, catalogue: CatalogueLoss | None = None
) -> Tensor:
    """log p of targets [B, 1, S] given hidden states [B, G, S, D]: [B, G, S], 0 where ``mask`` [B, 1, S] is false.

    With a catalogue, targets are its edges.

    The lm_head runs on target rows alone. Their logits are kept for the backward where they are few, else recomputed.
    """
    shape = hidden.shape[:-1]
    chosen = mask.expand(shape)
    rows, wanted = hidden[chosen], targets.expand(shape)[chosen]
    if catalogue is not None:
        found = -catalogue(model, rows, wanted)
    elif rows.shape[0] * model.config.get_text_config().vocab_size <= MAX_LOSS_LOGITS:
        found = -row_losses(model, rows, wanted, 0.0)
    else:
        found = head_logprob(model, rows, wanted)
    return torch.zeros(shape, dtype=found.dtype, device=found.device).masked_scatter(chosen, found)
