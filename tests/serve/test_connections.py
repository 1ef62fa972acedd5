"""Deadlines of connections, how many there may be, and clients that close their half."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import socket
import time

import pytest

from tests.helpers.serving import Process, save, serving

uvicorn = pytest.importorskip("uvicorn")
import h11  # noqa: E402
from uvicorn.server import ServerState  # noqa: E402

from flr.serve import Settings  # noqa: E402
from flr.serve import connections as module  # noqa: E402
from flr.serve.connections import Connection, Connections, connection_limit  # noqa: E402
from flr.serve.metrics import Metrics  # noqa: E402
from flr.serve.server import Seldom  # noqa: E402

GET = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"


class App:
    """Answers ``/refused`` without reading the body, ``/long`` with 32 MiB, ``/slow`` after 0.4 s, the rest at once."""

    def __init__(self) -> None:
        self.answered, self.gone = [], []

    async def __call__(self, scope, receive, send):
        path = scope["path"]
        if path != "/refused":
            while (message := await receive()).get("more_body"):
                pass
            if message["type"] == "http.disconnect":
                self.gone.append(path)
                return
        if path == "/slow":
            leaving = asyncio.ensure_future(receive())
            done, _ = await asyncio.wait({leaving}, timeout=0.4)
            if done:
                self.gone.append(path)
                return
            leaving.cancel()
        body = b"x" * (1 << 25 if path == "/long" else 2)
        length = [(b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": length})
        for start in range(0, len(body), 1 << 20):
            part = body[start : start + (1 << 20)]
            await send({"type": "http.response.body", "body": part, "more_body": start + len(part) < len(body)})
        self.answered.append(path)


def run(test, limit=50, **settings):
    """Run ``test(server)`` with connections to a server of :class:`App` on this loop."""

    async def whole():
        options = {"header_timeout_s": 0.3, "body_timeout_s": 0.3, "write_timeout_s": 0.3, **settings}
        app = App()
        shared = Connections(limit, Settings(**options), Metrics())
        config = uvicorn.Config(app, ws="none", log_config=None, timeout_keep_alive=1)
        config.load()

        def connection():
            return Connection(config=config, server_state=ServerState(), app_state={}, shared=shared)

        server = await asyncio.get_running_loop().create_server(connection, "127.0.0.1", 0)
        server.port = server.sockets[0].getsockname()[1]
        server.app, server.shared = app, shared
        server.ended = lambda reason: shared.metrics.registry.get_sample_value(
            "flr_connections_ended_total", {"reason": reason}
        )
        try:
            await asyncio.wait_for(test(server), 20)
        finally:
            server.close()

    asyncio.run(whole())


def test_the_head_of_an_answer_goes_with_what_follows_it():
    ours = module._Joined(h11.SERVER)
    for asked, events in (
        (GET, [h11.Data(data=b"ab"), h11.Data(data=b"c"), h11.EndOfMessage()]),
        (GET.replace(b"GET", b"HEAD"), [h11.EndOfMessage()]),
        (GET, [h11.InformationalResponse(status_code=100, headers=[]), h11.Data(data=b"abc"), h11.EndOfMessage()]),
    ):
        ours.receive_data(asked)
        while ours.next_event() is not h11.PAUSED and ours.their_state is not h11.DONE:
            pass
        written = []
        if isinstance(events[0], h11.InformationalResponse):
            written.append(ours.send(events.pop(0)))
            assert written.pop().startswith(b"HTTP/1.1 100")
        assert ours.send(h11.Response(status_code=200, headers=[("content-length", "3")])) == b""
        written = [ours.send(event) for event in events]
        body = b"ab" if len(events) == 3 else b"abc" if len(events) == 2 else b""
        assert written[0].startswith(b"HTTP/1.1 200")
        assert written[0].endswith(b"\r\n\r\n" + body)
        assert b"".join(written[1:]) == (b"c" if len(events) == 3 else b"")
        ours.start_next_cycle()


async def opened(server, message=b""):
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(message)
    return reader, writer


async def rest(reader, seconds=5.0):
    """Everything until the connection ends, and the seconds until then."""
    start, received = time.monotonic(), b""
    with contextlib.suppress(ConnectionError):
        while part := await asyncio.wait_for(reader.read(1 << 16), seconds):
            received += part
    return received, time.monotonic() - start


def test_a_head_that_does_not_come_ends_the_connection():
    async def test(server):
        silent, begun = await opened(server), await opened(server, GET[:20])
        (nothing, first), (answer, second) = await asyncio.gather(rest(silent[0]), rest(begun[0]))
        assert nothing == b""
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert b'"error": "the request\'s head took too long to arrive"' in answer
        assert 0.2 < first < 2
        assert 0.2 < second < 2
        assert server.ended("head") == 2

    run(test)


def test_a_byte_now_and_then_does_not_prolong_the_deadline():
    async def test(server):
        for before in (b"", GET):  # the first request of a connection, and a later one
            reader, writer = await opened(server, before)
            if before:
                await reader.readuntil(b"xx")
            start, answer = time.monotonic(), asyncio.ensure_future(rest(reader))
            for byte in GET[:-1]:
                if answer.done():
                    break
                writer.write(bytes([byte]))
                await asyncio.sleep(0.05)
            assert (await answer)[0].startswith(b"HTTP/1.1 408 ")
            assert 0.25 < time.monotonic() - start < 1
        assert server.app.answered == ["/"]

    run(test)


def test_the_rest_of_a_refused_body_has_a_deadline():
    async def test(server):
        head = b"POST /refused HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n"
        reader, writer = await opened(server, head)
        await reader.readuntil(b"xx")
        start, ended = time.monotonic(), asyncio.ensure_future(rest(reader))
        while not ended.done():
            writer.write(b"x")
            await asyncio.sleep(0.05)
        assert 0.2 < time.monotonic() - start < 1
        assert server.ended("rest") == 1

    run(test)


def test_an_answer_that_is_not_read_ends_the_connection():
    async def test(server):
        reader, writer = await opened(server, GET.replace(b"/ ", b"/long ", 1))
        end = time.monotonic() + 3
        while server.ended("unread") is None and time.monotonic() < end:
            await asyncio.sleep(0.05)
        assert server.ended("unread") == 1
        await asyncio.sleep(0.05)
        assert server.shared.metrics.registry.get_sample_value("flr_connections") == 0
        assert len((await rest(reader))[0]) < 1 << 25
        writer.close()

    run(test)


def test_a_slow_reader_that_goes_on_reading_gets_all():
    async def test(server):
        reader, _ = await opened(server, GET.replace(b"/ ", b"/long ", 1))
        received = 0
        while received < 1 << 25:
            received += len(await reader.read(1 << 20))
            await asyncio.sleep(0.01)
        assert server.ended("unread") is None

    run(test)


def test_half_closed_clients_get_their_answers():
    async def test(server):
        slow = GET.replace(b"/ ", b"/slow ", 1)
        for message, count in ((GET, 1), (slow, 1), (slow + slow + GET, 3), (slow.replace(b"1.1", b"1.0"), 1)):
            reader, writer = await opened(server, message)
            writer.write_eof()
            answer, _ = await rest(reader)
            assert answer.count(b" 200 OK\r\n") == count, answer
            assert answer.endswith(b"xx")
        assert len(server.app.answered) == 6
        # an incomplete request of a client that has closed its half will never be whole
        reader, writer = await opened(server, GET[:-2])
        writer.write_eof()
        assert (await rest(reader))[1] < 0.2

    run(test)


def test_a_client_that_has_left_is_found_out():
    async def test(server):
        _, writer = await opened(server, GET.replace(b"/ ", b"/slow ", 1))
        await asyncio.sleep(0.1)
        writer.close()
        await asyncio.sleep(0.25)
        assert server.app.gone == ["/slow"]
        assert server.app.answered == []

    run(test)


def test_the_connection_that_has_waited_longest_makes_room():
    async def test(server):
        waiting = [await opened(server) for _ in range(4)]
        kept, kept_writer = await opened(server, GET)
        await kept.readuntil(b"xx")  # the first of the waiting has made room
        waiting[0][1].write(GET)  # a client that was slow for a moment
        told = [await rest(waiting[0][0])]
        busy = [await opened(server, GET.replace(b"/ ", b"/slow ", 1)) for _ in range(3)]
        told += [await rest(reader) for reader, _ in waiting[1:]]
        for answer, _ in told:
            assert answer.startswith(b"HTTP/1.1 503 ")
            assert b"\r\nretry-after: 1\r\n" in answer
            assert answer.count(b"HTTP/1.1") == 1
        one_more = await opened(server)
        assert await kept.read() == b""  # idle between two requests
        one_more[1].write(GET)
        assert (await one_more[0].readuntil(b"xx")).startswith(b"HTTP/1.1 200 ")
        answers = [await reader.readuntil(b"xx") for reader, _ in busy]
        assert all(answer.startswith(b"HTTP/1.1 200 ") for answer in answers)
        kept_writer.close()

    run(test, limit=4, header_timeout_s=10)


def test_where_all_are_busy_one_more_is_told_to_come_again():
    async def test(server):
        busy = [await opened(server, GET.replace(b"/ ", b"/slow ", 1)) for _ in range(3)]
        await asyncio.sleep(0.1)
        refused = [await opened(server, GET) for _ in range(5)]
        for reader, _ in refused:
            answer, _ = await rest(reader)
            assert answer.startswith(b"HTTP/1.1 503 ")
            assert b"\r\nretry-after: 1\r\n" in answer
        assert server.ended("refused") == 5
        for reader, _ in busy:
            assert (await reader.readuntil(b"xx")).startswith(b"HTTP/1.1 200 ")

    run(test, limit=3)


def test_without_descriptors_the_longest_waiting_makes_room_and_the_log_stays_small(caplog, monkeypatch):
    monkeypatch.setattr(module, "REPORT_S", 0.2)
    caplog.set_level(logging.WARNING)

    async def test(server):
        reader, _ = await opened(server)
        await asyncio.sleep(0.05)
        context = {"message": "out", "exception": OSError(errno.EMFILE, "none left"), "socket": None}
        for _ in range(1000):
            server.shared.on_error(asyncio.get_running_loop(), context)
        assert await reader.read() == b""
        await asyncio.sleep(0.3)

    run(test)
    assert [record.fields["ended"] for record in caplog.records] == [{"starved": 1000}]


def test_repeated_warnings_are_counted_instead_of_written():
    limited = Seldom(burst=2, seconds=0.1)

    def record(line, level=logging.WARNING):
        return logging.LogRecord("x", level, "x.py", line, "told", (), None)

    assert [limited.filter(record(1)) for _ in range(5)] == [True, True, False, False, False]
    assert limited.filter(record(2))
    assert all(limited.filter(record(3, logging.INFO)) for _ in range(5))
    time.sleep(0.12)
    later = record(1)
    assert limited.filter(later)
    assert later.skipped == 3


def test_the_limit_leaves_descriptors_for_the_rest():
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[1]))
        assert connection_limit(300) == 300  # the soft limit rose
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 300
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def exchange(server: Process, message: bytes) -> bytes:
    with socket.create_connection((server.host, server.port), 5) as connection:
        connection.settimeout(5)
        connection.sendall(message)
        return connection.recv(1 << 16)


def test_300_slow_connections_and_256_descriptors_stop_nothing(tmp_path):
    """A flood that comes back as soon as it is closed: others are answered, and it leaves few lines in the log."""
    model = save(tmp_path / "model")
    with serving(model, tmp_path / "log", "--header_timeout_s", "2", descriptors=256) as server:
        health = b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"

        async def flood(stop):
            async def slow():
                while not stop.is_set():
                    with contextlib.suppress(OSError):
                        reader, writer = await asyncio.open_connection(server.host, server.port)
                        writer.write(b"G")
                        await rest(reader)
                        writer.close()
                    await asyncio.sleep(0.05)

            await asyncio.gather(*(slow() for _ in range(300)))

        async def test():
            stop = asyncio.Event()
            flooding = asyncio.ensure_future(flood(stop))
            await asyncio.sleep(1)
            slowest, end = 0.0, time.monotonic() + 4
            while time.monotonic() < end:
                start = time.monotonic()
                answer = await asyncio.to_thread(exchange, server, health)
                assert answer.startswith(b"HTTP/1.1 200 "), answer
                slowest = max(slowest, time.monotonic() - start)
            stop.set()
            await flooding
            return slowest

        slowest = asyncio.run(test())
        assert slowest < 5
        limit = next(line for line in server.lines() if line.get("event") == "limit")
        assert "max_connections: descriptors suffice for" in limit["message"]
        # The requests of this test are logged too, as many as the machine is fast; what the flood causes is bounded.
        others = [line for line in server.lines() if line.get("event") != "request" or line.get("status") != 200]
        print(f"slowest answer {slowest:.2f} s, {len(others)} lines that are not of answered requests")
        assert len(others) < 50
