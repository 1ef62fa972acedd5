"""Prompts' states that are kept: the same loss and gradients, each prompt read once, within a bound, or refused."""

import errno
import os

import pytest
import torch
import transformers

import flr
from flr.model.base import base_of
from flr.model.prompt_cache import PromptCache
from tests.helpers.comparisons import assert_same_gradients, gradients_of
from tests.helpers.inputs import group_case, supervised_batch
from tests.helpers.models import patched_model

ROOM = 0.1  # 10^9 bytes, enough for every prompt here


def frozen(family="llama", **config):
    """A model of which only the reasoner trains."""
    model = patched_model(family, **{"num_factors": 3, **config}).eval()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("flr."))
    return model


def batch_of(layout="left", num_thoughts=1):
    """Rows that all have a thought, their positions counting tokens."""
    batch = supervised_batch(layout, num_thoughts, rows_without=0)
    mask = batch["attention_mask"]
    return {**batch, "position_ids": (mask.cumsum(1) - 1).clamp_min(0)}


class Reads:
    """Counts the tokens that the base model reads."""

    def __init__(self, model):
        self.tokens = 0
        base_of(model).register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, _, args, kwargs):
        self.tokens += kwargs["inputs_embeds"].shape[:2].numel()


@pytest.mark.parametrize("place", ["memory", "disk"])
@pytest.mark.parametrize("thoughts", [1, 2])
@pytest.mark.parametrize("layout", ["left", "columns"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "phi"])
def test_loss_and_gradients_are_those_without(family, layout, thoughts, place, tmp_path):
    model, batch = frozen(family, num_thoughts=thoughts), batch_of(layout, thoughts)
    expected = model(**batch)
    gradients = gradients_of(model, expected.loss)
    with PromptCache(model, ROOM, tmp_path if place == "disk" else None).used() as kept:
        for found in (0, 4, 8):  # of four rows each time
            out = model(**batch)
            torch.testing.assert_close(out.loss, expected.loss, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(out.flr.attention, expected.flr.attention, rtol=1e-4, atol=1e-5)
            assert_same_gradients(gradients_of(model, out.loss), gradients, 1e-4)
            assert kept.found == found


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(("thoughts", "policy"), [(1, "tokens"), (2, "tokens"), (1, "thoughts")])
def test_group_forwards_are_those_without(family, thoughts, policy):
    model, prompts, group = group_case(family, torch.float32, thoughts=thoughts)
    group.policy = policy
    expected = model(**prompts, group=group)

    def loss(out):
        return out.logprobs.square().mean() if policy == "tokens" else out.thought_logprobs.mean()

    gradients = gradients_of(model, loss(expected))
    with PromptCache(model, ROOM).used() as kept:
        for _ in range(2):
            out = model(**prompts, group=group)
            torch.testing.assert_close(out.logprobs, expected.logprobs, rtol=1e-5, atol=1e-5)
            assert_same_gradients(gradients_of(model, loss(out)), gradients, 1e-4)
    assert (kept.found, kept.asked) == (3, 6)


def test_a_prompt_is_read_once():
    model, batch = frozen(), batch_of()
    with PromptCache(model, ROOM).used():
        reads = Reads(model)
        model(**batch)
        first, prompts = reads.tokens, int(batch["attention_mask"].sum() - (batch["labels"] != -100).sum()) - 4
        model(**batch)
        assert 0 < reads.tokens - first == first - prompts  # thoughts and targets alone


def test_states_do_not_depend_on_the_batch():
    """To the last bit: an empty cache after a kill changes nothing."""
    model, batch = frozen(), batch_of()
    with PromptCache(model, ROOM).used():
        together = model(**batch).flr.thought
    row = {name: x[2:3, int((batch["attention_mask"][2] == 0).sum()) :] for name, x in batch.items()}
    with PromptCache(model, ROOM).used() as kept:
        model(**row)
        (hidden, both) = next(iter(kept._rows.values()))
    with PromptCache(model, ROOM).used() as kept:
        model(**batch)
        rows = list(kept._rows.values())
    assert together.shape[0] == len(rows) == 4
    assert torch.equal(hidden, rows[2][0])
    assert torch.equal(both, rows[2][1])


def test_the_bound_holds_and_what_does_not_fit_is_computed(tmp_path):
    model, batch = frozen(), batch_of()
    expected = model(**batch).loss
    with PromptCache(model, ROOM).used() as whole:
        model(**batch)
    for folder in (None, tmp_path):
        with PromptCache(model, whole.bytes * 0.6 / 1e9, folder).used() as kept:
            for _ in range(2):
                torch.testing.assert_close(model(**batch).loss, expected, rtol=1e-5, atol=1e-6)
        assert 0 < kept.bytes <= whole.bytes * 0.6
        assert 0 < kept.found < 4


def test_a_full_disk_is_no_error(tmp_path, monkeypatch):
    model, batch = frozen(), batch_of()
    expected = model(**batch).loss
    write, calls = os.pwrite, []

    def full(*args):
        calls.append(args)
        if len(calls) > 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(*args)

    monkeypatch.setattr(os, "pwrite", full)
    with PromptCache(model, ROOM, tmp_path).used() as kept:
        for _ in range(2):
            torch.testing.assert_close(model(**batch).loss, expected, rtol=1e-5, atol=1e-6)
    assert kept.found == 1


def test_only_training_takes_from_it():
    model, batch = frozen(), batch_of()
    with PromptCache(model, ROOM).used() as kept:
        with torch.no_grad():
            model(**batch)
        model(**{k: v for k, v in batch.items() if k != "labels"}, output_hidden_states=True)
        assert kept.asked == 0
        model(**batch)
        assert kept.asked == 4
    model(**batch)
    assert kept.asked == 4
    assert not kept._rows


@pytest.mark.parametrize(("layout", "found"), [("left", 0), ("right", 4)])
def test_positions_that_do_not_count_tokens_are_computed(layout, found):
    """Columns as positions: rows that are padded on the left begin later; others are shifted, with their positions."""
    model, batch = frozen(), supervised_batch(layout, rows_without=0)
    batch["position_ids"] = torch.arange(batch["input_ids"].shape[1])[None]
    expected = model(**batch).loss
    with PromptCache(model, ROOM).used() as kept:
        for _ in range(2):
            torch.testing.assert_close(model(**batch).loss, expected)
    assert kept.found == found


_SMALL = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2}
_MLA = {"intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": None}
_LATENT = {"kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8, "first_k_dense_replace": 2}
_HEADS = {"intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (transformers.MistralConfig(**_SMALL, **_HEADS, sliding_window=6), "sliding_attention"),
        (transformers.MambaConfig(**_SMALL), "more of a prompt"),
        (transformers.BloomConfig(**_SMALL, n_head=4, hidden_dropout=0, attention_dropout=0), "positions"),
        (transformers.DeepseekV3Config(**_SMALL, **_MLA, **_LATENT), "of one shape"),
    ],
    ids=["mistral", "mamba", "bloom", "deepseek"],
)
def test_models_whose_states_are_more_are_refused(config, message):
    model = transformers.AutoModelForCausalLM.from_config(config).requires_grad_(False)
    with pytest.raises(ValueError, match=f"prompt_cache: .*{message}"):
        PromptCache(flr.patch_model(model).eval(), ROOM)


def test_what_changes_a_prompts_states_is_refused():
    with pytest.raises(ValueError, match=r"prompt_cache: .* are trained"):
        PromptCache(patched_model(), ROOM)
    model = frozen("gpt2")
    model.transformer.drop.p = 0.1
    with pytest.raises(ValueError, match=r"prompt_cache: .* dropout"):
        PromptCache(model, ROOM)
    model = frozen()
    model.config.attention_dropout = 0.1
    with pytest.raises(ValueError, match=r"prompt_cache: .* dropout"):
        PromptCache(model, ROOM)
    with pytest.raises(ValueError, match="prompt_cache_gb: expected a positive number, got 0"):
        PromptCache(frozen(), 0)
