"""The application in this process: every route, every refusal, and answers equal to those without a server."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from tests.helpers.catalogues import named_catalogue
from tests.helpers.models import build_recommender
from tests.helpers.serving import assert_same_items, metric, mixed_requests, offline, with_client

# ---------------------------------------------------------------- answers


@pytest.mark.parametrize("codec", ["id", "sid", "title"])
def test_concurrent_requests_get_the_answers_of_each_alone(codec):
    recommender = build_recommender(codec)
    bodies = mixed_requests(60)

    async def test(client):
        replies = await asyncio.gather(*(client.post("/v1/recommend", json=body) for body in bodies))
        for body, reply in zip(bodies, replies, strict=True):
            assert reply.status_code == 200, reply.text
            assert_same_items(reply.json()["items"], offline(recommender, body))
        assert metric(client, "flr_batch_size_count") < 30  # they were computed together
        assert metric(client, "flr_batch_size_sum") == 60

    with_client(recommender, test, max_wait_ms=20)


def test_explanations_are_those_without_a_server(recommender):
    bodies = [
        {"history": [f"item_{i}" for i in range(n)], "k": 1 + n % 4, "exclude_seen": n % 2 == 0} for n in range(13)
    ]

    async def test(client):
        replies = await asyncio.gather(*(client.post("/v1/explain", json=body) for body in bodies))
        for body, reply in zip(bodies, replies, strict=True):
            given = reply.json()
            expected = recommender.explain(**body).to_dict()
            assert_same_items(given["recommendations"], expected["recommendations"])
            for name in ("attention", "gates", "norms"):
                np.testing.assert_allclose(given[name], expected[name], atol=2e-5, err_msg=name)
            assert [one["total"] for one in given["effects"]["items"]] == pytest.approx(
                [sum(item["contributions"]) for item in given["recommendations"]]
            )
            for name in ("variant", "num_factors", "history", "unknown"):
                assert given[name] == expected[name]
        assert metric(client, "flr_batch_size_count") < 13

    with_client(recommender, test, max_wait_ms=20)


@pytest.mark.parametrize("variant", ["none", "anchor"])
def test_models_without_factors(variant):
    async def test(client):
        given = (await client.post("/v1/explain", json={"history": ["item_3"], "k": 2})).json()
        assert (given["attention"], given["gates"], given["norms"]) == ([], [], [])
        assert len(given["recommendations"]) == 2
        assert (await client.get("/v1/info")).json()["num_factors"] == 0

    with_client(build_recommender(variant=variant), test)


def test_unknown_names_and_skipping(recommender):
    async def test(client):
        body = {"history": ["item_1", "nonsense"], "deny": ["rubbish"]}
        reply = await client.post("/v1/recommend", json=body)
        assert reply.status_code == 422
        assert reply.json()["error"] == "history[1]: 'nonsense' is no id and no title of the catalogue"
        reply = (await client.post("/v1/recommend", json={**body, "on_unknown": "skip"})).json()
        assert reply["unknown"] == ["nonsense", "rubbish"]
        assert_same_items(reply["items"], offline(recommender, {"history": ["item_1"]}))
        reply = await client.post("/v1/recommend", json={"history": [], "where": {"colour": ["red"]}})
        assert reply.status_code == 422
        assert "expected attributes of the catalogue" in reply.json()["error"]

    with_client(recommender, test)


def test_items_info_and_openapi(recommender, tmp_path):
    examples = tmp_path / "examples.txt"
    examples.write_text("item_3\titem_4\n\nbrave jazz 1\n")

    async def test(client):
        info = (await client.get("/v1/info")).json()
        assert [len(x) for x in info["examples"]] == [2, 1]
        assert (info["num_items"], info["variant"], info["num_factors"]) == (40, "flr", 3)
        found = (await client.get("/v1/items", params={"q": "JAZZ", "limit": 3, "offset": 1})).json()
        assert len(found["items"]) == 3
        assert all("Jazz" in item["title"] for item in found["items"])
        assert (await client.get("/v1/items", params={"limit": 51})).status_code == 422
        assert (await client.get("/v1/items", params={"q": "x" * 201})).status_code == 422
        schema = (await client.get("/openapi.json")).json()
        assert schema["components"]["schemas"]["RecommendRequest"]["properties"]["k"]["maximum"] == 7
        for path in ("/", "/static/app.css", "/static/app.js"):
            page = await client.get(path)
            assert page.status_code == 200
            assert "default-src 'none'" in page.headers["content-security-policy"]
        assert "unsafe" not in page.headers["content-security-policy"]

    with_client(recommender, test, examples=str(examples), max_k=7)
    examples.write_text("no such thing")
    with pytest.raises(ValueError, match="is no id and no title"):
        with_client(recommender, test, examples=str(examples))


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"history"',
        b"\xff\xfe",
        b"[" * 50_000,
        b'{"history": ' + b"[" * 50_000,
        b'{"history": ["item_1"], "k": 0}',
        b'{"history": ["item_1"], "k": 101}',
        b'{"history": ["item_1"], "k": "3"}',
        b'{"history": ["item_1"], "k": true}',
        b'{"history": ["item_1"], "k": 1e400}',
        b'{"history": ["item_1"], "k": NaN}',
        b'{"history": ["item_1"], "k": ' + b"9" * 5000 + b"}",
        b'{"history": ["item_1"], "num_beams": -1}',
        b'{"history": ["item_1"], "scoring": "best"}',
        b'{"history": ["item_1"], "timeout_ms": 10001}',
        b'{"history": ["item_1"], "surprise": 1}',
        b'{"history": "item_1"}',
        b'{"history": ["\\ud800"]}',
        b'{"\\ud800": 1, "history": []}',
        b'{"history": [""]}',
        b'{"history": [null]}',
        b'{"k": 3}',
        json.dumps({"history": ["item_1"] * 501}).encode(),
        json.dumps({"history": ["x" * 1001]}).encode(),
        json.dumps({"history": [], "deny": ["item_1"] * 1001}).encode(),
        json.dumps({"history": [], "where": {"interest": ["x"]}}).encode(),
        json.dumps({"history": [], "where": {str(i): [] for i in range(9)}}).encode(),
    ],
)
def test_malformed_bodies(recommender, body):
    async def test(client):
        reply = await client.post("/v1/recommend", content=body, headers={"content-type": "application/json"})
        assert reply.status_code in (400, 422), reply.text
        problem = reply.json()
        assert problem["error"]
        assert problem["request_id"] == reply.headers["x-request-id"]
        assert metric(client, "flr_batch_size_count") == 0

    with_client(recommender, test)


def test_limits_of_requests_are_those_of_the_settings(recommender):
    limits = {"max_k": 4, "max_num_beams": 6, "num_beams": 5, "max_history": 2, "max_filter": 3, "max_text": 9}
    within = {"history": ["item_1"] * 2, "k": 4, "num_beams": 6, "deny": ["item_2"] * 3}
    beyond = {"history": ["item_1"] * 3, "k": 5, "num_beams": 7, "deny": ["item_2"] * 4, "allow": ["item_1" + "0" * 4]}

    async def test(client):
        assert (await client.post("/v1/recommend", json=within)).status_code == 200
        for name, value in beyond.items():
            assert (await client.post("/v1/recommend", json={**within, name: value})).status_code == 422, name

    with_client(recommender, test, **limits)


def test_a_failure_is_a_500_without_its_text(recommender, monkeypatch, caplog):
    def broken(*_, **__):
        raise FloatingPointError("the secret reason")

    async def test(client):
        monkeypatch.setattr(recommender, "ranked", broken)
        reply = await client.post("/v1/recommend", json={"history": ["item_1"]})
        assert (reply.status_code, reply.json()["error"]) == (500, "internal error")
        assert reply.json()["request_id"] in [getattr(r, "fields", {}).get("id") for r in caplog.records]
        monkeypatch.undo()
        assert (await client.post("/v1/recommend", json={"history": ["item_1"]})).status_code == 200

    with_client(recommender, test)
    assert "the secret reason" in caplog.text


# ---------------------------------------------------------------- reload


def test_reload_takes_over_and_a_broken_one_does_not(recommender, tokens):
    user, admin = tokens
    larger = build_recommender("sid", catalogue=named_catalogue(60, seed=2))
    answers = [larger, ValueError("the folder is broken")]

    def load():
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def test(client):
        body = {"history": ["item_1"], "k": 3}
        first = (await client.post("/v1/recommend", json=body, headers=user)).json()
        assert_same_items(first["items"], offline(recommender, body))
        assert (await client.post("/v1/recommend", json={"history": ["item_50"]}, headers=user)).status_code == 422
        done = await client.post("/v1/reload", headers=admin)
        assert done.json() | {"seconds": 0} == {"generation": 2, "num_items": 60, "seconds": 0}
        second = (await client.post("/v1/recommend", json=body, headers=user)).json()
        assert (first["generation"], second["generation"]) == (1, 2)
        assert_same_items(second["items"], offline(larger, body))
        assert (await client.get("/v1/items", params={"q": "item_50"}, headers=user)).json()["total"] == 1
        failed = await client.post("/v1/reload", headers=admin)
        assert failed.status_code == 409
        assert "the folder is broken" in failed.json()["error"]
        third = (await client.post("/v1/recommend", json=body, headers=user)).json()
        assert third["generation"] == 2
        assert metric(client, "flr_reloads_total", result="failed") == 1

    with_client(recommender, test, load=load)


def test_reload_needs_an_admin_token(recommender):
    async def test(client):
        reply = await client.post("/v1/reload")
        assert reply.status_code == 403
        assert "SIGHUP" in reply.json()["error"]

    with_client(recommender, test, load=lambda: recommender)


def test_answers_do_not_depend_on_the_default_dtype(recommender):
    """Loading a bfloat16 model sets torch's default dtype for the whole process, while the old model answers."""
    bodies = [{**body, "shares": True} for body in mixed_requests(12)]
    expected = [offline(recommender, body) for body in bodies]
    torch.set_default_dtype(torch.bfloat16)
    try:
        given = [offline(recommender, body) for body in bodies]
    finally:
        torch.set_default_dtype(torch.float32)
    for a, b in zip(given, expected, strict=True):
        assert_same_items(a, b)


def test_without_the_extra():
    code = """
import sys
from flr.cli import main
import flr
flr.Recommender
for missing in ("fastapi", "uvicorn", "prometheus_client"):
    for name in [name for name in sys.modules if name.startswith("flr.serve")]:
        del sys.modules[name]
    sys.modules[missing] = None
    assert main(["serve"]) == 1
    del sys.modules[missing]
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for missing in ("fastapi", "uvicorn", "prometheus_client"):
        assert f'flr serve: this command needs {missing}: pip install "flr[serve]"' in done.stderr


def test_a_client_that_leaves_is_not_computed(recommender):
    async def test(client):
        gate = client.gate
        sent: list[dict] = []
        body = json.dumps({"history": ["item_1"]}).encode()
        messages = [{"type": "http.request", "body": body, "more_body": False}, {"type": "http.disconnect"}]

        async def receive():
            await asyncio.sleep(0.01)
            return messages.pop(0)

        async def send(message):
            sent.append(message)

        headers = [(b"host", b"localhost"), (b"content-type", b"application/json"), (b"content-length", b"23")]
        scope = {"type": "http", "method": "POST", "path": "/v1/recommend", "headers": headers, "query_string": b""}
        gate.engine.announce(1)  # another one is on its way, so this one waits
        await gate(scope, receive, send)
        assert sent == []
        await asyncio.sleep(0.6)
        assert metric(client, "flr_batch_size_count") == 0
        assert metric(client, "flr_dropped_total", reason="gone") == 1
        assert metric(client, "flr_requests_total", path="/v1/recommend", status="499") == 1

    with_client(recommender, test, max_wait_ms=500)
