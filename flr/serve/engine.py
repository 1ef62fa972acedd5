"""Micro-batching: requests that arrive together are computed together, and every answer is that of the request alone.

One asyncio queue, bounded; one worker thread, in which the model runs. A batch holds requests that one search can
serve: the same model generation, number of beams, scoring and kind of answer; histories, k and filters may differ. It
starts when it is full, when no other request is announced (received, but not in the queue yet), or when its oldest has
waited ``max_wait_ms``; so a request alone never waits, and while the worker is busy the next batch fills by itself. The
oldest waiting request is always in the next batch, so no kind of request starves another.

    full queue           QueueFull, at once; with the time after which there should be room, from the measured rate.
                         What is announced has its place, so what is read and understood is not refused afterwards
    deadline passes      DeadlineExceeded, at once; one that waits is dropped, one that is being computed is answered
    caller is cancelled  the request is dropped if it still waits
    a batch fails        its requests are computed one by one, so that one bad request does not fail the others
    reload               requests keep their generation; the old model goes when its last one is answered
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
import traceback
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from flr.recommend import Recommender
from flr.recommend.query import Query
from flr.recommend.results import Explanation, Recommendation

from .memory import collect, collect_after
from .metrics import Metrics
from .search import Hits, ItemSearch
from .settings import Settings

logger = logging.getLogger("flr.serve")

Kind = Literal["recommend", "shares", "explain"]
_LONGEST_RETRY = 60  # seconds
_MEMORY = 0.8  # of the measured rate: weight of the past at each batch


class QueueFull(Exception):
    """The queue is full."""

    def __init__(self, retry_after: int) -> None:
        super().__init__(f"too many requests wait; try again in {retry_after} s")
        self.retry_after = retry_after


class DeadlineExceeded(Exception):
    """The deadline passed before the request was computed."""


@dataclass(frozen=True, eq=False)
class Loaded:
    """A model that is served; generation 1 is the one at the start."""

    recommender: Recommender
    search: ItemSearch
    generation: int

    @classmethod
    def warm(
        cls, recommender: Recommender, generation: int, settings: Settings, before: Loaded | None = None
    ) -> Loaded:
        """Build what is built at first use, and run a request of each kind; ``before`` may have the same catalogue."""
        catalogue, beams, scoring = recommender.processor.catalogue, settings.num_beams, settings.scoring
        catalogue.lookup("\0")
        recommender.selection(where=dict.fromkeys(catalogue.attributes, ()))
        recommender.recommend([[]], k=1, num_beams=beams, scoring=scoring)  # type: ignore[arg-type]
        recommender.explain(catalogue.item_ids[:1], k=1, num_beams=beams)
        same = before is not None and before.recommender.processor.catalogue is catalogue
        return cls(recommender, before.search if before is not None and same else ItemSearch(catalogue), generation)

    @property
    def num_items(self) -> int:
        """Of the catalogue."""
        return len(self.recommender.processor.catalogue)


@dataclass(eq=False)
class Job:
    """A request: what to compute, with which model, until when (of ``time.monotonic``)."""

    model: Loaded
    query: Query
    unknown: list[str]
    num_beams: int
    scoring: Any
    kind: Kind
    deadline: float
    arrived: float = field(default_factory=time.monotonic)
    future: asyncio.Future[Answer] = field(init=False)

    @property
    def bucket(self) -> tuple[int, int, str, Kind]:
        """Jobs of one bucket can be computed together."""
        return self.model.generation, self.num_beams, self.scoring, self.kind


@dataclass(frozen=True)
class Answer:
    """What came out, how long the request waited, and with how many it was computed."""

    result: list[Recommendation] | Explanation
    waited: float
    batch_size: int


class Engine:
    """Runs requests in micro-batches. Everything but the model's work happens on the event loop.

    Args:
        model: the first one.
        settings: limits.
        load: reads the model anew, in a thread of its own; None where reloading makes no sense.
        metrics: where to count.
    """

    not_ready = "the engine has stopped"

    def __init__(
        self,
        model: Loaded,
        settings: Settings,
        load: Callable[[], Recommender] | None = None,
        metrics: Metrics | None = None,
    ) -> None:
        self.model = model
        self.settings = settings
        self.metrics = Metrics() if metrics is None else metrics
        self.metrics.generation.set(model.generation)
        self._load = load
        self._buckets: dict[Any, deque[Job]] = {}
        self._waiting = self._computing = self._announced = 0
        self._task: asyncio.Task[None] | None = None
        self._reloading = False
        self._rate = 0.0  # requests a second while the worker is busy; 0 before the first batch

    def start(self) -> None:
        """Begin to take jobs from the queue; call it on the event loop. After :meth:`close` it may be started again."""
        self._arrived = asyncio.Event()
        self._worker = ThreadPoolExecutor(1, "flr-model")
        self._searcher = ThreadPoolExecutor(1, "flr-search")  # of its own: what else runs in threads must not wait
        self._task = asyncio.get_running_loop().create_task(self._run())
        self._task.add_done_callback(_stopped)

    @property
    def alive(self) -> bool:
        """False when the loop over batches is not running."""
        return self._task is not None and not self._task.done()

    async def close(self) -> None:
        """Answer what waits, then stop."""
        while self.alive and self._waiting + self._computing:
            await asyncio.sleep(0.01)
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
            self._task = None
            self._worker.shutdown(wait=True)
            self._searcher.shutdown(wait=True, cancel_futures=True)

    def announce(self, more: int) -> None:
        """A request is on its way (1), or it has come or gone (-1)."""
        self._announced += more
        if not self._announced and self.alive:
            self._arrived.set()

    def check_room(self) -> None:
        """Raise ``QueueFull`` where no place is left beside those that wait and those that are announced."""
        if self._waiting + self._announced >= self.settings.max_queue:
            self.metrics.dropped.labels("full").inc()
            ahead = self._waiting + self._announced + self._computing
            wait = math.ceil(ahead / self._rate) if self._rate else 1
            raise QueueFull(min(max(wait, 1), _LONGEST_RETRY))

    async def submit(self, job: Job) -> Answer:
        """The answer; raises ``QueueFull``, ``DeadlineExceeded``, or what the model raised."""
        self.check_room()
        loop = asyncio.get_running_loop()
        left = job.deadline - time.monotonic()
        if left <= 0:
            self.metrics.dropped.labels("late").inc()
            raise DeadlineExceeded
        job.future = loop.create_future()
        self._buckets.setdefault(job.bucket, deque()).append(job)
        self._count(1)
        self._arrived.set()
        timer = loop.call_later(left, self._expire, job)
        try:
            return await job.future
        except asyncio.CancelledError:
            if self._remove(job):
                self.metrics.dropped.labels("gone").inc()
            raise
        finally:
            timer.cancel()

    async def search(self, model: Loaded, words: str) -> Hits:
        """Items by parts of their titles or ids."""
        return await asyncio.get_running_loop().run_in_executor(self._searcher, model.search, words)

    async def ready(self) -> bool:
        """Whether requests are answered."""
        return self.alive

    async def exposition(self) -> bytes:
        """The metrics in Prometheus' text format."""
        return self.metrics.text()

    def relabel(self, generation: int) -> None:
        """Count the model that serves as this generation: it was read from the folder as it is now."""
        self.model = replace(self.model, generation=generation)
        self.metrics.generation.set(generation)

    async def reload(self, generation: int | None = None) -> Loaded:
        """Load the model anew, warm it, and let it take over; the one that serves stays if that fails.

        Args:
            generation: of the new one; None for the next.

        Raises:
            RuntimeError: a reload is under way, or there is nothing to load from.
            Exception: what loading raised.
        """
        if self._load is None:
            raise RuntimeError("this server was given a model, not a folder to load one from")
        if self._reloading:
            raise RuntimeError("a reload is under way")
        load, before, settings = self._load, self.model, self.settings
        generation = before.generation + 1 if generation is None else generation
        self._reloading = True
        started = time.monotonic()
        try:
            loaded = await asyncio.to_thread(lambda: Loaded.warm(load(), generation, settings, before))
        except Exception as error:
            self.metrics.reloads.labels("failed").inc()
            told = {"event": "reload", "error": f"{type(error).__name__}: {error}"}
            logger.error("reload failed", extra={"fields": told})
            traceback.clear_frames(error.__traceback__)  # which hold what was loaded
            await asyncio.to_thread(collect)
            raise
        finally:
            self._reloading = False
        collect_after(self.model.recommender)
        self.model = loaded
        self.metrics.reloads.labels("done").inc()
        self.metrics.generation.set(generation)
        seconds = round(time.monotonic() - started, 3)
        logger.info("reloaded", extra={"fields": {"event": "reload", "generation": generation, "seconds": seconds}})
        return self.model

    def _count(self, more: int) -> None:
        self._waiting += more
        self.metrics.queue_depth.set(self._waiting)

    def _remove(self, job: Job) -> bool:
        """Take a job out of the queue; False where it is there no longer."""
        queue = self._buckets.get(job.bucket)
        if queue is None or job not in queue:
            return False
        queue.remove(job)
        if not queue:
            del self._buckets[job.bucket]
        self._count(-1)
        return True

    def _expire(self, job: Job) -> None:
        if self._remove(job) and not job.future.done():
            self.metrics.dropped.labels("late").inc()
            job.future.set_exception(DeadlineExceeded())

    async def _run(self) -> None:
        while True:  # without variables: they would hold the last batch, and its model, until the next one
            await self._answer(await self._next())

    async def _next(self) -> list[Job]:
        """The next batch, once it may start."""
        patience = self.settings.max_wait_ms / 1000
        while True:
            while not self._waiting:
                self._arrived.clear()
                await self._arrived.wait()
            queue = min(self._buckets.values(), key=lambda jobs: jobs[0].arrived)
            head, limit = queue[0], self._limit(queue[0])
            left = head.arrived + patience - time.monotonic()
            if len(queue) < limit and self._announced and left > 0:
                self._arrived.clear()
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(self._arrived.wait(), left)
                continue
            jobs = [queue.popleft() for _ in range(min(len(queue), limit))]
            if not queue:
                del self._buckets[head.bucket]
            self._count(-len(jobs))
            return jobs

    async def _answer(self, jobs: list[Job]) -> None:
        """Compute a batch, and tell those who wait for it."""
        loop = asyncio.get_running_loop()
        self._computing = len(jobs)
        began = time.monotonic()
        results = await loop.run_in_executor(self._worker, _compute, jobs)
        seconds = time.monotonic() - began
        self._computing = 0
        rate = len(jobs) / max(seconds, 1e-6)
        self._rate = _MEMORY * self._rate + (1 - _MEMORY) * rate if self._rate else rate
        self.metrics.batch_seconds.observe(seconds)
        self.metrics.batch_size.observe(len(jobs))
        for job, result in zip(jobs, results, strict=True):
            self.metrics.queue_seconds.observe(began - job.arrived)
            if job.future.done():  # its caller has gone
                continue
            if isinstance(result, Exception):
                job.future.set_exception(result)
            else:
                job.future.set_result(Answer(result, began - job.arrived, len(jobs)))

    def _limit(self, job: Job) -> int:
        return min(self.settings.max_batch_size, job.model.recommender.rows_at_once(job.num_beams))


def _stopped(task: asyncio.Task[None]) -> None:
    """The loop over batches ends by being cancelled; anything else turns /health to 503."""
    if not task.cancelled() and (error := task.exception()) is not None:
        logger.critical("the engine has stopped", exc_info=error, extra={"fields": {"event": "engine"}})


def _compute(jobs: list[Job]) -> list[list[Recommendation] | Explanation | Exception]:
    """In the worker thread: one result, or what was raised, for every job of one bucket."""
    first = jobs[0]
    recommender, queries = first.model.recommender, [job.query for job in jobs]
    try:
        if first.kind == "explain":
            return [*recommender.explained(queries, [job.unknown for job in jobs], first.num_beams, first.scoring)]
        return [*recommender.ranked(queries, first.num_beams, first.scoring, first.kind == "shares")[0]]
    except Exception as error:
        if len(jobs) == 1:
            return [error]
        logger.warning("a batch failed, its requests are computed alone", extra={"fields": {"error": repr(error)}})
        return [result for job in jobs for result in _compute([job])]
