"""A server at twice its capacity, with whatever may happen to it: nothing is lost or wrong but what was in flight.

    python -m tests.chaos.server --seconds 60

Requests come at random times, twice as many as the server can answer. Meanwhile 1,000 connections hold a begun head
open and come back when they are closed, beyond the 300 that the server allows; the model's folder is switched to one
with another catalogue and reloaded, then a broken folder is to be reloaded; the process is killed with SIGKILL and
started again on its port. Failures are a status other than 200, 429, 504 and 503 with Retry-After, an answer that
differs from the recommender's own for the generation it names, and a request without an answer that had not been in
flight when the process was killed. Prints one JSON line, and exits with 1 where anything failed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.load import Client, Reply, closed_loop, open_loop
from flr.recommend import Recommender
from tests.helpers.catalogues import named_catalogue
from tests.helpers.serving import ADMIN, Process, assert_same_items, mixed_requests, offline, save, serving

from .figures import keep

FLAGS = ("--max_queue", "24", "--max_batch_size", "8", "--max_connections", "300", "--header_timeout_s", "5")
ENVIRONMENT = {"FLR_SERVE_ADMIN_TOKEN": ADMIN}


class Chaos:
    """One run in a folder of its own."""

    def __init__(self, folder: Path, seconds: float, slow: int) -> None:
        self.folder, self.seconds, self.slow = folder, seconds, slow
        self.models = (
            save(folder / "first"),
            save(folder / "second", catalogue=named_catalogue(60, seed=2)),
        )
        self.pool = mixed_requests(48, k=8, num_beams=20)
        loaded = [Recommender.from_pretrained(model, "cpu") for model in self.models]
        self.answers = [[offline(recommender, body) for body in self.pool] for recommender in loaded]
        self.link = folder / "live"
        self.link.symlink_to(self.models[0])
        self.failures: list[str] = []
        self.statuses: Counter[int] = Counter()
        self.generations: Counter[int] = Counter()
        self.in_flight = self.slow_opened = 0

    def run(self) -> dict[str, Any]:
        """Two servers, one after the other; what came of it."""
        with serving(self.link, self.folder / "log", *FLAGS, environment=ENVIRONMENT) as server:
            asyncio.run(self._until_killed(server))
        first_log = (self.folder / "log").stat().st_size
        start = time.monotonic()
        flags = (*FLAGS, "--port", str(server.port))
        with serving(self.link, self.folder / "again", *flags, environment=ENVIRONMENT) as server:
            restarted = time.monotonic() - start
            asyncio.run(self._load(server, 0.3 * self.seconds, generations={1: 1}))
        return {
            "part": "server", "seconds": self.seconds, "requests": sum(self.statuses.values()),
            "requests_per_second": round(self.rate, 1), "statuses": dict(self.statuses),
            "generations": dict(self.generations), "in_flight_when_killed": self.in_flight,
            "slow_connections": self.slow, "slow_connections_opened": self.slow_opened,
            "restarted_in_seconds": round(restarted, 1), "log_bytes": first_log,
            "failures": len(self.failures), "first_failures": self.failures[:10],
        }  # fmt: skip

    async def _until_killed(self, server: Process) -> None:
        client = Client(server.host, server.port)
        bodies, start = [self.pool[i % len(self.pool)] for i in range(150)], time.perf_counter()
        await closed_loop(client, "/v1/recommend", bodies, 16)
        self.rate = 2 * len(bodies) / (time.perf_counter() - start)
        stop = asyncio.Event()
        slow = [asyncio.create_task(self._slow(server, stop)) for _ in range(self.slow)]
        start, events = time.monotonic(), asyncio.create_task(self._events(client))
        while not events.done() or time.monotonic() - start < 0.7 * self.seconds:
            await self._load(server, max(1.0, self.seconds / 10), generations={1: 0, 2: 1})
        await events
        await self._load(server, 1.5, generations={1: 0, 2: 1}, killed=time.monotonic() + 1)
        stop.set()
        await asyncio.gather(*slow)

    async def _events(self, client: Client) -> None:
        """A reload of another model, and one of a broken folder, however long they take."""
        await asyncio.sleep(0.2 * self.seconds)
        await self._reload(client, self.models[1], 200)
        await asyncio.sleep(0.2 * self.seconds)
        broken = self.folder / "broken"
        broken.mkdir()
        (broken / "config.json").write_text("{")
        await self._reload(client, broken, 409)
        self._switch(self.models[1])

    async def _reload(self, client: Client, model: Path, expected: int) -> None:
        self._switch(model)
        reply = await client.request("POST", "/v1/reload", headers={"authorization": f"Bearer {ADMIN}"})
        if reply.status != expected:
            self.failures.append(f"reload of {model.name}: expected {expected}, got {reply.status}")

    def _switch(self, model: Path) -> None:
        new = self.folder / "new"
        new.symlink_to(model)
        new.replace(self.link)

    async def _slow(self, server: Process, stop: asyncio.Event) -> None:
        """A client that begins a request and never ends it, again and again; all of them begin at once."""
        while not stop.is_set():
            with contextlib.suppress(OSError, asyncio.TimeoutError):
                reader, writer = await asyncio.open_connection(server.host, server.port)
                self.slow_opened += 1
                writer.write(b"POST /v1/recommend HTTP/1.1\r\n")
                await asyncio.wait_for(reader.read(), 10)
                writer.close()
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(stop.wait(), 1)

    async def _load(
        self, server: Process, seconds: float, generations: dict[int, int], killed: float | None = None
    ) -> None:
        """Requests for ``seconds``; every fourth has little time. The server is killed at ``killed``."""
        sent: dict[int, float] = {}

        def body(number: int) -> dict[str, Any]:
            sent[number] = time.monotonic()
            return self.pool[number % len(self.pool)] | ({"timeout_ms": 60} if number % 4 == 0 else {})

        client = Client(server.host, server.port)
        if killed is not None:
            loop = asyncio.get_running_loop()
            loop.call_later(killed - time.monotonic(), server.signal, signal.SIGKILL)
        replies = await open_loop(client, "/v1/recommend", body, self.rate, seconds)
        client.close()
        for reply in replies:
            if reply.status == 0 and killed is not None and sent[reply.number] + reply.seconds >= killed - 0.05:
                self.in_flight += sent[reply.number] < killed
                continue
            self.statuses[reply.status] += 1
            if problem := _problem(reply, lambda g, n: self.answers[generations[g]][n % len(self.pool)]):
                self.failures.append(f"request {reply.number}: {problem}")
            elif reply.status == 200:
                self.generations[reply.json()["generation"]] += 1


def _problem(reply: Reply, expected: Callable[[int, int], list[dict[str, Any]]]) -> str | None:
    """What is wrong with a reply."""
    if reply.status == 200:
        content = reply.json()
        try:
            assert_same_items(content["items"], expected(content["generation"], reply.number))
        except (AssertionError, KeyError) as error:
            return f"another answer than the recommender's: {error!r}"[:300]
        return None
    if reply.status in (429, 503) and reply.headers.get("retry-after", "").isdigit():
        return None
    return None if reply.status == 504 else f"status {reply.status}, {reply.body[:200]!r}"


def run(seconds: float, slow: int = 1000) -> dict[str, Any]:
    """One run of so many seconds under load."""
    with tempfile.TemporaryDirectory() as folder:
        return Chaos(Path(folder), seconds, slow).run()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--json", type=Path, help="file to which the figures are added")
    options = parser.parse_args(argv)
    figures = run(options.seconds)
    print(json.dumps(figures))
    keep(options.json, {figures.pop("part"): figures})
    return 1 if figures["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
