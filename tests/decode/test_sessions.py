"""Toy models and catalogues for the decoding tests, and the equalities that every model family must satisfy."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
import torch
import transformers

import flr.decode.session
from flr.decode import CatalogueTrie, beam_search, rank_one_token, score_all_items

VOCABULARY = 61
FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma2", "phi", "gpt2")


class Codec(NamedTuple):
    tokens: np.ndarray
    offsets: np.ndarray


def codec_of(sequences: list[tuple[int, ...]]) -> Codec:
    lengths = [len(s) for s in sequences]
    tokens = np.array([t for s in sequences for t in s], dtype=np.int32)
    return Codec(tokens, np.concatenate(([0], np.cumsum(lengths))).astype(np.int64))


def random_catalogue(
    seed: int, num_items: int = 14, depth: int = 4, alphabet: int = 4, first: int = 10
) -> list[tuple[int, ...]]:
    """Prefix-heavy unique sequences of 1..depth tokens, closed by token 9 (so prefix-free)."""
    rng = np.random.default_rng(seed)
    found: dict[tuple[int, ...], None] = {}
    while len(found) < num_items:
        body = rng.integers(first, first + alphabet, rng.integers(1, depth + 1))
        found[(*(int(t) for t in body), 9)] = None
    return list(found)


def toy_model(family: str, attention: str | None = None, sliding_window: int | None = None, seed: int = 0):
    """A random model of two layers whose logits spread enough for rankings to be stable."""
    common = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.25,
    }
    if family == "gemma2":
        common.update(head_dim=8, query_pre_attn_scalar=8, sliding_window=sliding_window or 128)
        common.update(attn_logit_softcapping=20.0, final_logit_softcapping=15.0)
    elif family == "qwen3":
        common.update(head_dim=8)
    elif family == "mistral":
        common.update(sliding_window=sliding_window)
    elif family == "gpt2":
        common = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}
        common["initializer_range"] = 0.25
    names = {"gpt2": "GPT2", "llama": "Llama", "mistral": "Mistral", "phi": "Phi"}
    config_type = getattr(transformers, f"{names.get(family, family.capitalize())}Config")
    config = config_type(**common, bos_token_id=1, eos_token_id=9, pad_token_id=0)
    config._attn_implementation = attention or ("eager" if family == "gemma2" else "sdpa")
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=config._attn_implementation)
    model.generation_config.do_sample = True  # must not matter
    model.generation_config.top_k = 1
    return model.eval()


def toy_inputs(
    lengths: tuple[int, ...] = (7, 3, 5), seed: int = 0, pad_to: int | None = None
) -> dict[str, torch.Tensor]:
    """Left-padded prompts; row b depends on `seed` and b alone. With an item_positions entry, which models do not take."""
    width = pad_to or max(lengths)
    ids = torch.zeros(len(lengths), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        rng = np.random.default_rng([seed, row])
        ids[row, width - length :] = torch.from_numpy(rng.integers(20, VOCABULARY, 64)[:length])
        mask[row, width - length :] = 1
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "item_positions": ids}


def row_of(inputs: dict[str, torch.Tensor], row: int) -> torch.Tensor:
    return inputs["input_ids"][row][inputs["attention_mask"][row].bool()]


@torch.no_grad()
def naive_scores(model, inputs, sequences, scoring="full", allowed=None) -> torch.Tensor:
    """[B, C]: a full forward, without padding or cache, for every user and item."""
    rows, device = len(inputs["input_ids"]), model.device
    allowed = torch.ones(len(sequences), dtype=torch.bool) if allowed is None else allowed
    allowed = allowed.expand(rows, len(sequences))
    scores = torch.full((rows, len(sequences)), -torch.inf)
    for row in range(rows):
        prompt = row_of(inputs, row)
        candidates = [s for s, ok in zip(sequences, allowed[row], strict=True) if ok]
        for item, sequence in enumerate(sequences):
            if not allowed[row, item]:
                continue
            ids = torch.cat([prompt, torch.tensor(sequence)])[None].to(device)
            extra = {}
            if "reasoner_mask" in inputs:  # of a patched model
                own = inputs["reasoner_mask"][row][inputs["attention_mask"][row].bool()]
                extra["reasoner_mask"] = torch.cat([own, torch.zeros(len(sequence), dtype=torch.bool)])[None]
            logits = model(input_ids=ids, use_cache=False, **extra).logits[0].float()[len(prompt) - 1 : -1]
            total = 0.0
            for step, token in enumerate(sequence):
                siblings = sorted({s[step] for s in candidates if len(s) > step and s[:step] == sequence[:step]})
                row_logits = logits[step] if scoring == "full" else logits[step, siblings]
                total += float(logits[step, token] - row_logits.logsumexp(0))
            scores[row, item] = total
    return scores


def assert_ranked(result, scores: torch.Tensor, k: int, tolerance: float = 1e-4) -> None:
    """`result` holds the k best finite entries of `scores` [B, C] by descending score."""
    order = scores.sort(dim=1, descending=True, stable=True)
    expected = torch.full((len(scores), k), -1)
    best = torch.full((len(scores), k), -torch.inf)
    n = min(k, scores.shape[1])
    best[:, :n] = order.values[:, :n]
    expected[:, :n] = order.indices[:, :n].masked_fill(order.values[:, :n] == -torch.inf, -1)
    assert result.items.dtype == torch.int64
    assert result.scores.dtype == torch.float32
    assert result.items.tolist() == expected.tolist()
    torch.testing.assert_close(result.scores, best, atol=tolerance, rtol=1e-5)


@pytest.mark.parametrize("scoring", ["full", "catalogue"])
@pytest.mark.parametrize(("family", "attention"), [(f, a) for f in FAMILIES for a in ("sdpa", "eager")])
def test_all_families_equal_naive(family, attention, scoring):
    if family == "gemma2" and attention == "sdpa":
        pytest.skip("transformers refuses softcap with sdpa")
    model, inputs = toy_model(family, attention), toy_inputs()
    sequences = random_catalogue(seed=3)
    trie = CatalogueTrie.from_codec(codec_of(sequences))
    expected = naive_scores(model, inputs, sequences, scoring)
    torch.testing.assert_close(score_all_items(model, inputs, trie, scoring, chunk=5), expected, atol=1e-4, rtol=1e-5)
    assert_ranked(beam_search(model, inputs, trie, num_beams=20, k=len(sequences), scoring=scoring), expected, 14)


@pytest.mark.parametrize("family", ["mistral", "gemma2"])
@pytest.mark.parametrize("window", [4, 8])
def test_short_sliding_window_falls_back_and_is_exact(family, window, caplog):
    flr.decode.session._log_once.cache_clear()
    model, inputs = toy_model(family, sliding_window=window), toy_inputs((7, 7, 7))
    sequences = random_catalogue(seed=4)
    trie = CatalogueTrie.from_codec(codec_of(sequences))
    with caplog.at_level("WARNING"):
        for scoring in ("full", "catalogue"):
            expected = naive_scores(model, inputs, sequences, scoring)
            found = score_all_items(model, inputs, trie, scoring, chunk=6)
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)
            assert_ranked(beam_search(model, inputs, trie, 20, 14, scoring), expected, 14)
    assert sum("attention window" in r.message for r in caplog.records) == 1


def test_models_without_position_ids_fall_back_and_are_exact(caplog):
    flr.decode.session._log_once.cache_clear()
    torch.manual_seed(0)
    config = transformers.BloomConfig(
        vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.25
    )
    model, inputs = transformers.BloomForCausalLM(config).eval(), toy_inputs()
    sequences = random_catalogue(seed=4)
    trie = CatalogueTrie.from_codec(codec_of(sequences))
    expected = naive_scores(model, inputs, sequences)
    torch.testing.assert_close(score_all_items(model, inputs, trie, chunk=6), expected, atol=1e-4, rtol=1e-5)
    assert_ranked(beam_search(model, inputs, trie, 20, 14), expected, 14)
    assert [r.message for r in caplog.records] == [
        "decoding expands the prompt's cache to every beam instead of sharing it: "
        "BloomForCausalLM derives positions from the attention mask"
    ]


def test_attention_without_a_4d_mask_falls_back():
    model, inputs = toy_model("llama"), toy_inputs()
    past = model(input_ids=inputs["input_ids"], use_cache=True).past_key_values
    assert flr.decode.session._packing_obstacle(model, past, 7, 5) is None
    model.config._attn_implementation = "flash_attention_2"
    obstacle = flr.decode.session._packing_obstacle(model, past, 7, 5)
    assert obstacle == "flash_attention_2 attention takes no 4-D mask"


@pytest.mark.parametrize("scoring", ["full", "catalogue"])
def test_expanded_session_equals_packed(monkeypatch, scoring):
    model, inputs = toy_model("llama"), toy_inputs()
    trie = CatalogueTrie.from_codec(codec_of(random_catalogue(seed=5, num_items=40)))
    packed = beam_search(model, inputs, trie, 5, 5, scoring), score_all_items(model, inputs, trie, scoring, chunk=7)
    monkeypatch.setattr(flr.decode.session, "_packing_obstacle", lambda *_: "test")
    expanded = beam_search(model, inputs, trie, 5, 5, scoring), score_all_items(model, inputs, trie, scoring, chunk=7)
    assert packed[0].items.tolist() == expanded[0].items.tolist()
    torch.testing.assert_close(packed[0].scores, expanded[0].scores, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(packed[1], expanded[1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_and_batch_do_not_matter(family):
    model = toy_model(family)
    trie = CatalogueTrie.from_codec(codec_of(random_catalogue(seed=6, num_items=40)))
    together = beam_search(model, toy_inputs(), trie, 6, 6)
    padded = beam_search(model, toy_inputs(pad_to=20), trie, 6, 6)
    assert together.items.tolist() == padded.items.tolist()
    torch.testing.assert_close(together.scores, padded.scores, atol=1e-5, rtol=1e-5)
    inputs = toy_inputs()
    for row in range(3):
        alone = {"input_ids": row_of(inputs, row)[None]}
        single = beam_search(model, alone, trie, 6, 6)
        assert single.items[0].tolist() == together.items[row].tolist()
        torch.testing.assert_close(single.scores[0], together.scores[row], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(
            score_all_items(model, alone, trie)[0], score_all_items(model, inputs, trie)[row], atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_one_token_items(family):
    model, inputs = toy_model(family), toy_inputs()
    sequences = [(int(t),) for t in np.random.default_rng(0).permutation(VOCABULARY)[:30]]
    trie = CatalogueTrie.from_codec(codec_of(sequences))
    allowed = torch.arange(30) % 3 != 0
    for scoring in ("full", "catalogue"):
        expected = naive_scores(model, inputs, sequences, scoring, allowed)
        found = rank_one_token(model, inputs, trie, scoring, allowed)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(score_all_items(model, inputs, trie, scoring, allowed=allowed), found)
        assert_ranked(beam_search(model, inputs, trie, 3, 12, scoring, allowed), expected, 12)


def test_one_token_items_need_one_forward():
    model, inputs = toy_model("llama"), toy_inputs()
    trie = CatalogueTrie.from_sequences([12, 13, 14], [0, 1, 2, 3])
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    beam_search(model, inputs, trie, 5, 5)
    rank_one_token(model, inputs, trie)
    score_all_items(model, inputs, trie)
    assert len(calls) == 3
