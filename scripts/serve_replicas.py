"""Requests a second and latencies of one process, of 1 and 2 replicas behind a front, and of 64 by simulation.

    python -m scripts.serve_replicas             # measure (needs flr[serve,ray]), simulate, write docs/serving.md
    python -m scripts.serve_replicas --table     # simulate and write from docs/results/serve_replicas.json

Measured: the three servers are asked in turn, 32 requests at a time, several rounds; and the seconds of a batch of each
size in the engine. Simulated: requests at random times (Poisson), the front gives each to the less loaded of
two replicas drawn at random, as Ray Serve's router does, and a replica computes what waits, at most 32 at a time, for
as long as a batch of that size was measured to take.
"""

from __future__ import annotations

import argparse
import asyncio
import heapq
import os
import random
import tempfile
import time
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np

from bench.load import closed_loop
from flr.files import read_json, write_json
from flr.recommend import Recommender

from .marks import filled

ROOT = Path(__file__).resolve().parents[1]
RESULT, PAGE = ROOT / "docs/results/serve_replicas.json", ROOT / "docs/serving.md"
SHAPE = {"D": 256, "layers": 4, "C": 5000, "requests": 96}
SERVERS = {
    "one process": [],
    "1 replica": ["--ray", "local", "--replicas", "1"],
    "2 replicas": ["--ray", "local", "--replicas", "2"],
}
AT_ONCE, BATCH = 32, 32
SIZES = (1, 2, 4, 8, 16, 32)
LOADS, REPLICAS, SIMULATED = (0.5, 0.8, 0.95), (1, 2, 64), 400  # shares of the capacity; requests a replica


def measure(rounds: int) -> dict[str, Any]:
    """The three servers and the engine, on this machine."""
    from bench.test_server import save, start  # here: its marks are those of the benchmarks' own pytest

    os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's 15 is for work that may wait
    shape = dict(SHAPE)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        bodies = save(folder / "model", shape)
        service = batches(folder / "model", bodies)
        found: dict[str, list[dict[str, float]]] = {}
        for name, flags in SERVERS.items():
            process, client = start(folder / "model", folder / f"{len(found)}.log", ["--max_batch_size", "32", *flags])
            try:
                found[name] = asyncio.run(ask(client, bodies, rounds))
            finally:
                process.terminate()
                process.wait()
            print(name, found[name], flush=True)
    return {"shape": shape, "at_once": AT_ONCE, "servers": found, "service_seconds": service}


async def ask(client: Any, bodies: list[Any], rounds: int) -> list[dict[str, float]]:
    """Rates and latencies of rounds under load, the first left out; and the latency of a request alone."""
    found = []
    for number in range(rounds + 1):
        begun = time.perf_counter()
        replies = await closed_loop(client, "/v1/recommend", bodies, AT_ONCE)
        seconds = time.perf_counter() - begun
        assert {reply.status for reply in replies} == {200}
        alone = [await client.request("POST", "/v1/recommend", body) for body in bodies[:12]]
        times = np.array([reply.seconds for reply in replies])
        if number:
            one = {"p50_s": float(np.median(times)), "p99_s": float(np.quantile(times, 0.99))}
            found.append(
                {"per_s": len(bodies) / seconds, **one, "alone_s": float(np.median([r.seconds for r in alone]))}
            )
    client.close()
    return found


def batches(folder: Path, bodies: list[Any]) -> dict[str, list[float]]:
    """Seconds of the engine's batches by size, sizes in turn."""
    recommender = Recommender.from_pretrained(folder, "cpu")
    queries = [recommender.query(recommender.names("history", body["history"])[0], body["k"]) for body in bodies]
    found: dict[str, list[float]] = {str(size): [] for size in SIZES}
    for number in range(4):
        for size in SIZES:
            begun = time.perf_counter()
            recommender.ranked(queries[:size], bodies[0]["num_beams"], "auto", False)
            if number:
                found[str(size)].append(time.perf_counter() - begun)
    return found


def simulate(replicas: int, load: float, service: dict[str, list[float]], extra: float) -> dict[str, float]:
    """Latencies, seconds, at a share of the capacity; ``extra`` is what the way over the front takes.

    >>> found = simulate(2, 0.1, {"1": [0.1], "32": [1.0]}, 0.0)
    >>> round(found["p50_s"], 2)
    0.1
    """
    draw = random.Random(0)
    sizes = sorted(map(int, service))
    middle = [float(np.median(service[str(size)])) for size in sizes]
    rate = load * replicas * sizes[-1] / middle[-1]
    waiting: list[deque[float]] = [deque() for _ in range(replicas)]
    computing: list[list[float]] = [[] for _ in range(replicas)]
    events: list[tuple[float, int]] = []  # when which replica is free again
    times: list[float] = []
    now, count = 0.0, SIMULATED * max(replicas, 8)

    def begin(which: int, at: float) -> None:
        jobs = [waiting[which].popleft() for _ in range(min(len(waiting[which]), BATCH))]
        computing[which] = jobs
        near = min(range(len(sizes)), key=lambda place: abs(sizes[place] - len(jobs)))
        spread = draw.choice(service[str(sizes[near])]) / middle[near]
        heapq.heappush(events, (at + float(np.interp(len(jobs), sizes, middle)) * spread, which))

    def end() -> None:
        at, which = heapq.heappop(events)
        times.extend(at - came + extra for came in computing[which])
        computing[which] = []
        if waiting[which]:
            begin(which, at)

    for _ in range(count):
        now += draw.expovariate(rate)
        while events and events[0][0] <= now:
            end()
        pair = draw.sample(range(replicas), min(2, replicas))
        which = min(pair, key=lambda one: len(waiting[one]) + len(computing[one]))
        waiting[which].append(now)
        if not computing[which]:
            begin(which, now)
    while events:
        end()
    kept = np.array(times[len(times) // 5 :])  # the begin, when nothing waits yet, is left out
    return {"per_s": rate, "p50_s": float(np.median(kept)), "p99_s": float(np.quantile(kept, 0.99))}


def table(report: dict[str, Any]) -> str:
    """The results in Markdown."""
    lines = [
        f"| {report['at_once']} requests at a time | requests/s (least, most) | p50, ms | p99, ms | alone, ms |",
        "|---|---|---|---|---|",
    ]
    alone = {}
    for name in SERVERS:
        rounds = report["servers"][name]
        found = {key: [one[key] for one in rounds] for key in rounds[0]}
        alone[name] = float(np.median(found["alone_s"]))
        rates = found["per_s"]
        cells = [f"{np.median(rates):.1f} ({min(rates):.1f}, {max(rates):.1f})"]
        cells += [f"{1e3 * np.median(found[key]):.0f}" for key in ("p50_s", "p99_s", "alone_s")]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    extra = max(0.0, alone["1 replica"] - alone["one process"])
    lines += ["", "| simulated | of capacity | requests/s | p50, ms | p99, ms |", "|---|---|---|---|---|"]
    for replicas in REPLICAS:
        for load in LOADS:
            one = simulate(replicas, load, report["service_seconds"], extra)
            many = "replica" if replicas == 1 else "replicas"
            latencies = f"{1e3 * one['p50_s']:.0f} | {1e3 * one['p99_s']:.0f}"
            lines.append(f"| {replicas} {many} | {load:.0%} | {one['per_s']:.1f} | {latencies} |")
    by_size = sorted(report["service_seconds"].items(), key=lambda entry: int(entry[0]))
    service = ", ".join(f"{size}: {1e3 * np.median(t):.0f}" for size, t in by_size)
    lines.append(
        f"\nMeasured milliseconds of a batch by its size: {service}; of the way over the front: {1e3 * extra:.0f}."
    )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="Only simulate and write the page, from the result.")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    if not args.table:
        write_json(RESULT, measure(args.rounds))
    PAGE.write_text(filled(PAGE.read_text(), "serving:replicas", table(read_json(RESULT, 1 << 20))))


if __name__ == "__main__":
    main()
