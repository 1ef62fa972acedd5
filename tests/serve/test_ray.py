"""The server over replicas on a Ray cluster of two simulated nodes: the plain server's answers, whatever happens."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.helpers import ray_cluster  # noqa: F401  sets Ray up before it is imported, and skips where it is missing

# isort: split

import ray
from ray import serve

from bench.load import Client, closed_loop, open_loop
from flr.recommend import Recommender
from flr.serve import Settings
from flr.serve.app import load
from flr.serve.ray import build
from flr.serve.server import bind
from tests.helpers.catalogues import named_catalogue
from tests.helpers.serving import ADMIN, TOKEN, assert_same_items, in_process, mixed_requests, offline, save, serving

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]
POOL = mixed_requests(24, k=5, num_beams=20)
USER, ADMINISTRATOR = {"authorization": f"Bearer {TOKEN}"}, {"authorization": f"Bearer {ADMIN}"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two models of different catalogues, and what each says to the pool."""
    place = tmp_path_factory.mktemp("models")
    found = [save(place / "first"), save(place / "second", catalogue=named_catalogue(60, seed=2))]
    return found, [[offline(Recommender.from_pretrained(f, "cpu"), body) for body in POOL] for f in found]


@pytest.fixture(scope="module")
def address(ray_nodes):
    """Of the cluster; what Ray Serve has brought is gone afterwards."""
    ray_nodes.restore()
    ray.init(address=ray_nodes.address, log_to_driver=False, logging_level="ERROR")
    yield ray_nodes.address
    serve.shutdown()
    ray.shutdown()


@pytest.fixture(scope="module")
def server(address, folders, tmp_path_factory):
    """``flr serve --ray`` with two replicas of a model whose folder is a link."""
    place = tmp_path_factory.mktemp("server")
    link = place / "live"
    link.symlink_to(folders[0][0])
    flags = ["--ray", address, "--replicas", "2"]
    tokens = {"FLR_SERVE_TOKEN": TOKEN, "FLR_SERVE_ADMIN_TOKEN": ADMIN}
    with serving(link, place / "log", *flags, environment=tokens, seconds=420) as process:
        process.link = link
        yield process
        process.signal(signal.SIGTERM)
        assert process.wait(60) == 0


def replica_processes() -> list[int]:
    """Of this machine, whoever started them."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                title = Path(f"/proc/{name}/cmdline").read_text()
            except OSError:  # it has ended
                continue
            if title.startswith("ray::ServeReplica:flr:Replica"):
                found.append(int(name))
    return found


def check(replies, answers, allowed=frozenset({200})):
    """Every answer is that of its generation; others are refusals that say when to come again."""
    statuses = Counter(reply.status for reply in replies)
    assert set(statuses) <= allowed, (statuses, [r.body[:300] for r in replies if r.status not in allowed][:3])
    for reply in replies:
        content = reply.json()
        if reply.status == 200:
            assert_same_items(content["items"], answers[(content["generation"] + 1) % 2][reply.number % len(POOL)])
        else:
            assert 1 <= int(reply.headers["retry-after"]) <= 60
    return statuses


def test_the_application_behind_rays_proxies(address, folders):
    """The builder, as ``serve run flr.serve.ray:build`` calls it: options as text. First, since it brings proxies."""
    (first, _), answers = folders
    with bind("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(build({"model": str(first), "replicas": "1", "max_k": "50"}), name="built", route_prefix="/")
    try:

        async def test():
            client = Client("127.0.0.1", port)
            check(await closed_loop(client, "/v1/recommend", POOL, 8), answers)
            assert b"<html" in (await client.request("GET", "/")).body
            refused = await client.request("POST", "/v1/recommend", {"history": [], "k": 60})
            assert refused.status == 422
            client.close()

        asyncio.run(test())
    finally:
        serve.delete("built")


def test_the_same_answers_refusals_and_pages_as_the_plain_server(server, folders, tokens):
    (first, _), answers = folders
    # as flr serve has them; the application runs in this process, which spares another that imports everything
    settings = {"model": str(first), "threads": 1}

    async def test():
        async with in_process(load(Settings(**settings)), lambda: None, **settings) as plain:
            ours = Client(server.host, server.port)
            check(await closed_loop(ours, "/v1/recommend", POOL, 8, USER), answers)
            cases = [
                ("GET", "/", None, {}),
                ("GET", "/openapi.json", None, {}),
                ("GET", "/health", None, {}),
                ("GET", "/ready", None, {}),
                ("GET", "/v1/items?q=item&limit=3", None, USER),
                ("GET", "/v1/info", None, USER),
                ("GET", "/v1/info", None, {}),
                ("PUT", "/v1/info", None, USER),
                ("GET", "/nothing", None, USER),
                ("POST", "/v1/explain", {"history": ["item_3"], "k": 2}, USER),
                ("POST", "/v1/recommend", {"history": ["no such item"]}, USER),
                ("POST", "/v1/recommend", {"history": ["item_3"], "k": 100_000}, USER),
                ("POST", "/v1/recommend", {"history": ["x" * 900] * 400}, USER),
                ("POST", "/v1/reload", None, USER),
            ]
            for method, path, body, headers in cases:
                sent = {**headers, "x-request-id": "one"}
                a = await ours.request(method, path, body, sent)
                b = await plain.request(method, path, json=body, headers=sent)
                assert (a.status, a.headers.get("content-type")) == (b.status_code, b.headers.get("content-type")), path
                if path == "/v1/explain":
                    mine, other = a.json(), b.json()
                    assert_same_items(mine.pop("recommendations"), other.pop("recommendations"))
                    assert mine.keys() == other.keys()
                    assert mine["history"] == other["history"]
                else:
                    assert a.body == b.content, path
                security = {"content-security-policy", "x-content-type-options", "x-request-id"}
                assert {k: a.headers[k] for k in security} == {k: b.headers[k] for k in security}
            text = (await ours.request("GET", "/metrics", None, USER)).body.decode()
            # the front counts requests, each replica its batches
            assert f'flr_requests_total{{path="/v1/recommend",status="200"}} {len(POOL)}.0' in text
            assert text.count("flr_batch_seconds_count{replica=") == 2
            late = await ours.request("POST", "/v1/recommend", {**POOL[0], "timeout_ms": 1}, USER)
            assert late.status == 504, late.body
            ours.close()

    asyncio.run(test())


def test_a_replica_is_killed_under_load_and_no_answer_is_wrong(server, folders):
    before = replica_processes()
    assert len(before) == 2

    def requests():
        """Kill the replica when 31 requests wait for answers and a third has been sent, however fast they are."""
        for number, body in enumerate(POOL * 12):
            if number == 4 * len(POOL):
                os.kill(before[0], signal.SIGKILL)
            yield body

    async def test():
        client = Client(server.host, server.port)
        check(await closed_loop(client, "/v1/recommend", POOL, 8, USER), folders[1])
        replies = await closed_loop(client, "/v1/recommend", requests(), 32, USER)
        text = (await client.request("GET", "/metrics", None, USER)).body.decode()
        client.close()
        return replies, float(text.split("\nflr_replicas_lost_total ")[1].split()[0])

    replies, lost = asyncio.run(test())
    statuses = check(replies, folders[1], frozenset({200, 503}))
    print(f"{lost:.0f} requests had lost their replica: {dict(statuses)}")
    assert len(replies) == 12 * len(POOL)
    assert lost > 0
    assert statuses[200] > 0.9 * len(replies)
    end = time.monotonic() + 60
    while len(after := replica_processes()) < 2 and time.monotonic() < end:
        time.sleep(0.2)
    assert len(after) == 2
    assert set(after) != set(before)  # another was started in its place


def test_a_rolling_reload_under_load_loses_nothing(server, folders):
    """Twice, so that the replica that was started meanwhile is asked too; a broken folder changes nothing."""
    (first, second), answers = folders

    async def test():
        client = Client(server.host, server.port)
        load = asyncio.create_task(open_loop(client, "/v1/recommend", lambda i: POOL[i % len(POOL)], 20, 8, USER))

        async def switch(folder):
            new = server.link.with_name("new")
            new.symlink_to(folder)
            new.replace(server.link)
            return await client.request("POST", "/v1/reload", headers=ADMINISTRATOR)

        await asyncio.sleep(0.5)
        done = await switch(second)
        assert done.status == 200, done.body
        assert (done.json()["generation"], done.json()["num_items"]) == (2, 60)
        done = await switch(second.parent)
        assert done.status == 409, done.body
        done = await switch(first)
        assert (done.status, done.json()["generation"]) == (200, 3), done.body
        replies = await load
        client.close()
        return replies

    replies = asyncio.run(test())
    assert check(replies, answers) == {200: len(replies)}
    assert set(Counter(reply.json()["generation"] for reply in replies)) == {1, 2, 3}
