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
import inspect
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache
from transformers.utils.generic import ModelOutput

from .forward import MAX_LOSS_LOGITS, _is_checkpointing, _row_losses
from .head import head_logprob
from .reasoner import LOSSES, ReasonerOutput

if TYPE_CHECKING:
    from flr.decode.group import GroupPrompts

    from .catalogue_loss import CatalogueLoss

logger = logging.getLogger("flr")


@dataclass
class GroupInputs:
    """What a group forward needs beside the prompts.

    Attributes:
        targets: int64 [B, S], a user's target tokens from column 0 on; anything behind them.
        target_mask: bool [B, S], true on target tokens; every row starts with a true one and has no gap.
        noise: [B, G, N, D], ε of unit variance; member 0 of every group is the unperturbed one and must be 0.
        noise_scale: σ, absolute or in units of the RMS of the user's thought r.
        relative: which of the two.
        policy: "tokens", log-probabilities of the targets pass gradients to the thoughts; or "thoughts", they do not (the
            suffix runs without a graph), and those of the noisy thoughts do.
        reference: a frozen reasoner; gives the KL of the noisy thoughts from its own.
        actions: r + σ ε [B, G, N, D] of an earlier forward, and their σ [B, G, N]: only ``thought_logprobs`` of these
            are computed then, and neither noise nor targets are looked at.
        catalogue, edges: normalise targets over their siblings in the catalogue instead of the vocabulary; edges int64 [B, S]
            are ``catalogue.edges`` of the targets (-100 behind them).
        decodable: also give ``prompts``.
    """

    targets: Tensor
    target_mask: Tensor
    noise: Tensor
    noise_scale: float = 1.0
    relative: bool = True
    policy: str = "tokens"
    reference: nn.Module | None = None
    actions: tuple[Tensor, Tensor] | None = None
    catalogue: CatalogueLoss | None = None
    edges: Tensor | None = None
    decodable: bool = False


@dataclass
class GroupOutput(ModelOutput):
    """Result of a group forward.

    Attributes:
        logprobs: [B, G, S] log p of every target token given a member's thoughts, 0 behind a row's target; float32 or
            float64; None for given actions.
        thought_logprobs: [B, G, N], log N(r + σ ε; r, σ²) less its constant, -‖r + σ ε - r‖² / (2 σ²), the action fixed:
            its gradient is (ε / σ) · dr.
        regularisers: [B], weighted sum of the reasoner's regularisers, mean over thoughts and members.
        kl: [B], Σ_n ‖r_n - r_n^ref‖² / (2 σ²), mean over members; None without a reference.
        actions: r + σ ε [B, G, N, D] and σ [B, G, N], no gradient.
        thoughts: [B, G, N, D], the embeddings fed at the thought tokens, no gradient.
        thought_norm: [B], ‖r‖₂ of the unperturbed member's last thought, no gradient.
        gate_entropy: [B], of the last refinement of the first thought, nats, no gradient.
        prompts: what ``flr.decode.group.group_ranks`` goes on from, if asked for; None where members have caches of their own.
    """

    logprobs: Tensor | None = None
    thought_logprobs: Tensor | None = None
    regularisers: Tensor | None = None
    kl: Tensor | None = None
    actions: tuple[Tensor, Tensor] | None = None
    thoughts: Tensor | None = None
    thought_norm: Tensor | None = None
    gate_entropy: Tensor | None = None
    prompts: GroupPrompts | None = None


@cache
def _say_once(message: str) -> None:
    logger.warning(message)


def backbone_trains(model: nn.Module) -> bool:
    """Whether anything but the reasoner needs a gradient."""
    return any(p.requires_grad and ".flr." not in f".{name}" for name, p in model.named_parameters())


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
    if model.training and _is_checkpointing(model):
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


class _Suffix:
    """The columns behind the prompts, what they may see, and the cache they are appended to."""

    def __init__(self, model: Any, cache: DynamicCache, prompt_mask: Tensor, first: Tensor, members: int) -> None:
        self.model, self.cache, self.prompt_mask, self.first, self.members = model, cache, prompt_mask, first, members
        self.config = model.config.get_text_config(decoder=True)
        device = prompt_mask.device
        self.member = torch.zeros(0, dtype=torch.int64, device=device)  # of every column
        self.offset = torch.zeros(0, dtype=torch.int64, device=device)  # tokens since the prompt
        self.positioned = _takes_positions(model)
        obstacle = packing_obstacle(model)
        self.packed = obstacle is None
        if obstacle is not None:
            _say_once(f"the prompt's cache is expanded to every group member instead of shared: {obstacle}")
            cache.batch_repeat_interleave(members)
            self.prompt_mask, self.first = (x.repeat_interleave(members, 0) for x in (prompt_mask, first))

    def run(self, embeds: Tensor) -> Tensor:
        """Hidden states [B, G, n, D] of the next n tokens of every member."""
        batch, members, length, size = embeds.shape
        offset = self.offset.max() + 1 if len(self.offset) else self.offset.new_zeros(())
        offsets = offset + torch.arange(length, device=embeds.device)
        if not self.packed:
            self.offset = torch.cat([self.offset, offsets])
            ones = self.prompt_mask.new_ones(len(self.prompt_mask), len(self.offset))
            mask: Any = torch.cat([self.prompt_mask, ones], 1)
            rows = batch * members
        else:
            member = torch.arange(members, device=embeds.device).repeat_interleave(length)
            offsets = offsets.repeat(members)
            self.member, self.offset = torch.cat([self.member, member]), torch.cat([self.offset, offsets])
            sees = (member[:, None] == self.member) & (offsets[:, None] >= self.offset)  # [G n, columns]
            mask = self._masks(sees, offsets, embeds.dtype)
            rows = batch
        out = self.model.base_model(
            inputs_embeds=embeds.reshape(rows, -1, size),
            attention_mask=mask,
            past_key_values=self.cache,
            use_cache=True,
            return_dict=True,
            **({"position_ids": self.first + offsets} if self.positioned else {}),
        )
        return out.last_hidden_state.view(batch, members, length, size)

    def prompts(self, thoughts: int, steps: int, hidden: Tensor, position_ids: Tensor) -> GroupPrompts:
        """The prompts and thoughts alone, the last of which began a run of ``steps`` tokens; hidden states [B, G, D] after it."""
        from flr.decode.group import GroupPrompts  # which stands on this package

        length, device = self.prompt_mask.shape[1], hidden.device
        earlier = torch.arange(length + (thoughts - 1) * self.members, device=device)
        last = len(earlier) + torch.arange(self.members, device=device) * steps
        kept = torch.cat([earlier, last])
        plain = DynamicCache()
        layers: list[Any] = list(self.cache.layers)
        for n, layer in enumerate(layers):
            plain.update(layer.keys.detach()[:, :, kept], layer.values.detach()[:, :, kept], n)
        return GroupPrompts(plain, self.member[kept[length:] - length], hidden.detach(), self.prompt_mask, position_ids)

    def _masks(self, sees: Tensor, offsets: Tensor, dtype: torch.dtype) -> Any:
        """4-D mask of the prompt's columns and the members' own; by layer type where they differ."""
        batch, length = self.prompt_mask.shape
        full = torch.cat(
            [
                self.prompt_mask[:, None].bool().expand(-1, len(sees), -1),
                sees.expand(batch, -1, -1),
            ],
            -1,
        )

        def finished(mask: Tensor) -> Tensor:
            if self.config._attn_implementation != "eager":
                return mask[:, None]
            zeros = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
            return zeros.masked_fill_(~mask, torch.finfo(dtype).min)[:, None]

        types = _layer_types(self.config)
        if types == {"full_attention"}:
            return finished(full)
        columns = torch.cat([torch.arange(-length, 0, device=sees.device), self.offset])
        near = finished(full & (offsets[:, None] - columns < self.config.sliding_window))
        return near if len(types) == 1 else {"full_attention": finished(full), "sliding_attention": near}


def _layer_types(config: Any) -> set[str]:
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None) or ["full_attention" if window is None else "sliding_attention"]
    return set(types) if window is not None else {t.replace("sliding_attention", "full_attention") for t in types}


def _takes_positions(model: Any) -> bool:
    return "position_ids" in inspect.signature(type(model.base_model).forward).parameters


def packing_obstacle(model: Any) -> str | None:
    """Why the members cannot be packed into one row with a 4-D mask, or None."""
    config = model.config.get_text_config(decoder=True)
    attention = getattr(config, "_attn_implementation", None)
    if attention not in ("sdpa", "eager"):
        return f"{attention} attention takes no 4-D mask"
    if not _takes_positions(model) or getattr(config, "alibi", False):
        return f"{type(model).__name__} derives positions from the attention mask"
    odd = _layer_types(config) - {"full_attention", "sliding_attention"}
    return f"it has layers of type {', '.join(sorted(odd))}" if odd else None


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
        positions = {"position_ids": position_ids[:, :length]} if _takes_positions(model) else {}
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
    suffix = _Suffix(model, kv, attention_mask[:, :length], position_ids[:, length, None], members)

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
        found = -_row_losses(model, rows, wanted, 0.0)
    else:
        found = head_logprob(model, rows, wanted)
    return torch.zeros(shape, dtype=found.dtype, device=found.device).masked_scatter(chosen, found)
