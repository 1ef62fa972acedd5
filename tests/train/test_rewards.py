"""Rewards and the advantages that are made of them."""

import math

import pytest
import torch

from flr.train import RewardInputs, Rewards
from flr.train.rewards import ranking_reward


def inputs_of(ranks=None):
    generator = torch.Generator().manual_seed(0)
    logprobs = -torch.rand(2, 3, 4, generator=generator)
    mask = torch.arange(4) < torch.tensor([[4], [2]])
    logprobs = logprobs * mask[:, None]
    return RewardInputs(
        logprobs, mask, torch.zeros(2, 4).long(), torch.zeros(2, 3, 1, 8), {}, torch.zeros(2).long(), lambda: ranks
    )


def test_rewards_are_weighted_sums():
    ranks = torch.tensor([[1, 2, 0], [11, 10, 3]])
    given = inputs_of(ranks)
    mean = given.logprobs.sum(-1) / given.target_mask.sum(1)[:, None]
    torch.testing.assert_close(Rewards.parse("neg_perplexity").of(given), -(-mean).exp())
    ndcg = torch.tensor([[1, 1 / math.log2(3), 0], [0, 1 / math.log2(11), 0.5]])
    hit = torch.tensor([[1.0, 1, 0], [0, 0, 1]])
    mrr = torch.tensor([[1, 0.5, 0], [1 / 11, 0.1, 1 / 3]])
    found = Rewards.parse("log_likelihood=2, ndcg@10=0.5, hit@9=3,mrr").of(given)
    torch.testing.assert_close(found, 2 * mean + 0.5 * ndcg + 3 * hit + mrr)
    own = Rewards({"log_likelihood": 1.0, lambda x: x.logprobs[..., 0]: -1.0})
    torch.testing.assert_close(own.of(given), mean - given.logprobs[..., 0])
    assert ranking_reward(torch.zeros(2).long(), "mrr").tolist() == [0, 0]
    with pytest.raises(ValueError, match="reward: expected neg_perplexity"):
        Rewards.parse("hit@²")  # a digit and no number
    with pytest.raises(ValueError, match=r"reward: expected \[2, 3\] of a function"):
        Rewards({lambda x: x.logprobs: 1.0}).of(given)


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "rloo", "latentr3"])
def test_advantages_of_a_likelihood_and_of_a_sum_agree(kind):
    given = inputs_of()
    fused = Rewards.parse("neg_perplexity").advantages(given, kind, 0.5)
    half = Rewards({"neg_perplexity": 0.5})
    summed = Rewards({**half.terms, half.of: 1.0})
    other = summed.advantages(given, kind, 0.5)
    for a, b in zip(fused, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    if kind == "grpo":
        r = fused.rewards
        torch.testing.assert_close(fused.advantages, (r - r.mean(1, True)) / (r.std(1, keepdim=True) + 0.5))


def test_the_weight_of_a_single_likelihood_counts():
    given = inputs_of()
    one, three = (Rewards.parse(text).advantages(given, "dr_grpo") for text in ("log_likelihood", "log_likelihood=3"))
    for a, b in zip(one, three, strict=True):
        torch.testing.assert_close(3 * a, b)


def test_the_longest_list_is_that_of_all_terms():
    assert Rewards.parse("hit@3,ndcg@10,mrr").longest_list == 10
    assert Rewards.parse("mrr").longest_list == 1


def test_latentr3_from_the_groups_own_clean_member():
    given = inputs_of()
    rewards = Rewards.parse("log_likelihood")
    r = rewards.of(given)
    published = rewards.advantages(given, "latentr3", 1e-4)
    centred = r - r[:, 0].mean()
    torch.testing.assert_close(published.advantages, centred / (centred.norm() + 1e-4))
    own = rewards.advantages(given, "latentr3", 1e-4, from_clean=True)
    centred = r - r[:, :1]
    torch.testing.assert_close(own.advantages, centred / (centred.norm() + 1e-4))
    assert own.advantages[:, 0].tolist() == [0, 0]
    torch.testing.assert_close(own.rewards, r)
    torch.testing.assert_close(own.mean, r.mean(1))


@pytest.mark.parametrize("text", ["accuracy", "ndcg", "hit@0", "ndcg@x", "log_likelihood=much", ""])
def test_unknown_rewards_are_refused(text):
    with pytest.raises(ValueError, match="reward: expected"):
        Rewards.parse(text)
    with pytest.raises(ValueError, match="reward: expected at least one"):
        Rewards({})
