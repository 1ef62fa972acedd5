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
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, lru_cache, partial
from typing import Any

import torch
from torch.autograd import forward_ad, profiler
from torch.library import CustomOpDef

logger = logging.getLogger("flr_kernels")

_Tensor, _Parameter = torch.Tensor, torch.nn.Parameter
BACKENDS = ("reference", "triton", "cuda", "host", "cce")
#: Order in which ``auto`` tries backends on a CUDA tensor; the others run when asked for.
_AUTO_ORDER = ("cuda", "triton", "reference")
_NUMBER = re.compile(r"0x[0-9a-f]+|\d+")
#: What has been logged.
_SAID: set[str] = set()


class BackendUnavailable(RuntimeError):
    """Raised by a backend that cannot serve a call; the message says why and what to do."""


@dataclass
class Op:
    """The implementations of one op by backend name. ``reference`` is always present and serves every device."""

    name: str
    forward: dict[str, Callable] = field(default_factory=dict)
    backward: dict[str, Callable] = field(default_factory=dict)
    check: dict[str, Callable[..., None]] = field(default_factory=dict)
    suits: dict[str, Callable[..., bool]] = field(default_factory=dict)
    on_cpu: tuple[str, ...] = ("reference",)

    def register(
        self,
        backend: str,
        forward: Callable,
        backward: Callable | None = None,
        check: Callable[..., None] | None = None,
        *,
        suits: Callable[..., bool] | None = None,
        on_cpu: bool = False,
    ) -> None:
        """Plug in a backend. ``forward`` and ``backward`` take exactly the arguments of the reference ones.

        ``check`` takes the arguments of either and raises :class:`BackendUnavailable` or ``ValueError`` if the backend
        cannot serve them. ``suits`` takes them, too: where it is false, ``auto`` tries the others before. ``on_cpu``:
        ``auto`` tries it on CPU tensors; others run there when asked for by name.
        """
        if backend not in BACKENDS:
            raise ValueError(f"backend: expected one of {BACKENDS}, got {backend!r}")
        self.forward[backend] = forward
        if backward is not None:
            self.backward[backend] = backward
        if check is not None:
            self.check[backend] = check
        if suits is not None:
            self.suits[backend] = suits
        if on_cpu:
            self.on_cpu = (backend, *self.on_cpu)


def on_use(module: str, function: str) -> Callable:
    """A function of a module that is imported at its first call, so that only running a kernel needs triton."""

    @cache
    def found() -> Callable:
        return getattr(importlib.import_module(module), function)

    def call(*args: Any) -> Any:
        return found()(*args)

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


@lru_cache(maxsize=256)
def _asked_for(spec: str, name: str) -> str:
    chosen = _parse(spec)
    return chosen.get(name, chosen["*"])


def _log_once(message: str) -> None:
    """Log what has not been said, other numbers being the same: strides and addresses change from call to call."""
    kind = _NUMBER.sub("#", message)
    if kind not in _SAID:
        _SAID.add(kind)
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
    backend = _asked_for(os.environ.get("FLR_BACKEND", "auto"), name)
    if backend == "auto":
        return _first(OPS[name], tensor, args, accepts)
    if backend not in OPS[name].forward:
        raise BackendUnavailable(
            f"FLR_BACKEND asks for {backend!r}, but op {name!r} has only {sorted(OPS[name].forward)}; "
            f"unset FLR_BACKEND or choose per op, e.g. FLR_BACKEND={backend},{name}=reference"
        )
    _check(OPS[name], backend, tensor, args, accepts)
    return backend


def _check(op: Op, backend: str, tensor: torch.Tensor, args: tuple, accepts: Callable[[str], None] | None) -> None:
    if accepts is not None:
        accepts(backend)
    elif backend in op.check:
        op.check[backend](tensor, *args)


def _first(op: Op, tensor: torch.Tensor, args: tuple, accepts: Callable[[str], None] | None) -> str:
    """The first backend in ``auto``'s order that takes the call."""
    order = _AUTO_ORDER if tensor.is_cuda else op.on_cpu
    if len(order) == 1:
        return order[0]
    known = [backend for backend in order if backend in op.forward]
    if op.suits and accepts is None:
        late = {x for x in known if x in op.suits and not op.suits[x](tensor, *args)}
        known.sort(key=lambda x: (x == "reference", x in late))
    reasons = []
    for candidate in known:
        try:
            _check(op, candidate, tensor, args, accepts)
        except (BackendUnavailable, ValueError) as reason:
            reasons.append(str(reason))
            continue
        if candidate == "reference":
            why = "; ".join(reasons) or "no GPU kernel of it is registered"
            _log_once(f"{op.name}: using the PyTorch reference: {why}")
        return candidate
    raise BackendUnavailable(f"op {op.name!r} has no implementation")  # not reachable: the reference is registered


def forward(name: str, tensor: torch.Tensor, *args):
    """Run the forward that :func:`select` picks; ``tensor`` is its first argument. Autocast is off inside."""
    if torch.is_autocast_enabled(tensor.device.type):
        with torch.autocast(tensor.device.type, enabled=False):
            return forward(name, tensor, *args)
    return OPS[name].forward[select(name, tensor, *args)](tensor, *args)


def backward(name: str, tensor: torch.Tensor, *args):
    """Run the backward that belongs to :func:`forward`: the same device and shapes, the same choice."""
    if torch.is_autocast_enabled(tensor.device.type):
        with torch.autocast(tensor.device.type, enabled=False):
            return backward(name, tensor, *args)
    return OPS[name].backward[select(name, tensor, *args)](tensor, *args)


class Operator:
    """An operator of ``torch.library`` that a plain call reaches on a shorter way.

    The registered operator costs tens of microseconds of Python a call, more than a kernel takes. Where nothing looks
    at operators, the implementation runs directly, and where a gradient is recorded, inside of a
    ``torch.autograd.Function`` with the same formulas. Compiled and exported graphs, modes, transforms, subclasses of
    tensors, other devices and the profiler get the registered operator.
    """

    def __init__(self, name: str, definition: CustomOpDef, run: Callable):
        self.name, self._definition, self._run = name, definition, run
        self._registered: Callable = getattr(torch.ops.flr, name).default
        self._record = self._registered  # where a gradient is recorded

    def register_autograd(self, backward: Callable, *, setup_context: Callable) -> None:
        """As of ``torch.library.CustomOpDef``."""
        self._definition.register_autograd(backward, setup_context=setup_context)
        run = self._run

        def recorded(ctx: Any, *args: Any) -> Any:
            output = run(*args)
            setup_context(ctx, args, output)
            return output

        members = {"forward": staticmethod(recorded), "backward": staticmethod(backward)}
        function: Any = type(self.name, (torch.autograd.Function,), members)
        # apply of torch.autograd.Function looks for functorch first, whose absence _watched has seen
        self._record = super(torch.autograd.Function, function).apply  # type: ignore[misc]

    def __call__(self, *args: Any) -> Any:
        if torch.compiler.is_compiling():
            return self._registered(*args)
        if _watched():
            self._refuse_tangents(args)
            return self._registered(*args)
        wanted = False
        for x in args:
            kind = type(x)
            if kind is _Tensor or kind is _Parameter:
                if x.is_neg():  # its memory holds the opposite; torch.library resolves that
                    return self._registered(*args)
                wanted = wanted or x.requires_grad
            elif isinstance(x, _Tensor):
                return self._registered(*args)
        if not (args[0].is_cuda or args[0].is_cpu):
            return self._registered(*args)
        if wanted and torch.is_grad_enabled():
            return self._record(*args)
        return self._run(*args)

    def _refuse_tangents(self, args: tuple[Any, ...]) -> None:
        """Raise for forward derivatives: torch.library would leave them out in silence."""
        if forward_ad._current_level < 0:
            return
        if any(isinstance(x, _Tensor) and _has_tangent(x) for x in args):
            raise NotImplementedError(
                f"{self.name}: expected tensors without tangents, as it has no forward derivatives, got one with them"
            )


def _has_tangent(x: torch.Tensor) -> bool:
    while torch._C._functorch.is_batchedtensor(x):  # of torch.func.vmap, which cannot look for one
        x = torch._C._functorch.get_unwrapped(x)
    return forward_ad.unpack_dual(x).tangent is not None


def _watched() -> bool:
    """Whether something wants to see operators: a mode, a transform, a tracer, forward derivatives, a profiler."""
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
        or forward_ad._current_level >= 0
        or profiler._is_profiler_enabled
    )


def forward_op(name: str) -> Callable[[Callable], Operator]:
    """Decorates the function that makes an op's empty results: it becomes ``flr::name``, which runs :func:`forward`.

    The annotations of the function are the operator's schema, and the function itself is its fake implementation. The
    backends are called without the arguments that are equal to the function's defaults, and need the same ones.
    """
    return _operator(name, partial(forward, name))


def backward_op(name: str) -> Callable[[Callable], Operator]:
    """As :func:`forward_op`, for ``flr::name_backward``, which runs :func:`backward`."""
    return _operator(f"{name}_backward", partial(backward, name))


def _operator(name: str, run: Callable) -> Callable[[Callable], Operator]:
    def declare(empty_results: Callable) -> Operator:
        schema = torch.library.infer_schema(empty_results, mutates_args=())
        definition = torch.library.custom_op(f"flr::{name}", run, mutates_args=(), schema=schema)
        definition.register_fake(empty_results)
        return Operator(name, definition, run)

    return declare
