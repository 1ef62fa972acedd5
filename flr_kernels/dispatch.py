"""Which implementation of an op runs: ``reference`` (PyTorch), ``triton``, ``cuda``, ``host`` (C++ on one CPU
thread) or ``cce`` (the library cut-cross-entropy, for ``token_logprob``).

``FLR_BACKEND`` is ``auto`` (default), one backend for every op, or a comma-separated list with per-op choices::

    FLR_BACKEND=reference
    FLR_BACKEND=triton,group_advantage=cuda

``auto`` takes the first registered backend that accepts the tensors' device and shapes and falls back to the reference
(logged once, with the reason). A backend that is asked for by name is never replaced by another one: if it cannot run,
the call raises :class:`BackendUnavailable` (device, missing package) or ``ValueError`` (shape, dtype).
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

import torch
from torch.library import CustomOpDef

logger = logging.getLogger("flr_kernels")

BACKENDS = ("reference", "triton", "cuda", "host", "cce")
#: Order in which ``auto`` tries backends on a CUDA tensor; the others run when asked for.
_AUTO_ORDER = ("cuda", "triton", "reference")


class BackendUnavailable(RuntimeError):
    """Raised by a backend that cannot serve a call; the message says why and what to do."""


@dataclass
class Op:
    """The implementations of one op by backend name. ``reference`` is always present and serves every device."""

    name: str
    forward: dict[str, Callable] = field(default_factory=dict)
    backward: dict[str, Callable] = field(default_factory=dict)
    check: dict[str, Callable[..., None]] = field(default_factory=dict)
    on_cpu: tuple[str, ...] = ("reference",)

    def register(
        self,
        backend: str,
        forward: Callable,
        backward: Callable | None = None,
        check: Callable[..., None] | None = None,
        *,
        on_cpu: bool = False,
    ) -> None:
        """Plug in a backend. ``forward`` and ``backward`` take exactly the arguments of the reference ones.

        ``check`` takes the arguments of either and raises :class:`BackendUnavailable` or ``ValueError`` if the backend
        cannot serve them. ``on_cpu``: ``auto`` tries it on CPU tensors; others run there when asked for by name.
        """
        if backend not in BACKENDS:
            raise ValueError(f"backend: expected one of {BACKENDS}, got {backend!r}")
        self.forward[backend] = forward
        if backward is not None:
            self.backward[backend] = backward
        if check is not None:
            self.check[backend] = check
        if on_cpu:
            self.on_cpu = (backend, *self.on_cpu)


def on_use(module: str, function: str) -> Callable:
    """A function of a module that is imported at its first call, so that only running a kernel needs triton."""

    def call(*args: Any) -> Any:
        return getattr(importlib.import_module(module), function)(*args)

    return call


OPS: dict[str, Op] = {}


def op(name: str) -> Op:
    """The registry entry of an op, made on first use."""
    return OPS.setdefault(name, Op(name))


@lru_cache(maxsize=32)
def _parse(spec: str) -> dict[str, str]:
    chosen = {"*": "auto"}
    for part in filter(None, (p.strip() for p in spec.split(","))):
        name, _, backend = part.rpartition("=")
        if backend not in ("auto", *BACKENDS):
            raise ValueError(f"FLR_BACKEND: expected auto, {', '.join(BACKENDS)} or op=backend, got {part!r}")
        if name and name not in OPS:
            raise ValueError(f"FLR_BACKEND: unknown op {name!r}, expected one of {sorted(OPS)}")
        chosen[name or "*"] = backend
    return chosen


@lru_cache(maxsize=64)
def _log_once(message: str) -> None:
    logger.warning(message)


def select(name: str, tensor: torch.Tensor, *args, accepts: Callable[[str], None] | None = None) -> str:
    """The backend that runs op ``name`` on ``tensor``'s device; ``tensor`` and ``args`` are the op's arguments.

    ``accepts`` takes the place of the backends' own checks where there are no arguments yet: it raises as they do.

    Raises:
        BackendUnavailable: the backend named in ``FLR_BACKEND`` has no implementation of this op, or cannot run here.
        ValueError: the backend named in ``FLR_BACKEND`` does not take this shape or dtype.

    Example:
        >>> import torch
        >>> select("factor_attention", torch.zeros(1))
        'reference'
    """
    chosen = _parse(os.environ.get("FLR_BACKEND", "auto"))
    backend = chosen.get(name, chosen["*"])
    implementations = OPS[name].forward

    def check(candidate: str) -> None:
        if accepts is not None:
            accepts(candidate)
        elif candidate in OPS[name].check:
            OPS[name].check[candidate](tensor, *args)

    if backend != "auto":
        if backend not in implementations:
            raise BackendUnavailable(
                f"FLR_BACKEND asks for {backend!r}, but op {name!r} has only {sorted(implementations)}; "
                f"unset FLR_BACKEND or choose per op, e.g. FLR_BACKEND={backend},{name}=reference"
            )
        check(backend)
        return backend
    order = _AUTO_ORDER if tensor.is_cuda else OPS[name].on_cpu
    if len(order) == 1:
        return order[0]
    reasons = []
    for candidate in filter(implementations.__contains__, order):
        try:
            check(candidate)
        except (BackendUnavailable, ValueError) as reason:
            reasons.append(str(reason))
            continue
        if candidate == "reference":
            why = "; ".join(reasons) or "no GPU kernel of it is registered"
            _log_once(f"{name}: using the PyTorch reference: {why}")
        return candidate
    raise BackendUnavailable(f"op {name!r} has no implementation")  # not reachable: the reference is registered


def forward(name: str, tensor: torch.Tensor, *args):
    """Run the forward that :func:`select` picks; ``tensor`` is its first argument. Autocast is off inside."""
    with torch.autocast(tensor.device.type, enabled=False):
        return OPS[name].forward[select(name, tensor, *args)](tensor, *args)


def backward(name: str, tensor: torch.Tensor, *args):
    """Run the backward that belongs to :func:`forward`: the same device and shapes, the same choice."""
    with torch.autocast(tensor.device.type, enabled=False):
        return OPS[name].backward[select(name, tensor, *args)](tensor, *args)


def forward_op(name: str) -> Callable[[Callable], CustomOpDef]:
    """Decorates the function that makes an op's empty results: it becomes ``flr::name``, which runs :func:`forward`.

    The annotations of the function are the operator's schema, and the function itself is its fake implementation. The
    backends are called without the arguments that are equal to the function's defaults, and need the same ones.
    """
    return _operator(f"flr::{name}", name, forward)


def backward_op(name: str) -> Callable[[Callable], CustomOpDef]:
    """As :func:`forward_op`, for ``flr::name_backward``, which runs :func:`backward`."""
    return _operator(f"flr::{name}_backward", name, backward)


def _operator(qualified_name: str, name: str, run: Callable) -> Callable[[Callable], CustomOpDef]:
    def declare(empty_results: Callable) -> CustomOpDef:
        schema = torch.library.infer_schema(empty_results, mutates_args=())
        operator = torch.library.custom_op(qualified_name, partial(run, name), mutates_args=(), schema=schema)
        operator.register_fake(empty_results)
        return operator

    return declare
