"""The real server as a process, over loopback: overload, kill, reload, drain, and bytes that are not quite HTTP."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import socket
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest

from bench.load import Client, closed_loop, open_loop
from flr.cli import main
from flr.recommend.recommender import Recommender
from flr.serve import memory
from flr.serve import server as module
from flr.serve.server import bind
from tests.helpers.catalogues import named_catalogue
from tests.helpers.garbage import set_apart
from tests.helpers.serving import Process, assert_same_items, mixed_requests, offline, save, serving

SECONDS = float(os.environ.get("FLR_LOAD_SECONDS", "10"))
POOL = mixed_requests(48, k=8, num_beams=20)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def expected(model):
    recommender = Recommender.from_pretrained(model, "cpu")
    return [offline(recommender, body) for body in POOL]


def check(replies, expected, allowed):
    """Every reply has an allowed status, and every answer is that of its own request."""
    statuses = Counter(reply.status for reply in replies)
    assert set(statuses) <= allowed, (statuses, [r.body[:300] for r in replies if r.status not in allowed][:3])
    for reply in replies:
        content = reply.json()
        assert content["request_id"] == reply.headers["x-request-id"]
        if reply.status == 200:
            assert_same_items(content["items"], expected[reply.number % len(POOL)])
        elif reply.status == 429:
            assert 1 <= int(reply.headers["retry-after"]) <= 60
    return statuses


async def capacity(client, count=150):
    """Requests a second that the server answers when it is never idle."""
    bodies = [POOL[i % len(POOL)] for i in range(count)]
    start = time.perf_counter()
    replies = await closed_loop(client, "/v1/recommend", bodies, 16)
    assert {reply.status for reply in replies} == {200}
    return count / (time.perf_counter() - start)


def test_twice_the_capacity_loses_and_mixes_up_nothing(model, expected, tmp_path):
    with serving(model, tmp_path / "log", "--max_queue", "24", "--max_batch_size", "8") as server:

        async def test():
            client, running = Client(server.host, server.port), psutil.Process(server.popen.pid)
            await capacity(client)  # so that nothing is done for the first time below
            begun = sum(running.cpu_times()[:2])
            rate = 2 * await capacity(client)
            alone = (sum(running.cpu_times()[:2]) - begun) / 150
            begun = sum(running.cpu_times()[:2])
            # every fourth request has little time, so that some deadlines pass in the queue
            replies = await open_loop(
                client,
                "/v1/recommend",
                lambda i: POOL[i % len(POOL)] | ({"timeout_ms": 60} if i % 4 == 0 else {}),
                rate,
                SECONDS,
            )
            spent = sum(running.cpu_times()[:2]) - begun
            assert sorted(reply.number for reply in replies) == list(range(len(replies)))
            assert len(replies) > 0.8 * rate * SECONDS
            statuses = check(replies, expected, {200, 429, 504})
            print(f"{rate:.0f} requests/s for {SECONDS:g} s: {dict(statuses)}, {spent / statuses[200] / alone:.2f}")
            assert statuses[429] > 0, statuses
            assert statuses[504] > 0, statuses
            metrics = (await client.request("GET", "/metrics")).body.decode()
            for status in (200, 429, 504):
                total = float(
                    metrics.split(f'flr_requests_total{{path="/v1/recommend",status="{status}"}} ')[1].split()[0]
                )
                assert total == statuses[status] + (300 if status == 200 else 0)
            assert "flr_queue_depth 0.0" in metrics
            # half of what it can do, in CPU time, since others use the machine, too: refusals may cost the other half
            assert spent < 2 * alone * statuses[200], (statuses, spent, alone)
            client.close()

        asyncio.run(test())
        logged = Counter(line["status"] for line in server.lines() if line.get("path") == "/v1/recommend")
        assert set(logged) == {200, 429, 504}


def test_killed_under_load_and_started_again_it_is_ready(model, expected, tmp_path):
    with serving(model, tmp_path / "log") as server:

        async def load():
            client = Client(server.host, server.port)
            task = asyncio.create_task(open_loop(client, "/v1/recommend", lambda i: POOL[i % len(POOL)], 40, 2))
            await asyncio.sleep(1)
            server.signal(signal.SIGKILL)
            return await task

        replies = asyncio.run(load())
        statuses = check([r for r in replies if r.status], expected, {200})
        assert statuses[200] > 5
        assert any(reply.status == 0 for reply in replies)
        assert server.wait() == -signal.SIGKILL
        with serving(model, tmp_path / "again", "--port", str(server.port), "--drain_delay_s", "60") as again:
            assert again.port == server.port

            async def ready():
                client = Client(again.host, again.port)
                assert (await client.request("GET", "/ready")).status == 200
                check(await closed_loop(client, "/v1/recommend", POOL, 8), expected, {200})
                client.close()

            asyncio.run(ready())
            again.signal(signal.SIGINT)  # Ctrl-C does not wait for the drain's delay
            assert again.wait() == 0


def test_hot_reload_under_load_drops_nothing_and_mixes_up_nothing(tmp_path):
    """The folder is a link switched between two models of different catalogues; every answer is of its generation."""
    first = save(tmp_path / "first")
    second = save(tmp_path / "second", catalogue=named_catalogue(60, seed=2))
    pool = mixed_requests(24, k=5, num_beams=20)
    answers = [[offline(Recommender.from_pretrained(f, "cpu"), body) for body in pool] for f in (first, second)]
    assert [x["item_id"] for x in answers[0][0]] != [x["item_id"] for x in answers[1][0]]
    link = tmp_path / "live"
    link.symlink_to(first)
    admin = "an-admin-token-of-some-length"
    with serving(link, tmp_path / "log", environment={"FLR_SERVE_ADMIN_TOKEN": admin}) as server:

        async def test():
            client = Client(server.host, server.port)
            task = asyncio.create_task(open_loop(client, "/v1/recommend", lambda i: pool[i % len(pool)], 30, 7))

            async def switch(folder, generation, by_signal):
                new = tmp_path / "new"
                new.symlink_to(folder)
                new.replace(link)
                if by_signal:
                    server.signal(signal.SIGHUP)
                else:
                    reply = await client.request("POST", "/v1/reload", headers={"authorization": f"Bearer {admin}"})
                    assert reply.status == 200, reply.body
                while (await client.request("GET", "/v1/info")).json()["generation"] < generation:
                    await asyncio.sleep(0.05)

            await asyncio.sleep(0.5)
            await switch(second, 2, by_signal=True)
            await asyncio.sleep(0.5)
            await switch(first, 3, by_signal=False)
            (link / "config.json").rename(link / "config.away")  # a broken folder changes nothing
            reply = await client.request("POST", "/v1/reload", headers={"authorization": f"Bearer {admin}"})
            assert reply.status == 409, reply.body
            replies = await task
            client.close()
            return replies

        replies = asyncio.run(test())
        assert Counter(reply.status for reply in replies) == {200: len(replies)}, Counter(r.status for r in replies)
        generations = Counter()
        for reply in replies:
            content = reply.json()
            generations[content["generation"]] += 1
            assert_same_items(content["items"], answers[(content["generation"] + 1) % 2][reply.number % len(pool)])
        assert set(generations) == {1, 2, 3}, generations


def test_sigterm_drains(model, expected, tmp_path):
    """/ready says 503 while requests are answered; then what is in flight is answered, and the exit status is 0."""
    with serving(model, tmp_path / "log", "--drain_delay_s", "1.5", "--max_batch_size", "4") as server:

        async def test():
            client = Client(server.host, server.port)
            assert (await client.request("GET", "/ready")).status == 200
            task = asyncio.create_task(open_loop(client, "/v1/recommend", lambda i: POOL[i % len(POOL)], 30, 2))
            await asyncio.sleep(0.7)
            server.signal(signal.SIGTERM)
            await asyncio.sleep(0.3)
            ready = await Client(server.host, server.port).request("GET", "/ready")
            assert ready.status == 503
            assert ready.json()["error"] == "draining"
            # what is in the queue when listening ends is answered too
            last = await asyncio.gather(*(client.request("POST", "/v1/recommend", POOL[i], None, i) for i in range(40)))
            return [*await task, *last]

        replies = asyncio.run(test())
        check(replies, expected, {200})
        assert len(replies) >= 70
        assert server.wait() == 0
        events = [line["event"] for line in server.lines() if line.get("event") != "request"]
        assert events == ["listening", "draining", "stopped"]
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((server.host, server.port), 1).close()


def raw(server: Process, message: bytes, seconds: float = 10) -> bytes:
    """Everything that comes back until the server closes the connection or is silent."""
    with socket.create_connection((server.host, server.port), 5) as connection:
        connection.settimeout(seconds)
        connection.sendall(message)
        received = b""
        try:
            while part := connection.recv(65536):
                received += part
        except (TimeoutError, ConnectionResetError):
            pass
        return received


@pytest.fixture(scope="module")
def server(model, tmp_path_factory):
    log = tmp_path_factory.mktemp("raw") / "log"
    with serving(model, log, "--max_body_bytes", "4096", "--body_timeout_s", "1", "--keep_alive_s", "2") as running:
        yield running


JSON = b"Content-Type: application/json\r\n"
TOP = b"POST /v1/recommend HTTP/1.1\r\nHost: localhost\r\n" + JSON
CHUNKED = b"Transfer-Encoding: chunked\r\n"
BODY = b'{"history": ["item_1"], "k": 1}'
SMUGGLED = b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.mark.parametrize(
    "message",
    [
        pytest.param(TOP + b"Content-Length: 5\r\nContent-Length: 31\r\n\r\n" + BODY + SMUGGLED, id="two lengths"),
        pytest.param(TOP + b"Content-Length: 31, 5\r\n\r\n" + BODY, id="a list of lengths"),
        pytest.param(TOP + b"Content-Length: +31\r\n\r\n" + BODY, id="a signed length"),
        pytest.param(TOP + b"Content-Length: 0x1f\r\n\r\n" + BODY, id="a length in hexadecimal"),
        pytest.param(TOP + b"Content-Length: -1\r\n\r\n" + BODY, id="a negative length"),
        pytest.param(
            TOP + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + SMUGGLED, id="length and chunks"
        ),
        pytest.param(
            TOP + CHUNKED + b"Transfer-Encoding: identity\r\n\r\n0\r\n\r\n" + SMUGGLED, id="two codings"
        ),
        pytest.param(TOP + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n" + SMUGGLED, id="an unknown coding"),
        pytest.param(TOP + b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n", id="a space before the colon"),
        pytest.param(TOP + CHUNKED + b"\r\nzz\r\n" + BODY + b"\r\n0\r\n\r\n", id="a bad chunk size"),
        pytest.param(TOP + b"Transfer-Encoding: chunked\r\n\r\n" + b"f" * 40 + b"\r\n", id="an endless chunk size"),
        pytest.param(b"POST /v1/recommend HTTP/1.1\r\n" + JSON + b"Content-Length: 31\r\n\r\n" + BODY, id="no host"),
        pytest.param(b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: evil\r\n\r\n", id="two hosts"),
        pytest.param(b"GET / HTTP/1.1\r\nHost: evil.example\r\n\r\n", id="another host"),
        pytest.param(b"GET / HTTP/1.1\r\nHost: localhost\r\nX-A: a\x00b\r\n\r\n", id="a null byte"),
        pytest.param(b"GET / HTTP/1.1\r\nHost: localhost\r\nX-A: " + b"a" * 100_000 + b"\r\n\r\n", id="a long header"),
        pytest.param(b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n", id="a long path"),
        pytest.param(b"GET / HTTP/9.9\r\nHost: localhost\r\n\r\n", id="another version"),
        pytest.param(b"G<>T / HTTP/1.1\r\nHost: localhost\r\n\r\n", id="a bad method"),
        pytest.param(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", id="TLS"),
        pytest.param(TOP + b"Content-Length: 5000\r\n\r\n" + b" " * 5000, id="too long"),
        pytest.param(TOP + b"Content-Length: 99999999999999999999999\r\n\r\n" + BODY, id="an absurd length"),
        pytest.param(TOP + b"Content-Length: 50000000\r\nExpect: 100-continue\r\n\r\n", id="too long, announced"),
        pytest.param(
            TOP + CHUNKED + b"\r\n1000\r\n" + b" " * 4096 + b"\r\n1\r\n \r\n0\r\n\r\n", id="too long in chunks"
        ),
        pytest.param(TOP + b"Content-Length: 31\r\n\r\n{", id="too slow"),
    ],
)  # fmt: skip
def test_what_is_not_quite_http_is_refused_once_and_ends_the_connection(server, message):
    answer = raw(server, message)
    statuses = [int(part.split(b" ")[1]) for part in answer.split(b"HTTP/1.1")[1:] if part[:1] == b" "]
    if message[:1] == b"\x16":
        assert statuses in ([], [400])
    elif b"evil.example" in message:
        assert statuses == [421]
    else:
        assert len(statuses) == 1, answer  # what came behind the refused message was not taken for a request
        assert statuses[0] in (400, 408, 413, 431), answer
    assert b"flr_requests_total" not in answer
    assert raw(server, b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").startswith(
        b"HTTP/1.1 200"
    )


def test_pipelined_requests_are_answered_in_order(server):
    one = TOP + b"Content-Length: 31\r\nX-Request-ID: %d\r\n\r\n" + BODY
    answer = raw(server, b"".join(one % i for i in range(5)), 4)
    assert [part[:1] for part in answer.split(b"x-request-id: ")[1:]] == [b"0", b"1", b"2", b"3", b"4"]
    assert answer.count(b"HTTP/1.1 200 OK") == 5


def test_a_kept_connection_does_not_wait_for_acknowledgements(server):
    async def test():
        client = Client(server.host, server.port)
        replies = [await client.request("GET", "/health") for _ in range(40)]
        client.close()
        return sorted(reply.seconds for reply in replies)[20]

    assert asyncio.run(test()) < 0.03  # Nagle's algorithm and delayed acknowledgements would make it 40 ms


def test_an_address_is_taken_before_the_model_is_loaded():
    with bind("127.0.0.1", 0) as first:
        host, port = first.getsockname()
        with pytest.raises(OSError, match=f"cannot bind to {host}:{port}"):
            bind(host, port)
        early = socket.create_connection((host, port), timeout=10)
    with early, pytest.raises(ConnectionResetError):  # no model came: who waited for it is told
        early.recv(1)


def test_a_taken_port_and_a_missing_model_are_clear_errors(server, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(logging, "basicConfig", lambda **_: None)  # the tests' own stays
    for flags, message in (
        (["--port", str(server.port)], f"cannot bind to 127.0.0.1:{server.port}"),
        (["--port", "0", "--model", str(tmp_path / "absent")], "expected a folder with config.json"),
        (["--port", "0", "--max_k", "0"], "max_k: expected 1 to 1000, got 0"),
    ):
        assert main(["serve", *flags]) == 1
        assert message in capsys.readouterr().err


def test_no_collection_looks_through_packages_and_catalogue(monkeypatch, recommender):
    """It took a fifth of a second, in which nobody was answered, and came every few thousand requests."""
    looked_at = []

    def connections(*_):
        looked_at.append((gc.get_freeze_count(), len(gc.get_objects())))
        raise InterruptedError

    monkeypatch.setattr(module, "load", lambda _: recommender)
    monkeypatch.setattr(module, "Connections", connections)
    monkeypatch.setattr(memory, "_frozen", False)
    monkeypatch.setattr(logging, "basicConfig", lambda **_: None)
    monkeypatch.setattr("transformers.utils.logging.disable_progress_bar", lambda: None)
    levels = {name: logging.getLogger(name).level for name in ("uvicorn", "httpx", "ray")}
    gc.unfreeze()  # what the tests set apart
    try:
        with pytest.raises(InterruptedError):
            module.run(module.Settings(port=0))
    finally:
        gc.unfreeze()
        set_apart()
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
    [(frozen, others)] = looked_at
    assert frozen > 100_000
    assert others < frozen / 20
