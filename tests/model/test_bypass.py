"""Losses that run the base model themselves: a fused one of somebody else's in the place of our forward."""

import types

import pytest
import torch

import flr
from tests.helpers.comparisons import assert_same_gradients, gradients_of
from tests.helpers.inputs import supervised_batch
from tests.helpers.models import FAMILIES, tiny_model, wake
from tests.model.test_insertion import one_line


class Output:
    def __init__(self, loss):
        self.loss = loss


def fuse(model):
    """Replace forward as fused losses do: the base model and the lm_head, called one after the other."""
    original = model.forward

    def fused(self, input_ids=None, labels=None, fused=True, num_items_in_batch=None, **kwargs):
        if not fused:
            return original(input_ids=input_ids, labels=labels, **kwargs)
        states = self.base_model(input_ids, use_cache=False, **kwargs).last_hidden_state
        logits = flr.model.head.head(self, states)[:, :-1].flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum")
        return Output(loss / ((labels[:, 1:] != -100).sum() if num_items_in_batch is None else num_items_in_batch))

    model.forward = types.MethodType(fused, model)
    return model


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", ["left", "right", "columns"])
@pytest.mark.parametrize("rows_without", [4, 1], ids=["inserted", "brought"])
def test_a_fused_loss_gets_the_thought_and_the_regularisers(family, layout, rows_without):
    model = one_line(family, num_thoughts=2, diversity_weight=0.3, orthogonality_weight=0.2)
    inputs = supervised_batch(layout, num_thoughts=2, rows_without=rows_without)
    if rows_without == 1:
        inputs["input_ids"][inputs["input_ids"] == 60] = model._flr_patch.config.thought_token_id
    for options in ({}, {"num_items_in_batch": 17}):
        expected = model(**inputs, **options)
        gradients = gradients_of(model, expected.loss)
        forward = model.forward
        fuse(model)
        loss = model(**inputs, **options).loss
        torch.testing.assert_close(loss, expected.loss, rtol=1e-5, atol=1e-6)
        assert_same_gradients(gradients_of(model, loss), gradients, 1e-5)
        torch.testing.assert_close(model(**inputs, fused=False).loss, model(**inputs, fused=False).loss)
        model.forward = forward
    assert model._flr_patch.pending is None


def test_what_ours_refuses_is_refused_there_too_and_nothing_is_left_behind():
    model = fuse(one_line())
    ids = torch.tensor([[5, 6, 7, 8, 9, 10]])
    labels = torch.tensor([[-100, -100, 7, -100, 9, 10]])
    with pytest.raises(ValueError, match="packed"):
        model(input_ids=ids, labels=labels, position_ids=torch.tensor([[0, 1, 2, 0, 1, 2]]))
    assert model._flr_patch.pending is None
    plain = model.base_model(ids).last_hidden_state  # a call of the base model alone is that of the base model
    torch.testing.assert_close(plain, tiny_model().base_model(ids).last_hidden_state)


def test_a_forward_that_is_called_past_the_hooks_is_refused():
    """As PEFT before 0.21 does: nobody has seen the labels, and no thought would be trained."""
    model, inputs = fuse(one_line()), supervised_batch("left", rows_without=4)
    with pytest.raises(ValueError, match="forward: expected a call of the model itself"):
        model.forward(**inputs)
    assert model(**inputs).loss > 0
    with torch.no_grad():
        model.forward(**inputs)
    model.eval()
    model.forward(**inputs)


def test_states_of_prompts_with_thoughts_come_from_the_base_model_too():
    model = one_line().eval()
    token = model._flr_patch.config.thought_token_id
    ids = torch.tensor([[5, 6, 7, token]])
    expected = model(input_ids=ids, output_hidden_states=True)
    out = model.base_model(input_ids=ids, use_cache=True, output_hidden_states=True)
    torch.testing.assert_close(out.last_hidden_state, expected.hidden_states[-1])
    torch.testing.assert_close(out.hidden_states[0], expected.hidden_states[0])
    assert out.past_key_values.get_seq_length() == 4
    tuples = model.base_model(ids[:, :3]).last_hidden_state
    assert tuples.shape == (1, 3, 32)


def test_a_model_wrapped_by_mixed_precision_is_not_gone_around():
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)  # what other tests of this process asked for
    model = flr.patch_model(tiny_model())
    wake(model)
    inputs = supervised_batch("left", rows_without=4)
    expected = model(**inputs)
    prepared = Accelerator(cpu=True, mixed_precision="bf16").prepare(model)
    out = prepared(**inputs)
    assert out.logits.shape == expected.logits.shape
    torch.testing.assert_close(out.loss, expected.loss, rtol=2e-2, atol=2e-2)
    AcceleratorState._reset_state(True)
