"""Latent GRPO with transformers' ``Trainer``: G noisy thoughts a user, rewards, group advantages, a clipped surrogate.

    a_i = r + σ ε_i,  ε_0 = 0      R_i = reward of the target after thought a_i      A = group_advantage(R)
    P = -mean_i mean(min(ρ_i A_i, clip(ρ_i, 1 - ε_low, 1 + ε_high) A_i))
    loss = (1 - λ) P - λ log p(target | r) + β KL                                      mean over users of the batch

``policy`` says what ρ is the ratio of (docs/rl.md has the reasons): "thoughts", N(a_i; r, σ²) now against then, or
"tokens", p(target token | prompt, r + σ ε_i) now against then, as LatentR3 has it. KL = Σ_n ‖r_n - r_n^SFT‖² / (2 σ²),
exact for these Gaussians. λ is 0 unless asked for; it, β and σ may be adapted (:mod:`flr.train.controls`). The step
goes through the wrapped module's forward, so DDP and FSDP2 average gradients.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from flr.config import IGNORE, check_beside
from flr.data import Interactions, RecProcessor
from flr.decode import beam_search, rank_one_token
from flr.decode.group import group_ranks
from flr.decode.scoring import rank_by_scores, rank_in_list
from flr.model.backbone import causal_lm, mixes
from flr.model.outputs import GroupInputs, GroupOutput
from flr.model.token_table import embedding_width

from .arguments import LatentGRPOConfig
from .base import RecTrainer
from .controls import Controls, user_weights
from .finite import name_rows
from .group_batches import GroupCollator, RepeatedBlocks
from .policy_loss import clipped_surrogate
from .rewards import RewardInputs, Rewards
from .step_graphs import StepGraphs, padded
from .throughput import COUNTS
from .zero import shards_weights

#: Tensors of a group's inputs and results that a CUDA graph takes and gives, beside the actions, which are pairs.
_INPUTS = ("targets", "target_mask", "noise", "target_nodes", "noise_scale")
_RESULTS = ("logprobs", "thought_logprobs", "regularisers", "kl", "thoughts", "thought_norm", "gate_entropy")


def by_graphs(
    graphs: StepGraphs, model: Any, prompts: dict[str, torch.Tensor], group: GroupInputs, without: tuple[str, ...] = ()
) -> GroupOutput:
    """``model(**prompts, group=group)``, by a CUDA graph where these shapes have come before.

    ``without`` names results whose gradients are not asked for: a graph's backward would compute them all.
    """
    tensors = {name: x for name in _INPUTS if isinstance(x := getattr(group, name), torch.Tensor)}
    if group.actions is not None:
        tensors |= dict(zip(("action", "sigma"), group.actions, strict=True))

    def call(tensors: dict[str, torch.Tensor]) -> tuple[torch.Tensor | None, ...]:
        given: Any = {name: tensors[name] for name in _INPUTS if name in tensors}
        given["actions"] = (tensors["action"], tensors["sigma"]) if "action" in tensors else None
        out = model(**{name: tensors[name] for name in prompts}, group=replace(group, **given))
        found = {name: getattr(out, name) for name in _RESULTS}
        found |= {name: found[name].detach() for name in without if found[name] is not None}
        return *found.values(), *out.actions

    key = (group.policy, group.likelihood, model.training, without)
    *results, action, sigma = graphs(call, tensors | prompts, model, key)
    found: Any = dict(zip(_RESULTS, results, strict=True))
    assert action is not None
    assert sigma is not None
    return GroupOutput(**found, actions=(action, sigma))


def check_one_thought(lm: Any) -> None:
    """ValueError for a causal LM that has nothing to reinforce: no reasoner, or a mixture of thoughts."""
    if not hasattr(lm, "flr"):
        raise ValueError(
            "model: expected a patched model of variant flr, offsets or latentr3, got one without a reasoner"
        )
    if mixes(lm):
        raise ValueError("aggregation: expected thought for latent GRPO, which perturbs one thought, got mixture")


@dataclass
class _Rollout:
    """What the first iteration on a batch leaves for the later ones."""

    rewards: torch.Tensor  # [B, G]
    advantages: torch.Tensor  # [B, G]
    old: torch.Tensor  # log-probabilities [B, G, S] or [B, G, N]
    actions: tuple[torch.Tensor, torch.Tensor]


class LatentGRPOTrainer(RecTrainer):
    """Trains the reasoner of a patched model so that thoughts around its own give better rewards.

    Args:
        model: patched, variant "flr", "offsets" or "latentr3" with one thought (no mixture), supervised first.
        args: :class:`LatentGRPOConfig`.
        processor: the one it was trained with.
        train, valid: interactions; ``valid`` is ranked as in SFT, and may be None.
        rewards: overrides ``args.reward``; needed for functions of your own.
        kwargs: as for ``transformers.Trainer``.

    Loss, gradients and weights do not depend on how the users of a global batch are split over processes (for advantage
    "latentr3" with gradient accumulation the statistics are those of the micro-batch of all processes). There is no
    dropout. Advantages "latentr3" are multiplied by √(B G), which turns the norm into a deviation, so that their size
    does not depend on the batch.
    """

    def __init__(
        self,
        model: Any,
        args: LatentGRPOConfig,
        processor: RecProcessor,
        train: Interactions,
        valid: Interactions | None = None,
        rewards: Rewards | None = None,
        **kwargs: Any,
    ) -> None:
        lm = causal_lm(model)
        check_one_thought(lm)
        self.rewards = Rewards.parse(args.reward) if rewards is None else rewards
        check_beside(args, {"reward_beams": ("a reward that decodes (hit@k, ndcg@k, mrr)", self.rewards.may_decode)})
        if not args.train_backbone:
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(parameter.requires_grad and ".flr." in f".{name}")
        self.reference = copy.deepcopy(lm.flr).requires_grad_(False).eval()
        if args.noise_target is not None and not self.rewards.may_decode:
            raise ValueError(
                f"noise_target: expected None with likelihoods, which differ at any noise, got {args.noise_target}"
            )
        self._rollouts: list[_Rollout] = []
        self._micro_batch = 0
        self._sums: dict[str, torch.Tensor] = {}
        self._extremes = torch.tensor([torch.inf, -torch.inf])
        super().__init__(model, args, processor, train, valid, {"reward_terms": self.rewards.names}, **kwargs)
        self.reference.to(args.device)  # where inputs are; not at every step, which a compiler would not follow
        targets = (args.kl_target, args.noise_target)
        self.controls = Controls(args.kl_weight, args.noise_scale, *targets, self._over_processes)
        self.add_callback(self.controls)
        self._groups = GroupCollator(processor, args.group_size, embedding_width(lm), args.seed)
        self.model_accepts_loss_kwargs = True  # the loss is divided by the users of the whole step here
        world = self.accelerator.num_processes
        self._block = args.per_device_train_batch_size * args.gradient_accumulation_steps * world
        if len(train) < self._block and (args.dataloader_drop_last or args.num_iterations > 1):
            raise ValueError(f"train: expected at least one batch of {self._block} users, got {len(train)} rows")

    def _batch(self, rows: list[Any]) -> dict[str, Any]:
        batch = self._groups(rows)
        if self._graphs is not None:
            batch = padded(batch, batch["input_ids"].shape[1])
        return self._with_target_nodes(batch)

    def _with_target_nodes(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if self.catalogue_loss is not None:
            batch["target_nodes"] = self.catalogue_loss.target_nodes(
                batch["targets"].masked_fill(~batch["target_mask"], IGNORE)
            )
        return batch

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        sampler = super()._get_train_sampler(train_dataset)
        options: Any = self.args
        times = options.num_iterations
        return sampler if times == 1 else RepeatedBlocks(sampler, self._block, times)

    def _grouped_optimizer(self, model: Any) -> torch.optim.Optimizer:
        args: Any = self.args
        slow = args.learning_rate / 10 if args.backbone_learning_rate is None else args.backbone_learning_rate
        parameters = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        decayed = set(self.get_decay_parameter_names(model))
        mine = [p for n, p in parameters if ".flr." in f".{n}"]
        rest = [(n in decayed, p) for n, p in parameters if ".flr." not in f".{n}"]
        groups = [
            {"params": mine, "lr": args.learning_rate, "weight_decay": args.weight_decay},
            {"params": [p for decays, p in rest if decays], "lr": slow, "weight_decay": args.weight_decay},
            {"params": [p for decays, p in rest if not decays], "lr": slow, "weight_decay": 0.0},
        ]
        return self._optimizer([group for group in groups if group["params"]], model)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The batches of a step, and their users over all processes, which the loss is divided by."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._micro_batch = 0
        return batches, self._over_processes(torch.tensor(sum(len(b["targets"]) for b in batches), device=device))

    def _over_processes(self, x: torch.Tensor) -> torch.Tensor:
        return self.accelerator.reduce(x, "sum") if self.accelerator.num_processes > 1 else x

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        args: Any = self.args
        model.eval()  # no dropout: noise on the thought is the only chance
        inputs = dict(inputs)
        inputs.pop("rows", None)
        inputs.pop(COUNTS, None)
        items, group = inputs.pop("items"), self._group(inputs)
        iteration = self.state.global_step % args.num_iterations
        if iteration and self._micro_batch >= len(self._rollouts):
            raise ValueError(
                f"num_iterations: expected to resume at a multiple of {args.num_iterations} steps, got "
                f"{self.state.global_step}; the rewards of the batch are gone"
            )
        if iteration and args.policy == "thoughts":
            group.actions = self._rollouts[self._micro_batch].actions
        graphs = None if group.decodable else self._graphs
        if graphs is None:
            out = model(**inputs, group=group)
        else:
            unused = {"thought_logprobs": args.policy == "tokens", "regularisers": not args.regularise}
            out = by_graphs(graphs, model, inputs, group, tuple(name for name, x in unused.items() if x))
        now = out.thought_logprobs if args.policy == "thoughts" else out.logprobs
        assert now is not None
        if iteration == 0:
            self._roll_out(model, inputs, items, group, out, now)
        rollout = self._rollouts[self._micro_batch]
        self._micro_batch += 1
        losses = self._objective(group, out, now, rollout)
        self._losses = losses.detach()
        users = torch.tensor(len(losses), device=losses.device)
        total = self._over_processes(users) if num_items_in_batch is None else num_items_in_batch
        loss = losses.sum() / total * self.accelerator.num_processes  # DDP and FSDP average over processes
        return (loss, out) if return_outputs else loss

    def _group(self, inputs: dict[str, torch.Tensor]) -> GroupInputs:
        """What a step asks of the forward; ``inputs`` loses what is not a prompt's."""
        args: Any = self.args
        return GroupInputs(
            inputs.pop("targets"),
            inputs.pop("target_mask"),
            inputs.pop("noise"),
            noise_scale=self.controls.on("noise_scale", inputs["input_ids"].device),
            relative=args.noise_relative,
            policy=args.policy,
            likelihood=args.is_hybrid and args.policy == "thoughts",
            catalogue_loss=self.catalogue_loss,
            target_nodes=inputs.pop("target_nodes", None),
            reference=self.reference,
            decodable=self.rewards.may_decode,
        )

    def _objective(self, group: GroupInputs, out: GroupOutput, now: torch.Tensor, rollout: _Rollout) -> torch.Tensor:
        """Losses [B] of the users."""
        args: Any = self.args
        mask = None if args.policy == "thoughts" else group.target_mask
        surrogate = clipped_surrogate(now, rollout.old, mask, rollout.advantages, args.epsilon_low, args.epsilon_high)
        losses = surrogate.loss
        if args.is_hybrid:
            assert out.logprobs is not None
            weights = user_weights(rollout.rewards, args.likelihood_weight, args.likelihood_adaptive, self._mean_of)
            likelihood = out.logprobs[:, 0].sum(-1) / group.target_mask.sum(-1)
            losses = (1 - weights) * losses - weights * likelihood
            self._note(likelihood=likelihood, likelihood_weight=weights)
        assert out.kl is not None
        losses = losses + self.controls.on("kl_weight", losses.device) * out.kl
        if args.regularise:
            losses = losses + out.regularisers
        self._note(
            loss=losses,
            clip_fraction=surrogate.clipped,
            kl=out.kl,
            thought_norm=out.thought_norm,
            gate_entropy=out.gate_entropy,
        )
        # advantages may be finite for rewards that are not; so each shows in the loss, which is looked at anyway
        return losses + 0 * rollout.rewards.sum(1)

    def _mean_of(self, values: torch.Tensor) -> torch.Tensor:
        """The mean of values [B] over the users of all processes' micro-batches."""
        total = self._over_processes(torch.stack([values.sum(), torch.full_like(values[0], len(values))]))
        return total[0] / total[1]

    def _fault(self, model: Any, inputs: dict[str, Any], rows: torch.Tensor, num_items: Any) -> str:
        rewards = self._rollouts[self._micro_batch - 1].rewards.cpu()
        for name, values in (("reward", rewards), ("loss", self._losses.cpu())):
            bad = ~torch.isfinite(values.view(len(rows), -1)).all(1)
            if bad.any():
                return f"{name}: expected finite numbers, got others for {name_rows(rows[bad])}"
        return f"loss: expected a finite number, got another for {name_rows(rows)}"

    def _roll_out(
        self, model: Any, prompts: dict, items: torch.Tensor, group: GroupInputs, out: GroupOutput, now: torch.Tensor
    ) -> None:
        """Rewards and advantages of the current micro-batch, kept for the iterations on it."""
        args: Any = self.args
        assert out.logprobs is not None
        assert out.thoughts is not None
        assert out.actions is not None
        seen = RewardInputs(
            out.logprobs.detach(),
            group.target_mask,
            group.targets,
            out.thoughts,
            prompts,
            items,
            lambda: self._ranks(model, prompts, items, out),
        )
        several = torch.distributed.is_available() and torch.distributed.is_initialized()
        result = self.rewards.advantages(
            seen,
            args.advantage,
            args.advantage_epsilon,
            args.advantage_from_clean,
            torch.distributed.group.WORLD if several else None,
        )
        advantages = result.advantages
        if args.advantage == "latentr3":
            count = torch.tensor(advantages.numel(), device=advantages.device)
            advantages = advantages * self._over_processes(count).sqrt()
        del self._rollouts[self._micro_batch :]
        self._rollouts.append(_Rollout(result.rewards.detach(), advantages, now.detach(), out.actions))
        if out.kl is not None:
            self.controls.observe(out.kl, result.rewards)
        self._note(reward=result.mean, reward_std=result.std, reward_clean=result.rewards[:, 0].detach())
        least, most = self._extremes.to(advantages.device)
        self._extremes = torch.stack([torch.minimum(least, advantages.min()), torch.maximum(most, advantages.max())])

    def _ranks(self, model: Any, prompts: dict, items: torch.Tensor, out: GroupOutput) -> torch.Tensor:
        """Place [B, G] of the target in the list that constrained decoding gives each member, 0 where it is not in it.

        Members go on from the group forward; where they cannot be packed into a row, each is a prompt of its own.
        """
        assert out.thoughts is not None
        args: Any = self.args
        if self.is_fsdp_enabled or shards_weights(args):
            raise ValueError(
                "reward: expected a likelihood under FSDP and ZeRO-3, where decoding would gather at different times"
            )
        lm, scoring = self.accelerator.unwrap_model(model), self.processor.scoring
        width = max(args.reward_beams, min(self.rewards.longest_list, self.trie.num_items))
        ranks = None
        if out.prompts is not None:
            ranks = group_ranks(lm, out.prompts, self.trie, items, width, scoring)
        if ranks is not None:
            return ranks
        batch, members = out.thoughts.shape[:2]
        rows = {name: x.repeat_interleave(members, 0) for name, x in prompts.items()}
        rows["thoughts"] = out.thoughts.flatten(0, 1)
        target = items.repeat_interleave(members)
        if self.trie.depth == 1:
            ranks = rank_by_scores(rank_one_token(lm, rows, self.trie, scoring), target)
        else:
            ranks = rank_in_list(beam_search(lm, rows, self.trie, width, width, scoring).items, target)
        return ranks.view(batch, members)

    def _note(self, **values: torch.Tensor | None) -> None:
        """Add values [B] to the sums of the next line of the log."""
        for name, value in values.items():
            if value is not None:
                value = value.detach().double()
                new = torch.stack([value.sum(), torch.ones_like(value).sum()])
                self._sums[name] = self._sums[name] + new if name in self._sums else new

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Means over the users of all processes since the last line, and the range of advantages."""
        if "loss" in logs and self._sums:
            names = sorted(self._sums)
            sums = self._over_processes(torch.stack([self._sums[name] for name in names])).cpu()
            logs |= {name: float(s[0] / s[1]) for name, s in zip(names, sums, strict=True)}
            if self.controls.adapts:
                logs |= {name: float(value) for name, value in self.controls.values.items()}
            ends = self._extremes.to(self.args.device) * torch.tensor([-1.0, 1.0], device=self.args.device)
            ends = self.accelerator.gather(ends[None]).amax(0).cpu()
            if ends[1] > -torch.inf:
                logs |= {"advantage_min": -float(ends[0]), "advantage_max": float(ends[1])}
            self._sums = {}
            self._extremes = torch.tensor([torch.inf, -torch.inf])
        super().log(logs, start_time)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """As in SFT, and the mean log-likelihood of the targets, ``eval_target_logprob``."""
        rows: Any = self.valid if eval_dataset is None else eval_dataset.interactions
        extra = {f"{metric_key_prefix}_target_logprob": float(self.target_logprobs(rows).mean())}
        self.log(extra)
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix) | extra

    @torch.no_grad()
    def target_logprobs(self, rows: Interactions) -> np.ndarray:
        """Mean log-probability of each row's target tokens, float64 [n], normalised as in training, without noise."""
        collate = GroupCollator(self.processor, 1, self._groups.hidden_size, self.args.seed)
        size, parts = self.args.per_device_eval_batch_size, []
        model: Any = self.model
        model.eval()
        order = np.argsort(-self.processor.prompt_lengths(rows.histories), kind="stable")  # little padding a batch
        for start in range(0, len(rows), size):
            batch = collate([rows[i] for i in order[start : start + size].tolist()])
            batch = self._prepare_inputs(self._with_target_nodes(batch))
            del batch["items"]
            group = GroupInputs(
                batch.pop("targets"),
                batch.pop("target_mask"),
                batch.pop("noise"),
                catalogue_loss=self.catalogue_loss,
                target_nodes=batch.pop("target_nodes", None),
            )
            logprobs = model(**batch, group=group).logprobs[:, 0]
            parts.append((logprobs.sum(-1) / group.target_mask.sum(-1)).double().cpu().numpy())
        return np.concatenate(parts)[np.argsort(order)]
