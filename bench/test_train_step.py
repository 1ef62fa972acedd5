"""A whole training step, forward and backward: one encoding of the prompt against LatentR3's two passes over
everything.

Competitors are those of baselines/two_pass.py: ``published`` (lm_head on every token in both passes; RL: a rollout for
the rewards, then the passes again with gradient) and ``best`` (lm_head on target rows, rewards from the pass that is
differentiated); in RL ``grouped`` of baselines/grouped.py, the strongest that exists, a pass for the thought and one
of all members behind one copy of the prompt; in the supervised step ``plain``, Hugging Face's own forward and loss
over the same rows without a thought, which is less work and another loss. On a GPU ``flr`` is what the trainers do
there, a CUDA graph of forward and backward (flr.train.step_graphs), ``layers compiled`` what they do with
``--compile_layers``, ``calls`` the same launched from Python, and the competitors' steps are raced as they are and,
where they can be captured, as one graph.

In RL ``flr`` is policy "tokens", the same work as theirs; ``thoughts`` is ours with the other policy, which needs no
gradient through the suffix, and ``prompts kept`` ours with the prompts' states in memory, as in every epoch but the
first of a run with ``--prompt_cache``. In
tokens through the backbone, forward and backward each counted once, ``grouped`` takes 3 L + 2 G S and ours L + 2 G S:
2.0 times at L = 256 and 2.6 at 1024. The shape is that of the model in docs/log.md: an lm_head of about 15 % of the
work. Backbone frozen in RL, trained in the supervised step; a larger vocabulary would flatter the ratios.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

import flr
from flr.model.base import base_of
from flr.model.joint_products import joint_products
from flr.model.outputs import GroupInputs
from flr.model.prompt_cache import PromptCache
from flr.train.grpo import by_graphs
from flr.train.policy_loss import clipped_surrogate
from flr.train.step_graphs import StepGraphs, in_place_of
from flr_kernels import group_advantage

from .baselines import grouped, two_pass
from .harness import captured, label
from .machine import DEVICE, ON_GPU

MODEL = {"D": 512, "layers": 8, "V": 10432}
SMALL = {"D": 128, "layers": 4, "V": 2048}  # large enough for a ratio of products, not of calls


def build(shape: dict):
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=shape["V"], hidden_size=shape["D"], intermediate_size=shape.get("inner", shape["D"] * 11 // 4),
        num_hidden_layers=shape["layers"], num_attention_heads=shape.get("heads", 8),
        num_key_value_heads=shape.get("of_keys", 4), tie_word_embeddings=shape.get("tied", False),
    )  # fmt: skip
    with DEVICE:  # random numbers for 10⁹ weights take the host a minute
        model = Qwen2ForCausalLM(config)
    return flr.patch_model(model, config=flr.FLRConfig(num_factors=4, thought_token_id=shape["V"] - 1))


def flops_of(shape: dict, rl: bool) -> int:
    """The least that a step must compute: 11.25 D² weights a layer, causal attention, lm_head on target rows, prompts
    encoded once.

    The backward of the supervised step costs twice its forward; that of RL, through the suffixes alone and to no
    weight, once. The reasoner, under 1 %, is left out.
    """
    layers, size, users, prompt, target = (shape[k] for k in ("layers", "D", "B", "L", "S"))
    rows = users * shape["G"] if rl else users

    def backbone(count: int, tokens: int, before: int) -> float:
        pairs = tokens * before + tokens * (tokens + 1) / 2
        return count * layers * (2 * 11.25 * size**2 * tokens + 4 * size * pairs)

    head = 2 * size * shape["V"] * rows * target
    if rl:
        return int(backbone(users, prompt, 0) + 2 * (backbone(rows, target, prompt) + head))
    return int(3 * (backbone(users, prompt + 1 + target, 0) + head))


def weight_bytes(model) -> int:
    """Of the matrices; the embedding is left out, of which a step reads few rows."""
    table = model.get_input_embeddings().weight
    return sum(p.nbytes for p in model.parameters() if p.dim() > 1 and p is not table)


def prompts_of(shape: dict) -> dict[str, torch.Tensor]:
    ids = torch.randint(5, shape["V"] - 1, (shape["B"], shape["L"] + 1), device=DEVICE)
    ids[:, -1] = shape["V"] - 1
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def gradients(model, step) -> tuple[float, list[torch.Tensor]]:
    model.zero_grad()
    loss = float(step())
    return loss, [p.grad for p in model.parameters() if p.grad is not None]  # the next step makes new ones


def from_nothing(model, steps: dict) -> dict:
    """Every step without gradients of the one before, as an optimizer leaves it."""

    def begun(step):
        def run():
            model.zero_grad()
            return step()

        return run

    return {name: begun(step) for name, step in steps.items()}


def whole_step(model, step):
    """A competitor's whole step as one CUDA graph, captured at the first call."""
    replays: list = []

    def with_own_leaves():
        """Gradients of parameters that were used before would wait for another stream."""
        leaves = {id(p): torch.nn.Parameter(p.detach()) for p in model.parameters() if p.requires_grad}
        with in_place_of(model, leaves):
            return step()

    def run():
        if not replays:
            replays.append(captured(with_own_leaves, 1))
        replays[0]()

    return run


def check_equal(model, ours, theirs, bound: float) -> None:
    (a, mine), (b, naive) = gradients(model, ours), gradients(model, theirs)
    largest = max(float(g.norm()) for g in naive)
    errors = [float((x - y).norm()) / max(float(y.norm()), 1e-2 * largest) for x, y in zip(mine, naive, strict=True)]
    if not (abs(a - b) <= bound * max(abs(b), 1) and max(errors) <= bound):
        raise AssertionError(f"expected loss and gradients within {bound}, got {a} and {b}, gradients {max(errors)}")


@pytest.mark.cases(
    quick=[{**SMALL, "B": 2, "L": 128, "S": 8, "G": 8}],
    default=[{**MODEL, "B": b, "L": length, "S": 16, "G": 8} for b, length in ((1, 256), (4, 256), (1, 1024))],
    gpu=[
        {"D": 1536, "layers": 28, "V": 151936, "B": b, "L": 256, "S": 16, "G": 8, "dtype": torch.bfloat16}
        for b in (4, 16)
    ],
)
def test_rl_step(shape, tier, race):
    model = build(shape).requires_grad_(False).eval()
    model.flr.requires_grad_(True)
    model.to(shape.get("dtype", torch.float32))
    prompts = prompts_of(shape)
    targets = torch.randint(5, shape["V"] - 1, (shape["B"], shape["S"]), device=DEVICE)
    noise = torch.randn(shape["B"], shape["G"], 1, shape["D"], device=DEVICE)
    noise[:, 0] = 0
    group = GroupInputs(targets, torch.ones_like(targets, dtype=torch.bool), noise, noise_scale=3.0)

    def forward(prompts, group):
        return model(**prompts, group=group)

    def ours(policy: str = "tokens", prompts=prompts, group=group, forward=forward):
        group = dataclasses.replace(group, policy=policy)
        out = forward(prompts, group)
        rows = group.target_mask.repeat_interleave(shape["G"], 0)
        advantages = group_advantage(out.logprobs.detach().flatten(0, 1), rows, shape["G"]).advantages
        now, mask = (out.logprobs, group.target_mask) if policy == "tokens" else (out.thought_logprobs, None)
        clipped_surrogate(now, now.detach(), mask, advantages).loss.mean().backward()
        # the surrogate's value is that of ratios of 1; this one has its gradient and says more
        return two_pass.group_loss(out.logprobs.detach(), group.target_mask)[0]

    graphs, compiled = StepGraphs(), StepGraphs("inductor")

    def by_graph(policy: str = "tokens", graphs=graphs):
        unused = ("thought_logprobs", "regularisers")[policy == "thoughts" :]  # as the trainer has it by default
        return ours(policy, forward=lambda prompts, group: by_graphs(graphs, model, prompts, group, unused))

    kept = PromptCache(model, gigabytes=1)

    def with_prompts_kept():
        model._flr_patch.prompt_cache = kept  # for this variant alone: PromptCache.used() drops all when left
        try:
            return ours()
        finally:
            model._flr_patch.prompt_cache = None

    def check():
        """One user, in double: lower precision divides by the spread of nearly equal rewards and compares rounding.

        Norms are float32 in any dtype, and 28 layers of them on a GPU left 1.2e-5.
        """
        bound = 1e-4 if ON_GPU else 1e-6
        one = {k: v[:1] for k, v in prompts.items()}
        part = GroupInputs(targets[:1], group.target_mask[:1], noise[:1].double(), group.noise_scale)
        wide = model.double()
        for published in (False, True):
            check_equal(
                wide,
                lambda: ours(prompts=one, group=part),
                lambda p=published: two_pass.rl_step(model, one, part, published=p),
                bound,
            )
        check_equal(wide, lambda: ours(prompts=one, group=part), lambda: grouped.rl_step(model, one, part), bound)

        def from_kept():
            with PromptCache(wide, gigabytes=1).used():
                return ours(prompts=one, group=part)

        check_equal(wide, from_kept, lambda: ours(prompts=one, group=part), bound)
        model.to(shape.get("dtype", torch.float32))
        with joint_products(base_of(model).layers):  # before graphs know where weights are
            pass

    others = {
        "published": lambda: two_pass.rl_step(model, prompts, group, published=True),
        "best": lambda: two_pass.rl_step(model, prompts, group, published=False),
        "grouped": lambda: grouped.rl_step(model, prompts, group),
    }
    if ON_GPU:
        variants = {"flr": by_graph, **others, "thoughts": lambda: by_graph("thoughts"), "calls": ours}
        variants |= {f"{x}, layers compiled": lambda x=x: by_graph(x, compiled) for x in ("tokens", "thoughts")}
        variants |= {f"{name}, graph": whole_step(model, others[name]) for name in ("best", "grouped")}
    else:
        variants = {"flr": ours, **others, "thoughts": lambda: ours("thoughts"), "prompts kept": with_prompts_kept}
    if shape["L"] > 256:  # half a minute a call
        del variants["published"], variants["best"]
    targets_by_length = {256: {"published": 13 if shape["B"] == 1 else 20, "grouped": 2.5}, 1024: {"grouped": 2.5}}
    race(
        f"rl {label(shape)}",
        from_nothing(model, variants),
        suite="train_step",
        shape=shape,
        check=check,
        flops=flops_of(shape, rl=True),
        bytes_moved=3 * weight_bytes(model),  # read by the prompts, by the suffixes, and by their backward
        target=None if tier == "quick" else targets_by_length.get(shape["L"]),
        rounds=3 if shape["B"] * shape["L"] > 256 and tier != "quick" else None,
    )


@pytest.mark.cases(
    quick=[{**SMALL, "B": 8, "L": 128, "S": 8}],
    default=[{**MODEL, "B": 8, "L": 256, "S": 16}],
    gpu=[{"D": 1536, "layers": 28, "V": 151936, "B": b, "L": 256, "S": 16, "dtype": torch.bfloat16} for b in (8, 32)],
)
def test_sft_step(shape, tier, race):
    model = build(shape).train()
    model.to(shape.get("dtype", torch.float32))
    prompts = prompts_of(shape)
    targets = torch.randint(5, shape["V"] - 1, (shape["B"], shape["S"]), device=DEVICE)
    ids = torch.cat([prompts["input_ids"], targets], 1)
    labels = torch.cat([torch.full_like(prompts["input_ids"], -100), targets], 1)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}

    graphs, compiled = StepGraphs(), StepGraphs("inductor")

    def call(tensors):
        return (model(**tensors, thought_start=shape["L"] if ON_GPU else None).loss,)

    def backward_of(tensors):
        loss = call(tensors)[0]
        loss.backward()
        return loss.detach()

    def calls():
        return backward_of(inputs)

    def ours(graphs=graphs):
        loss = graphs(call, inputs, model, 0)[0] if ON_GPU else call(inputs)[0]
        loss.backward()
        return loss.detach()

    def check():
        """Two users, in double, gradients of all weights: those of the backbone are most of the work."""
        two = {k: v[:2] for k, v in inputs.items()}
        wide = model.double()
        for published in (False, True):
            check_equal(
                wide,
                lambda: backward_of(two),
                lambda p=published: two_pass.sft_step(wide, two, p),
                1e-4 if ON_GPU else 1e-6,
            )
        model.to(shape.get("dtype", torch.float32))

    place = shape["L"]  # of the thought token, which plain training knows nothing of
    rows = {k: torch.cat([v[:, :place], v[:, place + 1 :]], 1) for k, v in inputs.items()}

    def plain():
        loss = model._flr_patch.original(model)(**rows).loss
        loss.backward()
        return loss.detach()

    variants = {
        "flr": ours,
        "published": lambda: two_pass.sft_step(model, inputs, published=True),
        "best": lambda: two_pass.sft_step(model, inputs, published=False),
        "plain": plain,
    }
    if ON_GPU:
        variants |= {"calls": calls, "layers compiled": lambda: ours(compiled)}
        variants |= {"plain, graph": whole_step(model, plain)}
    race(
        f"sft {label(shape)}",
        from_nothing(model, variants),
        suite="train_step",
        shape=shape,
        check=check,
        flops=flops_of(shape, rl=False),
        bytes_moved=3 * weight_bytes(model),  # read forward and backward, their gradient written
        target={"published": 2.0, "plain": 1.3} if tier != "quick" else None,
        rounds=3 if tier != "quick" else None,
    )
