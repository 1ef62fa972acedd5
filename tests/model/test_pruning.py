"""Factors that are taken out: what is left is the definition with fewer of them."""

import copy

import pytest
import torch

import flr
from flr.model.pruning import only_factors, prune_factors
from tests.helpers.inputs import supervised_batch
from tests.helpers.models import patched_model

KEEP = [0, 2]


def rows():
    return supervised_batch("left", rows_without=0)


@pytest.mark.parametrize("variant", ["flr", "offsets"])
def test_the_gates_share_out_what_is_gone(variant):
    model = patched_model(variant=variant, num_factors=4, num_refinements=1)
    history = torch.randn(3, 5, 32)
    whole = model.flr(history)
    prune_factors(model, [2, 0])
    left = model.flr(history)
    gates = whole.log_gates[:, KEEP].softmax(-1)
    torch.testing.assert_close(left.factors, whole.factors[:, KEEP])
    torch.testing.assert_close(left.thought, (gates[..., None] * whole.factors[:, KEEP]).sum(1))
    assert left.attention.shape[2] == 2


def test_a_mixture_stays_one():
    model = patched_model(aggregation="mixture", num_factors=3).eval()
    batch = rows()
    with torch.no_grad():
        parts = []
        for k in range(3):
            with only_factors(model, [k]):
                parts.append(model(**batch, num_items_in_batch=1))
        with only_factors(model, KEEP):
            two = model(**batch, num_items_in_batch=1)
    nll = [float(out.loss - out.flr.loss) for out in (*parts, two)]
    # -log Σ g p of the two lies between that of the better and that of the worse alone, row by row and in sum
    assert min(nll[0], nll[2]) - 1 < nll[3] < max(nll[0], nll[2])
    assert two.logits.exp().sum(-1).sub(1).abs().max() < 1e-4


@pytest.mark.parametrize("options", [{}, {"aggregation": "mixture"}, {"variant": "offsets"}])
def test_all_factors_are_the_model_and_afterwards_it_is_as_before(options):
    model = patched_model(num_factors=4, **options).eval()
    batch, config = rows(), dict(model.config.flr)
    reasoner, loss = model.flr, model(**batch).loss
    with only_factors(model, range(4)):
        torch.testing.assert_close(model(**batch).loss, loss, rtol=1e-6, atol=0)
    with only_factors(model, [1]):
        assert model(**batch).loss != loss
    with pytest.raises(ValueError, match="exactly one of"), only_factors(model, [1]):
        model(input_ids=None)
    assert model.flr is reasoner
    assert model.config.flr == config
    assert model(**batch).loss == loss


def test_what_is_left_is_saved_loaded_and_trained(tmp_path):
    model = prune_factors(patched_model(num_factors=4), [1, 3])
    assert {name: p.shape[0] for name, p in model.flr.named_parameters()}["key"] == 2
    loss = model.train()(**rows()).loss
    loss.backward()
    assert model.flr.key.grad.norm() > 0
    model.eval().save_pretrained(tmp_path)
    again = flr.from_pretrained(tmp_path)
    assert again.config.flr["num_factors"] == 2
    assert again.config.flr["factor_size"] == 8  # as it was, not 32 / 2
    assert torch.equal(again(**rows()).loss, model(**rows()).loss)
    flr.unpatch_model(again)


def test_the_model_given_keeps_its_weights_while_a_copy_is_pruned():
    model = patched_model(num_factors=4)
    other = prune_factors(copy.deepcopy(model), [0])
    assert model.flr.key.shape[0] == 4
    assert torch.equal(other.flr.key, model.flr.key[:1])


@pytest.mark.parametrize("keep", [[], [4], [-1], [1, 1]])
def test_factors_that_there_are_not(keep):
    with pytest.raises(ValueError, match="keep: expected different factors of 0 to 3, got"):
        prune_factors(patched_model(num_factors=4), keep)


@pytest.mark.parametrize("variant", ["latentr3", "anchor", "none"])
def test_a_model_without_factors_of_its_own(variant):
    with pytest.raises(ValueError, match="model: expected factors of variant flr or offsets"):
        prune_factors(patched_model(variant=variant), [0])
