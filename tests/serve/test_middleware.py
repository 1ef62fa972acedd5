"""What comes before the routes: tokens, hosts, bounds, request ids."""

from __future__ import annotations

import asyncio
import json
import logging
import threading

import pytest

from flr.serve import Settings
from tests.helpers.serving import ADMIN, TOKEN, metric, with_client


def test_too_long_too_slow_and_of_another_kind(recommender):
    async def test(client):
        async def chunks(count, pause=0.0):
            for _ in range(count):
                yield b" " * 512
                await asyncio.sleep(pause)

        kind = {"content-type": "application/json"}
        declared = await client.post("/v1/recommend", content=b" " * 2049, headers=kind)
        assert declared.status_code == 413
        assert declared.headers["connection"] == "close"
        assert (await client.post("/v1/recommend", content=chunks(5), headers=kind)).status_code == 413
        assert (await client.post("/v1/recommend", content=chunks(4), headers=kind)).status_code == 422
        assert (await client.post("/v1/recommend", content=chunks(4, 0.2), headers=kind)).status_code == 408
        for other in ("text/plain", "application/x-www-form-urlencoded", ""):
            assert (
                await client.post("/v1/recommend", content=b"{}", headers={"content-type": other})
            ).status_code == 415
        both = {**kind, "content-length": "2", "transfer-encoding": "chunked"}
        assert (await client.post("/v1/recommend", content=b"{}", headers=both)).status_code == 400
        assert (await client.get("/v1/recommend")).status_code == 405
        assert (await client.get("/etc/passwd")).status_code == 404
        assert (await client.get("/static/../app.py")).status_code == 404
        assert metric(client, "flr_requests_total", path="other", status="404") == 2

    with_client(recommender, test, max_body_bytes=2048, body_timeout_s=0.3)


def test_tokens(recommender, tokens):
    user, admin = tokens

    async def test(client):
        body = {"history": ["item_1"]}
        assert (await client.post("/v1/recommend", json=body, headers=user)).status_code == 200
        for wrong in (
            "",
            "Bearer",
            "Bearer ",
            f"Basic {TOKEN}",
            f"Bearer {TOKEN}x",
            f"Bearer {TOKEN[:-1]}",
            f"Bearer {ADMIN}",
        ):
            reply = await client.post("/v1/recommend", json=body, headers={"authorization": wrong})
            assert reply.status_code == 401, wrong
            assert reply.headers["www-authenticate"] == "Bearer"
        twice = [("authorization", f"Bearer {TOKEN}"), ("authorization", "Bearer other")]
        assert (await client.post("/v1/recommend", json=body, headers=twice)).status_code == 401
        for path in ("/v1/info", "/v1/items", "/metrics"):
            assert (await client.get(path)).status_code == 401
            assert (await client.get(path, headers=user)).status_code == 200
        for path in ("/", "/health", "/ready", "/static/app.js"):
            assert (await client.get(path)).status_code == 200
        assert (await client.post("/v1/reload", headers=user)).status_code == 401
        assert (await client.post("/v1/reload", headers=admin)).status_code == 200

    with_client(recommender, test, load=lambda: recommender)


def test_token_settings(tmp_path, monkeypatch, tokens):
    file = tmp_path / "token"
    file.write_text(f"{TOKEN}\n")
    with pytest.raises(ValueError, match="expected either the file or FLR_SERVE_TOKEN, got both"):
        Settings(token_file=str(file)).tokens()
    monkeypatch.delenv("FLR_SERVE_TOKEN")
    found, _ = Settings(token_file=str(file)).tokens()
    assert found is not None
    assert TOKEN.encode() not in found
    file.write_text("short")
    with pytest.raises(ValueError, match="at least 16 printable ASCII characters"):
        Settings(token_file=str(file)).tokens()
    for arguments in ({"max_k": 0}, {"max_k": 1001}, {"num_beams": 101}, {"port": -1}, {"scoring": "best"}):
        with pytest.raises(ValueError, match=r"expected|must be"):
            Settings(**arguments)


def test_a_full_queue_refuses_before_anything_is_understood(recommender, monkeypatch):
    """What is on its way has a place, and gives it back where the request was wrong."""

    async def test(client):
        engine, reached = client.gate.engine, []
        application = client.gate.fastapi

        async def counted(scope, receive, send):
            reached.append(scope["path"])
            await application(scope, receive, send)

        monkeypatch.setattr(client.gate, "fastapi", counted)
        for _ in range(3):  # as many wrong ones as wanted take no place for good
            assert (await client.post("/v1/recommend", json={"history": ["no such item"]})).status_code == 422
        assert reached == ["/v1/recommend"] * 3
        engine.announce(2)
        for path in ("/v1/recommend", "/v1/explain"):
            reply = await client.post(path, content=b"{", headers={"content-type": "application/json"})
            assert reply.status_code == 429
            assert 1 <= int(reply.headers["retry-after"]) <= 60
            assert "too many requests wait" in reply.json()["error"]
        assert reached == ["/v1/recommend"] * 3
        assert metric(client, "flr_dropped_total", reason="full") == 2
        assert (await client.get("/health")).status_code == 200
        engine.announce(-2)
        assert (await client.post("/v1/recommend", json={"history": ["item_1"]})).status_code == 200

    with_client(recommender, test, max_queue=2)


def test_what_the_drain_has_no_time_for_is_told_to_come_again(recommender, monkeypatch):
    """uvicorn cancels it then, and would answer 500 with a traceback in the log."""
    opened, original = threading.Event(), recommender.ranked

    def ranked(*arguments):
        assert opened.wait(30)
        return original(*arguments)

    async def test(client):
        monkeypatch.setattr(recommender, "ranked", ranked)
        gate, sent, unread = client.gate, [], []

        async def receive():
            return unread.pop() if unread else await asyncio.Event().wait()

        async def send(message):
            sent.append(message)

        async def cancelled(inside):
            unread[:] = [{"type": "http.request", "body": b'{"history": []}', "more_body": False}]
            headers = [(b"content-type", b"application/json"), (b"content-length", b"15"), (b"host", b"127.0.0.1")]
            scope = {"type": "http", "path": "/v1/recommend", "method": "POST", "query_string": b"", "headers": headers}
            task = asyncio.create_task(gate(scope, receive, send))
            while gate.engine._computing + gate.engine._waiting < inside:
                await asyncio.sleep(0.01)
            task.cancel()
            await asyncio.wait({task})
            return task.cancelled()

        try:
            assert await cancelled(1)
            assert sent == []
            gate.draining = True
            assert not await cancelled(2)
        finally:
            opened.set()
        head, body = sent
        assert head["status"] == 503
        assert dict(head["headers"])[b"retry-after"] == b"1"
        assert dict(head["headers"])[b"connection"] == b"close"
        assert "the server stops" in json.loads(body["body"])["error"]
        for status in ("499", "503"):
            assert metric(client, "flr_requests_total", path="/v1/recommend", status=status) == 1

    with_client(recommender, test)


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:8000", 200),
        ("localhost", 200),
        ("[::1]:80", 200),
        ("evil.example", 421),
        ("127.0.0.1.evil.example", 421),
        ("[", 421),
        ("", 421),
    ],
)
def test_hosts(recommender, host, status):
    async def test(client):
        assert (await client.get("/v1/info", headers={"host": host})).status_code == status

    with_client(recommender, test)


def test_any_host_when_bound_to_all(recommender):
    async def test(client):
        assert (await client.get("/v1/info", headers={"host": "shop.example"})).status_code == 200

    with_client(recommender, test, host="0.0.0.0")


# ---------------------------------------------------------------- ids and logs


def test_request_ids_and_logs_without_histories(recommender, caplog):
    caplog.set_level(logging.INFO, "flr.serve")

    async def test(client):
        body = {"history": ["item_7", "item_8"]}
        reply = await client.post("/v1/recommend", json=body, headers={"x-request-id": "abc-1.2_3"})
        assert reply.headers["x-request-id"] == reply.json()["request_id"] == "abc-1.2_3"
        for odd in ("", "a b", "x" * 65, "a\x7fb", '"quoted"'):
            reply = await client.post("/v1/recommend", json=body, headers={"x-request-id": odd})
            assert len(reply.headers["x-request-id"]) == 32

    with_client(recommender, test)
    lines = [record.fields for record in caplog.records if hasattr(record, "fields")]
    assert lines[0]["id"] == "abc-1.2_3"
    assert lines[0]["status"] == 200
    assert lines[0]["batch"] == 1
    assert "item_7" not in json.dumps(lines)
    caplog.clear()
    with_client(recommender, test, log_histories=True)
    assert caplog.records[0].fields["history"] == ["item_7", "item_8"]
