"""A model with few positions and long titles: nothing that makes prompts runs past its table."""

import asyncio

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import flr
from flr.data import Catalogue, RecDataset, RecProcessor, build_tokenizer, planted_dataset
from flr.evaluate import evaluate
from flr.train import LatentGRPOTrainer
from tests.helpers.comparisons import assert_same_recommendations
from tests.helpers.serving import in_process
from tests.helpers.training import grpo_config, sft_trainer

POSITIONS = 64
_PLANTED = planted_dataset(num_items=20, num_users=30, seed=3)
TITLES = [f"{title}, a long edition with many words {i}" for i, title in enumerate(_PLANTED.catalogue.titles)]
CATALOGUE = Catalogue(_PLANTED.catalogue.item_ids, TITLES)
DATA = RecDataset(CATALOGUE, _PLANTED.train, _PLANTED.valid, _PLANTED.test, "long")
HISTORY = CATALOGUE.item_ids[:8]


def parts(vocab_size: int):
    """A patched GPT-2 and its processor; the vocabulary decides how many tokens a title and the template have."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer(CATALOGUE, "title", vocab_size=vocab_size)
    sizes = {"n_positions": POSITIONS, "n_embd": 16, "n_layer": 1, "n_head": 2}
    processor = RecProcessor(tokenizer, CATALOGUE, "title")
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), bos_token_id=1, eos_token_id=2, **sizes))
    return flr.patch_model(model, tokenizer, flr.FLRConfig(num_factors=2)), processor


def test_text_that_does_not_fit_is_refused(tmp_path):
    model, processor = parts(vocab_size=300)
    wanted = r"positions of the model: expected at least \d+ \(\d+ for template and thoughts, .* got 64"
    with pytest.raises(ValueError, match=wanted):
        sft_trainer(tmp_path, model, processor, train=DATA.train)
    for use in (lambda: flr.Recommender(model, processor), lambda: evaluate(model, processor, DATA.test)):
        with pytest.raises(ValueError, match=wanted):
            use()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What supervised training saves."""
    folder = tmp_path_factory.mktemp("sft")
    trainer = sft_trainer(folder, *parts(vocab_size=600), train=DATA.train, max_steps=2)
    trainer.train()
    trainer.save_model(str(folder))
    return folder


def test_the_saved_processor_knows_the_bound(folder):
    processor = RecProcessor.from_pretrained(folder)
    assert processor.max_positions == POSITIONS
    assert processor.prompt_limit == POSITIONS - processor.item_codec.lengths.max()
    longest = processor(DATA.test)["input_ids"].shape[1]
    assert processor.prompt_limit - processor.item_codec.lengths.max() < longest <= processor.prompt_limit
    assert processor.items_left_out > 0


@pytest.mark.parametrize("saved", [True, False], ids=["saved", "bare"])
def test_evaluation_reinforcement_and_answers(folder, tmp_path, saved, caplog):
    """With the saved processor, and with one that has yet to learn of the model's positions."""

    def load():
        processor = RecProcessor.from_pretrained(folder)
        if not saved:
            processor = RecProcessor(processor.tokenizer, CATALOGUE, "title", scoring=processor.scoring)
        return flr.from_pretrained(folder), processor

    with caplog.at_level("WARNING", logger="flr"):
        result = evaluate(*load(), DATA.test, progress=False, samples=1)
    assert sum("items are left out" in record.getMessage() for record in caplog.records) == 1
    assert result.settings["method"] == "beam"
    model, processor = load()
    trainer = LatentGRPOTrainer(model, grpo_config(tmp_path, max_steps=1), processor, DATA.train, DATA.valid)
    trainer.train()
    assert np.isfinite(trainer.evaluate()["eval_target_logprob"])
    recommender = flr.Recommender(*load())
    [found] = recommender.recommend([HISTORY], k=3, shares=True)
    explanation = recommender.explain(HISTORY, k=3)
    used = [entry.used for entry in explanation.history]
    assert used == sorted(used)
    assert 0 < sum(used) < len(used)
    shown = HISTORY[used.index(True) :]
    assert_same_recommendations(found, recommender.recommend([shown], k=3, shares=True)[0])

    async def served():
        async with in_process(recommender) as client:
            answer = await client.post("/v1/recommend", json={"history": HISTORY, "k": 3})
            assert answer.status_code == 200, answer.text
            return [item["item_id"] for item in answer.json()["items"]]

    assert asyncio.run(served()) == [item.item_id for item in found]
