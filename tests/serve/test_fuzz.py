"""Requests that nobody would think of: none of them is answered 5xx, and every answer is what OpenAPI says.

FLR_FUZZ_CASES is about how many in all.
"""

from __future__ import annotations

import asyncio
import json
import os
import string
from collections import Counter

import hypothesis
import pytest
from hypothesis import HealthCheck, given
from hypothesis import strategies as st

from flr.serve import Settings, create_app
from tests.helpers.models import build_recommender
from tests.helpers.serving import in_process

schemathesis = pytest.importorskip("schemathesis")

pytestmark = pytest.mark.slow
CASES = int(os.environ.get("FLR_FUZZ_CASES", "10000"))
# a body of the right form may name items that the catalogue lacks, which is a 422 too;
# 504 is right where little time was asked for
_NOT_CHECKED = [schemathesis.checks.positive_data_acceptance, schemathesis.checks.not_a_server_error]
_STATUSES: dict[str, Counter[int]] = {}


@pytest.fixture(scope="module", autouse=True)
def _reached():
    """Not all that was sent to the model was refused, in whichever process it was sent."""
    yield
    if found := _STATUSES.get("/v1/recommend"):
        assert {200, 422} <= set(found), found


def several(cases: int):
    return hypothesis.settings(
        max_examples=max(cases, 10), deadline=None, database=None, derandomize=True,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip


GATE = create_app(build_recommender("sid"), Settings(max_wait_ms=0, max_history=50, allowed_hosts=["testserver"]))
OPERATIONS = 3  # with something to vary: recommend, explain, items
schema = schemathesis.openapi.from_asgi("/openapi.json", GATE)


@schema.parametrize()
@several(CASES // 2 // OPERATIONS)
def test_what_openapi_allows_and_what_it_does_not(case):
    response = case.call()
    # a body that is too long is refused as such, whatever else is wrong with it
    refused = [schemathesis.checks.negative_data_rejection] if response.status_code == 413 else []
    case.validate_response(response, excluded_checks=[*_NOT_CHECKED, *refused])
    _STATUSES.setdefault(case.path, Counter())[response.status_code] += 1
    hurried = response.status_code == 504 and case.body["timeout_ms"] < 5000
    assert response.status_code < 500 or hurried, response.text


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec=None), max_size=30),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=12,
)
names = st.sampled_from([f"item_{i}" for i in range(45)]) | st.text(max_size=20)
bodies = st.fixed_dictionaries(
    {"history": st.lists(names, max_size=15) | json_values},
    optional={
        "k": st.integers(-2, 120) | json_values,
        "num_beams": st.integers(-2, 120) | json_values,
        "scoring": st.sampled_from(["full", "catalogue"]) | json_values,
        "exclude_seen": st.booleans() | json_values,
        "shares": st.booleans() | json_values,
        "on_unknown": st.sampled_from(["raise", "skip", "skip"]) | json_values,
        "allow": st.lists(names, max_size=9) | json_values,
        "deny": st.lists(names, max_size=9) | json_values,
        "where": st.dictionaries(
            st.sampled_from(["interest", "series", "volume", "nothing"]), st.lists(json_values, max_size=3), max_size=3
        )
        | json_values,
        "timeout_ms": st.integers(-1, 20_000) | json_values,
        "surprise": json_values,
    },
)
header = st.tuples(
    st.sampled_from([
        "x-request-id", "authorization", "accept", "content-encoding", "expect", "cookie", "x-forwarded-for", "range",
    ]),
    st.binary(max_size=40).filter(lambda value: not set(value) & {0, 10, 13}),
)  # fmt: skip
requests = st.tuples(
    st.sampled_from(["POST"] * 12 + ["GET", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS", "TRACE", "QUERY"]),
    st.sampled_from([
        *["/v1/recommend"] * 5, *["/v1/explain"] * 3,
        "/v1/items", "/v1/reload", "/", "//", "/v1/../etc", "/v1/%00", "/static/",
    ])
    | st.text(string.printable, max_size=20).map(lambda text: "/" + text),
    st.one_of(
        bodies.map(lambda body: json.dumps(body).encode()),
        bodies.map(lambda body: json.dumps(body).encode()),
        json_values.map(lambda value: json.dumps(value).encode()),
        st.binary(max_size=200),
    ),
    st.lists(header, max_size=3),
    st.binary(max_size=30),
)  # fmt: skip


@pytest.fixture(scope="module")
def runner():
    loop = asyncio.new_event_loop()
    manager = in_process(build_recommender("sid"), max_wait_ms=0)
    client = loop.run_until_complete(manager.__aenter__())
    yield loop, client.gate
    loop.run_until_complete(manager.__aexit__(None, None, None))
    loop.close()


async def ask(gate, method, path, body, headers, query):
    """One request as raw ASGI: an HTTP client would not send most of these."""
    sent: list[dict] = []
    parts = [body[: len(body) // 2], body[len(body) // 2 :]]

    async def receive():
        if parts:
            part = parts.pop(0)
            return {"type": "http.request", "body": part, "more_body": bool(parts)}
        await asyncio.Event().wait()

    async def send(message):
        sent.append(message)

    given = [
        (b"host", b"localhost"),
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
    ]
    scope = {
        "type": "http", "http_version": "1.1", "method": method, "path": path, "query_string": query,
        "raw_path": path.encode("utf-8", "replace"), "scheme": "http",
        "headers": [*given, *((name.encode(), value) for name, value in headers)],
        "server": ("localhost", 80), "client": ("127.0.0.1", 1), "root_path": "",
    }  # fmt: skip
    await gate(scope, receive, send)
    return sent


@several(CASES - CASES // 2)
@given(request=requests)
def test_requests_of_any_kind(runner, request):
    loop, gate = runner
    method, _, body, *_ = request
    start, *rest = loop.run_until_complete(ask(gate, *request))
    status = start["status"]
    _STATUSES.setdefault("raw", Counter())[status] += 1
    content = b"".join(message.get("body", b"") for message in rest)
    hurried = status == 504 and json.loads(body)["timeout_ms"] < 5000
    assert 200 <= status < 500 or hurried, (status, content)
    assert [name for name, _ in start["headers"]].count(b"x-request-id") == 1
    kind = dict(start["headers"]).get(b"content-type", b"")
    if kind == b"application/json" and method != "HEAD":
        answer = json.loads(content)
        if status >= 400:
            assert set(answer) == {"error", "details", "request_id"}
