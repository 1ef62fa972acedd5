"""Factors that begin with groups of items: what they look for, what stays as it was, and what is refused."""

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import flr
from flr.data import RecProcessor, build_tokenizer, planted_dataset
from flr.explain import factor_interest
from flr.model.pruning import own_factors
from flr.train import init_factors, init_item_embeddings

DATA = planted_dataset(num_items=40, num_users=300, num_interests=4)
INTEREST = DATA.catalogue.attributes["interest"]


def _model(codec="id", dtype=torch.float32, spread=0.5, **config):
    tokenizer = build_tokenizer(DATA.catalogue, codec)
    config = flr.FLRConfig(num_factors=4, **config)
    processor = RecProcessor(tokenizer, DATA.catalogue, codec, num_thoughts=config.thought_count)
    torch.manual_seed(0)
    tiny = LlamaConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=1,
                       num_attention_heads=2, initializer_range=spread)  # fmt: skip
    model = LlamaForCausalLM(tiny).to(dtype)
    return flr.patch_model(model, tokenizer, config), processor


def _scores(model, processor):
    """Each factor's scores [n, K] of the history tokens that init_factors reads, and the interest of each token [n]."""
    reasoner, scores, states, labels = own_factors(model), [], [], []
    hook = reasoner.register_forward_pre_hook(lambda _, inputs: states.append(inputs[:2]))
    rows = DATA.train.spread(256)
    for row in range(len(rows)):
        inputs = processor(rows.histories.take(np.array([row])))
        states.clear()
        with torch.no_grad():
            model(**{name: x for name, x in inputs.items() if name != "item_positions"})
        history, mask = states[0]
        u = torch.einsum("kfd,kf->kd", reasoner.key, reasoner.factor_query) / reasoner.key.shape[1] ** 0.5
        scores.append((history.float() @ u.float().T)[mask.bool()].detach())
        entry = inputs["item_positions"][0]
        labels.append(INTEREST[rows.histories.row(row)][entry[entry >= 0].numpy()])
    hook.remove()
    return torch.cat(scores), torch.from_numpy(np.concatenate(labels))


@pytest.mark.parametrize(
    ("codec", "config"),
    [
        ("id", {}),
        ("sid", {"num_refinements": 1}),
        ("title", {"num_thoughts": 2}),
        ("id", {"aggregation": "mixture", "factor_size": 1}),
        ("id", {"dtype": torch.bfloat16}),
    ],
)
def test_each_factor_looks_for_its_group(codec, config):
    model, processor = _model(codec, **config)
    model.eval()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    init_factors(model, processor, DATA.train, INTEREST)
    scores, interest = _scores(model, processor)
    within = torch.stack([scores[interest == k].mean(0) for k in range(4)])  # [group, factor]
    assert within.argmax(0).tolist() == [0, 1, 2, 3]
    assert scores.std(0, correction=0).numpy() == pytest.approx(2.0, rel=0.03)  # as in any new model
    changed = {name for name, x in model.state_dict().items() if not torch.equal(x, before[name])}
    assert changed == {"flr.key"}


def test_where_states_tell_items_apart_factors_are_bound_before_the_first_step():
    model, processor = _model(spread=0.02)
    init_item_embeddings(model, processor, scale=0.3, power=1.5)
    started = factor_interest(model, processor, DATA.test, INTEREST, by="scores").nmi
    init_factors(model, processor, DATA.train, INTEREST)
    found = factor_interest(model, processor, DATA.test, INTEREST, by="scores").nmi
    assert found > max(0.8, started + 0.2)


def test_items_without_a_group_and_factors_without_items_are_left_alone():
    model, processor = _model()
    before = own_factors(model).key.clone()
    init_factors(model, processor, DATA.train, np.where(INTEREST < 2, INTEREST, -1))
    key = own_factors(model).key
    assert not torch.equal(key[:2], before[:2])
    assert torch.equal(key[2:], before[2:])
    init_factors(model, processor, DATA.train, np.full(40, -1))  # nothing to look for
    assert torch.equal(own_factors(model).key, key)
    assert key.isfinite().all()


def test_what_cannot_be_done_is_refused():
    model, processor = _model()
    with pytest.raises(ValueError, match=r"group: expected \[40\], one an item, got shape \[3\]"):
        init_factors(model, processor, DATA.train, np.zeros(3, int))
    with pytest.raises(ValueError, match="group: expected at most 4, one a factor, got 5"):
        init_factors(model, processor, DATA.train, np.full(40, 4))
    offsets, processor = _model(variant="offsets")
    with pytest.raises(ValueError, match="model: expected factors that attend"):
        init_factors(offsets, processor, DATA.train, INTEREST)
    plain, processor = _model(variant="none")
    with pytest.raises(ValueError, match="model: expected factors of variant flr or offsets"):
        init_factors(plain, processor, DATA.train, INTEREST)
