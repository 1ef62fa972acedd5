"""Searches of fixed shapes, run operation by operation: what CUDA graphs replay.

The graphs themselves need a GPU: ``-m gpu``.
"""

from __future__ import annotations

import gc
import threading
import weakref

import pytest
import torch

import flr.decode.beam
from flr.decode import CatalogueTrie, beam_search, graphs
from flr.decode import replayed as replayed_search
from flr.decode.kernel_search import KernelSearch
from flr.decode.prompt_graph import PromptGraph, prompts_to_capture
from flr.decode.replayed import padded_length
from tests.helpers.catalogues import LONG, codec_of, random_catalogue
from tests.helpers.inputs import filters, toy_inputs
from tests.helpers.models import patched_model, toy_model

LENGTHS = ((9, 4, 6), (5, 30), (3,), (2, 8, 5, 7, 26))  # users and prompts of several padded sizes


@pytest.fixture
def replayed(monkeypatch):
    """Every search by `Replayed`, kept from call to call as graphs are; the calls that it answered."""
    kept, answered = {}, []

    def run(model, search, prompts, _):
        users = 1 << (len(prompts.states) - 1).bit_length()
        key = (
            users,
            padded_length(prompts.session.length),
            type(search.allows),
            *(x.shape for x in search.allows.padded(users).tensors()),
        )
        if key in kept:
            kept[key].load(search, prompts)
        else:
            kept[key] = graphs.Replayed(search, prompts)
        found = kept[key].run(len(prompts.states))
        answered.append(found is not None)
        return found

    monkeypatch.setattr(flr.decode.beam, "runs_as_kernel", lambda *_: True)
    monkeypatch.setattr(graphs, "run", run)
    monkeypatch.setattr(replayed_search, "PROMPT_STEP", 16)
    return answered


def test_every_level_runs_before_it_is_captured(replayed, monkeypatch):
    """Also those below the last that has anything alive: a kernel is not compiled while a graph is captured."""
    seen = []
    level = KernelSearch.level

    def spy(self, state, step):
        seen.append(step)
        return level(self, state, step)

    monkeypatch.setattr(KernelSearch, "level", spy)
    sequences = [(30 + i,) for i in range(20)] + [(50, 51, 52, 53, 54, 55)]  # found before the deepest level
    trie = CatalogueTrie.from_codec(codec_of(sequences))
    beam_search(toy_model("llama"), toy_inputs((9, 4)), trie, 2, 2, "full")
    assert replayed == [True]
    assert seen == list(range(trie.depth))


@pytest.mark.parametrize("kind", ["none", "mask", "shared", "exclude", "only"])
@pytest.mark.parametrize("scoring", ["full", "catalogue"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_fixed_shapes_equal_growing_ones(family, scoring, kind, replayed):
    model = toy_model(family)
    sequences = [(30, 31, *s) for s in random_catalogue(5, 40, 4, 4)]  # a chain at the root
    trie = CatalogueTrie.from_codec(codec_of(sequences))
    for lengths in (*LENGTHS, *reversed(LENGTHS)):  # tensors are used again with other contents
        inputs = toy_inputs(lengths)
        allowed = filters(kind, len(lengths), len(sequences))
        found = beam_search(model, inputs, trie, 5, 6, scoring, **allowed)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(graphs, "run", lambda *_: None)
            patch.setattr(flr.decode.beam, "runs_as_kernel", lambda *_: False)
            expected = beam_search(model, inputs, trie, 5, 6, scoring, **allowed)
        assert found.items.tolist() == expected.items.tolist()
        torch.testing.assert_close(found.scores, expected.scores, atol=1e-4, rtol=1e-5)
    assert any(replayed)
    if kind == "none":
        assert all(replayed)


def test_longer_ways_than_the_trie_has_are_noticed(replayed):
    sequences = [(a, b, c) for a in (1, 2) for b in (3, 4) for c in (5, 6)]
    trie = CatalogueTrie.from_codec(codec_of(sequences))
    assert trie.longest_forced_runs() == [0, 1, 1]
    allowed = torch.zeros(8, dtype=torch.bool)
    allowed[[0, 1, 4, 5]] = True  # after the first token the second has no alternative, the third has
    found = beam_search(toy_model("llama"), toy_inputs((4,)), trie, 2, 2, "catalogue", allowed)
    assert replayed == [False]
    assert (found.items >= 0).all()


def test_lm_head_rows_follow_training(replayed):
    model, inputs = toy_model("llama"), toy_inputs((4, 6))
    trie = CatalogueTrie.from_codec(codec_of(random_catalogue(3, 20, 3, 4)))
    before = beam_search(model, inputs, trie, 4, 4, "catalogue")
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(-1)
    after = beam_search(model, inputs, trie, 4, 4, "catalogue")
    assert replayed == [True, True]
    assert before.items.tolist() != after.items.tolist()


def test_broken_logits_are_an_error(replayed):
    model = toy_model("llama")
    with torch.no_grad():
        model.get_output_embeddings().weight.fill_(float("nan"))
    trie = CatalogueTrie.from_codec(codec_of(random_catalogue(3, 20, 3, 4)))
    with pytest.raises(FloatingPointError, match="NaN or infinite"):
        beam_search(model, toy_inputs((4, 6)), trie, 4, 4)


@pytest.fixture
def policy(monkeypatch):
    """`graphs.run` on a CPU; capturing is counted and does nothing, so that replays run operation by operation.

    Prefills are neither captured nor answered from; see ``prefills``.
    """
    captured: list[graphs.Replayed] = []
    monkeypatch.setattr(graphs, "_capture_prompts", lambda *_: None)
    monkeypatch.setattr(flr.decode.beam, "runs_as_kernel", lambda *_: True)
    monkeypatch.setattr(graphs, "_usable", lambda *_: True)
    monkeypatch.setattr(graphs, "_fits", lambda _: True)
    monkeypatch.setattr(graphs.Replayed, "capture", lambda self: captured.append(self))
    return captured


@pytest.fixture
def prefills(policy, monkeypatch):
    """Prefills, too, by what a graph would replay; the calls that were answered whole."""
    monkeypatch.undo()
    monkeypatch.setattr(flr.decode.beam, "runs_as_kernel", lambda *_: True)
    monkeypatch.setattr(graphs, "_usable", lambda *_: True)
    monkeypatch.setattr(graphs, "_fits", lambda _: True)
    monkeypatch.setattr(graphs, "_serves", lambda model: model in graphs._entries)
    monkeypatch.setattr(graphs.Replayed, "capture", lambda self: None)
    monkeypatch.setattr(PromptGraph, "capture", lambda self, model, record: self.run(model))
    monkeypatch.setattr(replayed_search, "PROMPT_STEP", 16)
    answered = []
    answer = graphs.answer

    def counted(*args):
        found = answer(*args)
        answered.append(found is not None)
        return found

    monkeypatch.setattr(graphs, "answer", counted)
    return answered


def calls(model, trie, count=1, **more):
    return [beam_search(model, toy_inputs((4, 6)), trie, 4, 4, **more).items.tolist() for _ in range(count)]


def test_shapes_are_captured_when_they_come_again(policy):
    model = toy_model("llama")
    trie = CatalogueTrie.from_codec(codec_of(random_catalogue(3, 20, 3, 4)))
    first, second, third = calls(model, trie, 3)
    assert first == second == third
    assert len(policy) == 1
    calls(model, trie, 2, scoring="catalogue")
    assert len(policy) == 2
    other = CatalogueTrie.from_codec(codec_of(random_catalogue(4, 20, 3, 4)))
    calls(model, other)
    assert len(policy) == 2
    assert calls(model, trie) == [first]
    model.get_output_embeddings().weight = torch.nn.Parameter(model.get_output_embeddings().weight.clone())
    calls(model, trie)  # weights elsewhere are shapes never seen
    assert len(policy) == 2


def test_what_cannot_be_captured_runs_as_usual_and_is_said(policy, monkeypatch, caplog):
    def fails(_):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(graphs.Replayed, "capture", fails)
    model = toy_model("llama")
    trie = CatalogueTrie.from_codec(codec_of(random_catalogue(3, 20, 3, 4)))
    first, *others = calls(model, trie, 4)
    assert others == [first] * 3
    assert caplog.text.count("without CUDA graphs") == 1
    assert "not permitted when stream is capturing" in caplog.text


def test_graphs_that_answer_otherwise_are_not_used(policy, monkeypatch, caplog):
    monkeypatch.setattr(graphs, "equal", lambda *_: False)
    model = toy_model("llama")
    trie = CatalogueTrie.from_codec(codec_of(random_catalogue(3, 20, 3, 4)))
    first, *others = calls(model, trie, 3)
    assert others == [first] * 2
    assert "differs" in caplog.text


def test_threads_do_not_share_tensors(policy):
    model = toy_model("llama")
    trie = CatalogueTrie.from_codec(codec_of(random_catalogue(3, 20, 3, 4)))
    (expected,) = calls(model, trie)
    calls(model, trie, 2)
    found: list = []
    threads = [threading.Thread(target=lambda: found.extend(calls(model, trie, 5))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 15


@pytest.mark.parametrize("scoring", ["full", "catalogue"])
def test_what_is_kept_for_a_model_does_not_keep_it(policy, scoring):
    model = toy_model("llama", seed=77)
    trie = CatalogueTrie.from_codec(codec_of(random_catalogue(3, 20, 3, 4)))
    calls(model, trie, 3, scoring=scoring)
    assert len(policy) == 1
    policy.clear()
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_few_shapes_are_kept(policy, monkeypatch):
    monkeypatch.setattr(graphs, "_KEPT", 2)
    model = toy_model("llama")
    trie = CatalogueTrie.from_codec(codec_of(random_catalogue(3, 20, 3, 4)))
    for beams in (2, 3, 4):
        beam_search(model, toy_inputs((4, 6)), trie, beams, 2)
    assert len(graphs._entries[model]) == 2


@pytest.mark.parametrize("variant", [None, {}, {"anchor": "none", "num_thoughts": 2}, {"variant": "offsets"}])
@pytest.mark.parametrize("scoring", ["full", "catalogue"])
def test_prefills_of_fixed_shapes_lead_to_the_same_items(scoring, variant, prefills):
    """From the fourth call of shapes on; other users, lengths and filters than those of the capture."""
    model = toy_model("llama") if variant is None else patched_model("llama", thought_token_id=3, **variant).eval()
    sequences = random_catalogue(5, 40, 4, 4)
    trie = CatalogueTrie.from_codec(codec_of(sequences))
    for step, lengths in enumerate([(9, 4, 6), (5, 11, 3), (8, 2, 2), (12, 4, 6), (3, 7, 5), (2, 3, 13)]):
        inputs = toy_inputs(lengths)
        chosen = filters("mask", len(lengths), len(sequences))
        found = beam_search(model, inputs, trie, 5, 6, scoring, **chosen)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(graphs, "run", lambda *_: None)
            patch.setattr(graphs, "answer", lambda *_: None)
            patch.setattr(flr.decode.beam, "runs_as_kernel", lambda *_: False)
            expected = beam_search(model, inputs, trie, 5, 6, scoring, **chosen)
        assert found.items.tolist() == expected.items.tolist()
        torch.testing.assert_close(found.scores, expected.scores, atol=1e-4, rtol=1e-5)
        assert prefills[-1] == (step >= 3)


def test_a_prefill_that_leads_elsewhere_is_not_used(prefills, monkeypatch, caplog):
    monkeypatch.setattr(graphs.Replayed, "take_prompts", lambda *_: None)
    model, trie = toy_model("llama"), CatalogueTrie.from_codec(codec_of(random_catalogue(3, 20, 3, 4)))
    first, *others = calls(model, trie, 5)
    assert others == [first] * 4
    assert not any(prefills)
    assert caplog.text.count("prefills without CUDA graphs") == 1


def test_prompts_that_a_graph_does_not_take(prefills):
    """Their thoughts are not at the end of every row: the usual way answers, and is as right as ever."""
    model = patched_model("llama", thought_token_id=3).eval()
    trie = CatalogueTrie.from_codec(codec_of(random_catalogue(3, 20, 3, 4)))
    calls(model, trie, 4)
    assert prefills == [False, False, False, True]
    inputs = toy_inputs((5, 7))
    inputs["input_ids"][:, 3], inputs["input_ids"][1, -1] = 11, 3
    assert prompts_to_capture(model, inputs) is None
    beam_search(model, inputs, trie, 4, 4)
    assert prefills[-1] is False


@pytest.mark.gpu
@pytest.mark.parametrize("scoring", ["full", "catalogue"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_graphs_on_a_gpu(family, scoring, caplog):
    model = toy_model(family).to("cuda")
    trie = CatalogueTrie.from_codec(codec_of(random_catalogue(5, 40, 4, 4))).to("cuda")
    for lengths in LENGTHS:
        expected = beam_search(toy_model(family), toy_inputs(lengths), trie.to("cpu"), 5, 6, scoring)
        for _ in range(6):  # as usual, captured, replayed and the prefill captured, and thrice replayed
            found = beam_search(model, toy_inputs(lengths), trie, 5, 6, scoring)
            assert found.items.tolist() == expected.items.tolist()
            torch.testing.assert_close(found.scores.cpu(), expected.scores, atol=1e-3, rtol=1e-3)
    entries = list(graphs._entries[model].values())
    assert all(entry.replayed is not None and entry.replayed.levels for entry in entries)
    assert all(entry.prompts is not None for entry in entries)
    assert "without CUDA graphs" not in caplog.text


@pytest.mark.gpu
def test_long_items_on_a_gpu(caplog, monkeypatch):
    """A patched model over titles of up to twenty tokens, whose ends are read without graphs."""
    model, finished = patched_model("qwen2", thought_token_id=3).eval().to("cuda"), []
    finish = graphs.Replayed.finish
    monkeypatch.setattr(graphs.Replayed, "finish", lambda *args: finished.append(args[2]) or finish(*args))
    trie = CatalogueTrie.from_codec(codec_of(LONG)).to("cuda")
    for lengths in ((9, 4, 6), (12, 3, 3)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("FLR_CUDA_GRAPHS", "0")
            expected = beam_search(model, toy_inputs(lengths), trie, 8, 8)
        for _ in range(6):
            found = beam_search(model, toy_inputs(lengths), trie, 8, 8)
            assert found.items.tolist() == expected.items.tolist()
            torch.testing.assert_close(found.scores, expected.scores, atol=1e-3, rtol=1e-3)
    assert finished
    assert any(entry.replayed.rests._known for entry in graphs._entries[model].values())
    assert "without CUDA graphs" not in caplog.text
