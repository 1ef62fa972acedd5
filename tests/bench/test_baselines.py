"""Competitors do the work that ours is compared for: loss and gradients are those of the plainest way."""

import pytest
import torch

from bench.baselines import attention, grouped, logprob, two_pass
from tests.helpers.comparisons import assert_same_gradients, gradients_of
from tests.helpers.inputs import group_case


@pytest.mark.parametrize("backbone", [False, True])
@pytest.mark.parametrize("thoughts", [1, 2])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_grouped_forward_equals_every_member_in_full(family, thoughts, backbone):
    """Prompts padded on the left and targets of different lengths: log-probabilities, loss and gradients in float64."""
    model, prompts, group = group_case(family, thoughts=thoughts, backbone=backbone)
    theirs = grouped.group_logprobs(model, prompts, group)
    exact, _ = two_pass.group_logprobs(model, prompts, group, published=True)
    torch.testing.assert_close(theirs, exact, rtol=1e-6, atol=1e-6)
    (mine, a), (naive, b) = (two_pass.group_loss(x, group.target_mask) for x in (theirs, exact))
    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    assert_same_gradients(gradients_of(model, mine), gradients_of(model, naive), 1e-6)
    assert model.config._attn_implementation != grouped.NAME


def test_token_logprob_is_that_of_trl():
    pytest.importorskip("trl")
    from trl.trainer import utils

    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 16, generator=generator) for n in (40, 300))
    target = torch.randint(300, (40,), generator=generator)
    theirs = utils.selective_log_softmax(hidden @ weight.T, target)
    torch.testing.assert_close(logprob.token_logprob(hidden, weight, target), theirs, rtol=1e-6, atol=1e-6)


def test_group_advantages_are_those_of_the_published_trainers():
    """Their lines: TRL 1.16's for groups of scaled rewards, LatentR3's at a67bbca."""
    size, eps = 4, 1e-4
    logps = -3 * torch.rand(12, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mask = torch.arange(5) < torch.tensor([5, 3, 1]).repeat_interleave(size)[:, None]
    rewards = -(-(logps * mask).sum(dim=-1) / mask.sum(-1)).exp()
    mean = rewards.view(-1, size).mean(dim=1).repeat_interleave(size)
    std = rewards.view(-1, size).std(dim=1).repeat_interleave(size)
    first = rewards.view(-1, size)[:, 0].unsqueeze(1).expand(-1, size).reshape(-1)
    latentr3 = rewards - first.mean()
    expected = {"grpo": (rewards - mean) / (std + eps), "latentr3": latentr3 / (torch.norm(latentr3) + eps)}
    for kind, advantages in expected.items():
        found = logprob.group_advantages(logps, mask, size, kind, eps)
        for ours, theirs in zip(found[:2], (rewards, advantages), strict=True):
            torch.testing.assert_close(ours.flatten().double(), theirs, rtol=1e-5, atol=1e-5)


def test_projected_attention_is_that_of_latentr3():
    """Its layer's lines for one factor (src/latent/layers.py at a67bbca), without its rotation and biases."""
    generator = torch.Generator().manual_seed(0)
    hidden, *weights = (torch.randn(n, generator=generator, dtype=torch.float64) for n in ((3, 7, 8), *[(8, 8)] * 3))
    mask = torch.arange(7) >= torch.tensor([0, 2, 6])[:, None]
    queries, keys, values = (hidden @ w.T for w in weights)
    scores = torch.matmul(queries[:, -1:], keys.transpose(-2, -1)) / 8**0.5
    scores = scores + torch.zeros(mask.shape).double().masked_fill(~mask, float("-inf")).unsqueeze(1)
    theirs = torch.matmul(torch.softmax(scores, dim=-1), values)
    ours = attention.projected(hidden, queries[:, -1:], *weights[1:], mask)[0]
    torch.testing.assert_close(ours, theirs)
