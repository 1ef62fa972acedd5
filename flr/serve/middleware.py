"""What every request passes before and after the application: id, host, token, body, headers, log, metrics.

Plain ASGI, so that a body that is too long or too slow is refused before anything parses it.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import logging
import re
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from .engine import QueueFull
from .metrics import Metrics
from .settings import Settings, token_digest

logger = logging.getLogger("flr.serve")

_SANE_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
_DISCARD = 4 << 20  # bytes of a refused body that are read, so that the client gets to see the answer
MAX_HEAD = 32_768  # bytes of path and headers
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_ADMIN = "/v1/reload"
_BATCHED = frozenset({"/v1/recommend", "/v1/explain"})
_CLOSE = {"connection": "close"}
_SECURITY = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
}


@dataclass
class Trace:
    """One request, in ``scope["flr"]``: its id, when it came (``time.monotonic``), and what its log line adds."""

    id: str
    started: float
    fields: dict[str, Any] = field(default_factory=dict)
    announced: bool = False  # the engine waits for it


class Core(Protocol):
    """What stands behind the application: an engine in this process, or a cluster's front."""

    settings: Settings
    metrics: Metrics
    not_ready: str  # why, where :meth:`ready` says no

    @property
    def alive(self) -> bool: ...

    def announce(self, more: int) -> None: ...

    def check_room(self) -> None: ...

    async def ready(self) -> bool: ...

    async def exposition(self) -> bytes: ...

    async def reload(self) -> Load: ...


class Load(Protocol):
    """A model as it was loaded."""

    @property
    def generation(self) -> int: ...

    @property
    def num_items(self) -> int: ...


class Refused(Exception):
    """The request is answered here, without the application."""

    def __init__(self, status: int, error: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(error)
        self.status, self.headers = status, headers


class Gone(Exception):
    """The client closed the connection."""


def problem(error: str, trace: Trace, details: list[dict[str, Any]] | None = None) -> bytes:
    """Body of an answer that is not 200 (schemas.Problem). ASCII, whatever the request held."""
    return json.dumps({"error": error, "details": details or [], "request_id": trace.id}).encode("ascii", "replace")


CoreT = TypeVar("CoreT", bound=Core)


class Middleware(Generic[CoreT]):
    """ASGI middleware.

    Args:
        fastapi: the application.
        engine: that the application asks, or the cluster in its place; its settings hold here too.
        open_paths: those that need no token.
        tokens: digests of the token and of the admin token, None where there is none.

    Attributes:
        paths: the application's, the only ones that metrics and logs name.
        draining: whether the server is about to stop.
    """

    def __init__(
        self, fastapi: Any, engine: CoreT, open_paths: frozenset[str], tokens: tuple[bytes | None, bytes | None]
    ) -> None:
        self.fastapi, self.engine = fastapi, engine
        self.settings, self.metrics = engine.settings, engine.metrics
        self.paths = self.open_paths = open_paths
        self.token, self.admin_token = tokens
        self.hosts = self.settings.hosts
        self.draining = False

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.fastapi(scope, receive, send)
            return
        headers: dict[bytes, list[bytes]] = {}
        for name, value in scope["headers"]:
            headers.setdefault(name.lower(), []).append(value)
        given = headers.get(b"x-request-id", [])
        sane = len(given) == 1 and _SANE_ID.fullmatch(given[0])
        started = time.monotonic() - scope.get("flr_spent", 0.0)  # seconds on the way from a front to a replica
        trace = Trace(given[0].decode("ascii") if sane else uuid.uuid4().hex, started)
        scope["flr"] = trace
        path = scope["path"] if scope["path"] in self.paths else "other"
        batched = path in _BATCHED and scope["method"] == "POST"
        answer = _Answer(send, trace, lambda: self.draining)
        self.metrics.in_flight.inc()
        try:
            try:
                self._check(scope, headers)
                body = await self._body(headers, receive)
                if batched:
                    self._check_room()
                    trace.announced = True
                    self.engine.announce(1)
                await self._run(scope, body, receive, answer)
            except Refused as refused:
                if refused.status == 413 and b"expect" not in headers:
                    await _discard(receive)
                await answer.whole(refused.status, problem(str(refused), trace), refused.headers)
        except Gone:
            answer.status = 499
        except asyncio.CancelledError:  # nobody waits for it, or the time to drain is over
            answer.status = answer.status or 499
            if answer.begun or not self.draining:
                raise
            await answer.whole(503, problem("the server stops; try again in 1 s", trace), {"retry-after": "1"})
        except Exception:
            logger.exception("failed", extra={"fields": {"event": "error", "id": trace.id, "path": path}})
            if not answer.begun:
                await answer.whole(500, problem("internal error", trace))
            answer.status = 500
        finally:
            self.mark_arrived(trace)
            seconds = time.monotonic() - trace.started
            self.metrics.in_flight.dec()
            self.metrics.requests.labels(path, str(answer.status)).inc()
            self.metrics.seconds.labels(path).observe(seconds)
            method = scope["method"] if scope["method"] in _METHODS else "other"
            line = {"event": "request", "id": trace.id, "method": method, "path": path, "status": answer.status}
            logger.info("request", extra={"fields": line | {"ms": round(1000 * seconds, 2)} | trace.fields})

    def mark_arrived(self, trace: Trace) -> None:
        """The request stands in the queue now, or never will."""
        if trace.announced:
            trace.announced = False
            self.engine.announce(-1)

    def _check_room(self) -> None:
        """Raise ``Refused`` where the queue is full, before anything is spent on a request that comes to nothing."""
        try:
            self.engine.check_room()
        except QueueFull as full:
            raise Refused(429, str(full), {"retry-after": str(full.retry_after)}) from None

    def _check(self, scope: Any, headers: dict[bytes, list[bytes]]) -> None:
        """Raise ``Refused`` unless host, token and content type are in order."""
        if scope.get("http_version", "1.1") not in ("1.0", "1.1"):
            raise Refused(400, "expected HTTP/1.0 or HTTP/1.1", _CLOSE)
        lines = sum(len(name) + sum(map(len, values)) for name, values in headers.items())
        if lines + len(scope.get("raw_path", b"")) + len(scope["query_string"]) > MAX_HEAD:
            raise Refused(431, f"expected a request line and headers of at most {MAX_HEAD} bytes", _CLOSE)
        if self.hosts is not None and b"host" in headers:
            host = headers[b"host"][0].decode("latin-1").lower()
            name = host[1 : host.find("]")] if host.startswith("[") else host.rpartition(":")[0] or host
            if len(headers[b"host"]) > 1 or name not in self.hosts:
                raise Refused(421, "this server does not answer for that host")
        if b"content-length" in headers and b"transfer-encoding" in headers:
            raise Refused(400, "expected Content-Length or Transfer-Encoding, got both", _CLOSE)
        wanted = self.token
        if scope["path"] == _ADMIN and scope["method"] == "POST":
            wanted = self.admin_token
            if wanted is None:
                raise Refused(403, "reloading over HTTP is off: no admin token was set; send SIGHUP instead")
        elif scope["path"] in self.open_paths:
            wanted = None
        if wanted is not None and not _bears(headers.get(b"authorization", []), wanted):
            raise Refused(401, "expected a valid bearer token", {"www-authenticate": "Bearer"})
        has_body = b"transfer-encoding" in headers or headers.get(b"content-length", [b"0"])[0].strip(b"0") != b""
        if has_body and scope["method"] == "POST":
            kind = headers.get(b"content-type", [b""])[0].split(b";")[0].strip().lower()
            if kind != b"application/json":
                raise Refused(415, "content-type: expected application/json")

    async def _body(self, headers: dict[bytes, list[bytes]], receive: Any) -> bytes:
        """The whole body; raises ``Refused`` when it is too long or too slow, ``Gone`` when the client is gone."""
        limit = self.settings.max_body_bytes
        too_long = Refused(413, f"body: expected at most {limit} bytes", _CLOSE)
        declared = headers.get(b"content-length", [b"0"])[0]
        if not declared.isdigit() or len(declared) > 18:
            raise Refused(400, "content-length: expected a number", _CLOSE)
        if int(declared) > limit:
            raise too_long
        body = bytearray()
        deadline = time.monotonic() + self.settings.body_timeout_s
        while True:
            try:
                message = await asyncio.wait_for(receive(), max(deadline - time.monotonic(), 0.001))
            except asyncio.TimeoutError:
                raise Refused(408, "the body took too long to arrive", _CLOSE) from None
            if message["type"] == "http.disconnect":
                raise Gone
            body += message.get("body", b"")
            if len(body) > limit:
                raise too_long
            if not message.get("more_body", False):
                return bytes(body)

    async def _run(self, scope: Any, body: bytes, receive: Any, answer: _Answer) -> None:
        """Run the application; it is cancelled when the client leaves, so that nothing is computed for nobody."""
        given = False

        async def replay() -> dict[str, Any]:
            nonlocal given
            if given:
                await asyncio.Event().wait()  # until the application is done or cancelled
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        work = asyncio.ensure_future(self.fastapi(scope, replay, answer))
        leaving = asyncio.ensure_future(_left(receive))
        try:
            await asyncio.wait({work, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done() and not answer.begun:
                raise Gone
            await work
        finally:
            for task in (work, leaving):
                task.cancel()
            await asyncio.wait({work, leaving})


class _Answer:
    """The ``send`` that the application gets: adds headers, remembers the status."""

    def __init__(self, send: Any, trace: Trace, closing: Any) -> None:
        self.send, self.trace, self.closing = send, trace, closing
        self.status, self.begun = 0, False

    async def __call__(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            self.begun, self.status = True, message["status"]
            headers = [*message.get("headers", []), (b"x-request-id", self.trace.id.encode())]
            headers += [(name.encode(), value.encode()) for name, value in _SECURITY.items()]
            if self.closing():  # so that no client sends its next request into a connection that is about to close
                headers = [pair for pair in headers if pair[0].lower() != b"connection"] + [(b"connection", b"close")]
            message = {**message, "headers": headers}
        await self.send(message)

    async def whole(self, status: int, body: bytes, headers: Mapping[str, str] | None = None) -> None:
        pairs = {"content-type": "application/json", "content-length": str(len(body)), **(headers or {})}
        encoded = [(name.encode(), value.encode()) for name, value in pairs.items()]
        await self({"type": "http.response.start", "status": status, "headers": encoded})
        await self({"type": "http.response.body", "body": body})


def _bears(given: list[bytes], wanted: bytes) -> bool:
    """Whether the one Authorization header holds the token, in a time that does not depend on how much is right."""
    scheme, _, token = given[0].partition(b" ") if len(given) == 1 else (b"", b"", b"")
    same = hmac.compare_digest(token_digest(token.strip()), wanted)
    return same and scheme.lower() == b"bearer"


async def _left(receive: Any) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _discard(receive: Any) -> None:
    """Read what is left of a body, within bounds: a close at once would reset the connection before the answer."""
    length = 0
    with contextlib.suppress(asyncio.TimeoutError):
        end = time.monotonic() + 2
        while length < _DISCARD:
            message = await asyncio.wait_for(receive(), max(end - time.monotonic(), 0.001))
            length += len(message.get("body", b""))
            if message["type"] == "http.disconnect" or not message.get("more_body", False):
                return
