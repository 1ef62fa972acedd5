"""A teacher's part of a target: its definition, that it has not seen what it teaches, draws, and what is refused."""

from types import SimpleNamespace

import numpy as np
import pytest
import scipy.sparse as sp

from flr.data import CSR, Augment, InteractionDataset, Interactions, SFTCollator, Teacher
from flr.data import teacher as teacher_module
from flr.data.left_out import LeftOut
from flr.data.teacher import draw
from flr.train import item_neighbours
from tests.helpers.catalogues import DATA
from tests.helpers.models import trainable

SIZE = len(DATA.catalogue)


@pytest.mark.parametrize("method", ["linear", "item-knn"])
@pytest.mark.parametrize(("weight", "temperature", "top"), [(0.5, 0.7, 100), (1.0, 1.0, 7), (0.2, 2.0, 1)])
def test_the_definition(method, weight, temperature, top):
    """q over the whole catalogue, dense; the scores themselves are those of tests/data/test_left_out.py."""
    teacher = Teacher.fit(DATA.train, SIZE, method, weight=weight, temperature=temperature, top=top)
    rows = DATA.train.select(np.arange(40))
    taught = teacher(rows.users, rows.histories)
    for n, scores in enumerate(teacher.left_out.scores(rows.users, rows.histories).toarray()):
        scores[np.argsort(-scores)[top:]] = 0
        powers = np.maximum(scores, 0) ** (1 / temperature)
        found = np.zeros(SIZE)
        np.add.at(found, taught.items[n], taught.weights[n])
        np.testing.assert_allclose(found, weight * powers / powers.sum() if powers.any() else powers, atol=1e-6)
    alone = teacher([rows.users[5]], rows.histories.take(np.array([5])))  # whatever else is in the batch
    np.testing.assert_array_equal(alone.items[0], taught.items[5])
    np.testing.assert_array_equal(alone.weights[0], taught.weights[5])


@pytest.mark.parametrize("method", ["linear", "item-knn"])
def test_it_has_not_seen_the_rows_that_it_teaches(method):
    """One user alone goes from item 0 to item 1: others are told so, and that user is not."""
    train = Interactions(["ann", *(f"user {n}" for n in range(30))], [[0], *([[2]] * 30)], [1, *([3] * 30)])
    teacher = Teacher.fit(train, 4, method)
    history = CSR.from_rows([[0]])
    assert not teacher(["ann"], history).weights.any()
    taught = teacher(["user 7"], history)
    assert taught.items[0, taught.weights[0] > 0].tolist() == [1]
    known = teacher(["ann"], CSR.from_rows([[2]]))
    assert known.items[0, np.argmax(known.weights[0])] == 3


def test_auto_is_whichever_ranks_train_better(monkeypatch):
    """Without the user's rows, by definition; and item-kNN where a linear model would be too large."""
    found = {}
    for method in ("linear", "item-knn"):
        teacher = Teacher.fit(DATA.train, SIZE, method)
        scores = teacher.left_out.scores(DATA.train.users, DATA.train.histories).toarray()
        own = scores[np.arange(len(scores)), DATA.train.targets]
        rank = (scores >= own[:, None]).sum(1)
        found[method] = np.where((own > 0) & (rank <= 10), 1 / np.log2(rank + 1), 0).mean()
        assert teacher_module._ndcg(teacher.left_out, DATA.train) == pytest.approx(found[method])
    monkeypatch.setattr(teacher_module, "_TRIED", len(DATA.train))
    best = Teacher.fit(DATA.train, SIZE, max(found, key=found.get))
    assert of(Teacher.fit(DATA.train, SIZE, "auto")) == of(best)
    monkeypatch.setattr(teacher_module, "MOST_LINEAR_ITEMS", SIZE - 1)
    assert of(Teacher.fit(DATA.train, SIZE, "auto")) == of(Teacher.fit(DATA.train, SIZE, "item-knn"))


def of(teacher):
    return teacher.left_out.table.similarity.toarray().tolist()


def test_draws_follow_the_whole_distribution():
    teacher = Teacher.fit(DATA.train, SIZE, weight=0.6, top=5)
    row = DATA.train.select([3])
    taught = teacher(row.users, row.histories)
    target, count = int(row.targets[0]), 20_000
    many = type(taught)(taught.items.repeat(count, 0), taught.weights.repeat(count, 0))
    places = (np.arange(count) + 0.5) / count
    found = np.bincount(draw(many, np.full(count, target, np.int32), places), minlength=SIZE) / count
    expected = np.zeros(SIZE)
    np.add.at(expected, taught.items[0], taught.weights[0])
    expected[target] += 1 - taught.weights.sum()
    np.testing.assert_allclose(found, expected, atol=2e-4)
    knows_nothing = type(taught)(taught.items, np.zeros_like(taught.weights))
    assert draw(knows_nothing, np.array([target], np.int32), np.zeros(1)).tolist() == [target]


def test_what_is_level_counts_against_the_target():
    train = Interactions(["u", "u", "u"], [[0]] * 3, [1, 2, 3])
    known = SimpleNamespace(scores=lambda users, histories: sp.csr_matrix([[0, 2.0, 2.0, 3.0]] * len(users)))
    expected = np.mean([1 / np.log2(4), 1 / np.log2(4), 1])
    assert teacher_module._ndcg(known, train) == pytest.approx(expected)


def test_batches_have_the_distribution_where_items_are_one_token_and_draws_elsewhere():
    teacher = Teacher.fit(DATA.train, SIZE, weight=0.5)
    augment = Augment(teacher=teacher)
    rows = [InteractionDataset(DATA.train)[(2, n)] for n in range(32)]
    _, processor = trainable("id")
    batch = SFTCollator(processor, augment)(rows)
    np.testing.assert_allclose(batch["soft_weights"].sum(1).numpy(), 1, atol=1e-6)
    tokens = processor.item_codec.tokens
    assert batch["soft_targets"][:, -1].tolist() == [int(tokens[row.target]) for row in rows]
    assert batch["input_ids"][:, -1].tolist() == batch["soft_targets"][:, -1].tolist()
    taught = teacher([row.user for row in rows], CSR.from_rows([row.history for row in rows]))
    np.testing.assert_array_equal(batch["soft_targets"][:, :-1].numpy(), tokens[taught.items])
    np.testing.assert_array_equal(batch["soft_weights"][:, :-1].numpy(), taught.weights)

    own = np.array([row.target for row in rows], np.int32)
    drawn = augment.drawn(taught, rows, own, seed=3)
    assert 4 < (drawn != own).sum() < 28  # half of the weight is the teacher's
    _, processor = trainable("sid")
    batch, codec = SFTCollator(processor, augment, 3)(rows), processor.item_codec
    assert "soft_targets" not in batch
    for n, item in enumerate(drawn.tolist()):
        wanted = codec.tokens[codec.offsets[item] : codec.offsets[item + 1]].tolist()
        found = batch["labels"][n]
        assert found[found != -100].tolist() == wanted
    again = augment.drawn(taught, rows, own, seed=3)
    np.testing.assert_array_equal(drawn, again)
    later = [row._replace(epoch=3) for row in rows]
    assert (augment.drawn(taught, later, own, seed=3) != drawn).any()  # drawn anew in every epoch
    assert (augment.drawn(taught, rows, own, seed=4) != drawn).any()


def test_it_answers_to_the_history_that_is_left():
    teacher = Teacher.fit(DATA.train, SIZE)
    augment = Augment(drop_item=1.0, teacher=teacher)  # leaves the latest item
    rows = [InteractionDataset(DATA.train)[(0, n)] for n in range(8)]
    histories, _ = augment(rows)
    assert histories.lengths.max() == 1
    _, processor = trainable("id")
    batch = SFTCollator(processor, augment)(rows)
    taught = teacher([row.user for row in rows], histories)
    np.testing.assert_array_equal(batch["soft_weights"][:, :-1].numpy(), taught.weights)


def test_what_is_refused():
    left_out = LeftOut.item_knn(DATA.train, SIZE)
    for wanted, arguments in (
        (r"weight: expected more than 0 and at most 1, got 0", {"weight": 0}),
        (r"weight: expected more than 0 and at most 1, got 1\.5", {"weight": 1.5}),
        ("temperature: expected more than 0, got nan", {"temperature": float("nan")}),
        ("top: expected at least 1, got 0", {"top": 0}),
    ):
        with pytest.raises(ValueError, match=wanted):
            Teacher(left_out, **arguments)
    with pytest.raises(ValueError, match="method: expected auto or one of linear, item-knn, got 'ease'"):
        Teacher.fit(DATA.train, SIZE, "ease")
    neighbours = item_neighbours(DATA.train, DATA.catalogue, top=4)
    with pytest.raises(ValueError, match="teacher: expected None beside neighbours"):
        Augment(neighbours=neighbours, teacher=Teacher(left_out))
