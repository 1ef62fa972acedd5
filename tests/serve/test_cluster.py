"""The front of replicas, over a handle that stands for Ray Serve: what it does when they are lost or not there."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from tests.helpers.serving import metric  # skips where the server's packages are missing

import httpx  # isort: skip

from flr.serve.app import create_front
from flr.serve.cluster import Cluster, Errors, Forwarded, Reply
from flr.serve.metrics import Metrics, merged
from flr.serve.scaling import Scaling
from flr.serve.settings import Settings


class Lost(Exception):
    pass


class Full(Exception):
    pass


class Response:
    def __init__(self, work):
        self.work, self.cancelled = work, False

    def __await__(self):
        return self.work().__await__()

    def cancel(self):
        self.cancelled = True


class Handle:
    """Calls take the next of ``answers``: an exception, a reply, or a number of seconds to wait for ever after."""

    def __init__(self, *answers):
        self.answers, self.asked, self.responses, self.everyone = list(answers), [], [], []

    def __getattr__(self, name):
        handle = self

        class Method:
            def remote(self, *arguments):
                handle.asked.append(arguments)

                async def work():
                    answer = handle.answers.pop(0)
                    if answer is None:
                        await asyncio.Event().wait()
                    if isinstance(answer, Exception):
                        raise answer
                    return answer

                handle.responses.append(Response(work))
                return handle.responses[-1]

        return Method()

    def broadcast(self, name, *arguments):
        handle = self

        class All:
            async def results_async(self, return_exceptions):
                assert return_exceptions
                return handle.everyone

        self.asked.append((name, *arguments))
        return All()


def reply(generation=1, status=200, body=b"{}", headers=()):
    return Reply(status, [(b"content-type", b"application/json"), *headers], body, {"batch": 3}, generation)


def asked(handle, path="/v1/recommend", headers=None, method="POST", **settings):
    async def run():
        front = create_front(Cluster(handle, Settings(**settings), Errors((Lost,), (Full,))))
        transport = httpx.ASGITransport(app=front)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            client.gate = front
            content = {"json": {"history": []}} if method == "POST" else {}
            return await client.request(method, path, headers=headers, **content), client

    return asyncio.run(run())


def test_a_request_whose_replica_is_lost_goes_to_another_once():
    handle = Handle(Lost(), reply(body=b'{"x":1}', headers=[(b"x-frame", b"y"), (b"retry-after", b"7")]))
    answer, client = asked(handle)
    assert (answer.status_code, answer.json(), answer.headers["retry-after"]) == (200, {"x": 1}, "7")
    assert "x-frame" not in answer.headers
    first, second = (arguments[0] for arguments in handle.asked)
    assert isinstance(first, Forwarded)
    assert first.body == second.body
    assert second.spent >= first.spent > 0
    assert metric(client, "flr_replicas_lost_total") == 1
    answer, _ = asked(Handle(Lost(), Lost()))
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert answer.headers["x-request-id"] == answer.json()["request_id"]


def test_where_no_replica_has_room_or_answers_the_client_is_told_to_come_again(monkeypatch):
    monkeypatch.setattr("flr.serve.cluster._GRACE_S", 0.01)
    answer, _ = asked(Handle(Full()))
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    handle = Handle(None)
    answer, _ = asked(handle, timeout_ms=20)
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert handle.responses[0].cancelled  # nobody computes for nobody


def test_limits_and_tokens_hold_before_a_replica_is_asked(tokens):
    handle = Handle()
    user, _ = tokens
    assert asked(handle)[0].status_code == 401
    assert asked(handle, headers=user, max_body_bytes=1024, path="/v1/reload")[0].status_code == 401
    assert not handle.asked
    assert asked(Handle(reply(status=404)), "/nothing", user, "GET")[0].status_code == 404


def test_ready_is_that_of_a_replica_and_health_that_of_the_front():
    assert asked(Handle(), "/health", method="GET")[0].status_code == 200
    assert asked(Handle(4), "/ready", method="GET")[0].status_code == 200
    answer, _ = asked(Handle(Full()), "/ready", method="GET")
    assert (answer.status_code, answer.json()["error"]) == (503, "no replica answers")


def test_a_reload_counts_generations_and_says_which_replicas_could_not(tokens):
    _, admin = tokens

    async def test():
        handle = Handle()
        cluster = Cluster(handle, Settings(), Errors((Lost,), (Full,)))
        handle.everyone = [40, Lost()]  # a replica that is lost starts anew, from the new folder
        assert await cluster.reload() == (2, 40)
        handle.everyone = [40, ValueError("in a worker\nValueError: model: expected a folder, got none")]
        with pytest.raises(RuntimeError, match="1 of 2 replicas could not: ValueError: model: expected a folder"):
            await cluster.reload()
        assert cluster.generation == 2
        handle.answers = [3]  # the one that could has generation 3
        assert await cluster.ready()
        assert cluster.generation == 3
        handle.everyone = []
        with pytest.raises(RuntimeError, match="no replica is there"):
            await cluster.reload()
        assert [words for words in handle.asked if words] == [("reload", 3 - 1), ("reload", 3), ("reload", 4)]

    asyncio.run(test())
    handle = Handle()
    handle.everyone = [ValueError("no")]
    answer, _ = asked(handle, "/v1/reload", admin)
    assert answer.status_code == 409


def test_metrics_of_replicas_are_told_apart_and_requests_counted_once():
    front, replica = Metrics(), Metrics()
    for metrics in (front, replica):
        metrics.requests.labels("/v1/recommend", "200").inc()
    replica.batch_size.observe(4)
    replica.dropped.labels("late").inc()
    text = merged(front, {"a": replica.text().decode(), "b": replica.text().decode()}).decode()
    assert text.count("\nflr_requests_total{") == 1
    for name in ("a", "b"):
        assert f'flr_batch_size_count{{replica="{name}"}} 1.0' in text
        assert f'flr_dropped_total{{reason="late",replica="{name}"}} 1.0' in text
    assert text.count("# TYPE flr_batch_size histogram") == 1
    assert "flr_batch_size_count 0" not in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"replicas": 0, "ray": "auto"}, "replicas: expected 1 to 10000, got 0"),
        ({"replicas": 2}, "replicas: expected --ray ADDRESS beside it, got none"),
        ({"min_replicas": 2, "ray": "auto"}, "min_replicas: expected max_replicas beside it, got one of the two"),
        ({"min_replicas": 3, "max_replicas": 2, "ray": "auto"}, "max_replicas: expected 3 to 10000, got 2"),
        (
            {"min_replicas": 1, "max_replicas": 2, "replicas": 2, "ray": "auto"},
            "replicas: expected either that or min_replicas and max_replicas, got both",
        ),
        ({"target_requests": 5.0, "ray": "auto"}, "target_requests: expected min_replicas and max_replicas"),
    ],
)
def test_numbers_of_replicas_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Scaling(**options)


def test_what_a_replica_gets():
    settings = Settings(max_queue=10, max_batch_size=4, device="cuda", threads=3)
    found = Scaling(ray="auto", min_replicas=1, max_replicas=5).options(settings)
    assert found["ray_actor_options"] == {"num_cpus": 3, "num_gpus": 1.0}
    assert found["max_ongoing_requests"] >= 14
    assert found["autoscaling_config"] == {"min_replicas": 1, "max_replicas": 5, "target_ongoing_requests": 4}
    assert Scaling(ray="auto").options(replace(settings, device=None))["num_replicas"] == 1
