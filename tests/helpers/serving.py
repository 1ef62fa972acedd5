"""What the tests of the server share: a saved model, the server as a process, and what an answer must be equal to."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flr.recommend.recommender import Recommender
from tests.helpers.models import build_recommender

for _needed in ("fastapi", "uvicorn", "prometheus_client", "httpx"):
    pytest.importorskip(_needed)
import httpx  # noqa: E402

from flr.serve import Settings, create_app  # noqa: E402

TOKEN, ADMIN = "a-token-of-some-length", "an-admin-token-of-some-length"


def save(folder: Path, **options: Any) -> Path:
    """A small model with factors that matter, in ``folder``."""
    recommender = build_recommender(**{"codec": "sid", **options})
    recommender.model.save_pretrained(folder)
    recommender.processor.save_pretrained(folder)
    return folder


def mixed_requests(count: int, items: int = 40, seed: int = 0, **fixed: Any) -> list[dict[str, Any]]:
    """Bodies of /v1/recommend that differ in everything a request may differ in."""
    rng = np.random.default_rng(seed)
    names = [f"item_{i}" for i in range(items)]
    bodies = []
    for _ in range(count):
        body: dict[str, Any] = {
            "history": rng.choice(names, rng.integers(0, 14)).tolist(),
            "k": int(rng.integers(1, 12)),
            "num_beams": int(rng.choice([12, 20])),
            "exclude_seen": bool(rng.random() < 0.5),
            "scoring": str(rng.choice(["full", "catalogue"])),
            "shares": bool(rng.random() < 0.3),
        }
        if rng.random() < 0.4:
            body["deny"] = rng.choice(names, rng.integers(1, 5)).tolist()
        if rng.random() < 0.4:
            body["allow"] = rng.choice(names, rng.integers(1, 30)).tolist()
        if rng.random() < 0.3:
            body["where"] = {"interest": [int(x) for x in rng.integers(0, 4, 2)]}
        bodies.append({**body, **fixed})
    return bodies


def offline(recommender: Recommender, body: dict[str, Any]) -> list[dict[str, Any]]:
    """What the recommender says without a server."""
    arguments = {k: v for k, v in body.items() if k not in ("history", "timeout_ms")}
    return [r.to_dict() for r in recommender.recommend([body["history"]], **{"shares": False, **arguments})[0]]


def assert_same_items(given: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    """Equal items with close numbers, in equal order but for items whose scores are one within rounding."""
    assert len(given) == len(expected)
    known = {item["item_id"]: item for item in expected}
    last = expected[-1]["score"] if expected else 0.0
    for item, other in zip(given, expected, strict=True):
        assert abs(item["score"] - other["score"]) < 5e-5, (item, other)
        twin = known.get(item["item_id"])
        if twin is None:
            assert abs(item["score"] - last) < 5e-5, (item, expected)
            continue
        assert abs(item["score"] - twin["score"]) < 5e-5, (item, twin)
        assert (item["title"], item["index"]) == (twin["title"], twin["index"])
        np.testing.assert_allclose(item["contributions"], twin["contributions"], atol=1e-4)
        np.testing.assert_allclose(item["factor_shares"], twin["factor_shares"], atol=1e-2)


@contextlib.asynccontextmanager
async def in_process(recommender: Recommender, load: Any = None, **settings: Any) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the application in this process; ``client.gate`` is the application."""
    gate = create_app(recommender, Settings(**settings), load)
    transport = httpx.ASGITransport(app=gate, raise_app_exceptions=False)
    async with (
        gate.fastapi.router.lifespan_context(gate.fastapi),
        httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", timeout=60) as client,
    ):
        client.gate = gate
        yield client


class Process:
    """``flr serve`` as a process of its own."""

    def __init__(
        self,
        model: Path,
        log: Path,
        *flags: str,
        environment: dict[str, str] | None = None,
        descriptors: int | None = None,
        seconds: float = 120,
    ) -> None:
        code = "import sys; from flr.cli import main; sys.exit(main())"
        if descriptors is not None:
            code = f"import resource; resource.setrlimit(resource.RLIMIT_NOFILE, 2 * ({descriptors},)); {code}"
        words = ["serve", "--model", str(model), "--port", "0", "--threads", "1", *flags]
        self.log = log
        with log.open("w") as sink:
            self.popen = subprocess.Popen(
                [sys.executable, "-c", code, *words],
                env={**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})},
                stdout=sink,
                stderr=sink,
            )
        deadline = time.monotonic() + seconds
        while not (found := [line for line in self.lines() if line.get("event") == "listening"]):
            if self.popen.poll() is not None or time.monotonic() > deadline:
                self.popen.kill()
                raise RuntimeError(f"the server did not start:\n{log.read_text()[-3000:]}")
            time.sleep(0.05)
        self.url: str = found[0]["url"]
        self.host, port = self.url.removeprefix("http://").rsplit(":", 1)
        self.port = int(port)

    def lines(self) -> list[dict[str, Any]]:
        """The log so far; the last line may still be being written."""
        found = []
        for line in self.log.read_text().splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                found.append(json.loads(line))
        return found

    def signal(self, number: signal.Signals) -> None:
        self.popen.send_signal(number)

    def wait(self, seconds: float = 30) -> int:
        """Its exit status."""
        return self.popen.wait(seconds)


@contextlib.contextmanager
def serving(model: Path, log: Path, *flags: str, **options: Any) -> Iterator[Process]:
    """A running server; it is killed at the end if it still runs."""
    process = Process(model, log, *flags, **options)
    try:
        yield process
    finally:
        process.popen.kill()
        process.popen.wait()


def with_client(recommender, test, load=None, **settings):
    """Run ``test(client)`` against the application."""

    async def run():
        async with in_process(recommender, load, **settings) as client:
            return await test(client)

    return asyncio.run(run())


def metric(client, name, **labels):
    """A number that the application of the client shows under /metrics."""
    return client.gate.metrics.registry.get_sample_value(name, labels)
