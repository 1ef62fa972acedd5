"""Supervised training of a mixture over factors: the trainer's loss, its parts, and what it refuses."""

import numpy as np
import pytest
import torch

from flr.cli.compare import MODES, mode_config
from flr.config import FLRConfig
from flr.data import Augment, InteractionDataset, Teacher
from flr.decode import CatalogueTrie, score_all_items
from flr.evaluate import evaluate
from flr.train import item_neighbours
from tests.helpers.catalogues import DATA
from tests.helpers.models import trainable
from tests.helpers.training import grpo_trainer, sft_trainer

PLAIN = {"orthogonality_weight": 0.0, "diversity_weight": 0.0, "sparsity_weight": 0.0, "init_scale": 0.5}


@pytest.mark.parametrize("normalisation", ["full", "catalogue"])
@pytest.mark.parametrize("codec", ["id", "sid", "title"])
def test_loss_is_what_ranking_goes_by(tmp_path, codec, normalisation):
    """-Σ log p(target) by the number of target tokens, log p as the scores of all items say, with right padding too."""
    model, processor = trainable(codec, aggregation="mixture", **PLAIN)
    job = sft_trainer(tmp_path, model, processor, normalisation=normalisation)
    rows = [InteractionDataset(DATA.train)[(0, i)] for i in range(8)]
    model.eval()
    with torch.no_grad():
        loss = job.compute_loss(model, job._batch(rows), num_items_in_batch=torch.tensor(50))
    trie = CatalogueTrie.from_codec(processor.item_codec)
    scores = score_all_items(model, processor([r.history for r in rows]), trie, normalisation)
    own = scores[torch.arange(8), torch.tensor([r.target for r in rows])]
    torch.testing.assert_close(loss, -own.sum() / 50, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("codec", ["id", "sid"])
def test_accumulated_batches_have_the_gradient_of_one(tmp_path, codec):
    model, processor = trainable(codec, aggregation="mixture", init_scale=0.5)
    batches = {}
    for size, steps in ((16, 1), (4, 4)):
        job = sft_trainer(
            tmp_path / str(size), model, processor, per_device_train_batch_size=size, max_steps=1, learning_rate=0.0,
            gradient_accumulation_steps=steps, max_grad_norm=0.0, train_sampling_strategy="sequential",
        )  # fmt: skip
        seen = {}
        job.create_optimizer()
        step = job.optimizer.step
        job.optimizer.step = lambda *args, seen=seen, step=step, **kwargs: (
            seen.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}),
            step(*args, **kwargs),
        )
        job.train()
        batches[size] = seen
    assert batches[16].keys() == batches[4].keys() >= {"flr.output", "flr.gate"}
    for name, expected in batches[16].items():
        torch.testing.assert_close(batches[4][name], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("variant", ["flr", "offsets"])
def test_it_learns(tmp_path, variant):
    model, processor = trainable(aggregation="mixture", variant=variant)
    job = sft_trainer(tmp_path, model, processor, learning_rate=1e-2, num_train_epochs=3)
    before = job.evaluate()["eval_ndcg@10"]
    job.train()
    after = job.evaluate()["eval_ndcg@10"]
    assert after > before + 0.02
    assert after == pytest.approx(evaluate(model, processor, DATA.valid, progress=False).metrics["item"]["ndcg@10"])


def test_soft_targets(tmp_path):
    model, processor = trainable(aggregation="mixture", **PLAIN)
    table = item_neighbours(DATA.train, DATA.catalogue, top=4)
    augment = Augment(neighbour=1.0, neighbours=table)
    rows = [InteractionDataset(DATA.train)[(0, i)] for i in range(8)]
    job = sft_trainer(tmp_path, model, processor, augment, normalisation="full")
    batch = job._batch(rows)
    loss = job.compute_loss(model.train(), dict(batch), num_items_in_batch=torch.tensor(8))
    inputs = processor([r.history for r in rows])
    logp = model(**{k: v for k, v in inputs.items() if k != "item_positions"}).logits[:, -1]
    tokens = torch.from_numpy(processor.item_codec.tokens.astype(np.int64))
    sources = augment.with_sources(rows, job._collate.seed)[2]
    expected = torch.zeros(())
    for row, source, lp in zip(rows, sources, logp, strict=True):
        items = table.items[source] if source >= 0 else [row.target]
        weights = np.diff(table.cumulative[source], prepend=0) if source >= 0 else [1.0]
        expected = expected - sum(w * lp[tokens[i]] for i, w in zip(items, weights, strict=True))
    torch.testing.assert_close(loss, (expected / 8).to(loss.dtype), rtol=1e-5, atol=1e-6)


def test_refused(tmp_path):
    model, processor = trainable(aggregation="mixture")
    with pytest.raises(ValueError, match=r"label_smoothing_factor: expected 0 with aggregation mixture, got 0\.1"):
        sft_trainer(tmp_path, model, processor, label_smoothing_factor=0.1)
    teacher = Augment(teacher=Teacher.fit(DATA.train, len(DATA.catalogue), "item-knn"))
    with pytest.raises(ValueError, match=r"label_smoothing_factor: expected 0 where targets are drawn, got 0\.1"):
        sft_trainer(tmp_path, *trainable(), teacher, label_smoothing_factor=0.1)
    with pytest.raises(ValueError, match="aggregation: expected thought for latent GRPO"):
        grpo_trainer(tmp_path, model=model, processor=processor)


def test_modes_to_compare():
    given = FLRConfig(num_factors=3, anchor="last")
    found = {mode: mode_config(mode, given) for mode in MODES}
    assert {m: (c.variant, c.aggregation) for m, c in found.items() if "-" in m} == {
        "flr-plain": ("flr", "thought"),
        "flr-mixture": ("flr", "mixture"),
        "offsets-mixture": ("offsets", "mixture"),
    }
    assert (found["offsets"].variant, found["offsets"].num_factors) == ("offsets", 3)
    with pytest.raises(ValueError, match="aggregation: expected none with flr compare"):
        mode_config("flr", FLRConfig(aggregation="mixture"))
