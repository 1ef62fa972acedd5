"""The routes over an engine, the page, and what errors are answered with.

There is no ``from __future__ import annotations`` here: FastAPI reads the annotations of the routes, and the bodies'
models are made from the settings inside :func:`add_recommendations`.
"""

import asyncio
import json
import time
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

import flr
from flr.decode.scoring import resolve_scoring
from flr.recommend import Recommender

from .engine import DeadlineExceeded, Engine, Job, Kind, QueueFull
from .middleware import Middleware, Trace, problem
from .schemas import (
    ExplainResponse,
    InfoResponse,
    ItemsResponse,
    Problem,
    RecommendResponse,
    ReloadResponse,
    StatusResponse,
    request_models,
)

#: The page's files and their media types, by path.
PAGE = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/static/app.css": ("app.css", "text/css; charset=utf-8"),
    "/static/app.js": ("app.js", "text/javascript; charset=utf-8"),
}
_EXAMPLES, _EXAMPLE_LENGTH = 12, 6
_DESCRIPTIONS = {
    400: "The request is not HTTP or not JSON",
    401: "No valid bearer token",
    403: "No admin token was set",
    409: "The reload failed; the old model still serves",
    413: "The body is too long",
    415: "The body is not application/json",
    421: "Not this server's host name",
    422: "The body, or a name in it, is not in order",
    429: "Too many requests wait; Retry-After says when to come again",
    503: "Not ready",
    504: "The deadline passed in the queue",
}
Examples = list[list[str]] | None


class _InvalidQuery(Exception):
    """A ValueError about the names or filters of a request."""


def add_recommendations(app: FastAPI, middleware: Middleware[Any], engine: Engine) -> None:
    """/v1/recommend and /v1/explain."""
    recommend_request, explain_request = request_models(middleware.settings)
    responses = _problems(400, 401, 413, 415, 421, 422, 429, 504)

    @app.post("/v1/recommend", response_model=RecommendResponse, responses=responses)
    async def recommend(body: recommend_request, request: Request) -> Response:  # type: ignore[valid-type]
        """The k best items for a history."""
        kind: Kind = "shares" if body.shares else "recommend"  # type: ignore[attr-defined]
        items, job = await _answer(middleware, engine, request, body, kind)
        return _json({"items": [item.to_dict() for item in items], "unknown": job.unknown, **_origin(request, job)})

    @app.post("/v1/explain", response_model=ExplainResponse, responses=responses)
    async def explain(body: explain_request, request: Request) -> Response:  # type: ignore[valid-type]
        """The k best items, what every factor attended to, and what it contributed to each of them."""
        explanation, job = await _answer(middleware, engine, request, body, "explain")
        return _json({**explanation.to_dict(), "effects": explanation.effects(), **_origin(request, job)})


def add_catalogue(app: FastAPI, engine: Engine, given_examples: Examples) -> None:
    """/v1/items and /v1/info."""

    @app.get("/v1/items", response_model=ItemsResponse, responses=_problems(401, 421, 422))
    async def items(
        q: Annotated[str, Query(max_length=200, description="Words of a title or id.")] = "",
        offset: Annotated[int, Query(ge=0, le=2000)] = 0,
        limit: Annotated[int, Query(ge=1, le=50)] = 10,
    ) -> Response:
        """Items of the catalogue by parts of their titles or ids."""
        model = engine.model
        hits = await engine.search(model, q)
        shown = [_item(model.recommender, index) for index in hits.indices[offset : offset + limit]]
        return _json({"items": shown, "total": len(hits.indices), "complete": hits.complete})

    @app.get("/v1/info", response_model=InfoResponse, responses=_problems(401, 421))
    async def info() -> Response:
        """What is served."""
        model, settings = engine.model, engine.settings
        processor = model.recommender.processor
        return _json(
            {
                "version": flr.__version__,
                "generation": model.generation,
                "variant": model.recommender.variant,
                "num_factors": model.recommender.num_factors,
                "num_items": len(processor.catalogue),
                "codec": processor.codec,
                "max_history": settings.max_history,
                "used_history": processor.max_history,
                "max_k": settings.max_k,
                "scoring": settings.scoring,
                "attributes": sorted(processor.catalogue.attributes),
                "examples": _examples(model.recommender, given_examples),
            }
        )


def add_operations(app: FastAPI, middleware: Middleware[Any]) -> None:
    """/v1/reload, /health, /ready and /metrics."""
    engine = middleware.engine

    @app.post("/v1/reload", response_model=ReloadResponse, responses=_problems(401, 403, 409, 413, 415, 421))
    async def reload(request: Request) -> Response:
        """Read the model's folder anew; requests go on meanwhile, with the old model, and none is dropped."""
        started = time.monotonic()
        try:
            model = await asyncio.shield(engine.reload())
        except Exception as error:
            return _problem(request, 409, f"not reloaded: {error}")
        seconds = round(time.monotonic() - started, 3)
        return _json({"generation": model.generation, "num_items": model.num_items, "seconds": seconds})

    @app.get("/health", response_model=StatusResponse, responses=_problems(503))
    async def health(request: Request) -> Response:
        """200 while the process does its work: restart it otherwise."""
        return _json({"status": "ok"}) if engine.alive else _problem(request, 503, "the engine has stopped")

    @app.get("/ready", response_model=StatusResponse, responses=_problems(503))
    async def ready(request: Request) -> Response:
        """200 while requests are welcome: 503 from SIGTERM on."""
        if middleware.draining or not await engine.ready():
            return _problem(request, 503, "draining" if middleware.draining else engine.not_ready)
        return _json({"status": "ready"})

    in_text: dict[int | str, dict[str, Any]] = {200: {"content": {"text/plain": {}}}}

    @app.get("/metrics", response_class=Response, responses=in_text | _problems(401, 421))
    async def measured() -> Response:
        """In Prometheus' text format."""
        engine.metrics.ready.set(int(engine.alive and not middleware.draining))
        return Response(await engine.exposition(), media_type="text/plain; version=0.0.4; charset=utf-8")


def add_page(app: FastAPI) -> None:
    """The page and its static files."""
    for path, (name, media_type) in PAGE.items():
        content = (files("flr.serve") / "static" / name).read_bytes()
        app.get(path, include_in_schema=False)(_static(content, media_type))


def read_examples(path: str | None, recommender: Recommender) -> Examples:
    """Item ids of the histories in a file; ValueError naming one that the catalogue lacks."""
    if path is None:
        return None
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    histories = recommender.resolve([line.split("\t") for line in lines if line.strip()]).histories
    return [[recommender.processor.catalogue.item_ids[i] for i in history] for history in histories]


async def _failed(request: Request, error: Any) -> Response:
    """What an exception is answered with."""
    match error:
        case RequestValidationError():  # where and what, without the values: they may be long, private, or no JSON
            kept = ("loc", "msg", "type")
            details = [{name: part[name] for name in kept if name in part} for part in error.errors()[:20]]
            return _problem(request, 422, "the request is not in order", details)
        case HTTPException():
            return _problem(request, error.status_code, str(error.detail), headers=error.headers)
        case _InvalidQuery():
            return _problem(request, 422, str(error))
        case QueueFull():
            return _problem(request, 429, str(error), headers={"retry-after": str(error.retry_after)})
        case DeadlineExceeded():
            return _problem(request, 504, "the deadline passed before the request was computed")
        case _:  # raised again for the middleware, which logs it
            return _problem(request, 500, "internal error")


_ERRORS = (RequestValidationError, HTTPException, _InvalidQuery, QueueFull, DeadlineExceeded, Exception)
#: FastAPI's handlers, by the exception's class.
ERROR_HANDLERS: dict[int | type[Exception], Callable[[Request, Any], Any]] = dict.fromkeys(_ERRORS, _failed)


async def _answer(
    middleware: Middleware[Any], engine: Engine, request: Request, body: Any, kind: Kind
) -> tuple[Any, Job]:
    """Queue a request and wait for its result."""
    trace = _trace(request)
    if engine.settings.log_histories:
        trace.fields["history"] = body.history
    model = engine.model
    query, unknown = await asyncio.to_thread(_query, model.recommender, body)
    job = Job(
        model=model,
        query=query,
        unknown=unknown,
        num_beams=max(body.num_beams, body.k),
        scoring=resolve_scoring(body.scoring, model.recommender.processor.scoring),
        kind=kind,
        deadline=trace.started + body.timeout_ms / 1000,
    )
    middleware.mark_arrived(trace)  # nothing else runs before it stands in the queue
    answer = await engine.submit(job)
    waited_ms = round(1000 * answer.waited, 2)
    trace.fields |= {"generation": model.generation, "batch": answer.batch_size, "waited_ms": waited_ms}
    return answer.result, job


def _query(recommender: Recommender, body: Any) -> tuple[Any, list[str]]:
    """The query, and the names that were skipped. Searches the catalogue, so it runs beside the event loop."""
    filters = body.allow, body.deny, body.where
    try:
        history, unknown = recommender.names("history", body.history, body.on_unknown, suggest=False)
        allowed, denied, unknown_filters = recommender.selection(*filters, body.on_unknown, suggest=False)
    except ValueError as error:
        raise _InvalidQuery(str(error)) from None
    return recommender.query(history, body.k, body.exclude_seen, allowed, denied), unknown + unknown_filters


def _trace(request: Request) -> Trace:
    return request.scope["flr"]


def _origin(request: Request, job: Job) -> dict[str, Any]:
    return {"generation": job.model.generation, "request_id": _trace(request).id}


def _json(content: Any) -> Response:
    return Response(json.dumps(content, allow_nan=False).encode("ascii"), media_type="application/json")


def _problem(request: Request, status: int, error: str, details: Any = None, headers: Any = None) -> Response:
    return Response(problem(error, _trace(request), details), status, headers, media_type="application/json")


def _problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """What OpenAPI says of these statuses."""
    return {status: {"model": Problem, "description": _DESCRIPTIONS[status]} for status in statuses}


def _static(content: bytes, media_type: str) -> Callable[[], Any]:
    async def serve() -> Response:
        return Response(content, media_type=media_type, headers={"cache-control": "no-cache"})

    return serve


def _item(recommender: Recommender, index: int) -> dict[str, str]:
    catalogue = recommender.processor.catalogue
    return {"item_id": catalogue.item_ids[index], "title": catalogue.titles[index]}


def _examples(recommender: Recommender, given: Examples) -> list[list[dict[str, str]]]:
    """Histories for the page: those of the file as far as the catalogue still has their items, else random ones."""
    catalogue = recommender.processor.catalogue
    if given is None:
        rng = np.random.default_rng(len(catalogue))
        shape = _EXAMPLES, min(_EXAMPLE_LENGTH, len(catalogue))
        histories = rng.integers(0, len(catalogue), shape).tolist()
    else:
        histories = [[index for name in history for index in catalogue.lookup(name)[:1]] for history in given]
    return [[_item(recommender, index) for index in history] for history in histories]
