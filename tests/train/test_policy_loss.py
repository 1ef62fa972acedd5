"""The clipped surrogate."""

import torch

from flr.train.policy_loss import clipped_surrogate


def test_surrogate_on_policy_is_the_advantage_weighted_gradient():
    generator = torch.Generator().manual_seed(0)
    logprobs = torch.randn(3, 4, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    mask = torch.arange(5) < torch.tensor([[5], [2], [1]])
    advantages = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    loss = clipped_surrogate(logprobs, logprobs.detach(), mask, advantages).loss
    torch.testing.assert_close(loss, -advantages.mean(1))
    (gradient,) = torch.autograd.grad(loss.sum(), logprobs)
    expected = -advantages[..., None] * (mask / mask.sum(1, keepdim=True))[:, None] / 4
    torch.testing.assert_close(gradient, expected)


def test_clip_by_hand():
    ratio = torch.tensor([0.5, 0.9, 1.0, 1.25, 2.0])
    for sign, kept in ((1.0, [0.5, 0.9, 1.0, 1.25, 1.3]), (-1.0, [0.8, 0.9, 1.0, 1.25, 2.0])):
        now = ratio.log()[None, None].requires_grad_()
        out = clipped_surrogate(now, torch.zeros(1, 1, 5), None, torch.tensor([[sign]]), low=0.2, high=0.3)
        torch.testing.assert_close(out.loss, -sign * torch.tensor([kept]).mean(1))
        torch.testing.assert_close(out.clipped, torch.tensor([0.2]))
        (gradient,) = torch.autograd.grad(out.loss.sum(), now)
        assert (gradient[0, 0] == 0).sum() == 1


def test_what_is_clipped_is_counted_by_a_users_own_terms():
    ratio = torch.tensor([[[2.0, 1.0, 2.0, 2.0]], [[2.0, 2.0, 1.0, 1.0]]])
    mask = torch.arange(4) < torch.tensor([[2], [4]])
    out = clipped_surrogate(ratio.log(), torch.zeros(2, 1, 4), mask, torch.ones(2, 1))
    torch.testing.assert_close(out.clipped, torch.tensor([0.5, 0.5]))
