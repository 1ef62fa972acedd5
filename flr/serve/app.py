"""The application: the engine, FastAPI with the routes over it, and the middleware around both.

The front of a cluster is the same without recommendations of its own: those come from replicas.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import torch
from fastapi import FastAPI

import flr
from flr.recommend import Recommender

from . import routes
from .cluster import Cluster, Unanswered, kept
from .engine import Engine, Loaded
from .middleware import Middleware, problem
from .settings import Settings

_OPEN = frozenset({*routes.PAGE, "/health", "/ready", "/openapi.json"})


def load(settings: Settings, like: Recommender | None = None) -> Recommender:
    """The model in ``settings.model``; with the catalogue of ``like`` where that is the same."""
    device = settings.device or ("cuda" if torch.cuda.is_available() else "cpu")
    given = {"dtype": settings.dtype, "attn_implementation": settings.attn_implementation}
    options: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    known = None if like is None else like.processor
    return Recommender.from_pretrained(settings.model, device, like=known, revision=settings.revision, **options)


def create_app(
    recommender: Recommender,
    settings: Settings | None = None,
    load: Callable[[], Recommender] | None = None,
    tokens: tuple[bytes | None, bytes | None] | None = None,
) -> Middleware[Engine]:
    """The ASGI application.

    Args:
        recommender: what to serve.
        settings: limits and tokens (``model``, ``host`` and ``port`` are for whoever runs the application).
        load: reads the model anew for a reload; None: there is no reloading.
        tokens: digests of the token and of the admin token; None: as the settings say.

    Returns:
        An ASGI callable with the attributes ``engine`` (:class:`~flr.serve.engine.Engine`), ``fastapi`` and
        ``draining`` (set it before shutting down: /ready says 503 and connections close after their answer).

    Raises:
        ValueError, OSError: a token that is too short, examples that are not in the catalogue.
    """
    settings = Settings() if settings is None else settings
    tokens = settings.tokens() if tokens is None else tokens
    engine = Engine(Loaded.warm(recommender, 1, settings), settings, load)
    examples = routes.read_examples(settings.examples, recommender)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        engine.start()
        engine.metrics.ready.set(1)
        yield
        engine.metrics.ready.set(0)
        await engine.close()

    app = _fastapi(lifespan)
    middleware = Middleware(app, engine, _OPEN, tokens)
    routes.add_recommendations(app, middleware, engine)
    routes.add_catalogue(app, engine, examples)
    routes.add_operations(app, middleware)
    routes.add_page(app)
    middleware.paths |= app.openapi()["paths"].keys()
    return middleware


#: What the replicas answer.
_FORWARDED = frozenset({"/v1/recommend", "/v1/explain", "/v1/items", "/v1/info", "/openapi.json"})


def create_front(cluster: Cluster) -> Middleware[Cluster]:
    """The ASGI application over replicas on a cluster: the same paths, limits and tokens as :func:`create_app`'s.

    Raises:
        ValueError: a token that is too short.
    """
    app = _fastapi(None, openapi_url=None)
    middleware = Middleware(app, cluster, _OPEN, cluster.settings.tokens())
    routes.add_operations(app, middleware)
    routes.add_page(app)
    middleware.paths |= app.openapi()["paths"].keys() | _FORWARDED

    async def forward(scope: Any, receive: Any, send: Any) -> None:
        try:
            reply = await cluster.answer(scope, (await receive())["body"])
            status, headers, body = reply.status, kept(reply.headers), reply.body
        except Unanswered as error:
            status, body = 503, problem(str(error), scope["flr"])
            headers = [(b"content-type", b"application/json"), (b"retry-after", b"1")]
        headers.append((b"content-length", str(len(body)).encode()))
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    app.mount("/", forward)
    return middleware


def _fastapi(lifespan: Any, **options: Any) -> FastAPI:
    return FastAPI(
        title="FLR recommender",
        version=flr.__version__,
        summary="Recommendations by factorized latent reasoning, and why.",
        lifespan=lifespan,
        docs_url=None,  # its page loads scripts from elsewhere
        redoc_url=None,
        exception_handlers=routes.ERROR_HANDLERS,
        **options,
    )
