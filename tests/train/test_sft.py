"""Title features, neighbours, soft targets, optimizer groups, and the mixture over views of a history."""

import numpy as np
import pytest
import torch

from flr.data import (
    CATALOGUE_USER,
    CSR,
    Augment,
    HistoryViews,
    InteractionDataset,
    Interactions,
    RecProcessor,
    SFTCollator,
)
from flr.decode import score_all_items
from flr.evaluate import evaluate
from flr.train import init_item_embeddings, item_features, item_neighbours, with_catalogue_rows
from flr.train.neighbours import cooccurrence
from flr.views import ViewMixture
from tests.helpers.catalogues import DATA
from tests.helpers.models import trainable
from tests.helpers.training import sft_trainer


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


def test_cooccurrence_by_hand():
    train = Interactions(["u", "u", "v"], [[0, 1], [1, 2], [2]], [2, 3, 0])
    # u: 0 1 2 and 1 2 3 (the pair 1 2 counts once); v: 2 0
    matrix = cooccurrence(train, 4, decay=0.8, backward=0.5).toarray()
    expected = np.zeros((4, 4))
    for i, j, weight in [(0, 1, 1), (1, 2, 1), (0, 2, 0.8), (2, 3, 1), (1, 3, 0.8), (2, 0, 1)]:
        expected[i, j] += weight
        expected[j, i] += weight / 2
    np.testing.assert_allclose(matrix, expected)


def test_neighbours_are_drawn_by_weight_and_reproducibly():
    table = item_neighbours(DATA.train, DATA.catalogue, top=5)
    assert table.items.shape == (40, 5)
    assert np.all(np.diff(table.cumulative, axis=1) >= -1e-12)
    rows = with_catalogue_rows(DATA.train, table, 50)
    assert rows.users.count(CATALOGUE_USER) == 50 * int((table.cumulative[:, -1] > 0).sum())
    dataset = InteractionDataset(rows)
    item = int(rows.histories.row(len(DATA.train))[0])
    own = [i for i in range(len(rows)) if rows.users[i] == CATALOGUE_USER and rows[i].history.tolist() == [item]]
    augment = Augment(neighbours=table)
    drawn = np.concatenate([augment([dataset[(e, i)] for i in own], seed=1)[1] for e in range(40)])
    assert np.array_equal(
        drawn, np.concatenate([augment([dataset[(e, i)] for i in own], seed=1)[1] for e in range(40)])
    )
    share = np.diff(table.cumulative[item], prepend=0)
    for neighbour, weight in zip(table.items[item], share, strict=True):
        assert abs((drawn == neighbour).mean() - weight) < 0.05
    # rows of users keep their target unless asked
    plain = [dataset[(0, i)] for i in range(20)]
    assert augment(plain, seed=1)[1].tolist() == [row.target for row in plain]
    with pytest.raises(ValueError, match="neighbours"):
        Augment(neighbour=0.5)


def test_single_keeps_one_item_and_prefers_late_ones():
    rows = [
        row._replace(row=i)
        for i, row in enumerate([DATA.train[0]._replace(history=np.arange(6, dtype=np.int32))] * 3000)
    ]
    histories, _ = Augment(single=1.0, decay=0.5)(rows, seed=0)
    assert histories.lengths.tolist() == [1] * 3000
    counts = np.bincount(histories.values, minlength=6) / 3000
    expected = 0.5 ** np.arange(6)[::-1]
    np.testing.assert_allclose(counts, expected / expected.sum(), atol=0.03)


@pytest.mark.parametrize("neighbour", [0.0, 0.5, 1.0])
def test_soft_loss_is_the_expectation_over_drawn_targets(tmp_path, neighbour):
    model, processor = trainable(orthogonality_weight=0.0, diversity_weight=0.0, sparsity_weight=0.0)
    table = item_neighbours(DATA.train, DATA.catalogue, top=4)
    augment = Augment(neighbour=neighbour, neighbours=table)
    rows = [InteractionDataset(DATA.train)[(0, i)] for i in range(16)]
    train = sft_trainer(tmp_path, model, processor, augment, normalisation="full")
    batch = train._batch(rows)
    sources = augment.with_sources(rows, train._collate.seed)[2]
    assert (batch["soft_weights"].sum(1) > 0).tolist() == (sources >= 0).tolist()
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


@pytest.mark.parametrize("codec", ["id", "sid", "title"])
@pytest.mark.parametrize("weight", [0.0, 0.4, 1.0])
def test_views_are_a_mixture_of_probabilities(codec, weight):
    views = HistoryViews(weight, decay=0.6)
    model, processor = trainable(codec, views)
    model.eval()
    histories = [[1, 2, 3], [7], [], [5, 5, 9, 30], list(range(12))]
    mixture = ViewMixture(model, processor, num_beams=40, batch_size=2)
    scores = mixture.scores(CSR.from_rows(histories))
    again = ViewMixture(model, processor, num_beams=40).scores(CSR.from_rows(histories[::-1]))[::-1]
    np.testing.assert_allclose(scores, again, rtol=1e-3, atol=1e-6)

    def probabilities(history):
        with torch.inference_mode():
            return score_all_items(model, processor([history]), processor.item_codec)[0].exp().numpy()

    for row, history in zip(scores, histories, strict=True):
        kept = history[-processor.max_history :]
        share = 0.6 ** np.arange(len(kept))[::-1]
        w = weight if kept else 0.0
        expected = (1 - w) * probabilities(history)
        for item, s in zip(kept, share, strict=True):
            expected = expected + w * s / share.sum() * probabilities([item])
        np.testing.assert_allclose(row, expected, rtol=1e-3, atol=1e-6)


def test_views_are_saved_and_used_by_evaluation(tmp_path):
    model, processor = trainable(views=HistoryViews(0.7, 0.5))
    processor.save_pretrained(tmp_path)
    loaded = RecProcessor.from_pretrained(tmp_path)
    assert loaded.views == processor.views
    mixed = evaluate(model, loaded, DATA.test, progress=False)
    whole = evaluate(model, loaded, DATA.test, progress=False, views=HistoryViews(0.0))
    loaded.views = None
    assert whole.metrics == evaluate(model, loaded, DATA.test, progress=False).metrics
    assert mixed.metrics != whole.metrics
    assert mixed.settings["views"] == {"weight": 0.7, "decay": 0.5}
    for wrong in ({"weight": 1.5}, {"decay": 0.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            HistoryViews(**wrong)
    with pytest.raises(ValueError, match="views: expected HistoryViews"):
        ViewMixture(model, loaded)


def test_collator_adds_soft_targets_for_one_token_codecs_only():
    table = item_neighbours(DATA.train, DATA.catalogue, top=4)
    for codec, expected in (("id", True), ("sid", False)):
        _, processor = trainable(codec)
        batch = SFTCollator(processor, Augment(neighbour=1.0, neighbours=table))([DATA.train[0]])
        assert ("soft_targets" in batch) == expected


def test_loss_is_a_share_of_the_global_sum_times_processes(tmp_path, monkeypatch):
    """DDP averages gradients over processes; the loss divides by the tokens of all of them."""
    model, processor = trainable("sid")
    job = sft_trainer(tmp_path, model, processor)
    batch = next(iter(job.get_train_dataloader()))
    model.eval()  # no dropout
    alone = job.compute_loss(model, dict(batch), num_items_in_batch=torch.tensor(500))
    monkeypatch.setattr(type(job.accelerator), "num_processes", property(lambda _: 4))
    torch.testing.assert_close(job.compute_loss(model, dict(batch), num_items_in_batch=torch.tensor(500)), 4 * alone)
