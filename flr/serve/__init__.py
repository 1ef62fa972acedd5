"""An HTTP server around :class:`flr.Recommender`: ``flr serve``, or :func:`create_app` inside a server of your own.

Needs the extra ``serve`` (FastAPI, uvicorn, prometheus-client); nothing else of the package imports this one.
"""

from .app import create_app
from .engine import Engine, Loaded
from .settings import Settings

__all__ = ["Engine", "Loaded", "Settings", "create_app"]
