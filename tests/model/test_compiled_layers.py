"""Layers as one compiled function: the results and gradients of the layers as they were, from few programs."""

import threading

import pytest
import torch
from torch.nn.functional import linear

from flr.model.base import base_of
from flr.model.compiled_layers import compiled, compiled_layers, obstacle
from flr.model.shared_prompt import shared_prompts
from tests.helpers.comparisons import assert_same_gradients, gradients_of
from tests.helpers.inputs import group_case
from tests.helpers.models import THOUGHT, patched_model, tiny_model

#: Lengths of prompts and targets: two batches whose shapes have nothing in common.
BATCHES = (((9, 4), (6, 5), (3, 2)), ((14, 3), (8, 6)))


@pytest.fixture
def programs():
    """A compiler that runs what Dynamo traced as it is, and counts it."""
    torch._dynamo.reset()
    traced = []

    def backend(graph, inputs):
        traced.append(graph)
        return graph.forward

    yield compiled(backend), traced
    torch._dynamo.reset()


def of_group(model, prompts, group):
    out = model(**prompts, group=group)
    weights = torch.linspace(-1, 1, out.logprobs.numel(), dtype=out.logprobs.dtype).view_as(out.logprobs)
    return out.logprobs, gradients_of(model, (out.logprobs * weights).sum())


@pytest.mark.parametrize(
    ("family", "backbone"),
    [("llama", True), ("qwen2", False), ("qwen3", False), ("mistral", False), ("gemma2", True), ("phi", False)],
)
def test_a_group_forward_is_the_same(family, backbone, programs):
    program, traced = programs
    for lengths in BATCHES:
        case = group_case(family, torch.float32, backbone=backbone, lengths=lengths, thoughts=2)
        expected, gradients = of_group(*case)
        with compiled_layers(case[0], program):
            found, others = of_group(*case)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        assert_same_gradients(others, gradients, 1e-4)
        assert all("forward" not in layer.__dict__ for layer in base_of(case[0]).layers)
    assert traced


def test_all_layers_share_their_programs(programs):
    """Prompts and members; a second shape makes both of any size, and a third compiles nothing."""
    program, traced = programs
    counts = []
    for width in (5, 9, 13, 21):
        model, prompts, group = group_case("qwen2", torch.float32, lengths=((width, 4),) * 2)
        with compiled_layers(model, program):
            model(**prompts, group=group)
        counts.append(len(traced))
    assert counts == [2, 4, 4, 4]
    products = [sum(node.target is linear for node in graph.graph.nodes) for graph in traced]
    assert set(products) == {4}  # queries, keys and values; what attention gives; gate and up; down


def test_a_supervised_step_is_the_same(programs):
    program, traced = programs
    model = patched_model("llama").train()
    ids = torch.randint(3, THOUGHT, (3, 14), generator=torch.Generator().manual_seed(1))
    ids[:, 8] = THOUGHT
    labels = torch.where(torch.arange(14) > 8, ids, -100)
    expected = model(input_ids=ids, labels=labels, use_cache=False).loss
    gradients = gradients_of(model, expected)
    with compiled_layers(model, program):
        found = model(input_ids=ids, labels=labels, use_cache=False).loss
        torch.testing.assert_close(found, expected)
        assert_same_gradients(gradients_of(model, found), gradients, 1e-4)
    assert traced


def test_layers_are_as_they_were_after_an_error(programs):
    model = tiny_model("llama")
    with pytest.raises(KeyError), compiled_layers(model, programs[0]):
        raise KeyError
    assert all("forward" not in layer.__dict__ for layer in base_of(model).layers)


@pytest.mark.parametrize(("family", "reason"), [("gpt2", "no list of layers"), ("hooked", "forwards of their own")])
def test_what_cannot_be_compiled(family, reason, programs):
    model = tiny_model("llama" if family == "hooked" else family)
    if family == "hooked":
        layer = model.model.layers[1]
        layer.forward = layer.forward  # as accelerate does it
    assert reason in obstacle(model)
    refused = pytest.raises(ValueError, match=f"layers: expected ones to compile, .*{reason}")
    with refused, compiled_layers(model, programs[0]):
        pass
    assert obstacle(tiny_model("llama")) is None


def test_other_threads_keep_their_heads_unfolded(programs):
    """A program that was traced inside ``folded_heads`` is not taken outside of it."""
    program, _ = programs
    model, prompts, group = group_case("llama", torch.float32)
    expected = model(**prompts, group=group).logprobs
    with compiled_layers(model, program):
        found = []
        threads = [threading.Thread(target=lambda: found.append(model(**prompts, group=group).logprobs)) for _ in "ab"]
        for thread in threads:
            thread.start()
            thread.join()
    for x in found:
        torch.testing.assert_close(x, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.usefixtures("inductor")
def test_inductor_gives_the_same(shared):
    torch._dynamo.reset()
    case = group_case("qwen2", torch.float32)
    expected, gradients = of_group(*case)
    with compiled_layers(case[0], compiled()), shared_prompts(shared):
        found, others = of_group(*case)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert_same_gradients(others, gradients, 1e-3)
    torch._dynamo.reset()
