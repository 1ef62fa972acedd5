"""The application: the engine, FastAPI with the routes over it, and the middleware around both."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from fastapi import FastAPI

import flr
from flr.recommend import Recommender

from . import routes
from .engine import Engine, Loaded
from .middleware import Middleware
from .settings import Settings

_OPEN = frozenset({*routes.PAGE, "/health", "/ready", "/openapi.json"})


def create_app(
    recommender: Recommender,
    settings: Settings | None = None,
    load: Callable[[], Recommender] | None = None,
) -> Middleware:
    """The ASGI application.

    Args:
        recommender: what to serve.
        settings: limits and tokens (``model``, ``host`` and ``port`` are for whoever runs the application).
        load: reads the model anew for a reload; None: there is no reloading.

    Returns:
        An ASGI callable with the attributes ``engine`` (:class:`~flr.serve.engine.Engine`), ``fastapi`` and
        ``draining`` (set it before shutting down: /ready says 503 and connections close after their answer).

    Raises:
        ValueError, OSError: a token that is too short, examples that are not in the catalogue.
    """
    settings = Settings() if settings is None else settings
    tokens = settings.tokens()
    engine = Engine(Loaded.warm(recommender, 1, settings), settings, load)
    examples = routes.read_examples(settings.examples, recommender)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        engine.start()
        engine.metrics.ready.set(1)
        yield
        engine.metrics.ready.set(0)
        await engine.close()

    app = FastAPI(
        title="FLR recommender",
        version=flr.__version__,
        summary="Recommendations by factorized latent reasoning, and why.",
        lifespan=lifespan,
        docs_url=None,  # its page loads scripts from elsewhere
        redoc_url=None,
        exception_handlers=routes.ERROR_HANDLERS,
    )
    middleware = Middleware(app, engine, _OPEN, tokens)
    routes.add_recommendations(app, middleware)
    routes.add_catalogue(app, engine, examples)
    routes.add_operations(app, middleware)
    routes.add_page(app)
    middleware.paths |= app.openapi()["paths"].keys()
    return middleware
