"""Connections: how long a client may take over its part, how many may be open, and what becomes of one too many.

uvicorn ends a connection that is idle between two requests, and no other. Here every state in which the server waits
for a client has a deadline, counted from its begin, so that a byte now and then does not prolong it:

    head      the first request, or one that has begun: ``header_timeout_s``, then 408, or nothing where nothing came
    idle      between two requests: ``keep_alive_s`` (uvicorn's own)
    body      of a request that is not answered yet: ``body_timeout_s``, then 408 (in the middleware)
    rest      of a body that was refused before it was read: ``body_timeout_s``
    busy      the application works: ``timeout_ms`` (in the engine)
    closing   the last answer is sent, and what still comes is thrown away: ``LINGER_S`` or ``write_timeout_s``

and an answer that is not read ends its connection after ``write_timeout_s`` without progress. A connection beyond the
limit takes the place of the one that has waited for its client longest, which is answered 503 where it may still send
a request: it may be a client that was slow for a moment. Where all are busy, the new one is answered 503.

A client that closes its sending side after a request gets the answer. Closing the whole connection looks the same, so
such a client is sent an interim ``100 Continue``: the system of one that has left refuses it, and the request is
dropped.
"""

from __future__ import annotations

import asyncio
import enum
import errno
import logging
import os
import socket
import time
import uuid
from collections import Counter
from collections.abc import Mapping
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from .metrics import Metrics
from .middleware import MAX_HEAD, Trace, problem
from .settings import Settings

logger = logging.getLogger("flr.serve")

#: Seconds in which a client that was refused may read the answer; and between two log lines about connections.
LINGER_S, REPORT_S = 2.0, 10.0
#: Connections that are taken up at a time, so that those which make room for them are closed in between.
ACCEPTED_AT_ONCE = 16
_CLOSING = 32  # connections at a time that may be closed slowly, beside those of the limit
_SPARE = 64 + _CLOSING  # descriptors for files of a model that is reloaded, and for connections that are being closed
_IN_USE, _RETRY = "all connections are in use; try again in 1 s", {"retry-after": "1"}
_PROBE_S = 0.1
_STARVED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


class State(enum.Enum):
    """What a connection waits for."""

    HEAD = "head"
    IDLE = "idle"
    BODY = "body"
    REST = "rest"
    BUSY = "busy"
    CLOSING = "closing"


class Connections:
    """All connections of a server.

    Args:
        limit: how many may be open.
        settings: deadlines.
        metrics: where to count.
    """

    def __init__(self, limit: int, settings: Settings, metrics: Metrics) -> None:
        self.limit, self.settings, self.metrics = limit, settings, metrics
        self._open: set[Connection] = set()
        self._waiting: dict[Connection, None] = {}  # of these, for their clients, longest first
        self._closing: dict[Connection, None] = {}  # beside these
        self._ended: Counter[str] = Counter()

    def opened(self, connection: Connection) -> bool:
        """Whether there is room for it, or the connection that has waited longest could make room."""
        self._open.add(connection)
        room = len(self._open) <= self.limit or self._make_room()
        self.metrics.connections.set(len(self._open))
        return room

    def closed(self, connection: Connection) -> None:
        """It is open no longer."""
        self._open.discard(connection)
        self._waiting.pop(connection, None)
        self._closing.pop(connection, None)
        self.metrics.connections.set(len(self._open))

    def mark(self, connection: Connection, state: State) -> None:
        """It is in this state from now on."""
        self._waiting.pop(connection, None)
        if state is State.CLOSING:
            self.closed(connection)
            self._closing[connection] = None
            if len(self._closing) > _CLOSING:
                next(iter(self._closing)).transport.abort()
        elif state is not State.BUSY:
            self._waiting[connection] = None

    def ended(self, reason: str) -> None:
        """Count a connection that the server ended, and have a log line tell of it, one for many."""
        self.metrics.ended.labels(reason).inc()
        if not self._ended:
            asyncio.get_running_loop().call_later(REPORT_S, self._report)
        self._ended[reason] += 1

    def on_error(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """The event loop's handler of exceptions: without descriptors for the next connection, one makes room."""
        error = context.get("exception")
        if "socket" in context and isinstance(error, OSError) and error.errno in _STARVED:
            self.ended("starved")
            if longest := next(iter(self._waiting), None):  # without a farewell: its descriptor is needed now
                longest.transport.abort()
                self.closed(longest)
        else:
            loop.default_exception_handler(context)

    def _make_room(self) -> bool:
        longest = next(iter(self._waiting), None)
        if longest is None:
            return False
        longest.make_room()
        return True

    def _report(self) -> None:
        told = {"event": "connections", "ended": dict(self._ended), "seconds": REPORT_S, "open": len(self._open)}
        self._ended.clear()
        logger.warning("connections were ended", extra={"fields": told})


class _Joined(h11.Connection):
    """h11's, which gives the head of an answer together with what follows it: one system call, one packet."""

    _head = b""

    def send(self, event: Any) -> bytes | None:  # type: ignore[override]
        output = super().send(event)
        if isinstance(event, h11.Response):
            self._head, output = output or b"", b""
        elif self._head and output is not None:
            self._head, output = b"", self._head + output
        return output


class Connection(H11Protocol):
    """uvicorn's protocol with a deadline in every state. Args: as uvicorn's, and ``shared``, all connections."""

    def __init__(self, *args: Any, shared: Connections, **options: Any) -> None:
        super().__init__(*args, **options)
        self.conn = _Joined(h11.SERVER, MAX_HEAD)
        self.shared = shared
        self._state: State | None = None
        self._half_closed = False
        self._deadline: asyncio.TimerHandle | None = None
        self._reading: asyncio.TimerHandle | None = None  # until when the client must have read of its answer
        self._probe: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if self.shared.opened(self):
            self._watch()
        else:
            self._refuse("refused", 503, _IN_USE, _RETRY)

    def make_room(self) -> None:
        """End it for another connection, with an answer where the client may still wait for one."""
        if self._state in (State.HEAD, State.BODY):
            self._refuse("crowded", 503, _IN_USE, _RETRY)
        else:
            self._abort("crowded")
            self.shared.closed(self)

    def data_received(self, data: bytes) -> None:
        if self._state is not State.CLOSING:
            super().data_received(data)
            self._watch()

    def eof_received(self) -> bool:  # type: ignore[override]
        """True, which keeps the connection open, where a whole request is not answered yet."""
        if self._state is not State.BUSY:
            return False
        if not self._half_closed and self.scope["http_version"] == "1.1" and self.conn.our_state is h11.SEND_RESPONSE:
            interim = h11.InformationalResponse(status_code=100, headers=[], reason=b"Continue")
            self.transport.write(self.conn.send(interim) or b"")
            self._look_for_client()
        self._half_closed = True
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self.shared.closed(self)
        self._state = State.CLOSING
        for timer in (self._deadline, self._reading, self._probe, self.timeout_keep_alive_task):
            if timer is not None:
                timer.cancel()

    def on_response_complete(self) -> None:
        super().on_response_complete()  # which begins the next request where the client has sent one already
        if self._half_closed and self.cycle.response_complete:
            self.transport.close()
        self._watch()

    def timeout_keep_alive_handler(self) -> None:
        if self._state is not State.CLOSING:
            super().timeout_keep_alive_handler()
            self._watch()

    def shutdown(self) -> None:
        if self._state is State.CLOSING:
            self.transport.abort()
            return
        super().shutdown()
        self._watch()

    def send_400_response(self, msg: str) -> None:
        self._refuse("invalid", 400, msg)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._reading = self.loop.call_later(self.shared.settings.write_timeout_s, self._abort, "unread")

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._reading is not None:
            self._reading.cancel()

    def _now(self) -> State:
        if self._state is State.CLOSING or self.transport.is_closing():
            return State.CLOSING
        if self.cycle is not None and not self.cycle.response_complete:
            return State.BODY if self.cycle.more_body else State.BUSY
        if self.conn.their_state is not h11.IDLE:
            return State.REST
        return State.HEAD if self.cycle is None or self.conn.trailing_data[0] else State.IDLE

    def _watch(self) -> None:
        """See which state the connection is in."""
        state, settings = self._now(), self.shared.settings
        if state is not self._state:
            seconds = {
                State.HEAD: settings.header_timeout_s,
                State.REST: settings.body_timeout_s,
                State.CLOSING: settings.write_timeout_s,
            }
            self._enter(state, seconds.get(state))

    def _enter(self, state: State, seconds: float | None) -> None:
        self._state = state
        self.shared.mark(self, state)
        if self._deadline is not None:
            self._deadline.cancel()
        self._deadline = None if seconds is None else self.loop.call_later(seconds, self._late, state)

    def _late(self, state: State) -> None:
        if state is State.HEAD and self.conn.trailing_data[0]:
            self._refuse("head", 408, "the request's head took too long to arrive")
        elif state is State.CLOSING:
            self.transport.abort()
        else:
            self._abort(state.value)

    def _abort(self, reason: str) -> None:
        self.shared.ended(reason)
        self.transport.abort()

    def _refuse(self, reason: str, status: int, error: str, more: Mapping[str, str] | None = None) -> None:
        """Answer here, without the application, and close once the client could read it."""
        self.shared.ended(reason)
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):  # an answer has begun
            self.transport.close()
            self._watch()
            return
        trace = Trace(uuid.uuid4().hex, time.monotonic())
        body = problem(error, trace)
        headers = {"content-type": "application/json", "content-length": str(len(body)), "connection": "close"}
        pairs = [*headers.items(), ("x-request-id", trace.id), *(more or {}).items()]
        for event in (h11.Response(status_code=status, headers=pairs), h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.write_eof()
        self.shared.metrics.requests.labels("other", str(status)).inc()
        self.transport.resume_reading()  # to see the client go
        self._enter(State.CLOSING, LINGER_S)

    def _look_for_client(self) -> None:
        """Drop the request if the interim answer came back refused; look again until it is answered."""
        if self._state is not State.BUSY:
            return
        if self.transport.get_extra_info("socket").getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self.transport.abort()
        else:
            self._probe = self.loop.call_later(_PROBE_S, self._look_for_client)


def connection_limit(wanted: int) -> int:
    """How many of ``wanted`` connections the process has descriptors for, 1 at least.

    The soft limit on descriptors is raised as far as they need it and the hard one allows.
    """
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return wanted
    try:
        spare = len(os.listdir("/dev/fd")) + _SPARE
    except OSError:
        spare = 2 * _SPARE
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return wanted
    if soft < wanted + spare:
        goal = wanted + spare if hard == resource.RLIM_INFINITY else min(wanted + spare, hard)
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (goal, hard))
            soft = goal
        except (OSError, ValueError):
            logger.warning("the limit on descriptors stays", extra={"fields": {"event": "limit", "descriptors": soft}})
    return max(1, min(wanted, soft - spare))
