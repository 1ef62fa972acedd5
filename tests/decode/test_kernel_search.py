"""Decoding by kernels: how many operations a level has beside the model, and what makes them."""

from types import SimpleNamespace

import pytest
import torch

import flr.decode.beam
import flr.decode.packed
from flr.decode import CatalogueTrie, beam_search, graphs
from flr.decode.kernel_search import KernelSearch
from flr.model.backbone import fixed_shapes
from flr.model.base import attention_mask
from tests.decode.test_graphs import filters
from tests.helpers.catalogues import codec_of, random_catalogue
from tests.helpers.inputs import toy_inputs
from tests.helpers.models import toy_model
from tests.helpers.operations import Operations

SEQUENCES = [(30, 31, *s) for s in random_catalogue(5, 40, 4, 4)]  # a chain at the root
#: Of a level that begins and ends with one: three kernels, the mask's columns beside each other (three more on a GPU,
#: which makes numbers of them), how far the batch is, and what the scoring needs of states.
LEVEL = {
    "full": {"trie_advance", "cat", "log_normaliser", "trie_step", "trie_collect", "amax"},
    "catalogue": {"trie_advance", "cat", "index", "trie_step", "trie_collect", "amax"},
}


@pytest.mark.parametrize("kind", ["none", "mask", "shared", "exclude", "only"])
@pytest.mark.parametrize("scoring", ["full", "catalogue"])
def test_a_level_of_a_captured_search_has_six_operations(scoring, kind, monkeypatch):
    """43 to 78 under ``full`` and 176 to 198 under ``catalogue`` before `trie_advance` and `trie_collect`."""
    levels = []

    def run(_, search, prompts, __):
        replayed = graphs.Replayed(search, prompts)
        list(replayed.steps())  # makes what is made once
        counted = Operations()
        monkeypatch.setattr(flr.decode.packed, "model_states", counted.leave_out(flr.decode.packed.model_states))
        if replayed.search.logits is not None:
            kind_of_rows = type(replayed.search.logits)
            monkeypatch.setattr(kind_of_rows, "__call__", counted.leave_out(kind_of_rows.__call__))
        with fixed_shapes(), counted:
            for state, _ in replayed.steps():
                replayed.ended(state)
                levels.append(dict(counted.found))
                counted.found.clear()

    monkeypatch.setattr(flr.decode.beam, "runs_as_kernel", lambda *_: True)
    monkeypatch.setattr(graphs, "run", run)
    trie = CatalogueTrie.from_codec(codec_of(SEQUENCES))
    beam_search(toy_model("llama"), toy_inputs((9, 4, 6)), trie, 5, 6, scoring, **filters(kind, 3, len(SEQUENCES)))
    wanted = {f"flr::{name}" if "_" in name else name: 1 for name in LEVEL[scoring]}
    assert len(levels) == trie.depth
    for level in levels[1:-1]:
        assert level == wanted
    assert sum(levels[0].values()) < 70


class OnDevice(torch.Tensor):
    """A tensor on the CPU that says it were on a GPU."""

    is_cuda = True


@pytest.mark.parametrize("columns", [23, 32, 33])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_mask_on_a_device_is_of_numbers_in_rows_of_16(attention, columns):
    """SDPA's kernels would move a mask whose rows are not aligned, layer by layer."""
    config = SimpleNamespace(_attn_implementation=attention)
    seen = torch.rand(2, 5, columns) < 0.5
    mask = attention_mask(config, seen.as_subclass(OnDevice), torch.bfloat16).as_subclass(torch.Tensor)
    assert torch.equal(mask[:, 0] == 0, seen)
    assert mask.shape == (2, 1, 5, columns)
    assert mask.dtype == torch.bfloat16
    assert mask.stride(-2) == (columns if attention == "eager" else -(-columns // 16) * 16)


def test_a_forward_makes_one_mask(monkeypatch):
    """For all layers, with as many steps of the session."""
    made, steps, layers = [], [], []
    original = flr.decode.packed.attention_mask
    monkeypatch.setattr(flr.decode.packed, "attention_mask", lambda *args: made.append(original(*args)) or made[-1])
    states = flr.decode.packed.model_states

    def forward(model, hidden, arguments):
        steps.append(arguments["attention_mask"])
        return states(model, hidden, arguments)

    monkeypatch.setattr(flr.decode.packed, "model_states", forward)
    model = toy_model("llama")
    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(
            lambda _, args, more: layers.append(more["attention_mask"]), with_kwargs=True
        )
    trie = CatalogueTrie.from_codec(codec_of(SEQUENCES))
    beam_search(model, toy_inputs((9, 4, 6)), trie, 5, 6)
    assert steps
    assert [id(x) for x in steps] == [id(x) for x in made]
    of_steps = layers[-len(steps) * len(model.model.layers) :]
    assert [x.data_ptr() for x in of_steps] == [x.data_ptr() for x in made for _ in model.model.layers]


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("penalty", [0.7, -0.5])
@pytest.mark.parametrize("scoring", ["full", "catalogue"])
def test_length_penalties_are_those_of_the_search_in_pytorch(scoring, penalty, captured, monkeypatch):
    """Which also bound what can still enter the best k; with fixed shapes and with growing ones."""
    model, inputs = toy_model("llama"), toy_inputs((9, 4, 6))
    sequences = [(30, *s) for s in random_catalogue(7, 40, 3, 4)] + [(31,), (32, 33)]
    trie = CatalogueTrie.from_codec(codec_of(sequences))
    expected = beam_search(model, inputs, trie, 6, 5, scoring, length_penalty=penalty)
    plain = beam_search(model, inputs, trie, 6, 5, scoring)
    assert not torch.equal(expected.scores, plain.scores)

    def run(_, search, prompts, __):
        assert isinstance(search, KernelSearch)
        return graphs.Replayed(search, prompts).run(len(prompts.states)) if captured else None

    monkeypatch.setattr(flr.decode.beam, "runs_as_kernel", lambda *_: True)
    monkeypatch.setattr(graphs, "run", run)
    found = beam_search(model, inputs, trie, 6, 5, scoring, length_penalty=penalty)
    assert found.items.tolist() == expected.items.tolist()
    torch.testing.assert_close(found.scores, expected.scores, atol=1e-4, rtol=1e-5)
