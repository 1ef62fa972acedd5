"""The application: routes over an :class:`~flr.serve.engine.Engine`, and the page.

No ``from __future__ import annotations`` here: the bodies' models are made from the settings inside :func:`create_app`, and FastAPI
reads the annotations.
"""

import asyncio
import functools
import json
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
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

from .engine import Busy, Engine, Job, Late, Loaded
from .metrics import Metrics
from .middleware import Gate, Trace, problem
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
from .settings import Settings

logger = logging.getLogger("flr.serve")

_STATIC = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/static/app.css": ("app.css", "text/css; charset=utf-8"),
    "/static/app.js": ("app.js", "text/javascript; charset=utf-8"),
}
_OPEN = frozenset({*_STATIC, "/health", "/ready", "/openapi.json"})
_EXAMPLES, _EXAMPLE_LENGTH = 12, 6
_SAID = {
    400: "The request is not HTTP or not JSON",
    401: "No valid bearer token",
    413: "The body is too long",
    415: "The body is not application/json",
    421: "Not this server's host name",
    422: "The body, or a name in it, is not in order",
    429: "Too many requests wait; Retry-After says when to come again",
    503: "Not ready",
    504: "The deadline passed in the queue",
}


class _Unknown(Exception):
    """A ValueError about the request's own content."""


def create_app(
    recommender: Recommender,
    settings: Settings | None = None,
    load: Callable[[], Recommender] | None = None,
) -> Gate:
    """The ASGI application.

    Args:
        recommender: what to serve.
        settings: limits and tokens (``model``, ``host`` and ``port`` are for whoever runs the application).
        load: reads the model anew for a reload; None: there is no reloading.

    Returns:
        An ASGI callable with the attributes ``engine`` (:class:`Engine`), ``fastapi`` and ``draining`` (set it before shutting down:
        /ready says 503 and connections close after their answer).

    Raises:
        ValueError, OSError: a token that is too short, examples that are not in the catalogue.
    """
    settings = Settings() if settings is None else settings
    tokens = settings.tokens()
    metrics = Metrics()
    engine = Engine(Loaded.warm(recommender, 1, settings), settings, load, metrics)
    given_examples = _read_examples(settings.examples, recommender)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        engine.start()
        metrics.ready.set(1)
        yield
        metrics.ready.set(0)
        await engine.close()

    app = FastAPI(
        title="FLR recommender",
        version=flr.__version__,
        summary="Recommendations by factorized latent reasoning, and why.",
        lifespan=lifespan,
        docs_url=None,  # its page loads scripts from elsewhere
        redoc_url=None,
    )
    recommend_request, explain_request = request_models(settings)

    def said(*statuses: int) -> dict[int | str, dict[str, Any]]:
        return {status: {"model": Problem, "description": _SAID[status]} for status in statuses}

    async def aside(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Names and searches: short, and not the event loop's business."""
        return await asyncio.get_running_loop().run_in_executor(None, functools.partial(call, *args, **kwargs))

    async def answer(request: Request, body: Any, kind: Any) -> tuple[Any, Job]:
        trace: Trace = request.scope["flr"]
        if settings.log_histories:
            trace.fields["history"] = body.history
        engine.check_room()
        model = engine.model
        query, unknown = await aside(_query, model.recommender, body)
        job = Job(
            model=model,
            query=query,
            unknown=unknown,
            num_beams=max(body.num_beams, body.k),
            scoring=resolve_scoring(body.scoring, model.recommender.processor.scoring),
            kind=kind,
            deadline=trace.started + body.timeout_ms / 1000,
        )
        gate.has_come(trace)  # nothing else runs before it stands in the queue
        found = await engine.submit(job)
        trace.fields |= {
            "generation": model.generation,
            "batch": found.batch_size,
            "waited_ms": round(1000 * found.waited, 2),
        }
        return found.result, job

    @app.post("/v1/recommend", response_model=RecommendResponse, responses=said(400, 401, 413, 415, 421, 422, 429, 504))
    async def recommend(body: recommend_request, request: Request) -> Response:  # type: ignore[valid-type]
        """The k best items for a history."""
        items, job = await answer(request, body, "shares" if body.shares else "recommend")  # type: ignore[attr-defined]
        return _json(
            {
                "items": [item.to_dict() for item in items],
                "unknown": job.unknown,
                "generation": job.model.generation,
                "request_id": request.scope["flr"].id,
            }
        )

    @app.post("/v1/explain", response_model=ExplainResponse, responses=said(400, 401, 413, 415, 421, 422, 429, 504))
    async def explain(body: explain_request, request: Request) -> Response:  # type: ignore[valid-type]
        """The k best items, what every factor attended to, and what it contributed to each of them."""
        explanation, job = await answer(request, body, "explain")
        more = {"generation": job.model.generation, "request_id": request.scope["flr"].id}
        return _json({**explanation.to_dict(), **more})

    @app.get("/v1/items", response_model=ItemsResponse, responses=said(401, 421, 422))
    async def items(
        q: Annotated[str, Query(max_length=200, description="Words of a title or id.")] = "",
        offset: Annotated[int, Query(ge=0, le=2000)] = 0,
        limit: Annotated[int, Query(ge=1, le=50)] = 10,
    ) -> Response:
        """Items of the catalogue by parts of their titles or ids."""
        model = engine.model
        hits = await aside(model.search, q)
        found = [_item(model.recommender, index) for index in hits.indices[offset : offset + limit]]
        return _json({"items": found, "total": len(hits.indices), "complete": hits.complete})

    @app.get("/v1/info", response_model=InfoResponse, responses=said(401, 421))
    async def info() -> Response:
        """What is served."""
        model = engine.model
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

    @app.post(
        "/v1/reload",
        response_model=ReloadResponse,
        responses={
            **said(401, 413, 415, 421),
            403: {"model": Problem, "description": "No admin token was set"},
            409: {"model": Problem, "description": "The reload failed; the old model still serves"},
        },
    )
    async def reload(request: Request) -> Response:
        """Read the model's folder anew; requests go on meanwhile, with the old model, and none is dropped."""
        started = time.monotonic()
        try:
            model = await asyncio.shield(engine.reload())
        except Exception as error:
            return _problem(request, 409, f"not reloaded: {error}")
        number = len(model.recommender.processor.catalogue)
        seconds = round(time.monotonic() - started, 3)
        return _json({"generation": model.generation, "num_items": number, "seconds": seconds})

    @app.get("/health", response_model=StatusResponse, responses=said(503))
    async def health(request: Request) -> Response:
        """200 while the process does its work: restart it otherwise."""
        return _json({"status": "ok"}) if engine.alive else _problem(request, 503, "the engine has stopped")

    @app.get("/ready", response_model=StatusResponse, responses=said(503))
    async def ready(request: Request) -> Response:
        """200 while requests are welcome: 503 from SIGTERM on."""
        if gate.draining or not engine.alive:
            return _problem(request, 503, "draining" if gate.draining else "the engine has stopped")
        return _json({"status": "ready"})

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}, **said(401, 421)})
    async def measured() -> Response:
        """In Prometheus' text format."""
        metrics.ready.set(int(engine.alive and not gate.draining))
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    for path, (name, media_type) in _STATIC.items():
        content = (files("flr.serve") / "static" / name).read_bytes()
        app.get(path, include_in_schema=False)(_static(content, media_type))

    @app.exception_handler(RequestValidationError)
    async def malformed(request: Request, error: RequestValidationError) -> Response:
        return _problem(request, 422, "the request is not in order", _details(error))

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> Response:
        return _problem(request, error.status_code, str(error.detail), headers=error.headers)

    @app.exception_handler(_Unknown)
    async def unknown(request: Request, error: _Unknown) -> Response:
        return _problem(request, 422, str(error))

    @app.exception_handler(Busy)
    async def busy(request: Request, error: Busy) -> Response:
        return _problem(request, 429, str(error), headers={"retry-after": str(error.retry_after)})

    @app.exception_handler(Late)
    async def late(request: Request, error: Late) -> Response:
        return _problem(request, 504, "the deadline passed before the request was computed")

    @app.exception_handler(Exception)
    async def broken(request: Request, error: Exception) -> Response:  # raised again for the gate, which logs it
        return _problem(request, 500, "internal error")

    paths = frozenset({*_STATIC, *app.openapi()["paths"], "/openapi.json"})
    gate = Gate(app, settings, metrics, paths, _OPEN, tokens)
    gate.engine, gate.fastapi = engine, app
    return gate


def _query(recommender: Recommender, body: Any) -> tuple[Any, list[str]]:
    try:
        history, strangers = recommender.names("history", body.history, body.on_unknown, suggest=False)
        allowed, denied, others = recommender.selection(
            body.allow, body.deny, body.where, body.on_unknown, suggest=False
        )
    except ValueError as error:
        raise _Unknown(str(error)) from None
    return recommender.query(history, body.k, body.exclude_seen, allowed, denied), strangers + others


def _json(content: Any, status: int = 200) -> Response:
    return Response(json.dumps(content, allow_nan=False).encode("ascii"), status, media_type="application/json")


def _problem(request: Request, status: int, error: str, details: Any = None, headers: Any = None) -> Response:
    return Response(problem(error, request.scope["flr"], details), status, headers, media_type="application/json")


def _details(error: RequestValidationError) -> list[dict[str, Any]]:
    """Where and what, without the values that were sent: they may be long, private, or no JSON."""
    kept = ("loc", "msg", "type")
    return [{name: part[name] for name in kept if name in part} for part in error.errors()[:20]]


def _static(content: bytes, media_type: str) -> Callable[[], Any]:
    async def serve() -> Response:
        return Response(content, media_type=media_type, headers={"cache-control": "no-cache"})

    return serve


def _item(recommender: Recommender, index: int) -> dict[str, str]:
    catalogue = recommender.processor.catalogue
    return {"item_id": catalogue.item_ids[index], "title": catalogue.titles[index]}


def _read_examples(path: str | None, recommender: Recommender) -> list[list[str]] | None:
    """Item ids of the histories in a file; ValueError naming one that the catalogue lacks."""
    if path is None:
        return None
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    found = recommender.resolve([line.split("\t") for line in lines if line.strip()])
    return [[recommender.processor.catalogue.item_ids[i] for i in history] for history in found.histories]


def _examples(recommender: Recommender, given: list[list[str]] | None) -> list[list[dict[str, str]]]:
    """Histories for the page: those of the file as far as the catalogue still has their items, else random ones."""
    catalogue = recommender.processor.catalogue
    if given is None:
        rng = np.random.default_rng(len(catalogue))
        drawn = rng.integers(0, len(catalogue), (_EXAMPLES, min(_EXAMPLE_LENGTH, len(catalogue))))
        return [[_item(recommender, index) for index in row] for row in drawn.tolist()]
    known = [[index for name in history for index in catalogue.lookup(name)[:1]] for history in given]
    return [[_item(recommender, index) for index in row] for row in known]
