"""An HTTP server around :class:`flr.Recommender`: ``flr serve``, or :func:`create_app` inside a server of your own.

Needs the extra ``serve`` (FastAPI, uvicorn, prometheus-client); nothing else of the package imports this one.
"""

from typing import TYPE_CHECKING

from flr.lazy import attach

if TYPE_CHECKING:
    from .app import create_app
    from .engine import Engine, Loaded
    from .settings import Settings
else:  # flr serve --help reads the settings alone
    __getattr__, __dir__ = attach(
        __name__, {"app": ["create_app"], "engine": ["Engine", "Loaded"], "settings": ["Settings"]}
    )

__all__ = ["Engine", "Loaded", "Settings", "create_app"]
