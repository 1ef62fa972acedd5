"""Every limit of the server in one place; the same dataclass is what ``flr serve`` takes as flags."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from flr.config import ATTENTION, MAX_BEAMS, MAX_ENTRIES, MAX_K, check_normalisation, option

TOKEN_VARIABLE, ADMIN_TOKEN_VARIABLE = "FLR_SERVE_TOKEN", "FLR_SERVE_ADMIN_TOKEN"
_SHORTEST_TOKEN = 16
_DTYPES = ("float32", "bfloat16", "float16", "float64")
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass
class Settings:
    """What to serve, where, and within which limits. ValueError for a value out of range."""

    model: str = option(
        "runs/sft",
        "Folder that flr sft wrote, or id of such a model on the Hub; read again at a reload, so it may be a "
        "symbolic link.",
    )
    revision: str | None = option(None, "Branch, tag or commit of a model on the Hub.")
    host: str = option("127.0.0.1", "Address to bind to; 0.0.0.0 for every interface.")
    port: int = option(8000, "Port; 0 for any free one (the first log line tells which).")
    device: str | None = option(None, "Where the model runs, e.g. cuda. Default: cuda where there is one.")
    dtype: str | None = option(None, "Backbone's dtype, e.g. bfloat16. Default: as saved.")
    attn_implementation: str | None = option(
        None, f"How the backbone computes its attention: {', '.join(ATTENTION)}. Default: what transformers chooses."
    )
    threads: int = option(0, "CPU threads of the model; 0 leaves it to PyTorch.")

    max_batch_size: int = option(32, "Requests that are computed together.")
    max_wait_ms: float = option(5.0, "How long a request waits for others that are on their way.")
    max_queue: int = option(256, "Requests that may wait; one more is answered 429.")
    timeout_ms: int = option(
        10_000, "Deadline of a request, and the longest it may ask for; 504 when it passes in the queue."
    )

    max_k: int = option(100, f"Largest k, up to {MAX_K}.")
    num_beams: int = option(20, "Beams where a request does not say.")
    max_num_beams: int = option(100, f"Most beams, up to {MAX_BEAMS}.")
    scoring: str = option("auto", "Scoring where a request does not say: full, catalogue, or auto: that of training.")
    max_history: int = option(500, f"Longest history, up to {MAX_ENTRIES} entries.")
    max_filter: int = option(1000, f"Longest allow- or deny-list, up to {MAX_ENTRIES} entries.")
    max_text: int = option(1000, "Longest id or title, in characters.")
    max_body_bytes: int = option(262_144, "Longest body; 413 beyond.")
    body_timeout_s: float = option(10.0, "How long a body may take to arrive; 408 after that.")
    header_timeout_s: float = option(10.0, "How long a request's first line and headers may take; 408 after that.")
    write_timeout_s: float = option(20.0, "How long an answer may wait for its client to read on.")
    keep_alive_s: int = option(20, "How long an idle connection stays open.")
    max_connections: int = option(
        1000, "Connections at a time; one more ends the one that has waited longest for its client, or is answered 503."
    )

    token_file: str | None = option(
        None,
        f"File with the bearer token that /v1 and /metrics ask for. Or set {TOKEN_VARIABLE}. Default: none asked for.",
    )
    admin_token_file: str | None = option(
        None,
        f"File with the bearer token for POST /v1/reload. Or set {ADMIN_TOKEN_VARIABLE}. "
        "Without one only SIGHUP reloads.",
    )
    allowed_hosts: list[str] = option(
        [],
        "Host names that requests may be addressed to. Default: this machine's own when bound to it alone, else any.",
    )
    drain_delay_s: float = option(1.0, "After SIGTERM: how long /ready says 503 before connections are refused.")
    drain_timeout_s: int = option(30, "After SIGTERM: how long requests in flight may take.")
    examples: str | None = option(
        None, "Example histories for the page: a line each, ids or titles separated by tabs. Default: random items."
    )
    log_histories: bool = option(False, "Write histories into the log.")

    def __post_init__(self) -> None:
        for name, least, most in (
            ("port", 0, 65535),
            ("threads", 0, 1024),
            ("max_batch_size", 1, 1024),
            ("max_wait_ms", 0, 10_000),
            ("max_queue", 1, 100_000),
            ("timeout_ms", 1, 600_000),
            ("max_k", 1, MAX_K),
            ("num_beams", 1, self.max_num_beams),
            ("max_num_beams", 1, MAX_BEAMS),
            ("max_history", 1, MAX_ENTRIES),
            ("max_filter", 1, MAX_ENTRIES),
            ("max_text", 1, 100_000),
            ("max_body_bytes", 1024, 1 << 30),
            ("body_timeout_s", 0.1, 3600),
            ("header_timeout_s", 0.1, 3600),
            ("write_timeout_s", 0.1, 3600),
            ("keep_alive_s", 1, 3600),
            ("max_connections", 1, 100_000),
            ("drain_delay_s", 0, 3600),
            ("drain_timeout_s", 1, 3600),
        ):
            value = getattr(self, name)
            if not least <= value <= most:
                raise ValueError(f"{name}: expected {least} to {most}, got {value!r}")
        check_normalisation("scoring", self.scoring, "auto")
        if self.dtype not in (None, *_DTYPES):
            raise ValueError(f"dtype: expected one of {', '.join(_DTYPES)}, got {self.dtype!r}")
        if self.attn_implementation not in (None, *ATTENTION):
            wanted = f"one of {', '.join(ATTENTION)}"
            raise ValueError(f"attn_implementation: expected {wanted}, got {self.attn_implementation!r}")

    @property
    def loopback(self) -> bool:
        """Bound to this machine alone."""
        return self.host in _LOOPBACK

    @property
    def hosts(self) -> frozenset[str] | None:
        """Host names that a request may be addressed to, None for any.

        A page of another site can make a browser send requests to 127.0.0.1, but under that site's name.
        """
        if self.allowed_hosts:
            return frozenset(host.lower() for host in self.allowed_hosts)
        return frozenset(_LOOPBACK) if self.loopback else None

    def tokens(self, environment: Mapping[str, str] = os.environ) -> tuple[bytes | None, bytes | None]:
        """Digests of the token and the admin token, None where there is none; ValueError for a short or doubled one."""
        return (
            _digest("token_file", self.token_file, TOKEN_VARIABLE, environment),
            _digest("admin_token_file", self.admin_token_file, ADMIN_TOKEN_VARIABLE, environment),
        )


def _digest(name: str, path: str | None, variable: str, environment: Mapping[str, str]) -> bytes | None:
    given = environment.get(variable)
    if path is not None:
        if given:
            raise ValueError(f"{name}: expected either the file or {variable}, got both")
        given = Path(path).read_text(encoding="utf-8").strip()
    elif not given:
        return None
    if len(given) < _SHORTEST_TOKEN or not given.isascii() or not given.isprintable() or " " in given:
        characters = f"{_SHORTEST_TOKEN} printable ASCII characters without spaces"
        raise ValueError(f"{name}: expected a token of at least {characters}, got {len(given)}")
    return token_digest(given.encode())


def token_digest(token: bytes) -> bytes:
    """What tokens are compared by: the same length whatever was sent."""
    return hashlib.sha256(token).digest()
