"""Members and beams that attend to a shared prompt apart from their own tokens, in the models of transformers."""

from __future__ import annotations

import copy
import dataclasses
import threading

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.integrations import sdpa_attention
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import flr
from flr.decode import CatalogueTrie, beam_search, score_all_items
from flr.decode.group import group_ranks
from flr.model import merged_attention, packed_members, shared_prompt
from flr.model.compiled_layers import compiled, compiled_layers
from flr.model.shared_prompt import shared_prompts, shares
from tests.helpers.catalogues import codec_of, random_catalogue
from tests.helpers.comparisons import assert_same_gradients, gradients_of
from tests.helpers.inputs import group_case, toy_inputs
from tests.helpers.models import HIDDEN, THOUGHT, tiny_model, toy_model
from tests.helpers.waits import HostWaits

SHARING = ("llama", "qwen2", "qwen3", "phi", "gpt2")


def stepped(case, wanted):
    """Log-probabilities of a group and their gradients, the members apart or under a mask."""
    model, prompts, group = case
    with shared_prompts(wanted):
        out = model(**prompts, group=group)
    weights = torch.linspace(-1, 1, out.logprobs.numel(), dtype=out.logprobs.dtype).view_as(out.logprobs)
    return out.logprobs, gradients_of(model, (out.logprobs * weights).sum())


def assert_equal(ours, theirs, bound):
    torch.testing.assert_close(ours[0], theirs[0], rtol=bound, atol=bound)
    assert_same_gradients(ours[1], theirs[1], bound)


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize(("thoughts", "members"), [(1, 4), (2, 3), (3, 1)])
@pytest.mark.parametrize("backbone", [False, True])
@pytest.mark.parametrize("family", SHARING)
def test_a_group_has_what_it_has_under_a_mask(family, backbone, thoughts, members, padding):
    lengths = ((9, 3), (5, 4), (12, 1)) if padding else ((7, 4),) * 2
    case = group_case(family, torch.float32, thoughts=thoughts, members=members, backbone=backbone, lengths=lengths)
    assert shares(case[0], preferred=True)
    assert_equal(stepped(case, True), stepped(case, False), 2e-5)


class Shapes(TorchDispatchMode):
    """Shapes of all that operations return."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor):
                self.seen.add(tuple(x.shape))
        return out


def made_by(case, wanted):
    model, prompts, group = case
    with shared_prompts(wanted), Shapes() as shapes:
        model(**prompts, group=group).logprobs.sum().backward()
    return shapes.seen


def test_no_mask_of_rows_by_columns_no_joined_and_no_repeated_keys():
    """Sizes that mean one thing each: 3 members of 5 columns behind 23 of the prompt, 4 heads and 2 of keys."""
    case = group_case("qwen2", torch.float32, members=3, lengths=((23, 5),) * 2, backbone=True)
    rows, columns, heads, size = 15, 38, 4, HIDDEN // 4
    masks = {shape for shape in made_by(case, True) if shape[-2:] == (rows, columns)}
    joined = {shape for shape in made_by(case, True) if columns in shape}
    repeated = {s for s in made_by(case, True) if s[-3:] in ((heads, 23, size), (heads, 5, size)) and s[0] in (2, 6)}
    assert masks == joined == set()
    assert (2, heads, 23, size) in repeated  # queries of the prompt's own encoding, which has as many
    assert repeated <= {(2, heads, 23, size), (6, heads, 5, size)}
    under_a_mask = made_by(case, False)
    assert any(shape[-2:] == (rows, columns) for shape in under_a_mask)
    assert (2, 2, columns, size) in under_a_mask


def test_keys_are_not_repeated(monkeypatch):
    model, prompts, group = group_case("qwen2", torch.float32, members=3, lengths=((23, 5),) * 2)
    calls = []
    real = sdpa_attention.repeat_kv
    monkeypatch.setattr(sdpa_attention, "repeat_kv", lambda x, n: calls.append(x.shape[2]) or real(x, n))
    real_attend = merged_attention._attend
    heads = []
    monkeypatch.setattr(
        merged_attention,
        "_attend",
        lambda q, part: heads.append((q.shape[1], part.key.shape[1])) or real_attend(q, part),
    )
    with shared_prompts(True):
        model(**prompts, group=group)
    assert set(calls) <= {23}  # the prompt's own encoding
    assert set(heads) == {(4, 2)}


def test_a_wrong_backward_would_be_found(monkeypatch):
    case = group_case("llama", torch.float32)
    expected = stepped(case, False)
    real, attend = merged_attention._attend_backward, merged_attention._attend
    monkeypatch.setattr(
        merged_attention,
        "_attend_backward",
        lambda grad, query, part, whole: real(grad, query, part, whole._replace(lse=attend(query, part).lse)),
    )
    with pytest.raises(AssertionError):
        assert_equal(stepped(case, True), expected, 2e-5)


@pytest.mark.parametrize("policy", ["tokens", "thoughts"])
@pytest.mark.parametrize("thoughts", [1, 2])
def test_nothing_waits(thoughts, policy):
    model, prompts, group = group_case("llama", torch.float32, thoughts=thoughts, lengths=((9, 3), (5, 3), (12, 3)))
    group.policy = policy
    assert shares(model, preferred=True)  # which is found out once
    with shared_prompts(True), flr.model.backbone.fixed_shapes(), HostWaits() as waits:
        out = model(**prompts, group=group)
        (out.logprobs if policy == "tokens" else out.thought_logprobs).sum().backward()
    assert dict(waits.found) == {}


@pytest.mark.parametrize("large", [False, True])
def test_what_is_large_is_shared(large, monkeypatch):
    if large:
        monkeypatch.setattr(packed_members, "_LARGE", 3 * 4 * 4 * 12 * HIDDEN)
    model, prompts, group = group_case("llama", torch.float32)
    made = []
    monkeypatch.setattr(
        packed_members, "MemberRows", lambda *args: made.append(shared_prompt.MemberRows(*args)) or made[-1]
    )
    model(**prompts, group=group)
    assert len(made) == large


def test_the_choice():
    model = tiny_model("llama")
    assert shares(model, preferred=True)
    assert not shares(model, preferred=False)
    with shared_prompts(True):
        assert shares(model, preferred=False)
        with shared_prompts(False):
            assert not shares(model, preferred=True)
    model.set_attn_implementation("eager")
    assert not shares(model, preferred=True)


def test_windows_that_are_too_short_have_a_mask():
    mistral = tiny_model("mistral")  # a window of 6
    assert shares(mistral, preferred=True, longest=6)
    assert not shares(mistral, preferred=True, longest=7)
    for lengths in (((3, 2),) * 2, ((4, 3), (2, 1)), ((9, 3), (5, 4))):
        case = group_case("mistral", torch.float32, lengths=lengths)
        assert_equal(stepped(case, True), stepped(case, False), 2e-5)


def test_a_model_that_attends_in_its_own_way_has_a_mask(monkeypatch):
    """One that takes no notice of the entry, and one whose layers use the keys of others."""
    model = tiny_model("llama")
    for layer in model.model.layers:
        monkeypatch.setattr(layer.self_attn, "layer_idx", 0)
    assert not shares(model, preferred=True)
    other = tiny_model("llama")
    monkeypatch.setattr(shared_prompt, "merged_attention", lambda q, prompt, own, *_: q)
    assert not shares(other, preferred=True)


@pytest.mark.parametrize("members", [1, 3])
@pytest.mark.parametrize("padding", [False, True])
def test_what_two_calls_cannot_do_has_a_mask(padding, members):
    """Dropout that drops nothing, told from none by its value alone."""
    case = group_case("llama", torch.float64, members=members, lengths=((9, 3), (5, 4)) if padding else ((7, 4),) * 2)
    calls = []
    real = sdpa_attention_forward

    def counted(*args, **kwargs):
        calls.append(kwargs.pop("dropout"))
        return real(*args, dropout=0.0, **kwargs)

    expected = stepped(case, False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared_prompt, "sdpa_attention_forward", counted)
        patch.setitem(shared_prompt._PLAIN, "dropout", -1.0)
        found = stepped(case, True)
    assert calls
    assert_equal(found, expected, 1e-6)


def test_only_the_thread_inside():
    case = group_case("llama", torch.float32)
    expected = stepped(case, False)[0]
    outcome = []

    def run(wanted):
        for _ in range(5):
            with torch.no_grad(), shared_prompts(wanted):
                outcome.append(case[0](**case[1], group=case[2]).logprobs)

    threads = [threading.Thread(target=run, args=(wanted,)) for wanted in (True, False, True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(outcome) == 15
    for found in outcome:
        torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward


@pytest.mark.parametrize("thoughts", [1, 2])
@pytest.mark.parametrize("backbone", [False, True])
def test_compiled_layers(thoughts, backbone):
    torch._dynamo.reset()
    traced = []
    program = compiled(lambda graph, inputs: traced.append(graph) or graph.forward)
    case = group_case("qwen2", torch.float32, thoughts=thoughts, backbone=backbone)
    expected = stepped(case, False)
    with compiled_layers(case[0], program):
        found = stepped(case, True)
    assert_equal(found, expected, 1e-4)
    assert any("MergedAttention" in str(graph) or "autograd_function" in graph.code for graph in traced)
    torch._dynamo.reset()


@pytest.mark.parametrize("scoring", ["full", "catalogue"])
@pytest.mark.parametrize("family", SHARING)
def test_beams_and_trees_have_what_they_have_under_a_mask(family, scoring):
    model, inputs = toy_model(family), toy_inputs(pad_to=64)
    trie = CatalogueTrie.from_codec(codec_of(random_catalogue(seed=5, num_items=40)))

    def answers():
        return beam_search(model, inputs, trie, 5, 5, scoring), score_all_items(model, inputs, trie, scoring, chunk=7)

    with Shapes() as shapes:
        expected, scores = answers()
    assert any(len(s) == 4 and s[3] > 64 for s in shapes.seen)  # the prompt's columns and others
    with shared_prompts(True), Shapes() as shapes:
        found, others = answers()
    assert not any(len(s) == 4 and s[3] > 64 for s in shapes.seen)
    assert found.items.tolist() == expected.items.tolist()
    torch.testing.assert_close(found.scores, expected.scores, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(others, scores, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("scoring", ["full", "catalogue"])
def test_members_are_decoded_from_what_they_left(scoring):
    model, prompts, group = group_case("qwen2", torch.float32, thoughts=2)
    trie = CatalogueTrie.from_codec(codec_of(random_catalogue(seed=5, num_items=40)))
    group = dataclasses.replace(group, decodable=True)
    ranks = []
    for wanted in (False, True):
        with torch.no_grad(), shared_prompts(wanted):
            out = model(**prompts, group=group)
            ranks.append(group_ranks(model, out.prompts, trie, torch.tensor([3, 8, 20]), 20, scoring).tolist())
    assert ranks[0] == ranks[1]
    assert any(rank for row in ranks[0] for rank in row)


@pytest.mark.parametrize("aggregation", ["mixture"])
def test_a_mixture(aggregation):
    model, prompts, _ = group_case("llama", torch.float32, aggregation=aggregation)
    ids = torch.cat([prompts["input_ids"], torch.randint(3, THOUGHT, (3, 3))], 1)
    mask = torch.cat([prompts["attention_mask"], torch.ones(3, 3, dtype=torch.int64)], 1)
    labels = torch.where(torch.arange(ids.shape[1]) >= prompts["input_ids"].shape[1], ids, -100)
    trie, answers = CatalogueTrie.from_codec(codec_of(random_catalogue(seed=5, num_items=40))), []
    for wanted in (False, True):
        with shared_prompts(wanted):
            loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
            answers.append((loss.detach(), gradients_of(model, loss), beam_search(model, prompts, trie, 5, 5)))
    torch.testing.assert_close(answers[1][0], answers[0][0])
    assert_same_gradients(answers[1][1], answers[0][1], 2e-5)
    assert answers[1][2].items.tolist() == answers[0][2].items.tolist()


# --- flash_attention_2: no mask of rows by columns at all


@pytest.fixture
def flash(monkeypatch):
    """A stand-in for flash-attn, which is not here: causal attention by sdpa, with a mask [B, L] of padding or none."""

    def attention(module, query, key, value, attention_mask, scaling=None, **_):
        assert attention_mask is None or attention_mask.dim() == 2, "flash attention takes no 4-D mask"
        count, columns = query.shape[2], key.shape[2]
        seen = torch.ones(count, columns, dtype=torch.bool).tril(columns - count)[None, None]
        if attention_mask is not None:
            own = seen & torch.ones(count, columns, dtype=torch.bool).triu(columns - count)
            seen = seen & attention_mask[:, None, None, -columns:].bool() | own
        out = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, seen.expand(len(query), -1, -1, -1), scale=scaling, enable_gqa=True
        )
        return out.transpose(1, 2).contiguous(), None

    ALL_ATTENTION_FUNCTIONS["flash_attention_2"] = attention
    yield attention
    assert ALL_ATTENTION_FUNCTIONS["flash_attention_2"] is attention
    del ALL_ATTENTION_FUNCTIONS["flash_attention_2"]


def as_flash(model):
    made = copy.deepcopy(model)
    made.config._attn_implementation = "flash_attention_2"
    if "_flr_patch" in made.__dict__:
        made._flr_patch.traits = None
    return made


@pytest.mark.parametrize("backbone", [False, True])
@pytest.mark.parametrize("thoughts", [1, 2])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_members_of_flash_attention_are_packed(family, thoughts, backbone, flash, monkeypatch, caplog):
    model, prompts, group = group_case(family, torch.float32, thoughts=thoughts, backbone=backbone)
    expected = stepped((model, prompts, group), False)
    model.config._attn_implementation = "flash_attention_2"
    model._flr_patch.traits = None
    rows = []
    model.model.layers[0].register_forward_hook(lambda m, inputs, _: rows.append(len(inputs[0])))
    with caplog.at_level("WARNING", logger="flr"):
        out = model(**prompts, group=group)
    weights = torch.linspace(-1, 1, out.logprobs.numel()).view_as(out.logprobs)
    assert rows[-1] == len(prompts["input_ids"])
    assert "expanded" not in caplog.text
    assert_equal((out.logprobs, gradients_of(model, (out.logprobs * weights).sum())), expected, 5e-5)


@pytest.mark.parametrize("scoring", ["full", "catalogue"])
def test_beams_of_flash_attention_are_packed(scoring, flash, caplog):
    model, inputs = toy_model("llama"), toy_inputs()
    trie = CatalogueTrie.from_codec(codec_of(random_catalogue(seed=5, num_items=40)))
    expected = beam_search(model, inputs, trie, 5, 5, scoring), score_all_items(model, inputs, trie, scoring, chunk=7)
    other = as_flash(model)
    flr.model.backbone.warn_once.cache_clear()
    with caplog.at_level("WARNING", logger="flr"):
        found = beam_search(other, inputs, trie, 5, 5, scoring), score_all_items(other, inputs, trie, scoring, chunk=7)
    assert "expands" not in caplog.text
    assert found[0].items.tolist() == expected[0].items.tolist()
    torch.testing.assert_close(found[0].scores, expected[0].scores, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found[1], expected[1], atol=1e-5, rtol=1e-5)


def test_flash_attention_that_is_not_here():
    """The prompts' cache is expanded as ever."""
    model = tiny_model("llama")
    assert shares(model, preferred=True)
    model.config._attn_implementation = "flash_attention_2"
    assert not shares(model, preferred=True)
    assert packed_members.obstacle(model) == "flash_attention_2 attention takes no 4-D mask"
