"""The thought's id where tokens are added after the patch."""

import pytest
import torch

import flr
from flr.data import Catalogue, build_tokenizer
from tests.helpers.models import VOCAB, tiny_model, wake

ROWS = [[5, 6, 7, 8], [9, 10, 11, 12, 13, 14]]


def patched(**options):
    """A model that was patched by one line, and whose thought matters."""
    model = flr.patch_model(tiny_model(), **options)
    wake(model)
    return model.eval()


def padded(pad, side):
    """The rows as tensors, with labels for the last two tokens of each."""
    width, batch = max(map(len, ROWS)), {"input_ids": [], "labels": [], "attention_mask": []}
    for row in ROWS:
        values = (pad, row), (-100, [-100] * (len(row) - 2) + row[-2:]), (0, [1] * len(row))
        for rows, (filling, own) in zip(batch.values(), values, strict=True):
            more = [filling] * (width - len(row))
            rows.append(own + more if side == "right" else more + own)
    return {name: torch.tensor(rows) for name, rows in batch.items()}


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padding_token_added_after_the_patch(side):
    """As with Llama, whose tokenizer has none: its id is the one that the thought had."""
    model = patched()
    expected = model(**padded(0, side))
    model.resize_token_embeddings(VOCAB + 1)
    model.config.pad_token_id = VOCAB
    assert model.config.flr["thought_token_id"] == model._flr_patch.config.thought_token_id == VOCAB + 1
    assert model.get_input_embeddings().weight.shape[0] == VOCAB + 2
    found = model(**padded(VOCAB, side))
    assert found.flr.has_thought.all()
    torch.testing.assert_close(found.loss, expected.loss, atol=2e-2, rtol=0)  # one more token to choose from
    seen = padded(0, side)["attention_mask"].bool()
    torch.testing.assert_close(found.logits[seen][:, :VOCAB], expected.logits[seen][:, :VOCAB], atol=1e-5, rtol=1e-5)
    ids = torch.tensor(ROWS[:1])
    new = model.generate(ids, max_new_tokens=20, do_sample=True, eos_token_id=None)[:, ids.shape[1] :]
    assert not (new == VOCAB + 1).any()


@pytest.mark.parametrize("size", [VOCAB, VOCAB - 20, VOCAB + 7])
def test_resizing_to_the_tokenizer_keeps_the_thought(size):
    """``resize_token_embeddings(len(tokenizer))`` behind the patch, whichever way."""
    model = patched()
    with torch.no_grad():
        model.get_output_embeddings().weight[VOCAB] = 1.0
    expected = model(input_ids=torch.tensor(ROWS[:1])).logits
    model.resize_token_embeddings(size)
    assert model.config.flr["thought_token_id"] == size
    assert model.config.vocab_size == model.get_input_embeddings().weight.shape[0] == size + 1
    assert (model.get_output_embeddings().weight[size] == 1).all()
    both = min(size, VOCAB)
    found = model(input_ids=torch.tensor(ROWS[:1])).logits
    torch.testing.assert_close(found[..., :both], expected[..., :both])
    flr.unpatch_model(model)
    assert model.config.vocab_size == model.get_input_embeddings().weight.shape[0] == size


def test_a_thought_with_a_name_keeps_its_id():
    tokenizer = build_tokenizer(Catalogue(["x", "y"], ["Blue", "Green"]), "id")
    model = flr.patch_model(tiny_model(vocab_size=len(tokenizer)), tokenizer)
    token = model.config.flr["thought_token_id"]
    tokenizer.add_tokens(["mine"])
    model.resize_token_embeddings(len(tokenizer))
    assert model.config.flr["thought_token_id"] == token == len(tokenizer) - 2
    with pytest.raises(ValueError, match=f"new_num_tokens: expected at least {token + 1}.*got {token}"):
        model.resize_token_embeddings(token)
    flr.unpatch_model(model)
    assert model.get_input_embeddings().weight.shape[0] == len(tokenizer)  # the caller's token keeps its row


def test_it_gets_a_name_after_tokens_were_added():
    tokenizer = build_tokenizer(Catalogue(["x", "y"], ["Blue", "Green"]), "id")
    model = flr.patch_model(tiny_model(vocab_size=len(tokenizer)))
    tokenizer.add_tokens(["mine"])
    model.resize_token_embeddings(len(tokenizer))
    assert flr.add_thought_token(model, tokenizer) == len(tokenizer) - 1
    model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=8)
    assert model.config.flr["thought_token_id"] == len(tokenizer) - 1


def test_padding_with_the_thoughts_id_is_not_a_thought():
    """Even where nobody resized anything: what a mask hides is none."""
    model, known = patched(), patched()
    found, expected = model(**padded(VOCAB, "right")), known(**padded(0, "right"))
    assert found.flr.has_thought.all()
    torch.testing.assert_close(found.loss, expected.loss)


@pytest.mark.parametrize("name", ["pad_token_id", "eos_token_id"])
def test_a_special_token_with_the_thoughts_id_is_refused(name):
    model = patched()
    setattr(model.config, name, VOCAB if name == "pad_token_id" else [2, VOCAB])
    with pytest.raises(ValueError, match=f"{name}: expected another id than the thought's, {VOCAB}"):
        model(input_ids=torch.tensor(ROWS[:1]))
