"""A recommender in another process answers as it does here."""

from __future__ import annotations

import copy
import functools
import multiprocessing
import pickle
import threading

import numpy as np
import pytest

from flr.data import HistoryViews
from flr.recommend.recommender import Recommender
from tests.helpers.models import build_recommender

HISTORIES = [["item_3", "brave jazz 1", "item_7"], [], ["item_9", "item_2"]]


def answers(recommender: Recommender) -> list[list[tuple]]:
    found = recommender.recommend(HISTORIES, k=4, shares=True)
    return [[(r.item_id, r.title, r.score, *r.contributions) for r in items] for items in found]


def assert_same(given: list[list[tuple]], expected: list[list[tuple]]) -> None:
    for items, others in zip(given, expected, strict=True):
        assert [item[:2] for item in items] == [item[:2] for item in others]
        np.testing.assert_allclose([item[2:] for item in items], [item[2:] for item in others], atol=1e-5)


@functools.cache
def used(variant: str) -> Recommender:
    """A recommender that has already answered, so that everything it keeps is there."""
    recommender = build_recommender("sid", variant=variant)
    recommender.processor.views = HistoryViews()
    answers(recommender)
    recommender.explain(HISTORIES[0], k=2)
    assert recommender._mixture is not None
    return recommender


@pytest.mark.parametrize("variant", ["none", "flr"])
@pytest.mark.parametrize("way", ["pickle", "cloudpickle", "deepcopy"])
def test_copies_answer_alike(variant, way):
    recommender = used(variant)
    expected = answers(recommender)
    if way == "deepcopy":
        twin = copy.deepcopy(recommender)
    else:
        module = pickle if way == "pickle" else pytest.importorskip("cloudpickle")
        twin = pickle.loads(module.dumps(recommender))
    assert twin.model is not recommender.model
    assert_same(answers(twin), expected)
    assert_same(answers(recommender), expected)
    blocked = threading.Thread(target=answers, args=[twin])  # a lock of its own
    with recommender._lock:
        blocked.start()
        blocked.join(60)
        assert not blocked.is_alive()


def answers_of(data: bytes) -> list[list[tuple]]:
    """In another process; loading here lets a failure come back, where a pool would wait for ever."""
    return answers(pickle.loads(data))


def test_a_spawned_process_gives_the_same_lists():
    recommender = used("flr")
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        given = pool.apply_async(answers_of, [pickle.dumps(recommender)]).get(timeout=120)
    assert_same(given, answers(recommender))
