"""The supervised trainer: soft targets, optimizer groups, the share of a process, and that it learns."""

import numpy as np
import pytest
import torch

from flr.data import CSR, Augment, InteractionDataset, Teacher
from flr.decode import CatalogueTrie, rank_one_token
from flr.evaluate import evaluate
from flr.train import SFTConfig, item_neighbours
from tests.helpers.catalogues import DATA
from tests.helpers.models import trainable
from tests.helpers.training import sft_trainer


@pytest.mark.parametrize("neighbour", [0.0, 0.5, 1.0])
def test_soft_loss_is_the_expectation_over_drawn_targets(tmp_path, neighbour):
    model, processor = trainable(orthogonality_weight=0.0, diversity_weight=0.0, sparsity_weight=0.0)
    table = item_neighbours(DATA.train, DATA.catalogue, top=4)
    augment = Augment(neighbour=neighbour, neighbours=table)
    rows = [InteractionDataset(DATA.train)[(0, i)] for i in range(16)]
    train = sft_trainer(tmp_path, model, processor, augment, normalisation="full")
    batch = train._batch(rows)
    sources = augment.with_sources(rows, train._collate.seed)[2]
    assert (batch["soft_weights"][:, :-1].sum(1) > 0).tolist() == (sources >= 0).tolist()
    np.testing.assert_allclose(batch["soft_weights"].sum(1), 1, atol=1e-6)
    loss = train.compute_loss(model.train(), dict(batch), num_items_in_batch=torch.tensor(16))
    inputs = processor([r.history for r in rows])
    del inputs["item_positions"]
    logp = model(**inputs).logits[:, -1].log_softmax(-1)
    tokens = torch.from_numpy(processor.item_codec.tokens.astype(np.int64))
    expected = torch.zeros(())
    for row, source, lp in zip(rows, sources, logp, strict=True):
        if source < 0:
            expected = expected - lp[tokens[row.target]]
            continue
        weights = np.diff(table.cumulative[source], prepend=0)
        for item, weight in zip(table.items[source], weights, strict=True):
            expected = expected - weight * lp[tokens[item]]
    torch.testing.assert_close(loss, (expected / 16).to(loss.dtype), rtol=1e-5, atol=1e-6)
    assert loss.requires_grad


@pytest.mark.parametrize("aggregation", ["thought", "mixture"])
@pytest.mark.parametrize("normalisation", ["full", "catalogue"])
def test_a_teacher_is_a_part_of_every_target(tmp_path, aggregation, normalisation, monkeypatch):
    plain = {"orthogonality_weight": 0.0, "diversity_weight": 0.0, "sparsity_weight": 0.0}
    model, processor = trainable(aggregation=aggregation, **plain)
    teacher = Teacher.fit(DATA.train, len(DATA.catalogue), weight=0.7)
    rows = [InteractionDataset(DATA.train)[(0, i)] for i in range(16)]
    train = sft_trainer(tmp_path, model, processor, Augment(teacher=teacher), normalisation=normalisation)
    loss = train.compute_loss(model.train(), train._batch(rows), num_items_in_batch=torch.tensor(16))
    taught = teacher([row.user for row in rows], CSR.from_rows([row.history for row in rows]))
    tokens = torch.from_numpy(processor.item_codec.tokens.astype(np.int64))
    logp = catalogue_logprobs(model, processor, [r.history for r in rows], normalisation)
    own = np.array([row.target for row in rows], np.int32)
    weights = torch.from_numpy(taught.weights)
    expected = (logp.gather(1, tokens[torch.from_numpy(taught.items).long()]) * weights).sum()
    expected = expected + (logp[range(16), tokens[torch.from_numpy(own).long()]] * (1 - weights.sum(1))).sum()
    torch.testing.assert_close(loss, (-expected / 16).to(loss.dtype), rtol=1e-4, atol=1e-5)
    # in blocks that are recomputed, and with fixed shapes, loss and gradients are the same
    gradients = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True)
    batch = train._batch(rows)
    start = int((batch["labels"] != -100).any(0).int().argmax()) - processor.num_thoughts
    monkeypatch.setattr("flr.model.head.MAX_LOSS_LOGITS", 8 * batch["soft_targets"].shape[1])
    again = train.compute_loss(model, {**batch, "thought_start": start}, num_items_in_batch=torch.tensor(16))
    torch.testing.assert_close(again, loss)
    others = torch.autograd.grad(again, [p for p in model.parameters() if p.requires_grad], allow_unused=True)
    for one, other in zip(gradients, others, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def catalogue_logprobs(model, processor, histories, normalisation):
    """Log-probabilities [B, V] of the first token, normalised over the vocabulary or the items'."""
    inputs = processor(histories)
    del inputs["item_positions"]
    logits = model(**inputs).logits[:, -1]  # of a mixture already log-probabilities over the vocabulary
    if normalisation == "full":
        return logits.log_softmax(-1)
    trie = CatalogueTrie.from_codec(processor.item_codec)
    tokens = torch.from_numpy(processor.item_codec.tokens.astype(np.int64))
    scores = rank_one_token(model, processor(histories), trie, "catalogue")  # by item
    return torch.full_like(logits, -torch.inf).index_copy(1, tokens, scores.to(logits.dtype))


def test_optimizer_groups_and_dropout(tmp_path):
    model, processor = trainable()
    train = sft_trainer(
        tmp_path, model, processor, learning_rate=1e-3, weight_decay=0.1, reasoner_weight_decay=0.2,
        embedding_learning_rate=2e-3, embedding_weight_decay=0.0, embedding_dropout=0.5, output_dropout=0.5,
        normalisation="full",
    )  # fmt: skip
    of = {id(p): (g["lr"], g["weight_decay"]) for g in train.create_optimizer().param_groups for p in g["params"]}
    assert len(of) == len(list(model.parameters()))
    assert of[id(model.flr.key)] == (1e-4, 0.2)
    assert of[id(model.get_input_embeddings().weight)] == (2e-3, 0.0)
    assert of[id(model.model.layers[0].mlp.up_proj.weight)] == (1e-3, 0.1)
    assert of[id(model.model.norm.weight)] == (1e-3, 0.0)
    batch = train._batch([DATA.train[0], DATA.train[1]])
    model.train()
    assert model(**batch).loss != model(**batch).loss
    model.eval()
    assert model(**batch).loss == model(**batch).loss


def test_training_lowers_the_loss_and_evaluates_by_ndcg(tmp_path):
    model, processor = trainable()
    train = sft_trainer(tmp_path, model, processor, learning_rate=1e-2, num_train_epochs=3)
    before = train.evaluate()["eval_ndcg@10"]
    train.train()
    after = train.evaluate()["eval_ndcg@10"]
    assert after > before + 0.02
    exact = evaluate(model, processor, DATA.valid, progress=False).metrics["item"]["ndcg@10"]
    assert after == pytest.approx(exact)


def test_loss_is_a_share_of_the_global_sum_times_processes(tmp_path, monkeypatch):
    """DDP averages gradients over processes; the loss divides by the tokens of all of them."""
    model, processor = trainable("sid")
    job = sft_trainer(tmp_path, model, processor)
    batch = next(iter(job.get_train_dataloader()))
    model.eval()  # no dropout
    alone = job.compute_loss(model, dict(batch), num_items_in_batch=torch.tensor(500))
    monkeypatch.setattr(type(job.accelerator), "num_processes", property(lambda _: 4))
    torch.testing.assert_close(job.compute_loss(model, dict(batch), num_items_in_batch=torch.tensor(500)), 4 * alone)


def test_a_logger_that_is_missing_is_one_clear_error(monkeypatch, tmp_path):
    assert SFTConfig(output_dir=str(tmp_path), use_cpu=True).report_to == []
    assert SFTConfig(output_dir=str(tmp_path), use_cpu=True, report_to="tensorboard").report_to == ["tensorboard"]
    monkeypatch.setattr("flr.train.arguments.is_tensorboard_available", lambda: False)
    with pytest.raises(ValueError, match=r"report_to: expected .*, got tensorboard; pip install 'flr\[tensorboard\]'"):
        SFTConfig(output_dir=str(tmp_path), use_cpu=True, report_to="tensorboard")
