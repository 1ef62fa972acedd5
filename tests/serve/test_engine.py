"""Micro-batching: what is computed together, what is dropped, and what a failure does to the others."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
import weakref

import numpy as np
import pytest
import torch

from flr.serve import memory
from flr.serve.engine import DeadlineExceeded, Engine, Job, Loaded, QueueFull
from tests.helpers.comparisons import assert_same_recommendations
from tests.helpers.garbage import set_apart
from tests.helpers.models import build_recommender
from tests.helpers.serving import Settings


@pytest.fixture
def gated(recommender, monkeypatch):
    """The recommender's ``ranked`` waits for ``open`` to be set, and notes the histories that it was given."""
    original, opened, calls = recommender.ranked, threading.Event(), []

    def ranked(queries, *args):
        calls.append([query.history.tolist() for query in queries])
        assert opened.wait(30)
        return original(queries, *args)

    monkeypatch.setattr(recommender, "ranked", ranked)
    return recommender, opened, calls


def run(recommender, test, **settings):
    async def inside():
        options = Settings(**{"max_wait_ms": 0, **settings})
        engine = Engine(Loaded(recommender, None, 1), options)
        engine.start()
        try:
            return await test(engine)
        finally:
            await engine.close()

    return asyncio.run(inside())


def job(engine, history, *, seconds=30.0, k=3, num_beams=20, scoring="full", kind="recommend"):
    query = engine.model.recommender.query(np.array(history, np.int64), k)
    return Job(engine.model, query, [], num_beams, scoring, kind, time.monotonic() + seconds)


async def until(condition):
    for _ in range(3000):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it did not happen")


def test_what_arrives_while_the_model_works_is_computed_together(gated):
    recommender, opened, calls = gated

    async def test(engine):
        first = asyncio.create_task(engine.submit(job(engine, [0])))
        await until(lambda: calls)
        others = [asyncio.create_task(engine.submit(job(engine, [i], k=i))) for i in range(1, 10)]
        await asyncio.sleep(0.05)
        opened.set()
        answers = await asyncio.gather(first, *others)
        assert [len(call) for call in calls] == [1, 4, 4, 1]
        assert [answer.batch_size for answer in answers] == [1] + [4] * 8 + [1]
        assert all(answer.waited >= 0.04 for answer in answers[1:])
        for i, answer in enumerate(answers):
            assert_same_recommendations(
                answer.result, recommender.recommend([np.array([i])], k=max(i, 1) if i else 3, shares=False)[0]
            )

    run(recommender, test, max_batch_size=4)


def test_kinds_that_cannot_be_mixed_are_not_and_the_oldest_goes_first(gated):
    recommender, opened, calls = gated

    async def test(engine):
        tasks = [asyncio.create_task(engine.submit(job(engine, [0])))]
        await until(lambda: calls)
        for i, options in enumerate(
            [{}, {"num_beams": 12}, {}, {"scoring": "catalogue"}, {"num_beams": 12}, {"kind": "shares"}, {}], 1
        ):
            tasks.append(asyncio.create_task(engine.submit(job(engine, [i], **options))))
            await asyncio.sleep(0.002)
        opened.set()
        await asyncio.gather(*tasks)
        assert calls == [[[0]], [[1], [3], [7]], [[2], [5]], [[4]], [[6]]]

    run(recommender, test)


def test_patience(recommender):
    async def test(engine):
        alone = await engine.submit(job(engine, [5], seconds=60))
        assert alone.waited < 0.5  # nobody else is on the way
        engine.announce(1)
        expecting = await engine.submit(job(engine, [5], seconds=60))
        assert 1 <= expecting.waited < 5
        full = await asyncio.gather(*(engine.submit(job(engine, [i])) for i in range(4)))
        assert [answer.batch_size for answer in full] == [4] * 4
        assert all(answer.waited < 0.5 for answer in full)
        task = asyncio.create_task(engine.submit(job(engine, [5], seconds=60)))
        await asyncio.sleep(0.1)
        engine.announce(-1)  # it was refused
        assert (await task).waited < 0.9

    run(recommender, test, max_batch_size=4, max_wait_ms=1000)


def test_a_full_queue_refuses_at_once_and_says_when_to_come_again(gated):
    recommender, opened, calls = gated

    async def test(engine):
        opened.set()
        await engine.submit(job(engine, [0]))
        opened.clear()
        engine._rate = 0.5  # as measured
        tasks = [asyncio.create_task(engine.submit(job(engine, [0])))]
        await until(lambda: len(calls) == 2)
        tasks += [asyncio.create_task(engine.submit(job(engine, [i]))) for i in range(5)]
        await asyncio.sleep(0.01)
        with pytest.raises(QueueFull) as busy:
            await engine.submit(job(engine, [9]))
        assert busy.value.retry_after == 12  # five wait, one is computed, a request takes two seconds
        engine._rate = 1e-9
        with pytest.raises(QueueFull) as busy:
            engine.check_room()
        assert busy.value.retry_after == 60
        opened.set()
        await asyncio.gather(*tasks)
        assert engine.metrics.registry.get_sample_value("flr_queue_depth") == 0
        assert engine._rate > 0.5
        engine.check_room()
        engine.announce(5)  # each of these has a place
        with pytest.raises(QueueFull):
            engine.check_room()
        engine.announce(-1)
        await engine.submit(job(engine, [0]))

    run(recommender, test, max_queue=5)


def test_deadlines(gated):
    """A request is told at its deadline, not at its turn, and not computed; one that is being computed is answered."""
    recommender, opened, calls = gated

    async def test(engine):
        computing = asyncio.create_task(engine.submit(job(engine, [0], seconds=0.2)))
        await until(lambda: calls)
        late, patient = (
            asyncio.create_task(engine.submit(job(engine, [i], seconds=s))) for i, s in ((1, 0.1), (2, 30))
        )
        started = time.monotonic()
        with pytest.raises(DeadlineExceeded):
            await late
        assert time.monotonic() - started < 5
        assert len(calls) == 1  # the model is still at the first
        with pytest.raises(DeadlineExceeded):
            await engine.submit(job(engine, [3], seconds=-1))
        await asyncio.sleep(0.2)
        opened.set()
        assert_same_recommendations(
            (await computing).result, recommender.recommend([np.array([0])], k=3, shares=False)[0]
        )
        await patient
        assert [[1]] not in calls
        assert [[3]] not in calls
        assert engine.metrics.registry.get_sample_value("flr_dropped_total", {"reason": "late"}) == 2

    run(recommender, test)


def test_callers_that_leave(gated):
    recommender, opened, calls = gated

    async def test(engine):
        tasks = [asyncio.create_task(engine.submit(job(engine, [0])))]
        await until(lambda: calls)
        tasks += [asyncio.create_task(engine.submit(job(engine, [i]))) for i in (1, 2)]
        await asyncio.sleep(0.01)
        for task in tasks[:2]:  # one is being computed, one waits
            task.cancel()
        opened.set()
        assert (await tasks[2]).batch_size == 1
        assert calls == [[[0]], [[2]]]

    run(recommender, test)


def test_one_bad_request_does_not_fail_its_batch(recommender, monkeypatch):
    original = recommender.ranked

    def ranked(queries, *args):
        if any(query.history.tolist() == [3] for query in queries):
            raise FloatingPointError("bad")
        return original(queries, *args)

    monkeypatch.setattr(recommender, "ranked", ranked)

    async def test(engine):
        answers = await asyncio.gather(*(engine.submit(job(engine, [i])) for i in range(6)), return_exceptions=True)
        for i, answer in enumerate(answers):
            if i == 3:
                assert isinstance(answer, FloatingPointError)
            else:
                assert_same_recommendations(answer.result, recommender.recommend([np.array([i])], k=3, shares=False)[0])

    run(recommender, test, max_wait_ms=20)


def test_a_reload_leaves_waiting_requests_with_their_model(gated):
    recommender, opened, calls = gated
    other = build_recommender("sid", num_factors=2)
    loading = threading.Event()

    def load():
        assert loading.wait(30)
        return other

    async def test(engine):
        engine._load = load
        old = [asyncio.create_task(engine.submit(job(engine, [i]))) for i in (0, 1)]
        await until(lambda: calls)
        reload = asyncio.create_task(engine.reload())
        await asyncio.sleep(0.01)
        with pytest.raises(RuntimeError, match="a reload is under way"):
            await engine.reload()
        loading.set()
        await reload
        new = asyncio.create_task(engine.submit(job(engine, [1])))
        opened.set()
        for task, model in [(old[0], recommender), (old[1], recommender), (new, other)]:
            index = 0 if task is old[0] else 1
            assert_same_recommendations((await task).result, model.recommend([np.array([index])], k=3, shares=False)[0])
        assert engine.model.generation == 2

    run(recommender, test, max_batch_size=1)


@pytest.fixture
def collected_by_hand(monkeypatch):
    """Nothing is collected by chance, or frozen by an earlier test; what this one froze is collected afterwards."""
    monkeypatch.setattr(memory, "_frozen", False)
    gc.unfreeze()
    gc.collect()
    threshold = gc.get_threshold()
    gc.set_threshold(0)
    yield
    gc.unfreeze()
    set_apart()
    gc.set_threshold(*threshold)


def reloading(load, test, *, frozen):
    """Runs ``test(engine)``, of an engine whose models ``load`` builds; where told, as after the server's start."""

    async def inside():
        engine = Engine(Loaded(load(), None, 1), Settings(max_wait_ms=0), load)
        if frozen:
            memory.freeze()
        engine.start()
        try:
            await test(engine)
        finally:
            await engine.close()

    asyncio.run(inside())


@pytest.mark.usefixtures("collected_by_hand")
@pytest.mark.parametrize("frozen", [False, True])
def test_a_reload_gives_the_memory_of_the_old_model_back(frozen):
    """Also where the new one cannot serve, and while nobody asks for anything."""
    alive = []

    def load():
        loaded = build_recommender("sid")
        alive.append(weakref.ref(loaded.model))
        if len(alive) == 4:
            loaded.ranked = None  # it cannot be warmed
        return loaded

    async def test(engine):
        for count in (2, 3):
            await engine.reload()
            await engine.submit(job(engine, [0]))
            await until(lambda: sum(model() is not None for model in alive) == 1)
            assert len(alive) == count
        with pytest.raises(TypeError):
            await engine.reload()
        await until(lambda: sum(model() is not None for model in alive) == 1)
        assert engine.model.recommender.model is alive[2]()

    own = [alive]
    reloading(load, test, frozen=frozen)
    assert any(x is own for x in gc.get_objects()) != frozen  # a process that froze nothing is left alone


@pytest.mark.usefixtures("collected_by_hand")
def test_a_failed_reload_gives_back_what_was_frozen_while_it_loaded(monkeypatch):
    """By the collection for the model before it, which ends after the new one is read."""
    alive, read, frozen, freeze = [], threading.Event(), threading.Event(), gc.freeze

    def freeze_later():
        assert read.wait(30)
        freeze()
        frozen.set()

    def load():
        loaded = build_recommender("sid")
        alive.append(weakref.ref(loaded.model))
        if len(alive) == 3:
            loaded.ranked = None
            read.set()
            assert frozen.wait(30)
        return loaded

    async def test(engine):
        monkeypatch.setattr(gc, "freeze", freeze_later)
        await engine.reload()
        await until(lambda: alive[0]() is None)
        with pytest.raises(TypeError):
            await engine.reload()
        await until(lambda: alive[2]() is None)
        assert engine.model.recommender.model is alive[1]()

    reloading(load, test, frozen=True)


@pytest.mark.usefixtures("collected_by_hand")
def test_a_thread_that_is_slow_to_let_go_of_a_model_keeps_none():
    """The last reference ends in a thread, which others interrupt between its telling of that and what follows."""
    model, gone = torch.nn.Module(), torch.nn.Module()
    model.own = [model]
    gone.model = model
    alive = weakref.ref(model)
    slow = weakref.ref(gone, lambda _: time.sleep(0.5))  # called after what is registered later
    held = [gone]
    del model, gone

    async def inside():
        memory.collect_after(held[0])
        await asyncio.to_thread(held.clear)
        assert slow() is None
        await until(lambda: alive() is None)

    asyncio.run(inside())


def test_closing_answers_what_waits(gated):
    recommender, opened, calls = gated

    async def test(engine):
        tasks = [asyncio.create_task(engine.submit(job(engine, [i]))) for i in range(5)]
        await until(lambda: calls)
        closing = asyncio.create_task(engine.close())
        await asyncio.sleep(0.02)
        opened.set()
        await closing
        assert all(task.done() for task in tasks)
        assert len(await asyncio.gather(*tasks)) == 5
        assert not engine.alive

    run(recommender, test, max_batch_size=2)
