"""Training under the catalogue's normalisation: equal to naive sums in float64, and to what decoding ranks by."""

import json

import numpy as np
import pytest
import torch

import flr
from flr.config import IGNORE
from flr.data import Augment, HistoryViews, InteractionDataset, RecProcessor
from flr.decode import CatalogueTrie, score_all_items
from flr.evaluate import evaluate
from flr.model import catalogue_loss
from flr.model.backbone import fixed_shapes
from flr.model.catalogue_loss import CatalogueLoss
from flr.train import LatentGRPOConfig, LatentGRPOTrainer, item_neighbours
from tests.helpers.catalogues import DATA
from tests.helpers.comparisons import assert_same_gradients, gradients_of
from tests.helpers.models import THOUGHT, patched_model, trainable
from tests.helpers.processes import in_processes
from tests.helpers.training import sft_trainer

PLAIN = {"orthogonality_weight": 0.0, "diversity_weight": 0.0, "sparsity_weight": 0.0}
#: a forced chain, a wide node, siblings at several depths, one- to five-token items
ITEMS = [[7], [5, 9, 3], [5, 9, 4, 8, 6], [5, 9, 4, 8, 7], *([4, t] for t in range(10, 30)), [6, 20, 21, 22]]


def catalogue(items=ITEMS):
    offsets = np.cumsum([0, *map(len, items)])
    return CatalogueTrie.from_sequences(np.concatenate(items), offsets)


def naive(logits, tokens, items=ITEMS, smoothing=0.0):
    """-log P(tokens) from logits [S, V], item by item, in Python."""
    total = torch.zeros((), dtype=logits.dtype)
    for s, token in enumerate(tokens):
        siblings = sorted({item[s] for item in items if item[:s] == list(tokens[:s])})
        logp = logits[s, siblings].log_softmax(-1)
        total = total - (1 - smoothing) * logp[siblings.index(token)] - smoothing * logp.mean()
    return total


def batch(chosen, items=ITEMS):
    """Left-padded prompts, a thought, and the items behind it."""
    longest = max(len(items[i]) for i in chosen)
    ids = torch.randint(3, THOUGHT, (len(chosen), 6 + longest))
    ids[:, 5] = THOUGHT
    labels = torch.full_like(ids, IGNORE)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    for row, item in enumerate(chosen):
        tokens = torch.tensor(items[item])
        ids[row, 6 : 6 + len(tokens)] = labels[row, 6 : 6 + len(tokens)] = tokens
        mask[row, 6 + len(tokens) :] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def patched(family="llama"):
    return patched_model(family, torch.float64, **PLAIN).train()


CHOSEN = [0, 2, 3, 1, 6, 24, 12]


@pytest.fixture(params=[0, 1 << 40, "fixed"], ids=["gathered", "full-logits", "fixed-shapes"])
def way(request, monkeypatch):
    """Every way to compute the loss."""
    if request.param != "fixed":
        monkeypatch.setattr(catalogue_loss, "_GATHER_COST", request.param)
        yield
        return
    with fixed_shapes():
        yield


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("family", ["llama", "qwen2", "phi", "gemma2"])
def test_loss_and_gradients_equal_a_naive_sum(family, smoothing):
    """Phi has a bias, Gemma 2 a softcap, Qwen 2 tied tables."""
    model, inputs = patched(family), batch(CHOSEN)
    if family == "gemma2":  # its attention gives NaN in float64 where a padding row sees nothing
        inputs["attention_mask"][:] = 1
    loss_of = CatalogueLoss(catalogue())
    edges = loss_of.target_nodes(inputs["labels"])
    out = model(**{**inputs, "labels": edges}, catalogue_loss=loss_of, label_smoothing=smoothing)
    logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    sums = [naive(logits[r, 5:], ITEMS[i], smoothing=smoothing) for r, i in enumerate(CHOSEN)]
    expected = torch.stack(sums).sum() / (edges != IGNORE).sum()
    torch.testing.assert_close(out.loss, expected, rtol=1e-12, atol=0)
    actual = gradients_of(model, out.loss)
    assert_same_gradients(actual, gradients_of(model, expected), 1e-6 if family == "gemma2" else 1e-11)


@pytest.mark.usefixtures("way")
def test_recomputed_in_blocks_it_is_the_same(monkeypatch):
    model, inputs, loss_of = patched(), batch(CHOSEN), CatalogueLoss(catalogue())
    inputs["labels"] = loss_of.target_nodes(inputs["labels"])
    whole = model(**inputs, catalogue_loss=loss_of).loss
    expected = gradients_of(model, whole)
    monkeypatch.setattr(catalogue_loss, "MAX_LOSS_LOGITS", 130)
    loss = model(**inputs, catalogue_loss=loss_of).loss
    torch.testing.assert_close(loss, whole, rtol=1e-13, atol=0)
    assert_same_gradients(gradients_of(model, loss), expected, 1e-12)


@pytest.mark.parametrize("codec", ["id", "sid", "title"])
def test_loss_is_minus_the_log_probability_that_decoding_ranks_by(tmp_path, codec):
    model, processor = trainable(codec, **PLAIN)
    train = sft_trainer(tmp_path, model, processor, normalisation="catalogue")
    rows = [InteractionDataset(DATA.train)[(0, i)] for i in range(12)]
    inputs = train._batch(rows)
    assert "thought_start" not in inputs
    items = torch.tensor([r.target for r in rows])
    prompts = processor([r.history for r in rows])
    del prompts["item_positions"]
    scores = score_all_items(model.eval(), prompts, train.trie, "catalogue")
    torch.testing.assert_close(scores.exp().sum(1), torch.ones(12))
    model.train()
    each = []
    for i in range(12):
        one = {k: v[i : i + 1] for k, v in inputs.items()}
        each.append(train.compute_loss(model, one, num_items_in_batch=torch.tensor(1)))
    torch.testing.assert_close(-torch.stack(each), scores[range(12), items], rtol=1e-4, atol=1e-4)
    # a promise of the thought's column (fixed shapes) changes nothing
    first = int((inputs["labels"] != IGNORE).any(0).int().argmax())
    promised = {**inputs, "thought_start": first - 1}
    loss = [train.compute_loss(model, dict(x), num_items_in_batch=torch.tensor(7)) for x in (inputs, promised)]
    torch.testing.assert_close(loss[0], loss[1], rtol=1e-6, atol=0)
    torch.testing.assert_close(loss[0], torch.stack(each).sum() / 7, rtol=1e-5, atol=0)


def test_soft_targets_are_an_expectation_over_the_catalogue(tmp_path):
    model, processor = trainable(**PLAIN)
    table = item_neighbours(DATA.train, DATA.catalogue, top=4)
    train = sft_trainer(tmp_path, model, processor, Augment(neighbour=1.0, neighbours=table), normalisation="catalogue")
    rows = [InteractionDataset(DATA.train)[(0, i)] for i in range(16)]
    batch = train._batch(rows)
    loss = train.compute_loss(model.train(), dict(batch), num_items_in_batch=torch.tensor(16))
    prompts = processor([r.history for r in rows])
    del prompts["item_positions"]
    logits = model(**prompts).logits[:, -1]
    tokens = torch.from_numpy(processor.item_codec.tokens.astype(np.int64))
    other = torch.ones(logits.shape[1], dtype=torch.bool)
    other[tokens] = False
    logp = logits.masked_fill(other, -torch.inf).log_softmax(-1)
    assert (batch["soft_weights"][:, :-1] > 0).any(1).sum() > 8
    expected = -(logp.gather(1, batch["soft_targets"]) * batch["soft_weights"]).sum()
    torch.testing.assert_close(loss, expected / 16, rtol=1e-5, atol=1e-6)


def test_edges_are_whole_items():
    loss_of = CatalogueLoss(catalogue())
    labels = batch(CHOSEN)["labels"]
    edges = loss_of.target_nodes(labels)
    chosen = labels != IGNORE
    assert torch.equal(loss_of.trie.tokens[edges[chosen]].long(), labels[chosen])
    for wrong in ([5, 9, 5], [5, 9, 4, 8], [7, 7], [99], [4, 10 + loss_of._span]):
        with pytest.raises(ValueError, match="labels: expected"):
            loss_of.target_nodes(torch.tensor([[IGNORE, *wrong]]))
    with pytest.raises(ValueError, match="two items"):
        CatalogueLoss(catalogue([[3, 4]]))
    with pytest.raises(ValueError, match="output_dropout"):
        CatalogueLoss(catalogue(), 1.0)


def test_dropout_acts_in_training_only_and_hooks_are_obeyed(tmp_path, monkeypatch):
    model, processor = trainable("sid", **PLAIN)
    train = sft_trainer(tmp_path, model, processor, normalisation="catalogue", output_dropout=0.5)
    assert not model.get_output_embeddings()._forward_pre_hooks
    inputs = train._batch([DATA.train[0], DATA.train[1]])

    def loss():
        return model(**inputs, catalogue_loss=train.catalogue_loss).loss

    model.train()
    assert loss() != loss()
    model.eval()
    before = loss()
    assert before == loss()
    hook = model.get_output_embeddings().register_forward_hook(lambda m, x, y: 2 * y)
    doubled = loss()
    hook.remove()
    monkeypatch.setattr(catalogue_loss, "scale_logits", lambda m, x: 2 * x)
    monkeypatch.setattr(catalogue_loss, "_GATHER_COST", 0)
    torch.testing.assert_close(doubled, loss())
    assert doubled != before


def test_training_raises_the_targets_likelihood(tmp_path):
    model, processor = trainable("sid")
    train = sft_trainer(tmp_path, model, processor, learning_rate=1e-2, num_train_epochs=3, normalisation="catalogue")
    prompts = processor(DATA.train.histories)
    targets = torch.from_numpy(DATA.train.targets.astype(np.int64))[:, None]

    def likelihood():
        return float(score_all_items(model, prompts, train.trie, "catalogue").gather(1, targets).mean())

    before = likelihood()
    train.train()
    assert likelihood() > before + 0.3
    with pytest.raises(ValueError, match="normalisation: expected one of"):
        sft_trainer(tmp_path, model, processor, normalisation="items")


def test_ranking_goes_by_the_normalisation_of_training(tmp_path):
    """Saved with the processor, and what evaluation, views and recommendation take unless told otherwise."""
    model, processor = trainable("sid")
    model.eval()
    assert processor.scoring == "full"
    sft_trainer(tmp_path, model, processor, normalisation="catalogue")
    processor.save_pretrained(tmp_path)
    loaded = RecProcessor.from_pretrained(tmp_path)
    assert loaded.scoring == "catalogue"
    history = [DATA.catalogue.item_ids[3]]

    def outcomes(processor, **options):
        result = evaluate(model, processor, DATA.test, progress=False, **options)
        mixed = evaluate(model, processor, DATA.test, progress=False, views=HistoryViews(0.5), **options)
        one = flr.Recommender(model, processor).recommend([history], k=3, shares=False, **options)[0]
        explained = flr.Recommender(model, processor).explain(history, k=3, **options).recommendations
        return [result.scores.tolist(), mixed.scores.tolist(), [r.score for r in one], [r.score for r in explained]]

    auto, full = outcomes(loaded), outcomes(loaded, scoring="full")
    assert auto == outcomes(loaded, scoring="catalogue")
    assert all(a != f for a, f in zip(auto, full, strict=True))
    loaded.scoring = "full"
    assert outcomes(loaded) == full
    # written before there was a choice
    config = json.loads((tmp_path / "processor_config.json").read_text())
    del config["scoring"]
    (tmp_path / "processor_config.json").write_text(json.dumps(config))
    assert RecProcessor.from_pretrained(tmp_path).scoring == "full"
    with pytest.raises(ValueError, match="scoring"):
        RecProcessor(processor.tokenizer, processor.catalogue, "sid", scoring="auto")
    with pytest.raises(ValueError, match="scoring: expected one of auto"):
        evaluate(model, loaded, DATA.test, scoring="half")


@pytest.mark.parametrize("codec", ["sid", "title"])
def test_reinforcement_goes_on_with_the_normalisation_of_training(tmp_path, codec):
    """Rewards and the target's likelihood are those of the catalogue, member by member; the processor stays."""
    model, processor = trainable(codec, **PLAIN)
    processor.scoring = "catalogue"
    args = LatentGRPOConfig(
        output_dir=str(tmp_path), use_cpu=True, report_to="none", group_size=3, policy="tokens", save_strategy="no",
        eval_strategy="no", load_best_model_at_end=False, per_device_train_batch_size=4,
    )  # fmt: skip
    train = LatentGRPOTrainer(model, args, processor, DATA.train, DATA.valid)
    assert processor.scoring == "catalogue"
    rows = DATA.valid.select(list(range(12)))
    scores = score_all_items(model, processor(rows), train.trie, "catalogue")[range(12), rows.targets.astype(np.int64)]
    lengths = torch.from_numpy(processor.item_codec.lengths[rows.targets])
    assert train.target_logprobs(rows).mean() == pytest.approx(float((scores / lengths).mean()), rel=1e-4)
    inputs = train._batch([InteractionDataset(rows)[(0, i)] for i in range(12)])
    loss, out = train.compute_loss(model, inputs, return_outputs=True)
    torch.testing.assert_close(out.logprobs[:, 0].sum(-1), scores, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(out.logprobs[:, 1].sum(-1), scores)
    assert loss.requires_grad


def _step(rank: int) -> dict[str, torch.Tensor]:
    """Gradients of this process's half of a batch under DDP."""
    torch.manual_seed(0)
    inputs, loss_of = batch(CHOSEN[:4]), CatalogueLoss(catalogue())
    wrapped = torch.nn.parallel.DistributedDataParallel(patched())
    items = (inputs["labels"] != IGNORE).sum()
    mine = {k: v[[0, 1] if rank == 0 else [2, 3]] for k, v in inputs.items()}
    mine["labels"] = loss_of.target_nodes(mine["labels"])
    (wrapped(**mine, num_items_in_batch=items, catalogue_loss=loss_of).loss * 2).backward()
    return {n: p.grad for n, p in wrapped.module.named_parameters()}


@pytest.mark.timeout(120)
def test_two_processes_equal_one(tmp_path):
    ranks = in_processes(_step, 2, tmp_path)
    torch.manual_seed(0)
    inputs, loss_of, model = batch(CHOSEN[:4]), CatalogueLoss(catalogue()), patched()
    inputs["labels"] = loss_of.target_nodes(inputs["labels"])
    expected = gradients_of(model, model(**inputs, catalogue_loss=loss_of).loss)
    for actual in ranks:
        assert_same_gradients(actual, expected, 1e-9)
