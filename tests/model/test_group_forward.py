"""The group forward equals encoding every member in full: loss, advantages and gradients, with the same noise."""

import contextlib
import copy

import pytest
import torch

import flr
from bench.baselines import two_pass
from flr.model.backbone import packing_obstacle
from flr.model.shared_prompt import shared_prompts
from tests.helpers.comparisons import assert_same_gradients, gradients_of
from tests.helpers.inputs import group_case
from tests.helpers.models import FAMILIES, HIDDEN, THOUGHT


@pytest.fixture(params=["shared", "masked"])
def way(request):
    """Members that attend to the prompt and to themselves in two calls, and members that a mask keeps apart."""
    with shared_prompts(request.param == "shared"):
        yield request.param


# RMSNorm rounds to float32 inside a float64 model; Phi and GPT-2 have LayerNorm and no such step. Gemma 2's own eager
# attention gives NaN in float64 for all-masked rows, so it is in float32 alone.
FLOAT64 = {"llama": 1e-6, "qwen2": 1e-6, "mistral": 1e-6, "phi": 1e-12, "gpt2": 1e-12}


def assert_equal(model, prompts, group, relative, kind="grpo", **extra):
    """Log-probabilities, advantages, loss and every gradient.

    In float64 each side has its own advantages. In float32 dividing by the spread of nearly equal rewards turns their
    rounding of 2e-7 into up to 1e-4, so there the loss of both sides has the same ones.
    """
    ours = model(**prompts, group=group, **extra)
    theirs, _ = two_pass.group_logprobs(model, {**prompts, **extra}, group, published=True)
    torch.testing.assert_close(ours.logprobs, theirs, rtol=relative, atol=relative)
    (mine, a), (naive, b) = (two_pass.group_loss(x, group.target_mask, kind) for x in (ours.logprobs, theirs))
    if theirs.dtype == torch.float64:
        assert (a - b).abs().max() <= relative * b.abs().max()
    else:
        assert (a - b).abs().max() <= 1e-3
        weight = group.target_mask[:, None] / group.target_mask.sum(1)[:, None, None]
        mine = -(b[..., None] * ours.logprobs * weight).sum(-1).mean()
    if group.noise.shape[1] == 1 and kind != "latentr3":  # no group, no advantage: any loss will do
        mine, naive = ours.logprobs.square().mean(), theirs.square().mean()
    # the loss is a sum of terms of both signs: relative to their size
    assert (mine - naive).abs() <= relative * (b[..., None] * theirs).abs().mean().clamp_min(naive.abs())
    expected = gradients_of(model, naive)
    assert any(g.norm() > 0 for g in expected.values())
    assert_same_gradients(gradients_of(model, mine), expected, relative)
    return ours


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("backbone", [False, True])
@pytest.mark.parametrize(
    ("members", "thoughts", "refinements"), [(1, 1, 1), (4, 1, 2), (8, 1, 1), (4, 2, 2), (3, 3, 1)]
)
@pytest.mark.parametrize("family", FLOAT64)
def test_float64(family, members, thoughts, refinements, backbone):
    model, prompts, group = group_case(
        family, members=members, thoughts=thoughts, refinements=refinements, backbone=backbone
    )
    assert packing_obstacle(model) is None
    assert_equal(model, prompts, group, FLOAT64[family])


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("backbone", [False, True])
@pytest.mark.parametrize("thoughts", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_float32(family, thoughts, backbone):
    assert_equal(*group_case(family, torch.float32, thoughts=thoughts, backbone=backbone), 2e-5)


def test_regularisers_and_what_is_logged_are_those_of_the_members_thoughts():
    """Every member encoded in full with its thoughts, from whose states each of them is made once more."""
    model, prompts, group = group_case("phi", thoughts=2, refinements=2)
    out, config = model(**prompts, group=group), model._flr_patch.config
    embeds, mask = model.get_input_embeddings()(prompts["input_ids"]), prompts["attention_mask"].bool()
    length, terms, made = embeds.shape[1] - 2, [], {}
    for member in range(group.noise.shape[1]):
        whole = torch.cat([embeds[:, :length], out.thoughts[:, member]], 1)
        given = {"attention_mask": mask.long(), "position_ids": (mask.cumsum(1) - 1).clamp_min(0)}
        hidden = model.base_model(inputs_embeds=whole, **given, use_cache=False).last_hidden_state
        for n in range(2):
            made[member, n] = model.flr(hidden[:, : length + n], mask[:, : length + n], length + n - 1)
            losses = made[member, n].user_losses
            terms.append(sum(getattr(config, f"{name}_weight") * value for name, value in losses.items()))
    torch.testing.assert_close(out.regularisers, torch.stack(terms).mean(0))
    assert (terms[1] - terms[3]).abs().max() > 1e-6
    torch.testing.assert_close(out.thought_norm, made[0, 1].thought.norm(dim=-1).detach())
    gates = made[0, 0].gates[:, -1].detach()
    torch.testing.assert_close(out.gate_entropy, -(gates * gates.log()).sum(-1))


@pytest.mark.parametrize("kind", ["dr_grpo", "rloo", "latentr3"])
def test_every_kind_of_advantage(kind):
    assert_equal(*group_case("phi"), 1e-12, kind)
    assert_equal(*group_case("phi", members=1), 1e-12, kind)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("anchor", ["token", "last", "none"])
def test_anchors_and_narrowed_history(anchor):
    model, prompts, group = group_case("gpt2", anchor=anchor, thoughts=2)
    ours = assert_equal(model, prompts, group, 1e-12)
    narrowed = assert_equal(model, prompts, group, 1e-12, reasoner_mask=prompts["input_ids"] % 2 == 0)
    assert not torch.allclose(ours.logprobs, narrowed.logprobs)


def test_latentr3_variant():
    assert_equal(*group_case("phi", variant="latentr3"), 1e-12)


def test_absolute_noise():
    model, prompts, group = group_case("phi")
    relative = model(**prompts, group=group).logprobs
    group.relative = False
    absolute = assert_equal(model, prompts, group, 1e-12).logprobs
    torch.testing.assert_close(relative[:, 0], absolute[:, 0])
    assert not torch.allclose(relative[:, 1:], absolute[:, 1:])


@pytest.mark.parametrize(
    ("family", "attention"),  # Gemma 2 caps attention scores, which sdpa cannot
    [("llama", "eager"), ("llama", "sdpa"), ("mistral", "eager"), ("mistral", "sdpa"), ("gemma2", "eager")],
)
def test_attention_implementations(family, attention):
    model, prompts, group = group_case(family, torch.float32, thoughts=2, lengths=[(9, 9), (20, 5), (3, 1)])
    model.set_attn_implementation(attention)
    assert_equal(model, prompts, group, 2e-5)


@pytest.mark.parametrize("family", ["mistral", "gpt2"])
@pytest.mark.parametrize("backbone", [False, True])
def test_expanded_cache_where_rows_cannot_be_packed(family, backbone, monkeypatch, caplog):
    model, prompts, group = group_case(family, thoughts=2, backbone=backbone)
    packed = model(**prompts, group=group)
    monkeypatch.setattr(flr.model.packed_members, "obstacle", lambda model: "because")
    flr.model.backbone.warn_once.cache_clear()
    with caplog.at_level("WARNING", logger="flr"), shared_prompts(False):
        expanded = assert_equal(model, prompts, group, FLOAT64[family])
    assert "expanded to every group member instead of shared: because" in caplog.text
    torch.testing.assert_close(packed.logprobs, expanded.logprobs, rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("way")
def test_no_member_has_a_prompt_of_its_own():
    """Every call of the backbone has B rows; the prompt is encoded once, the suffix is G (N + S - 1) tokens."""
    model, prompts, group = group_case("qwen2", members=8)
    calls = []
    model.model.layers[0].register_forward_hook(lambda m, inputs, _: calls.append(tuple(inputs[0].shape[:2])))
    keys = []
    attention = model.model.layers[0].self_attn
    attention.k_proj.register_forward_hook(lambda m, inputs, out: keys.append((out.shape, out.requires_grad)))
    model(**prompts, group=group).logprobs.sum().backward()
    assert calls == [(3, 12), (3, 8 * 4)]
    assert [g for _, g in keys] == [False, True]


def test_equals_the_supervised_forward():
    """Member 0 is the model as it is: its mean target log-probability is the supervised loss."""
    model, prompts, group = group_case("qwen2", orthogonality_weight=0.3, sparsity_weight=0.2, thoughts=2)
    out = model(**prompts, group=group)
    ids = torch.cat([prompts["input_ids"], group.targets], 1)
    mask = torch.cat([prompts["attention_mask"], group.target_mask.long()], 1)
    labels = torch.cat([torch.full_like(prompts["input_ids"], -100), group.targets], 1).masked_fill(mask == 0, -100)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    supervised = model(input_ids=ids, attention_mask=mask, position_ids=positions, labels=labels)
    loss = -out.logprobs[:, 0].sum() / group.target_mask.sum()
    torch.testing.assert_close(loss, supervised.loss - supervised.flr.loss, rtol=1e-6, atol=0)
    assert out.regularisers.shape == (3,)
    one = group_case("qwen2", orthogonality_weight=0.3, sparsity_weight=0.2)
    regularisers = one[0](**one[1], group=one[2]).regularisers
    ids[:, 12], labels[:, 12] = THOUGHT, -100
    expected = one[0](input_ids=one[1]["input_ids"], attention_mask=one[1]["attention_mask"]).flr.loss
    torch.testing.assert_close(regularisers.mean(), expected, rtol=1e-6, atol=0)


def test_divergence_from_a_reference():
    model, prompts, group = group_case("phi", thoughts=2)
    group.reference = copy.deepcopy(model.flr).requires_grad_(False)
    out = model(**prompts, group=group)
    assert out.kl.abs().max() < 1e-20
    with torch.no_grad():
        model.flr.output.add_(0.01 * torch.randn_like(model.flr.output))
    out = model(**prompts, group=group)
    expected = torch.zeros(3, dtype=torch.float64)
    ids, mask = (x.repeat_interleave(4, 0) for x in (prompts["input_ids"], prompts["attention_mask"]))
    _, thoughts = two_pass.group_logprobs(model, prompts, group)
    embeds = model.get_input_embeddings()(ids)
    for n, ours in enumerate(thoughts):  # r and r_ref from the same noisy past
        if n:
            embeds[:, 11 + n] = out.thoughts[:, :, n - 1].flatten(0, 1)
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        hidden = model.model(inputs_embeds=embeds, attention_mask=mask, position_ids=positions).last_hidden_state
        reference = group.reference(hidden[:, : 12 + n], mask[:, : 12 + n].bool(), 11 + n).thought
        sigma = 3.0 * ours.thought.square().mean(-1).sqrt()
        kl = (ours.thought - reference).square().sum(-1) / (2 * sigma**2)
        expected += kl.view(3, 4).mean(1)
    torch.testing.assert_close(out.kl, expected, rtol=1e-9, atol=0)
    out.kl.sum().backward()
    assert model.flr.output.grad.norm() > 0
    assert group.reference.output.grad is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p, g: setattr(g, "noise", g.noise + 1), "noise: expected zeros for member 0"),
        (lambda p, g: setattr(g, "noise", g.noise[:, :, :, 1:]), "noise: expected .3, G, 1, 32."),
        (lambda p, g: setattr(g, "targets", g.targets[:2]), "targets: expected .3, S. with S >= 1"),
        (lambda p, g: setattr(g, "target_mask", g.target_mask.long()), "target_mask: expected bool"),
        (lambda p, g: setattr(g, "target_mask", ~g.target_mask), "target_mask: expected true from column 0"),
        (lambda p, g: setattr(g, "noise_scale", -1.0), "noise_scale: expected a number >= 0, got -1.0"),
        (lambda p, g: p.update(input_ids=p["input_ids"].flip(1)), "input_ids: expected 1 thought tokens at the end"),
        (lambda p, g: p.update(attention_mask=p["attention_mask"].flip(1)), "padded on the left alone"),
        (lambda p, g: p.update(position_ids=torch.zeros(1, 2)), "position_ids: expected shape"),
    ],
)
def test_unusable_input_is_refused(change, message):
    model, prompts, group = group_case("gpt2")
    change(prompts, group)
    with pytest.raises(ValueError, match=message):
        model(**prompts, group=group)


def test_what_excludes_a_group_forward():
    model, prompts, group = group_case("llama", variant="anchor")
    with pytest.raises(ValueError, match="variant: expected flr, offsets or latentr3"):
        model(**prompts, group=group)
    model, prompts, group = group_case("llama", backbone=True)
    model.train().gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="gradient checkpointing: expected off"):
        model(**prompts, group=group)


@pytest.mark.usefixtures("way")
def test_bfloat16_backbone():
    model, prompts, group = group_case("qwen2", torch.float32, thoughts=2)
    model.to(torch.bfloat16)
    for context in (contextlib.nullcontext(), torch.autocast("cpu", torch.bfloat16)):
        with context:
            out = model(**prompts, group=group)
        assert out.logprobs.dtype == torch.float32
        gradients = gradients_of(model, out.logprobs.mean())
        assert all(torch.isfinite(g).all() and g.dtype == torch.float32 for g in gradients.values() if g is not None)


# --- the policy of thoughts


@pytest.mark.parametrize("thoughts", [1, 2])
def test_thought_log_probabilities_by_hand(thoughts):
    model, prompts, group = group_case("phi", thoughts=thoughts)
    tokens = model(**prompts, group=group)
    group.policy = "thoughts"
    out = model(**prompts, group=group)
    torch.testing.assert_close(out.logprobs, tokens.logprobs)
    assert not out.logprobs.requires_grad
    actions, sigma = out.actions
    assert actions.shape == (3, 4, thoughts, HIDDEN)
    # -‖σ ε‖² / 2σ², whatever the thought
    expected = -group.noise.square().sum(-1) / 2
    torch.testing.assert_close(out.thought_logprobs, expected)
    # gradient (ε / σ) dr: of the first thought, which is shared
    weights = torch.randn(3, 4, dtype=torch.float64)
    mine = gradients_of(model, (weights * out.thought_logprobs[..., 0]).sum())
    embeds = model.get_input_embeddings()(prompts["input_ids"])
    positions = (prompts["attention_mask"].cumsum(1) - 1).clamp_min(0)
    hidden = model.model(
        inputs_embeds=embeds, attention_mask=prompts["attention_mask"], position_ids=positions
    ).last_hidden_state[:, :12]
    r = model.flr(hidden, prompts["attention_mask"][:, :12].bool(), 11).thought
    direction = (weights[..., None] * group.noise[:, :, 0] / sigma[:, :, :1]).sum(1)
    assert_same_gradients(mine, gradients_of(model, (direction * r).sum()), 1e-12)


def test_given_actions_are_scored_without_the_targets():
    model, prompts, group = group_case("qwen2", thoughts=2)
    group.policy = "thoughts"
    first = model(**prompts, group=group)
    group.actions = first.actions
    again = model(**prompts, group=group)
    assert again.logprobs is None
    torch.testing.assert_close(again.thought_logprobs, first.thought_logprobs, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        model.flr.output.add_(0.01 * torch.randn_like(model.flr.output))
    moved = model(**prompts, group=group).thought_logprobs
    assert (moved - first.thought_logprobs).abs().max() > 1e-3


@pytest.mark.usefixtures("way")
def test_given_thoughts_take_the_place_of_the_reasoners():
    model, prompts, group = group_case("mistral", torch.float32, thoughts=2)
    out = model(**prompts, group=group)
    for member in (0, 3):
        ids = torch.cat([prompts["input_ids"], group.targets], 1)
        mask = torch.cat([prompts["attention_mask"], group.target_mask.long()], 1)
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        logits = model(
            input_ids=ids, attention_mask=mask, position_ids=positions, thoughts=out.thoughts[:, member]
        ).logits
        logp = logits[:, 13:-1].log_softmax(-1).gather(-1, group.targets[..., None])[..., 0]
        torch.testing.assert_close(
            logp.masked_fill(~group.target_mask, 0), out.logprobs[:, member], rtol=1e-5, atol=1e-5
        )
    with pytest.raises(ValueError, match=r"thoughts: expected \[3, 2, D\]"):
        model(**prompts, thoughts=out.thoughts[:, 0, :1])
