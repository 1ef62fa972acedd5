"""Products that share their input as one: the same numbers, parameters that stay parameters."""

import copy

import pytest
import torch
from torch.nn.functional import linear

from flr.model.base import base_of
from flr.model.joint_products import groups_of, joint_products, share_products
from tests.helpers.models import tiny_model


def frozen(family="qwen2"):
    return tiny_model(family).requires_grad_(False).eval()


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2"])
def test_the_same_states_and_the_same_parameters(family):
    model, ids = frozen(family), torch.arange(3, 12)[None]
    before = copy.deepcopy(model.state_dict())
    expected = model(ids).logits
    layers = base_of(model).layers
    for _ in range(2):  # joined, and found joined
        with joint_products(layers):
            assert layers[0].self_attn.k_proj.flr_weight is layers[0].self_attn.q_proj.flr_weight
            torch.testing.assert_close(model(ids).logits, expected, atol=1e-5, rtol=1e-5)
        attention = layers[1].self_attn
        assert "forward" not in attention.q_proj.__dict__
        assert (
            attention.q_proj.weight.untyped_storage().data_ptr() == attention.v_proj.weight.untyped_storage().data_ptr()
        )
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    torch.testing.assert_close(model(ids).logits, expected, atol=0, rtol=0)


def test_weights_that_are_loaded_later_count():
    model, ids = frozen(), torch.arange(3, 12)[None]
    layers = base_of(model).layers
    with joint_products(layers):
        weight = layers[0].self_attn.q_proj.flr_weight
    model.load_state_dict({name: x * 1.5 for name, x in model.state_dict().items()})
    with joint_products(layers):
        assert layers[0].self_attn.q_proj.flr_weight.data_ptr() == weight.data_ptr()
        joint = model(ids).logits
    torch.testing.assert_close(joint, model(ids).logits, atol=1e-5, rtol=1e-5)
    model.to(torch.float64)  # memory of its own again
    with joint_products(layers):
        assert layers[0].self_attn.q_proj.flr_weight.dtype == torch.float64


def test_saved_models_are_whole(tmp_path):
    model = frozen()
    with joint_products(base_of(model).layers):
        pass
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert all(torch.equal(x, again.state_dict()[name]) for name, x in model.state_dict().items())


def test_what_is_not_joined():
    model = tiny_model("llama")
    layer = base_of(model).layers[0]
    assert not list(groups_of(layer))  # trained
    model.requires_grad_(False)
    assert [len(group) for group in groups_of(layer)] == [3, 2]
    layer.mlp.up_proj.weight.requires_grad_(True)
    layer.self_attn.q_proj.register_forward_hook(lambda *_: None)
    assert not list(groups_of(layer))


def test_equal_products_are_computed_once():
    def work(x, w, v, b):
        return linear(x, w)[:, :2] + linear(x, w)[:, 2:] + linear(x, v) + linear(x, v, b) + linear(x, v, bias=b)

    graph = share_products(torch.fx.symbolic_trace(work))
    assert sum(node.target is linear for node in graph.graph.nodes) == 4
    inputs = (torch.randn(3, 5), torch.randn(4, 5), torch.randn(2, 5), torch.randn(2))
    torch.testing.assert_close(graph(*inputs), work(*inputs))
