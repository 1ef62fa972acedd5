"""Codecs: unique, prefix-free, reversible and stable, for any titles and semantic IDs."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from flr.data import CSR, Catalogue, ItemCodec, build_codec, build_tokenizer
from flr.data.codecs import find_prefix

AWKWARD = (
    "",
    "Greatest Hits",
    "greatest hits",
    "Greatest Hits, Vol. 2",
    '<span class="a-size-medium',
    "<|item_end|>",
    "Hits<|same_1|><|item_end|>",
    "<|thought|><|pad|></s><pad>",
    "日本語 🎷 e\u0301",
    "  two  spaces \n",
    "nul \x00 byte",
)
TITLES = st.lists(
    st.sampled_from(AWKWARD) | st.text(st.characters(exclude_categories=("Cs",)), max_size=12), min_size=1, max_size=25
)


def catalogue_of(titles, sids=None):
    return Catalogue([str(number) for number in range(len(titles))], titles, sids)


def brute_prefix_free(sequences: list[list[int]]) -> bool:
    return not any(
        i != j and sequences[j][: len(sequences[i])] == sequences[i]
        for i in range(len(sequences))
        for j in range(len(sequences))
    )


def check(codec: ItemCodec) -> None:
    sequences = [codec.encode(item) for item in range(len(codec))]
    assert brute_prefix_free(sequences)
    assert [codec.decode(sequence) for sequence in sequences] == list(range(len(codec)))
    assert codec.tokens.dtype == np.int32
    assert codec.offsets.dtype == np.int64


@settings(max_examples=40, deadline=None)
@given(TITLES, st.none() | st.integers(1, 3))
def test_title_codec_any_titles(titles, max_title_tokens):
    catalogue = catalogue_of(titles)
    tokenizer = build_tokenizer(catalogue, "title", vocab_size=300)
    codec = build_codec("title", catalogue, tokenizer, max_title_tokens=max_title_tokens)
    check(codec)
    size = len(tokenizer)
    again = build_codec("title", catalogue, tokenizer, max_title_tokens=max_title_tokens)
    assert len(tokenizer) == size
    assert np.array_equal(again.tokens, codec.tokens)
    assert np.array_equal(again.offsets, codec.offsets)
    if max_title_tokens is None:
        for item, title in enumerate(titles):
            text = tokenizer.decode(codec.encode(item), skip_special_tokens=True)
            assert text == title


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.lists(st.sampled_from(["<a_1>", "<a_2>", "<a_10>", "x"]), min_size=1, max_size=4), min_size=1, max_size=20
    )
)
def test_sid_codec_any_sids(sids):
    catalogue = catalogue_of(["t"] * len(sids), sids)
    tokenizer = build_tokenizer(catalogue, "sid")
    codec = build_codec("sid", catalogue, tokenizer)
    check(codec)
    for item, sid in enumerate(sids):
        assert tokenizer.convert_ids_to_tokens(codec.encode(item))[: len(sid)] == sid


def test_sid_tokens_of_a_group_and_of_others():
    catalogue = catalogue_of(["t"] * 4, [("a", "b"), ("a", "c"), ("a", "b"), ("b", "b")])
    tokenizer = build_tokenizer(catalogue, "sid")
    codec = build_codec("sid", catalogue, tokenizer)
    names = [tokenizer.convert_ids_to_tokens(codec.encode(item)) for item in range(4)]
    assert names == [["a", "b", "<|same_0|>"], ["a", "c"], ["a", "b", "<|same_1|>"], ["b", "b"]]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 3), max_size=4), max_size=12))
def test_find_prefix_equals_brute_force(rows):
    clash = find_prefix(CSR.from_rows(rows))
    free = brute_prefix_free(rows) and [] not in rows
    assert (clash is None) == free
    if clash is not None and len(rows) > 1:
        assert rows[clash[1]][: len(rows[clash[0]])] == rows[clash[0]]


@pytest.mark.parametrize("codec_name", ["title", "sid", "id"])
def test_saved_tokenizer_gives_the_same_codec(tmp_path, codec_name):
    titles = [*AWKWARD, *AWKWARD, "Hits"]
    catalogue = catalogue_of(titles, [(f"<a_{n % 3}>", f"<b_{n % 2}>") for n in range(len(titles))])
    tokenizer = build_tokenizer(catalogue, codec_name, vocab_size=300)
    codec = build_codec(codec_name, catalogue, tokenizer)
    check(codec)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    size = len(loaded)
    again = build_codec(codec_name, catalogue, loaded)
    assert len(loaded) == size
    assert np.array_equal(again.tokens, codec.tokens)
    assert np.array_equal(again.offsets, codec.offsets)


def test_text_that_looks_like_a_token_reads_the_same_before_and_after_that_token_exists():
    """<|same_0|> is added after the titles are first read, so only the second build could mistake the text for it."""
    catalogue = catalogue_of(["Hits<|same_0|>", "Hits<|same_0|>", "<|same_1|>", "Hits"])
    tokenizer = build_tokenizer(catalogue, "title", vocab_size=300)
    codec = build_codec("title", catalogue, tokenizer)
    again = build_codec("title", catalogue, tokenizer)
    check(codec)
    assert np.array_equal(again.tokens, codec.tokens)
    assert max(codec.lengths) < len("Hits<|same_0|>") + 2  # merges were at work


@pytest.mark.parametrize("codec_name", ["sid", "id"])
def test_tokens_are_added_to_a_foreign_tokenizer(codec_name):
    """A tokenizer with a lower-casing normaliser, no pad and no bos: codes stay whole and different."""
    titles = ["Blue", "blue", "Red"]
    catalogue = catalogue_of(titles, [("<A_1>", "x"), ("<a_1>", "x"), ("<a_1>", "y")])
    backend = Tokenizer(models.WordLevel({"<eos>": 0, "blue": 1, "red": 2, "[UNK]": 3}, unk_token="[UNK]"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", unk_token="[UNK]")
    codec = build_codec(codec_name, catalogue, tokenizer)
    check(codec)
    assert min(codec.tokens) >= 4
    check(build_codec("title", catalogue, tokenizer))  # "Blue" and "blue" read alike and are told apart


def test_errors():
    catalogue = catalogue_of(["a", "b"])
    tokenizer = build_tokenizer(catalogue, "id")
    with pytest.raises(ValueError, match=r"name: expected one of .* got 'ids'"):
        build_codec("ids", catalogue, tokenizer)
    with pytest.raises(ValueError, match="expected semantic IDs"):
        build_codec("sid", catalogue, tokenizer)
    with pytest.raises(ValueError, match="expected one built for codec 'title'"):
        build_codec("title", catalogue, tokenizer)
    with pytest.raises(ValueError, match="max_title_tokens"):
        build_codec("id", catalogue, tokenizer, max_title_tokens=3)
    with pytest.raises(ValueError, match="at least one item"):
        build_codec("id", Catalogue([], []), tokenizer)
    with pytest.raises(ValueError, match="vocab_size: expected at least 259, got 100"):
        build_tokenizer(catalogue, "title", vocab_size=100)
    with pytest.raises(ValueError, match="codec: expected one of"):
        build_tokenizer(catalogue, "ids")
    codec = build_codec("id", catalogue, tokenizer)
    with pytest.raises(ValueError, match=r"item: expected an index in 0\.\.1, got 2"):
        codec.encode(2)
    for tokens in ([], [0], [99, 98], 7):
        with pytest.raises(ValueError, match="expected the sequence of an item"):
            codec.decode(tokens)
    for tokens, offsets in (([1, 1], [0, 1, 2]), ([1, 1, 2], [0, 1, 3]), ([1], [0, 1, 1])):
        with pytest.raises(ValueError, match="expected no item's tokens to begin another's"):
            ItemCodec("id", np.array(tokens), np.array(offsets))


def test_a_large_catalogue_takes_seconds():
    size = 200_000
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 9, size)
    values = rng.integers(0, 50, lengths.sum()).astype(np.int32)
    numbers = np.arange(size)
    digits = np.stack([numbers // 500, numbers % 500], 1).astype(np.int32) + 100  # unique ending, prefix-free
    offsets = np.concatenate([[0], np.cumsum(lengths + 2)])
    sequences = np.empty(offsets[-1], np.int32)
    head = np.ones(offsets[-1], bool)
    head[offsets[1:] - 2] = head[offsets[1:] - 1] = False
    sequences[head], sequences[~head] = values, digits.ravel()
    began = time.perf_counter()
    codec = ItemCodec("title", sequences, offsets)
    assert time.perf_counter() - began < 10  # 0.4 s where this was written
    assert codec.decode(codec.encode(size - 1)) == size - 1
