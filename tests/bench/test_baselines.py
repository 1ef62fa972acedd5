"""Competitors do the work that ours is compared for: loss and gradients are those of the plainest way."""

import pytest
import torch

from bench.baselines import grouped, two_pass
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
