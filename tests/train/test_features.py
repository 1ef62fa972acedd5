"""Title features, and the embeddings that start from them."""

import copy

import numpy as np
import pytest
import torch

from flr.data import Catalogue, RecProcessor, build_tokenizer
from flr.train import init_grown_tokens, init_item_embeddings, init_new_tokens, item_features
from tests.helpers.catalogues import DATA
from tests.helpers.models import tiny_llama, trainable


def test_title_features_put_items_of_one_series_together():
    features = item_features(DATA.catalogue, 16)
    assert features.shape == (40, 16)
    similarity = features @ features.T
    series = DATA.catalogue.attributes["series"]
    same = (series[:, None] == series[None]) & ~np.eye(40, dtype=bool)
    assert similarity[same].mean() > similarity[series[:, None] != series[None]].mean() + 0.2
    assert np.array_equal(features, item_features(DATA.catalogue, 16))


@pytest.mark.parametrize("codec", ["id", "sid"])
def test_item_embeddings_start_from_titles(codec):
    model, processor = trainable(codec)
    before = model.get_input_embeddings().weight.clone()
    init_item_embeddings(model, processor, scale=0.1)
    after = model.get_input_embeddings().weight
    used = torch.zeros(len(after), dtype=torch.bool)
    used[torch.from_numpy(processor.item_codec.tokens.astype(np.int64))] = True
    assert torch.equal(after[~used], before[~used])
    changed = (after != before).any(1)
    torch.testing.assert_close(after[changed].square().mean().sqrt(), torch.tensor(0.1))
    if codec == "id":
        rows = after[torch.from_numpy(processor.item_codec.tokens.astype(np.int64))]
        expected = torch.from_numpy(item_features(DATA.catalogue, 32))
        cosine = torch.nn.functional.cosine_similarity(rows[:, None], rows[None], dim=-1)
        torch.testing.assert_close(cosine, expected @ expected.T, rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match="codec"):
        init_item_embeddings(*trainable("title"))


@pytest.fixture(scope="module")
def pretrained():
    """A tokenizer that knows the titles' words, and a model whose table is wider than its tokens."""
    return build_tokenizer(DATA.catalogue, "title", vocab_size=400)


def with_new_tokens(tokenizer, codec, catalogue, tied):
    """A model that has seen the tokens of ``tokenizer``, and a processor that has added those of ``codec``."""
    known = len(tokenizer)
    processor = RecProcessor(copy.deepcopy(tokenizer), catalogue, codec, num_thoughts=0)
    torch.manual_seed(0)
    model = tiny_llama(len(processor.tokenizer) + 3, tie_word_embeddings=tied)
    return model, processor, known


@pytest.mark.parametrize("tied", [True, False])
def test_new_tokens_start_from_the_text_that_they_stand_for(pretrained, tied):
    model, processor, known = with_new_tokens(pretrained, "id", DATA.catalogue, tied)
    pair = [model.get_input_embeddings().weight, model.get_output_embeddings().weight]
    before = [weight.detach().clone() for weight in pair]
    assert init_new_tokens(model, processor, known) == []
    for weight, old in zip(pair, before, strict=True):
        items = torch.from_numpy(processor.item_codec.tokens.astype(np.int64))
        assert items.min() >= known
        assert torch.equal(weight[:known], old[:known])
        assert torch.equal(weight[len(processor.tokenizer) :], old[len(processor.tokenizer) :])
        ids = processor.tokenizer(DATA.catalogue.titles, add_special_tokens=False)["input_ids"]
        means = torch.stack([old[row].mean(0) for row in ids])
        rows = weight[items]
        apart, expected = rows - means.mean(0), means - means.mean(0)
        cosine = torch.nn.functional.cosine_similarity(apart, expected)
        torch.testing.assert_close(cosine, torch.ones(len(cosine)), rtol=0, atol=1e-4)
        spread = (old[:known] - old[:known].mean(0)).square().mean().sqrt()  # of every row, as far as the words' are
        torch.testing.assert_close(apart.square().mean(1).sqrt(), spread.expand(len(apart)), rtol=1e-3, atol=0)


def test_a_code_starts_from_the_items_that_carry_it(pretrained):
    model, processor, known = with_new_tokens(pretrained, "sid", DATA.catalogue, True)
    weight = model.get_input_embeddings().weight
    old = weight.detach().clone()
    init_new_tokens(model, processor, known)
    ids = processor.tokenizer(DATA.catalogue.titles, add_special_tokens=False)["input_ids"]
    means = torch.stack([old[row].mean(0) for row in ids])
    codes = sorted({int(t) for t in processor.item_codec.tokens})
    carried = [[i for i in range(len(means)) if code in processor.item_codec.encode(i)] for code in codes]
    expected = torch.stack([means[items].mean(0) for items in carried])
    apart = weight[codes] - expected.mean(0)
    cosine = torch.nn.functional.cosine_similarity(apart, expected - expected.mean(0))
    torch.testing.assert_close(cosine, torch.ones(len(cosine)), rtol=0, atol=1e-4)


def test_items_without_a_title_start_from_the_mean_and_are_said(pretrained):
    titles = ["", *DATA.catalogue.titles[1:]]
    catalogue = Catalogue(DATA.catalogue.item_ids, titles)
    model, processor, known = with_new_tokens(pretrained, "id", catalogue, True)
    weight = model.get_input_embeddings().weight
    mean = weight[:known].mean(0).detach()
    [line] = init_new_tokens(model, processor, known)
    assert line.startswith("1 new tokens of items start from the mean of all tokens")
    torch.testing.assert_close(weight[processor.item_codec.encode(0)[0]], mean)
    assert init_new_tokens(model, processor, known, "mean") == []
    torch.testing.assert_close(weight[known : len(processor.tokenizer)], mean.expand(40, -1))
    with pytest.raises(ValueError, match="init_items: expected text or mean, got 'title'"):
        init_new_tokens(model, processor, known, "title")


def test_the_end_of_an_item_stands_for_no_text(pretrained):
    titles = ["Blue", "Blue", *DATA.catalogue.titles[2:]]
    model, processor, known = with_new_tokens(pretrained, "title", Catalogue(DATA.catalogue.item_ids, titles), True)
    weight = model.get_input_embeddings().weight
    mean = weight[:known].mean(0).detach()
    assert init_new_tokens(model, processor, known) == []
    end, same = (processor.tokenizer.convert_tokens_to_ids(name) for name in ("<|item_end|>", "<|same_0|>"))
    torch.testing.assert_close(weight[end], mean)
    assert (weight[same] - mean).abs().max().item() > 1e-4


@pytest.mark.parametrize("tied", [True, False])
def test_a_new_item_starts_from_the_known_ones_with_alike_titles(tied):
    titles = [f"{colour} {place}" for colour in ("amber chess", "brave opera") for place in range(15)]
    known = Catalogue([f"i{n}" for n in range(30)], titles)
    processor = RecProcessor(build_tokenizer(known, "id"), known)
    more = Catalogue([f"i{n}" for n in range(32)], [*titles, "brave opera 99", "amber chess 98"])
    grown = processor.grown(more)
    model = tiny_llama(len(grown.tokenizer), tie_word_embeddings=tied)
    size = len(processor.tokenizer)
    with torch.no_grad():
        for place, weight in enumerate({model.get_input_embeddings().weight, model.get_output_embeddings().weight}):
            weight[size:] = torch.nan
            weight[grown.item_codec.tokens[:15]] = torch.randn(1, weight.shape[1]) + place
            weight[grown.item_codec.tokens[15:30]] = torch.randn(1, weight.shape[1]) - place
    assert init_grown_tokens(model, grown, size) == []
    for weight in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
        new = weight[grown.item_codec.tokens[30:]]
        means = torch.stack(
            [weight[grown.item_codec.tokens[15:30]].mean(0), weight[grown.item_codec.tokens[:15]].mean(0)]
        )
        assert torch.isfinite(new).all()
        nearest = torch.cdist(new, means).argmin(1)
        assert nearest.tolist() == [0, 1]
        old = weight[:size]
        apart = (new - new.mean(0)).square().mean(1).sqrt()
        torch.testing.assert_close(apart, (old - old.mean(0)).square().mean().sqrt().expand(2))
