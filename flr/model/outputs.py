"""What goes into a patched model's forward beside the batch, and what comes out."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.generic import ModelOutput

from .backbone import OUTPUT_CACHE
from .catalogue_loss import CatalogueLoss
from .head import several_logprobs
from .reasoner import ReasonerOutput


@dataclass
class FLROutput:
    """The thoughts of one forward: one :class:`ReasonerOutput` a thought column, in order.

    ``thought``, ``attention`` [B, T, K, L], ``gates`` [B, T, K] and ``contributions`` [B, K, D] are those of the last
    one; ``losses`` are means over users and thoughts; ``loss`` is their weighted sum, as added to the model's loss.
    """

    steps: list[ReasonerOutput]
    user_losses: dict[str, Tensor]  # [B], a user's mean over thoughts; 0 for users without a thought
    has_thought: Tensor  # bool [B]
    loss: Tensor = field(repr=False)

    @property
    def losses(self) -> dict[str, Tensor]:
        users = self.has_thought.sum().clamp_min(1)
        return {name: value.sum() / users for name, value in self.user_losses.items()}

    thought = property(lambda self: self.steps[-1].thought)
    attention = property(lambda self: self.steps[-1].attention)
    gates = property(lambda self: self.steps[-1].gates)
    contributions = property(lambda self: self.steps[-1].contributions)


@dataclass
class FLRCausalLMOutput(CausalLMOutputWithPast):
    """``CausalLMOutputWithPast`` plus ``flr``, None for a batch without a thought.

    ``aux_loss`` and ``router_logits`` are those of a mixture of experts, where they were asked for. A cache has the
    name that the family gives it. As a tuple (``return_dict=False``, ``output[1]``) it is the model's own: without
    ``flr``, in the order of the family.
    """

    flr: FLROutput | None = None
    aux_loss: Tensor | None = None
    router_logits: tuple[Tensor, ...] | None = None

    def order(self, cache: str | None) -> None:
        """Put the fields into the order of the model's own output, whose cache has the name ``cache``."""
        caches = (cache, OUTPUT_CACHE)  # since transformers 5.24 the second, whatever it was set as
        held = set(self.keys())  # not `in self`, which knows former names
        for name in ("loss", "aux_loss", "logits", *caches, "hidden_states", "attentions", "router_logits", "flr"):
            if name in held:
                self.move_to_end(name)

    def to_tuple(self) -> tuple[Any, ...]:
        """The fields that are not None, without ``flr``."""
        return tuple(value for name, value in self.items() if name != "flr")


@dataclass
class ThoughtInputs:
    """Keyword arguments that a patched model's forward takes beside those of the model it was.

    Attributes:
        reasoner_mask: bool [B, L]; narrows what the factors attend to, e.g. to item tokens. None for the whole prompt.
        thought_start: a promise that every row's first thought stands in this column and no label before it; saves a
            look at the data (one device synchronisation).
        skip_logits: return no logits, only the loss. Default: in training with labels, where the batch brings its
            own thought tokens.
        insert_thought: whether a batch without thought tokens gets them. Default: ``config.insert_thought``.
        label_smoothing: of the cross-entropy, in [0, 1).
        num_items_in_batch: divisor of the summed cross-entropy (as ``Trainer`` passes it under gradient
            accumulation and data parallelism); each user's regularisers are then weighted by its share of the target
            tokens, so that any split of a batch gives the same sum.
        catalogue_loss: normalise target tokens over their siblings in the catalogue instead of the vocabulary;
            ``labels`` are then ``catalogue_loss.target_nodes(labels)``.
        soft_targets, soft_weights: int64 and float32 [B, n], where every row has one label, a target's only token: the
            loss is then the cross-entropy against these tokens with these weights, whatever the label is. Smoothing is
            not applied to it.
        thoughts: [B, N, D], embeddings of the thought tokens instead of the reasoner's; same columns in every row.
        row_losses: the loss is that of every row, [B]: the summed cross-entropy of its target tokens, undivided, and
            nothing of regularisers and routers.
    """

    reasoner_mask: Tensor | None = None
    thought_start: int | None = None
    skip_logits: bool | None = None
    insert_thought: bool | None = None
    label_smoothing: float = 0.0
    num_items_in_batch: Tensor | int | None = None
    catalogue_loss: CatalogueLoss | None = None
    thoughts: Tensor | None = None
    soft_targets: Tensor | None = None
    soft_weights: Tensor | None = None
    row_losses: bool = False

    @classmethod
    def taken_from(cls, kwargs: dict[str, Any]) -> ThoughtInputs:
        """Those among ``kwargs``, which loses them."""
        own = cls(**{name: kwargs.pop(name) for name in _THOUGHT_INPUTS if name in kwargs})
        if (own.soft_targets is None) != (own.soft_weights is None):
            raise ValueError("soft_weights: expected them and soft_targets, or neither, got one of the two")
        return own

    def soft_loss(self, model: Any, hidden: Tensor, log_gates: Tensor | None = None) -> Tensor:
        """Cross-entropy against ``soft_targets``, summed; with ``row_losses`` that of each row, [B].

        Args:
            hidden: states before the targets, [B, D], or [B, K, D] of factors that are mixed with ``log_gates`` [B, K].
        """
        assert self.soft_targets is not None
        assert self.soft_weights is not None
        among = None if self.catalogue_loss is None else self.catalogue_loss.first_tokens(hidden.device)
        if log_gates is None:
            logprobs = several_logprobs(model, hidden, self.soft_targets, among)
        else:
            factors = hidden.shape[1]
            tokens = self.soft_targets.repeat_interleave(factors, 0)
            each = several_logprobs(model, hidden.flatten(0, 1), tokens, among)
            logprobs = (each.unflatten(0, (-1, factors)) + log_gates[..., None]).logsumexp(1)
        losses = logprobs * self.soft_weights
        return -(losses.sum(1) if self.row_losses else losses.sum())


_THOUGHT_INPUTS = tuple(f.name for f in fields(ThoughtInputs))  # a compiler cannot ask a class for its fields


@dataclass
class GroupInputs:
    """What a group forward needs beside the prompts.

    Attributes:
        targets: int64 [B, S], a user's target tokens from column 0 on; anything behind them.
        target_mask: bool [B, S], true on target tokens; every row starts with a true one and has no gap.
        noise: [B, G, N, D], ε of unit variance; member 0 of every group is the unperturbed one and must be 0.
        noise_scale: σ, absolute or in units of the RMS of the user's thought r; a number, or a tensor [] of one that
            changes from step to step.
        relative: which of the two.
        policy: "tokens", log-probabilities of the targets pass gradients to the thoughts; or "thoughts", they do not
            (the suffix runs without a graph), and those of the noisy thoughts do.
        likelihood: under policy "thoughts", let log-probabilities of the targets pass gradients to the unperturbed
            member's thoughts alone.
        reference: a frozen reasoner; gives the KL of the noisy thoughts from its own.
        actions: r + σ ε [B, G, N, D] of an earlier forward, and their σ [B, G, N]: only ``thought_logprobs`` of these
            are computed then, and neither noise nor targets are looked at.
        catalogue_loss, target_nodes: normalise targets over their siblings in the catalogue instead of the vocabulary;
            target_nodes int64 [B, S] are ``catalogue_loss.target_nodes`` of the targets (-100 behind them).
        decodable: also give ``prompts``.
    """

    targets: Tensor
    target_mask: Tensor
    noise: Tensor
    noise_scale: float | Tensor = 1.0
    relative: bool = True
    policy: str = "tokens"
    likelihood: bool = False
    reference: nn.Module | None = None
    actions: tuple[Tensor, Tensor] | None = None
    catalogue_loss: CatalogueLoss | None = None
    target_nodes: Tensor | None = None
    decodable: bool = False


@dataclass
class GroupOutput(ModelOutput):
    """Result of a group forward.

    Attributes:
        logprobs: [B, G, S] log p of every target token given a member's thoughts, 0 behind a row's target; float32 or
            float64; None for given actions.
        thought_logprobs: [B, G, N], log N(r + σ ε; r, σ²) less its constant, -‖r + σ ε - r‖² / (2 σ²), the action
            fixed: its gradient is (ε / σ) · dr.
        regularisers: [B], weighted sum of the reasoner's regularisers, mean over thoughts and members.
        kl: [B], Σ_n ‖r_n - r_n^ref‖² / (2 σ²), mean over members; None without a reference.
        actions: r + σ ε [B, G, N, D] and σ [B, G, N], no gradient.
        thoughts: [B, G, N, D], the embeddings fed at the thought tokens, no gradient.
        thought_norm: [B], ‖r‖₂ of the unperturbed member's last thought, no gradient.
        gate_entropy: [B], of the last refinement of the first thought, nats, no gradient.
        prompts: what ``flr.decode.group.group_ranks`` goes on from, if asked for; None without packing.
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


@dataclass(eq=False)
class GroupPrompts:
    """Prompts of B users and the N thoughts of each one's G members, as a group forward leaves them; no gradients.

    Attributes:
        cache: keys and values of L prompt columns and, behind them, G·N thoughts.
        member: int64 [G·N], whose thought a column is.
        hidden: [B, G, D], the state after a member's last thought.
        attention_mask, position_ids: int64 [B, L] of the prompts.
    """

    cache: Cache
    member: Tensor
    hidden: Tensor
    attention_mask: Tensor
    position_ids: Tensor
