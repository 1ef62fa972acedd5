"""``flr serve``: recommendations over HTTP, with a page."""

from __future__ import annotations

from .parsing import parse

ABOUT = "Serve recommendations over HTTP: /v1/recommend, /v1/explain, and a page that shows what the factors do."


def main(argv: list[str]) -> int:
    from flr.serve.settings import Settings

    settings, _ = parse("serve", ABOUT, (Settings,), argv)
    from flr.serve.server import run

    return run(settings)
