"""The front of replicas on a cluster: what the engine is to a server of one process, this is to one of many.

Every request is a question that may be asked twice, so one whose replica is lost goes to another, once; after that it
is refused with 503 and ``Retry-After``, as one that no replica takes before its deadline.

A reload counts generations. The front asks all replicas at once, each loads in place beside the model that serves, and
on one machine they take turns; ``generation`` says of every answer which load it is of. A replica that was not there
when the others were asked (it was started, or cut off) learns of the generation with its next request: it takes the
number over where the folder is still the one that it read, else it loads.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any, NamedTuple

from .metrics import Metrics, merged
from .middleware import Trace
from .settings import Settings

logger = logging.getLogger("flr.serve")

_TRIES = 2
_GRACE_S = 10.0  # beyond the deadline: what was begun before it is answered
_PULSE_S = 2.0
_KEPT = ("content-type", "retry-after", "cache-control", "allow")  # of a replica's headers; the front adds its own


class Unanswered(Exception):
    """No replica answered; the client is told to come again."""


class Forwarded(NamedTuple):
    """A request on its way to a replica; ``spent``: seconds since it came, ``sent``: ``time.time()`` of the front."""

    method: str
    path: str
    query: bytes
    headers: list[tuple[bytes, bytes]]
    body: bytes
    spent: float
    sent: float
    generation: int


class Reply(NamedTuple):
    """A replica's answer, what the log line says of it, and the generation that the replica serves now."""

    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes
    fields: dict[str, Any]
    generation: int


class Reloaded(NamedTuple):
    """What a reload ended with."""

    generation: int
    num_items: int


class Errors(NamedTuple):
    """Classes of exceptions by what they say: the replica is lost; no replica takes the request."""

    lost: tuple[type[BaseException], ...]
    full: tuple[type[BaseException], ...]


class Cluster:
    """Gives requests to replicas. It has what the middleware and the routes of operation ask of an engine.

    Args:
        replicas: a handle of Ray Serve (``ray.serve.handle.DeploymentHandle``) of ``flr.serve.ray.Replica``.
        settings: limits.
        errors: what the handle raises.
    """

    not_ready = "no replica answers"

    def __init__(self, replicas: Any, settings: Settings, errors: Errors) -> None:
        self.replicas, self.settings, self.errors = replicas, settings, errors
        self.metrics = Metrics()
        self.generation = 1
        self._reloading = False
        self.alive = True

    def announce(self, more: int) -> None:
        """The replicas know best what is on its way to them."""

    def check_room(self) -> None:
        """And whether they have room for it."""

    async def answer(self, scope: Any, body: bytes) -> Reply:
        """A replica's answer to a request of the middleware; ``Unanswered`` where none gives one in time."""
        trace: Trace = scope["flr"]
        end = trace.started + self.settings.timeout_ms / 1000 + _GRACE_S
        headers = [(name, value) for name, value in scope["headers"] if name.lower() == b"content-type"]
        headers.append((b"x-request-id", trace.id.encode()))
        for _ in range(_TRIES):
            spent = time.monotonic() - trace.started
            parts = scope["method"], scope["path"], scope["query_string"], headers, body
            asked = Forwarded(*parts, spent, time.time(), self.generation)
            try:
                reply: Reply = await self._ask("answer", asked, end - time.monotonic())
            except self.errors.lost as error:
                self.metrics.lost.inc()
                logger.warning("a replica was lost", extra={"fields": {"event": "lost", "error": _short(error)}})
                continue
            except self.errors.full:
                raise Unanswered("no replica has room; try again in 1 s") from None
            except asyncio.TimeoutError:
                raise Unanswered("no replica answered in time; try again in 1 s") from None
            trace.fields |= reply.fields
            self._follow(reply.generation)
            return reply
        raise Unanswered("the replicas that had this request were lost; try again in 1 s")

    async def _ask(self, method: str, argument: Any, seconds: float) -> Any:
        """One call of one replica, which is told to stop where nobody waits for it any more."""
        response = getattr(self.replicas, method).remote(*([] if argument is None else [argument]))
        try:
            return await asyncio.wait_for(_result(response), max(seconds, 0.001))
        except (asyncio.CancelledError, asyncio.TimeoutError):
            response.cancel()
            raise

    def _follow(self, generation: int) -> None:
        if generation > self.generation:  # another front has asked for it, or this one is new
            self.generation = generation
            self.metrics.generation.set(generation)

    async def ready(self) -> bool:
        """Whether a replica answers."""
        try:
            self._follow(await self._ask("pulse", None, _PULSE_S))
        except self.errors.lost + self.errors.full:
            return False
        except asyncio.TimeoutError:
            return False
        return True

    async def exposition(self) -> bytes:
        """The front's metrics and those of the replicas' engines, told apart by the label ``replica``."""
        parts = await self._everyone("exposition")
        return merged(self.metrics, dict(part for part in parts if not _is_error(part)))

    async def reload(self) -> Reloaded:
        """Have every replica load the model anew, in place, and take over.

        Raises:
            RuntimeError: a reload is under way, no replica is there, or some could not load; those serve on as before.
        """
        if self._reloading:
            raise RuntimeError("a reload is under way")
        self._reloading = True
        started = time.monotonic()
        wanted = self.generation + 1
        try:
            answers = await self._everyone("reload", wanted)
        finally:
            self._reloading = False
        failed = [x for x in answers if _is_error(x) and not isinstance(x, self.errors.lost)]
        done = [x for x in answers if not _is_error(x)]
        if failed or not done:
            self.metrics.reloads.labels("failed").inc()
            why = _short(failed[0]) if failed else "no replica is there"
            told = f"{len(failed)} of {len(answers)} replicas could not: {why}"
            logger.error("reload failed", extra={"fields": {"event": "reload", "error": told}})
            raise RuntimeError(told)
        self._follow(wanted)
        self.metrics.reloads.labels("done").inc()
        seconds = round(time.monotonic() - started, 3)
        told_more = {"event": "reload", "generation": wanted, "replicas": len(done), "seconds": seconds}
        logger.info("reloaded", extra={"fields": told_more})
        return Reloaded(wanted, int(done[0]))

    async def _everyone(self, method: str, *arguments: Any) -> list[Any]:
        """What every replica that is there answers, or raises."""
        try:
            return await self.replicas.broadcast(method, *arguments).results_async(return_exceptions=True)
        except self.errors.full:
            return []


def kept(headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """Those of a replica's headers that the client gets."""
    return [(name, value) for name, value in headers if name.decode("latin-1").lower() in _KEPT]


async def _result(response: Any) -> Any:
    return await response


def _is_error(answer: Any) -> bool:
    return isinstance(answer, BaseException)


def _short(error: BaseException) -> str:
    """The cause in a line: Ray's own errors hold a traceback, the last line of which says what was raised."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__)[:300]
