"""Whatever fails in a patch, the model and the tokenizer are as they were; and patched models pickle and copy."""

import copy
import io
import pickle

import pytest
import torch

import flr
from flr.data import build_tokenizer
from flr.model import patch as patching
from flr.model import vocabulary
from tests.helpers.catalogues import DATA
from tests.helpers.inputs import supervised_batch
from tests.helpers.models import VOCAB, patched_model, tiny_model


class Failure(Exception):
    """Raised by the tests alone."""


def fail(*args, **kwargs):
    raise Failure


def after(function):
    """``function``, which fails when its work is done."""

    def failing(*args, **kwargs):
        function(*args, **kwargs)
        raise Failure

    return failing


def snapshot(model):
    """Everything of a model that a patch could change."""
    return {
        "attributes": dict(model.__dict__),
        "config": copy.deepcopy(model.config.to_dict()),
        "own": dict(model.config.__dict__),
        "state": {k: v.clone() for k, v in model.state_dict().items()},
        "parameters": {k: id(p) for k, p in model.named_parameters()},
        "hooks": [dict(h) for m in (model, model.base_model) for n, h in sorted(m.__dict__.items()) if "_hooks" in n],
        "base": dict(model.base_model.__dict__),
        "modules": {k: id(m) for k, m in model.named_modules()},
        "sizes": [getattr(m, n) for m in model.modules() for n in ("num_embeddings", "out_features") if hasattr(m, n)],
        "modes": [m.training for m in model.modules()],
    }


def assert_same(ours, theirs, but=()):
    states = ours["state"], theirs["state"]
    for name in set(ours) - {"state", *but}:
        assert ours[name] == theirs[name], name
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name


STEPS = {
    "before the embedding grows": (vocabulary, "grow"),
    "after the embedding grew": (vocabulary, "_fill_new_rows"),
    "in the reasoner": (patching, "build_reasoner"),
    "in the check": (patching, "find_traits"),
    "in the generation config": (patching, "_neutral_generation"),
    "in the tokenizer": (patching, "teach"),
}


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "gemma2"])  # tied tables among them
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("how", [lambda f: fail, after], ids=["before", "after"])
def test_a_patch_that_fails_leaves_nothing_behind(family, step, how, monkeypatch):
    model, tokenizer = tiny_model(family), build_tokenizer(DATA.catalogue, "id")
    if step != "in the tokenizer":
        tokenizer = None
    module, name = STEPS[step]
    target = patching if hasattr(patching, name) else module
    before = snapshot(model)
    with monkeypatch.context() as patched:
        patched.setattr(target, name, how(getattr(target, name)))
        with pytest.raises(Failure):
            flr.patch_model(model, tokenizer, thought_token="<|think|>")
    assert_same(snapshot(model), before)
    assert not flr.is_patched(model)
    flr.unpatch_model(flr.patch_model(model))  # here modules are resized, not put back
    assert_same(snapshot(model), before, but=("parameters", "modules"))


def test_a_tokenizer_learns_the_token_last(monkeypatch):
    tokenizer = build_tokenizer(DATA.catalogue, "id")
    size = len(tokenizer)
    monkeypatch.setattr(patching, "_neutral_generation", fail)
    with pytest.raises(Failure):
        flr.patch_model(tiny_model(), tokenizer, thought_token="<|think|>")
    assert len(tokenizer) == size


def test_a_config_without_the_keys_of_inference_is_patched():
    """Some families' configurations, and transformers from 5.24 on, have no ``keys_to_ignore_at_inference``."""

    class Bare(type(tiny_model().config)):
        pass

    model = tiny_model()
    model.config.__class__ = Bare
    name = "keys_to_ignore_at_inference"
    saved = {owner: owner.__dict__[name] for owner in Bare.__mro__ if name in owner.__dict__}
    try:
        for owner in saved:
            delattr(owner, name)
        assert not hasattr(model.config, name)
        flr.patch_model(model)
        assert model.config.keys_to_ignore_at_inference == ["flr"]
        flr.unpatch_model(model)
        assert not hasattr(model.config, name)
    finally:
        for owner, value in saved.items():
            setattr(owner, name, value)


def pickled(model):
    return pickle.loads(pickle.dumps(model))


def saved(model):
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=False)


@pytest.mark.parametrize("copied", [pickled, saved, copy.deepcopy, copy.copy])
def test_copies_are_patched_models_of_their_own(copied):
    model = patched_model().eval()
    inputs = supervised_batch("columns")
    expected = model(**inputs)
    other = copied(model)
    assert flr.is_patched(other)
    out = other(**inputs)
    assert torch.equal(out.loss, expected.loss)
    prompts = {"input_ids": torch.tensor([[5, 6, 7]]), "max_new_tokens": 3}
    assert torch.equal(other.generate(**prompts), model.generate(**prompts))
    if copied is copy.copy:  # shares weights, as copies of modules do
        return
    assert other.forward.__self__ is other
    with torch.no_grad():
        other.flr.output.zero_()
    assert torch.equal(model(**inputs).loss, expected.loss)
    flr.unpatch_model(other)
    flr.patch_model(other)


def test_a_tokenizer_that_comes_later_learns_the_token():
    tokenizer = build_tokenizer(DATA.catalogue, "id")
    size = len(tokenizer)
    options = {"vocab_size": size + 7, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    model = flr.patch_model(tiny_model(**options), thought_token="<|think|>").eval()
    first = model.config.flr["thought_token_id"]
    assert first == size + 7
    with torch.no_grad():  # as if it had been trained
        model.get_input_embeddings().weight[first] += 1
    ids = torch.tensor([[5, 6, 7, 8]])
    labels = torch.tensor([[-100, -100, -100, 8]])
    expected = model(input_ids=ids, labels=labels).flr.thought
    token = flr.add_thought_token(model, tokenizer)
    assert (token, tokenizer.convert_tokens_to_ids("<|think|>")) == (size, size)
    assert model.config.flr["thought_token_id"] == token
    assert model.generation_config.suppress_tokens == [token]
    assert torch.equal(model(input_ids=ids, labels=labels).flr.thought, expected)
    assert flr.add_thought_token(model, tokenizer) == token
    with pytest.raises(ValueError, match=f"expected at most {VOCAB} tokens"):
        flr.add_thought_token(flr.patch_model(tiny_model()), build_tokenizer(DATA.catalogue, "title"))
    with pytest.raises(ValueError, match="model: expected a patched model"):
        flr.add_thought_token(tiny_model(), tokenizer)
