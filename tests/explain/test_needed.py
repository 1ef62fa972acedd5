"""Which factors a model needs: losses by definition, the choice of what is enough, agreement of runs."""

import contextlib
import copy

import numpy as np
import pytest
import torch

from flr.data import InteractionDataset, SFTCollator
from flr.explain import factor_stability, factors_needed, needed
from flr.model.pruning import only_factors, prune_factors
from tests.helpers.catalogues import DATA
from tests.helpers.models import trainable, wake


def awake(codec="id", **config):
    model, processor = trainable(codec, num_factors=3, **config)
    wake(model)
    return model.eval(), processor


def one_a_user(count: int):
    """Rows of as many users."""
    return DATA.train.select(np.unique(DATA.train.users, return_index=True)[1]).spread(count)


def plain_losses(model, processor, rows) -> np.ndarray:
    """-log p(target) of each row by itself, from the logits."""
    data, collate, found = InteractionDataset(rows), SFTCollator(processor), []
    for n in range(len(rows)):
        batch = collate([data[n]])
        batch.pop("item_positions")
        with torch.no_grad():
            logits = model(**batch).logits.double().log_softmax(-1)
        labels = batch["labels"][0, 1:]
        chosen = (labels != -100).nonzero()[:, 0]
        found.append(-float(logits[0, chosen, labels[chosen]].sum()))
    return np.array(found)


@pytest.mark.parametrize("codec", ["id", "sid"])
@pytest.mark.parametrize("aggregation", ["thought", "mixture"])
def test_losses_and_intervals_are_those_of_the_definition(codec, aggregation):
    weights = {"orthogonality_weight": 0.5, "diversity_weight": 0.5}  # regularisers are not a part of the loss
    model, processor = awake(codec, aggregation=aggregation, **weights)
    rows = one_a_user(12)
    found = factors_needed(model, processor, rows, batch_size=5)
    whole = plain_losses(model, processor, rows)
    assert found.loss == pytest.approx(whole.mean(), rel=1e-4)
    assert found.error == pytest.approx(whole.std(ddof=1) / np.sqrt(len(rows)), rel=1e-3)
    for k, change in enumerate(found.without):
        with only_factors(model, [j for j in range(3) if j != k]):
            more = plain_losses(model, processor, rows) - whole
        half = 1.959964 * more.std(ddof=1) / np.sqrt(len(rows))
        assert change == pytest.approx((more.mean(), more.mean() - half, more.mean() + half), abs=2e-4)
    assert max(abs(change.mean) for change in found.without) > 1e-3
    assert sum(found.gates) == pytest.approx(1)


def test_kinds_share_out_the_loss_and_batches_do_not_matter():
    model, processor = awake()
    rows = DATA.valid.spread(24)
    kinds = [str(n % 3) for n in range(len(DATA.catalogue))]
    found = factors_needed(model, processor, rows, kinds, batch_size=5)
    assert sum(found.rows) == len(rows)
    for change, row in zip(found.without, found.by_kind, strict=True):
        assert np.average(row, weights=found.rows) == pytest.approx(change.mean, abs=1e-5)
    again = factors_needed(model, processor, rows, batch_size=24)
    assert again.loss == pytest.approx(found.loss, rel=1e-5)
    assert again.error == pytest.approx(found.error, rel=1e-4), "of users, however many a batch has"
    assert again.error > 0
    assert again.kinds == ["all"]
    for (left, change), (others, other) in zip(again.path, found.path, strict=True):
        assert left == others
        assert change == pytest.approx(other, abs=1e-5)


def test_the_rows_of_a_user_vary_together():
    model, processor = awake()
    rows = one_a_user(12)
    twice = rows.select(np.tile(np.arange(len(rows)), 2))
    once, both = (factors_needed(model, processor, x, batch_size=8) for x in (rows, twice))
    assert (both.loss, both.error) == pytest.approx((once.loss, once.error), rel=1e-5), "no more is known than before"


def test_a_catalogue_loss_is_measured_as_it_was_trained():
    model, processor = awake("sid")
    rows = DATA.valid.spread(8)
    full = factors_needed(model, processor, rows).loss
    processor.scoring = "catalogue"
    assert factors_needed(model, processor, rows).loss < full - 0.1  # competes with siblings alone


def test_the_least_missed_goes_first_until_more_than_an_error_is_lost(monkeypatch):
    """Losses by the factors that are left: 1 is not missed at all, 0 hardly, and one of 2 and 3 is needed."""
    model, processor = trainable(num_factors=4)
    rows, left = one_a_user(16), [list(range(4))]
    noise = np.random.default_rng(0).normal(0, 1, 16)
    noise = (noise - noise.mean()) / noise.std(ddof=1)  # standard error 0.25
    cost = {0: 0.2, 1: 0.0, 2: 1.0, 3: 1.1}

    @contextlib.contextmanager
    def only(model, keep):
        left.append(list(keep))
        yield

    def losses(self):
        return 5 + noise + sum(cost[k] for k in range(4) if k not in left[-1])

    monkeypatch.setattr(needed, "only_factors", only)
    monkeypatch.setattr(needed, "_noting_gates", lambda model: contextlib.nullcontext([torch.ones(4)]))
    monkeypatch.setattr(needed._Rows, "losses", losses)
    found = factors_needed(model, processor, rows, batch_size=1)
    assert found.error == pytest.approx(0.25)
    assert [kept for kept, _ in found.path] == [[0, 1, 2, 3], [0, 2, 3], [2, 3], [3]]
    assert [round(change.mean, 6) for _, change in found.path] == [0.0, 0.0, 0.2, 1.2]
    assert found.enough == 2
    assert found.kept() == [2, 3]
    assert found.kept(1) == [3]
    with pytest.raises(ValueError, match="keep: expected 1 to 4, got 5"):
        found.kept(5)


def test_runs_that_divide_alike():
    model, processor = awake(num_refinements=1)  # later queries would depend on values, too
    same = prune_factors(copy.deepcopy(model), range(3))
    with torch.no_grad():
        for p in (same.flr.query, same.flr.factor_query, same.flr.key):
            p.copy_(p[[2, 0, 1]])  # factors of other numbers
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.flr.factor_query.normal_(std=8)
    table = factor_stability([(model, processor), (same, processor), (other, processor)], DATA.valid)
    assert table[0][0] == 1
    assert table[0][1] == table[1][0] == pytest.approx(1)
    assert table[0][2] < 0.9


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": DATA.valid.select(np.zeros(0, np.int64))}, "rows: expected at least 1, got none"),
        ({"rows": DATA.valid.spread(1)}, "rows: expected those of two users or more, .* got one user's"),
        ({"kinds": ["a"]}, r"kinds: expected \d+, one an item, got 1"),
        ({"batch_size": 0}, "batch_size: expected at least 1, got 0"),
    ],
)
def test_refused(change, message):
    model, processor = trainable()
    with pytest.raises(ValueError, match=message):
        factors_needed(model, processor, **{"rows": DATA.valid, **change})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_factors": 1}, "model: expected two factors or more, got 1"),
        ({"variant": "anchor"}, "model: expected factors"),
    ],
)
def test_a_model_without_factors_to_take_away(options, message):
    with pytest.raises(ValueError, match=message):
        factors_needed(*trainable(**options), DATA.valid)


def test_one_run_has_nothing_to_be_compared_with():
    with pytest.raises(ValueError, match="models: expected at least 2, got 1"):
        factor_stability([trainable()], DATA.valid)
