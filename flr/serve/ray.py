"""The server on Ray Serve: replicas of the model, and a front that answers HTTP.

    flr serve --model runs/books --ray auto --replicas 4        # this process is the front
    serve run flr.serve.ray:build model=runs/books replicas=4   # the front is a deployment, behind Ray's proxies

What travels is the model's folder or its name on the Hub, which every node must reach under the same name; a replica
reads it there. Needs ``pip install "flr[serve,ray]"``.
"""

from __future__ import annotations

import asyncio
import dataclasses
import fcntl
import logging
import os
import tempfile
import time
from pathlib import Path
from typing import Any

# A replica that computes tells its length of queue late, and one that has not told gets no requests. Ray Serve reads
# this when it is imported; its own value is 0.1 s.
_PATIENCE = {"RAY_SERVE_QUEUE_LENGTH_RESPONSE_DEADLINE_S": "1"}
for _name, _value in _PATIENCE.items():
    os.environ.setdefault(_name, _value)

import pydantic
import ray
import torch
from ray import serve
from ray.exceptions import RayActorError, RayError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from flr.recommend import Recommender

from .app import create_app, create_front, load
from .cluster import Cluster, Errors, Forwarded, Reply
from .memory import freeze
from .middleware import Middleware
from .scaling import Scaling
from .settings import Settings

ERRORS = Errors((RayActorError,), (BackPressureError, DeploymentUnavailableError))
_REPLICA, _FRONT = "Replica", "Front"
_START_S = 300.0
#: Settings about connections: where the front is a deployment, these are Ray's proxies'.
_OF_CONNECTIONS = (
    *("host", "port", "header_timeout_s", "write_timeout_s", "keep_alive_s", "max_connections"),
    *("drain_delay_s", "drain_timeout_s"),
)


class Replica:
    """One load of the model on the cluster: the application of a server of one process, without sockets and tokens."""

    async def __init__(self, settings: Settings) -> None:  # type: ignore[misc]
        torch.set_num_threads(settings.threads or 1)
        behind: dict[str, Any] = {"host": "0.0.0.0", "allowed_hosts": [], "token_file": None, "admin_token_file": None}
        self.settings = dataclasses.replace(settings, **behind)
        self._stamp = _stamp(settings.model)
        served = await asyncio.to_thread(load, self.settings)
        self.gate = create_app(served, self.settings, self._again, tokens=(None, None))
        freeze()  # as a server of one process does
        self.gate.engine.start()
        self._tried = 1
        self._loading = asyncio.Lock()
        self._tasks: set[asyncio.Task[Any]] = set()

    def _again(self) -> Recommender:
        self._stamp = _stamp(self.settings.model)  # before reading: a change meanwhile is seen as one
        return load(self.settings, self.gate.engine.model.recommender)

    async def answer(self, request: Forwarded) -> Reply:
        """What the application answers; the deadline counts from when the request came to the front."""
        self._follow(request.generation)
        scope: dict[str, Any] = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "scheme": "http",
            "method": request.method,
            "path": request.path,
            "raw_path": request.path.encode(),
            "query_string": request.query,
            "headers": request.headers,
            "root_path": "",
            # the way here counts, as far as the two clocks agree that it took any time
            "flr_spent": request.spent + max(0.0, time.time() - request.sent),
        }
        status, body = 500, b""
        headers: list[tuple[bytes, bytes]] = []
        unread = [{"type": "http.request", "body": request.body, "more_body": False}]

        async def receive() -> dict[str, Any]:
            if unread:
                return unread.pop()
            return await asyncio.Event().wait()  # type: ignore[return-value]  # the front cancels this call instead

        async def send(message: dict[str, Any]) -> None:
            nonlocal status, headers, body
            if message["type"] == "http.response.start":
                status, headers = message["status"], [(bytes(k), bytes(v)) for k, v in message["headers"]]
            else:
                body += message.get("body", b"")

        await self.gate(scope, receive, send)
        return Reply(status, headers, body, scope["flr"].fields, self.gate.engine.model.generation)

    def _follow(self, generation: int) -> None:
        """Come up to a generation that the front knows of and this replica was not asked for."""
        engine = self.gate.engine
        if generation <= engine.model.generation:
            return
        if self._stamp is not None and self._stamp == _stamp(self.settings.model):
            engine.relabel(generation)
        elif generation > self._tried:
            task = asyncio.get_running_loop().create_task(self._catch_up(generation))
            self._tasks.add(task)  # the loop itself holds tasks weakly
            task.add_done_callback(self._tasks.discard)

    async def _catch_up(self, generation: int) -> None:
        try:
            await self.reload(generation)
        except Exception:  # logged where it happened; the old model serves on, under its own generation
            return

    async def reload(self, generation: int) -> int:
        """Load the model anew, after the other replicas of this machine; how many items it has.

        A replica that has this generation already answers at once.
        """
        self._tried = max(self._tried, generation)
        async with self._loading:
            if self.gate.engine.model.generation < generation:
                turn = await asyncio.to_thread(_take_turn)
                try:
                    await self.gate.engine.reload(generation)
                finally:
                    os.close(turn)  # which unlocks it
        return self.gate.engine.model.num_items

    async def pulse(self) -> int:
        """Its generation."""
        return self.gate.engine.model.generation

    async def exposition(self) -> tuple[str, str]:
        """Its name and its metrics."""
        return serve.get_replica_context().replica_id.unique_id, (await self.gate.engine.exposition()).decode()

    def check_health(self) -> None:
        """Ray Serve starts another replica in the place of one that raises here."""
        if not self.gate.engine.alive:
            raise RuntimeError("the engine has stopped")


class Front:
    """The deployment that answers HTTP behind Ray's proxies; the application itself is made where it runs."""

    def __init__(self, replicas: Any) -> None:
        self.replicas = replicas


def _take_turn() -> int:
    """Wait until no other replica of this machine and user loads; a descriptor to close afterwards."""
    descriptor = os.open(Path(tempfile.gettempdir()) / f"flr-reload-{os.getuid()}.lock", os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    return descriptor


def _stamp(model: str) -> tuple[Any, ...] | None:
    """What tells whether a folder is still what was read: names, sizes and times of its files. None: not a folder."""
    folder = Path(model)
    if not folder.is_dir():
        return None
    whole = folder.resolve()
    entries = sorted((entry.name, entry.stat()) for entry in os.scandir(whole) if entry.is_file())
    return whole, *((name, one.st_ino, one.st_size, one.st_mtime_ns) for name, one in entries)


def replicas(settings: Settings, scaling: Scaling) -> serve.Application:
    """The application of the replicas alone, for a front elsewhere."""
    return serve.deployment(name=_REPLICA, **scaling.options(settings))(Replica).bind(settings)


def build(args: dict[str, Any]) -> serve.Application:
    """The whole server as an application of Ray Serve: ``serve run flr.serve.ray:build model=FOLDER replicas=2``.

    Args:
        args: options of ``flr serve`` by name, as text or values, but for those about connections, which are Ray's
            proxies' here, and ``ray``; ``fronts``: how many deployments answer HTTP (1). Tokens come from
            files or from the environment of the cluster's nodes.

    Raises:
        ValueError: an option that there is not, or a value out of range.

    Example:
        >>> import pytest; _ = pytest.importorskip("ray.serve")
        >>> build({"model": "runs/books", "replicas": "two"})
        Traceback (most recent call last):
            ...
        ValueError: replicas: expected Input should be a valid integer, unable to parse string as an integer, got 'two'
    """
    own = {field.name for field in dataclasses.fields(Settings)} - set(_OF_CONNECTIONS)
    of_scaling = {field.name for field in dataclasses.fields(Scaling)} - {"ray", "app"}
    for name in args:
        if name not in own | of_scaling | {"fronts"}:
            more = "; connections are Ray's proxies'" if name in _OF_CONNECTIONS else ""
            raise ValueError(f"args: expected options of flr serve or fronts, got {name!r}{more}")
    given = {name: value for name, value in args.items() if name in own}
    settings = _typed(Settings, {"host": "0.0.0.0", **given})
    scaling = _typed(Scaling, {"ray": "auto", **{name: args[name] for name in args if name in of_scaling}})
    fronts = pydantic.TypeAdapter(int).validate_python(args.get("fronts", 1))
    if not 1 <= fronts <= 1000:
        raise ValueError(f"fronts: expected 1 to 1000, got {fronts}")

    def door() -> Middleware[Cluster]:
        return create_front(Cluster(serve.get_deployment_handle(_REPLICA), settings, ERRORS))

    most = 100 * (settings.max_queue + settings.max_batch_size)
    options: dict[str, Any] = {"num_replicas": fronts, "max_ongoing_requests": most}
    # it waits, mostly
    options["ray_actor_options"] = {"num_cpus": 0, "runtime_env": {"env_vars": _PATIENCE}}
    front = serve.deployment(name=_FRONT, **options)(serve.ingress(door)(Front))
    return front.bind(replicas(settings, scaling))


def _typed(kind: type, values: dict[str, Any]) -> Any:
    """A dataclass from values that may be text, as those of a command line."""
    try:
        return pydantic.TypeAdapter(kind).validate_python(values)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        if first["type"] == "value_error":
            raise ValueError(str(first["ctx"]["error"])) from None
        raise ValueError(f"{first['loc'][0]}: expected {first['msg']}, got {first['input']!r:.80}") from None


class Deployed:
    """Replicas on a cluster, for as long as the front of this process runs.

    Args:
        settings, scaling: as ``flr serve`` takes them.

    Raises:
        ConnectionError: no cluster at that address.
        RuntimeError: the replicas do not start; Ray's status says why.
    """

    def __init__(self, settings: Settings, scaling: Scaling) -> None:
        self.started = not ray.is_initialized()
        if self.started:
            ray.init(address=scaling.ray, log_to_driver=False, logging_level="ERROR")
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        serve.start(proxy_location="Disabled")
        self.name = scaling.app
        # the folder as the front sees it: a replica's working directory is another
        folder = Path(settings.model)
        named = dataclasses.replace(settings, model=str(folder.absolute())) if folder.is_dir() else settings
        try:
            handle = serve.run(replicas(named, scaling), name=self.name, route_prefix=None)
            handle.pulse.remote().result(timeout_s=_START_S)  # else the first requests wait until the router knows them
        except Exception as error:
            told = _why(self.name) or f"{type(error).__name__}: {error}"
            self.close()
            raise RuntimeError(f"model: expected replicas that start, got {told:.1000}") from None
        self.front = create_front(Cluster(handle, settings, ERRORS))

    def close(self) -> None:
        """Take the replicas away."""
        try:
            serve.delete(self.name)
        except (RayError, TimeoutError):  # the cluster has gone first
            return
        finally:
            if self.started:
                ray.shutdown()


def _why(name: str) -> str:
    """What Ray's status says of replicas that do not start."""
    app = serve.status().applications.get(name)
    found = [] if app is None else [one.message for one in app.deployments.values()]
    lines = [line.strip() for line in "\n".join(found).splitlines() if line.strip()]
    errors = [line for line in lines if "Error: " in line]
    return (errors or lines or [""])[-1]
