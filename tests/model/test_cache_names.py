"""The KV cache under either of its names: ``past_key_values``, and ``cache`` since transformers 5.24."""

import inspect
from types import SimpleNamespace

import pytest
import torch

import flr
import flr.decode.prompts
from flr.decode import CatalogueTrie, beam_search
from flr.model.backbone import OUTPUT_CACHE, cache_argument, cache_name, cache_of
from flr.model.outputs import GroupInputs
from tests.helpers.catalogues import codec_of, random_catalogue
from tests.helpers.inputs import supervised_batch, toy_inputs
from tests.helpers.models import THOUGHT, tiny_model, toy_model, wake

NAMES = ("cache", "past_key_values")


def with_cache_named(model, name):
    """``model``, whose and whose base model's forward take and return a cache as ``name`` and as nothing else."""
    base, base_forward = model.base_model, type(model.base_model).forward

    def lm_forward(self, logits_to_keep=0, **options):
        out = base(**options)
        kept = out.last_hidden_state[:, -logits_to_keep:]
        return SimpleNamespace(logits=self.get_output_embeddings()(kept), **{name: cache_of(out)})

    def renamed(run, result):
        def forward(self, *args, **options):
            assert not set(options) & {*NAMES} - {name}, "the other name is gone"
            if run is base_forward:
                options[OUTPUT_CACHE] = options.pop(name, None)
            out = run(self, *args, **options)
            return SimpleNamespace(**{result: getattr(out, result), name: cache_of(out)}, hidden_states=None)

        parameters = inspect.signature(base_forward).parameters.values()
        parameters = [p.replace(name=name) if p.name in NAMES else p for p in parameters]
        forward.__signature__ = inspect.Signature(parameters)
        return forward

    base.__class__ = type("Base", (type(base),), {"forward": renamed(base_forward, "last_hidden_state")})
    model.__class__ = type("LM", (type(model),), {"forward": renamed(lm_forward, "logits")})
    return model


def patched(name):
    model = tiny_model()
    if name is not None:
        with_cache_named(model, name)
    flr.patch_model(model, config=flr.FLRConfig(thought_token_id=THOUGHT))
    torch.manual_seed(1)
    wake(model)
    return model.eval()


def group_of(batch, generator):
    noise = torch.randn(batch, 3, 1, 32, generator=generator)
    noise[:, 0] = 0
    targets = torch.randint(3, THOUGHT, (batch, 3), generator=generator)
    return GroupInputs(targets, torch.ones_like(targets, dtype=torch.bool), noise, noise_scale=1.0)


@pytest.mark.parametrize("name", NAMES)
def test_training_and_groups_do_not_depend_on_the_name_of_the_cache(name):
    ids = torch.tensor([[5, 6, 7, THOUGHT], [0, 8, 9, THOUGHT]])
    prompts = {"input_ids": ids, "attention_mask": (ids > 0).long()}
    results = []
    for model in (patched(None), patched(name)):
        loss = model(**supervised_batch("left"), use_cache=True).loss
        logprobs = model(**prompts, group=group_of(2, torch.Generator().manual_seed(0))).logprobs
        first = model(**prompts, use_cache=True)
        given = cache_argument(model, cache_of(first))
        assert set(given) == {name if model.__class__.__name__ == "LM" else OUTPUT_CACHE}
        mask = torch.cat([prompts["attention_mask"], torch.ones(2, 1, dtype=torch.int64)], 1)
        following = model(input_ids=torch.tensor([[7], [8]]), attention_mask=mask, use_cache=True, **given).logits
        results.append((loss, logprobs, first.logits, following))
    for plain, renamed in zip(*results, strict=True):
        torch.testing.assert_close(renamed, plain)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_decoding_does_not_depend_on_the_name_of_the_cache(monkeypatch, name, packed):
    if not packed:
        monkeypatch.setattr(flr.decode.prompts, "obstacle", lambda *_: "test")
    trie = CatalogueTrie.from_codec(codec_of(random_catalogue(seed=5, num_items=40)))
    model = toy_model("llama")
    plain = beam_search(model, toy_inputs(), trie, 5, 5)
    renamed = beam_search(with_cache_named(model, name), toy_inputs(), trie, 5, 5)
    assert renamed.items.tolist() == plain.items.tolist()
    torch.testing.assert_close(renamed.scores, plain.scores)


def test_a_patched_forward_takes_its_cache_under_both_names():
    model = patched(None)
    logits = []
    for name in NAMES:
        first = model(input_ids=torch.tensor([[5, 6, THOUGHT]]), use_cache=True)
        logits.append(model(input_ids=torch.tensor([[7]]), use_cache=True, **{name: cache_of(first)}).logits)
    alone = model(input_ids=torch.tensor([[7]])).logits
    assert torch.equal(*logits)
    assert not torch.allclose(logits[0], alone)


def test_names_of_the_cache():
    assert cache_name(lambda input_ids, cache=None: None) == "cache"
    assert cache_name(lambda input_ids, past_key_values=None: None) == "past_key_values"
    assert cache_name(lambda **options: None) == OUTPUT_CACHE
    assert cache_of(SimpleNamespace(past_key_values=3)) == 3
    assert cache_of(SimpleNamespace(cache=4)) == 4
    assert cache_of(SimpleNamespace()) is None
