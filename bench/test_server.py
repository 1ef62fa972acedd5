"""The server over loopback: micro-batching (``flr``) against batch-of-one serving, the same requests, model and limits.

Both are ``flr serve`` processes of one saved model with one model thread; ``single`` has ``--max_batch_size 1
--max_wait_ms 0``. The one that is not asked idles. A call of the race is a closed loop: N requests, `c` at a time,
different histories of titles, k = 10, 20 beams. Before anything is timed, every answer of both servers is compared with
the recommender's own.

``test_latency`` sends at random times of fixed rates instead, in parts of what ``single`` can do, and prints
percentiles; it asserts nothing about them.
"""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

import flr
from flr.data import RecProcessor, build_tokenizer, planted_dataset
from flr.recommend import Recommender

from .harness import START_SECONDS, label
from .load import Client, Reply, closed_loop, open_loop
from .machine import DEVICE, ON_GPU

SERVERS = {"flr": [], "single": ["--max_batch_size", "1", "--max_wait_ms", "0"]}
K, BEAMS = 10, 20


def shape_of(size: int, layers: int, items: int, requests: int, concurrency: int) -> dict[str, Any]:
    return {"D": size, "layers": layers, "C": items, "requests": requests, "c": concurrency}


QUICK = [shape_of(64, 2, 300, 24, 8)]
DEFAULT = [shape_of(256, 4, 5000, 96, 32)]
FULL = [shape_of(512, 8, 5000, 64, 32)]
GPU = [shape_of(1536, 28, 10_000, 128, 64)]


def save(folder: Path, shape: dict[str, Any]) -> list[dict[str, Any]]:
    """A Qwen2 of random weights with a reasoner, in ``folder``; returns the bodies of the requests."""
    torch.manual_seed(0)
    catalogue = planted_dataset(num_items=shape["C"], num_users=10).catalogue
    tokenizer = build_tokenizer(catalogue, "title", vocab_size=4096)
    config = flr.FLRConfig(num_factors=4)
    processor = RecProcessor(tokenizer, catalogue, "title", max_history=20, num_thoughts=config.thought_count)
    heads = max(shape["D"] // 64, 2)
    with DEVICE:  # random numbers for 10⁹ weights take the host a minute
        model = Qwen2ForCausalLM(
            Qwen2Config(
                vocab_size=len(tokenizer),
                hidden_size=shape["D"],
                intermediate_size=3 * shape["D"],
                num_hidden_layers=shape["layers"],
                num_attention_heads=heads,
                num_key_value_heads=max(heads // 4, 1),
                tie_word_embeddings=True,
            )
        )
    flr.patch_model(model, tokenizer, config)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    rng = np.random.default_rng(1)
    histories = rng.integers(0, shape["C"], (shape["requests"], 20))
    shape["L"] = int(np.median([len(processor([history])["input_ids"][0]) for history in histories[:20]]))
    names = catalogue.item_ids
    return [{"history": [names[i] for i in row], "k": K, "num_beams": BEAMS} for row in histories]


def start(folder: Path, log: Path, flags: list[str]) -> tuple[subprocess.Popen, Client]:
    code = "import sys; from flr.cli import main; sys.exit(main())"
    words = [
        "serve",
        "--model",
        str(folder),
        "--port",
        "0",
        "--threads",
        "1",
        "--device",
        DEVICE.type,
        "--max_queue",
        "4096",
    ]
    words += ["--timeout_ms", "600000"]
    with log.open("w") as sink:
        process = subprocess.Popen(
            [sys.executable, "-c", code, *words, *flags],
            stdout=sink,
            stderr=sink,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    end = time.monotonic() + START_SECONDS
    while not (found := re.search(r'"url": "http://([\d.]+):(\d+)"', log.read_text())):
        if process.poll() is not None or time.monotonic() > end:
            process.kill()
            raise RuntimeError(f"the server did not start: {log.read_text()[-1000:]}")
        time.sleep(0.1)
    return process, Client(found[1], int(found[2]))


class Served:
    """Both servers, and an event loop to ask them from."""

    def __init__(self, shape: dict[str, Any], folder: Path) -> None:
        self.bodies = save(folder / "model", shape)
        self.measured = {"L": shape["L"]}
        self.folder, self.concurrency = folder, shape["c"]
        self.loop = asyncio.new_event_loop()
        self.processes: list[subprocess.Popen] = []
        self.clients: dict[str, Client] = {}
        for name, flags in SERVERS.items():
            process, self.clients[name] = start(folder / "model", folder / f"{name}.log", flags)
            self.processes.append(process)

    def ask(self, name: str) -> list[Reply]:
        """All requests, ``concurrency`` at a time."""
        replies = self.loop.run_until_complete(
            closed_loop(self.clients[name], "/v1/recommend", self.bodies, self.concurrency)
        )
        assert {reply.status for reply in replies} == {200}
        return replies

    def check(self) -> None:
        recommender = Recommender.from_pretrained(self.folder / "model", DEVICE)
        catalogue = recommender.processor.catalogue
        histories = [np.array([catalogue.index(name) for name in body["history"]]) for body in self.bodies]
        expected = recommender.recommend(histories, k=K, num_beams=BEAMS, shares=False)
        for name in SERVERS:
            for reply in self.ask(name):
                items = reply.json()["items"]
                wanted = expected[reply.number]
                np.testing.assert_allclose([i["score"] for i in items], [r.score for r in wanted], atol=1e-3)
                known = {r.item_id: r.score for r in wanted}
                strangers = [i for i in items if i["item_id"] not in known]
                assert all(i["score"] <= wanted[-1].score + 1e-3 for i in strangers)
                assert all(abs(i["score"] - known[i["item_id"]]) < 1e-3 for i in items if i["item_id"] in known)

    def close(self) -> None:
        for client in self.clients.values():
            client.close()
        for process in self.processes:
            process.kill()
            process.wait()
        self.loop.close()


@pytest.fixture(scope="module")
def running() -> Iterator[dict[str, Served]]:
    """Servers by shape: both tests ask the same ones."""
    for package in ("fastapi", "uvicorn", "prometheus_client"):
        pytest.importorskip(package)
    found: dict[str, Served] = {}
    yield found
    for both in found.values():
        both.close()


@pytest.fixture
def served(shape, running, tmp_path_factory) -> Served:
    name = label(shape)
    if name not in running:
        for other in running.values():  # one pair at a time, for memory
            other.close()
        running.clear()
        running[name] = Served(shape, tmp_path_factory.mktemp("served"))
    shape |= running[name].measured
    return running[name]


@pytest.mark.cases(quick=QUICK, default=DEFAULT, full=FULL, gpu=GPU)
def test_throughput(shape, served, race):
    race(
        label(shape),
        {name: lambda name=name: served.ask(name) for name in SERVERS},
        suite="serve",
        shape=shape,
        check=served.check,
        clock="wall",
    )


@pytest.mark.cases(quick=QUICK, default=DEFAULT, full=FULL, gpu=GPU)
def test_latency(shape, served, tier, benchmark, capsys):
    """Milliseconds from request to answer at Poisson arrivals of fixed rates, servers in turn."""
    single = time.perf_counter()
    served.ask("single")
    capacity = len(served.bodies) / (time.perf_counter() - single)
    rounds, seconds = {"quick": (1, 1.0), "default": (1, 2.0) if ON_GPU else (3, 6.0), "full": (3, 10.0)}[tier]
    lines = []
    for part in (0.1, 0.5, 0.8, 1.5):
        found: dict[str, list[float]] = {name: [] for name in SERVERS}
        rate = part * capacity
        lasting = max(seconds, 4 / rate)  # on a slow machine a second may pass without a request
        for _ in range(rounds):
            for name, client in served.clients.items():
                work = open_loop(
                    client, "/v1/recommend", lambda i: served.bodies[i % len(served.bodies)], rate, lasting
                )
                replies = served.loop.run_until_complete(work)
                assert {reply.status for reply in replies} == {200}
                found[name] += [1000 * reply.seconds for reply in replies]
        cells = [f"{name} {np.percentile(x, 50):8.1f} {np.percentile(x, 99):8.1f}" for name, x in found.items()]
        lines.append(
            f"{part * capacity:7.1f}/s = {part:.1f} of single's {capacity:.1f}/s: p50, p99 ms: {'  '.join(cells)}"
        )
    benchmark.pedantic(served.ask, ("flr",), rounds=1)
    with capsys.disabled():
        print("\nserve", label(shape), *lines, sep="\n")
