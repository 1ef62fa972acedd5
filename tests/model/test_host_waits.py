"""A step on a device never makes the host wait for it: forward and backward of SFT and of latent GRPO, by counting.

On the CPU, under :func:`flr.model.backbone.fixed_shapes`, which takes the ways of another device.
"""

import dataclasses

import pytest
import torch

from flr.config import IGNORE
from flr.decode import CatalogueTrie
from flr.model.backbone import fixed_shapes
from flr.model.catalogue_loss import CatalogueLoss
from tests.helpers.comparisons import assert_same_gradients, gradients_of
from tests.helpers.inputs import group_case
from tests.helpers.models import THOUGHT, patched_model
from tests.helpers.waits import HostWaits

#: Items of one to three tokens with a wide node and a chain.
ITEMS = [[7], [5, 9, 3], [5, 9, 4], [5, 10, 3], *([4, t, 6] for t in range(10, 20)), [6, 20, 21]]


def catalogue_loss():
    offsets = torch.tensor([0, *map(len, ITEMS)]).cumsum(0).tolist()
    return CatalogueLoss(CatalogueTrie.from_sequences([t for item in ITEMS for t in item], offsets))


def counted(run):
    """What ``run()`` gives with fixed shapes: its loss, its gradients, and the waits on the way."""
    model, loss = run()
    expected = gradients_of(model, loss)
    with fixed_shapes(), HostWaits() as waits:
        _, fixed = run()
        model.zero_grad()
        fixed.backward()
    actual = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    torch.testing.assert_close(fixed, loss, rtol=1e-5, atol=1e-6)
    assert_same_gradients({n: g for n, g in actual.items() if n in expected}, expected, 1e-5)
    return dict(waits.found)


def test_the_counter_finds_what_waits():
    x = torch.tensor([1.0, 0.0, 2.0])
    with HostWaits() as waits:
        x[x > 0].sum()
        bool((x > 0).any())
        (x > 0).nonzero()
        torch.where(x > 0, x, 0.0)
        x.tolist()
        x.long().repeat_interleave(x.long())
        x.long().repeat_interleave(x.long(), output_size=3)
    assert sorted(name for name, _ in waits.found) == [
        "Tensor.tolist",
        "aten._local_scalar_dense.default",
        "aten.index.Tensor",
        "aten.nonzero.default",
        "aten.repeat_interleave.Tensor",
    ]
    assert all(place.startswith("tests/model/test_host_waits.py:") for _, place in waits.found)


@pytest.mark.parametrize("catalogue", [False, True])
@pytest.mark.parametrize("policy", ["tokens", "thoughts"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "mistral"])
def test_none_in_latent_grpo(family, policy, catalogue):
    model, prompts, group = group_case(family, torch.float32, lengths=((9, 3), (5, 3), (12, 3)))
    group.policy = policy
    if catalogue:
        loss_of = catalogue_loss()
        targets = torch.tensor([ITEMS[1], ITEMS[5], ITEMS[-1]])
        group = dataclasses.replace(
            group, targets=targets, catalogue_loss=loss_of, target_nodes=loss_of.target_nodes(targets)
        )

    def run():
        out = model(**prompts, group=group)
        return model, out.logprobs.square().mean() if policy == "tokens" else out.thought_logprobs.mean()

    assert counted(run) == {}


@pytest.mark.parametrize("thoughts", [1, 2])
def test_none_where_targets_differ_in_length(thoughts):
    model, prompts, group = group_case("llama", torch.float32, thoughts=thoughts)
    assert counted(lambda: (model, model(**prompts, group=group).logprobs.square().mean())) == {}


@pytest.mark.parametrize("catalogue", [False, True])
@pytest.mark.parametrize(
    ("family", "variant"), [("llama", "flr"), ("qwen2", "flr"), ("gpt2", "flr"), ("mistral", "flr"), ("llama", "none")]
)
def test_none_in_supervised_training(family, variant, catalogue):
    """Of the control without a thought, too, whose labels begin where a thought would stand."""
    model = patched_model(family, variant=variant).train()
    prompts = torch.randint(3, THOUGHT, (3, 9))
    prompts[:, -1] = THOUGHT
    labels = torch.tensor([ITEMS[1], ITEMS[5], ITEMS[-1]])
    ids = torch.cat([prompts, labels], 1)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    more = {}
    if catalogue:
        more["catalogue_loss"] = loss_of = catalogue_loss()
        labels = loss_of.target_nodes(labels)
    labels = torch.cat([torch.full_like(prompts, IGNORE), labels], 1)

    def run():
        start = 8 if variant == "flr" else 9
        return model, model(input_ids=ids, attention_mask=mask, labels=labels, thought_start=start, **more).loss

    assert counted(run) == {}
    model.eval()
    expected = model(input_ids=ids, attention_mask=mask, labels=labels, **more).loss
    torch.testing.assert_close(run()[1], expected)
