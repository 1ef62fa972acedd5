"""``flr serve``: recommendations over HTTP, with a page; from this process, or from replicas on a Ray cluster."""

from __future__ import annotations

import logging

from . import voice
from .parsing import parse

ABOUT = "Serve recommendations over HTTP: /v1/recommend, /v1/explain, and a page that shows what the factors do."


def main(argv: list[str]) -> int:
    from flr.serve.scaling import Scaling
    from flr.serve.settings import Settings

    settings, scaling, rest = parse("serve", ABOUT, (Settings, Scaling), argv)
    voice.manner.logs = False  # a server's log is lines of JSON
    if rest.quiet:
        logging.getLogger("flr.serve").setLevel(logging.WARNING)
    from flr.serve.server import run

    return run(settings, scaling)
