"""Running the application under uvicorn: socket, signals, draining, logs."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import logging
import signal
import socket
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
import transformers
import uvicorn

from flr.recommend import Recommender

from .app import create_app, load
from .connections import ACCEPTED_AT_ONCE, Connection, Connections, connection_limit
from .memory import freeze
from .middleware import Middleware
from .scaling import Scaling
from .settings import Settings

logger = logging.getLogger("flr.serve")

_BACKLOG = 1024  # connections that the system completes before they are taken up


class JsonLines(logging.Formatter):
    """One JSON object a line: time, level, logger, message, and the record's ``fields``."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
        }
        fields = getattr(record, "fields", None)
        line |= {"message": record.getMessage()} if fields is None else fields
        if skipped := getattr(record, "skipped", 0):
            line["skipped"] = skipped
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class Seldom(logging.Filter):
    """Lets pass, of the warnings and errors that one place in the code writes, ``burst`` in ``seconds``.

    The next one that passes says how many did not (``skipped``): whatever goes wrong a thousand times a second, the
    log grows slowly.
    """

    def __init__(self, burst: int = 5, seconds: float = 10.0) -> None:
        super().__init__()
        self.burst, self.seconds = burst, seconds
        self._seen: dict[tuple[str, int], tuple[float, int, int]] = {}  # begin of the interval, passed, skipped

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno < logging.WARNING:
            return True
        place, now = (record.pathname, record.lineno), time.monotonic()
        begin, passed, skipped = self._seen.get(place, (now, 0, 0))
        if now - begin >= self.seconds:
            begin, passed = now, 0
        if passed >= self.burst:
            self._seen[place] = begin, passed, skipped + 1
            return False
        record.skipped = skipped
        self._seen[place] = begin, passed + 1, 0
        return True


class Server(uvicorn.Server):
    """uvicorn's, with a drain before it stops listening, an exit status of 0 after it, and SIGHUP."""

    def __init__(
        self, config: uvicorn.Config, app: Middleware[Any], settings: Settings, address: str, connections: Connections
    ) -> None:
        super().__init__(config)
        self.app, self.settings, self.address, self.connections = app, settings, address, connections
        self._reloads: set[asyncio.Task[None]] = set()
        self.loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.loop = asyncio.get_running_loop()
        self.loop.set_exception_handler(self.connections.on_error)
        for bound in sockets or ():
            bound.listen(_BACKLOG)  # uvicorn's is how many are taken up at a time, too
        if hasattr(signal, "SIGHUP"):
            self.loop.add_signal_handler(signal.SIGHUP, self._hang_up)
        logger.info("listening", extra={"fields": {"event": "listening", "url": self.address}})

    def handle_exit(self, sig: int, frame: Any) -> None:
        """First SIGTERM: drain, then stop. Ctrl-C or a second signal: stop listening at once; a third Ctrl-C: leave."""
        if sig == signal.SIGTERM and not self.app.draining and self.loop is not None:
            self.app.draining = True
            logger.info("draining", extra={"fields": {"event": "draining", "seconds": self.settings.drain_delay_s}})
            self.loop.call_soon_threadsafe(self.loop.call_later, self.settings.drain_delay_s, self._stop)
            return
        self.app.draining = True
        self.force_exit = self.should_exit and sig == signal.SIGINT
        self.should_exit = True

    def _stop(self) -> None:
        self.should_exit = True

    def _hang_up(self) -> None:
        task = asyncio.get_running_loop().create_task(self._reload())
        self._reloads.add(task)  # the loop itself holds tasks weakly
        task.add_done_callback(self._reloads.discard)

    async def _reload(self) -> None:
        try:
            await self.app.engine.reload()
        except RuntimeError as error:
            logger.warning("not reloaded", extra={"fields": {"event": "reload", "error": str(error)}})
        except Exception:  # logged where it happened; the old model serves on
            return


def bind(host: str, port: int) -> socket.socket:
    """A listening address; OSError where it is taken.

    Who connects before requests are taken up waits for it: two sockets may be bound to an address until one listens, so
    a second server would load its model before it learned that the address is taken.
    """
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    # with the protocol, asyncio knows it for TCP and turns Nagle's algorithm off: 40 ms a request on a kept connection
    bound = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        bound.listen(_BACKLOG)
    except OSError as error:
        bound.close()
        raise OSError(f"cannot bind to {host}:{port}: {error.strerror}") from None
    return bound


def run(settings: Settings, scaling: Scaling | None = None) -> int:
    """Serve until SIGTERM or Ctrl-C; the exit status.

    Args:
        settings: what, where, within which limits.
        scaling: replicas on a cluster that run the model; None, or no address in it: this process does.

    Raises:
        ValueError, OSError: the address is taken, the model cannot be loaded, a token is too short.
        ModuleNotFoundError: Ray Serve is not installed: ``pip install "flr[ray]"``.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    handler.addFilter(Seldom())
    logging.basicConfig(handlers=[handler], level=logging.INFO, force=True)
    transformers.utils.logging.disable_progress_bar()  # a log of JSON lines
    for loud in ("uvicorn", "httpx", "ray"):
        logging.getLogger(loud).setLevel(logging.WARNING)
    token, _ = settings.tokens()
    bound = bind(settings.host, settings.port)
    with bound:
        host, port = bound.getsockname()[:2]
        address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        if token is None and not settings.loopback:
            message = "anybody who reaches this address may use it: set a token"
            logger.warning("open", extra={"fields": {"event": "open", "url": address, "message": message}})
        with _application(settings, scaling) as app:
            freeze()
            connections = Connections(_limit(settings.max_connections), settings, app.metrics)
            server = Server(_config(app, settings, connections), app, settings, address, connections)
            server.run(sockets=[bound])
    logger.info("stopped", extra={"fields": {"event": "stopped"}})
    return 0 if server.started else 1


@contextlib.contextmanager
def _application(settings: Settings, scaling: Scaling | None) -> Iterator[Middleware[Any]]:
    """Over the model in this process, or over replicas that are taken away at the end."""
    if scaling is not None and scaling.ray is not None:
        from .ray import Deployed

        deployed = Deployed(settings, scaling)
        try:
            yield deployed.front
        finally:
            deployed.close()
        return
    if settings.threads:
        torch.set_num_threads(settings.threads)

    def again() -> Recommender:
        return load(settings, app.engine.model.recommender)

    app = create_app(load(settings), settings, again)
    yield app


def _limit(wanted: int) -> int:
    limit = connection_limit(wanted)
    if limit < wanted:
        told = {"event": "limit", "message": f"max_connections: descriptors suffice for {limit} of {wanted}"}
        logger.warning("fewer connections", extra={"fields": told})
    return limit


def _config(app: Middleware[Any], settings: Settings, connections: Connections) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=functools.partial(Connection, shared=connections),  # type: ignore[arg-type]
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        backlog=ACCEPTED_AT_ONCE,
        timeout_keep_alive=settings.keep_alive_s,
        timeout_graceful_shutdown=settings.drain_timeout_s,
    )
