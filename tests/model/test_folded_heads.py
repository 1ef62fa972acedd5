"""Heads of a group as rows: the same attention, without copies of keys and values."""

from __future__ import annotations

import contextlib
import threading
from types import SimpleNamespace

import pytest
import torch
from transformers.integrations import sdpa_attention
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from flr.decode import CatalogueTrie, beam_search
from flr.model.folded_heads import folded_heads
from tests.helpers.inputs import toy_inputs
from tests.helpers.models import tiny_model


def arguments(heads, groups, count, columns, size, kind):
    torch.manual_seed(0)
    query = torch.randn(2, heads * groups, count, size, requires_grad=True)
    key, value = (torch.randn(2, heads, columns, size, requires_grad=True) for _ in range(2))
    mask = torch.rand(2, 1, count, columns) < 0.6
    mask[..., 0] = True
    if kind == "additive":
        mask = torch.zeros(mask.shape).masked_fill_(~mask, torch.finfo(torch.float32).min)
    return SimpleNamespace(num_key_value_groups=groups, is_causal=True), query, key, value, mask


@pytest.mark.parametrize("kind", ["bool", "additive"])
@pytest.mark.parametrize(("heads", "groups", "count", "columns", "size"), [(2, 6, 20, 300, 64), (1, 4, 3, 37, 16)])
def test_result_and_gradients_equal_those_of_copies(heads, groups, count, columns, size, kind, monkeypatch):
    found = arguments(heads, groups, count, columns, size, kind)
    expected = sdpa_attention_forward(*found, scaling=0.2)[0]
    seed = torch.randn_like(expected)
    gradients = torch.autograd.grad(expected, found[1:4], seed)
    copies = []
    monkeypatch.setattr(sdpa_attention, "repeat_kv", lambda x, n: copies.append(n) or pytest.fail("copied"))
    with folded_heads():
        folded = ALL_ATTENTION_FUNCTIONS["sdpa"](*found, scaling=0.2)[0]
    assert not copies
    assert folded.shape == expected.shape
    torch.testing.assert_close(folded, expected, atol=1e-6, rtol=1e-5)
    for a, b in zip(torch.autograd.grad(folded, found[1:4], seed), gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_only_the_thread_inside_and_only_while_it_is(monkeypatch):
    found, outcome = arguments(2, 3, 4, 30, 8, "bool"), []
    calls = []
    real = sdpa_attention.repeat_kv
    monkeypatch.setattr(sdpa_attention, "repeat_kv", lambda x, n: calls.append(n) or real(x, n))

    def attend():
        outcome.append(ALL_ATTENTION_FUNCTIONS["sdpa"](*found)[0])

    with contextlib.suppress(RuntimeError), folded_heads(), folded_heads():
        attend()
        assert calls == []
        thread = threading.Thread(target=attend)
        thread.start()
        thread.join()
        assert calls == [3, 3]
        raise RuntimeError
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward
    torch.testing.assert_close(*outcome, atol=1e-6, rtol=1e-5)


def test_another_attention_of_that_name_stays():
    def another(*args, **kwargs):
        raise AssertionError

    ALL_ATTENTION_FUNCTIONS["sdpa"] = another
    try:
        with folded_heads():
            assert ALL_ATTENTION_FUNCTIONS["sdpa"] is another
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is another
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]


def test_beams_do_not_copy_keys_and_values(monkeypatch):
    """Behind the prompt, whose own mask transformers makes."""
    model = tiny_model("llama", num_attention_heads=4, num_key_value_heads=1)
    trie = CatalogueTrie.from_sequences([10, 11, 12, 10, 11, 13, 14, 15, 16], [0, 3, 6, 9])
    expected = beam_search(model, toy_inputs(), trie, 3, 3)
    columns = []
    real = sdpa_attention.repeat_kv
    monkeypatch.setattr(sdpa_attention, "repeat_kv", lambda x, n: columns.append(x.shape[2]) or real(x, n))
    found = beam_search(model, toy_inputs(), trie, 3, 3)
    assert set(columns) <= {toy_inputs()["input_ids"].shape[1]}
    assert found.items.tolist() == expected.items.tolist()
